from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from skerry.core.bundle import open_bundle
from skerry.core.errors import GateFailed, SkerryError
from skerry.runtime.golden import TOKEN_LIMIT, check_golden


class Scorer:
    """Answers -1.0 for every token, or `value`; remembers what it was asked."""

    def __init__(self, value: float = -1.0) -> None:
        self.value, self.asked = value, []

    def score(self, sequences: list[tuple[list[int], int]]) -> list[Any]:
        self.asked += sequences
        return [SimpleNamespace(logprob=np.full(len(ids) - start, self.value)) for ids, start in sequences]


def bundle_with(path: Path, document: Any) -> Any:
    """A stand-in for a bundle whose golden.json is `document`."""
    (path / "golden.json").write_text(document if isinstance(document, str) else json.dumps(document))
    manifest = SimpleNamespace(model=SimpleNamespace(vocab_size=100))
    return SimpleNamespace(file=lambda name: path / name, manifest=manifest, short="abc")


def row(length: int = 5, start: int = 2, value: float = -1.0) -> dict[str, Any]:
    return {"ids": list(range(length)), "start": start, "logprobs": [value] * (length - start)}


def document(*rows: dict[str, Any], mean: float = 0.1, most: float = 1.0) -> dict[str, Any]:
    return {"mean_margin": mean, "max_margin": most, "rows": list(rows)}


def test_within_the_margins(tmp_path):
    result = check_golden(bundle_with(tmp_path, document(row(), row())), Scorer(-1.05))
    assert result.ok and result.tokens == 6 and result.mean_error == pytest.approx(0.05)


@pytest.mark.parametrize("value", [-1.2, float("nan"), float("-inf")])
def test_beyond_them_it_must_not_serve(tmp_path, value):
    bundle = bundle_with(tmp_path, document(row()))
    result = check_golden(bundle, Scorer(value))
    assert not result.ok
    with pytest.raises(GateFailed, match="margins"):
        result.require(bundle)


def test_one_wild_token_is_too_many(tmp_path):
    rows = [row(30, 2), {**row(5, 4), "logprobs": [-2.5]}]
    assert not check_golden(bundle_with(tmp_path, document(*rows)), Scorer()).ok


def test_only_as_many_rows_as_fit_the_limit_are_scored(tmp_path):
    scorer = Scorer()
    check_golden(bundle_with(tmp_path, document(*[row(90)] * 8)), scorer)
    assert len(scorer.asked) == TOKEN_LIMIT // 90
    check_golden(bundle_with(tmp_path, document(row(99))), scorer)


BROKEN = [
    "{", "[]", {"rows": []}, document(), document({**row(), "logprobs": [-1.0]}), document({**row(), "start": 0}),
    document({**row(), "ids": [1, 2, 3, 4, 100]}), document({**row(), "ids": [1, 2, 3, 4, -1]}), document({"ids": 3}),
    document({**row(), "logprobs": ["x", -1, -1]}), '{"mean_margin": NaN, "max_margin": 1, "rows": []}',
]  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_malformed_golden_prompts_are_a_broken_bundle(tmp_path, broken):
    with pytest.raises(SkerryError):
        check_golden(bundle_with(tmp_path, broken), Scorer())


def test_a_real_bundle_passes_its_own(bundles):
    from skerry.kernels.runner import Runner

    bundle = open_bundle(bundles())
    with Runner.open(bundle, threads=1, pages=8) as runner:
        assert check_golden(bundle, runner).max_error < 1e-3
