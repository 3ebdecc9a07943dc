"""The database under the registry: an SQLite file, or PostgreSQL where server.json names one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateColumn

from consilium_common.errors import ConsiliumError
from consilium_server.tables import APPEND_ONLY, Base

#: Beside the SQLite file; may name another database under ``database``.
_CONFIG: Final = "server.json"
#: Of PostgreSQL's advisory lock that is held while tables are made or grow.
_GROWING: Final = 0x636F6E73
_WAIT_SECONDS: Final = 20
#: PostgreSQL's answer to whoever changes evidence.
_REFUSING: Final = (
    "CREATE OR REPLACE FUNCTION consilium_append_only() RETURNS trigger AS $$ BEGIN"
    " RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME"
    " USING ERRCODE = 'integrity_constraint_violation'; END $$ LANGUAGE plpgsql"
)


def open_database(file: Path, named: str = "") -> Engine:
    """Open the registry's database; make or complete its tables and the guards on its evidence.

    Parameters
    ----------
    file : Path
        SQLite file; created where it is missing. Where ``server.json`` beside it has
        ``"database": "postgresql+psycopg://user:password@host/name"``, that database is opened
        and the file is left alone. A database of an earlier release gets the tables and columns
        that it lacks; nothing in it is changed.
    named : str, optional
        Such a URL, before there is a ``server.json``.

    Raises
    ------
    ConsiliumError
        ``state.registry``; never with the password of a URL.
    """
    chosen = read_url(named, where="--database-file") if named else _named_beside(file)
    url = make_url(f"sqlite:///{file}") if chosen is None else chosen
    shown = str(file) if url.get_backend_name() == "sqlite" else url.render_as_string()
    try:
        engine = _engine(url)
        with engine.begin() as connection:
            _alone_while_growing(connection)
            Base.metadata.create_all(connection)
            _add_missing_columns(connection)
            for statement in _guards(connection):
                connection.exec_driver_sql(statement)
    except ModuleNotFoundError as error:
        raise ConsiliumError(
            "state.registry",
            f"The database's driver {error.name} is not installed.",
            where=shown,
            hint="Install consilium with it: pip install 'consilium[postgresql]'.",
        ) from error
    except DatabaseError as error:
        # The driver's own words may quote the URL, so they stay out.
        raise ConsiliumError(
            "state.registry",
            "The aggregator's registry cannot be opened.",
            where=shown,
            hint="Restore it from your backup, or free space on the disk."
            if url.get_backend_name() == "sqlite"
            else "Look whether PostgreSQL runs and lets this user create tables in it.",
        ) from error
    if url.get_backend_name() == "sqlite":
        file.chmod(0o600)
    return engine


def insert_new(session: Session, table: Any, values: dict[str, Any]) -> Any:
    """Return an INSERT that leaves a row which is there already as it is."""
    dialect = postgresql if _is_postgresql(session.connection()) else sqlite
    return dialect.insert(table).values(values).on_conflict_do_nothing()


def hold_alone(session: Session, table: str) -> None:
    """Keep every other writer of a table out until the transaction ends; its first statement."""
    connection = session.connection()
    connection.exec_driver_sql(
        f"LOCK TABLE {table} IN EXCLUSIVE MODE" if _is_postgresql(connection) else "BEGIN IMMEDIATE"
    )


def read_url(text: str, *, where: str) -> URL:
    """Read the URL of a PostgreSQL database; ``where`` is said when it is none.

    Raises
    ------
    ConsiliumError
        ``state.registry``, without the text: it may hold a password.
    """
    try:
        url = make_url(text)
        if url.get_backend_name() == "postgresql":
            url.get_dialect()
            return url
    except (ArgumentError, NoSuchModuleError, ValueError):
        pass
    raise ConsiliumError(
        "state.registry",
        "`database` is not the URL of a PostgreSQL database.",
        where=where,
        hint="Write postgresql+psycopg://user:password@host/name, or leave it out for SQLite.",
    )


def _named_beside(file: Path) -> URL | None:
    config = file.with_name(_CONFIG)
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("database", "")
    except FileNotFoundError:
        return None
    return read_url(str(named), where=str(config)) if named else None


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "postgresql":
        # A connection that a restart of the database has cut is noticed before it is used.
        return create_engine(
            url, pool_pre_ping=True, connect_args={"connect_timeout": _WAIT_SECONDS}
        )
    engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    return engine


def _is_postgresql(connection: Connection) -> bool:
    return connection.dialect.name == "postgresql"


def _alone_while_growing(connection: Connection) -> None:
    # Several processes of an aggregator open it at the same time. SQLite locks the whole file;
    # PostgreSQL would let two of them create the same table.
    if _is_postgresql(connection):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_GROWING})")


def _add_missing_columns(connection: Connection) -> None:
    """Add to the tables of an earlier release the columns that came after it."""
    for table in Base.metadata.sorted_tables:
        missing = [
            column for column in table.columns if column.name not in _columns(connection, table)
        ]
        if not missing:
            continue
        if not _is_postgresql(connection) and not _writing(connection):
            # Another process may be at it: looked at again once nobody else can write.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        known = _columns(connection, table)
        for column in missing:
            if column.name not in known:
                definition = CreateColumn(column).compile(connection.engine)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")


def _columns(connection: Connection, table: Any) -> set[str]:
    return {column["name"] for column in inspect(connection).get_columns(table.name)}


def _writing(connection: Connection) -> bool:
    return bool(connection.connection.driver_connection.in_transaction)  # type: ignore[union-attr]


def _guards(connection: Connection) -> list[str]:
    """Return the SQL that makes every table of :data:`APPEND_ONLY` refuse changes."""
    if _is_postgresql(connection):
        # Made only where they are missing: to make one waits for everybody who writes.
        found = connection.exec_driver_sql(
            "SELECT tgrelid::regclass::text FROM pg_trigger WHERE tgname LIKE '%%_grows'"
        )
        unguarded = sorted(set(APPEND_ONLY) - set(found.scalars()))
        return [
            *([_REFUSING] if unguarded else []),
            *(
                # TRUNCATE deletes rows too, and passes by triggers on rows.
                f"CREATE TRIGGER {table}_grows BEFORE UPDATE OR DELETE OR TRUNCATE"
                f" ON {table} FOR EACH STATEMENT EXECUTE FUNCTION consilium_append_only()"
                for table in unguarded
            ),
        ]
    return [
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action.lower()} BEFORE {action} ON {table}"
        f" BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for table in APPEND_ONLY
        for action in ("UPDATE", "DELETE")
    ]
