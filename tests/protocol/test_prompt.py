"""The prompt file: what people, editors and programs save, and how their mistakes are reported."""

from __future__ import annotations

import codecs

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.config.schema import Options
from imagewatch.config.validate import check, nearest, shown
from imagewatch.protocol.prompt import (
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_FRONT,
    MAX_INPUTS,
    FrontMatter,
    Prompt,
    declared,
    parse,
    text_for_people,
)
from imagewatch.system.errors import BadRequest, Problem

TEXT = "Ein Kätzchen, 猫, 🐈"


def front(block: str, text: str = "a cat") -> bytes:
    return f"+++\n{block}\n+++\n{text}".encode()


def problems(raw: bytes) -> list[Problem]:
    with pytest.raises(BadRequest) as caught:
        parse(raw)
    return caught.value.problems


def problem(raw: bytes) -> Problem:
    (only,) = problems(raw)
    return only


def outcome(raw: bytes) -> Prompt | list[Problem]:
    try:
        return parse(raw)
    except BadRequest as error:
        return error.problems


# Encodings


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["UTF-8", "UTF-8 with BOM", "UTF-16 little", "UTF-16 big"],
)
def test_unicode_text_is_read_in_every_usual_encoding(raw):
    assert parse(raw) == Prompt(TEXT, FrontMatter())


@pytest.mark.parametrize("bom", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_front_matter_is_found_behind_a_byte_order_mark(bom):
    encoding = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le"}.get(bom, "utf-16-be")
    assert parse(bom + "+++\nn = 2\n+++\nhi".encode(encoding)).front == FrontMatter(n=2)


@pytest.mark.parametrize("encoding", ["utf-32-le", "utf-32-be"])
def test_utf_32_is_refused_by_its_name(encoding):
    bom = codecs.BOM_UTF32_LE if encoding.endswith("le") else codecs.BOM_UTF32_BE
    found = problem(bom + TEXT.encode(encoding))
    assert "UTF-32" in found.reason
    assert "UTF-8" in found.hint


@pytest.mark.parametrize(
    ("raw", "encoding", "offset"),
    [
        (b"a caf\xe9 at night", "UTF-8", 5),
        (codecs.BOM_UTF8 + b"a caf\xe9", "UTF-8", 8),
        (codecs.BOM_UTF16_LE + b"a\0b\0c", "UTF-16-LE", 6),
        (codecs.BOM_UTF16_BE + b"\0a\xd8\x00\0b", "UTF-16-BE", 4),
        (b"\x80", "UTF-8", 0),
    ],
)
def test_bytes_that_are_not_text_are_refused_with_their_place_in_the_file(raw, encoding, offset):
    assert problem(raw).reason == f"not {encoding} text: byte {offset} cannot be read"


@pytest.mark.parametrize(
    "raw", [b"a\0cat", codecs.BOM_UTF16_LE + "a\0".encode("utf-16-le"), b"\0", "cat".encode("utf-16-le")]
)
def test_nul_is_not_text(raw):
    assert "NUL" in problem(raw).reason


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_become_line_feeds(end):
    raw = end.join(["+++", "n = 2", "+++", "", "first  ", "", "\tsecond", ""]).encode()
    assert parse(raw) == Prompt("first  \n\n\tsecond", FrontMatter(n=2))


def test_white_space_around_the_text_is_trimmed_and_inside_it_kept():
    assert parse(b"\n \t\n  a  cat \n\n on a mat \xc2\xa0\n").text == "a  cat \n\n on a mat"


# Limits


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b" \r\n\t ", codecs.BOM_UTF8, codecs.BOM_UTF16_BE, b"+++\n+++", b"+++\n+++\n \n"]
)
def test_a_file_without_text_is_refused(raw):
    assert problem(raw).reason == "there is no text"


@pytest.mark.parametrize("letter", ["x", "猫", "🐈"])
def test_the_length_is_counted_in_characters_after_trimming(letter):
    assert parse(f"\n {letter * MAX_CHARACTERS} \n".encode()).text == letter * MAX_CHARACTERS
    assert problem((letter * (MAX_CHARACTERS + 1)).encode()).reason == "32,001 characters are more than 32,000"


