"""Weights are found, checked and recorded; missing ones are known without heavy imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.files.weight_folders import WeightsMissing
from components.metrics.cards import CARDS, card
from components.metrics.metric_weights import Weights
from components.metrics.registry import open_metric
from components.metrics.weight_files import find, state, trusted_digest, trusted_files, verify
from flows.commands.model.weights import app

DATA = b"weights"
SHA256 = hashlib.sha256(DATA).hexdigest()
NAMED = Weights(f"net/backbone-{SHA256[:8]}.pth", "7 B", "MIT", "copy it")
PLAIN = Weights("net/head.pth", "7 B", "MIT", "copy it")
HUB = Weights("folder", "7 B", "MIT", "fetch it", repository="some/model", files=("config.json",))


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


def _put(path: Path, data: bytes = DATA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_missing_file_is_named_with_size_licence_and_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"head\.pth \(7 B, licence: MIT\); .*copy it"):
        find("Metric", PLAIN, tmp_path)


def test_weights_are_found_locally_then_in_the_caches(tmp_path: Path) -> None:
    cached = _put(tmp_path / "TORCH_HOME" / "hub" / "checkpoints" / "head.pth")
    assert find("Metric", PLAIN, tmp_path) == cached
    local = _put(tmp_path / PLAIN.path)
    assert find("Metric", PLAIN, tmp_path) == local

    model = tmp_path / "HF_HUB_CACHE" / "models--some--model"
    _put(model / "refs" / "main", b"abc")
    snapshot = model / "snapshots" / "abc"
    _put(snapshot / "model.safetensors")
    with pytest.raises(WeightsMissing):
        find("Metric", HUB, tmp_path)
    _put(snapshot / "config.json", b"{}")
    assert find("Metric", HUB, tmp_path) == snapshot
    # Snapshots of other versions stay beside the one that the branch names.
    for name in ("aaa", "zzz"):
        _put(model / "snapshots" / name / "model.safetensors", b"old")
        _put(model / "snapshots" / name / "config.json", b"{}")
    assert find("Metric", HUB, tmp_path) == snapshot
    _put(model / "refs" / "main", b"zzz\n")
    assert find("Metric", HUB, tmp_path) == model / "snapshots" / "zzz"


def test_a_name_with_a_digest_is_checked_against_it(tmp_path: Path) -> None:
    _put(tmp_path / NAMED.path)
    assert verify("Metric", NAMED, tmp_path).state == "ok"
    assert trusted_digest("Metric", NAMED, tmp_path)[1] == SHA256
    _put(tmp_path / NAMED.path, b"other")
    assert verify("Metric", NAMED, tmp_path).state == "wrong"
    with pytest.raises(WeightsMissing, match="its name says"):
        trusted_digest("Metric", NAMED, tmp_path)


def test_the_first_verification_records_and_later_ones_compare(tmp_path: Path) -> None:
    _put(tmp_path / PLAIN.path)
    assert verify("Metric", PLAIN, tmp_path).state == "recorded"
    assert verify("Metric", PLAIN, tmp_path).state == "ok"
    _put(tmp_path / PLAIN.path, b"changed")
    verdict = verify("Metric", PLAIN, tmp_path)
    assert verdict.state == "wrong"
    assert f"recorded was {SHA256}" in verdict.detail


@pytest.mark.parametrize("also", ["sha256", "files", "seal"])
def test_a_digest_file_that_was_edited_by_hand_lets_no_other_weights_pass(
    tmp_path: Path, also: str
) -> None:
    _put(tmp_path / PLAIN.path)
    assert trusted_digest("Metric", PLAIN, tmp_path)[1] == SHA256
    random = b"random!"
    path = _put(tmp_path / PLAIN.path, random)
    stat = path.stat()
    record = json.loads((tmp_path / "digests.json").read_text())
    entry = record[PLAIN.path]
    entry["sha256"] = hashlib.sha256(random).hexdigest()
    entry["files"] = [[path.name, stat.st_size, stat.st_mtime_ns]]
    if also == "files":
        # Only the stamp: the old digest would be believed of the new bytes.
        entry["sha256"] = SHA256
    if also == "seal":
        del entry["seal"]
    (tmp_path / "digests.json").write_text(json.dumps(record))
    assert state("Metric", PLAIN, tmp_path) == "wrong"
    assert verify("Metric", PLAIN, tmp_path).state == "wrong"
    with pytest.raises(WeightsMissing, match="was not written by this program as it is"):
        trusted_digest("Metric", PLAIN, tmp_path)
    # As it says: without the entry the file is what it is, and is recorded as seen for the first
    # time, under its own digest.
    del record[PLAIN.path]
    (tmp_path / "digests.json").write_text(json.dumps(record))
    found = verify("Metric", PLAIN, tmp_path)
    assert (found.state, found.detail) == ("recorded", hashlib.sha256(random).hexdigest())


def test_a_metric_of_several_files_has_one_digest_of_all(tmp_path: Path) -> None:
    metric = card("lpips_alex")
    assert metric.weights is not None
    [heads] = metric.weights.also
    _put(tmp_path / heads.path)
    with pytest.raises(WeightsMissing, match="alexnet"):
        trusted_files(metric, tmp_path)


def test_missing_weights_are_reported_without_heavy_imports(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from components.metrics.cards import CARDS
from components.metrics.registry import open_metric
from components.files.weight_folders import WeightsMissing
missing = 0
for card in CARDS:
    if card.weights is not None:
        try:
            open_metric(card.id, Path({str(tmp_path)!r}))
        except WeightsMissing:
            missing += 1
heavy = {{"torch", "transformers", "pyiqa", "scipy", "numba"}} & set(sys.modules)
print(missing, sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = sum(c.weights is not None for c in CARDS)
    assert done.stdout.strip() == f"{wanted} []"


def test_a_damaged_file_never_opens_as_a_metric(tmp_path: Path) -> None:
    _put(tmp_path / "inception" / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(WeightsMissing, match="its name says 6726825d"):
        open_metric("fid", tmp_path)


def test_the_commands_list_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.commands.model.weights.workplace", lambda: tmp_path)
    runner = CliRunner()
    listed = runner.invoke(app, ["list", "fid", "clip_score"])
    assert listed.exit_code == 0
    assert "hf download openai/clip-vit-large-patch14" in listed.output
    assert "0 of 2 are there." in listed.output
    assert runner.invoke(app, ["verify"]).exit_code == 0
    assert runner.invoke(app, ["verify", "fid"]).exit_code == 1
    _put(tmp_path / "weights" / "inception" / "pt_inception-2015-12-05-6726825d.pth")
    wrong = runner.invoke(app, ["verify"])
    assert wrong.exit_code == 1
    assert "its name says 6726825d" in wrong.output
    assert runner.invoke(app, ["list", "bleu"]).exit_code == 2
