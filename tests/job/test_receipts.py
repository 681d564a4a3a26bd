"""Texts about a job: receipts, error files, lines on a terminal, job records."""

from __future__ import annotations

import hashlib
import math
import os
import tomllib
import unicodedata
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch import __version__
from imagewatch.job.receipts import SCHEMA, compose, unvouched, with_files
from imagewatch.job.running import NO_ATTEMPT, Attempt
from imagewatch.protocol.values import Claim, Decision, Head, Input, Move, Sent, Tail, dump, load
from imagewatch.system.text import printable, utc, whole

CLAIM = Claim(
    job="7f3a9c0d1e2b4a5f", folder="a/b", stem="cat", images=("cat.png",), size=5, mtime_ns=7, at=1_800_000_000.1239
)
INPUT = Input(file="cat.png", mime="image/png", bytes=70, width=1, height=2, sha256="ab" * 32)
SENT_AT, ANSWERED_AT, TAIL_AT, FINISHED = 1_800_000_001.0, 1_800_000_002.0, 1_800_000_003.5, 1_800_000_004.0


def sent(prompt="a cat", **fields):
    return Sent(
        prompt=prompt,
        prompt_sha256=hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest(),
        fields={"provider": "flux", **fields},
        inputs=(INPUT,),
        contents={"cat.prompt.txt": "00" * 32},
        endpoint="https://api.letta.com/v1/images/generations",
        at=SENT_AT,
    )


def composed(what, claim=CLAIM):
    made = what.pop("attempts", 0)
    attempt = Attempt(made, *(what.pop(name, None) for name in ("sent", "head", "tail")), made=made)
    return compose(claim, attempt, what.pop("finished", 0.0), **what)[0]


def result_file(**given_):
    """Compose a result file and read it."""
    what = {"charged": "yes", "finished": FINISHED, "top": {}, **given_}
    return tomllib.loads(composed(what))


TOP = {
    "charged": "yes",
    "credits_charged": 12.0,
    "provider": "flux",
    "model": "flux-2-pro",
    "asked": 2,
    "got": 1,
    "problems": ["asked for 2, got 1"],
}


def receipt_text(**given_):
    what = {
        "charged": "yes",
        "sent": sent(n=2, seed=5),
        "head": Head(status=200, headers={"x-request-id": "r1", "cf-ray": "c1", "server": "x"}, at=ANSWERED_AT),
        "tail": Tail(complete=True, at=TAIL_AT),
        "attempts": 3,
        "finished": FINISHED,
        "top": TOP,
        "images": [{"file": "cat.png", "mime": "image/png", "bytes": 70, "width": None, "sha256": "cd" * 32}],
        "billing": {"credits_charged": 12, "note": "…"},
        **given_,
    }
    return composed(what)


# Receipts and error files


def test_a_receipt_contains_everything_about_a_job():
    assert tomllib.loads(receipt_text()) == {
        "schema": SCHEMA,
        "job": CLAIM.job,
        "source": "a/b/cat.prompt.txt",
        "problems": ["asked for 2, got 1"],
        "charged": "yes",
        "credits_charged": 12,
        "provider": "flux",
        "model": "flux-2-pro",
        "prompt": "a cat",
        "prompt_sha256": hashlib.sha256(b"a cat").hexdigest(),
        "asked": 2,
        "got": 1,
        "attempts": 3,
        "endpoint": "https://api.letta.com/v1/images/generations",
        "version": __version__,
        "request": {"provider": "flux", "n": 2, "seed": 5},
        "billing": {"credits_charged": 12, "note": "…"},
        "times": {
            "claimed": datetime(2027, 1, 15, 8, 0, 0, 123000, tzinfo=UTC),
            "sent": datetime(2027, 1, 15, 8, 0, 1, tzinfo=UTC),
            "answered": datetime(2027, 1, 15, 8, 0, 3, 500000, tzinfo=UTC),
            "published": datetime(2027, 1, 15, 8, 0, 4, tzinfo=UTC),
        },
        "ids": {"x-request-id": "r1", "cf-ray": "c1"},
        "images": [{"file": "cat.png", "mime": "image/png", "bytes": 70, "sha256": "cd" * 32}],
        "inputs": [
            {"file": "cat.png", "mime": "image/png", "bytes": 70, "width": 1, "height": 2, "sha256": "ab" * 32},
        ],
    }


