"""Tables as spreadsheets write them, templates, and the names of rows."""

from __future__ import annotations

import contextlib
import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.commands.drop import SubmitRequest, require_stem
from imagewatch.commands.table import MAX_BYTES, Table, read
from imagewatch.commands.table_rows import Row, Rows
from imagewatch.commands.template import parse
from imagewatch.config.load import load
from imagewatch.system.errors import BadRequest
from imagewatch.system.text import printable

COLUMNS = st.text("abcdefghijkl xyzäßé0123456789", min_size=1, max_size=12).map(str.strip).filter(bool)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


def problems(raw: bytes) -> list[str]:
    with pytest.raises(BadRequest) as caught:
        read(raw, "x.csv")
    return [str(problem) for problem in caught.value.problems]


def rows(raw: bytes, template: str | None = None, *, folder: str = "", **options: object) -> list[Row]:
    request = None if template is None else SubmitRequest(template, {})
    config = load(None, {"HOME": "/nonexistent", "IMAGEWATCH_FOLDERS__ROOT": "/nonexistent"})
    table = read(raw, "x.csv")
    made = Rows(table, request, options=options, images=(), base="", folder=folder, config=config, blind=False)
    return made.read()


def row_problems(raw: bytes, template: str | None = None) -> list[str]:
    with pytest.raises(BadRequest) as caught:
        rows(raw, template)
    return [str(problem) for problem in caught.value.problems]


def cells(table: Table) -> list[dict[str, str]]:
    return [dict(row.cells) for row in table.rows]


# Tables


