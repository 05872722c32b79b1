"""The dashboard: one server-rendered page that refreshes itself."""

from __future__ import annotations

from starlette.responses import Response

from skerry.fleet.http import Call


def page(call: Call) -> Response:
    return Response("soon", media_type="text/plain")
