"""What is done is there, and what users do to their files is never lost: for every form of output."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sqlite3
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import png, say, settings

from blip2 import storage
from blip2.bulk import BulkError, ImageItem, Inputs, caption_all, publish
from blip2.bulk.database import Database, Row
from blip2.bulk.listing import work_items
from blip2.bulk.run import Progress
from blip2.storage import OutputError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and kills")
KINDS = ["jsonl", "csv", "parquet", "coco", "webdataset", "txt"]
TABLES = ["jsonl", "csv"]  # whose edits are taken over
NAMES = {"jsonl": "o.jsonl", "csv": "o.csv", "parquet": "o.parquet", "coco": "o.json", "webdataset": "o.tar"}


class Bench:
    """A folder of five images, the last one damaged, and runs over it into an output of some kind."""

    def __init__(self, place: Path, kind: str) -> None:
        if kind == "parquet":
            pytest.importorskip("pyarrow")
        self.place, self.kind, self.folder = place, kind, place / "in"
        self.folder.mkdir(parents=True)
        for i in range(4):
            (self.folder / f"{i}.png").write_bytes(png(i))
        (self.folder / "4.png").write_bytes(b"\x89PNG damaged")
        self.out = self.folder if kind == "txt" else place / NAMES[kind]
        self.described = 0

    def go(self, *, meanwhile: Callable[[], Any] = lambda: None, **changes: Any) -> Progress:
        """A run; meanwhile: done once, when the first batch has been recorded."""
        waiting = [meanwhile]

        def describe(images: Sequence[Image.Image]) -> list[list[Row]]:
            self.described += len(images)
            return say(images)

        def show(progress: Progress) -> None:
            if progress.done and waiting:
                waiting.pop()()

        self.described = 0
        options = settings(self.out, kind=self.kind, parallel_batches=1, **changes)
        return caption_all(Inputs(sources=[str(self.folder)]), options, describe, progress=show)

    def files(self) -> dict[str, bytes]:
        """What was published."""
        paths = [path for path in self.place.rglob("*") if path.is_file() and path.suffix != ".png"]
        return {path.name: path.read_bytes() for path in paths if ".blip2" not in str(path)}

    def paths(self) -> list[Path]:
        return sorted(next(self.place.rglob(name)) for name in self.files())

    def texts(self) -> dict[str, str]:
        """Of each image its text."""
        if self.kind == "txt":
            return {f"{path.stem}.png": path.read_text()[:-1] for path in self.folder.glob("*.txt")}
        if self.kind == "webdataset":
            rows = []
            with tarfile.open(self.place / "o-000000.tar") as archive:
                for member in archive:
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    rows += [json.loads(content)] if member.name.endswith("json") else []
            return {Path(row["image"]).name: row["texts"][0]["caption"] for row in rows}
        rows = read(self.out, self.kind)
        return {
            Path(row.get("image", row.get("image_id"))).name: row["caption"]
            for row in rows
            if row.get("caption")
        }


def read(path: Path, kind: str) -> list[Row]:
    if kind == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if kind == "csv":
        return list(csv.DictReader(io.StringIO(path.read_text())))
    if kind == "coco":
        return list(json.loads(path.read_text()))
    return list(pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist())


def write(path: Path, kind: str, rows: list[Row], form: tuple[str, str] = ("utf-8", "\n")) -> None:
    """A table as a user's program writes it."""
    encoding, newline = form
    with path.open("w", encoding=encoding, newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + newline for row in rows)
        else:
            columns = list({name: None for row in rows for name in row})
            table = csv.DictWriter(file, columns, lineterminator=newline, quoting=csv.QUOTE_ALL)
            table.writeheader()
            table.writerows(rows)


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param)


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param)


# --- done means there ---


def test_a_second_run_changes_nothing(bench: Bench) -> None:
    first = bench.go()
    assert (first.captioned, first.failed, first.done) == (4, 1, 5)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in bench.paths()}
    second = bench.go()
    assert bench.described == 0 and (second.captioned, second.failed, second.before) == (0, 1, 5)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in bench.paths()} == before


