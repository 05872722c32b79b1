"""The life of a request: what was asked (frozen) and how far it has come (mutable).

1. `Request`: token ids and parameters, fixed when the HTTP layer has understood the body.
2. WAITING: in the scheduler's queue, holding no pages.
3. RUNNING, prefill: pages for the whole prompt held, those found in the prefix cache among them; the rest of the prompt
   enters the cache in chunks.
4. RUNNING, decode: a token a step, or several where guesses came true; a page more whenever the last is full.
5. Preempted: pages given back, WAITING again in its old place; what the prefix cache has lost by then is recomputed.
6. FINISHED: stop, length, cancelled, timeout or error; pages are free at that moment.

Every sampled token leaves the engine as an `Update`.
"""

from __future__ import annotations

import enum
import itertools
import math
import secrets
from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from skerry.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from skerry.runtime.pooling import Pooling
    from skerry.runtime.speculate import Lookup

_SEED_MASK = (1 << 64) - 1
_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Neutral values draw from the model's own distribution; temperature 0 is greedy.

    `logit_bias` holds (token id, added logit); `top_n` alternatives are reported with their log-probabilities.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_n: int = 0

    @property
    def penalised(self) -> bool:
        """Whether sampling needs the history of tokens."""
        return self.repetition != 1.0 or self.frequency != 0.0 or self.presence != 0.0


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with n > 1 (splitmix64); choice 0 keeps the request's own."""
    if index == 0:
        return seed & _SEED_MASK
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _SEED_MASK
    return mixed ^ (mixed >> 31)


class Unanswerable(InputError):
    """The request itself cannot be answered, which only running it showed: no fault of the engine."""

    code = "unanswerable"


