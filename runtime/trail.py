"""What is known of one HTTP request, from its first byte to its last: its id, and what it came to.

The trail is found through a context variable, so whatever runs on behalf of a request (also in a thread) can add to it,
and log lines carry its id. It holds figures only; text enters `content` alone, and only where an operator has asked.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skerry.runtime.observe import Timing

CONTENT_LENGTH = 64 << 10
_current: contextvars.ContextVar[Trail | None] = contextvars.ContextVar("skerry_trail", default=None)


@dataclass(frozen=True)
class Account:
    """What one generation came to. `finishes` has "" for a choice that never ended; `queued`: seconds until the first
    of its choices was admitted, None: none was."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finishes: tuple[str, ...]
    timing: Timing
    queued: float | None
    preemptions: int

    @property
    def ttft(self) -> float | None:
        return self.timing.ttft if self.timing.first_token else None

    @property
    def tpot(self) -> float | None:
        """Of n choices that run side by side: the time of one token of each."""
        return self.timing.tpot(self.output_tokens // max(1, len(self.finishes)))

    @property
    def e2e(self) -> float | None:
        return self.timing.e2e if self.timing.last_token else None


@dataclass
class Content:
    """Texts of a request, kept only with --otel-content; what is longer than the limit is cut."""

    inputs: list[tuple[str, str]] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)

    def asked(self, role: str, text: str) -> None:
        room = CONTENT_LENGTH - sum(len(known) for _, known in self.inputs)
        self.inputs.append((role, text[: max(0, room)]))

    def answered(self, index: int, text: str) -> None:
        known = self.outputs.get(index, "")
        self.outputs[index] = known + text[: max(0, CONTENT_LENGTH - len(known))]


@dataclass
class Trail:
    """`started` is time.monotonic(), `wall` the same moment in nanoseconds since 1970. `status` 0: no answer was begun.

    `error`: a short code, also where the status was sent before the failure. `model`, `params` and `accounts` are the
    service's; asking an account is cheap and right at any time, so a request that was cut short is told of as well.
    """

    id: str
    method: str
    path: str
    started: float
    wall: int
    parent: dict[str, str] = field(default_factory=dict)
    status: int = 0
    ended: float = 0.0
    tenant: str = ""
    model: str = ""
    error: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    accounts: list[Callable[[], Account | None]] = field(default_factory=list)
    content: Content | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def account(self) -> Account | None:
        """Of all generations of the request together; None when there was none."""
        return merged([found for account in self.accounts if (found := account()) is not None])


def merged(accounts: Sequence[Account]) -> Account | None:
    """Several prompts of one request: tokens add up, the times are those of the first token and the last."""
    if len(accounts) < 2:
        return accounts[0] if accounts else None
    from skerry.runtime.observe import Timing  # logs are set up long before what that imports is needed

    timing = Timing(min(a.timing.arrived for a in accounts))
    timing.first_token = min((a.timing.first_token for a in accounts if a.timing.first_token), default=0.0)
    timing.last_token = max(a.timing.last_token for a in accounts)
    queued = [a.queued for a in accounts if a.queued is not None]
    return Account(
        sum(a.prompt_tokens for a in accounts), sum(a.cached_tokens for a in accounts),
        sum(a.output_tokens for a in accounts), tuple(f for a in accounts for f in a.finishes), timing,
        min(queued, default=None), sum(a.preemptions for a in accounts),
    )  # fmt: skip


def current() -> Trail | None:
    """The trail of the request that this code runs for; None outside one."""
    return _current.get()


def enter(trail: Trail) -> contextvars.Token[Trail | None]:
    return _current.set(trail)


def leave(token: contextvars.Token[Trail | None]) -> None:
    _current.reset(token)


def note_tenant(digest: bytes) -> None:
    """The first half of the tenant's digest, enough to tell tenants apart; the key itself never comes here."""
    trail = _current.get()
    if trail is not None and digest:
        trail.tenant = digest.hex()[:12]


def note_error(code: str) -> None:
    """The first one stays: it is the cause of those that follow."""
    trail = _current.get()
    if trail is not None:
        trail.error = trail.error or code