@pytest.mark.parametrize("content", [None, b"", b"\n \r\n", b"\xef\xbb\xbf\n", b"\xff\xfe\n\x00"])
def test_what_is_gone_or_empty_is_made_again_without_the_model(bench: Bench, content: bytes | None) -> None:
    bench.go()
    files = bench.files()
    lost = bench.paths()[0]
    lost.unlink() if content is None else lost.write_bytes(content)
    done = bench.go()
    assert bench.files() == files and bench.described == 0 and (done.again, done.edited) == (1, 0)


def test_what_failed_is_tried_again_and_what_changed_captioned_again(bench: Bench) -> None:
    bench.go()
    texts = bench.texts()
    (bench.folder / "4.png").write_bytes(png(4))
    (bench.folder / "1.png").write_bytes(png(11))
    os.utime(bench.folder / "2.png", ns=(5, 5))  # touched, and no other
    (bench.folder / "3.png").unlink()  # gone: what is known of it stays
    done = bench.go()
    assert (done.captioned, done.failed, bench.described) == (2, 0, 2)
    new = bench.texts()
    assert {name: text for name, text in new.items() if name not in ("1.png", "4.png")} == {
        name: text for name, text in texts.items() if name != "1.png"
    }
    assert new["1.png"] != texts["1.png"] and new["4.png"]
    assert bench.go().done == 0
    (bench.folder / "1.png").write_bytes(b"no image any more")
    assert bench.go().failed == 1 and bench.described == 0


def test_other_prefixes_and_suffixes_are_published_without_the_model(bench: Bench) -> None:
    bench.go()
    texts, files = bench.texts(), bench.files()
    bench.go(prefix="a \udce9'", suffix=', "z"')
    around = 'a \\udce9\'{}, "z"' if bench.kind in ("csv", "parquet", "txt") else 'a \udce9\'{}, "z"'
    assert bench.described == 0
    assert bench.texts() == {name: around.format(text) for name, text in texts.items()}
    bench.go()
    assert bench.described == 0 and bench.files() == files


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_text_that_is_empty_is_there(bench: Bench, text: str) -> None:
    def describe(images: Sequence[Image.Image]) -> list[list[Row]]:
        return [[{"caption": text}] for _ in images]

    inputs, options = Inputs(sources=[str(bench.folder)]), settings(bench.out, kind=bench.kind)
    assert caption_all(inputs, options, describe).captioned == 4
    before = {path: path.stat().st_mtime_ns for path in bench.paths()}
    done = caption_all(inputs, options, describe)
    assert (done.captioned, done.again, done.edited) == (0, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in bench.paths()} == before


HERE = ["in", "./in", "in/../in", "{}/in", "in/*.png"]
WITHIN = [".", "*.png", "../in", "{}/in", "./"]


