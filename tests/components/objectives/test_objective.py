"""The table of objectives: a row is all that settings, commands and training need of a new one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from components.objectives.objective import OBJECTIVES, Objective, objective_loss
from components.settings.objective import ObjectiveSettings
from components.settings.schema import SettingsError, parse_settings
from components.settings.section import NonNegative, Section

ROOT = Path(__file__).parents[3]


class CharbonnierSettings(Section):
    """Settings of a toy objective."""

    width: NonNegative


def charbonnier(
    velocity: Tensor, latents: Tensor, noise: Tensor, t: Tensor, settings: ObjectiveSettings
) -> Tensor:
    """Mean of sqrt(e^2 + width^2) over a sample."""
    width = settings.own("charbonnier", CharbonnierSettings).width
    error = velocity - (noise - latents)
    return (error**2 + width**2).sqrt().flatten(1).mean(1)


@pytest.fixture
def params() -> dict[str, Any]:
    """Values of params.yaml."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    return values


def test_a_new_objective_is_one_function_and_one_row(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "charbonnier", Objective(charbonnier, CharbonnierSettings))
    params["objective"] |= {"kind": "charbonnier", "charbonnier": {"width": 0.5}}
    settings = parse_settings(params).objective
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    loss = objective_loss(settings, noise - latents, latents, noise, torch.rand(3))
    torch.testing.assert_close(loss, torch.full((3,), 0.5))


def test_its_section_is_checked_like_every_other(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "charbonnier", Objective(charbonnier, CharbonnierSettings))
    params["objective"]["kind"] = "charbonnier"
    with pytest.raises(SettingsError, match=r"missing key 'objective\.charbonnier'"):
        parse_settings(params)
    params["objective"]["charbonnier"] = {"widht": 1.0, "width": -1.0}
    with pytest.raises(SettingsError) as problem:
        parse_settings(params)
    assert sorted(str(problem.value).splitlines()) == [
        "params.yaml: objective.charbonnier.width = -1.0: "
        "input should be greater than or equal to 0",
        "params.yaml: unknown key 'objective.charbonnier.widht'; did you mean 'width'?",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"kind": "snr_hubber"},
            "objective.kind = 'snr_hubber': input should be 'snr_huber', 'flow_matching' or "
            "'wavelet'; did you mean 'snr_huber'?",
        ),
        ({"kind": 3}, "objective.kind = 3: input should be a valid string"),
        ({"snr_hubber": {}}, "unknown key 'objective.snr_hubber'; did you mean 'snr_huber'?"),
        ({"wavelet_space": "z"}, "objective.wavelet_space = 'z': input should be 'x0' or 'v'"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(
    params: dict[str, Any], change: dict[str, Any], line: str
) -> None:
    values = copy.deepcopy(params)
    values["objective"] |= change
    with pytest.raises(SettingsError) as problem:
        parse_settings(values)
    assert str(problem.value) == f"params.yaml: {line}"


def test_checking_a_kind_imports_no_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from components.settings.schema import load_settings"
        f"; load_settings(Path({str(ROOT / 'params.yaml')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