def test_front_matter_does_not_count_as_text():
    assert parse(front("# " + "x" * 1000, "y" * MAX_CHARACTERS)).text == "y" * MAX_CHARACTERS


def test_the_limit_of_the_folder_may_be_lower():
    with pytest.raises(BadRequest, match="6 characters are more than 5"):
        parse(b"abcdef", max_characters=5)
    assert parse(b"abcde", max_characters=5).text == "abcde"


def test_a_file_that_is_too_large_is_refused_unread():
    assert "256 KiB" in problem(b"\xff" * (MAX_BYTES + 1)).reason
    assert "characters" in problem(b"x" * MAX_BYTES).reason


# Front matter


def test_every_key_of_the_front_matter_is_used():
    block = """
provider = "openai"
model = "gpt-image-2"
n = 4
size = "1536x1024"
quality = "high"
output_format = "webp"
seed = -7
input_images = ["a.png", "b c.JPG", "d.jpeg", "e.webp"]
preset = "draft"
"""
    read = parse(front(block))
    assert read.text == "a cat"
    assert read.front == FrontMatter(
        provider="openai",
        model="gpt-image-2",
        n=4,
        size="1536x1024",
        quality="high",
        output_format="webp",
        seed=-7,
        input_images=("a.png", "b c.JPG", "d.jpeg", "e.webp"),
        preset="draft",
    )
    assert read.options == Options(
        provider="openai", model="gpt-image-2", n=4, size="1536x1024", quality="high", output_format="webp", seed=-7
    )


def test_an_empty_front_matter_sets_nothing():
    assert parse(b"+++\n+++\na cat") == parse(front("# only a comment")) == Prompt("a cat", FrontMatter())


