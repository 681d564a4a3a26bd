"""The page about several hosts and its examples fit the program, as far as that shows without a container."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY
from support.pages import page

from imagewatch.commands.main import COMMANDS
from imagewatch.config.load import load
from imagewatch.config.shared import _CREDENTIAL

if TYPE_CHECKING:
    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
PAGE = page("howto/several-hosts")
COMPOSE = ROOT / "examples/compose.shared.yaml"
DROP_IN = ROOT / "examples/systemd-shared.conf"
PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    page = yaml.safe_load(COMPOSE.read_text())
    assert isinstance(page, dict)
    return page


def daemons(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each daemon, with those that the image has."""
    image = dict(re.findall(r"^(?:ENV)? +(\w+)=([/\w.]+) ?\\?$", (ROOT / "Containerfile").read_text(), re.MULTILINE))
    found = {name: one for name, one in compose["services"].items() if name != "postgres"}
    return {name: {**one, "environment": {**image, **one["environment"]}} for name, one in found.items()}


def test_the_configuration_on_the_page_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n# configuration of each daemon\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "config.toml"
    path.write_text(f'[folders]\nroot = "{tmp_path}/watched"\nstate = "{tmp_path}/state"\n{block}')
    shared = load(str(path), {}).shared
    assert {"account": shared.account, "instance": shared.instance, "database": shared.database} == (
        tomllib.loads(block)["shared"]
    )
    assert shared.durability == "replicated"


def test_every_command_on_the_page_exists_with_its_options() -> None:
    found = set(re.findall(r"`imagewatch ([a-z]+)((?: [a-z-]+)*)", PAGE))
    assert {"db", "hosts", "migrate", "once", "release"} == {name for name, _ in found}
    for name, rest in found:
        words = [word for word in rest.split() if word.startswith("--") or name == "db"]
        commands = [word for word in words if not word.startswith("--")]
        done = subprocess.run(
            [sys.executable, "-m", "imagewatch", name, *commands, "--help"], capture_output=True, text=True, check=True
        )
        assert name in COMMANDS
        assert all(word in done.stdout for word in words), (name, words)


def test_the_service_gets_the_password_as_the_credential_that_the_daemon_reads() -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(DROP_IN.read_text())
    assert parser["Service"]["LoadCredential"] == f"{_CREDENTIAL}:/etc/imagewatch/{_CREDENTIAL}"
    assert parser["Unit"]["After"] == "postgresql.service"
    assert f"/etc/imagewatch/{_CREDENTIAL}" in PAGE
    assert "systemd/system/imagewatch.service.d/shared.conf" in PAGE
    assert (ROOT / "systemd/imagewatch.service").exists()


def test_the_daemons_of_the_compose_file_have_valid_settings_and_names_of_their_own(compose: dict[str, Any]) -> None:
    names = []
    for name, daemon in daemons(compose).items():
        config = load(None, daemon["environment"])
        assert (config.folders.root, config.folders.state) == ("/srv/imagewatch", "/var/lib/imagewatch/state")
        assert (config.shared.account, config.shared.durability) == ("main", "single")
        assert "host=postgres " in config.shared.database
        targets = {volume.split(":")[1]: volume.split(":")[0] for volume in daemon["volumes"]}
        assert targets == {"/srv/imagewatch": f"./{name}", "/var/lib/imagewatch": f"state_{name}"}
        names.append(config.shared.instance)
    assert names == ["left", "right", "third"]


def test_what_the_compose_file_names_is_there(compose: dict[str, Any]) -> None:
    services, secrets = compose["services"], compose["secrets"]
    for service in services.values():
        assert set(service.get("secrets", [])) <= set(secrets)
        assert set(service.get("depends_on", {})) <= set(services)
        named = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert {name for name in named if not name.startswith("./")} <= set(compose["volumes"])
    assert {secret["file"] for secret in secrets.values()} == {f"secrets/{name}" for name in secrets}
    assert _CREDENTIAL in secrets
    build = compose["x-daemon"]["build"]
    project = tomllib.loads((COMPOSE.parent / build["context"] / "pyproject.toml").read_text())["project"]
    assert "postgres" in project["optional-dependencies"]
    assert build["args"] == {"REQUIREMENTS": "postgres"}
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).exists()
    assert (ROOT / "requirements/postgres.txt").exists()
    grace = int(compose["x-daemon"]["stop_grace_period"].removesuffix("s"))
    assert f"TimeoutStopSec={grace}\n" in (ROOT / "systemd/imagewatch.service").read_text()


def test_the_tables_and_a_daemon_of_the_compose_file_work_with_a_password_in_the_folder_of_credentials(
    compose: dict[str, Any], tmp_path: Path, own_postgres: Server, sandbox: Sandbox
) -> None:
    own_postgres.user("member", PASSWORD)
    own_postgres.psql("CREATE DATABASE compose OWNER member TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C'")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / _CREDENTIAL).write_text(f"{PASSWORD}\n")
    (secrets / _CREDENTIAL).chmod(0o644)  # as Compose mounts it
    (secrets / "letta_api_key").write_text(KEY)
    environ = {**daemons(compose)["left"]["environment"], "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environ["CREDENTIALS_DIRECTORY"] = str(secrets)
    environ["IMAGEWATCH_FOLDERS__ROOT"] = str(tmp_path / "watched")
    environ["IMAGEWATCH_FOLDERS__STATE"] = str(tmp_path / "state")
    environ["IMAGEWATCH_SHARED__DATABASE"] = f"host=127.0.0.1 port={own_postgres.port} dbname=compose user=member"
    environ["LETTA_BASE_URL"] = sandbox.base_url

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "imagewatch", *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)

    assert re.findall(r"^# +.* run --rm left (.+)$", COMPOSE.read_text(), re.MULTILINE) == ["db init"]
    made = run("db", "init")
    assert (made.returncode, made.stdout) == (0, "The tables were created.\n"), made.stderr
    checked = run("db", "check")
    assert (checked.returncode, checked.stdout) == (0, "ok: the account main; this daemon is left\n")
    (tmp_path / "watched/inbox").mkdir(parents=True)
    (tmp_path / "watched/inbox/cat.prompt.txt").write_text("a cat")
    done = run("once")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "watched/outbox/cat.receipt.toml").exists()
    assert PASSWORD not in made.stderr + checked.stderr + done.stderr + done.stdout
