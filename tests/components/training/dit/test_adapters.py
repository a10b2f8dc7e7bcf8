from __future__ import annotations

import json
import subprocess

import pandas as pd
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file

from components.files.safetensors_header import metadata_of
from components.files.weight_folders import weights_checksums, weights_identity
from components.models.resonance_rope import grid_ids
from components.models.transformer import UltraFluxTransformer2DModel
from components.settings.training import AdapterSettings
from components.training.adapters.adapter_files import (
    ADAPTER_FILE,
    BACKBONE,
    BASE_SHA256,
    BASE_TITLE,
    MISSING,
    STAGES,
    Adapter,
    read_adapter,
    write_adapter,
)
from components.training.adapters.base_rounding import noted_rounding
from components.training.dit.adapters import adapter_about, adapter_base, add_adapter, save_adapted
from components.training.dit.assembly import check_quantisation
from components.training.dit.curves import write_outcome
from components.training.dit.export import CHECKSUM_FILE
from components.training.dit.job import WEIGHTS_NAMES, StartUnusable, build_transformer
from components.training.dit.model_card import initial_identity
from components.training.dit.worker import run_job

TEXT_WIDTH = 16
SETTINGS = AdapterSettings(rank=3, alpha=6, target_modules=("to_q", "to_out.0", "proj_out"))
ABOUT = {BACKBONE: "flux", BASE_TITLE: "some/base", BASE_SHA256: "a" * 64, MISSING: "0"}
EXPORT = {"max_shard_gb": 1.0, "card": lambda config, checksums: "card", "before": None}


READS = {
    "flux": {"return_alphas": True, "return_lora_metadata": True},
    "sd3": {"return_lora_metadata": True},
}


