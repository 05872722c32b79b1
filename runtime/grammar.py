"""Answers of a given shape: a grammar says which tokens may come next (llguidance).

What a grammar costs is paid beside the engine: it is compiled and tried out in a thread; each step's masks are
computed in another while the graph runs, and are there when the step samples. Every step of that work is bounded
(`LIMITS`), since grammars come from clients: what explodes fails its own request.

JSON is written as `{"a": 1, "b": [2, 3]}`, with one space after commas and colons and none elsewhere: a model cannot
lose itself in white space, and more of the text is forced.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from skerry.core.errors import InputError, Unavailable
from skerry.core.tokenizer import Tokenizer
from skerry.runtime.formats import Format
from skerry.runtime.heap import give_back
from skerry.runtime.request import Unanswerable
from skerry.runtime.tokenizer import spelled_bytes

Mask = npt.NDArray[np.int32]
COMPILE_SECONDS = 5.0
MASK_SECONDS = 5.0
KNOWN = 32  # compiled grammars kept; a copy takes microseconds
COMPILING = 16  # at once; more are told to come back
# A lexer's state takes 1 to 2 KB, so one grammar holds 20 MB at most; fuel of 100,000 burns for about 7 ms a step.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 30_000,
    "max_lexer_states": 10_000, "max_grammar_size": 200_000, "verbose_errors": False,
}  # fmt: skip
JSON_STYLE: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}


class Grammars:
    """Compiles formats for one model. Used by the event loop; nothing is built before the first format is asked for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._stops = tokenizer, vocab_size, frozenset(stop_ids)
        self._compilers = ThreadPoolExecutor(2, "skerry-grammar")
        self._maskers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "skerry-masks")
        self._known: OrderedDict[Format, Any] = OrderedDict()
        self._compiling: dict[Format, Future[Any]] = {}
        self._vocabulary: Future[Any] | None = None

    async def constraints(self, format: Format, count: int) -> list[GrammarConstraint]:
        """One for each of `count` choices. Raises InputError (it does not compile, or not in time) and Unavailable."""
        matcher = self._known.get(format)
        if matcher is None:
            matcher = self._known[format] = await self._compile(format)
        self._known.move_to_end(format)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        vocabulary = await self._open()
        shape = (vocabulary.vocab_size + 31) // 32, self._vocab_size
        return [GrammarConstraint(matcher.deep_copy(), shape, self._stops, self._maskers) for _ in range(count)]

    def close(self) -> None:
        for pool in (self._compilers, self._maskers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _open(self) -> Any:
        if self._vocabulary is None:
            self._vocabulary = self._compilers.submit(self._build)
        return await asyncio.shield(asyncio.wrap_future(self._vocabulary))

    async def _compile(self, format: Format) -> Any:
        vocabulary = await self._open()
        work = self._compiling.get(format)
        if work is None:
            if len(self._compiling) >= COMPILING:
                raise Unavailable("compile format", "", f"{COMPILING} others are being compiled", "try again later")
            work = self._compiling[format] = self._compilers.submit(compile_format, vocabulary, format)
            work.add_done_callback(lambda _: self._compiling.pop(format, None))
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work)), COMPILE_SECONDS)
        except TimeoutError as error:
            if not work.running():
                raise Unavailable("compile format", "", "others took too long to compile", "try again later") from error
            cause = f"did not compile within {COMPILE_SECONDS:g} s"
            raise InputError("compile format", "", cause, "ask for a simpler one") from error

    def _build(self) -> Any:
        try:
            if not self._stops:
                raise ValueError("the model names no token that ends a text")
            size = max(self._vocab_size, self._tokenizer.vocab_size)
            return open_vocabulary(self._tokenizer, size, sorted(self._stops))
        except Exception as error:  # what a foreign tokenizer throws is not known
            cause = f"this model's tokenizer cannot be guided: {error}"
            raise InputError("compile format", "", cause, "ask without a format") from error


class _Vocabulary:
    """A tokenizer as llguidance asks for it: the bytes of each token, and a way to split text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos: int) -> None:
        known, self.eos_token_id = tokenizer.vocab_size, eos
        self.tokens = [spelled_bytes(tokenizer, token) if token < known else b"" for token in range(size)]
        added = tokenizer.inner.get_added_tokens_decoder()
        self.special_token_ids = [token for token, entry in added.items() if entry.special]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def open_vocabulary(tokenizer: Tokenizer, size: int, stops: Seq[int]) -> Any:
    """What llguidance keeps of a vocabulary of `size` tokens. Given the tokenizer's file it would open a tokenizer of
    its own beside ours: 21 MB for 49,000 tokens, where this is 6."""
    import llguidance

    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, size, stops[0]))
    vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=list(stops))
    wrapper.tokens = wrapper._gtokenizer.tokens = []  # it has copied them
    give_back()
    return vocabulary


def compile_format(vocabulary: Any, format: Format) -> Any:
    """A matcher at its beginning, tried out for one token: what has no beginning is refused here, and the lexer's first
    states, which copies share, are made here. Raises InputError."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    try:
        matcher = llguidance.LLMatcher(vocabulary, _source(format), log_level=0, limits=limits)
        if not matcher.is_error():
            trial = matcher.deep_copy()
            trial.compute_ff_tokens()
            mask = trial.compute_bitmask()
            cause = trial.get_error() or ("" if any(mask) else "no text has this shape")
        else:
            cause = matcher.get_error()
    except (ValueError, TypeError, RecursionError, RuntimeError) as error:
        cause = str(error) or type(error).__name__
    if cause:
        cause = " ".join(cause.replace("<non-verbose/>", "").split())[:300]
        raise InputError("compile format", "", cause)
    return matcher


