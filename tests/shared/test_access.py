"""A server that refuses the connection: what ``imagewatch db check`` reports, and the next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.daemon import Folders, command
from support.postgres import missing

if TYPE_CHECKING:
    from pathlib import Path

    from support.postgres import Server

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


def checked(folder: Path, uri: str, password: str = "") -> str:
    """Check the database with a password file; return what is reported."""
    folders = Folders(folder, "http://127.0.0.1:9", shared__database=uri, shared__durability="single")
    file = folder / "pgpass"
    file.write_text(f"*:*:*:*:{password}\n" if password else "")
    file.chmod(0o600)
    folders.environ["PGPASSFILE"] = str(file)
    done = command(folders, "db", "check")
    assert done.returncode == 69, done.stderr
    return done.stderr


def test_each_reason_to_refuse_a_connection_has_its_own_next_step(tmp_path: Path, own_postgres: Server) -> None:
    guarded = own_postgres.user("guarded", "secret")
    refused = checked(tmp_path / "none", guarded)
    assert "needs a password, and this process has none" in refused
    assert "database_password" in refused
    refused = checked(tmp_path / "wrong", guarded, "wrong")
    assert "refuses the password" in refused
    assert "check the password" in refused
    assert "check pg_hba.conf and the name of the user" in checked(tmp_path / "user", own_postgres.uri(user="unknown"))
    assert "create it, then run: imagewatch db init" in checked(tmp_path / "missing", own_postgres.uri("unknown"))
    uri = own_postgres.database("limited")
    own_postgres.psql("ALTER DATABASE limited CONNECTION LIMIT 0")
    assert "raise max_connections" in checked(tmp_path / "limited", uri)
    access = own_postgres.folder / "data/pg_hba.conf"
    access.write_text("host all postgres 127.0.0.1/32 trust\n")
    own_postgres.restart()
    refused = checked(tmp_path / "rules", own_postgres.uri("limited"))
    assert "refuses the user" in refused
    assert "check pg_hba.conf" in refused
