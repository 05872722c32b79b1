"""Who gets in, over what, and how long strangers may keep a connection: keys, TLS, slow and many clients."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from skerry.core.errors import InputError, UsageError
from skerry.runtime.access import Access, KeyFiles, read_keys
from skerry.runtime.connections import guarded
from skerry.runtime.node_settings import NodeSettings
from skerry.runtime.server import Options
from skerry.runtime.tls import TlsFiles
from tests.runtime.peft_folders import random_tensors, write_peft
from tests.runtime.test_peft import LAYOUT


def make_certificate(folder: Path, name: str = "a", password: bytes | None = None, days: int = 1) -> TlsFiles:
    """Self-signed, for 127.0.0.1."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=3))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    files = TlsFiles(folder / f"{name}.crt", folder / f"{name}.key")
    files.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM
    files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, hidden))
    return files


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.faults("wrong and missing keys")
def test_keys_are_tenants_and_the_admin_key_opens_both(start, run):
    async def scenario() -> None:
        access = Access((b"one", b"two", "sch\u00f6n".encode()), (b"root",))
        async with start(options=Options(access)) as server:

            async def status(headers: dict[str, Any]) -> int:
                return (await server.client.get("/v1/models", headers=headers)).status_code

            for key in ("one", "two", "root"):
                assert await status(bearer(key)) == 200
            assert await status({b"authorization": b"Bearer " + "sch\u00f6n".encode()}) == 200
            assert await status({"authorization": "bearer one"}) == 200
            for headers in ({}, {"authorization": "Bearer"}, bearer("on"), bearer("onee"), {"authorization": "one"},
                            {"authorization": "Basic one"}, {b"authorization": b"Bearer \xff\xfe"}):  # fmt: skip
                assert await status(headers) == 401, headers

            async def cached(key: str) -> int:
                body = {"prompt": "the same long beginning for all", "max_tokens": 2}
                answer = await server.client.post("/v1/completions", json=body, headers=bearer(key))
                return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

            for key in ("one", "two", "root"):  # none finds what another has asked
                assert await cached(key) == 0 < await cached(key)
            access.replace((b"three",), (b"root",))
            assert await status(bearer("one")) == 401 and await status(bearer("three")) == 200

    run(scenario())


def test_every_key_is_compared_in_constant_time(monkeypatch):
    """Whatever is given, all keys are compared, each as a digest of one length."""
    import hmac

    seen: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    access = Access((b"a", b"bb", b"c" * 99), (b"root",))

    class Asked:
        headers = bearer("a")

    access.check(Asked())  # type: ignore[arg-type]
    assert len(seen) == 4 and {len(one) for pair in seen for one in pair} == {32}