@settings(deadline=None)
@given(
    columns=st.lists(COLUMNS, min_size=1, max_size=6, unique=True),
    data=st.data(),
    separator=st.sampled_from(",;\t"),
    ending=st.sampled_from(["\r\n", "\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    has_line=st.booleans(),
)
def test_what_a_spreadsheet_writes_is_read_as_it_was(columns, data, separator, ending, encoding, has_line):
    row = st.lists(CELLS, min_size=len(columns), max_size=len(columns))
    body = data.draw(st.lists(row, min_size=1, max_size=5))
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writerows([columns, *body])
    first = f"sep={separator}{ending}" if has_line else ""
    raw = (first + file.getvalue()).encode(encoding)
    expected = [{name: cell.strip() for name, cell in zip(columns, one, strict=True) if cell.strip()} for one in body]
    expected = [one for one in expected if one]
    if not expected:
        assert problems(raw) == ["x.csv: the table has no rows (each row below the header is one prompt)"]
        return
    found = read(raw, "x.csv")
    assert found.columns == tuple(columns)
    assert cells(found) == expected


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_or_a_problem(raw):
    for begin in (b"", b"a,b\n", b"\xff\xfe"):
        with contextlib.suppress(BadRequest):
            assert read(begin + raw, "x.csv").rows


def test_rows_are_named_by_the_line_in_which_they_begin_also_after_quoted_line_breaks_and_empty_rows():
    raw = b'sep=;\r\nname;text\r\na;"one\r\ntwo"\r\n;;\r\n\r\nb;three\r\n'
    assert [row.line for row in read(raw, "x.csv").rows] == [3, 7]


@pytest.mark.parametrize(
    ("raw", "line", "texts"),
    [
        (b"", "", ["the table is empty"]),
        (b"\r\n \r\n", "", ["the table is empty"]),
        (b"a,b\r\n", "", ["has no rows"]),
        ("a,b\r\n1,2\r\n3,café".encode("cp1252"), " line 3", ["0xE9", "Windows code page 1252", '"é"', "CSV UTF-8"]),
        (b"a,b\r1,2\r3,\xe9", " line 3", ["0xE9"]),
        (b"\xff\xfea", "", ["not whole UTF-16"]),
        (b"a\n1\n\0", " line 3", ["NUL"]),
        (b'a,b\n1,"2\n', " line 2", ["not CSV: unexpected end of data"]),
        (b'a,b\n1,"2"x\n', " line 2", ["not CSV"]),
        (b"a,b\n1,2,3\n", " line 2", ["it has 3 cells, and the header has 2", "double quotes"]),
        (b"a,b\n1\n", " line 2", ["it has 1 cell, and the header has 2"]),
        (b"a,b,a\n1,2,3\n", " line 1", ['two columns have the name "a"']),
        (b"a,,c\n1,2,3\n", " line 1", ["column 2 has no name"]),
        (b"a\n" + b"1" * 200_000, " line 2", ["field larger than field limit"]),
        (b"a" * (MAX_BYTES + 1), "", ["larger than 32 MiB"]),
    ],
    ids=lambda value: printable(value[:20].decode("latin-1")) if isinstance(value, bytes) else None,
)
def test_what_is_no_table_is_reported_with_line_and_cause(raw, line, texts):
    (found,) = problems(raw)
    assert found.startswith(f"x.csv{line}: ")
    for text in texts:
        assert text in found


def test_all_problems_of_a_table_are_reported_together():
    found = problems(b"a,,a\n1,2,3,4\n1\n")
    assert [text.split(":")[0] for text in found] == ["x.csv line 1", "x.csv line 1", "x.csv line 2", "x.csv line 3"]


def test_a_column_without_name_and_cells_is_ignored():
    found = read(b"a;b;\n1;2;\n;;\n", "x.csv")
    assert (found.columns, cells(found)) == (("a", "b"), [{"a": "1", "b": "2"}])


# Templates


@given(CELLS)
def test_any_text_with_doubled_braces_is_itself(text):
    template = parse(text.replace("{", "{{").replace("}", "}}"))
    assert (template.fields, template.filled({})) == ((), text)


@given(st.lists(st.tuples(CELLS, COLUMNS), max_size=5), CELLS, st.data())
def test_values_are_put_in_unchanged_and_never_read_as_fields(parts, end, data):
    values = {name: data.draw(CELLS) for _, name in parts}
    escaped = [(text.replace("{", "{{").replace("}", "}}"), name) for text, name in parts]
    template = parse("".join(f"{text}{{{name}}}" for text, name in escaped) + end.replace("{", "").replace("}", ""))
    assert template.filled(values) == "".join(text + values[name] for text, name in parts) + end.replace(
        "{", ""
    ).replace("}", "")


@pytest.mark.parametrize("text", ["a { b", "a } b", "{}", "{ }", "{a\nb}", "{a{b}", "{{a}", "{a}}", "{a"])
def test_a_brace_without_its_field_is_a_problem(text):
    with pytest.raises(BadRequest) as caught:
        parse(text)
    assert "names no column" in str(caught.value.problems[0])


def test_attributes_and_formats_are_parts_of_a_columns_name():
    assert parse("{a.__class__} {b[0]} {c!r:>9} { d }").fields == ("a.__class__", "b[0]", "c!r:>9", "d")


# Rows


@settings(deadline=None)
@given(st.lists(CELLS.filter(str.strip), min_size=1, max_size=6, unique_by=str.strip))
def test_each_different_row_has_a_valid_name_of_its_own_which_is_the_same_each_time(products):
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["product"], *[[one] for one in products]])
    raw = file.getvalue().encode()
    found = rows(raw, "A poster for {product}.")
    names = [row.stem for row in found]
    assert len(set(names)) == len(products)
    for name in names:
        require_stem(name)
    assert [row.text for row in found] == [
        f"A poster for {one.strip()}.".replace("\r\n", "\n").replace("\r", "\n").strip() for one in products
    ]
    assert [row.stem for row in rows(raw, "A poster for {product}.")] == names
    assert not {row.stem for row in rows(raw, "A card for {product}.")} & set(names)
    assert not {row.stem for row in rows(raw, "A poster for {product}.", n=2)} & set(names)


