"""The wire format: what is sent, what a response means, and what is kept of a charged response."""

from __future__ import annotations

import base64
import email.utils
import gzip
import hashlib
import io
import itertools
import json
import random
import zlib
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewatch.config.schema import Options
from imagewatch.endpoint.api import charge_unknown, classify
from imagewatch.endpoint.body import Body
from imagewatch.endpoint.decode import read
from imagewatch.protocol.options import body_fields, choose_provider
from imagewatch.protocol.reasons import Reaction
from imagewatch.protocol.request import Part
from imagewatch.protocol.values import Head
from imagewatch.system.errors import ChargeUnknown, JobError

LIMIT = 50 << 20


# The request


@pytest.mark.parametrize(
    ("options", "has_inputs", "provider"),
    [
        (Options(), False, "flux"),
        (Options(provider="auto"), False, "flux"),
        (Options(n=4, seed=1), False, "flux"),
        (Options(model="x", provider="openai"), True, "openai"),
        (Options(), True, "gemini"),
        (Options(size="1024x1024", quality="high"), True, "gemini"),
        (Options(size="1024x1024"), False, "openai"),
        (Options(provider="auto", quality="low"), False, "openai"),
        (Options(output_format="webp"), False, "openai"),
        (Options(provider="flux", size="1024x1024"), True, "flux"),
        (Options(provider="openai"), True, "openai"),
        (Options(provider="gemini", quality="low"), False, "gemini"),
    ],
)
def test_a_provider_is_chosen_as_the_skill_advises_unless_it_is_named(options, has_inputs, provider):
    assert choose_provider(options, has_inputs=has_inputs) == provider


def test_only_what_is_set_is_sent():
    assert body_fields(Options(provider="auto"), "flux") == {"provider": "flux"}
    every = Options(provider="auto", model="m", n=2, size="1x1", quality="low", output_format="png", seed=0)
    assert body_fields(every, "openai") == {
        "provider": "openai",
        "model": "m",
        "n": 2,
        "size": "1x1",
        "quality": "low",
        "output_format": "png",
        "seed": 0,
    }


def part(data: bytes, mime: str = "image/png", *, now: bytes | None = None) -> Part:
    """An input image; ``now`` is the content of the file when it is sent."""
    there = data if now is None else now
    return Part(lambda: io.BytesIO(there), mime, len(data), hashlib.sha256(data).hexdigest())


def whole_body(prompt, fields, images, mime="image/png"):
    """The same request from an ordinary encoder."""
    table = {**fields, "prompt": prompt}
    if images:
        table["input_images"] = [f"data:{mime};base64,{base64.b64encode(image).decode()}" for image in images]
    return table


SIZES = [0, 1, 2, 3, 4, 5, 6, 100, 48 * 1024 - 1, 48 * 1024, 48 * 1024 + 1, 96 * 1024, 96 * 1024 + 2, 150_001]


@pytest.mark.parametrize("count", range(15))
def test_the_body_is_the_json_of_the_request_and_exactly_as_long_as_it_said(count):
    images = [random.Random(k).randbytes(size) for k, size in enumerate(SIZES[:count])]
    prompt, fields = 'a "cat" 猫\n\\ 🐈', {"provider": "gemini", "n": 2}
    body = Body(prompt, fields, [part(image) for image in images])
    sent = b"".join(body)
    assert len(sent) == body.length
    assert json.loads(sent) == whole_body(prompt, fields, images)


def test_the_body_can_be_sent_twice():
    body = Body("a cat", {"provider": "flux"}, [part(b"12345")])
    assert b"".join(body) == b"".join(body)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.binary(max_size=20), max_size=14))
@settings(max_examples=200, deadline=None)
def test_any_prompt_and_any_images_make_the_body_that_was_announced(prompt, images):
    body = Body(prompt, {"provider": "gemini"}, [part(image, "image/jpeg") for image in images])
    sent = b"".join(body)
    assert len(sent) == body.length
    assert json.loads(sent) == whole_body(prompt, {"provider": "gemini"}, images, "image/jpeg")


def sent_until_it_breaks(body: Body) -> bytes:
    sent: list[bytes] = []
    with pytest.raises(JobError, match="changed while it was sent"):
        sent.extend(body)
    return b"".join(sent)


IMAGE = random.Random(1).randbytes(100_001)


