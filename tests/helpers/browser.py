"""Drives a headless Chromium by its DevTools protocol, with the standard library alone.

Chromium reads commands from file descriptor 3 and writes answers and events to 4: JSON messages,
each ended by a zero byte. Nothing but the browser itself has to be installed, no port is opened and
no driver must match its version. The protocol: https://chromedevtools.github.io/devtools-protocol.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
INSTALL = (
    "no Chromium was found, which the tests of the page need; "
    "install it: apt-get install chromium (Debian), or Google Chrome"
)
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --hide-scrollbars
--remote-debugging-pipe
""".split()
# Moves two descriptors to 3 and 4, and becomes the browser.
LAUNCH = "import os, sys; a, b, *c = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); "
LAUNCH += "os.execv(c[0], c)"
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
KEYS |= {"PageUp": 33, "PageDown": 34}
TEXTS = {"Enter": "\r", " ": " "}

Json = dict[str, "Json"] | list["Json"] | str | float | int | bool | None


def find() -> str | None:
    """The path of a Chromium."""
    paths = [shutil.which(name) for name in [*NAMES, ON_A_MAC]]
    return next(filter(None, paths), None)


class Browser:
    """A Chromium with one page. `problems` holds its errors and warnings."""

    def __init__(self, path: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        commands, self.send_to = pipe()
        self.read_from, answers = pipe()
        flags = [*FLAGS, f"--user-data-dir={self.folder.name}"]
        descriptors = [commands, answers]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", LAUNCH, *map(str, descriptors), path, *flags],
            pass_fds=descriptors,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in descriptors:
            os.close(descriptor)
        self.unread = b""
        self.count = 0
        self.session = None
        self.problems: list[str] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def close(self) -> None:
        self.session = None
        self.command("Browser.close")
        self.process.wait()
        os.close(self.send_to)
        os.close(self.read_from)
        self.folder.cleanup()

    def command(self, method: str, **parameters: Json) -> dict[str, Json]:
        """Send a command and return its result; events that come before it are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.note(answer)

    def receive(self) -> dict[str, Json]:
        while b"\0" not in self.unread:
            more = os.read(self.read_from, 2**20)
            assert more, "the browser has ended"
            self.unread += more
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict[str, Json]) -> None:
        """Keep what the console of the browser would show as an error or a warning."""
        details = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(details["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.problems.append(details["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(details["args"]))

    def run(self, script: str) -> Json:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.command(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def call(self, function: str, *arguments: Json) -> Json:
        """Call a function of the page with these arguments."""
        return self.run(f"({function})(...{json.dumps(arguments)})")

    def show(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size, and wait until it is drawn."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media="", features=[scheme])
        self.command("Page.navigate", url=path.resolve().as_uri())
        self.run(
            """new Promise(function (drawn) {
              const settle = () => requestAnimationFrame(() => requestAnimationFrame(drawn));
              if (document.readyState === "complete") settle();
              else addEventListener("load", settle);
            })"""
        )

    def press(self, *keys: str) -> None:
        """Press keys, as a person at the keyboard does."""
        for key in keys:
            code = {"key": key, "code": "Space" if key == " " else key}
            code["windowsVirtualKeyCode"] = KEYS[key]
            text = {"text": TEXTS[key]} if key in TEXTS else {}
            self.command("Input.dispatchKeyEvent", type="keyDown", **code, **text)
            self.command("Input.dispatchKeyEvent", type="keyUp", **code)

    def picture(self, path: Path) -> None:
        """Save a PNG of the whole page."""
        picture = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))


def pipe() -> tuple[int, int]:
    """A pipe whose descriptors are above 9, so that none is 3 or 4."""
    low = os.pipe()
    high = tuple(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10) for descriptor in low)
    for descriptor in low:
        os.close(descriptor)
    return high
