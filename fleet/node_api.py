"""What nodes call: enrol once; then poll the desired state, report, and fetch metadata, manifests and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import Response

from skerry.core.errors import InputError, NotFound
from skerry.fleet import auth, director, enrol, ingest
from skerry.fleet.blobs import parse_range
from skerry.fleet.http import Call, json_response
from skerry.fleet.store import ManifestRow, Node

IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}
NEVER_CACHE = {"Cache-Control": "no-cache"}


@contextmanager
def _as_node(call: Call) -> Iterator[tuple[Session, Node]]:
    """One transaction that holds the authenticated node: replay counter and effect are kept together or not at all."""
    with call.plane.store.write() as session:
        yield (
            session,
            auth.node_request(session, call.path["node"], call.method, call.target, call.headers, call.body),
        )


def post_enrol(call: Call) -> Response:
    with call.plane.store.write(durable=True) as session:
        node = enrol.enrol(session, call.json())
        document = {
            "node": node.id,
            "poll_seconds": call.plane.settings.poll_seconds,
            "director_key": call.plane.director_public,
            "root": call.plane.root_base64,
        }
    return json_response(document, 201)


def get_desired(call: Call) -> Response:
    with _as_node(call) as (session, node):
        wanted = call.plane.director.desired(session, node)
    tag = director.etag(wanted)
    headers = {"ETag": tag, **NEVER_CACHE}
    if tag in [part.strip() for part in call.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    return json_response(call.plane.sign(wanted), headers=headers)


def post_heartbeat(call: Call) -> Response:
    with _as_node(call) as (session, node):
        ingest.heartbeat(session, node, call.json())
    return json_response({"poll_seconds": call.plane.settings.poll_seconds})


def post_events(call: Call) -> Response:
    with _as_node(call) as (session, node):
        outcome = ingest.events(session, node, call.json())
    return json_response(outcome)


def post_windows(call: Call) -> Response:
    with _as_node(call) as (session, node):
        outcome = ingest.windows(session, node, call.json())
    for name, count in outcome.items():
        call.plane.metrics.windows.labels(name).inc(count)
    call.plane.metrics.telemetry.inc(len(call.body))
    return json_response(outcome)


def get_metadata(call: Call) -> Response:
    name = call.path["file"]
    with call.plane.store.read() as session:
        body = call.plane.repository.file(session, name)
    versioned = name[:1].isdigit()
    return Response(body, media_type="application/json", headers=IMMUTABLE if versioned else NEVER_CACHE)


def get_target(call: Call) -> Response:
    """`{release}/{target}.manifest.json`, with the digest in front of the file's name or without."""
    release, _, name = call.path["path"].rpartition("/")
    first, _, rest = name.partition(".")
    digest, name = (first, rest) if len(first) == 64 else ("", name)
    target = name.removesuffix(".manifest.json")
    query = select(ManifestRow).where(ManifestRow.release == release, ManifestRow.target == target)
    with call.plane.store.read() as session:
        row = session.execute(query).scalar_one_or_none()
    if row is None or target == name or (digest and digest != row.sha256):
        raise NotFound("read target", call.path["path"][:200], "no such target")
    return Response(row.body, media_type="application/json", headers=IMMUTABLE)


def get_blob(call: Call) -> Response:
    digest = call.path["digest"]
    data = call.plane.blobs.read(digest)
    headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes", **IMMUTABLE}
    try:
        part = parse_range(call.headers.get("range"), len(data))
    except InputError:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
    if call.method == "HEAD":
        return Response(headers={**headers, "Content-Length": str(len(data))})
    if part is None:
        return Response(data, media_type="application/octet-stream", headers=headers)
    first, last = part
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Response(data[first : last + 1], 206, headers, media_type="application/octet-stream")
