"""What users change in a published JSONL or CSV table: taken over row by row, so that the table can be written anew.

A row is known by its image, its question and its place among that image's rows. What was edited or added is kept as it
is written there, what was removed stays removed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2.bulk.database import CHUNK, Database, Published, Row, to_blob
from blip2.bulk.outputs import COLUMNS, NUMBERS, flat, table_line, valid
from blip2.storage import TextFileError, read_json_text, read_rows, read_text_lines, text_form

FORMS_THAT_PARSE = ("jsonl", "csv")
ADDED = 1 << 20  # places from here on: rows that the user added
ERROR_ROW = -1  # the place that a removed error row is noted under: texts that come later are no errors
Line = tuple[int, str]  # its place among an input's rows, and what `table_line` gives


def table_rows(
    database: Database, kind: str, style: tuple[str, str], *, published: Published | None = None
) -> Iterator[tuple[int, str, list[Line]]]:
    """Of each input its id, its name and its lines, with what users changed; at last (0, "") what belongs to no input.

    published: as that version of the table had them.
    """
    groups = itertools.groupby(_edits(database), key=lambda edit: edit[0])
    key, group = next(groups, (0, iter(())))
    changes = {place: line for _, place, line in group}
    upto = None if published is None else published.upto
    for number, row in database.rows(upto=upto, as_published=published is not None):
        while key and key < number:
            key, group = next(groups, (0, iter(())))
            changes = {place: line for _, place, line in group}
        lines = [table_line(text, kind) for text in flat([row], *style)]
        yield number, row["image"], _changed(row, lines, changes if key == number else {})
    yield 0, "", [(place, line) for _, place, line in _edits(database, of_none=True) if line is not None]


def _changed(row: Row, lines: list[str], changes: dict[int, str | None]) -> list[Line]:
    if "error" in row and ERROR_ROW in changes:
        lines = []
    kept: dict[int, str | None] = {**dict(enumerate(lines)), **changes}
    return [(place, line) for place, line in sorted(kept.items()) if line is not None]


def _edits(database: Database, *, of_none: bool = False) -> Iterator[tuple[int, int, str | None]]:
    """All edits of inputs, or those that belong to none, in their order."""
    at, end = ((0, -2), 0) if of_none else ((1, -2), 1 << 62)
    sql = f"SELECT * FROM edits WHERE (input, place) > (?, ?) AND input <= ? ORDER BY input, place LIMIT {CHUNK}"
    while some := database.query(sql, *at, end):
        yield from some
        at = some[-1][:2]


def count_edits(database: Database) -> dict[str, int]:
    """How many rows users edited, added and removed; not counting the errors of what has succeeded since."""
    added_row = f"CASE WHEN e.place >= {ADDED} THEN e.row END"
    ((edited, added, removed),) = database.query(
        f"SELECT count(e.row) - count({added_row}), count({added_row}), count(*) - count(e.row) "
        f"FROM edits e LEFT JOIN inputs i ON i.id = e.input WHERE e.place != {ERROR_ROW} OR i.error IS NOT NULL"
    )
    return {"edited": edited, "added": added, "removed": removed}


def take_over(database: Database, path: Path, kind: str, old: Published) -> list[Any]:
    """Compare a table with what was published as `old` and note what the user changed, within a transaction.

    Returns:
        The form it has now, for `write_table`.

    Raises:
        TextFileError: it is no table any more.
        OSError: it cannot be read.
    """
    form = _read(database, path, kind)
    for number, name, lines in table_rows(database, kind, old.style or ("", ""), published=old):
        where, values = (
            ("image = ?", [to_blob(name if kind == "jsonl" else valid(name))]) if number else ("1", [])
        )
        theirs = database.query(f"SELECT place, line FROM temp.theirs WHERE {where} ORDER BY place", *values)
        if number:
            _note(database, number, kind, lines, [line for _, line in theirs])
            database.execute("DELETE FROM temp.theirs WHERE image = ?", *values)
        else:
            database.execute("DELETE FROM edits WHERE input = 0")
            for place, line in theirs:
                database.execute("INSERT INTO edits VALUES (0, ?, ?)", ADDED + place, line)
    database.execute("DROP TABLE temp.theirs")
    return form


def _read(database: Database, path: Path, kind: str) -> list[Any]:
    """Put the rows of a user's table into a temporary table; its form."""
    database.execute("CREATE TEMP TABLE theirs (place INTEGER PRIMARY KEY, image BLOB, line TEXT)")
    columns: list[str] = list(COLUMNS)
    insert = "INSERT INTO temp.theirs (image, line) VALUES (?, ?)"
    if kind == "jsonl":
        for i, line in read_text_lines(path):
            if line.strip():
                row = read_json_text(line, f"{path}, line {i}")
                if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                    raise TextFileError(
                        f"{path}, line {i}: expected an object with the image's name as `image`"
                    )
                database.execute(insert, to_blob(row["image"]), line)
    else:
        needed = _needed(database)
        for row in read_rows(path, ".csv"):
            columns = list(row)
            if missing := [name for name in needed if name not in row]:
                raise TextFileError(
                    f"{path}: expected the columns {', '.join(needed)}; {missing[0]} is missing"
                )
            database.execute(insert, to_blob(row["image"]), json.dumps(row))
    database.execute("CREATE INDEX temp.images ON theirs (image)")
    return [*text_form(path), columns if kind == "csv" else None]