@torch.no_grad()
def predict(model):
    generator = torch.Generator().manual_seed(1)
    common = {
        "encoder_hidden_states": torch.randn(1, 8, 16, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([0.3]),
        "return_dict": False,
    }
    if isinstance(model, UltraFluxTransformer2DModel):
        tokens = torch.randn(1, 24, 64, generator=generator)
        guidance = torch.tensor([4.0])
        return model(hidden_states=tokens, guidance=guidance, grid_hw=(4, 6), **common)[0]
    return model(hidden_states=torch.randn(1, 16, 8, 12, generator=generator), **common)[0]


@pytest.mark.parametrize(
    ("backbone", "model_class", "pipeline"),
    [
        ("flux", UltraFluxTransformer2DModel, FluxPipeline),
        ("sd3", SD3Transformer2DModel, StableDiffusion3Pipeline),
    ],
)
def test_merged_folder_and_stock_adapter_give_the_adapted_output(
    tiny_backbone, tmp_path, backbone, model_class, pipeline
):
    adapted = tiny_backbone(backbone)
    before = predict(adapted)
    add_adapter(adapted, SETTINGS, seed=5)
    torch.testing.assert_close(predict(adapted), before)
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            factors[name] = parameter.detach().clone()
    expected = predict(adapted)
    assert (expected - before).abs().max() > 1e-3

    about = ABOUT | {BACKBONE: backbone}
    save_adapted(
        tiny_backbone(backbone), SETTINGS, factors, tmp_path / "out", about=about, **EXPORT
    )
    merged = model_class.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(predict(merged), expected, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(tiny_backbone(backbone).state_dict())

    # As `load_lora_weights` of a stock pipeline does it.
    parts = pipeline.lora_state_dict(
        str(tmp_path / "out"), weight_name=ADAPTER_FILE, **READS[backbone]
    )
    alphas = parts[1] if backbone == "flux" else None
    stock = tiny_backbone(backbone)
    stock.load_lora_adapter(parts[0], metadata=parts[-1], network_alphas=alphas)
    torch.testing.assert_close(predict(stock), expected, rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / "out" / ADAPTER_FILE)
    assert any(name.endswith(".alpha") for name in tensors) == (backbone == "flux")


def test_equal_seeds_give_equal_factors_and_leave_the_global_generator_alone(tiny_backbone):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    models = [tiny_backbone("flux", num_layers=1) for _ in range(2)]
    torch.set_rng_state(state)
    for model in models:
        add_adapter(model, SETTINGS, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, two)


def test_a_layer_that_does_not_exist_is_named(tiny_backbone):
    settings = SETTINGS.model_copy(update={"target_modules": ("to_q", "to_w")})
    with pytest.raises(ValueError, match="has no layer 'to_w'"):
        add_adapter(tiny_backbone("flux"), settings, seed=0)


def test_factors_of_another_adapter_are_refused(tiny_backbone, tmp_path):
    unknown = {"elsewhere": torch.zeros(1)}
    with pytest.raises(ValueError, match="do not fit the adapter"):
        save_adapted(
            tiny_backbone("flux"), SETTINGS, unknown, tmp_path / "out", about=ABOUT, **EXPORT
        )


@pytest.mark.usefixtures("training_environment_restored")
def test_training_an_adapter_resumes_exactly_and_moves_only_its_layers(make_dit_job, tmp_path):
    adapter = {"rank": 2, "alpha": 2, "target_modules": ["to_q", "to_k"]}

    def adapted(folder, steps):
        job = make_dit_job(tmp_path / folder, steps=steps, checkpoint_every=1, adapter=adapter)
        return job.model_copy(update={"initial_weights": tmp_path / "base"})

    # Untrained blocks have gates of zero, which let no gradient through.
    base = build_transformer(make_dit_job(tmp_path), (TEXT_WIDTH, TEXT_WIDTH), 16)
    generator = torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    whole, parts = adapted("whole", 2), adapted("parts", 2)
    run_job(whole)
    run_job(adapted("parts", 1))
    run_job(parts)
    start = base.state_dict()
    # The frozen base is not written again with every checkpoint.
    checkpoints = sum(f.stat().st_size for f in (whole.state_dir / "checkpoints").rglob("*.pt"))
    assert 0 < checkpoints < sum(weights.nbytes for weights in start.values())
    for name in WEIGHTS_NAMES:
        folder = whole.export_dir / name
        files = sorted(path.name for path in folder.iterdir())
        assert {"config.json", "diffusion_pytorch_model.safetensors", ADAPTER_FILE} < set(files)
        assert ADAPTER_FILE in (folder / CHECKSUM_FILE).read_text()
        for file in files:
            assert (folder / file).read_bytes() == (parts.export_dir / name / file).read_bytes()
        assert "lora" not in json.loads((folder / "config.json").read_text())
        described = [
            metadata_of(folder / file)
            for file in ("diffusion_pytorch_model.safetensors", ADAPTER_FILE)
        ]
        architectures = [about["modelspec.architecture"] for about in described]
        assert architectures == ["flux-1-dev", "flux-1-dev/lora"]
        for about in described:
            assert about["ultraflux.base_sha256"] == initial_identity(tmp_path / "base")
            height, width = map(int, about["modelspec.resolution"].split("x"))
            assert min(height, width) > 0
            assert about["modelspec.tags"] == "ultraflux, flux"
            assert about["modelspec.title"] == f"UltraFlux dit_stage1 {name}"
            assert {"modelspec.license", "modelspec.hash_sha256"} < set(about)
        trained = load_file(folder / "diffusion_pytorch_model.safetensors")
        moved = {
            key.split(".attn.")[-1]
            for key, value in trained.items()
            if not torch.equal(value, start[key])
        }
        assert moved == {"to_q.weight", "to_k.weight"}


@torch.no_grad()
def stock_velocity(folder, adapter=None):
    """Of stock diffusers on a folder of weights, with an adapter loaded as its pipeline does it."""
    model = FluxTransformer2DModel.from_pretrained(folder)
    if adapter is not None:
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        parts |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler()
        FluxPipeline(scheduler=scheduler, transformer=model, **parts).load_lora_weights(adapter)
    generator = torch.Generator().manual_seed(1)
    return model(
        hidden_states=torch.randn(1, 15, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 8, TEXT_WIDTH, generator=generator),
        pooled_projections=torch.randn(1, TEXT_WIDTH, generator=generator),
        timestep=torch.tensor([0.3]),
        guidance=torch.tensor([4.0]),
        img_ids=grid_ids(3, 5),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


def trained(job, start, name="dit_stage1", **settings):
    """The job trained from a folder of weights; its exported average."""
    card = job.transformer.card.model_copy(update={"base_model": "some/published"})
    changes = {
        "initial_weights": start,
        "name": name,
        "transformer": job.transformer.model_copy(update={"card": card}),
        "settings": job.settings.model_copy(update=settings),
    }
    job = job.model_copy(update=changes)
    run_job(job)
    return job.export_dir / "ema"


@pytest.mark.usefixtures("training_environment_restored")
def test_the_exported_adapter_and_the_base_that_it_names_are_the_merged_weights(
    make_dit_job, tmp_path
):
    """Two stages with adapters on a published base; and one on weights that were trained whole."""
    base = tmp_path / "base"
    model = build_transformer(make_dit_job(tmp_path), (TEXT_WIDTH, TEXT_WIDTH), 16)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(base)
    printed = subprocess.run(
        "sha256sum *.safetensors | sha256sum", shell=True, cwd=base, capture_output=True, text=True
    ).stdout
    options = {"steps": 2, "learning_rate": 3e-2, "warmup_steps": 0, "precision": "fp32"}
    first_adapter = {"rank": 2, "alpha": 8, "target_modules": ["to_q", "to_k"]}
    second_adapter = {"rank": 3, "alpha": 3, "target_modules": ["to_k", "proj_out"]}

    first_job = make_dit_job(tmp_path / "first", adapter=first_adapter, **options)
    first = trained(first_job, base)
    second_job = make_dit_job(tmp_path / "second", adapter=second_adapter, **options)
    second = trained(second_job, first, "dit_stage2", initial_weights="stage1_ema")
    before, after = stock_velocity(base), stock_velocity(second)
    moved = float((after - before).abs().max())
    assert moved > 0.05
    for stage, folder in (("dit_stage1", first), ("dit_stage1+dit_stage2", second)):
        found = stock_velocity(base, folder)
        assert float((found - stock_velocity(folder)).abs().max()) < 1e-4 * moved
        about = read_adapter(folder).about
        assert (about[BASE_TITLE], about[BASE_SHA256]) == ("some/published", printed.split()[0])
        assert about[STAGES] == stage
        assert f"change from **{about[BASE_TITLE]}**" in (folder / "README.md").read_text()
    assert read_adapter(second).rank == 5
    # Stage 1's part alone is far from the whole, so that leaving it out would be seen.
    alone = stock_velocity(base, first)
    assert float((alone - after).abs().max()) > 0.05 * moved
    # In ComfyUI's names, for which stock diffusers has a reader of its own: at these sizes for
    # double blocks alone (it knows single ones of 3,072, and drops the layers outside of blocks).
    comfy = tmp_path / "comfy"
    comfy.mkdir()
    adapter = read_adapter(second)
    double = {n: one for n, one in adapter.change.items() if n.startswith("transformer")}
    write_adapter(Adapter(double, adapter.about), comfy / ADAPTER_FILE, "comfyui")
    write_adapter(Adapter(double, adapter.about), tmp_path / ADAPTER_FILE)
    difference = stock_velocity(base, comfy) - stock_velocity(base, tmp_path / ADAPTER_FILE)
    assert float(difference.abs().max()) < 1e-4 * moved

    # A stage that was trained whole is no change of low rank: then its weights are the base.
    whole = trained(make_dit_job(tmp_path / "whole", adapter=None, **options), base)
    assert not (whole / ADAPTER_FILE).exists()
    third_job = make_dit_job(tmp_path / "third", adapter=second_adapter, **options)
    third = trained(third_job, whole, "dit_stage2", initial_weights="stage1_ema")
    about = read_adapter(third).about
    assert about[BASE_TITLE] == "this project's dit_stage1 (ema)"
    assert about[BASE_SHA256] == weights_identity(weights_checksums(whole))
    difference = stock_velocity(whole, third) - stock_velocity(third)
    assert float(difference.abs().max()) < 1e-4 * moved


@pytest.mark.parametrize(
    ("captions", "trigger", "expected"),
    [
        (["a", "b"], None, None),
        (["sks dog", "sks dog"], None, "sks dog"),
        (["sks dog", "sks dog"], "zwx", "zwx"),
    ],
)
def test_the_trigger_is_the_settings_or_the_only_caption(
    make_dit_job, tmp_path, captions, trigger, expected
):
    adapter = {"rank": 2, "alpha": 2, "target_modules": ["to_q"], "trigger": trigger}
    table = tmp_path / "slice.parquet"
    pd.DataFrame({"image_id": captions, "caption_en": captions}).to_parquet(table)
    job = make_dit_job(tmp_path, adapter=adapter).model_copy(update={"train_slice": table})
    about = adapter_about(job, adapter_base(job, ""), "ema")
    assert about.get("modelspec.trigger_phrase") == expected
    assert about[BASE_SHA256] == ""
    assert about[BASE_TITLE].startswith("the random weights of seed")


@pytest.mark.usefixtures("training_environment_restored")
@pytest.mark.parametrize(
    ("kind", "zero_stage", "worst"),
    [("int8", 2, 0.01), ("nf4", 0, 0.06)],
)
@pytest.mark.slow
def test_an_adapter_on_a_rounded_base_resumes_exactly(
    make_dit_job, tmp_path, kind, zero_stage, worst
):
    """Bytes of an undisturbed run after an interruption; the card says what rounding changed."""
    adapter = {"rank": 2, "alpha": 2, "target_modules": ["to_q", "to_k"]}
    precision = "fp32" if zero_stage == 0 else "bf16"

    def adapted(folder, steps, **changes):
        job = make_dit_job(
            tmp_path / folder,
            steps=steps,
            checkpoint_every=1,
            adapter=adapter,
            zero_stage=zero_stage,
            precision=precision,
            **changes,
        )
        transformer = job.transformer.model_copy(update={"quantisation": kind})
        return job.model_copy(
            update={"initial_weights": tmp_path / "base", "transformer": transformer}
        )

    base = build_transformer(make_dit_job(tmp_path), (TEXT_WIDTH, TEXT_WIDTH), 16)
    generator = torch.Generator().manual_seed(3)
    for parameter in base.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    whole, parts = adapted("whole", 2), adapted("parts", 2)
    run_job(whole)
    run_job(adapted("parts", 1))
    run_job(parts)
    for name in WEIGHTS_NAMES:
        files = sorted(path.name for path in (whole.export_dir / name).iterdir())
        for file in files:
            one, other = (job.export_dir / name / file for job in (whole, parts))
            assert one.read_bytes() == other.read_bytes()
    if kind == "int8":
        # Its blocks wait on the host: the same bytes.
        waiting = adapted("waiting", 2, offload_base=True, gradient_checkpointing="blocks")
        run_job(waiting)
        one, other = (job.export_dir / "ema" / ADAPTER_FILE for job in (whole, waiting))
        assert one.read_bytes() == other.read_bytes()
    # Stock diffusers reads the adapter on the unrounded base: the merged weights once more.
    exported = whole.export_dir / "raw"
    found = stock_velocity(tmp_path / "base", exported)
    torch.testing.assert_close(found, stock_velocity(exported), rtol=1e-4, atol=1e-6)
    assert not torch.equal(found, stock_velocity(tmp_path / "base"))
    # Neither rounded weights nor their scales are written again with every checkpoint.
    saved = sum(f.stat().st_size for f in (whole.state_dir / "checkpoints").rglob("*model*.pt"))
    assert 0 < saved < 0.25 * sum(weights.nbytes for weights in base.state_dict().values())
    rounding = noted_rounding(whole.state_dir)
    assert (rounding.kind, len(rounding.velocity)) == (kind, 8)
    assert 0 < rounding.worst < worst
    card = (whole.export_dir / "ema" / "README.md").read_text()
    assert f"held as `{kind}`" in card
    assert f"{rounding.velocity[0]:.3%}" in card
    metrics = json.loads((write_outcome(whole), whole.export_dir / "metrics.json")[1].read_text())
    assert metrics["rounding_velocity_error_worst"] == rounding.worst
    # What is exported is the unrounded base with the adapter on it.
    trained = load_file(whole.export_dir / "raw" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        trained["transformer_blocks.0.ff.net.2.weight"],
        base.state_dict()["transformer_blocks.0.ff.net.2.weight"],
    )


def test_weights_that_are_trained_cannot_be_rounded(make_dit_job, tmp_path):
    job = make_dit_job(tmp_path)
    transformer = job.transformer.model_copy(update={"quantisation": "int8"})
    with pytest.raises(StartUnusable, match=r"dit_stage1: .* int8 freezes the weights"):
        check_quantisation(job.model_copy(update={"transformer": transformer}))
