"""What an operator reads of a request: its id on every answer and line, figures and codes, and no text of anybody's."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import time
from typing import Any

import pytest

from skerry.core.errors import UsageError
from skerry.runtime import logs
from skerry.runtime.scheduler import Limits
from skerry.runtime.server import Access, Options

SECRET, SAID = "xyzzy-prompt", "plugh-answer"
HOSTILE = 'a\n{"level": "info"}\r\x1b[2J\u2028\u202e\ud800"\\ b=c\x00'


@pytest.fixture
def captured():
    """`captured(form, level)` sends this process's logs to a buffer until the test has ended."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def start(form: str = "json", level: str = "debug") -> io.StringIO:
        stream = io.StringIO()
        logs.set_up(form, level, stream)
        return stream

    yield start
    root.handlers[:] = before
    root.setLevel(level)
    logging.getLogger("skerry").setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def access(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(stream) if line["logger"] == "skerry.access"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_line_tells_all_of_a_request_and_no_text(start, fake, say, run, captured, stream):
    out = captured()

    async def scenario() -> None:
        engine = fake(script=say(SAID), delay=0.002)
        async with start(engine, options=Options(Access((b"topsecret",)))) as server:
            server.client.headers["authorization"] = "Bearer topsecret"
            answer = await server.chat(SECRET, stream=stream, max_tokens=40, n=2)
            assert answer.status_code == 200 and (stream or SAID in answer.text)
            assert answer.headers["x-request-id"] == access(out)[0]["request_id"]

    run(scenario())
    [line] = access(out)
    assert line["level"] == "info" and line["message"] == "POST /v1/chat/completions 200"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["model"] == "tiny" and len(line["tenant"]) == 12 and "error" not in line
    assert line["prompt_tokens"] == len(f"<user>{SECRET}\n>") and line["output_tokens"] == 2 * (len(SAID) + 1)
    assert line["finish_reasons"] == ["stop", "stop"] and line["cached_tokens"] >= 0 and line["preemptions"] == 0
    assert 0 <= line["queue"] <= line["ttft"] < line["e2e"] <= line["duration"]
    assert 0.001 < line["tpot"] < line["e2e"]
    for text in (SECRET, SAID, "topsecret"):
        assert text not in out.getvalue()


def test_refusals_failures_and_cancelled_requests_have_their_line_without_text(start, fake, say, run, captured):
    out = captured()

    async def scenario() -> None:
        async with start(fake(script=say(SAID), rows=40)) as server:
            assert (await server.chat(SECRET, temperature=SECRET)).status_code == 400
            assert (await server.client.post("/v1/completions", content=SECRET)).status_code == 400
            assert (await server.chat(SECRET * 5)).status_code == 500
            assert (await server.client.get("/nowhere")).status_code == 404
        async with start(fake(script=say("x", end=False), delay=0.01, max_context=9000, pages=4000)) as server:
            asked = asyncio.create_task(server.chat(SECRET, max_tokens=5000))
            await server.until(lambda: server.service.loop.load().running == 1)
            asked.cancel()
            await server.until(lambda: len(access(out)) == 5)

    run(scenario())
    told = [(line["status"], line.get("error"), line["level"]) for line in access(out)]
    assert told == [
        (400, "invalid_value", "info"), (400, "bad_json", "info"), (500, "engine_error", "warning"),
        (404, None, "info"), (499, "client_closed", "info"),
    ]  # fmt: skip
    assert access(out)[-1]["finish_reasons"] == ["aborted"]
    assert SECRET not in out.getvalue() and SAID not in out.getvalue()


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "!~"])
def test_a_sane_request_id_is_kept(start, run, given):
    async def scenario() -> None:
        async with start() as server:
            for path in ("/v1/models", "/health/live", "/nowhere"):
                answer = await server.client.get(path, headers={"x-request-id": given})
                assert answer.headers.get_list("x-request-id") == [given]
            bad = await server.client.post("/v1/chat/completions", content=b"{", headers={"x-request-id": given})
            assert bad.headers["x-request-id"] == given
            assert set(bad.json()["error"]) == {"message", "type", "param", "code"}

    run(scenario())


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"two words", b"caf\xe9", b"tab\tbed", b"\x7f"])
def test_any_other_is_replaced(start, run, given):
    async def scenario() -> None:
        async with start() as server:
            answers = [await server.client.get("/v1/models", headers=[(b"x-request-id", given)]) for _ in range(2)]
            names = [answer.headers["x-request-id"] for answer in answers]
            assert names[0] != names[1] and all(len(name) == 32 and name.isalnum() for name in names)

    run(scenario())


