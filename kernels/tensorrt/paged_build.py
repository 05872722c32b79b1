"""From a bundle's graph to a plan of full TensorRT, with our attention as its plugin: 10.16 and 11.

TensorRT times kernels on the GPU that it builds for, so a plan is made on a node or on a machine with the same GPU, and
is good for exactly that library, platform and GPU. With a timing cache the times are known, and the kernels are those
that were chosen where it was filled. Nothing here has run with libnvinfer yet (DESIGN.md).
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from skerry.core.bundle import Bundle, Manifest
from skerry.core.errors import IncompatibleError
from skerry.core.memory import mib, require_memory
from skerry.kernels.buckets import MOST_SEQUENCES, power_of_two
from skerry.kernels.devices import INSTALL
from skerry.kernels.pages import PAGE_TOKENS, page_bytes
from skerry.kernels.tensorrt.build import DECODE, MIXED, Network, Shape, Shapes, serialized, write_network
from skerry.kernels.tensorrt.paged_decoder import PagedDecoder, step_inputs

log = logging.getLogger("skerry.tensorrt")
OLDEST, BEFORE = (10, 16), (12, 0)
MOST_ELEMENTS = 2**31 - 1  # of a tensor
MOST_WORKSPACE = 4 << 30  # for kernels that are tried
# Times the weights: as constants here and in the plan that is written; on the device as weights and as tried kernels.
HOST_COPIES, DEVICE_COPIES = 3.5, 2.5


@dataclass(frozen=True)
class PagedLimits:
    """The most that one step has: tokens, sequences, rows of logits; pages that a block table names and pages in all.
    A step of pure decode has at most buckets.MOST_SEQUENCES of each."""

    tokens: int
    sequences: int
    rows: int
    width: int
    pages: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def of(cls, manifest: Manifest) -> PagedLimits:
        """What a scheduler for GPUs asks for at most (prompts of 2,048 tokens, 64 sequences with 8 guesses each), and
        every page of the context."""
        largest = max(page_bytes(group.layout, group.kv_heads, group.head_size) for group in manifest.kv)
        width = power_of_two(-(-manifest.max_context // PAGE_TOKENS))
        return cls(tokens=4096, sequences=64, rows=1280, width=width, pages=MOST_ELEMENTS // (largest // 4))


def import_tensorrt() -> Any:
    """Raises IncompatibleError where it is not installed, or of a version that is not known here."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise IncompatibleError("load TensorRT", "", f"not installed: {error}", INSTALL) from error
    found = getattr(tensorrt, "__version__", "")
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not OLDEST <= parts < BEFORE:
        raise IncompatibleError("load TensorRT", found or "tensorrt", "is none of 10.16 to 11", INSTALL)
    return tensorrt


def write_paged(trt: Any, bundle: Bundle, dtype: str, creator: Any, evaluated: bool = False) -> Network:
    """Raises IncompatibleError, SkerryError."""
    return write_network(trt, bundle, dtype, partial(PagedDecoder, creator=creator), evaluated)


def compile_plan(
    trt: Any, network: Network, bundle: Bundle, limits: PagedLimits, timing: bytes, workspace: int
) -> tuple[bytes, bytes]:
    """The plan, and the timing cache after it; `timing` is the one to build by, empty where there is none. Raises
    SkerryError with TensorRT's own last error."""
    config = network.builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    cache = config.create_timing_cache(timing)
    if not config.set_timing_cache(cache, False):
        log.warning("the timing cache is of another GPU or TensorRT: kernels are timed anew")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    profiles = [paged_shapes(bundle, limits, profile) for profile in (DECODE, MIXED)]
    plan = serialized(network, config, profiles, bundle.short, "--target ort-cuda")
    return plan, bytes(config.get_timing_cache().serialize())


def paged_shapes(bundle: Bundle, limits: PagedLimits, profile: int) -> Shapes:
    """Least, usual and largest shape of every input."""
    few = min(8, limits.sequences)
    if profile == DECODE:
        most = min(MOST_SEQUENCES, limits.sequences)
        sizes = [{"T": n, "B": n, "R": n, "Q": 1} for n in (1, few, most)]
    else:
        tokens = min(512, limits.tokens)
        sizes = [
            {"T": 1, "B": 1, "R": 1, "Q": 1}, {"T": tokens, "B": 1, "R": 1, "Q": tokens},
            {"T": limits.tokens, "B": limits.sequences, "R": limits.rows, "Q": limits.tokens},
        ]  # fmt: skip
    usual = min(limits.width, 64)
    for size, width in zip(sizes, (1, usual, limits.width), strict=True):
        size |= {"B+1": size["B"] + 1, "W": width}
    found: dict[str, list[Shape]] = {
        name: [tuple(size[dimension] for dimension in dimensions) for size in sizes]
        for name, dimensions in step_inputs(bundle).items()
    }
    for group in bundle.manifest.kv:
        ints = page_bytes(group.layout, group.kv_heads, group.head_size) // 4
        pages: list[Shape] = [(count, ints) for count in (1, few * usual, limits.pages)]
        found |= {f"kv.{layer}": pages for layer in group.layers}
    return {name: (shapes[0], shapes[1], shapes[2]) for name, shapes in found.items()}


def check_rooms(bundle: Bundle, free_device_bytes: int) -> int:
    """Bytes of workspace that kernels may be tried with. Raises IncompatibleError before the builder takes memory, of
    this machine or of its GPU."""
    held = bundle.manifest.entry("weights.bin").size
    hint = "a smaller model, or build the plan on a machine with more memory and the same GPU (skerry export there)"
    require_memory("build engine", bundle.short, {"constants and plan": int(HOST_COPIES * held)}, hint)
    needed = int(DEVICE_COPIES * held)
    if needed > free_device_bytes:
        cause = f"building takes about {mib(needed)} MiB of GPU memory, {mib(free_device_bytes)} are free"
        raise IncompatibleError("build engine", bundle.short, cause, hint)
    return min(MOST_WORKSPACE, free_device_bytes - needed)
