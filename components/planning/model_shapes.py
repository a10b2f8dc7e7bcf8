"""Sizes of the networks, from a weights folder's config.json, a published one, or the settings.

Everything that the planner computes follows from these few integers, so no network is built and
no weight is read. Published configurations are data here: where a profile names a folder that is
not on this machine, they stand in, and `origin` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from components.models.backbones import BACKBONES
from components.settings.schema import Settings

Shape = TypeVar("Shape")

# Width of the sinusoidal embedding of t and guidance, and MLP width over model width (Flux, CLIP).
TIME_CHANNELS, MLP_RATIO = 256, 4
CLIP_TOKENS = 77


@dataclass(frozen=True)
class FluxShape:
    """A Flux transformer; fields as in diffusers' config.json, defaults are FLUX.1-dev's."""

    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    in_channels: int = 64
    out_channels: int | None = None
    guidance_embeds: bool = True

    @property
    def width(self) -> int:
        """Channels of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Autoencoder channels; a token is a 2x2 block of latents."""
        return self.in_channels // 4

    @property
    def parameters(self) -> int:
        """Exact number of parameters (tested against the real class)."""
        d, head = self.width, self.attention_head_dim

        def linear(inputs: int, outputs: int) -> int:
            return (inputs + 1) * outputs

        def embedder(inputs: int) -> int:
            return linear(inputs, d) + linear(d, d)

        mlp = linear(d, MLP_RATIO * d) + linear(MLP_RATIO * d, d)
        # Two streams: modulation, four projections, MLP each; RMS norms of q and k in both.
        double = 2 * (linear(d, 6 * d) + 4 * linear(d, d) + mlp) + 4 * head
        single = (
            linear(d, 3 * d)
            + 3 * linear(d, d)
            + linear(d, MLP_RATIO * d)
            + linear((1 + MLP_RATIO) * d, d)
            + 2 * head
        )
        # Embedders of latents and text, last modulation, and the projection back to latents.
        ends = linear(self.in_channels, d) + linear(self.joint_attention_dim, d)
        ends += linear(d, 2 * d) + linear(d, self.out_channels or self.in_channels)
        times = embedder(TIME_CHANNELS) * (2 if self.guidance_embeds else 1)
        times += embedder(self.pooled_projection_dim)
        return self.num_layers * double + self.num_single_layers * single + ends + times

    @property
    def linear_layers(self) -> Iterator[tuple[str, int, int]]:
        """(name, inputs, outputs) of every linear layer, what adapters are put beside."""
        d, hidden = self.width, MLP_RATIO * self.width
        joint = [f"attn.{name}" for name in ("to_q", "to_k", "to_v")]
        text = [f"attn.add_{name}_proj" for name in "qkv"]
        square = [*joint, "attn.to_out.0", *text, "attn.to_add_out"]
        double = [("norm1.linear", d, 6 * d), ("norm1_context.linear", d, 6 * d)]
        double += [(name, d, d) for name in square]
        for name in ("ff", "ff_context"):
            double += [(f"{name}.net.0.proj", d, hidden), (f"{name}.net.2", hidden, d)]
        single = [("norm.linear", d, 3 * d), ("proj_mlp", d, hidden), ("proj_out", d + hidden, d)]
        single += [(name, d, d) for name in joint]
        embedders = [("timestep", TIME_CHANNELS), ("text", self.pooled_projection_dim)]
        if self.guidance_embeds:
            embedders.append(("guidance", TIME_CHANNELS))
        for name, inputs in embedders:
            yield f"time_text_embed.{name}_embedder.linear_1", inputs, d
            yield f"time_text_embed.{name}_embedder.linear_2", d, d
        yield "x_embedder", self.in_channels, d
        yield "context_embedder", self.joint_attention_dim, d
        yield "norm_out.linear", d, 2 * d
        yield "proj_out", d, self.out_channels or self.in_channels
        blocks = (
            ("transformer_blocks", self.num_layers, double),
            ("single_transformer_blocks", self.num_single_layers, single),
        )
        for kind, count, layers in blocks:
            for number in range(count):
                for name, inputs, outputs in layers:
                    yield f"{kind}.{number}.{name}", inputs, outputs


@dataclass(frozen=True)
class AutoencoderShape:
    """An F8 or F16 autoencoder; defaults are Flux's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    in_channels: int = 3
    out_channels: int = 3
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    mid_block_add_attention: bool = True
    sample_size: int = 1024
    """Edge in pixels of a tile of tiled coding."""
    stride: int = 2
    decode_mode: str = "aligned"

    @property
    def compression(self) -> int:
        """Image pixels per latent pixel and axis."""
        return int(self.stride * 2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class T5Shape:
    """A gated T5 encoder; defaults are T5-XXL's, as in FLUX.1-dev's text_encoder_2."""

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        d, inner = self.d_model, self.num_heads * self.d_kv
        # No biases in T5; its two RMS norms have a weight per channel each.
        layer = 4 * d * inner + 3 * d * self.d_ff + 2 * d
        # One table of relative positions, which the first layer holds for all.
        bias = self.relative_attention_num_buckets * self.num_heads
        return self.vocab_size * d + self.num_layers * layer + bias + d


@dataclass(frozen=True)
class ClipShape:
    """A CLIP text encoder; defaults are CLIP-L's, as in FLUX.1-dev's text_encoder."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = CLIP_TOKENS
    projection_dim: int | None = None
    """Only of encoders with a text projection."""

    @property
    def parameters(self) -> int:
        """Exact number of parameters."""
        d, mlp = self.hidden_size, self.intermediate_size
        # Four projections and the MLP with biases, two layer norms of two vectors each.
        layer = 4 * (d + 1) * d + (d + 1) * mlp + (mlp + 1) * d + 4 * d
        tables = (self.vocab_size + self.max_position_embeddings) * d
        return tables + self.num_hidden_layers * layer + 2 * d + d * (self.projection_dim or 0)


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a model's folder, None where there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    # No folder is an answer (published values stand in); a broken file in a folder is an error.
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path}: not a readable config.json ({problem})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def shape_from_config(kind: type[Shape], config: Mapping[str, Any], where: object = "") -> Shape:
    """A shape from the entries of a config.json that it knows; others keep their defaults.

    Raises:
        ValueError: an entry has another type than the shape's field.
    """
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        # null stands for entries without a value, such as out_channels: the default holds.
        value = config.get(field.name)
        if value is None:
            continue
        # JSON has no tuples, and shapes must compare and hash.
        values[field.name] = tuple(value) if isinstance(value, list) else value
        expected = type(field.default)
        if field.default is not None and not isinstance(values[field.name], expected):
            raise ValueError(f"{where}: {field.name} = {value!r}: expected {expected.__name__}")
    return kind(**values)


@dataclass(frozen=True)
class Networks:
    """Shapes of one settings file and where each came from."""

    transformer: FluxShape | None
    """None for backbones without a closed form (`transformer_config` is counted instead)."""
    transformer_config: Mapping[str, Any] | None
    """diffusers config of such a backbone; None: its tiny one of the settings."""
    autoencoder: AutoencoderShape
    t5: T5Shape
    clips: tuple[ClipShape, ...]
    origin: Mapping[str, str]
    """Network to "settings (tiny)", "weights/.../config.json", or "published ...": ..."""


def networks(settings: Settings, root: Path) -> Networks:
    """Shapes of the networks that a settings file names.

    Args:
        settings: the settings.
        root: repository root, where relative weight folders start.

    Raises:
        ValueError: a config.json that cannot be read, or holds values of a wrong type.
    """
    models = settings.models
    # Filled while shapes are read: a plan says for each network where its sizes come from.
    origin: dict[str, str] = {}

    def configured(name: str, folder: str | None, published: str) -> dict[str, Any] | None:
        """The folder's configuration; without one, {} so that the published defaults hold."""
        if folder is None:
            origin[name] = "tiny network of the settings"
            return None
        found = read_config(root / folder)
        origin[name] = (
            f"published configuration of {published} ({folder} is not here)"
            if found is None
            else f"{folder}/config.json"
        )
        return found or {}

    tiny_vae = models.autoencoder.tiny
    vae = configured("autoencoder", models.autoencoder.pretrained, "FLUX.1-dev")
    autoencoder = shape_from_config(
        AutoencoderShape,
        {
            **(tiny_vae.model_dump() if vae is None else vae),
            # The settings win: a stock F8 folder is loaded with this stride.
            "stride": models.autoencoder.stride,
            "decode_mode": models.autoencoder.decode_mode,
        },
        origin["autoencoder"],
    )
    text = models.text_encoders
    folders = None if text.pretrained is None else f"{text.pretrained}/text_encoder"
    clip = configured("CLIP", folders, "CLIP-L")
    backbone = BACKBONES[models.transformer.backbone]
    t5_folder = None if text.pretrained is None else f"{text.pretrained}/{backbone.t5_part}"
    t5 = configured("T5", t5_folder, "T5-XXL")
    t5_shape = _tiny_t5(settings) if t5 is None else shape_from_config(T5Shape, t5, origin["T5"])
    clip_shape = (
        _tiny_clip(settings) if clip is None else shape_from_config(ClipShape, clip, origin["CLIP"])
    )
    # One CLIP gives its pooled state itself, several project theirs to the same width.
    projection = clip_shape.hidden_size if backbone.further_clips else None
    clip_shape = replace(clip_shape, projection_dim=projection)
    config = configured("transformer", models.transformer.pretrained, backbone.published_name)
    further = tuple(
        # Tiny CLIPs are alike; published ones differ and are data of the backbone.
        clip_shape if clip is None else shape_from_config(ClipShape, published)
        for published in backbone.further_clips
    )
    # Flux alone has a closed form.
    flux = backbone.name == "flux"
    return Networks(
        transformer=_flux(settings, config, autoencoder, t5_shape, clip_shape, origin)
        if flux
        else None,
        # Entries of the folder over the published ones: a plan needs more keys than old folders
        # have.
        transformer_config=None
        if flux or config is None
        else {**backbone.published_config, **config},
        autoencoder=autoencoder,
        t5=t5_shape,
        clips=(clip_shape, *further),
        origin=origin,
    )


def _flux(
    settings: Settings,
    config: dict[str, Any] | None,
    autoencoder: AutoencoderShape,
    t5: T5Shape,
    clip: ClipShape,
    origin: Mapping[str, str],
) -> FluxShape:
    if config is not None:
        return shape_from_config(FluxShape, config, origin["transformer"])
    tiny = settings.models.transformer.tiny
    return FluxShape(
        num_layers=tiny.num_layers,
        num_single_layers=tiny.num_single_layers,
        attention_head_dim=sum(tiny.axes_dims_rope),
        num_attention_heads=tiny.num_attention_heads,
        # Widths follow from the encoders and channels from the autoencoder, as when it is built.
        joint_attention_dim=t5.d_model,
        pooled_projection_dim=clip.hidden_size,
        in_channels=4 * autoencoder.latent_channels,
    )


def _tiny_heads(width: int) -> int:
    """Heads of 16 channels, as `text_encoders.build_tiny_text_encoders` has them (tested)."""
    return next(heads for heads in (max(width // 16, 1), 4, 2, 1) if width % heads == 0)


def _tiny_t5(settings: Settings) -> T5Shape:
    """Two layers; its real vocabulary depends on the captions, the wanted size is counted."""
    tiny = settings.models.text_encoders.tiny
    heads = _tiny_heads(tiny.t5_dim)
    return T5Shape(tiny.t5_dim, tiny.t5_dim // heads, 2 * tiny.t5_dim, 2, heads, tiny.vocab_size)


def _tiny_clip(settings: Settings) -> ClipShape:
    tiny = settings.models.text_encoders.tiny
    # Several CLIPs share the width of the pooled vector.
    clips = 1 + len(BACKBONES[settings.models.transformer.backbone].further_clips)
    width = tiny.clip_dim // clips
    return ClipShape(width, 2 * width, 2, tiny.vocab_size)