def test_all_mistakes_are_reported_together_and_the_nearest_key_is_suggested():
    found = problems(
        front(
            'qualty = "high"\nn = 9\nprovider = "midjourney"\ninput_image = []\ninput_images = ["~b"]\nzzz = 1',
            " ",
        )
    )
    said = {item.field: str(item) for item in found}
    assert list(said) == ["qualty", "n", "provider", "input_image", "zzz", "input_images", "prompt"]
    assert 'did you mean "quality"?' in said["qualty"]
    assert 'did you mean "input_images"?' in said["input_image"]
    assert "known keys: input_images, model, n, output_format, preset, provider, quality, seed, size" in said["zzz"]
    assert "midjourney" in said["provider"]
    assert said["n"] == "n: must be a whole number of at most 4, not 9"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("n = true", "n"),
        ('n = "2"', "n"),
        ("n = 2.0", "n"),
        ("n = nan", "n"),
        ("n = [2]", "n"),
        ("n = 2026-01-01", "n"),
        ("n.a = 2", "n"),
        ("[n]", "n"),
        ("seed = 1.5", "seed"),
        ("seed = false", "seed"),
        ("seed = 12:00:00", "seed"),
        ("size = 1024", "size"),
        ('quality = ["low"]', "quality"),
        ("model = 5", "model"),
        ("preset = true", "preset"),
        ('input_images = "a.png"', "input_images"),
        ("input_images = [1]", "input_images"),
        ("input_images = { a = 1 }", "input_images"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_and_never_converted(line, key):
    assert problem(front(line)).field == key


@pytest.mark.parametrize(
    "line",
    [
        "n = 0",
        "n = -1",
        "n = 5",
        f"seed = {2**53 + 1}",
        f"seed = {-(2**53) - 1}",
        f"seed = {10**40}",
        'model = ""',
        f'model = "{"x" * 201}"',
        'size = ""',
        f'size = "{"x" * 41}"',
        'quality = "best"',
        'quality = "High"',
        'output_format = "jpg"',
        'provider = ""',
    ],
)
def test_a_value_outside_the_contract_is_refused(line):
    assert problem(front(line)).field == line.partition(" ")[0]


@pytest.mark.parametrize(
    "line",
    [
        "n = 1",
        "n = 4",
        f"seed = {2**53}",
        f"seed = {-(2**53)}",
        'provider = "auto"',
        'quality = "auto"',
        'size = "auto"',
    ],
)
def test_the_bounds_themselves_are_allowed(line):
    key, _, value = line.partition(" = ")
    assert str(getattr(parse(front(line)).front, key)) == value.strip('"')


@pytest.mark.parametrize(
    "raw", [b"+++", b"+++\n", b"+++\nn = 2\na cat", b"+++\nn = 2\n +++\na cat", b"+++\nn = 2\n++++\na cat"]
)
def test_front_matter_that_is_never_closed_is_refused(raw):
    found = problem(raw)
    assert "no second line is exactly +++" in found.reason
    assert "TOML" in found.hint


@pytest.mark.parametrize("raw", [b"---\nn: 2\n---\na cat", b"---\r\nn: 2\r\n---\r\na cat", b"---\n---"])
def test_a_yaml_block_is_refused_and_not_paid_for_as_prose(raw):
    found = problem(raw)
    assert "YAML" in found.reason
    assert "+++" in found.hint


@pytest.mark.parametrize(
    "text", ["---\na rule without an end", "--- a cat", "a cat\n---\nand\n---", "----\n----", "---"]
)
def test_dashes_that_do_not_fence_a_block_are_prose(text):
    assert parse(text.encode()).text == text


@pytest.mark.parametrize(
    "text",
    [
        "+++ \nn = 2\n+++\na cat",
        " +++\n+++",
        "+++\t\na",
        "\n+++\nn = 2\n+++\na cat",
        "\n \t\n+++\na cat",
        "\ufeff\ufeff+++\nn = 2\n+++\na cat",
        "+++toml\nn = 2\n+++\na cat",
        "+++ TOML\nn = 2\na cat",
        "++++\nn = 2\n++++\na cat",
        "++++\na",
        "++\nn = 2\n++\na cat",
        "+++n = 2\n+++\na cat",
        "\uff0b\uff0b\uff0b\nn = 2\n\uff0b\uff0b\uff0b\na cat",
        "+++\u2028n = 2\u2028+++\u2028a cat",
        "n = 2\n+++\na cat",
        'input_images = ["a.png"]\n\nquality = "low"\n+++\na cat',
        "---\nn: 2\n---\na cat",
        "\n---\nn: 2\n--- \na cat",
        "--- yaml\nn: 2\n---\na cat",
        "---\nprovider: openai\na cat",
        "---\n---",
        "```\na cat\n```",
        "```toml\nn = 2\n```\na cat",
        "\n``` toml\nn = 2\n````\na cat",
        "~~~\nn = 2\n~~~\na cat",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_is_almost_front_matter_is_refused_and_not_paid_for_as_prose(text, end):
    found = problem(text.replace("\n", end).encode())
    assert found.field == "front matter"
    assert "exactly +++" in found.hint


@pytest.mark.parametrize(
    "text",
    [
        "+++ Breaking news +++ a ticker in a subway",
        "a\n+++\nn = 2\n+++",
        "A cat\n+++\na dog",
        "+ a cat\n+ a dog",
        "++a",
        "---\na cat",
        "----\na cat\n----",
        "---\nModel: a woman in red",
        "model: a woman in red",
        "n = 2 cats",
        "```a cat```",
        "```\nnever closed",
        "```\na cat\n~~~",
        "a cat\n```\nn = 2\n```",
        "~ a cat ~",
    ],
)
def test_what_only_resembles_front_matter_is_prose(text):
    assert parse(text.encode()) == Prompt(text, FrontMatter())


def test_after_an_empty_front_matter_a_text_may_begin_like_one():
    for text in ("+++\nn = 2\n+++\na", "---\nn: 2\n---\na", "```\na cat\n```", "++++"):
        assert parse(f"+++\n+++\n{text}".encode()) == Prompt(text, FrontMatter())


# What people are shown of a file that is refused


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("a cat", "a cat"),
        (" \r\na cat,\r\n\r\nasleep\r\n", "a cat,\n\nasleep"),
        ('+++\nqualtiy = "high"\nn = 9\n+++\n\na cat\n', "a cat"),
        ("+++\nnot TOML at all\n+++\na cat", "a cat"),
        ("+++\nn = 2\n+++\n", ""),
        ("+++\n+++", ""),
        ("+++", ""),
        ("", ""),
        ("+++\nn = 9\n# a comment\n\n[billing]\na cat\nn = 2", "a cat\nn = 2"),
        ("+++\na cat", "a cat"),
        ("+++\na cat\n+++", "a cat"),
        ("+++ \nn = 2\n+++\na cat", "a cat"),
        ("\n \t\n+++\nn = 2\n+++\na cat", "a cat"),
        ("++\nn = 2\n++\na cat", "a cat"),
        ("++++\nn = 2\n++++\na cat", "a cat"),
        ("+++n = 2\n+++\na cat", "a cat"),
        ("+++ TOML\nn = 2\na cat", "a cat"),
        ("n = 2\n+++\na cat", "a cat"),
        ("+++\u2028n = 2\u2028+++\u2028a cat", "a cat"),
        ("\uff0b\uff0b\uff0b\nn = 2\n\uff0b\uff0b\uff0b\na cat", "a cat"),
        ("---\nn: 2\n---\na cat", "a cat"),
        ("--- yaml\nn: 2\n---\na cat", "a cat"),
        ("---\nprovider: openai\na cat", "a cat"),
        ("```toml\nn = 2\n```\na cat", "a cat"),
        ("```\na cat\n```", "a cat"),
        ("~~~\nn = 2\n~~~\na cat", "a cat"),
        ("--- a cat", "--- a cat"),
        ("A cat\n+++\na dog", "A cat\n+++\na dog"),
        ("model: a woman in red", "model: a woman in red"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_people_are_shown_a_prompt_without_its_options_also_if_they_are_not_valid(text, shown_text, encoding):
    assert text_for_people(text.encode(encoding)) == shown_text


@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None)
def test_people_are_shown_something_of_any_file(raw):
    text = text_for_people(raw)
    assert "\0" not in text
    assert text == text.encode("utf-8", "strict").decode()
    read = outcome(raw)
    if isinstance(read, Prompt):
        assert text == read.text


# Files of other kinds

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
CONFLICT = "<<<<<<< Conflict 1 of 1\n%%%%%%% from\n-a\n+++++++ to\nb\n>>>>>>> Conflict 1 of 1 ends"
OTHERS = {
    "RTF": ("Rich Text", "{\\rtf1\\ansi\\ansicpg1252 a cat\\par}"),
    "error page": ("HTML", "<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>…</body></html>"),
    "old error page": ("HTML", "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"),
    "XHTML": ("HTML", '<?xml version="1.0"?>\n<!-- a -->\n<!DOCTYPE html PUBLIC "x">\n<html xmlns="y">'),
    "Git LFS": ("git lfs pull", POINTER),
    "git-annex": ("git annex get", "/annex/objects/SHA256E-s12--4d7a214614ab2935c943f9e0ff69d22e.txt\n"),
    "merge": ("merge conflict", "a cat\n<<<<<<< HEAD\nin red\n=======\nin blue\n>>>>>>> main\non a mat"),
    "merge with base": ("merge conflict", "<<<<<<< a\nx\n||||||| b\ny\n=======\nz\n>>>>>>> c"),
    "Jujutsu": ("merge conflict", CONFLICT),
    "PGP": ("encrypted", "-----BEGIN PGP MESSAGE-----\n\nhQEMA\n-----END PGP MESSAGE-----"),
    "base64": ("base64", "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAA" * 4),
}


@pytest.mark.parametrize(("words", "text"), OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.parametrize(
    "before", ["", "\n\n", "+++\nn = 2\n+++\n"], ids=["alone", "below blank lines", "below options"]
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_of_another_kind_is_refused_with_what_it_is_and_what_to_do(words, text, before, encoding):
    found = problem((before + text).encode(encoding))
    assert words in str(found)
    assert found.hint


@pytest.mark.parametrize(
    "text",
    [
        "<html> as a neon sign",
        "<!DOCTYPE html> as a tattoo",
        "A poster of this page: <html><head><title>404</title></head></html>",
        "{\\rt is how it begins",
        "Explain {\\rtf1 in a comic",
        "version https://git-lfs.github.com/spec/v1 printed on a mug",
        "A terminal with\n" + POINTER,
        "a\n=======\nb",
        "<<<<<<< arrows >>>>>>>",
        "an arrow\n<<<<<<<\nand another\n>>>>>>>",
        ">>>>>>> a\n=======\n<<<<<<< b",
        "-----BEGIN PGP MESSAGE----- as a banner",
        "/annex/objects/ as a folder tree",
        "iVBORw0KGgo is how a PNG begins in base64",
    ],
)
def test_a_prompt_that_mentions_other_kinds_of_files_is_sent(text):
    assert parse(text.encode()) == Prompt(text.strip(), FrontMatter())


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        "<!---->" * 30_000,
        "<!--" * 50_000,
        "<<<<<<<\n" * 30_000,
        "<<<<<<<\n=======\n" * 15_000,
        "<html>" + "<" * 200_000,
        "<html>" * 40_000,
        "<html " + "x " * 100_000,
        "<?xml>" * 40_000,
        "<!doctype " + " " * 200_000,
        "-----BEGIN A-----\n" * 10_000,
        "version https://git-lfs.github.com/spec/v1\n" + "oid \n" * 40_000,
        "+++x\n" * 50_000,
        "```\n" + "~" * 200_000,
        "n=\n" * 60_000 + "+++",
        "/9j/" + "A" * 200_000 + "!",
        "\n" * 200_000,
        "n = 2\n" * 10_000 + "+++",
    ],
    ids=range(17),
)
def test_text_that_is_made_to_be_slow_is_not(text):
    assert outcome(text.encode())


def test_later_fences_belong_to_the_text():
    assert parse(b"+++\nn = 2\n+++\na\n+++\nb") == Prompt("a\n+++\nb", FrontMatter(n=2))


@pytest.mark.parametrize(
    ("block", "line"),
    [("n = ", 2), ("n = 2\nquality = high", 3), ("n = 2\n\n\nn = 3", 5), ("a b", 2)],
)
def test_a_toml_mistake_is_reported_with_the_line_of_the_file(block, line):
    raw = f"+++\n{block}\n# end\n+++\na cat".encode()
    assert f"(at line {line}, column" in problem(raw).reason


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("provider = openai", 'provider = "openai"'),
        ("provider = “openai”  # not flux", 'provider = "openai"'),
        ("provider: openai", 'provider = "openai"'),
        ("size = 1024x1536", 'size = "1024x1536"'),
        ("  model=gpt-image-2", 'model = "gpt-image-2"'),
        ("n = two", ""),
        ('provider = "openai', ""),
        ('provider = open"ai', ""),
    ],
)
def test_an_option_whose_text_has_no_quotes_is_shown_with_them(line, right):
    hint = problem(f"+++\n{line}\n+++\na cat".encode()).hint
    assert hint == (
        f"put text in double quotes: {right}"
        if right
        else "front matter is TOML between two lines that are exactly +++"
    )


@pytest.mark.parametrize(
    "block",
    [
        "n = " + "[" * 5000,
        "n = " + "[" * 5000 + "]" * 5000,
        "n = " + "{a = " * 2000,
        "n" + ".a" * 6000 + " = 1",
        "x" + ".a" * 6000 + " = 1",
        "input_images" + ".a" * 6000 + " = 1",
        "[" + "n." * 6000 + "a]",
        "n = " + "9" * 5000,
        "n = 0x" + "f" * 5000,
        "seed = 0b" + "1" * 16000,
        "n = 1e999",
        "n = 2026-99-99",
        'model = "\\ud800"',
        "n = 1\n" * 2,
        "\x01 = 2",
    ],
    ids=range(15),
)
def test_toml_that_is_made_to_hurt_is_a_mistake_like_any_other(block):
    assert len(block) <= MAX_FRONT
    found = problem(front(block))
    assert len(str(found)) < 400


def test_front_matter_without_end_is_refused_unread():
    assert parse(front("#" * MAX_FRONT)).text == "a cat"
    found = problem(front("#" * (MAX_FRONT + 1)))
    assert found.reason == "more than 16,384 characters"


# Images that a prompt names


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/b.png",
        "/etc/passwd.png",
        "..",
        ".",
        "",
        "a\\b.png",
        "\\\\server\\share\\a.png",
        "C:\\a.png",
        "a\0.png",
        ".hidden.png",
        ".png",
        "~cat.png",
        "~$cat.png",
        "#cat.png",
        "cat.prompt.txt",
        "cat.png.part",
    ],
)
def test_only_a_visible_file_in_the_same_folder_may_be_named(name):
    found = problem(front(tomli_w.dumps({"input_images": [name, "good.png"]})))
    assert found.field == "input_images"
    assert shown(name) in found.reason