@pytest.mark.parametrize(
    "now",
    [
        b"",
        IMAGE[:1],
        IMAGE[:-1],
        IMAGE[: 48 * 1024],
        IMAGE[: 96 * 1024],
        bytes(len(IMAGE)),
        IMAGE[:-1] + bytes([IMAGE[-1] ^ 1]),
        bytes([IMAGE[0] ^ 1]) + IMAGE[1:],
        b"x" + IMAGE,
    ],
    ids=["emptied", "1 byte", "1 less", "1 piece", "2 pieces", "zeros", "last byte", "first byte", "shifted"],
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_request_whose_image_differs_from_the_checked_one_stays_incomplete(now, after):
    body = Body("a cat", {"provider": "gemini"}, [part(b"first"), part(IMAGE, now=now), *[part(b"last")] * after])
    assert len(sent_until_it_breaks(body)) < body.length


@pytest.mark.parametrize("size", range(1, 10))
def test_a_request_whose_small_image_lost_a_byte_stays_incomplete(size):
    body = Body("a cat", {"provider": "gemini"}, [part(b"x" * size, now=b"x" * (size - 1))])
    assert len(sent_until_it_breaks(body)) < body.length


def test_of_an_image_that_grew_only_the_checked_part_is_sent():
    body = Body("a cat", {"provider": "gemini"}, [part(IMAGE, now=IMAGE + b"more")])
    sent = b"".join(body)
    assert len(sent) == body.length
    assert json.loads(sent) == whole_body("a cat", {"provider": "gemini"}, [IMAGE])


# What a response means


def verdict_of(status, body=b"", **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    at = 1_800_000_000.0
    return classify(
        Head(status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}, at=at), lambda: raw
    )


@pytest.mark.parametrize(
    ("status", "body", "reaction", "kind"),
    [
        (0, b"", Reaction.WAIT, "unreachable"),
        (200, b"", Reaction.SUCCESS, "completed"),
        (201, b"garbage", Reaction.SUCCESS, "completed"),
        (204, b"", Reaction.SUCCESS, "completed"),
        (299, b"", Reaction.SUCCESS, "completed"),
        (429, b"", Reaction.RETRY, "busy"),
        (429, {"error": "slow down", "errorCode": "route_rps_rate_limit_exceeded"}, Reaction.RETRY, "busy"),
        (429, b"<html>", Reaction.RETRY, "busy"),
        (503, {"errorCode": "cloud_api_shutting_down", "admitted": False, "retryable": True}, Reaction.RETRY, "busy"),
        (503, {"error": {"admitted": False}}, Reaction.RETRY, "busy"),
        (401, b"", Reaction.ACCOUNT, "key"),
        (403, {"message": "no"}, Reaction.ACCOUNT, "key"),
        (402, {"message": "no", "credits_required": 30}, Reaction.ACCOUNT, "credits"),
        (429, {"error": "x", "reasons": ["exceeded-quota"]}, Reaction.ACCOUNT, "quota"),
        (429, {"error": {"error": "x", "reasons": ["premium-usage-exceeded"]}}, Reaction.ACCOUNT, "quota"),
        (429, {"errorCode": "exceeded-quota"}, Reaction.ACCOUNT, "quota"),
        (429, {"reasons": ["a", None, 3, ["b"], "free-usage-exceeded"]}, Reaction.ACCOUNT, "quota"),
        (429, {"reasons": "agents-limit-exceeded"}, Reaction.ACCOUNT, "quota"),
        (429, {"reasons": ["model-unknown"]}, Reaction.ACCOUNT, "quota"),
        (429, {"reasons": ["not-enough-credits"]}, Reaction.ACCOUNT, "quota"),
        (429, {"timeToQuotaResetMs": 1000}, Reaction.ACCOUNT, "quota"),
        (404, b"<!doctype html><title>Not here</title>", Reaction.ACCOUNT, "endpoint"),
        (405, b"", Reaction.ACCOUNT, "endpoint"),
        (301, b"", Reaction.ACCOUNT, "endpoint"),
        (302, b"", Reaction.ACCOUNT, "endpoint"),
        (304, b"", Reaction.ACCOUNT, "endpoint"),
        (308, b"", Reaction.ACCOUNT, "endpoint"),
        (400, {"message": "bad"}, Reaction.REFUSED, "refused"),
        (400, b"", Reaction.REFUSED, "refused"),
        (409, {"message": "bad"}, Reaction.REFUSED, "refused"),
        (413, b"<html>", Reaction.REFUSED, "refused"),
        (415, b"", Reaction.REFUSED, "refused"),
        (422, {"detail": "bad"}, Reaction.REFUSED, "refused"),
        (500, {"message": "unknown model"}, Reaction.REFUSED, "refused"),
        (500, b"", Reaction.UNKNOWN, "unknown"),
        (500, {}, Reaction.UNKNOWN, "unknown"),
        (500, b"<html>oops</html>", Reaction.UNKNOWN, "unknown"),
        (500, b'{"message": "cut sho', Reaction.UNKNOWN, "unknown"),
        (408, {"message": "too slow"}, Reaction.UNKNOWN, "unknown"),
        (501, {"message": "x"}, Reaction.UNKNOWN, "unknown"),
        (502, b"<html>", Reaction.UNKNOWN, "unknown"),
        (503, b"", Reaction.UNKNOWN, "unknown"),
        (503, {"errorCode": "cloud_api_deployment_interrupted"}, Reaction.UNKNOWN, "unknown"),
        (503, {"admitted": True}, Reaction.UNKNOWN, "unknown"),
        (503, {"admitted": None}, Reaction.UNKNOWN, "unknown"),
        (503, {"admitted": 0}, Reaction.UNKNOWN, "unknown"),
        (503, {"admitted": "false"}, Reaction.UNKNOWN, "unknown"),
        (504, {"message": "x"}, Reaction.UNKNOWN, "unknown"),
        *[
            (status, {"cloudflare_error": True, "status": status}, Reaction.UNKNOWN, "unknown")
            for status in range(520, 528)
        ],
        (502, {"admitted": False}, Reaction.UNKNOWN, "unknown"),
        (100, b"", Reaction.UNKNOWN, "unknown"),
        (101, b"", Reaction.UNKNOWN, "unknown"),
        (600, b"", Reaction.UNKNOWN, "unknown"),
        (999, b"", Reaction.UNKNOWN, "unknown"),
    ],
)
def test_every_response_means_what_the_table_of_the_folder_protocol_says(status, body, reaction, kind):
    verdict = verdict_of(status, body)
    assert (verdict.reaction, verdict.reason.kind) == (reaction, kind)


def test_only_a_success_counts_as_charged_and_only_a_certainly_free_request_may_be_sent_again():
    bodies = [b"", b"{}", {"message": "x"}, {"admitted": False}, {"reasons": ["exceeded-quota"]}, b"<html>"]
    for status in range(1000):
        for body in bodies:
            reaction = verdict_of(status, body).reaction
            assert (reaction is Reaction.SUCCESS) == (200 <= status < 300)
            if reaction is Reaction.RETRY:
                assert status == 429 or (status == 503 and body == {"admitted": False})
            assert (reaction is Reaction.WAIT) == (status == 0)


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"message": "unknown model"}, "unknown model", ""),
        ({"error": "no such thing"}, "no such thing", ""),
        ({"error": "x", "errorCode": "route_rps_rate_limit_exceeded"}, "x", "route_rps_rate_limit_exceeded"),
        ({"errorCode": "c", "message": " m \n"}, "m", "c"),
        ({"detail": "why"}, "why", ""),
        ({"error": "short", "reasons": ["not-enough-credits"], "reason_text": "buy some"}, "buy some", ""),
        ({"error": {"error": "short", "reasons": [], "reason_text": "buy some"}}, "buy some", ""),
        ({"error": {"error": "short", "reasons": ["exceeded-quota"]}}, "short", ""),
        ({"error": {"type": "t", "message": "m", "detail": "d"}, "run_id": "r"}, "m", "t"),
        ({"error": {"code": "c", "detail": "d"}}, "d", "c"),
        ({"error": {"error": {"message": "deep"}}}, "deep", ""),
        ({"message": None, "error": {"message": "inner"}}, "inner", ""),
        ({"message": "", "error": "outer"}, "outer", ""),
        ({"message": "  ", "detail": "d", "code": 7}, "d", ""),
        (
            {
                "issues": [{"path": ["input_images", 3], "message": "Invalid"}, {"message": "and more"}],
                "name": "ZodError",
            },
            "input_images.3: Invalid; and more",
            "",
        ),
        (
            {"success": False, "error": {"issues": [{"path": ["n"], "message": "Too big"}], "name": "ZodError"}},
            "n: Too big",
            "",
        ),
        (
            {"issues": [{"path": [], "message": "root"}, "plain", 3, {"path": "n"}, {}]},
            "root; plain; 3; {'path': 'n'}; {}",
            "",
        ),
        ({"issues": [{"message": " "}, ""]}, ";", ""),
        ({"issues": []}, '{"issues": []}', ""),
        ({"other": 1}, '{"other": 1}', ""),
        (b"plain words\n", "plain words", ""),
        (b"[1, 2]", "[1, 2]", ""),
        (b"", "HTTP 400 without a message", ""),
        (b" \n", "HTTP 400 without a message", ""),
        (b"<!DOCTYPE html><html><title>\n 502: Bad\n gateway </title><body>", "502: Bad gateway", ""),
        (b"<html><body>no title", "a web page instead of a response", ""),
        (b"\n<HTML><HEAD><TITLE>Loud</TITLE>", "Loud", ""),
        (b"<html><title></title>", "HTTP 400 without a message", ""),
        (b"caf\xe9", "caf\ufffd", ""),
        (b'{"message": "cut sho', '{"message": "cut sho', ""),
    ],
)
def test_the_message_of_the_api_is_found_in_every_shape(body, message, code):
    verdict = verdict_of(400, body)
    assert (verdict.reason.message, verdict.code) == (message, code)


