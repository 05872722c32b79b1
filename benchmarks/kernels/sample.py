"""Sample: temperature, top-k, top-p and the draw, over vocabularies of three sizes.

torch is two peers. "torch" does what the definition says: sort the row, softmax, cumulative sum, multinomial. "torch
topk" selects the k largest first and sorts those alone, which only helps where there is a top-k. Both draw from their
own random numbers, so it is the kept sets that are compared; ours is compared token by token with the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.benchmarks.kernels.contest import Case, Peer, calls_of
from skerry.benchmarks.kernels.setting import Setting
from skerry.core.errors import GateFailed, SkerryError
from skerry.kernels import _native, reference
from skerry.kernels.sampling import SampleParams, SampleRows

Float32 = npt.NDArray[np.float32]
VOCABULARIES, BATCHES = (49_152, 128_256, 262_144), (1, 8)
TEMPERATURE, TOP_K, TOP_P, SPREAD = 0.8, 50, 0.95, 3.0
KEPT_SLACK = 1  # of a peer: its sums are rounded, and the id at the edge may fall on either side


def cases(setting: Setting) -> Iterator[Case]:
    """Checked against the reference, peers prepared. Raises GateFailed where ours is wrong."""
    for vocabulary in setting.vocabularies or VOCABULARIES:
        for batch in BATCHES:
            yield _case(setting, vocabulary, batch)


def _case(setting: Setting, vocabulary: int, batch: int) -> Case:
    name = f"sample_{vocabulary}_b{batch}"
    setting.report(f"{name}: checking")
    logits = np.random.default_rng(setting.seed).standard_normal((batch, vocabulary), np.float32) * np.float32(SPREAD)
    rows = SampleRows.build(
        [SampleParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, seed=row) for row in range(batch)]
    )
    kept = check(logits, rows, setting.threads, name)
    threads = setting.threads
    case = Case(
        name, f"sampling, V={vocabulary}, b{batch}", calls_of(lambda _: _native.sample(logits, rows, threads)),
        work=logits.nbytes,
    )  # fmt: skip
    peers: list[Peer] = []
    for title, prefilter in (("torch", False), ("torch topk", True)):
        peers += setting.peer("torch", name, lambda t=title, p=prefilter: _torch(setting, logits, kept, t, p))  # type: ignore[misc]
    case.peers = tuple(peers)
    return case


def check(logits: Float32, rows: SampleRows, threads: int, name: str) -> list[npt.NDArray[Any]]:
    """The reference's kept sets. Raises GateFailed where the op keeps, draws or scores otherwise."""
    expected = reference.sample(logits, rows)
    kept = [reference.kept(logits[row], rows, row)[0] for row in range(len(rows))]
    token, logprob, entropy, *_ = _native.sample(logits, rows, threads)
    wrong = [row for row in range(len(rows)) if not np.array_equal(_native.kept(logits, rows, row), kept[row])]
    if wrong or not np.array_equal(token, expected.token):
        cause = f"kept sets of rows {wrong} differ" if wrong else "draws other tokens than the reference"
        raise GateFailed("check kernel", name, cause, "run tests/kernels; a wrong kernel has no figures")
    error = max(float(np.abs(logprob - expected.logprob).max()), float(np.abs(entropy - expected.entropy).max()))
    if not error <= 1e-4:
        raise GateFailed("check kernel", name, f"log-probabilities off by {error:.3g}", "run tests/kernels")
    return kept


def _torch(setting: Setting, logits: Float32, kept: list[npt.NDArray[Any]], title: str, prefilter: bool) -> Peer:
    assert setting.torch is not None
    options = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "prefilter": prefilter}
    prepared = setting.torch.prepare("sample", {"logits": logits}, **options)
    setting.on_close(prepared.forget)
    tokens, counts = prepared.output
    for row, (token, count) in enumerate(zip(tokens.tolist(), counts.tolist())):
        most_likely = np.argsort(-logits[row], kind="stable")[: len(kept[row]) + KEPT_SLACK]
        if abs(count - len(kept[row])) > KEPT_SLACK or token not in most_likely:
            cause = f"keeps {count} ids of row {row} and drew {token}; the reference keeps {len(kept[row])}"
            raise SkerryError("check peer", title, cause)
    return Peer(title, setting.torch.version, prepared.shot)
