"""Where the key comes from, and that it is never shown."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import time
import traceback

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imagewatch.config.key import Key, key_file_problem, key_source, key_step, read_key
from imagewatch.config.schema import Endpoint
from imagewatch.system.errors import ConfigError

SECRET = "sk-let-VERYSECRETvalue0123456789=="


def python(code: str) -> Endpoint:
    return Endpoint(api_key_command=(sys.executable, "-c", code))


def refused(endpoint: Endpoint, environ: dict[str, str] | None = None, timeout: float = 30.0) -> str:
    with pytest.raises(ConfigError) as caught:
        read_key(endpoint, environ or {}, command_timeout=timeout)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.problems)
    assert SECRET not in shown
    (problem,) = caught.value.problems
    assert problem.hint
    return str(problem)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"  {SECRET}\r\n")
    path.chmod(0o600)
    return str(path)


# --- the value


def test_a_key_is_revealed_on_demand_only():
    key = Key(SECRET)
    assert key.reveal() == SECRET
    for shown in (repr(key), str(key), f"{key}", f"{key!a}", "%s" % key, repr([key]), repr({"key": key})):  # noqa: UP031
        assert SECRET not in shown
        assert "Key(***)" in shown
    assert not hasattr(key, "__dict__")


def test_a_key_cannot_be_serialized_by_accident():
    for write in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError) as caught:
            write(Key(SECRET))
        assert SECRET not in str(caught.value)


def test_keys_can_be_compared_to_notice_a_new_one():
    assert Key("a") == Key("a")
    assert Key("a") != Key("b")
    assert Key("a") != "a"
    assert len({Key("a"), Key("a"), Key("b")}) == 2


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=8), st.text(), st.text())
@example('quo"te\\and/slash', "", "")
def test_a_masked_text_does_not_hold_the_key(value, before, after):
    masked = Key(value).mask(f"{before}{value}{after}")
    assert value not in masked or value in f"{before}***{after}"
    assert "***" in masked
    assert Key(value).secret.content(f"{before}{value}{after}".encode()) == masked.encode()


def test_the_rest_of_a_masked_text_stays():
    assert Key(SECRET).mask(f"Bearer {SECRET}, sorry {SECRET}") == "Bearer ***, sorry ***"
    assert Key(SECRET).mask("nothing here") == "nothing here"
    assert Key("").mask("nothing here") == "nothing here"


def test_a_key_escaped_for_json_or_a_url_is_masked_too():
    assert Key('a"b/c=d').mask('{"k": "a\\"b/c=d"} ?k=a%22b%2Fc%3Dd ?k=a%22b/c%3Dd') == '{"k": "***"} ?k=*** ?k=***'


# --- the order


def test_the_first_source_that_is_set_wins(tmp_path, key_file):
    (tmp_path / "letta_api_key").write_text("from-credential")
    environ = {"LETTA_API_KEY": "from-variable"}
    with_credential = environ | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    both = Endpoint(api_key_file=key_file, api_key_command=(sys.executable, "-c", "print('from-command')"))
    assert read_key(Endpoint(), environ).reveal() == "from-variable"
    assert read_key(Endpoint(), with_credential).reveal() == "from-credential"
    assert read_key(Endpoint(api_key_file=key_file), with_credential).reveal() == SECRET
    assert read_key(both, with_credential).reveal() == "from-command"
    assert key_source(Endpoint(), environ) == "environment variable LETTA_API_KEY"
    assert key_source(Endpoint(), with_credential) == "systemd credential letta_api_key"
    assert key_source(Endpoint(api_key_file=key_file), with_credential) == f"api_key_file {key_file}"
    assert key_source(both, with_credential) == f"api_key_command {sys.executable}"


def test_a_source_that_fails_is_an_error_and_the_others_are_not_tried(tmp_path, key_file):
    environ = {"LETTA_API_KEY": SECRET}
    assert "api_key_file" in refused(Endpoint(api_key_file=str(tmp_path / "none")), environ)
    broken = Endpoint(api_key_command=("/no/such/program",), api_key_file=key_file)
    assert "api_key_command" in refused(broken, environ)
    (tmp_path / "letta_api_key").mkdir()
    assert "credential" in refused(Endpoint(), environ | {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert "empty" in refused(Endpoint(), {"LETTA_API_KEY": "  "})


def test_the_next_step_for_a_rejected_key_is_the_one_of_its_source(tmp_path, key_file):
    (tmp_path / "letta_api_key").write_text(SECRET)
    credentials = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert key_step(Endpoint(api_key_command=("pass",)), {}).startswith("make api_key_command print a valid key; ")
    assert key_step(Endpoint(api_key_file=key_file), {}).startswith(f"replace the key in {key_file}; ")
    assert key_step(Endpoint(), credentials).endswith("credential letta_api_key, then restart the service")
    variable = {"LETTA_API_KEY": SECRET}
    assert key_step(Endpoint(), variable) == "set LETTA_API_KEY to a valid key and restart the daemon"
    assert "if the daemon is running, restart it" in key_step(Endpoint(), {})


def test_no_source_at_all_lists_the_four_ways():
    for environ in ({}, {"LETTA_API_KEY": ""}, {"CREDENTIALS_DIRECTORY": "/nowhere"}):
        shown = refused(Endpoint(), environ)
        for way in ("api_key_command", "api_key_file", "letta_api_key", "LETTA_API_KEY"):
            assert way in shown
        assert key_source(Endpoint(), environ) == ""


def test_the_source_of_a_command_shows_no_argument_and_nothing_that_is_no_program():
    assert SECRET not in key_source(Endpoint(api_key_command=(sys.executable, SECRET)), {})
    assert key_source(Endpoint(api_key_command=(SECRET,)), {}) == "api_key_command"
    refused(Endpoint(api_key_command=(SECRET,)))


# --- the value's form


@pytest.mark.parametrize("value", ["", " \n", f"{SECRET} x", f"{SECRET}\nsecond", f"{SECRET}é", f"\x00{SECRET}"])
def test_what_is_not_one_printable_word_is_refused_and_not_repeated(tmp_path, value):
    path = tmp_path / "key"
    path.write_bytes(value.encode())
    assert "the key alone" in refused(Endpoint(api_key_file=str(path)))


@given(st.text(st.characters(exclude_categories=[]), max_size=30))
@example("key\udcff")
def test_a_variable_gives_exactly_its_key_or_is_refused(value):
    word = value.strip(" \t\n\r\x0b\x0c")
    if word and all("\x21" <= character <= "\x7e" for character in word):
        assert read_key(Endpoint(), {"LETTA_API_KEY": value}).reveal() == word
    else:
        with pytest.raises(ConfigError):
            read_key(Endpoint(), {"LETTA_API_KEY": value})


# --- files


def test_a_key_file_that_is_none_is_refused(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    large = tmp_path / "large"
    large.write_text("k" * (64 * 1024 + 1))
    assert "regular" in refused(Endpoint(api_key_file=str(fifo)))
    assert "regular" in refused(Endpoint(api_key_file=str(tmp_path)))
    assert "64 KiB" in refused(Endpoint(api_key_file=str(large)))
    assert "regular" in refused(Endpoint(api_key_file="/dev/null"))
    assert "not a file name" in refused(Endpoint(api_key_file="/tmp/a\0b"))


def test_reading_a_key_leaves_nothing_open(tmp_path, key_file):
    before = os.listdir("/proc/self/fd")
    read_key(Endpoint(api_key_file=key_file), {})
    read_key(python("print('k')"), {})
    refused(Endpoint(api_key_file=str(tmp_path)))
    refused(python("import sys; sys.exit(1)"))
    assert os.listdir("/proc/self/fd") == before


def test_a_key_file_may_be_a_link(tmp_path, key_file):
    (tmp_path / "link").symlink_to(key_file)
    assert read_key(Endpoint(api_key_file=str(tmp_path / "link")), {}).reveal() == SECRET


@pytest.mark.parametrize(("mode", "fine"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)])
def test_a_key_file_that_others_can_read_is_worth_a_warning(key_file, mode, fine):
    os.chmod(key_file, mode)
    warning = key_file_problem(key_file)
    assert (warning == "") is fine
    if not fine:
        assert key_file in warning
        assert f"{mode:04o}" in warning
        assert "chmod 600" in warning


def test_a_missing_key_file_is_not_a_matter_of_permissions(tmp_path):
    assert key_file_problem(str(tmp_path / "none")) == ""


# --- commands


def test_a_command_has_no_shell_and_no_input(tmp_path):
    echo = python("import sys; print(sys.argv[1] + sys.stdin.read())")
    odd = Endpoint(api_key_command=(*echo.api_key_command, "$HOME;`id`"))
    assert read_key(odd, {"HOME": "/x"}).reveal() == "$HOME;`id`"


def test_a_command_has_the_environment_that_was_given():
    code = "import os; print(os.environ['VAULT'])"
    assert read_key(python(code), {"VAULT": "v1"}).reveal() == "v1"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import sys; sys.exit('first\\nlocked: \\x1b[31mno')", r"locked: \x1b[31mno"),
        ("pass", "empty"),
        ("import sys\nwhile True: sys.stdout.write('y' * 4096)", "64 KiB"),
    ],
)
def test_a_command_that_fails_is_reported_with_its_own_message(code, words):
    shown = refused(python(code))
    assert words in shown
    assert shown.isprintable()


def test_the_message_of_a_command_is_cut():
    shown = refused(python("import sys; sys.exit('x' * 100_000)"))
    assert "x" * 200 in shown
    assert "x" * 201 not in shown


def test_a_command_that_fails_with_the_key_in_both_outputs_does_not_give_it_away():
    code = f"import sys; print({SECRET!r}); sys.exit('cannot store ' + {SECRET!r})"
    assert "cannot store ***" in refused(python(code))


def test_a_command_that_cannot_be_started_is_refused(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("no program")
    assert "No such file" in refused(Endpoint(api_key_command=("/no/such/program",)))
    assert "Permission denied" in refused(Endpoint(api_key_command=(str(plain),)))
    plain.chmod(0o700)
    assert "cannot be started" in refused(Endpoint(api_key_command=(str(plain),)))
    assert "cannot be started" in refused(Endpoint(api_key_command=("a\0b",)))


@pytest.mark.parametrize(
    "code",
    [
        "import signal; print('early', flush=True); signal.pause()",
        "import os, signal; os.close(1); os.close(2); signal.pause()",
        "import os, signal; os.fork(); signal.pause()",
    ],
)
def test_a_command_that_does_not_end_is_ended(code):
    begin = time.monotonic()
    assert "did not end in time" in refused(python(code), timeout=0.5)
    assert time.monotonic() - begin < 20


def test_a_child_that_keeps_the_outputs_open_is_not_waited_for():
    code = "import os, signal\nif os.fork(): print('key-of-parent', flush=True)\nelse: signal.alarm(20); signal.pause()"
    begin = time.monotonic()
    assert read_key(python(code), {}).reveal() == "key-of-parent"
    assert time.monotonic() - begin < 15


# --- in a container


def test_in_a_container_the_next_step_names_the_file_to_mount(monkeypatch):
    environ = {"CREDENTIALS_DIRECTORY": "/run/secrets"}
    assert "mount a file with the key at /run/secrets/letta_api_key" in refused(Endpoint(), environ)
    assert key_step(Endpoint(), environ) == (
        "mount a file with the key at /run/secrets/letta_api_key, then start a new container"
    )
    assert "LoadCredential" in key_step(Endpoint(), {"CREDENTIALS_DIRECTORY": "/run/credentials/imagewatch.service"})
    monkeypatch.setattr("os.path.lexists", lambda path: path == "/run/secrets/letta_api_key")
    assert key_source(Endpoint(), environ) == "/run/secrets/letta_api_key"
    assert "mounted at /run/secrets/letta_api_key" in key_step(Endpoint(), environ)
