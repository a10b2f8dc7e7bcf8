"""A server on 127.0.0.1 that answers byte by byte as it is told: for tests of the downloader."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping


class Request:
    """One request; `number` counts those of its path from 1."""

    def __init__(self, path: str, headers: dict[str, str], number: int) -> None:
        self.path, self.headers, self.number = path, headers, number

    @property
    def range_end(self) -> int | None:
        """Last byte of the range that is asked for."""
        value = self.headers.get("range", "")
        return int(value.rpartition("-")[2]) if value else None


Handler = Callable[["Server", asyncio.StreamWriter, Request], Awaitable[None]]


class Server:
    """Counts requests and body bytes by path.

    Args:
        routes: what answers, by path without its query.
    """

    def __init__(self, routes: Mapping[str, Handler]) -> None:
        self.routes = dict(routes)
        self.requests: Counter[str] = Counter()
        self.full_requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(5)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def url(self, path: str) -> str:
        """Address of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            path = head[0].split(" ")[1]
            lines = (line.partition(":") for line in head[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in lines}
            self.requests[path] += 1
            if "range" not in headers:
                self.full_requests[path] += 1
            self.times.setdefault(path, []).append(time.monotonic())
            request = Request(path, headers, self.requests[path])
            await self.routes[path.partition("?")[0]](self, writer, request)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def head(self, writer: asyncio.StreamWriter, status: str, **headers: object) -> None:
        """Status line and headers, whose names have "_" for "-"."""
        lines = [f"HTTP/1.1 {status}", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def body(
        self, writer: asyncio.StreamWriter, request: Request, data: bytes, **headers: object
    ) -> None:
        """The whole, or the range that is asked for; written in small pieces as far as read."""
        headers = {"Content_Type": "image/jpeg"} | headers
        if request.range_end is None:
            self.head(writer, "200 OK", Content_Length=len(data), **headers)
        else:
            total, data = len(data), data[: request.range_end + 1]
            headers["Content_Range"] = f"bytes 0-{len(data) - 1}/{total}"
            self.head(writer, "206 Partial Content", Content_Length=len(data), **headers)
        for start in range(0, len(data), 16384):
            writer.write(data[start : start + 16384])
            await writer.drain()
            self.sent[request.path] += len(data[start : start + 16384])
