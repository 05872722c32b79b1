"""Graphs of one ONNX Runtime operator, run on arrays that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import SkerryError

OPSETS = {"": 21, "com.microsoft": 1}
IR_VERSION = 10


def session(
    op: str, domain: str, inputs: Mapping[str, npt.NDArray[Any] | None], outputs: tuple[str, ...], threads: int,
    constants: Mapping[str, npt.NDArray[Any]] | None = None, spin: bool = True, **attributes: Any,
) -> Any:  # fmt: skip
    """`inputs` in the operator's order: an array names type and rank, None is an input left out. Those named in
    `constants` too are weights. Raises SkerryError where ONNX Runtime refuses."""
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    constants = constants or {}
    names = [name if array is not None else "" for name, array in inputs.items()]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items() if array is not None}
    values = [
        helper.make_tensor_value_info(name, kinds[name], [None] * array.ndim)
        for name, array in inputs.items()
        if array is not None and name not in constants
    ]
    node = helper.make_node(op, names, list(outputs), domain=domain, **attributes)
    results = [helper.make_tensor_value_info(name, kinds[next(iter(kinds))], None) for name in outputs]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], op, values, results, weights)
    opsets = [helper.make_opsetid(name, version) for name, version in OPSETS.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exception classes are not exported
        raise SkerryError("open", op, " ".join(str(error).split())[:400]) from error


class Bound:
    """One session on one set of arrays. An output of the same name as in `shared` is that input's own buffer."""

    def __init__(
        self, opened: Any, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]],
        shared: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        import onnxruntime as ort

        self._session, self._binding = opened, opened.io_binding()
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        self._outputs = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
        for name, value in self._values.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, source in (shared or {}).items():
            self._binding.bind_ortvalue_output(name, self._values[source])
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # its own exception classes are not exported
            raise SkerryError("run", "onnxruntime", " ".join(str(error).split())[:400]) from error

    def output(self, name: str) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self._outputs[name].numpy()
        return found
