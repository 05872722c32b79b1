"""Both ops through the custom-op library: the same answers as the direct calls, and clear refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from skerry.kernels import _native
from skerry.kernels.library import library_path
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


def attention_session(case, threads: int = 2, **changed: Any) -> tuple[Any, dict[str, np.ndarray]]:
    inputs = dict(zip(ATTENTION, case.arrays())) | {"plan": np.zeros(0, np.int32)}
    attributes = {key: int(value) if isinstance(value, bool) else value for key, value in vars(case.shape).items()}
    model = one_node("PagedAttention", inputs, {"o": 1, "kv_out": 1}, **(attributes | changed))
    return session_of(model, threads), inputs


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_attention_equals_the_direct_call(attention_case, threads):
    shape = AttentionShape(6, 2, 64, 0.125, rotary_dim=64, softcap=30.0, window=500)
    case = attention_case(np.random.default_rng(0), shape, [(900, 1), (300, 120), (4, 4), (7, 0)], padding=2)
    session, inputs = attention_session(case, threads)
    out, kv = session.run(None, inputs)
    expected, expected_kv = case.run()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(kv, expected_kv)


def test_attributes_have_defaults(attention_case):
    shape = AttentionShape(2, 1, 64, 0.125, rotary_dim=64)
    case = attention_case(np.random.default_rng(1), shape, [(30, 30)])
    inputs = dict(zip(ATTENTION, case.arrays())) | {"plan": np.zeros(0, np.int32)}
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_size": 64, "scale": 0.125}
    out, _ = session_of(one_node("PagedAttention", inputs, {"o": 1, "kv_out": 1}, **sizes)).run(None, inputs)
    np.testing.assert_array_equal(out, case.run()[0])


def test_bound_cache_is_one_buffer(attention_case):
    """Bound to the same memory, input and output are the same pointer: nothing is copied."""
    case = attention_case(np.random.default_rng(2), AttentionShape(2, 2, 64, 0.125, rotary_dim=64), [(40, 3)])
    session, inputs = attention_session(case)
    kv = inputs.pop("kv").copy()
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    place = ("cpu", 0, np.float32, kv.shape, kv.ctypes.data)
    binding.bind_input("kv", *place)
    binding.bind_output("kv_out", *place)
    binding.bind_output("o", "cpu")
    session.run_with_iobinding(binding)
    out, expected_kv = case.run()
    np.testing.assert_array_equal(kv, expected_kv)
    np.testing.assert_array_equal(binding.get_outputs()[1].numpy(), out)
    assert binding.get_outputs()[0].data_ptr() == kv.ctypes.data


def test_plain_run_leaves_the_input_alone(attention_case):
    case = attention_case(np.random.default_rng(3), AttentionShape(2, 2, 64, 0.125, rotary_dim=64), [(40, 40)])
    session, inputs = attention_session(case)
    session.run(None, inputs)
    np.testing.assert_array_equal(inputs["kv"], case.kv)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("plan", np.zeros(3, np.int32), "length of plan .* is 3, expected 0"),
        ("positions", np.full(20, 40, np.int32), "position 40 of token 0 is outside the rotary tables of 40 rows"),
        ("slot", np.zeros(19, np.int32), "length of slot is 19, expected 20"),
        ("q", np.zeros((20, 64), np.float32), "columns of q is 64, expected 128"),
        ("kv", np.zeros((2, 2, 2, 16, 32), np.float32), "head size of kv is 32, expected 64"),
        ("kv", np.zeros((2, 3, 2, 16, 64), np.float32), "dimension 1 of kv is 3"),
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
