"""The skill for agents: its format, the queries it is for, and that it is installed with the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import skills_ref
from support.daemon import run_reported

import imagewatch
from imagewatch.commands.main import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "imagewatch/skills/imagewatch"
TEXT = (FOLDER / "SKILL.md").read_text()
QUERIES = json.loads((ROOT / "tests/data/skill_queries.json").read_text())


def skill(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_reported([sys.executable, "-m", "imagewatch", "skill", *arguments], text=True)


# The format


def test_the_reference_validator_accepts_the_skill():
    assert skills_ref.validate(FOLDER) == []
    properties = skills_ref.read_properties(FOLDER)
    assert properties.name == "imagewatch"
    assert len(properties.description) <= 1024
    assert properties.compatibility
    assert len(properties.compatibility) <= 500


def test_the_description_has_the_words_of_people_and_says_what_it_is_not_for():
    description = skills_ref.read_properties(FOLDER).description
    for word in ("image", "picture", "photo", "illustration", "logo", "icon", "draw", "edit", "generate", "design"):
        assert re.search(rf"\b{word}", description, re.IGNORECASE), word
    assert "Use it when" in description
    assert "Prefer the folder to calling an image API" in description
    assert "Not for" in description
    assert not re.search(r"<[^>]*>", description), "no markup"


def test_the_skill_reports_credits_only_if_the_user_asks():
    assert "- Mention credits or costs only if the user asks for them.\n" in TEXT
    assert "If the user asks what it cost: the key is `credits_charged`." in TEXT
    assert TEXT.count("credits_charged") == 1
    assert not re.search(r"[Rr]eport (how many|the) credits", TEXT)
    assert not [
        block for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL) if "credit" in block
    ]


def test_the_skill_names_only_commands_and_options_that_exist():
    options = set(re.findall(r"(?<![\w-])(--[a-z-]+|-n)\b", TEXT))
    done = run_reported([sys.executable, "-m", "imagewatch", "submit", "--help"], text=True)
    assert options <= set(re.findall(r"--[a-z-]+|-n", done.stdout))
    assert set(re.findall(r"^imagewatch (\w+)", TEXT, re.MULTILINE)) <= set(COMMANDS)


# The queries


def test_there_are_twenty_queries_half_of_them_for_the_skill():
    assert set(QUERIES) == {"should", "should_not"}
    assert [len(QUERIES[kind]) for kind in ("should", "should_not")] == [10, 10]
    every = [*QUERIES["should"], *QUERIES["should_not"]]
    assert len(set(every)) == 20
    assert all(isinstance(query, str) and 20 <= len(query) <= 200 and query.strip() == query for query in every)


def test_the_queries_are_what_people_write_and_do_not_name_the_skill():
    assert not [query for kind in QUERIES.values() for query in kind if "imagewatch" in query.lower()]


def test_queries_that_are_not_for_the_skill_are_near_to_it():
    near = re.compile(r"images?|photos?|pictures?|PNG|icon|SVG|draw|screenshot|IMG_", re.IGNORECASE)
    assert not [query for query in QUERIES["should_not"] if not near.search(query)]


# The command


def test_the_command_prints_the_skill():
    done = skill()
    assert (done.returncode, done.stdout, done.stderr) == (0, TEXT, "")


def test_the_command_installs_the_skill_once(tmp_path):
    target = tmp_path / "new/skills"
    file = target / "imagewatch/SKILL.md"
    for _ in range(2):
        done = skill("--install", str(target))
        assert (done.returncode, done.stdout) == (0, f"Installed: {file}\n")
    assert file.read_text() == TEXT
    assert skills_ref.validate(file.parent) == []
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("content", [b"mine", b"\xff", None])
def test_the_command_replaces_no_other_file(tmp_path, content):
    file = tmp_path / "imagewatch/SKILL.md"
    file.parent.mkdir()
    if content is None:
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(content)
    done = skill("--install", str(tmp_path))
    assert done.returncode == 64
    assert str(file) in done.stderr
    assert content is None or file.read_bytes() == content
    assert not (tmp_path / "elsewhere").exists()


def test_a_pipe_in_the_place_of_the_file_is_not_waited_for(tmp_path):
    file = tmp_path / "imagewatch/SKILL.md"
    file.parent.mkdir()
    os.mkfifo(file)
    done = skill("--install", str(tmp_path))
    assert (done.returncode, str(file) in done.stderr) == (64, True)


def test_the_skill_is_printed_for_another_folder(tmp_path):
    done = skill("--root", str(tmp_path))
    assert "/srv/imagewatch" not in done.stdout
    assert done.stdout == TEXT.replace("/srv/imagewatch", str(tmp_path))


@pytest.mark.parametrize("root", ["/a b", "/a'b", "/a$b", "/a\nb", "/ä", '/a"; rm -rf x; "'])
def test_a_folder_whose_name_would_change_the_commands_is_refused(root):
    done = skill("--root", root)
    assert (done.returncode, done.stdout) == (64, "")


@pytest.mark.slow
def test_the_wheel_has_the_skill(tmp_path):
    command = [sys.executable, "-m", "pip", "--version"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        command = ["python3", "-m", "pip", "--python", sys.executable]
    else:
        command = command[:3]
    done = subprocess.run(
        [*command, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("the build backend cannot be installed here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("imagewatch/skills/imagewatch/SKILL.md").decode() == TEXT
        (metadata,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
        assert "Provides-Extra: mcp" in archive.read(metadata).decode()
    assert imagewatch.__version__ in wheel.name
