"""Server-sent events cut anywhere, and the answers they carry."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skerry.benchmarks.stream import EVENT_LIMIT, Answer, EventParser

STREAM = (
    '\ufeffdata: {"text": "één"}\n\n: a comment\r\n\r\ndata:no space\r\rdata: two\ndata: lines\n\nevent: x\nid: 7\n\n'
    "data\n\ndata:  \u2028 kept\r\n\r\nretry: 5\ndata: \U0001f600\n\n\n\n"
).encode()
EVENTS = ['{"text": "één"}', "no space", "two\nlines", "", " \u2028 kept", "\U0001f600"]


def feed(parts: list[bytes]) -> list[bytes]:
    parser = EventParser()
    events = [event for part in parts for event in parser.feed(part)]
    assert parser.rest() == b""
    return events


def cut(raw: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(places), len(raw)]
    return [raw[start:end] for start, end in pairwise(edges)]


@given(st.lists(st.integers(0, len(STREAM))))
def test_any_split_gives_the_same_events(places):
    assert feed(cut(STREAM, places)) == [event.encode() for event in EVENTS]


def test_byte_by_byte():
    assert feed([bytes([byte]) for byte in STREAM]) == [event.encode() for event in EVENTS]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5),
       st.sampled_from(["\n", "\r\n", "\r"]), st.data())  # fmt: skip
def test_what_was_said_comes_back(texts, end, data):
    raw = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    places = data.draw(st.lists(st.integers(0, len(raw))))
    assert feed(cut(raw, places)) == [text.encode() for text in texts]


def test_an_event_without_end_is_not_kept_in_memory_for_ever():
    parser = EventParser()
    parser.feed(b"data: ")
    with pytest.raises(ValueError, match="4 MiB"):
        for _ in range(EVENT_LIMIT // (1 << 20) + 1):
            parser.feed(b"x" * (1 << 20))


def sse(document: object) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


def text(content: str, finish: str | None = None) -> bytes:
    return sse({"choices": [{"index": 0, "text": content, "finish_reason": finish}]})


def delta(**fields: str) -> bytes:
    return sse({"choices": [{"index": 0, "delta": fields}]})


def test_roles_and_empty_texts_are_no_tokens():
    answer = Answer(keep_text=True)
    end = sse({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    events = (delta(role="assistant", content=""), delta(content=""), delta(content="a"), delta(content="b"), end)
    for at, raw in enumerate((*events, sse(b"[DONE]"))):
        answer.take(raw, float(at))
    answer.close()
    assert (answer.chunks, answer.end, answer.text) == ([2.0, 3.0], 5.0, "ab")
    assert (answer.finish, answer.error, answer.done) == ("stop", "", True)


def test_reasoning_is_output():
    answer = Answer()
    answer.take(delta(reasoning_content="hm"), 1.0)
    assert answer.chunks == [1.0]


def test_one_arrival_for_each_read():
    answer = Answer()
    answer.take(text("a") + text("b") + text("c")[:10], 1.0)
    answer.take(text("c")[10:], 2.0)
    assert answer.chunks == [1.0, 2.0]


def test_usage_is_the_servers_and_may_be_missing():
    answer = Answer()
    answer.take(text("a", "length") + sse(b"[DONE]"), 1.0)
    assert (answer.output_tokens, answer.prompt_tokens) == (None, None)
    answer = Answer()
    answer.take(sse({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}), 1.0)
    answer.take(sse({"choices": None, "usage": None}), 1.0)
    assert (answer.output_tokens, answer.prompt_tokens, answer.chunks) == (0, 3, [])


@pytest.mark.parametrize(("raw", "error"), [
    (text("a") + sse({"error": {"message": "out of pages"}}), "out of pages"),
    (text("a") + sse({"error": "plain words"}), "plain words"),
    (text("a") + sse(b"{nonsense}"), "not JSON"),
    (text("a") + sse([1]), "no JSON object"),
    (text("a"), "without [DONE]"),
    (text("a", "stop") + b'data: {"choi', "in the middle of an event"),
    (text("a", "stop") + b'data: {"choices": []}\n', "in the middle of an event"),
    (b'{"choices": [{"text": "whole"}]}', "no event stream: content type application/json"),
    (b"", "no event stream"),
])  # fmt: skip
def test_broken_streams(raw, error):
    answer = Answer()
    answer.take(raw, 1.0)
    answer.close("application/json")
    assert error in answer.error and not answer.done


@pytest.mark.parametrize("end", [sse(b"[DONE]"), b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n"])
def test_ways_to_say_done(end):
    answer = Answer()
    answer.take(text("a"), 1.0)
    answer.take(end, 2.0)
    answer.close()
    assert answer.done and not answer.error and answer.end in (1.0, 2.0)


def test_a_finish_reason_is_an_end_too():
    answer = Answer()
    answer.take(text("a", "stop"), 1.0)
    answer.close("text/event-stream")
    assert not answer.error and answer.finish == "stop"


def test_nothing_after_done_counts():
    answer = Answer()
    answer.take(text("a") + sse(b"[DONE]") + text("b"), 1.0)
    answer.take(sse(b"{nonsense}"), 2.0)
    assert answer.end == 1.0
