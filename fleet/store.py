"""The control plane's memory: SQLAlchemy 2 over SQLite in WAL mode, one transaction per request.

A writer opens with BEGIN IMMEDIATE behind an in-process lock, so that a read-then-write transaction never fails half
way on an upgrade. Work that must survive a power cut (enrolment, releases, rollout transitions, audit) asks for
`durable=True` (synchronous=FULL); telemetry takes NORMAL, which a killed process also survives.
Times are UNIX seconds of this server's clock; whatever a node says about time is kept only as information.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import JSON, ForeignKey, Index, LargeBinary, UniqueConstraint, create_engine, event, text
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from skerry.core.errors import StorageError, Unavailable

BUSY_MS = 5000
MIGRATIONS = Path(__file__).parent / "migrations"


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, list[Any]: JSON}


class Setting(Base):
    """Small facts about this control plane: its identity and the serial counters."""

    __tablename__ = "settings"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class Token(Base):
    """A one-time enrolment token; only its SHA-256 is kept, so a stolen database enrols nobody."""

    __tablename__ = "tokens"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    expires_at: Mapped[float]
    uses_left: Mapped[int]


class Node(Base):
    __tablename__ = "nodes"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    public_key: Mapped[str] = mapped_column(unique=True)
    token_sha256: Mapped[str]
    device: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    enrolled_at: Mapped[float]
    revoked_at: Mapped[float | None]
    # Replay guard: the last (boot, seq) whose request was accepted.
    boot: Mapped[int] = mapped_column(default=0)
    seq: Mapped[int] = mapped_column(default=0)
    # Last heartbeat.
    seen_at: Mapped[float | None] = mapped_column(index=True)
    heartbeat: Mapped[dict[str, Any] | None]
    observed_digest: Mapped[str | None]
    release: Mapped[str | None]
    # What the director last told it.
    generation: Mapped[int] = mapped_column(default=0)
    desired: Mapped[dict[str, Any] | None]


class Counter(Base):
    """Requests and failures one node counted under one engine, summed over worker restarts."""

    __tablename__ = "counters"
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    engine_digest: Mapped[str] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    last_boot: Mapped[int] = mapped_column(default=0)
    last_requests: Mapped[int] = mapped_column(default=0)
    last_failed: Mapped[int] = mapped_column(default=0)


class Event(Base):
    __tablename__ = "events"
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    boot: Mapped[int] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    at: Mapped[float]
    received_at: Mapped[float]
    data: Mapped[dict[str, Any]]
    __table_args__ = (Index("events_by_kind", "node", "kind"), Index("events_by_time", "received_at"))


class Window(Base):
    """One window of sketches; `sketches` is dropped once the window is assessed and old."""

    __tablename__ = "windows"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id"))
    boot: Mapped[int]
    engine_digest: Mapped[str]
    number: Mapped[int]
    received_at: Mapped[float]
    requests: Mapped[int]
    failed: Mapped[int]
    bytes: Mapped[int]
    body: Mapped[dict[str, Any] | None]
    assessed: Mapped[int] = mapped_column(default=0)
    # Filled by assess: p-value per feature, and the detector's statistic after this window.
    p_values: Mapped[dict[str, Any] | None]
    statistic: Mapped[float | None]
    alarmed: Mapped[int] = mapped_column(default=0)
    __table_args__ = (
        UniqueConstraint("node", "boot", "engine_digest", "number", name="windows_once"),
        Index("windows_to_assess", "assessed", "id"),
        Index("windows_by_engine", "engine_digest", "node", "id"),
    )


class DetectorRow(Base):
    __tablename__ = "detectors"
    node: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    engine_digest: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[dict[str, Any]]
    windows: Mapped[int] = mapped_column(default=0)
    updated_at: Mapped[float]


class Release(Base):
    __tablename__ = "releases"
    version: Mapped[str] = mapped_column(primary_key=True)
    serial: Mapped[int] = mapped_column(unique=True)
    floor: Mapped[int]
    created_at: Mapped[float]


class ManifestRow(Base):
    """One bundle of a release. `body` is the signed bytes, exactly."""

    __tablename__ = "manifests"
    release: Mapped[str] = mapped_column(ForeignKey("releases.version"), primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str]
    engine_digest: Mapped[str] = mapped_column(index=True)
    tokenizer_digest: Mapped[str]
    # Text: a seed has 64 bits, an SQLite integer one less.
    hash_seed: Mapped[str]
    window_requests: Mapped[int]
    body: Mapped[bytes] = mapped_column(LargeBinary)


class Qualification(Base):
    """An engine that could not be run where it was exported. `state`: unproven, proven, disproved; `node`: whose report
    decided it, None where an operator did; `reason`: why it is unproven or disproved, or the operator's."""

    __tablename__ = "qualifications"
    engine_digest: Mapped[str] = mapped_column(primary_key=True)
    release: Mapped[str]
    target: Mapped[str]
    state: Mapped[str]
    mean_margin: Mapped[float]
    max_margin: Mapped[float]
    node: Mapped[str | None]
    reason: Mapped[str]
    at: Mapped[float]
    report: Mapped[dict[str, Any] | None]


