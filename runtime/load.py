"""From a bundle on disk to an engine that has proven itself: open, verify, load, golden check, warm up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.bundle import Bundle, open_bundle
from skerry.core.chat import ChatTemplate
from skerry.core.errors import BundleError, IncompatibleError, SkerryError
from skerry.core.files import read_json
from skerry.core.target import Gpu, incompatibility, local_device, on_gpu, usable_cores
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.engine_tensorrt import open_proven, opener
from skerry.runtime.golden import GoldenResult
from skerry.runtime.heap import give_back
from skerry.runtime.protocol import Defaults
from skerry.runtime.request import Request, SamplingParams

if TYPE_CHECKING:
    from skerry.runtime.engine import Engine
    from skerry.runtime.service import Model

log = logging.getLogger("skerry.load")


@dataclass(frozen=True)
class Loaded:
    """An engine that runs. Whether it may serve is up to `golden.require`; None: the bundle has no golden prompts."""

    bundle: Bundle
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate
    generation: dict[str, Any]
    golden: GoldenResult | None
    seconds: float
    gpus: tuple[Gpu, ...] = ()  # that it may run on
    fell_back: str = ""  # why its graph serves, and not the engine that was compiled from it

    def model(self) -> Model:
        from skerry.runtime.service import Model

        manifest, generation = self.bundle.manifest, self.generation
        try:
            defaults = Defaults(
                vocab_size=manifest.model.vocab_size,
                temperature=float(generation.get("temperature") or 0.0) if "temperature" in generation else 1.0,
                top_p=float(generation.get("top_p") or 1.0),
                top_k=int(generation.get("top_k") or 0),
            )
            stop_ids = frozenset(int(id) for id in generation["eos_token_ids"])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("read", "generation.json", f"malformed: {error!r}", "export the bundle again") from error
        return Model(
            name=manifest.name, fingerprint=f"fp_{manifest.engine_digest[:12]}", engine_digest=manifest.engine_digest,
            tokenizer=self.tokenizer, template=self.template, defaults=defaults, stop_ids=stop_ids,
        )  # fmt: skip


def load(
    path: Path,
    *,
    threads: int | None = None,
    memory_bytes: int | None = None,
    adapter_slots: int = 0,
    adapter_rank: int = 16,
    adapters_optional: bool = False,
    building: Callable[[], None] = lambda: None,
) -> Loaded:
    """Raises SkerryError: the bundle is broken, does not fit this machine, or its engine cannot run. Slots that are
    optional are left out where the graph takes no adapters. `building` is called where it will take minutes."""
    from skerry.kernels.devices import this_device
    from skerry.kernels.runner import Runner
    from skerry.runtime.engine_ort import OrtEngine

    began = time.monotonic()
    bundle = open_bundle(path, verify=True)
    device = this_device() if on_gpu(bundle.manifest.target) else local_device()  # drivers are slow to ask
    reason = incompatibility(bundle.manifest, device)
    if reason:
        raise IncompatibleError("serve bundle", bundle.short, reason, "export it for this machine's target")
    generation = read_json(bundle.file("generation.json"))
    if not isinstance(generation, dict):
        raise BundleError("read", "generation.json", "is no JSON object", "export the bundle again")
    special = (str(generation.get("bos_token") or ""), str(generation.get("eos_token") or ""))
    with ThreadPoolExecutor(1) as pool:  # a large tokenizer takes as long as the graph
        text = pool.submit(Tokenizer.open, bundle.file("tokenizer.json"))

        def graph() -> Runner:
            return Runner.open(
                bundle, threads=threads or usable_cores(), memory_bytes=memory_bytes, adapter_rank=adapter_rank,
                adapter_slots=0 if adapters_optional and bundle.manifest.adapters is None else adapter_slots,
            )  # fmt: skip

        compiled = opener(bundle, device, threads or usable_cores(), memory_bytes, building)
        proven = open_proven(bundle, compiled, graph)
        tokenizer, template = text.result(), ChatTemplate.open(bundle.path, *special)
    engine = OrtEngine(proven.runner)
    try:
        warm_up(engine)
    except SkerryError as error:
        raise proven.runner.rejected(error) or error from error
    give_back()
    gpus = device.gpus if on_gpu(bundle.manifest.target) else ()
    seconds = time.monotonic() - began
    return Loaded(bundle, engine, tokenizer, template, generation, proven.golden, seconds, gpus, proven.fell_back)


def warm_up(engine: Engine) -> None:
    """One short prompt and two tokens, so that the first client does not pay for first-time allocations."""
    from skerry.runtime.engine import run_to_completion

    try:
        run_to_completion(engine, [Request((0, 0, 0), 2, SamplingParams(seed=0))])
    except SkerryError:
        raise
    except Exception as error:
        raise SkerryError("warm up engine", "", str(error), "export the bundle again") from error
