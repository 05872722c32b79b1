from __future__ import annotations

import pytest

from skerry.benchmarks.gates import Gates, read_gates
from skerry.core.errors import ConfigError, UsageError


def test_the_file_the_flags_and_the_defaults(tmp_path):
    file = tmp_path / "skerry.toml"
    file.write_text('[node]\nport = 1\n[gates]\nmetrics = ["tpot", "e2e:0.1"]\nbudget = 0.05\n')
    assert read_gates(file).budgets() == {"tpot": 0.05, "e2e": 0.1}
    assert read_gates(file, budget=0.0, blocks=None).budgets() == {"tpot": 0.0, "e2e": 0.1}
    assert read_gates(file, ["ttft:0.2"]).budgets() == {"ttft": 0.2}
    assert read_gates(None).budgets() == {"ttft": 0.03, "tpot": 0.03, "e2e": 0.03}


@pytest.mark.parametrize(("line", "cause"), [
    ('metrics = ["tpto"]', "did you mean tpot"), ('metrics = ["tpot:much"]', "NAME:SHARE"),
    ('metrics = ["tpot:-1"]', "NAME:SHARE"), ("metrics = []", "names no metric"), ("budget = -0.1", "out of range"),
    ("blocks = 3", "at least 6"), ("blocks = 50", "at least 6"), ("agreement = 2.0", "out of range"),
    ("confidence = 1.0", "out of range"), ("bugdet = 0.1", "did you mean budget"), ('budget = "3%"', "not a number"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(tmp_path, line, cause):
    file = tmp_path / "skerry.toml"
    file.write_text(f"[gates]\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_gates(file)
    assert cause in caught.value.render()


def test_no_99th_percentile_of_few_requests():
    gates = Gates(metrics=("ttft_p99", "tpot"))
    with pytest.raises(UsageError, match="99 requests a block"):
        gates.check_requests(99)
    gates.check_requests(100)
    Gates().check_requests(2)
