"""`ultraflux generate` on published layouts: files, resume, metadata, errors."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import pytest
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from components.files.weight_folders import ComponentsMissing, WeightsMissing
from components.generation.image_metadata import read_metadata
from components.models.text_encoders import build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.training.dit.export import save_transformer
from flows.commands.images.generate import generate as command
from flows.commands.images.generation import (
    GenerateOptions,
    GenerationRefused,
    generate,
    parse_size,
)


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("project")
    (project / "params.yaml").write_text((root / "params.yaml").read_text())
    model, base = project / "weights" / "UltraFlux-v1", project / "weights" / "FLUX.1-dev"
    build_tiny_transformer(
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32
    ).save_pretrained(model / "transformer")
    build_tiny_autoencoder().save_pretrained(model / "vae")
    build_tiny_text_encoders(base, ["A lake.", "Red leaves."], t5_dim=32, clip_dim=32)
    return project


def options(project: Path, folder: Path, **changes: object) -> GenerateOptions:
    values: dict[str, object] = {
        "prompt": "a lake",
        "size": "96x64",
        "steps": 2,
        "model": project / "weights" / "UltraFlux-v1",
        "output": folder,
    }
    return GenerateOptions(**(values | changes))  # type: ignore[arg-type]


def test_a_file_of_prompts_is_resumed_and_memory_modes_give_the_same_files(
    project: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a lake"}, {"prompt": "red leaves", "size": "64x64", "seed": 5}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    asked = {"prompt": None, "prompts": file, "num_images": 2}
    made = generate(project, options(project, tmp_path / "out", **asked))
    assert len(made) == 4
    found = [read_metadata(path) for path in made]
    assert [fields["seed"] for fields in found] == ["0", "1", "5", "6"]
    assert Image.open(made[2]).size == (64, 64)
    stamps = [path.stat().st_mtime_ns for path in made]
    made[1].unlink()
    again = generate(project, options(project, tmp_path / "out", **asked, memory="text-first"))
    assert again == made
    assert [path.stat().st_mtime_ns for path in made][2:] == stamps[2:]
    assert read_metadata(made[1]) == found[1]


def test_a_picture_of_a_short_cut_says_so_and_is_another_file(
    project: Path, tmp_path: Path
) -> None:
    cached = {"step_cache": "taylorseer", "step_cache_interval": 2, "steps": 6}
    plain, short = (
        generate(project, options(project, tmp_path, **changes))[0]
        for changes in ({"steps": 6}, cached)
    )
    assert plain != short
    assert "step_cache" not in read_metadata(plain)
    fields = read_metadata(short)
    assert (fields["step_cache"], fields["step_cache_interval"]) == ("taylorseer", "2")


def test_another_scheduler_is_another_file_of_the_dynamic_schedule_alone(
    project: Path, tmp_path: Path
) -> None:
    shutil.copytree(project / "weights" / "FLUX.1-dev", tmp_path / "base")
    made = []
    for shift in (1.15, 2.5):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=shift)
        scheduler.save_pretrained(tmp_path / "base" / "scheduler")
        made += [
            generate(project, options(project, tmp_path, base=tmp_path / "base", **more))[0]
            for more in ({}, {"schedule": "dynamic"})
        ]
    assert made[0] == made[2]
    assert len(set(made)) == 3


def test_positions_and_a_stride_unlike_the_weights_are_another_file_that_says_so(
    project: Path, tmp_path: Path
) -> None:
    plain, named, paper = (
        generate(project, options(project, tmp_path, **changes))[0]
        for changes in ({}, {"rope": "official", "vae_stride": 1}, {"rope": "paper"})
    )
    # The weights' own positions by name, and a stride that no stock autoencoder takes.
    assert named == plain
    assert "rope_variant" not in read_metadata(plain)
    assert paper != plain
    assert read_metadata(paper)["rope_variant"] == "paper"


def test_image_to_image_takes_the_size_of_its_picture(project: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((100, 70)).save(photo)
    changes = {"size": None, "image": photo, "strength": 0.5, "file_format": "jpg"}
    path = generate(project, options(project, tmp_path, **changes))[0]
    assert path.suffix == ".jpg"
    assert Image.open(path).size == (96, 64)
    assert read_metadata(path)["strength"] == "0.5"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt": None}, "give --prompt or --prompts"),
        ({"model": None, "base": Path("base")}, "--base: holds what --model lacks"),
        ({"model": None, "transformer": Path("typed")}, "--transformer typed: no such folder"),
        ({"prompt": " "}, "--prompt: empty"),
        ({"size": None}, "--size: missing"),
        ({"size": "100x64"}, "nearest is 96"),
        ({"strength": 2.0}, "--strength"),
        ({"dtype": "int8"}, "--dtype int8: choose"),
        ({"quantise": "int4"}, "--quantise int4: choose none, int8"),
        ({"steps": -1}, "--steps"),
        ({"steps": 10**11}, "--steps 100000000000: from 1 to 1000"),
        ({"seed": 2**63}, "--seed 9223372036854775808 --num-images 1: seeds go from 0 to"),
        ({"seed": 2**63 - 2, "num_images": 3}, "--num-images 3: seeds go from 0 to"),
        ({"guidance_scale": float("nan")}, "--guidance-scale nan: a number from 0"),
        ({"guidance_scale": float("inf")}, "--guidance-scale inf: a number from 0"),
        ({"prompt": "caf\udce9"}, "--prompt: not UTF-8 at character 4"),
        ({"memory": "all"}, "memory: unknown mode all"),
        ({"step_cache": "some"}, "--step-cache some: input should be 'none', 'first_block' or"),
        ({"step_cache_threshold": 0.0}, "--step-cache-threshold 0.0: input should be greater"),
        ({"strength": 0.3}, "--strength 0.3: of --image"),
        ({"strength": 0.6}, "--strength 0.6: of --image"),
        ({"step_cache_threshold": 0.2}, "threshold 0.2: of --step-cache first_block"),
        ({"step_cache_interval": 3, "step_cache": "first_block"}, "3: of --step-cache taylorseer"),
        ({"attention_backend": "flash"}, r"attention_backend flash needs a CUDA GPU \(the device"),
    ],
)
def test_bad_options_are_one_line(
    project: Path, tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as raised:
        generate(project, options(project, tmp_path, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ('"size": "100x64"', "p.jsonl line 2: size 100x64: 100 is not a multiple of 32"),
        (f'"seed": {2**63 - 1}', "p.jsonl line 2: seed 9223372036854775807 --num-images 2"),
    ],
)
def test_a_field_of_a_file_is_named_with_its_line(
    project: Path, tmp_path: Path, field: str, problem: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", ' + field + "}")
    changes = {"prompt": None, "prompts": file, "size": "64x64", "num_images": 2}
    with pytest.raises(ValueError, match=problem):
        generate(project, options(project, tmp_path, **changes))


def test_every_option_is_one_of_the_command_with_the_same_default() -> None:
    typed = inspect.signature(command).parameters
    assert {one.name: one.default for one in dataclasses.fields(GenerateOptions)} == {
        name: one.default for name, one in typed.items() if name not in {"sign", "show_metadata"}
    }


def test_missing_parts_are_listed_with_commands(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ComponentsMissing, match="hf download black-forest-labs") as raised:
        generate(project, options(project, tmp_path, base=tmp_path / "nothing"))
    assert len(str(raised.value).splitlines()) == 4


def test_a_transformer_replaces_the_pipelines_own(project: Path, tmp_path: Path) -> None:
    trained = tmp_path / "data"
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    weights = project / "weights"
    own = trained / "dit_stage2" / "ema"
    shutil.copytree(weights / "UltraFlux-v1" / "transformer", own)
    shutil.copytree(weights / "UltraFlux-v1" / "vae", trained / "vae" / "autoencoder")
    shutil.copytree(weights / "FLUX.1-dev", trained / "text_embeddings" / "encoders")
    build_tiny_transformer(
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, seed=7
    ).save_pretrained(tmp_path / "other")
    pictures = [
        generate(tmp_path, options(project, tmp_path / "out", model=None, **changes))[0]
        for changes in ({}, {"transformer": own}, {"transformer": tmp_path / "other"})
    ]
    assert pictures[0] == pictures[1] != pictures[2]
    missing = tmp_path / "weights" / "none"
    with pytest.raises(WeightsMissing, match="hf download Owen777/UltraFlux-v1-1-Transformer"):
        generate(tmp_path, options(project, tmp_path, model=None, transformer=missing))


def test_sizes_round_to_multiples_of_32_only_when_asked() -> None:
    assert parse_size("1000x33", round_size=True) == (32, 992)
    with pytest.raises(GenerationRefused, match="--round-size"):
        parse_size("1000x32")


def test_a_trained_export_in_shards_is_sampled_like_the_model_it_was_made_of(
    project: Path, tmp_path: Path
) -> None:
    module = build_tiny_transformer(
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32, seed=7
    )
    module.save_pretrained(tmp_path / "saved")
    save_transformer(
        module,
        dict(module.named_parameters()),
        tmp_path / "export",
        max_shard_gb=0.0005,
        card=lambda config, checksums: f"{config['rope_variant']}\n{checksums}",
    )
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    pictures = [
        generate(project, options(project, tmp_path / name, transformer=tmp_path / name))[0]
        for name in ("saved", "export")
    ]
    one, two = (Image.open(path).tobytes() for path in pictures)
    assert one == two
