from __future__ import annotations

import pytest

from skerry.core.errors import ConfigError
from skerry.core.target import OPS
from skerry.kernels import _native, doctor, library
from skerry.kernels.runner import Runner


def test_checks_pass_where_the_kernels_are_built():
    found = {check.name: check for check in doctor.checks()}
    assert found["native kernels"].ok and found["onnxruntime"].ok and found["custom-op library"].ok
    assert found["CUDA kernels"].ok is not False and found["GPU"].ok is not False  # neither is needed


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(library, "LIBRARY", "libmissing.so")
    missing = doctor.checks()[0]
    assert not missing.ok and "make build" in missing.hint


@pytest.mark.parametrize(("asked", "said"), [("sse9", "'sse9' is no instruction set"), ("neondot", "lacks neondot")])
def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch, make_bundle, asked, said):
    if _native.isa() == asked:
        pytest.skip(f"this processor has {asked}")
    monkeypatch.setenv("SKERRY_ISA", asked)
    found = {check.name: check for check in doctor.checks()}["instruction set"]
    assert not found.ok and said in found.detail and "base, avx2" in found.hint
    with pytest.raises(ConfigError, match=said):
        Runner.open(make_bundle(), pages=4)
    monkeypatch.setenv("SKERRY_ISA", _native.isa())
    assert "lowered by SKERRY_ISA" in {check.name: check for check in doctor.checks()}["instruction set"].detail


def test_native_ops_are_the_ones_that_core_knows():
    assert _native.OPS == OPS
