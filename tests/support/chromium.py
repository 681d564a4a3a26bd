"""A real Chromium without a window, controlled over a pipe (the DevTools protocol)."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SECONDS = 40.0


class Chromium:
    """One browser with one page.

    Args:
        profile: An empty folder for what it keeps.
        options: More of its own options.
    """

    def __init__(self, profile: Path, *options: str) -> None:
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        arguments = [PROGRAM, "--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        arguments += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", *options]
        # It reads its orders from descriptor 3 and answers on 4, which no other way of starting a program offers.
        parked = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out)]
        with open(os.devnull, "r+b") as nothing:
            self.pid = os.posix_spawn(
                PROGRAM,
                [*arguments, "about:blank"],
                {**os.environ, "HOME": str(profile), "LANG": "C.UTF-8"},
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, nothing.fileno(), fd) for fd in (0, 1, 2)),
                    (os.POSIX_SPAWN_DUP2, parked[0], 3),
                    (os.POSIX_SPAWN_DUP2, parked[1], 4),
                ],
                setpgroup=0,
            )
        for fd in (its_in, its_out, *parked):
            os.close(fd)
        self._buffer = b""
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets", session=False)["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", session=False, targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, *, session: bool = True, **parameters: Any) -> Any:
        """Give an order and return its result; what is reported meanwhile is kept in ``events``."""
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(order | ({"sessionId": self._session} if session else {})).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def _message(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(self._in, 1 << 20) if ready else b""
            assert piece, "the browser sends nothing any more"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def wait(self, event: str) -> None:
        """Wait for the next report of this name."""
        while (message := self._message()).get("method") != event:
            self.events.append(message)

    def open(self, url: str) -> None:
        """Go to an address and wait until the page is whole."""
        for there in ("about:blank", url):  # in between, or only the fragment would change
            self.call("Page.navigate", url=there)
            self.loaded()

    def reload(self) -> None:
        """Load the page again and wait until it is whole."""
        self.call("Page.reload")
        self.loaded()

    def loaded(self) -> None:
        """Wait until a page that is being loaded is whole."""
        name = "Page.loadEventFired"
        if any(event.get("method") == name for event in self.events):
            self.events = [event for event in self.events if event.get("method") != name]
        else:
            self.wait(name)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; promises are waited for."""
        # The page forbids scripts that are text; the debugger is not the page.
        result = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            allowUnsafeEvalBlockedByCSP=True,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, name: str, text: str = "") -> None:
        """Press and release a key."""
        codes = {
            "Enter": 13,
            "Escape": 27,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Tab": 9,
            "Backspace": 8,
        }
        what = {"key": name, "code": name, "windowsVirtualKeyCode": codes.get(name, 0)}
        if text := text or ("\r" if name == "Enter" else ""):
            what["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.call("Input.insertText", text=text)

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """Make the window so large, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def colors(self, scheme: str) -> None:
        """Prefer ``light`` or ``dark``."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self) -> bytes:
        """Return what can be seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[dict[str, Any]]:
        """Return what the browser has reported against the page so far: errors, refusals by its policy."""
        thrown = [event["params"] for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        return thrown + [event["params"]["entry"] for event in self.events if event.get("method") == "Log.entryAdded"]

    def requested(self) -> list[str]:
        """Return every address the page has asked for so far."""
        asked = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in asked]

    def close(self) -> None:
        """End the browser and everything it started."""
        os.close(self._out)
        os.close(self._in)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
