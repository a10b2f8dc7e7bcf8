from __future__ import annotations

import shutil

import pandas as pd
import pytest
import torch

from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.dit.assembly import TrainingData, assemble_run, training_ids
from components.training.dit.batch_plan import PlanMismatch
from components.training.dit.job import StartUnusable
from components.training.dit.trainer import DitTrainer
from components.training.dit.worker import run_job
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import EMPTY_PROMPT_ID, TextStore


def test_a_slice_restricts_training_and_must_be_encoded(dit_corpus, tmp_path):
    index = LatentStore(dit_corpus / "latents").index
    path = tmp_path / "slice.parquet"
    pd.DataFrame({"image_id": ["image03", "image07"]}).to_parquet(path)
    assert set(training_ids(index, path)) == {"image03", "image07"}
    pd.DataFrame({"image_id": ["image03", "elsewhere"]}).to_parquet(path)
    with pytest.raises(ValueError, match="elsewhere"):
        training_ids(index, path)
    pd.DataFrame({"image_id": pd.Series([], dtype=str)}).to_parquet(path)
    with pytest.raises(ValueError, match="no training image"):
        training_ids(index, path)


def test_ranks_share_the_batch_that_one_process_would_train_on(make_dit_job, tmp_path):
    data = TrainingData.of(make_dit_job(tmp_path))
    cpu = torch.device("cpu")
    for step in range(3):
        alone = data.micro_batches(step, Ranks(0, 1, cpu))
        pair = [batch for rank in (0, 1) for batch in data.micro_batches(step, Ranks(rank, 2, cpu))]
        assert [batch.sample_ids for batch in pair] == [batch.sample_ids for batch in alone]
        for one, other in zip(alone, pair, strict=True):
            for name, tensor in one.tensors().items():
                assert torch.equal(tensor, other.tensors()[name])
        # Two ranks that share each sample (context parallelism) read the same ones.
        twins = [data.micro_batches(step, Ranks(rank, 2, cpu, context_degree=2)) for rank in (0, 1)]
        assert [b.sample_ids for b in twins[0]] == [b.sample_ids for b in twins[1]]
        assert [b.sample_ids for b in twins[0]] == [b.sample_ids for b in alone]


@pytest.mark.usefixtures("training_environment_restored")
def test_a_run_is_assembled_at_its_newest_checkpoint(make_dit_job, tmp_path, capsys):
    job = make_dit_job(tmp_path, steps=2)
    with deterministic_torch(1), open_ranks("cpu") as ranks:
        first = assemble_run(job, ranks)
        assert first.steps_done == 0
        DitTrainer(first).run()
        first.checkpoints.writer.close()
        capsys.readouterr()
        job.metrics.unlink()
        second = assemble_run(job, ranks)
        assert second.steps_done == 2
        assert "lacks the validation before step 1 and steps 1 to 2: " in capsys.readouterr().err
        expected = dict(first.average.whole_tensors())
        for name, tensor in second.average.whole_tensors():
            assert torch.equal(tensor, expected[name])
        other = job.model_copy(update={"seed": job.seed + 1})
        with pytest.raises(PlanMismatch, match="seed"):
            assemble_run(other, ranks)


def test_a_dropped_caption_is_the_empty_prompt_and_nothing_else_changes(
    make_dit_job, dit_corpus, tmp_path
):
    texts = TextStore(dit_corpus / "texts")
    empty = texts.read(EMPTY_PROMPT_ID)
    plain = TrainingData.of(make_dit_job(tmp_path))
    dropping = TrainingData.of(make_dit_job(tmp_path, caption_dropout=0.5))
    here = Ranks(0, 1, torch.device("cpu"))
    seen = {True: 0, False: 0}
    for step in range(8):
        pairs = zip(
            plain.micro_batches(step, here), dropping.micro_batches(step, here), strict=True
        )
        for before, after in pairs:
            assert after.sample_ids == before.sample_ids
            for name in ("latents", "noise", "t"):
                assert torch.equal(after.tensors()[name], before.tensors()[name])
            for text, pooled, name in zip(after.text, after.pooled, after.sample_ids, strict=True):
                is_empty = torch.equal(text, empty[0])
                expected = empty if is_empty else texts.read(name)
                assert torch.equal(text, expected[0])
                assert torch.equal(pooled, expected[1])
                seen[is_empty] += 1
    assert min(seen.values()) >= 5


def test_a_stage_trains_on_the_levels_of_its_shift_by_the_size_of_each_bucket(
    make_dit_job, tmp_path
):
    """The log-odds of every level are moved by mu: Flux' line at the tokens of its bucket."""
    here = Ranks(0, 1, torch.device("cpu"))
    plain = TrainingData.of(make_dit_job(tmp_path))
    options = {"timestep_shift": "dynamic", "sigma_table": "shifted", "sigma_range": [0.0, 1.0]}
    moved = TrainingData.of(make_dit_job(tmp_path, **options))
    tokens = set()
    for step in range(6):
        batches = (data.micro_batches(step, here) for data in (plain, moved))
        for before, after in zip(*batches, strict=True):
            height, width = before.latents.shape[-2:]
            tokens.add(count := height * width // 4)
            mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (count - 256)
            difference = torch.logit(after.t.double()) - torch.logit(before.t.double())
            torch.testing.assert_close(
                difference, torch.full_like(difference, mu), atol=1e-3, rtol=0
            )
    assert tokens == {16, 18}
    ends = {"sigma_range": [0.9, 1.0], "timestep_shift": 3.0}
    for table, low in (("unshifted", 0.9), ("shifted", 2.7 / 2.8)):
        data = TrainingData.of(make_dit_job(tmp_path, **ends, sigma_table=table))
        levels = torch.cat([b.t for step in range(8) for b in data.micro_batches(step, here)])
        assert low <= float(levels.min()) < low + 0.05


@pytest.mark.usefixtures("training_environment_restored")
def test_a_store_without_the_empty_prompt_trains_unless_captions_are_dropped(
    make_dit_job, dit_corpus, tmp_path
):
    folder = tmp_path / "texts"
    shutil.copytree(dit_corpus / "texts", folder)
    index = pd.read_parquet(folder / "index.parquet")
    index[index["image_id"] != EMPTY_PROMPT_ID].to_parquet(folder / "index.parquet")
    job = make_dit_job(tmp_path, steps=1).model_copy(update={"texts": folder})
    run_job(job)
    assert (job.export_dir / "raw" / "config.json").is_file()
    job = make_dit_job(tmp_path / "dropping", caption_dropout=0.1)
    with pytest.raises(
        StartUnusable, match=r"^dit_stage1\.caption_dropout 0\.1: .* no empty prompt"
    ):
        run_job(job.model_copy(update={"texts": folder}))


@pytest.mark.usefixtures("training_environment_restored")
def test_the_guidance_of_the_settings_reaches_every_pass_of_training_and_validation(
    make_dit_job, tmp_path
):
    seen = []
    with deterministic_torch(1), open_ranks("cpu") as ranks:
        parts = assemble_run(make_dit_job(tmp_path, steps=1, guidance_scale=3.5), ranks)

        def note(module, arguments, named):
            seen.append((module.training, set(named["guidance"].tolist())))

        parts.engine.module.register_forward_pre_hook(note, with_kwargs=True)
        DitTrainer(parts).run()
        parts.checkpoints.writer.close()
    assert {training for training, _ in seen} == {True, False}
    assert all(values == {3.5} for _, values in seen)