@pytest.mark.parametrize("key", ["a" + ".a" * 2000, "'\"'" + ".a" * 2000 + ".'\"'", '"x"' + ' . "\\u0041"' * 2000])
def test_keys_that_would_take_very_long_to_read_are_refused_unread(key):
    for text in (f"{key} = 1", f"[{key}]", f"x = {{{key} = 1}}", f'# """\n{key} = 1\n# """'):
        with pytest.raises(ValueError, match="more than 1000 dots"):
            unvouched(text)


def test_our_own_result_files_can_be_read_like_untrusted_ones():
    text = receipt_text(sent=sent("a sentence. " * 900, n=2))
    assert unvouched(text) == tomllib.loads(text)


def test_the_keys_come_in_the_order_of_the_folder_protocol():
    top = {"next": "move it back", **TOP, "code": "c", "message": "m", "status": 402, "credits_required": 30}
    keys = list(tomllib.loads(receipt_text(top=top)))
    assert " ".join(keys) == (
        "schema job source message status code credits_required problems next charged credits_charged provider "
        "model prompt prompt_sha256 asked got attempts endpoint version request billing times ids images inputs"
    )


def test_an_error_file_before_any_call_contains_what_is_known_and_nothing_else():
    read = result_file(charged="no", top={"message": "there is no text", "problems": ["prompt: there is no text"]})
    assert list(read) == ["schema", "job", "source", "message", "problems", "charged", "attempts", "version", "times"]
    assert list(read["times"]) == ["claimed", "published"]
    assert read["attempts"] == 0


def test_what_is_not_known_is_left_out():
    read = result_file(top={"code": None, "credits_required": None, "message": ""})
    assert "None" not in receipt_text()
    assert not {"code", "credits_required", "billing", "ids", "images", "inputs"} & set(read)
    assert read["message"] == ""


def test_a_response_without_an_end_time_is_dated_by_its_start():
    for tail in (None, Tail(complete=False)):
        read = tomllib.loads(receipt_text(tail=tail))
        assert read["times"]["answered"] == datetime(2027, 1, 15, 8, 0, 2, tzinfo=UTC)


def test_only_headers_that_help_support_staff_are_listed():
    head = Head(status=200, headers={"authorization": "Bearer sk-let-secret", "set-cookie": "x", "x-vercel-id": "v"})
    text = receipt_text(head=head)
    assert tomllib.loads(text)["ids"] == {"x-vercel-id": "v"}
    assert "secret" not in text


def test_a_prompt_of_many_lines_is_written_in_many_lines():
    text = receipt_text(sent=sent("first\n\nthird"))
    assert '"""\nfirst\n\nthird"""' in text


@pytest.mark.parametrize(
    "prompt",
    [
        'She said "no"\nand """then""" \\ \\n \\u0041 """"""',
        '"\n"',
        '"""\n',
        "\n",
        "\n\n",
        "\\\n",
        "ends in a backslash\n\\",
        "a\r\nb",
        "a\rb\n",
        "a\r\n\nb",
        "tab\there\nthere",
        "\x01\x1b[31m\x7f\x80\x9f\n",
        "'''\n'''",
        "# not a comment\n[table]\nkey = 1",
        "\u2028\u2029\u0085\n\ufeff",
        "🐈\n猫",
    ],
)
def test_awkward_prompts_come_back_exactly(prompt):
    assert tomllib.loads(receipt_text(sent=sent(prompt)))["prompt"] == prompt


def test_billing_survives_whatever_it_holds():
    billing = {
        "credits_charged": 12.0,
        "null": None,
        "list": [1, None, "a", [None], {"b": None, "c": 1}],
        "huge": 10**60,
        "minus huge": -(10**60),
        "edge": [2**63 - 1, -(2**63), 2**63],
        "float": 0.1,
        "big float": 1e300,
        "nan": math.nan,
        "inf": -math.inf,
        "yes": True,
        "": {"": ""},
        'key "with"\nall\\': "x\r\ny",
        "bytes": "\udce9",
        "\udce9": 1,
        "empty": {},
        "none": [],
    }
    read = result_file(billing=billing)["billing"]
    assert math.isnan(read.pop("nan"))
    assert read == {
        "credits_charged": 12,
        "list": [1, "a", [], {"c": 1}],
        "huge": str(10**60),
        "minus huge": str(-(10**60)),
        "edge": [2**63 - 1, -(2**63), str(2**63)],
        "float": 0.1,
        "big float": 1e300,
        "inf": -math.inf,
        "yes": True,
        "": {"": ""},
        'key "with"\nall\\': "x\r\ny",
        "bytes": "\\udce9",
        "\\udce9": 1,
        "empty": {},
        "none": [],
    }
    assert isinstance(read["credits_charged"], int)
    assert read["yes"] is True


