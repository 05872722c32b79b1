from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.core.tokenizer import Tokenizer
from skerry.runtime.tokenizer import ByteDetokenizer, Detokenizer, StopStrings, detokenizer, is_special, token_bytes


def pieces(tokenizer, data: bytes, context: tuple[int, ...] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, context)
    return [*(detokenizer.push(byte) for byte in data), detokenizer.finish()]


def test_characters_are_never_torn(tokenizer):
    got = pieces(tokenizer, "aé世🌍 z".encode())
    assert "".join(got) == "aé世🌍 z" and got[:3] == ["a", "", "é"]
    assert not any("\ufffd" in piece for piece in got)


def test_pieces_join_to_the_whole_for_any_bytes(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        size = rng.randrange(1, 60)
        data = bytes(rng.choice([rng.randrange(256), rng.randrange(0x80, 0xC0), 0x61]) for _ in range(size))
        assert "".join(pieces(tokenizer, data)) == tokenizer.decode(list(data))


def test_valid_text_after_a_long_run_of_garbage(tokenizer):
    data = b"\x80" * 40 + "🌍ok".encode()
    got = pieces(tokenizer, data)
    assert "".join(got) == tokenizer.decode(list(data))
    assert sum(bool(piece) for piece in got[:40]) >= 2, "garbage is not held back for ever"


def test_special_tokens_show_nothing_and_the_prompt_is_not_repeated(tokenizer):
    assert pieces(tokenizer, b"", (1, 2)) == [""]
    detokenizer = Detokenizer(tokenizer.decode, tuple(b"prompt"))
    assert [detokenizer.push(104), detokenizer.push(256), detokenizer.push(105)] == ["h", "", "i"]


def test_stop_strings_hold_back_what_may_begin_one():
    stops = StopStrings(["STOP", "\n\n"])
    assert [stops.push(t) for t in ("a", "S", "T", "x", "\n", "b\n")] == ["a", "", "", "STx", "", "\nb"]
    assert stops.push("\nmore") == "" and stops.hit == "\n\n"
    assert stops.push("after") == "" == stops.finish()


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["ab", "b"], "xab", "x"),
        (["b", "ab"], "xab", "x"),
        (["aab"], "aaab", "a"),
        ([], "abc", "abc"),
        (["z"], "ab", "ab"),
    ],
)
def test_the_first_stop_wins_however_the_text_arrives(stops, text, shown):
    for cut in range(len(text)):
        matcher = StopStrings(stops)
        got = matcher.push(text[:cut]) + matcher.push(text[cut:])
        assert got + ("" if matcher.hit else matcher.finish()) == shown


def test_bytes_of_tokens(tokenizer):
    assert [token_bytes(tokenizer, token) for token in (0, 32, 200, 255)] == [b"\x00", b" ", b"\xc8", b"\xff"]
    assert token_bytes(tokenizer, 256) == b"<|end|>"
    assert [is_special(tokenizer, token) for token in (0, 200, 256, 257)] == [False, False, True, True]


def test_bytes_of_tokens_where_spaces_are_spelled_out():
    """As Llama 2 and Gemma have it: decoded alone a first word would lose its space, and bytes are spelled <0x..>."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Inner

    inner = Inner(models.BPE(vocab={"▁a": 0, "b": 1, "<0xC3>": 2, "<0xA9>": 3}, merges=[]))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    spelled = Tokenizer(inner, "d")
    assert [token_bytes(spelled, token) for token in range(5)] == [b" a", b"b", b"\xc3", b"\xa9", b"<end>"]
    assert [is_special(spelled, token) for token in range(5)] == [False] * 4 + [True]


@given(
    st.lists(st.one_of(st.integers(0, 257), st.sampled_from([0xE4, 0xB8, 0x96, 0xF0, 0x9F, 0x8C, 0x8D])), max_size=40),
    st.booleans(),
)
def test_reading_on_bytes_gives_what_decoding_the_whole_gives(tokenizer, ids, skip):
    reader = detokenizer(tokenizer, (), skip)
    assert isinstance(reader, ByteDetokenizer)
    assert "".join([*map(reader.push, ids), reader.finish()]) == tokenizer.decode(ids, skip)


def test_a_character_that_began_in_the_prompt_is_shown_whole(tokenizer):
    world = "世".encode()
    reader = detokenizer(tokenizer, (*b"hello ", *world[:2]))
    assert [reader.push(world[2]), reader.push(ord("!"))] == ["世", "!"]
