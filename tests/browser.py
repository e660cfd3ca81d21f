"""A headless Chromium that tests drive through the DevTools protocol, and a server of static files for it to open."""

from __future__ import annotations

import base64
import functools
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--remote-debugging-port=0"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a request that leaves the host fails
)
_PATIENCE = 60.0  # seconds for a page on a busy machine


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome; None where none is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page, and what it did: requests (its workers' too), console messages, errors."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._count = socket, 0
        self.requests: list[str] = []  # addresses
        self.problems: list[str] = []  # errors and warnings of the console, exceptions, failed loads
        target = self._send("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        for domain in ("Network", "Runtime", "Log", "Page", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command for the page, and gives its result."""
        return self._send(method, parameters, self._session)

    def _send(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = self._post(method, parameters, session)
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if "method" in message:
                self._notice(message["method"], message["params"])

    def _post(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": session} if session else {})))
        return self._count

    def _notice(self, event: str, about: dict[str, Any]) -> None:
        if event == "Target.attachedToTarget":  # a worker, which waits until its requests are seen
            for method in ("Network.enable", "Runtime.enable", "Log.enable", "Runtime.runIfWaitingForDebugger"):
                self._post(method, {}, about["sessionId"])
        elif event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Network.loadingFailed" and not about.get("canceled"):
            self.problems.append(f"failed: {about['errorText']}")
        elif event == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(about["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(a.get("value", a.get("description"))) for a in about["args"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])

    def open(
        self, address: str, *, width: int = 1280, height: int = 900, dark: bool = False, still: bool = True
    ) -> None:
        """Opens a page at that size; `still`: the user wants no motion."""
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.send("Emulation.setEmulatedMedia", features=features)
        self.send("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page, of its promise where it is one."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {json.dumps(found['exceptionDetails'])}")
        return found["result"].get("value")

    def wait(self, condition: str, patience: float = _PATIENCE) -> Any:
        """Waits until an expression is true, and gives its value."""
        end = time.monotonic() + patience
        while not (value := self.evaluate(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}; the console says {self.problems}")
            time.sleep(0.02)
        return value

    def set_files(self, selector: str, files: list[Path]) -> None:
        """Chooses files for a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, code: int) -> None:
        """Presses a key, named as in KeyboardEvent.key, with its Windows virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, file: Path, *, full: bool = False) -> None:
        """Writes a PNG of what is seen, or of the full page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
        file.write_bytes(base64.b64decode(data))

    def screenshot_bytes(self, *, width: float, height: float, top: float = 0) -> bytes:
        """Returns a PNG of the page's left part below `top`, whatever of it is seen."""
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A tab of a Chromium with the new profile folder `profile`."""
    import websocket

    path = find_chromium()
    assert path is not None
    command = [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, end = profile / "DevToolsActivePort", time.monotonic() + _PATIENCE
        while not port_file.exists() or len(port_file.read_text().split()) < 2:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{path} did not start (exit code {process.poll()})")
            time.sleep(0.05)
        port, place = port_file.read_text().split()
        socket = websocket.create_connection(f"ws://127.0.0.1:{port}{place}", timeout=_PATIENCE, suppress_origin=True)
        yield Tab(socket)
        socket.close()
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder as `python -m http.server` does; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def host(address: str) -> str:
    """Scheme, host and port of an address; "blob:" and "data:" addresses have no host of their own."""
    parts = urlsplit(address.removeprefix("blob:"))
    return f"{parts.scheme}://{parts.netloc}/"
