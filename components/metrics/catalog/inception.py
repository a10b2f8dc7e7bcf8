"""FID, KID and their kin: distances of two sets in InceptionV3's features."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from components.metrics.metric import Metric
from components.metrics.metric_card import MetricCard, MetricFamily, Opener
from components.metrics.metric_weights import Weights

_WEIGHTS = Weights(
    path="inception/pt_inception-2015-12-05-6726825d.pth",
    size="91 MiB",
    license="Apache-2.0",
    command="copy pt_inception-2015-12-05-6726825d.pth (release fid_weights of the pytorch-fid "
    "project) to weights/inception/",
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


RFID = MetricFamily(
    cards=(
        MetricCard(
            "rfid",
            "rFID",
            "lower",
            "1",
            "299 px",
            "fid/inception2048-noantialias/v1",
            "set pair",
            note="Nearly all bias below a few thousand images.",
            weights=_WEIGHTS,
        ),
    ),
    opener=_opener(("rfid",), "noantialias"),
)

FID_KID = MetricFamily(
    cards=(
        MetricCard(
            "fid",
            "FID",
            "lower",
            "1",
            "299 px",
            "fid/inception2048-noantialias/v1",
            "set pair",
            note="Newer torchmetrics antialiases the resize: another metric id, other numbers.",
            weights=_WEIGHTS,
        ),
        MetricCard(
            "kid",
            "KID",
            "lower",
            "1",
            "299 px",
            "kid/inception2048-noantialias-poly3/v1",
            "set pair",
            note="Unbiased squared MMD over all pictures, so levels of small sets can be read; may "
            "be negative.",
            weights=_WEIGHTS,
            decimals=5,
        ),
        MetricCard(
            "kid_spread",
            "KID spread",
            "neither",
            "1",
            "299 px",
            "kid-spread/100-subsets-of-half-max1000-seed0/v1",
            "set pair",
            note="Standard deviation of KID over 100 random subsets of half the smaller set; not a "
            "standard error.",
            weights=_WEIGHTS,
            decimals=5,
        ),
    ),
    opener=_opener(("fid", "kid", "kid_spread"), "noantialias"),
)

FID_FITTED = MetricFamily(
    cards=(
        MetricCard(
            "fid_fitted",
            "FID (both cropped)",
            "lower",
            "1",
            "299 px",
            "fid/inception2048-noantialias-cover-crop/v1",
            "set pair",
            note="Diffusion-4K's released script: both sets are brought to the size that was asked "
            "for by short side and centre crop, then shrunk to 299 px. `fid` squashes references "
            "of another shape. Deviation: the resize is Lanczos on 8 bits; the script's was not "
            "seen run. Nearly all bias below a few thousand images.",
            weights=_WEIGHTS,
            fits_references=True,
        ),
    ),
    opener=_opener(("fid_fitted",), "noantialias"),
)

FID_EXTRAPOLATED = MetricFamily(
    cards=(
        MetricCard(
            "fid_extrapolated",
            "FID (bias-corrected)",
            "lower",
            "1",
            "299 px",
            "fid/inception2048-noantialias-extrapolated-both/v1",
            "set pair",
            note="FID-infinity (Chong and Forsyth 2020): a line through FID over 1/n, read at 0, "
            "drawn from both sets alike; at least 16 pictures in each.",
            weights=_WEIGHTS,
        ),
    ),
    opener=_extrapolated,
)

FID_CLEAN = MetricFamily(
    cards=(
        MetricCard(
            "fid_clean",
            "FID (clean)",
            "lower",
            "1",
            "299 px, antialiased",
            "fid/inception2048-clean/v1",
            "set pair",
            note="clean-fid's resize (PIL bicubic on float channels) before the network of `fid`; "
            "nearly all bias below a few thousand images.",
            weights=_WEIGHTS,
        ),
    ),
    opener=_opener(("fid_clean",), "clean"),
)

PATCH_FID_KID = MetricFamily(
    cards=(
        MetricCard(
            "patch_fid",
            "Patch FID",
            "lower",
            "1",
            "native pixels in 299 px patches",
            "fid/inception2048-patch299-centred-grid/v1",
            "set pair",
            note="Every full patch of a centred grid is a row (169 at 4096 x 4096); patches of one "
            "picture are not independent.",
            weights=_WEIGHTS,
        ),
        MetricCard(
            "patch_kid",
            "Patch KID",
            "lower",
            "1",
            "native pixels in 299 px patches",
            "kid/inception2048-patch299-centred-grid-poly3/v1",
            "set pair",
            weights=_WEIGHTS,
            decimals=5,
        ),
        MetricCard(
            "patch_kid_spread",
            "Patch KID spread",
            "neither",
            "1",
            "native pixels in 299 px patches",
            "kid-spread/patch299-100-subsets-of-half-max1000-seed0/v1",
            "set pair",
            weights=_WEIGHTS,
            decimals=5,
        ),
    ),
    opener=_opener(("patch_fid", "patch_kid", "patch_kid_spread"), "patch299"),
)
