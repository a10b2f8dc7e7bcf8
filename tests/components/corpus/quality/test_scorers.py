"""Q-Align's and ArtiMuse's arithmetic, and the scorer protocol against a real server process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from skimage import data

from components.corpus.derivatives import Derivative
from components.corpus.quality import artimuse, qalign
from components.corpus.quality.artimuse import SCORE_TOKENS, LinearTestScorer, score_remotely
from components.corpus.quality.scorer import score_schema
from components.corpus.quality.scorer_protocol import (
    ItemRejected,
    ScorerChanged,
    ScorerClient,
    ScorerIdentity,
    ScorerUnavailable,
)
from components.engine.map_items import EngineLimits, ItemsFailed, map_items
from components.files.weight_folders import folder_digest
from components.images.decoding import decode_rgb
from components.signals.candidate import derivative_jpeg

ROOT = Path(__file__).resolve().parents[4]


def test_scores_are_expectations_over_their_scale() -> None:
    assert qalign.score_from_logits(np.zeros(5)) == 3.0
    assert qalign.score_from_logits(np.array([50.0, 0, 0, 0, 0])) == pytest.approx(5.0)
    assert qalign.score_from_logits(np.log([0.1, 0.2, 0.3, 0.4, 1e-300])) == pytest.approx(3.0)
    assert artimuse.score_from_logits(np.full(101, 7.0)) == pytest.approx(50.0)
    sure = np.zeros(101)
    sure[87] = 1000.0
    assert artimuse.score_from_logits(sure) == 87.0
    for wrong in (np.zeros(4), np.full(5, np.nan)):
        with pytest.raises(ValueError, match="expected 5 finite"):
            qalign.score_from_logits(wrong)


def test_artimuse_tokens_are_those_of_the_prompt_of_the_released_code() -> None:
    places = {"aa": 0, "az": 25, "ca": 26, "cy": 50, "da": 51, "dy": 75, "ea": 76, "ey": 100}
    assert {token: SCORE_TOKENS.index(token) for token in places} == places
    assert len(set(SCORE_TOKENS)) == 101


@pytest.mark.parametrize("shape", [(300, 512), (512, 301), (448, 448)])
def test_qalign_preprocessing_is_the_librarys(shape: tuple[int, int]) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor

    architecture = pytest.importorskip("pyiqa.archs.qalign_arch", reason="needs the extra iqa")
    expand2square = architecture.expand2square
    pixels = np.ascontiguousarray(data.astronaut()[: shape[0], : shape[1]])
    # preprocessor_config.json of q-future/one-align.
    size = {"height": 448, "width": 448}
    processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=True)
    expected = processor.preprocess(expand2square(Image.fromarray(pixels)), return_tensors="np")
    found = qalign.preprocess(pixels)
    np.testing.assert_array_equal(found, np.asarray(expected["pixel_values"]))


@pytest.mark.parametrize("shape", [(300, 512), (512, 301), (448, 448)])
def test_qalign_preprocessing_step_by_step(shape: tuple[int, int]) -> None:
    """Centre on a square of CLIP's mean colour, bicubic to 448, scale, normalise."""
    from PIL import Image

    pixels = np.ascontiguousarray(data.astronaut()[: shape[0], : shape[1]])
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    edge = max(shape)
    square = np.empty((edge, edge, 3), np.uint8)
    square[:] = (mean * 255).astype(np.uint8)
    top, left = (edge - shape[0]) // 2, (edge - shape[1]) // 2
    square[top : top + shape[0], left : left + shape[1]] = pixels
    small = np.asarray(Image.fromarray(square).resize((448, 448), Image.Resampling.BICUBIC))
    expected = ((small / 255.0 - mean) / std).transpose(2, 0, 1)[None]
    # The processor resizes with torchvision, which rounds a few pixels to the next grey level.
    found = qalign.preprocess(pixels)
    np.testing.assert_allclose(found, expected, atol=1.001 / 255 / std.min())
    assert np.mean(np.abs(found - expected) > 1e-5) < 0.01


