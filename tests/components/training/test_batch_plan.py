from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.training.batch_plan import PLAN_VERSION, BatchPlan, PlanMismatch, PlanState

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


def test_a_million_samples_are_planned_quickly():
    import time

    corpus = {f"{i:07d}": f"bucket{i % 21}" for i in range(300_000)}
    plan = BatchPlan(corpus, 64, 0)
    start = time.perf_counter()
    plan.batch(123_456)
    assert time.perf_counter() - start < 1.0
