from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from components.telemetry.wording import bytes_text, flops_text
from flows.cli import app

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
        shlex.split("plan --profile paper --images 1000 --tflops-per-gpu 989 --mfu 0.4 --json"),
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
        ["--profile", "paper", "--settings", "params.yaml"],
        ["--gpu-memory-gib", "0"],
        ["--images", "0"],
        ["--stage", "select"],
        ["--price-per-gpu-hour", "-1"],
        ["--price-per-gpu-hour", "inf"],
        ["--gpu-memory-gib", "nan"],
        ["--gpu-memory-gib", "1e300"],
        ["--tflops-per-gpu", "inf", "--mfu", "0.4"],
        ["--tflops-per-gpu", "nan", "--mfu", "0.4"],
        ["--tflops-per-gpu", "989", "--mfu", "nan"],
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


def test_a_stage_gets_a_verdict_and_a_price():
    words = (
        "plan --profile paper --stage dit_stage1 --images 1000 --tflops-per-gpu 989 --mfu 0.4 "
        "--gpu-memory-gib {} --price-per-gpu-hour 3"
    )
    small, large = (
        run(app, words.format(size).split(), env={"COLUMNS": "240"}) for size in (24, 141)
    )
    assert "dit_stage1: does not fit" in small.output
    assert "warning: dit_stage1: needs" in small.output
    assert "dit_stage1: fits" in large.output
    assert "dit_stage2" not in large.output
    values = json.loads(run(app, [*words.format(141).split(), "--json"]).stdout)
    (only,) = values["stages"]
    assert only["fits"] is True
    assert only["cost"] == pytest.approx(3 * only["gpu_hours"])


def test_the_exact_plan_stands_beside_the_formula():
    words = "plan --profile embedded --stage latents --exact"
    shown = run(app, words.split(), env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "peak at components/models/autoencoder_f16.py:" in shown.output
    assert "waits for the GPU: 1 x _to_copy at components/planning/exact.py" in shown.output
    (one,) = json.loads(run(app, [*words.split(), "--json"]).stdout)["exact"]
    assert abs(one["formula_bytes"] / one["peak_bytes"] - 1) < 0.03
    # The latents leave for the host.
    assert sum(one["waits"].values()) == 1
    assert one["doubles"] == {}


def test_every_setting_of_a_card_can_be_read_in_a_narrow_terminal():
    words = "plan --profile single-gpu --cards"
    shown = run(app, words.split(), env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    cells = [line.split("│")[5].strip() for line in shown.stdout.splitlines() if "│" in line]
    settings = "".join(cells)
    rows = json.loads(run(app, [*words.split(), "--json"]).stdout)
    assert len(rows) == 36
    for row in rows:
        for name, value in row["changes"].items():
            text = f"[{', '.join(value)}]" if isinstance(value, list) else str(value).lower()
            assert f"{name}: {text}".replace(" ", "") in settings.replace(" ", "")


def test_an_open_verdict_says_what_it_leaves_open():
    words = "plan --profile single-gpu --stage latents --images 1000 --gpu-memory-gib 24"
    shown = run(app, words.split(), env={"COLUMNS": "240"})
    assert "latents: open (21.2 of 24.0 GiB, 2 processes before CUDA contexts" in shown.output
    (only,) = json.loads(run(app, [*words.split(), "--json"]).stdout)["stages"]
    assert (only["verdict"], only["fits"]) == ("open", False)
