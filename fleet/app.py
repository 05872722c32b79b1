"""The control plane's HTTP application: every route in one list, wired by hand."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import FastAPI
from starlette.responses import Response

from skerry.core.errors import Unavailable
from skerry.fleet import dashboard, node_api, operator_api
from skerry.fleet.blobs import BLOB_LIMIT
from skerry.fleet.controller import Controller
from skerry.fleet.http import Call, Frame, Handler, install_error_handlers, json_response
from skerry.fleet.plane import Plane

KB, MB = 1 << 10, 1 << 20


def live(call: Call) -> Response:
    return json_response({"status": "ok"})


def metrics(call: Call) -> Response:
    with call.plane.store.read() as session:
        ends = call.plane.repository.expiries(session)
        body = call.plane.metrics.render(session, time.time(), call.plane.settings.offline_seconds, ends)
    return Response(body, media_type="text/plain; version=0.0.4")


def create_app(plane: Plane, *, run_controller: bool = True) -> FastAPI:
    """The application over an open plane. The controller runs as long as the application does."""
    frame = Frame(plane)
    controller = Controller(plane)

    def ready(call: Call) -> Response:
        """The store answers and the controller's last good round is recent."""
        with call.plane.store.read() as session:
            call.plane.repository.newest_version(session, "timestamp")
        age = time.time() - controller.alive_at
        if run_controller and age > max(30.0, 20 * plane.settings.tick_seconds):
            raise Unavailable("check", "controller", f"no good round for {age:.0f} s", "see the server's log")
        return json_response({"status": "ready", "uptime_seconds": round(time.time() - plane.started_at, 1)})

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if run_controller:
            controller.start()
        yield
        controller.stop()

    app = FastAPI(title="Skerry fleet", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.controller = controller
    api, limit = "/api/v1", plane.settings.body_limit
    node, operator = node_api, operator_api
    app.router.routes.extend(
        [
            # nodes
            frame.route("POST", f"{api}/enrol", node.post_enrol),
            frame.route("GET", f"{api}/nodes/{{node}}/desired", node.get_desired),
            frame.route("POST", f"{api}/nodes/{{node}}/heartbeat", node.post_heartbeat),
            frame.route("POST", f"{api}/nodes/{{node}}/events", node.post_events, 2 * MB),
            frame.route("POST", f"{api}/nodes/{{node}}/windows", node.post_windows, 2 * MB),
            frame.route("GET", "/tuf/metadata/{file}", node.get_metadata),
            frame.route("GET", "/tuf/targets/{path:path}", node.get_target),
            frame.route("GET", "/blobs/{digest}", node.get_blob),
            frame.route("HEAD", "/blobs/{digest}", node.get_blob),
            # operators
            frame.operator("GET", f"{api}/nodes", operator.list_nodes),
            frame.operator("GET", f"{api}/nodes/{{node}}", operator.show_node),
            frame.operator("POST", f"{api}/nodes/{{node}}/revoke", operator.revoke_node),
            frame.operator("POST", f"{api}/tokens", operator.create_token),
            frame.operator("PUT", f"{api}/blobs/{{digest}}", operator.put_blob, BLOB_LIMIT),
            frame.operator("HEAD", f"{api}/blobs/{{digest}}", operator.head_blob),
            frame.operator("POST", f"{api}/blobs/missing", operator.missing_blobs, limit),
            frame.operator("POST", f"{api}/releases", operator.publish_release, 4 * limit),
            frame.operator("GET", f"{api}/releases", operator.list_releases),
            frame.operator("POST", f"{api}/releases/renew", operator.renew_releases, 4 * limit),
            frame.operator("POST", f"{api}/releases/{{version}}/qualify", operator.qualify_engine),
            frame.operator("POST", f"{api}/rollouts", operator.start_rollout),
            frame.operator("GET", f"{api}/rollouts", operator.list_rollouts),
            frame.operator("GET", f"{api}/rollouts/{{rollout}}", operator.show_rollout),
            frame.operator("GET", f"{api}/rollouts/{{rollout}}/history", operator.rollout_history),
            *(
                frame.operator("POST", f"{api}/rollouts/{{rollout}}/{action}", _with(operator.act_on_rollout, action))
                for action in ("pause", "resume", "abort", "undo", "approve")
            ),
            frame.operator("POST", f"{api}/data-sources", operator.add_source),
            frame.operator("GET", f"{api}/data-sources", operator.list_sources),
            frame.operator("GET", f"{api}/drift", operator.drift_status),
            frame.operator("GET", f"{api}/retrain-requests", operator.list_retrain),
            *(
                frame.operator(
                    "POST", f"{api}/retrain-requests/{{request}}/{verb}", _with(operator.act_on_retrain, verb)
                )
                for verb in ("claim", "complete", "fail")
            ),
            frame.operator("GET", f"{api}/audit", operator.show_audit),
            # everyone
            frame.route("GET", "/health/live", live),
            frame.route("GET", "/health/ready", ready),
            frame.route("GET", "/metrics", metrics),
            frame.route("GET", "/", dashboard.page),
            frame.route("GET", "/fleet.css", dashboard.style),
        ]
    )
    install_error_handlers(app)
    return app


def _with(handler: Handler, action: str) -> Handler:
    """The handler with its verb bound: verbs are routes of their own, an unknown one is a 404."""

    def bound(call: Call) -> Response:
        return handler(replace(call, path={**call.path, "action": action}))

    bound.__name__, bound.__module__ = f"{handler.__name__}_{action}", handler.__module__
    return bound
