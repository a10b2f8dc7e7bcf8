"""The one settings schema: every value of `params.yaml`, typed, bounded and documented.

Values live in `conf/` (profiles) and in the composed `params.yaml`; this module holds no defaults
except where a settings object is part of a public function signature (`SnrHuberSettings`).
Unknown or out-of-range keys raise `SettingsError`, one line per problem.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, Strict, ValidationError, model_validator

from components.corpus.settings import (
    CaptionSettings,
    EndpointSettings,
    ImagesSettings,
    IngestSettings,
    PeopleSettings,
    QualitySettings,
    SelectSettings,
    SignalsSettings,
    SlicesSettings,
    ValidateSettings,
)
from components.section import (
    Count,
    HeightWidth,
    Ints,
    NonNegative,
    Section,
)
from components.training.settings import DitStageSettings, LatentsSettings, VaeSettings


class SettingsError(ValueError):
    """Bad settings; the message names file, field, value and allowed range, one problem a line."""


class ProjectSettings(Section):
    """Identity of a pipeline."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    """MLflow experiment and registry prefix."""
    profile: Literal["embedded", "single-gpu", "paper"]
    """The profile in `conf/profiles/` that the values came from."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """Root of every random stream."""


class RuntimeSettings(Section):
    """Machine resources."""

    torch_threads: Count
    """Intra-op threads of a training process; fixed because sums depend on it bit for bit."""
    workers: Count
    """Worker processes of the corpus engine (results do not depend on it)."""
    engine: Literal["local", "ray"]
    """Where those workers run: processes of this machine, or actors of a Ray cluster (extra
    `ray`)."""
    ray_address: Annotated[str, Field(pattern=r"^(auto|[\w.-]+:\d{1,5})$")] | None
    """For `ray`: head node of a running cluster, such as 10.0.0.1:6379, or `auto` on one of its
    machines; None: an instance on this machine's loopback, with a CPU per worker."""
    actors: Count | None
    """For `ray`: worker actors, one CPU each; None: as many as the cluster has room for."""
    gpus_per_actor: Annotated[float, Field(ge=0, le=8)]
    """For `ray` and device `cuda`: of stages that run networks; a share such as 0.5 puts two actors
    on a GPU. Device `cpu`: none."""
    processes: Count
    """Training processes (ranks) per node."""
    nodes: Count
    """Machines of a training run. They see the same files; `python -m
    components.training.dit_worker JOB.json --join` on the others joins a run (job.json lies in its
    state folder)."""
    rendezvous_endpoint: Annotated[str, Field(pattern=r"^[\w.-]+:\d{1,5}$")] | None
    """For several nodes: host and port of the one that the others meet at, such as node1:29400."""
    max_restarts: Annotated[int, Field(ge=0, le=100)]
    """How often all ranks of a stage start again from the newest checkpoint when one of them dies
    or stands still, before the stage fails."""
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=1440)]
    """How long ranks may wait for each other; longer than the slowest single part between two
    meetings, such as loading the weights."""
    device: Literal["cpu", "cuda"]
    """Where models run."""
    peak_tflops: Annotated[float, Field(gt=0)] | None
    """Dense bf16 TFLOP/s of one GPU by its data sheet, such as 989 for an H100 or H200 SXM; model
    FLOPs utilisation (MFU) is logged against it. None: not logged."""
    compile: Literal["none", "blocks"] = "none"
    """For DiT training. `blocks`: torch.compile of every transformer block, one graph of a kind for
    all buckets, made in a fixed order when a process starts; results differ from `none` by
    rounding and resume with the same bytes."""
    context_parallel_degree: Count = 1
    """Ranks that share the tokens of each sample in DiT training (Ulysses), for sequences too long
    for one GPU; divides the ranks, the heads and every bucket's tokens. 1: none."""
    gpus: Annotated[int, Field(ge=0, le=64)]
    """GPUs of this machine that a stage that trains or encodes takes for itself (`meta` in
    dvc.yaml); 0: none."""
    network_gpus: Annotated[int, Field(ge=0, le=64)]
    """Likewise of a stage that runs networks in one process: quality, people, generate,
    evaluate."""
    gpu_free_fraction: Annotated[float, Field(ge=0, le=1)]
    """Share of a GPU's memory that has to be unused before a stage takes it."""
    gpu_wait_minutes: Annotated[float, Field(ge=0)]
    """How long a stage waits for GPUs that others hold before it fails; its own time limit stands
    still meanwhile."""
    gpu_hour_price: Annotated[float, Field(ge=0)] | None
    """Price of a GPU for an hour, in any currency, for the cost of runs; None: cost is not said."""
    encoders_per_gpu: Count = 2
    """Worker processes per GPU that encode latents and texts (device `cuda`, engine `local`): one
    decodes its photograph while the other encodes."""
    verify_reads: Literal["always", "first", "never"] = "always"
    """When training compares a stored record with its hash: on every read, on the first read of a
    record in this process, or not at all."""
    offline: bool
    """Set HF_HUB_OFFLINE so that a missing weight fails at once instead of waiting for a hub."""

    @model_validator(mode="after")
    def _nodes_meet_somewhere(self) -> RuntimeSettings:
        if self.nodes > 1 and self.rendezvous_endpoint is None:
            raise ValueError(
                f"runtime.nodes = {self.nodes} needs runtime.rendezvous_endpoint, the HOST:PORT of "
                "one of the nodes"
            )
        return self

    @model_validator(mode="after")
    def _samples_divide_over_ranks(self) -> RuntimeSettings:
        ranks = self.processes * self.nodes
        if ranks % self.context_parallel_degree:
            raise ValueError(
                f"runtime.context_parallel_degree {self.context_parallel_degree} does not divide "
                f"the {ranks} ranks (processes x nodes)"
            )
        return self

    @model_validator(mode="after")
    def _actors_see_a_gpu(self) -> RuntimeSettings:
        if self.engine == "ray" and self.device == "cuda" and self.gpus_per_actor == 0:
            raise ValueError(
                "runtime.gpus_per_actor must be above 0 for engine 'ray' on device 'cuda'"
            )
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError("runtime.gpus_per_actor must be a whole number when it is above 1")
        return self