class Quarantine(Base):
    __tablename__ = "quarantine"
    engine_digest: Mapped[str] = mapped_column(primary_key=True)
    release: Mapped[str]
    reason: Mapped[str]
    at: Mapped[float]


class RolloutRow(Base):
    """`body` is core.rollout.Rollout; the other columns repeat what queries ask for."""

    __tablename__ = "rollouts"
    id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    release: Mapped[str] = mapped_column(ForeignKey("releases.version"))
    previous: Mapped[str | None]
    state: Mapped[str] = mapped_column(index=True)
    live: Mapped[int] = mapped_column(index=True)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    revision: Mapped[int] = mapped_column(default=0)
    # What nodes had already counted under the release's engines when the rollout began: [requests, failed] by node.
    marks: Mapped[dict[str, Any]]
    body: Mapped[dict[str, Any]]


class Audit(Base):
    """Each row's hash covers the row before it: a row cannot be changed or dropped without breaking the chain."""

    __tablename__ = "audit"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[float]
    actor: Mapped[str]
    action: Mapped[str] = mapped_column(index=True)
    object: Mapped[str]
    data: Mapped[dict[str, Any]]
    previous: Mapped[str]
    hash: Mapped[str]


class Source(Base):
    __tablename__ = "sources"
    name: Mapped[str] = mapped_column(primary_key=True)
    tokenizer_digest: Mapped[str]
    sketch: Mapped[dict[str, Any]]
    updated_at: Mapped[float]


class Retrain(Base):
    __tablename__ = "retrain_requests"
    id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    release: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[float]
    updated_at: Mapped[float]
    owner: Mapped[str | None]
    body: Mapped[dict[str, Any]]


class Metadata(Base):
    """TUF metadata, every version of every role, bytes as signed."""

    __tablename__ = "metadata"
    role: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)


class Store:
    """Opens the database, migrates it, hands out sessions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = create_engine(
            f"sqlite:///{path}",
            pool_size=16,
            max_overflow=16,
            pool_timeout=10,
            connect_args={"timeout": BUSY_MS / 1000, "check_same_thread": False, "isolation_level": None},
        )
        event.listen(self.engine, "connect", _configure)
        self._writer = threading.Lock()
        # Counts durable writes, the only ones that change rollouts, releases and quarantine: what caches go by.
        self.epoch = 0

    def migrate(self) -> None:
        """Brings the schema to the newest version. Raises StorageError when the file is not ours or not writable."""
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        try:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (DatabaseError, CommandError) as error:
            hint = "restore a backup, or point --dir at another directory"
            raise StorageError("open", self.path, str(error).splitlines()[0], hint) from error

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent snapshot; nothing written through it is kept."""
        with Session(self.engine, expire_on_commit=False) as session:
            session.execute(text("BEGIN"))
            try:
                yield session
            finally:
                session.expunge_all()  # rows stay readable afterwards
                session.rollback()

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[Session]:
        """One transaction: all of it or, on any exception, none of it."""
        if not self._writer.acquire(timeout=BUSY_MS / 1000):
            raise Unavailable("write", "store", "busy", "try again")
        try:
            with Session(self.engine, expire_on_commit=False) as session:
                session.connection().exec_driver_sql(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                session.execute(text("BEGIN IMMEDIATE"))
                yield session
                session.commit()
                self.epoch += durable
        except OperationalError as error:
            cause = str(error.orig)
            if "full" in cause or "readonly" in cause or "I/O" in cause:
                raise StorageError("write", self.path, cause, "free disk space or check permissions") from error
            raise Unavailable("write", self.path, cause, "try again") from error
        finally:
            self._writer.release()

    def close(self) -> None:
        self.engine.dispose()


def _configure(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", f"busy_timeout={BUSY_MS}", "foreign_keys=ON", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