def test_raw_text_is_cut():
    assert verdict_of(502, b"x" * 5000).reason.message == "x" * 2000


@pytest.mark.parametrize(
    ("body", "required"),
    [
        ({"credits_required": 30}, 30.0),
        ({"credits_required": 12.5}, 12.5),
        ({"error": {"credits_required": 7}}, 7.0),
        ({"credits_required": 0}, 0.0),
        ({"credits_required": True}, None),
        ({"credits_required": "many"}, None),
        ({"credits_required": None}, None),
        ({"credits_required": 10**400}, None),
        ({}, None),
    ],
)
def test_the_credits_that_a_request_would_have_needed_are_kept(body, required):
    assert verdict_of(402, body).credits_required == required


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("0", 0),
        ("1.5", 1.5),
        ("999999999", 999999999),
        ("", None),
        ("-7", None),
        ("soon", None),
        ("1e3", None),
        ("9999999999", None),
        ("\u0667", None),
        ("nan", None),
        (email.utils.formatdate(1_800_000_090, usegmt=True), 90),
        (email.utils.formatdate(1_799_999_000, usegmt=True), 0),
        ("Fri, 15 Jan 2027 08:01:30 +0000", 90),
        ("Fri, 15 Jan 2027 09:01:30 +0100", 90),
        ("Fri, 15 Jan 99999 08:01:30 GMT", None),
        ("Fri, 99 Foo 2027", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, seconds):
    assert verdict_of(429, retry_after=header).reason.seconds == seconds


def test_without_retry_after_there_is_none():
    assert verdict_of(429).reason.seconds is None


def test_a_503_puts_requests_on_hold_for_at_most_half_a_minute():
    typed = {"admitted": False}
    assert verdict_of(503, typed, retry_after="3600").reason.seconds == 30
    assert verdict_of(503, typed, retry_after="3").reason.seconds == 3
    assert verdict_of(503, typed, retry_after=email.utils.formatdate(1_800_009_000, usegmt=True)).reason.seconds == 30
    assert verdict_of(429, retry_after="3600").reason.seconds == 3600


