"""Full TensorRT without a GPU, as far as Skerry calls it: layers, plugin classes and the registry are TensorRT-RTX's,
which has all of them but `add_plugin_v3`; a "plan" is a network that was built, and contexts compute what it says.

A plugin's outputs are inputs of the real network, so types and shapes of all that follows are checked by it. Contexts
read and write the addresses that they are given, and run the plugins' own `enqueue` on this machine's memory, in the
order in which they were added.
"""

from __future__ import annotations

import ctypes
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from skerry.core.files import sha256_bytes
from skerry.kernels.cuda_pages import from_bfloat16, to_bfloat16
from skerry.kernels.tensorrt.interpret import NetworkValues


class Plugged:
    """A plugin's layer: `at`, how many layers of the network come before it."""

    def __init__(self, at: int, plugin: Any, inputs: list[Any], outputs: list[Any]) -> None:
        self.at, self.plugin, self.inputs, self.outputs, self.name = at, plugin, inputs, outputs, ""
        self.num_outputs = len(outputs)

    def get_output(self, index: int) -> Any:
        return self.outputs[index]


class Definition:
    def __init__(self, trt: Any, real: Any) -> None:
        self._trt, self._real = trt, real
        self.plugged: list[Plugged] = []
        self.constants: list[tuple[Any, Any, Any]] = []  # tensor, its type, what its memory held

    def add_constant(self, shape: tuple[int, ...], weights: Any) -> Any:
        """Read from its memory when the network is built, as TensorRT does."""
        layer = self._real.add_constant(shape, weights)
        self.constants.append((layer.get_output(0), weights.dtype, weights.address))
        return layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> Plugged:
        trt = self._trt
        assert shape_inputs == [] and isinstance(plugin, trt.IPluginV3)
        kinds = plugin.get_output_data_types([tensor.dtype for tensor in inputs])
        assert len(kinds) == plugin.num_outputs == 2
        descs = [described(trt, tensor.dtype, tuple(tensor.shape)) for tensor in (*inputs, inputs[0], inputs[3])]
        for pos in range(len(descs)):
            assert plugin.supports_format_combination(pos, descs, len(inputs)), (pos, descs[pos].desc.type)
        aliased = [plugin.get_aliased_input(output) for output in range(2)]
        assert aliased == [-1, 3], "pages are written in place, and nothing else"
        made = [
            self._real.add_input(f"plugged.{len(self.plugged)}.{output}", kind, tuple(tensor.shape))
            for output, (kind, tensor) in enumerate(zip(kinds, (inputs[0], inputs[3])))
        ]
        self.plugged.append(Plugged(self._real.num_layers, plugin, inputs, made))
        return self.plugged[-1]

    def mark_output(self, tensor: Any) -> None:
        if not any(tensor is output for plugged in self.plugged for output in plugged.outputs):
            self._real.mark_output(tensor)


def described(trt: Any, kind: Any, shape: tuple[int, ...], most: tuple[int, ...] = ()) -> Any:
    desc = SimpleNamespace(type=kind, dims=shape, format=trt.TensorFormat.LINEAR)
    return SimpleNamespace(desc=desc, max=most or shape)


class Config:
    def __init__(self) -> None:
        self.features: dict[Any, bool] = {}
        self.profiles: list[dict[str, Any]] = []
        self.workspace, self.timing, self.refuses_timing = 0, b"", False

    def set_preview_feature(self, feature: Any, on: bool) -> None:
        self.features[feature] = on

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self.workspace = size

    def create_timing_cache(self, blob: bytes) -> bytes:
        return bytes(blob)

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if ignore_mismatch or cache.startswith(b"other GPU"):
            return False
        self.timing = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.timing or b"timed here")

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        assert len(shapes) == 3 and all(a <= b <= c for a, b, c in zip(*shapes)), (name, shapes)
        self.shapes[name] = shapes