@pytest.mark.parametrize("first", ["in", "./in", "{}/in", "in/*.png"])
def test_an_image_is_one_input_however_a_run_names_it(
    bench: Bench, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(source: str, out: Path) -> Progress:
        inputs = Inputs(sources=[source.format(place)])
        return caption_all(inputs, settings(out, kind=bench.kind, parallel_batches=1), say)

    place, name = bench.place, os.path.relpath(bench.out, bench.place)
    monkeypatch.chdir(place)
    assert go(first, Path(name)).captioned == 4
    before = bench.files()
    for number, source in enumerate([*HERE, *WITHIN]):
        if source == WITHIN[0]:
            monkeypatch.chdir(bench.folder)
        out = Path(os.path.relpath(bench.out)) if number % 2 else bench.out
        done = go(source, out)
        assert (done.captioned, done.again, done.edited, done.existing) == (
            0,
            0,
            0,
            0,
        ) and bench.files() == before
    (bench.folder / "0.png").write_bytes(png(9))
    (bench.folder / "new.png").write_bytes(png(10))
    for _ in range(2):
        done = go(".", bench.out)
        assert (done.before, done.failed) == (5, 1) or done.before == 6
    assert len(bench.texts()) == 5 and bench.files() != before


def test_folders_that_are_called_the_same_are_not_taken_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(place: Path) -> Progress:
        monkeypatch.chdir(place)
        return caption_all(Inputs(sources=["in"]), settings(place.parent / "o.jsonl"), say)

    all_of_it = tmp_path / "all"
    for number, name in enumerate(("a", "b", "c")):
        (all_of_it / name / "in").mkdir(parents=True)
        (all_of_it / name / "in" / "0.png").write_bytes(png(number))
        done = go(all_of_it / name)
        assert (done.captioned, done.before) == (1, number)
    all_of_it.rename(tmp_path / "moved")
    assert go(tmp_path / "moved" / "a").done == 0  # names are from where they were


# --- what users edit ---


def test_rows_that_were_edited_removed_and_added_stay_so(table: Bench) -> None:
    table.go()
    rows = read(table.out, table.kind)
    rows[0]["caption"] = 'mine, "quoted"\u2028 and\n two lines'
    del rows[2]
    rows += [
        {**rows[0], "caption": "a second one"},
        {**rows[0], "image": "elsewhere.jpg", "caption": "unknown"},
    ]
    write(table.out, table.kind, rows)
    content = table.out.read_bytes()
    for _ in range(2):
        done = table.go()
        assert table.out.read_bytes() == content
        assert (done.edited, done.added, done.removed, done.captioned) == (1, 2, 1, 0)
    (table.folder / "5.png").write_bytes(png(5))
    done = table.go(prefix="now ")
    assert (done.edited, done.added, done.removed, done.captioned) == (1, 2, 1, 1)
    new = read(table.out, table.kind)
    ours = [row for row in new if row["caption" if "caption" in row else "error"].startswith("now ")]
    assert [Path(row["image"]).name for row in ours] == ["1.png", "3.png", "5.png"]
    theirs = [row for row in new if row not in ours and not row.get("error")]
    assert sorted(json.dumps(row) for row in theirs) == sorted(
        json.dumps(row) for row in [rows[0], *rows[-2:]]
    )
    files = table.files()
    table.out.unlink()
    table.go(prefix="now ")
    assert table.files() == files  # edits too, and nothing that was removed


@pytest.mark.parametrize("form", [("utf-8-sig", "\r\n"), ("utf-16", "\n"), ("utf-8", "\r\n")])
def test_a_table_keeps_the_form_a_user_gave_it(table: Bench, form: tuple[str, str]) -> None:
    table.go()
    rows = [row | {"note": "good" if i == 1 else ""} for i, row in enumerate(read(table.out, table.kind))]
    for row in rows:
        del row["hash" if "hash" in row else "error"]
    write(table.out, table.kind, rows, form)
    (table.folder / "5.png").write_bytes(png(5))
    table.go()
    content = table.out.read_bytes()
    text = content.decode(form[0])
    assert content.startswith("".encode(form[0])) and text.count("\r") == text.count("\n") * (
        form[1] == "\r\n"
    )
    table.out.write_text(text.replace("\r\n", "\n"))
    new = read(table.out, table.kind)
    assert new[: len(rows)] == rows and new[-1]["image"].endswith("5.png")
    if table.kind == "csv":
        assert [*new[-1]] == [*rows[0]]


@pytest.mark.parametrize("digits", [15, 10, 7])
def test_saving_a_table_in_another_program_is_no_edit(table: Bench, digits: int) -> None:
    table.go()
    rows = read(table.out, table.kind)
    for row in rows:
        if row.get("score"):
            row["score"] = (
                f"{float(row['score']) + 0.0:.{digits}g}"
                if table.kind == "csv"
                else round(row["score"] * 1.0, digits)
            )
        row |= {"question": None, "error": row.get("error")} if table.kind == "jsonl" else {}
    write(table.out, table.kind, [*reversed(rows)], ("utf-8-sig", "\r\n"))
    done = table.go()
    assert (done.edited, done.added, done.removed) == (0, 0, 0)
    assert table.go(prefix="a ").captioned == 0
    table.out.write_text(table.out.read_text("utf-8-sig"))
    assert all(text.startswith("a ") for text in table.texts().values())


def test_of_equal_rows_the_right_one_is_taken_for_removed(table: Bench) -> None:
    def three(images: Sequence[Image.Image]) -> list[list[Row]]:
        return [
            [{"question": q, "answer": a} for q, a in (("x", "1"), ("x", "2"), ("y", "1"))] for _ in images
        ]

    inputs, options = Inputs(sources=[str(table.folder)]), settings(table.out, kind=table.kind)
    caption_all(inputs, options, three)
    rows = read(table.out, table.kind)
    write(table.out, table.kind, [*reversed(rows[1:4]), {**rows[4], "answer": "mine"}, *rows[5:-1]])
    done = caption_all(inputs, options, three)
    assert (done.edited, done.added, done.removed) == (1, 0, 2)  # and the error's row
    (table.folder / "4.png").write_bytes(png(4))  # what is no error any more was not removed
    assert caption_all(inputs, options, three).removed == 1
    answers = [row["answer"] for row in read(table.out, table.kind)]
    assert answers == ["2", "1", "1", "mine", "1", *"121" * 3]


BROKEN = {
    "jsonl": '{"image": "a", "caption": "x"\n',
    "csv": 'image,caption\na,"open\n',
    "coco": '[{"image_id": 1, "caption": "mine"}]',
    "parquet": "mine",
    "webdataset": "mine",
}


@pytest.mark.parametrize("bench", BROKEN, indirect=True)
def test_what_cannot_be_taken_over_stops_the_run_only_where_it_is_to_be_written(bench: Bench) -> None:
    bench.go()
    (path,) = bench.paths()
    path.write_text(BROKEN[bench.kind])
    done = bench.go()
    assert path.read_text() == BROKEN[bench.kind] and (done.edited or path.name in done.note)
    (bench.folder / "5.png").write_bytes(png(5))
    for changes in ({}, {"prefix": "a "}):
        with pytest.raises(BulkError, match=r"was changed since it was written.*--existing overwrite"):
            bench.go(**changes)
        assert path.read_text() == BROKEN[bench.kind]
    bench.go(existing="overwrite")
    assert path.with_name(path.name + ".bak").read_text() == BROKEN[bench.kind]
    assert "5.png" in bench.texts()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("field", ["image", "question", "caption", "answer"])
def test_a_table_without_a_column_of_its_texts_stops_the_run(tmp_path: Path, field: str, asked: bool) -> None:
    def describe(images: Sequence[Image.Image]) -> list[list[Row]]:
        return [[{"question": "what?", "answer": "a"} if asked else {"caption": "a"}] for _ in images]

    bench = Bench(tmp_path, "csv")
    inputs, options = Inputs(sources=[str(bench.folder)]), settings(bench.out, kind="csv")
    caption_all(inputs, options, describe)
    write(bench.out, "csv", [{k: v for k, v in row.items() if k != field} for row in read(bench.out, "csv")])
    content = bench.out.read_bytes()
    if field in (("image", "question", "answer") if asked else ("image", "caption")):
        with pytest.raises(BulkError, match=f"expected the columns image.*; {field} is missing"):
            caption_all(inputs, settings(bench.out, kind="csv", prefix="a "), describe)
        assert bench.out.read_bytes() == content
    else:
        assert caption_all(inputs, options, describe).edited == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: ["[", *lines, "]"],
        lambda lines: ["[" + ",".join(lines) + "]"],
        lambda lines: [*lines, "7"],
        lambda lines: [lines[0].replace('"image"', '"file"'), *lines[1:]],
        lambda lines: [json.dumps(json.loads(line), indent=1) for line in lines],
        lambda lines: [lines[0].replace('"image": "', '"image": null, "x": "'), *lines[1:]],
    ],
)
def test_jsonl_of_anything_but_rows_stops_the_run(
    tmp_path: Path, change: Callable[[list[str]], list[str]]
) -> None:
    bench = Bench(tmp_path, "jsonl")
    bench.go()
    bench.out.write_text("\n".join(change(bench.out.read_text().splitlines())))
    content = bench.out.read_bytes()
    with pytest.raises(BulkError, match=r"cannot be read any more \(.*, line \d"):
        bench.go(prefix="a ")
    assert bench.out.read_bytes() == content


