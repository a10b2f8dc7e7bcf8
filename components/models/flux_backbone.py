"""Flux as a backbone: packed latents and rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.models.backbone import Backbone, Shapes, TextFamily, bare_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from components.settings.models import TransformerSettings

_ROPE_NOTE = (
    "Stock diffusers computes plain rotary positions: it gives other images beyond the window of "
    "{window} tokens per axis."
)
_SNAPPED_NOTE = (
    "Stock diffusers computes plain rotary positions: it gives other images at every size, because "
    "`rope_variant: paper` snaps frequencies inside the window of {window} tokens per axis too."
)


class FluxBackbone(Backbone):
    """`UltraFluxTransformer2DModel`: packed latents, rotary positions, embedded guidance."""

    name = "flux"
    title = "Flux"
    # In the configuration of every Flux model, whether it is true or false.
    config_key = "guidance_embeds"
    folder_classes = ("UltraFluxTransformer2DModel", "FluxTransformer2DModel")
    takes_image = True
    repository = "black-forest-labs/FLUX.1-dev"
    weights_folder = "FLUX.1-dev"
    published_name = "FLUX.1-dev"

    def build_tiny(
        self,
        settings: TransformerSettings,
        widths: tuple[int, int],
        latent_channels: int,
        seed: int,
    ) -> Any:
        """Random Flux transformer of `transformer.tiny`."""
        from components.models.tiny import build_tiny_transformer

        tiny = settings.tiny
        return build_tiny_transformer(
            num_layers=tiny.num_layers,
            num_single_layers=tiny.num_single_layers,
            num_attention_heads=tiny.num_attention_heads,
            axes_dims_rope=tiny.axes_dims_rope,
            joint_attention_dim=widths[0],
            pooled_projection_dim=widths[1],
            # A token is a 2x2 block, packed before the transformer.
            in_channels=4 * latent_channels,
            # As FLUX.1-dev, so that a tiny run goes through the guidance input too.
            guidance_embeds=True,
            rope_variant=settings.rope_variant,
            rope_window=settings.rope_window,
            seed=seed,
        )

    def load(self, folder: Path, settings: TransformerSettings) -> Any:
        """Flux transformer with the rope of the settings."""
        import torch

        from components.files.weight_folders import require_class
        from components.models.checkpoint_files import check_folder
        from components.models.transformer import UltraFluxTransformer2DModel

        require_class(folder, None, self.folder_classes)
        # Before from_pretrained, which only warns about tensors that it does not find.
        check_folder(folder, UltraFluxTransformer2DModel, "transformer")
        return UltraFluxTransformer2DModel.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            # Passed explicitly: a stock folder's configuration has no rope entries.
            rope_variant=settings.rope_variant,
            rope_window=settings.rope_window,
        )

    def load_released(self, path: Path, *, dtype: torch.dtype, rope_variant: Any) -> Any:
        """A folder (ours or stock Flux, sharded or not), or one safetensors file."""
        from components.models.loading.flux_transformer import load_transformer

        return load_transformer(path, dtype=dtype, rope_variant=rope_variant)

    def text_family(self) -> TextFamily:
        """T5 and one CLIP."""
        from components.models.text_encoders import FLUX_TEXT

        return FLUX_TEXT

    def pipeline_class(self) -> Any:
        """FluxPipeline on an F16 grid."""
        from components.models.pipeline import UltraFluxPipeline

        return UltraFluxPipeline

    def predict(
        self,
        transformer: Any,
        noised: Tensor,
        t: Tensor,
        text: Tensor,
        pooled: Tensor,
        *,
        guidance_scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Velocity; a token is a 2x2 block of latents."""
        import torch

        from components.models.latent_tokens import pack_latents, unpack_latents

        # Extent from the tensor, so a batch of any bucket needs no further argument.
        height, width = noised.shape[-2:]
        grid = (height // 2, width // 2)
        # A model without the embedder rejects the argument's value, one with it needs a value.
        takes_guidance = bool(bare_model(transformer).config.guidance_embeds)
        tokens = transformer(
            hidden_states=pack_latents(noised).to(dtype),
            encoder_hidden_states=text.to(dtype),
            pooled_projections=pooled.to(dtype),
            # t in [0, 1]: the model rounds it to its weights' dtype, then multiplies by 1000
            # itself.
            timestep=t,
            guidance=torch.full_like(t, guidance_scale) if takes_guidance else None,
            # Named although None: diffusers looks the ids up to split them over ranks.
            img_ids=None,
            txt_ids=None,
            grid_hw=grid,
            return_dict=False,
        )[0]
        # float32 from here on: losses and the sampler's sums take small differences.
        return unpack_latents(tokens, *grid).float()

    def shape(self, transformer: Any) -> tuple[int, int, int]:
        """(C, D, P); four latent pixels share a token."""
        config = bare_model(transformer).config
        return config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim

    def tensor_shapes(self, config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
        """Packed latents with position ids, and guidance where it is embedded."""
        channels = int(config["in_channels"])
        given = int(config.get("out_channels") or channels)
        # Positions of text and image have no sample axis: all samples of a batch share one grid.
        inputs: Shapes = {
            "hidden_states": (-1, -1, channels),
            "encoder_hidden_states": (-1, -1, int(config["joint_attention_dim"])),
            "pooled_projections": (-1, int(config["pooled_projection_dim"])),
            "timestep": (-1,),
            "img_ids": (-1, 3),
            "txt_ids": (-1, 3),
        }
        if config.get("guidance_embeds"):
            inputs["guidance"] = (-1,)
        return inputs, {"sample": (-1, -1, given)}

    def usage(self, config: Mapping[str, Any]) -> str:
        """Our class loads it; stock diffusers too, with other positions unless they are plain."""
        variant, window = config["rope_variant"], config["rope_window"]
        if variant == "flux":
            # What stock diffusers computes.
            stock = "`diffusers.FluxTransformer2DModel.from_pretrained` gives equal outputs."
        else:
            note = _SNAPPED_NOTE if variant == "paper" else _ROPE_NOTE
            stock = note.format(window=window)
        return (
            "`UltraFluxTransformer2DModel.from_pretrained` of `components.models.transformer` "
            "loads this folder; `ultraflux generate --transformer FOLDER` samples from it. " + stock
        )

    def blocks(self, transformer: Any) -> tuple[int, int]:
        """Both kinds of blocks: a single-stream block holds as many tokens as a double one."""
        model = bare_model(transformer)
        number = len(model.transformer_blocks) + len(model.single_transformer_blocks)
        return number, int(model.inner_dim)
