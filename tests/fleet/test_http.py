"""The HTTP frame: limits, errors of one shape, blobs with ranges, health, metrics, the dashboard's door."""

from __future__ import annotations

import threading
import time

import anyio
import httpx
import pytest

from skerry.core.errors import InputError, StorageError
from skerry.core.files import sha256_bytes
from skerry.fleet.app import create_app
from skerry.fleet.blobs import BLOB_LIMIT, Blobs, parse_range
from skerry.fleet.http import Frame, json_response
from skerry.fleet.plane import Plane, init


def put(server, data, digest=None):
    url = f"{server.url}/api/v1/blobs/{digest or sha256_bytes(data)}"
    return httpx.put(url, content=data, headers={"Authorization": f"Bearer {server.token}"})


def test_blobs_are_what_their_name_says_and_answer_ranges(shared):
    data = bytes(range(256)) * 10
    digest = sha256_bytes(data)
    assert put(shared, data).status_code == 201 and put(shared, data).status_code == 200
    assert put(shared, data, "0" * 64).json()["error"]["code"] == "invalid_input"
    assert put(shared, data, "../../etc/passwd").status_code in (400, 404)
    assert put(shared, b"x" * (BLOB_LIMIT + 1)).status_code == 413
    url = f"{shared.url}/blobs/{digest}"
    whole = httpx.get(url)
    assert whole.content == data and "immutable" in whole.headers["cache-control"]
    for header, part in (("bytes=0-9", data[:10]), ("bytes=2550-", data[2550:]), ("bytes=-6", data[-6:]), ("bytes=9-9", data[9:10])):  # fmt: skip  # noqa: E501
        answer = httpx.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (206, part)
    assert httpx.get(url, headers={"Range": "bytes=99999-"}).status_code == 416
    assert httpx.head(url).headers["content-length"] == str(len(data))
    assert httpx.get(f"{shared.url}/blobs/{'1' * 64}").status_code == 404
    assert httpx.get(f"{shared.url}/blobs/nonsense").status_code == 400


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("items=0-1", None),
        ("bytes=0-1,3-4", None),
        ("bytes=-", None),
        ("bytes=0-0", (0, 0)),
        ("bytes=5-900", (5, 9)),
        ("bytes=-900", (0, 9)),
    ],
)
def test_ranges(header, expected):
    assert parse_range(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=5-2", "bytes=-0"])
def test_ranges_outside(header):
    with pytest.raises(InputError):
        parse_range(header, 10)


def test_a_rotten_blob_is_never_served(tmp_path):
    blobs = Blobs(tmp_path)
    digest = sha256_bytes(b"abc")
    blobs.put(digest, b"abc")
    blobs.path(digest).write_bytes(b"abd")
    with pytest.raises(StorageError, match="damaged"):
        blobs.read(digest)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("DELETE", "/health/live", 405),
        ("GET", "/tuf/metadata/evil.json", 404),
        ("GET", "/tuf/metadata/99.root.json", 404),
        ("GET", "/tuf/targets/v1/../../x", 404),
        ("GET", "/api/v1/enrol", 405),
        ("GET", "/docs", 404),
    ],
)
def test_errors_have_one_shape(shared, method, path, status):
    answer = httpx.request(method, shared.url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"code", "message", "hint"}


@pytest.mark.parametrize("length", ["-1", "x", "999999999999"])
def test_dishonest_content_lengths(shared, length):
    import socket

    host, port = shared.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(f"POST /api/v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
        assert raw.recv(100).split()[1] in (b"400", b"413")


def test_a_chunked_body_is_counted_while_it_arrives(shared):
    answer = httpx.post(f"{shared.url}/api/v1/enrol", content=(b"x" * 10_000 for _ in range(100)))
    assert answer.status_code == 413


def test_too_many_at_once_are_told_to_come_back(tmp_path, settings):
    from dataclasses import replace

    init(tmp_path / "f")
    plane = Plane.open(tmp_path / "f" / "server", replace(settings, max_in_flight=2, workers=2))
    app = create_app(plane, run_controller=False)
    gate = threading.Event()

    def slow(call):
        gate.wait(5)
        return json_response({})

    app.router.routes.append(Frame(plane).route("GET", "/slow", slow))

    async def crowd():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            codes: list[int] = []

            async def one():
                answer = await client.get("/slow")
                codes.append(answer.status_code)
                if answer.status_code == 429:
                    assert answer.headers["retry-after"] and answer.json()["error"]["code"] == "overloaded"
                    gate.set()

            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(one)
            return sorted(codes)

    assert anyio.run(crowd) == [200, 200, 429, 429]
    plane.close()


def test_health_and_metrics(shared, serving):
    assert httpx.get(f"{shared.url}/health/live").json() == {"status": "ok"}
    assert httpx.get(f"{shared.url}/health/ready").json()["status"] == "ready"
    text = httpx.get(f"{shared.url}/metrics").text
    assert 'skerry_fleet_nodes{state="online"} 1.0' in text and "skerry_fleet_request_seconds_bucket" in text


def test_the_dashboard_is_open_to_this_machine_only(shared, serving):
    page = httpx.get(shared.url + "/")
    assert page.status_code == 200 and "serving" in page.text and "v1" in page.text
    assert "script" not in page.headers["content-security-policy"]
    assert httpx.get(shared.url + "/fleet.css").headers["content-type"].startswith("text/css")
    for headers in ({"Host": "evil.example"}, {"X-Forwarded-For": "10.0.0.1"}):
        answer = httpx.get(shared.url + "/", headers=headers)
        assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
        assert httpx.get(shared.url + "/", headers=headers, auth=("operator", shared.token)).status_code == 200


def test_what_a_node_says_is_text_on_the_dashboard(server, client, join):
    node = join("n1")
    beat = {"node": node.id, "boot": 1, "seq": 1, "at": 1.0, "generation": 0, "state": "IDLE", "engine_digest": None,
            "manifest_sha256": None, "release": "<script>alert(1)</script>", "requests": 0, "failed": 0}  # fmt: skip
    assert node.call("POST", "heartbeat", beat).status_code == 200
    page = httpx.get(server.url + "/").text
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_an_idle_control_plane_writes_nothing(server):
    path = server.directory / "server" / "fleet.db-wal"
    time.sleep(0.2)
    before = path.stat().st_mtime_ns
    time.sleep(0.5)
    assert path.stat().st_mtime_ns == before


def test_discovery_finds_a_control_plane_on_loopback():
    from skerry.fleet.discovery import Advertisement, find

    advertisement = Advertisement.start("127.0.0.1", 7999, b"root")
    if advertisement is None:
        pytest.skip("this machine allows no multicast")
    try:
        assert sha256_bytes(b"root") in [one.root_digest for one in find(1.5)]
    finally:
        advertisement.stop()
