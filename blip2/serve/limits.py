"""The server's limits, each with a safe default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from blip2.images import MOST_PIXELS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A request beyond any of these gets an error that names it; sizes in bytes, times in seconds."""

    queue: int = 64  # requests that wait for the model; beyond: 503
    rows: int = 32  # rows of the batch: texts generated at a time, all beams counted
    requests: int = 256  # requests at work, those whose bodies still arrive included; beyond: 503
    connections: int = 1024
    body_bytes: int = 20_000_000  # of one request
    bodies_bytes: int = 200_000_000  # of all requests at work, images fetched included; beyond: 503
    pixels: int = 50_000_000  # of one image
    images: int = 8  # in one request
    texts: int = 64  # in one request
    text_chars: int = 8_000  # of one prompt, question or text; of all turns of a conversation
    turns: int = 64  # messages of a conversation
    new_tokens: int = 256
    num_beams: int = 10
    sequences: int = 8  # texts of one request
    header_seconds: float = 5  # from the connection, or a request's first byte, until its headers are there
    body_seconds: float = 10  # likewise, until its body is there
    write_seconds: float = 10  # for which a client may leave its answer unread
    idle_seconds: float = 8  # between two requests on a connection; some clients keep one for 5
    request_seconds: float = 60  # from a request's arrival to its answer's end
    drain_seconds: float = 60  # to finish what was accepted after SIGTERM
    cache_bytes: int = 256_000_000  # of encoded images
    fetch_bytes: int = 20_000_000  # image URLs, where switched on
    fetch_seconds: float = 10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "cache_bytes" else 1
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and least <= value < float("inf")):
                raise ValueError(f"the limit {name} must be a number, {least} or more; got {value!r}")

        if self.pixels > MOST_PIXELS:
            raise ValueError(f"the limit pixels must be {MOST_PIXELS:,} at most; got {self.pixels!r}")

    def changed(self, settings: Iterable[str]) -> Limits:
        """These limits with some set, each written as NAME=NUMBER. Raises ValueError: no such limit, or no number."""
        kinds = {name: float if name.endswith("seconds") else int for name in vars(self)}
        values: dict[str, int | float] = {}
        for setting in settings:
            name, _, number = setting.partition("=")
            name = name.strip().replace("-", "_")
            if name not in kinds:
                raise ValueError(f"there is no limit {name!r}; choose among {', '.join(kinds)}")
            try:
                values[name] = kinds[name](number.replace("_", ""))
            except ValueError:
                raise ValueError(f"--limit {setting}: expected {name}=NUMBER") from None
        return replace(self, **values)  # type: ignore[arg-type]
