"""The tables of the journal in PostgreSQL, and the views through which a daemon uses them.

The tables are those of ``journal.schema``, with the account, the inbox and the instance (the daemon) of each row. These
have the settings of the connection as default values. The queries of the journal name views of the same names, which
show the rows that concern a daemon:

===============================================  =======================================================================
``attempts``, ``jobs``, ``sums``,                those of the account: caps, the rate, redeliveries and the history are
``folder_sums``, ``prices``, ``redeliveries``    counted over all its daemons
``inbox_jobs``, ``requests``                     those of the inbox; a release is asked of each of its daemons
``own_jobs``                                     those of the inbox that the daemon has: it carries them on
``holds``, ``announced``                         those of the account where the kind of hold concerns all its daemons,
                                                 else those of the instance; a cap is announced once for the account
``events``, ``meta``                             those of the instance
``instances``, ``leaders``                       the daemons of the account; which of them scans the inbox
===============================================  =======================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imagewatch.protocol.reasons import KINDS

if TYPE_CHECKING:
    from imagewatch.journal.database import Connection

VERSION: Final = 1
SCHEMA: Final = "imagewatch"
VIEWS: Final = "imagewatch_view"
CHANNEL: Final = "imagewatch"
"""PostgreSQL's channel for notifications; their text is the account."""
OFFERS: Final = "imagewatch_offers"
"""The channel for offered prompts; the text is the account, a line feed, and the inbox."""
_ACCOUNT, _INBOX, _INSTANCE = (f"current_setting('imagewatch.{name}')" for name in ("account", "inbox", "instance"))
_OWNED: Final = f"""
    account  TEXT NOT NULL DEFAULT {_ACCOUNT},
    inbox    TEXT NOT NULL DEFAULT {_INBOX},
    instance TEXT NOT NULL DEFAULT {_INSTANCE}"""
