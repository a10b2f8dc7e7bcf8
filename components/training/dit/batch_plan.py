"""Which samples stand in which global batch: a pure function of (seed, step).

A global batch holds samples of one aspect-ratio bucket, so that they stack. Nothing is iterated:
any step can be asked for, hence a resumed run needs no more than its step number, and the plan does
not know how many processes there are.

Buckets are interleaved by stratified jitter: batch k of a bucket's n gets a random time in
[k / n, (k + 1) / n) of the epoch, and the epoch runs in the order of times. So every bucket is
spread over the whole epoch, unlike in a plain shuffle: two neighbours of one bucket are never more
than 2 / n apart, and a run of one bucket is no longer than 2 + 2 n / m for any other bucket of m.

An epoch walks every bucket at least `passes` times, where `passes` is the smallest number for
which even the smallest bucket fills one batch. A bucket of n samples reads from one endless
sequence, a fresh shuffle of all its samples per pass, and gives ceil(passes * n / batch size)
batches an epoch. So a bucket smaller than the batch repeats its samples evenly (counts within a
bucket differ by at most one), and no bucket is seen twice as often as its size deserves. In a
corpus whose buckets all fill a batch, `passes` is 1: the usual epoch.

Ids are kept as one array (`stores.sample_ids`), a bucket as row numbers into it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from components.training.stores.sample_ids import id_array

# Raised by whoever changes which samples meet at a step: a resumed run must notice.
PLAN_VERSION = 2
_SHOWN_BUCKETS = 5
# Distinguishes the two kinds of random stream made from the same seed and epoch.
_ORDER_STREAM, _SHUFFLE_STREAM = 0, 1

Integers = npt.NDArray[np.int64]
Ids = npt.NDArray[np.bytes_]


class PlanMismatch(ValueError):
    """A checkpoint was made under another plan; continuing would not repeat the same batches."""


@dataclass(frozen=True)
class PlanState:
    """What a checkpoint keeps of the plan."""

    seed: int
    step: int
    plan_version: int
    index_digest: str
    # Fields with a default came later; a checkpoint without them is read all the same.
    batch_size: int = 0
    """0: not recorded."""
    buckets: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    """[number of samples, digest of their ids] by bucket: enough to say what changed."""

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class GlobalBatch:
    """Samples of one optimizer step over all processes."""

    step: int
    bucket: str
    sample_ids: tuple[str, ...]
    occurrences: tuple[int, ...]
    """How often the sample stood earlier in this batch; tells repeats apart when noise is drawn."""

    def rank_slice(self, rank: int, world_size: int) -> GlobalBatch:
        """Contiguous share of process `rank` of `world_size`.

        Raises:
            ValueError: the batch does not divide by `world_size`, or there is no such rank.
        """
        total = len(self.sample_ids)
        # Uneven shares would weigh samples differently, since ZeRO averages over ranks.
        if total % world_size:
            raise ValueError(
                f"global_batch_size {total} must be a multiple of the {world_size} processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in [0, {world_size})")
        share = total // world_size
        return self._part(rank * share, (rank + 1) * share)

    def micro_batches(self, size: int) -> list[GlobalBatch]:
        """Consecutive parts of `size` samples (the last may be smaller)."""
        return [self._part(start, start + size) for start in range(0, len(self.sample_ids), size)]

    def _part(self, start: int, stop: int) -> GlobalBatch:
        return GlobalBatch(
            self.step, self.bucket, self.sample_ids[start:stop], self.occurrences[start:stop]
        )


def _digest(buckets: Mapping[str, Ids], batch_size: int) -> str:
    """SHA-256 of everything besides the seed that decides the batches."""
    digest = hashlib.sha256(f"batch_size={batch_size}\n".encode())
    for bucket, sample_ids in buckets.items():
        # The count stands before the ids, so that no id can pass for the next bucket's name.
        digest.update(f"{bucket}\t{len(sample_ids)}\n".encode())
        digest.update(_lines(sample_ids))
    return digest.hexdigest()


def _lines(sample_ids: Ids) -> bytes:
    return b"\n".join(sample_ids.tolist()) + b"\n"


def _grouped(bucket_of: Mapping[str, str]) -> dict[str, Ids]:
    """Sorted ids by bucket name, buckets sorted."""
    grouped: dict[str, list[str]] = {}
    for sample_id, bucket in bucket_of.items():
        grouped.setdefault(bucket, []).append(sample_id)
    # Python sorts a million strings in a fraction of the time that NumPy takes.
    return {bucket: id_array(sorted(grouped[bucket])) for bucket in sorted(grouped)}


def _changes(before: PlanState, after: PlanState) -> list[str]:
    """What differs between two plans, a sentence part each."""
    parts = []
    if before.batch_size and before.batch_size != after.batch_size:
        parts.append(f"global_batch_size {before.batch_size} is now {after.batch_size}")
    # Checkpoints of older versions kept the digest alone.
    if not before.buckets:
        return parts
    resized, replaced = [], []
    for bucket in sorted(before.buckets.keys() | after.buckets.keys()):
        (old, old_digest), (new, new_digest) = (
            plan.buckets.get(bucket, (0, "")) for plan in (before, after)
        )
        # Counts first: other ids in as many places are told by their digest only.
        if old != new:
            resized.append((bucket, int(old), int(new)))
        elif old_digest != new_digest:
            replaced.append(bucket)
    if resized:
        gone = sum(max(0, old - new) for _, old, new in resized)
        come = sum(max(0, new - old) for _, old, new in resized)
        shown = ", ".join(f"{name} {old} -> {new}" for name, old, new in resized[:_SHOWN_BUCKETS])
        more = f" and {len(resized) - _SHOWN_BUCKETS} more" * (len(resized) > _SHOWN_BUCKETS)
        parts.append(f"at least {come} samples came and {gone} went (bucket {shown}{more})")
    if replaced:
        shown = ", ".join(replaced[:_SHOWN_BUCKETS])
        parts.append(f"as many but other samples in bucket {shown}")
    return parts


def _occurrences(sample_ids: Sequence[str]) -> tuple[int, ...]:
    seen: dict[str, int] = {}
    counts = []
    for sample_id in sample_ids:
        # Position in the global batch decides, not in a rank's share: noise is the same on any
        # split.
        counts.append(seen.get(sample_id, 0))
        seen[sample_id] = counts[-1] + 1
    return tuple(counts)


class BatchPlan:
    """The plan over one index of samples."""

    def __init__(self, bucket_of: Mapping[str, str], batch_size: int, seed: int) -> None:
        """Plan over `bucket_of`.

        Args:
            bucket_of: bucket name by sample id; the order does not matter.
            batch_size: samples in a global batch.
            seed: at least 0; other seeds give other orders.

        Raises:
            ValueError: no samples, or a batch size below 1.
        """
        if not bucket_of:
            raise ValueError("batch plan: there is no sample to plan over")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self._samples = _grouped(bucket_of)
        self._names = list(self._samples)
        self.batch_size = batch_size
        self.seed = seed
        self.index_digest = _digest(self._samples, batch_size)
        # So many walks that the smallest bucket fills a batch; see the module's description.
        smallest = min(len(sample_ids) for sample_ids in self._samples.values())
        self.passes = math.ceil(batch_size / smallest)
        self._batches_of = np.array(
            [math.ceil(self.passes * len(ids) / batch_size) for ids in self._samples.values()]
        )
        self.steps_per_epoch = int(self._batches_of.sum())
        # Bound to the instance so that plans do not share (or outlive in) a module-level cache.
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)
        self._shuffle = lru_cache(maxsize=64)(self._make_shuffle)

    def __len__(self) -> int:
        """Number of different samples."""
        return sum(len(ids) for ids in self._samples.values())

    @property
    def sample_ids(self) -> list[str]:
        """All samples, sorted."""
        return sorted(one.decode() for ids in self._samples.values() for one in ids.tolist())

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step` (0 is the first).

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} must be at least 0")
        # Nothing is carried from step to step: a resumed run asks for its step directly.
        epoch, position = divmod(step, self.steps_per_epoch)
        order, visits = self._epoch_order(epoch)
        bucket = int(order[position])
        sample_ids = self._window(epoch, bucket, int(visits[position]))
        return GlobalBatch(step, self._names[bucket], sample_ids, _occurrences(sample_ids))

    def state(self, step: int) -> PlanState:
        """State to store in a checkpoint written after `step` steps."""
        buckets: dict[str, Sequence[int | str]] = {
            # Shortened: it only has to tell two states of one bucket apart, and stands in every
            # checkpoint.
            bucket: [len(ids), hashlib.sha256(_lines(ids)).hexdigest()[:16]]
            for bucket, ids in self._samples.items()
        }
        return PlanState(self.seed, step, PLAN_VERSION, self.index_digest, self.batch_size, buckets)

    def check(self, state: PlanState) -> None:
        """Make sure that `state` belongs to this plan.

        Raises:
            PlanMismatch: seed, plan version or index differ; the message says which and what to do.
        """
        remedy = "start a new run, or restore what the checkpoint was trained on"
        # First, because the meaning of the other fields depends on it.
        if state.plan_version != PLAN_VERSION:
            raise PlanMismatch(
                f"checkpoint at step {state.step} follows batch plan version "
                f"{state.plan_version}, this code has version {PLAN_VERSION}: {remedy}"
            )
        if state.seed != self.seed:
            raise PlanMismatch(
                f"checkpoint at step {state.step} was trained with seed {state.seed}, "
                f"the settings say {self.seed}: {remedy}"
            )
        if state.index_digest != self.index_digest:
            changes = _changes(state, self.state(state.step))
            raise PlanMismatch(
                f"checkpoint at step {state.step} was trained on another set of samples, buckets "
                f"or global batch size (index {state.index_digest[:12]}, now "
                f"{self.index_digest[:12]}){''.join(f'; {part}' for part in changes)}: {remedy}"
            )

    def _rng(self, *key: int) -> np.random.Generator:
        # SeedSequence hashes its key: neighbouring seeds, epochs and walks give unrelated streams.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *key])))

    def _make_epoch_order(self, epoch: int) -> tuple[Integers, Integers]:
        """(bucket of every step of the epoch, how often that bucket came before in the epoch)."""
        buckets: Integers = np.repeat(np.arange(len(self._names)), self._batches_of)
        first_of = np.concatenate([[0], np.cumsum(self._batches_of)[:-1]])
        # Counts 0, 1, 2, ... within each bucket's run of equal entries.
        visits: Integers = np.arange(len(buckets)) - np.repeat(first_of, self._batches_of)
        # One number for every batch, in bucket order, so that the draw does not depend on the
        # result.
        jitter = self._rng(_ORDER_STREAM, epoch).random(len(buckets))
        # Stable, so that equal times fall alike on every platform.
        order = np.argsort((visits + jitter) / self._batches_of[buckets], kind="stable")
        return buckets[order], visits[order]

    def _make_shuffle(self, epoch: int, bucket: int, walk: int) -> Integers:
        # Epoch and walk in the key: walk 0 of the next epoch is another shuffle.
        size = len(self._samples[self._names[bucket]])
        return self._rng(_SHUFFLE_STREAM, epoch, bucket, walk).permutation(size)

    def _window(self, epoch: int, bucket: int, visit: int) -> tuple[str, ...]:
        """Batch `visit` of the bucket's endless sequence: a fresh shuffle per walk over it."""
        samples = self._samples[self._names[bucket]]
        # A batch may end one walk over the bucket and begin the next.
        places = range(visit * self.batch_size, (visit + 1) * self.batch_size)
        return tuple(
            samples[
                self._shuffle(epoch, bucket, place // len(samples))[place % len(samples)]
            ].decode()
            for place in places
        )
