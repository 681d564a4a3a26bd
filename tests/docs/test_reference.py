"""The pages of the reference are those that the code gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from support.pages import DOCS, ROOT, page, table

from imagewatch.config.schema import NAMED, RESTART, SECTIONS, SINCE, Config

if TYPE_CHECKING:
    from pathlib import Path

KEYS = {f"{section}.{key}" for section, struct in {**SECTIONS, **NAMED}.items() for key in struct.__struct_fields__}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The pages as ``docs/make.py`` writes them now."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(DOCS / "make.py", folder)
    (folder / "reference").mkdir()
    subprocess.run([sys.executable, folder / "make.py"], check=True)
    return folder / "reference"


@pytest.mark.parametrize("name", ["configuration", "commands", "exit-codes", "metrics"])
def test_a_page_of_the_reference_is_what_the_code_gives(written, name):
    """After a change of keys, commands or exit codes: ``make reference``."""
    assert (written / f"{name}.md").read_text() == page(f"reference/{name}")


def test_the_page_about_the_configuration_has_every_key_with_all_that_is_known_about_it():
    text = page("reference/configuration")
    for section, struct in SECTIONS.items():
        for key in struct.__struct_fields__:
            part = text[text.index(f"\n### {section}.{key}\n") :].partition("\n#")[2].partition("\n#")[0]
            ((kind, default, since, change, variable),) = table(part, " ")
            assert kind
            assert default
            assert since == SINCE.get(f"{section}.{key}", "0.1")
            assert change == ("restart" if section in RESTART else "reload")
            assert variable == f"`IMAGEWATCH_{section.upper()}__{key.upper()}`"


def test_each_key_that_the_first_version_did_not_have_says_since_which_version_it_is_there():
    """A new key needs an entry in ``SINCE`` with the version that will have it first."""
    first = set(json.loads((ROOT / "tests/data/keys_of_0.1.json").read_text()))
    assert set(SINCE) == set(KEYS) - first


def test_the_sections_that_need_a_restart_are_sections():
    assert set(RESTART) < set(SECTIONS) < set(Config.__struct_fields__)


def test_the_page_about_metrics_has_each_one():
    source = (ROOT / "imagewatch/commands/metrics.py").read_text()
    names = re.findall(r'yield "(\w+)", "(gauge|counter)"', source)
    assert len(names) > 15
    rows = [
        (name.strip("`").removeprefix("imagewatch_"), kind)
        for name, kind, _, _ in table(page("reference/metrics"), "# ")
    ]
    assert sorted(rows) == sorted(names)


def test_the_page_about_the_status_files_has_each_key():
    schema = json.loads((ROOT / "schemas/imagewatch-status.schema.json").read_text())
    names = [cells[0] for cells in table(page("reference/status-and-receipts"), "| `stopped` |")]
    listed = [name for cell in names for name in re.findall(r"`(\w+)`", cell)]
    assert sorted([*listed, "state"]) == sorted(schema["properties"])
