"""``docs/reference/folder-protocol.md`` and the schemas, held to real result files of every kind and to the code."""

from __future__ import annotations

import copy
import datetime as dt
import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from support.daemon import KEY
from support.endpoint import unique_png
from support.pages import page, table
from support.station import Station

from imagewatch.job.receipts import SCHEMA
from imagewatch.protocol.prompt import FrontMatter
from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = page("reference/folder-protocol")
RESULTS = page("reference/status-and-receipts")
SCHEMAS = {kind: json.loads((ROOT / f"schemas/{kind}.schema.json").read_text()) for kind in ("receipt", "error")}
VALIDATORS = {kind: Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}


def closed(schema: Any) -> Any:
    """A schema that accepts no key but those it names: our own result files have no others."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    more = {"additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else {}
    return {name: closed(inner) for name, inner in schema.items()} | more


CLOSED = {kind: Draft202012Validator(closed(schema)) for kind, schema in SCHEMAS.items()}

PROMPTS = {
    "completed": "a cat",
    "edit": "+++\nn = 2\nseed = 3\n+++\nmake it blue [sandbox: wrong-mime]",
    "options": '+++\nprovider = "openai"\nmodel = "gpt-image-2"\nsize = "1024x1024"\nquality = "low"\n'
    'output_format = "webp"\n+++\na poster',
    "by/url": "a cat [sandbox: url]",
    "unknown_cost": "a cat [sandbox: no-billing]",
    "partial": "+++\nn = 3\n+++\ncats [sandbox: fewer]",
    "page": "+++\nn = 3\n+++\ncats [sandbox: not-picture]",
    "torn": "+++\nn = 2\n+++\ncats [sandbox: bad-picture]",
    "credentials": "a cat [sandbox: credentials]",
    "refused": "a cat [sandbox: 400]",
    "poor": "a cat [sandbox: 402]",
    "busy": "a cat [sandbox: 429]",
    "proxy": "a cat [sandbox: 502]",
    "invalid": "+++\nn = 9\ncolour = 1\n+++\na cat",
    "foreign": "a cat",
    "lost": "a cat [sandbox: drop]",
    "gateway": "a cat [sandbox: 504]",
    "empty": "a cat [sandbox: no-images]",
    "garbled": "a cat [sandbox: not-json]",
}
ERRORS = {
    "refused": "no",
    "poor": "no",
    "busy": "no",
    "proxy": "unknown",
    "invalid": "no",
    "foreign": "no",
    "lost": "unknown",
    "gateway": "unknown",
    "empty": "yes",
    "garbled": "yes",
}


def plain(value: Any) -> Any:
    """A TOML value as JSON has it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.isoformat() if isinstance(value, dt.datetime) else value


