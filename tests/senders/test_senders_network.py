"""Files come over a network protocol: scp, sftp and rsync through a real sshd, SMB through a real smbd."""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.daemon import until
from support.senders import PATIENCE, SLOW, Parcel, Service, pause, pieces, program, run, serving, writers_are_seen

if TYPE_CHECKING:
    from collections.abc import Iterator

SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/client.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
Subsystem sftp internal-sftp
"""
SSH = """
Host inbox
ProxyCommand {sshd} -i -f {folder}/sshd.conf
User {user}
IdentityFile {folder}/client
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
SMB = """
[global]
private dir = {folder}
lock directory = {folder}
state directory = {folder}
cache directory = {folder}
pid directory = {folder}
ncalrpc dir = {folder}/rpc
log file = {folder}/log
disable netbios = yes
interfaces = lo
bind interfaces only = yes
load printers = no
map to guest = Bad User
[inbox]
path = {inbox}
guest ok = yes
read only = no
force user = {user}
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("native")) as service:
        yield service


@pytest.fixture
def parcel(native, tmp_path) -> Parcel:
    return native.parcel(tmp_path)


def prompt_first(parcel: Parcel) -> list[Path]:
    return [parcel.source / name for name in ("cat.prompt.txt", "cat.1.png", "cat.2.jpg", "cat.webp")]


@pytest.fixture
def ssh(tmp_path) -> Iterator[Path]:
    """The configuration of a client whose server is a real sshd at the other end of a pipe."""
    folder = tmp_path / "ssh"
    folder.mkdir()
    words = {"sshd": program("sshd"), "folder": folder, "user": getpass.getuser()}
    for name in ("host", "client"):
        run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", folder / name])
    (folder / "sshd.conf").write_text(SSHD.format(**words))
    (folder / "ssh.conf").write_text(SSH.format(**words))
    with contextlib.ExitStack() as undo:
        chroot = Path("/run/sshd")  # a service manager creates it if sshd is a service
        if os.geteuid() == 0 and not chroot.exists():
            chroot.mkdir()
            undo.callback(chroot.rmdir)
        login = [program("ssh"), "-F", folder / "ssh.conf", "inbox", "true"]
        tried = subprocess.run(login, capture_output=True, text=True, check=False, timeout=PATIENCE)
        if tried.returncode:
            pytest.skip(f"this user cannot log in here: {tried.stderr.strip()}")
        yield folder / "ssh.conf"


def test_scp_over_a_slow_line(parcel, ssh):
    parcel.send(
        lambda: run([program("scp"), "-F", ssh, "-l", "4000", *prompt_first(parcel), f"inbox:{parcel.target}/"])
    )
    parcel.is_completed()


@SLOW
def test_sftp_under_the_final_names(parcel, ssh):
    def put() -> None:
        puts = "".join(f"put {path} {parcel.target}/\n" for path in prompt_first(parcel))
        run([program("sftp"), "-F", ssh, "-l", "4000", "-b", "-", "inbox"], input=puts.encode())

    parcel.send(put)
    parcel.is_completed()


def test_sftp_under_other_names_and_renamed(parcel, ssh):
    def put() -> None:
        files = [(path, parcel.target / path.name) for path in prompt_first(parcel)]
        puts = "".join(f"put {path} {target}.part\n" for path, target in files)
        renames = "".join(f"rename {target}.part {target}\n" for _, target in files)
        run([program("sftp"), "-F", ssh, "-l", "4000", "-b", "-", "inbox"], input=(puts + renames).encode())

    parcel.send(put)
    parcel.is_completed()


def test_rsync_over_ssh(parcel, ssh):
    rsync, client = program("rsync"), program("ssh")
    parcel.send(
        lambda: run(
            [rsync, "-a", "--bwlimit=600", "-e", f"{client} -F {ssh}", f"{parcel.source}/", f"inbox:{parcel.target}/"]
        )
    )
    parcel.is_completed()


@pytest.fixture
def smb(native, tmp_path) -> Iterator[list[str]]:
    """The beginning of a command that connects to a real smbd on this machine, whose share is the inbox."""
    smbd, client = program("smbd"), program("smbclient")
    if os.geteuid() != 0:
        pytest.skip("smbd runs as root only")
    folder = tmp_path / "smb"
    (folder / "rpc").mkdir(parents=True)
    config = folder / "smb.conf"
    config.write_text(SMB.format(folder=folder, inbox=native.folders.inbox, user=getpass.getuser()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        [smbd, "-F", "--no-process-group", "-s", config, "-p", port],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # it ends by a signal to its whole process group
    )
    try:
        command = [client, "//127.0.0.1/inbox", "-s", str(config), "-p", port, "-N"]
        until(lambda: subprocess.run([*command, "-c", "ls"], capture_output=True, check=False).returncode == 0)
        yield command
    finally:
        server.terminate()
        server.communicate(timeout=PATIENCE)


@SLOW
def test_smb_with_the_prompt_first(parcel, smb):
    def put() -> None:
        for path in prompt_first(parcel):
            run([*smb, "-D", parcel.name, "-c", f"put {path} {path.name}"])

    parcel.send(put)
    parcel.is_completed()


@SLOW
def test_smb_from_a_client_that_stalls(parcel, smb, tmp_path):
    writers_are_seen(tmp_path)
    for path in prompt_first(parcel)[:-1]:
        run([*smb, "-D", parcel.name, "-c", f"put {path} {path.name}"])
    command = [*smb, "-D", parcel.name, "-c", "put - cat.webp"]
    content = parcel.files["cat.webp"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, stdout=subprocess.DEVNULL) as sending:
        assert sending.stdin
        sending.stdin.write(content[:100_000])
        until((parcel.target / "cat.webp").exists)
        parcel.is_not_claimed()
        for piece in pieces(content[100_000:]):
            sending.stdin.write(piece)
            pause()
    parcel.is_completed()
