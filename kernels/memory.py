"""What an engine will take, told from its manifest before anything of it is loaded.

Measured (SmolLM2-135M, ONNX Runtime 1.32): weights in blocks are mapped and stay one copy; 544 MB of float32 matrices,
which are packed anew, took 636; 512 tokens in a step took 18 MiB besides pages and logits, of which 16 are told here.
"""

from __future__ import annotations

from skerry.core.bundle import Manifest
from skerry.core.errors import IncompatibleError
from skerry.core.memory import mib, require_memory, total_memory
from skerry.core.model import ModelSpec
from skerry.core.target import CONTEXT_BYTES, device_bytes, on_gpu
from skerry.kernels.pages import check_pages, page_bytes

DEFAULT_SEQUENCES = 4  # at full context, when neither pages nor bytes are given
DEFAULT_MEMORY_SHARE = 0.25  # of the machine's memory, at most, for the same case
DEVICE_SEQUENCES = 32
DEVICE_MEMORY_SHARE = 0.45  # of a GPU's memory, weights and pages: two engines then fit while one follows the other
PACKED_ANEW = 1.25
STEP_TOKENS = 512  # in one step, at most, of what runs engines here
STEP_LOGITS = 64  # rows of logits in one step, as many
SESSION_BYTES = 32 << 20  # ONNX Runtime's own, with the graph
HINT = "fewer KV pages (--memory-mib, memory_bytes of a node), a smaller model, or more memory"


def bytes_of_pages(manifest: Manifest) -> int:
    """Bytes of one page in every layer of every KV group. Raises IncompatibleError on pages of another version."""
    check_pages(manifest.kv, manifest.name)
    return sum(page_bytes(g.layout, g.kv_heads, g.head_size) * len(g.layers) for g in manifest.kv)


def fixed_parts(manifest: Manifest) -> dict[str, int]:
    """What is needed whatever the number of pages: name -> bytes."""
    factor = 1 if any(op.startswith("skerry.MatMulBlock:") for op in manifest.ops) else PACKED_ANEW
    return {"weights": int(manifest.entry("weights.bin").size * factor), "scratch": scratch_bytes(manifest.model)}


def scratch_bytes(spec: ModelSpec) -> int:
    """Activations of a step and its logits, float32, and what the session itself takes."""
    wide = 4 * spec.hidden_size + 3 * spec.intermediate_size + (spec.heads + 2 * spec.kv_heads) * spec.head_size
    return 4 * (STEP_TOKENS * wide + STEP_LOGITS * spec.vocab_size) + SESSION_BYTES


def default_kv_bytes(manifest: Manifest) -> int:
    """For KV pages where nobody says how many: a few sequences at full context, within the machine's means."""
    full = -(-manifest.max_context // manifest.kv[0].page_size) * bytes_of_pages(manifest)
    return min(DEFAULT_SEQUENCES * full, int(total_memory() * DEFAULT_MEMORY_SHARE))


def default_device_kv_bytes(manifest: Manifest, gpu_bytes: int) -> int:
    """The same for a GPU: enough sequences to be worth one, and room beside it for the engine that comes next."""
    full = -(-manifest.max_context // manifest.kv[0].page_size) * bytes_of_pages(manifest)
    left = int(gpu_bytes * DEVICE_MEMORY_SHARE) - device_bytes(manifest)
    return max(bytes_of_pages(manifest), min(DEVICE_SEQUENCES * full, left))


def needed_bytes(manifest: Manifest, kv_bytes: int = 0, gpu_bytes: int = 0) -> int:
    """Of an engine with `kv_bytes` for its pages, 0 for the default; on a GPU of `gpu_bytes` where it runs on one."""
    if on_gpu(manifest.target):
        return device_bytes(manifest) + (kv_bytes or default_device_kv_bytes(manifest, gpu_bytes))
    return sum(fixed_parts(manifest).values()) + (kv_bytes or default_kv_bytes(manifest))


def check_memory(manifest: Manifest, name: str, pages: int, adapters: int = 0) -> None:
    """Raises IncompatibleError where engine and pages do not fit into what is free. Pages are counted whole: they are
    taken as they fill, and it is in the middle of an answer that they would be missing. So are `adapters`, in bytes."""
    parts = {**fixed_parts(manifest), "KV pages": pages * bytes_of_pages(manifest)}
    parts |= {"adapters": adapters} if adapters else {}
    require_memory("open engine", name, parts, HINT)


def check_device_memory(manifest: Manifest, name: str, pages: int, free: int) -> int:
    """The bytes that engine and pages take on a GPU with `free` ones. Raises IncompatibleError where they are more."""
    parts = {"weights": manifest.engine_bytes, "CUDA": CONTEXT_BYTES, "KV pages": pages * bytes_of_pages(manifest)}
    needed = sum(parts.values())
    if needed > free:
        told = ", ".join(f"{part} {mib(size)}" for part, size in parts.items())
        cause = f"needs {mib(needed)} MiB of GPU memory ({told}), {mib(free)} are free"
        raise IncompatibleError("open engine", name, cause, HINT)
    return needed
