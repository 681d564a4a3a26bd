"""``imagewatch service``: what it writes, what it refuses, and what it says to do next."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import run_reported

from imagewatch.commands.service_program import HIDDEN

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
PROGRAM = "/opt/imagewatch/bin/imagewatch"
SYSTEM = ["etc/systemd/system/imagewatch.service", "etc/systemd/system/imagewatch@.service"]
SYSTEM += ["etc/sysusers.d/imagewatch.conf", "etc/tmpfiles.d/imagewatch.conf"]


def service(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imagewatch", "service", *map(str, arguments)]
    return run_reported(command, text=True, env={"PATH": os.environ["PATH"], **environ})


def install(top: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return service("install", "--root", top, "--program", PROGRAM, *arguments)


def written(top: Path) -> dict[str, str]:
    return {str(path.relative_to(top)): path.read_text() for path in top.rglob("*") if path.is_file()}


def body(text: str) -> str:
    return text.partition("\n")[2]


# Print


def test_print_shows_each_file_of_the_service_with_its_place():
    done = service("print", "--gallery", "--program", PROGRAM)
    assert done.returncode == 0
    names = re.findall(r"^# /etc/(\S+)$", done.stdout, re.MULTILINE)
    shipped = {path.name for path in UNITS.iterdir() if path.is_file()}
    assert {Path(name).name for name in names if name.startswith("systemd/")} == shipped
    for kind in ("sysusers.d", "tmpfiles.d"):
        assert {name for name in names if name.startswith(kind)} == {
            f"{kind}/{path.name}" for path in (UNITS / kind).iterdir()
        }


@pytest.mark.parametrize(
    "path", [path for path in sorted(UNITS.rglob("*")) if path.is_file() and "user" not in path.parts]
)
def test_print_shows_a_single_file_as_it_was_shipped_if_the_program_is_the_usual_one(path):
    done = service(
        "print", path.name if path.parent == UNITS else f"{path.parent.name}/{path.name}", "--program", PROGRAM
    )
    assert (done.returncode, done.stdout) == (0, path.read_text())


def test_every_unit_starts_the_program_of_this_installation():
    own = os.path.realpath(Path(sys.executable).with_name("imagewatch"))
    for arguments in (["--gallery"], ["--user"]):
        lines = re.findall(r"^ExecStart=(.+)$", service("print", *arguments).stdout, re.MULTILINE)
        assert len(lines) == (4 if "--gallery" in arguments else 1)
        assert all(line.startswith(f"{own} ") for line in lines), lines


@pytest.mark.parametrize(
    ("program", "written"), [("/a b/imagewatch", '"/a b/imagewatch"'), ("/100%/é/imagewatch", "/100%%/é/imagewatch")]
)
def test_a_path_with_special_characters_is_quoted_for_systemd(program, written, tmp_path):
    unit = service("print", "imagewatch.service", "--program", program).stdout
    assert f"ExecStart={written} run " in unit
    if shutil.which("systemd-analyze"):
        (tmp_path / program.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("/bin/true", tmp_path / program.lstrip("/"))
        inside = re.sub(r"(ExecStart=\"?)/", rf"\1{tmp_path}/", re.sub(r"(?m)^(Requires|Documentation).*$", "", unit))
        (tmp_path / "probe.service").write_text(inside)
        command = ["systemd-analyze", "verify", "--man=no", tmp_path / "probe.service"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "not executable" not in done.stderr
        assert "Exec" not in done.stderr


@pytest.mark.parametrize("program", ["imagewatch", "/a/$x/imagewatch", "/a\n/imagewatch", '/a"b', "/a'b", "/a\\b"])
def test_a_path_that_a_unit_cannot_name_is_refused(program):
    done = service("print", "--program", program)
    assert (done.returncode, done.stdout) == (64, "")
    assert "a unit cannot start this program" in done.stderr


def test_an_unknown_file_is_refused():
    done = service("print", "other.service")
    assert (done.returncode, done.stdout) == (64, "")
    assert "there is no such file: other.service" in done.stderr


# Install


def test_install_writes_the_files_that_print_shows(tmp_path):
    done = install(tmp_path)
    found = written(tmp_path)
    assert done.returncode == 0
    assert sorted(found) == sorted(SYSTEM)
    for name in SYSTEM:
        assert body(found[name]) in service("print", "--program", PROGRAM).stdout
        assert f"wrote: {tmp_path / name}\n" in done.stdout


def test_files_and_folders_can_be_read_by_all_whatever_the_umask_is(tmp_path):
    command = [sys.executable, "-m", "imagewatch", "service", "install", "--root", str(tmp_path), "--program", PROGRAM]
    run_reported(["sh", "-c", 'umask 077; exec "$@"', "sh", *command], text=True, env={"PATH": os.environ["PATH"]})
    for name in SYSTEM:
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
        assert (tmp_path / name).parent.stat().st_mode & 0o777 == 0o755


def test_a_second_install_changes_nothing(tmp_path):
    install(tmp_path)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in SYSTEM}
    done = install(tmp_path)
    assert done.returncode == 0
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in SYSTEM} == before
    assert done.stdout.count("unchanged: ") == len(SYSTEM)
    assert "daemon-reload" not in done.stdout


def test_a_file_that_was_copied_from_a_checkout_counts_as_unchanged(tmp_path):
    unit = tmp_path / SYSTEM[0]
    unit.parent.mkdir(parents=True)
    shutil.copy(UNITS / "imagewatch.service", unit)
    done = install(tmp_path)
    assert f"unchanged: {unit}\n" in done.stdout
    assert unit.read_text() == (UNITS / "imagewatch.service").read_text()


def test_a_file_of_another_version_is_replaced_and_named(tmp_path):
    service("install", "--root", tmp_path, "--program", "/opt/earlier/bin/imagewatch")
    done = install(tmp_path)
    assert done.returncode == 0
    assert f"replaced (from another version or installation): {tmp_path / SYSTEM[0]}" in done.stdout
    assert f"ExecStart={PROGRAM} run " in (tmp_path / SYSTEM[0]).read_text()
    assert f"unchanged: {tmp_path / SYSTEM[2]}" in done.stdout
    assert "systemctl daemon-reload" in done.stdout


def test_a_file_that_was_changed_by_hand_is_not_replaced_and_nothing_else_is_written(tmp_path):
    install(tmp_path)
    unit, other = tmp_path / SYSTEM[0], tmp_path / SYSTEM[1]
    unit.write_text(unit.read_text() + "Nice=5\n")
    other.unlink()
    changed = unit.read_text()
    done = install(tmp_path)
    assert done.returncode == 64
    assert f"changed manually, so not replaced: {unit}\n" in done.stderr
    assert "nothing was written" in done.stderr
    assert unit.read_text() == changed
    assert not other.exists()

    shown = install(tmp_path, "--dry-run")
    assert shown.returncode == 64
    assert "\n-Nice=5\n" in shown.stdout

    forced = install(tmp_path, "--force")
    assert forced.returncode == 0
    assert f"replaced (changed manually): {unit}\n" in forced.stdout
    assert "Nice=5" not in unit.read_text()


def test_a_dry_run_writes_nothing_and_shows_differences_and_next_commands(tmp_path):
    done = install(tmp_path, "--dry-run")
    assert done.returncode == 0
    assert written(tmp_path) == {}
    assert f"{tmp_path / SYSTEM[0]}: new\n" in done.stdout
    assert "  systemctl enable --now imagewatch\n" in done.stdout
    service("install", "--root", tmp_path, "--program", "/opt/earlier/bin/imagewatch")
    before = written(tmp_path)
    shown = install(tmp_path, "--dry-run").stdout
    assert "\n-ExecStart=/opt/earlier/bin/imagewatch run --config /etc/imagewatch/config.toml\n" in shown
    assert f"\n+ExecStart={PROGRAM} run --config /etc/imagewatch/config.toml\n" in shown
    assert written(tmp_path) == before


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_link_in_the_place_of_a_file_is_never_replaced(tmp_path, force):
    """As ``systemctl mask`` makes it."""
    unit = tmp_path / SYSTEM[0]
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/dev/null")
    done = install(tmp_path, *force)
    assert done.returncode == 64
    assert "is not a plain file" in done.stderr
    assert "unmask" in done.stderr
    assert unit.is_symlink()
    assert len(written(tmp_path)) == 0


def test_units_of_a_package_are_not_hidden_by_others(tmp_path):
    packaged = tmp_path / "usr/lib/systemd/system/imagewatch.service"
    packaged.parent.mkdir(parents=True)
    packaged.write_text("")
    done = install(tmp_path)
    assert done.returncode == 64
    assert f"a package has installed the service: {packaged}" in done.stderr
    assert not (tmp_path / "etc").exists()


def test_the_next_commands_are_in_the_order_of_the_documented_installation(tmp_path):
    done = install(tmp_path, "--gallery")
    steps = re.findall(r"^  (\S.*)$", done.stdout, re.MULTILINE)
    pages = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    for step in steps:
        command = step.replace(f"{PROGRAM} init", "imagewatch init")
        assert command in pages or command.startswith("systemd-sysusers"), step
    kinds = [
        re.search(r"sysusers imagewatch|tmpfiles| init |letta_api_key|daemon-reload|enable", step) for step in steps
    ]
    order = list(dict.fromkeys(kind[0] for kind in kinds if kind))
    assert order == ["sysusers imagewatch", "tmpfiles", " init ", "letta_api_key", "daemon-reload", "enable"]
    assert any("imagewatch-gallery.timer" in step for step in steps)


def test_the_unit_of_one_person_goes_to_their_own_folder(tmp_path):
    done = service("install", "--user", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [*written(tmp_path)] == [".config/systemd/user/imagewatch.service"]
    assert "systemctl --user enable --now imagewatch" in done.stdout
    assert f"{tmp_path}/.config" not in done.stdout.partition("Next")[2], "in commands, the home folder is ~"
    own = os.path.realpath(Path(sys.executable).with_name("imagewatch"))
    assert (
        f"\nExecStart={own} run --config %E/imagewatch/config.toml\n"
        in (tmp_path / ".config/systemd/user/imagewatch.service").read_text()
    )
    again = service("install", "--user", HOME=str(tmp_path))
    assert again.stdout.startswith("unchanged: ")


@pytest.mark.parametrize("wrong", [["--root", "/nowhere"], ["--gallery"]])
def test_options_that_exclude_each_other_are_refused(wrong):
    assert service("install", "--user", *wrong).returncode == 64


# The program


def test_the_hidden_folders_are_those_of_the_unit():
    unit = (UNITS / "imagewatch.service").read_text()
    assert "\nProtectHome=yes\n" in unit
    assert "\nPrivateTmp=yes\n" in unit
    (line,) = re.findall(r"^TemporaryFileSystem=(.+)$", unit, re.MULTILINE)
    assert {one.removesuffix(":ro") for one in line.split()} == set(HIDDEN["TemporaryFileSystem="])


def test_a_program_that_the_unit_hides_is_refused_with_the_way_out(tmp_path):
    program = tmp_path / "pipx/venvs/imagewatch/bin/imagewatch"
    program.parent.mkdir(parents=True)
    program.write_text("")
    done = service("install", "--program", program)
    assert (done.returncode, done.stdout) == (64, "")
    assert f"the service cannot read {program}: its unit hides /" in done.stderr
    assert "PIPX_HOME=/opt/pipx" in done.stderr
    warned = service("print", "--program", program)
    assert warned.returncode == 0
    assert "warning: the service cannot read" in warned.stderr


IN_A_SYSTEM = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p /opt/imagewatch/bin
cp /bin/true /opt/imagewatch/bin/imagewatch
cd /
{change}
shift
exec "$@"
"""


