"""Keys for OSS that are renewed while a run reads: a file that something outside replaces.

OSS_CREDENTIALS_FILE    JSON with AccessKeyId, AccessKeySecret and SecurityToken, at the top or
                        under Credentials: what AssumeRole of STS, or a node's metadata, answers
"""

import json
import os
import threading
from pathlib import Path

from oss2.credentials import Credentials, CredentialsProvider

from triptych.errors import ConfigError


class FileCredentials(CredentialsProvider):
    """The keys in a file, read anew whenever it is another. Threads share it."""

    def __init__(self, path: Path) -> None:
        """Reads it.

        Raises:
            ConfigError: it is missing, or has no keys.
        """
        self._path, self._lock = path, threading.Lock()
        self._stamp: tuple[int, ...] = ()
        self._keys: Credentials | None = None
        self.get_credentials()

    def get_credentials(self) -> Credentials:
        """What the file holds now; while it is being replaced, what it held before."""
        with self._lock:
            try:
                found = os.stat(self._path)
                stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
                if stamp != self._stamp:
                    self._keys, self._stamp = _parse(self._path.read_bytes()), stamp
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                if self._keys is None:
                    raise ConfigError(
                        f"OSS_CREDENTIALS_FILE={self._path} holds no keys ({type(error).__name__})"
                        "  -> JSON with AccessKeyId, AccessKeySecret and SecurityToken"
                    ) from None
            return self._keys


def _parse(content: bytes) -> Credentials:
    found = json.loads(content)
    found = found.get("Credentials", found)
    return Credentials(
        found["AccessKeyId"], found["AccessKeySecret"], found.get("SecurityToken", "")
    )
