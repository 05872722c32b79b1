"""Sample on the GPU: temperature, top-k, top-p and the draw, for vocabularies and batches of the targets.

Ours is compared token by token with the reference; torch draws from its own random numbers, so its kept sets are
compared. What is timed is the launch: parameters of a step are on the device already, as are the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer
from skerry.benchmarks.kernels.gpu.bench import GpuBench
from skerry.benchmarks.kernels.sample import KEPT_SLACK, SPREAD, TEMPERATURE, TOP_K, TOP_P
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import reference
from skerry.kernels.sample_cuda import CudaSampler
from skerry.kernels.sampling import SampleParams, SampleRows

Float32 = npt.NDArray[np.float32]
VOCABULARIES, BATCHES = (32_768, 131_072, 262_144), (1, 8, 64)


def cases(bench: GpuBench) -> Iterator[Case]:
    """Checked against the reference, peers prepared. Raises GateFailed where ours is wrong."""
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            yield _case(bench, vocabulary, batch)


def case_name(vocabulary: int, batch: int) -> tuple[str, str]:
    """Of its figure, and of its rows."""
    return f"gpu_sample_{vocabulary}_b{batch}", f"GPU sampling, V={vocabulary}, b{batch}"


def _case(bench: GpuBench, vocabulary: int, batch: int) -> Case:
    name, label = case_name(vocabulary, batch)
    bench.setting.report(f"{name}: checking")
    rng = np.random.default_rng(bench.setting.seed)
    logits = rng.standard_normal((batch, vocabulary), np.float32) * np.float32(SPREAD)
    rows = SampleRows.build(
        [SampleParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, seed=row) for row in range(batch)]
    )
    sampler = CudaSampler(bench.device)
    there = bench.device.put(logits)
    step = sampler.prepare(bench.device.address(there), vocabulary, rows)
    step.launch()
    _check(step.outcome().token, logits, rows, name)

    def call(_: int) -> Any:
        step.launch()
        return there  # is kept as long as the case is

    case = Case(name, label, bench.clock.shot(call), work=logits.nbytes)
    if bench.torch is not None:
        case.peers = tuple(bench.setting.peer("torch", name, lambda: _torch(bench, logits, rows)))
    return case


def _check(token: npt.NDArray[np.int32], logits: Float32, rows: SampleRows, name: str) -> None:
    expected = reference.sample(logits, rows).token
    if not np.array_equal(token, expected):
        wrong = np.flatnonzero(token != expected).tolist()
        raise GateFailed("check kernel", name, f"rows {wrong} draw other tokens than the reference",
                         "run tests/kernels/test_cuda_sample.py; a wrong kernel has no figures")  # fmt: skip


def _torch(bench: GpuBench, logits: Float32, rows: SampleRows) -> Peer:
    assert bench.torch is not None
    there = bench.torch.put(logits)
    call = bench.torch.sample(there, TEMPERATURE, TOP_K, TOP_P)
    tokens, counts = (value.tolist() for value in bench.torch.once(call))
    for row in range(len(rows)):
        kept: npt.NDArray[Any] = reference.kept(logits[row], rows, row)[0]
        most_likely = np.argsort(-logits[row], kind="stable")[: len(kept) + KEPT_SLACK]
        if abs(counts[row] - len(kept)) > KEPT_SLACK or tokens[row] not in most_likely:
            cause = f"keeps {counts[row]} ids of row {row} and drew {tokens[row]}; the reference keeps {len(kept)}"
            raise SkerryError("check peer", "torch", cause)
    return Peer("torch", bench.torch.version, bench.clock.shot(call))
