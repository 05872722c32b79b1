"""Who may do what: API keys for /v1, each a tenant, and apart from them one key for what changes the server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skerry.core.errors import InputError
from skerry.runtime.api_error import ApiError
from skerry.runtime.trail import note_tenant

if TYPE_CHECKING:
    from fastapi import Request

MAX_KEYS = 10_000


class Access:
    """Optional API keys for /v1/*; health and metrics stay open. The admin key opens /v1 as well; an API key never does
    what needs the admin key. Keys are kept and compared as digests, which says nothing about their lengths."""

    def __init__(self, keys: Iterable[bytes] = (), admin: Iterable[bytes] = ()) -> None:
        self.replace(keys, admin)

    def replace(self, keys: Iterable[bytes], admin: Iterable[bytes]) -> None:
        """From the next request on."""
        self._keys, self._admin = tuple(map(_digest, keys)), tuple(map(_digest, admin))

    def check(self, request: Request) -> bytes:
        """The tenant that asks: a digest of its key, b"" on an open server. Raises ApiError 401."""
        if not self._keys:
            return b""
        given = _given(request)
        if not _among(given, (*self._keys, *self._admin)):
            raise ApiError(401, "missing or wrong API key", code="invalid_api_key")
        note_tenant(given)
        return given

    def check_admin(self, request: Request) -> None:
        """Raises ApiError 401 and 403. Without an admin key an open server is open; one with API keys is not."""
        given = _given(request)
        if not self._admin:
            if self._keys:
                raise ApiError(403, "this needs an admin key; the server has none (--admin-key-file)", code="forbidden")
            return
        if _among(given, self._admin):
            return
        if _among(given, self._keys):
            raise ApiError(403, "this needs the admin key, not an API key", code="forbidden")
        raise ApiError(401, "missing or wrong admin key", code="invalid_api_key")


@dataclass(frozen=True)
class KeyFiles:
    """Where keys are read from, at the start and on SIGHUP."""

    api: Path | None = None
    admin: Path | None = None

    def read(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """API keys and admin keys. Raises InputError."""
        keys, admin = read_keys(self.api), read_keys(self.admin)
        if set(keys) & set(admin):
            raise InputError("read API keys", self.api, f"a key in it is in {self.admin} too", "two different keys")
        return keys, admin


def read_keys(path: Path | None) -> tuple[bytes, ...]:
    """One key a line. Raises InputError: a key file that is unreadable or empty must not mean an open server."""
    if path is None:
        return ()
    try:
        keys = tuple(line.strip() for line in path.read_bytes().splitlines() if line.strip())
    except OSError as error:
        raise InputError("read API keys", path, error.strerror or str(error)) from error
    if not keys or len(keys) > MAX_KEYS:
        raise InputError("read API keys", path, f"it holds {len(keys) or 'no'} keys", f"1 to {MAX_KEYS}, one a line")
    return keys


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given(request: Request) -> bytes:
    """The digest of the bearer's key; b"", like nothing else, where none is given."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return _digest(key.strip().encode("latin-1", "replace")) if scheme.lower() == "bearer" else b""


def _among(given: bytes, known: tuple[bytes, ...]) -> bool:
    """Compares with all of them, so that the time taken tells nothing."""
    return any([hmac.compare_digest(given, one) for one in known])
