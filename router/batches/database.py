"""The tables of files and batches, and the engine that reaches them: SQLite (WAL), or any SQLAlchemy URL.

Every transaction on SQLite begins with the write lock: one that reads first and writes then fails at once when another
server has written in between, whatever the busy timeout.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

METADATA = MetaData()
_BUSY_TIMEOUT_S = 10.0
"""SQLite has no end for the transaction of a suspended server: a call fails after this time, and may be sent again."""
_IDLE_TIMEOUT_S = 10.0
"""PostgreSQL ends a transaction whose server has been silent for this long: one that was suspended, or whose machine is
gone, would keep its locks, so that no other could take its batches over."""
_LOCK_TIMEOUT_S = 15.0
_LIBPQ: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
"""Without them a thread waits for hours for a database whose machine is gone."""

FILES = Table(
    "files",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index("files_by_owner", "owner", "created_at", "id"),
)

_TIMES = (
    "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at",
)  # fmt: skip

BATCHES = Table(
    "batches",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(80), nullable=False),
    Column("endpoint", String(32), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(8), nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("errors", JSON(none_as_null=True)),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    *(Column(name, Double) for name in _TIMES),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("input_offset", BigInteger, nullable=False),
    Column("next_line", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("holder", String(64), nullable=False),
    Column("lease_until", Double, nullable=False),
    Index("batches_by_owner", "owner", "created_at", "id"),
    Index("batches_by_status", "status", "created_at"),
)

SEGMENTS = Table(
    "batch_segments",
    METADATA,
    Column("batch_id", String(64), primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("output_bytes", BigInteger, nullable=False),
    Column("error_bytes", BigInteger, nullable=False),
)

DATA_FOLDERS = Table(
    "data_folder",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("identity", String(32), nullable=False),
)


def open_database(url: str) -> Engine:
    """Connect, and create the tables that are missing.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the URL is not valid, or the database does not answer.
    """
    asked = make_url(url)
    is_libpq = asked.get_driver_name() in ("psycopg", "psycopg2")
    options = {name: value for name, value in _LIBPQ.items() if name not in asked.query} if is_libpq else {}
    engine = create_engine(asked, pool_pre_ping=True, connect_args=options)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "connect", _configure_postgresql)
    try:
        METADATA.create_all(engine)
    except (OperationalError, ProgrammingError):
        METADATA.create_all(engine)  # another server has created them at the same moment
    return engine


def bind_folder(engine: Engine, identity: str) -> bool:
    """Return whether the database belongs to the folder of that identity. A new database belongs to the first."""
    known = select(DATA_FOLDERS.c.identity)
    with engine.begin() as connection:
        found = connection.execute(known).scalar()
    if found is None:
        with suppress(IntegrityError), engine.begin() as connection:  # another server was first
            connection.execute(insert(DATA_FOLDERS).values(id=1, identity=identity))
        with engine.begin() as connection:
            found = connection.execute(known).scalar()
    return bool(found == identity)


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions itself, without the write lock
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _configure_postgresql(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = {int(_IDLE_TIMEOUT_S * 1000)}")
    cursor.execute(f"SET lock_timeout = {int(_LOCK_TIMEOUT_S * 1000)}")
    cursor.close()
    connection.commit()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
