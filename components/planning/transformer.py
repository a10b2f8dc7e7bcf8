"""What the planner asks of a transformer, whatever its backbone: counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from components.models.backbones import BACKBONES
from components.planning.flops import Flops, flux_flops
from components.planning.memory import ITEM_BYTES, TrainedTensors, flux_activation_bytes
from components.planning.model_shapes import MLP_RATIO, Networks
from components.settings.schema import Settings
from components.settings.training import AdapterSettings, Checkpointing, DitStageSettings

if TYPE_CHECKING:
    import torch

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
    _trained: dict[AdapterSettings | None, TrainedTensors] = field(
        default_factory=dict, compare=False
    )

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
            not_kept=_not_kept(stage.adapter) if policy != "selective" else (0, 0),
        )
        if stage.adapter is not None and policy == "selective":
            # Its products are kept, too.
            activations += self._adapter_products(stage, stage.adapter, tokens) // degree
        return shape.parameters, flops, activations

    def trained(self, stage: DitStageSettings) -> int:
        """Parameters that `stage` trains: all, or those of its adapter.

        Raises:
            ValueError: the adapter names layers that there are not.
        """
        if stage.adapter is None:
            return self.counts(_ANY_SIZE, None)[0]
        return self.trained_tensors(stage).elements

    def trained_tensors(self, stage: DitStageSettings) -> TrainedTensors:
        """What an optimizer's states depend on, of the parameters that `stage` trains.

        Raises:
            ValueError: the adapter names layers that there are not.
        """
        key = stage.adapter
        if key not in self._trained:
            shapes = self._shapes() if key is None else self._adapter_shapes(key)
            self._trained[key] = TrainedTensors.of(shapes)
        return self._trained[key]

    def _shapes(self) -> Iterable[tuple[int, ...]]:
        """Of all parameters; vectors of a network of closed form as one."""
        shape = self.networks.transformer
        if shape is not None:
            # Everything of Flux that has two axes is a linear layer.
            matrices = [(outputs, inputs) for _, inputs, outputs in shape.linear_layers]
            return [*matrices, (shape.parameters - sum(map(math.prod, matrices)),)]
        import torch

        with torch.device("meta"):
            return [tuple(each.shape) for each in self.model(torch.bfloat16).parameters()]

    def _adapter_products(self, stage: DitStageSettings, adapter: AdapterSettings, n: int) -> int:
        """Bytes of what an adapter's matrix products give, n image tokens a sample."""
        values = 0
        for name, _, outputs in self.linear_layers():
            if not adapter.is_target(name):
                continue
            # Of a double block some layers see text tokens only, and the others image tokens only.
            is_text = "add_" in name or "_context" in name
            rows = self.text_tokens if is_text else n
            if name.startswith("single_"):
                rows = n + self.text_tokens
            values += rows * (adapter.rank + outputs)
        return stage.micro_batch_size * ITEM_BYTES[stage.precision] * values

    def _adapter_shapes(self, adapter: AdapterSettings) -> Iterable[tuple[int, ...]]:
        """Of an adapter's factors; those beside a convolution as matrices."""
        layers = list(self.linear_layers())
        title = BACKBONES[self.settings.models.transformer.backbone].title
        # Names that match nothing fail as at the start of a run.
        adapter.check([name for name, _, _ in layers], f"the {title} transformer")
        # A maps the inputs to `rank` values, B those to the outputs; neither has a bias.
        return [
            factor
            for name, inputs, outputs in layers
            if adapter.is_target(name)
            for factor in ((adapter.rank, inputs), (outputs, adapter.rank))
        ]

    def linear_layers(self) -> Iterable[tuple[str, int, int]]:
        """(name, inputs, outputs) of every layer that an adapter can be put beside."""
        nets = self.networks
        if nets.transformer is not None:
            return nets.transformer.linear_layers
        # Imported where the sizes are not known otherwise.
        import torch

        from components.planning.counted_flops import linear_layers

        with torch.device("meta"):
            return list(linear_layers(self.model(torch.bfloat16)))

    def model(self, dtype: torch.dtype) -> Any:
        """The real class on the current device of torch, in training mode (imports torch)."""
        from components.planning.counted_flops import backbone_model, flux_model

        nets = self.networks
        if nets.transformer is not None:
            return flux_model(nets.transformer, dtype)
        return backbone_model(
            self.settings.models.transformer,
            nets.transformer_config,
            (nets.t5.d_model, self.pooled_width),
            (nets.autoencoder.latent_channels, *self.latent_hw(_ANY_SIZE)),
            dtype,
        )

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


def _not_kept(adapter: AdapterSettings | None) -> tuple[int, int]:
    """What a (double, single) block keeps less with a frozen base, in widths of a token.

    A linear layer keeps its input for its own gradient alone. Most inputs are kept for something
    else as well; those of the last projections are not.
    """
    if adapter is None:
        return 0, 0
    last_of_mlp = adapter.is_target("ff.net.2") or adapter.is_target("ff_context.net.2")
    joint = adapter.is_target("proj_out")
    return (0 if last_of_mlp else MLP_RATIO), (0 if joint else MLP_RATIO + 1)
