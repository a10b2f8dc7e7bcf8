"""A DiT training run put together: data, network, engine, and what watches and saves it.

`assemble_run` reads in the order in which things have to happen: what can be refused is refused
before anything expensive is made, the network has its final form before DeepSpeed wraps it, and
the checkpoint comes last, because it is loaded into everything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from components.models.backbones import BACKBONES, backbone_of, check_stores
from components.models.loading.block_compile import compile_blocks
from components.models.loading.block_offload import offload_frozen_blocks
from components.settings.training import DitStageSettings
from components.telemetry.metric_log import MetricLog
from components.training.distributed.divergence import DivergenceGuard
from components.training.distributed.optimizers import apply_settings
from components.training.distributed.ranks import Ranks
from components.training.dit.adapters import add_adapter
from components.training.dit.batch_plan import BatchPlan, GlobalBatch, PlanState
from components.training.dit.block_compilation import (
    check_compilation,
    compile_for_buckets,
    uncompiled,
)
from components.training.dit.curriculum import NoiseLevels, draw_noise, dropped_captions
from components.training.dit.curves import say_missing_rows
from components.training.dit.job import (
    DitJob,
    StartUnusable,
    build_transformer,
    refuse_other_start,
    start_identity,
)
from components.training.dit.sample_grids import SampleGrids, grids_of_run
from components.training.dit.throughput import Throughput
from components.training.dit.validation import ValidationSet
from components.training.dit.velocity import NoisedBatch
from components.training.sharded.activation_checkpointing import enable_activation_checkpointing
from components.training.sharded.context_parallel import (
    check_context_parallel,
    enable_context_parallel,
)
from components.training.sharded.ema import WeightAverage
from components.training.sharded.engine import UpdateGate, initialize_engine
from components.training.sharded.hand_over import loaded, note_hand_over
from components.training.sharded.run_checkpoints import RunCheckpoints
from components.training.sharded.weight_shards import master_shards
from components.training.stores.latent_store import LatentStore
from components.training.stores.text_store import EMPTY_PROMPT_ID, TextStore


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from: two stores, and the plan of which samples meet at which step."""

    job: DitJob
    latents: LatentStore
    texts: TextStore
    plan: BatchPlan

    @classmethod
    def of(cls, job: DitJob) -> TrainingData:
        """Open the job's stores.

        Raises:
            ValueError: nothing to train on, or the slice names images without latents.
            StartUnusable: captions are to be dropped and the store has no empty prompt.
        """
        verify = job.runtime.verify_reads
        latents = LatentStore(job.latents, verify=verify)
        texts = TextStore(job.texts, verify=verify)
        if job.settings.caption_dropout > 0 and EMPTY_PROMPT_ID not in texts:
            raise StartUnusable(
                f"{job.name}.caption_dropout {job.settings.caption_dropout:g}: the text embeddings "
                "hold no empty prompt; make them again with `ultraflux stage run "
                "text_embeddings`, or set it to 0"
            )
        # The slice decides, and not the store: stage 2 reads the store of stage 1 and plans over a
        # part.
        buckets = training_ids(latents.index, job.train_slice, latents.rejected)
        plan = BatchPlan(buckets, job.settings.global_batch_size, job.seed)
        return cls(job, latents, texts, plan)

    @property
    def latent_channels(self) -> int:
        """Channels of every latent."""
        # One encoder made the whole store, so any row speaks for all.
        return int(self.latents.index["latent_channels"].iloc[0])

    @property
    def held_out(self) -> list[str]:
        """Images that are never trained on."""
        index = self.latents.index
        return list(index.loc[index["split"] == "eval", "image_id"])

    def validation(self) -> ValidationSet:
        """The held-out images with their fixed noise.

        Raises:
            ValueError: there are none.
        """
        return self._measured(self.held_out)

    def training_images(self) -> ValidationSet | None:
        """The first images of the slice by id, with noise as fixed as that of held-out ones."""
        count = self.job.settings.validation_training_images
        return self._measured(self.plan.sample_ids[:count]) if count else None

    def _measured(self, image_ids: Sequence[str]) -> ValidationSet:
        settings = self.job.settings
        return ValidationSet(
            self.latents,
            self.texts,
            image_ids,
            repeats=settings.validation_repeats,
            # The size for which training's memory suffices; without gradients it suffices all the
            # more.
            batch_size=settings.micro_batch_size,
            seed=self.job.seed,
        )

    def micro_batches(self, step: int, ranks: Ranks) -> list[NoisedBatch]:
        """This rank's share of the global batch of one step, in host memory.

        Ranks that work on the same samples (context parallelism) get the same batches.
        """
        # The plan knows no ranks; they come in here, after the batch is settled.
        share = self.plan.batch(step).rank_slice(ranks.data_rank, ranks.data_world_size)
        parts = share.micro_batches(self.job.settings.micro_batch_size)
        return [self._noised(part, pins=ranks.device.type == "cuda") for part in parts]

    def _noised(self, part: GlobalBatch, *, pins: bool) -> NoisedBatch:
        # In the stored precision: half the bytes on the way to the device, which widens exactly.
        latents = self.latents.read_stored(part.sample_ids, pin_memory=pins)
        channels, height, width = latents.shape[1:]
        # Keyed by (seed, step, sample), not drawn in sequence: the noise of a sample is the same
        # on any number of ranks, in any micro batch, and after any resume.
        noise, t = draw_noise(
            self.job.seed,
            part.step,
            part.sample_ids,
            part.occurrences,
            (channels, height, width),
            NoiseLevels.of(self.job.settings),
        )
        dropped = dropped_captions(
            self.job.seed,
            part.step,
            part.sample_ids,
            part.occurrences,
            self.job.settings.caption_dropout,
        )
        captions = [
            EMPTY_PROMPT_ID if is_dropped else sample_id
            for sample_id, is_dropped in zip(part.sample_ids, dropped, strict=True)
        ]
        rest: tuple[Tensor, ...] = (noise, t, *self.texts.read_stored(captions))
        if pins:
            # Text states of several records are no contiguous tensor, which would not be pinned.
            rest = tuple(tensor.contiguous().pin_memory() for tensor in rest)
        return NoisedBatch(part.sample_ids, latents, *rest)

    def empty_batches(self, device: torch.device) -> Iterator[NoisedBatch]:
        """A micro batch of zeros of every size in the store, on `device`, in a fixed order."""
        index, count = self.latents.index, self.job.settings.micro_batch_size
        length, (width, pooled) = self.texts.tokens, self.texts.widths
        columns = ["latent_channels", "latent_h", "latent_w"]
        # Sorted, because the sizes seen first become hints of the code, which has to be the same in
        # every process.
        for shape in sorted(set(index[columns].itertuples(index=False, name=None))):
            latents = torch.zeros(count, *map(int, shape))
            texts = torch.zeros(count, length, width), torch.zeros(count, pooled)
            # Any level inside (0, 1) will do: only sizes and dtypes reach the compiler.
            t = torch.full((count,), 0.5)
            ids = ("",) * count
            yield NoisedBatch(ids, latents, latents, t, *texts).to(device)