class Server:
    """The scorer server as a process."""

    def __init__(self, seed: int, port: int = 0) -> None:
        module = "components.corpus.quality.artimuse_server"
        command = [sys.executable, "-m", module, "--test-linear", str(seed), "--port", str(port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]

    @property
    def port(self) -> int:
        return int(re.findall(r"\d+$", self.url)[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(seed=1)
    yield running
    running.kill()


def picture(n: int) -> bytes:
    return derivative_jpeg(np.roll(data.astronaut()[::4, ::4], n * 7, axis=1), 128)


def test_a_server_scores_as_the_same_scorer_does_here(server: Server) -> None:
    client = ScorerClient(server.url)
    identity = client.identity()
    assert identity.scorer == "test-linear"
    expected = LinearTestScorer(1)(decode_rgb(picture(3)).pixels)
    assert client.score(picture(3), identity) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ItemRejected, match="empty file"):
        client.score(b"", identity)
    with pytest.raises(ScorerChanged, match=r"run began with test-linear \(0000"):
        client.score(picture(0), ScorerIdentity("test-linear", "0" * 64))


def test_a_server_that_dies_in_the_middle_costs_no_finished_item(
    server: Server, tmp_path: Path
) -> None:
    """Killed after some of 32 items, started again on the same port: the rest is asked for."""
    identity = ScorerClient(server.url).identity()
    ids = [f"{n:064x}" for n in range(32)]
    score = partial(score_remotely, url=server.url, expected=identity, retries=1)

    def payloads(kill_after: int | None) -> Iterator[Derivative]:
        for n, image_id in enumerate(ids):
            if n == kill_after:
                server.kill()
            yield Derivative(image_id, 128, 128, picture(n))

    def attempt(kill_after: int | None = None, state: str = "state") -> list[dict]:
        shards = map_items(
            score,
            ids,
            payloads(kill_after),
            stage="artimuse",
            key={"weights": identity.weights},
            schema=score_schema("aesthetic"),
            state_dir=tmp_path / state,
            limits=EngineLimits(workers=1, timeout_s=60, memory_mb=4096, retries=0),
            keep_items=True,
            outside=(ScorerUnavailable, ScorerChanged),
        )
        return [row for shard in shards for row in pq.read_table(shard).to_pylist()]

    with pytest.raises(ItemsFailed, match=r"3 of 32 items failed .*run the stage again") as caught:
        attempt(kill_after=13)
    kept = int(re.findall(r"(\d+) finished ones are kept", str(caught.value))[0])
    assert 0 < kept < 29
    failed = [
        json.loads(line) for line in (tmp_path / "state" / "failed.jsonl").read_text().splitlines()
    ]
    assert [line["image_id"] for line in failed] == ids[kept : kept + 3]
    assert all(line["error"].startswith("ScorerUnavailable") for line in failed)
    again = Server(seed=1, port=server.port)
    try:
        resumed = attempt()
        assert [row["image_id"] for row in resumed] == ids
        assert all(row["error"] is None for row in resumed)
        assert {row["aesthetic_weights"] for row in resumed} == {identity.weights}
        assert resumed == attempt(state="uninterrupted")
        assert not (tmp_path / "state" / "failed.jsonl").exists()
        assert not list((tmp_path / "state").glob("artimuse-*.jsonl"))
    finally:
        again.kill()


@contextmanager
def small_server(answers: list[tuple[int, dict[str, object]]]) -> Iterator[str]:
    """Gives the answers in turn, the last one for ever; another program than ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def test_a_server_of_another_protocol_is_refused_with_both_versions() -> None:
    with (
        small_server([(200, {"protocol": 2, "scorer": "x", "weights": "y"})]) as url,
        pytest.raises(ScorerUnavailable, match="speaks protocol 2, this client 1"),
    ):
        ScorerClient(url, retries=0).identity()
    with (
        small_server([(200, {"hello": "world"})]) as url,
        pytest.raises(ScorerUnavailable, match="not a scorer server"),
    ):
        ScorerClient(url, retries=0).identity()


def test_loading_costs_no_attempt_but_has_an_end() -> None:
    loading = (503, {"error": "the model is loading"})
    ready = (200, {"protocol": 1, "scorer": "x", "weights": "y"})
    with small_server([loading, loading, loading, ready]) as url:
        assert ScorerClient(url, retries=0).identity() == ScorerIdentity("x", "y")
    with (
        small_server([loading]) as url,
        pytest.raises(ScorerUnavailable, match=r"still loading after 0\.3 s"),
    ):
        ScorerClient(url, retries=0, loading_s=0.3).identity()


ARTIMUSE_PACKAGE = """\
import json, time
from pathlib import Path
import torch
from safetensors.torch import load_file


class InternVLChatModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 101)

    @classmethod
    def from_pretrained(cls, folder, torch_dtype):
        while not (Path(folder) / "go").exists():
            time.sleep(0.01)
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.to(torch_dtype)

    def score(self, device, tokenizer, values, generation):
        assert values.shape == (1, 3, 448, 448) and values.dtype == torch.bfloat16
        assert tokenizer is not None and generation["do_sample"] is False
        weights = self.head(values.mean((2, 3))).float().softmax(-1)[0]
        return float(weights @ torch.arange(101.0))
"""


def test_the_server_loads_a_model_through_the_authors_interface_and_answers_503_meanwhile(
    tmp_path: Path,
) -> None:
    import httpx
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertTokenizer

    module = tmp_path / "src/artimuse/internvl/model/internvl_chat/modeling_artimuse.py"
    module.parent.mkdir(parents=True)
    module.write_text(ARTIMUSE_PACKAGE)
    weights = tmp_path / "weights"
    BertConfig().save_pretrained(weights)
    BertTokenizer(vocab={"[UNK]": 0, "[PAD]": 1, "a": 2}).save_pretrained(weights)
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 101)
    save_file(
        {f"head.{k}": v.detach() for k, v in head.state_dict().items()},
        weights / "model.safetensors",
    )
    command = [sys.executable, "-m", "components.corpus.quality.artimuse_server", "--weights"]
    process = subprocess.Popen(
        [*command, str(weights), "--port", "0", "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        for answer in (httpx.get(f"{url}/identity"), httpx.post(f"{url}/score", content=b"x")):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        (weights / "go").touch()
        client = ScorerClient(url, retries=0)
        identity = client.identity()
        assert identity == ScorerIdentity("artimuse", folder_digest(weights))
        values = artimuse.preprocess(decode_rgb(picture(5)).pixels).mean((2, 3), dtype=np.float64)
        logits = values @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        expected = artimuse.score_from_logits(logits[0])
        # The server computes in bfloat16, which keeps 8 bits.
        assert client.score(picture(5), identity) == pytest.approx(expected, abs=1.0)
        assert client.score(picture(5), identity) == client.score(picture(5), identity)
    finally:
        process.kill()
        process.wait()


def test_no_server_and_another_kind_of_server_are_clear_errors() -> None:
    client = ScorerClient("http://127.0.0.1:9", retries=1)
    with pytest.raises(ScorerUnavailable, match=r"127\.0\.0\.1:9/identity"):
        client.identity()


def test_the_server_without_weights_ends_with_one_line_that_names_the_command(
    tmp_path: Path,
) -> None:
    module = "components.corpus.quality.artimuse_server"
    done = subprocess.run(
        [sys.executable, "-m", module, "--weights", str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "hf download" in done.stderr
    assert done.stderr.count("\n") == 1
