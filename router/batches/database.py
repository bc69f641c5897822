"""The tables of files and batches, and the engine that reaches them: SQLite (WAL), or any SQLAlchemy URL.

Every transaction on SQLite begins with the write lock: one that reads first and writes then fails at once when another
server has written in between, whatever the busy timeout.
"""

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
)
from sqlalchemy.exc import OperationalError, ProgrammingError

METADATA = MetaData()
_BUSY_TIMEOUT_S = 30.0

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


def open_database(url: str) -> Engine:
    """Connect, and create the tables that are missing.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the URL is not valid, or the database does not answer.
    """
    engine = create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_immediate)
    try:
        METADATA.create_all(engine)
    except (OperationalError, ProgrammingError):
        METADATA.create_all(engine)  # another server has created them at the same moment
    return engine


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # else the driver begins transactions itself, without the write lock
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
