from __future__ import annotations

from skerry.core.target import OPS
from skerry.kernels import _native, doctor, library


def test_checks_pass_where_the_kernels_are_built():
    found = {check.name: check for check in doctor.checks()}
    assert found["native kernels"].ok and found["onnxruntime"].ok and found["custom-op library"].ok
    assert found["CUDA kernels"].ok is None


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", "libmissing.so")
    missing = doctor.checks()[0]
    assert not missing.ok and "make build" in missing.hint


def test_native_ops_are_the_ones_that_core_knows():
    assert _native.OPS == OPS
