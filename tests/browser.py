"""A headless Chromium that tests look at pages with, by its DevTools protocol over pipes."""

import base64
import json
import select
import shutil
import subprocess
from contextlib import contextmanager
from time import monotonic, sleep

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'  # Chromium reads commands from 3 and writes answers to 4
SECONDS = 60  # that anything may take

DROP = """
(() => {
  const bytes = Uint8Array.from(atob(%s), letter => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], %s));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
})()
"""


class Browser:
    """A page. requests: the addresses that it has asked for, but for those that stand for their own content. errors: of its scripts."""

    def __init__(self, process):
        self.process, self.number, self.received, self.session = process, 0, b"", {}
        self.requests, self.errors = [], []
        (page,) = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]}
        for part in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.call(f"{part}.enable")

    def call(self, method, **parameters):
        """The answer to a command; events before it are noted."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.process.stdin.write(json.dumps(command).encode() + b"\0")
        self.process.stdin.flush()
        while (message := self._receive()).get("id") != self.number:
            if message.get("method") == "Network.requestWillBeSent":
                self.requests += [url for url in [message["params"]["request"]["url"]] if not url.startswith(("data:", "blob:"))]
            elif message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"])
        assert "error" not in message, f"{method}: {message}"
        return message["result"]

    def _receive(self):
        while b"\0" not in self.received:
            assert select.select([self.process.stdout], [], [], SECONDS)[0], "Chromium does not answer"
            part = self.process.stdout.read1(2**20)
            assert part, "Chromium has ended"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression):
        """The value of an expression of JavaScript, or of what it promises."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true."""
        end = monotonic() + SECONDS
        while not self.value(f"Boolean({expression})"):
            assert monotonic() < end, f"never {expression}: {self.value('document.body.innerText')}"
            sleep(0.05)

    def choose(self, selector, *files):
        """Choose files for an input of the page."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, name, content):
        """Drop a file on the page."""
        self.value(DROP % (json.dumps(base64.b64encode(content).decode()), json.dumps(name)))

    def screenshot(self):
        """The page as a PNG file."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


@contextmanager
def browser(folder):
    """A Browser that keeps its own files in a folder."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = ["sh", "-c", PIPES, "sh", "chromium", *options, f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        found = Browser(process)
        yield found
        found.session = {}
        found.call("Browser.close")
        process.wait(SECONDS)
    finally:
        process.kill()
        process.communicate()