@pytest.mark.parametrize("letter", ["a", "é", "猫"])
def test_a_name_that_is_too_long_for_any_file_is_refused(letter):
    stem = letter * (251 // len(letter.encode()))
    longest = stem + "a" * (251 - len(stem.encode())) + ".png"
    assert declared(front(tomli_w.dumps({"input_images": [longest]}))) == (longest,)
    found = problem(front(tomli_w.dumps({"input_images": ["a" + longest]})))
    assert found.field == "input_images"
    assert "longer than 255 bytes" in found.reason


@pytest.mark.parametrize("name", ["cat.gif", "IMG_1.HEIC", "cat.jfif", "cat.jpg_large", "cat.bin", "cat", "cat.png "])
def test_an_image_may_be_named_whatever_its_ending_as_its_content_decides(name):
    assert declared(front(tomli_w.dumps({"input_images": [name]}))) == (name,)


def test_an_image_may_be_named_once():
    assert "twice" in problem(front('input_images = ["a.png", "b.png", "a.png"]')).reason


def test_at_most_fourteen_images_may_be_named():
    names = [f"{k}.png" for k in range(MAX_INPUTS + 1)]
    assert parse(front(tomli_w.dumps({"input_images": names[:-1]}))).front.input_images == tuple(names[:-1])
    assert problem(front(tomli_w.dumps({"input_images": names}))).reason == "15 images are more than 14"


def test_every_bad_name_is_reported():
    found = problems(front('input_images = ["../a.png", "b.prompt.txt", "c.png", ".d.png", "c.png"]'))
    assert len(found) == 4


def test_an_empty_list_of_images_is_not_the_same_as_none():
    assert declared(front("input_images = []")) == ()
    assert declared(front("n = 2")) is None
    assert declared(b"a cat") is None


@pytest.mark.parametrize("raw", [b"\xff", b"", front('input_images = ["a.png"]\nn = 9'), b"+++"])
def test_a_prompt_that_cannot_be_read_declares_nothing(raw):
    assert declared(raw) is None


# Tables


def test_options_that_are_not_set_come_from_below():
    upper = Options(n=2, quality="low")
    lower = Options(n=3, provider="openai", seed=0)
    assert upper.over(lower) == Options(n=2, quality="low", provider="openai", seed=0)
    assert Options(seed=0).over(Options(seed=5)).seed == 0


def test_a_faulty_key_is_left_at_its_default_and_the_others_are_used():
    made, found = check({"n": 9, "seed": 3}, Options, "defaults.")
    assert made == Options(seed=3)
    assert [item.field for item in found] == ["defaults.n"]


def test_a_close_name_is_suggested_and_else_all_are_listed():
    assert nearest("qualitty", ["quality", "n"]) == 'did you mean "quality"?'
    assert nearest("xyz", ["quality", "n"]) == "known keys: n, quality"


def test_a_value_is_shown_in_ascii_and_never_at_length():
    assert shown("ü\n") == "'\\xfc\\n'"
    assert len(shown("x" * 1000)) == 60
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == shown(1 << 100_000) == "a value too large to be shown"


# Anything


@given(
    st.one_of(
        st.binary(max_size=200), st.builds(lambda a, b: a + b, st.sampled_from([b"+++\n", b"---\n"]), st.binary())
    )
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_prompt_or_a_list_of_problems(raw):
    read = outcome(raw)
    assert read
    if isinstance(read, Prompt):
        assert read.text == read.text.strip() != ""


toml_scraps = st.lists(
    st.sampled_from(
        ["n", "seed", "input_images", "size", " = ", ".", "[", "]", "{", "}", '"', "'", "1", "-", "_", "nan"]
    )
    | st.sampled_from(
        ["\n", "#", ",", "0x", "e9", '"""', "\\u0000", "2026-01-01", "true", "\x7f", "é", "a.png", "T1:0"]
    ),
    max_size=12,
).map("".join)


@given(toml_scraps)
@settings(max_examples=300, deadline=None)
def test_any_scraps_of_toml_are_front_matter_or_a_list_of_problems(block):
    assert outcome(front(block))


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), max_size=200)