def training_ids(
    index: pd.DataFrame, train_slice: Path | None, rejected: Collection[str] = ()
) -> dict[str, str]:
    """Bucket by image id of the training images; `rejected` ones have no latent and are left out.

    Raises:
        ValueError: nothing to train on, or the slice names images without latents.
    """
    rows = index[index["split"] == "train"]
    if train_slice is not None:
        wanted = set(pd.read_parquet(train_slice, columns=["image_id"])["image_id"])
        # The slice was made before encoding, so it still names photographs that turned out
        # unreadable.
        wanted -= set(rejected)
        absent = sorted(wanted - set(rows["image_id"]))
        if absent:
            raise ValueError(
                f"{train_slice.name}: {len(absent)} of {len(wanted)} images have no training "
                f"latents (first: {absent[0]}); run the stage `latents` again"
            )
        rows = rows[rows["image_id"].isin(wanted)]
    if rows.empty:
        raise ValueError("there is no training image; relax the rules in `select` or add photos")
    return dict(zip(rows["image_id"], rows["bucket"], strict=True))


@dataclass(frozen=True)
class AssembledRun:
    """The parts of a run in one rank, ready for its next step."""

    job: DitJob
    ranks: Ranks
    data: TrainingData
    engine: Any
    """A `deepspeed.DeepSpeedEngine` around the transformer."""
    dtype: torch.dtype
    """Of the transformer's weights and inputs."""
    uncompiled: Callable[[], AbstractContextManager[None]]
    """Inside it compiled blocks run as plain Python; does nothing where there are none."""
    compiles_objective: bool
    """Whether training takes the objective as generated code."""
    average: WeightAverage
    validation: ValidationSet
    training_images: ValidationSet | None
    """Measured beside `validation`; None: the settings ask for none."""
    grids: SampleGrids | None
    throughput: Throughput
    metrics: MetricLog | None
    """On the first rank only."""
    checkpoints: RunCheckpoints
    guard: DivergenceGuard
    gate: UpdateGate
    steps_done: int
    """Of the checkpoint that was loaded; 0: a fresh start."""


