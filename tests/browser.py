"""A page in headless Chromium: its console, its elements, keys and the mouse, by the DevTools protocol over two pipes.

    .venv/bin/python tests/browser.py page.html page.png 1280 2200

takes a picture of a page, 1280 by 2200 pixels.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
PATIENCE_S = 120


def find():
    """The path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab; `errors` are the messages of its console and the exceptions of its scripts."""

    def __init__(self, folder, width=1280, height=900):
        to_child, from_us = os.pipe()
        to_us, from_child = os.pipe()
        command = [find(), *FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        # Chromium reads the protocol at 3 and writes it at 4
        script = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "browser", *command],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.writer, self.reader = os.fdopen(from_us, "wb"), os.fdopen(to_us, "rb")
        self.rest, self.count, self.session, self.errors, self.requests = b"", 0, None, [], []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Log", "Network"):
            self.send(f"{domain}.enable")
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.writer.close()
        self.reader.close()

    def send(self, method, **params):
        """The result of a command; what happens in the meantime is noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while (answer := self._receive()).get("id") != self.count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self):
        while b"\0" not in self.rest:
            if not select.select([self.reader], [], [], PATIENCE_S)[0]:
                raise RuntimeError(f"the browser said nothing for {PATIENCE_S} s")
            more = os.read(self.reader.fileno(), 1 << 20)
            if not more:
                raise RuntimeError("the browser ended")
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(params))
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, file):
        """Load a file, and wait until its script has run."""
        self.send("Page.navigate", url=Path(file).resolve().as_uri())
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script):
        """The value of an expression; what it promises is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def key(self, key, **more):
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, **more)
        self.frame()

    def frame(self):
        """Wait until what was asked for is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def dark(self, dark=True):
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])
        self.frame()

    def picture(self, file):
        """What the window shows, as PNG."""
        Path(file).write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


if __name__ == "__main__":
    page, picture, width, height = sys.argv[1:5]
    made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # Chromium writes into it while it ends
    with made as folder, Browser(folder, int(width), int(height)) as browser:
        browser.open(page)
        browser.frame()
        browser.picture(picture)
