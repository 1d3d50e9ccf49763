"""GIF: only its first picture is handed on, without comments and other extensions."""

from __future__ import annotations

from blip2.imagefiles.cost import Cost

MAX_BLOCKS = 500_000  # of up to 255 bytes each

_CONTROL = 0xF9  # the extension that holds the transparent color


def check_gif(content: bytes) -> Cost:
    """What decoding a GIF takes."""
    return Cost(rewrite=True)


def bare_gif(content: bytes) -> tuple[bytes, int]:
    """The first picture of a GIF; the file as it is where it has none that is whole.

    Raises:
        ValueError: more blocks than any picture has.
    """
    place = 13 + _palette(content[10:11])
    kept, blocks = [content[:place]], 0
    while content[place : place + 1] in (b"!", b","):
        start, is_picture = place, content[place : place + 1] == b","
        place += 11 + _palette(content[place + 9 : place + 10]) if is_picture else 2
        first = place
        while place < len(content) and content[place]:
            place, blocks = place + 1 + content[place], blocks + 1
            if blocks > MAX_BLOCKS:
                raise ValueError(f"a GIF of more than {MAX_BLOCKS:,} blocks")
        place += 1
        if is_picture:
            return (b"".join([*kept, content[start:place], b";"]) if place <= len(content) else content), 1
        if content[start + 1 : start + 2] == bytes([_CONTROL]) and place - first == 6 <= len(content) - first:
            # How the picture is removed before the next one does not matter here, and costs memory.
            kept.append(
                content[start : first + 1] + bytes([content[first + 1] & 1]) + content[first + 2 : place]
            )
    return content, 1


def _palette(flags: bytes) -> int:
    """The bytes of a palette, by the flags that announce it."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 128 else 0
