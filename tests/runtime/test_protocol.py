"""Whatever a body holds, it becomes a call or a refusal that names a field; nothing else escapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skerry.runtime.api_error import ApiError
from skerry.runtime.protocol import (
    CHAT,
    COMPLETION,
    HARMLESS,
    UNIMPLEMENTED,
    Call,
    Defaults,
    parse_body,
    parse_chat,
    parse_completion,
)

DEFAULTS = Defaults(vocab_size=100)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*sorted(CHAT | COMPLETION | HARMLESS | set(UNIMPLEMENTED)), "x", "temprature"])
GOOD = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.faults("any JSON as a request (hypothesis)")
@settings(max_examples=400, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=5), st.booleans())
def test_any_body_is_a_call_or_a_refusal(body: dict[str, Any], chat: bool):
    start = dict(GOOD) if chat else {"prompt": "hi"}
    raw = json.dumps({**start, **body}).encode()
    try:
        call = (parse_chat if chat else parse_completion)(parse_body(raw), DEFAULTS)
    except ApiError as error:
        assert error.status == 400 and error.param and error.param.split("[")[0].split(".")[0] in error.message
        json.dumps(error.body())
    else:
        assert isinstance(call, Call) and 0 <= call.sampling.seed < 1 << 64


@pytest.mark.faults("any bytes as a body (hypothesis)")
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_a_refusal(raw: bytes):
    try:
        assert isinstance(parse_body(raw), dict)
    except ApiError as error:
        assert error.status == 400


def test_null_means_not_given_and_neutral_values_pass():
    nulls = dict.fromkeys([*CHAT - {"messages"}, *UNIMPLEMENTED])
    assert parse_chat(parse_body(json.dumps({**GOOD, **nulls}).encode()), DEFAULTS).max_tokens is None
    for field, values in UNIMPLEMENTED.items():
        for value in values:
            parse_chat({**GOOD, field: value}, DEFAULTS)
        with pytest.raises(ApiError, match=field):
            parse_chat({**GOOD, field: {"something": "else"}}, DEFAULTS)


def test_the_bundles_defaults_hold_where_the_request_is_silent():
    defaults = Defaults(vocab_size=100, temperature=0.3, top_p=0.8, top_k=9)
    sampling = parse_chat(GOOD, defaults).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.8, 9)
    given_ = parse_chat({**GOOD, "temperature": 0, "top_p": 1, "top_k": -1}, defaults).sampling
    assert (given_.temperature, given_.top_p, given_.top_k) == (0.0, 1.0, 0)


def test_content_in_parts_is_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    call = parse_chat({"messages": messages}, DEFAULTS)
    assert call.messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"})


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", 1], ["a"] * 65, [1, 100], [1, "a"], [-1], [True], 5, {}])
def test_prompts_that_are_refused(prompt):
    with pytest.raises(ApiError) as caught:
        parse_completion({"prompt": prompt}, DEFAULTS)
    assert caught.value.param in ("prompt", "prompt[0]", "prompt[1]")


def test_prompts_that_are_taken():
    for prompt, taken in (
        ("a", ("a",)), (["a"], ("a",)), ([1, 2], ((1, 2),)), ([[1, 2]], ((1, 2),)), (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ):  # fmt: skip
        assert parse_completion({"prompt": prompt}, DEFAULTS).prompts == taken
