"""Every safetensors file that leaves this project says what it is."""

from __future__ import annotations

import hashlib
import itertools
import subprocess

import numpy as np
import pytest
from typer.testing import CliRunner

from components.files.safetensors_header import metadata_of
from components.models.text_encoders import build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder
from components.training.adapters.export_choices import DELTAS_FILE, WEIGHTS_FILE
from components.training.dit.job import build_transformer
from components.training.dit.worker import run_job
from components.training.vae.export import autoencoder_about, export_training
from components.training.vae.trainer import VaeTraining
from flows.cli import app

WIDTH = 16
SAID = ("sai_model_spec", "architecture", "implementation", "title", "license", "tags")


@pytest.mark.usefixtures("training_environment_restored")
def test_every_exported_file_says_what_it_is(make_dit_job, tmp_path):
    job = make_dit_job(
        tmp_path / "job",
        steps=1,
        adapter={"rank": 2, "alpha": 2, "target_modules": ["to_q", "proj_out"], "trigger": "zwx"},
    )
    base = build_transformer(job, (WIDTH, WIDTH), 16)
    base.save_pretrained(tmp_path / "base")
    run_job(job.model_copy(update={"initial_weights": tmp_path / "base"}))
    source, out = job.export_dir / "ema", tmp_path / "out"
    out.mkdir()

    def typed(command: str, name: str, *words: str) -> None:
        done = CliRunner().invoke(
            app, ["weights", command, str(source), "--out", str(out / name), *words]
        )
        assert done.exit_code == 0, done.output

    for layout, bits in itertools.product(("diffusers", "bfl"), ("float32", "bfloat16", "fp8")):
        name = f"{layout}-{bits}" + (".safetensors" if layout == "bfl" else "")
        typed("export", name, "--layout", layout, "--dtype", bits)
    typed("export", "deltas", "--rounding", "deltas")
    typed("export", "d.safetensors", "--layout", "bfl", "--rounding", "deltas")
    for keys in ("diffusers", "comfyui"):
        typed("adapter", f"lora-{keys}.safetensors", "--keys", keys)
    adapters = {"lora-diffusers.safetensors", "lora-comfyui.safetensors"}
    whole = {
        *(f"diffusers-{bits}/{WEIGHTS_FILE}" for bits in ("float32", "bfloat16", "fp8")),
        *(f"bfl-{bits}.safetensors" for bits in ("float32", "bfloat16", "fp8")),
        *(f"deltas/{name}" for name in (WEIGHTS_FILE, DELTAS_FILE)),
        *("d.safetensors", f"d.{DELTAS_FILE}"),
    }
    commands = {str(file.relative_to(out)) for file in out.rglob("*.safetensors")}
    assert commands == whole | adapters
    stages = {str(one.relative_to(job.export_dir)) for one in job.export_dir.rglob("*.safetensors")}
    lora = "pytorch_lora_weights.safetensors"
    assert stages == {f"{n}/{file}" for n in ("raw", "ema") for file in (WEIGHTS_FILE, lora)}
    files = [out / name for name in commands] + [job.export_dir / name for name in stages]
    for file in files:
        about = metadata_of(file)
        missing = [name for name in SAID if not about.get(f"modelspec.{name}")]
        assert not missing, file
        data = file.read_bytes()
        tensors = data[8 + int.from_bytes(data[:8], "little") :]
        assert about["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
        assert min(map(int, about["modelspec.resolution"].split("x"))) > 0
        assert len(about["ultraflux.base_sha256"]) == 64
        is_adapter = file.name == lora or file.name in adapters
        assert about["modelspec.architecture"] == "flux-1-dev" + "/lora" * is_adapter
        assert about.get("modelspec.trigger_phrase") == ("zwx" if is_adapter else None)
        # Equal weights of a stage are equal files; what is handed out has a day.
        assert ("modelspec.date" in about) == (out in file.parents)


def test_autoencoder_and_tiny_text_encoders_say_what_they_are(tmp_path):
    autoencoder, base = build_tiny_autoencoder(), tmp_path / "FLUX.1-dev" / "vae"
    autoencoder.save_pretrained(base)
    crop = np.zeros((32, 32, 3), np.uint8)
    history = [{"step": 0.0, "psnr_db": 1.0}, {"step": 1.0, "loss": 1.0, "psnr_db": 2.0}]
    training = VaeTraining(history, [crop], [crop], [crop])
    about = autoencoder_about(base, 0, 512)
    export_training(autoencoder, training, tmp_path / "vae", about=about)
    build_tiny_text_encoders(tmp_path / "encoders", ["a lake"])
    files = [*(tmp_path / "vae").rglob("*.safetensors")]
    files += (tmp_path / "encoders").rglob("*.safetensors")
    assert len(files) == 3
    for file in files:
        found = metadata_of(file)
        assert not [name for name in SAID if not found.get(f"modelspec.{name}")], file
        assert found["modelspec.hash_sha256"].startswith("0x")
    found = metadata_of(files[0])
    assert found["modelspec.resolution"] == "512x512"
    # As it is called on the hub, not where it lies on this machine.
    assert found["ultraflux.base"] == "FLUX.1-dev/vae"
    printed = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=base, capture_output=True, text=True
    ).stdout
    assert found["ultraflux.base_sha256"] == printed.split()[0]
    random = autoencoder_about(None, 7, 512)
    assert random["ultraflux.base"] == "the random weights of seed 7"
