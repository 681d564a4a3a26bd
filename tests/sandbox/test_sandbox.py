"""The sandbox from outside: real HTTP over loopback, and its report afterwards."""

from __future__ import annotations

import base64
import gzip
import hashlib
import http.client
import io
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagewatch.sandbox import (
    BALANCE_ROUTE,
    DEFAULT_MODELS,
    MAX_BODY_BYTES,
    REPORT_ROUTE,
    ROUTE,
    TAGS,
    Sandbox,
    tags_help,
)
from imagewatch.system.errors import ConfigError

BEARER = {"Authorization": "Bearer sk-let-test"}
FAILURES_FREE = ["400", "401", "402", "403", "404", "409", "413", "422", "429", "429-quota", "429-plain"]
FAILURES_FREE += ["500", "500-empty", "503-shutdown", "302", "307", "308"]
FAILURES_PAID = ["408", "502", "503", "503-interrupted", "504", "520", "521", "522", "523", "524"]
CUT_OFF = ["drop", "reset", "drop-headers", "truncate"]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sandbox(clock):
    with Sandbox(clock=clock) as running:
        yield running
    assert running.report()["faults"] == []


@pytest.fixture(autouse=True)
def _silent(capfd):
    yield
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def web():
    with httpx.Client(timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture
def ask(sandbox, web):
    def ask(prompt="a cat", provider="flux", *, headers=None, **fields):
        body = {"provider": provider, "prompt": prompt, **fields}
        return web.post(sandbox.base_url + ROUTE, json=body, headers={**BEARER, **(headers or {})})

    return ask


def image_bytes(kind="PNG", size=(60, 40)):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 80, 40)).save(file, kind)
    return file.getvalue()


def data_url(content, mime="image/png"):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def decoded(response):
    return [base64.b64decode(entry["b64_json"], validate=True) for entry in response.json()["images"]]


def opened(content):
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def in_thread(call, *args, **fields):
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *args, **fields)
    pool.shutdown(wait=False)
    return future


def raw(sandbox, request):
    """Send bytes unchanged and return everything that the server sends until it closes."""
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def head(sandbox, *lines, method="POST", path=ROUTE):
    host = sandbox.base_url.removeprefix("http://")
    start = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Authorization: Bearer k"]
    return "".join(f"{line}\r\n" for line in [*start, "Content-Type: application/json", *lines, ""]).encode()


# Success.


@pytest.mark.parametrize("provider", DEFAULT_MODELS)
def test_a_success_has_the_published_shape_and_names_the_default_model(ask, provider):
    response = ask(provider=provider, n=2)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert (body["provider"], body["model"], len(body["images"])) == (provider, DEFAULT_MODELS[provider], 2)
    assert all(("url" in entry) != ("b64_json" in entry) and entry["mime_type"] for entry in body["images"])
    assert body["billing"]["credits_charged"] == 2 * body["billing"]["credits_per_image"] > 0


def test_the_response_names_the_model_that_was_asked_for(ask):
    assert ask(model="flux-9").json()["model"] == "flux-9"


def test_each_response_has_its_own_request_id(ask):
    assert ask().headers["x-request-id"] != ask().headers["x-request-id"]


def test_gemini_returns_real_jpeg_bytes_and_their_type(ask):
    response = ask(provider="gemini")
    assert response.json()["images"][0]["mime_type"] == "image/jpeg"
    assert opened(decoded(response)[0]).format == "JPEG"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_openai_returns_the_format_and_size_asked_for(ask, kind):
    response = ask(provider="openai", output_format=kind, size="320x192")
    image = opened(decoded(response)[0])
    assert (image.format, image.size) == (kind.upper(), (320, 192))
    assert response.json()["images"][0]["mime_type"] == f"image/{kind}"


@pytest.mark.parametrize("size", ["1x1", "16x900", "900x16", "auto"])
def test_odd_sizes_can_be_drawn(ask, size):
    image = opened(decoded(ask(provider="openai", size=size, input_images=[data_url(image_bytes())]))[0])
    assert size in {"auto", f"{image.width}x{image.height}"}


def test_flux_returns_urls_whose_bytes_are_those_in_the_report(ask, sandbox, web):
    entries = ask(n=4).json()["images"]
    fetched = [web.get(entry["url"]) for entry in entries]
    assert {got.headers["content-type"] for got in fetched} == {"image/jpeg"}
    assert all(opened(got.content).format == "JPEG" for got in fetched)
    sums = [hashlib.sha256(got.content).hexdigest() for got in fetched]
    assert len(set(sums)) == 4
    assert sandbox.report()["calls"][0]["images"] == sums


