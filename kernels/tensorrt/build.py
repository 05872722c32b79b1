"""From a bundle's graph to a serialized TensorRT engine.

Two optimization profiles: 0 for steps in which each sequence has one token, 1 for the others. Nothing here needs a GPU
with TensorRT-RTX, which compiles kernels for named compute capabilities and finishes them on the node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skerry.core.bundle import Bundle, Manifest
from skerry.core.errors import IncompatibleError, SkerryError
from skerry.core.memory import require_memory
from skerry.kernels.devices import RTX_SMS
from skerry.kernels.onnx_file import OnnxGraph, read_graph
from skerry.kernels.tensorrt.decoder import Decoder, write_decoder
from skerry.kernels.tensorrt.layers import Layers
from skerry.kernels.tensorrt.linear_decoder import LinearDecoder, step_inputs

log = logging.getLogger("skerry.tensorrt")
DECODE, MIXED = 0, 1
# What the architecture itself lacks, by what a network holds.
NEEDS_SM = {"bfloat16": 80, "int4": 80, "float32": 80}
# Times the weights that the engine holds: SmolLM2-135M int8 (144 MB) took 444 MB written and 873 more compiled.
CONSTANT_COPIES, BUILD_COPIES = 3.1, 6.1
# An engine for several has the kernels of the least of them: with 75 among them, Turing's for all.
COMMON_SM = 80
INSTALL = "pip install 'skerry[tensorrt]'"


@dataclass(frozen=True)
class Limits:
    """The most that one call of an engine takes: sequences, tokens of all of them, tokens of one, rows of logits."""

    slots: int = 16
    tokens: int = 320
    queries: int = 256
    rows: int = 64

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Network:
    """A network that is whole, and what its constants hold (interpret.py)."""

    builder: Any
    definition: Any
    layers: Layers
    logger: Messages


class Messages:
    """TensorRT's own messages: the errors among them are the cause of whatever fails. Wraps its logger class, which
    exists only where the library does."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        messages = self

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, text: str) -> None:
                messages.take(severity <= trt.ILogger.ERROR, text)

        self.logger = Logger()

    def take(self, error: bool, text: str) -> None:
        if "cudaError 35" in text or "CUDA initialization failure" in text:
            log.debug("%s", text)  # no driver: expected where engines are built ahead of time
        elif error:
            self.errors.append(text)
            log.warning("%s", text)
        else:
            log.debug("%s", text)

    @property
    def cause(self) -> str:
        return " ".join(self.errors[-1].split())[:600] if self.errors else "TensorRT gave no reason"


def import_rtx() -> Any:
    """Raises IncompatibleError where TensorRT-RTX is not installed."""
    try:
        import tensorrt_rtx_bindings
    except (ImportError, OSError) as error:
        raise IncompatibleError("load TensorRT-RTX", "", f"not installed: {error}", INSTALL) from error
    return tensorrt_rtx_bindings


def sms_for(asked: int | None, dtype: str, int4: bool) -> tuple[int, ...]:
    """The compute capabilities to build for; where none is asked for, all from COMMON_SM on. Raises
    IncompatibleError."""
    least = max(NEEDS_SM.get(dtype, 0), NEEDS_SM["int4"] if int4 else 0)
    fit = tuple(sm for sm in RTX_SMS if sm >= least)
    if asked is None:
        return tuple(sm for sm in fit if sm >= COMMON_SM)
    if asked not in RTX_SMS:
        known = ", ".join(map(str, RTX_SMS))
        raise IncompatibleError("build engine for", f"sm {asked}", "TensorRT-RTX has no such target", f"one of {known}")
    if asked not in fit:
        what = "4-bit weights" if int4 else dtype
        raise IncompatibleError(
            "build engine for", f"sm {asked}", f"{what} need sm {least}", "--precision int8, or another --sm"
        )
    return (asked,)