class BucketsSettings(Section):
    """Aspect-ratio buckets."""

    published: Literal["table", "text"]
    """Which published set: the supplement's table 3 or the sizes in its text."""
    target_pixels: Annotated[int, Field(ge=32 * 32)] | None
    """Keep the aspect ratios but scale to this area (embedded profile); None: published sizes."""


class TinyAutoencoder(Section):
    """Shape of the random autoencoder that stands in where no weights folder is named."""

    block_out_channels: Ints
    layers_per_block: Count
    norm_num_groups: Count


class AutoencoderSettings(Section):
    """The F16 autoencoder."""

    pretrained: str | None
    """Folder with a Flux VAE (F8, or F16 with stride 2); None: `tiny`."""
    stride: Literal[1, 2]
    decode_mode: Literal["aligned", "official_partitioned"]
    tiny: TinyAutoencoder


class TinyTransformer(Section):
    """Shape of the random Flux transformer."""

    num_layers: Count
    num_single_layers: Count
    num_attention_heads: Count
    axes_dims_rope: Annotated[tuple[Count, Count, Count], Strict(False)]


class TinySd3Transformer(Section):
    """Shape of the random SD3 transformer."""

    num_layers: Count
    num_attention_heads: Count
    attention_head_dim: Count
    sample_size: Annotated[int, Field(ge=2, multiple_of=2)]
    """Latent pixels over which the positions 0 to sample_size/2 are spread; SD3: 128."""
    pos_embed_max_size: Count
    """Side of the table of positions in 2x2 patches; SD3-2B: 192."""


class Sd3Settings(Section):
    """What the SD3 backbone has of its own."""

    pos_embed_max_size: Count | None
    """Continue the position table of `pretrained` to this many patches an edge (a patch is 32 px
    with F16), for images beyond it; null: its own, and larger images are an error."""
    tiny: TinySd3Transformer


class ModelCardSettings(Section):
    """What only the owner of the weights can say in a model card."""

    license: Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")]
    """Identifier of the model hub's list, such as apache-2.0, other or unknown. Weights trained
    from others inherit their terms."""
    license_name: str | None
    """Name of the licence where `license` is other."""
    base_model: str | None
    """Hub repository of the weights that training began with."""