def test_the_same_seed_and_prompt_give_the_same_image_and_another_seed_another(ask):
    first, again, other = (decoded(ask(provider="gemini", seed=seed))[0] for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_seed_the_same_prompt_gives_different_images(ask):
    assert decoded(ask(provider="gemini")) != decoded(ask(provider="gemini"))


@pytest.mark.parametrize(("quality", "price"), [("low", 11), ("medium", 42), ("high", 167), (None, 42)])
def test_openai_costs_by_quality(ask, quality, price):
    fields = {"quality": quality} if quality else {}
    assert ask(provider="openai", n=3, **fields).json()["billing"]["credits_charged"] == 3 * price


def test_the_report_contains_what_was_asked_and_charged(ask, sandbox, clock, web):
    image = image_bytes("WEBP")
    ask("one", "gemini", input_images=[data_url(image, "image/webp")], headers={"Idempotency-Key": "k1"})
    ask("two", n=9)
    report = sandbox.report()
    assert (report["requests"], report["charged"], report["credits"]) == (2, 1, 134)
    good, bad = report["calls"]
    assert web.get(sandbox.base_url + REPORT_ROUTE).json() == report
    images = good.pop("images")
    assert good == {
        "prompt": "one",
        "provider": "gemini",
        "status": 200,
        "credits": 134,
        "idempotency_key": "k1",
        "inputs": [hashlib.sha256(image).hexdigest()],
        "at": clock.now,
    }
    assert len(images) == 1
    assert (bad["prompt"], bad["status"], bad["credits"], bad["images"]) == ("two", 400, 0, [])


def test_a_repeated_idempotency_key_is_charged_again(ask, sandbox):
    for _ in range(2):
        ask(headers={"Idempotency-Key": "same"})
    assert sandbox.report()["charged"] == 2


@pytest.mark.parametrize("provider", ["gemini", "openai"])
def test_input_images_appear_in_the_image(ask, provider):
    kinds = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
    inputs = [data_url(image_bytes(kind), mime) for kind, mime in kinds.items()]
    plain, edited = (decoded(ask(provider=provider, seed=1, **more))[0] for more in ({}, {"input_images": inputs}))
    near = [
        sum(count for count, color in opened(content).convert("RGB").getcolors(512**2) if is_input(color))
        for content in (plain, edited)
    ]
    assert near[1] - near[0] > 3000


def is_input(color):
    return all(abs(part - other) < 12 for part, other in zip(color, (200, 80, 40), strict=True))


def bomb():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "mime"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (bomb(), "image/png"),
        (image_bytes()[:60], "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (image_bytes("JPEG")[:-300], "image/jpeg"),
        (b"RIFF\0\0\0\0WEBP", "image/webp"),
        (b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff", "image/webp"),
    ],
)
def test_an_input_that_cannot_be_decoded_is_accepted_and_drawn_as_a_number(ask, sandbox, content, mime):
    assert ask(provider="gemini", input_images=[data_url(content, mime)]).status_code == 200
    assert sandbox.report()["calls"][0]["inputs"] == [hashlib.sha256(content).hexdigest()]


def test_fourteen_large_inputs_are_received_whole(ask, sandbox):
    large = image_bytes() + bytes(1 << 20)
    assert ask(provider="gemini", input_images=[data_url(large)] * 14).status_code == 200
    assert sandbox.report()["calls"][0]["inputs"] == [hashlib.sha256(large).hexdigest()] * 14


# Refusals.


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"provider": "dalle"}, "provider"),
        ({"provider": None}, "provider"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 32001}, "prompt"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"n": 0}, "n must"),
        ({"n": 5}, "n must"),
        ({"n": True}, "n must"),
        ({"n": 1.0}, "n must"),
        ({"n": "1"}, "n must"),
        ({"size": "big"}, "size"),
        ({"size": "0x10"}, "size"),
        ({"size": "5000x10"}, "size"),
        ({"size": 1024}, "size"),
        ({"quality": "ultra"}, "quality"),
        ({"output_format": "gif"}, "output_format"),
        ({"seed": "1"}, "seed"),
        ({"seed": False}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"input_images": "x"}, "input_images"),
        ({"input_images": [1]}, "input_images"),
        ({"input_images": ["x"] * 15}, "input_images"),
        ({"input_images": ["x"] * 9}, "flux"),
        ({"input_images": ["x"]}, "input_images[0]"),
        ({"input_images": ["data:image/gif;base64,R0lGODlh"]}, "input_images[0]"),
        ({"input_images": ["data:image/png,iVBORw0KGgo="]}, "input_images[0]"),
        ({"input_images": ["data:image/png;base64,iVBO\nRw0KGgo="]}, "base64"),
        ({"input_images": ["data:image/png;base64,\u00e4"]}, "base64"),
        ({"input_images": ["data:image/png;base64,"]}, "something else"),
        ({"input_images": [data_url(b"\xff\xd8\xff", "image/png")]}, "something else"),
        ({"negative_prompt": "dogs"}, "unknown field"),
    ],
)
def test_a_body_that_breaks_the_contract_is_refused_with_a_message(ask, sandbox, fields, text):
    response = ask(**fields)
    assert response.status_code == 400
    assert text in response.json()["message"]
    assert (sandbox.report()["requests"], sandbox.report()["charged"]) == (1, 0)


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "x" * 32000}, {"n": 4}, {"seed": -(2**70)}, {"quality": "auto"}, {"model": "x" * 200}],
)
def test_values_at_the_edge_of_the_contract_are_accepted(ask, fields):
    assert ask(**fields).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"nonsense",
        b"\xff\xfe{\0}\0",
        b'\xef\xbb\xbf{"provider":"flux","prompt":"x"}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"provider":"flux","prompt":"x","seed":NaN}',
        b'{"provider":"flux","prompt":"x","seed":' + b"9" * 5000 + b"}",
        b'{"provider":"flux","prompt":"x","prompt":"y"}',
        b'{"provider":"flux","prompt":"\\ud800"}',
        b'{"provider":["flux"],"prompt":{"x":1}}',
        b'{"prompt":"x"}',
        b'{"provider":"flux"}',
    ],
)
def test_a_body_that_is_not_a_valid_json_object_is_refused(sandbox, web, body):
    headers = {**BEARER, "Content-Type": "application/json"}
    response = web.post(sandbox.base_url + ROUTE, content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["message"]


@pytest.mark.parametrize("value", [None, "", "Bearer", "Basic eDp5", "bearer secret", "Bearer other"])
def test_without_the_right_key_nothing_is_read_or_charged(web, value):
    headers = {} if value is None else {"Authorization": value}
    with Sandbox(key="secret") as locked:
        for response in (
            web.post(locked.base_url + ROUTE, json={"provider": "flux", "prompt": "x"}, headers=headers),
            web.get(locked.base_url + BALANCE_ROUTE, headers=headers),
        ):
            assert response.status_code == 401
            assert response.json()["message"]
        assert (locked.report()["requests"], locked.report()["charged"]) == (1, 0)


def test_with_the_right_key_it_works(web):
    with Sandbox(key="secret") as locked:
        headers = {"Authorization": "Bearer secret"}
        body = {"provider": "flux", "prompt": "x"}
        assert web.post(locked.base_url + ROUTE, json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused(sandbox, web, kind):
    headers = {**BEARER, **({"Content-Type": kind} if kind else {})}
    response = web.post(sandbox.base_url + ROUTE, content=b'{"provider":"flux","prompt":"x"}', headers=headers)
    assert (response.status_code, sandbox.report()["charged"]) == (400, 0)


def test_a_body_in_chunks_is_refused(sandbox, web):
    headers = {**BEARER, "Content-Type": "application/json"}
    response = web.post(sandbox.base_url + ROUTE, content=iter([b"{}"]), headers=headers)
    assert (response.status_code, sandbox.report()["requests"]) == (411, 0)


def test_a_client_that_disconnects_when_it_is_refused_is_no_fault(sandbox):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    for _ in range(200):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
            connection.sendall(head(sandbox, "Transfer-Encoding: chunked"))
            connection.recv(1)
    assert (sandbox.report()["requests"], sandbox.report()["faults"]) == (0, [])


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([], 411),
        (["Content-Length: -1"], 400),
        (["Content-Length: 2", "Content-Length: 3"], 400),
        (["Content-Length: \u00b2"], 400),
        ([f"Content-Length: {MAX_BODY_BYTES + 1}"], 413),
        (["Content-Length: 99999999999999999999"], 400),
    ],
)
def test_a_body_of_unknown_or_absurd_length_is_refused_unread(sandbox, lines, status):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head(sandbox, *lines))
        connection.shutdown(socket.SHUT_WR)
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(f"HTTP/1.1 {status} ".encode())
    assert sandbox.report()["requests"] == 0