_SHARED_KINDS: Final = sorted(kind.name for kind in KINDS.values() if kind.is_shared)
TABLES: Final = f"""
CREATE TABLE about (
    one     INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1),
    version INTEGER NOT NULL
);
CREATE TABLE accounts (
    name TEXT PRIMARY KEY               -- its row is locked by each transaction that records an attempt
);
CREATE TABLE instances (
    account     TEXT NOT NULL DEFAULT {_ACCOUNT},
    name        TEXT NOT NULL,
    inbox       TEXT NOT NULL,
    host        TEXT NOT NULL,
    folder      TEXT NOT NULL,          -- the inbox on that host
    place       TEXT NOT NULL,          -- random, of its state folder
    version     TEXT NOT NULL,
    incarnation BIGINT NOT NULL,        -- how often a daemon was started with this name
    started_at  DOUBLE PRECISION NOT NULL,
    seen_at     DOUBLE PRECISION NOT NULL,
    ended_at    DOUBLE PRECISION,       -- when it was stopped; NULL while it runs, and after a kill
    forgotten_at DOUBLE PRECISION,      -- when a person removed it from the account; NULL when it comes back
    recorded    BIGINT NOT NULL DEFAULT 0,  -- how often its attempts were inserted; it never becomes less
    slots       BIGINT NOT NULL DEFAULT 0,  -- requests at the same time
    status      TEXT NOT NULL DEFAULT '',  -- JSON: what status --all shows of it
    PRIMARY KEY (account, name)
);
CREATE TABLE meta ({_OWNED},
    name  TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (account, instance, name)
);
CREATE TABLE jobs ({_OWNED},
    id        TEXT PRIMARY KEY,
    folder    BYTEA NOT NULL,
    stem      BYTEA NOT NULL,
    claim     TEXT NOT NULL,
    state     TEXT NOT NULL CHECK (
        state IN ('open', 'returning', 'decided', 'published', 'kept', 'reopened', 'done')
    ),
    decision  TEXT NOT NULL DEFAULT '',
    reserved  DOUBLE PRECISION NOT NULL DEFAULT 0,
    is_stuck  INTEGER NOT NULL DEFAULT 0,
    opened_at DOUBLE PRECISION NOT NULL,
    ended_at  DOUBLE PRECISION,
    holder    TEXT NOT NULL DEFAULT {_INSTANCE},  -- the daemon that has the job; empty: any of the inbox may take it
    epoch     BIGINT NOT NULL DEFAULT 0,  -- how often it was taken; its claim folder has the number
    lease_ends_at DOUBLE PRECISION NOT NULL DEFAULT 0  -- then another daemon of the inbox may take it over
);
CREATE UNIQUE INDEX jobs_by_name ON jobs (account, inbox, folder, stem)
    WHERE state IN ('open', 'decided', 'published');
CREATE INDEX jobs_that_are_open ON jobs (account, opened_at) WHERE state <> 'done';
CREATE INDEX jobs_of_an_inbox ON jobs (account, inbox, holder, opened_at) WHERE state <> 'done';
CREATE TABLE leaders (
    account TEXT NOT NULL DEFAULT {_ACCOUNT},
    inbox   TEXT NOT NULL DEFAULT {_INBOX},
    holder  TEXT NOT NULL DEFAULT {_INSTANCE},  -- the daemon that scans the inbox
    lease_ends_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (account, inbox)
);
CREATE INDEX jobs_that_are_over ON jobs (account, ended_at) WHERE state = 'done';
CREATE TABLE attempts ({_OWNED},
    job             TEXT NOT NULL,
    attempt         BIGINT NOT NULL,
    source          TEXT NOT NULL,
    source_size     BIGINT NOT NULL,
    source_mtime_ns BIGINT NOT NULL,
    contents        TEXT NOT NULL,
    prompt_sha256   TEXT NOT NULL,
    outcome         TEXT NOT NULL CHECK (
        outcome IN ('sent', 'unsent', 'completed', 'refused', 'busy', 'unknown', 'invalid')
    ),
    charged         TEXT NOT NULL CHECK (charged IN ('yes', 'no', 'unknown')),
    credits         DOUBLE PRECISION,
    provider        TEXT NOT NULL,
    model           TEXT NOT NULL,
    fields          TEXT NOT NULL,
    asked           BIGINT NOT NULL,
    got             BIGINT NOT NULL,
    status          BIGINT NOT NULL,
    code            TEXT NOT NULL,
    message         TEXT NOT NULL,
    request_id      TEXT NOT NULL,
    endpoint        TEXT NOT NULL,
    version         TEXT NOT NULL,
    claimed_at      DOUBLE PRECISION NOT NULL,
    sent_at         DOUBLE PRECISION,
    answered_at     DOUBLE PRECISION,
    asked_provider  TEXT NOT NULL DEFAULT '',
    price_kind      TEXT NOT NULL DEFAULT '',
    transaction_id  TEXT NOT NULL DEFAULT '',
    new_credit_balance DOUBLE PRECISION,
    owner           TEXT NOT NULL DEFAULT '',
    placed_mtime_ns BIGINT NOT NULL DEFAULT 0,
    nonce           TEXT NOT NULL DEFAULT '',
    reserved        DOUBLE PRECISION NOT NULL DEFAULT 0,
    request         TEXT NOT NULL DEFAULT '',
    counted_at      DOUBLE PRECISION,
    answer_on       TEXT NOT NULL DEFAULT '',  -- the instance that alone has the response; empty: none, or the folder
    PRIMARY KEY (job, attempt)
);
CREATE INDEX attempts_by_time ON attempts (account, counted_at);
CREATE INDEX attempts_by_claim ON attempts (account, claimed_at);
CREATE INDEX attempts_by_source ON attempts (account, source);
CREATE INDEX attempts_by_balance ON attempts (account, answered_at) WHERE new_credit_balance IS NOT NULL;
CREATE INDEX attempts_by_price ON attempts (account, asked_provider, sent_at);
CREATE INDEX attempts_by_placement ON attempts (account, placed_mtime_ns) WHERE placed_mtime_ns > 0;
CREATE INDEX attempts_without_result ON attempts (account, job) WHERE outcome = 'sent';
CREATE TABLE redeliveries ({_OWNED},
    job     TEXT PRIMARY KEY,
    times   BIGINT NOT NULL,
    last_at DOUBLE PRECISION NOT NULL
);
CREATE TABLE holds ({_OWNED},
    scope   TEXT NOT NULL,              -- empty: the account; else the instance
    kind    TEXT NOT NULL,
    message TEXT NOT NULL,
    since   DOUBLE PRECISION NOT NULL,
    seconds DOUBLE PRECISION NOT NULL DEFAULT 0,  -- from the last refusal to the next probe
    next_at DOUBLE PRECISION NOT NULL DEFAULT 0,  -- of the next probe
    prober  TEXT NOT NULL DEFAULT '',   -- the job that is sent as a probe; these four only of the account's holds
    probe_ends_at DOUBLE PRECISION NOT NULL DEFAULT 0,  -- then another may be sent, also if this one has no result
    PRIMARY KEY (account, scope, kind)
);
CREATE TABLE requests ({_OWNED},
    id       BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind     TEXT NOT NULL CHECK (kind IN ('release', 'retry')),
    job      TEXT NOT NULL DEFAULT '',
    asked_at DOUBLE PRECISION NOT NULL
);
CREATE TABLE sums (
    account    TEXT NOT NULL,
    instance   TEXT NOT NULL,           -- that sent the requests: no daemon waits for the rows of another one
    day        TEXT NOT NULL,
    provider   TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    credits    DOUBLE PRECISION NOT NULL,
    unknown    BIGINT NOT NULL,
    PRIMARY KEY (account, day, provider, price_kind, instance)
);
CREATE TABLE folder_sums (
    account    TEXT NOT NULL,
    instance   TEXT NOT NULL,
    folder     TEXT NOT NULL,
    day        TEXT NOT NULL,
    provider   TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    credits    DOUBLE PRECISION NOT NULL,
    unknown    BIGINT NOT NULL,
    PRIMARY KEY (account, folder, day, provider, price_kind, instance)
);
CREATE TABLE prices (
    account    TEXT NOT NULL,
    instance   TEXT NOT NULL,
    provider   TEXT NOT NULL,
    price_kind TEXT NOT NULL,
    price      DOUBLE PRECISION NOT NULL,
    last_at    DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (account, provider, price_kind, price, instance)
);
CREATE TABLE events ({_OWNED},
    number    BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id        TEXT NOT NULL,
    target    TEXT NOT NULL CHECK (target IN ('command', 'url')),
    name      TEXT NOT NULL CHECK (name IN ('completed', 'failed', 'unknown', 'held', 'released', 'cap')),
    job       TEXT NOT NULL DEFAULT '',
    at        DOUBLE PRECISION NOT NULL,
    tries     BIGINT NOT NULL DEFAULT 0,
    next_at   DOUBLE PRECISION NOT NULL DEFAULT 0,
    message   TEXT NOT NULL DEFAULT '',
    failed_at DOUBLE PRECISION,
    content   TEXT NOT NULL,
    UNIQUE (id, target)
);
CREATE INDEX events_by_next_try ON events (account, instance, target, next_at, at) WHERE failed_at IS NULL;
CREATE INDEX events_by_job ON events (job);
CREATE TABLE announced ({_OWNED},
    scope   TEXT NOT NULL,
    subject TEXT NOT NULL,
    at      DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (account, scope, subject)
);
"""
_OF_ACCOUNT = f"account = {_ACCOUNT}"
_SCOPES: Final = {
    "meta": f"{_OF_ACCOUNT} AND instance = {_INSTANCE}",
    "jobs": _OF_ACCOUNT,
    "attempts": _OF_ACCOUNT,
    "redeliveries": _OF_ACCOUNT,
    "holds": f"{_OF_ACCOUNT} AND scope IN ('', {_INSTANCE})",
    "requests": f"{_OF_ACCOUNT} AND inbox = {_INBOX} AND (kind <> 'release' OR instance = {_INSTANCE})",
    "sums": _OF_ACCOUNT,
    "folder_sums": _OF_ACCOUNT,
    "prices": _OF_ACCOUNT,
    "events": f"{_OF_ACCOUNT} AND instance = {_INSTANCE}",
    "announced": f"{_OF_ACCOUNT} AND scope IN ('', {_INSTANCE})",
    "instances": _OF_ACCOUNT,
    "leaders": f"{_OF_ACCOUNT} AND inbox = {_INBOX}",
}
"""Which rows of a table a daemon sees."""
_DAY = (
    "CASE WHEN r.sent_at >= -62135596800 AND r.sent_at < 253402300800 "  # of the years 1 to 9999
    "THEN to_char(to_timestamp(r.sent_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD') ELSE '9999-12-31' END"
)
_UNKNOWN = "CASE WHEN r.credits IS NULL THEN sign * greatest(r.asked, 1) ELSE 0 END"
FUNCTIONS: Final = f"""
CREATE FUNCTION scope_of_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.scope := CASE WHEN NEW.kind = ANY ('{{{",".join(_SHARED_KINDS)}}}') THEN '' ELSE NEW.instance END;
    RETURN NEW;
END $$;
CREATE TRIGGER scope BEFORE INSERT ON holds FOR EACH ROW EXECUTE FUNCTION scope_of_hold();
CREATE FUNCTION scope_of_announced() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    NEW.scope := CASE WHEN NEW.subject LIKE 'cap:%'
        OR split_part(NEW.subject, ':', 2) = ANY ('{{{",".join(_SHARED_KINDS)}}}') THEN '' ELSE NEW.instance END;
    RETURN NEW;
END $$;
CREATE TRIGGER scope BEFORE INSERT ON announced FOR EACH ROW EXECUTE FUNCTION scope_of_announced();
CREATE FUNCTION add_attempt(r attempts, sign INTEGER) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    IF r.sent_at IS NULL OR r.charged NOT IN ('yes', 'unknown')
        OR r.outcome NOT IN ('completed', 'unknown', 'refused') THEN RETURN; END IF;
    INSERT INTO {SCHEMA}.sums AS s
        VALUES (r.account, r.instance, {_DAY}, r.asked_provider, r.price_kind,
                sign * coalesce(r.credits, 0), {_UNKNOWN})
        ON CONFLICT (account, day, provider, price_kind, instance)
        DO UPDATE SET credits = s.credits + excluded.credits, unknown = s.unknown + excluded.unknown;
    IF position('/' IN r.source) > 0 THEN
        INSERT INTO {SCHEMA}.folder_sums AS s
            VALUES (r.account, r.instance, split_part(r.source, '/', 1), {_DAY}, r.asked_provider, r.price_kind,
                    sign * coalesce(r.credits, 0), {_UNKNOWN})
            ON CONFLICT (account, folder, day, provider, price_kind, instance)
            DO UPDATE SET credits = s.credits + excluded.credits, unknown = s.unknown + excluded.unknown;
    END IF;
END $$;
CREATE FUNCTION note_price(r attempts) RETURNS void LANGUAGE plpgsql AS $$ BEGIN
    IF r.credits > 0 AND r.sent_at IS NOT NULL THEN
        INSERT INTO {SCHEMA}.prices AS p
            VALUES (r.account, r.instance, r.asked_provider, r.price_kind, r.credits / greatest(r.asked, 1), r.sent_at)
            ON CONFLICT (account, provider, price_kind, price, instance)
            DO UPDATE SET last_at = greatest(p.last_at, excluded.last_at);
    END IF;
END $$;
CREATE FUNCTION attempts_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'UPDATE' THEN PERFORM {SCHEMA}.add_attempt(OLD, -1); END IF;
    PERFORM {SCHEMA}.add_attempt(NEW, 1);
    PERFORM {SCHEMA}.note_price(NEW);
    RETURN NULL;
END $$;
CREATE TRIGGER sums_inserted AFTER INSERT ON attempts FOR EACH ROW EXECUTE FUNCTION attempts_changed();
CREATE TRIGGER sums_updated
    AFTER UPDATE OF source, sent_at, charged, outcome, credits, asked, asked_provider, price_kind ON attempts
    FOR EACH ROW EXECUTE FUNCTION attempts_changed();
CREATE FUNCTION notify_account() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM pg_notify('{CHANNEL}', coalesce(NEW.account, OLD.account));
    RETURN NULL;
END $$;
CREATE TRIGGER notified AFTER INSERT OR UPDATE OR DELETE ON holds FOR EACH ROW EXECUTE FUNCTION notify_account();
CREATE TRIGGER notified AFTER INSERT ON requests FOR EACH ROW EXECUTE FUNCTION notify_account();
CREATE FUNCTION count_attempts() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    UPDATE {SCHEMA}.instances SET recorded = recorded + 1 WHERE account = NEW.account AND name = NEW.instance;
    RETURN NULL;
END $$;
CREATE TRIGGER counted AFTER INSERT ON attempts FOR EACH ROW EXECUTE FUNCTION count_attempts();
CREATE FUNCTION keep_attempts() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'an attempt is never deleted: it is what keeps a request from being sent again';
END $$;
CREATE TRIGGER never_deleted BEFORE DELETE OR TRUNCATE ON attempts FOR EACH STATEMENT EXECUTE FUNCTION keep_attempts();
"""  # noqa: S608  our own names


