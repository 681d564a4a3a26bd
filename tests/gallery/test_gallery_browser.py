"""The gallery in a real Chromium, opened as a file, as people open it."""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from support.chromium import PROGRAM, Chromium
from support.daemon import until

from gallery.test_gallery import HOSTILE, Shelf, hostile, page_data, plain_image
from gallery.test_gallery_status import NOW, notice, report, waiting
from imagewatch.config.load import load
from imagewatch.gallery import Gallery
from imagewatch.gallery.page import page
from imagewatch.gallery.values import Job, JobImage
from imagewatch.protocol.notice import (
    HoldNotice,
    Ignored,
    IgnoredFile,
    InFlight,
    Stuck,
    StuckFile,
    Waiting,
    WaitingFile,
    at,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(not PROGRAM, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """The browser with a window of its usual size; at the end it must have reported no error in the page."""
    chromium.events.clear()
    chromium.size(1200, 900)
    chromium.colors("light")
    yield chromium
    # A page finds out about a newer one by requesting its stamp, also if that is missing.
    assert [one for one in chromium.complaints() if "/stamp-" not in one.get("url", "")] == []


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "watched")


def write(shelf: Shelf, clock: float | None = None) -> None:
    """Write the page, as at some time."""
    Gallery(load(None, shelf.environ()), clock=time.time if clock is None else lambda: clock).write()


def visit(browser: Chromium, shelf: Shelf, fragment: str = "", clock: float | None = None) -> None:
    write(shelf, clock)
    browser.open((shelf.root / "gallery.html").as_uri() + fragment)


def texts(browser: Chromium, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(element => element.textContent)")


def prompts(browser: Chromium) -> list[str]:
    return texts(browser, ".words p")


def write_in(browser: Chromium, text: str) -> None:
    browser.run("document.querySelector('#words').select()")
    browser.type(text)


def zoo(shelf: Shelf) -> None:
    """Five jobs; the newest first: cat, dog, two cows, and an elk that failed."""
    when = "2027-03-0{}T12:00:00+00:00"
    shelf.completed("cat", plain_image("red"), provider="flux", credits_charged=30, times=times(when.format(4)))
    shelf.completed(
        "dog", plain_image("blue"), provider="openai", credits_charged=5.5, times=times(when.format(3)), folder="pets"
    )
    cows = [plain_image("green"), plain_image("lime")]
    shelf.completed(
        "cow", *cows, provider="gemini", credits_charged=268, times=times(when.format(2)), folder="farm/big"
    )
    shelf.failed(
        "elk",
        message="no such animal",
        next="ask for another",
        charged="unknown",
        prompt="an elk",
        times=times(when.format(1)),
    )


def times(moment: str) -> dict[str, Any]:
    return {"published": datetime.fromisoformat(moment)}


# Visible content


def test_every_job_is_a_card_and_each_image_has_its_prompt_as_alternative_text(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    assert prompts(browser) == ["a cat", "a dog", "a cow", "an elk"]
    until(lambda: browser.run("[...document.querySelectorAll('.card img')].every(image => image.naturalWidth === 320)"))
    assert browser.run("[...document.querySelectorAll('.card img')].map(image => image.alt)") == [
        "a cat",
        "a dog",
        "a cow",
        "",
    ]
    assert texts(browser, ".failed .mat *") == ["Failed, may have been charged", "no such animal", "ask for another"]
    assert browser.run("document.querySelector('.failed').getAttribute('aria-label')").startswith(
        "an elk, Failed, may have been charged: no such animal"
    )
    assert texts(browser, "#totals div") == ["credits303.5", "images4", "completed3", "failed1", "of unknown cost1"]


def test_the_page_loads_nothing_but_images_beside_it(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    browser.run("enlarge(0, 0)")
    top = shelf.root.as_uri()
    asked = [url for url in browser.requested() if url != "about:blank"]
    assert asked
    assert all(url.startswith(f"{top}/gallery") or url == f"{top}/outbox/cat.png" for url in asked)


def test_an_edit_is_shown_beside_its_inputs(browser: Chromium, shelf: Shelf):
    inputs = [{"file": "boat.png", "bytes": len(plain_image("navy"))}, {"file": "missing.png", "bytes": 5}]
    shelf.put("archive/boat.png", plain_image("navy"))
    shelf.completed("cat", plain_image("red"), inputs=inputs)
    visit(browser, shelf)
    assert browser.run("document.querySelector('.from img').alt") == "input: boat.png"
    assert texts(browser, ".from .blank") == ["is missing from the archive"]
    browser.run("document.querySelector('.card').click()")
    assert texts(browser, ".strip button") == ["input 1", "is missing from the archiveinput 2", "result"]
    browser.run("document.querySelector('.strip button').click()")
    until(lambda: browser.run("document.querySelector('.stage img').src.endsWith('/archive/boat.png')"))


def test_credits_are_charted_by_day(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    titles = texts(browser, "#chart title")
    assert len(titles) == 30
    assert [line for line in titles if not line.endswith(": 0 credits")] == [
        "Mar 2, 2027: 268 credits",
        "Mar 3, 2027: 5.5 credits",
        "Mar 4, 2027: 30 credits",
    ]
    heights = browser.run(
        "[...document.querySelectorAll('#chart .bar')].map(bar => Number(bar.getAttribute('height')))"
    )
    assert heights[-3] == 100
    assert heights[-1] == pytest.approx(3000 / 268)


def test_without_a_job_the_page_says_what_to_do(browser: Chromium, shelf: Shelf):
    visit(browser, shelf)
    assert "No images yet" in browser.run("document.body.innerText")
    assert "Nothing matches" not in browser.run("document.body.innerText")


def test_a_suspicious_image_is_not_loaded_in_the_large_view(browser: Chromium, shelf: Shelf):
    shelf.completed("cat", plain_image()[:-20])
    visit(browser, shelf)
    browser.run("document.querySelector('.card').click()")
    assert browser.run("document.querySelector('.stage').innerText").startswith("cat.png: cut short")
    assert not [url for url in browser.requested() if url.endswith("cat.png")]


# Text of other people


def test_text_of_other_people_is_shown_and_never_run(browser: Chromium, shelf: Shelf):
    hostile(shelf)
    visit(browser, shelf)
    elements = browser.run("document.querySelectorAll('script, img[src=x]').length")
    assert elements == 2
    assert HOSTILE in prompts(browser)
    for index in range(browser.run("shown.length")):
        browser.run(f"enlarge({index}, 0)")
        assert browser.run("typeof pwned") == "undefined"
        assert browser.run("document.querySelectorAll('script, img[src=x]').length") == elements
    assert [url for url in browser.requested() if url.endswith("/x")] == []


def test_the_policy_protects_even_if_the_script_has_a_flaw(chromium: Chromium, shelf: Shelf):
    chromium.size(1200, 900)
    visit(chromium, shelf)
    hole = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=pwned()>')"
    assert "TypeError" in chromium.run(f"(() => {{ try {{ {hole} }} catch (error) {{ return String(error) }} }})()")
    script = "const s = document.createElement('script'); s.append('window.pwned = 1'); document.body.append(s)"
    chromium.run(f"(() => {{ try {{ {script} }} catch {{ }} }})()")
    assert chromium.run("typeof pwned") == "undefined"
    assert chromium.run("fetch('https://127.0.0.1:9/').then(() => 'sent', error => String(error))").startswith(
        "TypeError"
    )


EVIL = "javascript:window.pwned=1//"
ADDRESSES = [
    *(EVIL, "JaVaScRiPt:window.pwned=1//.png", "data:text/html,<script>window.pwned=1</script>", "//127.0.0.1:9/x.png"),
    *("https://127.0.0.1:9/x.png", "http:x.png", "file:///etc/passwd", "\\\\127.0.0.1\\share\\x.png", "../../x.png"),
    *("?x.png", "#x.png", " javascript:window.pwned=1", "\tjavascript:window.pwned=1"),
]


def test_urls_of_other_people_are_no_links(browser: Chromium, shelf: Shelf):
    entries = [{"file": name, "bytes": 5} for name in ADDRESSES]
    for k, name in enumerate(ADDRESSES):
        plain = name.replace("/", "\\")
        content = plain_image()
        shelf.put(f"outbox/{plain}.png", content)
        there = [{"file": f"{plain}.png", "bytes": len(content)}]
        shelf.completed(
            f"cat{k}", images=there + entries, inputs=entries, prompt=name, message=name, next=name, job=name
        )
        shelf.completed(
            plain, plain_image(), folder=plain, source=name, provider=name, model=name, problems=[name, name]
        )
        shelf.failed(plain, message=name, next=name, code=name, inputs=entries)
    visit(browser, shelf)
    leading = (
        "[...document.querySelectorAll('[href], [src], [action], [data], [srcset]')].map(one => one.href ?? one.src)"
    )
    top = f"{shelf.root.as_uri()}/"
    found = set(browser.run(leading))
    for index in range(browser.run("shown.length")):
        browser.run(f"enlarge({index}, 0)")
        found |= set(browser.run(leading))
    assert len(found) > 4 * len(ADDRESSES)
    assert all(address.startswith((f"{top}outbox/", f"{top}errors/", f"{top}gallery_files/")) for address in found)
    asked = [url for url in browser.requested() if url != "about:blank"]
    assert all(url.startswith((f"{top}outbox/", f"{top}gallery_files/", f"{top}gallery.html")) for url in asked)
    assert browser.run("typeof pwned") == "undefined"
    assert browser.run("[...document.querySelectorAll('aside a')].every(link => link.rel === 'noopener noreferrer')")


def test_an_invalid_result_file_is_shown_without_a_link_to_it(browser: Chromium, shelf: Shelf):
    shelf.put("outbox/cat.receipt.toml", b"<!doctype html><script>pwned()</script>")
    visit(browser, shelf)
    browser.run("document.querySelector('.card').click()")
    assert browser.run("view.open")
    assert texts(browser, "aside a") == []
    assert browser.run("document.querySelectorAll('[href]').length") == 0


ATTEMPTS = {
    "img-src": "new Image().src = url",
    "connect-src": "fetch(url).catch(() => {}); navigator.sendBeacon(url, 'x')",
    "frame-src": "put('iframe', { src: url })",
    "font-src": "new FontFace('x', `url(${url})`).load().catch(() => {})",
    "media-src": "new Audio(url).play().catch(() => {})",
    "style-src-elem": "put('link', { rel: 'stylesheet', href: url }); put('style', {}).append('* { color: red }')",
    "style-src-attr": "put('p', { style: `background: url(${url})` })",
    "manifest-src": "put('link', { rel: 'manifest', href: url })",
    "form-action": "put('form', { action: url, method: 'post' }).submit()",
    "base-uri": "put('base', { href: url })",
    "script-src-elem": "put('a', { href: 'javascript:window.pwned=1' }).click()",
    "require-trusted-types-for": "put('p', {}).innerHTML = '<img src=x onerror=window.pwned=1>'",
}


def sent_to(server: socket.socket) -> list[bytes]:
    """The requests so far. Before it checks the policy, Chromium may connect to the target of a frame or form."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(BlockingIOError):
                connection.settimeout(0)
                received.append(connection.recv(1000))
    return [content for content in received if content]


def test_the_policy_keeps_the_page_from_loading_sending_and_running_anything_else(chromium: Chromium, shelf: Shelf):
    visit(chromium, shelf)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        chromium.run(f"var url = {url!r}, violated = new Set()")
        chromium.run("addEventListener('securitypolicyviolation', (event) => violated.add(event.violatedDirective))")
        put = "Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value))"
        chromium.run(
            "function put(tag, attributes) { const element = document.createElement(tag);"
            f"{put}; (tag === 'link' ? document.head : document.body).append(element); return element }}"
        )
        for attempt in ATTEMPTS.values():
            chromium.run(f"(() => {{ try {{ {attempt} }} catch {{ }} }})()")
        until(lambda: set(ATTEMPTS) <= set(chromium.run("[...violated]")))
        for element, name in (("p", "onclick"), ("script", "src"), ("object", "data"), ("embed", "src")):
            attempt = f"try {{ put('{element}', {{ {name}: url }}) }} catch (error) {{ return error.name }}"
            assert chromium.run(f"(() => {{ {attempt} }})()") == "TypeError", element
        assert chromium.run("typeof pwned") == "undefined"
        assert chromium.run("document.baseURI").startswith("file:")
        chromium.open("about:blank")
        assert sent_to(server) == []


# Titles and prompts


def test_the_title_of_a_failed_job_has_no_options(browser: Chromium, shelf: Shelf):
    for stem, text in (
        ("typo", '+++\nqualtiy = "high"\n+++\nA cat with options'),
        ("yaml", "---\nquality: high\n---\nA cat after YAML"),
        ("open", "+++\nn = 9\nA cat after a fence"),
        ("bare", "+++\nn = 9\n+++\n"),
    ):
        shelf.failed(stem)
        shelf.put(f"errors/{stem}.prompt.txt", text.encode())
    visit(browser, shelf)
    titles = ["A cat after YAML", "A cat after a fence", "A cat with options", "bare"]
    assert sorted(prompts(browser)) == titles
    browser.run("enlarge(shown.findIndex((job) => job.name === 'typo'), 0)")
    assert texts(browser, "aside .prompt") == ["A cat with options"]


def pasted(browser: Chromium) -> str:
    """What the clipboard has: pasted into a field of another page."""
    browser.open("data:text/html,<textarea></textarea>")
    browser.run("document.querySelector('textarea').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="v", code="KeyV", modifiers=2, commands=["paste"])
    browser.call("Input.dispatchKeyEvent", type="keyUp", key="v", code="KeyV", modifiers=2)
    return browser.run("document.querySelector('textarea').value")


def press(browser: Chromium, selector: str) -> None:
    """Click with a mouse, as a script alone may not copy."""
    box = "const { x, y, width, height } = element.getBoundingClientRect(); return [x + width / 2, y + height / 2]"
    x, y = browser.run(f"((element) => {{ {box} }})(document.querySelector({selector!r}))")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.mark.parametrize(
    "clipboard", ["a clipboard for scripts", "no clipboard for scripts", "a clipboard that refuses"]
)
def test_the_button_copies_the_prompt_as_it_was_sent(browser: Chromium, shelf: Shelf, clipboard: str):
    prompt = f"Two lines, {HOSTILE}\n\n  and an indented one\twith ü and 🐈"
    shelf.completed("cat", plain_image(), prompt=f"{prompt}\x1b[201~\x00\x9b")
    visit(browser, shelf)
    if clipboard != "a clipboard for scripts":
        other = "undefined" if clipboard.startswith("no ") else "{ writeText: () => Promise.reject(new Error('no')) }"
        browser.run(f"Object.defineProperty(navigator, 'clipboard', {{ value: {other} }})")
    browser.run("enlarge(0, 0)")
    browser.run("var button = document.querySelector('aside .copy'), said = []")
    browser.run("new MutationObserver(() => said.push(button.textContent)).observe(button, { childList: true })")
    press(browser, "aside .copy")
    until(lambda: browser.run("said[0]") == "Copied")
    assert browser.run("document.activeElement.className") == "copy"
    assert browser.run("document.querySelectorAll('textarea').length") == 0
    until(lambda: texts(browser, "aside .copy") == ["Copy prompt"])
    assert pasted(browser) == f"{prompt}[201~"


def test_a_long_prompt_can_be_read_found_and_copied_completely(browser: Chromium, shelf: Shelf):
    shelf.completed("cat", plain_image(), prompt="word " * 6000 + "the end")
    shelf.completed("dog", plain_image(), prompt="x" * 32_001)
    visit(browser, shelf)
    write_in(browser, "the end")
    assert browser.run("shown.length") == 1
    assert len(prompts(browser)[0]) == 500
    browser.run("enlarge(0, 0)")
    assert texts(browser, "aside .prompt")[0].endswith(" the end")
    assert texts(browser, "aside .copy") == ["Copy prompt"]
    browser.run("view.close()")
    write_in(browser, "dog")
    browser.run("enlarge(0, 0)")
    assert texts(browser, "aside .copy") == []  # it would copy a part


def test_a_mark_shows_content_credentials_and_says_that_they_are_not_checked(browser: Chromium, shelf: Shelf):
    contents = [plain_image("red"), plain_image("blue")]
    entries = [{"file": f"cat-{k}.png", "bytes": len(one)} for k, one in enumerate(contents, 1)]
    shelf.completed("cat", *contents, images=[entries[0], {**entries[1], "content_credentials": True}])
    shelf.completed("dog", plain_image())
    visit(browser, shelf)
    said = "content credentials (C2PA) in the file; not checked"
    assert browser.run("[...document.querySelectorAll('.mat abbr')].map((mark) => [mark.textContent, mark.title])") == [
        ["CR", said]
    ]
    assert (
        browser.run("[...document.querySelectorAll('.card')].filter((card) => card.ariaLabel.includes('C2PA')).length")
        == 1
    )
    cat = browser.run("shown.findIndex((job) => job.name === 'cat')")
    for image, expected in ((0, []), (1, [said])):
        browser.run(f"enlarge({cat}, {image})")
        found = [one for one in texts(browser, "aside dd") if "C2PA" in one]
        assert found == expected


# The daemon's status


def test_holds_and_what_waits_are_at_the_top(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    hold = HoldNotice(kind="credits", message="Not enough credits", next="add credits", since=at(NOW - 60))
    folder = HoldNotice(
        kind="cap", folder="anna", message="a cap", next="no action needed; it ends", next_try_at=at(NOW)
    )
    names = tuple(WaitingFile(name=f"anna/{k}.prompt.txt", why="ready", message="is ready") for k in range(60))
    ignored = Ignored(count=1, files=(IgnoredFile(name="x.txt.txt", message="its ending", next="rename it"),))
    there = Waiting(count=1234, oldest_since=at(NOW), files=names)
    report(shelf, notice("on_hold", holds=(hold, folder), waiting=there, ignored=ignored, in_flight=InFlight(count=1)))
    visit(browser, shelf, clock=NOW)
    assert texts(browser, "#status .stop strong") == ["On hold (credits): all prompts", "On hold (cap): folder anna"]
    assert texts(browser, "#status .stop p") == ["Not enough credits.", "a cap."]
    local = "new Intl.DateTimeFormat(undefined, { day: 'numeric', month: 'short', hour: 'numeric', minute: '2-digit' })"
    hour, earlier = (browser.run(f"{local}.format({moment} * 1000)") for moment in (NOW, NOW - 60))
    assert texts(browser, "#status .stop small") == [
        "For the administrator: add credits.",
        f"since {earlier} · until the administrator ends it",
        "No action needed; it ends.",
        f"next try at {hour}",
    ]
    waits, ignores = texts(browser, "#status summary")
    assert waits == f"1,234 prompts wait, the oldest since {hour}"
    assert ignores == "1 file in the inbox is ignored"
    assert "1 request in flight" in texts(browser, "#status > p")
    assert texts(browser, "#status li")[49:52] == [
        "anna/49.prompt.txt is ready",
        "and 1,184 more",
        "x.txt.txt its endingNext step: rename it.",
    ]
    assert not browser.run("document.querySelector('#status li').checkVisibility()")
    press(browser, "#status summary")
    assert browser.run("document.querySelector('#status li').checkVisibility()")
    top = "document.querySelector('{}').getBoundingClientRect().top"
    assert browser.run(top.format("#status")) < browser.run(top.format("form"))


@pytest.mark.parametrize(
    ("state", "later", "heading"),
    [
        ("stopped", 0, ["The daemon is stopped."]),
        ("running", 3600, ["The daemon is not running."]),
        ("on_hold", 3600, ["The daemon is not running."]),
        ("on_hold", 0, ["On hold: all prompts"]),
        ("running", 0, []),
    ],
)
def test_the_page_says_whether_the_daemon_runs(
    browser: Chromium, shelf: Shelf, state: str, later: int, heading: list[str]
):
    report(shelf, notice(state))
    visit(browser, shelf, clock=NOW + later)
    assert texts(browser, "#status strong") == heading
    assert browser.run("document.querySelector('#status').hidden") == (not heading)


def test_an_open_page_shows_a_hold_automatically_but_not_while_a_list_is_open(browser: Chromium, shelf: Shelf):
    shelf.completed("cat", plain_image())
    visit(browser, shelf, clock=NOW)
    report(shelf, notice(waiting=waiting("x.prompt.txt")))
    write(shelf, NOW)
    browser.loaded()
    assert texts(browser, "#status summary")[0].startswith("1 prompt waits")
    press(browser, "#status summary")
    report(shelf, notice("stopped"))
    write(shelf, NOW)
    until(lambda: not browser.run("document.querySelector('#newer').hidden"))
    assert texts(browser, "#status strong") == []
    press(browser, "#newer")
    browser.loaded()
    assert texts(browser, "#status strong") == ["The daemon is stopped."]


def test_text_of_other_people_in_the_status_is_shown_and_never_run(browser: Chromium, shelf: Shelf):
    hold = HoldNotice(kind=HOSTILE, provider=HOSTILE, folder=HOSTILE, message=HOSTILE, next=HOSTILE)
    files = tuple(WaitingFile(name=text, why=HOSTILE, message=text, next=text) for text in (HOSTILE, EVIL, "x" * 3000))
    stuck = Stuck(count=2**53, files=(StuckFile(name=HOSTILE, message=HOSTILE),))
    times = {"written_at": datetime(1970, 1, 1, tzinfo=UTC), "next_writing_at": datetime(9000, 1, 1, tzinfo=UTC)}
    there = Waiting(count=3, oldest_since=datetime(9000, 1, 1, tzinfo=UTC), files=files)
    report(shelf, notice("on_hold", holds=(hold,) * 20, waiting=there, stuck=stuck, **times))
    browser.size(360, 800)
    visit(browser, shelf)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert f"On hold ({HOSTILE}): provider {HOSTILE}, folder {HOSTILE}" in texts(browser, "#status strong")
    assert HOSTILE in texts(browser, "#status li b")
    assert browser.run("document.querySelectorAll('script, img, #status [href], #status [src]').length") == 2
    assert browser.run("typeof pwned") == "undefined"
    assert browser.run("document.documentElement.scrollWidth") == 360


# Phone


def phone(browser: Chromium, width: int = 390) -> None:
    browser.size(width, 844, 2)


@pytest.mark.parametrize("width", [320, 360, 390, 430])
def test_on_a_phone_no_date_wraps_or_is_cut(browser: Chromium, shelf: Shelf, width: int):
    zoo(shelf)
    shelf.completed("yak", *[plain_image()] * 4, credits_charged=12_345, times=times("2027-12-30T22:58:00+00:00"))
    report(
        shelf,
        notice("on_hold", holds=(HoldNotice(kind="x", message="x", next="x", since=at(NOW), next_try_at=at(NOW)),)),
    )
    phone(browser, width)
    visit(browser, shelf, clock=NOW)
    browser.run("enlarge(0, 0)")
    dates = "time, figcaption span, .words small:last-child .whole, aside .date"
    lines = "one.getClientRects().length === 1 && one.offsetHeight < 1.6 * parseFloat(getComputedStyle(one).fontSize)"
    whole = "one.scrollWidth <= one.clientWidth + 1 || getComputedStyle(one).display === 'inline'"
    found = browser.run(f"[...document.querySelectorAll({dates!r})].map((one) => [one.textContent, {lines}, {whole}])")
    assert len(found) >= 10
    assert [one for one in found if one[1:] != [True, True]] == []
    first, _, last = browser.run("[...document.querySelectorAll('figcaption span')].map((one) => one.offsetTop)")
    assert first == last


def test_on_a_phone_the_large_view_opens_at_its_top(browser: Chromium, shelf: Shelf):
    high = plain_image(size=(600, 1800))
    entries = [{"file": f"cat-{k}.png", "bytes": len(high)} for k in (1, 2)]
    shelf.completed("cat", high, high, images=entries, prompt="many words " * 300)
    shelf.completed("dog", plain_image())
    phone(browser)
    visit(browser, shelf)
    cat = browser.run("shown.findIndex((job) => job.name === 'cat')")
    browser.run(f"document.querySelectorAll('.card')[{cat}].click()")
    until(lambda: browser.run("document.querySelector('.stage img').naturalWidth") == 600)
    assert browser.run("[view.scrollTop, document.activeElement.id]") == [0, "close"]
    browser.run("view.scrollTo(0, 800)")
    assert browser.run("view.scrollTop") == 800
    browser.key("ArrowRight")
    assert browser.run("[part, view.scrollTop]") == [1, 0]


# Search and filters


def test_search_and_filters_narrow_the_list_and_survive_a_reload(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    write_in(browser, "A  do")
    assert prompts(browser) == ["a dog"]
    assert browser.run("document.querySelector('#count').textContent") == "1 of 4 jobs"
    browser.reload()
    assert prompts(browser) == ["a dog"]
    write_in(browser, "zebra")
    assert prompts(browser) == []
    assert "Nothing matches" in browser.run("document.body.innerText")
    browser.run("document.querySelector('#all').click()")
    assert len(prompts(browser)) == 4
    browser.run("document.querySelector('[value=failed]').click()")
    assert prompts(browser) == ["an elk"]
    browser.run("document.querySelector('[name=outcome]').click()")
    for select, value, found in (("provider", "flux", "a cat"), ("folder", "pets", "a dog")):
        browser.run("location.hash = ''")
        until(lambda: len(prompts(browser)) == 4)
        browser.run(f"document.querySelector('#{select}').value = '{value}'")
        browser.run(f"document.querySelector('#{select}').dispatchEvent(new Event('input', {{bubbles: true}}))")
        assert prompts(browser) == [found]


def test_a_url_with_a_removed_folder_or_provider_shows_all_jobs(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf, "#provider=removed&folder=removed&outcome=removed&job=removed&image=-7")
    assert len(prompts(browser)) == 4


def test_escape_clears_the_search_and_stays_at_the_same_job(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    browser.key("/", "/")
    browser.type("a cow")
    assert prompts(browser) == ["a cow"]
    browser.key("Enter")
    assert browser.run("document.activeElement.dataset.index") == "0"
    browser.key("Escape")
    assert len(prompts(browser)) == 4
    assert browser.run("[fields.q.value, location.hash, document.activeElement.dataset.index]") == ["", "", "2"]
    browser.key("Escape")  # nothing to clear
    assert browser.run("document.activeElement.dataset.index") == "2"


def test_escape_belongs_to_the_large_view_while_it_is_open(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf, "#q=a+cow")
    browser.run("document.querySelector('.card').click()")
    browser.key("Escape")
    assert browser.run("[view.open, fields.q.value]") == [False, "a cow"]


# The keyboard


def test_the_page_can_be_used_with_the_keyboard_alone(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    focused = "document.activeElement.querySelector('.words p')?.textContent"
    browser.key("/", "/")
    assert browser.run("document.activeElement.id") == "words"
    browser.type("a")
    browser.key("Escape")
    assert browser.run("[fields.q.value, document.activeElement.id]") == ["", "words"]
    browser.key("Escape")
    assert browser.run("document.activeElement.tagName") == "BODY"
    browser.key("ArrowRight")
    assert browser.run(focused) == "a cat"
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    assert browser.run(focused) == "a cow"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.key("Enter")
    assert browser.run("view.open")
    until(lambda: browser.run("document.querySelector('.stage img').naturalWidth") == 640)
    assert browser.run("document.querySelector('.stage img').src").endswith("/outbox/farm/big/cow-1.png")
    browser.key("ArrowRight")
    assert browser.run("document.querySelector('.stage img').src").endswith("/outbox/farm/big/cow-2.png")
    browser.key("ArrowRight")
    assert texts(browser, ".stage article *")[:2] == ["Failed, may have been charged", "no such animal"]
    browser.key("ArrowRight")  # the last card
    browser.key("Escape")
    assert not browser.run("view.open")
    assert browser.run(focused) == "an elk"
    browser.key("Home")
    assert browser.run(focused) == "a cat"


@pytest.mark.parametrize("way", ["Escape", "#close"])
def test_the_focus_returns_to_the_card_before_the_browser_reports_that_the_large_view_is_closed(
    browser: Chromium, shelf: Shelf, way: str
):
    # The next key may come before that report: an arrow key pressed immediately continues from the shown image.
    zoo(shelf)
    visit(browser, shelf)
    browser.run("enlarge(2, 0)")
    browser.run("var seen = []")
    browser.run("view.addEventListener('close', () => seen.push(document.activeElement.dataset.index), true)")
    if way == "Escape":
        browser.key(way)
    else:
        browser.run(f"document.querySelector('{way}').click()")
    until(lambda: browser.run("seen.length"))
    assert browser.run("seen") == ["2"]


def test_arrow_keys_move_up_and_down_between_rows(browser: Chromium, shelf: Shelf):
    for k in range(7):
        shelf.completed(f"cat{k}", plain_image(), times=times(f"2027-03-04T0{9 - k}:00:00+00:00"))
    browser.size(700, 900)
    visit(browser, shelf)
    columns = browser.run("columns")
    assert columns == 3
    for key, there in (
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 4),
        ("ArrowDown", 6),
        ("ArrowDown", 6),
        ("ArrowUp", 3),
    ):
        browser.key(key)
        assert browser.run("current") == there, key


def test_one_press_of_tab_skips_all_cards(browser: Chromium, shelf: Shelf):
    zoo(shelf)
    visit(browser, shelf)
    stops = "[...document.querySelectorAll('.card')].map(card => card.tabIndex)"
    assert browser.run(stops) == [0, -1, -1, -1]
    for _ in range(3):
        browser.key("ArrowRight")
    assert browser.run(stops) == [-1, -1, 0, -1]
    write_in(browser, "a")
    assert browser.run(stops) == [0, -1, -1, -1]


# Light and dark


def test_colors_follow_the_system_until_the_user_chooses(browser: Chromium, shelf: Shelf):
    visit(browser, shelf)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(paper)
    browser.colors("dark")
    dark = browser.run(paper)
    assert dark != light
    press = "document.querySelector('#theme').click()"
    browser.run(press)
    assert browser.run(paper) == light
    browser.run(press)
    assert browser.run(paper) == dark
    browser.colors("light")
    browser.reload()
    assert browser.run(paper) == dark
    browser.run(press)
    browser.run(press)
    assert browser.run(paper) == light
    browser.colors("dark")
    assert browser.run(paper) == dark


@pytest.mark.parametrize(("system", "other"), [("light", "dark"), ("dark", "light")])
def test_the_color_button_says_what_it_does(browser: Chromium, shelf: Shelf, system: str, other: str):
    browser.colors(system)
    visit(browser, shelf)
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    assert browser.run(scheme) == "light dark"
    for name, expected in (
        (f"Use {other} colors", other),
        (f"Use {system} colors", system),
        ("Use the system's colors", "light dark"),
        (f"Use {other} colors", other),
    ):
        assert texts(browser, "#theme") == [name]
        browser.run("document.querySelector('#theme').click()")
        assert browser.run(scheme) == expected
    browser.colors(other)  # the system's colors are now those that were chosen
    until(lambda: texts(browser, "#theme") == ["Use the system's colors"])
    browser.run("document.querySelector('#theme').click()")  # the browser keeps the choice for the next page


@pytest.mark.parametrize("width", [360, 700, 1400, 2560])
def test_no_window_is_too_narrow_or_too_wide(browser: Chromium, shelf: Shelf, width: int):
    zoo(shelf)
    shelf.completed("word" * 60, plain_image(), prompt="unbreakable" * 40, model="model" * 30, provider="provider" * 9)
    shelf.failed("more", message="unbreakable" * 40, next="unbreakable" * 40)
    browser.size(width, 800)
    visit(browser, shelf)
    assert browser.run("document.documentElement.scrollWidth") == width
    box = "const { left, top, right, bottom } = card.getBoundingClientRect(); return [left, top, right, bottom]"
    cards = browser.run(f"[...document.querySelectorAll('.card')].map(card => {{ {box} }})")
    for k, one in enumerate(cards):
        for other in cards[k + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1], "cards overlap"
    browser.run("enlarge(0, 0)")
    assert browser.run("view.scrollWidth") <= width


# Many jobs


def many(path: Path, count: int) -> None:
    """Write a page of this many jobs, without their images."""
    jobs = [
        Job(
            completed=k % 30 > 0,
            name=f"job-{k}",
            result_file=f"outbox/job-{k}.receipt.toml",
            at=1_800_000_000_000 - k * 5_000_000,
            charged="yes",
            credits=30,
            provider="flux",
            prompt=f"number {k} of many, with as many words as people write",
            images=[JobImage(f"job-{k}.png", problem="none")],
        )
        for k in range(count)
    ]
    made = page(jobs, [], title="many", files="many_files", written=time.time())
    path.with_name("many_files").mkdir()
    path.with_name("many_files").joinpath(made.stamp).write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    path.write_bytes(made.content)


def test_of_thousands_of_jobs_only_those_in_sight_exist(browser: Chromium, tmp_path: Path):
    many(tmp_path / "gallery.html", 5000)
    browser.open((tmp_path / "gallery.html").as_uri())
    assert texts(browser, "#count") == ["5,000 jobs"]
    assert browser.run("document.querySelectorAll('*').length") < 1500
    height = browser.run("document.documentElement.scrollHeight")
    browser.run("scrollTo(0, document.documentElement.scrollHeight)")
    until(lambda: prompts(browser) and prompts(browser)[-1].startswith("number 4999 "))
    assert browser.run("document.querySelectorAll('*').length") < 1500
    assert browser.run("document.documentElement.scrollHeight") == height
    write_in(browser, "number 2500")
    assert prompts(browser) == ["number 2500 of many, with as many words as people write"]


def test_arrow_keys_reach_every_card_of_a_long_list(browser: Chromium, tmp_path: Path):
    many(tmp_path / "gallery.html", 60)
    browser.size(500, 500)
    browser.open((tmp_path / "gallery.html").as_uri())
    seen = []
    for _ in range(61):
        browser.key("ArrowRight")
        box = "document.activeElement.getBoundingClientRect()"
        top, bottom, window = browser.run(f"[{box}.top, {box}.bottom, innerHeight]")
        assert 0 <= top < bottom <= window
        seen.append(browser.run("Number(document.activeElement.dataset.index)"))
    assert seen == [*range(60), 59]


# A newer page


def test_an_open_idle_page_shows_a_new_job_automatically(browser: Chromium, shelf: Shelf):
    shelf.completed("cat", plain_image())
    visit(browser, shelf)
    shelf.completed("dog", plain_image())
    shelf.gallery().write()
    browser.loaded()
    assert sorted(prompts(browser)) == ["a cat", "a dog"]
    assert browser.run("document.querySelector('#newer').hidden")


def test_a_new_job_is_announced_without_closing_the_large_view(browser: Chromium, shelf: Shelf):
    shelf.completed("cat", plain_image())
    visit(browser, shelf)
    browser.run("document.querySelector('.card').click()")
    shelf.completed("dog", plain_image())
    shelf.gallery().write()
    until(lambda: not browser.run("document.querySelector('#newer').hidden"))
    assert browser.run("view.open")
    assert prompts(browser) == ["a cat"]
    browser.key("Escape")
    browser.loaded()
    assert sorted(prompts(browser)) == ["a cat", "a dog"]


def test_a_page_that_was_copied_alone_does_not_wait_for_a_newer_one(browser: Chromium, shelf: Shelf, tmp_path: Path):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    copy = tmp_path / "copy.html"
    copy.write_bytes((shelf.root / "gallery.html").read_bytes())
    browser.open(copy.as_uri())
    until(lambda: texts(browser, ".mat .blank") == ["the thumbnail is missing"])
    stamp = page_data(copy)["stamp"]
    until(lambda: any(stamp in url for url in browser.requested()))
    assert browser.run("document.querySelector('#newer').hidden")
    browser.events.clear()  # two missing images are part of this test
