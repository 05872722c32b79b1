"""Pages on disk: found again by the same engine and by nothing else; a damaged file costs only time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skerry.core.errors import InputError
from skerry.kernels.runner import Runner
from skerry.runtime.engine_ort import OrtEngine
from skerry.runtime.kvcache import PagePool, root_key
from skerry.runtime.prefix_file import PrefixFile
from skerry.runtime.request import Request, SamplingParams, Sequence
from skerry.runtime.scheduler import Scheduler

DIGEST, SCOPE = "ab" * 32, root_key(b"tenant")


def answer(engine: Any, pool: PagePool, prompt: range, scope: bytes = SCOPE) -> Sequence:
    scheduler = Scheduler(pool, engine.max_context)
    (sequence,) = scheduler.submit(Request(tuple(prompt), 4, SamplingParams(seed=1), scope=scope))
    while scheduler.has_work:
        planned = scheduler.plan()
        scheduler.commit(planned, engine.step([item.row for item in planned]))
    return sequence


@pytest.fixture(params=["fake", "float32", "int8"])
def engines(request: pytest.FixtureRequest, fake: Any, bundles: Any) -> Any:
    """A maker of engines that are all the same."""
    if request.param == "fake":
        return lambda: fake(pages=32, page_size=16)
    bundle = bundles("fp32" if request.param == "float32" else "int8")
    return lambda: OrtEngine(Runner.open(bundle, threads=1, pages=32))


def test_a_restarted_engine_finds_what_the_last_one_computed(engines, tmp_path):
    before, pool = engines(), PagePool(32, 16)
    first = answer(before, pool, range(1, 70))
    file = PrefixFile(tmp_path / "cache", DIGEST, 1 << 30)
    assert file.save(before, pool) == 4 and file.path.stat().st_mode & 0o777 == 0o600
    after, pool = engines(), PagePool(32, 16)
    assert file.restore(after, pool) == 4 and pool.used == 0 and pool.cached == 4
    again = answer(after, pool, range(1, 70))
    assert again.cached == 64 and again.tokens == first.tokens
    assert answer(after, pool, range(1, 70), root_key(b"other")).cached == 0


def test_other_engines_leave_it_alone_and_the_size_is_bounded(fake, tmp_path):
    engine, pool = fake(), PagePool(64, 4)
    answer(engine, pool, range(40))
    size = engine.page_bytes + 32
    assert PrefixFile(tmp_path, DIGEST, 3 * size + 5).save(engine, pool) == 3
    assert PrefixFile(tmp_path, "cd" * 32, 1 << 20).restore(fake(), PagePool(64, 4)) == 0
    small = PagePool(2, 4)
    assert PrefixFile(tmp_path, DIGEST, 1 << 20).restore(fake(pages=2), small) == 2 and small.free == 2
    assert answer(fake_with(fake, tmp_path), filled(fake, tmp_path), range(40)).cached == 12, "the beginning was kept"


def fake_with(fake: Any, directory: Path) -> Any:
    engine = fake()
    PrefixFile(directory, DIGEST, 1 << 20).restore(engine, PagePool(64, 4))
    return engine


def filled(fake: Any, directory: Path) -> PagePool:
    pool = PagePool(64, 4)
    PrefixFile(directory, DIGEST, 1 << 20).restore(fake(), pool)
    return pool


@pytest.mark.faults("a damaged file of prefixes")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_costs_pages_and_never_a_text(fake, tmp_path, data):
    engine, pool = fake(), PagePool(64, 4)
    expected = answer(engine, pool, range(40)).tokens
    file = PrefixFile(tmp_path, DIGEST, 1 << 20)
    file.save(engine, pool)
    raw = bytearray(file.path.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.path.write_bytes(raw)
    other, pool = fake(), PagePool(64, 4)
    file.restore(other, pool)
    assert answer(other, pool, range(40)).tokens == expected and pool.used == 0


def test_no_file_and_no_room_to_write_are_no_errors(fake, tmp_path, caplog):
    assert PrefixFile(tmp_path / "none", DIGEST, 1 << 20).restore(fake(), PagePool(64, 4)) == 0
    (tmp_path / "file").write_text("x")
    engine, pool = fake(), PagePool(64, 4)
    answer(engine, pool, range(20))
    assert PrefixFile(tmp_path / "file" / "below", DIGEST, 1 << 20).save(engine, pool) == 0
    assert "not kept" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pages_of_another_size_are_refused(bundles):
    with Runner.open(bundles(), threads=1, pages=4) as runner, pytest.raises(InputError, match="a page has"):
        runner.write_page(0, b"x")
