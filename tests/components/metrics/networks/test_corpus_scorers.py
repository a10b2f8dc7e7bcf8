"""Learned quality: checkpoints load or are refused, and the scorer process is asked over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from components.corpus.quality.artimuse import LinearTestScorer
from components.files.weight_folders import WeightsMissing
from components.images.decoding import decode_rgb
from components.metrics.metric import ImageMetric, Picture
from components.metrics.networks.corpus_scorers import ARTIMUSE_URL, open_musiq
from components.metrics.networks.musiq import Musiq
from components.metrics.registry import open_metric

PICTURE = Picture(Path("a.png"), "0" * 64)


def _rgb() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (96, 130, 3), dtype=np.uint8)


def test_musiq_of_a_file_is_the_networks_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Musiq()
    torch.save({"params": network.state_dict()}, tmp_path / "musiq.pth")
    image = torch.from_numpy(_rgb()).permute(2, 0, 1)[None].float() / 255
    value = open_musiq(tmp_path / "musiq.pth", "0", "cpu").measure(_rgb(), PICTURE)["musiq"]
    assert value == pytest.approx(float(network(image)), rel=1e-6)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not a MUSIQ checkpoint"):
        open_musiq(tmp_path / "other.pth", "0", "cpu")


class _Scorer(BaseHTTPRequestHandler):
    """The protocol over the seeded linear test scorer."""

    scorer = LinearTestScorer(3)

    def _answer(self, **values: object) -> None:
        body = json.dumps({"protocol": 1, "scorer": "test-linear", "weights": "ab"} | values)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(score=self.scorer(decode_rgb(data).pixels))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Scorer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_artimuse_is_asked_over_http(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ARTIMUSE_URL, address)
    metric = open_metric("artimuse", tmp_path)
    assert isinstance(metric, ImageMetric)
    assert metric.weights_digest == "ab"
    value = metric.measure(_rgb(), PICTURE)["artimuse"]
    # A JPEG of quality 95 is close to the pixels, not equal to them.
    assert value == pytest.approx(LinearTestScorer(3)(_rgb()), abs=2.0)


def test_without_an_address_artimuse_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(ARTIMUSE_URL, raising=False)
    with pytest.raises(WeightsMissing, match="artimuse_server --weights"):
        open_metric("artimuse", tmp_path)
