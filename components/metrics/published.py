"""Published numbers that stand beside ours in the report, each with its table.

They were measured on other images at 4096 x 4096 with other weights; the report says so on every
table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedTable:
    """A table as a paper prints it."""

    caption: str
    source: str
    columns: tuple[str, ...]
    """Metric names with their arrows, without the system column."""
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(system, values in column order, digits as printed)."""
    metrics: tuple[str, ...] = ()
    """Ids of our metrics under the columns."""
    protocols: tuple[str, ...] = ()
    """Our protocol id that the column was measured under; empty where the paper and the released
    code do not say, so that nothing may be compared with it."""
    wants: str = ""
    """Pictures, prompts and sampling that the table was made with, as far as they are stated."""

    def comparison(self, place: int, protocol: str) -> str:
        """Why numbers of ours do not compare with a column; empty where protocol ids are equal.

        Args:
            place: of the column.
            protocol: id of our metric.
        """
        theirs = self.protocols[place] if self.protocols else ""
        if not theirs:
            return "the paper and its released code do not state the protocol"
        return "" if theirs == protocol else f"measured under {theirs}, ours under {protocol}"


_FID_4K = "fid/inception2048-noantialias-cover-crop/v1"
_CLIP_4K = "clip/vit-b-16/v1"
_SAMPLING_4K = (
    "Diffusion-4K: guidance scale 7.0, flow-matching sampling, 28 steps for SD3-2B and 50 for "
    "Flux-12B; prompts of Aesthetic-Eval at either size; seeds not stated"
)


VAE_RECONSTRUCTION = PublishedTable(
    caption="Reconstruction with F16 autoencoders, Aesthetic-4K@4096 evaluation set",
    source="UltraFlux, supplement, table 2",
    columns=("rFID ↓", "NMSE ↓", "PSNR ↑", "SSIM ↑", "LPIPS ↓"),
    rows=(
        ("Flux-VAE-F16", ("2.201", "0.01522", "26.90", "0.784", "0.168")),
        ("Flux-VAE-F16-SC", ("0.588", "0.00736", "30.19", "0.846", "0.097")),
        ("UltraFlux-F16-VAE", ("0.547", "0.00657", "30.70", "0.852", "0.102")),
    ),
    metrics=("rfid", "nmse", "psnr_db", "ssim", "lpips"),
)

TEXT_TO_IMAGE = PublishedTable(
    caption="Text to image, Aesthetic-Eval@4096, 4096 x 4096",
    source="UltraFlux, main results table",
    columns=(
        "FID ↓",
        "HPSv3 ↑",
        "PickScore ↑",
        "ArtiMuse ↑",
        "CLIP ↑",
        "Q-Align ↑",
        "MUSIQ ↑",
    ),
    rows=(
        ("ScaleCrafter", ("164.02", "6.83", "21.68", "67.88", "33.36", "4.30", "38.21")),
        ("FouriScale", ("164.71", "11.19", "21.86", "65.87", "33.11", "4.50", "38.96")),
        ("Sana", ("144.17", "10.83", "23.18", "63.72", "35.49", "4.89", "45.08")),
        ("Diffusion-4K", ("152.43", "8.92", "21.88", "63.76", "33.00", "4.69", "27.51")),
        ("UltraFlux", ("143.11", "11.47", "22.69", "68.36", "34.62", "4.85", "46.13")),
    ),
    metrics=("fid_fitted", "hpsv3", "pickscore", "artimuse", "clip_score_b16", "qalign", "musiq"),
    wants="Aesthetic-Eval@4096 prompts at 4096 x 4096; seeds, steps and guidance not stated",
)

TEXT_TO_IMAGE_2K = PublishedTable(
    caption="Text to image, Aesthetic-Eval@2048, 2048 x 2048",
    source="Diffusion-4K, table 3",
    columns=("FID ↓", "CLIPScore ↑", "Aesthetics ↑"),
    rows=(
        ("SD3-F16@2048", ("43.82", "31.50", "5.91")),
        ("SD3-F16-WLF@2048", ("40.18", "34.04", "5.96")),
        ("Flux-F16@2048", ("50.57", "30.41", "6.36")),
        ("Flux-F16-WLF@2048", ("39.49", "34.41", "6.37")),
    ),
    metrics=("fid_fitted", "clip_score_b16", "laion_aesthetics"),
    # The released script; which of LAION's predictors it reads is not stated.
    protocols=(_FID_4K, _CLIP_4K, ""),
    wants=_SAMPLING_4K,
)

DETAIL = PublishedTable(
    caption="Fine detail, Aesthetic-Eval at 2048 x 2048 and 4096 x 4096",
    source="Diffusion-4K, tables 4 and 8",
    columns=("GLCM score ↑", "Compression ratio ↓"),
    rows=(
        ("Flux-F16@2048", ("0.58", "14.80")),
        ("Flux-F16-WLF@2048", ("0.61", "13.60")),
        ("SD3-F16@4096", ("0.73", "11.97")),
        ("SD3-F16-WLF@4096", ("0.77", "10.50")),
    ),
    metrics=("glcm_score", "compression_ratio"),
    protocols=("glcm/diffusion4k/v1", "jpeg95-420/v1"),
    wants=_SAMPLING_4K,
)

ABLATION_LADDER = PublishedTable(
    caption="Additive ablation, 500K images and 10K steps each, Aesthetic-Eval@4096",
    source="UltraFlux, ablation table",
    columns=("FID ↓", "HPSv3 ↑", "ArtiMuse ↑"),
    rows=(
        ("Flux + F16 VAE", ("151.40", "9.22", "66.39")),
        ("+ SNR-HW", ("148.81", "9.70", "67.23")),
        ("+ SNR-HW + SACL", ("147.32", "10.30", "67.31")),
        ("+ SNR-HW + SACL + Resonance 2D RoPE w. YaRN", ("146.93", "10.91", "68.13")),
    ),
    metrics=("fid", "hpsv3", "artimuse"),
)

ABLATION_DATA_MODEL = PublishedTable(
    caption="Data and model, Aesthetic-Eval@4096",
    source="UltraFlux, supplement, table 1",
    columns=("FID ↓", "HPSv3 ↑"),
    rows=(
        ("A: Diffusion-4K-v2, Flux with latent L2", ("152.09", "8.57")),
        ("B: MultiAspect-4K-1M, Flux with latent L2", ("151.41", "9.17")),
        ("C: Diffusion-4K-v2, UltraFlux", ("147.41", "10.03")),
        ("D: MultiAspect-4K-1M, UltraFlux", ("145.81", "10.78")),
    ),
    metrics=("fid", "hpsv3"),
)

TABLES_OF_SUITE: dict[str, PublishedTable] = {
    "aesthetic-eval-4096": TEXT_TO_IMAGE,
    "aesthetic-eval-2048": TEXT_TO_IMAGE_2K,
    "reconstruction": VAE_RECONSTRUCTION,
    "detail": DETAIL,
}
"""Suite to the published table with its layout."""
