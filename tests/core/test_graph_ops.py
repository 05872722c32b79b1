"""The reader of graph ops against onnx, which writes what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core.graph_ops import custom_ops, opset_version

onnx = pytest.importorskip("onnx")


def node(domain: str, op: str, **attributes: object) -> object:
    return onnx.helper.make_node(op, ["x"], ["y"], domain=domain, **attributes)


def graph(*nodes: object) -> object:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    weights = [onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [300], [0.5] * 300)]
    return onnx.helper.make_graph(nodes, "g", [value], [], weights)


def write(path: Path, body: object, functions: list[object] | None = None) -> Path:
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("acme", 1)]
    onnx.save(onnx.helper.make_model(body, opset_imports=opsets, functions=functions or []), path)
    return path


def test_only_foreign_domains_are_named(tmp_path: Path) -> None:
    nodes = [node("", "Relu"), node("com.microsoft", "MatMulNBits"), node("skerry", "Sample"), node("acme", "Backdoor")]
    assert custom_ops(write(tmp_path / "g.onnx", graph(*nodes))) == {"skerry.Sample", "acme.Backdoor"}


def test_branches_and_functions_are_looked_into(tmp_path: Path) -> None:
    branch = node("", "If", then_branch=graph(node("acme", "Then")), else_branch=graph(node("", "Relu")))
    opsets = [onnx.helper.make_opsetid("acme", 1)]
    function = onnx.helper.make_function("skerry", "F", ["x"], ["y"], [node("acme", "Inner")], opsets)
    found = custom_ops(write(tmp_path / "g.onnx", graph(branch), [function]))
    assert found == {"acme.Then", "acme.Inner"}


def test_what_is_no_protobuf_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    whole = write(path, graph(node("acme", "Backdoor"))).read_bytes()
    for content in (b"graph", whole[:-3], b"\x3a" * 5000, b"\xff" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            custom_ops(path)
    path.write_bytes(b"")
    assert custom_ops(path) == set()


@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    try:
        custom_ops(path)
    except ValueError:
        return


def test_versions_of_domains(tmp_path: Path) -> None:
    path = write(tmp_path / "g.onnx", graph(node("acme", "Backdoor")))
    assert [opset_version(path, domain) for domain in ("", "acme", "skerry")] == [21, 1, None]
    (tmp_path / "empty").write_bytes(b"")
    assert opset_version(tmp_path / "empty", "acme") is None
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"beyond the end|cut short"):
        opset_version(tmp_path / "cut", "skerry")
