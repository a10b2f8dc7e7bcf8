"""Distances between two sets of features: Fréchet distance and kernel distance, in float64.

Fréchet (Heusel et al. 2017): ||m1 - m2||^2 + Tr S1 + Tr S2 - 2 Tr (S1 S2)^(1/2), unbiased
covariances. With centred rows X and Y, S1 = X'X / (n - 1), the last trace is the nuclear norm of
X Y' over sqrt((n - 1)(m - 1)): singular values of an (n, m) matrix instead of a square root of a
(2048, 2048) one, exact also where the covariances are singular. At n = 195 the distance is nearly
all bias: compare systems by permutation and report levels by the kernel distance.

Legend: x (n, d), y (m, d).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

Matrix = npt.NDArray[np.float64]

KID_SUBSETS = 100
KID_SUBSET_ROWS = 1000
KID_SEED = 0


def _rows(features: npt.ArrayLike, name: str) -> Matrix:
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] < 2:
        raise ValueError(
            f"{name}: features must be (n, d) with n >= 2 pictures or patches, got {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: features must be finite")
    return matrix


def _two_sets(x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Matrix, Matrix]:
    first, second = _rows(x, "first set"), _rows(y, "second set")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"feature widths differ: {first.shape[1]} and {second.shape[1]}")
    return first, second


def _nuclear_norm(matrix: Matrix) -> float:
    # May be overwritten: callers pass products that nobody else holds.
    values = scipy.linalg.svd(matrix, compute_uv=False, check_finite=False, overwrite_a=True)
    return float(values.sum())


def _compact(centred: Matrix) -> Matrix:
    """A matrix with the same Gram matrix X'X and at most d rows: R of X = QR where n > d."""
    if centred.shape[0] <= centred.shape[1]:
        return centred
    (upper,) = scipy.linalg.qr(centred, mode="r", check_finite=False)[:1]
    # Below row d the factor is zero.
    square: Matrix = upper[: centred.shape[1]]
    return square


