"""What the planner asks of a transformer, whatever its backbone: counts and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from components.models.backbones import BACKBONES
from components.planning.flops import Flops, flux_flops
from components.planning.memory import (
    ITEM_BYTES,
    TrainingMemory,
    communication_bytes,
    flux_activation_bytes,
    state_bytes,
)
from components.planning.model_shapes import Networks
from components.settings.schema import Settings
from components.settings.training import AdapterSettings, Checkpointing, DitStageSettings

# (height, width) in pixels for counts that do not depend on it.
_ANY_SIZE = (512, 512)


@dataclass(frozen=True)
class Transformer:
    """Shapes and settings of one plan."""

    networks: Networks
    settings: Settings
    # Dicts in a frozen class: caches, left out of comparisons.
    _counts: dict[int, tuple[int, Flops, int, tuple[int, int, int]]] = field(
        default_factory=dict, compare=False
    )
    """Counts on the meta device by latent area, on which alone they depend."""
    _trained: dict[AdapterSettings, int] = field(default_factory=dict, compare=False)

    @property
    def gpus(self) -> int:
        """Training processes on all nodes."""
        return self.settings.runtime.processes * self.settings.runtime.nodes

    @property
    def text_tokens(self) -> int:
        """L: T5's, and the CLIP positions that the backbone puts before them."""
        models = self.settings.models
        before = BACKBONES[models.transformer.backbone].clip_positions
        return before + models.text_encoders.max_sequence_length

    @property
    def pooled_width(self) -> int:
        """P; the pooled vectors of several CLIPs stand in a row."""
        return sum(clip.projection_dim or clip.hidden_size for clip in self.networks.clips)

    def latent_hw(self, size: tuple[int, int]) -> tuple[int, int]:
        """Latent pixels of an image (height, width)."""
        compression = self.networks.autoencoder.compression
        return size[0] // compression, size[1] // compression

    def counts(
        self, size: tuple[int, int], stage: DitStageSettings | None
    ) -> tuple[int, Flops, int]:
        """(parameters, operations of one sample, activation bytes of a micro batch).

        Args:
            size: (height, width) in pixels.
            stage: precision, micro batch and checkpointing; None: forward only.
        """
        h, w = self.latent_hw(size)
        policy: Checkpointing = "none" if stage is None else stage.gradient_checkpointing
        shape = self.networks.transformer
        if shape is None:
            return self._counted((h, w), stage)
        tokens = (h // 2) * (w // 2)
        # `selective` keeps every product's result, so only `blocks` repeats operations.
        flops = flux_flops(shape, tokens, self.text_tokens, checkpointing=policy == "blocks")
        if stage is None:
            return shape.parameters, flops.inference, 0
        degree = self.settings.runtime.context_parallel_degree
        activations = flux_activation_bytes(
            shape,
            # With context parallelism an estimate: attention keeps other tensors, of like size.
            -(-(tokens + self.text_tokens) // degree),
            stage.micro_batch_size,
            stage.precision,
            checkpointing=policy,
        )
        return shape.parameters, flops, activations

    def trained(self, stage: DitStageSettings) -> int:
        """Parameters that `stage` trains: all, or those of its adapter.

        Raises:
            ValueError: the adapter names layers that there are not.
        """
        nets = self.networks
        if stage.adapter is None:
            return self.counts(_ANY_SIZE, None)[0]
        # Imported where something is counted: closed forms need neither torch nor diffusers.
        from components.planning.counted_flops import backbone_on_meta, flux_on_meta
        from components.training.dit.adapters import adapter_parameters

        if stage.adapter not in self._trained:
            # Built without storage, and peft put on it: names that match nothing fail as at the
            # start of a run.
            model = (
                backbone_on_meta(
                    self.settings.models.transformer,
                    nets.transformer_config,
                    (nets.t5.d_model, self.pooled_width),
                    (nets.autoencoder.latent_channels, *self.latent_hw(_ANY_SIZE)),
                )
                if nets.transformer is None
                else flux_on_meta(nets.transformer)
            )
            self._trained[stage.adapter] = adapter_parameters(model, stage.adapter)
        return self._trained[stage.adapter]

    def _counted(
        self, latent_hw: tuple[int, int], stage: DitStageSettings | None
    ) -> tuple[int, Flops, int]:
        """A backbone without a closed form, counted on the meta device (imports torch)."""
        from components.planning.counted_flops import backbone_counts

        nets = self.networks
        # Portrait and landscape buckets share a count, which takes seconds.
        area = math.prod(latent_hw)
        if area not in self._counts:
            self._counts[area] = backbone_counts(
                self.settings.models.transformer,
                nets.transformer_config,
                (nets.t5.d_model, self.pooled_width),
                (nets.autoencoder.latent_channels, *latent_hw),
                self.text_tokens,
            )
        held, flops, saved, (inputs, products, blocks) = self._counts[area]
        if stage is None:
            return held, flops.inference, 0
        # Counted for one sample in bf16; nearly all tensors are per sample and of the network's
        # dtype.
        scale = stage.micro_batch_size * ITEM_BYTES[stage.precision] // ITEM_BYTES["bf16"]
        # Blocks are alike: one block's share is repeated at a time, its inputs are kept.
        if stage.gradient_checkpointing == "blocks":
            repeated = Flops(flops.forward, flops.backward, flops.forward)
            return held, repeated, scale * (inputs + saved // blocks)
        if stage.gradient_checkpointing == "selective":
            return held, flops, scale * (inputs + products + saved // blocks)
        return held, flops, scale * saved


def dit_memory(
    stage: DitStageSettings, transformer: Transformer, sizes: Sequence[tuple[int, int]], gpus: int
) -> TrainingMemory:
    """Memory of one GPU at the bucket with the most tokens.

    Activations are an upper bound with `adapter`: frozen layers keep less.
    """
    # A step's bucket may be any of them, so the largest decides what must fit.
    largest = max(sizes, key=lambda size: size[0] * size[1])
    held, _, activations = transformer.counts(largest, stage)
    trained = transformer.trained(stage)
    if stage.adapter is not None:
        # The adapter's weights come on top of the frozen ones.
        held += trained
    weights, gradients, optimizer = state_bytes(
        held,
        gpus,
        stage.zero_stage,
        stage.precision,
        trained=trained,
        eight_bits=stage.optimizer == "adamw_8bit",
    )
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        # Offloaded states are in host memory, which this plan does not count.
        optimizer=0 if stage.offload_optimizer == "cpu" else optimizer,
        # Each rank averages its share (`training.sharded.ema`); on "cpu" it is in host memory.
        average=4 * -(-trained // gpus) if stage.ema_device == "model" else 0,
        activations=activations,
        buffers=communication_bytes(held, gpus, stage.precision, stage.zero_stage),
    )
