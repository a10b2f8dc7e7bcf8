"""Every metric behind one of two shapes: numbers of one picture, or of two sets of pictures.

`open_metric` looks at the disk before it imports anything heavy, so missing weights are known in
milliseconds. What the numbers mean is said by `components.evaluation.cards`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from components.evaluation.cards import CARDS, card
from components.evaluation.weight_files import trusted_files

ImageArray = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """What a metric may know of a picture beside its pixels."""

    path: Path
    sha256: str
    """Of the file."""
    prompt: str | None = None
    reference: Path | None = None
    """The picture that a pair metric compares with."""
    reference_sha256: str | None = None


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


Metric = ImageMetric | SetMetric
_Opener = Callable[[Path, str], Metric]


@functools.lru_cache(maxsize=1)
def _decoded(path: Path, _sha256: str | None) -> ImageArray:
    """The last reference only: pair metrics of one picture come one after another."""
    from components.corpus.decoding import read_rgb

    return read_rgb(path).pixels


def reference_rgb(picture: Picture) -> ImageArray:
    """Pixels of the reference, uint8 (H, W, 3).

    Raises:
        ValueError: the picture has no reference.
        ImageUndecodable: the reference cannot be read.
    """
    if picture.reference is None:
        raise ValueError(f"{picture.path}: this metric compares with a reference, which is not set")
    return _decoded(picture.reference, picture.reference_sha256)


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


def _texture(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.native_metrics import fused_metrics

    return FunctionMetric(("entropy_bits", "flat_fraction"), of_picture=fused_metrics)


def _glcm(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.native_metrics import glcm_metrics

    return FunctionMetric(("glcm_score", "glcm_entropy_bits"), of_picture=glcm_metrics)


def _compression(_weights_dir: Path, _device: str) -> Metric:
    from components.corpus.compression import jpeg95_ratio

    return FunctionMetric(
        ("compression_ratio",), of_picture=lambda rgb: {"compression_ratio": jpeg95_ratio([rgb])}
    )


def _appearance(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.native_metrics import appearance_metrics

    return FunctionMetric(("laplacian_variance", "colourfulness"), of_picture=appearance_metrics)


def _piqe(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.piqe import piqe

    return FunctionMetric(("piqe",), of_picture=lambda rgb: {"piqe": piqe(rgb)})


def _niqe(weights_dir: Path, _device: str) -> Metric:
    (file,), digest = trusted_files(card("niqe"), weights_dir)
    from components.evaluation.niqe import NiqeMetric

    return NiqeMetric(file, digest)


def _fidelity(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.native_metrics import pair_metrics

    return FunctionMetric(("psnr_db", "nmse", "ssim", "ms_ssim"), of_pair=pair_metrics)


def _lpips(metric_id: str, backbone: Literal["alex", "vgg"]) -> _Opener:
    def open_it(weights_dir: Path, device: str) -> Metric:
        (features, heads), digest = trusted_files(card(metric_id), weights_dir)
        from components.evaluation.perceptual_similarity import LpipsMetric

        return LpipsMetric(metric_id, backbone, (features, heads), digest, device)

    return open_it


def _inception(
    ids: tuple[str, ...], preprocessing: Literal["noantialias", "clean", "patch299"]
) -> _Opener:
    def open_it(weights_dir: Path, device: str) -> Metric:
        (file,), digest = trusted_files(card(ids[0]), weights_dir)
        from components.evaluation import set_metrics

        distances = (
            set_metrics.frechet_only(ids[0])
            if len(ids) == 1
            else set_metrics.frechet_and_kernel(ids[0], ids[1])
        )
        return set_metrics.inception_metric(ids, preprocessing, distances)(file, digest, device)

    return open_it


def _dino(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("fd_dinov2"), weights_dir)
    from components.evaluation.set_metrics import dino_metric

    return dino_metric(folder, digest, device)


def _clip_score(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("clip_score"), weights_dir)
    from components.evaluation.preference import ClipEncoder, PromptMetric

    return PromptMetric("clip_score", ClipEncoder(folder, device), "cosine", digest)


def _pickscore(weights_dir: Path, device: str) -> Metric:
    (folder, tokenizer), digest = trusted_files(card("pickscore"), weights_dir)
    from components.evaluation.preference import ClipEncoder, PromptMetric

    return PromptMetric("pickscore", ClipEncoder(folder, device, tokenizer), "logit", digest)


def _hpsv3(weights_dir: Path, device: str) -> Metric:
    (folder, texts), digest = trusted_files(card("hpsv3"), weights_dir)

    def load() -> ImageMetric:
        from components.evaluation.hpsv3 import CHECKPOINT, HpsV3, HpsV3Metric

        return HpsV3Metric(HpsV3(folder / CHECKPOINT, texts, device), digest)

    return DeferredMetric(("hpsv3", "hpsv3_sigma"), digest, load)


def _laion_aesthetics(weights_dir: Path, device: str) -> Metric:
    (head, folder), digest = trusted_files(card("laion_aesthetics"), weights_dir)
    import torch

    from components.evaluation.preference import AestheticMetric, ClipEncoder

    state = torch.load(head, map_location="cpu", weights_only=True)
    return AestheticMetric(ClipEncoder(folder, device), state, digest)


def _musiq(weights_dir: Path, device: str) -> Metric:
    (file,), digest = trusted_files(card("musiq"), weights_dir)
    from components.evaluation.quality import open_musiq

    return open_musiq(file, digest, device)


def _qalign(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("qalign"), weights_dir)

    def load() -> ImageMetric:
        from components.corpus.qalign import QAlign
        from components.evaluation.quality import QAlignMetric

        return QAlignMetric(QAlign(folder, device), digest)

    return DeferredMetric(("qalign",), digest, load)


def _artimuse(_weights_dir: Path, _device: str) -> Metric:
    from components.evaluation.quality import ArtiMuseMetric, artimuse_url

    url = artimuse_url()
    from components.corpus.scorer_protocol import ScorerClient

    return ArtiMuseMetric(ScorerClient(url))


_NOANTIALIAS = ("fid", "kid", "kid_spread")
_PATCHES = ("patch_fid", "patch_kid", "patch_kid_spread")
_OPENERS: dict[tuple[str, ...], _Opener] = {
    ("psnr_db", "nmse", "ssim", "ms_ssim"): _fidelity,
    ("glcm_score", "glcm_entropy_bits"): _glcm,
    ("compression_ratio",): _compression,
    ("entropy_bits", "flat_fraction"): _texture,
    ("laplacian_variance", "colourfulness"): _appearance,
    ("piqe",): _piqe,
    ("niqe",): _niqe,
    ("lpips",): _lpips("lpips", "vgg"),
    ("lpips_alex",): _lpips("lpips_alex", "alex"),
    _NOANTIALIAS: _inception(_NOANTIALIAS, "noantialias"),
    ("rfid",): _inception(("rfid",), "noantialias"),
    ("fid_clean",): _inception(("fid_clean",), "clean"),
    _PATCHES: _inception(_PATCHES, "patch299"),
    ("fd_dinov2",): _dino,
    ("clip_score",): _clip_score,
    ("pickscore",): _pickscore,
    ("hpsv3", "hpsv3_sigma"): _hpsv3,
    ("laion_aesthetics",): _laion_aesthetics,
    ("musiq",): _musiq,
    ("qalign",): _qalign,
    ("artimuse",): _artimuse,
}
"""Ids that are measured together, and what opens them."""


def has_scorer(metric_id: str) -> bool:
    """Whether this version can compute the metric once its weights are there."""
    return any(metric_id in ids for ids in _OPENERS)


def open_metric(metric_id: str, weights_dir: Path, device: str = "cpu") -> Metric:
    """The metric that yields `metric_id`, perhaps with others: see its `ids`.

    Args:
        metric_id: id of a card.
        weights_dir: the repository's `weights/` folder.
        device: where a network runs.

    Raises:
        ValueError: no such metric, or none that this version computes.
        WeightsMissing: at once, before anything heavy is imported.
    """
    wanted = card(metric_id)
    for ids, opener in _OPENERS.items():
        if metric_id in ids:
            return opener(weights_dir, device)
    known = ", ".join(c.id for c in CARDS if has_scorer(c.id))
    raise ValueError(f"{wanted.name} ({metric_id}): this version has no scorer; it has {known}")