def test_a_used_up_quota_is_waited_for_until_its_own_reset_time():
    quota = {"reasons": ["exceeded-quota"], "timeToQuotaResetMs": 90_000}
    assert verdict_of(429, quota, retry_after="5").reason.seconds == 90
    assert verdict_of(429, {"error": quota}).reason.seconds == 90
    assert verdict_of(429, {**quota, "timeToQuotaResetMs": "x"}, retry_after="5").reason.seconds == 5
    assert verdict_of(429, {"reasons": ["exceeded-quota"]}).reason.seconds is None


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "message", "reasons", "issues", "path", "code", "detail", "admitted", "credits_required"]
            )
            | st.sampled_from(["errorCode", "reason_text", "timeToQuotaResetMs", "type"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.integers(0, 700) | st.sampled_from([402, 429, 500, 503]),
    st.binary(max_size=60) | json_like.map(lambda value: json.dumps(value).encode()),
    st.text(max_size=30) | st.text("0123456789:+- ,GMTJanFri", max_size=30),
)
@settings(max_examples=500, deadline=None)
def test_any_refusal_is_understood_however_unusual(status, raw, retry_after):
    verdict = classify(Head(status=status, headers={"retry-after": retry_after}, at=1e9), lambda: raw)
    assert verdict.reason.seconds is None or verdict.reason.seconds >= 0 or verdict.reason.kind == "quota"
    assert verdict.reason.message or 200 <= status < 300
    assert verdict.reason.message == verdict.reason.message.strip()


@pytest.mark.parametrize("depth", [*range(100, 900, 100), *range(940, 1010), 2000, 100_000])
def test_any_refusal_is_understood_however_deeply_nested(depth):
    for inner in (b'"x"', b"1"):
        nested = b"[" * depth + inner + b"]" * depth
        errors = b'{"error":' * depth + inner + b"}" * depth
        for body in (nested, errors, b'{"reasons":%s}' % nested, b'{"issues":[%s,{"path":%s}]}' % (nested, nested)):
            for status in (400, 429, 500):
                assert verdict_of(status, body).reason.message


def test_an_unknown_charge_is_reported_with_the_next_step():
    error = charge_unknown("the connection broke")
    assert isinstance(error, ChargeUnknown)
    assert "balance" in error.hint


# Decoding a charged response


class Kept(io.BytesIO):
    """A file whose content can be read after it was closed."""

    content = b""

    def close(self):
        if not self.closed:
            self.content = self.getvalue()
        super().close()


def decoded(chunks, encoding="", limit=LIMIT):
    files = {}

    def create(number):
        assert number not in files
        files[number] = Kept()
        return files[number]

    result = read([chunks] if isinstance(chunks, bytes) else chunks, encoding=encoding, limit=limit, create=create)
    assert all(file.closed for file in files.values())
    assert sorted(files) == list(range(len(files)))
    return result, [files[k].content for k in range(len(files))]


def good_images(result, files):
    """The good images, in order."""
    return [files[got.decoded] for got in result.images if got.decoded is not None and not got.problem]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def safe(data: bytes) -> str:
    """The alphabet that needs no escaping in a url."""
    text = base64.urlsafe_b64encode(data).decode()
    assert "-" in text
    assert "_" in text
    return text


PNG = b"\x89PNG\r\n\x1a\n" + random.Random(2).randbytes(301)
JPEG = b"\xff\xd8\xff\xe0" + random.Random(3).randbytes(200) + b"\xff\xd9"

GEMINI = {
    "provider": "gemini",
    "model": "gemini-3-pro-image",
    "images": [{"b64_json": b64(PNG), "mime_type": "image/png"}],
    "billing": {"credits_charged": 12, "...": "..."},
}
FLUX = {
    "provider": "flux",
    "model": "flux-2-pro",
    "images": [{"url": "https://cdn.example/a.png?sig=x&y=\u00e9", "mime_type": "image/png"}],
    "billing": {"credits_charged": 4.5},
}
OPENAI = {
    "images": [
        {"mime_type": "image/webp", "b64_json": b64(JPEG), "url": None, "revised_prompt": 'a "b64_json": "cat"'},
        {"b64_json": None, "url": "https://cdn.example/b.webp", "mime_type": "image/webp"},
        {"b64_json": b64(PNG[:-1]), "mime_type": "image/png"},
    ],
    "billing": {"credits_charged": 134, "nested": {"a": [1, None, {"b": 2.5}]}},
    "provider": "openai",
    "model": "gpt-image-2",
}


def test_a_response_of_gemini_is_one_image_in_base64():
    result, files = decoded(json.dumps(GEMINI).encode())
    (got,) = result.images
    assert (got.decoded, got.url, got.mime, got.problem) == (0, "", "image/png", "")
    assert files == [PNG]
    assert (result.provider, result.model, result.problem) == ("gemini", "gemini-3-pro-image", "")
    assert (result.billing, result.credits) == (GEMINI["billing"], 12.0)


def test_a_response_of_flux_is_a_url():
    result, files = decoded(json.dumps(FLUX).encode())
    (got,) = result.images
    assert (got.decoded, got.url, got.mime, got.problem) == (None, FLUX["images"][0]["url"], "image/png", "")
    assert files == []
    assert result.credits == 4.5


def test_a_response_may_mix_images_and_urls():
    result, files = decoded(json.dumps(OPENAI).encode())
    assert [(got.decoded, got.url) for got in result.images] == [(0, ""), (None, "https://cdn.example/b.webp"), (1, "")]
    assert files == [JPEG, PNG[:-1]]
    assert result.billing == OPENAI["billing"]


SPELLINGS = {
    "plain": lambda response: json.dumps(response).encode(),
    "compact": lambda response: json.dumps(response, separators=(",", ":")).encode(),
    "indented": lambda response: json.dumps(response, indent=4, separators=(" , ", " \n:\t")).encode(),
    "utf-8": lambda response: json.dumps(response, ensure_ascii=False).encode(),
    "escaped slashes": lambda response: json.dumps(response).replace("/", "\\/").encode(),
    "escaped signs": lambda response: json.dumps(response).replace("+", "\\u002b").replace("=", "\\u003D").encode(),
    "escaped padding": lambda response: json.dumps(response).replace("/", "\\u002F").replace("=", "\\u003d").encode(),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("response", [GEMINI, FLUX, OPENAI], ids=["gemini", "flux", "openai"])
def test_a_response_in_pieces_of_any_size_is_decoded_the_same(response, spelling):
    raw = spelling(response)
    expected = decoded(raw)
    assert good_images(*expected) == [base64.b64decode(i["b64_json"]) for i in response["images"] if i.get("b64_json")]
    assert expected[0].billing == response["billing"]
    assert expected[0].problem == ""
    for cut in range(len(raw) + 1):
        assert decoded([raw[:cut], raw[cut:]]) == expected
    for step in (1, 2, 3, 5, 7, 191, 192, 193):
        assert decoded([raw[k : k + step] for k in range(0, len(raw), step)]) == expected


@pytest.mark.parametrize("size", range(7))
@pytest.mark.parametrize("tail", [b"\xff\xd9", b"\xff\xff\xff", b"\xfb\xef\xbe", b""])
def test_an_image_that_ends_with_escaped_characters_is_complete(size, tail):
    data = b"x" * size + tail
    for escape in (("/", "\\/"), ("/", "\\u002f"), ("+", "\\u002B"), ("=", "\\u003d")):
        raw = json.dumps({"images": [{"b64_json": b64(data)}]}).replace(*escape).encode()
        assert good_images(*decoded(raw)) == [data]
        assert good_images(*decoded([bytes([byte]) for byte in raw])) == [data]


def one(text: str, **more: object) -> bytes:
    """A response whose image is written as a given JSON string."""
    return f'{{"images":[{{"b64_json":"{text}","mime_type":"image/png"}}],"billing":{{"credits_charged":1}}}}'.encode()


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64," + b64(PNG),
        "data:image\\/png;base64," + b64(PNG).replace("/", "\\/"),
        "data:;base64," + b64(PNG),
        "data:," + b64(PNG),
        b64(PNG).rstrip("="),
        "\\n".join(b64(PNG)[k : k + 76] for k in range(0, 400, 76)),
        "\\r\\n".join(b64(PNG)[k : k + 64] for k in range(0, 448, 64)) + "\\r\\n",
        "\n".join(b64(PNG)[k : k + 76] for k in range(0, 400, 76)).replace("/", "\\/"),
        " " + b64(PNG) + " ",
        "\\t" + b64(PNG),
        "".join(f"\\u{ord(letter):04x}" for letter in b64(PNG)),
        safe(PNG),
        safe(PNG).rstrip("="),
        b64(PNG).replace("/", "_"),
        "data:image/png;base64," + safe(PNG).rstrip("="),
        "DATA:image/PNG;charset=utf-8;BASE64," + b64(PNG),
        "data:image/png;base64," + quote(b64(PNG), safe=""),
        b64(PNG).rstrip("=") + "=",
        b64(PNG) + "==",
        "\\f".join(b64(PNG)[k : k + 76] for k in range(0, 400, 76)),
        b64(PNG[:5]).rstrip("=") + "=" + b64(PNG[5:]),
    ],
    ids="data-url data-url-escaped no-type bare-prefix unpadded lf crlf raw-lf spaces tab all-escaped url-safe "  # noqa: SIM905
    "url-safe-unpadded mixed-alphabets url-safe-data-url capitals percent one-pad four-pads form-feed joined".split(),
)
def test_base64_is_decoded_in_every_usual_variant(text):
    raw = one(text)
    for chunks in (raw, [bytes([byte]) for byte in raw], [raw[k : k + 5] for k in range(0, len(raw), 5)]):
        result, files = decoded(chunks)
        assert good_images(result, files) == [PNG]
        assert result.credits == 1


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "QUJDR",
        "QUJD!EFG",
        "QUJD\\u00e9A",
        "QUJD\\\\AAA",
        "QUJD\\x41",
        "QUJD\\u12",
        "Q=JD",
        "QUJDQ==QUJD",
        "=QUJ",
        "QUJD\\u0000",
        "QUJD%ZZ",
        "data:image/png;base64",
        "data:" + "x" * 300,
        "data:" + "x" * 300 + ",QUJD",
        "https://cdn.example/cat.png",
        "@0",
        "\\",
    ],
)
def test_broken_base64_is_a_problem_of_this_image_alone(text):
    raw = one(text + "")[:-1] + b',"provider":"gemini"}'
    if text == "\\":
        raw = raw.replace(b'"b64_json":"\\"', b'"b64_json":"\\\\"')
    for chunks in (raw, [bytes([byte]) for byte in raw], *[[raw[:cut], raw[cut:]] for cut in range(len(raw))]):
        result, files = decoded(chunks)
        assert good_images(result, files) == []
        assert "base64" in result.images[0].problem
        assert (result.credits, result.provider, result.images[0].mime) == (1, "gemini", "image/png")