class Engine:
    """`profiles` of the calls that were made, one after another; `refused`: the library takes no plan of it."""

    def __init__(self, trt: Any, definition: Definition, constants: dict[str, Any], config: Config) -> None:
        self.trt, self.definition, self.config = trt, definition, config
        network: Any = SimpleNamespace(definition=definition, layers=SimpleNamespace(constants=constants))
        self.values = _Values(trt, network)
        self.profiles: list[int] = []
        inputs = {definition.get_input(index).name for index in range(definition.num_inputs)}
        outputs = {definition.get_output(index).name for index in range(definition.num_outputs)}
        stand_ins = {plugged.outputs[0].name for plugged in definition.plugged}
        self.names = sorted((inputs | outputs) - stand_ins)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        """The largest workspace of a plugin, as they share it."""
        shapes, sizes = self.config.profiles[profile], []
        for plugged in self.definition.plugged:
            tokens = shapes["input_ids"][2][0]
            most = [
                shapes[t.name][2] if t.name in shapes else tuple(tokens if size == -1 else size for size in t.shape)
                for t in plugged.inputs
            ]
            descs = [described(self.trt, t.dtype, tuple(t.shape), m) for t, m in zip(plugged.inputs, most)]
            sizes.append(plugged.plugin.get_workspace_size(descs, []))
        return max(sizes)

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class _Values(NetworkValues):
    def run_with(self, inputs: dict[str, Any], run_plugin: Any) -> dict[str, Any]:
        values = {**self._constants, **inputs}
        pending: dict[str, Any] = {}
        waiting = list(self._definition.plugged)
        for index in range(len(self._layers) + 1):
            while waiting and waiting[0].at == index:
                run_plugin(waiting.pop(0), values)
            if index < len(self._layers):
                self._evaluate(values, pending, *self._layers[index])
        return values


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt, self.profile, self.memory = engine, engine.trt, -1, (0, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self._plugins = [plugged.plugin.attach_to_context(None) for plugged in engine.definition.plugged]

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.config.profiles[self.profile][name]
        self.shapes[name] = shape
        return len(shape) == len(most) and all(a <= b <= c for a, b, c in zip(least, shape, most))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names, name
        self.addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        whole = {name: self._memory(name, shape) for name, shape in self.shapes.items()}
        plugins = iter(self._plugins)

        def run_plugin(plugged: Plugged, values: dict[str, Any]) -> None:
            values[plugged.outputs[0].name] = self._enqueue(next(plugins), plugged, values, stream)

        found = self.engine.values.run_with(whole, run_plugin)
        for name in ("logits", "hidden"):
            self._memory(name, found[name].shape, np.float32)[...] = found[name]
        self.engine.profiles.append(self.profile)
        return True

    def _enqueue(self, plugin: Any, plugged: Plugged, values: dict[str, Any], stream: int) -> Any:
        trt = self.trt
        arrays = [self._typed(values[t.name], t.dtype) for t in plugged.inputs]
        out = np.full_like(arrays[0], np.nan if arrays[0].dtype == np.float16 else 0x7FC0)
        descs = [SimpleNamespace(type=t.dtype, dims=a.shape) for t, a in zip(plugged.inputs, arrays)]
        addresses = [array.ctypes.data for array in arrays]
        kv_out = self.addresses[plugged.outputs[1].name]
        plugin.on_shape_change(descs, [descs[0], descs[3]])
        plugin.enqueue(descs, [descs[0], descs[3]], addresses, [out.ctypes.data, kv_out], self.memory[0], stream)
        wide = from_bfloat16(out) if plugged.inputs[0].dtype == trt.bfloat16 else out.astype(np.float32)
        return wide

    def _typed(self, x: Any, kind: Any) -> Any:
        if kind == self.trt.float16:
            return x.astype(np.float16)
        return to_bfloat16(x) if kind == self.trt.bfloat16 else np.ascontiguousarray(x)

    def _memory(self, name: str, shape: tuple[int, ...], dtype: Any = np.int32) -> Any:
        raw = (ctypes.c_char * (prod(shape) * np.dtype(dtype).itemsize)).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)


class Library:
    """In TensorRT's place. `engines`: what was built, by plan; `fails`: what building says, where it is to fail."""

    __version__ = "11.1.0.106"

    def __init__(self, rtx: Any) -> None:
        self._rtx, self.engines, self.fails = rtx, dict[bytes, Engine](), ""
        self.configs: list[Config] = []

        class Weights(rtx.Weights):  # type: ignore[misc]
            def __init__(self, kind: Any, address: int, count: int) -> None:
                super().__init__(kind, address, count)
                self.address = address

        self.Weights = Weights
        self.PreviewFeature = SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliased")
        library = self

        class Builder:
            def __init__(self, logger: Any) -> None:
                self._real, self._logger = rtx.Builder(logger), logger

            def create_network(self, flags: int) -> Definition:
                return Definition(rtx, self._real.create_network(flags))

            def create_builder_config(self) -> Config:
                library.configs.append(Config())
                return library.configs[-1]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, definition: Definition, config: Config) -> bytes | None:
                if library.fails:
                    self._logger.log(rtx.ILogger.ERROR, library.fails)
                    return None
                assert config.features == {"aliased": True} and config.workspace > 0 and len(config.profiles) == 2
                return library.keep(definition, config)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self._logger = logger

            def deserialize_cuda_engine(self, raw: bytes) -> Engine | None:
                found = library.engines.get(bytes(raw))
                if found is None:
                    self._logger.log(
                        rtx.ILogger.ERROR, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION"
                    )
                return found

        self.Builder, self.Runtime = Builder, Runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rtx, name)

    def keep(self, definition: Definition, config: Config) -> bytes:
        constants = {
            tensor.name: SimpleNamespace(values=self._read(kind, address, tuple(tensor.shape)))
            for tensor, kind, address in definition.constants
        }
        plan = b"plan " + sha256_bytes(config.timing + str(len(self.engines)).encode()).encode()
        self.engines[plan] = Engine(self._rtx, definition, constants, config)
        return plan

    def _read(self, kind: Any, address: int, shape: tuple[int, ...]) -> Any:
        known = {self._rtx.float32: np.float32, self._rtx.float16: np.float16, self._rtx.bfloat16: np.uint16}
        dtype = np.dtype(known.get(kind, np.int32))
        raw = np.frombuffer((ctypes.c_char * (prod(shape) * dtype.itemsize)).from_address(address), dtype)
        wide = (
            from_bfloat16(raw)
            if kind == self._rtx.bfloat16
            else raw.astype(np.int32 if kind == self._rtx.int32 else np.float32)
        )
        return wide.reshape(shape)
