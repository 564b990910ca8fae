"""A headless Chromium through WebDriver, by HTTP alone: no client of it is a dependency."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of references to elements (WebDriver, §12.1)


class Browser:
    """A page in a browser.

    Args:
        session: address of a WebDriver session.
    """

    def __init__(self, session: str):
        self.session = session

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that the body of a JavaScript function returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{found[ELEMENT]}/click")

    def drag(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Moves a pressed pointer over an element, through points (x, y) of 0 to 1."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        box = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]",
            selector,
        )
        places = [{"x": round(box[0] + x * box[2]), "y": round(box[1] + y * box[3])} for x, y in points]
        moves = [{"type": "pointerMove", "duration": 0, **place} for place in places]
        actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "pen", "parameters": {"pointerType": "mouse"}, "actions": actions}
        self.call("POST", "/actions", {"actions": [pointer]})

    def wait(self, until: Callable[[], Any], *, seconds: float = 60) -> Any:
        """The first value of `until` that is true."""
        end = time.monotonic() + seconds
        while not (value := until()):
            assert time.monotonic() < end, "the page did not get there in time"
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> Path:
        """A picture of the whole page."""
        size = self.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        told = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True, "clip": clip}}
        path.write_bytes(base64.b64decode(self.call("POST", "/goog/cdp/execute", told)["data"]))
        return path


@contextmanager
def browser(width: int, height: int, *, touch: bool = False) -> Iterator[Browser]:
    """A browser with a window of so many pixels; a phone with `touch`.

    Raises:
        FileNotFoundError: there is no Chromium with its driver.
    """
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or chromium is None:
        raise FileNotFoundError("chromium and chromedriver are not installed")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if "started successfully on port" in line)
        address = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},{height}"]
        options: dict[str, Any] = {"binary": chromium, "args": arguments}
        if touch:
            options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "touch": True}}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        session = Browser(address).call("POST", "", wanted)["sessionId"]
        page = Browser(f"{address}/{session}")
        try:
            yield page
        finally:
            page.call("DELETE", "")
    finally:
        process.terminate()
        process.wait()
