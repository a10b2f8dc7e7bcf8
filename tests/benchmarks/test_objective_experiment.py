"""The experiment on objectives and RoPE: repeatable, resumable, with the ratios that it names."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

PHOTOGRAPHS = ("held-out.jpg", "training.jpg")


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    """The script as a module."""
    import objective_experiment

    return objective_experiment


@pytest.fixture(scope="module")
def maps() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{name}/1024": torch.randn(16, 64, 64, generator=generator) for name in PHOTOGRAPHS}


@pytest.fixture(scope="module")
def plan(experiment: ModuleType) -> Any:
    return experiment.Plan(
        steps=2, beyond_steps=1, batch=1, beyond_batch=1, heads=1, axes_dims_rope=(4, 4, 4)
    )


@pytest.fixture(scope="module")
def cell(experiment: ModuleType, plan: Any, maps: dict[str, torch.Tensor]) -> dict[str, Any]:
    held_out, training = ({name: maps[name]} for name in sorted(maps))
    return experiment.run_cell(plan, "SNR-HW", "flux", 0, training, held_out)


def test_a_missing_cell_is_trained_again_to_the_same_bytes_and_the_others_are_only_read(
    experiment: ModuleType,
    plan: Any,
    maps: dict[str, torch.Tensor],
    cell: dict[str, Any],
    tmp_path: Path,
) -> None:
    for name in PHOTOGRAPHS:
        (tmp_path / name).touch()
    folder = tmp_path / "out" / experiment.digest(plan, PHOTOGRAPHS, PHOTOGRAPHS[:1])
    folder.mkdir(parents=True)
    save_file(maps, folder / "latents.safetensors")
    for kind in experiment.KINDS.values():
        for variant in ("flux", "paper"):
            (folder / f"{kind}-{variant}-0.json").write_text(json.dumps({"kept": kind}))
    lost = folder / "snr_huber-flux-0.json"
    lost.unlink()

    results = experiment.run_cells(plan, tmp_path, tmp_path / "out", [0], PHOTOGRAPHS[:1])

    assert lost.read_bytes() == experiment.cell_bytes(cell)
    assert results["FM", "paper", 0] == {"kept": "flow_matching"}
    assert len(results) == 6


def test_official_rope_is_plain_rope_inside_the_window_and_another_beyond(
    experiment: ModuleType, cell: dict[str, Any]
) -> None:
    plain, official = (cell["inside"][variant] for variant in ("flux", "official"))
    for height, width in experiment.INSIDE:
        assert plain[f"{height}x{width}"] == official[f"{height}x{width}"]
    for height, width in experiment.UNSEEN:
        assert plain[f"{height}x{width}"] != official[f"{height}x{width}"]


def test_ratios_compare_each_level_with_flow_matching_of_the_same_seed(
    experiment: ModuleType, cell: dict[str, Any]
) -> None:
    worse = json.loads(json.dumps(cell))
    for sizes in worse["inside"].values():
        for table in sizes.values():
            # Twice the error at low noise, eight times at high noise: four times on average.
            table["square"] = [
                [value * (2.0 if level < 4 else 8.0) for value in row]
                for level, row in enumerate(table["square"])
            ]
    compared = experiment.Comparison({("FM", "flux", 0): cell, ("WLF", "flux", 0): worse})
    ratio = compared.ratio(("inside", "WLF", "flux"), "inside")
    assert ratio == pytest.approx([4.0])
    low = compared.ratio(("inside", "WLF", "flux"), "inside", levels=experiment.LOW_NOISE)
    assert low == pytest.approx([2.0])
    own = compared.ratio(("inside", "FM", "flux"), "1:1, larger")
    assert np.array_equal(own, [1.0])


def test_training_lowers_the_error(experiment: ModuleType, maps: dict[str, torch.Tensor]) -> None:
    """Zero velocity is the start (its error is the target's energy); a constant is learnt fast."""
    constant = {name: torch.ones_like(z) for name, z in maps.items()}
    plan = experiment.Plan(heads=1, axes_dims_rope=(4, 4, 4))
    model = experiment.tiny_transformer(plan, "flux", 0)
    sizes = experiment.INSIDE[:1]
    before = experiment.measure(model, constant, sizes)["12x12"]
    assert np.allclose(before["square"], before["target"])
    phase = experiment.Phase(sizes, steps=30, batch=2, peak=4e-3)
    experiment.train(model, constant, experiment.objective("FM"), phase, seed=0)
    after = experiment.measure(model, constant, sizes)["12x12"]
    assert np.sum(after["square"]) < 0.9 * np.sum(before["square"])
