"""API keys from a file."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from pathlib import Path

from phalanx.errors import PhalanxError

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at whether the file has changed


class ApiKeys:
    """The keys in a file, one a line; lines that are empty or begin with # are passed over.

    The file is read again when it changes, so that keys are given out and taken back without a restart.
    """

    def __init__(self, path: Path) -> None:
        """Raises PhalanxError where the file cannot be read, or has no key in it."""
        self._path = path
        self._looked_s = time.monotonic()
        self._version = self._stat()
        self._digests = self._read()

    def name_of(self, key: str) -> str | None:
        """What a key is called in logs, or None for one that is not in the file. Takes as long for either."""
        self._look()
        digest = _digest(key.encode("latin-1", "replace"))  # the bytes that came in the header
        known = None
        for name, each in self._digests:
            if hmac.compare_digest(digest, each):
                known = name
        return known

    def _look(self) -> None:
        now_s = time.monotonic()
        if now_s < self._looked_s + LOOK_S:
            return
        self._looked_s = now_s
        try:
            version = self._stat()
            if version != self._version:
                self._digests, self._version = self._read(), version
        except PhalanxError as error:
            logger.warning("the keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise PhalanxError(f"the API keys cannot be read: {error}; see serve.api_keys") from None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> list[tuple[str, bytes]]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PhalanxError(f"the API keys cannot be read: {error}; see serve.api_keys") from None
        digests = [
            _digest(line.strip().encode()) for line in lines if line.strip() and not line.lstrip().startswith("#")
        ]
        if not digests:
            raise PhalanxError(f"{self._path} has no API key in it; write one a line, or set serve.api_keys to null")
        return [(digest.hex()[:8], digest) for digest in digests]


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing them takes the same time for each."""
    return hashlib.sha256(key).digest()
