"""Configuration as an administrator sees it: files, variables, defaults, and every mistake in one report."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pwd
import re
import shutil
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path

import msgspec
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import imagewatch
from imagewatch.config import schema
from imagewatch.config.example import example
from imagewatch.config.load import load
from imagewatch.config.locate import find
from imagewatch.config.schema import Config, Options
from imagewatch.system.errors import ConfigError

SECRET = "sk-let-VERYSECRETvalue0123456789"
ROOT = '[folders]\nroot = "/srv/iw"\n'
STRUCTS = {
    "folders": schema.Folders,
    "endpoint": schema.Endpoint,
    "inbox": schema.Inbox,
    "outbox": schema.Outbox,
    "defaults": Options,
    "limits": schema.Limits,
    "notify": schema.Notify,
    "shared": schema.Shared,
    "retry": schema.Retry,
    "log": schema.Log,
}
SAMPLES = {
    "folders": {"archive": "delete", "state": "/var/lib/x", "errors": "/elsewhere/5", "notice": "/x"},
    "notify": {"command": ["notify", "--now"], "url": "https://ntfy.example/x?y=z", "secret_file": "/etc/secret"},
    "endpoint": {
        "base_url": "https://gateway.example:8443/letta",
        "api_key_file": "/etc/key",
        "api_key_command": ["pass", "show", "a b"],
        "connect_timeout_seconds": 2.5,
        "timeout_seconds": 30,
        "deadline_seconds": 31,
        "max_response_bytes": 1000,
        "ca_file": "/etc/ca.pem",
        "allow_private_downloads": True,
    },
    "inbox": {
        "watch": "poll",
        "settle_seconds": 0,
        "input_wait_seconds": 1.5,
        "rescan_seconds": 0.1,
        "recursive": False,
        "redelivery": "run",
    },
    "outbox": {"file_mode": "0640", "folder_mode": "2750", "group": "5"},
    "defaults": {
        "provider": "openai",
        "model": "5",
        "n": 2,
        "size": "true",
        "quality": "low",
        "output_format": "webp",
        "seed": -7,
    },
    "presets.draft": {"provider": "flux", "n": 3},
    "limits": {
        "concurrency": 64,
        "requests_per_minute": 10,
        "credits_per_day": 0.5,
        "credits_per_month": 100,
        "assumed_credits": 1,
        "burst": 20,
        "providers": ["flux", "openai"],
        "models": ["a", "b"],
        "qualities": ["low"],
        "max_n": 1,
        "max_prompt_chars": 10,
        "max_input_bytes": 0,
        "min_free_bytes": 1,
    },
    "shared": {
        "database": "service=imagewatch",
        "account": "5",
        "instance": "left",
        "lease_seconds": 10,
        "durability": "single",
    },
    "retry": {"attempts": 20, "initial_seconds": 2, "max_seconds": 2},
    "log": {"level": "debug", "format": "json"},
}


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "config.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refused(path: str | None, environ: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


def problems(path: str | None, environ: dict[str, str] | None = None) -> dict[str, str]:
    return {one.field: f"{one.reason} | {one.hint}" for one in refused(path, environ).problems}


def without_source(loaded: Config) -> Config:
    return msgspec.structs.replace(loaded, source="")


# --- defaults and folders


def test_a_root_alone_is_a_configuration(write):
    path = write(ROOT)
    loaded = load(path, {"HOME": "/home/ann"})
    assert loaded.folders.inbox == "/srv/iw/inbox"
    assert loaded.folders.outbox == "/srv/iw/outbox"
    assert loaded.folders.errors == "/srv/iw/errors"
    assert loaded.folders.archive == "/srv/iw/archive"
    assert loaded.source == path
    assert loaded == Config(folders=loaded.folders, source=path)
    assert loaded.defaults == Options(provider="auto")


def test_defaults_are_those_of_the_specification(write):
    loaded = load(write(ROOT), {})
    assert loaded.endpoint == schema.Endpoint(
        base_url="https://api.letta.com",
        api_key_file=None,
        api_key_command=(),
        connect_timeout_seconds=10,
        timeout_seconds=600,
        deadline_seconds=900,
        max_response_bytes=400_000_000,
        ca_file=None,
        allow_private_downloads=False,
    )
    assert loaded.inbox == schema.Inbox(
        watch="auto",
        settle_seconds=5,
        input_wait_seconds=60,
        rescan_seconds=30,
        recursive=True,
        redelivery="skip",
    )
    assert loaded.limits == schema.Limits(
        concurrency=4,
        requests_per_minute=0,
        credits_per_day=0,
        credits_per_month=0,
        assumed_credits=150,
        burst=0,
        providers=(),
        models=(),
        qualities=(),
        max_n=4,
        max_prompt_chars=32_000,
        max_input_bytes=300_000_000,
        min_free_bytes=500_000_000,
    )
    assert loaded.retry == schema.Retry(attempts=4, initial_seconds=1, max_seconds=60)
    assert loaded.log == schema.Log(level="info", format="auto")
    assert loaded.outbox == schema.Outbox(file_mode=None, folder_mode=None, group=None)


def test_a_folder_set_alone_wins_over_root(write):
    loaded = load(write(ROOT + 'outbox = "/mnt/pictures"\n'), {})
    assert loaded.folders.outbox == "/mnt/pictures"
    assert loaded.folders.inbox == "/srv/iw/inbox"


def test_relative_paths_begin_at_the_folder_of_the_file(write, tmp_path):
    text = '[folders]\nroot = "box"\narchive = "../old"\n'
    text += '[endpoint]\napi_key_file = "./key"\nca_file = "ca.pem"\n'
    loaded = load(write(text), {})
    assert loaded.folders.inbox == str(tmp_path / "box" / "inbox")
    assert loaded.folders.archive == str(tmp_path.parent / "old")
    assert loaded.endpoint.api_key_file == str(tmp_path / "key")
    assert loaded.endpoint.ca_file == str(tmp_path / "ca.pem")


def test_without_a_file_relative_paths_begin_at_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(None, {"IMAGEWATCH_FOLDERS__ROOT": "box"})
    assert loaded.folders.inbox == str(tmp_path / "box" / "inbox")
    assert loaded.source == "environment"


def test_a_tilde_is_the_home_of_the_environment(write):
    loaded = load(write('[folders]\nroot = "~/box"\n'), {"HOME": "/home/ann"})
    assert loaded.folders.inbox == "/home/ann/box/inbox"


@pytest.mark.parametrize("path", ["$HOME/box", "${HOME}/box"])
def test_a_variable_in_a_path_is_a_problem_and_no_folder_of_that_name(write, path):
    found = problems(
        write(f'[folders]\nroot = "{path}"\n[endpoint]\napi_key_file = "{path}/key"\n'), {"HOME": "/home/ann"}
    )
    for name in ("folders.root", "endpoint.api_key_file"):
        assert "variables are not expanded" in found[name]
        assert "~" in found[name]
    assert load(write('[folders]\nroot = "./$box"\n'), {}).folders.inbox.endswith("/$box/inbox")


def test_the_home_of_an_unknown_user_is_a_problem(write):
    assert "unknown user" in problems(write('[folders]\nroot = "~nobodyofthatname/box"\n'))["folders.root"]


def test_the_word_delete_is_no_folder(write):
    assert load(write(ROOT + 'archive = "delete"\n'), {}).folders.archive == "delete"
    assert load(write(ROOT + 'archive = "/x/delete"\n'), {}).folders.archive == "/x/delete"


def test_missing_folders_name_root_and_the_next_step(write):
    assert "init" in problems(write(""))["folders.root"]
    assert "init" in problems(None)["folders.root"]
    named = problems(write('[folders]\ninbox = "/a"\narchive = "delete"\n'))["folders.root"]
    assert "outbox, errors" in named
    assert "inbox" not in named.partition("|")[0]


def test_a_faulty_root_is_reported_once(write):
    assert list(problems(write("[folders]\nroot = 5\n"))) == ["folders.root"]
    assert list(problems(write('[folders]\nroot = ""\n'))) == ["folders.root"]
    assert list(problems(write("folders = 5\n"))) == ["folders"]


@pytest.mark.parametrize(
    ("extra", "pair"),
    [
        ('outbox = "/srv/iw/inbox"', ("outbox", "inbox")),
        ('outbox = "/srv/iw/inbox/out"', ("outbox", "inbox")),
        ('inbox = "/srv/iw/errors/in"', ("inbox", "errors")),
        ('state = "/srv/iw/inbox/.state"', ("state", "inbox")),
        ('state = "/srv/iw"', ("inbox", "state")),
        ('archive = "/srv/iw/x/../outbox"', ("archive", "outbox")),
    ],
)
def test_equal_and_nested_folders_are_refused_with_the_pair_named(write, extra, pair):
    found = problems(write(f"{ROOT}{extra}\n"))
    assert f"folders.{pair[1]}" in found[f"folders.{pair[0]}"]


def test_folders_that_are_equal_by_a_link_are_refused(write, tmp_path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "out").symlink_to("inbox")
    found = problems(write('[folders]\nroot = "."\noutbox = "out"\n'))
    assert "same folder as folders.inbox" in found["folders.outbox"]


@pytest.mark.parametrize(
    ("extra", "place"),
    [
        ("", "/srv/iw"),
        ('notice = "off"', ""),
        ('notice = "/srv/share"', "/srv/share"),
        ('notice = "/srv/iw/inbox"', "/srv/iw/inbox"),
        ('notice = "/srv/iw/outbox"', "/srv/iw/outbox"),
    ],
)
def test_the_status_files_are_in_the_root_or_where_it_is_said(write, extra, place):
    assert load(write(f"{ROOT}{extra}\n"), {}).folders.notice == place


def test_without_a_root_there_are_no_status_files_unless_a_folder_is_named(write):
    places = "".join(f'{name} = "/srv/{name}"\n' for name in ("inbox", "outbox", "errors", "archive"))
    assert load(write(f"[folders]\n{places}"), {}).folders.notice == ""
    assert load(write(f'[folders]\n{places}notice = "n"\n'), {}).folders.notice.endswith("/n")


@pytest.mark.parametrize("place", ["state", "iw/archive", "iw/errors", "iw/errors/x", "iw/inbox/x", "iw/outbox/x"])
def test_the_status_files_may_not_be_where_others_or_a_prompts_files_are(write, place):
    found = problems(write(f'{ROOT}state = "/srv/state"\nnotice = "/srv/{place}"\n'))
    assert "is inside folders." in found["folders.notice"]


def test_a_root_that_is_one_of_the_folders_has_no_status_files_and_is_no_problem(write):
    places = 'inbox = "/a"\noutbox = "/b"\nerrors = "/c"\narchive = "/srv/iw"\n'
    assert load(write(ROOT + places), {}).folders.notice == ""
    places = 'inbox = "/srv/iw"\noutbox = "/b"\nerrors = "/c"\narchive = "/d"\n'
    assert load(write(ROOT + places), {}).folders.notice == "/srv/iw"


def test_folders_with_a_common_beginning_of_name_are_separate(write):
    assert load(write(ROOT + 'outbox = "/srv/iw/inbox2"\n'), {}).folders.outbox == "/srv/iw/inbox2"


def test_the_state_folder_is_systemds_else_xdgs_else_below_home_and_of_the_inbox_alone(write):
    path = write(ROOT)
    name = hashlib.sha256(b"/srv/iw/inbox").hexdigest()[:8]
    home = {"HOME": "/home/ann"}
    assert load(path, home).folders.state == f"/home/ann/.local/state/imagewatch/{name}"
    xdg = home | {"XDG_STATE_HOME": "/xdg"}
    assert load(path, xdg).folders.state == f"/xdg/imagewatch/{name}"
    relative = home | {"XDG_STATE_HOME": "xdg"}
    assert load(path, relative).folders.state == f"/home/ann/.local/state/imagewatch/{name}"
    systemd = xdg | {"STATE_DIRECTORY": "/var/lib/iw:/var/lib/other"}
    assert load(path, systemd).folders.state == "/var/lib/iw"
    other = load(path, home | {"IMAGEWATCH_FOLDERS__INBOX": "/srv/other"})
    assert other.folders.state != load(path, home).folders.state


# --- the file


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[folders]\nroot = /srv\n", "line 2, column 8"),
        (b"[folders\n", "line 1"),
        (b"[folders]\nroot = '\xff'\n", "not UTF-8 (line 2)"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
        (b"a = " + b"9" * 5000, "too long"),
        (b"#" * (1 << 20) + b"\n", "1 MiB"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_the_place(write, content, words):
    path = write(content)
    error = refused(path)
    assert words in str(error)
    assert error.source == path


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in str(refused(str(tmp_path / "none.toml")))
    assert "directory" in str(refused(str(tmp_path)))
    assert "not a file name" in str(refused("/tmp/a\0b"))


def test_a_byte_order_mark_and_crlf_are_accepted(write):
    text = '\ufeff[folders]\r\nroot = "/srv/iw"\r\n'
    assert load(write(text), {}).folders.inbox == "/srv/iw/inbox"


def test_all_problems_appear_together(write):
    text = """
    stray = 1
    retry = 3
    [folder]
    root = "/x"
    [endpoint]
    base_url = "https://api.letta.com/v1"
    timeout_secs = 5
    [inbox]
    watch = "sometimes"
    settle_seconds = 4000
    recursive = 1
    [outbox]
    file_mode = 640
    [defaults]
    n = 9
    [presets.".x"]
    provider = "flux"
    [presets.ok]
    seeds = 5
    [limits]
    concurrency = true
    credits_per_day = nan
    providers = ["flux", "midjourney"]
    """
    found = problems(write(text), {"IMAGEWATCH_LOG__LEVEL": "loud", "IMAGEWATCH_LIMITS__MAXN": "3"})
    assert set(found) == {
        "stray",
        "retry",
        "folder",
        "folders.root",
        "endpoint.base_url",
        "endpoint.timeout_secs",
        "inbox.watch",
        "inbox.settle_seconds",
        "inbox.recursive",
        "outbox.file_mode",
        "defaults.n",
        "presets..x",
        "presets.ok.seeds",
        "limits.concurrency",
        "limits.credits_per_day",
        "limits.providers",
        "IMAGEWATCH_LOG__LEVEL",
        "IMAGEWATCH_LIMITS__MAXN",
    }
    assert '"folders"' in found["folder"]
    assert '"timeout_seconds"' in found["endpoint.timeout_secs"]
    assert '"seed"' in found["presets.ok.seeds"]
    assert "IMAGEWATCH_LIMITS__MAX_N" in found["IMAGEWATCH_LIMITS__MAXN"]
    assert "[retry]" in found["retry"]
    assert "auto, native, poll" in found["inbox.watch"]
    assert "flux, gemini, openai" in found["limits.providers"]


def test_a_key_outside_of_its_section_is_reported_with_its_place(write):
    assert "[folders]" in problems(write('root = "/srv"\n'))["root"]


@pytest.mark.parametrize(
    ("section", "key", "good", "bad"),
    [
        ("limits", "concurrency", ["1", "64"], ["0", "65", "4.0", '"4"', "true"]),
        ("limits", "max_n", ["1", "4"], ["0", "5"]),
        ("limits", "max_prompt_chars", ["1", "32000"], ["0", "32001"]),
        ("limits", "credits_per_day", ["0", "0.5", "1000"], ["-1", "nan", "inf", "-inf", "true"]),
        ("limits", "requests_per_minute", ["0", "60"], ["-0.1", "inf"]),
        ("limits", "burst", ["0", "1000"], ["-1", "1.5", "99999999999999999999", "0x" + "f" * 5000]),
        ("limits", "qualities", ['["low", "auto"]', "[]"], ['"low"', '["best"]', "[1]", "[nan]"]),
        ("limits", "models", ['["x"]'], ['[""]', '["a\\u0000"]']),
        ("inbox", "settle_seconds", ["0", "3600", "0.5"], ["-1", "3601", "nan", "false"]),
        ("inbox", "rescan_seconds", ["0.1"], ["0", "0.09", "1e300"]),
        ("retry", "attempts", ["1", "20"], ["0", "21"]),
        ("retry", "initial_seconds", ["0", "60"], ["61", "-1"]),
        ("endpoint", "connect_timeout_seconds", ["1", "900"], ["0", "901", "inf"]),
        ("endpoint", "allow_private_downloads", ["true"], ["1", '"true"']),
        ("endpoint", "api_key_command", ['"pass show x"', '["pass"]'], ['""', "[]", "[1]", "5", '"it\'s"']),
        (
            "outbox",
            "file_mode",
            ['"0640"', '"640"', '"0o640"'],
            ["640", '"0888"', '"rw"', '"77777"', '""', '"0000"', '"0400"', '"0266"'],
        ),
        ("outbox", "folder_mode", ['"2750"', '"0700"'], ['"0640"', "0x1ed", "true"]),
        ("outbox", "group", ['"users"'], ['""', "100"]),
        ("log", "level", ['"warning"'], ['"INFO"', "1"]),
        ("defaults", "provider", ['"auto"', '"gemini"'], ['"dalle"']),
        ("defaults", "seed", ["-5"], ["1.5", "1979-05-27"]),
    ],
)
def test_bounds_and_types(write, section, key, good, bad):
    head = ROOT + f"[{section}]\n{key} = "
    for value in good:
        load(write(head + value), {})
    for value in bad:
        found = refused(write(head + value)).problems
        assert len(found) == 1, value
        assert found[0].field in (f"{section}.{key}", "retry.max_seconds", "endpoint.deadline_seconds")


def test_modes_become_numbers(write):
    loaded = load(write(ROOT + '[outbox]\nfile_mode = "0640"\nfolder_mode = "2750"\n'), {})
    assert (loaded.outbox.file_mode, loaded.outbox.folder_mode) == (0o640, 0o2750)


def test_a_mode_without_quotes_is_reported(write):
    assert "quote" in problems(write(ROOT + "[outbox]\nfile_mode = 640\n"))["outbox.file_mode"]


def test_a_command_may_be_one_line_or_a_list(write):
    one = load(write(ROOT + "[endpoint]\napi_key_command = \"pass show 'my key'\"\n"), {})
    many = load(write(ROOT + '[endpoint]\napi_key_command = ["pass", "show", "my key"]\n'), {})
    assert one.endpoint.api_key_command == many.endpoint.api_key_command == ("pass", "show", "my key")


def test_presets_are_options_by_name(write):
    loaded = load(write(ROOT + '[presets.draft]\nquality = "low"\n[presets."Große Bilder"]\nn = 4\n'), {})
    assert loaded.presets == {"draft": Options(quality="low"), "Große Bilder": Options(n=4)}


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a\\nb", "a\\u0000b"])
def test_a_preset_name_that_no_folder_can_have_is_refused(write, name):
    (problem,) = refused(write(ROOT + f'[presets."{name}"]\nn = 1\n')).problems
    assert "name" in problem.reason
    assert problem.field.isprintable()


def test_presets_that_are_not_tables_are_refused(write):
    assert "presets.a" in problems(write("presets.a = 1\n" + ROOT))
    assert "presets" in problems(write("presets = []\n" + ROOT))


# --- the base URL


@pytest.mark.parametrize(
    ("url", "result"),
    [
        ("https://api.letta.com", "https://api.letta.com"),
        ("https://api.letta.com//", "https://api.letta.com"),
        ("https://proxy.example:8443/letta/", "https://proxy.example:8443/letta"),
        ("HTTPS://API.letta.com", "HTTPS://API.letta.com"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:5000/", "http://[::1]:5000"),
    ],
)
def test_a_base_url_loses_its_last_slashes_only(write, url, result):
    assert load(write(ROOT + f'[endpoint]\nbase_url = "{url}"\n'), {}).endpoint.base_url == result


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://api.letta.com/v1", "remove /v1"),
        ("https://api.letta.com/V1/", "remove /v1"),
        ("http://api.letta.com", "the key would be sent unencrypted"),
        ("http://127.0.0.1.evil.example", "the key would be sent unencrypted"),
        ("http://localhost.evil.example", "the key would be sent unencrypted"),
        ("http://0.0.0.0", "the key would be sent unencrypted"),
        (f"https://me:{SECRET}@api.letta.com", "user name"),
        ("http://localhost@evil.example", "user name"),
        ("https://api.letta.com?x=1", "no query"),
        ("https://api.letta.com/#x", "no query"),
        ("http://localhost\\\\evil.example", "no query"),
        ("ftp://api.letta.com", "https://"),
        ("api.letta.com", "https://"),
        ("https://", "https://"),
        ("https://:443", "https://"),
        ("", "https://"),
        ("http://[::1]evil.example", "https://"),
        ("http://[::1", "not a URL"),
        ("https://api.letta.com:99999", "not a URL"),
        ("https://api letta.com", "without spaces"),
        ("https://api.lettä.com", "ASCII"),
    ],
)
def test_a_base_url_that_is_unsafe_or_unclear_is_refused(write, url, words):
    found = problems(write(ROOT + f'[endpoint]\nbase_url = "{url}"\n'))
    assert list(found) == ["endpoint.base_url"]
    assert words in found["endpoint.base_url"]


def test_letta_base_url_counts_unless_the_file_sets_another(write):
    environ = {"LETTA_BASE_URL": "https://other.example/"}
    assert load(write(ROOT), environ).endpoint.base_url == "https://other.example"
    own = write(ROOT + '[endpoint]\nbase_url = "https://own.example"\n')
    assert load(own, environ).endpoint.base_url == "https://own.example"
    assert load(write(ROOT), {"LETTA_BASE_URL": ""}).endpoint.base_url == "https://api.letta.com"


def test_a_faulty_letta_base_url_is_named_as_the_variable(write):
    assert list(problems(write(ROOT), {"LETTA_BASE_URL": "http://far.example"})) == ["LETTA_BASE_URL"]


# --- keys in wrong places


@pytest.mark.parametrize(
    "text",
    [
        f'[endpoint]\napi_key = "{SECRET}"\n',
        f'[endpoint]\nAPI-KEY = "{SECRET}"\n',
        f'[endpoint]\ntoken = "{SECRET}"\n',
        f'[limits]\napi_key = "{SECRET}"\n',
        f'[presets.x]\napi_key = "{SECRET}"\n',
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(write, text):
    found = refused(write(ROOT + text)).problems
    assert [one.hint for one in found] == ["put the key in a file and name it in api_key_file"]


@pytest.mark.parametrize(
    "text",
    [
        f'api_key = "{SECRET}"\n{ROOT}',
        f'{ROOT}[endpoint]\napi_key_file = "{SECRET}"\n',
        f'{ROOT}[endpoint]\napi_key_file = ["{SECRET}"]\n',
        f'{ROOT}[endpoint]\napi_key_command = [5, "{SECRET}"]\n',
        f'{ROOT}[endpoint]\napi_key_command = "\'{SECRET}"\n',
        f'{ROOT}[endpoint]\napi_key_command = {{key = "{SECRET}"}}\n',
        f'{ROOT}[letta]\nanything = "{SECRET}"\n',
        f"{ROOT}[endpoint]\napi_key = {SECRET}\n",
        f'{ROOT}[endpoint]\napi_key = "{SECRET}\n',
    ],
)
def test_a_key_anywhere_else_is_not_repeated_either(write, text):
    refused(write(text))


def test_a_key_in_an_override_is_refused_and_not_repeated():
    environ = {"IMAGEWATCH_FOLDERS__ROOT": "/srv/iw", "IMAGEWATCH_ENDPOINT__API_KEY": SECRET}
    assert "put the key in a file" in problems(None, environ)["IMAGEWATCH_ENDPOINT__API_KEY"]


def test_a_printed_configuration_holds_no_key(write):
    loaded = load(write(ROOT), {"LETTA_API_KEY": SECRET})
    assert SECRET not in repr(loaded)
    assert SECRET not in str(msgspec.to_builtins(loaded))


# --- the environment


def test_the_environment_alone_is_enough():
    environ = {"IMAGEWATCH_FOLDERS__ROOT": "/srv/iw", "IMAGEWATCH_limits__Concurrency": "2"}
    loaded = load(None, environ)
    assert loaded.folders.inbox == "/srv/iw/inbox"
    assert loaded.limits.concurrency == 2


def test_the_environment_wins_over_the_file(write):
    path = write(ROOT + "[limits]\nconcurrency = 8\nmax_n = 2\n")
    loaded = load(path, {"IMAGEWATCH_LIMITS__CONCURRENCY": "2"})
    assert (loaded.limits.concurrency, loaded.limits.max_n) == (2, 2)


@pytest.mark.parametrize(("section", "key"), [(s, k) for s, table in SAMPLES.items() for k in table])
def test_a_variable_means_the_same_as_the_file(write, section, key):
    value = SAMPLES[section][key]
    plain = ROOT if section != "folders" else ROOT + tomli_w.dumps({key: value})
    text = plain if section == "folders" else ROOT + f"[{section}]\n" + tomli_w.dumps({key: value})
    spelt = value if isinstance(value, str) else tomli_w.dumps({"v": value}).partition("=")[2].strip()
    variable = f"IMAGEWATCH_{section.replace('.', '__')}__{key}".upper()
    by_file = load(write(text), {})
    by_variable = load(write(ROOT), {variable: spelt})
    assert without_source(by_file) == without_source(by_variable)
    assert without_source(by_file) != without_source(load(write(ROOT), {}))


def test_the_samples_hold_every_key():
    for section, struct in STRUCTS.items():
        assert set(SAMPLES[section]) >= set(struct.__struct_fields__) - {"root", "inbox", "outbox"}


@settings(max_examples=50)
@given(
    limits=st.fixed_dictionaries(
        {},
        optional={
            "concurrency": st.integers(1, 64),
            "credits_per_day": st.floats(0, 1e9),
            "models": st.lists(st.text(st.characters(min_codepoint=32, codec="ascii"), min_size=1), max_size=3),
            "providers": st.lists(st.sampled_from(["flux", "gemini", "openai"]), max_size=3),
        },
    ),
    model=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), min_size=1, max_size=50),
)
def test_any_value_means_the_same_in_a_variable(tmp_path_factory, limits, model):
    path = tmp_path_factory.mktemp("c") / "c.toml"
    tables = {"folders": {"root": "/srv/iw"}, "limits": limits, "defaults": {"model": model}}
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    environ = {"IMAGEWATCH_FOLDERS__ROOT": "/srv/iw", "IMAGEWATCH_DEFAULTS__MODEL": model}
    for key, value in limits.items():
        spelt = tomli_w.dumps({"v": value}).partition("=")[2].strip()
        environ[f"IMAGEWATCH_LIMITS__{key.upper()}"] = spelt
    assert without_source(load(str(path), {})) == without_source(load(None, environ))


def test_text_in_a_variable_needs_no_quotes_and_is_not_read_as_a_number():
    environ = {
        "IMAGEWATCH_FOLDERS__ROOT": "/srv/iw",
        "IMAGEWATCH_DEFAULTS__MODEL": "4.5",
        "IMAGEWATCH_OUTBOX__FILE_MODE": "640",
        "IMAGEWATCH_OUTBOX__GROUP": "true",
        "IMAGEWATCH_ENDPOINT__API_KEY_COMMAND": "true",
    }
    loaded = load(None, environ)
    assert loaded.defaults.model == "4.5"
    assert loaded.outbox == schema.Outbox(file_mode=0o640, group="true")
    assert loaded.endpoint.api_key_command == ("true",)


def test_a_variable_reaches_a_preset_of_the_file_in_its_own_spelling(write):
    path = write(ROOT + "[presets.Draft__2]\nn = 2\n")
    loaded = load(path, {"IMAGEWATCH_PRESETS__DRAFT__2__QUALITY": "low", "IMAGEWATCH_PRESETS__NEW__N": "3"})
    assert loaded.presets == {"Draft__2": Options(n=2, quality="low"), "new": Options(n=3)}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("IMAGEWATCH_LIMIT__CONCURRENCY", "2", '"limits"'),
        ("IMAGEWATCH_LIMITS__CONCURENCY", "2", "IMAGEWATCH_LIMITS__CONCURRENCY"),
        ("IMAGEWATCH_LIMITS__CONCURRENCY", "many", "must be a whole number, not 'many'"),
        ("IMAGEWATCH_LIMITS__CONCURRENCY", "2\nmax_n = 1", "must be a whole number"),
        ("IMAGEWATCH_LIMITS__CREDITS_PER_DAY", "nan", "finite"),
        ("IMAGEWATCH_PRESETS__DRAFT", "1", "names no key"),
        ("IMAGEWATCH_PRESETS__DRAFT__SEEDS", "1", "IMAGEWATCH_PRESETS__DRAFT__SEED"),
        ("IMAGEWATCH_PRESETS__.A__SEED", "1", "name"),
        ("IMAGEWATCH_RETRY__MAX_SECONDS", "0.5", "initial_seconds"),
        ("IMAGEWATCH_FOLDERS__OUTBOX", "/srv/iw/inbox", "same folder"),
        ("IMAGEWATCH_DEFAULTS__MODEL", "\udcff", "UTF-8"),
        ("IMAGEWATCH____", "x", "unknown section"),
    ],
)
def test_a_faulty_variable_is_named(write, variable, value, words):
    (problem,) = refused(write(ROOT), {variable: value}).problems
    assert words in f"{problem.reason} {problem.hint}"
    assert problem.field in (variable, "presets..a")


def test_two_variables_for_one_key_are_a_problem(write):
    environ = {"IMAGEWATCH_LIMITS__MAX_N": "1", "IMAGEWATCH_LIMITS__max_n": "2"}
    assert "IMAGEWATCH_LIMITS__MAX_N" in problems(write(ROOT), environ)["IMAGEWATCH_LIMITS__max_n"]


def test_other_variables_are_left_alone(write):
    environ = {"IMAGEWATCH_CONFIG": "/x", "IMAGEWATCH_DEBUG": "1", "OTHER__THING": "2"}
    load(write(ROOT), environ)


# --- finding the file


def test_the_file_is_searched_in_order(tmp_path):
    here, home = tmp_path / "here", tmp_path / "home"
    (home / ".config/imagewatch").mkdir(parents=True)
    here.mkdir()
    environ = {"HOME": str(home)}
    system = "/etc/imagewatch/config.toml" if os.path.lexists("/etc/imagewatch/config.toml") else None
    assert find(None, environ, str(here)) == system
    (home / ".config/imagewatch/config.toml").touch()
    assert find(None, environ, str(here)) == str(home / ".config/imagewatch/config.toml")
    xdg = tmp_path / "xdg"
    (xdg / "imagewatch").mkdir(parents=True)
    (xdg / "imagewatch/config.toml").touch()
    environ["XDG_CONFIG_HOME"] = str(xdg)
    assert find(None, environ, str(here)) == str(xdg / "imagewatch/config.toml")
    (here / "imagewatch.toml").touch()
    assert find(None, environ, str(here)) == str(here / "imagewatch.toml")
    environ["IMAGEWATCH_CONFIG"] = "named.toml"
    assert find(None, environ, str(here)) == str(here / "named.toml")
    assert find("/other.toml", environ, str(here)) == "/other.toml"


def test_a_file_that_is_named_need_not_exist_until_it_is_loaded(tmp_path):
    path = find("none.toml", {}, str(tmp_path))
    assert path == str(tmp_path / "none.toml")
    refused(path)


def test_an_empty_variable_names_no_file(tmp_path):
    (tmp_path / "imagewatch.toml").touch()
    assert find(None, {"IMAGEWATCH_CONFIG": ""}, str(tmp_path)) == str(tmp_path / "imagewatch.toml")


def test_a_dangling_link_is_a_mistake_and_not_skipped(tmp_path):
    (tmp_path / "imagewatch.toml").symlink_to("gone")
    assert find(None, {}, str(tmp_path)) == str(tmp_path / "imagewatch.toml")


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
ASKED = """
import os, sys
from imagewatch.config.locate import find
from imagewatch.system.errors import ConfigError
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[1]))
try:
    print(find(None, {}, sys.argv[3]))
