"""Settings of the project and the machine: threads, engine, ranks, GPUs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.settings.section import (
    CHANGES_NO_WEIGHT,
    Count,
    Section,
)

Determinism = Literal["bitwise", "fast"]


class ProjectSettings(Section):
    """Identity of a pipeline."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    """MLflow experiment and registry prefix."""
    profile: Literal["embedded", "consumer-24gb", "single-gpu", "paper"]
    """The profile in `conf/profiles/` that the values came from."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """Root of every random stream."""


class RuntimeSettings(Section):
    """Machine resources."""

    torch_threads: Count
    """Intra-op threads of a training process; fixed because sums depend on it bit for bit."""
    determinism: Determinism = "bitwise"
    """Of training. `bitwise`: deterministic kernels alone, that of attention's backward pass among
    them, and an error where there is none, so that a run that was killed ends with the same bytes
    (tested on CPU; CUDA not measured). `fast`: whatever is quickest; on CUDA two runs differ by
    rounding. Decoding and sampling are not touched."""
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
    processes: Annotated[Count, CHANGES_NO_WEIGHT]
    """Training processes (ranks) per node."""
    nodes: Annotated[Count, CHANGES_NO_WEIGHT]
    """Machines of a training run. They see the same files; `python -m
    components.training.dit.worker JOB.json --join` on the others joins a run (job.json lies in its
    state folder)."""
    rendezvous_endpoint: Annotated[str, Field(pattern=r"^[\w.-]+:\d{1,5}$")] | None
    """For several nodes: host and port of the one that the others meet at, such as node1:29400."""
    max_restarts: Annotated[int, Field(ge=0, le=100)]
    """How often all ranks of a stage start again from the newest checkpoint when one of them dies
    or stands still, before the stage fails."""
    on_changed_run: Literal["refuse", "continue", "restart"] = "refuse"
    """When a stage that trains finds its own unfinished run, made under other settings, data or
    code: stop and say what differs; go on from its last checkpoint, as a segment of its own; begin
    at step 0. `refuse` begins again, too, where no more than ten minutes of work are at stake."""
    grace_s: Annotated[float, Field(ge=1, le=3600)] = 120.0
    """How long a training stage that is asked to stop (Ctrl-C, SIGTERM, SIGUSR1, a cancelled run)
    may take to finish its step and save, before it is killed."""
    interruptions_per_day: Annotated[float, Field(gt=0)] | None = None
    """How often machines are taken away, for the advised interval of checkpoints; None: none is
    advised."""
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=1440)]
    """How long ranks may wait for each other; longer than the slowest single part between two
    meetings, such as loading the weights."""
    device: Literal["cpu", "cuda"]
    """Where models run."""
    peak_tflops: Annotated[float, Field(gt=0)] | None
    """Dense bf16 TFLOP/s of one GPU by its data sheet, such as 989 for an H100 or H200 SXM; model
    FLOPs utilisation (MFU) is logged against it. None: not logged."""
    compile: Literal["none", "blocks"] = "none"
    """For DiT training. `blocks`: torch.compile of every transformer block, and on GPUs of the
    SNR-HW objective, one graph of a kind for all buckets, made in a fixed order when a process
    starts; results differ from `none` by rounding and resume with the same bytes."""
    context_parallel_degree: Count = 1
    """Ranks that share the tokens of each sample in DiT training (Ulysses), for sequences too long
    for one GPU; divides the ranks, the heads and every bucket's tokens. 1: none."""
    gpus: Annotated[int, Field(ge=0, le=64)]
    """GPUs of this machine that a stage that trains or encodes takes for itself (`meta` in
    dvc.yaml); 0: none."""
    network_gpus: Annotated[int, Field(ge=0, le=64)]
    """Likewise of a stage that runs networks in one process: quality, people, generate,
    evaluate."""
    caption_gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """Likewise of the stage caption: 1 where `caption.provider` is `local` and `device` cuda. Not
    `network_gpus`, because captions of an endpoint take days and no GPU."""
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
    verify_reads: Literal["always", "first", "never"] = "first"
    """When training compares a stored record with its hash: on every read; on its first read in a
    process and whenever it comes from the disk again or its shard was changed; or not at all."""
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
