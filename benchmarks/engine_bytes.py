"""How close decoding comes to what the machine can read: bytes of weights a second over a sum of as many bytes.

At one sequence and context 0 a step reads every matrix once and hardly anything else, so the sum of an array of the
same size (kernels/read_sum.py) is its ceiling. The sum is taken before and after the decoding, half of the passes each:
the speed of a machine wanders within minutes, and a figure of another minute would be no ceiling.
"""

from __future__ import annotations

from collections.abc import Callable

from skerry.benchmarks.kernels.read_sum import data, reader
from skerry.core.bundle import Bundle
from skerry.kernels.blocks import BlockFormat, packed_bytes

WEIGHTS = "weights.bin"


def token_bytes(bundle: Bundle) -> int | None:
    """Bytes of the matrices that a step reads: of weights.bin without the rotary tables (cosines and sines in float32,
    one pair for each KV group) and without an embedding that is not the head too, of which a step reads a row. None
    where the file is too small for that: its rotary tables lie elsewhere."""
    manifest, spec = bundle.manifest, bundle.manifest.model
    stored = next(entry.size for entry in manifest.files if entry.name == WEIGHTS)
    tables = len(manifest.kv) * manifest.max_context * spec.head_size * 4
    if spec.tied_embeddings:
        embedding = 0
    elif manifest.precision == "fp32":
        embedding = 4 * spec.vocab_size * spec.hidden_size
    else:
        embedding = packed_bytes(BlockFormat.Q8_0, spec.vocab_size, spec.hidden_size)
    found = stored - tables - embedding
    return found if found > 0 else None


def measure_share(decode: Callable[[], float], tokens: int, nbytes: int, threads: int) -> dict[str, float]:
    """`decode`: decodes `tokens` tokens and returns tokens a second. Figures `read_sum` (GB/s) and
    `decode_bytes_share`. Raises GateFailed where a sum is wrong."""
    shot, close = reader(data(nbytes), threads)
    half = max(1, tokens // 2)
    try:
        shot(1)  # warms up
        before = shot(half)
        speed = decode()
        reading = 2 * half * nbytes / (before + shot(half))
    finally:
        close()
    return {"read_sum": reading / 1e9, "decode_bytes_share": speed * nbytes / reading}