def in_a_system(change: str, *arguments: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command where ``/opt`` has a program, in mounts of its own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("new mount namespaces are not permitted here")
    command = command or [sys.executable, "-m", "imagewatch", "service", "install", "--program", PROGRAM, *arguments]
    enter = ["unshare", "--mount", "sh", "-c", IN_A_SYSTEM.format(change=change), "sh", ""]
    return run_reported([*enter, *command], text=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    ("change", "message", "step"),
    [
        ("chmod 777 /opt/imagewatch/bin", "all users may write /opt/imagewatch/bin", "chmod go-w /opt/imagewatch/bin"),
        ("chgrp 54321 /opt; chmod 775 /opt", "its group may write /opt", "chmod go-w /opt"),
        ("chown 54321 /opt/imagewatch", "user number 54321 owns /opt/imagewatch", "chown root /opt/imagewatch"),
        ("chmod 700 /opt/imagewatch", "the user imagewatch cannot read", "chmod o+x /opt/imagewatch"),
        ("chmod 700 /opt/imagewatch/bin/imagewatch", "has mode 0700", "chmod o+r /opt/imagewatch/bin/imagewatch"),
        (
            "mv /opt/imagewatch /opt/real; chmod 777 /opt/real; ln -s real /opt/imagewatch",
            "all users may write /opt/real",
            "chmod go-w /opt/real",
        ),
        (
            "mount -t tmpfs tmpfs /srv; mv /opt/imagewatch /srv/x; ln -s /srv/x /opt/imagewatch",
            "its unit hides /srv (TemporaryFileSystem=)",
            "/opt/imagewatch/bin/pip install imagewatch",
        ),
        ("rm /opt/imagewatch/bin/imagewatch", "there is no such program", "--program"),
    ],
)
def test_a_program_that_others_may_change_or_the_service_cannot_read_is_refused(change, message, step):
    done = in_a_system(change, "--dry-run")
    assert (done.returncode, done.stdout) == (64, "")
    assert message in done.stderr
    assert step in done.stderr


def test_a_program_of_root_that_all_may_read_is_accepted():
    done = in_a_system("", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "etc/systemd/system/imagewatch.service: new" in done.stdout or "unchanged" in done.stdout


AS_ANOTHER_USER = """\
import os, sys
import imagewatch.commands.service
from imagewatch.commands.main import main
os.setuid(54321)
main()
"""


def test_only_root_installs_a_service_of_the_system():
    arguments = ["service", "install", "--program", PROGRAM]
    done = in_a_system("", command=[sys.executable, "-c", AS_ANOTHER_USER, *arguments])
    assert (done.returncode, done.stdout) == (64, "")
    assert f"only root can install a service of the system\n  run: sudo {PROGRAM} service install" in done.stderr
