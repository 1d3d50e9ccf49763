"""The records of a zip archive as torch.save writes it: stored as they are, one after the other.

Only the list of records is read, and only where all its parts agree: the archive's end is at the file's end, the
directory just before it, no record is compressed, none overlaps another and none has another's name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blip2.tensorfiles.errors import quoted
from blip2.tensorfiles.filebytes import FileBytes

MAX_RECORDS = 20_000  # a record a tensor
MAX_DIRECTORY_BYTES = 8 << 20

# The format is PKWARE's APPNOTE; these are its structures without their four-byte signatures.
_END = struct.Struct("<4HIIH")
_END_64 = struct.Struct("<QHHIIQQQQ")
_LOCATOR = struct.Struct("<IQI")
_ENTRY = struct.Struct("<6H3I5H2I")
_LOCAL = struct.Struct("<5H3I2H")
_DESCRIPTOR_FOLLOWS, _UTF8 = 1 << 3, 1 << 11
_DESCRIPTOR_SIZES = (0, 12, 16, 20, 24)  # of what may follow a record: its checksum and lengths
_IN_64 = 0xFFFFFFFF


@dataclass(frozen=True)
class ZipRecord:
    """The place of a record's bytes in the file."""

    start: int
    length: int


def read_records(file: FileBytes) -> dict[str, ZipRecord]:
    """The records of an archive by name.

    Raises:
        BrokenFileError: the archive is cut short or contradicts itself.
        UnsupportedFileError: compressed or encrypted records, or more of them than a model has.
    """
    count, start, length = _find_directory(file)
    if count > MAX_RECORDS or length > MAX_DIRECTORY_BYTES:
        raise file.unsupported(
            f"an archive of {count:,} records, listed in {length:,} bytes; no model has so many tensors"
        )
    directory = file.read(start, length, "the archive's directory")
    records: dict[str, ZipRecord] = {}
    extents = []
    position = 0
    for _ in range(count):
        name, record, begin, position = _read_entry(file, directory, position)
        if name in records:
            raise file.broken(f"two records of the archive have the name {quoted(name)}")
        records[name] = record
        extents.append((begin, record.start + record.length, name))
    if position != length:
        raise file.broken(f"the archive's directory holds more than its {count:,} records")
    extents.sort()
    for (_, end, name), (begin, _, _) in zip([(0, 0, "the first"), *extents], [*extents, (start, 0, "")]):
        if begin - end not in _DESCRIPTOR_SIZES:
            raise file.broken(f"record {quoted(name)} of the archive does not end where the next begins")
    return records


def _find_directory(file: FileBytes) -> tuple[int, int, int]:
    """Number of records, first byte and length of the directory."""
    what = "the archive's end"
    end = file.size - _END.size - 4
    if end < 0 or file.read(end, 4, what) != b"PK\x05\x06":
        raise file.broken("a zip archive that does not end as one; it is cut short")
    disk, first_disk, here, count, length, start, comment = _END.unpack(file.read(end + 4, _END.size, what))
    directory_end = end
    locator = end - _LOCATOR.size - 4
    if locator >= 0 and file.read(locator, 4, what) == b"PK\x06\x07":
        first_disk_64, directory_end, disks = _LOCATOR.unpack(file.read(locator + 4, _LOCATOR.size, what))
        fields = file.read(directory_end, _END_64.size + 4, what)
        size, _, _, disk, first_disk, here, count, length, start = _END_64.unpack(fields[4:])
        if fields[:4] != b"PK\x06\x06" or directory_end + 12 + size != locator or first_disk_64 or disks > 1:
            raise file.broken("the archive's two ends contradict each other")
    if comment or disk or first_disk or here != count or start + length != directory_end:
        raise file.broken("the archive's directory is not where its end says")
    return count, start, length


def _read_entry(file: FileBytes, directory: bytes, position: int) -> tuple[str, ZipRecord, int, int]:
    """A record's name, its bytes, where its own header begins, and where the next entry of the directory does."""
    fixed = directory[position : position + 4 + _ENTRY.size]
    if len(fixed) < 4 + _ENTRY.size or fixed[:4] != b"PK\x01\x02":
        raise file.broken("the archive's directory is broken")
    _, _, flags, method, _, _, _, packed, length, *sizes, disk, _, _, begin = _ENTRY.unpack(fixed[4:])
    name_end = position + len(fixed) + sizes[0]
    extra_end = name_end + sizes[1]
    raw_name = directory[position + len(fixed) : name_end]
    name = raw_name.decode("utf-8", "replace")
    # Nothing is ever written under these names; an archive that has others was not made by torch.
    if name.encode() != raw_name or {"\\", "\0"} & set(name) or {"", ".", ".."} & set(name.split("/")):
        raise file.broken(f"the archive has a record of the improper name {quoted(raw_name)}")
    what = f"record {quoted(name)} of the archive"
    if method or flags & ~(_DESCRIPTOR_FOLLOWS | _UTF8):
        raise file.unsupported(
            f"{what} is compressed or encrypted, as torch.save never does; unpack the archive and store "
            "it anew without compression"
        )
    length, packed, begin = _wide_fields(directory[name_end:extra_end], [length, packed, begin], what, file)
    if packed != length or disk:
        raise file.broken(f"{what} has two lengths, {packed:,} and {length:,}")

    local = file.read(begin, 4 + _LOCAL.size, what)
    _, own_flags, own_method, *_, own_packed, own_length, name_size, extra_size = _LOCAL.unpack(local[4:])
    start = begin + len(local) + name_size + extra_size
    other_lengths = {own_packed, own_length} - {length}
    if own_flags & _DESCRIPTOR_FOLLOWS:
        other_lengths.discard(0)
    if _IN_64 in other_lengths:
        extra = file.read(start - extra_size, extra_size, what)
        other_lengths = {*_wide_fields(extra, [own_length, own_packed], what, file)} - {length}
    if (
        local[:4] != b"PK\x03\x04"
        or (own_method, own_flags) != (method, flags)
        or other_lengths
        or file.read(begin + len(local), name_size, what) != raw_name
    ):
        raise file.broken(f"{what} and the archive's directory contradict each other")
    if start + length > file.size:
        raise file.broken(f"{what} ends beyond the end of the file")
    return name, ZipRecord(start, length), begin, extra_end + sizes[2]


def _wide_fields(extra: bytes, narrow: list[int], what: str, file: FileBytes) -> list[int]:
    """Lengths and places of a record, from the directory's zip64 field where they do not fit into 32 bits."""
    wide, position = b"", 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = extra[position + 4 : position + 4 + size]
        position += 4 + size
    numbers = []
    for number in narrow:
        if number == _IN_64:
            if len(wide) < 8:
                raise file.broken(f"{what} has no length or place")
            number, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        numbers.append(number)
    return numbers
