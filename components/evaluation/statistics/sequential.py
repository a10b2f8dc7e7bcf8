"""Stopping an evaluation as soon as one metric decides, at a false-positive rate that still holds.

Prompts are looked at in groups. Whoever tests at 5% after every group finds a difference that is
not there far more often than 5%; here each look spends a part of the 5% (Lan and DeMets 1983, the
spending function that resembles O'Brien and Fleming's boundaries). The boundaries come from the
joint distribution of the looks by recursive integration (Armitage, McPherson and Rowe 1969). The
statistic is Student's t over prompts, turned into the normal deviate of the same p-value, and the
interval is the repeated confidence interval (Jennison and Turnbull 1989), which holds whenever one
stops.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import special, stats
from scipy.optimize import brentq

FEWEST_PROMPTS = 8
"""Of a look; below, Student's t of a skewed metric errs by more than the level that is spent."""
_GRID = 801
_HIGHEST = 8.0
"""No boundary is beyond: the level spent there is below 1e-14."""


def spent(time: float, level: float) -> float:
    """Level that may have been used up when a share `time` of the prompts is seen.

    Args:
        time: in (0, 1].
        level: two-sided, of the whole evaluation.
    """
    half = float(stats.norm.ppf(1.0 - level / 4.0))
    # Half the level on either side: 2 (1 - Phi(z_{a/2} / sqrt(t))), twice.
    return 4.0 * float(stats.norm.sf(half / math.sqrt(time)))


@dataclass(frozen=True)
class _Paths:
    """Density of the score (deviate times the root of the time) of paths that go on."""

    time: float
    points: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]

    def outside(self, z: float, time: float) -> float:
        """How likely a path goes on until now and is beyond `z` at `time`."""
        edge, step = z * math.sqrt(time), math.sqrt(time - self.time)
        above = stats.norm.sf((edge - self.points) / step)
        below = stats.norm.cdf((-edge - self.points) / step)
        return float(np.trapezoid(self.density * (above + below), self.points))

    def going_on(self, z: float, time: float) -> _Paths:
        """Those that are within `z` at `time`."""
        edge, step = z * math.sqrt(time), math.sqrt(time - self.time)
        grid = np.linspace(-edge, edge, _GRID)
        kernel = stats.norm.pdf(grid[:, None] - self.points[None, :], scale=step)
        density = np.trapezoid(kernel * self.density[None, :], self.points, axis=1)
        return _Paths(time, grid, density)


def boundaries(times: Sequence[float], level: float = 0.05) -> tuple[float, ...]:
    """Absolute normal deviates at which each look decides.

    Args:
        times: share of the prompts at each look, increasing, the last one 1.
        level: two-sided false-positive rate over all looks.

    Raises:
        ValueError: times that do not increase to 1.
    """
    increases = all(after > before for before, after in pairwise((0.0, *times)))
    if not times or times[-1] != 1.0 or not increases:
        raise ValueError("looks: shares of the prompts must increase from above 0 to 1")
    first = times[0]
    found = [float(stats.norm.isf(spent(first, level) / 2.0))]
    edge = found[0] * math.sqrt(first)
    grid = np.linspace(-edge, edge, _GRID)
    paths = _Paths(first, grid, stats.norm.pdf(grid, scale=math.sqrt(first)))
    for time in times[1:]:
        found.append(_boundary(paths, time, spent(time, level) - spent(paths.time, level)))
        paths = paths.going_on(found[-1], time)
    return tuple(found)


def _boundary(paths: _Paths, time: float, wanted: float) -> float:
    """The deviate that paths pass at `time` as often as `wanted`."""
    if paths.outside(_HIGHEST, time) >= wanted:
        return _HIGHEST
    return float(brentq(lambda z: paths.outside(z, time) - wanted, 0.0, _HIGHEST, xtol=1e-7))


@dataclass(frozen=True)
class Look:
    """What is known after a group of prompts."""

    prompts: int
    of: int
    """Prompts of the whole suite."""
    number: int
    """From 1."""
    difference: float
    """Mean over prompts, system minus baseline."""
    low: float
    high: float
    """Ends of the repeated confidence interval at the level of the whole evaluation."""
    deviate: float
    """Absolute normal deviate of the test."""
    boundary: float

    @property
    def is_decided(self) -> bool:
        """Whether the difference is beyond the boundary."""
        return self.deviate >= self.boundary


def look(differences: Sequence[float], of: int, number: int, boundary: float) -> Look:
    """Test the differences that are there.

    Args:
        differences: one per prompt (mean over its pictures), at least two, finite.
        of: prompts of the whole suite.
        number: of the look, from 1.
        boundary: of `boundaries` at this look.
    """
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(count)
    if error == 0.0:
        deviate = 0.0 if mean == 0.0 else math.inf
        return Look(count, of, number, mean, mean, mean, deviate, boundary)
    # The lower tail of both: an upper one would lose p-values below 1e-16. The deviate of a p-value
    # that no float holds is infinite.
    deviate = -float(special.ndtri(special.stdtr(count - 1, -abs(mean) / error)))
    reach = -float(special.stdtrit(count - 1, special.ndtr(-boundary))) * error
    return Look(count, of, number, mean, mean - reach, mean + reach, deviate, boundary)


def look_sizes(prompts: int, looks: int) -> tuple[int, ...]:
    """Prompts at each of so many equal looks; the last one sees all.

    Raises:
        ValueError: the first look would see fewer than `FEWEST_PROMPTS`.
    """
    sizes = tuple(math.ceil(prompts * number / looks) for number in range(1, looks + 1))
    if looks < 1 or sizes[0] < FEWEST_PROMPTS:
        most = max(1, prompts // FEWEST_PROMPTS)
        raise ValueError(
            f"--looks {looks}: the first of {looks} looks at {prompts} prompts would see fewer "
            f"than {FEWEST_PROMPTS}; at most {most}"
        )
    return sizes


def drawn_order(prompts: Sequence[str], seed: int) -> list[str]:
    """Distinct prompts in a drawn order, the same for the same seed and prompts.

    A suite's own order may go by subject, and its first prompts would not stand for all.
    """

    def key(prompt: str) -> str:
        return hashlib.sha256(f"{seed} {prompt}".encode("utf-8", "surrogatepass")).hexdigest()

    return sorted(dict.fromkeys(prompts), key=key)


def paired_differences(
    system: Mapping[str, float], baseline: Mapping[str, float], prompts: Sequence[str]
) -> list[float]:
    """System minus baseline of each prompt that both have.

    Args:
        system: mean of the metric by prompt.
        baseline: the same.
        prompts: which of them, in order.

    Raises:
        ValueError: a value that is not finite, such as the PSNR of equal pictures.
    """
    found = [system[p] - baseline[p] for p in prompts if p in system and p in baseline]
    if not all(math.isfinite(value) for value in found):
        raise ValueError(
            "--stop-when-decided: this metric is infinite for some pictures; take another one"
        )
    return found
