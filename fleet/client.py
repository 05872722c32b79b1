"""The operator's side of the API: a small httpx client whose failures are SkerryErrors with the server's own words."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from skerry.core.errors import (
    AuthError,
    Conflict,
    DeadlineExceeded,
    GateFailed,
    InputError,
    NotFound,
    SkerryError,
    Unavailable,
    UsageError,
)

BY_CODE: dict[str, type[SkerryError]] = {"gate_failed": GateFailed, "unauthorized": AuthError, "conflict": Conflict}
BY_STATUS: dict[int, type[SkerryError]] = {
    400: InputError,
    401: AuthError,
    403: AuthError,
    404: NotFound,
    409: Conflict,
    413: InputError,
    422: InputError,
    429: Unavailable,
    503: Unavailable,
}
RETRIES = 4
TERMINAL = ("SUCCEEDED", "ROLLED_BACK", "ABORTED")


class FleetClient:
    """Every method returns the parsed document. Raises the error tree; GETs and PUTs are tried again when it helps."""

    def __init__(self, server: str, token: str | None, transport: httpx.BaseTransport | None = None) -> None:
        if not server.startswith(("http://", "https://")):
            raise UsageError("connect", server, "not an http or https URL", "--server http://HOST:PORT")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.server = server.rstrip("/")
        self._http = httpx.Client(
            base_url=self.server,
            headers=headers,
            timeout=httpx.Timeout(30, connect=5),
            trust_env=False,
            transport=transport,
        )

    def __enter__(self) -> FleetClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()

    def request(self, method: str, path: str, document: Any = None, content: bytes | None = None) -> httpx.Response:
        """Raises the SkerryError the answer stands for; Unavailable when there is none."""
        body: dict[str, Any] = {"content": content} if content is not None else {}
        if document is not None:
            body = {"json": document}
        for attempt in range(RETRIES):
            last = attempt == RETRIES - 1 or method == "POST"
            try:
                response = self._http.request(method, path, **body)
            except httpx.HTTPError as error:
                if last:
                    hint = "is `skerry fleet serve` running there? --server URL or SKERRY_FLEET_SERVER"
                    raise Unavailable(method, self.server + path, str(error) or type(error).__name__, hint) from error
            else:
                if response.status_code not in (429, 503) or last:
                    return response if response.is_success else self._fail(method, path, response)
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _fail(self, method: str, path: str, response: httpx.Response) -> httpx.Response:
        try:
            error = response.json()["error"]
            code, message, hint = str(error["code"]), str(error["message"]), str(error.get("hint", ""))
        except (ValueError, KeyError, TypeError):
            code, message, hint = "", f"HTTP {response.status_code}", ""
        kind = BY_CODE.get(code) or BY_STATUS.get(response.status_code, SkerryError)
        operation, _, cause = message.partition(": ")
        raise kind(operation, "", cause, hint) if cause else kind(method, path, message, hint)

    def get(self, path: str) -> Any:
        return self.request("GET", path).json()

    def post(self, path: str, document: Any = None) -> Any:
        return self.request("POST", path, {} if document is None else document).json()

    def create_token(self, uses: int, ttl_seconds: float) -> Any:
        return self.post("/api/v1/tokens", {"uses": uses, "ttl_seconds": ttl_seconds})

    def nodes(self) -> list[Any]:
        return list(self.get("/api/v1/nodes")["nodes"])

    def node(self, name: str) -> Any:
        return self.get(f"/api/v1/nodes/{quote(name, safe='')}")

    def revoke(self, name: str) -> Any:
        return self.post(f"/api/v1/nodes/{quote(name, safe='')}/revoke")

    def releases(self) -> list[Any]:
        return list(self.get("/api/v1/releases")["releases"])

    def qualify(self, release: str, target: str, reason: str) -> Any:
        return self.post(f"/api/v1/releases/{quote(release, safe='')}/qualify", {"target": target, "reason": reason})

    def start_rollout(self, release: str, policy: dict[str, Any], dry_run: bool = False) -> Any:
        return self.post("/api/v1/rollouts", {"release": release, "policy": policy, "dry_run": dry_run})

    def rollouts(self) -> list[Any]:
        return list(self.get("/api/v1/rollouts")["rollouts"])

    def rollout(self, rollout: str) -> Any:
        return self.get(f"/api/v1/rollouts/{quote(rollout, safe='')}")

    def history(self, rollout: str) -> Any:
        return self.get(f"/api/v1/rollouts/{quote(rollout, safe='')}/history")

    def act(self, rollout: str, action: str) -> Any:
        return self.post(f"/api/v1/rollouts/{quote(rollout, safe='')}/{action}")

    def add_source(self, name: str, sketch: Any, tokenizer_digest: str) -> Any:
        document = {"name": name, "sketch": sketch, "tokenizer_digest": tokenizer_digest}
        return self.post("/api/v1/data-sources", document)

    def sources(self) -> list[Any]:
        return list(self.get("/api/v1/data-sources")["data_sources"])

    def retrain_requests(self, state: str | None = None) -> list[Any]:
        query = f"?state={quote(state)}" if state else ""
        return list(self.get(f"/api/v1/retrain-requests{query}")["retrain_requests"])

    def audit(self) -> Any:
        return self.get("/api/v1/audit")

    def drift(self) -> Any:
        return self.get("/api/v1/drift")

    def watch(self, rollout: str, timeout: float | None, tell: Callable[[Any], None], poll_seconds: float = 0.5) -> Any:
        """Follows a rollout to its end; `tell` hears of each change. Raises DeadlineExceeded after `timeout` seconds.

        A control plane that restarts meanwhile is waited for; only an answer that can never be right ends the watch.
        """
        started, seen = time.monotonic(), None
        while True:
            try:
                document = self.rollout(rollout)
            except Unavailable:
                document = None
            if document is not None:
                state = (document["state"], document["wave"], document["phase"], document["reason"])
                if state != seen:
                    tell(document)
                    seen = state
                if document["state"] in TERMINAL:
                    return document
            if timeout is not None and time.monotonic() - started > timeout:
                where = f"{seen[0]} {seen[2]}".strip() if seen else "not reachable"
                hint = f"skerry fleet rollout status {rollout}"
                raise DeadlineExceeded("watch rollout", rollout, f"still {where} after {timeout:g} s", hint)
            time.sleep(poll_seconds)