def test_a_client_that_disconnects_before_its_body_is_complete_is_not_charged(sandbox):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head(sandbox, "Content-Length: 100") + b'{"provider":')
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(10) == b""
    assert sandbox.report()["requests"] == 0


@pytest.mark.parametrize(
    "request_bytes", [b"\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0\x01"]
)
def test_data_that_is_not_http_does_no_harm(sandbox, ask, request_bytes):
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        b"".join(iter(lambda: connection.recv(65536), b""))
    assert ask().status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", ROUTE, 405),
        ("HEAD", ROUTE, 405),
        ("PUT", ROUTE, 405),
        ("GET", "/", 404),
        ("POST", "/v1/images", 404),
        ("DELETE", "/x", 404),
        ("GET", "/delivery/", 403),
        ("GET", "/delivery/x/sample.jpeg?se=1&sig=%ff", 403),
    ],
)
def test_other_routes_and_methods_are_refused(sandbox, web, method, path, status):
    response = web.request(method, sandbox.base_url + path)
    assert response.status_code == status
    assert method == "HEAD" or response.json()["message"]


def test_a_target_that_is_not_a_path_has_no_route(sandbox):
    assert raw(sandbox, head(sandbox, method="GET", path="http://[x/")).startswith(b"HTTP/1.1 404 ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from(
    ["provider", "prompt", "model", "n", "size", "quality", "output_format", "input_images", "seed"]
)
likely = st.sampled_from(["flux", "openai", "16x16", "png", "low", "[sandbox: 402]", "[sandbox: once]", 1, 4])
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(st.dictionaries(fields, likely | json_values, max_size=9) | json_values)
def test_random_json_is_answered_200_or_refused(sandbox, web, value):
    headers = {**BEARER, "Content-Type": "application/json"}
    content = json.dumps(value).encode()
    response = web.post(sandbox.base_url + ROUTE, content=content, headers=headers)
    assert response.status_code in {200, 400, 402}
    assert sandbox.report()["faults"] == []