@given(plain, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.sampled_from(["\n", "\r\n", "\r"]))
@settings(max_examples=200, deadline=None)
def test_text_without_fences_comes_back_as_it_is(text, encoding, end):
    text = f"a{text}z"
    assert parse(text.replace("\n", end).encode(encoding)) == Prompt(text, FrontMatter())


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
images = st.builds(
    lambda stem, suffix: f"{stem}.{suffix}",
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0"), min_size=1, max_size=20).filter(
        lambda stem: stem[0] not in ".~#"
    ),
    st.sampled_from(["png", "JPG", "jpeg", "Webp"]),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "provider": st.sampled_from(["auto", "flux", "gemini", "openai"]),
        "model": words,
        "n": st.integers(1, 4),
        "size": words,
        "quality": st.sampled_from(["low", "medium", "high", "auto"]),
        "output_format": st.sampled_from(["png", "jpeg", "webp"]),
        "seed": st.integers(-(2**53), 2**53),
        "input_images": st.lists(images, max_size=14, unique=True),
        "preset": words,
    },
)


@given(options, plain, st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=200, deadline=None)
def test_valid_front_matter_comes_back_as_it_was_written(table, text, end):
    raw = f"+++\n{tomli_w.dumps(table)}+++\na{text}z".replace("\n", end).encode()
    read = parse(raw)
    assert read.text == f"a{text}z"
    set_ = {name: value for name in table if (value := getattr(read.front, name)) is not None}
    assert {**set_, **({"input_images": list(set_["input_images"])} if "input_images" in set_ else {})} == table
    assert declared(raw) == (tuple(table["input_images"]) if "input_images" in table else None)


