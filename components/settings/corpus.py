"""Settings of the corpus stages; part of the one schema in `components.settings.schema`."""

from __future__ import annotations

import codecs
import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, Strict, field_validator, model_validator

from components.settings.open_section import OpenSection
from components.settings.section import Count, Fraction, NonNegative, PositiveFraction, Section


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


class ListSettings(Section):
    """How lists of addresses are written, where a file does not say it itself."""

    encoding: str | None = None
    """Python's name for it, such as cp1252 or gb18030; None: UTF-8, and a list that is not is
    refused. A byte order mark in a file decides for that file."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Between the cells of a line; None: a comma, in .tsv a tab."""
    columns: Annotated[tuple[str, ...], Strict(False), Field(min_length=1)] | None = None
    """Names of the cells of a line, for lists without a heading; None: line 1 holds them."""
    url_column: str | None = None
    """The column or field of the addresses; None: image_url, url and other common spellings."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        if name is None:
            return None
        try:
            known = codecs.lookup(name)
        except LookupError:
            raise ValueError(
                f"{name!r} is no encoding that Python knows; try utf-8, cp1252 or gb18030"
            ) from None
        # Codecs such as rot13 and base64 turn no bytes into text.
        if not known._is_text_encoding:
            raise ValueError(f"{name!r} is no encoding of text; try utf-8, cp1252 or gb18030")
        try:
            # As lists are read. The mark is what UTF-16 without a byte order asks for.
            known.incrementaldecoder("replace").decode(codecs.BOM_UTF32_LE)
        except UnicodeError:
            # Such as idna, of single names.
            raise ValueError(
                f"{name!r} reads no whole file; try utf-8, cp1252 or gb18030"
            ) from None
        return name

    @field_validator("separator")
    @classmethod
    def _separates(cls, separator: str | None) -> str | None:
        if separator is not None and separator in '"\r\n':
            raise ValueError("a quotation mark or a line end separates no cells; try , ; or |")
        return separator


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
    """CSV inside the source with columns file, author, license (None: no attribution known). A file
    of another name than ATTRIBUTION.csv must be there."""
    max_megapixels: Annotated[float, Field(gt=0)]
    """Larger headers are rejected before any pixel is decoded (decompression bombs)."""
    lists: ListSettings = ListSettings()
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


class QualitySettings(OpenSection):
    """Image quality and aesthetics: the scorer's name is stored beside every score."""

    chosen_by: ClassVar[tuple[str, ...]] = ("scorer", "aesthetic_scorer")
    table: ClassVar[str] = "components.corpus.quality.scorers:SCORERS"

    scorer: str
    """A name of the table of scorers. `classical`: sharpness/noise/exposure index computed here;
    `table`: scores made elsewhere; `qalign`: the paper's scorer, 1 to 5."""
    aesthetic_scorer: str
    """A name of the table of scorers. `classical`: colour/contrast/composition index; `table`:
    scores made elsewhere; `artimuse`: the paper's scorer, 0 to 100."""
    scores: str | None
    """For `table`: Parquet or CSV with image_id, quality, quality_scorer and/or aesthetic,
    aesthetic_scorer."""
    qalign_weights: str | None
    """For `qalign`: folder of q-future/one-align."""
    artimuse_url: Annotated[str, Field(pattern=r"^https?://[^@/?#\s]+$")] | None
    """For `artimuse`: address of a scorer server, such as http://127.0.0.1:8765."""

    @classmethod
    def offered(cls, field: str) -> list[str]:
        """Scorers that give the kind of score which `field` asks for."""
        kind = "aesthetic" if field == "aesthetic_scorer" else "quality"
        return [name for name, scorer in cls.entries().items() if kind in scorer.kinds]

    @model_validator(mode="after")
    def _scorers_have_what_they_need(self) -> Self:
        for field in self.chosen_by:
            name: str = getattr(self, field)
            # A name that is unknown has been refused with a line of its own.
            needs = self.entries()[name].needs if name in self.offered(field) else None
            if needs is not None and getattr(self, needs) is None:
                raise ValueError(f"quality.{needs} must be set for quality.{field} {name!r}")
        return self


