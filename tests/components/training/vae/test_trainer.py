"""Decoder post-training: it learns, the encoder stays, resumed runs end with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from components.images.decoding import ImageUndecodable
from components.images.pixel_range import to_model, to_pixels
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import encoder_digest
from components.models.tiny import build_tiny_autoencoder, synthetic_images
from components.settings.training import ReconstructionSettings, VaeSettings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoints import load_state
from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.vae.crops import (
    Photograph,
    PhotographTooSmall,
    WorkingCopies,
    working_size,
)
from components.training.vae.export import export_training, history_table
from components.training.vae.trainer import LossNotFinite, VaeTraining, train_vae

CROP_PX = 64
SEED = 7


def settings(**changes: object) -> VaeSettings:
    values: dict[str, object] = {
        "crop_px": CROP_PX,
        "batch_size": 4,
        "micro_batch_size": 4,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "steps": 6,
        "learning_rate": 2e-3,
        "weight_decay": 0.01,
        "loss": ReconstructionSettings(
            wavelet=0.2,
            perceptual=0.1,
            l2=1.0,
            perceptual_kind="gmsd",
            lpips_backbone=None,
            lpips_sha256=None,
        ),
        "eval_crops": 3,
        "eval_every": 3,
        "checkpoint_every": 2,
    }
    return VaeSettings.model_validate(values | changes)


def tiny() -> AutoencoderKLF16:
    return build_tiny_autoencoder(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[WorkingCopies, WorkingCopies]:
    """Four training and two held-out photographs with 1/f spectra."""
    folder = tmp_path_factory.mktemp("photographs")
    photographs = []
    for number, image in enumerate(to_pixels(synthetic_images(6, 160, 11))):
        Image.fromarray(image[: 100 + 8 * number]).save(folder / f"{number}.png")
        photographs.append(Photograph(f"id{number}", folder / f"{number}.png"))
    cache = folder / "cache"
    return (
        WorkingCopies(photographs[:4], CROP_PX, cache),
        WorkingCopies(photographs[4:], CROP_PX, cache),
    )


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with deterministic_torch(1), open_ranks("cpu") as alone:
        yield alone


def train(
    data: tuple[WorkingCopies, WorkingCopies],
    ranks: Ranks,
    folder: Path,
    chosen: VaeSettings,
    autoencoder: AutoencoderKLF16 | None = None,
) -> tuple[AutoencoderKLF16, VaeTraining]:
    autoencoder = autoencoder or tiny()
    training = train_vae(
        autoencoder,
        *data,
        chosen,
        ranks,
        seed=SEED,
        state_dir=folder,
        metrics=MetricLog(folder / "metrics.jsonl"),
    )
    return autoencoder, training


def weights(autoencoder: AutoencoderKLF16) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in autoencoder.state_dict().items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_reconstructions_improve_and_the_encoder_does_not_change(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    base = tiny()
    before, digest = weights(base), encoder_digest(base)
    trained, training = train(data, ranks, tmp_path, settings(steps=40, eval_every=20))
    after = weights(trained)
    changed = {name for name in after if after[name] != before[name]}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)
    assert encoder_digest(trained) == digest
    measured = [row["psnr_db"] for row in training.history if "psnr_db" in row]
    assert [row["step"] for row in training.history] == list(range(41))
    assert measured[-1] > measured[0] + 3.0


def test_recomputing_blocks_changes_no_bit(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    plain, _ = train(data, ranks, tmp_path / "plain", settings(steps=3))
    chosen = settings(steps=3, gradient_checkpointing=True)
    recomputed, _ = train(data, ranks, tmp_path / "recomputed", chosen)
    assert recomputed.decoder.gradient_checkpointing
    assert weights(recomputed) == weights(plain)


def test_accumulated_gradients_are_those_of_the_whole_batch(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    # Three and one: parts of different sizes count by their size.
    _, whole = train(data, ranks, tmp_path / "whole", settings(steps=1))
    _, parts = train(data, ranks, tmp_path / "parts", settings(steps=1, micro_batch_size=3))
    for name in ("loss", "loss_l2", "grad_norm"):
        assert parts.history[1][name] == pytest.approx(whole.history[1][name], rel=1e-4)


def test_bfloat16_training_improves_and_keeps_float32_weights(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    chosen = settings(steps=40, eval_every=20, precision="bf16")
    trained, training = train(data, ranks, tmp_path, chosen)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    measured = [row["psnr_db"] for row in training.history if "psnr_db" in row]
    assert measured[-1] > measured[0] + 3.0


def test_a_resumed_run_ends_with_the_bytes_of_an_undisturbed_one(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    one, undisturbed = train(data, ranks, tmp_path / "a", settings())
    export_training(one, undisturbed, tmp_path / "out-a")
    # Stopped after its checkpoint at step 2, with one more step in the log.
    train(data, ranks, tmp_path / "b", settings(steps=2))
    log = MetricLog(tmp_path / "b" / "metrics.jsonl")
    log.log({"loss": 99.0}, 3)
    two, resumed = train(data, ranks, tmp_path / "b", settings())
    export_training(two, resumed, tmp_path / "out-b")
    assert weights(one) == weights(two)
    files = contents(tmp_path / "out-a")
    # The stop at step 2 measured PSNR there once more; everything else is equal.
    files.pop("history.csv"), files.pop("curves.png")
    again = contents(tmp_path / "out-b")
    again.pop("history.csv"), again.pop("curves.png")
    assert files == again
    assert [int(row["step"]) for row in log.rows()] == list(range(7))


def test_a_run_killed_with_sigkill_ends_with_the_same_files(
    data: tuple[WorkingCopies, WorkingCopies], tmp_path: Path
) -> None:
    def work(folder: Path, pause_s: float) -> None:
        real = WorkingCopies.batch

        def slowly(*args: object) -> torch.Tensor:
            time.sleep(pause_s)
            return real(*args)  # type: ignore[arg-type]

        WorkingCopies.batch = slowly  # type: ignore[method-assign, assignment]
        with deterministic_torch(1), open_ranks("cpu") as alone:
            trained, training = train(data, alone, folder, settings())
            export_training(trained, training, folder / "out")

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    undisturbed = context.Process(target=work, args=(tmp_path / "a", 0.0))
    undisturbed.start()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    killed = 0
    for wanted in ("step-00000002", "step-00000004", None):
        child = context.Process(target=work, args=(tmp_path / "b", 0.15 if wanted else 0.0))
        child.start()
        while wanted and child.is_alive():
            if (tmp_path / "b" / "checkpoints" / wanted).exists():
                child.kill()
                killed += 1
                break
            time.sleep(0.005)
        child.join()
    assert killed == 2
    assert child.exitcode == 0
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")


def test_two_processes_train_as_one_with_averaged_gradients(
    data: tuple[WorkingCopies, WorkingCopies], tmp_path: Path
) -> None:
    def work(rank: int, world: int, folder: Path) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "rendezvous"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        chosen = settings(steps=2, checkpoint_every=1)
        trained, _ = train(data, Ranks(rank, world, torch.device("cpu")), folder, chosen)
        torch.save(trained.state_dict(), folder / f"rank{rank}.pt")

    context = multiprocessing.get_context("fork")
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        children = [context.Process(target=work, args=(r, world, folder)) for r in range(world)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0
    alone = load_state(tmp_path / "1" / "rank0.pt")
    replicas = [load_state(tmp_path / "2" / f"rank{rank}.pt") for rank in (0, 1)]
    base = tiny().state_dict()
    moved = max(float((alone[name] - base[name]).abs().max()) for name in alone)
    for name, tensor in alone.items():
        assert torch.equal(replicas[0][name], replicas[1][name])
        # AdamW's first steps are about the sign of the gradient, so rounding shows a little.
        assert float((replicas[0][name] - tensor).abs().max()) < 0.2 * moved


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    broken = tiny()
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = float("inf")
    before = weights(broken)
    with pytest.raises(LossNotFinite, match=r"step 1.*not-finite-step00000001-rank0\.pt"):
        train(data, ranks, tmp_path, settings(), broken)
    assert weights(broken) == before
    saved = load_state(tmp_path / "not-finite-step00000001-rank0.pt")
    assert torch.equal(saved["images"], data[0].batch(SEED, 0, range(4)))
    assert len(saved["crops"]) == 4


def test_a_batch_that_does_not_divide_over_the_processes_is_refused(
    data: tuple[WorkingCopies, WorkingCopies], tmp_path: Path
) -> None:
    three = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size = 4 must be a multiple of the 3"):
        train(data, three, tmp_path, settings())


def test_the_export_loads_as_the_trained_autoencoder(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    trained, training = train(data, ranks, tmp_path, settings(steps=2))
    metrics = export_training(trained, training, tmp_path / "out")
    loaded = AutoencoderKLF16.from_pretrained(tmp_path / "out" / "autoencoder")
    assert weights(loaded) == weights(trained)
    assert metrics["psnr_gain_db"] == metrics["psnr_after_db"] - metrics["psnr_before_db"]
    assert metrics["psnr_after_db"] == pytest.approx(training.history[-1]["psnr_db"])
    names = {path.name for path in (tmp_path / "out" / "crops").iterdir()}
    assert names == {
        f"0{n}_{kind}.png" for n in range(3) for kind in ("original", "before", "after")
    }
    original = np.asarray(Image.open(tmp_path / "out" / "crops" / "00_original.png"))
    assert np.array_equal(original, training.held_out[0])
    table = pd.read_csv(tmp_path / "out" / "history.csv")
    assert list(table["step"]) == [0, 1, 2]
    assert "loss_perceptual_gmsd" in table.columns
    assert list(table.columns) == list(history_table(training.history).columns)


def test_crops_are_a_pure_function_of_seed_step_and_index(
    data: tuple[WorkingCopies, WorkingCopies],
) -> None:
    photographs = data[0]
    crops = [photographs.crop_at(1, step, index) for step in range(20) for index in range(8)]
    again = [photographs.crop_at(1, step, index) for step in range(20) for index in range(8)]
    assert crops == again
    assert crops != [photographs.crop_at(2, s, i) for s in range(20) for i in range(8)]
    assert {crop.photograph for crop in crops} == {0, 1, 2, 3}
    assert {crop.flip for crop in crops} == {True, False}
    assert len(set(crops)) > 150
    for crop in crops:
        assert photographs.cut(crop).shape == (CROP_PX, CROP_PX, 3)


def test_a_rank_sees_its_part_of_the_global_batch(
    data: tuple[WorkingCopies, WorkingCopies],
) -> None:
    whole = data[0].batch(SEED, 5, range(4))
    assert torch.equal(data[0].batch(SEED, 5, range(2, 4)), whole[2:])
    assert whole.dtype == torch.float32
    assert -1.0 <= float(whole.min()) < float(whole.max()) <= 1.0


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_pixels(to_model([pixels]))[0], pixels)


def test_working_copies_keep_native_pixels_at_the_papers_crop_size() -> None:
    assert working_size(4000, 6000, 512) == (4000, 6000)
    assert working_size(4000, 6000, 128) == (1365, 2048)
    assert working_size(100, 120, 128) == (100, 120)


def test_working_copies_are_made_once(tmp_path: Path) -> None:
    Image.fromarray(to_pixels(synthetic_images(1, 128, 0))[0]).save(tmp_path / "a.png")
    photograph = Photograph("a", tmp_path / "a.png")
    first = WorkingCopies([photograph], CROP_PX, tmp_path / "cache").held_out(SEED, 2)
    (tmp_path / "a.png").unlink()
    second = WorkingCopies([photograph], CROP_PX, tmp_path / "cache").held_out(SEED, 2)
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_photograph_below_the_crop_size_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 200)).save(tmp_path / "thin.png")
    with pytest.raises(PhotographTooSmall, match=r"thin\.png"):
        WorkingCopies([Photograph("t", tmp_path / "thin.png")], CROP_PX, tmp_path / "cache")


def test_an_unreadable_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8not a picture")
    with pytest.raises(ImageUndecodable, match=r"broken\.jpg"):
        WorkingCopies([Photograph("b", tmp_path / "broken.jpg")], CROP_PX, tmp_path / "cache")