def _source(format: Format) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    match format.kind:
        case "json":
            schema, style = json_parts(format)
            return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=style))  # type: ignore[arg-type]
        case "regex":
            return str(LLMatcher.grammar_from_regex(format.source))
        case "grammar":
            try:
                return str(LLMatcher.grammar_from_lark(any_to_lark(format.source)))
            except Exception as error:  # its parser raises bare exceptions
                raise ValueError(f"no grammar: {error or type(error).__name__}") from error
        case _:
            return str(LLMatcher.grammar_from_lark(format.source))


def json_parts(format: Format) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a format of kind json, and the style of its text: the compiler's options, which are not the
    client's to set."""
    schema, style = json.loads(format.source), dict(JSON_STYLE)
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    schema.pop("x-guidance", None)
    if format.whitespace:
        style |= {"whitespace_pattern": format.whitespace, "item_separator": ",", "key_separator": ":"}
    return schema, style


class GrammarConstraint:
    """One sequence's place in its grammar: `request.Constraint`.

    The engine's thread and one of the pool's share the matcher in turns: `prepare` hands it over, `masks` (or the next
    `advance`) waits until it is back. Whatever goes wrong is kept for `masks`, the one that may raise.
    """

    def __init__(self, matcher: Any, shape: tuple[int, int], stops: frozenset[int], pool: ThreadPoolExecutor) -> None:
        self._matcher, self._stops, self._pool = matcher, stops, pool
        self._words, self._vocab_size = shape
        self._known = 0  # generated tokens that the matcher has seen
        self._cause = ""
        self._work: Future[list[Mask]] | None = None

    def advance(self, tokens: Seq[int], prompt: int) -> None:
        if len(tokens) - prompt == self._known or self._cause:
            return
        self._settle()
        try:
            new = list(tokens[prompt + self._known :])
            self._known += len(new)
            if not self._matcher.consume_tokens(new):
                self._cause = self._matcher.get_error() or "the text left the grammar"
        except Exception as error:  # noqa: BLE001 - shown by masks()
            self._cause = repr(error)

    def forced(self, most: int) -> list[int]:
        """As they are verified like guesses, one that is wrong costs time and no text."""
        if self._cause:
            return []
        self._settle()
        try:
            return list(self._matcher.compute_ff_tokens()[:most])
        except Exception as error:  # noqa: BLE001 - shown by masks()
            self._cause = repr(error)
            return []

    def prepare(self, drafts: Seq[int]) -> None:
        self._settle()
        try:
            self._work = self._pool.submit(self._compute, tuple(drafts))
        except RuntimeError as error:  # the pool is closed
            self._work, self._cause = None, str(error)

    def masks(self) -> list[Mask]:
        if self._work is not None and not self._cause:
            try:
                return list(self._work.result(MASK_SECONDS))
            except Exception as error:  # noqa: BLE001 - raised below, in one shape
                self._cause = str(error) or type(error).__name__
        raise Unanswerable("apply grammar", "", " ".join(self._cause.split())[:300] or "masks were never prepared")

    def _settle(self) -> None:
        """The matcher is nobody else's any more."""
        if self._work is not None and not self._work.done():
            try:
                self._work.result(MASK_SECONDS)
            except Exception as error:  # noqa: BLE001 - shown by masks()
                self._cause = str(error) or type(error).__name__

    def _compute(self, drafts: tuple[int, ...]) -> list[Mask]:
        found = [self._mask()]
        try:
            for draft in drafts:
                if draft in self._stops or self._matcher.try_consume_tokens([draft]) != 1:
                    break
                found.append(self._mask())
        finally:
            if len(found) > 1:
                self._matcher.rollback(len(found) - 1)
        return found

    def _mask(self) -> Mask:
        mask = np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        return _fitted(mask, self._vocab_size)


def _fitted(mask: Mask, vocab_size: int) -> Mask:
    """A mask of the tokenizer's ids as one of the engine's: no bit beyond `vocab_size`."""
    words = (vocab_size + 31) // 32
    if vocab_size % 32 and len(mask) >= words:
        mask[words - 1] &= (1 << vocab_size % 32) - 1
    return mask[:words]
