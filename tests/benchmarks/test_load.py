"""The load client as a process, against a mock server as a process, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from skerry.benchmarks.client import COMMAND, Client, longest
from skerry.benchmarks.exchange import GIVE_UP
from skerry.benchmarks.load import Stall, quiet_memory, read_order
from skerry.benchmarks.records import Outcome, Planned, Run, to_json
from skerry.benchmarks.selfcheck import mock, read_truths
from skerry.core.errors import DeadlineExceeded, SkerryError, UsageError

FAST = ("--ttft-ms=5", "--tpot-ms=1")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client() as found:
        yield found


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """serve(*words) -> the URL of a mock server."""
    with ExitStack() as stack:
        yield lambda *words: stack.enter_context(mock(*(words or FAST)))


def plan(count: int, tokens: int = 6, gap: float = 0.0, warm_up: int = 0) -> tuple[Planned, ...]:
    warm = tuple(Planned(index, f"w{index}", tokens, warm_up=True) for index in range(warm_up))
    return warm + tuple(Planned(index, f"r{index}", tokens, index * gap) for index in range(count))


def errors(outcome: Outcome) -> list[str]:
    return [record.error for record in outcome.records]


def most_at_once(url: str) -> int:
    truths = [truth for truth in read_truths(url) if truth["tag"].startswith("r")]
    edges = sorted((at, step) for truth in truths for at, step in ((truth["received"], 1), (truth["written"][-1], -1)))
    now = most = 0
    for _, step in edges:
        now += step
        most = max(most, now)
    return most


def test_closed_loop(client, serve):
    url = serve()
    outcome = client.run(Run(url, plan(20, warm_up=4), concurrency=4, keep_text=True))
    assert errors(outcome) == [""] * 20 and [record.index for record in outcome.records] == list(range(20))
    for record in outcome.records:
        assert 0 <= record.due <= record.sent < record.first <= record.chunks[-1] <= record.end <= outcome.seconds + 1
        assert (record.status, record.finish, record.asked_tokens, record.text) == (200, "length", 6, " 0 1 2 3 4 5")
        assert (record.output_tokens, record.prompt_tokens) == (6, len(f"r{record.index}"))
        assert record.chunks[0] == record.first and len(record.chunks) <= 6
    truths = read_truths(url)
    assert [truth["tag"][0] for truth in truths[:4]] == ["w"] * 4, "warm-up goes first"
    assert len(truths) == 24


def test_the_width_of_a_closed_loop(client, serve):
    url = serve("--ttft-ms=60")
    client.run(Run(url, plan(12), concurrency=3))
    assert most_at_once(url) == 3


def test_no_cap_of_100_connections(client, serve):
    url = serve("--ttft-ms=1500", "--tokens=1")
    outcome = client.run(Run(url, plan(150, 1), concurrency=150))
    assert errors(outcome) == [""] * 150 and most_at_once(url) == 150


def test_an_open_loop_sends_when_due_whatever_the_answers(client, serve):
    url = serve("--ttft-ms=400", "--tokens=1")
    outcome = client.run(Run(url, plan(10, 1, gap=0.02)))
    assert errors(outcome) == [""] * 10
    assert [record.due for record in outcome.records] == pytest.approx([0.02 * index for index in range(10)])
    assert all(record.sent >= record.due for record in outcome.records)
    assert most_at_once(url) == 10, "it does not wait for answers"


def test_an_open_loop_out_of_connections_counts_from_due(client, serve):
    """Who is late is not rescheduled: four slots later the fifth request has waited for all before it."""
    url = serve("--ttft-ms=100", "--tokens=1")
    outcome = client.run(Run(url, plan(5, 1, gap=0.01), connections=1))
    for record in outcome.records:
        assert record.due == pytest.approx(0.01 * record.index)
        assert record.sent >= 0.1 * record.index - 0.005
        assert record.end - record.due >= 0.1 * (record.index + 1) - record.due - 0.005
    assert most_at_once(url) == 1


def test_unordered_due_times(client, serve):
    requests = (Planned(7, "late", 2, 0.2), Planned(3, "early", 2, 0.0))
    records = client.run(Run(serve(), requests)).records
    assert [record.index for record in records] == [7, 3] and records[0].sent >= 0.2


def test_chat(client, serve):
    """A role and an empty text come at once, and are no first token."""
    url = serve("--ttft-ms=200", "--tpot-ms=1")
    outcome = client.run(Run(url, plan(2), concurrency=1, endpoint="/v1/chat/completions", keep_text=True))
    assert errors(outcome) == ["", ""]
    assert all(record.first - record.sent >= 0.19 for record in outcome.records)
    assert outcome.records[0].text == " 0 1 2 3 4 5" and outcome.records[0].output_tokens == 6


def test_body_and_headers_reach_the_server(client, serve):
    outcome = client.run(Run(serve(), plan(1, 6), concurrency=1, body={"max_tokens": 3, "ignore_eos": True}))
    assert outcome.records[0].output_tokens == 3


@pytest.mark.parametrize(("fault", "said"), [
    ("drop", "the server closed the connection in the middle of the answer"),
    ("error", "error in the stream: the engine failed"),
    ("truncate", "the stream ends in the middle of an event"),
    ("no-end", "the stream ends without [DONE]"),
    ("bad-json", "an event is not JSON"),
    ("status-429", "status 429: asked to fail"),
    ("status-500", "status 500: asked to fail"),
    ("plain", "no event stream: content type application/json"),
    ("hang", "no end within 0.5 s"),
])  # fmt: skip
def test_one_bad_answer_leaves_the_others(client, serve, fault, said):
    url = serve(*FAST, f"--fault={fault}", "--fault-every=3")
    outcome = client.run(Run(url, plan(9), concurrency=1, timeout=0.5))
    bad = [record for record in outcome.records if not record.ok]
    assert [record.index for record in bad] == [2, 5, 8]
    for record in bad:
        assert said in record.error and record.end is None
        assert record.status == (int(fault[7:]) if fault.startswith("status") else 0 if fault == "hang" else 200)
        if fault in ("drop", "error", "truncate", "bad-json"):
            assert record.first is not None, "what came before is kept"


def test_a_server_that_does_not_count(client, serve):
    record = client.run(Run(serve(*FAST, "--fault=no-usage"), plan(1), concurrency=1)).records[0]
    assert record.ok and record.output_tokens is None and record.prompt_tokens is None


def test_events_cut_by_the_network(client, serve):
    outcome = client.run(Run(serve(*FAST, "--fault=split"), plan(4), concurrency=2, keep_text=True))
    assert errors(outcome) == [""] * 4 and outcome.records[0].text == " 0 1 2 3 4 5"


def test_connections_closed_under_the_client_are_not_the_servers_fault(client, serve):
    """The second request on a connection finds it closed: a new one is tried, unseen."""
    url = serve(*FAST, "--fault=stale")
    for close in (False, True):
        outcome = client.run(Run(url, plan(6), concurrency=1, close=close))
        assert errors(outcome) == [""] * 6
    assert len(read_truths(url)) == 12


def test_the_server_dies_in_the_middle(client, serve):
    url = serve(*FAST, "--fault=die", "--fault-every=30")
    outcome = client.run(Run(url, plan(200), concurrency=4, timeout=20))
    ended = [record for record in outcome.records if record.ok]
    assert 20 <= len(ended) <= 30 and len(outcome.records) == 200
    said = set(errors(outcome)) - {""}
    assert f"not sent: {GIVE_UP} connections in a row failed" in said
    assert any("closed the connection" in error for error in said) and any("cannot connect" in error for error in said)


def test_nobody_listens(client, free_port):
    outcome = client.run(Run(f"http://127.0.0.1:{free_port}", plan(60, gap=0.05), timeout=5), budget=60)
    assert len(outcome.records) == 60
    assert sum(error == "cannot connect: Connection refused" for error in errors(outcome)) == GIVE_UP
    assert all(record.status == 0 and record.sent >= record.due for record in outcome.records)


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://127.0.0.1:99999"])
def test_a_url_that_is_none(client, url):
    assert all(errors(client.run(Run(url, plan(2), concurrency=1, timeout=5))))


def test_a_run_that_makes_no_sense(client, serve):
    for run in (
        Run(serve(), (Planned(0, (1, 2), 3),), endpoint="/v1/chat/completions"),
        Run(serve(), (Planned(0, "a", 3), Planned(0, "b", 3))),
        Run(serve(), plan(1), concurrency=0),
        Run(serve(), plan(1), timeout=0),
    ):
        with pytest.raises(UsageError):
            client.run(run)
    assert client.run(Run(serve(), ())).records == ()


def test_a_budget_ends_the_run_and_keeps_what_there_is(client, serve):
    url = serve("--ttft-ms=300", "--tokens=1")
    outcome = client.run(Run(url, plan(40, 1, gap=0.25)), budget=1.5)
    said = errors(outcome)
    assert len(said) == 40 and said[0] == "" and said[-1] == "not sent: interrupted"
    assert errors(client.run(Run(url, plan(2, 1), concurrency=1))) == ["", ""], "and the next run works"


def test_long_orders_and_answers(client, serve):
    """More than a pipe holds, both ways."""
    requests = tuple(Planned(index, tuple(range(20_000)), 400) for index in range(16))
    outcome = client.run(Run(serve("--ttft-ms=1", "--tpot-ms=0.1"), requests, concurrency=8, keep_text=True))
    assert errors(outcome) == [""] * 16 and outcome.records[0].prompt_tokens == 20_000


def test_a_client_that_dies_is_an_error_and_the_next_run_starts_another(serve):
    url = serve("--ttft-ms=3000")
    with Client() as client:
        killer = threading.Timer(1.0, client._start().kill)
        killer.start()
        with pytest.raises(SkerryError, match="its process ended, exit code -9"):
            client.run(Run(url, plan(1), concurrency=1))
        killer.join()
        assert client.run(Run(url, (), concurrency=1)).records == ()


def test_a_client_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("skerry.benchmarks.client.COMMAND", [sys.executable, "-c", "import time\nwhile 1:\n"
                        " try: time.sleep(9)\n except KeyboardInterrupt: pass"])  # fmt: skip
    monkeypatch.setattr("skerry.benchmarks.client.GRACE", 0.3)
    with Client() as client, pytest.raises(DeadlineExceeded):
        client.run(Run("http://127.0.0.1:1", plan(1)), budget=0.3)


def test_bounds_of_a_run():
    assert longest(Run("", plan(10, gap=2.0), connections=5, timeout=7)) == 60 + 18 + 3 * 7


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_the_client_dies_with_who_started_it(tmp_path: Path):
    script = tmp_path / "parent.py"
    lines = ("import time", "from skerry.benchmarks.client import Client", "print(Client()._start().pid, flush=True)",
             "time.sleep(60)")  # fmt: skip
    script.write_text("\n".join(lines))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # dead; whoever adopted it has yet to look
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(*lines: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(COMMAND, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True,
                          timeout=60, **options)  # type: ignore[call-overload, no-any-return]  # fmt: skip


def test_a_pipe_and_bad_lines(serve):
    good = json.dumps(to_json(Run(serve(), plan(2), concurrency=1)))
    done = ask("nonsense", "[]", "{}", "", '{"url": "http://x", "requests": [{"index": 0}]}', good)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and ["error" in answer for answer in answers] == [True] * 4 + [False]
    assert [record["error"] for record in answers[-1]["records"]] == ["", ""]


@pytest.mark.parametrize("busy", [False, True])
def test_sigint_ends_it(serve, busy):
    order = json.dumps(to_json(Run(serve("--ttft-ms=20000"), plan(3), concurrency=2)))
    child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdin is not None
    bad_first = "nonsense\n"  # its answer says that the process is ready
    child.stdin.write(bad_first + (order + "\n" if busy else ""))
    child.stdin.flush()
    assert child.stdout is not None and "error" in child.stdout.readline()
    time.sleep(1.0 if busy else 0.0)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=20)
    assert child.returncode == 130 and err == ""
    if busy:
        said = [record["error"] for record in json.loads(out)["records"]]
        assert said == ["interrupted", "interrupted", "not sent: interrupted"]


def test_memory_is_collected_between_runs_only():
    with quiet_memory():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_stalled_client_says_so():
    async def run() -> float:
        stall = Stall()
        watch = asyncio.create_task(stall.watch())
        await asyncio.sleep(0.03)
        time.sleep(0.1)
        await asyncio.sleep(0.03)
        watch.cancel()
        return stall.worst

    assert asyncio.run(run()) >= 0.08


def test_what_a_line_must_hold():
    run = Run("http://x", (Planned(0, (1, 2), 3, 0.5, True), Planned(0, "text", 4)), body={"a": 1})
    assert read_order(json.dumps(to_json(run))) == run