def assemble_run(job: DitJob, ranks: Ranks) -> AssembledRun:
    """Put a run together and load its newest checkpoint, if there is one; collective.

    Call inside `open_ranks` and `deterministic_torch`, and close `checkpoints.writer` at the end.

    Raises:
        ValueError: settings, stores and network do not fit together, or nothing to train on.
        PlanMismatch: the checkpoint was trained on other data.
    """
    settings = job.settings
    # Settings and tables first: a wrong slice must not cost the loading of a large network.
    check_compilation(settings, job.runtime)
    check_quantisation(job)
    data = TrainingData.of(job)
    validation = data.validation()
    # Once, and by the rank that writes it: these are gigabytes.
    began_with = start_identity(job) if ranks.is_first else ""
    model = _network(job, data, ranks, began_with)
    # From here on parameters belong to DeepSpeed: nothing may add or replace one.
    engine = initialize_engine(model, settings, ranks)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    is_compiled = job.runtime.compile == "blocks"
    compiles_objective = is_compiled and ranks.device.type == "cuda"
    if is_compiled:
        # After the engine, which casts the weights: graphs over float32 weights would be of no use.
        batches = data.empty_batches(ranks.device)
        objective = job.objective if compiles_objective else None
        compile_for_buckets(engine, batches, settings.guidance_scale, dtype, objective)
    average = WeightAverage(
        # Of the float32 masters: decay 0.9999 moves a bfloat16 average by less than it can hold.
        master_shards(engine, ranks),
        settings.ema_decay,
        ranks,
        torch.device("cpu") if settings.ema_device == "cpu" else None,
    )
    guard = DivergenceGuard(settings.divergence, job.changed_at or 0)
    # After average and engine, both of which it saves and loads.
    checkpoints = RunCheckpoints(
        engine,
        average,
        ranks,
        job.state_dir / "checkpoints",
        started_from=began_with,
        keep=settings.keep_checkpoints,
        in_background=settings.async_checkpoints,
        is_needed=guard.is_anchor if settings.on_divergence == "rollback" else lambda *_: False,
    )
    throughput = Throughput(
        job.name,
        engine.module,
        images_per_step=settings.global_batch_size,
        world_size=ranks.world_size,
        peak_tflops=job.runtime.peak_tflops,
        memory_every=settings.watch_every,
    )
    # Last of the large things: its autoencoder waits on the host until a grid is drawn.
    grids = grids_of_run(job, data.latents, data.texts, validation.image_ids, ranks)
    if grids is not None:
        check_pictures(grids, engine.module, data, ranks)
    if ranks.is_first:
        _say_if_contrast_is_unlearnt(job)
    # One writer: lines of several processes would mix in one file.
    metrics = MetricLog(job.metrics) if ranks.is_first else None
    return AssembledRun(
        job=job,
        ranks=ranks,
        data=data,
        engine=engine,
        dtype=dtype,
        uncompiled=uncompiled if is_compiled else nullcontext,
        compiles_objective=compiles_objective,
        average=average,
        validation=validation,
        training_images=data.training_images(),
        grids=grids,
        throughput=throughput,
        metrics=metrics,
        checkpoints=checkpoints,
        guard=guard,
        gate=UpdateGate(engine),
        # Last of all, when everything that a checkpoint is loaded into is there.
        steps_done=_resume(job, engine, data.plan, checkpoints, guard, metrics, ranks),
    )


def check_pictures(grids: SampleGrids, transformer: Any, data: TrainingData, ranks: Ranks) -> None:
    """Refuse pictures of sizes that the network cannot place or divide, before the first step.

    Raises:
        StartUnusable: see there.
    """
    sizes = pd.DataFrame(grids.sizes, columns=["latent_h", "latent_w"])
    index = sizes.assign(bucket=[f"of {h}x{w} latents" for h, w in grids.sizes])
    try:
        for height, width in grids.sizes:
            backbone_of(transformer).check_size(transformer, height, width)
        if ranks.context_degree > 1:
            check_context_parallel(transformer, ranks.context_degree, data.texts.tokens, index)
    except ValueError as problem:
        raise StartUnusable(f"samples.own_prompts: {problem}") from None


def _say_if_contrast_is_unlearnt(job: DitJob) -> None:
    """One line where sampling contrasts with an empty prompt that training never meets."""
    family = BACKBONES[job.transformer.backbone].text_family()
    if family.negative_prompt is not None and job.settings.caption_dropout == 0:
        print(
            f"{job.name}: {job.transformer.backbone} is sampled against the empty prompt, which "
            f"this training never meets; {job.name}.caption_dropout 0.1 would change that",
            file=sys.stderr,
        )


