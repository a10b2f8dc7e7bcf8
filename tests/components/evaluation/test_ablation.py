"""Arms of the ablations, and the stages they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from components.evaluation.ablation import DESIGNS, Design, expand, planned_stages, with_overrides
from components.evaluation.scores import Score, scores_table
from flows.ablation import ablation_table
from flows.cli import app
from flows.versioning import stage_graph


@pytest.fixture(scope="module")
def params(root: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize("design", list(DESIGNS))
def test_every_arm_is_valid_and_the_last_is_params_yaml(
    design: Design, params: dict[str, Any]
) -> None:
    arms = expand(design, params)
    assert len(arms) == 4
    assert arms[-1].overrides == {}
    assert with_overrides(params, {}) == params


def test_each_rung_of_the_ladder_adds_one_component(params: dict[str, Any]) -> None:
    left = [set(arm.overrides) for arm in expand("ladder", params)]
    assert left[0] > left[1] > left[2] > left[3] == set()
    assert left[0] - left[1] == {"objective.kind"}
    assert left[1] - left[2] == {"slices.stage2_top_fraction", "dit_stage2.sigma_range"}
    assert left[2] == {"models.transformer.rope_variant"}


def test_the_two_by_two_crosses_data_and_model(params: dict[str, Any]) -> None:
    a, b, c, d = (set(arm.overrides) for arm in expand("data-model", params))
    assert a == b | c
    assert not b & c
    assert d == set()
    assert all(key.startswith("select.") for key in c)


def test_settings_without_a_component_are_refused(params: dict[str, Any]) -> None:
    lacking = with_overrides(params, {"objective.kind": "flow_matching"})
    with pytest.raises(ValueError, match=r"arms 'base' and 'snr-hw' are the same run"):
        expand("ladder", lacking)


def test_shared_stages_run_once(root: Path, params: dict[str, Any]) -> None:
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    upstream = {name: node.upstream for name, node in stage_graph(root).items()}
    plan = planned_stages(expand("ladder", params), params, stages, upstream)
    assert set(plan["base"].values()) == {"base"}
    for arm in ("snr-hw", "sacl", "rope"):
        assert {plan[arm][stage] for stage in ("ingest", "signals", "select")} == {"base"}
        assert plan[arm]["dit_stage1"] == arm


def test_a_dry_run_prints_sets_and_stages(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    done = CliRunner().invoke(app, ["ablate", "ladder", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert '-S objective.kind="flow_matching"' in done.output
    assert "params.yaml as it stands" in done.output
    assert CliRunner().invoke(app, ["ablate", "stairs"]).exit_code == 2


def test_the_table_has_ours_paired_differences_and_the_published_rows(
    tmp_path: Path, params: dict[str, Any]
) -> None:
    arms = expand("ladder", params)
    paths = []
    for step, arm in enumerate(arms):
        table = scores_table(
            Score(f"{i}.png", "generated", 64, 64, "glcm_score", "g/v1", i + 0.5 * step)
            for i in range(8)
        )
        paths.append(tmp_path / f"{arm.name}.parquet")
        table.to_parquet(paths[-1], index=False)
    text = ablation_table("ladder", arms, paths, resamples=999, seed=0)
    assert "| Flux + F16 VAE | 3.5 |" in text
    assert "- + SNR-HW, glcm_score: +0.5 [+0.5, +0.5], p = 0.00781, n = 8" in text
    assert "| + SNR-HW + SACL | 147.32 | 10.30 | 67.31 |" in text
