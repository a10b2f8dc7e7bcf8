"""Ways to sample faster or in fewer bits, each against the exact picture.

A way is one of `WAYS`, several joined by +, with a number where it takes one:

    int8, fp8, nf4             weights of the transformer's blocks
    flash, flash_3, cudnn      attention back ends that differ by rounding
    sage                       8-bit queries and keys
    first_block:0.05           threshold
    taylorseer:5               interval
    compile                    compiled blocks

The exact picture is that of the same weights, seed and precision with all of these off. Where a way
cannot run, its row says why.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from components.evaluation.suites.runtime_suite import clear_peak, peak_bytes
from components.evaluation.suites.suites import SuiteItem
from components.files.weight_folders import WeightsMissing
from components.metrics.native.fidelity import psnr_db, ssim
from components.models.loading.sampling_speed import SamplingSpeed, counted_blocks
from components.settings.models import Quantisation

if TYPE_CHECKING:
    from PIL import Image

    from components.images.arrays import ImageArray

Kind = Literal["exact", "rounding", "approximate"]
EXACT = "exact"
WAYS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "int8": ("approximate", {"quantisation": "int8"}),
    "fp8": ("approximate", {"quantisation": "fp8"}),
    "nf4": ("approximate", {"quantisation": "nf4"}),
    "flash": ("rounding", {"attention_backend": "flash"}),
    "flash_3": ("rounding", {"attention_backend": "flash_3"}),
    "cudnn": ("rounding", {"attention_backend": "cudnn"}),
    "sage": ("approximate", {"attention_backend": "sage"}),
    "first_block": ("approximate", {"step_cache": "first_block"}),
    "taylorseer": ("approximate", {"step_cache": "taylorseer"}),
    "compile": ("rounding", {"compile": "blocks"}),
}
_NUMBERS: dict[str, tuple[str, Callable[[str], float]]] = {
    "first_block": ("step_cache_threshold", float),
    "taylorseer": ("step_cache_interval", int),
}


@dataclass(frozen=True)
class Way:
    """How a picture is made."""

    name: str
    """As it was typed."""
    kind: Kind
    """What is known of it before anything is measured."""
    speed: SamplingSpeed = field(default_factory=SamplingSpeed)
    quantisation: Quantisation = "none"


def parse_way(text: str) -> Way:
    """The way of "first_block:0.1+fp8".

    Raises:
        ValueError: an unknown part, a number out of its range, or two parts for one thing.
    """
    from components.settings.evaluation import GenerateSettings

    changes: dict[str, Any] = {}
    kinds: set[Kind] = set()
    for part in text.split("+"):
        name, _, number = part.strip().partition(":")
        if name not in WAYS:
            raise ValueError(f"--way {text}: {name!r} is none of {', '.join(WAYS)}")
        kind, values = WAYS[name]
        if set(values) & set(changes):
            raise ValueError(f"--way {text}: {name} and another part say the same thing; keep one")
        kinds.add(kind)
        changes |= values
        if not number:
            continue
        if name not in _NUMBERS:
            raise ValueError(f"--way {text}: {name} takes no number")
        setting, read = _NUMBERS[name]
        low, high = _bounds(GenerateSettings.model_fields[setting].metadata)
        try:
            value = read(number)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"--way {text}: {number} is not from {low:g} to {high:g}")
        changes[setting] = value
    quantisation = changes.pop("quantisation", "none")
    kind = "approximate" if "approximate" in kinds else "rounding"
    return Way(text, kind, SamplingSpeed(**changes), quantisation)


def _bounds(metadata: Iterable[Any]) -> tuple[float, float]:
    """Lowest and highest value of a field of the settings."""
    low, high = -math.inf, math.inf
    for one in metadata:
        low = getattr(one, "ge", getattr(one, "gt", low))
        high = getattr(one, "le", getattr(one, "lt", high))
    return low, high


@dataclass(frozen=True)
class WayResult:
    """One way at one size, over all prompts."""

    way: str
    kind: Kind
    height: int
    width: int
    psnr_db: tuple[float, ...] = ()
    """Of each picture against the exact one; infinite where equal."""
    ssim: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    """Of each picture, in the prompts' order."""
    blocks_computed: int = 0
    blocks_total: int = 0
    peak_bytes: int = 0
    """While the pictures were made, as in `Timing`."""
    error: str | None = None
    """Why nothing was measured."""

    @property
    def size(self) -> str:
        """As width x height."""
        return f"{self.width}x{self.height}"

    @property
    def equal(self) -> int:
        """Pictures without any difference."""
        return sum(math.isinf(value) for value in self.psnr_db)

    @property
    def psnr_worst_db(self) -> float:
        """Lowest; infinite where all are equal, NaN where none was made."""
        return min(self.psnr_db, default=math.nan)

    @property
    def psnr_mean_db(self) -> float:
        """Of the pictures that differ; infinite where all are equal, NaN where none was made."""
        finite = [value for value in self.psnr_db if math.isfinite(value)]
        if finite:
            return statistics.fmean(finite)
        return math.inf if self.psnr_db else math.nan

    def metrics(self) -> dict[str, float]:
        """What JSON can hold, by name."""
        found = {
            "psnr_worst_db": self.psnr_worst_db,
            "psnr_mean_db": self.psnr_mean_db,
            "ssim_worst": min(self.ssim, default=math.nan),
            "ssim_mean": statistics.fmean(self.ssim) if self.ssim else math.nan,
            "seconds_per_image": statistics.median(self.seconds) if self.seconds else math.nan,
            "blocks_computed": float(self.blocks_computed),
            "blocks_total": float(self.blocks_total),
            "peak_gib": self.peak_bytes / 2**30,
            "equal": float(self.equal),
            "n": float(len(self.psnr_db)),
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}