class TransformerSettings(Section):
    """The DiT."""

    backbone: Literal["flux", "sd3"]
    """Architecture: Flux (UltraFlux), or SD3, Diffusion-4K's second one. The text encoders follow:
    T5 and CLIP for Flux, T5 and two CLIPs for SD3."""
    pretrained: str | None
    """Folder of a transformer of that architecture; None: a random tiny one."""
    rope_variant: Literal["official", "official_prefix", "paper", "flux"]
    rope_window: Count
    """Training window in tokens per axis; paper: 64."""
    card: ModelCardSettings
    tiny: TinyTransformer
    sd3: Sd3Settings


class TinyTextEncoders(Section):
    """Shapes of the random T5 and CLIP encoders."""

    t5_dim: Count
    clip_dim: Count
    """Width of the pooled vector; SD3's two CLIPs have half of it each (even, at most t5_dim)."""
    vocab_size: Annotated[int, Field(ge=300)]


class TextEncodersSettings(Section):
    """T5 and CLIP."""

    pretrained: str | None
    """FLUX.1-dev folder (tokenizer, tokenizer_2, text_encoder, text_encoder_2), or for the backbone
    sd3 its folder (the same and tokenizer_3, text_encoder_3); None: `tiny`."""
    max_sequence_length: Annotated[int, Field(ge=8, le=512)]
    tiny: TinyTextEncoders


class ModelsSettings(Section):
    """The three networks."""

    autoencoder: AutoencoderSettings
    transformer: TransformerSettings
    text_encoders: TextEncodersSettings


class SnrHuberSettings(Section):
    """SNR-aware Huber wavelet objective; alpha, beta, gamma are not published: ours."""

    c_min: Annotated[float, Field(gt=0)] = 0.2
    c_max: Annotated[float, Field(gt=0)] = 1.0
    alpha: Annotated[float, Field(gt=0)] = 1.0
    beta: NonNegative = 1.0
    gamma: Annotated[float, Field(gt=0)] = 5.0
    time_weight: Literal["paper", "fm_exact"] = "paper"
    band_weights: Annotated[
        tuple[NonNegative, NonNegative, NonNegative, NonNegative], Strict(False)
    ] = (1.0, 1.0, 1.0, 1.0)
    """Weights of (LL, LH, HL, HH)."""

    @model_validator(mode="after")
    def _ordered(self) -> SnrHuberSettings:
        if self.c_max < self.c_min:
            raise ValueError(f"c_max {self.c_max} must be at least c_min {self.c_min}")
        return self


class ObjectiveSettings(Section):
    """Training objective of the DiT."""

    kind: Literal["snr_huber", "flow_matching", "wavelet"]
    wavelet_space: Literal["x0", "v"]
    """Only for kind `wavelet` (Diffusion-4K's WLF)."""
    snr_huber: SnrHuberSettings


class GenerateSettings(Section):
    """Sampling."""

    sizes: Annotated[tuple[HeightWidth, ...], Strict(False), Field(min_length=1)]
    """(height, width) in pixels, multiples of 32."""
    prompts: Count
    """How many held-out captions are sampled (all sizes each)."""
    num_inference_steps: Count
    guidance_scale: NonNegative
    shift: Annotated[float, Field(gt=0)]
    """FlowMatchEuler shift; the released script: 3.0."""
    schedule: Literal["static", "dynamic"]
    """`static`: `shift` for every size (the released script). `dynamic`: a shift that grows with
    the number of image tokens, as in stock Flux."""
    weights: Literal["ema", "raw"]
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _multiples(self) -> GenerateSettings:
        for height, width in self.sizes:
            if height % 32 or width % 32:
                raise ValueError(f"size {height}x{width}: both edges must be multiples of 32")
        return self


class RefinerSettings(Section):
    """Prompt refiner of `ultraflux generate --refine` (UltraFlux supplement 12)."""

    endpoint: EndpointSettings
    language: Literal["English", "Chinese"]
    min_words: Count
    """The supplement asks for 55 to 100; what lies outside is asked again, then left as it was."""
    max_words: Count
    prompt_file: str | None
    """Text file, relative to the project, with the exact system prompt to send instead."""
    batch_size: Annotated[int, Field(ge=1, le=50)]
    """Prompts per request."""
    max_cost_usd: NonNegative
    """Over all runs with the same settings."""


class EvaluateSettings(Section):
    """Evaluation and report."""

    reconstruction_images: Count
    """Held-out images for PSNR, SSIM and NMSE of the VAE."""
    bootstrap_resamples: Annotated[int, Field(ge=100)]
    report_image_px: Annotated[int, Field(ge=64)]
    """Long edge of pictures inside the HTML report."""


