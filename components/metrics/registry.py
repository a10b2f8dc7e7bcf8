"""Every metric behind one of two shapes: numbers of one picture, or of two sets of pictures.

`open_metric` looks at the disk before it imports anything heavy, so missing weights are known in
milliseconds. What the numbers mean is said by `components.metrics.cards`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from components.metrics.cards import CARDS, card
from components.metrics.metric import DeferredMetric, FunctionMetric, ImageMetric, Metric
from components.metrics.weight_files import trusted_files

_Opener = Callable[[Path, str], Metric]


def _texture(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.native.native_metrics import fused_metrics

    return FunctionMetric(("entropy_bits", "flat_fraction"), of_picture=fused_metrics)


def _glcm(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.native.native_metrics import glcm_metrics

    return FunctionMetric(("glcm_score", "glcm_entropy_bits"), of_picture=glcm_metrics)


def _compression(_weights_dir: Path, _device: str) -> Metric:
    from components.signals.compression import jpeg95_ratio

    return FunctionMetric(
        ("compression_ratio",), of_picture=lambda rgb: {"compression_ratio": jpeg95_ratio([rgb])}
    )


def _appearance(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.native.native_metrics import appearance_metrics

    return FunctionMetric(("laplacian_variance", "colourfulness"), of_picture=appearance_metrics)


def _piqe(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.native.piqe import piqe

    return FunctionMetric(("piqe",), of_picture=lambda rgb: {"piqe": piqe(rgb)})


def _niqe(weights_dir: Path, _device: str) -> Metric:
    (file,), digest = trusted_files(card("niqe"), weights_dir)
    from components.metrics.native.niqe import NiqeMetric

    return NiqeMetric(file, digest)


def _fidelity(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.native.native_metrics import pair_metrics

    return FunctionMetric(("psnr_db", "nmse", "ssim", "ms_ssim"), of_pair=pair_metrics)


def _lpips(metric_id: str, backbone: Literal["alex", "vgg"]) -> _Opener:
    def open_it(weights_dir: Path, device: str) -> Metric:
        (features, heads), digest = trusted_files(card(metric_id), weights_dir)
        from components.metrics.networks.lpips import LpipsMetric

        return LpipsMetric(metric_id, backbone, (features, heads), digest, device)

    return open_it


def _inception(
    ids: tuple[str, ...], preprocessing: Literal["noantialias", "clean", "patch299"]
) -> _Opener:
    def open_it(weights_dir: Path, device: str) -> Metric:
        (file,), digest = trusted_files(card(ids[0]), weights_dir)
        from components.metrics.networks import set_metrics

        distances = (
            set_metrics.frechet_only(ids[0])
            if len(ids) == 1
            else set_metrics.frechet_and_kernel(ids[0], ids[1])
        )
        return set_metrics.inception_metric(ids, preprocessing, distances)(file, digest, device)

    return open_it


def _dino(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("fd_dinov2"), weights_dir)
    from components.metrics.networks.set_metrics import dino_metric

    return dino_metric(folder, digest, device)


def _clip_score(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("clip_score"), weights_dir)
    from components.metrics.networks.clip import ClipEncoder, PromptMetric

    return PromptMetric("clip_score", ClipEncoder(folder, device), "cosine", digest)


def _pickscore(weights_dir: Path, device: str) -> Metric:
    (folder, tokenizer), digest = trusted_files(card("pickscore"), weights_dir)
    from components.metrics.networks.clip import ClipEncoder, PromptMetric

    return PromptMetric("pickscore", ClipEncoder(folder, device, tokenizer), "logit", digest)


def _hpsv3(weights_dir: Path, device: str) -> Metric:
    (folder, texts), digest = trusted_files(card("hpsv3"), weights_dir)

    def load() -> ImageMetric:
        from components.metrics.networks.hpsv3 import CHECKPOINT, HpsV3, HpsV3Metric

        return HpsV3Metric(HpsV3(folder / CHECKPOINT, texts, device), digest)

    return DeferredMetric(("hpsv3", "hpsv3_sigma"), digest, load)


def _laion_aesthetics(weights_dir: Path, device: str) -> Metric:
    (head, folder), digest = trusted_files(card("laion_aesthetics"), weights_dir)
    import torch

    from components.metrics.networks.clip import AestheticMetric, ClipEncoder

    state = torch.load(head, map_location="cpu", weights_only=True)
    return AestheticMetric(ClipEncoder(folder, device), state, digest)


def _musiq(weights_dir: Path, device: str) -> Metric:
    (file,), digest = trusted_files(card("musiq"), weights_dir)
    from components.metrics.networks.corpus_scorers import open_musiq

    return open_musiq(file, digest, device)


def _qalign(weights_dir: Path, device: str) -> Metric:
    (folder,), digest = trusted_files(card("qalign"), weights_dir)

    def load() -> ImageMetric:
        from components.corpus.quality.qalign import QAlign
        from components.metrics.networks.corpus_scorers import QAlignMetric

        return QAlignMetric(QAlign(folder, device), digest)

    return DeferredMetric(("qalign",), digest, load)


def _artimuse(_weights_dir: Path, _device: str) -> Metric:
    from components.metrics.networks.corpus_scorers import ArtiMuseMetric, artimuse_url

    url = artimuse_url()
    from components.corpus.quality.scorer_protocol import ScorerClient

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
