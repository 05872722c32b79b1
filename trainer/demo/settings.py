"""How large the demo is: the real model in about a quarter of an hour, or a tiny one for tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """`calm_windows` of window_requests on every node before the shift; `alarm_windows` at most after it."""

    base: str
    precision: str
    rows: int
    steps: tuple[int, int]
    batch: int
    max_tokens: int
    learning_rate: float
    users_per_node: int
    answer_tokens: int
    window_requests: int = 16
    calm_windows: int = 5
    alarm_windows: int = 10
    replay: float = 0.3
    soak_requests: int = 24
    defect_rows: int = 448
    # What the second model must reach; None where a random model has nothing to show.
    min_gain_v1: float | None = 0.10
    min_gain_v2: float | None = 0.05
    max_loss_v2: float | None = 0.02


REAL = Settings(
    base="smollm2", precision="int8", rows=1500, steps=(24, 24), batch=16, max_tokens=160, learning_rate=1e-3,
    users_per_node=2, answer_tokens=24,
)  # fmt: skip
TINY = Settings(
    base="tiny", precision="fp32", rows=160, steps=(20, 10), batch=8, max_tokens=96, learning_rate=5e-3,
    users_per_node=4, answer_tokens=8, calm_windows=3, soak_requests=8, min_gain_v1=None, min_gain_v2=None,
    max_loss_v2=None,
)  # fmt: skip
