"""What training learned arrives, or the hand-over says so and stops."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from components.training.distributed.checkpoint_folders import CONTENTS_FILE
from components.training.distributed.checkpoint_hashes import file_hash
from components.training.distributed.ranks import Ranks
from components.training.dit.worker import run_job
from components.training.sharded.hand_over import (
    MOVEMENT_FILE,
    HandOver,
    LearningLost,
    MasterSample,
    compared,
    movement,
    noted_hand_overs,
)
from components.training.sharded.weight_shards import WeightShard

pytestmark = pytest.mark.usefixtures("training_environment_restored")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_the_share_kept_is_one_less_the_error_over_the_movement():
    start = {"a": torch.zeros(4), "b": torch.zeros(2)}
    learned = {"a": torch.full((4,), 3.0), "b": torch.zeros(2)}
    squares = movement(learned, start)
    assert squares == {"a": 36.0, "b": 0.0}
    arrived = {"a": torch.tensor([3.0, 3.0, 3.0, 0.0]), "b": torch.zeros(2)}
    hand_over = compared("load", learned.items(), arrived.__getitem__, squares)
    assert (hand_over.moved, hand_over.error, hand_over.kept) == (6.0, 3.0, 0.5)
    hand_over.check(0.5, "dit_stage2")
    with pytest.raises(LearningLost, match=r"dit_stage2: load keeps 50.0% .* \(at least 51.0%"):
        hand_over.check(0.51, "dit_stage2")


@pytest.mark.parametrize(
    ("moved", "error", "kept"),
    [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 2.0, 0.0), (1.0, math.nan, 0.0), (2.0, 0.0, 1.0)],
)
def test_the_share_kept_is_a_share(moved, error, kept):
    assert HandOver("load", moved, error).kept == kept


def test_bfloat16_gives_back_what_a_small_learning_rate_moved():
    generator = torch.Generator().manual_seed(0)
    start = {"a": (0.03 * torch.randn(10_000, generator=generator)).bfloat16().float()}
    learned = {"a": start["a"] + 2e-5 * torch.randn(10_000, generator=generator)}
    squares = movement(learned, start)
    rounded = compared(
        "quantisation", learned.items(), lambda name: learned[name].bfloat16(), squares
    )
    assert rounded.kept < 0.25


@given(size=st.integers(1, 500), cuts=st.lists(st.floats(0, 1), max_size=4))
def test_shares_of_any_cut_sample_the_same_places(size, cuts):
    whole = torch.arange(size, dtype=torch.float32)
    bounds = [0, *sorted(int(cut * size) for cut in cuts), size]
    sampled = {}
    for start, stop in itertools.pairwise(bounds):
        shard = WeightShard("w", (size,), start, whole[start:stop])
        sample = MasterSample(lambda shard=shard: [shard], Ranks(0, 1, torch.device("cpu")))
        first, values = sample.take()["w"]
        sampled |= dict(enumerate(values.tolist(), first)) if len(values) else {}
    # Every n-th element from the first on, n the 64th part.
    stride = max(1, size // 64)
    assert sampled == dict(enumerate(range(0, size, stride)))


def shares(job):
    return [(h.where, h.kept) for h in noted_hand_overs(job.state_dir)]


def test_a_stage_hands_its_movement_to_the_next_and_a_rounded_file_is_refused(
    make_dit_job, tmp_path
):
    first = make_dit_job(tmp_path / "first", steps=2, learning_rate=1e-6)
    run_job(first)
    assert shares(first) == [("export", 1.0), ("export", 1.0)]
    folder = first.export_dir / "ema"
    squares = json.loads((folder / MOVEMENT_FILE).read_text())["squares"]
    # Two AdamW steps of 5e-7 and 1e-6 (warm-up), averaged: no weight moved further.
    weights = load_file(folder / WEIGHTS)
    assert all(squares[name] <= weights[name].numel() * 1.6e-6**2 for name in squares)
    assert sum(squares.values()) > 0

    def second(name, **changes):
        job = make_dit_job(tmp_path / name, steps=2, learning_rate=1e-6, **changes)
        return job.model_copy(update={"initial_weights": folder})

    run_job(second("second"))
    assert shares(second("second"))[0] == ("load", 1.0)
    # Gone on after its last step: nothing but the resume and the export.
    run_job(second("second"))
    assert shares(second("second"))[3:] == [("resume", 1.0), ("export", 1.0), ("export", 1.0)]

    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / WEIGHTS)
    with pytest.raises(LearningLost, match=r"dit_stage1: load keeps 0\.0%"):
        run_job(second("third"))
    run_job(second("third", min_kept_movement=0.0))


def test_a_resume_from_rounded_masters_is_refused(make_dit_job, tmp_path):
    job = make_dit_job(tmp_path, steps=2, learning_rate=1e-6)
    run_job(job)
    (file,) = (job.state_dir / "checkpoints" / "step-00000002").rglob("*optim_states.pt")
    from components.training.sharded.engine_snapshot import read_state, write_state

    state = read_state(file)
    masters = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    for master in masters:
        master.copy_(master.bfloat16().float())
    write_state(state, file)
    # As code that rounds would have written it.
    contents = file.parents[1] / CONTENTS_FILE
    text = contents.read_text(encoding="utf-8")
    kept = json.loads(text)["xxh64"][f"engine/{file.name}"]
    contents.write_text(text.replace(kept, file_hash(file)), encoding="utf-8")
    with pytest.raises(LearningLost, match="dit_stage1: resume keeps"):
        run_job(job)


def test_a_merged_adapter_is_base_and_product(make_dit_job, tmp_path):
    # From trained weights: the tiny transformer begins with an output of zero, and teaches nothing.
    first = make_dit_job(tmp_path / "first", steps=2)
    run_job(first)
    adapter = {"rank": 2, "alpha": 4, "target_modules": ["to_q", "to_v"]}
    job = make_dit_job(tmp_path / "second", steps=2, adapter=adapter)
    job = job.model_copy(update={"initial_weights": first.export_dir / "raw"})
    run_job(job)
    (raw, ema) = noted_hand_overs(job.state_dir)
    assert raw.where == ema.where == "merge"
    assert raw.moved > ema.moved > 0
    assert min(raw.kept, ema.kept) > 0.999
