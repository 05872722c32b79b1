"""Embeddings: hidden states of the engine that also generates, in the same batches.

Each input is a request of its own that generates nothing. Only a few of one client's inputs are in the scheduler at a
time, so a long list waits in its own queue and not in everybody's.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.runtime.answer import ClientGone, failure
from skerry.runtime.api_error import ApiError, refuse
from skerry.runtime.pooling import Pooling
from skerry.runtime.prompting import encode, no_tokens, truncated
from skerry.runtime.request import Request, Sequence, Update
from skerry.runtime.scheduler import QueueFull
from skerry.runtime.service import THREAD_CHARACTERS, Service
from skerry.runtime.text_protocol import EmbeddingCall

Float32 = npt.NDArray[np.float32]
AT_ONCE = 16
MAX_NUMBERS = 1 << 21  # of one answer: 11 MB as base64


class Embedding:
    """A call on its way; its vectors are awaited once. `cancel` from the event loop: the client has left."""

    def __init__(self, service: Service, call: EmbeddingCall, prompts: list[tuple[int, ...]], tenant: bytes) -> None:
        self.call, self.prompts = call, prompts
        self._service = service
        self._scope = service.scope(tenant, call.salt)
        self._deadline = math.inf if call.timeout is None else time.monotonic() + call.timeout
        self._left = deque(range(len(prompts)))
        self._open: dict[Sequence, int] = {}
        self._news: asyncio.Queue[Update | None] = asyncio.Queue()

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def put(self, update: Update) -> None:
        self._news.put_nowait(update)

    def cancel(self) -> None:
        self._service.leave(*self._open)
        self._news.put_nowait(None)

    async def vectors(self) -> list[Float32]:
        """Of each input, in order. Raises ApiError, SkerryError (429: the queue is full) or ClientGone."""
        found: dict[int, Float32] = {}
        try:
            while self._left or self._open:
                self._submit()
                update = await self._news.get()
                if update is None:
                    self._service.metrics.cancelled()
                    raise ClientGone
                error = failure(update, self.call.timeout)
                if error is not None:
                    raise error
                index, pooling = self._open.pop(update.sequence), update.sequence.request.pooling
                assert pooling is not None
                found[index] = finished(pooling.vector(), self.call)
                self._service.leave(update.sequence)
                self._service.metrics.embedded(len(self.prompts[index]))
        finally:
            self._service.leave(*self._open)
        return [found[index] for index in range(len(self.prompts))]

    def _submit(self) -> None:
        while self._left and len(self._open) < AT_ONCE:
            prompt = self.prompts[self._left[0]]
            request = Request(
                prompt, 0, priority=self.call.priority, deadline=self._deadline, scope=self._scope,
                pooling=Pooling(len(prompt), self.call.mean),
            )  # fmt: skip
            try:
                sequence = self._service.enter(self, request)
            except QueueFull:
                if not self._open:
                    raise
                return
            self._open[sequence] = self._left.popleft()


async def embed(service: Service, call: EmbeddingCall, tenant: bytes) -> Embedding:
    """Raises ApiError 400: what never fits, before anything is computed."""
    service.check_model(call.model)
    if not service.hidden_size:
        why = "this engine hands out no hidden states; export its bundle with this version"
        raise ApiError(400, why, code="unsupported_parameter")
    if len(call.inputs) * (call.dimensions or service.hidden_size) > MAX_NUMBERS:
        raise refuse("input", f"{len(call.inputs)} vectors are more than {MAX_NUMBERS} numbers: ask in parts")
    aside = call.text_size > THREAD_CHARACTERS
    prompts = await asyncio.to_thread(_encoded, service, call) if aside else _encoded(service, call)
    return Embedding(service, call, prompts, tenant)


def _encoded(service: Service, call: EmbeddingCall) -> list[tuple[int, ...]]:
    model, room, prompts = service.model, service.loop.scheduler.max_tokens, []
    for index, source in enumerate(call.inputs):
        where = f"input[{index}]"
        ids = truncated(encode(model.chat, source, call.prompting), call.prompting, room)
        if not ids:
            raise no_tokens(where)
        if len(ids) > room:
            raise refuse(where, f"{len(ids)} tokens are more than the {room} that fit", "context_length_exceeded")
        prompts.append(ids)
    return prompts


def finished(vector: Float32, call: EmbeddingCall) -> Float32:
    """Cut to the dimensions asked for, and of length 1."""
    vector = vector[: call.dimensions]
    if not call.normalize:
        return vector
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector / np.float32(length) if length else vector


def body(model: str, call: EmbeddingCall, vectors: list[Float32], prompt_tokens: int) -> dict[str, Any]:
    """The answer in OpenAI's shape."""
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(vector, call.base64)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _shown(vector: Float32, as_base64: bool) -> str | list[float]:
    """Little-endian float32 in base64, or decimal numbers: nine digits hold a float32 of a normalised vector."""
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.astype(np.float64).round(9).tolist()
