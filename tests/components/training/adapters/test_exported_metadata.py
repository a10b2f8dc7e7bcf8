"""Every safetensors file that leaves this project says what it is."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from typer.testing import CliRunner

from components.files.safetensors_header import metadata_of
from components.training.adapters.weight_export import DELTAS_FILE, WEIGHTS_FILE
from components.training.dit.job import build_transformer
from components.training.dit.worker import run_job
from flows.cli import app

WIDTH = 16
SAID = (
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "license",
    "tags",
    "resolution",
)


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
        assert len(about["ultraflux.base_sha256"]) == 64
        is_adapter = file.name == lora or file.name in adapters
        assert about["modelspec.architecture"] == "flux-1-dev" + "/lora" * is_adapter
        assert about.get("modelspec.trigger_phrase") == ("zwx" if is_adapter else None)
        # Equal weights of a stage are equal files; what is handed out has a day.
        assert ("modelspec.date" in about) == (out in file.parents)