def write_network(
    trt: Any, bundle: Bundle, dtype: str, decoder: Callable[[Layers, Bundle, OnnxGraph], Decoder] = LinearDecoder,
    evaluated: bool = True,
) -> Network:  # fmt: skip
    """`evaluated`: its definition is to be evaluated too. Raises IncompatibleError, SkerryError."""
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    definition = builder.create_network(flags)
    layers = Layers(trt, definition, dtype, evaluated)
    try:
        write_decoder(decoder(layers, bundle, read_graph(bundle.file("graph.onnx"))))
    except SkerryError as error:
        if messages.errors and not isinstance(error, IncompatibleError):
            raise SkerryError(error.operation, error.obj, f"{error.cause}: {messages.cause}", error.hint) from error
        raise
    except ValueError as error:
        raise SkerryError("build network", bundle.short, f"graph.onnx is refused: {error}") from error
    return Network(builder, definition, layers, messages)


def compile_network(trt: Any, network: Network, manifest: Manifest, limits: Limits, sms: Sequence[int]) -> bytes:
    """The serialized engine. Raises SkerryError with TensorRT's own last error."""
    config = network.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names and operations stay readable in the engine
    if sms:
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
                raise SkerryError("build engine", f"sm {sm}", network.logger.cause)
    hint = "another --precision, or --target ort-cuda"
    profiles = [profile_shapes(manifest, limits, profile) for profile in (DECODE, MIXED)]
    return serialized(network, config, profiles, manifest.name, hint)


Shape = tuple[int, ...]
Shapes = dict[str, tuple[Shape, Shape, Shape]]  # least, usual and largest, by input


def serialized(network: Network, config: Any, profiles: Sequence[Shapes], name: str, hint: str) -> bytes:
    """The engine of a network with these profiles, in their order. Raises SkerryError with TensorRT's last error."""
    for index, inputs in enumerate(profiles):
        made = network.builder.create_optimization_profile()
        for tensor, shapes in inputs.items():
            made.set_shape(tensor, *shapes)
        if config.add_optimization_profile(made) < 0:
            raise SkerryError("build engine", f"profile {index}", network.logger.cause)
    engine = network.builder.build_serialized_network(network.definition, config)
    if engine is None:
        raise SkerryError("build engine", name, network.logger.cause, hint)
    return bytes(engine)


def profile_shapes(manifest: Manifest, limits: Limits, profile: int) -> Shapes:
    """Least, usual and largest shape of every input."""
    slots = limits.slots
    least = {"T": 1, "B": 1, "S": 1, "R": 1}
    if profile == DECODE:
        usual = {"T": slots, "B": slots, "S": 1, "R": slots}
        most = usual
    else:
        usual = {"T": limits.queries, "B": 1, "S": limits.queries, "R": 1}
        most = {"T": limits.tokens, "B": slots, "S": limits.queries, "R": limits.rows}
    sizes = [{**size, "B+1": size["B"] + 1} for size in (least, usual, most)]
    found = {
        name: tuple(tuple(size[dimension] for dimension in dimensions) for size in sizes)
        for name, _, dimensions in step_inputs()
    }
    spec = manifest.model
    cache = tuple((size["B"], spec.kv_heads, manifest.max_context, spec.head_size) for size in sizes)
    caches = (f"{part}.{layer}" for part in ("keys", "values") for layer in range(spec.layers))
    return {
        name: (shapes[0], shapes[1], shapes[2]) for name, shapes in {**found, **dict.fromkeys(caches, cache)}.items()
    }


def check_room(bundle: Bundle) -> None:
    """Raises IncompatibleError before the builder takes any memory. The network's evaluation, which comes first, has
    its weights as float32."""
    stored = bundle.manifest.entry("weights.bin").size
    held = stored // 2 if bundle.manifest.precision == "fp32" else stored
    building, evaluating = int(BUILD_COPIES * held), 4 * bundle.manifest.model.parameters
    parts = {"constants": int(CONSTANT_COPIES * held), "building or evaluating": max(building, evaluating)}
    require_memory("build engine", bundle.short, parts, "a smaller model, or a machine with more memory")
