"""`ultraflux diagnose`: known numbers, the same bytes twice, one line for bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from components.training.stores.latent_store import LatentStoreWriter
from flows.cli import app
from flows.commands.model import diagnose as diagnose_commands

ROOT = Path(__file__).parents[4]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(diagnose_commands, "project_root", lambda: tmp_path)
    return tmp_path


def _diagnose(output: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["diagnose", *arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    numbers: dict[str, Any] = json.loads((output / f"{arguments[0]}.json").read_text())
    return numbers


def test_rope_counts_closed_bands_and_writes_the_same_bytes_twice(project: Path) -> None:
    numbers = _diagnose(project / "one", "rope", "--tokens", "96")
    closed = {
        name: sum(error < 1e-9 for error in values["closure_error_rad"])
        for name, values in numbers["variants"].items()
    }
    assert closed == {"official": 8, "official_prefix": 0, "paper": 28, "flux": 0}
    assert numbers["variants"]["paper"]["distinct_frequencies"] == 7
    square = next(r for r in numbers["patterns"] if r["variant"] == "paper")
    assert square["grid"] == [64, 64]
    assert square["cycles_h"] == pytest.approx(3)
    assert square["angle_deg"] == pytest.approx(45)
    _diagnose(project / "two", "rope", "--tokens", "96")
    names = sorted(path.name for path in (project / "one").iterdir())
    assert names == [
        "rope.json",
        "rope_bands.png",
        "rope_bands.svg",
        "rope_patterns.png",
        "rope_patterns.svg",
    ]
    for name in names:
        assert (project / "one" / name).read_bytes() == (project / "two" / name).read_bytes()


def test_wavelet_of_white_noise_has_a_quarter_of_its_energy_in_every_band(project: Path) -> None:
    writer = LatentStoreWriter(
        project / "writing", dtype="float32", shard_mb=1, encoder_digest="noise"
    )
    noise = torch.randn(2, 16, 32, 64, generator=torch.Generator().manual_seed(0))
    writer.append((512, 1024), [("a", "train"), ("b", "eval")], noise)
    writer.publish(project / "data" / "latents")
    numbers = _diagnose(project / "out", "wavelet")
    assert numbers["images"] == 2
    assert sum(band["energy_share"] for band in numbers["bands"].values()) == pytest.approx(1)
    for band in numbers["bands"].values():
        assert band["coefficients"] == sum(band["histogram"]) == 16 * 16 * 32 * 2
        assert band["energy_share"] == pytest.approx(0.25, abs=0.01)
        assert band["share_above"]["1.0"] == pytest.approx(0.3173, abs=0.02)
        assert band["excess_kurtosis"] == pytest.approx(0, abs=0.2)


def test_wavelet_encodes_photographs_with_the_settings_autoencoder(project: Path) -> None:
    (project / "photos").mkdir()
    shutil.copy(ROOT / "data" / "sample" / "jad-limcaco-square.jpg", project / "photos")
    numbers = _diagnose(project / "out", "wavelet", "--images", str(project / "photos"))
    assert numbers["images"] == 1
    assert numbers["bands"]["ll"]["energy_share"] > 0.4
    assert numbers["source"].startswith("encoder ")


def test_objective_numbers_follow_the_closed_forms(project: Path) -> None:
    numbers = _diagnose(project / "out", "objective")
    half = numbers["t"].index(0.5)
    # SNR 1 of gamma 5: c = 0.2 + 0.8 / 5, omega = 1.
    assert numbers["c"][half] == pytest.approx(0.36)
    assert numbers["omega_paper"][half] == pytest.approx(1)
    assert numbers["omega_fm_exact"][half] == pytest.approx(8)
    assert numbers["quadratic_limit"][half] == pytest.approx(0.125)
    weights = [curve[half] for curve in numbers["effective_weight"].values()]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] < 0.125


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rope", "--band", "28"], "bands 0 to 27"),
        (["rope", "--dim", "9", "--band", "0"], "dim: "),
        (["wavelet"], "--images"),
        (["wavelet", "--vae", "x"], "only with --images"),
        (["wavelet", "--images", "nowhere"], "not a folder"),
        (["wavelet", "--images", ".", "--store", "."], "one of them"),
    ],
)
def test_bad_input_is_one_line(project: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["diagnose", *arguments])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
