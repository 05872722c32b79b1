"""Guessing the next tokens: a text that repeats itself probably goes on as it did the last time.

The guesses are run behind the sequence's last token in the same step and compared with what is drawn there (keyed
sample-and-match: the noise depends on seed and token index alone), so they change no text, only how many tokens a step
gives. Prompt lookup: A. Saxena, "Prompt Lookup Decoding" (2023).

Whether a guess pays is arithmetic, not taste. One token more in a step costs `slope` seconds; in those the batch would
give `slope * rows / step` tokens; so the i-th guess of a sequence pays while the chance that it and all before it come
true is larger than that. Both sides are measured as the engine runs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from skerry.runtime.request import Sequence

GRAM = 3  # tokens that must read the same
INDEX_STEP = 2048  # tokens indexed in one step at most: a long prompt must not hold up the batch
FORGET = 0.98  # weight of the past, a step
PRIOR_CHANCE = 0.5
CHANCE_WEIGHT = 0.8  # weight of the past, a guessed step
RETRY_TOKENS = 64  # after so many tokens without a guess one is tried again


class Lookup:
    """Where each run of three tokens was seen last. Grows with the text; time per token does not."""

    __slots__ = ("_at", "_indexed", "chance", "quiet")

    def __init__(self, chance: float) -> None:
        self.chance = chance  # that a guess comes true, by what this text has shown
        self.quiet = 0  # tokens since the last guess
        self._at: dict[tuple[int, ...], int] = {}
        self._indexed = GRAM  # runs ending before this position are known

    def propose(self, tokens: Seq[int], most: int) -> list[int]:
        """Up to `most` tokens that followed when the text last read as it does at its end; [] when it never did."""
        end = min(len(tokens), self._indexed + INDEX_STEP)
        at = self._at
        for position in range(self._indexed, end):
            at[tuple(tokens[position - GRAM : position])] = position
        self._indexed = max(self._indexed, end)
        found = at.get(tuple(tokens[-GRAM:])) if len(tokens) > GRAM else None
        return [] if found is None else list(tokens[found : found + most])


class StepCost:
    """Seconds of a decode step against its tokens: a straight line through the recent ones (least squares)."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._n = self._n * FORGET + 1
        self._x = self._x * FORGET + tokens
        self._y = self._y * FORGET + seconds
        self._xx = self._xx * FORGET + tokens * tokens
        self._xy = self._xy * FORGET + tokens * seconds

    def share(self, rows: int) -> float:
        """Tokens that the batch of `rows` would give in the time that one more guess takes. A quarter of a step per
        token is assumed until steps of different sizes were seen."""
        if self._n < 1:
            return 0.25
        x, y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - x * x
        slope = (self._xy / self._n - x * y) / spread if spread > 0.25 else 0.25 * y / x
        slope = min(max(slope, 0.02 * y / x), y / x)
        step = y + slope * (rows - x)
        return slope * rows / max(step, slope)


class Speculator:
    """Decides how many guesses each sequence runs. `most` 0: none."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.cost = StepCost()
        self.drafted = self.accepted = 0
        self._chance = PRIOR_CHANCE  # of all sequences: where a new one begins

    def guesses(self, sequence: Sequence, rows: int, most: int) -> list[int]:
        """`most`: what pages and the sequence's length allow."""
        if min(self.most, most) <= 0 or not sequence.request.speculate:
            return []
        lookup = sequence.lookup
        if lookup is None:
            lookup = sequence.lookup = Lookup(self._chance)
        worth = self._worth(lookup.chance, rows)
        lookup.quiet += 1
        if worth == 0 and lookup.quiet >= RETRY_TOKENS:
            worth = 1
        found = lookup.propose(sequence.tokens, min(worth, most)) if worth else []
        if found:
            lookup.quiet = 0
        return found

    def learn(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        if sequence.lookup is None:
            return
        # Of a run of guesses each but the last wrong one came true: the chance of one is accepted / tried.
        tried = min(drafted, accepted + 1)
        chance = accepted / tried
        sequence.lookup.chance += (1 - CHANCE_WEIGHT) * (chance - sequence.lookup.chance)
        self._chance += (1 - CHANCE_WEIGHT) * 0.25 * (chance - self._chance)

    def _worth(self, chance: float, rows: int) -> int:
        price, together, count = self.cost.share(rows), chance, 0
        while count < self.most and together > price:
            together *= chance
            count += 1
        return count