def frechet_distance(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two sets.

    Args:
        x: (n, d), n >= 2.
        y: (m, d), m >= 2.

    Returns:
        At least 0 up to rounding; 0 for equal sets.

    Raises:
        ValueError: fewer than two rows, different widths, or values that are not finite.
    """
    first, second = _two_sets(x, y)
    mean_x, mean_y = first.mean(axis=0), second.mean(axis=0)
    # Divided here, so that the squared entries add up to the covariance's trace.
    a = (first - mean_x) / np.sqrt(first.shape[0] - 1)
    b = (second - mean_y) / np.sqrt(second.shape[0] - 1)
    # The nuclear norm only sees Gram matrices, so whichever side has more rows than features is
    # replaced by its R factor first: patches number tens of thousands.
    cross = _nuclear_norm(_compact(a) @ _compact(b).T)
    difference = mean_x - mean_y
    # Traces are sums of squares of the scaled rows; the covariances themselves are never formed.
    return float(difference @ difference + np.vdot(a, a) + np.vdot(b, b) - 2.0 * cross)


class GramFrechet:
    """Fréchet distances between subsets of one pool of rows, from the pool's Gram matrix alone.

    All that the distance needs are inner products, so a relabelling costs the singular values of
    one (n, m) matrix and nothing of size d.
    """

    def __init__(self, pool: npt.ArrayLike) -> None:
        """Compute the Gram matrix.

        Args:
            pool: (N, d) rows of all sets.

        Raises:
            ValueError: as `frechet_distance`.
        """
        rows = _rows(pool, "pool")
        # The distance does not change under a common shift; a centred pool loses fewer digits.
        rows = rows - rows.mean(axis=0)
        self.gram: Matrix = rows @ rows.T

    def __call__(self, first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]) -> float:
        """Distance of two subsets.

        Args:
            first: (n,) row numbers.
            second: (m,) row numbers; may overlap with `first`.
        """
        n, m = len(first), len(second)
        within_x = self.gram[np.ix_(first, first)]
        within_y = self.gram[np.ix_(second, second)]
        cross = self.gram[np.ix_(first, second)]
        # ||m1 - m2||^2 out of inner products: the mean of a block is that of the products.
        means = within_x.mean() + within_y.mean() - 2.0 * cross.mean()
        trace_x = (np.trace(within_x) - n * within_x.mean()) / (n - 1)
        trace_y = (np.trace(within_y) - m * within_y.mean()) / (m - 1)
        # Each subset about its own mean; the pool's, above, is for digits alone.
        centred = cross - cross.mean(axis=0) - cross.mean(axis=1, keepdims=True) + cross.mean()
        nuclear = _nuclear_norm(centred) / np.sqrt((n - 1) * (m - 1))
        return float(means + trace_x + trace_y - 2.0 * nuclear)


EXTRAPOLATION_SIZES = 8
EXTRAPOLATION_DRAWS = 12
FEWEST_EXTRAPOLATED = 16


def extrapolated_frechet_distance(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Fréchet distance at infinitely many rows of both sets (Chong and Forsyth 2020, FID-infinity).

    The bias of the plain distance falls like 1 / n, so a line through its values at several n,
    drawn from both sets alike, is read off at 1 / n = 0. Deviation: they draw from the system
    alone and keep a large reference set; here the reference is as small as the system's, and its
    bias is as large (tested on sets whose distance is known).

    Args:
        x: (n, d), n >= 16.
        y: (m, d), m >= 16.

    Raises:
        ValueError: fewer rows, or as `frechet_distance`.
    """
    first, second = _two_sets(x, y)
    most = min(len(first), len(second))
    if most < FEWEST_EXTRAPOLATED:
        raise ValueError(
            f"an extrapolation needs at least {FEWEST_EXTRAPOLATED} pictures in both sets, got "
            f"{most}"
        )
    distance = GramFrechet(np.concatenate([first, second]))
    rng = np.random.default_rng(KID_SEED)
    sizes = np.unique(np.linspace(most // 2, most, EXTRAPOLATION_SIZES).astype(int))
    places: list[float] = []
    values: list[float] = []
    for size in sizes:
        for _ in range(EXTRAPOLATION_DRAWS):
            ours = rng.permutation(len(first))[:size]
            theirs = len(first) + rng.permutation(len(second))[:size]
            places.append(1.0 / size)
            values.append(distance(ours, theirs))
    _, at_infinity = np.polyfit(places, values, 1)
    return float(at_infinity)


def kernel_distance(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Unbiased squared MMD under (x.y / d + 1)^3 (KID; Binkowski et al. 2018), over all rows.

    Args:
        x: (n, d), n >= 2.
        y: (m, d), m >= 2.

    Returns:
        Zero on average for equal distributions, so it may be negative.

    Raises:
        ValueError: as `frechet_distance`.
    """
    first, second = _two_sets(x, y)
    return _unbiased_mmd(_kernel(first, first), _kernel(second, second), _kernel(first, second))


def _kernel(x: Matrix, y: Matrix) -> Matrix:
    # Divided by the width, so that one kernel serves features of any size.
    kernel: Matrix = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def _unbiased_mmd(within_x: Matrix, within_y: Matrix, cross: Matrix) -> float:
    n, m = cross.shape
    # Without the diagonal: a picture's similarity to itself is what biases the plain estimate.
    own_x = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    own_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(own_x + own_y - 2.0 * cross.mean())


class GramKernel:
    """Kernel distances between subsets of one pool of rows, from the pool's kernel matrix alone."""

    def __init__(self, pool: npt.ArrayLike) -> None:
        """Compute the kernel matrix.

        Args:
            pool: (N, d) rows of all sets.

        Raises:
            ValueError: as `frechet_distance`.
        """
        rows = _rows(pool, "pool")
        self.kernel: Matrix = _kernel(rows, rows)

    def __call__(self, first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]) -> float:
        """Distance of two subsets.

        Args:
            first: (n,) row numbers.
            second: (m,) row numbers.
        """
        return _unbiased_mmd(
            self.kernel[np.ix_(first, first)],
            self.kernel[np.ix_(second, second)],
            self.kernel[np.ix_(first, second)],
        )


def kernel_distance_spread(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    subsets: int = KID_SUBSETS,
    rows: int | None = None,
    seed: int = KID_SEED,
) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over random subsets of both sets.

    Args:
        x: (n, d).
        y: (m, d).
        subsets: how many, at least 2.
        rows: rows of each subset; None: half of the smaller set, at most 1000. With all rows every
            subset would be the same and the spread would be 0.
        seed: of the subsets.

    Raises:
        ValueError: sets of fewer than four rows, a bad argument, or as `frechet_distance`.
    """
    first, second = _two_sets(x, y)
    smaller = min(len(first), len(second))
    size = min(KID_SUBSET_ROWS, smaller // 2) if rows is None else rows
    if subsets < 2 or not 2 <= size <= smaller:
        raise ValueError(
            f"{subsets} subsets of {size} rows: at least 2 of 2 rows, at most {smaller} rows; "
            "sets need at least 4 rows"
        )
    # A fixed seed by default: the spread is printed beside a protocol id and must not vary.
    generator = np.random.default_rng(seed)
    # Without replacement: a picture drawn twice would bring the diagonal back in.
    values = []
    for _ in range(subsets):
        a = first[generator.choice(len(first), size, replace=False)]
        b = second[generator.choice(len(second), size, replace=False)]
        values.append(_unbiased_mmd(_kernel(a, a), _kernel(b, b), _kernel(a, b)))
    return float(np.mean(values)), float(np.std(values, ddof=1))