@pytest.mark.parametrize("size", [1, 2, 4, 100, 1000])
def test_base64_that_was_encoded_in_pieces_is_decoded(size):
    for letters in (
        "".join(b64(PNG[k : k + size]) for k in range(0, len(PNG), size)),
        b64(b"") + b64(PNG[:4]) + "QQQ=QR==",
    ):
        raw = one(letters)
        expected = decoded(raw)
        assert good_images(*expected) in ([PNG], [PNG[:4] + b"A\x04A"])
        for cut in range(len(raw)):
            assert decoded([raw[:cut], raw[cut:]]) == expected


IN_URLS = {
    "base64": "data:image/png;base64," + b64(PNG),
    "slashes escaped": "data:image\\/png;base64," + b64(PNG).replace("/", "\\/"),
    "no type": "data:;base64," + b64(PNG),
    "capitals": "DATA:IMAGE/PNG;BASE64," + b64(PNG),
    "url-safe": "data:image/png;base64," + safe(PNG).rstrip("="),
    "percent": "data:image/png;base64," + quote(b64(PNG), safe=""),
    "percent, no base64": "data:image/png," + quote(PNG, safe=""),
    "does not say base64": "data:image/png," + b64(b"\x89PNG\r\n\x1a\n" + PNG[8:]),
    "bare base64": b64(PNG),
    "spaces": " data:image/png;base64, " + b64(PNG) + " ",
}


ENTRIES = ['{"url":"%s","mime_type":"image/png"}', '{"url": null, "url" : "%s"}', '"%s"']


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        pytest.param(url, entry, id=f"{name} {entry}")
        for name, url in IN_URLS.items()
        for entry in ENTRIES[: 2 if name in {"no type", "spaces"} else 3]  # alone nothing shows that these are images
    ],
)
def test_an_image_in_a_data_url_is_decoded_and_not_downloaded(url, entry):
    raw = ('{"images":[' + entry.replace("%s", url) + '],"billing":{"credits_charged":1}}').encode()
    for chunks in (raw, [bytes([byte]) for byte in raw], *[[raw[:cut], raw[cut:]] for cut in range(0, len(raw), 3)]):
        result, files = decoded(chunks)
        assert good_images(result, files) == [PNG]
        assert [got.url for got in result.images] == [""]
        assert (result.credits, result.problem) == (1, "")


def test_a_large_image_in_a_data_url_does_not_count_as_text_beside_the_images():
    large = random.Random(7).randbytes(6_000_000)
    raw = json.dumps({"images": [{"url": "data:image/png;base64," + b64(large)}]}).encode()
    result, files = decoded([raw[k : k + 65536] for k in range(0, len(raw), 65536)])
    assert (good_images(result, files), result.problem) == ([large], "")


def test_of_two_images_in_an_entry_the_one_under_the_documented_key_is_used():
    small = "data:image/jpeg;base64," + b64(JPEG)
    entry = {"thumbnail": small, "b64_json": b64(PNG), "url": "https://cdn.example/a.png"}
    result, files = decoded(json.dumps({"images": [entry]}).encode())
    assert good_images(result, files) == [PNG]


