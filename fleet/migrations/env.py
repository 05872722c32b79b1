"""Alembic's entry point: the connection comes from Store.migrate, there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from skerry.fleet.store import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
connection.commit()