def test_key_files(tmp_path):
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_bytes(b" one \n\ntwo\r\n")
    admin.write_bytes(b"root")
    assert KeyFiles(keys, admin).read() == ((b"one", b"two"), (b"root",)) and KeyFiles().read() == ((), ())
    admin.write_bytes(b"two")
    with pytest.raises(InputError, match="a key in it is in"):
        KeyFiles(keys, admin).read()
    admin.write_bytes(b"\n \n")
    for path, words in ((admin, "it holds no keys"), (tmp_path / "none", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=words):
            read_keys(path)


def test_answers_over_tls(start, run, tmp_path):
    files = make_certificate(tmp_path)

    async def scenario() -> None:
        context = files.context()
        async with start(tls=context) as server:
            assert server.url.startswith("https://")
            trusting = ssl.create_default_context(cafile=str(files.cert))
            async with httpx.AsyncClient(base_url=server.url, verify=trusting) as client:
                body = {"prompt": "hi", "max_tokens": 4, "stream": True}
                assert "[DONE]" in (await client.post("/v1/completions", json=body)).text
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                async with httpx.AsyncClient(base_url=server.url) as client:
                    await client.get("/health/live")
            with pytest.raises(httpx.HTTPError):
                async with httpx.AsyncClient() as client:
                    await client.get(server.url.replace("https", "http") + "/health/live")
            assert (await server.client.get("/health/live")).status_code == 200
            newer = make_certificate(tmp_path, "b")
            newer.load_into(context)
            trusting = ssl.create_default_context(cafile=str(newer.cert))
            async with httpx.AsyncClient(base_url=server.url, verify=trusting) as client:
                assert (await client.get("/health/live")).status_code == 200

    run(scenario())


def test_tls_files_that_do_not_do(tmp_path, caplog):
    good, other = make_certificate(tmp_path, "a"), make_certificate(tmp_path, "b")
    locked = make_certificate(tmp_path, "c", password=b"secret")
    text = tmp_path / "text"
    text.write_text("hello")
    huge = tmp_path / "huge"
    huge.write_bytes(b"-" * (1 << 21))
    for files, words in (
        (TlsFiles(tmp_path / "none", good.key), "No such file"),
        (TlsFiles(good.cert, tmp_path / "none"), "No such file"),
        (TlsFiles(tmp_path, good.key), "directory"), (TlsFiles(text, good.key), "holds no PEM certificate"),
        (TlsFiles(good.cert, text), "holds no PEM private key"), (TlsFiles(good.cert, good.cert), "no PEM private key"),
        (TlsFiles(good.cert, other.key), "it is not the key of"), (locked, "the key is encrypted"),
        (TlsFiles(huge, good.key), "more than 1048576 bytes"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            files.context()
    assert TlsFiles.of(None, None) is None and TlsFiles.of(good.cert, good.key) == good
    for pair in ((good.cert, None), (None, good.key)):
        with pytest.raises(UsageError, match="go together"):
            TlsFiles.of(*pair)
    make_certificate(tmp_path, "old", days=-1).context()
    assert "expired" in caplog.text


async def talk(server: Any, *parts: bytes, pause: float = 0.0, patience: float = 5.0) -> bytes:
    """Everything a raw socket gets back after it has sent `parts`, until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        async with asyncio.timeout(patience):
            return await reader.read()
    finally:
        writer.close()


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head and b"connection: close" in head
    assert f"content-length: {len(body)}".encode() in head
    return json.loads(body)["error"] | {"status": int(head.split()[1])}


@pytest.mark.faults("a client that sends its head byte by byte")
def test_a_head_that_never_ends_is_given_up(start, run):
    async def scenario() -> None:
        async with start(protocol=guarded(head_seconds=0.4)) as server:
            began = time.monotonic()
            error = error_of(await talk(server, b"GET /health/live HTTP/1.1\r\nhost: x\r\n"))
            assert error["status"] == 408 and 0.3 < time.monotonic() - began < 2
            drip = [b"GET /health/live HTTP/1.1\r\n", *[f"x-{i}: y\r\n".encode() for i in range(30)]]
            with pytest.raises(ConnectionError):  # it is cut while it goes on
                began = time.monotonic()
                await talk(server, *drip, pause=0.1)
            assert time.monotonic() - began < 2
            assert await talk(server) == b""  # said nothing: no answer that would be taken for another's
            assert (await server.client.get("/health/live")).status_code == 200

    run(scenario())


@pytest.mark.faults("a slow second head on a kept-alive connection")
def test_a_kept_alive_connection_is_watched_too(start, run):
    async def scenario() -> None:
        async with start(protocol=guarded(head_seconds=0.4)) as server:
            request = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
            answer = await talk(server, request, request, b"GET /hea", pause=0.1)
            assert answer.count(b"200 OK") == 2 and answer.count(b"408 Request Timeout") == 1
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
            for _ in range(2):  # and one that is idle for longer than that is left alone
                writer.write(request)
                assert b'{"status":"live"}' in await reader.readuntil(b"}")
                await asyncio.sleep(0.8)
            writer.close()

    run(scenario())


@pytest.mark.faults("a body that goes on after its refusal")
def test_a_body_that_nobody_reads_any_more_is_not_waited_for(start, run):
    async def scenario() -> None:
        options = Options(Access((b"one",)))
        async with start(options=options, protocol=guarded(head_seconds=0.4)) as server:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                await talk(server, head, *[b"x"] * 30, pause=0.1)
            assert time.monotonic() - began < 2
            last = head.replace(b"host: x", b"host: x\r\nconnection: close")
            whole = await talk(server, head, b"x" * 500, b"x" * 500, last + b"x" * 1000, pause=0.1)
            assert whole.count(b"401 Unauthorized") == 2

    run(scenario())


@pytest.mark.faults("a client that reads nothing of its stream")
def test_a_client_that_does_not_read_is_cut(start, run):
    async def scenario() -> None:
        async with start(protocol=guarded(write_seconds=0.4)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]), limit=1024)
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 4000)
            await server.until(lambda: bool(server.listener._server.server_state.connections))
            await server.until(lambda: not server.listener._server.server_state.connections, 20)
            with pytest.raises(ConnectionError):
                while await reader.read(1 << 16):
                    pass
                raise ConnectionError
            writer.close()
            assert (await server.client.get("/health/live")).status_code == 200

    run(scenario())


def test_slow_answers_are_no_slow_heads(start, fake, run):
    async def scenario() -> None:
        async with start(fake(delay=0.05), protocol=guarded(head_seconds=0.2)) as server:
            assert (await server.chat(max_tokens=15)).status_code == 200
            body = b'{"prompt": "hi", "max_tokens": 12, "stream": true}'
            head = (
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            answer = await talk(server, head.encode(), body[:9], body[9:], pause=0.3)
            assert answer.count(b"200 OK") == 1 and b"[DONE]" in answer and b"408" not in answer

    run(scenario())


@pytest.mark.faults("bytes that are no HTTP")
def test_what_is_no_http_gets_json(start, run):
    async def scenario() -> None:
        async with start() as server:
            for garbage in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x" * 100_000):
                assert error_of(await talk(server, garbage))["status"] == 400
            chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
            assert error_of(await talk(server, chunked))["status"] == 400
            assert (await server.client.get("/health/live")).status_code == 200

    run(scenario())


@pytest.mark.faults("more connections than the limit")
def test_beyond_the_limit_newcomers_are_told(start, run):
    async def scenario() -> None:
        async with start(protocol=guarded(limit=3)) as server:
            port = int(server.url.rpartition(":")[2])
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            request = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"
            await asyncio.sleep(0.05)
            answer = await talk(server, request)
            error = error_of(answer)
            assert (error["status"], error["code"]) == (503, "too_many_connections") and b"retry-after: 1" in answer
            held += [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await asyncio.sleep(0.05)
            with pytest.raises(ConnectionError):
                assert await talk(server, request) == b"", "neither cut nor silent"
                raise ConnectionError  # closed before it was read: as good
            held[0][1].write(request)  # who was there first is served
            assert b"200 OK" in await held[0][0].readuntil(b"\r\n")
            for _, writer in held:
                writer.close()
            await asyncio.sleep(0.1)
            assert (await server.client.get("/health/live")).status_code == 200

    run(scenario())


def test_settings_of_a_node_reach_its_worker():
    assert NodeSettings().worker_options() == []
    kept = NodeSettings(prefix_cache="/kept", prefix_cache_mib=9).worker_options()
    assert kept == ["--prefix-cache", "/kept", "--prefix-cache-mib", "9"]
    told = NodeSettings(adapter_slots=3, adapter_dir="/a", admin_key_file="/k", memory_bytes=5).worker_options()
    assert told == ["--memory-bytes", "5", "--admin-key-file", "/k", "--adapter-dir", "/a", "--adapter-slots", "3",
                    "--adapter-rank", "16"]  # fmt: skip


@pytest.mark.e2e
@pytest.mark.slow
def test_serve_with_tls_keys_and_adapters(bundles, tmp_path):
    from skerry.core.bundle import open_bundle
    from tests.runtime.test_worker import start_serve, url_of

    bundle, files = bundles("int8", adapters=True), make_certificate(tmp_path)
    layout = open_bundle(bundle).manifest.adapters
    for name in ("first", "second"):
        write_peft(tmp_path / "adapters" / name, random_tensors(layout, seed=len(name)))
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text("one\n")
    admin.write_text("root\n")
    process = start_serve(
        bundle, "--port", "0", "--tls-cert", str(files.cert), "--tls-key", str(files.key), "--api-key-file", str(keys),
        "--admin-key-file", str(admin), "--adapter", f"first={tmp_path / 'adapters/first'}",
        "--adapter-dir", str(tmp_path / "adapters"),
    )  # fmt: skip
    try:
        trusting = ssl.create_default_context(cafile=str(files.cert))
        with httpx.Client(base_url=url_of(process), verify=trusting, headers=bearer("one"), timeout=20) as client:

            def said(model: str) -> str:
                body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"][0]["text"]

            body = {"lora_name": "second", "lora_path": "second"}
            refused = client.post("/v1/load_lora_adapter", json=body)
            assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
            assert client.post("/v1/load_lora_adapter", json=body, headers=bearer("root")).status_code == 200
            assert len({said("skerry"), said("first"), said("second")}) == 3
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny", "first", "second"]
            keys.write_text("two\n")
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 5
            while client.get("/v1/models").status_code == 200 and time.monotonic() < deadline:
                time.sleep(0.02)
            assert client.get("/v1/models").status_code == 401
            assert client.get("/v1/models", headers=bearer("two")).status_code == 200
            keys.write_text("\n")
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert client.get("/v1/models", headers=bearer("two")).status_code == 200  # an empty file opens nothing
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.e2e
@pytest.mark.slow
def test_a_worker_of_an_agent_has_slots_where_its_engine_takes_adapters(bundles, tmp_path):
    """An engine without room for adapters is no reason to refuse an update."""
    from skerry.core.bundle import open_bundle
    from tests.runtime.test_worker import Agent

    admin = tmp_path / "admin"
    admin.write_text("root\n")
    plain, roomy = bundles("int8"), bundles("int8", adapters=True)
    write_peft(tmp_path / "a", random_tensors(open_bundle(roomy).manifest.adapters))
    told = NodeSettings(adapter_slots=2, adapter_dir=str(tmp_path), admin_key_file=str(admin)).worker_options()
    for bundle, status, words in ((plain, 409, "opened without slots"), (roomy, 200, "loaded")):
        agent = Agent()
        try:
            worker = agent.start(bundle, *told)
            worker.wait_for("ready")
            worker.send("accept")
            body = {"lora_name": "a", "lora_path": "a"}
            answer = httpx.post(f"{agent.url}/v1/load_lora_adapter", json=body, headers=bearer("root"), timeout=20)
            assert answer.status_code == status and words in answer.text
        finally:
            agent.close()


@pytest.mark.e2e
@pytest.mark.slow
def test_serve_names_what_is_wrong_before_the_engine_loads(bundles, tmp_path):
    from tests.runtime.test_worker import start_serve

    files, other = make_certificate(tmp_path), make_certificate(tmp_path, "b")
    plain, roomy = bundles("int8"), bundles("int8", adapters=True)
    folder = write_peft(tmp_path / "a", random_tensors(LAYOUT))
    for bundle, words, code, message in (
        (plain, ["--tls-cert", str(files.cert)], 2, "go together"),
        (plain, ["--tls-cert", str(files.cert), "--tls-key", str(other.key)], 1, "is not the key of"),
        (plain, ["--admin-key-file", str(tmp_path / "none")], 1, "No such file"),
        (plain, ["--adapter", f"a={folder}"], 1, "its graph takes no adapters"),
        (roomy, ["--adapter", f"a={folder}"], 1, "load adapter a: "), (roomy, ["--adapter", "a"], 2, "is not NAME=DIR"),
        (roomy, ["--adapter", f"tiny={folder}"], 1, "the model itself has that name"),
        (roomy, ["--adapter-dir", str(tmp_path / "none")], 2, "is no directory"),
    ):  # fmt: skip
        process = start_serve(bundle, "--port", "0", *words)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code and message in errors, errors
