"""Full TensorRT where it and a GPU are: the plan is built there, and its plugin's kernels run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from skerry.core.errors import NotFound
from skerry.core.target import Target
from skerry.exporter.export import Options, export
from skerry.kernels.device_arrays import GpuArrays
from skerry.kernels.runner import Row, Runner, pack_rows
from skerry.kernels.tensorrt.paged_engine import build_plan, open_plan
from skerry.kernels.tensorrt.paged_file import BuildFile

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "head_dim": 64}
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]
QUICK = Options(unmeasured=True)


def test_a_plan_on_a_gpu(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Built twice, the second time by the first one's times; steps as they come, captured and replayed."""
    pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    try:
        arrays = GpuArrays()
    except NotFound as error:
        pytest.skip(str(error))
    model = make_model("llama", peaked=True, **SHAPE)
    wide = export(model, Target("ort-cpu"), "fp32", tmp_path / "cpu", QUICK)
    narrow = export(model, Target("tensorrt"), "fp16", tmp_path / "tensorrt", QUICK)
    described = BuildFile.of(narrow)
    plan, timing = build_plan(narrow, described, arrays)
    again, _ = build_plan(narrow, described, arrays, timing)
    with Runner.open(wide, pages=24) as reference:
        expected = reference.logits_for(IDS)
    for made in (plan, again):
        with open_plan(narrow, made, arrays, pages=24) as runner:
            found = runner.logits_for(IDS)
            steps = [runner.step(pack_rows([Row([IDS[-1]], len(IDS) - 1, [[0, 1, 2]])], 16)) for _ in range(4)]
        assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 0.004
        for step in steps:
            np.testing.assert_allclose(step[0], found[-1], atol=0.05)
