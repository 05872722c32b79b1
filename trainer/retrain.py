"""RetrainRequests over HTTP: list the open ones, claim one, tell how it ended."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from skerry.core.errors import AuthError, Conflict, InputError, NotFound, SkerryError, Unavailable

_BY_STATUS: dict[int, type[SkerryError]] = {
    401: AuthError, 403: AuthError, 404: NotFound, 409: Conflict, 429: Unavailable, 502: Unavailable,
    503: Unavailable, 504: Unavailable,
}  # fmt: skip


class RetrainClient:
    """Raises the error tree: Unavailable without a control plane, Conflict when a request is another's."""

    def __init__(self, server: str, token_file: Path) -> None:
        try:
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AuthError("read token", token_file, str(error), "--token-file D/admin.token") from error
        self._server = server.rstrip("/")
        self._http = httpx.Client(base_url=self._server, headers={"Authorization": f"Bearer {token}"},
                                  timeout=httpx.Timeout(30, connect=5), trust_env=False)  # fmt: skip

    def __enter__(self) -> RetrainClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def open_requests(self) -> list[dict[str, Any]]:
        """Oldest first."""
        document = self._call("GET", "/api/v1/retrain-requests?state=open")
        listed = document.get("retrain_requests")
        if not isinstance(listed, list):
            raise InputError("list retrain requests", self._server, "the answer holds no list of them")
        return [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def act(self, request: str, action: str, **body: Any) -> dict[str, Any]:
        """`action` claim, complete or fail; repeating one by the same owner is fine."""
        return self._call("POST", f"/api/v1/retrain-requests/{quote(request, safe='')}/{action}", body)

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **({"json": body} if body is not None else {}))
        except httpx.HTTPError as error:
            cause = str(error) or type(error).__name__
            raise Unavailable(method, self._server + path, cause, "is `skerry fleet serve` running there?") from error
        try:
            document = response.json()
        except ValueError:
            document = {}
        if response.is_success and isinstance(document, dict):
            return document
        failure = document.get("error") if isinstance(document, dict) else None
        message = str(failure.get("message")) if isinstance(failure, dict) else f"HTTP {response.status_code}"
        raise _BY_STATUS.get(response.status_code, SkerryError)(method, self._server + path, message)
