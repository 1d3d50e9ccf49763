"""Bulk captioning: what goes in and what comes out, whatever happens while files take their places."""

from __future__ import annotations

import json
import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_folder, png, run, say, settings

from blip2 import storage
from blip2.bulk import BulkError, Inputs, caption_all, outputs, publish
from blip2.bulk.run import Progress
from blip2.bulk.sources import parquet_items

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")


def test_every_source(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = make_folder(tmp_path / "in", 4)
    (folder / "deep").mkdir()
    (folder / "deep" / "x.JPG").write_bytes(png(8))
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(folder / "00001.png", "00001.png")
        archive.add(tmp_path / "in" / "deep" / "x.JPG", "notes.txt")
    (tmp_path / "l.txt").write_text("in/00000.png\nin/00003.png\n")
    (tmp_path / "t.csv").write_text("id,image\n7,in/00002.png\n")
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 3, "file_name": "in/00001.png"}]}))
    pq.write_table(pa.table({"image": [{"bytes": png(5)}]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"path": ["in/00002.png"]}), tmp_path / "p.parquet")

    def listed(*sources: str, **patterns: Any) -> list[tuple[str, bytes]]:
        items = Inputs(sources=[str(tmp_path / source) for source in sources], **patterns)
        return [(os.path.relpath(item.name, tmp_path), item.read()) for item in items]

    images = {
        name: (folder / name).read_bytes() for name in ("00000.png", "00001.png", "00002.png", "00003.png")
    }
    assert [name for name, _ in listed("in")] == [*(f"in/{name}" for name in images), "in/deep/x.JPG"]
    assert [name for name, _ in listed("in", exclude=["deep/*", "*2.png"])] == [
        "in/00000.png", "in/00001.png", "in/00003.png"]  # fmt: skip
    assert [name for name, _ in listed("in", include=["*.JPG"])] == ["in/deep/x.JPG"]
    assert listed("s.tar", "l.txt", "t.csv", "c.json", "b.parquet", "p.parquet") == [
        ("s.tar/00001.png", images["00001.png"]),
        ("in/00000.png", images["00000.png"]),
        ("in/00003.png", images["00003.png"]),
        ("in/00002.png", images["00002.png"]),
        ("in/00001.png", images["00001.png"]),
        ("b.parquet#1", png(5)),
        ("in/00002.png", images["00002.png"]),
    ]
    for name, content in (
        ("x.tar.gz", "a"),
        ("x.csv", "a,b\n1,2\n"),
        ("x.json", "{"),
        ("x.parquet", "no"),
        ("x.tar", "no"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(BulkError, match=name):
            listed(name)


def test_what_cannot_be_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "deep.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("gone.png\ndeep.png\na\0b.png\npipe.png\n")
    rows = run(tmp_path / "list.txt", tmp_path / "o.jsonl")
    assert [row["error"].removeprefix(f"{tmp_path}/") for row in rows] == [
        "gone.png: no such file",
        "deep.png: no such file (a folder?)",
        "a\0b.png: no such file",
        "pipe.png: no regular file",
    ]
    assert [json.loads(line) for line in (tmp_path / ".o.jsonl.blip2" / "errors.jsonl").open()] == rows


def test_shards_are_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_folder(tmp_path / "in", 10))
    names = sorted(os.listdir())
    parts = [[item.name for item in Inputs(sources=names, shard=f"{i}/3")] for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == names
    assert [item.name for item in Inputs(sources=names, limit=5, shard="2/2")] == [names[1], names[3]]
    for wrong in ("0/3", "4/3", "x"):
        with pytest.raises(ValueError, match="--shard"):
            Inputs(sources=names, shard=wrong)


@pytest.mark.parametrize("kind", ["csv", "parquet", "coco", "webdataset"])
def test_files(kind: str, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 10), tmp_path / "out.x"
    rows = run(folder, tmp_path / "o.jsonl")
    caption_all(Inputs(sources=[str(folder)]), settings(out, kind=kind), say)
    if kind == "csv":
        import csv

        table = list(csv.DictReader(out.open()))
        assert [row["caption"] for row in table[:9]] == [row["caption"] for row in rows[:9]]
        assert "damaged" in table[9]["error"] or table[9]["error"]
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(out).to_pylist()
        assert [row["caption"] for row in table] == [row.get("caption") for row in rows]
    elif kind == "coco":
        assert json.loads(out.read_text()) == [
            {"image_id": row["image"], "caption": row["caption"]} for row in rows[:9]
        ]
    else:
        with tarfile.open(tmp_path / "out-000000.tar") as archive:
            assert len(archive.getnames()) == 27
            assert archive.extractfile("000000000.png").read() == png(0)  # type: ignore[union-attr]
            assert archive.extractfile("000000003.txt").read().decode() == rows[3]["caption"]  # type: ignore[union-attr]


def test_coco_knows_its_images_by_their_numbers(tmp_path: Path) -> None:
    names = ["COCO_val2014_000000000042.png", "000000000139.png", "x12.png", "a.png"]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(png(i))
    (tmp_path / "t.csv").write_text("id,image\n07,a.png\n")
    out = tmp_path / "out.json"
    sources = [*(str(tmp_path / name) for name in names[:3]), str(tmp_path / "t.csv")]
    caption_all(Inputs(sources=sources), settings(out, kind="coco"), say)
    assert [row["image_id"] for row in json.loads(out.read_text())] == [42, 139, sources[2], 7]


def test_what_prevents_an_output_is_reported_at_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for out, requested in (("x.parquet", None), ("x", "parquet")):
        with pytest.raises(BulkError, match=r"pip install 'blip2\[bulk\]'"):
            outputs.format_of(Path(out), requested)
    assert outputs.format_of(Path("x.parquet"), "csv") == "csv"
    (tmp_path / "x.jsonl").mkdir()
    with pytest.raises(BulkError, match="there is a folder of this name"):
        outputs.format_of(tmp_path / "x.jsonl", None)
    assert outputs.format_of(tmp_path / "x.jsonl", "txt") == "txt"
    with pytest.raises(BulkError, match=r"what format is \.xyz"):
        outputs.format_of(Path("x.xyz"), None)


@pytest.mark.parametrize(
    ("existing", "expected"),
    [("skip", "old"), ("overwrite", "{}"), ("append", "old {}"), ("prepend", "{} old")],
)
def test_text_files_beside_the_images(existing: str, expected: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", 3)
    rows = run(folder, tmp_path / "o.jsonl")
    (folder / "00001.txt").write_text("old\n")
    for _ in range(1 if existing == "overwrite" else 2):  # a second run adds nothing
        done = caption_all(
            Inputs(sources=[str(folder)]), settings(folder, kind="txt", existing=existing), say
        )
        assert done.failed == 0
        texts = [(folder / f"0000{i}.txt").read_text() for i in range(3)]
        caption = expected.format(rows[1]["caption"])
        assert texts == [rows[0]["caption"] + "\n", caption + "\n", rows[2]["caption"] + "\n"]


def test_text_files_in_a_mirror_folder(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 2), tmp_path / "texts"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.JPG").write_bytes(png(8))
    other = make_folder(tmp_path / "other", 1)
    items = [*Inputs(sources=[str(folder)]), *Inputs(sources=[str(other / "00000.png")])]
    caption_all([item._replace(root=str(tmp_path)) for item in items], settings(out, kind="txt"), say)
    paths = sorted(str(path.relative_to(out)) for path in out.rglob("*.txt"))
    assert paths == ["in/00000.txt", "in/00001.txt", "in/deep/er/x.txt", "other/00000.txt"]
    texts = {row["image"]: row["caption"] for row in run(folder, tmp_path / "o.jsonl")}
    for name in ("00000.png", "deep/er/x.JPG"):
        beside = (out / "in" / name).with_suffix(".txt")
        assert beside.read_text() == texts[str(folder / name)] + "\n"
    assert not [*folder.rglob("*.txt")]


def test_text_files_appear_as_captions_are_done(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "in", 9)
    texts = {Path(row["image"]).stem: row.get("caption") for row in run(folder, tmp_path / "o.jsonl")}

    def stop(progress: Progress) -> None:
        written = {path.stem: path.read_text().strip() for path in folder.glob("*.txt")}
        assert written == {name: texts[name] for name in list(texts)[: progress.done]}
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caption_all(Inputs(sources=[str(folder)]), settings(folder, kind="txt"), say, progress=stop)
    (folder / "00002.txt").unlink()  # as where it was killed before this file was written
    caption_all(Inputs(sources=[str(folder)]), settings(folder, kind="txt"), say)
    assert {path.stem: path.read_text().strip() for path in folder.glob("*.txt")} == texts
    (folder / "00002.txt").write_text("better")  # once all is done, what was written is the user's
    (folder / "00009.png").write_bytes(png(9))
    assert caption_all(Inputs(sources=[str(folder)]), settings(folder, kind="txt"), say).done == 1
    assert (folder / "00002.txt").read_text() == "better"


def test_every_image_has_a_text_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    z = "z" * 251  # a name as long as may be
    names = ["a/x.jpg", "a/x.png", "a/y..png", "b/x.jpg", "b/deep/x.jpg", f"c/{z}.png"]
    for i, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(png(i))
    with tarfile.open("s.tar", "w") as archive:
        archive.add("a/x.jpg", "deep/x.jpg")
    pq.write_table(pa.table({"bytes": [png(10), png(11)]}), "t.parquet")

    def texts(out: str, *sources: str) -> list[str]:
        failed: list[int] = []
        caption_all(
            Inputs(sources=sources),
            settings(Path(out), kind="txt"),
            say,
            progress=lambda progress: failed.append(progress.failed),
        )
        return [str(failed[-1]), *sorted(str(path) for path in Path(out).rglob("*.txt"))]

    mirror = ["o/a/x.txt", "o/a/y..txt", "o/b/deep/x.txt", "o/b/x.txt", "o/s/deep/x.txt"]
    assert texts("o", "a", "b", "s.tar", "t.parquet") == [
        "1", *mirror, "o/t.parquet#1.txt", "o/t.parquet#2.txt"]  # fmt: skip
    refused = json.loads(Path("o/.blip2/errors.jsonl").read_text())
    assert refused["error"].startswith("a/x.png: a/x.txt is the text file of another image")
    assert texts("p", f"c/{z}.png", "a/../c/../b") == ["0", "p/b/deep/x.txt", "p/b/x.txt", f"p/{z}.txt"]
    assert {*texts(".", "b/x.jpg", "c")} >= {"b/x.txt", f"c/{z}.txt"}
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("q/b"))
    Path("q/b").mkdir(parents=True)
    assert texts("q", "a/x.jpg", "b") == ["1", "q/b/deep/x.txt", "q/x.txt"]


@pytest.mark.parametrize("batch_size", [2, 4, 9])
def test_shards_appear_as_they_are_full(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "SHARD_SIZE", 3)
    folder = make_folder(tmp_path / "in", 22)  # two of them are damaged: seven shards, the last of two images

    def shards(out: Path) -> list[bytes]:
        return [path.read_bytes() for path in sorted(out.parent.glob(f"{out.stem}-*.tar"))]

    def go(out: Path, **more: Any) -> None:
        caption_all(
            Inputs(sources=[str(folder)]),
            settings(out, kind="webdataset", parallel_batches=1, batch_size=batch_size),
            say,
            **more,
        )

    (tmp_path / "s").mkdir()
    go(tmp_path / "s" / "out.tar")
    expected = shards(tmp_path / "s" / "out.tar")
    assert len(expected) == 7
    for after in (1, 5, 10, 15, 19):
        out = tmp_path / str(after) / "out.tar"
        out.parent.mkdir()

        def stop(progress: Progress, out: Path = out, after: int = after) -> None:
            assert shards(out) == expected[: (progress.done - progress.failed) // 3]
            if progress.done >= after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            go(out, progress=stop)
        if len(shards_written := sorted(out.parent.glob("*.tar"))) > 1:
            shards_written[0].unlink()  # one that was lost is made again
        go(out)
        assert shards(out) == expected
    first = min(out.parent.glob("*.tar"))
    first.write_bytes(b"mine now")  # new images change none of the full shards
    (folder / "more.png").write_bytes(png(77))
    go(out)
    assert first.read_bytes() == b"mine now" and shards(out)[1:6] == expected[1:6]
    with tarfile.open(sorted(out.parent.glob("*.tar"))[-1]) as archive:
        assert len(archive.getnames()) == 9


def test_shards_of_images_within_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(publish, "SHARD_SIZE", 3)
    contents = [png(i) for i in range(10)]
    contents[4] = b"no image"
    table = pa.table({"image": [{"bytes": content, "path": None} for content in contents]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    folder, out = make_folder(tmp_path / "in", 2), tmp_path / "out.tar"
    items = Inputs(sources=[str(tmp_path / "t.parquet"), str(folder)])
    caption_all(items, settings(out, kind="webdataset"), say)
    images: list[bytes] = []
    for path in sorted(tmp_path.glob("out-*.tar")):
        with tarfile.open(path) as archive:
            names = [name for name in archive.getnames() if name.endswith(".png")]
            images += [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    assert images == contents[:4] + contents[5:] + [png(0), png(1)]
    assert [item.content for item in parquet_items(str(tmp_path / "t.parquet"), 7)] == contents[6:]


def test_a_shard_holds_the_images_that_were_captioned(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "in", 5), tmp_path / "out.tar"
    image = folder / "00002.png"
    content = image.read_bytes()

    def go(meanwhile: Callable[[], Any] = lambda: None) -> None:
        def show(progress: Progress) -> None:
            if progress.done == 5:
                meanwhile()

        caption_all(Inputs(sources=[str(folder)]), settings(out, kind="webdataset"), say, progress=show)

    with pytest.raises(BulkError, match=r"00002.png has changed since it was captioned, and its shard"):
        go(lambda: image.write_bytes(png(9)))
    image.unlink()
    with pytest.raises(BulkError, match=r"00002.png: no such file, and its shard is still to be written"):
        go()
    assert not [*tmp_path.glob("*.tar")]
    for new in (content, png(8)):  # another image under its name is captioned too
        image.write_bytes(new)
        go()
        with tarfile.open(tmp_path / "out-000000.tar") as archive:
            assert archive.extractfile("000000002.png").read() == new  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "webdataset"])
def test_kills_during_publishing_change_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after each file takes its place, and with half a file written beside it."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(publish, "SHARD_SIZE", 3)
    folder = make_folder(tmp_path / "in", 8)
    name = "texts" if kind == "txt" else "out.x"

    def go(place: Path) -> None:
        (place / "texts" / "in").mkdir(parents=True, exist_ok=True)
        for i in (0, 1) if not (place / "begun").exists() else ():
            (place / "texts" / "in" / f"{i:05}.txt").write_text("old")
        (place / "begun").touch()
        items = [item._replace(root=str(tmp_path)) for item in Inputs(sources=[str(folder)])]
        caption_all(items, settings(place / name, kind=kind, existing="append"), say)

    def files(place: Path) -> dict[str, bytes]:
        paths = [path for path in place.rglob("*") if path.is_file() and ".blip2" not in str(path)]
        return {str(path.relative_to(place)): path.read_bytes() for path in paths}

    go(tmp_path / "straight")
    expected = files(tmp_path / "straight")
    count = {"txt": 8, "webdataset": 3}.get(kind, 1)
    for kill in range(2 * count + 1):
        place = tmp_path / f"killed{kill}"
        child = os.fork()
        if child == 0:
            _kill_at(kill, half=kill == 2 * count)
            go(place)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert files(place) != expected or kill == 2 * count - 1
        go(place)
        assert files(place) == expected


def _kill_at(place: int, *, half: bool) -> None:
    """End this process before (even places) or after (odd ones) a file is renamed, or with half of it written."""
    rename, done = os.replace, [0]

    def replace(old: Any, new: Any) -> None:
        if half:
            os.truncate(old, os.path.getsize(old) // 2)
        if half or done[0] == place:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)
        if done[0] + 1 == place:
            os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 2

    storage.os.replace = replace  # type: ignore[attr-defined]
