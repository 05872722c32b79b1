"""torch on the same GPU and stream: the product that is a ceiling, and the peers of attention and sampling.

Unlike on a CPU torch runs in this process: nothing of it spins between calls, and data need not be copied.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from skerry.core.errors import SkerryError, Unavailable

Call = Callable[[int], Any]
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}


class TorchSide:
    """Raises Unavailable where torch is not installed or finds no device."""

    def __init__(self, seed: int) -> None:
        try:
            self.torch = importlib.import_module("torch")
        except ImportError as error:
            raise Unavailable("open torch", "", str(error)) from error
        if not self.torch.cuda.is_available():
            raise Unavailable("open torch", self.torch.__version__, "finds no CUDA device")
        self.version = str(self.torch.__version__)
        self.stream = self.torch.cuda.Stream()
        self._random = self.torch.Generator(device="cuda").manual_seed(seed)
        self.torch.set_grad_enabled(False)

    def normal(self, *shape: int, dtype: str = "bfloat16") -> Any:
        with self.torch.cuda.stream(self.stream):
            return self.torch.randn(shape, generator=self._random, device="cuda", dtype=getattr(self.torch, dtype))

    def put(self, array: Any) -> Any:
        with self.torch.cuda.stream(self.stream):
            return self.torch.from_numpy(array).to("cuda")

    def bfloat16(self, there: Any) -> Any:
        """A tensor over what lies on the device, bits of bfloat16 (uint16)."""
        return self.torch.from_dlpack(there.view("int16")).view(self.torch.bfloat16)

    def once(self, call: Call) -> Any:
        """What the call returns, complete."""
        found = call(0)
        self.torch.cuda.synchronize()
        return found

    def on_stream(self, call: Call) -> Call:
        def run(index: int) -> Any:
            with self.torch.cuda.stream(self.stream):
                return call(index)

        return run

    def product(self, size: int) -> Call:
        a, b = self.normal(size, size), self.normal(size, size)
        out = self.torch.empty_like(a)
        return self.on_stream(lambda _: self.torch.mm(a, b, out=out))

    def attention(self, q: Any, k: Any, v: Any, backend: str, causal: bool) -> Call:
        """q [B, H, T, D], k and v [B, G, S, D]. Raises SkerryError where torch refuses this backend for the case."""
        attention = importlib.import_module("torch.nn.attention")
        chosen = getattr(attention.SDPBackend, BACKENDS[backend])
        sdpa = self.torch.nn.functional.scaled_dot_product_attention

        def call(_: int) -> Any:
            with attention.sdpa_kernel(chosen):
                return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return self._tried(f"{backend} attention", self.on_stream(call))

    def sample(self, logits: Any, temperature: float, top_k: int, top_p: float) -> Call:
        """Tokens and how many ids were kept, of logits [B, V], by sort, softmax, cumulative sum and multinomial."""
        torch = self.torch

        def call(_: int) -> tuple[Any, Any]:
            ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True)
            if top_k:
                ordered[:, top_k:] = -torch.inf
            share = torch.softmax(ordered, dim=-1)
            before = torch.cumsum(share, dim=-1) - share
            share = torch.where(before < top_p, share, 0.0)
            drawn = torch.multinomial(share, 1)
            return ids.gather(-1, drawn).squeeze(-1), (share > 0).sum(-1)

        return self._tried("sampling", self.on_stream(call))

    def _tried(self, what: str, call: Call) -> Call:
        try:
            self.once(call)
        except RuntimeError as error:
            raise SkerryError("run torch", what, str(error).splitlines()[0]) from error
        return call