@pytest.fixture(scope="module")
def result_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A real result file of every kind, by the name of its prompt, with a second one of a name that existed."""
    with Sandbox(key=KEY) as sandbox:
        station = Station(tmp_path_factory.mktemp("result_files"), sandbox.base_url, retry__attempts="2")
        for name, content in (("edit.png", "a"), ("edit.1.png", "b"), ("refused.png", "c")):
            station.drop(name, unique_png(content))
        station.drop("foreign.gif", b"GIF89a")
        for stem, text in PROMPTS.items():
            station.prompt(stem, text)
        station.work()
        station.prompt("completed", "another cat")
        station.prompt("lost", "another cat [sandbox: drop]")
        station.work()
        station.close()
    found = {
        path.relative_to(station.root).as_posix(): plain(tomllib.loads(path.read_text()))
        for folder in (station.outbox, station.errors)
        for path in folder.rglob("*.toml")
    }
    assert len(found) == len(PROMPTS) + 2
    return found


def kind_of(name: str) -> str:
    return "receipt" if name.startswith("outbox/") else "error"


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_is_one_and_has_the_version_of_the_result_files(kind):
    Draft202012Validator.check_schema(SCHEMAS[kind])
    assert SCHEMAS[kind]["properties"]["schema"] == {"const": SCHEMA}
    assert f"# The folder protocol, version {SCHEMA}\n" in PAGE


def test_what_both_schemas_define_is_the_same():
    receipt, error = (SCHEMAS[kind]["$defs"] for kind in ("receipt", "error"))
    shared = receipt.keys() & error.keys()
    assert len(shared) > 5
    assert {name: receipt[name] for name in shared} == {name: error[name] for name in shared}


def test_real_result_files_of_every_kind_satisfy_the_schemas(result_files):
    for name, result_file in result_files.items():
        faults = [
            f"{name}: {fault.json_path}: {fault.message}" for fault in CLOSED[kind_of(name)].iter_errors(result_file)
        ]
        assert faults == []
    for stem in PROMPTS:
        path = f"errors/{stem}.error.toml" if stem in ERRORS else f"outbox/{stem}.receipt.toml"
        assert result_files[path]["charged"] == ERRORS.get(stem, "yes"), stem
        assert result_files[path]["source"] == f"{stem}.prompt.txt"


def test_the_result_files_together_have_every_key_that_the_schemas_know(result_files):
    """What never occurs would be described by no one's word but ours. ``cf-ray`` and its like are the gateway's."""
    for kind, schema in SCHEMAS.items():
        mine = [result_file for name, result_file in result_files.items() if kind_of(name) == kind]
        assert set().union(*mine) == set(schema["properties"])
        assert set().union(*(one["times"] for one in mine)) == set(schema["$defs"]["times"]["properties"])
        assert set().union(*(one.get("request", {}) for one in mine)) <= set(schema["$defs"]["request"]["properties"])
    images = [table for name in result_files for table in result_files[name].get("images", [])]
    assert set().union(*images) == set(SCHEMAS["receipt"]["$defs"]["image"]["properties"])


def tables(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every table of a result file; what is as received has no rules."""
    if isinstance(value, dict):
        yield path
        for name, inner in value.items():
            if name != "billing":
                yield from tables(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from tables(inner, (*path, number))


def test_a_key_that_a_later_release_adds_anywhere_is_accepted(result_files):
    for name, result_file in result_files.items():
        for path in tables(result_file):
            changed = copy.deepcopy(result_file)
            at(changed, path)["of_a_later_release"] = 1
            assert VALIDATORS[kind_of(name)].is_valid(changed), (name, *path)
            assert VALIDATORS[kind_of(name)].is_valid(result_file)


def at(result_file: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        result_file = result_file[step]
    return result_file


def test_no_result_file_with_a_wrong_name_or_a_wrong_type_satisfies_its_schema(result_files):
    tried = 0
    for name, result_file in result_files.items():
        accepts = CLOSED[kind_of(name)].is_valid
        for path in tables(result_file):
            for key in at(result_file, path):
                for wrong in ({f"{key}s": at(result_file, path)[key]}, {key: {"a": [None]}}):
                    if (*path, key) == ("billing",) and key in wrong:
                        continue
                    changed = copy.deepcopy(result_file)
                    table = at(changed, path)
                    del table[key]
                    table |= wrong
                    assert not accepts(changed), (name, *path, wrong)
                    tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("outbox/completed.receipt.toml", {"charged": "no"}),
        ("outbox/completed.receipt.toml", {"schema": 2}),
        ("outbox/completed.receipt.toml", {"got": 0}),
        ("outbox/completed.receipt.toml", {"images": []}),
        ("outbox/completed.receipt.toml", {"source": "completed.txt"}),
        ("outbox/completed.receipt.toml", {"times": {"claimed": "yesterday", "published": "today"}}),
        ("errors/lost.error.toml", {"attempts": 0}),
        ("errors/invalid.error.toml", {"charged": "unknown"}),
        ("errors/invalid.error.toml", {"charged": "maybe"}),
        ("errors/invalid.error.toml", {"attempts": 1}),
        ("errors/refused.error.toml", {"originals": [{"file": "../x", "dropped_as": "x"}]}),
        ("errors/refused.error.toml", {"message": ""}),
    ],
)
def test_a_result_file_that_contradicts_itself_or_the_protocol_does_not_satisfy_its_schema(result_files, name, change):
    assert not VALIDATORS[kind_of(name)].is_valid({**result_files[name], **change})


def test_a_name_that_existed_gets_the_short_id_in_every_file_of_the_job(result_files):
    (again,) = (name for name in result_files if re.fullmatch(r"outbox/completed\.\w{4}\.receipt\.toml", name))
    result_file = result_files[again]
    assert again == f"outbox/completed.{result_file['job'][:4]}.receipt.toml"
    assert result_file["images"][0]["file"] == f"completed.{result_file['job'][:4]}.jpg"
    (lost,) = (name for name in result_files if re.fullmatch(r"errors/lost\.\w{4}\.error\.toml", name))
    tag = result_files[lost]["job"][:4]
    assert result_files[lost]["originals"] == [{"file": f"lost.{tag}.prompt.txt", "dropped_as": "lost.prompt.txt"}]


def test_the_page_lists_exactly_the_keys_of_the_result_files_and_where_they_are():
    listed: dict[str, set[str]] = {}
    for names, where, _ in table(RESULTS, "## Keys of the result files"):
        for name in re.findall(r"`\[*(\w+)\]*`", names):
            listed[name] = set(where.split())
    for kind, always, sometimes in (("receipt", "R", "r"), ("error", "E", "e")):
        required = {name for name, where in listed.items() if always in where}
        assert required == set(SCHEMAS[kind]["required"])
        optional = {name for name, where in listed.items() if sometimes in where}
        assert required | optional == set(SCHEMAS[kind]["properties"])


def test_the_page_lists_exactly_the_keys_of_front_matter():
    listed = [names.strip("`") for names, _ in table(PAGE, "**Front matter**")]
    assert sorted(listed) == sorted(FrontMatter.__struct_fields__)


def test_the_tables_of_images_and_inputs_name_all_their_keys():
    for name, definition in (("images", "image"), ("inputs", "input")):
        (words,) = (
            words for names, _, words in table(RESULTS, "## Keys of the result files") if f"[[{name}]]" in names
        )
        assert set(re.findall(r"`(\w+)`", words)) == set(SCHEMAS["receipt"]["$defs"][definition]["properties"])
