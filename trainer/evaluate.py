"""NLL of held-out answers under a checkpoint's float32 weights, row by row, so that gates can pair them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skerry.core.chat import ChatTemplate
from skerry.core.errors import InputError
from skerry.core.files import canonical_json, sha256_bytes
from skerry.core.tokenizer import Tokenizer
from skerry.trainer.batches import Example, encode_examples
from skerry.trainer.data.rows import Row
from skerry.trainer.data.split import sample

if TYPE_CHECKING:
    pass

EVAL_ROWS = 80
EVAL_BATCH = 16


@dataclass(frozen=True)
class SliceScore:
    """Summed NLL (nats) and answer tokens of each row, in the order of the rows; `rows_digest` names those rows."""

    rows_digest: str
    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats per answer token over the slice."""
        return sum(self.nll) / sum(self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {"rows_digest": self.rows_digest, "mean": self.mean, "nll": list(self.nll), "tokens": list(self.tokens)}

    @classmethod
    def from_json(cls, raw: Any) -> SliceScore:
        try:
            score = cls(str(raw["rows_digest"]), tuple(map(float, raw["nll"])), tuple(map(int, raw["tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError("read slice score", "", f"missing or malformed field {error}") from error
        if not score.nll or len(score.nll) != len(score.tokens) or min(score.tokens) < 1:
            raise InputError("read slice score", "", "rows and tokens do not match")
        return score


def choose_rows(rows: Sequence[Row], limit: int = EVAL_ROWS) -> list[Row]:
    """The same bounded choice for every model: drawn by hash, not by position."""
    return sample(rows, limit, seed=0)


def rows_digest(examples: Sequence[Example]) -> str:
    """Names exactly what was measured: token ids after truncation, so the tokenizer is covered too."""
    return sha256_bytes(canonical_json([[list(example.ids), example.start] for example in examples]))


class Evaluator:
    """A loaded model with its tokenizer and template; `model` may be replaced between measurements."""

    def __init__(self, directory: Path, model: Any, max_tokens: int) -> None:
        self.model, self.max_tokens = model, max_tokens
        self.tokenizer = Tokenizer.open(directory)
        self.template = open_template(directory)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        return encode_examples(rows, self.tokenizer, self.template, self.max_tokens)

    def score(self, rows: Sequence[Row], tick: Callable[[int], None] = lambda _: None) -> SliceScore:
        """Scores rows whose answer fits. Raises InputError when there is none."""
        return score_examples(self.model, self.encode(rows), tick)


def score_examples(model: Any, examples: Sequence[Example], tick: Callable[[int], None] = lambda _: None) -> SliceScore:
    import torch

    from skerry.trainer.loss import answer_nll

    if not examples:
        raise InputError("evaluate", "slice", "no row fits into the token limit", "raise --max-tokens")
    order = sorted(range(len(examples)), key=lambda at: len(examples[at].ids))
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    with torch.no_grad():
        for first in range(0, len(order), EVAL_BATCH):
            chosen = order[first : first + EVAL_BATCH]
            losses, lengths = answer_nll(model, [examples[at] for at in chosen])
            for at, part in zip(chosen, losses.double().split(lengths), strict=True):
                sums[at], counts[at] = float(part.sum()), len(part)
            tick(len(chosen))
    return SliceScore(rows_digest(examples), tuple(sums), tuple(counts))


def open_template(directory: Path) -> ChatTemplate:
    """The checkpoint's chat template with the tokens its tokenizer names."""
    from skerry.core.files import read_json

    settings = read_json(directory / "tokenizer_config.json")

    def text(key: str) -> str:
        value = settings.get(key)
        return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")

    return ChatTemplate.open(directory, bos_token=text("bos_token"), eos_token=text("eos_token"))


def load_model(directory: Path) -> Any:
    """float32 weights, in evaluation mode. Raises InputError on files that do not fit together."""
    import torch
    from transformers import AutoModelForCausalLM

    from skerry.trainer.base import quiet_transformers

    quiet_transformers()
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError("load model", directory, str(error).strip().splitlines()[0][:300]) from error
