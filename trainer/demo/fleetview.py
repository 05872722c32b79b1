"""The demo's eyes on the fleet: the operator API, read with the admin token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from skerry.core.errors import Unavailable


class FleetView:
    """Reads what an operator could; every answer is plain JSON. Raises Unavailable."""

    def __init__(self, server: str, token_file: Path) -> None:
        headers = {"Authorization": f"Bearer {token_file.read_text(encoding='ascii').strip()}"}
        self._client = httpx.Client(base_url=server, headers=headers, timeout=10, trust_env=False)
        self.server = server

    def ready(self) -> bool:
        try:
            return self._client.get("/health/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any:
        try:
            answer = self._client.get(f"/api/v1/{path}")
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Unavailable("ask control plane", path, str(error), "read logs/fleet.log") from error

    def nodes(self) -> list[dict[str, Any]]:
        return list(self.get("nodes")["nodes"])

    def rollouts(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return sorted(self.get("rollouts")["rollouts"], key=lambda rollout: rollout["number"])

    def drift(self) -> dict[str, Any]:
        return dict(self.get("drift"))

    def retrain_requests(self) -> list[dict[str, Any]]:
        return list(self.get("retrain-requests")["retrain_requests"])