def test_a_full_queue_answers_with_the_id(start, fake, run):
    async def scenario() -> None:
        engine = fake(max_context=100_000, pages=30_000, delay=0.005)
        async with start(engine, limits=Limits(rows=1, queue=0)) as server:
            asked = asyncio.create_task(server.chat(max_tokens=90_000))
            await server.until(lambda: server.service.loop.load().running == 1)
            full = await server.chat()
            assert full.status_code == 429 and len(full.headers["x-request-id"]) == 32
            asked.cancel()
            await server.idle()

    run(scenario())


def test_a_bug_outside_the_guarded_routes_is_a_500_with_id_and_a_traceback_in_one_line(start, run, captured):
    out = captured()

    async def scenario() -> None:
        async with start() as server:

            def broken() -> dict[str, Any]:
                raise LookupError(HOSTILE)

            server.service.stats = broken
            answer = await server.client.get("/health/ready", headers={"x-request-id": "r1"})
            assert answer.status_code == 500 and answer.headers["x-request-id"] == "r1"
            assert answer.json()["error"]["message"] == "internal error: LookupError"

    run(scenario())
    [line] = [line for line in lines(out) if "traceback" in line]
    assert line["request_id"] == "r1" and line["error_type"] == "LookupError" and line["logger"] == "skerry.server"
    assert line["traceback"].startswith("Traceback") and "in broken" in line["traceback"]


@pytest.mark.parametrize("form", logs.FORMATS)
@pytest.mark.parametrize("level", ["info", "debug"])
def test_an_error_that_quotes_a_prompt_is_shown_whole_only_when_debugging(start, run, captured, form, level):
    out = captured(form, level)

    async def scenario() -> None:
        async with start() as server:

            def broken(call: Any) -> Any:
                try:
                    raise KeyError(call.messages[0]["content"])
                except KeyError as error:
                    raise ValueError(f"bad {call.messages[0]['content']}") from error

            server.service._encode = broken
            answer = await server.chat(SECRET)
            assert answer.status_code == 500 and SECRET not in answer.text

    run(scenario())
    told = out.getvalue()
    assert "in broken" in told and told.rindex("KeyError") < told.rindex("ValueError")
    assert (SECRET in told) == (level == "debug")


def test_every_line_of_a_request_carries_its_id_also_from_its_threads(start, run, captured):
    out = captured()

    async def scenario() -> None:
        async with start() as server:
            encode = server.service._encode

            def chatty(call: Any) -> Any:
                logging.getLogger("skerry.test").info("encoding")
                return encode(call)

            server.service._encode = chatty
            long = [{"role": "user", "content": "a" * 5000}]
            body = {"messages": long, "max_tokens": 4}
            await asyncio.gather(*(
                server.client.post("/v1/chat/completions", json=body, headers={"x-request-id": f"r{i}"})
                for i in range(3)
            ))  # fmt: skip

    run(scenario())
    told = {line["request_id"] for line in lines(out) if line["message"] == "encoding"}
    assert told == {"r0", "r1", "r2"}
    logging.getLogger("skerry.test").info("nobody's")
    assert "request_id" not in lines(out)[-1]


@pytest.mark.faults("input that tries to forge log lines")
@pytest.mark.parametrize("form", logs.FORMATS)
def test_hostile_input_stays_within_its_line(captured, form):
    out = captured(form)
    log = logging.getLogger("skerry.test")
    log.info("%s", HOSTILE, extra={"fields": {"path": HOSTILE, "list": [HOSTILE], "nan": float("nan"), "odd": object}})
    log.info("x" * 100_000)
    written = out.getvalue()
    assert written.count("\n") == 2 and len(written) < 10_000
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 or 0x2028 <= ord(c) < 0x2030 for c in written if c != "\n")
    written.encode("utf-8")
    if form == "json":
        line = lines(out)[0]
        assert line["path"] == HOSTILE.replace("\ud800", "?") and line["list"] == [line["path"]]
        assert "nan" not in line or line["nan"] is None


