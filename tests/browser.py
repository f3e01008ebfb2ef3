"""Headless Chromium over its own pipe: pages are opened as a person would, and asked what they show
and request.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time

FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
FLAGS += " --remote-debugging-pipe --disable-component-update --disable-sync --hide-scrollbars"


def chromium():
    """The path of Chromium or Chrome; None where there is none."""
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


class Browser:
    """One page of a headless browser: `open`, `ask` JavaScript, and what was requested and
    complained about since.
    """

    def __init__(self):
        self.profile = tempfile.mkdtemp()
        to_browser, self.pen = os.pipe()
        self.ear, from_browser = os.pipe()
        high = [
            os.dup2(to_browser, 203),
            os.dup2(from_browser, 204),
        ]  # then 3 and 4, as the protocol wants them
        command = f'exec "$0" {FLAGS} --user-data-dir="$1" about:blank 3<&203 4>&204'
        self.process = subprocess.Popen(
            ["bash", "-c", command, chromium(), self.profile],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in (to_browser, from_browser, *high):
            os.close(number)
        self.buffer, self.count, self.requests, self.complaints, self.loaded = b"", 0, [], [], False
        self.session = None
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in pages if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            assert select.select([self.ear], [], [], 60)[0], (
                "the browser has said nothing for a minute"
            )
            more = os.read(self.ear, 1 << 20)
            assert more, "the browser has ended"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        method, found = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent" and not found["request"]["url"].startswith(
            "data:"
        ):
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(found))
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            entry = found.get("entry", found)
            if entry.get("level", entry.get("type")) in ("error", "warning"):
                self.complaints.append(json.dumps(entry))
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.pen, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != message["id"]:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def open(self, address, width=1280, height=900, dark=False):
        """Load a page in a window of this size; requests and complaints count from here."""
        self.requests, self.complaints, self.loaded = [], [], False
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        for each in ("about:blank", address):  # from one hash to another nothing would be loaded
            self.loaded = False
            self.call("Page.navigate", url=each)
            while not self.loaded:
                self.receive()

    def ask(self, expression):
        """The value of a JavaScript expression, a promise's included; an exception there is an
        AssertionError here.
        """
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, seconds=20):
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"never came true: {expression}"
            time.sleep(0.05)

    def press(self, key, code, text=""):
        """One key, as the keyboard sends it."""
        named = dict(key=key, code=key, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def close(self):
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait(timeout=30)
        os.close(self.pen)
        os.close(self.ear)
        shutil.rmtree(self.profile, ignore_errors=True)
