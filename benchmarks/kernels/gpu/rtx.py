"""Does TensorRT-RTX run on this device? Its list of targets leaves sm_90 out, so it is asked, not assumed.

A network of one sum is built for the device at hand, for what the library builds by default, and for the device's
compute capability where the library knows it by name; then the library says whether it takes each engine here.
"""

from __future__ import annotations

from typing import Any

from skerry.core.errors import SkerryError
from skerry.kernels.tensorrt.build import Messages, import_rtx

OPENED = "the engine opens"


def tried(sm: int) -> dict[str, str]:
    """What was built for -> what the library said: its validity here with reasons, or its error."""
    try:
        trt = import_rtx()
    except SkerryError as error:
        return {"library": str(error)}
    known = trt.ComputeCapability.__members__
    asked = {"the device at hand": known.get("CURRENT"), "the default": None, f"sm {sm}": known.get(f"SM{sm}")}
    said = {}
    for name, capability in asked.items():
        if capability is None and name != "the default":
            said[name] = f"no such target: the library has {', '.join(known)}"
            continue
        try:
            said[name] = _validity(trt, _built(trt, capability))
        except (SkerryError, RuntimeError, TypeError) as error:  # the last: its constructors answer nothing
            said[name] = f"not built: {error}"
    return {"library": str(trt.__version__), **said}


def _built(trt: Any, capability: Any) -> bytes:
    """Raises SkerryError with the library's last error."""
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (8,))
    network.mark_output(network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0))
    config = builder.create_builder_config()
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SkerryError("build engine", "of one sum", messages.cause)
    return bytes(engine)


def _validity(trt: Any, engine: bytes) -> str:
    messages = Messages(trt)
    runtime = trt.Runtime(messages.logger)
    validity, diagnostics = runtime.get_engine_validity(engine)
    reasons = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)]
    parts = [validity.name, *reasons]
    if validity != trt.EngineValidity.INVALID and runtime.deserialize_cuda_engine(engine) is not None:
        parts.append(OPENED)
    return ", ".join([*parts, *([messages.cause] if messages.errors else [])])
