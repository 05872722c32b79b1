"""A control plane small enough to lie on demand: real HTTP, signatures and TUF metadata; no database, no rollouts.

Tests set `wish`, publish bundles, and break it: `mode` (ok, down, garbage, hang, drip), `tampered` chunks, expired
metadata, forged or replayed desired states.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from skerry.core.bundle import open_bundle
from skerry.core.errors import SkerryError
from skerry.core.files import sha256_bytes
from skerry.core.wire import Desired, generate_key, public_hex, sign_document, verify_request


class Repository:
    """TUF metadata in memory, consistent snapshots; `releases` is delegated, as in the product."""

    def __init__(self) -> None:
        roles = ("root", "targets", "releases", "snapshot", "timestamp")
        self.keys = {role: CryptoSigner(Ed25519PrivateKey.generate()) for role in roles}
        self.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
        self.custom: dict[str, Any] = {"floor": 0}
        self.manifests: dict[str, bytes] = {}
        self.version = 0
        self.files: dict[str, bytes] = {}
        root = Root(expires=self.expires, consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            root.add_key(self.keys[role].public_key, role)
        self.root = self._put("1.root.json", root, "root")
        self.write()

    def write(self, expires: datetime | None = None) -> None:
        """Signs everything anew as the next version; `expires` is that of the timestamp."""
        self.version += 1
        delegation = DelegatedRole("releases", [], 1, terminating=True, paths=["*/*.manifest.json"])
        targets = Targets(version=self.version, expires=self.expires,
                          delegations=Delegations(keys={}, roles={"releases": delegation}))  # fmt: skip
        targets.add_key(self.keys["releases"].public_key, "releases")
        releases = Targets(version=self.version, expires=self.expires)
        for path, raw in self.manifests.items():
            releases.targets[path] = TargetFile.from_data(path, raw, ["sha256"])
            releases.targets[path].unrecognized_fields["custom"] = dict(self.custom)
        meta = {f"{role}.json": MetaFile(self.version) for role in ("targets", "releases")}
        snapshot = Snapshot(version=self.version, expires=self.expires, meta=meta)
        stamp = Timestamp(version=self.version, expires=expires or self.expires, snapshot_meta=MetaFile(self.version))
        self._put(f"{self.version}.targets.json", targets, "targets")
        self._put(f"{self.version}.releases.json", releases, "releases")
        self._put(f"{self.version}.snapshot.json", snapshot, "snapshot")
        self._put("timestamp.json", stamp, "timestamp")

    def _put(self, name: str, signed: Any, role: str) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(self.keys[role])
        self.files[name] = metadata.to_bytes()
        return self.files[name]


class ControlPlane:
    """Serves on a loopback port from construction until `close`."""

    def __init__(self, poll_seconds: float = 0.1) -> None:
        self.poll_seconds = poll_seconds
        self.director = generate_key()
        self.repository = Repository()
        self.tokens = {"good-token"}
        self.nodes: dict[str, str] = {}
        self.last: dict[str, tuple[int, int]] = {}
        self.blobs: dict[str, bytes] = {}
        self.tampered: set[str] = set()
        self.mode = "ok"
        self.blob_delay = 0.0
        self.wish: dict[str, Any] = {}
        self.node_wishes: dict[str, tuple[int, dict[str, Any]]] = {}
        self.quarantined: tuple[str, ...] = ()
        self.floor = 0
        self.generation = 0
        self.envelope: dict[str, Any] | None = None
        self.heartbeats: list[dict[str, Any]] = []
        self.events: dict[tuple[int, int], dict[str, Any]] = {}
        self.windows: list[dict[str, Any]] = []
        self.blob_requests: list[str] = []
        self.replays = 0
        self.lock = threading.Lock()
        plane = self

        class Handler(_Handler):
            control = plane

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Nodes are killed in the middle of their requests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, bundle_path: Path, release: str | None = None, sign: bool = True) -> dict[str, Any]:
        """Takes the bundle's blobs and signs its manifest (unless `sign` is False); returns the wish for it."""
        bundle = open_bundle(bundle_path)
        release = release or bundle.manifest.version
        for entry in bundle.manifest.files:
            raw = (bundle.path / entry.name).read_bytes()
            offset = 0
            for chunk in entry.chunks:
                self.blobs[chunk.sha256] = raw[offset : offset + chunk.size]
                offset += chunk.size
        path = f"{release}/ort-cpu.manifest.json"
        if sign:
            self.repository.manifests[path] = bundle.manifest_bytes
            self.repository.write()
        return {"release": release, "manifest_path": path, "manifest_sha256": bundle.digest,
                "engine_digest": bundle.manifest.engine_digest}  # fmt: skip

    def want(self, wish: dict[str, Any], node: str = "", **changes: Any) -> None:
        """For all nodes, or for one."""
        with self.lock:
            self.generation += 1
            if node:
                self.node_wishes[node] = (self.generation, {**wish, **changes})
            else:
                self.wish = {**wish, **changes}

    def desired(self, node: str) -> dict[str, Any]:
        if self.envelope is not None:
            return self.envelope
        blank = dict.fromkeys(("release", "manifest_path", "manifest_sha256", "engine_digest"))
        generation, wish = self.node_wishes.get(node, (self.generation, self.wish))
        desired = Desired.from_json({
            **blank, **wish, "node": node, "generation": generation, "poll_seconds": self.poll_seconds,
            "window_requests": 16, "quarantined": list(self.quarantined), "floor": self.floor, "hash_seed": 7,
        })  # fmt: skip
        return sign_document(desired.to_json(), self.director, "director")

    def enrol(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if request["token"] not in self.tokens:
            return 401, {"error": {"code": "unauthorized", "message": "enrol: unknown token", "hint": "ask for one"}}
        node = f"{request['name']}-1"
        self.nodes[node] = request["public_key"]
        return 201, {"node": node, "poll_seconds": self.poll_seconds, "director_key": public_hex(self.director),
                     "root": base64.b64encode(self.repository.root).decode()}  # fmt: skip

    def node_request(self, node: str, leaf: str, document: Any) -> tuple[int, dict[str, Any]]:
        if leaf == "desired":
            return 200, self.desired(node)
        if leaf == "heartbeat":
            self.heartbeats.append(document)
            return 200, {"poll_seconds": self.poll_seconds}
        if leaf == "events":
            for event in document["events"]:
                self.events.setdefault((event["boot"], event["seq"]), event)
        if leaf == "windows":
            self.windows.extend(document["windows"])
        return 200, {"accepted": 1, "duplicate": 0}

    @property
    def beat(self) -> dict[str, Any]:
        return self.heartbeats[-1] if self.heartbeats else {}

    def kinds(self) -> list[str]:
        return [event["kind"] for _, event in sorted(self.events.items())]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for _, event in sorted(self.events.items()) if event["kind"] == kind]