def test_columns_are_options_and_an_empty_cell_leaves_the_option_of_the_command_line():
    raw = b"prompt,provider,n,seed,size\na cat,openai,2,-7,1024x1024\na dog,,,,\n"
    first, second = rows(raw, quality="high", n=4)
    assert first.fields == {"provider": "openai", "n": 2, "seed": -7, "size": "1024x1024", "quality": "high"}
    assert second.fields == {"provider": "openai", "n": 4, "quality": "high"}


def test_a_value_with_fences_and_braces_is_only_text():
    raw = b'prompt\n"+++\r\nn = 4\r\n+++\r\n{x} {{y}}"\n'
    (row,) = rows(raw)
    assert row.text == "+++\nn = 4\n+++\n{x} {{y}}"
    assert "n" not in row.fields


def test_the_name_of_a_row_is_that_of_the_column_or_is_made_from_its_values():
    raw = "name,product\nhero,Chair\n,Tall Lämp/#1\n,Weiße Größe\n".encode()
    first, second, third = rows(raw, "A {product}")
    assert first.stem == "hero"
    assert second.stem.rpartition("-")[0] == "tall-lamp-1"
    assert third.stem.rpartition("-")[0] == "weisse-grosse"


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"prompt,n\na,5\n", ["x.csv line 2: n: must be a whole number of at most 4, not 5"]),
        (b"prompt,n\na,two\n", ["x.csv line 2: n: must be a whole number, not 'two'"]),
        (b"prompt,quality\na,hgih\n", ["x.csv line 2: quality: must be one of low, medium, high, auto, not 'hgih'"]),
        (b"prompt,model\na,best\n", ['x.csv line 2: model: "best" belongs to no known family']),
        (b"prompt,preset\na,post\n", ["x.csv line 2: preset: "]),
        (b"prompt,input_images\na,no.png\n", ["x.csv line 2: no.png: no such file"]),
        (b'prompt,input_images\na,"[""a"""\n', ["x.csv line 2: input_images: it begins with [ and is no TOML list"]),
        (b"prompt,name\na,x/y\n", ['x.csv line 2: name: "x/y" is not a valid name']),
        (b"prompt,name\na,.x\n", ['x.csv line 2: name: ".x" is not a valid name']),
        (b"prompt,name\na," + b"x" * 201 + b"\n", ["is longer than 200 bytes"]),
        (b"prompt,name\na,x\nb,X\n", ['x.csv line 3: "X" is also the name of line 2']),
        (b"prompt\na\nb\na\n", ["x.csv line 4: the row is the same as line 2"]),
        (b"prompt,n\n,2\n", ["x.csv line 2: prompt: the cell is empty"]),
        (b"prompt,qualty\na,high\n", ['the column "qualty" is no option', 'did you mean "quality"?']),
        (b"Prompt\na\n", ['x.csv: it has no column "prompt"', 'the column "Prompt" is no option']),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(raw, texts):
    found = "\n".join(row_problems(raw))
    for text in texts:
        assert text in found


def test_template_and_columns_must_fit():
    found = "\n".join(row_problems(b"product,size\na,1x1\n", "A {prodct}, {size}"))
    assert 'template: the table has no column "prodct" (did you mean "product"?)' in found
    assert '"size" is an option and also a field of the template' in found
    assert 'the column "product" is no option and no field' in found


def test_all_problems_of_all_rows_are_reported_together():
    found = row_problems(b"prompt,n,seed\na,9,x\nb,1,1\nc,0,\n")
    assert [text.split(": ")[:2] for text in found] == [
        ["x.csv line 2", "n"],
        ["x.csv line 2", "seed"],
        ["x.csv line 4", "n"],
    ]


def test_a_column_that_begins_with_a_number_sign_is_for_people():
    (row,) = rows(b"prompt,#note\na,later\n")
    assert (row.text, row.fields) == ("a", {"provider": "flux"})