@fuzzed
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(sandbox, web, content):
    headers = {**BEARER, "Content-Type": "application/json"}
    assert web.post(sandbox.base_url + ROUTE, content=content, headers=headers).status_code == 400


@fuzzed
@given(st.text(st.sampled_from("[]:, sandbox402onceslowtimes3.[[]]\u00e9\U0001f98a"), max_size=60))
def test_random_tags_never_break_anything(sandbox, web, text):
    body = {"provider": "openai", "size": "8x8", "prompt": f"[sandbox{text}"}
    response = web.post(sandbox.base_url + ROUTE, json=body, headers=BEARER)
    assert response.status_code in {200, 400, 402}
    assert sandbox.report()["faults"] == []


# Money.


def test_a_request_above_the_balance_is_402_and_is_not_charged_and_names_the_credits_it_would_need(ask, sandbox):
    sandbox.balance = 100
    assert ask(n=3).status_code == 200
    refused = ask(n=1)
    assert refused.status_code == 402
    assert (refused.json()["credits_required"], refused.json()["errorCode"]) == (30, "not-enough-credits")
    assert refused.json()["message"]
    assert (sandbox.balance, sandbox.report()["charged"], sandbox.report()["credits"]) == (10, 1, 90)


def test_many_requests_at_the_same_time_never_spend_more_than_the_balance(ask, sandbox):
    sandbox.balance = 95
    with ThreadPoolExecutor(8) as pool:
        statuses = [response.status_code for response in pool.map(lambda _: ask(), range(8))]
    assert (statuses.count(200), statuses.count(402), sandbox.balance) == (3, 5, 5)


def test_the_balance_can_be_requested(sandbox, web):
    sandbox.balance = 12.5
    response = web.get(sandbox.base_url + BALANCE_ROUTE, headers=BEARER).json()
    assert response["total_balance"] == 12.5
    assert set(response) == {
        "total_balance",
        "monthly_credit_balance",
        "purchased_credit_balance",
        "billing_tier",
    }


def test_an_endless_balance_is_shown_as_a_number(sandbox, web):
    assert web.get(sandbox.base_url + BALANCE_ROUTE, headers=BEARER).json()["total_balance"] > 0


