"""A headless Chromium over its DevTools protocol: as little of it as the page tests need.

Used by `report_size.py` and by the browser tests. Needs Debian's package `chromium`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

_START_S, _WAIT_S = 60.0, 60.0


class BrowserMissing(RuntimeError):
    """No Chromium on this machine; one line with the package."""


class PageFailed(RuntimeError):
    """A script in the page raised, or a condition never held."""


class Tab:
    """One page of the browser, and what it asked for and complained about."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self._socket, self._session = socket, session
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: asyncio.Queue[str] = asyncio.Queue()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if message.get("id") in self._answers:
                self._answers.pop(message["id"]).set_result(message)
                continue
            method, found = message.get("method"), message.get("params", {})
            if method == "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                described = details.get("exception", {}).get("description", "")
                self.problems.append(f"{details['text']} {described}")
            elif method == "Runtime.consoleAPICalled" and found["type"] in {"error", "warning"}:
                self.problems.append(json.dumps(found["args"]))
            elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
                self.problems.append(found["entry"]["text"])
            elif method == "Page.loadEventFired":
                self._events.put_nowait(method)

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        command = {"id": self._number, "method": method, "params": params}
        await self._socket.send(json.dumps(command | {"sessionId": self._session}))
        message = await asyncio.wait_for(answer, _WAIT_S)
        if "error" in message:
            raise PageFailed(f"{method}: {message['error']['message']}")
        result: dict[str, Any] = message["result"]
        return result

    async def start(self, width: int, height: int, *, dark: bool = False) -> None:
        """Listen, and set the window's size in pixels."""
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")
        await self.resize(width, height)
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    async def resize(self, width: int, height: int) -> None:
        """Set the window's size in pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def navigate(self, page: Path) -> None:
        """Open a file and wait for its load event."""
        await self.call("Page.navigate", url=page.resolve().as_uri())
        await asyncio.wait_for(self._events.get(), _WAIT_S)

    async def evaluate(self, script: str) -> Any:
        """Value of an expression in the page."""
        result = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise PageFailed(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    async def wait_for(self, condition: str) -> None:
        """Until an expression of the page is true."""
        for _ in range(int(_WAIT_S / 0.02)):
            if await self.evaluate(condition):
                return
            await asyncio.sleep(0.02)
        raise PageFailed(f"never true: {condition}")

    async def key(self, key: str, code: str = "", text: str = "") -> None:
        """Press and release a key."""
        named = {"key": key, "code": code or key} | ({"text": text} if text else {})
        if key == "Enter":
            named |= {"windowsVirtualKeyCode": 13, "text": "\r"}
        elif key == "Escape":
            named["windowsVirtualKeyCode"] = 27
        await self.call("Input.dispatchKeyEvent", type="keyDown", **named)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    async def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One mouse event at a place of the window, such as mousePressed."""
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    async def close(self) -> None:
        """Stop listening."""
        self._reader.cancel()


@asynccontextmanager
async def open_browser(
    width: int = 1280, height: int = 900, *, dark: bool = False
) -> AsyncIterator[Tab]:
    """A fresh headless Chromium with one empty tab.

    Raises:
        BrowserMissing: there is no Chromium.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise BrowserMissing("no chromium; install it with: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            program,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
            *("--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort", process)
            async with connect(port, max_size=None, proxy=None) as socket:
                tab = Tab(socket, await _attach(socket))
                try:
                    await tab.start(width, height, dark=dark)
                    yield tab
                finally:
                    await tab.close()
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> str:
    for _ in range(int(_START_S / 0.05)):
        if file.exists() and len(lines := file.read_text().split("\n")) >= 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.returncode is not None:
            raise BrowserMissing(f"chromium ended with {process.returncode} before it listened")
        await asyncio.sleep(0.05)
    raise BrowserMissing("chromium did not listen in time")


async def _attach(socket: ClientConnection) -> str:
    """Session of a new tab."""

    async def call(number: int, method: str, **params: Any) -> dict[str, Any]:
        await socket.send(json.dumps({"id": -number, "method": method, "params": params}))
        while True:
            message = json.loads(await socket.recv())
            if message.get("id") == -number:
                result: dict[str, Any] = message["result"]
                return result

    target = await call(1, "Target.createTarget", url="about:blank")
    attached = await call(2, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
    return str(attached["sessionId"])