def _network(job: DitJob, data: TrainingData, ranks: Ranks, began_with: str) -> nn.Module:
    """The transformer in the form that DeepSpeed wraps: what is trained is settled here.

    DeepSpeed takes over the parameters that it finds, so adapters come before it. Compiling a
    block replaces its call and no weight, hence comes last.
    """
    settings = job.settings
    channels, widths = data.latent_channels, data.texts.widths
    model: nn.Module = build_transformer(job, widths, channels)
    index = data.latents.index
    sizes = zip(index["latent_h"], index["latent_w"], strict=True)
    # By sizes, before any step: a store that does not fit would fail inside a matrix product.
    check_stores(model, widths, channels, ((int(h), int(w)) for h, w in sizes))
    if ranks.context_degree > 1:
        check_context_parallel(model, ranks.context_degree, data.texts.tokens, index)
        enable_context_parallel(model, ranks)
    if job.transformer.quantisation != "none":
        _freeze_rounded(job, data, model, ranks, began_with)
    if settings.adapter is not None:
        add_adapter(model, settings.adapter, job.seed)
    if settings.offload_base:
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        offload_frozen_blocks(model, ranks.device, dtype)
    enable_activation_checkpointing(
        model, settings.gradient_checkpointing, to_host=settings.offload_activations
    )
    # diffusers loads models in evaluation mode.
    model.train()
    if job.runtime.compile == "blocks":
        compile_blocks(model)
    return model


def check_quantisation(job: DitJob) -> None:
    """Refuse a rounded base where the stage cannot train on one.

    Raises:
        StartUnusable: the weights are trained themselves or divided, or a library is missing.
    """
    kind = job.transformer.quantisation
    if kind == "none":
        return
    # diffusers' quantisers are asked for only where there is something to round.
    from components.models.loading.quantisation import (
        QuantisationUnavailable,
        require_library,
        training_problem,
    )

    try:
        require_library(kind, "models.transformer.quantisation")
    except QuantisationUnavailable as missing:
        raise StartUnusable(str(missing)) from None
    problem = training_problem(kind, job.settings)
    if problem is not None:
        raise StartUnusable(f"{job.name}: {problem}")


def _freeze_rounded(
    job: DitJob, data: TrainingData, model: nn.Module, ranks: Ranks, began_with: str
) -> None:
    """Round the base, every rank in the same way; the first measures what that changes."""
    from components.models.loading.quantisation import quantise
    from components.training.adapters.base_rounding import measured_rounding

    dtype = torch.bfloat16 if job.settings.precision == "bf16" else torch.float32
    measuring: AbstractContextManager[None] = nullcontext()
    # Divided over ranks a pass needs all of them: the measurement is one process's alone.
    if ranks.is_first and ranks.context_degree == 1:
        name = min(data.held_out)
        states, pooled = data.texts.read(name)
        image = data.latents.read(name)[None], (states[None], pooled[None])
        measuring = measured_rounding(
            job, model, image, began_with, dtype=dtype, device=ranks.device
        )
    with measuring:
        quantise(model, job.transformer.quantisation, dtype=dtype, device=ranks.device)


def _resume(
    job: DitJob,
    engine: Any,
    plan: BatchPlan,
    checkpoints: RunCheckpoints,
    guard: DivergenceGuard,
    metrics: MetricLog | None,
    ranks: Ranks,
) -> int:
    """Load the newest checkpoint; returns the number of steps done.

    Raises:
        LearningLost: what was learned before did not arrive in the masters.
        StartUnusable: the initial weights are not those of the checkpoint's run.
    """
    hand_over = None
    saved = checkpoints.newest()
    if saved is not None:
        # Before any weight is touched: other data must not be continued under an old state. A
        # segment says that this is wished, for the checkpoint that it began with and no other.
        if saved.step != job.changed_at:
            plan.check(PlanState(**saved.plan))
        if ranks.is_first:
            refuse_other_start(job, saved.started_from, checkpoints.started_from)
        hand_over = checkpoints.load(saved)
        apply_settings_after_load(engine, job.settings)
        if saved.guard is not None:
            guard.restore(saved.guard)
    elif job.initial_weights is not None:
        hand_over = loaded(master_shards(engine, ranks), job.initial_weights, ranks)
    if hand_over is not None:
        if ranks.is_first:
            note_hand_over(job.state_dir, hand_over)
        # The same numbers on all ranks, so all of them stop.
        hand_over.check(job.settings.min_kept_movement, job.name)
    if metrics is not None:
        if saved is not None and saved.step > 0:
            say_missing_rows(job, saved.step)
        # Steps after the checkpoint happen again and are logged again; without a checkpoint that
        # includes the validation before the first step, which is row 0.
        metrics.rewind((saved.step if saved is not None else 0) or -1)
    return 0 if saved is None else saved.step


def apply_settings_after_load(engine: Any, settings: DitStageSettings) -> None:
    """Today's settings in place of those that a checkpoint brought along."""
    apply_settings(engine.optimizer, settings)
    # DeepSpeed saves its clipping too; not there where it clips by its configuration.
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = settings.max_grad_norm