def test_a_client_that_disconnects_is_charged(sandbox):
    sandbox.hold()
    body = b'{"provider":"gemini","prompt":"x"}'
    host, port = sandbox.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head(sandbox, f"Content-Length: {len(body)}") + body)
        assert sandbox.wait_for_requests(1, 10)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sandbox.release()
    assert sandbox.report()["charged"] == 1


# Downloads.


def test_a_url_expires(ask, clock, web):
    url = ask().json()["images"][0]["url"]
    clock.now += 599
    assert web.get(url).status_code == 200
    clock.now += 1
    assert web.get(url).status_code == 403


def test_a_url_is_valid_only_as_it_was_signed(ask, sandbox, web):
    url = ask().json()["images"][0]["url"]
    for spoilt in (
        url.partition("?")[0],
        url.replace("se=", "se=9"),
        url[:-1] + ("0" if url[-1] != "0" else "1"),
    ):
        assert web.get(spoilt).status_code == 403
    assert sandbox.report()["delivered"] == 0


def test_a_key_sent_to_the_image_host_is_refused_and_counted(ask, sandbox, web):
    url = ask().json()["images"][0]["url"]
    assert web.get(url, headers=BEARER).status_code == 400
    assert sandbox.report()["bearer_at_image_host"] == 1


# Tags.


def test_every_tag_is_explained_on_a_line_of_its_own():
    lines = tags_help().splitlines()
    assert [line.split()[0] for line in lines] == list(TAGS)
    assert all(len(line) < 100 and line[21:].strip() for line in lines)


@pytest.mark.parametrize(
    "prompt",
    [
        "[sandbox: 4o2]",
        "[sandbox: ]",
        "[sandbox:]",
        "[sandbox 402]",
        "[sandbox: 402",
        "[sandbox: slow]",
        "[sandbox: slow x]",
        "[sandbox: slow -1]",
        "[sandbox: slow nan]",
        "[sandbox: slow 1e9]",
        "[sandbox: slow 999999]",
        "[sandbox: big 1 2]",
        "[sandbox: gzip 3]",
        "[sandbox: 402 403]",
        "[sandbox: once]",
        "[sandbox: once once 402]",
        "[sandbox: once 4o2]",
        "[sandbox: times 402]",
        "[sandbox: gzip, ]",
    ],
)
def test_a_mistyped_tag_is_refused_rather_than_ignored(ask, sandbox, prompt):
    response = ask(f"a cat {prompt}")
    assert (response.status_code, sandbox.report()["charged"]) == (400, 0)
    assert response.json()["message"].startswith("sandbox:")


def test_the_refusal_of_an_unknown_tag_lists_those_that_exist(ask):
    message = ask("[sandbox: teapot]").json()["message"]
    assert all(name in message for name in TAGS)


@pytest.mark.parametrize("tag", FAILURES_FREE)
def test_a_refusal_on_request_is_not_charged(ask, sandbox, tag):
    assert ask(f"a cat [sandbox: {tag}]").status_code == int(tag[:3])
    assert (sandbox.report()["requests"], sandbox.report()["charged"], sandbox.report()["credits"]) == (
        1,
        0,
        0,
    )


@pytest.mark.parametrize("tag", FAILURES_PAID)
def test_a_failure_that_leaves_the_outcome_open_is_charged(ask, sandbox, tag):
    assert ask(f"a cat [sandbox: {tag}]", n=2).status_code == int(tag[:3])
    assert (sandbox.report()["charged"], sandbox.report()["credits"]) == (1, 60)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("400", {"code": "moderation_blocked", "message": "Your request was rejected by the safety system"}),
        ("402", {"errorCode": "not-enough-credits", "credits_required": 30}),
        ("422", {"name": "ZodError"}),
        ("429", {"errorCode": "route_rps_rate_limit_exceeded"}),
        ("429-quota", {"reasons": ["exceeded-quota"], "timeToQuotaResetMs": 60000}),
        ("503-shutdown", {"errorCode": "cloud_api_shutting_down", "admitted": False, "retryable": True}),
        ("503-interrupted", {"errorCode": "cloud_api_deployment_interrupted"}),
    ],
)
def test_error_bodies_have_the_shapes_seen_in_the_wild(ask, tag, expected):
    assert expected.items() <= ask(f"[sandbox: {tag}]").json().items()


@pytest.mark.parametrize(
    ("tag", "value"), [("429", "1"), ("503-shutdown", "1"), ("429-plain", None), ("429-quota", None)]
)
def test_only_some_refusals_say_when_to_try_again(ask, tag, value):
    assert ask(f"[sandbox: {tag}]").headers.get("retry-after") == value