class BaselineSettings(Section):
    """Scores that a candidate is compared with."""

    scores: Annotated[str, Field(min_length=1)]
    """Parquet file below the repository root, kept in Git or DVC: `data/evaluate/scores.parquet` of
    the champion (`ultraflux promote --keep-baseline` writes it)."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file, so that a baseline never changes unnoticed and a new one re-runs the gate."""


class NonInferioritySettings(Section):
    """One metric that must not become worse than the baseline's by more than a margin."""

    system: str
    """As in the scores table, such as `generated` or `reconstruction_after`."""
    metric: str
    """Id of a metric card, which also says the better direction."""
    margin: NonNegative
    """In the metric's unit."""


class PromoteSettings(Section):
    """Promotion gate."""

    alias: Literal["candidate", "champion"]
    min_vae_psnr_gain_db: float
    min_validation_loss_drop: float
    """Relative fall of the DiT validation loss over both stages, 0 to 1."""
    baseline: BaselineSettings | None
    """None: there is none yet; `non_inferiority` is then stated as not compared."""
    non_inferiority: Annotated[tuple[NonInferioritySettings, ...], Strict(False)]
    significance: Annotated[float, Field(gt=0.0, lt=0.5)]
    """One-sided level of the lower bounds; 0.05 is a 95% bound."""
    correction: Literal["holm", "none"]
    """`holm`: every rule may be read as a claim of its own. `none`: suffices for the decision,
    because all rules must hold at once."""
    resamples: Annotated[int, Field(ge=100)]
    """Of the bootstrap over prompts; with m rules under `holm` at least m / significance."""


class Settings(Section):
    """All of `params.yaml`."""

    project: ProjectSettings
    runtime: RuntimeSettings
    ingest: IngestSettings
    signals: SignalsSettings
    quality: QualitySettings
    people: PeopleSettings
    select: SelectSettings
    caption: CaptionSettings
    validation: ValidateSettings
    slices: SlicesSettings
    images: ImagesSettings
    buckets: BucketsSettings
    models: ModelsSettings
    vae: VaeSettings
    latents: LatentsSettings
    objective: ObjectiveSettings
    dit_stage1: DitStageSettings
    dit_stage2: DitStageSettings
    generate: GenerateSettings
    refiner: RefinerSettings
    evaluate: EvaluateSettings
    promote: PromoteSettings


def _nearest_key(location: tuple[str | int, ...]) -> str | None:
    """The known key closest to the last part of an unknown `location`."""
    model: type[BaseModel] = Settings
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        model = field.annotation
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1, cutoff=0.4)
    return close[0] if close else None


# A key pasted where its variable's name belongs, or a password in an address, is not repeated.
_MAY_HOLD_A_SECRET = ("api_key_env", "base_url")


def _describe(error: Any, where: str) -> str:
    """One line for one pydantic error."""
    location = error["loc"]
    name = ".".join(str(part) for part in location) or "settings"
    if error["type"] == "extra_forbidden":
        nearest = _nearest_key(location)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        return f"{where}: unknown key '{name}'{hint}"
    if error["type"] == "missing":
        return f"{where}: missing key '{name}'"
    message = str(error["msg"]).removeprefix("Value error, ")
    if location and location[-1] in _MAY_HOLD_A_SECRET:
        return f"{where}: {name} (value not shown): {message[0].lower()}{message[1:]}"
    return f"{where}: {name} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def parse_settings(values: Any, *, where: str = "params.yaml") -> Settings:
    """Validate a nested mapping.

    Args:
        values: what YAML gave, sections by name.
        where: file name for messages.

    Raises:
        SettingsError: every problem on a line of its own: field, value, allowed range.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected a mapping of sections, got {type(values).__name__}")
    try:
        return Settings.model_validate(values)
    except ValidationError as problem:
        lines = [_describe(error, where) for error in problem.errors()]
        raise SettingsError("\n".join(lines)) from None


def load_settings(path: Path) -> Settings:
    """Read and validate a `params.yaml`.

    Raises:
        SettingsError: file missing, not YAML, or not valid settings.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{path}: not found; run `ultraflux config compose --profile embedded`"
        ) from None
    except yaml.YAMLError as problem:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(problem).split())}") from None
    return parse_settings(values, where=path.name)
