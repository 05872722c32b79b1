"""Graphs of our own ops as native programs: what the file says, what is refused, and that bad steps are named. That a
program answers as ONNX Runtime does is tests/exporter/test_engine_bits.py's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from skerry.core.bundle import Bundle
from skerry.core.errors import IncompatibleError
from skerry.kernels import _native
from skerry.kernels.blocks import BlockFormat, pack
from skerry.kernels.onnx_file import read_graph
from skerry.kernels.runner import Row, Runner, StepError, pack_rows
from tests.kernels.test_matmul_block import random_blocks

WIDTH, VOCAB = 32, 96
INPUTS = ("input_ids", "positions", "query_start", "context_len", "slot.0", "sample_rows")


def program_graph() -> onnx.ModelProto:
    """An embedding, one attention, a norm and a head, with products of our own."""
    rng = np.random.default_rng(0)
    packed = {
        name: pack(random_blocks(rng, BlockFormat.Q8_0, rows, WIDTH))
        for name, rows in (("table", VOCAB), ("q", 32), ("k", 16), ("v", 16), ("o", 32))
    }
    half = np.ones((320, 4), np.float32)
    weights = {**packed, "cos": half, "sin": half * 0, "norm": rng.normal(size=WIDTH).astype(np.float32)}
    common = {"width": WIDTH, "epsilon": 1e-5, "activation": 0}
    shared = ["positions", "query_start", "context_len", "block_table.0", "slot.0", "plan"]

    def node(op: str, inputs: list[str], outputs: list[str], domain: str = "skerry", **attributes: object) -> object:
        return helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes)

    nodes = [
        node("GatherBlock", ["input_ids", "table"], ["x"], width=WIDTH, rows=VOCAB, format=0),
        node("MatMulBlock", ["x", "norm", "", "q", "", "k", "", "v"], ["q.y", "k.y", "v.y"], rows=[32, 16, 16],
             formats=[0, 0, 0], **common),
        node("PagedAttention", ["q.y", "k.y", "v.y", "kv.0", "cos", "sin", *shared], ["a", "kv_out.0"], num_heads=4,
             num_kv_heads=2, head_size=8, scale=0.35),
        node("MatMulBlock", ["a", "", "x", "o"], ["b"], rows=[32], formats=[0], **common),
        node("Gather", ["b", "sample_rows"], ["picked"], "", axis=0),
        node("RMSNormalization", ["picked", "norm"], ["hidden"], "", axis=-1, epsilon=1e-5),
        node("MatMulBlock", ["hidden", "", "", "table"], ["logits"], rows=[VOCAB], formats=[0], **common),
    ]  # fmt: skip
    page = ["pages", 2 * 4 * 2 * 16 * 8]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT32, [None]) for name in (*INPUTS, "plan")]
    inputs.append(helper.make_tensor_value_info("block_table.0", TensorProto.INT32, [None, None]))
    inputs.append(helper.make_tensor_value_info("kv.0", TensorProto.UINT8, page))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["S", VOCAB])]
    outputs.append(helper.make_tensor_value_info("kv_out.0", TensorProto.UINT8, page))
    outputs.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["S", WIDTH]))
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(array, name) for name, array in weights.items()]
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("skerry", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


@pytest.fixture
def seal(make_bundle: Callable[..., Bundle], bundle: Bundle) -> Callable[[onnx.ModelProto], Bundle]:
    spec, group = bundle.manifest.model, bundle.manifest.kv[0]
    ops = ("skerry.GatherBlock:1", "skerry.MatMulBlock:1", "skerry.PagedAttention:1")
    kv = (replace(group, layers=(0,)),)
    return lambda graph: make_bundle(graph, model=replace(spec, layers=1), kv=kv, ops=ops, precision="int8")


def node_of(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def set_attribute(model: onnx.ModelProto, node: str, name: str, value: object) -> None:
    found = node_of(model, node)
    kept = [attribute for attribute in found.attribute if attribute.name != name]
    del found.attribute[:]
    found.attribute.extend([*kept, helper.make_attribute(name, value)])


def test_a_program_runs_and_wants_any_number_of_rows(seal: Callable[..., Bundle]) -> None:
    with Runner.open(seal(program_graph()), threads=2, pages=8) as runner:
        whole = runner.step(pack_rows([Row(range(40), 0, [[0, 1, 2]], range(40))], 16))
        assert whole.shape == (40, VOCAB) and whole.std() > 0.1 and 0 < runner.graph_seconds < 60
        assert runner.step(pack_rows([Row(range(40), 0, [[3, 4, 5]], "none")], 16)).shape == (0, VOCAB)
        next_row = runner.step(pack_rows([Row([7], 40, [[0, 1, 2]]), Row([7], 40, [[3, 4, 5]])], 16))
        np.testing.assert_array_equal(next_row[0], next_row[1])


def test_hidden_states_are_handed_out_when_asked(seal: Callable[..., Bundle]) -> None:
    rows = [Row(range(40), 0, [[0, 1, 2]], [3, 39]), Row([7, 8], 0, [[3]], "none"), Row([9], 0, [[4]])]
    with Runner.open(seal(program_graph()), threads=2, pages=8) as runner:
        assert runner.hidden_size == WIDTH
        hidden = np.full((3, WIDTH), np.nan, np.float32)
        logits = runner.step(pack_rows(rows, 16), hidden)
        table = random_blocks(np.random.default_rng(0), BlockFormat.Q8_0, VOCAB, WIDTH).dequantized()
        wanted = hidden @ table.T
        assert np.abs(wanted - logits).max() <= 0.1 * wanted.std()  # the product rounds what it takes to 8 bits
        alone = np.empty((1, WIDTH), np.float32)
        runner.step(pack_rows([Row([9], 0, [[5]])], 16), alone)
        np.testing.assert_array_equal(alone[0], hidden[2])
        before = hidden.copy()
        np.testing.assert_array_equal(runner.step(pack_rows(rows, 16)), logits)
        np.testing.assert_array_equal(hidden, before)  # nothing is written where nobody asks
        runner.step(pack_rows([Row([1, 2], 0, [[6]], "none")], 16), np.empty((0, WIDTH), np.float32))
        for shape in ((2, WIDTH), (3, WIDTH - 1), (3 * WIDTH,)):
            with pytest.raises(StepError, match="hidden"):
                runner.step(pack_rows(rows, 16), np.empty(shape, np.float32))


def test_a_graph_without_hidden_states_says_so(seal: Callable[..., Bundle]) -> None:
    model = program_graph()
    del model.graph.output[2]
    with Runner.open(seal(model), threads=1, pages=4) as runner:
        assert runner.hidden_size == 0
        with pytest.raises(StepError, match="hidden"):
            runner.step(pack_rows([Row([1], 0, [[0]])], 16), np.empty((1, WIDTH), np.float32))


def test_hidden_states_that_nothing_computes_are_refused(seal: Callable[..., Bundle]) -> None:
    model = program_graph()
    node_of(model, "hidden").output[0] = node_of(model, "logits").input[0] = "other"
    with pytest.raises(IncompatibleError, match="hidden is not computed"):
        Runner.open(seal(model), pages=4).close()


def test_a_closed_runner_lets_go_of_weights_and_pages_at_once(seal: Callable[..., Bundle]) -> None:
    bundle = seal(program_graph())
    gc.disable()
    try:
        runner = Runner.open(bundle, threads=1, pages=8)
        pages = weakref.ref(runner._kv[0])
        runner.step(pack_rows([Row(range(5), 0, [[0]])], 16))
        runner.close()
        assert pages() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(node_of(m, "hidden"), "op_type", "LayerNormalization"), "hidden is LayerNormalization"),
        (lambda m: node_of(m, "b").input.__setitem__(2, "logits"), "logits is not computed before it is read"),
        (lambda m: node_of(m, "b").input.__setitem__(3, "elsewhere"), "elsewhere is no constant"),
        (lambda m: node_of(m, "b").input.__setitem__(3, "norm"), "norm is of type 1"),
        (lambda m: node_of(m, "b").output.__setitem__(0, "x"), "x is written twice"),
        (lambda m: node_of(m, "a").input.__setitem__(6, "context_len"), "a reads other inputs"),
        (lambda m: node_of(m, "a").input.__setitem__(3, "kv.x"), "kv.x is not kv. and a number"),
        (lambda m: node_of(m, "x").input.__setitem__(0, "positions"), "x gathers by positions"),
        (lambda m: set_attribute(m, "b", "width", 64), "b takes rows of 64 elements, not of 32"),
        (lambda m: set_attribute(m, "b", "rows", [48]), "axis 0 of weight"),
        (lambda m: set_attribute(m, "b", "formats", [9]), "in format 9"),
        (lambda m: set_attribute(m, "b", "rows", [32, 32]), "zip()"),
        (lambda m: set_attribute(m, "b", "activation", 1), "a gated product takes two segments"),
        (lambda m: set_attribute(m, "a", "num_heads", 6), "q has rows of 32 elements, expected 48"),
        (lambda m: set_attribute(m, "a", "scale", 1), "a has no number scale"),
        (lambda m: set_attribute(m, "hidden", "axis", 0), "hidden has a weight of"),
    ],
)  # fmt: skip
def test_a_graph_that_does_not_fit_together(
    seal: Callable[..., Bundle], change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = program_graph()
    change(model)
    with pytest.raises(IncompatibleError) as caught:
        Runner.open(seal(model), pages=4).close()
    assert message in str(caught.value)


def test_a_constant_beyond_its_file(seal: Callable[..., Bundle]) -> None:
    model = program_graph()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "o")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "64"), ("length", "1088")):
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(IncompatibleError, match=r"o ends beyond weights\.bin"):
        Runner.open(seal(model), pages=4)
    tensor.external_data[0].value = "../weights.bin"
    with pytest.raises(Exception, match=r"\.\./weights\.bin"):
        Runner.open(seal(model), pages=4)


def test_bad_steps_name_their_node(seal: Callable[..., Bundle]) -> None:
    good = pack_rows([Row(range(20), 0, [[0, 1]])], 16)
    with Runner.open(seal(program_graph()), threads=1, pages=4) as runner:
        wanted = runner.step(good)
        for change, message in (
            ({"input_ids": good.input_ids + 90}, "x: id 96 at 6 is outside"),
            ({"slots": [good.slots[0] + 1000]}, "a: slot 1000"),
            ({"sample_rows": np.array([20], np.int32)}, "picked: sample_rows has token 20 of 20"),
            ({"positions": good.positions[1:]}, "axis 0 of positions is 19, expected 20"),
        ):
            with pytest.raises(StepError, match=message):
                runner.step(replace(good, **change))
        np.testing.assert_array_equal(runner.step(good), wanted)


GRAPH = program_graph().SerializeToString()


def test_the_reader_sees_what_onnx_sees(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(GRAPH)
    found, model = read_graph(tmp_path / "graph.onnx"), onnx.load_from_string(GRAPH)
    assert [value.name for value in found.inputs] == [value.name for value in model.graph.input]
    assert found.constants.keys() == {tensor.name for tensor in model.graph.initializer}
    for node, wanted in zip(found.nodes, model.graph.node, strict=True):
        op = f"{wanted.domain}.{wanted.op_type}" if wanted.domain else wanted.op_type
        assert (node.op, node.inputs, node.outputs) == (op, tuple(wanted.input), tuple(wanted.output))
        values = {item.name: helper.get_attribute_value(item) for item in wanted.attribute}
        assert node.attributes == {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(GRAPH) - 1), st.integers(0, 255), st.booleans())
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    path.write_bytes(GRAPH[:at] if cut else GRAPH[:at] + bytes([byte]) + GRAPH[at + 1 :])
    try:
        read_graph(path)
    except ValueError as error:
        assert str(error)


def test_native_programs_check_for_themselves() -> None:
    program = _native.Program(2, 1, 1)
    with pytest.raises(ValueError, match="n: buffer 2 of 2"):
        program.pick("n", (0, 8, False), (2, 8, True))
    with pytest.raises(ValueError, match="n: the output has rows of 4 elements, expected 8"):
        program.pick("n", (0, 8, False), (1, 4, True))
    with pytest.raises(ValueError, match="n: unknown kind 9"):
        program.element("n", 9, (0, 8, False), (1, 8, False), None, 1.0)
    with pytest.raises(ValueError, match="n: the second value has other rows"):
        program.element("n", 0, (0, 8, False), (1, 8, False), (1, 8, True))
    with pytest.raises(ValueError, match="no such layer"):
        program.set_pages(0, np.zeros((1, 16), np.uint8))
