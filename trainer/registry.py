"""What was trained from what, how good it is and where it stands: one SQLite file beside the pipeline.

A record is a checkpoint or a bundle, named by its digest. Its stage only moves along `STAGES`' arrows, every move is
kept with its time and reason, and `tainted_by` answers which models a dataset went into, through any number of parents.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
    update,
)

from skerry.core.errors import Conflict, InputError, NotFound

# stage -> stages it may be followed by
STAGES = {
    "candidate": ("accepted", "rejected"),
    "accepted": ("champion", "rejected"),
    "champion": ("retired", "rejected"),
    "retired": ("champion",),
    "rejected": (),
}
_meta = MetaData()
_records = Table(
    "records", _meta,
    Column("digest", String(64), primary_key=True), Column("kind", String(16), nullable=False),
    Column("name", String(200), nullable=False), Column("version", String(200), nullable=False),
    Column("path", Text, nullable=False), Column("stage", String(16), nullable=False),
    Column("parent", String(64)), Column("dataset", String(64)), Column("metrics", Text, nullable=False),
    Column("lineage", Text, nullable=False), Column("created_at", Float, nullable=False),
)  # fmt: skip
_moves = Table(
    "moves", _meta,
    Column("number", Integer, primary_key=True, autoincrement=True), Column("digest", String(64), nullable=False),
    Column("stage", String(16), nullable=False), Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)  # fmt: skip


class Registry:
    """Safe for several processes: each call is one transaction."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine: Engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=10000"))
        _meta.create_all(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def register(
        self, digest: str, kind: str, name: str, version: str, path: Path, *, parent: str | None = None,
        dataset: str | None = None, metrics: dict[str, Any] | None = None, lineage: dict[str, Any] | None = None,
        stage: str = "candidate",
    ) -> dict[str, Any]:  # fmt: skip
        """Adds a record, or returns the one that is there, since a stage may run twice. Raises InputError."""
        if kind not in ("checkpoint", "bundle") or stage not in STAGES:
            raise InputError("register", digest[:12], f"unknown kind or stage: {kind}, {stage}")
        now = time.time()
        row = {"digest": digest, "kind": kind, "name": name, "version": version, "path": str(path), "stage": stage,
               "parent": parent, "dataset": dataset, "metrics": json.dumps(metrics or {}),
               "lineage": json.dumps(lineage or {}), "created_at": now}  # fmt: skip
        with self._engine.begin() as connection:
            if connection.execute(select(_records.c.digest).where(_records.c.digest == digest)).first() is None:
                connection.execute(insert(_records).values(row))
                connection.execute(insert(_moves).values(digest=digest, stage=stage, reason="registered", at=now))
        return self.get(digest)

    def move(self, digest: str, stage: str, reason: str = "") -> dict[str, Any]:
        """Moves a record to `stage`; a new champion retires the one of its kind and name. Raises Conflict, NotFound."""
        record = self.get(digest)
        if record["stage"] == stage:
            return record
        if stage not in STAGES.get(record["stage"], ()):
            raise Conflict("move", record["digest"][:12], f"{record['stage']} cannot become {stage}")
        with self._engine.begin() as connection:
            if stage == "champion":
                same = (_records.c.kind == record["kind"]) & (_records.c.stage == "champion")
                for (old,) in connection.execute(select(_records.c.digest).where(same)).all():
                    self._set(connection, old, "retired", f"replaced by {record['digest'][:12]}")
            self._set(connection, record["digest"], stage, reason)
        return self.get(record["digest"])

    @staticmethod
    def _set(connection: Any, digest: str, stage: str, reason: str) -> None:
        connection.execute(update(_records).where(_records.c.digest == digest).values(stage=stage))
        connection.execute(insert(_moves).values(digest=digest, stage=stage, reason=reason, at=time.time()))

    def get(self, digest: str) -> dict[str, Any]:
        """By digest or an unambiguous beginning of it (6 digits at least). Raises NotFound, InputError."""
        if len(digest) < 6 or not set(digest) <= set("0123456789abcdef"):
            raise InputError("find record", digest[:80], "not the beginning of a digest")
        with self._engine.connect() as connection:
            found = (
                connection.execute(select(_records).where(_records.c.digest.startswith(digest)).limit(2))
                .mappings()
                .all()
            )
        if not found:
            raise NotFound("find record", digest, "not registered", "skerry pipeline models")
        if len(found) > 1:
            raise InputError("find record", digest, "several digests begin so", "give more digits")
        return _record(found[0])

    def records(self, kind: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """Oldest first."""
        query = select(_records).order_by(_records.c.created_at, _records.c.digest)
        if kind:
            query = query.where(_records.c.kind == kind)
        if stage:
            query = query.where(_records.c.stage == stage)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def champion(self) -> dict[str, Any] | None:
        found = self.records("checkpoint", "champion")
        return found[-1] if found else None

    def history(self, digest: str) -> list[dict[str, Any]]:
        query = select(_moves).where(_moves.c.digest == self.get(digest)["digest"]).order_by(_moves.c.number)
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def ancestry(self, digest: str) -> list[dict[str, Any]]:
        """The record, its parent, and so on, as far as they are registered."""
        found = [self.get(digest)]
        while (parent := found[-1]["parent"]) and all(record["digest"] != parent for record in found):
            try:
                found.append(self.get(parent))
            except NotFound:
                break
        return found

    def tainted_by(self, dataset: str) -> list[dict[str, Any]]:
        """Every record that this dataset went into, directly, by replay or through a parent: consent withdrawn, say."""
        tainted: dict[str, dict[str, Any]] = {}
        for record in self.records():
            replayed = [str(part.get("version")) for part in (record["lineage"].get("dataset") or {}).get("replay", [])]
            sources = [record["dataset"] or "", *replayed]
            if any(source.startswith(dataset) for source in sources) or record["parent"] in tainted:
                tainted[record["digest"]] = record
        return list(tainted.values())


def _record(row: Any) -> dict[str, Any]:
    return {**row, "metrics": json.loads(row["metrics"]), "lineage": json.loads(row["lineage"])}