def test_overwrite_replaces_edits_and_keeps_one_copy(bench: Bench) -> None:
    bench.go()
    files = bench.files()
    path = bench.paths()[0]
    for i in range(2):
        if bench.kind in TABLES:
            write(path, bench.kind, [row | {"caption": f"mine {i}"} for row in read(path, bench.kind)])
        else:
            path.write_bytes(b"mine %d" % i)
        edited = path.read_bytes()
        done = bench.go(existing="overwrite")
        assert bench.described == 4 and done.replaced == (5 if bench.kind in TABLES else 1)
        assert bench.files() == files | {path.name + ".bak": edited}
    assert bench.go(existing="overwrite").replaced == 0
    # Edits that were taken over before are replaced too.
    if bench.kind in TABLES:
        write(path, bench.kind, [row | {"caption": "mine"} for row in read(path, bench.kind)])
        (bench.folder / "5.png").write_bytes(png(5))
        bench.go()
        edited = path.read_bytes()
        assert bench.go(existing="overwrite").replaced == 5
        assert bench.files()[path.name + ".bak"] == edited and b"mine" not in path.read_bytes()


def test_a_copy_of_the_users_own_is_not_replaced(bench: Bench) -> None:
    bench.go()
    path = bench.paths()[0]
    path.write_bytes(b"mine")
    backup = path.with_name(path.name + ".bak")
    backup.write_bytes(b"mine too")
    with pytest.raises(BulkError, match=r"\.bak is in the way.*move it"):
        bench.go(existing="overwrite")
    assert (path.read_bytes(), backup.read_bytes()) == (b"mine", b"mine too")
    backup.unlink()
    bench.go(existing="overwrite")
    assert backup.read_bytes() == b"mine"