def _needed(database: Database) -> list[str]:
    """The columns without which rows could neither be told apart nor written: the image's, and those of its texts."""
    texts = database.query("SELECT texts FROM contents WHERE texts != '[]' LIMIT 1")
    used = json.loads(texts[0][0])[0] if texts else {}
    if "abstained" in used:  # others have one
        used["caption"] = ""
    return ["image", *(name for name in ("question", "caption", "answer") if name in used)]


def _note(database: Database, number: int, kind: str, ours: list[Line], theirs: list[str]) -> None:
    """Note how an input's rows differ: first those that are the same are put aside, then the others paired in order."""
    left = [(line, json.loads(line)) for line in theirs]
    missing: list[tuple[int, Row]] = []
    for place, line in ours:
        row = json.loads(line)
        twin = next((i for i, (_, other) in enumerate(left) if _same(row, other, kind)), None)
        if twin is None:
            missing.append((place, row))
        else:
            del left[twin]
    last = max([ADDED, *(place for place, _ in ours)])
    for place, row in missing:
        asked = row.get("question") or None
        twin = next(
            (i for i, (_, other) in enumerate(left) if (other.get("question") or None) == asked), None
        )
        if twin is not None:
            database.execute(
                "INSERT OR REPLACE INTO edits VALUES (?, ?, ?)", number, place, left.pop(twin)[0]
            )
        elif place >= ADDED:
            database.execute("DELETE FROM edits WHERE input = ? AND place = ?", number, place)
        else:
            place = ERROR_ROW if row.get("error") else place
            database.execute("INSERT OR REPLACE INTO edits VALUES (?, ?, NULL)", number, place)
    for place, (line, _) in enumerate(left, last + 1):
        database.execute("INSERT INTO edits VALUES (?, ?, ?)", number, place, line)


def _same(ours: Row, theirs: Row, kind: str) -> bool:
    """Whether a row says what it said: programs that save a table round numbers and write out what is empty.

    In CSV, a column that was removed is no change to the row either.
    """
    names = {name for row in (ours, theirs) for name, value in row.items() if value not in (None, "")}
    if kind == "csv":
        names -= ours.keys() - theirs.keys()
    return all(_equal(name, ours.get(name), theirs.get(name)) for name in names)


def _equal(name: str, ours: Any, theirs: Any) -> bool:
    if name == "abstained":  # spreadsheets write TRUE
        return str(ours).lower() == str(theirs).lower()
    if name not in NUMBERS:
        return bool(ours == theirs)
    try:
        return math.isclose(float(ours), float(theirs), rel_tol=1e-6, abs_tol=1e-9)
    except (TypeError, ValueError):
        return False
