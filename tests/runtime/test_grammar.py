"""Answers keep to their grammar, whatever the model would rather say; nobody else's text changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError, SkerryError
from skerry.runtime.engine import run_to_completion
from skerry.runtime.formats import Format
from skerry.runtime.grammar import GrammarConstraint, Grammars
from skerry.runtime.request import Request, SamplingParams
from skerry.runtime.scheduler import FORCED, Limits

EOS, VOCAB = 256, 258
PERSON = {
    "type": "object", "required": ["kind", "age"], "additionalProperties": False,
    "properties": {"kind": {"enum": ["alpha", "beta"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars(tokenizer):
    made = Grammars(tokenizer, VOCAB, [EOS])
    yield made
    made.close()


class Maker:
    def __init__(self, grammars: Grammars) -> None:
        self._grammars, self._runner = grammars, asyncio.Runner()

    def __call__(self, kind: str, source: Any, count: int = 1, **fields: Any) -> list[GrammarConstraint]:
        text = source if isinstance(source, str) else json.dumps(source)
        return self._runner.run(self._grammars.constraints(Format(kind, text, "field", **fields), count))


@pytest.fixture(scope="module")
def make(grammars):
    return Maker(grammars)


def bits(mask: Any) -> list[int]:
    return [id for id in range(VOCAB) if int(mask[id // 32]) >> (id % 32) & 1]


def walk(constraint: GrammarConstraint, rng: random.Random, most: int = 400) -> bytes | None:
    """A text that the grammar allows, drawn at random; None when it did not end."""
    tokens: list[int] = []
    while len(tokens) < most:
        constraint.advance(tokens, 0)
        constraint.prepare([])
        allowed = bits(constraint.masks()[0])
        assert allowed, f"nothing may follow {bytes(tokens)!r}"
        likely = [id for id in allowed if id in {*b'"}]0123456789,', EOS}]
        token = rng.choice(likely if likely and rng.random() < 0.8 else allowed)
        if token == EOS:
            return bytes(tokens)
        tokens.append(token)
    return None


def texts(engine: Any, constraints: list[Any], limits: Limits | None = None, **fields: Any) -> list[bytes]:
    fields = {"max_tokens": 60, "stop_ids": frozenset({EOS}), **fields}
    requests = [
        Request(tuple(b"prompt %d" % i), sampling=SamplingParams(seed=i), constraint=own, **fields)
        for i, own in enumerate(constraints)
    ]
    return [bytes(t for t in tokens if t != EOS) for tokens in run_to_completion(engine, requests, limits)]


def test_the_text_keeps_to_the_schema_and_ends_with_it(make, fake):
    for text in texts(fake(pages=200), make("json", PERSON, 5)):
        jsonschema.validate(json.loads(text), PERSON)
        assert text.startswith(b'{"kind": "')


def test_masks_of_drafts_are_those_of_the_same_text_step_by_step(make):
    whole = b'{"kind": "beta", "age": 7}'
    one, other = make("json", PERSON, 2)
    one.prepare(tuple(whole))
    drafted = one.masks()
    assert len(drafted) == 1 + len(whole)
    for count, mask in enumerate(drafted):
        other.advance(list(whole[:count]), 0)
        other.prepare([])
        assert np.array_equal(mask, other.masks()[0])
    assert bits(drafted[-1]) == [EOS], "only the end may follow"
    one.advance([], 0)
    one.prepare([ord("x"), ord("{")])
    assert len(one.masks()) == 1, "behind a draft that the grammar excludes there is nothing to draw"
    one.advance(list(whole), 0)
    one.prepare([EOS, EOS])
    assert [bits(mask) for mask in one.masks()] == [[EOS]]


def test_forced_tokens_are_given_and_change_no_text(make, fake):
    class Unforced:
        def __init__(self, inner: GrammarConstraint) -> None:
            self.advance, self.prepare, self.masks = inner.advance, inner.prepare, inner.masks

        def forced(self, most: int) -> list[int]:
            return []

    constraint = make("json", PERSON)[0]
    assert bytes(constraint.forced(100)) == b'{"kind": "' and constraint.forced(3) == list(b'{"k')
    quick, slow = fake(pages=200), fake(pages=200)
    forced = texts(quick, make("json", PERSON, 3))
    assert forced == texts(slow, [Unforced(own) for own in make("json", PERSON, 3)])
    assert len(quick.batches) < len(slow.batches) / 2
    assert texts(fake(pages=200), make("regex", "a" * (2 * FORCED)), max_tokens=FORCED) == [b"a" * FORCED]


def test_a_mixed_batch_says_what_each_says_alone(make, fake):
    def constraints() -> list[Any]:
        return [
            make("json", PERSON)[0],
            None,
            make("regex", "(ab|cd)+x")[0],
            None,
            make("lark", 'start: "yes" | "no"')[0],
        ]

    together = texts(fake(pages=200), constraints())
    crowded = texts(fake(pages=24, page_size=4), constraints(), Limits(prefill_tokens=8), max_tokens=40)
    alone = []
    for index, own in enumerate(constraints()):
        request = Request(tuple(b"prompt %d" % index), 60, SamplingParams(seed=index), frozenset({EOS}), constraint=own)
        alone.append(bytes(t for t in run_to_completion(fake(), [request])[0] if t != EOS))
    assert together == alone and [text[:40] for text in alone] == crowded


@pytest.mark.faults("grammars that cannot compile")
def test_what_is_no_grammar_is_refused_with_the_compilers_words(make):
    cases: list[tuple[str, Any, str]] = [
        ("regex", "(", "unclosed"), ("json", {"type": "nothing"}, "nothing"), ("json", {"not": {}}, "not"),
        ("json", {"x-guidance": {"lenient": True}, "not": {}}, "not"), ("json", False, "Unsatisfiable"),
        ("grammar", "root ::= (" * 3000, "no grammar"), ("grammar", "root ::= other", "other"),
        ("lark", "start: missing", "missing"), ("json", {"$ref": "http://example.com/x"}, "example.com"),
    ]  # fmt: skip
    for kind, source, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            make(kind, source)
        assert len(caught.value.cause) <= 300


@pytest.mark.faults("a grammar whose compilation takes too long")
def test_a_grammar_that_takes_too_long_is_refused_and_others_go_on(make, monkeypatch):
    monkeypatch.setattr("skerry.runtime.grammar.COMPILE_SECONDS", 0.05)
    make("regex", "ab")
    real = __import__("skerry.runtime.grammar", fromlist=["compile_format"]).compile_format

    def slow(vocabulary: Any, format: Format) -> Any:
        time.sleep(0.3 if format.source == "slow" else 0)
        return real(vocabulary, format)

    monkeypatch.setattr("skerry.runtime.grammar.compile_format", slow)
    with pytest.raises(InputError, match="did not compile within"):
        make("regex", "slow")
    make("regex", "quick")


def test_what_fails_inside_fails_at_masks_alone(make):
    constraint = make("regex", "ab")[0]
    constraint.advance(list(b"zz"), 0)
    assert constraint.forced(5) == []
    constraint.prepare([1, 2])
    for _ in range(2):
        with pytest.raises(SkerryError, match="apply grammar"):
            constraint.masks()


@pytest.mark.faults("a matcher that breaks while its request runs")
def test_a_failed_grammar_costs_only_its_own_request(start, fake, run):
    async def scenario() -> None:
        async with start(fake()) as server:
            constraints = server.service.grammars.constraints

            async def broken(format: Format, count: int) -> list[GrammarConstraint]:
                made = await constraints(format, count)
                for own in made:
                    own._matcher.consume_tokens([1, 2])
                return made

            server.service.grammars.constraints = broken
            bad, good = await asyncio.gather(server.chat(guided_regex="abc", max_tokens=20), server.chat(max_tokens=20))
            assert (bad.status_code, bad.json()["error"]["code"]) == (400, "unanswerable") and good.status_code == 200
            for _ in range(4):  # alone in their steps: no number of them ends the worker or speaks against its engine
                assert (await server.chat(guided_regex="abc", max_tokens=20)).status_code == 400
            assert server.service.observer.failures == 0 and server.service.loop.load().failed_steps == 0
            assert server.fatal == []
            server.service.grammars.constraints = constraints
            fine = (await server.chat(guided_regex="abc", max_tokens=20)).json()
            assert fine["choices"][0]["message"]["content"] == "abc"

    run(scenario())


def test_the_engines_vocabulary_may_be_larger_or_smaller(tokenizer):
    for size in (250, 258, 287, 288, 300):
        grammars = Grammars(tokenizer, size, [EOS] if size > EOS else [249])
        mask_of = Maker(grammars)("regex", "(?s:.)*")[0]
        mask_of.prepare([])
        mask = mask_of.masks()[0]
        assert mask.dtype == np.int32 and len(mask) == -(-size // 32)
        ids = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]
        assert ids.max() < min(size, 257) and len(ids) > 100
        grammars.close()


SCALARS = st.one_of(
    st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 5}]),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)}, *[st.integers(-99, 99)] * 2
    ),
    st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(["^[a-c]{1,3}$", "x+", "^\\d{4}$"])),
    st.builds(lambda v: {"enum": v}, st.lists(st.none() | st.integers(-9, 9) | st.text(max_size=4), max_size=3)),
    st.builds(lambda k, v: {k: v}, st.sampled_from(["type", "not", "const", "format", "x"]), st.text(max_size=4)),
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(
            lambda p, all_: {"type": "object", "properties": p, "required": sorted(p)[: 9 if all_ else 1],
                             "additionalProperties": False},
            st.dictionaries(st.text(max_size=4), inner, max_size=3), st.booleans(),
        ),
        st.builds(lambda a: {"anyOf": a}, st.lists(inner, max_size=3)),
        st.builds(lambda k, v: {k: v}, st.sampled_from(["items", "properties", "contains", "allOf", "$defs"]), inner),
    ),
    max_leaves=5,
)  # fmt: skip


@pytest.mark.faults("any JSON schema (hypothesis)")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_any_schema_is_refused_or_its_texts_validate(make, schema: Any, seed: int):
    try:
        constraint = make("json", schema)[0]
    except InputError as error:
        assert error.cause
        return
    text = walk(constraint, random.Random(seed))
    if text is not None:
        found = json.loads(text)
        with contextlib.suppress(jsonschema.SchemaError):  # what is no schema says nothing about its texts
            jsonschema.validate(found, schema)


def test_whitespace_is_one_space_unless_asked_for(make):
    rng = random.Random(1)
    tight = walk(make("json", PERSON)[0], rng)
    assert tight is not None and tight == json.dumps(json.loads(tight)).encode()
    loose = make("json", PERSON, whitespace="[ \\n]{0,2}")[0]
    loose.advance(list(b'{ \n"kind"'), 0)
    loose.prepare([])
    assert ord(":") in bits(loose.masks()[0])


CASES: list[tuple[dict[str, Any], Any]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}}, PERSON),
    ({"guided_regex": "[0-9]{3}"}, None),
    ({"structured_outputs": {"choice": ["red", "green\n\"blue\""]}}, None),
    ({"grammar": 'root ::= "a" x\nx ::= [0-9]+ "."'}, None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "schema"), CASES)
def test_over_http(start, fake, run, body, schema):
    async def scenario() -> None:
        async with start(fake(pages=200)) as server:
            whole = (await server.chat(max_tokens=90, seed=1, n=2, ignore_eos=True, **body)).json()
            said = [choice["message"]["content"] for choice in whole["choices"]]
            assert all(said)
            for choice in whole["choices"]:
                if schema and choice["finish_reason"] == "stop":
                    jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            plain = (await server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 90, **body})).json()
            assert plain["choices"][0]["text"]
            await server.idle()

    run(scenario())


def test_refusals_over_http_name_the_field(start, fake, run):
    async def scenario() -> None:
        async with start(fake()) as server:
            answer = await server.chat(structured_outputs={"regex": "("})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "structured_outputs.regex" and "unclosed" in error["message"]

    run(scenario())


def test_a_real_engine_keeps_to_the_schema(bundles, tokenizer, make):
    from skerry.core.bundle import open_bundle
    from skerry.kernels.runner import Runner
    from skerry.runtime.engine_ort import OrtEngine

    with Runner.open(open_bundle(bundles()), threads=1, pages=64) as runner:
        engine = OrtEngine(runner)
        requests = [
            Request(tuple(b"<user>hi\n>"), 60, SamplingParams(seed=i), frozenset({EOS}), constraint=own)
            for i, own in enumerate([*make("json", PERSON, 3), None])
        ]
        together = run_to_completion(engine, requests)
        again = [replace(request, constraint=own) for request, own in zip(requests, [*make("json", PERSON, 3), None])]
        assert [run_to_completion(engine, [request])[0] for request in again] == together
    for tokens in together[:3]:
        assert tokens[-1] == EOS
        jsonschema.validate(json.loads(bytes(tokens[:-1])), PERSON)
