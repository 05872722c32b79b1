"""Swapping servers behind one socket, and binding."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from skerry.core.errors import SkerryError
from skerry.runtime.listener import Listener, bind
from skerry.runtime.observe import Observer
from skerry.runtime.process import Orphans
from skerry.runtime.protocol import Defaults
from skerry.runtime.public import bind_public
from skerry.runtime.server import Gate, create_app
from skerry.runtime.service import Model, Service


def test_a_port_in_use_is_named(free_port):
    with socket.create_server(("127.0.0.1", free_port)):
        with pytest.raises(SkerryError, match=f"127.0.0.1:{free_port}: the port is in use") as caught:
            bind("127.0.0.1", free_port)
        assert caught.value.hint


def test_small_answers_wait_for_no_ack(tmp_path):
    """asyncio sets TCP_NODELAY only on sockets that name their protocol."""
    with bind("127.0.0.1", 0) as own, bind_public("127.0.0.1", 0, Orphans(tmp_path / "workers.json")) as inherited:
        assert own.proto == inherited.proto == socket.IPPROTO_TCP


async def serve_on(sock: socket.socket, model: Model, engine: Any) -> tuple[Listener, Service]:
    """A server on its own descriptor of a shared socket, as a worker process would have."""
    service = Service(engine, model, Observer(model.engine_digest, model.tokenizer.digest))
    gate = Gate()
    own = sock.dup()
    own.setblocking(False)
    listener = Listener(create_app(service, gate), own, gate, service)
    service.start()
    await listener.start()
    return listener, service


@pytest.mark.faults("listeners swapped under kept-alive clients")
@pytest.mark.slow
def test_swaps_under_kept_alive_clients_lose_no_request(fake, tokenizer, run):
    from skerry.core.chat import ChatTemplate

    async def scenario() -> None:
        sock = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"

        def model(version: int) -> Model:
            template = ChatTemplate("{{ messages[0].content }}\n>")
            return Model("tiny", f"v{version}", "e" * 64, tokenizer, template, Defaults(258), frozenset({256}))

        stopping = asyncio.Event()
        seen: list[str] = []
        failures: list[str] = []

        async def client(number: int) -> None:
            async with httpx.AsyncClient(timeout=20) as session:
                while not stopping.is_set():
                    stream = number % 2 == 0
                    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": stream}
                    try:
                        response = await session.post(url, json=body)
                    except httpx.HTTPError as error:
                        failures.append(repr(error))
                        continue
                    text = response.text
                    if response.status_code != 200 or (stream and not text.endswith("data: [DONE]\n\n")):
                        failures.append(f"{response.status_code} {text[-200:]}")
                    else:
                        seen.append("v" + text.split('"system_fingerprint":"v')[1][0])
                    await asyncio.sleep(0.05 * (number % 3))

        listener, service = await serve_on(sock, model(0), fake(delay=0.002))
        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for version in range(1, 4):
            await asyncio.sleep(0.5)
            successor, next_service = await serve_on(sock, model(version), fake(delay=0.002))
            await listener.drain(20, successor=True)
            assert service.loop.load().pages_used == 0
            listener, service = successor, next_service
        await asyncio.sleep(0.5)
        stopping.set()
        await asyncio.gather(*clients)
        await listener.drain(5, successor=False)
        sock.close()
        assert failures == [] and {"v0", "v1", "v2", "v3"} == set(seen) and len(seen) > 100

    run(scenario())
