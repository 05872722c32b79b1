"""The store under trouble: full disks, strangers' files, concurrent writers, a broken audit chain."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from skerry.core.errors import Conflict, StorageError, Unavailable
from skerry.fleet import audit
from skerry.fleet import store as stores
from skerry.fleet.plane import Plane, init
from skerry.fleet.store import Audit, Setting, Store


@pytest.fixture
def store(tmp_path: Path):
    opened = Store(tmp_path / "fleet.db")
    opened.migrate()
    yield opened
    opened.close()


def test_a_full_disk_is_an_error_with_a_hint_and_leaves_nothing_half_written(store):
    with pytest.raises(StorageError, match="full") as caught, store.write() as session:
        pages = session.execute(text("PRAGMA page_count")).scalar()
        session.execute(text(f"PRAGMA max_page_count={pages + 2}"))
        session.add(Setting(name="small", value="x"))
        session.flush()
        session.add(Setting(name="large", value="x" * 1_000_000))
        session.flush()
    assert "free disk space" in caught.value.hint
    store.engine.dispose()
    with store.read() as session:
        assert session.query(Setting).count() == 0
    with store.write() as session:
        session.add(Setting(name="later", value="x"))


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "fleet.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"fleet\.db"):
        Store(tmp_path / "fleet.db").migrate()


def test_a_database_of_a_newer_version_is_refused(store):
    with store.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="9999"):
        store.migrate()


def test_writers_take_turns_and_lose_nothing(store):
    def add(who):
        for number in range(20):
            with store.write() as session:
                audit.record(session, who, "test", str(number))

    threads = [threading.Thread(target=add, args=(f"t{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as session:
        assert session.query(Audit).count() == 120 and audit.verify(session) is None


def test_a_writer_that_hangs_makes_others_unavailable_not_stuck(store, monkeypatch):
    monkeypatch.setattr(stores, "BUSY_MS", 50)
    with store.write(), pytest.raises(Unavailable, match="busy"), store.write():
        pass


@pytest.mark.parametrize(
    "tamper",
    [
        "UPDATE audit SET actor = 'somebody' WHERE seq = 2",
        "UPDATE audit SET data = '{\"x\": 1}' WHERE seq = 2",
        "DELETE FROM audit WHERE seq = 2",
        "UPDATE audit SET at = at + 1 WHERE seq = 2",
    ],
)
def test_a_changed_or_dropped_audit_entry_breaks_the_chain(store, tamper):
    with store.write() as session:
        for number in range(4):
            audit.record(session, "operator", "test", str(number))
    with store.read() as session:
        assert audit.verify(session) is None
    with store.write() as session:
        session.execute(text(tamper))
    with store.read() as session:
        assert audit.verify(session) == 2


def test_one_process_at_a_time_serves_a_directory(tmp_path, settings):
    init(tmp_path / "f")
    plane = Plane.open(tmp_path / "f" / "server", settings)
    with pytest.raises(Conflict, match="another process"):
        Plane.open(tmp_path / "f" / "server", settings)
    plane.close()
    Plane.open(tmp_path / "f" / "server", settings).close()