signs = st.lists(
    st.sampled_from(
        ["+++", "++++", "---", "```", "~~~", "n = 2", "n: 2", "a cat", "", " ", "toml", "<html>", "</html>"]
    )
    | st.sampled_from(
        ["{\\rtf1", "<<<<<<< a", "=======", ">>>>>>> b", "\ufeff", "\uff0b" * 3, "\u2028", "<!--", "-->"]
    ),
    max_size=10,
).map("\n".join)


@given(signs)
@settings(max_examples=500, deadline=None)
def test_any_mixture_of_signs_is_a_prompt_or_a_problem_and_options_are_never_prose(text):
    read = outcome(text.encode())
    if isinstance(read, Prompt) and read.front == FrontMatter():
        assert not read.text.startswith(("+++\nn = 2\n", "++++\n", "n = 2\n+++", "---\nn: 2")) or text.startswith(
            "+++\n"
        )


@given(signs)
@settings(max_examples=500, deadline=None)
def test_of_any_mixture_of_signs_that_is_sent_people_are_shown_what_was_sent(text):
    read = outcome(text.encode())
    shown_text = text_for_people(text.encode())
    assert not isinstance(read, Prompt) or shown_text == read.text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=100), signs)
@settings(max_examples=300, deadline=None)
def test_signs_of_other_files_after_the_beginning_of_a_text_are_a_part_of_it(text, rest):
    """Only the markers of a merge conflict are searched in the whole text."""
    if "<<<<<<< a" not in rest:
        assert isinstance(outcome(f"A poster: {text}\n{rest}".encode()), Prompt)