class Variable(Protocol):
    """A system whose ways can be switched on."""

    @property
    def name(self) -> str:
        """As in tables."""
        ...

    def painter_in(
        self, speed: SamplingSpeed, quantisation: Quantisation
    ) -> tuple[Callable[[SuiteItem], Image.Image], Any]:
        """What makes one picture, and the transformer that it uses.

        Raises:
            WeightsMissing: a part is not there.
            ValueError: the way cannot run here.
        """
        ...


def measure_ways(
    system: Variable, ways: Sequence[Way], items: Sequence[SuiteItem], *, device: str
) -> list[WayResult]:
    """Every way at every size of the items; the first rows are the exact pictures.

    A picture that is not counted goes before the others of a size: compilation and first
    allocations are its.

    Raises:
        WeightsMissing: the system has no weights.
        ValueError: the exact pictures cannot be made.
    """
    expected: dict[str, ImageArray] = {}
    results = [*_measured(system, Way(EXACT, "exact"), items, expected, device)]
    failed = next((one for one in results if one.error is not None), None)
    if failed is not None:
        raise ValueError(f"{system.name}: the exact picture at {failed.size}: {failed.error}")
    for way in ways:
        results += _measured(system, way, items, expected, device)
    return results


def _measured(
    system: Variable,
    way: Way,
    items: Sequence[SuiteItem],
    expected: dict[str, ImageArray],
    device: str,
) -> Iterator[WayResult]:
    """One result for each size; fills `expected` where the way is the exact one."""
    sizes = dict.fromkeys((item.height, item.width) for item in items)
    nothing = [WayResult(way.name, way.kind, *size) for size in sizes]
    try:
        paint, transformer = system.painter_in(way.speed, way.quantisation)
    except WeightsMissing:
        raise
    except (ValueError, RuntimeError) as problem:
        yield from (replace(one, error=_one_line(problem)) for one in nothing)
        return
    for one in nothing:
        wanted = [item for item in items if (item.height, item.width) == (one.height, one.width)]
        try:
            yield _painted(one, paint, transformer, wanted, expected, device)
        except (ValueError, RuntimeError, MemoryError) as problem:
            # Also torch's out-of-memory errors; another size may still fit.
            yield replace(one, error=_one_line(problem))
    del paint, transformer
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def _painted(
    row: WayResult,
    paint: Callable[[SuiteItem], Image.Image],
    transformer: Any,
    items: Sequence[SuiteItem],
    expected: dict[str, ImageArray],
    device: str,
) -> WayResult:
    paint(items[0])
    clear_peak(device)
    psnrs, ssims, seconds = [], [], []
    with counted_blocks(transformer) as count:
        for item in items:
            begin = time.perf_counter()
            # Reading its pixels waits for the device.
            picture = np.asarray(paint(item).convert("RGB"))
            seconds.append(time.perf_counter() - begin)
            reference = expected.setdefault(item.id, picture)
            psnrs.append(psnr_db(reference, picture))
            ssims.append(ssim(reference, picture))
    return replace(
        row,
        psnr_db=tuple(psnrs),
        ssim=tuple(ssims),
        seconds=tuple(seconds),
        blocks_computed=count.computed,
        blocks_total=count.total,
        peak_bytes=peak_bytes(device),
    )


def ways_metrics(system: str, results: Sequence[WayResult]) -> dict[str, float]:
    """`<system>.<way>.<width>x<height>.<number>` of all that was measured."""
    return {
        f"{system}.{one.way}.{one.size}.{name}": value
        for one in results
        if one.error is None
        for name, value in one.metrics().items()
    }