@pytest.mark.parametrize("depth", [10, 20, 300, 600, 900, 5000])
@pytest.mark.parametrize("kind", ["tables", "lists", "both"])
def test_billing_may_be_nested_to_any_depth(depth, kind):
    nested: object = 1
    for level in range(depth):
        nested = [nested] if kind == "lists" or (kind == "both" and level % 2) else {"a": nested}
    read = result_file(billing={"credits_charged": 12, "deep": nested})
    assert read["billing"]["credits_charged"] == 12
    assert "deep" in read["billing"]


def test_names_that_are_no_text_are_written_with_escapes():
    claim = Claim(job="ab" * 8, folder="\udce9", stem="c\udce9t", at=1.0)
    read = tomllib.loads(compose(claim, NO_ATTEMPT, 2.0, charged="no", top={"message": "\udcff"})[0])
    assert read["source"] == "\\udce9/c\\udce9t.prompt.txt"
    assert read["message"] == "\\udcff"


any_text = st.text(st.characters(exclude_categories=["Cs"]))
prompts = st.lists(
    st.sampled_from(['"', '"""', "\\", "\n", "\r\n", "\r", "'", "'''", "\x7f", "\x1b", " ", "#", "=", "\\u0041"])
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
    max_size=20,
).map("".join)


@given(prompts)
@settings(max_examples=300, deadline=None)
def test_any_prompt_comes_back_exactly(prompt):
    assert tomllib.loads(receipt_text(sent=sent(prompt)))["prompt"] == prompt


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def same(value, read):
    """Whether two values are equal, as far as TOML can represent them."""
    if isinstance(value, dict):
        kept = {whole(key): inner for key, inner in value.items()}
        kept = {key: inner for key, inner in kept.items() if inner is not None}
        return set(read) == set(kept) and all(same(inner, read[key]) for key, inner in kept.items())
    if isinstance(value, list):
        kept = [item for item in value if item is not None]
        return len(kept) == len(read) and all(map(same, kept, read))
    if isinstance(value, str):
        return read == whole(value)
    if isinstance(value, float) and math.isnan(value):
        return math.isnan(read)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return read == str(value)
    return bool(read == value) and isinstance(read, bool) == isinstance(value, bool)


