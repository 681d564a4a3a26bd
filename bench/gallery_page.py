"""Speed of the gallery's page in a real Chromium: opening, scrolling and searching.

During a task the page does not react. Its CPU time is measured, because other programs on the machine do not change
it. The bounds are ratios: ten times the jobs may cost at most ten times as much if all jobs are processed, and little
more if only the visible ones are.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import Check, Figure, Row, ratio
from PIL import Image
from plan import say

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from support.chromium import PROGRAM, Chromium

from imagewatch.gallery.page import page
from imagewatch.gallery.values import Job, JobImage

if TYPE_CHECKING:
    from collections.abc import Callable

    from plan import Bench

PAINT = "first paint"
MOST_GROWTH = {"open": 10.0, "scroll": 4.0, "search": 10.0}
WORDS = "lighthouse cliff dusk harbor boat cat dog robot poster festival railway station glass snow"
CALM = "new Promise((done) => setTimeout(done, 500))"
FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
SCROLL = """new Promise((done) => {
  let left = 200;
  const down = () => { scrollBy(0, 60); left -= 1; if (left) requestAnimationFrame(down); else done(); };
  down();
})"""


def fill(folder: Path, jobs: int) -> Path:
    """Write a page of this number of jobs with their thumbnails; return its path."""
    thumbs = folder / "gallery_files"
    thumbs.mkdir(parents=True)
    words, pool = WORDS.split(), [thumbs / f"{number}.webp" for number in range(12)]
    for number, path in enumerate(pool):
        Image.effect_noise((320, 320), 20 + 10 * number).convert("RGB").save(path, quality=80)
    listed = []
    for number in range(jobs):
        thumb = f"{number:024x}.webp"
        os.link(pool[number % len(pool)], thumbs / thumb)
        image = JobImage(f"job-{number}.png", f"outbox/job-{number}.png", thumb, 1024, 1024, 1_500_000)
        job = Job(completed=True, name=f"job-{number}", result_file=f"outbox/job-{number}.receipt.toml", at=0)
        job.at, job.charged, job.credits = 1_800_000_000_000 - number * 1_500_000, "yes", 30.0
        job.provider, job.model = ("flux", "gemini", "openai")[number % 3], "some-model-2-pro"
        job.prompt = " ".join(words[(number * 7 + k * k) % len(words)] for k in range(6 + number % 30))
        job.images = [image]
        listed.append(job)
    written = page(listed, [], title="bench", files="gallery_files", written=time.time())
    (thumbs / written.stamp).write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    path = folder / "gallery.html"
    path.write_bytes(written.content)
    return path


def longest(browser: Chromium, act: Callable[[], Any]) -> float:
    """Return the CPU time of the page's longest task during a call, in milliseconds."""
    browser.events.clear()
    config = {"includedCategories": ["toplevel"], "recordMode": "recordUntilFull"}
    browser.call("Tracing.start", session=False, traceConfig=config, transferMode="ReportEvents")
    act()
    browser.call("Tracing.end", session=False)
    browser.wait("Tracing.tracingComplete")
    reports = [event["params"]["value"] for event in browser.events if event.get("method") == "Tracing.dataCollected"]
    found = [one for report in reports for one in report]
    pages = {one["tid"] for one in found if one.get("args", {}).get("name") == "CrRendererMain"}
    return max(one.get("tdur", 0) for one in found if one["tid"] in pages and one["ph"] == "X") / 1000


def search(browser: Chromium) -> None:
    """Type two words and remove them again, letter by letter."""
    browser.run("document.querySelector('#words').select()")
    for letter in "cat poster":
        browser.key(letter, letter)
        browser.run(FRAME)
    for _ in "cat poster":
        browser.key("Backspace")
        browser.run(FRAME)


def measure(browser: Chromium, path: Path) -> dict[str, float]:
    """Return the longest task of each user action, and the first paint, in milliseconds."""
    browser.size(1280, 900)
    found = {"open": longest(browser, lambda: (browser.open(path.as_uri()), browser.run(CALM)))}
    found[PAINT] = browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    found["scroll"] = longest(browser, lambda: (browser.run(SCROLL), browser.run(CALM)))
    browser.run("scrollTo(0, 0)")
    browser.run(CALM)
    found["search"] = longest(browser, lambda: search(browser))
    return found


def in_browser(bench: Bench) -> list[Row]:
    """Measure two pages, one with a tenth of the jobs."""
    if not PROGRAM:
        say("no Chromium here: the page is not measured")
        return []
    jobs = bench.amount.gallery
    found: dict[int, dict[str, Figure]] = {jobs // 10: {}, jobs: {}}
    for run in range(bench.amount.few):
        say(f"gallery in a browser, run {run + 1}")
        root = bench.root / f"page-{run}"
        browser = Chromium(root / "profile")
        try:
            measure(browser, fill(root / "first", 10))  # warm-up: some work is done only once
            for many, figures in found.items():
                for what, value in measure(browser, fill(root / str(many), many)).items():
                    figures.setdefault(what, Figure(f"{many:,} jobs", "ms")).values.append(value)
        finally:
            browser.close()
    few, large = found.values()
    return [
        Row("the gallery's page, until the first paint", [few[PAINT], large[PAINT]]),
        *(
            Row(
                f"the gallery's page, longest task: {what}",
                [few[what], large[what]],
                [Check("growth", ratio(large[what], few[what]), most)],
            )
            for what, most in MOST_GROWTH.items()
        ),
    ]
