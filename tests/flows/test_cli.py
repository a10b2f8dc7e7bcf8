"""The command line: instant help, one clear line for bad input."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flows.commands.images.generation import GenerationRefused, parse_size
from flows.commands.services.doctor import examine

Typed = Callable[..., subprocess.CompletedProcess[str]]


def ultraflux(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ultraflux", *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_imports_nothing_heavy(root: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['ultraflux', '--help']\n"
        "try:\n    runpy.run_module('flows.cli', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'mlflow', 'prefect', 'dvc', 'numpy', 'pydantic'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout
    started = time.monotonic()
    shown = ultraflux("--help", cwd=root)
    assert shown.returncode == 0
    assert "doctor" in shown.stdout
    # Generous: the bound of one second is measured in benchmarks, not in a test under load.
    assert time.monotonic() - started < 10


def test_outside_a_project_there_is_one_clear_line(tmp_path: Path) -> None:
    done = ultraflux("run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no UltraFlux project")
    assert done.stderr.count("\n") == 1


def test_bad_settings_stop_the_run_before_anything_starts(toy: Path, root: Path) -> None:
    text = (root / "params.yaml").read_text().replace("min_entropy_bits", "min_entropy_bit")
    (toy / "params.yaml").write_text(text)
    done = ultraflux("run", cwd=toy)
    assert done.returncode == 2
    assert "did you mean 'min_entropy_bits'" in done.stderr
    assert not (toy / "runs" / "records").exists()


def test_an_unknown_profile_names_the_known_ones(root: Path) -> None:
    done = ultraflux("config", "compose", "--profile", "huge", cwd=root)
    assert done.returncode == 2
    assert "consumer-24gb, embedded, paper, single-gpu" in done.stderr


def test_measure_prints_the_official_values(root: Path) -> None:
    done = ultraflux("measure", "data/sample/solus-tiles-dark.jpg", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert list(row) == [
        "path",
        "width",
        "height",
        "entropy_bits",
        "flat_fraction",
        "glcm_score",
        "glcm_entropy_bits",
        "jpeg95_ratio",
        "upright_width",
        "upright_height",
        "orientation",
        "color_space",
        "bit_depth",
        "alpha_fraction",
    ]
    assert row["entropy_bits"] == 7.05601304585249
    assert row["flat_fraction"] == 0.0
    assert row["glcm_score"] == pytest.approx(1.2808827871145916, abs=1e-12)


def test_measure_of_an_unreadable_file_is_a_row_with_an_error(root: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    done = ultraflux("measure", str(tmp_path), "--json", cwd=root)
    assert done.returncode == 2
    row = json.loads(done.stdout)
    assert row["entropy_bits"] is None
    assert row["error"]


def test_a_warning_of_a_library_ends_no_command(toy: Path) -> None:
    env = os.environ | {"PYTHONWARNINGS": "error"}
    done = subprocess.run(
        ["ultraflux", "stage", "list"], cwd=toy, env=env, capture_output=True, text=True
    )
    # DVC asks what a library of its own warns of.
    assert done.returncode == 0, done.stderr
    assert "DeprecationWarning" in done.stderr


def test_doctor_finds_this_machine_fit_and_names_what_is_broken(root: Path, toy: Path) -> None:
    assert ultraflux("doctor", cwd=root).returncode == 0
    shutil.copy(root / "requirements.lock", toy)
    (toy / "params.yaml").write_text(
        (root / "params.yaml").read_text().replace("data/sample", "data/nowhere")
    )
    done = ultraflux("doctor", cwd=toy)
    assert done.returncode == 1
    assert "problem" in done.stdout


def test_doctor_names_the_command_for_each_missing_part_of_the_chosen_backbone(
    root: Path, toy: Path
) -> None:
    values = yaml.safe_load((root / "params.yaml").read_text())
    models = values["models"]
    models["transformer"]["backbone"] = "sd3"
    for part, folder in (
        ("autoencoder", "weights/FLUX.1-dev/vae"),
        ("transformer", "weights/sd3/transformer"),
        ("text_encoders", "weights/sd3"),
    ):
        models[part]["pretrained"] = folder
    (toy / "params.yaml").write_text(yaml.safe_dump(values))
    shown = {f.text.partition(":")[0]: f.fix for f in examine(toy) if f.topic == "weights"}
    sd3 = "hf download stabilityai/stable-diffusion-3-medium-diffusers --include"
    assert shown == {
        "autoencoder": "hf download black-forest-labs/FLUX.1-dev --include 'vae/*' "
        "--local-dir weights/FLUX.1-dev",
        "transformer": f"{sd3} 'transformer/*' --local-dir weights/sd3",
        "text_encoders": f"{sd3} 'tokenizer*/*' --include 'text_encoder*/*' "
        "--local-dir weights/sd3",
    }


def test_the_version_is_that_of_the_installed_project(root: Path) -> None:
    done = ultraflux("--version", cwd=root)
    assert done.stdout == f"ultraflux {importlib.metadata.version('ultraflux-mlops')}\n"


@pytest.mark.parametrize(
    ("size", "problem"),
    [("5120*2880", "WIDTHxHEIGHT"), ("100x128", "nearest is 96"), ("0x32", "multiple of 32")],
)
def test_a_bad_size_says_what_is_wrong(size: str, problem: str) -> None:
    with pytest.raises(GenerationRefused, match=problem):
        parse_size(size)


def test_a_size_is_width_by_height_outside_and_height_first_inside() -> None:
    assert parse_size("5120x2880") == (2880, 5120)


def test_generate_without_trained_weights_names_what_makes_them(
    toy: Path, root: Path, typed: Typed
) -> None:
    (toy / "params.yaml").write_text((root / "params.yaml").read_text())
    done = typed(toy, "generate", "--prompt", "a tree", "--size", "64x64")
    assert done.returncode == 2
    assert "ultraflux run" in done.stderr
    assert done.stderr.count("\n") == 1


def test_promote_without_a_decision_says_what_to_run(toy: Path, typed: Typed) -> None:
    done = typed(toy, "promote")
    assert done.returncode == 1
    assert "run the pipeline first" in done.stderr


@pytest.mark.parametrize(
    ("section", "stage"), [("autoencoder", "vae"), ("transformer", "dit_stage1")]
)
def test_missing_weights_name_the_folder_and_the_command_that_gets_them(
    root: Path, tmp_path: Path, section: str, stage: str
) -> None:
    import yaml

    from components.files.weight_folders import WeightsMissing
    from components.models.loading.base_autoencoder import load_base_autoencoder
    from components.settings.schema import parse_settings
    from components.training.dit.job import initial_weights

    values = yaml.safe_load((root / "params.yaml").read_text())
    values["models"][section]["pretrained"] = f"weights/FLUX.1-dev/{section}"
    settings = parse_settings(values)
    transformer = settings.models.transformer
    load: dict[str, Callable[[], object]] = {
        "vae": lambda: load_base_autoencoder(settings.models.autoencoder, 0, tmp_path),
        "dit_stage1": lambda: initial_weights(
            stage, settings.dit_stage1, transformer, tmp_path, None
        ),
    }
    with pytest.raises(WeightsMissing) as caught:
        load[stage]()
    message = str(caught.value)
    assert f"weights/FLUX.1-dev/{section}" in message
    assert "hf download black-forest-labs/FLUX.1-dev" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("corpus", "datasheet", "data/slices/none.parquet"), "make it with: ultraflux run"),
        (("corpus", "datasheet", "params.yaml"), "params.yaml: not a Parquet file"),
        (("ablate", "ladder", "--dry-run", "--suite", "nothing"), "suite 'nothing'"),
        (("ablate", "ladder", "--dry-run", "--suite", "runtime"), "it scores no pictures"),
        (("ablate", "ladder", "--suite", "held-out", "--metrics", "nothing"), "nothing"),
        (("generate", "--show-metadata", "PHOTO"), "not made by this project"),
        (("generate", "--prompts", "nothing.txt"), "--prompts nothing.txt: no such file"),
        (("generate", "--prompt", "x", "--image", "nothing.jpg"), "nothing.jpg: no such file"),
        (("generate", "--prompt", "x", "--image", "/dev/zero"), "not a regular file"),
        (("generate", "--prompt", "x", "--image", "dvc.yaml"), "not a readable picture"),
        (("stage", "run", "vae", "--continue-from", "va/01"), "stages that train: vae, dit_stage1"),
        (("stage", "run", "vae", "--continue-from", "dit_stage1/01"), "is not part of this run"),
        (("run", "--continue-from", "ingest/01"), "stages that train: vae, dit_stage1"),
        (("stage", "remote", "params.yaml"), "request params.yaml: not JSON"),
        (("stage", "remote", "nothing.json"), "request nothing.json: cannot read it"),
    ],
)
def test_what_a_command_cannot_use_is_one_line_before_anything_is_computed(
    root: Path, arguments: tuple[str, ...], said: str, typed: Typed
) -> None:
    photo = str(next((root / "data" / "sample").glob("*.jpg")))
    done = typed(root, *(photo if word == "PHOTO" else word for word in arguments))
    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--prefect-port=99999", "--mlflow-port=-4"])
def test_a_port_that_cannot_be_is_refused_by_the_option(
    toy: Path, option: str, typed: Typed
) -> None:
    done = typed(toy, "up", option)
    assert done.returncode == 2
    assert option.partition("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name", ["outputs/a.png", "judged/a.json", "dvc_plots/index.html", "drift.html", "drift.json"]
)
def test_what_commands_write_by_default_is_no_change_of_the_clone(root: Path, name: str) -> None:
    """Workers refuse a clone with files that no commit has."""
    done = subprocess.run(["git", "check-ignore", "-q", "--no-index", name], cwd=root)
    assert done.returncode == 0


def test_checking_a_store_imports_no_models(tmp_path: Path) -> None:
    import sys

    code = (
        "import sys; from pathlib import Path\n"
        "from components.training.encoding.store_check import check_store\n"
        f"try:\n    check_store(Path({str(tmp_path)!r}))\n"
        "except ValueError as problem:\n    print(problem)\n"
        "print('HEAVY', sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "not a finished store" in done.stdout
    assert "HEAVY []" in done.stdout