@pytest.mark.parametrize("tag", ["429-plain", "500-empty"])
def test_some_errors_have_no_body(ask, tag):
    assert ask(f"[sandbox: {tag}]").content == b""


@pytest.mark.parametrize("tag", ["502", "503", "504", "520", "521", "522", "523", "524", "not-json"])
def test_some_responses_are_pages(ask, tag):
    response = ask(f"[sandbox: {tag}]")
    assert response.headers["content-type"].startswith("text/html")
    assert "<html>" in response.text


@pytest.mark.parametrize("tag", ["302", "307", "308"])
def test_a_client_that_follows_a_redirect_of_the_paid_call_is_counted(ask, sandbox, web, tag):
    response = ask(f"[sandbox: {tag}]")
    assert sandbox.report()["redirected"] == 0
    web.request("GET" if tag == "302" else "POST", sandbox.base_url + response.headers["location"], headers=BEARER)
    assert sandbox.report()["redirected"] == 1


@pytest.mark.parametrize("tag", CUT_OFF)
def test_a_response_that_is_cut_off_is_charged(ask, sandbox, tag):
    with pytest.raises(httpx.TransportError):
        ask(f"[sandbox: {tag}]", "gemini")
    assert (sandbox.report()["charged"], sandbox.report()["credits"]) == (1, 134)


def test_a_reset_is_a_reset_and_a_drop_is_not(ask):
    with pytest.raises(httpx.ReadError, match="reset"):
        ask("[sandbox: reset]")
    with pytest.raises(httpx.RemoteProtocolError):
        ask("[sandbox: drop]")


def test_a_truncated_response_announces_its_whole_length_and_sends_half(sandbox):
    body = b'{"provider":"gemini","prompt":"[sandbox: truncate]"}'
    response = raw(sandbox, head(sandbox, f"Content-Length: {len(body)}") + body)
    top, _, content = response.partition(b"\r\n\r\n")
    length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    assert len(content) == length // 2


def test_not_object_is_a_list(ask):
    assert isinstance(ask("[sandbox: not-object]").json(), list)


@pytest.mark.parametrize(("tag", "count"), [("no-images", 0), ("fewer", 2)])
def test_fewer_images_than_asked_for_are_charged_nevertheless(ask, tag, count):
    body = ask(f"[sandbox: {tag}]", n=3).json()
    assert (len(body["images"]), body["billing"]["credits_charged"]) == (count, 90)


def test_bad_base64_is_in_the_last_image_only_and_no_decoder_accepts_it(ask, sandbox):
    good, bad = ask("[sandbox: bad-base64]", n=2).json()["images"]
    assert opened(base64.b64decode(good["b64_json"], validate=True)).format == "JPEG"
    with pytest.raises(ValueError, match="base64"):
        base64.b64decode(bad["b64_json"], validate=False)
    assert sandbox.report()["calls"][0]["images"][1] is None


def test_a_bad_image_is_valid_base64_of_half_an_image(ask):
    good, bad = decoded(ask("[sandbox: bad-picture]", "gemini", n=2))
    opened(good)
    with pytest.raises(OSError, match="truncated"):
        opened(bad)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("not-picture", ("image/png", b"<!DOCTYPE html>")),
        ("wrong-mime", ("image/png", b"\xff\xd8\xff")),
        ("svg", ("image/svg+xml", b"<svg")),
    ],
)
@pytest.mark.parametrize("by", ["url", "b64"])
def test_bytes_can_be_something_else_than_an_image_or_than_the_named_type(ask, web, tag, expected, by):
    entry = ask(f"[sandbox: {tag}, {by}]", "openai").json()["images"][-1]
    content = web.get(entry["url"]).content if by == "url" else base64.b64decode(entry["b64_json"])
    assert entry["mime_type"] == expected[0]
    assert content.startswith(expected[1])


def test_an_image_with_content_credentials_is_a_png_that_has_them_and_opens(ask):
    images = decoded(ask("[sandbox: credentials]", "gemini", n=2))
    for content in images:
        assert opened(content).format == "PNG"
        assert content.count(b"caBX") == content.count(b"jumdc2pa") == 1
    (page,) = decoded(ask("[sandbox: not-picture, credentials]", "gemini"))
    assert page.startswith(b"<!DOCTYPE html>")


