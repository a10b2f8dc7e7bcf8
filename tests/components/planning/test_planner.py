"""Plans of the shipped profiles."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from components.corpus.selection.slices import slices as cut_slices
from components.corpus.selection.slices import split
from components.models.backbones import BACKBONES
from components.models.text_encoders import build_tiny_text_encoders
from components.models.tiny import build_tiny_autoencoder
from components.planning import planner
from components.planning.counted_flops import flux_on_meta, linear_layers
from components.planning.flops import decoder_products, encoder_products, flux_flops, total
from components.planning.model_shapes import AutoencoderShape, FluxShape, networks
from components.planning.planner import Plan, Rate, plan, vae_slice
from components.settings.schema import Settings
from components.training.dit.adapters import add_adapter
from components.training.dit.validation import LEVELS

GIB = 2**30


def stage(made: Plan, name: str) -> planner.StagePlan:
    return next(item for item in made.stages if item.stage == name)


def test_the_paper_profile_costs_what_the_design_states(profile, tmp_path):
    made = plan(profile("paper"), tmp_path, 1_007_230)
    square = next(bucket for bucket in made.buckets if bucket.name == "4096x4096")
    assert (square.image_tokens, square.forward, square.training) == (
        16384,
        418_111_959_859_200,
        1_254_316_544_360_448,
    )
    first = stage(made, "dit_stage1")
    assert first.items == 30_000 * 64
    assert first.parameters == 11_901_408_320
    # DESIGN's 44.6 GB with bf16 gradients; this engine accumulates them in float32.
    assert made.states_by_zero[2] == (first.memory.weights, 4 * 1_487_676_040, 12 * 1_487_676_040)
    assert round((first.memory.states - 2 * 1_487_676_040) / 1e9, 1) == 44.6
    store = stage(made, "latents").disk["latent store"]
    assert store / 1_007_230 == pytest.approx(2.1e6, rel=0.01)
    text = stage(made, "text_embeddings").disk["text store"]
    assert text == 1_007_231 * 2 * (512 * 4096 + 768)
    assert all("published" in origin for origin in made.origin.values())


def test_the_papers_rate_gives_the_papers_12_days(profile, tmp_path):
    made = plan(profile("paper"), tmp_path, 1_007_230)
    first, second = stage(made, "dit_stage1"), stage(made, "dit_stage2")
    assert "not measured" in first.rate
    assert stage(made, "latents").hours is None
    without_validation = sum(
        item.hours * (1 - item.validation / item.model_flops) for item in (first, second)
    )
    assert without_validation / 24 == pytest.approx(12, rel=0.01)


def test_hours_follow_from_the_stated_rate(profile, tmp_path):
    made = plan(profile("paper"), tmp_path, 1000, Rate(1e15 * 0.5, "stated"))
    for item in made.stages:
        assert item.rate == "stated"
        assert item.hours * item.gpus * 3600 * 5e14 == pytest.approx(item.model_flops)
        assert item.gpu_hours == pytest.approx(item.hours * item.gpus)


def test_buckets_are_averaged_with_equal_weight(profile, tmp_path):
    made = plan(profile("paper"), tmp_path, 1000)
    flops = [flux_flops(FluxShape(), bucket.image_tokens, 512) for bucket in made.buckets]
    mean = sum(f.model for f in flops) / len(flops)
    assert stage(made, "dit_stage1").flops_per_item.model == pytest.approx(mean, abs=1)


def test_the_tiles_of_half_a_million_photographs_are_planned(profile, tmp_path):
    made = stage(plan(profile("paper"), tmp_path, 1_007_230), "vae")
    # 2,014 are held out; half of the others train, and 64 of those are measured on.
    cut = 502_608 + 64
    assert made.disk["tiles of 502,672 photographs (at most)"] == cut * 2 * 1024**2 * 3
    assert made.core_hours == pytest.approx(cut * planner.TILES_CORE_S / 3600)
    assert "benchmarks/vae_tiles.py" in made.core_rate
    smaller = profile("paper", vae__tile_px=512, vae__tiles_per_photograph=1)
    sizes = stage(plan(smaller, tmp_path, 1000), "vae").disk
    assert sizes["tiles of 869 photographs (at most)"] == 869 * 512**2 * 3


def test_the_planned_slice_is_the_one_that_is_cut(profile):
    for images, fraction, floor in ((10, 0.5, 2), (11, 0.31, 2), (40, 0.1, 8), (5, 0.5, 8)):
        chosen = profile("embedded", slices__vae_top_fraction=fraction, slices__min_images=floor)
        rows = pd.DataFrame({"image_id": [f"{n:02d}" for n in range(images)], "kept": True})
        rows["flat_fraction"], rows["aesthetic"] = 0.5, 0.5
        rows["bucket_height"], rows["bucket_width"], rows["category"] = 1, 1, "x"
        rows["split"] = split(rows, chosen.slices, seed=0)
        assert len(cut_slices(rows, chosen.slices, seed=0)["vae"]) == vae_slice(chosen, images)


def test_the_embedded_profile_is_planned_from_its_tiny_networks(profile, tmp_path):
    chosen = profile("embedded")
    made = plan(chosen, tmp_path, 21)
    assert stage(made, "dit_stage1").rate is None
    shapes = networks(chosen, tmp_path)
    tiny = chosen.models.autoencoder.tiny
    model = build_tiny_autoencoder(
        block_out_channels=tiny.block_out_channels,
        layers_per_block=tiny.layers_per_block,
        norm_num_groups=tiny.norm_num_groups,
    )
    assert stage(made, "vae").parameters == sum(p.numel() for p in model.parameters())
    encoders = build_tiny_text_encoders(tmp_path, ["a quiet lake at dawn"] * 4)
    t5 = sum(p.numel() for p in encoders.text_encoder_2.parameters())
    missing = shapes.t5.vocab_size - encoders.text_encoder_2.config.vocab_size
    assert shapes.t5.parameters == t5 + missing * shapes.t5.d_model
    assert VALIDATION == LEVELS


VALIDATION = planner.VALIDATION_LEVELS


def test_a_weights_folder_decides_the_architecture(profile, tmp_path):
    folder = tmp_path / "weights" / "FLUX.1-dev" / "transformer"
    folder.mkdir(parents=True)
    config = {"_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = networks(profile("paper"), tmp_path)
    assert shapes.transformer == FluxShape(2, 1)
    assert shapes.origin["transformer"].endswith("transformer/config.json")
    assert shapes.autoencoder == AutoencoderShape(decode_mode="official_partitioned")
    (folder / "config.json").write_text('{"num_layers": "many"}')
    with pytest.raises(ValueError, match="num_layers = 'many'"):
        networks(profile("paper"), tmp_path)
    (folder / "config.json").write_text("no")
    with pytest.raises(ValueError, match=r"not a readable config\.json"):
        networks(profile("paper"), tmp_path)


def test_a_small_gpu_is_warned_about_with_a_change_that_fits(profile, tmp_path):
    chosen = profile("paper", dit_stage1__gradient_checkpointing="none")
    made = plan(chosen, tmp_path, 1000, limit=141 * GIB)
    warning = next(text for text in made.warnings if text.startswith("dit_stage1"))
    assert "dit_stage1.gradient_checkpointing: blocks" in warning
    cured = plan(profile("paper"), tmp_path, 1000, limit=141 * GIB)
    assert not cured.warnings
    small = plan(chosen, tmp_path, 1000, limit=2 * GIB)
    assert any("no number of GPUs that global_batch_size 64" in text for text in small.warnings)
    assert any(text.startswith("generate") for text in small.warnings)


def test_more_gpus_are_advised_when_they_are_enough(profile, tmp_path):
    full = {"dit_stage1__adapter": None, "dit_stage2__adapter": None}
    made = plan(profile("single-gpu", **full), tmp_path, 1000, limit=141 * GIB)
    warning = next(text for text in made.warnings if text.startswith("dit_stage1"))
    # "...; set dit_stage1.ema_device: cpu, runtime.processes: 2 (121.9 GiB)"
    words = warning.rpartition("set ")[2].partition(" (")[0]
    advised = dict(part.split(": ") for part in words.split(", "))
    assert int(advised["runtime.processes"]) > 1
    changes = {key.replace(".", "__"): yaml.safe_load(value) for key, value in advised.items()}
    chosen = profile("single-gpu", **full, **changes)
    assert stage(plan(chosen, tmp_path, 1000), "dit_stage1").memory_bytes <= 141 * GIB


def test_every_advice_is_one_that_the_settings_and_the_engine_take(profile, tmp_path):
    full = {"dit_stage1__adapter": None, "dit_stage2__adapter": None}
    seen = 0
    for name, changes in (("paper", {}), ("single-gpu", full), ("single-gpu", {})):
        for limit in (8, 16, 24, 48, 80):
            made = plan(profile(name, **changes), tmp_path, 1000, limit=limit * GIB)
            for warning in made.warnings:
                where, _, advice = warning.partition(": needs ")
                if "; set " not in advice:
                    assert "no " in advice or "ultraflux generate --memory" in advice
                    continue
                words = advice.rpartition("; set ")[2].partition(" (")[0]
                advised = dict(part.split(": ") for part in words.split(", "))
                values = {k.replace(".", "__"): yaml.safe_load(v) for k, v in advised.items()}
                again = plan(profile(name, **changes, **values), tmp_path, 1000)
                # Applied and planned again: it fits, and nothing refuses to start.
                assert stage(again, where).memory_bytes <= limit * GIB
                assert not again.warnings
                seen += 1
    assert seen > 10


def test_more_gpus_than_the_batch_has_samples_are_no_advice(profile, tmp_path):
    changes = {
        "dit_stage1__adapter": None,
        "dit_stage1__global_batch_size": 4,
        "dit_stage1__zero_stage": 3,
    }
    made = plan(profile("single-gpu", **changes), tmp_path, 1000, limit=24 * GIB)
    warning = next(text for text in made.warnings if text.startswith("dit_stage1"))
    # Four samples: four groups of GPUs at most, whatever shares a sample.
    words = warning.rpartition("set ")[2].partition(" (")[0]
    advised = dict(part.split(": ") for part in words.split(", "))
    degree = int(advised.get("runtime.context_parallel_degree", 1))
    assert 4 % (int(advised["runtime.processes"]) // degree) == 0
    tiny = plan(profile("single-gpu", **changes), tmp_path, 1000, limit=4 * GIB)
    assert any("raise global_batch_size" in text for text in tiny.warnings)


def test_known_answers_of_small_gpus(profile, tmp_path):
    made = plan(profile("single-gpu"), tmp_path, 1000, limit=24 * GIB)
    latents = stage(made, "latents")
    # Two workers, and one float32 photograph of 4096 px takes 10.2 GiB beside the weights.
    assert latents.processes_per_gpu == 2
    assert latents.memory_bytes == pytest.approx(21.2 * GIB, rel=0.02)
    assert latents.taken.verdict(24 * GIB) == "open"
    assert latents.taken.verdict(20 * GIB) == "does not fit"
    alone = profile("single-gpu", runtime__encoders_per_gpu=1)
    assert stage(plan(alone, tmp_path, 1000), "latents").taken.verdict(24 * GIB) == "fits"
    # 47.6 GB of float32 weights a rank while it loads.
    assert stage(made, "dit_stage1").host_bytes == 4 * 11_901_408_320
    ranks = stage(plan(profile("paper"), tmp_path, 1000), "dit_stage1")
    assert ranks.host_bytes == 8 * 4 * 11_901_408_320
    # ZeRO's buckets are there on one GPU, too.
    assert stage(made, "dit_stage1").memory.buffers == 2 * 2 * 200_000_000
    # The bfloat16 transformer alone is 22.2 GiB: no way to sample fits.
    small = plan(profile("single-gpu"), tmp_path, 1000, limit=16 * GIB)
    (sampling,) = (text for text in small.warnings if text.startswith("generate"))
    assert "no mode of ultraflux generate --memory fits" in sampling
    assert "--memory text-first" not in sampling


def test_the_single_gpu_profile_fits_one_gpu_of_80_gib(profile, tmp_path):
    made = plan(profile("single-gpu"), tmp_path, 1000, limit=80 * GIB)
    assert made.warnings == ()
    first = stage(made, "dit_stage1")
    assert first.memory_bytes < 60 * GIB
    assert first.disk["checkpoints (one more while writing)"] < 10 * GIB


def test_settings_that_the_engine_refuses_are_named(profile, tmp_path):
    chosen = profile("paper", dit_stage2__global_batch_size=12)
    warnings = plan(chosen, tmp_path, 1000).warnings
    assert any("set it to 16" in text for text in warnings)


def test_tokens_divided_over_gpus_divide_the_activations(profile, tmp_path):
    whole = plan(profile("paper"), tmp_path, 1000)
    divided = plan(profile("paper", runtime__context_parallel_degree=4), tmp_path, 1000)
    one, part = (stage(made, "dit_stage1") for made in (whole, divided))
    assert part.memory.activations == pytest.approx(one.memory.activations / 4, rel=1e-3)
    assert part.memory.states == one.memory.states
    assert part.work.endswith(", 4 GPUs a sample")
    assert divided.warnings == ()


def test_a_degree_that_does_not_divide_a_bucket_is_named(profile, tmp_path):
    warnings = plan(profile("paper", runtime__context_parallel_degree=8), tmp_path, 9).warnings
    assert any("context_parallel_degree 8: bucket " in text for text in warnings)


def test_divided_tokens_are_advised_where_more_gpus_do_not_help(profile, tmp_path):
    made = plan(profile("paper"), tmp_path, 1000, limit=8 * GIB)
    warning = next(text for text in made.warnings if text.startswith("dit_stage1"))
    assert "runtime.context_parallel_degree: " in warning


def test_an_adapter_is_planned_by_its_own_size(profile, tmp_path):
    adapter = {"rank": 16, "alpha": 16, "target_modules": ["to_q", "to_k", "to_v"]}
    whole = stage(plan(profile("paper"), tmp_path, 9), "dit_stage1")
    chosen = profile("paper", dit_stage1__adapter=adapter)
    first = stage(plan(chosen, tmp_path, 9), "dit_stage1")
    # Factors of 16 x 3072 on both sides, in three projections of each of the 57 blocks.
    assert first.trained == 2 * 16 * 3072 * 3 * (19 + 38)
    assert first.parameters == whole.parameters + first.trained
    assert first.memory.weights == 2 * first.parameters
    assert first.memory.optimizer == 12 * first.trained // 8
    assert first.memory.average in (0, 4 * first.trained // 8)
    assert first.disk["export (raw and ema)"] == 8 * (whole.parameters + first.trained)
    adapter["target_modules"] = ["no_such_layer"]
    with pytest.raises(ValueError, match="no_such_layer"):
        plan(profile("paper", dit_stage1__adapter=adapter), tmp_path, 9)


@pytest.mark.parametrize("backbone", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_an_adapter_is_planned_with_as_many_values_as_peft_trains(profile, tmp_path, backbone):
    adapter = {"rank": 2, "alpha": 2, "target_modules": ["to_q", "proj_out", "ff.net.2", "proj"]}
    changes = {"models__transformer__backbone": backbone, "dit_stage1__adapter": adapter}
    chosen = profile("embedded", **changes)
    first = stage(plan(chosen, tmp_path, 21), "dit_stage1")
    model = build_tiny(chosen)
    add_adapter(model, chosen.dit_stage1.adapter, seed=0)
    assert first.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_tiny(settings: Settings):
    backbone = BACKBONES[settings.models.transformer.backbone]
    return backbone.build_tiny(settings.models.transformer, (64, 64), 16, 0)


def test_linear_layers_have_the_names_and_sizes_of_the_real_class():
    for shape in (
        FluxShape(2, 3, 32, 4, joint_attention_dim=48, pooled_projection_dim=20, in_channels=8),
        FluxShape(1, 1, 32, 2, guidance_embeds=False, out_channels=12),
    ):
        assert sorted(shape.linear_layers) == sorted(linear_layers(flux_on_meta(shape)))


def test_planning_flux_imports_neither_torch_nor_pandas_nor_peft(root):
    code = (
        "import sys, pathlib, yaml; from components.planning.planner import plan;"
        "from components.settings.schema import parse_settings;"
        "from flows.versioning.profiles import compose; root = pathlib.Path(sys.argv[1]);"
        "settings = parse_settings(yaml.safe_load(compose(root, 'single-gpu')));"
        "plan(settings, root / 'nowhere', 1000, limit=24 << 30);"
        "print({'torch', 'pandas', 'peft', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], cwd=root, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


def test_moments_in_8_bits_take_a_quarter(profile, tmp_path):
    first, eight = (
        stage(plan(profile("paper", dit_stage1__optimizer=kind), tmp_path, 9), "dit_stage1")
        for kind in ("adamw", "adamw_8bit")
    )
    share = -(-first.trained // 8)
    assert first.memory.optimizer == 12 * share
    # Masters, two bytes of moments, two scales per block of 256.
    assert eight.memory.optimizer == pytest.approx((4 + 2 + 8 / 256) * share, rel=1e-6)


def test_a_checkpoint_holds_the_states_of_its_optimizer(profile, tmp_path):
    def first(kind: str):
        changes = {"optimizer": kind, "zero_stage": 0, "precision": "fp32"}
        chosen = profile("paper", **{f"dit_stage1__{key}": each for key, each in changes.items()})
        made = plan(chosen, tmp_path, 9)
        assert list(made.states_by_zero) == ([0, 1, 2, 3] if kind == "adamw" else [0])
        assert made.states_by_zero[0][2] == stage(made, "dit_stage1").memory.optimizer
        return stage(made, "dit_stage1")

    adamw, muon, adafactor = map(first, ("adamw", "muon", "adafactor"))
    files = profile("paper").dit_stage1.keep_checkpoints + 1
    title = "checkpoints (one more while writing)"
    # Without ZeRO, weights and average in float32, and the states once.
    for one in (adamw, muon, adafactor):
        assert one.disk[title] == files * (8 * one.trained + one.memory.optimizer)
    assert adamw.memory.optimizer == 8 * adamw.trained
    # A momentum for nearly all; a mean for each row and column.
    assert muon.memory.optimizer == pytest.approx(4 * muon.trained, rel=0.001)
    assert adafactor.memory.optimizer < 0.01 * adafactor.trained


def test_too_few_images_are_refused(profile, tmp_path):
    with pytest.raises(ValueError, match="images 1"):
        plan(profile("paper"), tmp_path, 1)


def test_the_second_backbone_is_planned_from_counts(profile, tmp_path):
    chosen = profile("embedded", models__transformer__backbone="sd3")
    made = plan(chosen, tmp_path, 21)
    first = stage(made, "dit_stage1")
    assert first.parameters > 0
    assert 1.9 < first.flops_per_item.backward / first.flops_per_item.forward < 2.0
    assert first.memory.activations > 0


@pytest.mark.parametrize(("batch", "accumulates"), [(4, False), (8, True)])
def test_gpus_that_share_the_tokens_of_a_sample_count_once_towards_the_batch(
    profile, tmp_path, batch, accumulates
):
    # Eight of them in pairs: a batch of four is one micro batch each, of eight it is two.
    options = {
        "runtime__processes": 8,
        "runtime__context_parallel_degree": 2,
        "dit_stage1__precision": "fp32",
        "dit_stage1__zero_stage": 2,
        "dit_stage1__micro_batch_size": 1,
        "dit_stage1__global_batch_size": batch,
    }
    memory = stage(plan(profile("paper", **options), tmp_path, 1000), "dit_stage1").memory
    # In float32 the gradients of the micro batch before stay beside ZeRO's two buckets.
    assert memory.buffers == 4 * 2 * 200_000_000 + accumulates * memory.gradients


@pytest.mark.parametrize(("beside_training", "bytes_a_weight"), [(True, 16), (False, 8)])
def test_a_checkpoint_written_beside_training_copies_states_and_average(
    profile, tmp_path, beside_training, bytes_a_weight
):
    # Masters, two moments and the average, of all weights together; or the float32 weights that
    # each of the two processes loads.
    options = {"runtime__processes": 2, "dit_stage1__async_checkpoints": beside_training}
    made = stage(plan(profile("paper", **options), tmp_path, 1000), "dit_stage1")
    assert made.host_bytes == bytes_a_weight * 11_901_408_320


def test_the_average_is_divided_over_the_gpus_or_kept_on_the_host(profile, tmp_path):
    first = stage(plan(profile("paper", dit_stage1__ema_device="model"), tmp_path, 9), "dit_stage1")
    assert first.memory.average == 4 * 1_487_676_040
    hosted = profile("paper", dit_stage1__ema_device="cpu")
    assert stage(plan(hosted, tmp_path, 9), "dit_stage1").memory.average == 0


def test_the_paper_profiles_autoencoder_costs_what_the_design_states(profile, tmp_path):
    shape = networks(profile("paper"), tmp_path).autoencoder
    assert round(total(encoder_products(shape, 4096, 4096)).forward / 1e12) == 26
    assert round(total(decoder_products(shape, 4096, 4096)).forward / 1e12) == 49


@pytest.mark.parametrize("name", ["embedded", "consumer-24gb", "single-gpu", "paper"])
def test_what_no_profile_has_is_a_warning_of_its_stage(name, profile, tmp_path):
    settings = profile(name)
    assert settings.doubts() == []
    stage = settings.dit_stage2.model_copy(update={"steps": 3, "warmup_steps": 4})
    made = plan(settings.model_copy(update={"dit_stage2": stage}), tmp_path, 500)
    assert made.warnings[-1].startswith("dit_stage2: warmup_steps 4 exceeds steps 3: ")
