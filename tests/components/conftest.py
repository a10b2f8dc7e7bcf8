"""A real chat completions server and a tiny corpus for the tests of captions."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from components.corpus.captions.checks import CaptionBatch, Judged, filled
from components.corpus.captions.models import write_captions
from components.corpus.captions.provided import NOT_PROVIDED
from components.files.parquet_files import write_parquet
from components.settings.captions import CaptionSettings
from components.signals.candidate import DERIVATIVES_SCHEMA

ENGLISH = "a calm lake below red hills"
CHINESE = "红色山丘下平静的湖"

# Status, headers, and the body or its chunks.
Reply = tuple[int, dict[str, str], bytes | Iterable[bytes]]


@pytest.fixture(scope="session", autouse=True)
def _autograd_without_threads() -> None:
    """Let torch's first backward pass be one of a processor, whatever file comes first.

    It decides whether autograd starts a thread per device, after which no child of this process may
    use it. Libraries that tests of planning import add devices that are not there.
    """
    torch.ones(1, requires_grad=True).sum().backward()


class Api:
    """An OpenAI-compatible server; `respond(body, times this picture was asked)` answers."""

    english, chinese = ENGLISH, CHINESE
    key, key_variable = "sk-very-secret-0123456789", "CAPTION_TEST_KEY"

    def __init__(self) -> None:
        self.respond: Callable[[dict[str, Any], int], Reply] = lambda body, n: self.completion(
            ENGLISH if isinstance(body["messages"][0]["content"], list) else CHINESE
        )
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                raw = handler.rfile.read(int(handler.headers["Content-Length"]))
                assert handler.path == "/v1/chat/completions"
                body = json.loads(raw)
                with lock:
                    self.times.append(time.monotonic())
                    asked = sum(self.picture_of(b) == self.picture_of(body) for b in self.bodies)
                    self.bodies.append(body)
                    self.headers.append(dict(handler.headers))
                status, headers, data = self.respond(body, asked)
                handler.send_response(status)
                if isinstance(data, bytes):
                    headers = {"Content-Length": str(len(data)), **headers}
                    data = [data]
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.end_headers()
                for part in data:
                    if "Transfer-Encoding" in headers:
                        part = b"%x\r\n%s\r\n" % (len(part), part)
                    handler.wfile.write(part)

            def log_message(handler, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Clients that are killed or give up are part of the tests."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def settings(self, translate: dict[str, object] | None = None, **changes: object) -> Any:
        own = {
            name: changes.pop(name)
            for name in list(changes)
            if name in CaptionSettings.model_fields
        }
        return CaptionSettings.model_validate(
            {
                "provider": "endpoint",
                "text": None,
                "local": None,
                "provided": "keep",
                "file": "captions.jsonl",
                "min_words": 3,
                "max_words": 8,
                "prompt_version": "detailed-1",
                "prompt_file": None,
                "max_cost_usd": 1.0,
                "endpoint": endpoint(self, **changes),
                "translate": {
                    "provider": "endpoint" if translate is not None else "none",
                    "prompt_version": "simplified-chinese-1",
                    "prompt_file": None,
                    "endpoint": endpoint(self, model="some/mt", **translate) if translate else None,
                },
            }
            | own
        )

    @staticmethod
    def completion(text: Any, finish: str = "stop", **message: Any) -> Reply:
        """A chat completion that used 1,000 and 100 tokens."""
        body = {
            "model": "served",
            "choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
        }
        return 200, {}, json.dumps(body).encode()

    @staticmethod
    def problem(status: int, message: str, **headers: str) -> Reply:
        """An error in the API's own form."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return status, named, json.dumps({"error": {"message": message}}).encode()

    @staticmethod
    def picture_of(body: dict[str, Any]) -> str:
        """Name of the picture in a request; the text itself for a translation."""
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            return content.rsplit("\n\n", 1)[1]
        prefix, data = content[1]["image_url"]["url"].split(",")
        assert prefix == "data:image/jpeg;base64"
        return base64.b64decode(data).decode()

    @property
    def asked(self) -> list[str]:
        return [self.picture_of(body) for body in self.bodies]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setenv(Api.key_variable, Api.key)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    api = Api()
    yield api
    api.server.shutdown()
    api.server.server_close()


def endpoint(api: Api, **changes: object) -> dict[str, object]:
    return {
        "base_url": api.url,
        "model": "some/vlm",
        "api_key_env": Api.key_variable,
        "temperature": 0.5,
        "max_tokens": 200,
        "seed": 7,
        "reasoning_effort": None,
        "requests_per_minute": 60000.0,
        "concurrency": 4,
        "timeout_s": 5.0,
        "retries": 2,
        "input_usd_per_million": 1.0,
        "output_usd_per_million": 10.0,
    } | changes


@dataclass(frozen=True)
class Asked:
    """What the models wrote, by row."""

    rows: list[Judged]
    spent_usd: float | None
    problems: list[str]


class Corpus:
    """`names` are image ids and, as bytes, the pictures."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.names = names
        rows = [{"image_id": n, "height": 1, "width": 1, "jpeg": n.encode()} for n in names]
        write_parquet(
            pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA), folder / "derivatives.parquet"
        )

    def write(
        self,
        settings: CaptionSettings,
        *,
        kept: list[bool] | None = None,
        provided: list[Judged] | None = None,
        cache: str = "cache.sqlite",
    ) -> Asked:
        rows = provided or [NOT_PROVIDED] * len(self.names)
        was_kept = kept or [True] * len(rows)
        # In pieces, as a manifest comes.
        pieces = [slice(start, start + 5) for start in range(0, len(rows), 5)]
        batches = [CaptionBatch(self.names[one], was_kept[one], rows[one]) for one in pieces]
        found = write_captions(
            lambda: batches,
            self.folder / "derivatives.parquet",
            settings,
            derivative_px=1024,
            cache=self.folder / cache,
            root=self.folder,
        )
        written = [row for one in batches for row in filled(one, found.fills).rows]
        return Asked(written, found.spent_usd, found.problems)

    @staticmethod
    def statuses(captioned: Asked) -> list[str | None]:
        return [row.status for row in captioned.rows]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path, [f"picture-{n}" for n in range(8)])


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[[int], Corpus]:
    """`make_corpus(40)`: that many pictures in the test's folder."""
    return lambda size: Corpus(tmp_path, [f"picture-{n}" for n in range(size)])


@pytest.fixture(scope="session")
def tiny_backbone() -> Callable[..., Any]:
    """`tiny_backbone("flux", num_layers=1)`: a random transformer with texts 16 wide."""

    from components.models.sd3.transformer import build_tiny_sd3_transformer
    from components.models.tiny import build_tiny_transformer

    def flux(num_layers: int = 2) -> Any:
        return build_tiny_transformer(
            num_layers=num_layers,
            num_single_layers=num_layers,
            num_attention_heads=2,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=16,
            pooled_projection_dim=16,
            rope_window=4,
        )

    def sd3(num_layers: int = 2) -> Any:
        return build_tiny_sd3_transformer(
            num_layers=num_layers,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            latent_channels=16,
            sample_size=16,
            pos_embed_max_size=16,
        )

    builders = {"flux": flux, "sd3": sd3}
    return lambda backbone, **sizes: builders[backbone](**sizes)