def test_a_file_that_no_run_has_written_is_kept(bench: Bench) -> None:
    path = {"txt": bench.folder / "0.txt", "webdataset": bench.place / "o-000000.tar"}.get(
        bench.kind, bench.out
    )
    path.write_bytes(b"mine")
    done = bench.go()
    assert len(bench.texts()) == 4
    if bench.kind == "txt":
        assert path.read_bytes() == b"mine" and done.existing == 1
        assert bench.go().existing == 1 and bench.described == 0
        path.write_text(" \n")  # no caption
        assert (bench.go().captioned, bench.described) == (1, 1)
    else:
        assert path.with_name(path.name + ".bak").read_bytes() == b"mine" and done.foreign == 1


def test_an_edit_while_the_run_goes_on_is_kept(bench: Bench) -> None:
    bench.go()
    for i in range(5, 9):
        (bench.folder / f"{i}.png").write_bytes(png(i))
    path = bench.paths()[0]

    def edit() -> None:
        if bench.kind in TABLES:
            write(path, bench.kind, [row | {"caption": "mine"} for row in read(path, bench.kind)])
        else:
            path.write_bytes(b"mine")

    if bench.kind in ("parquet", "coco", "webdataset"):
        with pytest.raises(BulkError, match="was changed since it was written"):
            bench.go(meanwhile=edit)
        assert path.read_bytes() == b"mine"
    else:
        done = bench.go(meanwhile=edit)
        assert bench.texts()["0.png"] == "mine" if bench.kind in TABLES else path.read_bytes() == b"mine"
        assert len(bench.texts()) == 8 + (bench.kind in TABLES) and done.captioned == 4


