"""Metrics over pictures, in worker processes, through the ledger.

Only what the ledger does not know is computed: a picture is read and decoded once for all of its
missing metrics, and what comes back is on disk before the next picture is handed out. A picture
that cannot be read, a metric that fails, a worker that dies or hangs cost one entry in `errors`;
errors are not kept, so the next run tries again.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.engine.ordered_pool import EngineLimits, Failure
from components.engine.worker_pool import WorkerPool
from components.evaluation.measuring.ledger import FeatureKey, Ledger, ValueKey, prompt_digest
from components.files.holder_locks import claim_first
from components.files.weight_folders import WeightsMissing
from components.files.whole_files import regular_bytes
from components.images.arrays import ImageArray
from components.images.colour_profiles import SRGB, UNTAGGED
from components.images.decoding import (
    MAX_MEGAPIXELS,
    SEEN,
    ImageHeader,
    ImageUndecodable,
    decode_rgb,
    is_plain,
    read_header,
)
from components.images.header_facts import UPRIGHT
from components.metrics.cards import card
from components.metrics.metric import ImageMetric, Metric, Picture, SetMetric, content_digest
from components.metrics.registry import open_metric
from components.telemetry.progress import track
from components.telemetry.rates import Throughput


@dataclass(frozen=True)
class RunOptions:
    """Where and how pictures are measured; none of it changes a value on one kind of device."""

    weights_dir: Path
    workers: int = 1
    devices: tuple[str, ...] = ("cpu",)
    """Such as ("cuda:0", "cuda:1"): one worker process on each; `workers` counts on CPUs only."""
    timeout_s: float = 600.0
    """Per picture, for all its metrics; loading weights counts against a worker's first."""
    memory_mb: int = 8192
    """Per worker above what it holds at the start; not applied on GPUs, whose drivers reserve
    address space freely."""
    retries: int = 1
    max_megapixels: float = MAX_MEGAPIXELS

    def limits(self) -> EngineLimits:
        """For the worker pool."""
        on_gpu = self.devices != ("cpu",)
        return EngineLimits(
            workers=len(self.devices) if on_gpu else self.workers,
            timeout_s=self.timeout_s,
            memory_mb=2**24 if on_gpu else self.memory_mb,
            retries=self.retries,
        )


@dataclass(frozen=True)
class OpenedMetrics:
    """What can be measured, and what cannot and why."""

    metrics: tuple[Metric, ...]
    unavailable: dict[str, str]
    """Metric id to one line, such as the command that gets its weights."""

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids that the opened metrics yield."""
        return tuple(metric_id for metric in self.metrics for metric_id in metric.ids)


@dataclass(frozen=True)
class Found:
    """A file as it is on disk."""

    path: Path
    sha256: str
    height: int = 0
    width: int = 0
    error: str | None = None
    """Why it is no picture."""
    reading: str = ""
    """See `Picture`."""
    kind: str = ""
    """What is not plain about it, such as "16-bit gray, EXIF orientation 6"."""

    @property
    def content(self) -> str:
        """See `Picture`."""
        return content_digest(self.sha256, self.reading)


@dataclass
class Measured:
    """One picture's numbers."""

    values: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    """Metric id to reason."""


@dataclass
class RunStatistics:
    """What a run had to do; the ledger did the rest."""

    pictures: int = 0
    decoded: int = 0
    """Pictures that were handed to a worker."""
    computed: int = 0
    """Values and blocks of features."""
    reused: int = 0


def open_metrics(metric_ids: Iterable[str], weights_dir: Path, device: str) -> OpenedMetrics:
    """Open each metric once; missing weights are listed, not raised.

    Raises:
        ValueError: an id that no card has.
    """
    opened: list[Metric] = []
    unavailable: dict[str, str] = {}
    for metric_id in dict.fromkeys(metric_ids):
        card(metric_id)
        if any(metric_id in metric.ids for metric in opened):
            continue
        try:
            opened.append(open_metric(metric_id, weights_dir, device))
        except (WeightsMissing, ValueError, ImportError) as problem:
            unavailable[metric_id] = " ".join(str(problem).split())
    return OpenedMetrics(tuple(opened), unavailable)


