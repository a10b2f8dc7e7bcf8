from __future__ import annotations

import pandas as pd
import pytest
import torch

from components.training.distributed.ranks import Ranks, deterministic_torch, open_ranks
from components.training.dit.assembly import TrainingData, assemble_run, training_ids
from components.training.dit.batch_plan import PlanMismatch
from components.training.dit.trainer import DitTrainer
from components.training.stores.latent_store import LatentStore


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
def test_a_run_is_assembled_at_its_newest_checkpoint(make_dit_job, tmp_path):
    job = make_dit_job(tmp_path, steps=2)
    with deterministic_torch(1), open_ranks("cpu") as ranks:
        first = assemble_run(job, ranks)
        assert first.steps_done == 0
        DitTrainer(first).run()
        first.checkpoints.writer.close()
        second = assemble_run(job, ranks)
        assert second.steps_done == 2
        expected = dict(first.average.whole_tensors())
        for name, tensor in second.average.whole_tensors():
            assert torch.equal(tensor, expected[name])
        other = job.model_copy(update={"seed": job.seed + 1})
        with pytest.raises(PlanMismatch, match="seed"):
            assemble_run(other, ranks)
