"""Both ops through the custom-op library: the same answers as the direct calls, and clear refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skerry.kernels import _native
from skerry.kernels.blocks import BlockFormat, Blocks, pack
from skerry.kernels.library import library_path
from skerry.kernels.pages import to_pages
from skerry.kernels.reference import AttentionShape
from skerry.kernels.sampling import SampleParams, SampleRows

ATTENTION = ["q", "k", "v", "kv", "cos", "sin", "positions", "query_start", "context_len", "block_table", "slot"]
SAMPLE = [
    "temperature", "top_k", "top_p", "min_p", "repetition", "frequency", "presence", "seed", "token_index", "target",
    "hist_start", "hist_ids", "hist_counts", "bias_start", "bias_ids", "bias_values", "mask", "mask_row",
]  # fmt: skip


def one_node(op: str, inputs: dict[str, np.ndarray], outputs: dict[str, int], **attributes: Any) -> bytes:
    from onnx import helper

    node = helper.make_node(op, list(inputs), list(outputs), domain="skerry", **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("skerry", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session_of(model: bytes, threads: int = 2) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def op_inputs(case) -> list[np.ndarray]:
    """The cache as pages."""
    arrays = case.arrays()
    arrays[3] = to_pages(arrays[3], "f32.k16t")
    return arrays


def attention_session(case, threads: int = 2, **changed: Any) -> tuple[Any, dict[str, np.ndarray]]:
    inputs = dict(zip(ATTENTION, op_inputs(case))) | {"plan": np.zeros(0, np.int32)}
    attributes = {key: int(value) if isinstance(value, bool) else value for key, value in vars(case.shape).items()}
    model = one_node("PagedAttention", inputs, {"o": 1, "kv_out": 2}, **(attributes | changed))
    return session_of(model, threads), inputs


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_attention_equals_the_direct_call(attention_case, threads):
    shape = AttentionShape(6, 2, 64, 0.125, rotary_dim=64, softcap=30.0, window=500)
    case = attention_case(np.random.default_rng(0), shape, [(900, 1), (300, 120), (4, 4), (7, 0)], padding=2)
    session, inputs = attention_session(case, threads)
    out, kv = session.run(None, inputs)
    expected, expected_kv = case.run()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(kv, to_pages(expected_kv, "f32.k16t"))


def test_attributes_have_defaults(attention_case):
    shape = AttentionShape(2, 1, 64, 0.125, rotary_dim=64)
    case = attention_case(np.random.default_rng(1), shape, [(30, 30)])
    inputs = dict(zip(ATTENTION, op_inputs(case))) | {"plan": np.zeros(0, np.int32)}
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_size": 64, "scale": 0.125}
    out, _ = session_of(one_node("PagedAttention", inputs, {"o": 1, "kv_out": 2}, **sizes)).run(None, inputs)
    np.testing.assert_array_equal(out, case.run()[0])


def test_bound_cache_is_one_buffer(attention_case):
    """Bound to the same memory, input and output are the same pointer: nothing is copied."""
    case = attention_case(np.random.default_rng(2), AttentionShape(2, 2, 64, 0.125, rotary_dim=64), [(40, 3)])
    session, inputs = attention_session(case)
    kv = inputs.pop("kv").copy()
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    place = ("cpu", 0, np.uint8, kv.shape, kv.ctypes.data)
    binding.bind_input("kv", *place)
    binding.bind_output("kv_out", *place)
    binding.bind_output("o", "cpu")
    session.run_with_iobinding(binding)
    out, expected_kv = case.run()
    np.testing.assert_array_equal(kv, to_pages(expected_kv, "f32.k16t"))
    np.testing.assert_array_equal(binding.get_outputs()[1].numpy(), out)
    assert binding.get_outputs()[0].data_ptr() == kv.ctypes.data


def test_plain_run_leaves_the_input_alone(attention_case):
    case = attention_case(np.random.default_rng(3), AttentionShape(2, 2, 64, 0.125, rotary_dim=64), [(40, 40)])
    session, inputs = attention_session(case)
    session.run(None, inputs)
    np.testing.assert_array_equal(inputs["kv"], to_pages(case.kv, "f32.k16t"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("plan", np.zeros(3, np.int32), "length of plan .* is 3, expected 0"),
        ("positions", np.full(20, 40, np.int32), "position 40 of token 0 is outside the rotary tables of 40 rows"),
        ("slot", np.zeros(19, np.int32), "length of slot is 19, expected 20"),
        ("q", np.zeros((20, 64), np.float32), "columns of q is 64, expected 128"),
        ("kv", np.zeros((2, 8192), np.uint8), "bytes of a page of kv is 8192, expected 16384"),
        ("cos", np.zeros((40, 16), np.float32), "columns of cos is 16, expected 32"),
        ("sin", np.zeros((39, 32), np.float32), "rows of sin is 39, expected 40"),
        ("block_table", np.zeros((2, 3), np.int32), "rows of block_table is 2, expected 1"),
        ("query_start", np.zeros(3, np.int32), "length of query_start is 3, expected 2"),
    ],
)
def test_attention_refuses(attention_case, name, value, message):
    case = attention_case(np.random.default_rng(4), AttentionShape(2, 2, 64, 0.125, rotary_dim=64), [(40, 20)])
    session, inputs = attention_session(case)
    with pytest.raises(Exception, match=f"skerry.PagedAttention: {message}"):
        session.run(None, inputs | {name: value})


@pytest.mark.parametrize(
    ("changed", "message"), [({"num_heads": 3}, "num_heads 3"), ({"rotary_dim": 65}, "rotary_dim 65")]
)
def test_bad_attributes_fail_at_load(attention_case, changed, message):
    case = attention_case(np.random.default_rng(5), AttentionShape(4, 2, 64, 0.125, rotary_dim=64), [(4, 4)])
    with pytest.raises(Exception, match=f"create skerry.PagedAttention: {message}"):
        attention_session(case, **changed)


def sample_inputs(logits: np.ndarray, rows: SampleRows) -> dict[str, np.ndarray]:
    fields = {name: getattr(rows, name) for name in SAMPLE}
    return {"logits": logits} | fields | {"top_n": np.array([rows.top_n], np.int32)}


SAMPLE_OUTPUTS = {"token": 6, "logprob": 1, "entropy": 1, "top_ids": 6, "top_logprobs": 1}


@pytest.mark.parametrize("top_n", [0, 4])
def test_sample_equals_the_direct_call(top_n):
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(5, 1000)).astype(np.float32) * 2
    logits[3, 4] = np.nan
    mask = rng.integers(-(2**31), 2**31, 32).astype(np.int32)
    params = [
        SampleParams(seed=2**64 - 1, top_p=0.9), SampleParams(temperature=0.0, history={3: 2, 9: 0}, repetition=1.3),
        SampleParams(mask=mask, bias={7: 2.0}, top_k=50), SampleParams(), SampleParams(target=12),
    ]  # fmt: skip
    rows = SampleRows.build(params, top_n)
    inputs = sample_inputs(logits, rows)
    found = session_of(one_node("Sample", inputs, SAMPLE_OUTPUTS)).run(None, inputs)
    for mine, direct in zip(found, _native.sample(logits, rows)):
        np.testing.assert_array_equal(mine, direct)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", np.full(2, -1, np.float32), "temperature -1"),
        ("target", np.full(2, 10, np.int32), "target 10"),
        ("seed", np.zeros(1, np.uint64), "length of seed is 1, expected 2"),
        ("mask_row", np.zeros(2, np.int32), "mask_row 0 of row 0 is outside the 0 masks"),
        ("top_n", np.array([5000], np.int32), "top_n 5000"),
    ],
)  # fmt: skip
def test_sample_refuses(name, value, message):
    inputs = sample_inputs(np.zeros((2, 10), np.float32), SampleRows.build([SampleParams()] * 2))
    session = session_of(one_node("Sample", inputs, SAMPLE_OUTPUTS))
    with pytest.raises(Exception, match=f"skerry.Sample: {message}"):
        session.run(None, inputs | {name: value})


def test_rows_of_no_batch():
    inputs = sample_inputs(np.zeros((0, 10), np.float32), SampleRows.build([]))
    found = session_of(one_node("Sample", inputs, SAMPLE_OUTPUTS)).run(None, inputs)
    assert [value.shape for value in found] == [(0,), (0,), (0,), (0, 0), (0, 0)]


# MatMulBlock and GatherBlock


def block_inputs(tokens: int = 5, width: int = 96) -> tuple[dict[str, np.ndarray], list[Blocks], dict[str, Any]]:
    rng = np.random.default_rng(0)
    weights = [
        quantize_for_test(rng, form, rows, width) for form, rows in ((BlockFormat.Q8_0, 33), (BlockFormat.Q4_1, 16))
    ]
    inputs = {
        "x": rng.normal(size=(tokens, width)).astype(np.float32),
        "norm": rng.uniform(0.5, 1.5, width).astype(np.float32),
        "w0": pack(weights[0]), "b0": rng.normal(size=33).astype(np.float32), "w1": pack(weights[1]),
    }  # fmt: skip
    formats = [int(weight.format) for weight in weights]
    return inputs, weights, {"width": width, "rows": [33, 16], "formats": formats, "epsilon": 1e-5, "activation": 0}


def quantize_for_test(rng: np.random.Generator, form: BlockFormat, rows: int, width: int) -> Blocks:
    shape = (rows, width // 32)
    minima = rng.normal(size=shape).astype(np.float16) if form is BlockFormat.Q4_1 else None
    scales = rng.uniform(0.5, 1, shape).astype(np.float16)
    return Blocks(form, rng.integers(0, 1 << form.bits, (*shape, 32), np.uint8), scales, minima)


def block_model(
    inputs: dict[str, np.ndarray], order: list[str], outputs: int, attributes: dict[str, Any], version: int = 1
) -> bytes:
    from onnx import helper

    node = helper.make_node("MatMulBlock", order, [f"y{i}" for i in range(outputs)], domain="skerry", **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in inputs.items()
        if name in order
    ]
    results = [helper.make_tensor_value_info(f"y{i}", 1, None) for i in range(outputs)]
    graph = helper.make_graph([node], "g", values, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("skerry", version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def assert_equals_the_direct_call(session: Any, inputs: dict[str, np.ndarray]) -> None:
    segments = [(inputs["w0"], 33, 0, inputs["b0"]), (inputs["w1"], 16, 2, None)]
    expected = _native.matmul_block(inputs["x"], segments, norm=inputs["norm"], epsilon=1e-5)
    for found, wanted in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_block_product_equals_the_direct_call(threads: int, tokens: int) -> None:
    inputs, _, attributes = block_inputs(tokens)
    session = session_of(block_model(inputs, ["x", "norm", "", "w0", "b0", "w1"], 2, attributes), threads)
    assert_equals_the_direct_call(session, inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((5, 64), np.float32), "columns of x is 64, expected 96"),
        ("norm", np.zeros(95, np.float32), "length of norm is 95, expected 96"),
        ("w0", np.zeros(100, np.uint8), "bytes of weight is 100"),
        ("b0", np.zeros(32, np.float32), "length of bias is 32, expected 33"),
    ],
)
def test_block_product_refuses(name: str, value: np.ndarray, message: str) -> None:
    inputs, _, attributes = block_inputs()
    session = session_of(block_model(inputs, ["x", "norm", "", "w0", "b0", "w1"], 2, attributes))
    with pytest.raises(Exception, match=f"skerry.MatMulBlock: {message}"):
        session.run(None, inputs | {name: value})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 95}, "rows of 95 elements"), ({"formats": [0, 8]}, "segment 1 has unknown format 8"),
        ({"formats": [0]}, "length of formats is 1, expected 2"), ({"rows": [33, 0]}, "segment 1 has 0 rows"),
        ({"activation": 1}, "a gated product takes two segments of equal rows"),
        ({"rows": [1] * 9, "formats": [0] * 9}, "segments, 1 to 4 are possible"),
    ],
)  # fmt: skip
def test_bad_block_attributes_fail_at_load(changed: dict[str, Any], message: str) -> None:
    inputs, _, attributes = block_inputs()
    with pytest.raises(Exception, match=f"create skerry.MatMulBlock: .*{message}"):
        session_of(block_model(inputs, ["x", "norm", "", "w0", "b0", "w1"], 2, attributes | changed))


WITH_ADAPTERS = ["x", "norm", "", "w0", "b0", "w1", "", "", "", "", "", "query_start", "adapter_rows", "adapters"]


def adapter_inputs() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    inputs, _, attributes = block_inputs()
    values = np.random.default_rng(2).normal(size=(2, 3, 300)).astype(np.float16)
    rows, starts = np.array([1, -1, 0], np.int32), np.array([0, 2, 3, 5], np.int32)
    inputs |= {"query_start": starts, "adapter_rows": rows, "adapters": values}
    return inputs, attributes | {"adapter_offset": 59}


def test_a_block_product_with_adapters_equals_the_direct_call() -> None:
    inputs, attributes = adapter_inputs()
    given = {name: inputs[name] for name in ("norm", "query_start", "adapter_rows", "adapters")}
    segments = [(inputs["w0"], 33, 0, inputs["b0"]), (inputs["w1"], 16, 2, None)]
    session = session_of(block_model(inputs, WITH_ADAPTERS, 2, attributes, version=2), 1)
    for slots in (2, 0):
        given["adapters"], given["adapter_rows"] = inputs["adapters"][:slots], inputs["adapter_rows"] % (slots + 1) - 1
        expected = _native.matmul_block(inputs["x"], segments, epsilon=1e-5, adapter_offset=59, **given)
        found = session.run(None, inputs | given)
        for one, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, wanted)


@pytest.mark.parametrize("version", [1, 2])
def test_a_graph_of_either_version_may_leave_adapters_out(version: int) -> None:
    inputs, _, attributes = block_inputs()
    session = session_of(block_model(inputs, ["x", "norm", "", "w0", "b0", "w1"], 2, attributes, version))
    assert_equals_the_direct_call(session, inputs)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("adapter_rows", np.array([2, 0, 0], np.int32), "adapter_rows has 2 for sequence 0, there are 2 slots"),
        ("adapter_rows", np.zeros(2, np.int32), "length of query_start is 4, expected 3"),
        ("query_start", np.array([0, 2, 3, 6], np.int32), "query_start ends at 6 but there are 5 tokens"),
        ("adapters", np.zeros((2, 3, 299), np.float16), "adapter columns 59 to 300 are beyond the 299"),
    ],
)
def test_block_product_refuses_adapters(name: str, value: np.ndarray, message: str) -> None:
    inputs, attributes = adapter_inputs()
    session = session_of(block_model(inputs, WITH_ADAPTERS, 2, attributes, version=2))
    with pytest.raises(Exception, match=f"skerry.MatMulBlock: {message}"):
        session.run(None, inputs | {name: value})


@pytest.mark.parametrize(
    ("order", "offset", "message"),
    [
        (WITH_ADAPTERS, -1, "adapter_offset is -1 with 14 inputs"), (WITH_ADAPTERS[:6], 5, "is 5 with 6 inputs"),
        (WITH_ADAPTERS[:13], 5, "is 5 with 13 inputs"), (WITH_ADAPTERS, -2, "adapter_offset -2"),
        ([*WITH_ADAPTERS[:11], "", *WITH_ADAPTERS[12:]], 5, "query_start is missing"),
    ],
)  # fmt: skip
def test_adapters_are_there_with_their_columns_or_not_at_all(order: list[str], offset: int, message: str) -> None:
    inputs, attributes = adapter_inputs()
    with pytest.raises(Exception, match=f"skerry.MatMulBlock: .*{message}"):
        session = session_of(block_model(inputs, order, 2, attributes | {"adapter_offset": offset}, version=2))
        session.run(None, {name: inputs[name] for name in order if name})


def test_gathered_rows_are_those_of_the_matrix() -> None:
    matrix = quantize_for_test(np.random.default_rng(1), BlockFormat.Q8_0, 50, 64)
    inputs = {"ids": np.array([49, 0, 17], np.int32), "w": pack(matrix)}
    model = one_node("GatherBlock", inputs, {"y": 1}, width=64, rows=50, format=0)
    session = session_of(model)
    np.testing.assert_array_equal(session.run(None, inputs)[0], matrix.dequantized()[inputs["ids"]])
    with pytest.raises(Exception, match="id 50 at 1 is outside the table of 50 rows"):
        session.run(None, inputs | {"ids": np.array([1, 50], np.int32)})
    with pytest.raises(Exception, match="bytes of weight"):
        session.run(None, inputs | {"w": inputs["w"][1:]})
