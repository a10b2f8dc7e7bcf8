from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file

from components.models.transformer import UltraFluxTransformer2DModel
from components.settings.training import AdapterSettings
from components.training.dit.adapters import ADAPTER_FILE, add_adapter, save_adapted
from components.training.dit.export import CHECKSUM_FILE
from components.training.dit.job import WEIGHTS_NAMES, build_transformer
from components.training.dit.worker import run_job

TEXT_WIDTH = 16
SETTINGS = AdapterSettings(rank=3, alpha=6, target_modules=("to_q", "to_out.0", "proj_out"))
EXPORT = {"max_shard_gb": 1.0, "card": lambda config, checksums: "card"}


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

    save_adapted(tiny_backbone(backbone), SETTINGS, factors, tmp_path / "out", **EXPORT)
    merged = model_class.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(predict(merged), expected, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(tiny_backbone(backbone).state_dict())

    # As `load_lora_weights` of a stock pipeline does it.
    state, *_, metadata = pipeline.lora_state_dict(
        str(tmp_path / "out"), weight_name=ADAPTER_FILE, return_lora_metadata=True
    )
    stock = tiny_backbone(backbone)
    stock.load_lora_adapter(state, metadata=metadata)
    torch.testing.assert_close(predict(stock), expected, rtol=1e-4, atol=1e-5)


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
        save_adapted(tiny_backbone("flux"), SETTINGS, unknown, tmp_path / "out", **EXPORT)


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
        trained = load_file(folder / "diffusion_pytorch_model.safetensors")
        moved = {
            key.split(".attn.")[-1]
            for key, value in trained.items()
            if not torch.equal(value, start[key])
        }
        assert moved == {"to_q.weight", "to_k.weight"}
