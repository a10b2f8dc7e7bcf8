"""FID, KID and their kin: distances of two sets in InceptionV3's features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from components.files.install_hints import fetch_command
from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily, Opener
from components.metrics.metric_weights import Weights

_WEIGHTS = Weights(
    path="inception/pt_inception-2015-12-05-6726825d.pth",
    size="91 MiB",
    license="Apache-2.0",
    command=fetch_command(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        "weights/inception/pt_inception-2015-12-05-6726825d.pth",
    ),
)


def _opener(
    ids: tuple[str, ...], preprocessing: Literal["noantialias", "clean", "patch299"]
) -> Opener:
    def open_it(files: tuple[Path, ...], digest: str, device: str) -> Metric:
        (file,) = files
        from components.metrics.networks import set_metrics

        distances = (
            set_metrics.frechet_only(ids[0])
            if len(ids) == 1
            else set_metrics.frechet_and_kernel(ids[0], ids[1])
        )
        return set_metrics.inception_metric(ids, preprocessing, distances)(file, digest, device)

    return open_it


def _extrapolated(files: tuple[Path, ...], digest: str, device: str) -> Metric:
    (file,) = files
    from components.metrics.networks import set_metrics

    name = "fid_extrapolated"
    distances = set_metrics.extrapolated_only(name)
    open_it = set_metrics.inception_metric((name,), "noantialias", distances, pooled=False)
    return open_it(file, digest, device)


_BIASED = "Nearly all bias below a few thousand images."
_HEUSEL = "Heusel et al. 2017 in pytorch-fid's network, the TensorFlow release's weights"
_BINKOWSKI = "Binkowski et al. 2018: polynomial kernel of degree 3"
_WHOLE, _PATCHES = "299 px", "native pixels in 299 px patches"


def _distance(
    metric_id: str, name: str, protocol: str, sees: str = _WHOLE, **more: Any
) -> MetricCard:
    """The card of a distance of two sets in these features."""
    return MetricCard(
        metric_id, name, "lower", "1", sees, protocol, "set pair", weights=_WEIGHTS, **more
    )


def _spread(metric_id: str, name: str, protocol: str, sees: str = _WHOLE) -> MetricCard:
    return replace(
        _distance(metric_id, name, protocol, sees, decimals=5),
        direction="neither",
        note="Standard deviation of KID over 100 random subsets of half the smaller set; not a "
        "standard error.",
        follows=_BINKOWSKI,
    )


RFID = MetricFamily(
    cards=(
        _distance(
            "rfid",
            "rFID",
            "fid/inception2048-noantialias/v1",
            note=_BIASED,
            follows=_HEUSEL,
            deviates="UltraFlux (supplement, table 2) states neither resize nor weights.",
        ),
    ),
    opener=_opener(("rfid",), "noantialias"),
)

FID_KID = MetricFamily(
    cards=(
        _distance(
            "fid",
            "FID",
            "fid/inception2048-noantialias/v1",
            note="Newer torchmetrics antialiases the resize: another metric id, other numbers.",
            follows=_HEUSEL,
            deviates="References of another shape are squashed; Diffusion-4K's script crops them "
            "(`fid_fitted`).",
        ),
        _distance(
            "kid",
            "KID",
            "kid/inception2048-noantialias-poly3/v1",
            note="Unbiased squared MMD over all pictures, so levels of small sets can be read; may "
            "be negative.",
            follows=_BINKOWSKI,
            decimals=5,
        ),
        _spread("kid_spread", "KID spread", "kid-spread/100-subsets-of-half-max1000-seed0/v1"),
    ),
    opener=_opener(("fid", "kid", "kid_spread"), "noantialias"),
)

FID_FITTED = MetricFamily(
    cards=(
        _distance(
            "fid_fitted",
            "FID (both cropped)",
            "fid/inception2048-noantialias-cover-crop/v1",
            note=f"Both sets at the size that was asked for. {_BIASED}",
            follows="Diffusion-4K's released script: short side to the size that is asked for, "
            "centre crop, 299 px without antialiasing",
            deviates="The resize is Lanczos on 8 bits; the script's was not seen run.",
            fits_references=True,
        ),
    ),
    opener=_opener(("fid_fitted",), "noantialias"),
)

FID_EXTRAPOLATED = MetricFamily(
    cards=(
        _distance(
            "fid_extrapolated",
            "FID (bias-corrected)",
            "fid/inception2048-noantialias-extrapolated-both/v1",
            note="A line through FID over 1/n, read at 0, drawn from both sets alike; at least 16 "
            "pictures in each.",
            follows="FID-infinity, Chong and Forsyth 2020",
            deviates="Both sets are extrapolated, the paper's references are not.",
        ),
    ),
    opener=_extrapolated,
)

FID_CLEAN = MetricFamily(
    cards=(
        _distance(
            "fid_clean",
            "FID (clean)",
            "fid/inception2048-clean/v1",
            "299 px, antialiased",
            note=_BIASED,
            follows="clean-fid's resize (PIL bicubic on float channels), Parmar et al. 2022",
        ),
    ),
    opener=_opener(("fid_clean",), "clean"),
)

PATCH_FID_KID = MetricFamily(
    cards=(
        _distance(
            "patch_fid",
            "Patch FID",
            "fid/inception2048-patch299-centred-grid/v1",
            _PATCHES,
            note="Every full patch of a centred grid is a row (169 at 4096 x 4096); patches of one "
            "picture are not independent.",
            follows=_HEUSEL,
            deviates="Patches instead of pictures: of no paper that is compared here.",
        ),
        _distance(
            "patch_kid",
            "Patch KID",
            "kid/inception2048-patch299-centred-grid-poly3/v1",
            _PATCHES,
            follows=_BINKOWSKI,
            deviates="Patches instead of pictures: of no paper that is compared here.",
            decimals=5,
        ),
        _spread(
            "patch_kid_spread",
            "Patch KID spread",
            "kid-spread/patch299-100-subsets-of-half-max1000-seed0/v1",
            _PATCHES,
        ),
    ),
    opener=_opener(("patch_fid", "patch_kid", "patch_kid_spread"), "patch299"),
)