ENVELOPES = {
    "OpenAI": {"data": [{"b64_json": b64(PNG)}]},
    "OpenAI, url": {"data": [{"url": "data:image/png;base64," + b64(PNG)}]},
    "one object": {"images": {"b64_json": b64(PNG)}},
    "one text": {"image": b64(PNG)},
    "Replicate": {"output": ["data:image/png;base64," + b64(PNG)]},
    "chat": {"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(PNG)}}]},
    "Gemini": {"images": [{"inlineData": {"mimeType": "image/png", "data": b64(PNG)}}]},
    "plain base64": {"images": [{"base64": b64(PNG)}]},
    "list of texts": {"images": [b64(PNG)]},
}


@pytest.mark.parametrize("body", ENVELOPES.values(), ids=ENVELOPES.keys())
def test_an_image_is_found_in_the_response_formats_of_other_apis(body):
    raw = json.dumps({"input_images": ["data:image/png;base64," + b64(JPEG)], **body}).encode()
    for chunks in (raw, [bytes([byte]) for byte in raw]):
        result, files = decoded(chunks)
        assert good_images(result, files) == [PNG]


@pytest.mark.parametrize("entry", [{"url": "https://x.test/a.png"}, {"image_url": {"url": "https://x.test/a.png"}}])
@pytest.mark.parametrize("name", ["images", "data", "output"])
def test_a_url_is_found_in_the_response_formats_of_other_apis(name, entry):
    result, _ = decoded(json.dumps({name: [entry]}).encode())
    assert [got.url for got in result.images] == ["https://x.test/a.png"]


def test_an_input_that_the_response_repeats_is_not_one_of_its_images():
    raw = json.dumps({"input_images": ["data:image/png;base64," + b64(PNG)], "message": "no"}).encode()
    for end in range(len(raw), 0, -1):
        assert decoded(raw[:end])[0].images == []


def test_complete_urls_in_an_incomplete_response_are_kept():
    entries = [
        {"url": "https://x.test/a.png?a=1&b=\u00e9", "mime_type": "image/png"},
        {"b64_json": b64(PNG), "url": "https://x.test/same.png"},
        {"url": "data:image/jpeg;base64," + b64(JPEG)},
        {"url": "https://x.test/b.png"},
    ]
    raw = json.dumps({"model": "m", "images": entries}).encode()
    wanted = ["https://x.test/a.png?a=1&b=\u00e9", PNG, JPEG, "https://x.test/b.png"]
    most = []
    for end in range(len(raw)):
        result, files = decoded(raw[:end])
        found = [got.url or files[got.decoded] for got in result.images]
        assert found == wanted[: len(found)]
        assert len(found) >= len(most), "what came whole stays"
        assert result.problem
        most = found
    assert most == wanted


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"error": {"message": "blocked", "code": "moderation_blocked"}}, "blocked", "moderation_blocked"),
        ({"error": "blocked"}, "blocked", ""),
        ({"message": "blocked", "images": []}, "blocked", ""),
        ({"images": None, "detail": "blocked"}, "blocked", ""),
        ({**GEMINI, "message": "fine"}, "", ""),
        ({"images": []}, "", ""),
    ],
)
def test_a_response_without_images_is_reported_with_its_own_message(body, message, code):
    result, _ = decoded(json.dumps(body).encode())
    assert (result.message, result.code) == (message, code)


def test_an_entry_without_an_image_is_reported_with_its_own_message():
    response = {"images": [{"error": {"message": "blocked by safety"}}, GEMINI["images"][0]]}
    result, files = decoded(json.dumps(response).encode())
    assert "blocked by safety" in result.images[0].problem
    assert good_images(result, files) == [PNG]


def test_a_good_image_beside_a_broken_one_is_kept():
    result, files = decoded(json.dumps({"images": [{"b64_json": "!"}, {"b64_json": b64(PNG)}]}).encode())
    assert good_images(result, files) == [PNG]
    assert [bool(got.problem) for got in result.images] == [True, False]


@pytest.mark.parametrize("space", ["", " ", "\n\t ", " " * 64])
def test_space_around_the_colon_of_the_key_does_not_matter(space):
    raw = f'{{"images":[{{"b64_json"{space}:{space}"{b64(PNG)}"}}]}}'.encode()
    for cut in range(len(raw)):
        assert good_images(*decoded([raw[:cut], raw[cut:]])) == [PNG]


@pytest.mark.parametrize(
    "texts",
    [
        '"b64_json": "QUJD"',
        '{"b64_json":"QUJD"}',
        '\\"b64_json": "',
        'b64_json": "QUJD',
        '"b64_json"',
        "\\",
        '"b64_json":',
    ],
)
def test_the_name_of_the_key_inside_a_string_is_only_text(texts):
    response = {**GEMINI, "model": texts, "note": [texts, texts], texts + "!": 1}
    response["billing"] = {"credits_charged": 12, "note": texts}
    raw = json.dumps(response).encode()
    for chunks in (raw, [bytes([byte]) for byte in raw]):
        result, files = decoded(chunks)
        assert files == [PNG]
        assert (result.model, result.billing) == (texts, response["billing"])


def test_an_image_with_an_empty_base64_is_downloaded_from_its_url():
    for text in ("", "!!!"):
        entry = {"b64_json": text, "url": "https://cdn.example/a.png", "mime_type": "image/png"}
        result, _ = decoded(json.dumps({"images": [entry]}).encode())
        (got,) = result.images
        assert (got.decoded, got.url, got.problem) == (None, "https://cdn.example/a.png", "")


def test_an_image_that_came_in_base64_is_not_downloaded_again():
    result, files = decoded(
        json.dumps({"images": [{"url": "https://cdn.example/a.png", "b64_json": b64(PNG)}]}).encode()
    )
    assert good_images(result, files) == [PNG]
    assert result.images[0].url == ""


@pytest.mark.parametrize("held", ["@", "@x", "@-1", "@0", "@7", "@99999999999", "@\u0661", "QUJD"])
def test_a_key_written_with_an_escape_does_not_get_the_image_of_another_key(held):
    raw = f'{{"images":[{{"b64\\u005fjson":{json.dumps(held)}}}],"billing":{{"credits_charged":3}}}}'.encode()
    result, files = decoded(raw)
    assert files == []
    assert result.images[0].problem
    assert result.credits == 3


# Billing


@pytest.mark.parametrize(
    ("billing", "charged"),
    [
        ({"credits_charged": 12}, 12.0),
        ({"credits_charged": 0.25, "x": None}, 0.25),
        ({"credits_charged": "12"}, None),
        ({"credits_charged": True}, None),
        ({"credits_charged": None}, None),
        ({"credits_charged": 10**400}, None),
        ({"other": [1, {"a": None}], "big": 10**30, "text": "\u00e9\\"}, None),
        ({}, None),
    ],
)
def test_billing_is_kept_as_it_came(billing, charged):
    result, _ = decoded(json.dumps({**FLUX, "billing": billing}).encode())
    assert result.billing == billing
    assert result.credits == charged


