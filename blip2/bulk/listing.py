"""What is still to be done in a run: inputs that are new, failed or changed, and text files that are gone."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from blip2.bulk.database import CHUNK, Database, Known, Stamp, from_blob
from blip2.bulk.outputs import file_hash, sidecar, stamp_of
from blip2.bulk.settings import RunSettings
from blip2.bulk.sources import ImageItem
from blip2.storage import OutputError

_CLAIMED = 1 << 16  # names that are remembered until the database has them


class WorkItem(NamedTuple):
    """An item that something is to be done about.

    file: its text file, relative to the output; ours: the output wrote that.
    digest: the SHA-256 of its content, whose texts are known and only to be written again; then stamp is its file's.
    kept: why its text file is left alone, where nothing is to be done but to say so.
    """

    item: ImageItem
    file: str = ""
    ours: bool = False
    digest: str = ""
    stamp: tuple[int | None, int | None] | None = None
    kept: str = ""


def work_items(
    items: Iterable[ImageItem], database: Database, settings: RunSettings, before: int
) -> Iterator[WorkItem]:
    """What a run has to do, in the order of the items.

    before: how many inputs the database had when the run began. A name counts once; one whose text file is another
    image's is given with that as its problem.
    """
    stream, claims = iter(items), _Claims(database)
    with ThreadPoolExecutor(settings.threads) as pool:
        while some := list(itertools.islice(stream, CHUNK)):
            found = _recorded(some, database)
            paths = {item.path for item, known in found if known is not None and known.content is not None}
            stamps = _stamps(list(paths), pool, settings.threads)
            for item, known in found:
                stamp = stamps.get(item.path)
                done = known is not None and known.content is not None and stamp in (None, known.stamp)
                if done and settings.kind != "txt":
                    continue
                if (known is not None and known.id > before) or claims.has(item.name):
                    continue
                try:
                    work = _work(item, known, stamp, database, settings)
                except (OutputError, OSError) as error:
                    file = from_blob((known and known.file) or b"")
                    work = WorkItem(item._replace(problem=str(error)), file)
                if work is not None:
                    yield claims.add(work, settings)


def _recorded(items: list[ImageItem], database: Database) -> list[tuple[ImageItem, Known | None]]:
    """What is known of each item, which gets the name it is known by: a file is one, however a run names it."""
    if os.getcwd() != database.begun:
        items = [item._replace(name=database.spelled(item.name)[0]) for item in items]
    found = database.find([item.name for item in items])
    new = [i for i, known in enumerate(found) if known is None] if database.before else []
    spellings = {i: database.spelled(items[i].name)[1:] for i in new}
    names = list(itertools.chain(*spellings.values()))
    there = dict(zip(names, database.find(names), strict=True)) if names else {}
    for i, names in spellings.items():
        for name in names:
            if (known := there[name]) is not None:
                items[i], found[i] = items[i]._replace(name=name), known
                break
    return list(zip(items, found, strict=True))


def _stamps(paths: list[str], pool: ThreadPoolExecutor, threads: int) -> dict[str, Stamp | None]:
    """Of each file its stamp, looked up side by side: over a network each takes a while."""
    parts = [part for i in range(threads) if (part := paths[i::threads])]
    stamps = pool.map(lambda part: list(map(stamp_of, part)), parts)
    return dict(zip(itertools.chain(*parts), itertools.chain(*stamps), strict=True))


def _work(
    item: ImageItem, known: Known | None, stamp: Stamp | None, database: Database, settings: RunSettings
) -> WorkItem | None:
    """What is to be done about an item; stamp: of the file that holds it."""
    if known is None or known.file is None:
        return WorkItem(item)
    file, overwrite = from_blob(known.file), settings.existing == "overwrite"
    if known.failed:
        return WorkItem(item, file, known.style is not None)
    there = file_hash(settings.out / file, known.sha256)
    if known.content is None:
        return (
            WorkItem(item, file, kept="existing")
            if there is not None and not overwrite
            else WorkItem(item, file)
        )
    if there is not None and known.style is not None and there != known.sha256 and not overwrite:
        return WorkItem(item, file, kept="edited")
    if stamp is not None and stamp != known.stamp:
        return WorkItem(item, file, known.style is not None)
    if there is None or there != known.sha256 or known.style != json.dumps(settings.style):
        return WorkItem(item, file, known.style is not None, database.digest(known.content), known.stamp)
    return None


class _Claims:
    """Names and text files of work that were given out, until the database has them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._files: dict[str, str] = {}  # of each name
        self._names: dict[str, str] = {}  # of each file

    def has(self, name: str) -> bool:
        return name in self._files

    def add(self, work: WorkItem, settings: RunSettings) -> WorkItem:
        """Claim the name of an item, and its text file unless that is another image's."""
        name = work.item.name
        if settings.kind == "txt" and not work.file and not work.item.problem:
            located = work.item._replace(name=os.path.join(self._database.begun, name))
            file = sidecar(located, settings.out)
            owner = self._names.get(file) or self._owner(file, work.item.path) or name
            if owner == name:
                work = work._replace(file=file)
            else:
                problem = f"{file} is the text file of another image; rename one of them"
                work = work._replace(item=work.item._replace(problem=problem))
        if len(self._files) >= _CLAIMED:
            self._forget()
        self._files[name] = work.file
        if work.file:
            self._names[work.file] = name
        return work

    def _owner(self, file: str, path: str) -> str | None:
        """The other image whose text file it is; None where that is gone: a.jpg may have become a.png."""
        if (owner := self._database.owner(file)) is None:
            return None
        try:  # by way of a link it may be the same
            return None if os.path.samefile(os.path.join(self._database.begun, owner), path) else owner
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return owner  # it is in a tar file, or its name is none of a file

    def _forget(self) -> None:
        """Let go of what the database has, of the older half: those are no longer on their way."""
        names = list(self._files)[: _CLAIMED // 2]
        for start in range(0, len(names), CHUNK):
            for name in self._database.having(names[start : start + CHUNK]):
                self._names.pop(self._files.pop(name), None)
