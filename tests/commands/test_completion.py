"""Completion in shells, and the manual page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from support.pages import page

from imagewatch.commands.main import COMMANDS, load_command

ROOT = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).with_name("imagewatch")
PAGE = ROOT / "man/imagewatch.1"
ENVIRON = {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}

COMPLETE = {
    "bash": """
        eval "$(_IMAGEWATCH_COMPLETE=bash_source imagewatch)"
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _imagewatch_completion imagewatch
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": """
        _IMAGEWATCH_COMPLETE=fish_source imagewatch | source
        complete -C (string join ' ' -- $argv) | string split -f1 \\t
    """,
    "zsh": """
        compadd() { print -l -- $completions }
        _describe() { print -l -- ${completions_with_descriptions%%:*} }
        compdef() { : }
        eval "$(_IMAGEWATCH_COMPLETE=zsh_source imagewatch)"
        words=("$@") CURRENT=$#
        _imagewatch_completion
    """,
}


@pytest.fixture(params=sorted(COMPLETE))
def complete(request, tmp_path):
    """The completions that a shell offers for the last word."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")

    def run(*words: str) -> set[str]:
        options = ["--norc", "--noprofile"] if shell == "bash" else ["-f"] if shell == "zsh" else ["--no-config"]
        before = [] if shell == "fish" else ["-"]
        done = subprocess.run(
            [shell, *options, "-c", COMPLETE[shell], *before, *words],
            env={**ENVIRON, "HOME": str(tmp_path)},  # fish creates its folders there
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        return set(done.stdout.split())

    return run


def test_the_shell_completes_commands(complete):
    assert complete("imagewatch", "") >= set(COMMANDS)
    assert complete("imagewatch", "su") == {"submit"}


def test_the_shell_completes_options_and_their_values(complete):
    offered = {name for part in load_command("submit").params if isinstance(part, click.Option) for name in part.opts}
    assert complete("imagewatch", "submit", "--") >= {name for name in offered if name.startswith("--")}
    assert complete("imagewatch", "submit", "--provider", "") == {"auto", "flux", "gemini", "openai"}


@pytest.mark.slow
@pytest.mark.parametrize("shell", sorted(COMPLETE))
def test_the_documented_lines_for_shells_work(shell):
    line = f"imagewatch completion {shell}"
    assert line in page("howto/install")
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    done = subprocess.run(["sh", "-c", line], env=ENVIRON, capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "imagewatch" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shell", sorted(COMPLETE))
def test_the_printed_script_is_that_of_click(shell):
    """After a change of click: write its script into ``completions/`` again, with the line that says so."""
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    line = f"_IMAGEWATCH_COMPLETE={shell}_source imagewatch"
    printed = subprocess.run([PROGRAM, "completion", shell], env=ENVIRON, capture_output=True, text=True, check=True)
    done = subprocess.run(["sh", "-c", line], env=ENVIRON, capture_output=True, text=True, check=True)
    assert printed.stdout.replace(f"# Written by click: {line}\n", "").strip() == done.stdout.strip()


def test_the_manual_page_matches_the_commands():
    """After a change of commands or options: ``make man``."""
    done = subprocess.run([sys.executable, ROOT / "man/make.py"], capture_output=True, text=True, check=True)
    assert done.stdout == PAGE.read_text()
    commands = {name: load_command(name) for name in COMMANDS}
    groups = {name: one for name, one in commands.items() if isinstance(one, click.Group)}
    assert set(groups) == {"db", "hosts", "service"}
    commands |= {f"{name} {inner}": one.commands[inner] for name, one in groups.items() for inner in one.commands}
    for name, one in commands.items():
        start = rf'^\.SS "imagewatch {name} \[OPTIONS\]'
        (section,) = re.findall(rf"{start}.*?(?=^\.S)", done.stdout, re.MULTILINE | re.DOTALL)
        for part in one.params:
            if isinstance(part, click.Option) and part.name != "path":
                assert part.opts[-1].replace("-", "\\-") in section


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_the_manual_page_is_shown_without_warnings():
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", PAGE],
        env={**ENVIRON, "MANWIDTH": "80", "MANPAGER": "cat", "MAN_KEEP_FORMATTING": ""},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "imagewatch submit [OPTIONS] [PROMPT]…" in done.stdout
    assert "--output-format png|jpeg|webp" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