def find_picture(path: Path, max_megapixels: float = MAX_MEGAPIXELS) -> Found:
    """Digest and size of a file; its pixels are not decoded."""
    try:
        data = regular_bytes(path)
    except OSError as problem:
        return Found(path, "", error=f"{path.name}: {problem.strerror or problem}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        header = read_header(data, max_megapixels=max_megapixels)
    except ImageUndecodable as problem:
        return Found(path, digest, error=f"{path.name}: {problem}")
    plain = is_plain(header)
    kind = "" if plain and header.frames == 1 else _kind(header)
    reading = "" if plain else SEEN
    return Found(path, digest, header.height, header.width, reading=reading, kind=kind)


def _kind(header: ImageHeader) -> str:
    parts = [f"{header.bit_depth}-bit {header.mode}"]
    if header.has_alpha:
        parts.append("with transparency")
    if header.orientation != UPRIGHT:
        parts.append(f"EXIF orientation {header.orientation}")
    if header.color_space not in (SRGB, UNTAGGED):
        parts.append(f"colours of {header.color_space}")
    if header.frames > 1:
        parts.append(f"first of {header.frames} frames")
    return " ".join(parts)


def value_key(metric_id: str, picture: Picture, weights_digest: str | None) -> ValueKey:
    """The ledger's key: a reference or prompt counts only where the metric looks at it."""
    metric = card(metric_id)
    pair = metric.needs == "pair"
    prompted = metric.needs == "prompt and image"
    return ValueKey(
        image_sha256=picture.content,
        reference_sha256=(picture.reference_content or "") if pair else "",
        prompt_sha256=prompt_digest(picture.prompt or "") if prompted else "",
        metric=metric_id,
        protocol=metric.protocol,
        weights=weights_digest or "",
    )


def feature_key(metric: SetMetric, picture: Picture) -> FeatureKey:
    """The ledger's key of a picture's features."""
    return FeatureKey(picture.content, metric.feature_id, metric.weights_digest or "")


@dataclass(frozen=True)
class Job:
    """One picture and what is wanted of it."""

    picture: Picture
    metrics: tuple[int, ...]
    """Numbers of the opened metrics."""


JobKey = tuple[str, str | None, str | None]


def job_key(picture: Picture) -> JobKey:
    """What tells jobs apart: the same content under two names is one, another reference is not."""
    return picture.content, picture.reference_content, picture.prompt


@dataclass
class _Answer:
    """What a worker found."""

    values: dict[str, float | None] = field(default_factory=dict)
    features: dict[int, Any] = field(default_factory=dict)
    """By number of the metric; float32 (k, d)."""
    errors: dict[int, str] = field(default_factory=dict)


def _reason(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}".rstrip(": ")


class _Measure:
    """What a worker process does; opens each metric when a picture first needs it."""

    def __init__(self, names: Sequence[str], options: RunOptions, lock_dir: Path) -> None:
        self._names = tuple(names)
        self._options = options
        self._lock_dir = lock_dir
        self._device = "cpu"

    def prepare_worker(self) -> None:
        """Take a device that no other worker of this run has."""
        if self._options.devices == ("cpu",):
            return
        files = {
            self._lock_dir / f"{device.replace(':', '-')}.lock": device
            for device in self._options.devices
        }
        claimed = claim_first(files)
        if claimed is None:
            raise RuntimeError(f"every one of {', '.join(self._options.devices)} is taken")
        self._device = files[claimed]

    @functools.cached_property
    def _opened(self) -> dict[int, Metric]:
        return {}

    def _metric(self, number: int) -> Metric:
        if number not in self._opened:
            name, weights = self._names[number], self._options.weights_dir
            self._opened[number] = open_metric(name, weights, self._device)
        return self._opened[number]

    def __call__(self, job: Job) -> _Answer:
        """Everything that is missing of one picture."""
        answer = _Answer()
        picture = job.picture
        try:
            data = regular_bytes(picture.path)
            if hashlib.sha256(data).hexdigest() != picture.sha256:
                raise ImageUndecodable("the file changed while it was being evaluated")
            rgb = decode_rgb(data, max_megapixels=self._options.max_megapixels).pixels
            if picture.fitted is not None:
                rgb = _fitted(rgb, picture.fitted)
        except (OSError, ImageUndecodable) as problem:
            reason = f"{picture.path.name}: {problem}"
            answer.errors = dict.fromkeys(job.metrics, reason)
            return answer
        for number in job.metrics:
            try:
                self._one(number, rgb, picture, answer)
            except MemoryError:
                answer.errors[number] = f"more than {self._options.memory_mb} MiB needed"
            except Exception as problem:
                answer.errors[number] = _reason(problem)
        return answer

    def _one(self, number: int, rgb: ImageArray, picture: Picture, answer: _Answer) -> None:
        metric = self._metric(number)
        if isinstance(metric, SetMetric):
            answer.features[number] = metric.features(rgb, picture)
        else:
            answer.values |= metric.measure(rgb, picture)


def _fitted(rgb: ImageArray, size: tuple[int, int]) -> ImageArray:
    import numpy as np
    from PIL import Image

    from components.images.aspect_buckets import Bucket, fit_to_bucket

    return np.asarray(fit_to_bucket(Image.fromarray(rgb), Bucket(*size)))


class EvaluationRun:
    """Measures pictures with a fixed list of metrics.

    Args:
        opened: from `open_metrics`.
        ledger: where values come from and go to.
        options: see there.
    """

    def __init__(self, opened: OpenedMetrics, ledger: Ledger, options: RunOptions) -> None:
        self._opened = opened
        self._ledger = ledger
        self._options = options
        self.statistics = RunStatistics()

    def measure(
        self, pictures: Sequence[Picture], *, sets_only: Sequence[Picture] = (), name: str
    ) -> list[Measured]:
        """Measure what the ledger does not know.

        Args:
            pictures: measured with every metric.
            sets_only: only their features are wanted (reference pictures of set metrics).
            name: of the progress bar.

        Returns:
            one entry per picture of `pictures`, in order.

        Raises:
            LedgerConflict: two runs have kept different values of one key.
        """
        numbers = range(len(self._opened.metrics))
        set_numbers = [n for n in numbers if isinstance(self._opened.metrics[n], SetMetric)]
        wanted = [(picture, list(numbers)) for picture in pictures]
        wanted += [(picture, set_numbers) for picture in sets_only]
        known = self._ledger.find(key for p, ns in wanted for n in ns for key in self._keys(n, p))
        features = self._ledger.known_features(
            self._feature(n, p) for p, ns in wanted for n in ns if n in set_numbers
        )
        jobs: dict[JobKey, Job] = {}
        for picture, ns in wanted:
            missing = [n for n in ns if not self._is_known(n, picture, known, features)]
            self.statistics.reused += sum(
                1 if n in set_numbers else len(self._opened.metrics[n].ids)
                for n in ns
                if n not in missing
            )
            if missing:
                same = job_key(picture)
                before = jobs.get(same)
                together = sorted({*missing, *(before.metrics if before else ())})
                jobs[same] = Job(picture, tuple(together))
        errors = self._compute(list(jobs.values()), name)
        self.statistics.pictures += len(pictures)
        known |= self._ledger.find(
            key for p in pictures for n in numbers for key in self._keys(n, p)
        )
        return [self._measured(picture, known, errors) for picture in pictures]

    def combine(
        self,
        ours: Sequence[Picture],
        theirs: Sequence[Picture],
        fitted: Sequence[Picture] = (),
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Numbers of two sets, and reasons where there are none, by metric id.

        `fitted` are the references of metrics whose card `fits_references`.

        Pictures without features (unreadable ones) are left out of both sets; `measure` has said
        which.
        """
        import numpy as np

        values: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for metric in self._opened.metrics:
            if not isinstance(metric, SetMetric):
                continue
            sides = []
            fits = card(metric.ids[0]).fits_references
            for pictures in (ours, fitted if fits else theirs):
                keys = [feature_key(metric, picture) for picture in pictures]
                found = self._ledger.find_features(keys)
                blocks = [found[key] for key in keys if key in found]
                sides.append(np.concatenate(blocks) if blocks else None)
            if sides[0] is None or sides[1] is None:
                side = "system" if sides[0] is None else "reference"
                reasons |= dict.fromkeys(metric.ids, f"no {side} picture has features")
                continue
            try:
                values |= metric.combine(sides[0], sides[1])
            except ValueError as problem:
                reasons |= dict.fromkeys(metric.ids, str(problem))
        return values, reasons

    def _keys(self, number: int, picture: Picture) -> list[ValueKey]:
        metric = self._opened.metrics[number]
        if isinstance(metric, SetMetric):
            return []
        return [value_key(name, picture, metric.weights_digest) for name in metric.ids]

    def _feature(self, number: int, picture: Picture) -> FeatureKey:
        metric = self._opened.metrics[number]
        assert isinstance(metric, SetMetric)
        return feature_key(metric, picture)

    def _is_known(
        self,
        number: int,
        picture: Picture,
        known: Mapping[ValueKey, float | None],
        features: set[FeatureKey],
    ) -> bool:
        if isinstance(self._opened.metrics[number], SetMetric):
            return self._feature(number, picture) in features
        return all(key in known for key in self._keys(number, picture))

    def _compute(self, jobs: list[Job], name: str) -> dict[tuple[JobKey, int], str]:
        """Run the jobs; what they yield is in the ledger. Returns errors by metric."""
        errors: dict[tuple[JobKey, int], str] = {}
        if not jobs:
            return errors
        throughput = Throughput(pending=len(jobs))

        def keep(place: int, result: Any) -> None:
            job = jobs[place]
            self._keep(job, result, errors)
            failed = (job_key(job.picture), job.metrics[0]) in errors
            throughput.see({"error": "failed"} if failed else {})

        names = [metric.ids[0] for metric in self._opened.metrics]
        lock_dir = Path(os.environ.get("TMPDIR", "/tmp")) / f"ultraflux-devices-{os.getpid()}"
        options = replace(self._options, weights_dir=self._options.weights_dir.absolute())
        pool = WorkerPool(_Measure(names, options, lock_dir), options.limits())
        with closing(pool.map(jobs, keep)) as results:
            for _ in track(results, name, total=len(jobs), note=throughput.note):
                pass
        self.statistics.decoded += len(jobs)
        return errors

    def _keep(self, job: Job, result: Any, errors: dict[tuple[JobKey, int], str]) -> None:
        picture = job.picture
        if isinstance(result, Failure):
            errors |= {(job_key(picture), n): result.message for n in job.metrics}
            return
        answer: _Answer = result
        errors |= {(job_key(picture), n): text for n, text in answer.errors.items()}
        digests = {
            name: metric.weights_digest for metric in self._opened.metrics for name in metric.ids
        }
        self._ledger.append(
            {value_key(n, picture, digests[n]): value for n, value in answer.values.items()}
        )
        self._ledger.append_features(
            {self._feature(n, picture): block for n, block in answer.features.items()}
        )
        self.statistics.computed += len(answer.values) + len(answer.features)

    def _measured(
        self,
        picture: Picture,
        known: Mapping[ValueKey, float | None],
        errors: Mapping[tuple[JobKey, int], str],
    ) -> Measured:
        measured = Measured()
        for number, metric in enumerate(self._opened.metrics):
            reason = errors.get((job_key(picture), number))
            if reason is not None:
                measured.errors |= dict.fromkeys(metric.ids, reason)
            elif isinstance(metric, ImageMetric):
                for name, key in zip(metric.ids, self._keys(number, picture), strict=True):
                    measured.values[name] = known[key]
        return measured
