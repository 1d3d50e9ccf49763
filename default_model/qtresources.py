"""Files inside Qt's binary resource files (.rcc), in which GCompris keeps its pictures.

All numbers are big-endian. A header of "qres", the version and the offsets of three parts: the tree, whose first entry
is the root folder; the data, each file a length and so many bytes; the names, each a length, a hash and UTF-16.
"""

from __future__ import annotations

import struct
import zlib

ZLIB, FOLDER, ZSTD = 1, 2, 4  # flags of an entry


def read_resource(content: bytes, path: str) -> bytes:
    """The file `path` ("/gcompris/src/x.webp") in the resource file `content`.

    ValueError when this is no resource file, FileNotFoundError when it has no such file.
    """
    if content[:4] != b"qres":
        raise ValueError(f"not a Qt resource file: it starts with {content[:4]!r}, not with b'qres'")
    try:
        version, tree, data, names = struct.unpack_from(">4I", content, 4)
        entry_bytes = 14 if version == 1 else 22  # later versions add the time of the last change

        def name(entry: int) -> str:
            at = names + int(struct.unpack_from(">I", content, entry)[0])
            length = struct.unpack_from(">H", content, at)[0]
            return content[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

        entry = tree
        for part in path.strip("/").split("/"):
            flags, count, first = struct.unpack_from(">HII", content, entry + 4)
            children = range(tree + first * entry_bytes, tree + (first + count) * entry_bytes, entry_bytes)
            found = (
                next((child for child in children if name(child) == part), None) if flags & FOLDER else None
            )
            if found is None:
                raise FileNotFoundError(f"no {path} in the resource file: it ends before {part!r}")
            entry = found
        flags, _language, offset = struct.unpack_from(">HII", content, entry + 4)
        if flags & FOLDER:
            raise FileNotFoundError(f"{path} is a folder of the resource file")
        length = struct.unpack_from(">I", content, data + offset)[0]
    except struct.error as error:
        raise ValueError(
            f"the resource file is damaged or cut off at {len(content)} bytes: {error}"
        ) from error
    packed = content[data + offset + 4 : data + offset + 4 + length]
    if flags & ZLIB:
        return zlib.decompress(packed[4:])  # after the length of what is unpacked
    if flags & ZSTD:
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    return packed
