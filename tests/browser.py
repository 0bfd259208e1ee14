"""Chromium without a window, driven through its DevTools with the standard library alone."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

PATH = next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
MISSING = "no browser: install one, on Debian by `apt-get install chromium`"


class Browser:
    """A running browser with one page, which speaks JSON through two pipes, messages ended by a
    zero byte. What it says unasked is kept in `events`."""

    def __init__(self, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe"]
        command = [PATH, *options, f"--user-data-dir={folder}", "about:blank"]
        # DevTools reads descriptor 3 and writes descriptor 4.
        start = "import fcntl, os, sys; r, w = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in "
        start += "sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), ours_out
        self.count, self.events, self.rest, self.session = 0, [], b"", {}
        pages = self("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        found = self("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        """The result of a DevTools command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def read(self):
        while b"\0" not in self.rest:
            if not select.select([self.reader], [], [], 60)[0]:
                raise TimeoutError("the browser has said nothing for a minute")
            part = os.read(self.reader.fileno(), 1 << 20)
            if not part:
                raise EOFError("the browser has ended")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression):
        """What an expression in JavaScript (or its promise) is in the page."""
        found = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression):
        """Waits until the expression is true, 20 seconds at most."""
        end = time.monotonic() + 20
        while not self.value(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.03)

    def open(self, path):
        """Opens a file."""
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete'")

    def heard(self, method):
        """The parameters of the events of this name since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def errors(self):
        """What went wrong in the page, or was said on its console, since it was opened."""
        self.value("0")  # to have heard what there is
        names = "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"
        return [event for name in names for event in self.heard(name)]

    def size(self, width):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self("Emulation.setDeviceMetricsOverride", **metrics)

    def box(self, selector):
        """Where an element is, after it was brought into view: left, top, width, height."""
        element = f"document.querySelector({json.dumps(selector)})"
        return self.value(
            f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}}),"
            f"(r => [r.left, r.top, r.width, r.height])({element}.getBoundingClientRect())"
        )

    def drag(self, selector, places):
        """Moves the pressed mouse over an element, by places from (0, 0) to (1, 1)."""
        left, top, width, height = self.box(selector)
        points = [{"x": left + x * width, "y": top + y * height} for x, y in places]
        kinds = ["mousePressed"] + ["mouseMoved"] * (len(points) - 1) + ["mouseReleased"]
        self("Input.dispatchMouseEvent", type="mouseMoved", **points[0])
        for kind, point in zip(kinds, [*points, points[-1]], strict=True):
            pressed = {"button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
            self("Input.dispatchMouseEvent", type=kind, **point, **pressed)

    def press(self, selector):
        self.drag(selector, [(0.5, 0.5)])

    def key(self, key):
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self):
        self.session = {}
        self("Browser.close")
        self.process.wait(20)
        os.close(self.writer)
        self.reader.close()