@pytest.mark.parametrize("moment", ["before it is looked at", "before it takes its place"])
def test_an_edit_in_the_last_moment_is_kept(
    table: Bench, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.go()
    (table.folder / "5.png").write_bytes(png(5))
    original = publish.replace_file
    waiting = [1]

    @contextmanager
    def edited(path: Path, **more: Any) -> Iterator[Path]:
        with original(path, **more) as beside:
            if waiting and path == table.out:
                waiting.pop()
                rows = read(table.out, table.kind)
                write(table.out, table.kind, [rows[0] | {"caption": "mine"}, *rows[2:]])
            yield beside

    def look(path: Path) -> Any:
        if waiting and path == table.out and moment.endswith("at"):
            with edited(tmp := table.place / "other"):
                pass
            tmp.unlink(missing_ok=True)
        return stamp(path)

    stamp = publish.stamp_of
    monkeypatch.setattr(publish, "replace_file", edited)
    done = table.go()
    assert (done.edited, done.removed) == (1, 1) and not waiting
    texts = table.texts()
    assert texts["0.png"] == "mine" and "1.png" not in texts and "5.png" in texts


# --- text files ---


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp"])
def test_an_image_that_was_saved_anew_keeps_its_text_file(tmp_path: Path, suffix: str) -> None:
    bench = Bench(tmp_path, "txt")
    bench.go()
    text = (bench.folder / "0.txt").read_bytes()
    (bench.folder / "0.png").rename(bench.folder / f"0{suffix}")
    done = bench.go()
    assert (done.existing, done.captioned, done.failed) == (1, 0, 1)
    (bench.folder / "1.gif").write_bytes(png(7))  # beside the other one, which is still there
    assert bench.go().failed == 2 and (bench.folder / "0.txt").read_bytes() == text
    (bench.folder / "0.txt").unlink()
    assert bench.go().captioned == 1 and (bench.folder / "0.txt").read_bytes() == text


@pytest.mark.parametrize("existing", ["append", "prepend"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_text_file_is_added_to_once(tmp_path: Path, existing: str, encoding: str) -> None:
    bench = Bench(tmp_path, "txt")
    path = bench.folder / "0.txt"
    path.write_bytes("old é\r\n".encode(encoding))

    def go(suffix: str = "") -> str:
        bench.go(existing=existing, suffix=suffix)
        return path.read_bytes().decode(encoding)

    first = go()
    caption = first.replace("old é", "").strip()
    assert first == (f"old é {caption}\r\n" if existing == "append" else f"{caption} old é\r\n")
    assert go() == first
    longer = first.replace(caption, f"{caption}!")
    assert go("!") == longer and bench.described == 0  # not added a second time
    path.unlink()
    assert go("!") == longer
    path.write_bytes("mine\r\n".encode(encoding))
    for suffix in ("!", "?"):
        assert go(suffix) == "mine\r\n"
    assert (bench.folder / "1.txt").read_text().endswith("?\n")


# --- where nothing can be written ---


def _nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def _folder(path: Path) -> None:
    path.with_name("a folder").mkdir()
    path.symlink_to(path.with_name("a folder"))


def _circle(path: Path) -> None:
    path.symlink_to(path)


PLACES: dict[str, Callable[[Path], None]] = {
    "nothing": _nothing, "folder": _folder, "circle": _circle, "fifo": os.mkfifo,
    "link to fifo": lambda path: (os.mkfifo(path.with_name("f")), path.symlink_to(path.with_name("f")))[1],
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file_is_refused(bench: Bench, place: str) -> None:
    path = {"txt": bench.folder / "0.txt", "webdataset": bench.place / "o-000000.tar"}.get(
        bench.kind, bench.out
    )
    PLACES[place](path)
    before = path.lstat()
    if bench.kind == "txt":
        done = bench.go()
        assert (done.failed, done.captioned) == (2, 3)
        assert (
            "0.txt"
            in json.loads((bench.folder / ".blip2" / "errors.jsonl").read_text().splitlines()[0])["error"]
        )
    else:
        with pytest.raises((OutputError, BulkError), match=r"a link|no regular file"):
            bench.go()
        assert bench.described == 0 or bench.kind == "webdataset"
    after = path.lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("mode", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_devices_are_refused(bench: Bench, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat

    def pretend(self: Path, **more: Any) -> os.stat_result:
        status = real(self, **more)
        device = self.name in ("o.jsonl", "o.csv", "o.parquet", "o.json", "o.tar")
        return os.stat_result((mode, *tuple(status)[1:])) if device else status

    if bench.kind == "txt":
        bench.out = bench.place / "o.tar"
    bench.place.joinpath(NAMES.get(bench.kind, "o.tar")).touch()
    monkeypatch.setattr(Path, "stat", pretend)
    with pytest.raises((OutputError, BulkError), match=r"no regular file|this is none"):
        bench.go()
    assert not [*bench.place.glob(".o*")] and bench.described == 0


def test_of_a_link_to_a_file_the_target_is_replaced(bench: Bench) -> None:
    path = {"txt": bench.folder / "0.txt", "webdataset": bench.place / "o-000000.tar"}.get(
        bench.kind, bench.out
    )
    target = bench.place / "deep" / "target"
    target.parent.mkdir()
    target.touch(0o640)
    path.symlink_to(os.path.relpath(target, path.parent))
    bench.go()
    assert path.is_symlink() and target.read_bytes() and len(bench.texts()) == 4
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert bench.go().done <= 1 and not [*target.parent.glob(".*")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_an_earlier_version_is_refused_and_not_touched(tmp_path: Path, kind: str) -> None:
    bench = Bench(tmp_path, kind)
    state = bench.out / ".blip2" if kind == "txt" else bench.place / f".{bench.out.name}.blip2"
    state.mkdir()
    (state / "journal").write_text("00000000 {}\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(BulkError, match=r"earlier version.*--out"):
        bench.go()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("damage", [b"no database at all" * 99, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_damaged_database_is_refused_in_words(table: Bench, damage: bytes) -> None:
    table.go()
    before = table.files()
    (table.place / f".{table.out.name}.blip2" / "state.sqlite").write_bytes(damage)
    with pytest.raises(BulkError, match=r"state\.sqlite is damaged"):
        table.go()
    assert table.files() == before


@pytest.mark.parametrize(
    "sql", ["DROP TABLE edits", "DROP TABLE published", "UPDATE settings SET value = '{'"]
)
def test_a_database_that_lacks_something_is_refused_in_words(table: Bench, sql: str) -> None:
    table.go()
    before = table.files()
    with sqlite3.connect(table.place / f".{table.out.name}.blip2" / "state.sqlite") as connection:
        connection.execute(sql)
    with pytest.raises(BulkError, match=r"state\.sqlite is damaged"):
        table.go(prefix="a ")
    assert table.files() == before


# --- kills ---


@pytest.mark.parametrize("bench", ["jsonl", "csv", "txt", "webdataset"], indirect=True)
def test_kills_between_steps_lose_no_edit(bench: Bench, tmp_path: Path) -> None:
    """A run over an edited output, killed before or after each transaction and each file that takes its place."""
    edited = {"txt": "1.txt"}.get(bench.kind, "")

    def prepare(place: Path) -> Bench:
        other = Bench(place, bench.kind)
        if bench.kind == "txt":
            (other.folder / "3.txt").write_text("old\n")
        other.go(existing="append", prefix="first ")
        if bench.kind in TABLES:
            rows = read(other.out, bench.kind)
            write(
                other.out,
                bench.kind,
                [rows[0] | {"caption": "mine"}, *rows[2:], rows[0] | {"caption": "more"}],
            )
        elif edited:
            (other.folder / edited).write_text("mine")
        (other.folder / "4.png").write_bytes(png(4))
        (other.folder / "2.png").write_bytes(png(22))
        for i in range(5, 12):
            (other.folder / f"{i}.png").write_bytes(png(i))
        return other

    straight = prepare(tmp_path / "straight")
    straight.go(existing="append")
    expected = straight.texts()
    assert len(expected) == (12 if bench.kind not in TABLES else 11)
    for kill in range(100):
        other = prepare(tmp_path / str(kill))
        child = os.fork()
        if child == 0:
            _kill_at(kill)
            other.go(existing="append")
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        done = other.go(existing="append")
        assert other.texts() == expected
        assert set(other.files()) == set(straight.files())
        assert (done.edited, done.added, done.removed) == {"txt": (1, 0, 0), "webdataset": (0, 0, 0)}.get(
            bench.kind, (1, 1, 1)
        )
        if not killed:
            break
    assert not killed and kill > 8


def _kill_at(place: int) -> None:
    """End this process before or after a step: a transaction, or a file that takes its place."""
    steps = [0]

    def step(work: Callable[[], Any]) -> Any:
        for after in (False, True):
            if steps[0] == place:
                os.kill(os.getpid(), signal.SIGKILL)
            steps[0] += 1
            result = None if after else work()
        return result

    rename, transaction = os.replace, Database.transaction

    @contextmanager
    def counted(self: Database) -> Iterator[None]:
        context = transaction(self)
        context.__enter__()
        yield
        step(lambda: context.__exit__(None, None, None))

    storage.os.replace = lambda old, new: step(lambda: rename(old, new))  # type: ignore[attr-defined]
    Database.transaction = counted  # type: ignore[method-assign]


# --- what is listed ---


@pytest.mark.parametrize("seed", range(4))
def test_names_are_found_in_any_order(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    rng = random.Random(seed)
    names = [f"{i}\udce9\ud800" for i in range(1500)]
    database = Database(tmp_path, {})
    with database.transaction():
        for name in names:
            database.record({"image": name, "hash": "00", "texts": [], "stamp": None})
    monkeypatch.setattr("blip2.bulk.listing._CLAIMED", 300)
    for listed in (names, names[700:], names[::-1], rng.sample(names, 1500), names[:10] * 40):
        new = [f"new{seed}{i}" for i in range(700)]
        mixed = [*listed, *new, *new]
        if seed % 2:
            rng.shuffle(mixed)
        database._at = 0
        tasks = [
            task.item.name
            for task in work_items(
                [ImageItem(n, "") for n in mixed], database, settings(tmp_path), database.count
            )
        ]
        assert tasks[:250] == list(dict.fromkeys(name for name in mixed if name in set(new)))[:250]
        assert set(tasks) == set(new)
    database.close()
