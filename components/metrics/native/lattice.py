"""Lattices: patterns that repeat every 2, 16 or 32 px all over a picture.

Autoencoders and patch-wise transformers leave such grids above the sizes that they were trained at:
2 px is one latent's patch seen through an upsampling, 16 and 32 px are one latent and one token. A
pattern that repeats exactly has all its power in single frequencies, which photographs have not, so
each of those is compared with the frequencies around it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.fft

from components.images.arrays import ImageArray
from components.signals.flat_regions import grayscale

PERIODS_PX = (2, 16, 32)
LEAST_EDGE_PX = 256
"""Lattice frequencies then lie 8 bins apart, so that none stands in another's surroundings."""
_COARSER = {2: 1, 16: 8, 32: 16}
"""Frequencies of this period are another lattice's: 8 px is JPEG's."""
_INNER, _OUTER = 2, 6
"""Bins about a frequency: within the first a Hann window spreads it, up to the second is what
surrounds it."""

Power = npt.NDArray[np.float32]


def _power(rgb: ImageArray) -> tuple[Power, float]:
    """(|F|^2 of the windowed luminance's half plane, its value for a constant of 1)."""
    # Cut to whole periods, so that every lattice frequency falls on a bin.
    height, width = (edge - edge % PERIODS_PX[-1] for edge in rgb.shape[:2])
    plane = grayscale(rgb[:height, :width]).astype(np.float32)
    plane -= plane.mean()
    # Without a window the picture's borders, which do not meet, would leak along both axes.
    rows, columns = (np.hanning(edge + 1)[:-1].astype(np.float32) for edge in (height, width))
    plane *= rows[:, None]
    plane *= columns
    spectrum = scipy.fft.rfft2(plane)
    constant = float(rows.sum(dtype=np.float64) * columns.sum(dtype=np.float64)) ** 2
    return np.abs(spectrum) ** 2, constant


def _frequencies(period: int) -> Iterator[tuple[int, int]]:
    """(down, across) in cycles per period, without those of the coarser lattice."""
    step = period // _COARSER[period]
    for down in range(period):
        for across in range(period):
            if down % step or across % step:
                yield down, across


def _excess(power: Power, width: int, centre: tuple[int, int]) -> float:
    """Power at a frequency above the strongest of what surrounds it.

    An edge that crosses the picture has its power along one line through all frequencies, so the
    line across, down and both ways aslant count beside the whole surroundings.
    """
    height = power.shape[0]
    reach = np.arange(-_OUTER, _OUTER + 1)
    down, across = np.meshgrid(centre[0] + reach, centre[1] + reach, indexing="ij")
    across %= width
    # A real picture's spectrum has the same power at opposite frequencies; one half is stored.
    mirrored = across > width // 2
    down = np.where(mirrored, -down, down) % height
    across = np.where(mirrored, width - across, across)
    values = power[down, across].astype(np.float64)
    far = np.maximum.outer(np.abs(reach), np.abs(reach)) > _INNER
    beside = np.abs(reach) > _INNER
    lines = values[_OUTER], values[:, _OUTER], np.diagonal(values), np.diagonal(values[::-1])
    around = max(values[far].mean(), *(line[beside].mean() for line in lines))
    return float(values[_OUTER, _OUTER] - around)


def lattice_levels(rgb: ImageArray) -> dict[str, float | None]:
    """Root mean square of the pattern that repeats at each period, in grey levels of 255.

    A sine of amplitude a gives a / sqrt(2), a checkerboard of +a and -a gives a; half a level can
    be seen on a flat sky. Ids `lattice_2px`, `lattice_16px` and `lattice_32px`.

    Args:
        rgb: uint8 (H, W, 3).

    Returns:
        At least 0; None for edges below `LEAST_EDGE_PX`.
    """
    if min(rgb.shape[:2]) < LEAST_EDGE_PX:
        return {f"lattice_{period}px": None for period in PERIODS_PX}
    power, constant = _power(rgb)
    height = power.shape[0]
    width = rgb.shape[1] - rgb.shape[1] % PERIODS_PX[-1]
    found: dict[str, float | None] = {}
    for period in PERIODS_PX:
        # Summed with their signs: where there is no pattern the differences cancel.
        total = sum(
            _excess(power, width, (down * height // period, across * width // period))
            for down, across in _frequencies(period)
        )
        found[f"lattice_{period}px"] = float(np.sqrt(max(total, 0.0) / constant))
    return found