@pytest.mark.parametrize("form", logs.FORMATS)
def test_no_path_or_method_forges_a_line(start, run, captured, form):
    out = captured(form, "info")

    async def scenario() -> None:
        async with start() as server:
            for path in ("/%0A2026%20forged", "/%1b%5b2J", "/%e2%80%a8", "/%ff%fe", "/" + "long" * 4000):
                assert (await server.client.get(path)).status_code == 404
            assert (await server.client.request("A" * 3000, "/v1/models")).status_code == 405

    run(scenario())
    told = out.getvalue()
    assert len(told.splitlines()) == told.count("\n") == 6 and max(map(len, told.splitlines())) < 1500
    assert told.isprintable() or set(told) - set(map(chr, range(0x20, 0x7F))) <= {"\n", "\ufffd"}
    assert form == "text" or len(access(out)) == 6


def test_text_is_readable_and_a_traceback_in_it_cannot_pass_for_a_line(start, run, captured):
    out = captured("text", "info")

    async def scenario() -> None:
        async with start() as server:
            await server.client.get("/health/live")
            await server.client.get("/metrics")
            await server.chat(SECRET, max_tokens=2)

    run(scenario())
    [line] = [line for line in out.getvalue().splitlines() if "skerry.access" in line]  # no probes at this level
    assert " skerry.access INFO POST /v1/chat/completions 200 " in line
    assert " output_tokens=2 " in line and " finish_reasons=length " in line and " request_id=" in line
    try:
        raise ValueError("first\n2026-01-31 12:00:00,000 skerry.access INFO forged")
    except ValueError:
        logging.getLogger("skerry.test").exception("failed")
    told = out.getvalue().splitlines()
    assert [line for line in told if "forged" in line] and not [line for line in told if line.startswith("2026-01-31")]


@pytest.mark.faults("a log that nobody reads")
@pytest.mark.parametrize("size", [100, 1900])
def test_a_reader_that_stalls_costs_lines_and_never_waits(captured, size):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as out, os.fdopen(writer, "w") as stream:
        captured()
        logs.set_up("json", "info", stream)
        log = logging.getLogger("skerry.test")
        began = time.monotonic()
        for number in range(3000):
            log.info("%d %s", number, "x" * size)
        try:
            raise ValueError("y" * 9000)  # a line of several pieces
        except ValueError:
            log.exception("failed")
        assert time.monotonic() - began < 5
        first = out.read(1 << 20).splitlines()
        kept = [json.loads(line) for line in first]
        assert 10 < len(kept) < 1000 and kept[-1]["message"].startswith(f"{len(kept) - 1} ")
        log.info("again")
        notice, again = (json.loads(line) for line in out.read(1 << 20).splitlines())
        assert notice["message"] == f"{3001 - len(kept)} lines were lost: nobody read them"
        assert (notice["level"], again["message"]) == ("warning", "again")
        for _ in range(600):
            log.info("z" * size)
    captured()  # puts the handlers back before the pipe's end is used again


def test_a_line_cut_short_ends_before_the_next_begins():
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as out, os.fdopen(writer, "w") as stream:
        lines_to = logs.Lines(stream)
        lines_to.setFormatter(logs.JsonLines())
        long = logging.LogRecord("t", logging.INFO, "", 0, "", None, None)
        long.fields = {"part": "x" * 200_000}
        lines_to.emit(long)
        assert len(out.read(1 << 20)) <= 65536
        lines_to.emit(logging.LogRecord("t", logging.INFO, "", 0, "whole", None, None))
        cut, *rest = out.read(1 << 20).split(b"\n")
        assert cut == b"" and [json.loads(line)["message"] for line in rest if line] == [
            "1 lines were lost: nobody read them", "whole"
        ]  # fmt: skip


@pytest.mark.faults("a log whose reader is gone")
def test_a_reader_that_is_gone_fails_nothing(capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        lines_to = logs.Lines(stream)
        lines_to.setFormatter(logs.TextLines())
        for _ in range(3):
            lines_to.emit(logging.LogRecord("t", logging.INFO, "", 0, "hello", None, None))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [("yaml", "info"), ("json", "loud")])
def test_unknown_formats_and_levels_are_refused(given):
    with pytest.raises(UsageError, match="is not one of"):
        logs.set_up(*given)