class _Handler(BaseHTTPRequestHandler):
    control: ControlPlane
    protocol_version = "HTTP/1.1"
    timeout = 20.0

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers.get("content-length", 0))))

    def _handle(self, body: bytes) -> None:
        control = self.control
        if control.mode == "down":
            self._answer(503, b'{"error":{"code":"unavailable","message":"down","hint":""}}')
        elif control.mode == "garbage":
            self._answer(200, b"<html>It works!</html>")
        elif control.mode == "hang":
            time.sleep(3.0)
            self.close_connection = True
        else:
            self._answer(*self._route(self.path, body))

    def _route(self, path: str, body: bytes) -> tuple[int, bytes]:
        control, parts = self.control, path.strip("/").split("/")
        if path == "/api/v1/enrol":
            status, document = control.enrol(json.loads(body))
            return status, json.dumps(document).encode()
        if path.startswith("/api/v1/nodes/"):
            return self._node(parts[3], parts[4], body)
        if path.startswith("/tuf/metadata/"):
            raw = control.repository.files.get(parts[2])
            return (200, raw) if raw is not None else (404, b"{}")
        if path.startswith("/tuf/targets/"):
            digest, _, name = parts[3].partition(".")
            raw = control.repository.manifests.get(f"{parts[2]}/{name}", b"")
            return (200, raw) if sha256_bytes(raw) == digest else (404, b"{}")
        if path.startswith("/blobs/"):
            time.sleep(control.blob_delay)
            control.blob_requests.append(parts[1])
            raw = control.blobs.get(parts[1])
            if raw is None:
                return 404, b"{}"
            return 200, bytes([raw[0] ^ 1]) + raw[1:] if parts[1] in control.tampered else raw
        return 404, b"{}"

    def _node(self, node: str, leaf: str, body: bytes) -> tuple[int, bytes]:
        control = self.control
        with control.lock:
            try:
                counter = verify_request(control.nodes[node], self.command, self.path, dict(self.headers), body)
            except (SkerryError, KeyError) as error:
                return 401, json.dumps({"error": {"code": "unauthorized", "message": str(error), "hint": ""}}).encode()
            if counter <= control.last.get(node, (0, 0)):
                control.replays += 1
                return 401, b'{"error":{"code":"replay","message":"replayed","hint":""}}'
            control.last[node] = counter
            status, document = control.node_request(node, leaf, json.loads(body) if body else None)
        return status, json.dumps(document).encode()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""