@given(st.dictionaries(st.text(max_size=8), json_values, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_billing_makes_a_result_file_that_can_be_read(billing):
    assert same(billing, result_file(billing=billing)["billing"])


@given(st.text(), st.lists(st.text(), max_size=3), st.text(), st.text())
@settings(max_examples=200, deadline=None)
def test_any_message_makes_a_result_file_that_can_be_read(message, problems, code, name):
    top = {"message": message, "problems": problems, "code": code}
    read = result_file(top=top, images=[{"file": name, "problem": message}], sent=sent(model=name))
    assert (read["message"], read["problems"], read["code"]) == (whole(message), [*map(whole, problems)], whole(code))
    assert read["images"][0]["file"] == read["request"]["model"] == whole(name)
    assert (read["charged"], read["job"], read["attempts"]) == ("yes", CLAIM.job, 0)


# Text


@given(st.text(), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_no_printed_text_moves_the_cursor_or_reverses_a_line(text, limit):
    shown = printable(text, limit)
    for character in shown:
        assert unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
        assert unicodedata.bidirectional(character) not in {
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        }
    shown.encode()
    assert shown.isprintable() or text
    assert len(shown) <= 10 * (limit + 1)


def test_every_control_bidirectional_mark_and_surrogate_becomes_an_escape():
    unsafe = [
        chr(code)
        for code in range(0x110000)
        if unicodedata.category(chr(code)) in {"Cc", "Cs", "Zl", "Zp"}
        or unicodedata.bidirectional(chr(code)) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
        or chr(code) in "\u061c\u200b\u200e\u200f\ufeff"
        or 0xE0000 <= code <= 0xE007F  # invisible letters that a model reads
    ]
    assert len(unsafe) > 2100
    for character in unsafe:
        shown = printable(f"a{character}b")
        assert shown.isascii()
        assert shown.startswith("a\\")
        assert shown.isprintable()


def test_ordinary_text_of_any_language_is_unchanged():
    for text in ("a cat", "Ünïcödé", "猫 🐈", "שלום", "C:\\cat", "a\u0301", "\u00a0"):
        assert printable(text) == text


def test_long_text_is_cut_and_the_cut_is_marked():
    assert printable("x" * 2001) == "x" * 2000 + "…"
    assert printable("x" * 2000) == "x" * 2000
    assert printable("abcdef", 3) == "abc…"


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_complete_text_fits_into_any_file_and_is_unchanged_if_it_is_short(text):
    printed = whole(text)
    printed.encode()
    assert whole(printed) == printed
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert printed == text


def test_a_time_is_written_in_utc_to_the_millisecond():
    assert utc(1.9999) == datetime(1970, 1, 1, 0, 0, 1, 999000, tzinfo=UTC)
    assert utc(0).isoformat() == "1970-01-01T00:00:00+00:00"


# Records

names = st.binary(min_size=1, max_size=20).map(os.fsdecode)
claims = st.builds(
    Claim,
    job=st.text("0123456789abcdef", min_size=16, max_size=16),
    folder=names | st.just(""),
    stem=names,
    images=st.lists(names, max_size=3).map(tuple),
    declared=st.booleans(),
    size=st.integers(0, 2**60),
    mtime_ns=st.integers(-(2**62), 2**62),
    at=st.floats(0, 1e11),
)
moves = st.lists(st.builds(Move, source=names, name=names), max_size=3).map(tuple)
decisions = st.builds(
    Decision,
    destination=st.sampled_from(["outbox", "errors"]),
    moves=moves,
    name=names,
    result_file=any_text,
    keep=moves,
)
heads = st.builds(
    Head, status=st.integers(0, 999), headers=st.dictionaries(any_text, any_text, max_size=3), at=st.floats(0, 1e11)
)
sents = st.builds(
    Sent,
    prompt=any_text,
    prompt_sha256=any_text,
    fields=st.dictionaries(any_text, any_text | st.integers(-(2**53), 2**53), max_size=3),
    inputs=st.lists(
        st.builds(
            Input,
            file=names,
            mime=any_text,
            bytes=st.integers(0, 2**50),
            width=st.integers(0, 2**31),
            height=st.integers(0, 2**31),
            sha256=any_text,
        ),
        max_size=2,
    ).map(tuple),
    contents=st.dictionaries(any_text, any_text, max_size=2),
    endpoint=any_text,
    at=st.floats(0, 1e11),
)


@given(st.one_of(claims, decisions, heads, sents, st.builds(Tail, complete=st.booleans(), reason=any_text)))
@settings(max_examples=300, deadline=None)
def test_a_record_comes_back_as_it_was_written_in_one_line(record):
    raw = dump(record)
    assert b"\n" not in raw
    assert load(raw, type(record)) == record


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"\0" * 64,
        b'{"job":1,"folder":"","stem":"cat"}',
        b'{"job":"a","folder":"","stem":"cat","images":[1]}',
        b'{"job":"a","folder":"","stem":"cat"} x',
    ],
)
def test_a_damaged_record_is_a_value_error(raw):
    with pytest.raises(ValueError):  # noqa: PT011  the words are of the json module, of msgspec, of the codec
        load(raw, Claim)


def test_a_record_of_a_later_version_with_more_keys_can_be_read():
    raw = msgspec.json.encode({"job": "a", "folder": "", "stem": "cat", "invented_later": 1})
    assert load(raw, Claim).prompt == "cat.prompt.txt"


def test_a_claim_knows_the_names_that_follow_from_it():
    claim = Claim(job="7f3a9c0d1e2b4a5f", folder="", stem="cat", images=("cat.png", "cat.gif"))
    assert claim.originals == ("cat.png", "cat.gif", "cat.prompt.txt")
    assert claim.tag == "7f3a"
    assert claim.source == "cat.prompt.txt"
    assert CLAIM.source == "a/b/cat.prompt.txt"


def test_one_image_is_asked_for_unless_the_request_says_more():
    assert (sent().asked, sent(n=3).asked) == (1, 3)


@pytest.mark.parametrize(
    "advice", ["imagewatch retry {} reads it again", "imagewatch retry --pay-again {}, or move the prompt"]
)
def test_an_error_file_whose_name_existed_names_its_own_prompt_to_retry(advice: str):
    top = {"message": "cat: no catalogue", "next": advice.format("sub/cat")}
    claim = Claim(job="0123456789abcdef", folder="sub", stem="cat")
    result_file, _ = compose(claim, NO_ATTEMPT, 2.0, charged="unknown", top=top)
    read = tomllib.loads(with_files(result_file, {}, "sub/cat", "sub/cat.0123"))
    assert (read["next"], read["message"]) == (advice.format("sub/cat.0123"), top["message"])