def test_no_billing_is_a_response_without_billing(ask, sandbox):
    assert "billing" not in ask("[sandbox: no-billing]").json()
    assert sandbox.report()["charged"] == 1


def test_gzip_is_compressed_and_readable(sandbox):
    body = b'{"provider":"gemini","prompt":"[sandbox: gzip]"}'
    top, _, content = raw(sandbox, head(sandbox, f"Content-Length: {len(body)}") + body).partition(b"\r\n\r\n")
    assert b"content-encoding: gzip" in top.lower()
    assert json.loads(gzip.decompress(content))["images"]


def test_big_is_a_valid_image_of_that_many_megabytes_with_a_correct_length(ask, sandbox):
    response = ask("[sandbox: big 3]", "gemini", n=2)
    assert len(response.content) == int(response.headers["content-length"])
    contents = decoded(response)
    assert all(3_000_000 < len(content) < 3_400_000 for content in contents)
    assert opened(contents[0]).format == "PNG"
    assert [hashlib.sha256(content).hexdigest() for content in contents] == sandbox.report()["calls"][0]["images"]
    assert checksums_hold(contents[1])


def checksums_hold(content):
    at = 8
    while at < len(content):
        length = int.from_bytes(content[at : at + 4])
        checksum = int.from_bytes(content[at + 8 + length : at + 12 + length])
        if zlib.crc32(content[at + 4 : at + 8 + length]) != checksum:
            return False
        at += 12 + length
    return at == len(content)


def test_a_very_large_response_is_streamed(ask):
    response = ask("[sandbox: big 20, gzip]", "gemini", n=2)
    assert len(response.content) > 2 * 20_000_000 * 4 // 3


@pytest.mark.parametrize("provider", DEFAULT_MODELS)
def test_url_and_b64_choose_the_kind_of_delivery_for_any_provider(ask, provider):
    assert "url" in ask("[sandbox: url]", provider).json()["images"][0]
    assert "b64_json" in ask("[sandbox: b64]", provider).json()["images"][0]


@pytest.mark.parametrize(
    ("tag", "statuses"),
    [
        ("url-404", [404, 404]),
        ("url-expired", [403, 403]),
        ("url-flaky", [503, 200]),
        ("url-redirect", [302, 302]),
    ],
)
def test_downloads_fail_as_requested(ask, web, tag, statuses):
    url = ask(f"[sandbox: {tag}]").json()["images"][0]["url"]
    assert [web.get(url).status_code for _ in statuses] == statuses


def test_a_redirected_download_arrives_in_the_end(ask, web):
    url = ask("[sandbox: url-redirect]", "gemini").json()["images"][0]["url"]
    response = web.get(url, follow_redirects=True)
    assert opened(response.content).format == "JPEG"
    assert response.url.path.startswith("/delivery/")


@pytest.mark.parametrize(
    ("tag", "url"), [("url-file", "file:///etc/hostname"), ("url-private", "http://10.0.0.1/x.png")]
)
def test_urls_can_point_to_places_that_no_client_should_open(ask, tag, url):
    assert ask(f"[sandbox: {tag}]").json()["images"][0]["url"] == url


def test_a_huge_download_does_not_say_how_long_it_is(ask, web):
    response = web.get(ask("[sandbox: url-huge 5]").json()["images"][0]["url"])
    assert "content-length" not in response.headers
    assert opened(response.content).format == "PNG"
    assert len(response.content) > 5_000_000


def test_a_trickled_response_arrives_completely(ask):
    assert ask("[sandbox: trickle 0.0001, trickle-headers 0.0001, not-object]").json() == ["no object"]


@pytest.mark.parametrize("tag", ["slow 3600", "trickle 3600", "trickle-headers 3600"])
def test_a_slow_response_is_charged_first_and_ends_when_the_sandbox_stops(web, tag):
    body = {"provider": "flux", "prompt": f"[sandbox: {tag}]"}
    sandbox = Sandbox()
    sandbox.start()
    waiting = in_thread(web.post, sandbox.base_url + ROUTE, json=body, headers=BEARER)
    assert sandbox.wait_for_requests(1, 10)
    assert sandbox.report()["charged"] == 1
    assert not waiting.done()
    sandbox.stop()
    assert isinstance(waiting.exception(10), httpx.TransportError)
    assert sandbox.report()["faults"] == []


