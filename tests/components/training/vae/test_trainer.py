"""Decoder post-training: it learns, the encoder stays, resumed runs end with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from components.images.pixel_range import to_model, to_pixels
from components.models.autoencoder_f16 import AutoencoderKLF16
from components.models.loading.base_autoencoder import encoder_digest
from components.models.tiny import build_tiny_autoencoder, synthetic_images
from components.settings.training import ReconstructionSettings, VaeSettings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.checkpoint_folders import newest_checkpoint
from components.training.distributed.checkpoints import DiskFull, load_state
from components.training.distributed.divergence import TrainingDiverged, read_events
from components.training.distributed.interruption import (
    StopRequest,
    TrainingInterrupted,
    listening,
)
from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.vae import trainer
from components.training.vae.crops import Photograph, WorkingCopies
from components.training.vae.export import export_training, history_table
from components.training.vae.trainer import VaeTraining, train_vae

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
    stop: StopRequest | None = None,
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
        stop=stop,
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


def test_a_warned_run_loses_no_step_and_ends_with_the_same_bytes(
    data: tuple[WorkingCopies, WorkingCopies],
    ranks: Ranks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No other checkpoint is due before the end, so what is there is the warning's.
    chosen = settings(steps=5, checkpoint_every=5, eval_every=5)
    log = MetricLog.log

    def logged(self: MetricLog, metrics: Mapping[str, float], at: int) -> None:
        log(self, metrics, at)
        if at == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, listening() as stop:
        patched.setattr(MetricLog, "log", logged)
        with pytest.raises(TrainingInterrupted, match="vae: interrupted, saved at step 3 of 5"):
            train(data, ranks, tmp_path / "warned", chosen, stop=stop)
    newest = newest_checkpoint(tmp_path / "warned" / "checkpoints")
    assert newest is not None
    assert newest[0] == 3
    whole, _ = train(data, ranks, tmp_path / "whole", chosen)
    resumed, _ = train(data, ranks, tmp_path / "warned", chosen)
    assert weights(resumed) == weights(whole)


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
    with pytest.raises(TrainingDiverged, match=r"loss is not finite at step 1;.*no checkpoint"):
        train(data, ranks, tmp_path, settings(), broken)
    assert weights(broken) == before
    saved = load_state(tmp_path / "diverged" / "step-00000001" / "rank0.pt")
    assert torch.equal(saved["images"], data[0].batch(SEED, 0, range(4)))
    assert len(saved["crops"]) == 4


class Spoiled(WorkingCopies):
    """Photographs of which the batch of the fifth step is far too bright."""

    @classmethod
    def of(cls, data: tuple[WorkingCopies, WorkingCopies]) -> tuple[WorkingCopies, WorkingCopies]:
        spoiled = cls.__new__(cls)
        spoiled.__dict__.update(data[0].__dict__)
        return spoiled, data[1]

    def batch(self, seed: int, step: int, numbers: range) -> torch.Tensor:
        return super().batch(seed, step, numbers) * (50.0 if step == 4 else 1.0)


def guarded(action: str, **changes: object) -> VaeSettings:
    rules = {"warmup_steps": 3, "rollback_every": 2, "rollback_margin": 0, "left_out_steps": 1}
    own = {name: changes.pop(name) for name in list(changes) if name in (*rules, "max_events")}
    return settings(on_divergence=action, divergence=rules | own, **changes)


def test_a_diverged_batch_is_left_out_and_every_way_there_gives_the_same_bytes(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    spoiled = Spoiled.of(data)
    skipped, training = train(spoiled, ranks, tmp_path / "skip", guarded("skip"))
    (event,) = training.divergences
    assert str(event).startswith("step 5: loss ")
    assert str(event).endswith("; step 5 left out")
    assert read_events(tmp_path / "skip") == training.divergences
    assert training.history[5] == {"step": 5, "left_out": 1.0}
    assert np.isnan(history_table(training.history).set_index("step").loc[5, "loss"])
    saved = load_state(tmp_path / "skip" / "diverged" / "step-00000005" / "rank0.pt")
    assert torch.equal(saved["images"], spoiled[0].batch(SEED, 4, range(4)))
    # Nothing of it reached weights or moments: as many steps without it, and none after it.
    before, _ = train(data, ranks, tmp_path / "four", guarded("skip", steps=4))
    until, _ = train(spoiled, ranks, tmp_path / "five", guarded("skip", steps=5))
    assert weights(until) == weights(before)
    # Stopped before the event, whose statistics come back with the checkpoint.
    train(spoiled, ranks, tmp_path / "resumed", guarded("skip", steps=4))
    resumed, again = train(spoiled, ranks, tmp_path / "resumed", guarded("skip"))
    assert (weights(resumed), again.divergences) == (weights(skipped), training.divergences)
    # Back to the checkpoint of step 4, and on without the batch.
    back, gone_back = train(spoiled, ranks, tmp_path / "back", guarded("rollback"))
    assert weights(back) == weights(skipped) != weights(before)
    assert str(gone_back.divergences[0]).endswith("; back to step 4, step 5 left out")
    log = MetricLog(tmp_path / "back" / "metrics.jsonl").rows()
    assert [int(row["step"]) for row in log] == list(range(7))
    # Three batches up to the event left out: none since step 2.
    far, _ = train(
        spoiled, ranks, tmp_path / "far",
        guarded("rollback", rollback_margin=1, left_out_steps=3, steps=5),
    )  # fmt: skip
    two, _ = train(data, ranks, tmp_path / "two", guarded("skip", steps=2))
    assert weights(far) == weights(two)


def test_a_rollback_can_lower_the_rate_and_events_are_bounded(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    spoiled = Spoiled.of(data)
    rates = {"divergence": {"warmup_steps": 3, "rollback_every": 4, "rollback_margin": 0,
                            "left_out_steps": 1, "rollback_rate": 0.5}}  # fmt: skip
    slower, _ = train(spoiled, ranks, tmp_path / "a", settings(on_divergence="rollback", **rates))
    state = load_state(next((tmp_path / "a" / "checkpoints").glob("step-00000006")) / "state.pt")
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3
    same, _ = train(spoiled, ranks, tmp_path / "b", guarded("rollback"))
    assert weights(slower) != weights(same)
    with pytest.raises(TrainingDiverged, match=r"deviations above.* at step 5;.*step 4 is whole"):
        train(spoiled, ranks, tmp_path / "c", guarded("stop"))
    with pytest.raises(TrainingDiverged, match=r"deviations above.* at step 5;"):
        train(spoiled, ranks, tmp_path / "d", guarded("skip", max_events=0))
    # Goes on from there under other settings, as a segment does.
    _, training = train(spoiled, ranks, tmp_path / "c", guarded("skip"))
    assert len(training.divergences) == 1
    assert training.history[-1]["step"] == 6


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


def test_pixels_survive_the_way_to_the_model_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_pixels(to_model([pixels]))[0], pixels)


def test_a_full_disk_is_said_and_the_checkpoint_before_stays(
    data: tuple[WorkingCopies, WorkingCopies], tmp_path: Path
) -> None:
    def work() -> None:
        with deterministic_torch(1), open_ranks("cpu") as alone:
            train(data, alone, tmp_path, settings(steps=2, eval_every=9))
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            try:
                train(data, alone, tmp_path, settings(steps=4, eval_every=9))
            except DiskFull as problem:
                os._exit(0 if "the checkpoint of step 2 is whole" in str(problem) else 1)
            os._exit(2)

    torch.set_num_threads(1)
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(120)
    assert child.exitcode == 0


def test_a_run_may_end_at_the_checkpoint_that_it_goes_on_from(
    data: tuple[WorkingCopies, WorkingCopies], ranks: Ranks, tmp_path: Path
) -> None:
    whole = train(data, ranks, tmp_path / "whole", settings(steps=2))
    train(data, ranks, tmp_path / "cut", settings(steps=4, eval_every=9))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    cut = train(data, ranks, tmp_path / "cut", settings(steps=2, eval_every=9))
    assert weights(cut[0]) == weights(whole[0])
    assert cut[1].history[-1]["psnr_db"] == whole[1].history[-1]["psnr_db"]
    assert MetricLog(tmp_path / "cut" / "metrics.jsonl").series("psnr_db")[0][-1] == 2


def test_no_rank_leaves_before_every_batch_that_diverged_is_saved(
    data: tuple[WorkingCopies, WorkingCopies], tmp_path: Path
) -> None:
    def work(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        store = dist.FileStore(str(tmp_path / "rendezvous"), 2)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
        real = trainer.save_state

        def slowly(path: Path, state: dict[str, object]) -> None:
            time.sleep(0.5 * rank)
            real(path, state)

        trainer.save_state = slowly  # type: ignore[assignment]
        broken = tiny()
        with torch.no_grad():
            broken.decoder.conv_out.bias[0] = float("inf")
        try:
            train(data, Ranks(rank, 2, torch.device("cpu")), tmp_path, settings(), broken)
        except TrainingDiverged:
            os._exit(0 if len(list(tmp_path.glob("diverged/step-00000001/rank*.pt"))) == 2 else 1)
        os._exit(2)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


def test_weight_decay_is_that_of_the_settings(data, ranks, tmp_path: Path) -> None:
    """AdamW decays apart from the gradient: w' = w'(0) - rate * decay * w, entry by entry."""
    rate, decay = 2e-3, 0.5
    before = tiny().state_dict()
    plain, decayed = (
        train(data, ranks, tmp_path / str(value), settings(steps=1, weight_decay=value))[0]
        for value in (0.0, decay)
    )
    trained = 0
    for name, weight in plain.decoder.named_parameters():
        start = before[f"decoder.{name}"]
        expected = weight.detach() - rate * decay * start
        after = decayed.decoder.get_parameter(name).detach()
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
        trained += not torch.equal(after, start)
    assert trained > 10
