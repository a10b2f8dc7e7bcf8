from __future__ import annotations

import json
from collections import Counter
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.training.dit.batch_plan import PLAN_VERSION, BatchPlan, PlanMismatch, PlanState
from components.training.dit.curriculum import NoiseLevels, draw_noise

corpora = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda sizes: {f"{b}-{i}": f"bucket{b}" for b, size in enumerate(sizes) for i in range(size)}
)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 16), st.integers(0, 2**31 - 1), st.integers(0, 10_000))
def test_every_batch_is_full_and_of_one_bucket(corpus, batch_size, seed, step):
    batch = BatchPlan(corpus, batch_size, seed).batch(step)
    assert len(batch.sample_ids) == batch_size
    assert {corpus[sample_id] for sample_id in batch.sample_ids} == {batch.bucket}


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 16), st.integers(0, 1000), st.integers(0, 3))
def test_an_epoch_shows_every_sample_and_is_even_within_a_bucket(corpus, batch_size, seed, epoch):
    plan = BatchPlan(corpus, batch_size, seed)
    first = epoch * plan.steps_per_epoch
    seen = Counter(
        sample_id
        for step in range(first, first + plan.steps_per_epoch)
        for sample_id in plan.batch(step).sample_ids
    )
    for bucket in set(corpus.values()):
        counts = [seen[sample_id] for sample_id in corpus if corpus[sample_id] == bucket]
        assert min(counts) >= plan.passes
        assert max(counts) - min(counts) <= 1
        assert sum(counts) < 2 * plan.passes * len(counts)


@settings(max_examples=40, deadline=None)
@given(corpora, st.integers(1, 12), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_any_step_in_any_order_equals_walking_the_steps(corpus, batch_size, steps):
    walked = BatchPlan(corpus, batch_size, seed=3)
    expected = [walked.batch(step) for step in sorted(steps)]
    jumped = {step: BatchPlan(corpus, batch_size, seed=3).batch(step) for step in steps}
    assert [jumped[step] for step in sorted(steps)] == expected


@settings(max_examples=40, deadline=None)
@given(corpora, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(0, 300))
def test_ranks_and_micro_batches_put_together_are_the_global_batch(corpus, world, micro, step):
    batch = BatchPlan(corpus, batch_size=12, seed=1).batch(step)
    parts = [
        part for rank in range(world) for part in batch.rank_slice(rank, world).micro_batches(micro)
    ]
    assert sum((part.sample_ids for part in parts), ()) == batch.sample_ids
    assert sum((part.occurrences for part in parts), ()) == batch.occurrences


def test_large_buckets_are_walked_once_per_epoch():
    corpus = {f"{b}{i}": b for b, size in (("a", 64), ("b", 32)) for i in range(size)}
    plan = BatchPlan(corpus, batch_size=8, seed=0)
    assert plan.passes == 1
    assert plan.steps_per_epoch == 12
    ids = [sample for step in range(12) for sample in plan.batch(step).sample_ids]
    assert sorted(ids) == sorted(corpus)


def test_buckets_are_interleaved_and_epochs_differ():
    corpus = {f"{b}{i}": b for b in "abcd" for i in range(64)}
    plan = BatchPlan(corpus, batch_size=8, seed=0)
    epochs = [
        [plan.batch(e * plan.steps_per_epoch + s) for s in range(plan.steps_per_epoch)]
        for e in range(2)
    ]
    order = [[batch.bucket for batch in epoch] for epoch in epochs]
    assert order[0] != sorted(order[0])
    assert order[0] != order[1]
    by_epoch = [{batch.sample_ids for batch in epoch} for epoch in epochs]
    assert not by_epoch[0] & by_epoch[1]


def test_a_lone_sample_fills_its_batch_with_counted_repeats():
    plan = BatchPlan({"only": "bucket"}, batch_size=4, seed=0)
    assert plan.batch(7).sample_ids == ("only",) * 4
    assert plan.batch(7).occurrences == (0, 1, 2, 3)


def test_input_order_does_not_matter():
    corpus = {f"s{i}": f"b{i % 3}" for i in range(20)}
    backwards = dict(reversed(corpus.items()))
    one, other = BatchPlan(corpus, 4, 9), BatchPlan(backwards, 4, 9)
    assert one.index_digest == other.index_digest
    assert [one.batch(s) for s in range(30)] == [other.batch(s) for s in range(30)]


def test_a_matching_state_is_accepted_and_round_trips():
    plan = BatchPlan({"a": "x", "b": "x"}, 2, 5)
    plan.check(PlanState(**plan.state(17).as_dict()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index_digest": "0" * 64}, "another set of samples"),
        ({"seed": 6}, "seed 6"),
        ({"plan_version": PLAN_VERSION + 1}, "batch plan version"),
    ],
)
def test_a_changed_plan_is_refused_with_the_reason(change, words):
    plan = BatchPlan({"a": "x", "b": "x"}, 2, 5)
    with pytest.raises(PlanMismatch, match=words):
        plan.check(PlanState(**{**plan.state(17).as_dict(), **change}))


@pytest.mark.parametrize(
    "changed", [{"a": "x", "b": "y"}, {"a": "x"}, {"a": "x", "b": "x", "c": "x"}]
)
def test_moved_removed_and_added_samples_change_the_index_digest(changed):
    plan = BatchPlan({"a": "x", "b": "x"}, 2, 5)
    assert BatchPlan(changed, 2, 5).index_digest != plan.index_digest


def test_a_batch_that_does_not_divide_by_the_processes_is_refused():
    batch = BatchPlan({"a": "x"}, 4, 0).batch(0)
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        batch.rank_slice(0, 3)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        BatchPlan({}, 4, 0)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 16), st.integers(0, 1000), st.integers(0, 2))
def test_no_bucket_runs_longer_than_its_share_demands(corpus, batch_size, seed, epoch):
    plan = BatchPlan(corpus, batch_size, seed)
    first = epoch * plan.steps_per_epoch
    order = [plan.batch(first + step).bucket for step in range(plan.steps_per_epoch)]
    batches = Counter(order)
    for bucket, run in groupby(order):
        others = [count for name, count in batches.items() if name != bucket]
        if others:
            assert len(list(run)) <= 2 + 2 * batches[bucket] / max(others)


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 16), st.integers(0, 1000))
def test_every_part_of_an_epoch_has_its_share_of_every_bucket(corpus, batch_size, seed):
    plan = BatchPlan(corpus, batch_size, seed)
    order = [plan.batch(step).bucket for step in range(plan.steps_per_epoch)]
    totals = Counter(order)
    for stop in range(1, len(order) + 1):
        seen = Counter(order[:stop])
        # Every bucket is at most one batch off its schedule, and so is the clock per bucket.
        for bucket, total in totals.items():
            assert abs(seen[bucket] - total * stop / len(order)) <= 1 + len(totals)


