"""Types of the compiled module (bind.cpp)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ABI: int
VERSION: str
OPS: tuple[str, ...]
SPLIT_TOKENS: int

_F = npt.NDArray[np.float32]
_I = npt.NDArray[np.int32]

Place = tuple[int, int, bool]  # buffer (-1: the caller's logits), width, whether rows are the wanted ones
Segment = tuple[npt.NDArray[np.uint8], int, int, _F | None]  # weight, rows, format, bias

def isa() -> str: ...
def paged_attention(
    q: _F,
    k: _F,
    v: _F,
    kv: npt.NDArray[np.uint8],
    cos: _F,
    sin: _F,
    positions: _I,
    query_start: _I,
    context_len: _I,
    block_table: _I,
    slot: _I,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    rotary_dim: int = 0,
    interleaved: bool = False,
    kv_layout: int = 0,
    threads: int = 1,
) -> _F: ...
def sample(logits: _F, rows: Any, threads: int = 1) -> tuple[_I, _F, _F, _I, _F]: ...
def matmul_block(
    x: _F,
    segments: Sequence[Segment],
    *,
    norm: _F | None = None,
    residual: _F | None = None,
    epsilon: float = 0.0,
    activation: int = 0,
    adapters: npt.NDArray[np.float16] | None = None,
    adapter_rows: _I | None = None,
    query_start: _I | None = None,
    adapter_offset: int = -1,
    threads: int = 1,
) -> list[_F]: ...
def gather_block(ids: _I, table: Segment, width: int) -> _F: ...
def kept(logits: _F, rows: Any, row: int) -> _I: ...
def check_sample(vocabulary: int, rows: Any) -> None: ...
def sample_memory(rows: int, vocabulary: int, multiprocessors: int, shared_bytes: int) -> tuple[int, int]: ...
def plan_sample(
    addresses: dict[str, int],
    rows: int,
    vocabulary: int,
    *,
    mask_rows: int,
    mask_words: int,
    top_n: int,
    dtype: str,
    multiprocessors: int,
    shared_bytes: int,
) -> tuple[str, tuple[int, int, int], tuple[int, int, int], int, bool, bytes]: ...
def philox4x32(c0: int, c1: int, c2: int, c3: int, key0: int, key1: int) -> tuple[int, int, int, int]: ...

class Program:
    def __init__(self, buffers: int, layers: int, groups: int) -> None: ...
    def gather(self, name: str, table: Segment, out: Place) -> None: ...
    def product(
        self,
        name: str,
        x: Place,
        segments: Sequence[Segment],
        out: Sequence[Place],
        *,
        norm: _F | None = None,
        residual: Place | None = None,
        epsilon: float = 0.0,
        activation: int = 0,
        adapter_offset: int = -1,
    ) -> None: ...
    def attention(
        self,
        name: str,
        q: Place,
        k: Place,
        v: Place,
        out: Place,
        cos: _F,
        sin: _F,
        layer: int,
        group: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
        rotary_dim: int = 0,
        interleaved: bool = False,
        kv_layout: int = 0,
    ) -> None: ...
    def pick(self, name: str, x: Place, out: Place) -> None: ...
    def norm(self, name: str, x: Place, out: Place, weight: _F, epsilon: float) -> None: ...
    def element(
        self, name: str, kind: int, x: Place, out: Place, y: Place | None = None, number: float = 0.0
    ) -> None: ...
    def set_adapters(self, values: npt.NDArray[np.float16]) -> None: ...
    def set_pages(self, layer: int, pages: npt.NDArray[np.uint8]) -> None: ...
    def run(
        self,
        input_ids: _I,
        positions: _I,
        query_start: _I,
        context_len: _I,
        block_tables: Sequence[_I],
        slots: Sequence[_I],
        sample_rows: _I,
        adapter_rows: _I,
        logits: _F,
        threads: int,
        hidden: _F | None = None,
    ) -> float: ...
    def set_hidden(self, place: Place) -> None: ...
    @property
    def hidden_size(self) -> int: ...

class PagedAttentionTask:
    """Addresses of device memory as whole numbers, strides in bytes (include/paged_attention_cuda.h)."""

    q: int
    k: int
    v: int
    out: int
    kv: int
    cos: int
    sin: int
    positions: int
    query_start: int
    context_len: int
    block_table: int
    slot: int
    page_stride: int
    head_stride: int
    token_stride: int
    value_offset: int
    scale_offset: int
    pages: int
    table_rows: int
    tokens: int
    sequences: int
    table_width: int
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    interleaved: int
    window: int
    scale: float
    softcap: float
    stored: int

Planned = tuple[str, tuple[int, int, int], tuple[int, int, int], int, bool, bytes]

def plan_paged_attention(
    task: PagedAttentionTask,
    bfloat16: bool,
    most_query: int,
    sm: int,
    multiprocessors: int,
    shared_bytes: int,
    scratch: int,
) -> tuple[list[Planned], int]: ...