class NsfwSettings(Section):
    """Score of unsafe content, 0 to 1."""

    scorer: Literal["none", "nsfwjs", "nudenet", "classifier"]
    """`nsfwjs`: MobileNetV2 of that package (MIT; `ultraflux weights get nsfwjs`); `nudenet`:
    strongest exposed part (extra `nsfw`, AGPL); `classifier`: an image classifier."""
    weights: str | None
    """For `classifier`: folder of an image classifier of transformers. For `nsfwjs`: folder of its
    network, null for weights/nsfwjs."""

    @model_validator(mode="after")
    def _classifier_needs_folder(self) -> NsfwSettings:
        if self.scorer == "classifier" and self.weights is None:
            raise ValueError("people.nsfw.weights must name a folder for scorer 'classifier'")
        return self


class PeopleSettings(Section):
    """Evidence of people, the source of the `character` tag, and NSFW scores."""

    detector: Literal["classical", "nudenet", "owlv2", "rtdetr", "yoloe", "table"]
    """`classical`: cascade face detector on the derivative; `nudenet`: its faces; `owlv2`,
    `rtdetr`, `yoloe` (AGPL extra): people; `table`: none, every image has a row in `boxes`."""
    boxes: str | None
    """Boxes made elsewhere or by hand: Parquet or CSV with image_id, person_count, person_boxes,
    person_scorer. An image with a row there is not looked at by the detector. Below data/scores,
    so that a changed table runs the stage again."""
    weights: str | None
    """For `owlv2` and `rtdetr` a folder, for `yoloe` a file."""
    min_score: Fraction
    """Weaker detections do not count; the classical detector has no scores."""
    human_queries: Annotated[tuple[str, ...], Strict(False)]
    """Search queries whose results form the human channel (manifest column `query`)."""
    human_sources: Annotated[tuple[str, ...], Strict(False)]
    """Sources that belong to the human channel as a whole (manifest column `source`)."""
    nsfw: NsfwSettings

    @model_validator(mode="after")
    def _detector_has_what_it_needs(self) -> PeopleSettings:
        if self.detector == "table" and self.boxes is None:
            raise ValueError("people.boxes must name a file when people.detector is 'table'")
        if self.detector in ("owlv2", "rtdetr", "yoloe") and self.weights is None:
            raise ValueError(f"people.weights must be set when people.detector is {self.detector}")
        return self


class HumanChannelSettings(Section):
    """Rules for images of the human channel; None switches a rule off."""

    max_flat_fraction: Fraction | None
    """The paper names no flatness rule for this channel."""
    min_entropy_bits: Annotated[float, Field(ge=0, le=8)] | None
    min_quality: float | None
    """On the scale of the scorer; paper: the same filter as in the general channel."""
    aesthetic_top_fraction: PositiveFraction | None
    """Share of this channel; None: both channels are ranked together."""


class ShareSettings(Section):
    """Bounds of a group's share of the corpus."""

    ordered = (("min_share", "max_share"),)

    min_share: Fraction
    max_share: PositiveFraction


class AspectQuotaSettings(ShareSettings):
    """Share of images whose aspect ratio width / height lies in [min_ratio, max_ratio)."""

    name: Annotated[str, Field(min_length=1)]
    min_ratio: Annotated[float, Field(gt=0)]
    max_ratio: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if self.min_ratio >= self.max_ratio:
            raise ValueError(
                f"min_ratio {self.min_ratio:g} must be below max_ratio {self.max_ratio:g}"
            )
        return self


class LicenseSettings(Section):
    """Which licences a corpus takes, by names as `selection.rights.license_id` writes them.

    Such as CC0-1.0, CC-BY-SA-4.0, public-domain, or unknown where a photograph has none; patterns
    such as CC-BY-NC* are allowed, upper and lower case are the same. Not in the paper: ours.
    """

    allow: Annotated[tuple[str, ...], Strict(False)] | None
    """Only these; None: all that are not denied."""
    deny: Annotated[tuple[str, ...], Strict(False)]
    """Never these, allowed or not."""
    share_alike: Literal["mixed", "without", "only"]
    """Licences that ask for themselves in what is made from the work: `mixed` with the others, or
    a corpus `without` them, or of them `only`, so that the two stay apart."""


