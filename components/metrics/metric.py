"""The two shapes of a metric, of an image and of a set, and the picture that it is given."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from components.images.arrays import ImageArray

Features = npt.NDArray[np.float32]
PooledDistance = Callable[[npt.NDArray[np.intp], npt.NDArray[np.intp]], float]
"""Of two sets of row numbers of one pool of features."""


@dataclass(frozen=True)
class Picture:
    """What a metric may know of a picture beside its pixels."""

    path: Path
    sha256: str
    """Of the file."""
    prompt: str | None = None
    reference: Path | None = None
    """The picture that a pair metric compares with."""
    reference_content: str | None = None
    """`content` of the reference."""
    reading: str = ""
    """Version of the policy under which its pixels are read; empty where all read it alike."""
    fitted: tuple[int, int] | None = None
    """(height, width) to which it is resized to cover and cut about its centre before it is
    measured; None: as it is."""

    @property
    def content(self) -> str:
        """Of file, reading and fit: what was measured under another one is of other pixels."""
        if self.fitted is None:
            return content_digest(self.sha256, self.reading)
        height, width = self.fitted
        return content_digest(self.sha256, f"{self.reading} fitted {width}x{height}")


def content_digest(sha256: str, reading: str) -> str:
    """The digest of a file's bytes, or of them and how they are read where that matters."""
    return hashlib.sha256(f"{sha256} {reading}".encode()).hexdigest() if reading else sha256


@runtime_checkable
class ImageMetric(Protocol):
    """Numbers of one picture, or of one pair."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Card ids that `measure` yields."""
        ...

    @property
    def weights_digest(self) -> str | None:
        """sha256 of the weights; None for a metric without any."""
        ...

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """One number per id; None where the picture is too small.

        Args:
            rgb: uint8 (H, W, 3), native pixels of `picture`.
            picture: file, prompt and reference.

        Raises:
            ValueError: the picture lacks its prompt or reference, or does not fit to it.
        """
        ...


@runtime_checkable
class SetMetric(Protocol):
    """Numbers of two sets, from features of each picture."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Card ids that `combine` yields."""
        ...

    @property
    def feature_id(self) -> str:
        """Names network and preprocessing; equal names and weights share stored features."""
        ...

    @property
    def weights_digest(self) -> str | None:
        """sha256 of the weights."""
        ...

    def features(self, rgb: ImageArray, picture: Picture) -> Features:
        """Features of one picture.

        Args:
            rgb: uint8 (H, W, 3), native pixels.
            picture: file, prompt and reference.

        Returns:
            float32 (k, d): one row, or one per patch.
        """
        ...

    def combine(self, ours: Features, theirs: Features) -> dict[str, float]:
        """Numbers of two sets.

        Args:
            ours: (n, d), rows of all pictures of the system.
            theirs: (m, d), rows of all reference pictures.

        Raises:
            ValueError: too few rows.
        """
        ...


@runtime_checkable
class PooledSetMetric(SetMetric, Protocol):
    """A set metric that knows a fast way to its distances between many subsets of one pool."""

    def pooled(self, pool: Features) -> dict[str, PooledDistance]:
        """The distances of `combine`, for tests that exchange pictures a thousand times.

        Args:
            pool: (n, d), rows of all sets.

        Returns:
            By id; numbers that are no distances (a spread) are left out.
        """
        ...


Metric = ImageMetric | SetMetric


@functools.lru_cache(maxsize=1)
def _decoded(path: Path, _sha256: str | None) -> ImageArray:
    """The last reference only: pair metrics of one picture come one after another.

    The digest is part of the key, so a file that was replaced is read again.
    """
    from components.images.decoding import read_rgb
    from components.images.image_files import ImageUndecodable

    try:
        return read_rgb(path).pixels
    except ImageUndecodable as problem:
        raise ImageUndecodable(f"reference {path.name}: {problem}") from None


def reference_rgb(picture: Picture) -> ImageArray:
    """Pixels of the reference, uint8 (H, W, 3).

    Raises:
        ValueError: the picture has no reference.
        ImageUndecodable: the reference cannot be read.
    """
    if picture.reference is None:
        raise ValueError(f"{picture.path}: this metric compares with a reference, which is not set")
    return _decoded(picture.reference, picture.reference_content)


def prompt_of(picture: Picture) -> str:
    """The prompt.

    Raises:
        ValueError: the picture has none.
    """
    if not picture.prompt:
        raise ValueError(f"{picture.path}: this metric needs the prompt, which is not set")
    return picture.prompt


@dataclass(frozen=True)
class FunctionMetric:
    """A metric without weights: a function of pixels, or of reference and pixels."""

    ids: tuple[str, ...]
    of_picture: Callable[[ImageArray], dict[str, float | None]] | None = None
    of_pair: Callable[[ImageArray, ImageArray], dict[str, float | None]] | None = None
    weights_digest: str | None = None

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`."""
        if self.of_pair is not None:
            return self.of_pair(reference_rgb(picture), rgb)
        assert self.of_picture is not None
        return self.of_picture(rgb)


@dataclass(frozen=True)
class DeferredMetric:
    """A metric whose network is too large to be held by a process that measures nothing.

    Weights that do not fit are then the error of a picture, not of the start.
    """

    ids: tuple[str, ...]
    weights_digest: str | None
    load: Callable[[], ImageMetric]

    @functools.cached_property
    def _loaded(self) -> ImageMetric:
        return self.load()

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the first call loads the network."""
        return self._loaded.measure(rgb, picture)