@pytest.mark.parametrize("billing", [None, [], "free", 12, True])
def test_billing_that_is_not_an_object_is_ignored(billing):
    result, _ = decoded(json.dumps({**FLUX, "billing": billing}).encode())
    assert (result.billing, result.credits, result.problem) == ({}, None, "")
    assert len(result.images) == 1


def test_a_response_without_billing_is_still_a_success():
    result, files = decoded(json.dumps({"images": GEMINI["images"]}).encode())
    assert good_images(result, files) == [PNG]
    assert (result.billing, result.credits, result.provider, result.model, result.problem) == ({}, None, "", "", "")


@pytest.mark.parametrize("images", [None, {}, "x", 5, {"b64_json": "QUJD"}])
def test_the_charge_is_known_although_the_images_are_not_a_list(images):
    result, files = decoded(json.dumps({**GEMINI, "images": images}).encode())
    assert result.problem
    assert (result.billing, result.credits, result.provider) == (GEMINI["billing"], 12.0, "gemini")
    assert good_images(result, files) == ([b"ABC"] if isinstance(images, dict) and images else [])


def test_images_under_another_key_are_kept():
    result, files = decoded(json.dumps({"data": [{"b64_json": b64(PNG)}, {"b64_json": "!"}]}).encode())
    assert good_images(result, files) == [PNG]
    assert result.problem


def test_an_empty_list_of_images_has_no_images():
    result, files = decoded(json.dumps({**GEMINI, "images": []}).encode())
    assert (result.images, files, result.problem, result.credits) == ([], [], "", 12.0)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        1,
        "x",
        [],
        {},
        {"url": ""},
        {"url": None},
        {"url": 5},
        {"b64_json": None},
        {"b64_json": 5},
        {"b64_json": ["x"]},
    ],
)
def test_an_entry_without_an_image_is_a_problem_of_its_own(entry):
    result, files = decoded(json.dumps({"images": [entry, GEMINI["images"][0]]}).encode())
    assert result.images[0].problem
    assert good_images(result, files) == [PNG]


def test_images_beyond_the_largest_possible_number_are_left_out():
    response = {"images": [{"b64_json": b64(b"%d" % k)} for k in range(70)], "billing": {"credits_charged": 5}}
    result, files = decoded(json.dumps(response).encode())
    assert good_images(result, files) == [b"%d" % k for k in range(64)]
    assert len(result.images) == len(files) == 64
    assert result.credits == 5


def test_images_before_the_list_do_not_shift_the_list():
    response = {"extra": [{"b64_json": b64(b"%d" % k)} for k in range(63)], "images": [{"b64_json": b64(PNG)}] * 2}
    result, files = decoded(json.dumps(response).encode())
    assert good_images(result, files) == [PNG]
    assert "too many" in result.images[1].problem


def test_a_very_long_url_and_very_long_names_are_cut():
    response = {"images": [{"url": "https://x/" + "y" * 9000, "mime_type": "z" * 300}], "model": "m" * 300}
    result, _ = decoded(json.dumps(response).encode())
    assert (len(result.images[0].url), len(result.images[0].mime), len(result.model)) == (8192, 200, 200)


# Invalid responses


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"x"',
        b"<html>",
        b"\xff\xfe",
        b"NaN",
        b"{}",
        b'{"images":[]} trailing',
        b'{"images":[],"n":' + b"9" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"images":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
    ids=range(15),
)
def test_a_response_that_is_not_a_json_object_is_reported_as_such(raw):
    result, files = decoded(raw)
    assert (result.images, files) == ([], [])
    assert result.problem


@pytest.mark.parametrize("garbage", [b"9" * 10_000, b"[" * 100_000, b"x"])
@pytest.mark.parametrize("first", [True, False])
def test_images_survive_invalid_data_beside_them(garbage, first):
    images = json.dumps(GEMINI["images"]).encode()
    raw = b'{"note":%s,"images":%s}' % (garbage, images) if first else b'{"images":%s,"note":%s}' % (images, garbage)
    result, files = decoded(raw)
    assert good_images(result, files) == [PNG]
    assert result.problem


@pytest.mark.parametrize("odd", [b"NaN", b'"\xff"', b"1e999", b'"\\ud800"'])
def test_a_response_that_is_not_quite_json_is_decoded_nevertheless(odd):
    raw = b'{"note":%s,"images":[{"url":"https://x.test/a.png"}],"billing":{"credits_charged":7}}' % odd
    result, _ = decoded(raw)
    assert ([got.url for got in result.images], result.credits) == (["https://x.test/a.png"], 7)


def test_complete_images_in_an_incomplete_response_are_kept():
    response = {"images": [{"b64_json": b64(PNG)}, {"b64_json": b64(JPEG)}], "billing": {"credits_charged": 1}}
    raw = json.dumps(response).encode()
    first = raw.index(b64(PNG).encode()) + len(b64(PNG))
    second = raw.index(b64(JPEG).encode()) + len(b64(JPEG))
    for end in range(len(raw)):
        result, files = decoded(raw[:end])
        assert good_images(result, files) == [PNG, JPEG][: (end > first) + (end > second)]
        assert result.problem


def test_text_beside_the_images_has_a_limit_and_the_images_before_it_are_kept():
    images = json.dumps(GEMINI["images"]).encode()
    result, files = decoded([b'{"images":%s,"note":"' % images, *[b"x" * 65536] * 65, b'"}'])
    assert good_images(result, files) == [PNG]
    assert "4 MiB" in result.problem


@pytest.mark.parametrize("depth", range(900, 1010))
def test_nesting_at_the_limit_of_the_decoder_raises_no_exception(depth):
    raw = b'{"images":[],"billing":{"credits_charged":1,"deep":%s}}' % (b"[" * depth + b"]" * depth)
    result, _ = decoded(raw)
    assert result.credits in {1, None}


# Encodings

LONG = json.dumps({**GEMINI, "images": [{"b64_json": b64(bytes(200_000))}], "note": " " * 100_000}).encode()
ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    " GZIP ": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "": bytes,
}


