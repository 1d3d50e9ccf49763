"""API keys: read from a file, compared in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from blip2.storage import TextFileError, read_text

SHORTEST = 16  # characters: what is shorter can be guessed


class Keys:
    """The keys that give access to the server. Without any, everyone has access."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """Read a file with a key on each line; empty lines and those that begin with # are left out.

        Raises ValueError where there is no such file, no key in it, or one too short.
        """
        try:
            lines = read_text(path).split("\n")
        except (OSError, TextFileError) as error:
            raise ValueError(f"the key file cannot be read ({error}); it holds one API key a line") from error
        keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        if not keys:
            raise ValueError(f"the key file {path} holds no key; put one on each line")
        if min(map(len, keys)) < SHORTEST:
            raise ValueError(
                f"the key file {path} has a key of fewer than {SHORTEST} characters, which can be guessed; make one "
                "with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def holder(self, authorization: list[str]) -> str | None:
        """Whose key is in a request's Authorization headers; None where it is no known one.

        `Bearer KEY`, as OpenAI's clients send it, or `Basic` with the key as password, as browsers send it.
        """
        if len(authorization) != 1:
            return None
        scheme, _, key = authorization[0].encode("latin-1").partition(b" ")
        if scheme.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return None
        elif scheme.lower() != b"bearer":
            return None
        digest, holder = hashlib.sha256(key).digest(), None
        for i, known in enumerate(self._hashes):  # all of them, so that the time taken does not tell which
            if hmac.compare_digest(digest, known):
                holder = f"key {i + 1}"
        return holder
