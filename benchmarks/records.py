"""What is planned and what happened: one request, one run of requests against one server.

Times are seconds on one monotonic clock, from the run's start. Figures are made from these records in metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Planned:
    """`due`: when an open-loop schedule sends it; ignored by a closed loop. `prompt`: token ids, or text. `warm_up`
    requests are sent first, before the clock starts, and leave no record."""

    index: int
    prompt: tuple[int, ...] | str
    max_tokens: int
    due: float = 0.0
    warm_up: bool = False


@dataclass(frozen=True)
class Run:
    """One order to the load client. `concurrency` set: a closed loop of that many; None: an open loop on `due`.

    `connections` bounds sockets, and so what is in flight: an open loop that meets the bound sends late, and its
    latencies count from `due`. `close`: one connection a request, for servers that break kept-alive ones.
    """

    url: str  # of the server, without a path
    requests: tuple[Planned, ...]
    concurrency: int | None = None
    connections: int = 256
    endpoint: str = "/v1/completions"
    model: str = "default"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)  # more fields of each request, such as ignore_eos
    timeout: float = 120.0  # of one request
    close: bool = False
    keep_text: bool = False


@dataclass(frozen=True)
class Relay:
    """Runs that take turns: (which run, indices of its requests). Between turns nothing is in flight."""

    runs: tuple[Run, ...]
    turns: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Record:
    """One request. `first`, `end`: None where it never came. `chunks`: arrivals of non-empty content, the first too.
    Token counts are the server's own. `status` 0: no response. `error` "" means: complete and well formed."""

    index: int
    due: float
    sent: float
    first: float | None
    end: float | None
    chunks: tuple[float, ...]
    asked_tokens: int
    prompt_tokens: int | None
    output_tokens: int | None
    finish: str | None
    status: int
    error: str
    text: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Outcome:
    """`seconds`: from the first request that counts to the last byte. `stall`: the client's own worst delay of a timer
    in the run, in seconds: where it is large, the client and not the server was measured."""

    records: tuple[Record, ...]
    seconds: float
    stall: float


def to_json(value: Any) -> dict[str, Any]:
    return asdict(value)


def from_json(kind: type[T], raw: Mapping[str, Any]) -> T:
    """Unknown keys are dropped; lists become tuples. Raises TypeError where a field is missing."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items() if name in known}
    return kind(**values)
