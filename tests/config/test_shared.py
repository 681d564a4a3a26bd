"""``[shared]``: which database, under which names, and that no password is accepted or shown."""

from __future__ import annotations

import os
import socket
import string
import sys
import traceback

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagewatch.config.dsn import database_flaw
from imagewatch.config.load import load
from imagewatch.config.schema import Config, Folders, Shared
from imagewatch.config.shared import conninfo, instance_of, require_psycopg
from imagewatch.system.errors import ConfigError
from imagewatch.system.masking import Mask, known

SECRET = "Zq7Xw9Kv3"
"""It has nothing in common with the texts of any message."""
ROOT = '[folders]\nroot = "/srv/iw"\n'
PASSWORDS = st.text(min_size=6, max_size=12).map(lambda text: text.replace("\0", "") + SECRET)
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=8)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return str(path)

    return write


def refused(path: str | None, environ: dict[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return {one.field: f"{one.reason} | {one.hint}" for one in caught.value.problems}


def shared(inbox: str = "/srv/iw/inbox", **keys: str) -> Config:
    return Config(folders=Folders(inbox=inbox), shared=Shared(**keys))


# --- the keys


def test_without_the_section_there_is_no_database(write):
    assert load(write(ROOT), {}).shared == Shared(
        database="", account="main", instance="", lease_seconds=60, durability="replicated"
    )


@pytest.mark.parametrize(
    "value",
    [
        "service=imagewatch",
        "host=db.example.com dbname=imagewatch user=imagewatch",
        "host = db.example.com  port=5432 sslmode=verify-full sslrootcert='/etc/ssl/our ca.pem'",
        r"host=/run/postgresql dbname=it\'s\ here passfile='/etc/a\'b'",
        "host=@abstract,/run/postgresql port=,5433",
        "postgresql://imagewatch@db.example.com/imagewatch",
        "postgres://db1.example.com:5432,[2001:db8::1]:5433/imagewatch?target_session_attrs=read-write&user=ann",
        "postgresql:///imagewatch?host=%2Frun%2Fpostgresql&passfile=/etc/pgpass",
        "postgresql://",
        "",
    ],
)
def test_every_form_of_a_connection_without_a_password_is_accepted(write, value):
    assert load(write(ROOT), {"IMAGEWATCH_SHARED__DATABASE": value}).shared.database == value


@pytest.mark.parametrize("value", ["9", "3601", '"60"', "nan", "true"])
def test_a_lease_that_is_too_short_or_too_long_is_refused(write, value):
    assert list(refused(write(f"{ROOT}[shared]\nlease_seconds = {value}\n"))) == ["shared.lease_seconds"]


@pytest.mark.parametrize("value", [r"a\nb", "x" * 101, " a", "a ", r"a\u202eb"])
@pytest.mark.parametrize("key", ["account", "instance"])
def test_a_name_that_cannot_be_shown_is_refused(write, key, value):
    assert list(refused(write(f'{ROOT}[shared]\n{key} = "{value}"\n'))) == [f"shared.{key}"]


def test_an_account_has_a_name(write):
    assert "empty" in refused(write(f'{ROOT}[shared]\naccount = ""\n'))["shared.account"]


def test_an_unknown_key_and_an_unknown_durability_are_refused(write):
    found = refused(write(f'{ROOT}[shared]\ndatabse = ""\ndurability = "none"\n'))
    assert 'did you mean "database"?' in found["shared.databse"]
    assert "replicated, single" in found["shared.durability"]


def test_variables_override_the_section(write):
    environ = {"IMAGEWATCH_SHARED__LEASE_SECONDS": "90", "IMAGEWATCH_SHARED__ACCOUNT": "5"}
    loaded = load(write(f'{ROOT}[shared]\naccount = "one"\n'), environ).shared
    assert (loaded.account, loaded.lease_seconds) == ("5", 90)


# --- passwords


PLACES = [
    "postgresql://ann:{}@db/images",
    "postgres://ann:{}@db",
    "postgresql://:{}@db",
    "postgresql://ann:@db",
    "postgresql://db/images?password={}",
    "postgresql://db/images?user=ann&password={}",
    "postgresql://db/images?%70assword={}",
    "postgresql://db/images? password ={}",
    "postgresql://db/images?sslpassword={}",
    "host=db password={}",
    "host=db password = {}",
    "host=db password='{}'",
    "host='db'password='{}'",
    "password=",
    "sslpassword={}",
    "scram_client_key={}",
    "oauth_client_secret={}",
    "Password={}",
    "db_pwd={}",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_password_is_refused_and_not_repeated_and_the_hint_says_where_it_belongs(write, place):
    found = refused(write(ROOT), {"IMAGEWATCH_SHARED__DATABASE": place.format(SECRET)})
    assert found.keys() == {"IMAGEWATCH_SHARED__DATABASE"}
    assert found["IMAGEWATCH_SHARED__DATABASE"].startswith("must not hold a password | put the password into a")
    assert refused(write(f"{ROOT}[shared]\ndatabase = '''{place.format(SECRET)}'''\n")).keys() == {"shared.database"}


BROKEN = [
    f"postgresql://ann:4/{SECRET}@db/images",
    f"postgresql://ann:4%2F{SECRET}/@db",
    f"postgresql://db?user=ann&password={SECRET}@",
    f"postgresql://db?password={SECRET}&%zz=4",
    f"postgresql://ann%3A{SECRET}@db",
    f"postgresql://password={SECRET}@db",
    f"postgresql://db/images#password={SECRET}",
    f"postgresql+psycopg://ann:{SECRET}@db/images",
    f"PostgreSQL://ann:{SECRET}@db/images?sslmode=require",
    f"host=db password='{SECRET}",
    f"host=db password {SECRET}",
    f"host=db dbname=images user=ann:{SECRET}",
    f"host=ann:{SECRET}@db",
    f"dbname=postgresql://ann:{SECRET}@db/images",
    f"dbname='host=db password={SECRET}'",
    rf"dbname=host\=db\ password\={SECRET}",
    f"service=postgresql://ann:{SECRET}@db",
    f"service='host=db {SECRET}=1'",
    f"postgresql://db?application_name=a={SECRET}",
    f"application_name='{SECRET}",
    f"application_name=db\tpassword={SECRET}",
    f"application_name={'x' * 2000}{SECRET}",
    f"port={SECRET} host=db",
    f"host=db\tpassword={SECRET}",
    f"password\\={SECRET}",
    SECRET,
]


@pytest.mark.parametrize("value", BROKEN)
def test_what_cannot_be_read_is_refused_and_not_repeated(write, value):
    assert refused(write(ROOT), {"IMAGEWATCH_SHARED__DATABASE": value}).keys() == {"IMAGEWATCH_SHARED__DATABASE"}


@pytest.mark.parametrize("value", [f'["{SECRET}"]', f'{{password = "{SECRET}"}}', "5"])
def test_a_database_that_is_not_text_is_not_repeated(write, value):
    assert "must be text" in refused(write(f"{ROOT}[shared]\ndatabase = {value}\n"))["shared.database"]


@pytest.mark.parametrize("key", ["password", "PGPASSWORD"])
def test_a_password_with_a_key_of_its_own_is_refused_and_not_repeated(write, key):
    for found in (
        refused(write(f'{ROOT}[shared]\n{key} = "{SECRET}"\n')),
        refused(write(ROOT), {f"IMAGEWATCH_SHARED__{key.upper()}": SECRET}),
    ):
        (message,) = found.values()
        assert message.startswith("unknown key | put the password into a password file")


@given(st.sampled_from(PLACES).filter(lambda place: "{}" in place), PASSWORDS, NAMES)
def test_no_password_passes_and_no_message_has_it(place, password, name):
    reason, hint = database_flaw(place.format(password).replace("ann", name).replace("images", name))
    assert reason
    assert SECRET not in reason + hint


PIECES = [
    "postgresql://", "postgres://", "password", "=", "pass%77ord", "sslpassword", "ann", ":", "@", "/", "?", "&", "'",
    "\\", " ", "%", "%3d", "%26", "%00", "%20", "%C3", "host", "user", "port", "5432", "dbname", "[", "]", "::1", ",",
    "#", "+", "\u00a0", "\t", SECRET, "service", "passfile",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=2)), max_size=16).map("".join)


@given(TEXTS)
def test_no_message_has_a_part_of_the_value(text):
    assert SECRET not in "".join(database_flaw(text))


def check_like_libpq(text: str) -> None:
    """Where we find no flaw, libpq finds no password, and what it finds wrong does not hold one."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg (the extra postgres) is not installed")
    if database_flaw(text)[0]:
        return
    try:
        parsed = psycopg.conninfo.conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        return
    assert not {"password", "sslpassword", "scram_client_key", "oauth_client_secret"} & parsed.keys()


@given(TEXTS)
@example("host='db'password=x")
@example("postgresql://db? password =x")
@example("postgresql://ann:x?y@db")
@example("postgresql://[::1]:5432,ann:x@db")
def test_where_no_password_is_found_libpq_finds_none_either(text):
    check_like_libpq(text)


@given(st.lists(st.sampled_from(PIECES), max_size=10), st.sampled_from(["postgresql://", "host=db ", "user=ann "]))
def test_where_no_password_is_found_libpq_finds_none_either_in_what_looks_right(pieces, start):
    check_like_libpq(start + "".join(pieces))


# --- names of this daemon and of its inbox


def test_an_instance_has_its_own_name_or_that_of_host_and_inbox():
    assert instance_of(shared(instance="left")) == "left"
    assert instance_of(shared()) == f"{socket.gethostname()}:/srv/iw/inbox"


INBOXES = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200),
    st.binary(max_size=200).map(lambda raw: os.fsdecode(raw.replace(b"\0", b""))),
)
"""Paths that a system can have: any bytes, which Python shows with half of the surrogates."""


@given(INBOXES, INBOXES)
@example("x" * 150 + "a", "x" * 150 + "b")
@example("\udcff", "\\udcff")
@example("a ", "a")
def test_the_names_of_two_inboxes_are_different_short_and_printable(one, two):
    names = [instance_of(shared(f"/{inbox}")) for inbox in (one, two)]
    assert (names[0] == names[1]) == (one == two)
    for name in names:
        assert name.isprintable()
        assert len(name) <= 100
        name.encode()


# --- the connection


def test_the_password_is_the_credential_that_systemd_passes(tmp_path):
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    service = Shared(database="service=imagewatch")
    assert conninfo(service, environ) == conninfo(service, {}) == {}
    credential = tmp_path / "database_password"
    credential.write_text(f"{SECRET} it's\n")
    credential.chmod(0o440)
    assert conninfo(service, environ) == {"password": f"{SECRET} it's"}
    for number in range(20):
        known.remember(Mask(f"another-secret-{number}"))
    assert known.text(f"before {SECRET} it's after") == "before *** after"
    assert conninfo(Shared(database="postgresql://db?passfile=/etc/mine"), environ) == {}


@pytest.mark.parametrize("content", [b"", b"\n", b"one\ntwo\n", b"a\0b", b"\xff" + SECRET.encode(), b"x" * 5000])
def test_a_credential_that_holds_no_password_is_refused_and_not_shown(tmp_path, content):
    (tmp_path / "database_password").write_bytes(content)
    with pytest.raises(ConfigError, match="credential database_password") as refused_:
        conninfo(Shared(database="service=imagewatch"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert SECRET not in str(refused_.value)


def test_the_server_accepts_the_password_in_a_credential_as_systemd_passes_it(own_postgres, tmp_path):
    psycopg = pytest.importorskip("psycopg", reason="psycopg (the extra postgres) is not installed")
    uri = own_postgres.user("guarded", f"{SECRET} it's")
    file = tmp_path / "database_password"
    file.write_text(f"{SECRET} it's\n")
    file.chmod(0o440)  # as systemd does for the user of a service
    psycopg.connect(uri, **conninfo(Shared(database=uri), {"CREDENTIALS_DIRECTORY": str(tmp_path)})).close()


def test_a_credential_that_cannot_be_read_is_a_fault_of_the_configuration(tmp_path):
    (tmp_path / "database_password").mkdir()
    with pytest.raises(ConfigError, match="credential database_password: is not a regular file"):
        conninfo(Shared(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"shared\.database: .*pip install 'imagewatch\[postgres\]'"):
        require_psycopg()