@pytest.mark.parametrize("encoding", ENCODERS)
def test_a_response_in_an_encoding_that_was_not_requested_is_decoded_nevertheless(encoding):
    raw = json.dumps(OPENAI).encode()
    packed = ENCODERS[encoding](raw)
    expected = decoded(raw)
    assert decoded(packed, encoding) == expected
    assert decoded([bytes([byte]) for byte in packed], encoding) == expected
    for cut in range(0, len(packed), 7):
        assert decoded([packed[:cut], packed[cut:]], encoding) == expected


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_highly_compressed_response_is_decoded_to_its_end(encoding):
    packed = ENCODERS[encoding](LONG)
    assert len(packed) < len(LONG) // 50
    for step in (1, 7, 100, len(packed)):
        result, files = decoded([packed[k : k + step] for k in range(0, len(packed), step)], encoding)
        assert good_images(result, files) == [bytes(200_000)]
        assert result.credits == 12


def test_data_after_the_end_of_a_compressed_response_is_ignored():
    packed = gzip.compress(json.dumps(GEMINI).encode())
    result, files = decoded([packed + b"\0\0", b"\0" * 100], "gzip")
    assert (good_images(result, files), result.problem) == ([PNG], "")


def test_a_compression_bomb_is_stopped_and_the_images_before_it_are_kept():
    bomb = b'{"images":%s,"note":"' % json.dumps(GEMINI["images"]).encode() + b"x" * 3_000_000
    result, files = decoded(gzip.compress(bomb), "gzip", limit=1_000_000)
    assert good_images(result, files) == [PNG]
    assert "larger than 1,000,000 bytes" in result.problem


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "x" * 500])
def test_an_unknown_encoding_is_reported_unless_the_response_is_clearly_not_in_it(encoding):
    assert decoded(json.dumps(GEMINI).encode(), encoding) == decoded(json.dumps(GEMINI).encode())
    result, files = decoded(b"\x28\xb5\x2f\xfd" + json.dumps(GEMINI).encode(), encoding)
    assert (result.images, files) == ([], [])
    assert encoding[:40] in result.problem
    assert len(result.problem) < 120


def test_in_a_damaged_compressed_response_the_images_before_the_damage_are_kept():
    raw = json.dumps({**GEMINI, "note": b64(random.Random(5).randbytes(3000))}).encode()
    packed = bytearray(gzip.compress(raw))
    packed[-1500:-1400] = bytes(100)
    result, files = decoded([bytes(packed[k : k + 64]) for k in range(0, len(packed), 64)], "gzip")
    assert good_images(result, files) == [PNG]
    assert result.problem
    assert decoded(b"not gzip at all", "gzip")[0].problem


def test_a_response_with_only_a_wrong_checksum_is_decoded_completely_and_the_damage_is_reported():
    packed = bytearray(gzip.compress(json.dumps(OPENAI).encode()))
    packed[-6] ^= 1
    result, files = decoded([bytes([byte]) for byte in packed], "gzip")
    assert good_images(result, files) == [JPEG, PNG[:-1]]
    assert (result.billing, result.images[1].url) == (OPENAI["billing"], "https://cdn.example/b.webp")
    assert "damaged" in result.problem


@pytest.mark.parametrize("end", [1, 10, 100, 300])
def test_an_incomplete_compressed_response_raises_no_exception(end):
    result, files = decoded(gzip.compress(json.dumps(GEMINI).encode())[:end], "gzip")
    assert result.problem
    assert len(good_images(result, files)) <= 1


# Any bytes


@given(st.binary(max_size=200), st.sampled_from(["", "gzip", "deflate", "br"]))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_decoded_without_an_exception(raw, encoding):
    result, _ = decoded(raw, encoding)
    assert result.problem or encoding == ""


scraps = st.lists(
    st.sampled_from(
        [
            '"b64_json"',
            ":",
            '"',
            "[",
            "]",
            "{",
            "}",
            ",",
            " ",
            '"images"',
            '"url"',
            "\\",
            "\\u",
            "\\/",
            "QUJD",
            "=",
            "data:",
        ]
    )
    | st.sampled_from(['"@0"', '"@1"', "null", "1e9", '"billing"', '"credits_charged"', "\n", "\\u002b", ",", "x"])
    | st.text(max_size=2),
    max_size=25,
).map(lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass"))
mutations = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(scraps, st.binary(max_size=4))), min_size=1, max_size=5
)
cuts = st.lists(st.floats(0, 1), max_size=5)


def pieces_of(raw, places):
    edges = [0, *sorted(int(place * len(raw)) for place in places), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


def outcome(chunks):
    """The relevant parts of a result: the same in pieces of any size."""
    result, files = decoded(chunks)
    entries = [(got.decoded, got.url, got.mime, bool(got.problem)) for got in result.images]
    return entries, good_images(result, files), result.billing, bool(result.problem)


@given(st.sampled_from([GEMINI, FLUX, OPENAI]), mutations, cuts)
@settings(max_examples=400, deadline=None)
def test_a_good_response_that_was_changed_is_decoded_the_same_in_pieces_of_any_size(response, changes, places):
    raw = json.dumps(response).encode()
    for place, length, insert in changes:
        at = int(place * len(raw))
        raw = raw[:at] + insert + raw[at + length :]
    assert outcome(pieces_of(raw, places)) == outcome(raw)


@given(scraps, cuts)
@settings(max_examples=300, deadline=None)
def test_any_fragments_of_a_response_are_decoded_the_same_in_pieces_of_any_size(middle, places):
    raw = b'{"images":[{' + middle + b'}],"billing":{"credits_charged":1}}'
    assert outcome(pieces_of(raw, places)) == outcome(raw)


@given(st.lists(st.binary(max_size=300), max_size=5), cuts, st.sampled_from(list(SPELLINGS)))
@settings(max_examples=200, deadline=None)
def test_every_image_arrives_byte_for_byte(images, places, spelling):
    response = {"images": [{"b64_json": b64(image)} for image in images]}
    raw = SPELLINGS[spelling](response)
    result, files = decoded(pieces_of(raw, places))
    assert files == images
    assert not result.problem
    assert not any(got.problem for got in result.images)
