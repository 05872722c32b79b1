"""The plugin in Python, with TensorRT-RTX's own classes and registry, on the emulator."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from skerry.core.errors import InputError
from skerry.kernels.cuda_device import Emulated
from skerry.kernels.onnx_file import Node
from skerry.kernels.reference import AttentionShape
from skerry.kernels.tensorrt import plugin
from skerry.kernels.tensorrt.plugin import INPUTS, KV, PagedAttention, attributes_of

trt = pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("skerry.kernels._emulated")
SHAPE = AttentionShape(4, 2, 64, 0.125, 64, False, 30.0, 128)
OP = PagedAttention(SHAPE, "f16.t16")


def shapes(tokens: int = 5, sequences: int = 2, width: int = 3, longest: int = 4) -> list[tuple[int, ...]]:
    ints = OP.page_ints
    return [
        (tokens, 256), (tokens, 128), (tokens, 128), (8, ints), (512, 32), (512, 32), (tokens,), (sequences + 1,),
        (sequences,), (sequences, width), (tokens,), (longest,),
    ]  # fmt: skip


@pytest.fixture
def made() -> Any:
    _, creator = plugin.plugin_classes(trt, Emulated)
    kept = creator()
    return plugin.make_plugin(trt, kept, "layer.0.attention", OP)


def test_fields_survive_an_engine(made: Any) -> None:
    """As TensorRT keeps them: by name, as arrays of one number; the creator makes the same op of them."""
    _, creator = plugin.plugin_classes(trt, Emulated)
    kept = creator()
    again = kept.create_plugin("layer.0.attention", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.op == OP == made.clone().op
    assert [field.name for field in kept.field_names] == [*plugin.WHOLE, *plugin.FLOATS]


def test_the_registry_gives_one_creator_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = trt.get_plugin_registry()
    first = plugin.registered(trt, Emulated)
    try:
        assert plugin.registered(trt, Emulated) is first
        assert (first.name, first.plugin_version, first.plugin_namespace) == ("PagedAttention", "1", "skerry")
    finally:
        registry.deregister_creator(first)


def desc(kind: Any, form: Any = trt.TensorFormat.LINEAR) -> Any:
    return SimpleNamespace(desc=SimpleNamespace(type=kind, format=form))


def test_formats_are_those_of_the_pages(made: Any) -> None:
    def taken(half: Any, **other: Any) -> bool:
        kinds = dict.fromkeys(INPUTS, trt.int32) | dict.fromkeys(("q", "k", "v", "out"), half)
        kinds |= dict.fromkeys(("cos", "sin"), trt.float32) | other
        order = [*INPUTS, "out", "kv_out"]
        descs = [desc(kinds.get(name, trt.int32)) for name in order]
        return all(made.supports_format_combination(pos, descs, len(INPUTS)) for pos in range(len(descs)))

    assert taken(trt.float16) and not taken(trt.bfloat16) and not taken(trt.float32)
    assert not taken(trt.float16, k=trt.bfloat16) and not taken(trt.float16, cos=trt.float16)
    assert not taken(trt.float16, kv=trt.int8) and not taken(trt.float16, out=trt.float32)
    made.op = replace(OP, layout="i8.t16")
    assert taken(trt.float16) and taken(trt.bfloat16)
    chunked = desc(trt.float16, trt.TensorFormat.CHW32)
    assert not made.supports_format_combination(0, [chunked] * 14, len(INPUTS))


@pytest.mark.parametrize(
    ("index", "shape", "named"),
    [(0, (5, 255), "q"), (2, (4, 128), "v"), (KV, (8, 7), "kv"), (5, (511, 32), "sin"), (7, (2,), "query_start"),
     (9, (3, 3), "block_table"), (10, (4,), "slot")],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(index: int, shape: tuple[int, ...], named: str) -> None:
    found = shapes()
    found[index] = shape
    with pytest.raises(InputError, match=rf"{named}.*shape is") as caught:
        OP.run(Emulated(), found, [0] * 13, False, 0)
    assert named in str(caught.value.obj)


def test_smaller_steps_never_need_more_workspace() -> None:
    device = Emulated()
    whole = OP.workspace(device, shapes(64, 8, 64, 64), False)
    for tokens, sequences, width, longest in ((64, 8, 64, 1), (64, 8, 64, 16), (8, 8, 64, 1), (64, 1, 33, 64)):
        assert OP.workspace(device, shapes(tokens, sequences, width, longest), False) <= whole


def test_two_buffers_of_pages_are_refused(made: Any) -> None:
    descs = [SimpleNamespace(type=trt.float16, dims=shape) for shape in shapes()]
    with pytest.raises(InputError, match="two buffers"):
        made.enqueue(descs, descs[:2], [1] * len(INPUTS), [1, 2], 0, 0)


def test_attributes_are_read_from_the_node() -> None:
    given = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 0.125, "kv_layout": 5, "window": 8}
    found = attributes_of(Node("skerry.PagedAttention", "a", (), (), given))
    assert found == PagedAttention(AttentionShape(4, 2, 64, 0.125, 64, False, 0.0, 8), "i8.t16")
    with pytest.raises(InputError, match="none of a GPU's"):
        attributes_of(Node("skerry.PagedAttention", "a", (), (), given | {"kv_layout": 0}))