except ConfigError as error:
    print(error)
"""


def found_by(user: int, group: int, folder: Path) -> str:
    """What a user finds in a folder, or reads in a message."""
    command = [sys.executable, "-c", ASKED, str(user), str(group), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, check=True).stdout.strip()


@as_root
def test_a_file_of_another_user_in_the_current_folder_is_not_used_unless_it_is_named(tmp_path):
    file = tmp_path / "imagewatch.toml"
    file.touch()
    os.chown(file, 12345, 12345)
    with pytest.raises(ConfigError) as caught:
        find(None, {}, str(tmp_path))
    (problem,) = caught.value.problems
    assert (problem.field, caught.value.source) == ("imagewatch.toml", str(file))
    assert "belongs to another user" in problem.reason
    assert "name it with --config if you trust it" in problem.hint
    assert find("imagewatch.toml", {}, str(tmp_path)) == str(file)
    assert find(None, {"IMAGEWATCH_CONFIG": "imagewatch.toml"}, str(tmp_path)) == str(file)


@as_root
def test_neither_another_users_folder_nor_another_users_link_leads_to_a_configuration(open_path):
    theirs, mine = open_path / "theirs", open_path / "mine"
    for folder in (theirs, mine):
        folder.mkdir()
        (folder / "imagewatch.toml").touch()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(ConfigError, match=f"its folder {theirs} belongs to another user"):
        find(None, {}, str(theirs))
    shared = open_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "imagewatch.toml").symlink_to(mine / "imagewatch.toml")
    assert find(None, {}, str(shared)) == str(shared / "imagewatch.toml")
    os.chown(shared / "imagewatch.toml", 12345, 12345, follow_symlinks=False)
    with pytest.raises(ConfigError, match="belongs to another user"):
        find(None, {}, str(shared))
    (mine / "link").mkdir()
    (mine / "link/imagewatch.toml").symlink_to(theirs / "imagewatch.toml")
    with pytest.raises(ConfigError, match=r"its folder .*theirs belongs to another user"):
        find(None, {}, str(mine / "link"))


@pytest.mark.parametrize(
    ("file_mode", "folder_mode", "problem"),
    [
        (0o600, 0o700, ""),
        (0o644, 0o755, ""),
        (0o644, 0o1777, ""),
        (0o646, 0o755, "it may be written by all users"),
        (0o666, 0o1777, "it may be written by all users"),
        (0o644, 0o757, "its folder"),
    ],
)
def test_a_file_that_others_may_write_or_replace_is_not_used(tmp_path, file_mode, folder_mode, problem):
    folder = tmp_path / "here"
    folder.mkdir()
    file = folder / "imagewatch.toml"
    file.touch()
    file.chmod(file_mode)
    folder.chmod(folder_mode)
    if problem:
        with pytest.raises(ConfigError, match=problem):
            find(None, {}, str(folder))
    else:
        assert find(None, {}, str(folder)) == str(file)


@as_root
def test_a_group_may_write_the_file_only_if_it_is_the_users_own(open_path):
    bin_ = pwd.getpwnam("bin")  # of those that every system has: its group has its name, and no one else is in it
    folder = open_path / "here"
    folder.mkdir()
    file = folder / "imagewatch.toml"
    file.touch()
    for place, mode in ((folder, 0o775), (file, 0o664)):
        os.chown(place, bin_.pw_uid, bin_.pw_gid)
        place.chmod(mode)
    assert found_by(bin_.pw_uid, bin_.pw_gid, folder) == str(file), "as made with the umask 002"
    os.chown(file, bin_.pw_uid, 12345)
    assert "it may be written by its group" in found_by(bin_.pw_uid, bin_.pw_gid, folder)
    os.chown(file, 0, 0)
    os.chown(folder, 0, 0)
    file.chmod(0o664)
    with pytest.raises(ConfigError, match="it may be written by its group"):
        find(None, {}, str(folder))


# --- the example


def uncommented(marks: str) -> dict:
    return tomllib.loads(re.sub(rf"^{marks} (?=\[|[a-z_]+ = )", "", example(), flags=re.MULTILINE))


def test_the_example_is_a_configuration(write):
    loaded = load(write(example()), {})
    assert loaded.folders.inbox == "/srv/imagewatch/inbox"


def test_the_example_shows_the_defaults(write):
    as_shipped = load(write(example()), {})
    spelt_out = load(write(tomli_w.dumps(uncommented("#"))), {})
    assert as_shipped == spelt_out == Config(folders=as_shipped.folders, source=as_shipped.source)


def test_the_example_has_every_key_once_and_nothing_unknown(write):
    full = uncommented("##?")
    for section, struct in STRUCTS.items():
        assert set(full.pop(section)) == set(struct.__struct_fields__), section
    assert set(full) == {"presets", "budgets"}
    assert set(full["budgets"]["anna"]) == set(schema.FolderBudget.__struct_fields__)
    load(write(tomli_w.dumps(uncommented("##?"))), {})


def test_keys_without_a_default_are_the_ones_marked_twice():
    shown = uncommented("#")
    for section, struct in STRUCTS.items():
        empty = {
            field.name
            for field in msgspec.structs.fields(struct)
            if field.default is None or field.name in ("api_key_command", "command", "state", "database", "instance")
        }
        if section == "defaults":
            empty.remove("provider")
        assert set(shown[section]) == set(struct.__struct_fields__) - empty, section


def test_each_key_of_the_example_has_a_line_on_it():
    lines = example().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"(# |## )?[a-z_]+ = ", line) and not before.startswith("## ["):
            assert re.match(r"# [^=]*$", before) or before.startswith(("## provider", "## credits")), line
        assert len(line) <= 120


def test_a_lost_example_is_reported_and_no_crash(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from imagewatch.config import example\n"
        "from imagewatch.system import errors\n"
        "try: example.example()\n"
        "except errors.ConfigError as error: print(error)\n"
    )
    package = tmp_path / "imagewatch"
    shutil.copytree(Path(imagewatch.__file__).parent, package)
    run = [sys.executable, "-c", code]
    assert "missing" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
    (package / "config.example.toml").write_text("# packaged\n")
    code = code.replace("example.example()", "print(example.example())")
    run = [sys.executable, "-c", code]
    assert "# packaged" in subprocess.run(run, capture_output=True, text=True, check=True).stdout


# --- anything at all

KEYS = sorted({key for struct in STRUCTS.values() for key in struct.__struct_fields__})
SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-5, 70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["auto", "flux", "delete", "~", "~x/y", "/", "0640", "http://[", "https://a/v1", "\0", "'"]),
    st.dates(),
    st.datetimes(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "x", ""]), inner, max_size=3),
    max_leaves=5,
)
TABLES = st.dictionaries(
    st.sampled_from([*STRUCTS, "presets", "folder", "a.b", ""]),
    st.one_of(VALUES, st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), VALUES, max_size=6)),
    max_size=6,
)


@given(table=TABLES, environ=st.dictionaries(st.sampled_from(KEYS), st.text(max_size=20), max_size=4))
def test_no_table_raises_anything_but_a_config_error(tmp_path_factory, table, environ):
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8", errors="surrogatepass")
    homes = {key: struct for struct, one in STRUCTS.items() for key in one.__struct_fields__}
    variables = {f"IMAGEWATCH_{homes[key]}__{key}".upper(): value for key, value in environ.items()}
    with contextlib.suppress(ConfigError):
        assert os.path.isabs(load(str(path), variables).folders.inbox)
        return
    with pytest.raises(ConfigError) as caught:
        load(str(path), variables)
    assert caught.value.problems
    assert all(problem.field.isprintable() for problem in caught.value.problems)


@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
)
def test_no_bytes_raise_anything_but_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load(str(path), {})


@given(environ=st.dictionaries(st.text(max_size=12).map(lambda text: f"IMAGEWATCH_{text}"), st.text(max_size=12)))
def test_no_variable_raises_anything_but_a_config_error(environ):
    with pytest.raises(ConfigError):
        load(None, environ | {"IMAGEWATCH_FOLDERS__ROOT": "\0"})


# What is there twice


@pytest.mark.parametrize(
    ("header", "where"),
    [
        ("[limits]", "it is in line 4 already: put the keys there"),
        ("[limits]  # caps", "it is in line 4 already: put the keys there"),
        ("[ limits ]", "it is in the file already: put the keys there"),
    ],
)
def test_a_section_that_is_pasted_a_second_time_is_named_with_the_line_of_the_first(tmp_path, header, where):
    file = tmp_path / "imagewatch.toml"
    file.write_text(f"{ROOT}\n[limits]\n# credits_per_day = 0.0\n\n{header}\ncredits_per_day = 9\n")
    with pytest.raises(ConfigError) as raised:
        load(str(file), {})
    (problem,) = raised.value.problems
    shown = header.partition("#")[0].strip()
    assert (problem.reason, problem.hint) == (f"{shown} is there twice (at line 7)", where)


def test_a_key_that_is_there_twice_is_reported_as_such(tmp_path):
    file = tmp_path / "imagewatch.toml"
    file.write_text(f"{ROOT}[limits]\nburst = 1\nburst = 2\n[log]\n")
    with pytest.raises(ConfigError) as raised:
        load(str(file), {})
    (problem,) = raised.value.problems
    assert problem.reason.startswith("a key is there twice: ")
    assert problem.hint == "keep one of them"
