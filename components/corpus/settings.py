"""Settings of the corpus stages; part of the one schema in `components.settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from components.section import Count, Fraction, NonNegative, PositiveFraction, Section


class DownloadSettings(Section):
    """Bounds on what is fetched or unpacked, and manners towards the hosts."""

    concurrency: Annotated[int, Field(ge=1, le=1024)]
    """Requests in progress over all hosts."""
    host_connections: Annotated[int, Field(ge=1, le=64)]
    """Requests in progress per host."""
    requests_per_second: Annotated[float, Field(gt=0)]
    """Per host; idle hosts may get one second's worth at once."""
    connect_timeout_s: Annotated[float, Field(gt=0)]
    read_timeout_s: Annotated[float, Field(gt=0)]
    """Longest silence while an answer arrives."""
    total_timeout_s: Annotated[float, Field(gt=0)]
    """Of one body, from first to last byte."""
    max_mb: Annotated[float, Field(gt=0)]
    """Largest original, in MiB."""
    min_pixels: Annotated[int, Field(ge=1)]
    """Smaller images are refused by their header before the body is fetched; 1: no probe."""
    retries: Annotated[int, Field(ge=0, le=20)]
    """After timeouts, 429, 5xx and cut bodies; other failures are final."""
    backoff_s: NonNegative
    """Wait before the first retry; doubles with each."""
    max_wait_s: NonNegative
    """Upper bound of every wait, also of one that Retry-After asks for."""
    user_agent: Annotated[str, Field(min_length=1, pattern=r"^[\x20-\x7e]+$")]
    """Says who fetches; X-Robots-Tag lines for its first word concern us."""
    respect_robots_tag: bool
    """Leave images whose X-Robots-Tag says noai, noimageai, noindex, noimageindex or none."""
    private_hosts: Annotated[tuple[str, ...], Strict(False)]
    """Hosts that may have private addresses (an intranet); all others must be public."""


class IngestSettings(Section):
    """Where candidates come from."""

    kind: Literal["folder", "urls", "webdataset", "multiaspect"]
    """`folder`: photographs; `urls`: CSV, JSONL or Parquet lists; `webdataset`: tar archives;
    `multiaspect`: JSON shards of the released MultiAspect-4K-1M metadata."""
    source: str
    """Folder of photographs (or list, archive, folder of these), relative to the repository root or
    absolute."""
    recursive: bool
    extensions: Annotated[tuple[str, ...], Strict(False)]
    """Lower-case file endings with the dot."""
    attribution: str | None
    """CSV inside the source with columns file, author, license (None: no attribution known)."""
    max_megapixels: Annotated[float, Field(gt=0)]
    """Larger headers are rejected before any pixel is decoded (decompression bombs)."""
    download: DownloadSettings


class SignalsSettings(Section):
    """Classical per-image signals (UltraFlux supplement 2.1)."""

    patch_px: Annotated[int, Field(ge=8, le=1024)]
    """Edge of a flatness patch; paper: 240."""
    flat_variance: NonNegative
    """A patch is flat when Var(Sobel magnitude) is below this; paper: 800."""
    derivative_px: Annotated[int, Field(ge=64)]
    """Long edge of the small derivative that model scorers and reports read."""
    glcm: bool
    """Measure co-occurrence texture: no rule reads it, and it takes longer than all other signals
    together."""
    timeout_s: Annotated[float, Field(gt=0)]
    """Per image; an image that takes longer becomes a quarantined row."""
    memory_mb: Count
    """Address-space headroom of one worker in MiB, above what it holds at start."""
    retries: Annotated[int, Field(ge=0, le=10)]


class QualitySettings(Section):
    """Image quality and aesthetics: the scorer's name is stored beside every score."""

    scorer: Literal["classical", "table"]
    """`classical`: sharpness/noise/exposure index computed here; `table`: scores made elsewhere."""
    scores: str | None
    """For `table`: Parquet or CSV with image_id, quality, quality_scorer, aesthetic,
    aesthetic_scorer."""

    @model_validator(mode="after")
    def _table_needs_file(self) -> QualitySettings:
        if self.scorer == "table" and self.scores is None:
            raise ValueError("quality.scores must name a file when quality.scorer is 'table'")
        return self


class PeopleSettings(Section):
    """Evidence of people, the source of the `character` tag."""

    detector: Literal["classical", "table"]
    """`classical`: cascade face detector on the derivative; `table`: boxes made elsewhere."""
    boxes: str | None
    """For `table`: Parquet or CSV with image_id, person_count, person_boxes, person_scorer."""
    min_score: Fraction

    @model_validator(mode="after")
    def _table_needs_file(self) -> PeopleSettings:
        if self.detector == "table" and self.boxes is None:
            raise ValueError("people.boxes must name a file when people.detector is 'table'")
        return self


class SelectSettings(Section):
    """Selection rules (UltraFlux supplement 2.1); None switches a rule off."""

    min_pixels: Count
    """Paper: 3840 * 2160 = 8294400, without resizing."""
    max_flat_fraction: Fraction
    """Paper: an image with more than 0.5 flat patches is dropped."""
    min_entropy_bits: Annotated[float, Field(ge=0, le=8)]
    """Paper: 7.0."""
    min_quality: float | None
    """Paper: 4.0 on the Q-Align scale of 1 to 5; meaningless for another scorer."""
    aesthetic_top_fraction: PositiveFraction
    """Share kept by aesthetic score; paper: 0.3 by ArtiMuse."""


class CaptionSettings(Section):
    """Captions."""

    provider: Literal["shipped"]
    """`shipped`: a captions.jsonl with file, caption_en, caption_zh beside the photographs."""
    file: str
    """Captions file, relative to the ingest source."""
    min_words: Annotated[int, Field(ge=0)]
    max_words: Count
    """English length outside [min_words, max_words] marks the caption as failed."""


class ValidateSettings(Section):
    """Data contract."""

    contract: str
    """YAML under data/contracts/."""


class SlicesSettings(Section):
    """Training slices."""

    vae_top_fraction: PositiveFraction
    """Share with the least flat area for VAE post-training; paper: 0.5."""
    stage2_top_fraction: PositiveFraction
    """Share by aesthetic score for SACL stage 2; paper: 0.05."""
    min_images: Count
    """Floor of every slice, so that a tiny corpus still trains."""
    eval_fraction: PositiveFraction
    """Share of images held out from all training."""
    eval_min_images: Count
