"""From token ids to text, one token at a time: incomplete characters and beginnings of stop strings are held back."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Sequence

from skerry.core.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Bytes that are no text may go on for ever; after this many held tokens those before the last four are let go.
HELD_TOKENS = 16


class Detokenizer:
    """Text of a growing list of ids, such that all pieces joined are the text of the whole.

    Decoding token by token is wrong where a character spans tokens or a decoder treats the first word differently. So
    each piece is the difference between decoding a short window with and without the new ids; `context` (the end of
    the prompt) opens the first window. Memory and time per token do not grow with the text.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-6:])
        self._shown = len(self._window)
        self._shown_text = decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        self._window.append(token)
        return self._piece(final=False)

    def finish(self) -> str:
        """What was held back, replacement characters and all."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        text = self._decode(self._window)
        held = len(self._window) - self._shown
        if text.endswith(REPLACEMENT) and not final:
            return "" if held < HELD_TOKENS else self._let_go(text)
        piece = text[len(self._shown_text) :]
        if held:
            self._window = self._window[self._shown :]
            self._shown = len(self._window)
            self._shown_text = self._decode(self._window)
        return piece

    def _let_go(self, text: str) -> str:
        """Splits a long run of invalid bytes where it decodes the same in two parts, so no character is torn.

        The last four tokens stay: a UTF-8 character has at most four bytes.
        """
        for cut in range(len(self._window) - 4, self._shown, -1):
            head = self._decode(self._window[:cut])
            if head + self._decode(self._window[cut:]) == text:
                piece = head[len(self._shown_text) :]
                self._window, self._shown, self._shown_text = self._window[cut:], 0, ""
                return piece
        return ""


class ByteDetokenizer:
    """The same for tokenizers of the byte-level kind (GPT-2's, Llama 3's, Qwen's): a token stands for the same bytes
    wherever it is, so a text's bytes are read on as UTF-8. A tenth of the time of decoding windows."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context[-4:]:  # it may end within a character
            self.push(token)

    def push(self, token: int) -> str:
        return self._decoder.decode(_shown_bytes(self._tokenizer, token, self._skip))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def detokenizer(
    tokenizer: Tokenizer, context: Sequence[int] = (), skip_special: bool = True
) -> Detokenizer | ByteDetokenizer:
    """Whichever fits."""
    if str(tokenizer.inner.decoder).startswith("ByteLevel("):
        return ByteDetokenizer(tokenizer, context, skip_special)
    return Detokenizer(functools.partial(tokenizer.decode, skip_special=skip_special), context)


class StopStrings:
    """Lets text through up to the first stop string, that one included where it `shows` it; a tail that may be the
    beginning of one waits for more text."""

    def __init__(self, stops: Sequence[str], shows: bool = False) -> None:
        self._stops, self._shows = tuple(stops), shows
        self._held = ""
        self.hit = ""

    def push(self, text: str) -> str:
        """The text that is safe to show. After `hit` is set nothing more is."""
        if self.hit:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = min(((at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None)
        if found is not None:
            end = found[0] + (len(found[1]) if self._shows else 0)
            shown, self._held, self.hit = self._held[:end], "", found[1]
            return shown
        keep = max(overlap(self._held, stop) for stop in self._stops)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The text ended without a stop string: what was held back belongs to it."""
        shown, self._held = self._held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@functools.lru_cache(maxsize=1 << 16)
def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """`spelled_bytes`, of the tokens that come up."""
    return spelled_bytes(tokenizer, token)


def spelled_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes a token stands for, which may be no whole character: logprobs report them."""
    piece = tokenizer.inner.id_to_token(token) or ""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    byte_level = "ByteLevel" in str(tokenizer.inner.decoder)
    if byte_level and token not in tokenizer.inner.get_added_tokens_decoder():
        return bytes(_BYTE_OF[c] for c in piece if c in _BYTE_OF)
    if "▁" in piece and token not in tokenizer.inner.get_added_tokens_decoder():
        return piece.replace("▁", " ").encode()  # decoded alone, a first word would lose its space
    return tokenizer.decode([token], skip_special=False).encode()


@functools.lru_cache(maxsize=1 << 16)
def is_special(tokenizer: Tokenizer, token: int) -> bool:
    """Whether texts are shown without it."""
    return not tokenizer.decode([token]) and bool(tokenizer.decode([token], skip_special=False))


@functools.lru_cache(maxsize=1 << 16)
def _shown_bytes(tokenizer: Tokenizer, token: int, skip_special: bool) -> bytes:
    return b"" if skip_special and is_special(tokenizer, token) else token_bytes(tokenizer, token)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()
