from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.plan_command import bytes_text, flops_text

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _inside(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.mark.parametrize("profile", ["embedded", "single-gpu", "paper"])
def test_every_profile_has_tables(profile):
    shown = run(app, ["plan", "--profile", profile], env={"COLUMNS": "240"})
    assert shown.exit_code == 0, shown.output
    for text in ("forward + backward", "dit_stage2", "latent store", "ZeRO"):
        assert text in shown.output


def test_json_holds_the_sums():
    shown = run(
        app,
        "plan --profile paper --images 1000 --tflops-per-gpu 989 --mfu 0.4 --json".split(),
    )
    values = json.loads(shown.stdout)
    stages = {row["stage"]: row for row in values["stages"]}
    assert stages["dit_stage1"]["gpu_hours"] == 8 * stages["dit_stage1"]["hours"]
    assert stages["dit_stage1"]["memory"]["total"] == stages["dit_stage1"]["memory_bytes"]
    assert values["images"] == 1000


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mfu", "0.4"],
        ["--tflops-per-gpu", "989", "--mfu", "40"],
        ["--profile", "laptop"],
        ["--profile", "paper", "--params", "params.yaml"],
        ["--gpu-memory-gib", "0"],
        ["--images", "0"],
    ],
)
def test_bad_input_is_one_line(arguments):
    shown = run(app, ["plan", *arguments])
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1


def test_units_are_chosen_by_size():
    assert flops_text(418_111_959_859_200) == "418 TFLOP"
    assert flops_text(999_900_000_000_000) == "1 PFLOP"
    assert bytes_text(2_100_000) == "2.1 MB"