class SelectSettings(Section):
    """Selection rules (UltraFlux supplement 2.1); None switches a rule off."""

    exclusions: str
    """CSV below the repository root with columns kind, value, why: an identity (sha256 or path),
    url, photographer or host that no corpus may hold (`ultraflux corpus forget` writes it)."""
    licenses: LicenseSettings
    """Rules about licences."""

    min_pixels: Count
    """Paper: 3840 * 2160 = 8294400, without resizing."""
    max_alpha_fraction: Fraction | None
    """Largest mean transparency, 0 to 1: transparent parts are seen as white. Not in the paper:
    ours. None: no rule."""
    max_nsfw: Fraction | None
    """Largest NSFW score, 0 to 1; not published. None: no rule. An image without a score fails."""
    max_drawing: Fraction | None
    """Largest `drawing_score` of `people.nsfw.scorer: nsfwjs`, 0 to 1: what looks drawn or rendered
    is rejected. Not in the paper: ours. None: no rule. An image without a score fails."""
    max_flat_fraction: Fraction
    """Paper: an image with more than 0.5 flat patches is dropped."""
    min_entropy_bits: Annotated[float, Field(ge=0, le=8)]
    """Paper: 7.0."""
    min_quality: float | None
    """Paper: 4.0 on the Q-Align scale of 1 to 5; meaningless for another scorer."""
    near_duplicate_distance: Annotated[int, Field(ge=0, le=47)] | None
    """Largest Hamming distance of PDQ hashes (256 bits) of near duplicates; PDQ's authors: 31."""
    near_duplicate_min_quality: Annotated[int, Field(ge=0, le=100)]
    """Hashes of lower PDQ quality are not compared; PDQ's authors: 50."""
    aesthetic_top_fraction: PositiveFraction
    """Share kept by aesthetic score; paper: 0.3 by ArtiMuse."""
    human: HumanChannelSettings
    """Rules for images of the human channel, in place of those above of the same name."""
    aspect_quotas: Annotated[tuple[AspectQuotaSettings, ...], Strict(False)]
    """Shares of shapes; an image belongs to the first that it fits. Not in the paper: ours."""
    character_quota: ShareSettings | None
    """Share of images with people (`is_character`). Not in the paper: ours."""
    target_images: Count | None
    """Size of a stratified sample (bucket, channel, character) of what is left; None: all."""

    @model_validator(mode="after")
    def _shares_leave_room(self) -> Self:
        total = math.fsum(quota.min_share for quota in self.aspect_quotas)
        # A third three times is a hair above.
        if total > 1 + 1e-9:
            raise ValueError(f"min_share of aspect_quotas add up to {total:g}, which is above 1")
        return self


class ValidateSettings(Section):
    """Data contracts: YAML files below the repository root, tracked by DVC."""

    raw: str
    """What must hold once candidates are ingested; checked at the end of `ingest`."""
    scored: str
    """What must hold once every candidate is scored and judged; checked at the end of `select`."""
    released: str
    """What must hold of the captioned manifest; `validate` checks it with the other two."""


class ImagesSettings(Section):
    """Versions of the original photographs (`ultraflux corpus pack`)."""

    rows: Literal["kept", "all"]
    """`kept`: the released corpus (data/slices); `all`: every readable candidate (data/ingest)."""
    shard_digits: Annotated[int, Field(ge=1, le=3)]
    """Hexadecimal digits of the sha256 that decide an image's shard: 16, 256 or 4,096 shards."""


class SlicesSettings(Section):
    """Training slices."""

    vae_top_fraction: PositiveFraction
    """Share with the least flat area for VAE post-training; paper: 0.5."""
    stage2_top_fraction: PositiveFraction
    """Share by aesthetic score for SACL stage 2; paper: 0.05."""
    min_images: Count
    """Floor of every slice, so that a tiny corpus still trains."""
    ablation_images: Count
    """Size of the stratified random subset for ablations; paper: 500K."""
    eval_fraction: PositiveFraction
    """Share of images held out from all training."""
    eval_min_images: Count