@settings(max_examples=30, deadline=None)
@given(corpora, st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 300))
def test_noise_belongs_to_the_sample_not_to_the_rank(corpus, world, step):
    batch = BatchPlan(corpus, batch_size=12, seed=1).batch(step)

    def noise(part):
        return draw_noise(
            5, step, part.sample_ids, part.occurrences, (1, 2, 2), NoiseLevels("logit_normal")
        )

    whole = noise(batch)
    parts = [noise(batch.rank_slice(rank, world)) for rank in range(world)]
    assert torch.equal(torch.cat([n for n, _ in parts]), whole[0])
    assert torch.equal(torch.cat([t for _, t in parts]), whole[1])


def test_a_far_step_draws_one_epoch_order_and_the_shuffles_of_one_bucket(monkeypatch):
    plan = BatchPlan({f"{i:04d}": f"bucket{i % 7}" for i in range(2000)}, 64, 0)
    drawn = []
    real = BatchPlan._rng

    def counted(self, *key):
        drawn.append(key)
        return real(self, *key)

    monkeypatch.setattr(BatchPlan, "_rng", counted)
    step = 10**7
    plan.batch(step)
    # Keys are (stream, epoch[, bucket, walk]).
    assert {key[1] for key in drawn} == {step // plan.steps_per_epoch}
    assert len([key for key in drawn if len(key) == 2]) == 1
    assert len({key[2] for key in drawn if len(key) == 4}) == 1
    assert len(drawn) <= 3


CORPUS = {f"{b}{i}": b for b, size in (("wide", 6), ("tall", 4)) for i in range(size)}


@pytest.mark.parametrize(
    ("changed", "batch_size", "words"),
    [
        ({**CORPUS, "wide6": "wide", "new": "square"}, 2, "at least 2 samples came and 0 went"),
        ({**CORPUS, "wide6": "wide"}, 2, r"bucket wide 6 -> 7"),
        ({k: v for k, v in CORPUS.items() if v == "wide"}, 2, r"0 samples came and 4 went.*tall"),
        ({**CORPUS, "wide5": "tall"}, 2, r"tall 4 -> 5, wide 6 -> 5"),
        ({k.replace("tall3", "other"): v for k, v in CORPUS.items()}, 2, "other samples in .*tall"),
        (CORPUS, 5, "global_batch_size 2 is now 5"),
    ],
)
def test_a_refused_checkpoint_says_what_changed(changed, batch_size, words):
    state = PlanState(**json.loads(json.dumps(BatchPlan(CORPUS, 2, 0).state(9).as_dict())))
    with pytest.raises(PlanMismatch, match=words):
        BatchPlan(changed, batch_size, 0).check(state)


def test_a_state_without_counts_is_still_refused():
    plan = BatchPlan(CORPUS, 2, 0)
    with pytest.raises(PlanMismatch, match="another set of samples"):
        plan.check(PlanState(0, 3, PLAN_VERSION, "0" * 64))