def test_several_tags_work_together(ask, web):
    response = ask("a cat [sandbox: url, no-billing] on a mat [Sandbox: FEWER]", "openai", n=3)
    assert "billing" not in response.json()
    assert [web.get(entry["url"]).status_code for entry in response.json()["images"]] == [200, 200]


def test_once_applies_to_the_first_request_with_a_prompt_only(ask):
    assert [ask("[sandbox: once 429]").status_code for _ in range(3)] == [429, 200, 200]
    assert ask("another [sandbox: once 429]").status_code == 429


def test_once_uses_the_idempotency_key_if_there_is_one(ask):
    keys = ["a", "a", "b"]
    assert [ask("[sandbox: once 500]", headers={"Idempotency-Key": key}).status_code for key in keys] == [
        500,
        200,
        500,
    ]


def test_times_applies_to_the_first_few_requests(ask):
    assert [ask("[sandbox: times 2 429, once 502]").status_code for _ in range(3)] == [502, 429, 200]


# Hold, start and stop.


def test_during_a_hold_a_request_is_charged_but_gets_no_response(ask, sandbox):
    sandbox.hold()
    waiting = in_thread(ask)
    assert sandbox.wait_for_requests(1, 10)
    assert sandbox.report()["charged"] == 1
    assert not waiting.done()
    sandbox.release()
    assert waiting.result(10).status_code == 200


def test_waiting_for_more_requests_than_come_times_out(sandbox):
    assert sandbox.wait_for_requests(0, 0)
    assert not sandbox.wait_for_requests(1, 0.01)


def test_stopping_cuts_off_held_requests(web):
    sandbox = Sandbox()
    sandbox.start()
    sandbox.hold()
    waiting = in_thread(web.post, sandbox.base_url + ROUTE, json={"provider": "flux", "prompt": "x"}, headers=BEARER)
    assert sandbox.wait_for_requests(1, 10)
    sandbox.stop()
    assert isinstance(waiting.exception(10), httpx.TransportError)
    with pytest.raises(httpx.ConnectError):
        web.get(sandbox.base_url + REPORT_ROUTE)
    sandbox.stop()


def test_the_sandbox_can_be_stopped_without_having_been_started():
    Sandbox().stop()


def test_the_sandbox_serves_in_the_foreground_until_stopped(web):
    sandbox = Sandbox()
    thread = threading.Thread(target=sandbox.serve_forever)
    thread.start()
    assert web.get(sandbox.base_url + REPORT_ROUTE).json()["requests"] == 0
    sandbox.stop()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("port", [None, 99999])
def test_an_address_that_cannot_be_bound_is_a_configuration_error(sandbox, port):
    used_port = int(sandbox.base_url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot listen on"):
        Sandbox(port=port or used_port)


def test_latency_delays_a_response_until_it_is_over_or_the_sandbox_stops(web):
    sandbox = Sandbox(latency_seconds=3600)
    sandbox.start()
    waiting = in_thread(web.post, sandbox.base_url + ROUTE, json={"provider": "flux", "prompt": "x"}, headers=BEARER)
    assert sandbox.wait_for_requests(1, 10)
    assert not waiting.done()
    sandbox.stop()
    assert waiting.exception(10)


@contextmanager
def listening():
    lines = []
    with Sandbox(on_request=lines.append) as sandbox:
        yield sandbox, lines


def test_each_request_is_logged_on_one_plain_line(web):
    with listening() as (sandbox, lines):
        web.post(sandbox.base_url + ROUTE, json={"provider": "flux", "prompt": "a\n\x1b[31mcat"}, headers=BEARER)
        web.get(sandbox.base_url + "/x%0a")
    assert len(lines) == 2
    assert "200" in lines[0]
    assert "30 credits" in lines[0]
    assert all(line.isprintable() for line in lines)


def test_one_connection_can_carry_many_requests(sandbox):
    connection = http.client.HTTPConnection(sandbox.base_url.removeprefix("http://"), timeout=10)
    for _ in range(3):
        body = '{"provider":"flux","prompt":"x"}'
        connection.request("POST", ROUTE, body, {**BEARER, "Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, bool(json.loads(response.read()))) == (200, True)
    connection.close()
    assert sandbox.report()["requests"] == 3


def test_many_connections_at_the_same_time_are_all_served(ask, sandbox):
    with ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(lambda number: ask(f"cat {number}", "openai", size="16x16"), range(96)))
    assert {response.status_code for response in responses} == {200}
    assert sorted(call["prompt"] for call in sandbox.report()["calls"]) == sorted(f"cat {n}" for n in range(96))