def version_of(connection: Connection) -> int:
    """Return the version of the tables; 0 if there are none."""
    if connection.execute(f"SELECT to_regclass('{SCHEMA}.about') AS there").fetchone()["there"] is None:
        return 0
    row = connection.execute(f"SELECT version FROM {SCHEMA}.about").fetchone()  # noqa: S608  our own name
    return int(row["version"]) if row else 0


def install(connection: Connection) -> None:
    """Create the tables, in a transaction of the caller."""
    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {VIEWS}")
    connection.execute(f"SET LOCAL search_path = {SCHEMA}")
    for statement in _statements(TABLES):
        connection.execute(statement.replace(" TEXT ", ' TEXT COLLATE "C" '))
    for statement in FUNCTIONS.split("\n\n"):
        for one in _functions(statement):
            connection.execute(one)
    for name, rows in _SCOPES.items():
        connection.execute(f"CREATE VIEW {VIEWS}.{name} AS SELECT * FROM {SCHEMA}.{name} WHERE {rows}")  # noqa: S608
    of_inbox = f"{_OF_ACCOUNT} AND inbox = {_INBOX}"
    for name, rows in {"inbox_jobs": of_inbox, "own_jobs": f"{of_inbox} AND holder = {_INSTANCE}"}.items():
        connection.execute(f"CREATE VIEW {VIEWS}.{name} AS SELECT * FROM {SCHEMA}.jobs WHERE {rows}")  # noqa: S608
    connection.execute(f"INSERT INTO {SCHEMA}.about (version) VALUES ({VERSION})")  # noqa: S608


def _statements(text: str) -> list[str]:
    return [one for one in text.strip().split(";\n") if one.strip()]


def _functions(text: str) -> list[str]:
    """Return the statements of a text with functions, whose bodies have semicolons, too."""
    found, current = [], ""
    for line in text.strip().splitlines():
        current += line + "\n"
        if line.endswith(("END $$;", "();")):
            found.append(current)
            current = ""
    return found
