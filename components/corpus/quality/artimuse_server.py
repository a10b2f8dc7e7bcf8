"""Scorer server for ArtiMuse's own environment.

Started there with `python -m components.corpus.quality.artimuse_server`.

It needs the standard library, numpy, OpenCV and PIL of this project, and for ArtiMuse itself the
environment that its authors pin (transformers 4.37). It speaks `scorer_protocol` and listens on
127.0.0.1 unless told otherwise. It answers 503 while the model loads.
`--test-linear SEED` serves the deterministic test scorer instead.

What is asked of the package `artimuse` (on PYTHONPATH):

- `artimuse.internvl.model.internvl_chat.modeling_artimuse.InternVLChatModel`, a torch module with
  `from_pretrained(folder, torch_dtype=...)` and
- `score(device, tokenizer, values, generation)`: values (1, 3, 448, 448) -> a number, 0 to 100.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from components.corpus.quality.artimuse import LinearTestScorer, preprocess
from components.corpus.quality.scorer_protocol import (
    LOADING_STATUS,
    MAX_JPEG_BYTES,
    PROTOCOL,
    ScorerIdentity,
)
from components.files.install_hints import download_command
from components.files.weight_folders import WeightsMissing, folder_digest, resolve_folder
from components.images.decoding import ImageUndecodable, decode_rgb

COMMAND = download_command("Thunderbolt215215/ArtiMuse", "weights/ArtiMuse")

Score = Callable[[np.ndarray], float]
"""(H, W, 3) uint8 RGB -> score."""


def load_artimuse(folder: Path, device: str) -> Score:
    """ArtiMuse from a local folder, through the authors' package `artimuse`.

    Its `score` is the expectation over the score tokens (`artimuse.score_from_logits`).

    Raises:
        WeightsMissing: no weights there, or no such package.
    """
    resolve_folder(folder, "ArtiMuse weights (--weights)", COMMAND)
    try:
        from artimuse.internvl.model.internvl_chat.modeling_artimuse import InternVLChatModel
    except ImportError as problem:
        raise WeightsMissing(
            "the package artimuse",
            "this Python environment",
            "git clone https://github.com/thunderbolt215/ArtiMuse, install its requirements and "
            "put its folders src and src/artimuse on PYTHONPATH",
            str(problem),
        ) from None
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, local_files_only=True)
    model = InternVLChatModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    model = model.eval().to(device)
    generation = {"max_new_tokens": 512, "do_sample": False}

    def score(pixels: np.ndarray) -> float:
        values = torch.from_numpy(preprocess(pixels)).to(device, torch.bfloat16)
        with torch.inference_mode():
            return float(model.score(device, tokenizer, values, generation))

    return score


Loaded = tuple[Score, ScorerIdentity]


class ScorerServer(HTTPServer):
    """One request at a time: a model on one device has no use for more."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Bind; serve with `serve_forever`, and call `put` when the model is loaded."""
        super().__init__(address, _Handler)
        self.loaded: tuple[Score, dict[str, Any]] | None = None

    def put(self, score: Score, identity: ScorerIdentity) -> None:
        """Answer with this scorer from now on."""
        names = {"protocol": PROTOCOL, "scorer": identity.scorer, "weights": identity.weights}
        self.loaded = (score, names)


class _Handler(BaseHTTPRequestHandler):
    server: ScorerServer
    # Clients that keep a silent connection open would block the others.
    timeout = 60

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == LOADING_STATUS:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        """`/identity`."""
        if self.path != "/identity":
            self._answer(404, {"error": "only GET /identity and POST /score"})
        elif self.server.loaded is None:
            self._answer(LOADING_STATUS, {"error": "the model is loading"})
        else:
            self._answer(200, self.server.loaded[1])

    def do_POST(self) -> None:
        """`/score`."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._answer(404, {"error": "only GET /identity and POST /score"})
        elif not length.isdigit():
            self._answer(400, {"error": "no Content-Length"})
        elif int(length) > MAX_JPEG_BYTES:
            self._answer(413, {"error": f"more than {MAX_JPEG_BYTES} bytes"})
        else:
            # Read also when the answer is 503: a body left unread resets the connection before the
            # client has the answer.
            jpeg = self.rfile.read(int(length))
            if self.server.loaded is None:
                self._answer(LOADING_STATUS, {"error": "the model is loading"})
            else:
                self._score(jpeg, *self.server.loaded)

    def _score(self, jpeg: bytes, scorer: Score, identity: dict[str, Any]) -> None:
        try:
            score = scorer(decode_rgb(jpeg).pixels)
        except ImageUndecodable as problem:
            self._answer(400, {"error": str(problem)})
        except Exception as problem:
            # One picture must not end the server; the client retries, then quarantines it.
            detail = " ".join(str(problem).split())
            self._answer(500, {"error": f"{type(problem).__name__}: {detail}"})
        else:
            self._answer(200, {**identity, "score": score})

    def log_message(self, format: str, *args: Any) -> None:
        """No line per request."""


def _serve(server: ScorerServer, load: Callable[[], Loaded]) -> int:
    """Serve until killed; load meanwhile. Exit code 1 and one line when that fails."""
    failures: list[str] = []

    def fill() -> None:
        try:
            server.put(*load())
        except Exception as problem:
            failures.append(" ".join(str(problem).split()) or type(problem).__name__)
            server.shutdown()

    # The port answers at once (503): a client can tell "loading" from "not there".
    threading.Thread(target=fill, daemon=True).start()
    server.serve_forever()
    for failure in failures:
        print(f"artimuse_server: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    """Serve until killed; exit code 1 with one line when weights are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", type=Path, help="folder of ArtiMuse")
    what.add_argument("--test-linear", type=int, metavar="SEED", help="serve the test scorer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0: any free one")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)

    def load() -> Loaded:
        if options.test_linear is not None:
            linear = LinearTestScorer(options.test_linear)
            digest = hashlib.sha256(linear.weights_bytes).hexdigest()
            return linear, ScorerIdentity(linear.name, digest)
        score = load_artimuse(options.weights, options.device)
        return score, ScorerIdentity("artimuse", folder_digest(options.weights))

    server = ScorerServer((options.host, options.port))
    print(f"listening on http://{options.host}:{server.server_port}", flush=True)
    return _serve(server, load)


if __name__ == "__main__":
    sys.exit(main())