class Constraint(Protocol):
    """What one sequence may say: its grammar and how far it is in it. Used by the engine's thread alone."""

    def advance(self, tokens: Seq[int], prompt: int) -> None:
        """Takes note of what was generated so far, `tokens` behind the first `prompt`; what it knows is skipped."""
        ...

    def forced(self, most: int) -> list[int]:
        """The next tokens, where the grammar leaves no choice: as good as guesses that come true."""
        ...

    def prepare(self, drafts: Seq[int]) -> None:
        """Begins to compute, elsewhere, the masks of the next token and of the one after each draft."""
        ...

    def masks(self) -> list[npt.NDArray[np.int32]]:
        """Of the last `prepare`: 1 to 1 + drafts masks, fewer where the grammar ends a draft; waits for them.
        Raises Unanswerable when the grammar has failed."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """`max_tokens` bounds the tokens generated, 0: the prompt is computed and that is all; a token in `stop_ids` ends
    the text, but none of the first `min_tokens`.

    `scored`: the prompt's own tokens get log-probabilities, with so many alternatives each. `pooling` takes the
    prompt's hidden states.

    `priority`: lower runs first, and takes rows and pages of higher ones. `deadline`: time.monotonic() after which
    nobody waits for the answer. `adapter`: the engine's slot, -1 for none. `scope` is the root key of its prefixes:
    requests of one scope may share pages.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    priority: int = 0
    deadline: float = math.inf
    adapter: int = -1
    scope: bytes = b""
    constraint: Constraint | None = None
    speculate: bool = True
    scored: int | None = None
    pooling: Pooling | None = None
    number: int = field(default_factory=lambda: next(_ids))

    @property
    def rank(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival."""
        return self.priority, self.number


def choice_of(request: Request, index: int) -> Request:
    """Choice `index` of a request with n > 1: its own seed, its own number."""
    seed = choice_seed(request.sampling.seed, index)
    return replace(request, sampling=replace(request.sampling, seed=seed), number=next(_ids))


class State(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request's mutable side. Only the scheduler writes to it.

    `tokens` is prompt plus output; the keys and values of the first `computed` of them are in `pages`. `keys` name its
    full pages, the first `named` of which the pool knows. `scores` are those of the prompt's tokens behind the first,
    as far as they were asked for and are known. `cached` tokens were found in the prefix cache when it was first
    admitted, -1 before that; `awaits` is the key of a page that another is computing for it. `since` and `admitted`
    (0.0: not yet) are time.monotonic() of its arrival and of its first admission.
    """

    __slots__ = (
        "admitted", "awaits", "cached", "computed", "counts", "keys", "lookup", "named", "pages", "preemptions",
        "request", "scores", "since", "state", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, since: float = 0.0) -> None:
        self.request = request
        self.since, self.admitted = since, 0.0
        self.tokens: list[int] = list(request.prompt)
        self.computed = self.named = 0
        self.cached = -1
        self.pages = array("i")  # numpy copies it whole, a list item by item
        self.keys: list[bytes] = []
        self.scores: list[SampledToken] = []
        self.awaits = b""
        self.lookup: Lookup | None = None
        self.state = State.WAITING
        self.preemptions = 0
        self.counts: dict[int, int] | None = dict.fromkeys(request.prompt, 0) if request.sampling.penalised else None

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still missing: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def settled(self) -> int:
        """Tokens from the beginning of which only keys and values are wanted, no longer logits or hidden states: the
        prefix cache can spare computing these. The last token is never one of them."""
        last, request = len(self.tokens) - 1, self.request
        if request.scored is not None and len(self.scores) < len(request.prompt) - 1:
            return len(self.scores)
        return last if request.pooling is None else min(last, request.pooling.settled)

    @property
    def widely(self) -> bool:
        """Whether logits or hidden states of more than its last token are wanted."""
        return self.settled < len(self.tokens) - 1

    def targets(self, start: int, count: int) -> tuple[int, tuple[int, ...]]:
        """(first, ids): of tokens start to start + count, those from index `first` on are followed by ids of the prompt
        that are to be scored."""
        first = max(start, len(self.scores))
        return first - start, self.request.prompt[first + 1 : start + count + 1]

    def append(self, token: int) -> str:
        """Adds a sampled token; answers why the sequence ends with it, or ""."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.request.stop_ids:
            return "stop"
        return "length" if self.generated >= self.request.max_tokens else ""


# Not frozen, like all that is made for each row of each step: a frozen one takes three times as long to make.
@dataclass(slots=True)
class StepRow:
    """What an engine is asked of one sequence in one step.

    `tokens` enter the cache at positions `start`, `start` + 1, ...; `pages` are all the sequence's pages, in order.
    With `sampling` the token after the last one is drawn, its noise keyed on (seed, `token_index`) alone; without it
    (a chunk in the middle of a prompt) nothing is. `drafts` are guesses at the tokens that follow: they enter the cache
    behind `tokens`, and as long as what is drawn is what was guessed, the next one is drawn as well. `history` maps ids
    seen to how often they were *generated* (0: prompt only); None unless a penalty is set. `forbidden` ids are not
    drawn while fewer than `until` tokens are generated.

    `targets` are ids that follow tokens[first_target], tokens[first_target + 1], ... and get the log-probabilities that
    the model gives them there, with `target_top` alternatives each. `pooling` takes the hidden states that it wants.
    """

    tokens: list[int]
    start: int
    pages: Seq[int]
    sampling: SamplingParams | None
    token_index: int = 0
    history: Mapping[int, int] | None = None
    drafts: tuple[int, ...] = ()
    constraint: Constraint | None = None
    adapter: int = -1
    forbidden: frozenset[int] = frozenset()
    until: int = 0
    targets: tuple[int, ...] = ()
    first_target: int = 0
    target_top: int = 0
    pooling: Pooling | None = None


@dataclass(slots=True)
class SampledToken:
    """A token that was drawn, or one of the prompt that was scored. `logprob` and `entropy` (nats) are of the raw
    logits; `top` the best (id, logprob) pairs, best first."""

    id: int
    logprob: float
    entropy: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Update:
    """News about a sequence: a token, an end, or both ("length" without a token ends one that generates none). `at` is
    time.monotonic() in the engine's thread.

    `finish`: "" (goes on), "stop", "length", "timeout" (its deadline), "expired" (waited too long), "refused"
    (Unanswerable), "error" (the engine's fault) or "aborted" (the server shuts down).
    """

    sequence: Sequence
    token: SampledToken | None
    finish: str
    at: float
    error: str = ""
