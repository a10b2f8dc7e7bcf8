"""Speed of the 12B transformer's shape and of the F16 VAE on one GPU: one table in one call.

    python benchmarks/gpu/measure.py [--rows blocks,train,sample,adapter,ways,vae] [--json FILE]
    python benchmarks/gpu/measure.py --tiny --device cpu    # runs through anywhere

Random weights, true shapes, 4096x4096 px (16,384 image + 512 text tokens). Transformer rows need
torch alone (2.11 to 2.15); rows of adapters, ways and the VAE need diffusers (adapters peft, too)
and say so where it is missing. Each row is
isolated (out of memory is a result), warmed up, and given as the median of repeats with the lowest
and highest. FLOPs are the planner's model FLOPs: forward and backward, without recomputation.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

from block_variants import (  # noqa: E402
    NotMeasured,
    flash3,
    plain,
    sdpa,
    selective,
    to_float8,
    whole_blocks,
)
from flux_blocks import Attend, Blocks  # noqa: E402
from one_card import measure_adapters, measure_ways  # noqa: E402

from components.planning.flops import (  # noqa: E402
    decoder_products,
    encoder_products,
    flux_flops,
    total,
)
from components.planning.model_shapes import AutoencoderShape, FluxShape  # noqa: E402

GIB = 2**30
GROUPS = ("blocks", "train", "sample", "adapter", "ways", "vae")


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    width: int
    heads: int
    doubles: int
    singles: int
    grid: int
    """Image tokens per axis."""
    text: int
    image_px: int
    vae_widths: tuple[int, ...]
    repeats: int
    sampling_steps: int
    cached_steps: int
    """Of an image in the rows of step caches."""

    @property
    def tokens(self) -> int:
        """Text and image."""
        return self.grid**2 + self.text


TRUE = Scale(3072, 24, 19, 38, 128, 512, 4096, (128, 256, 512, 512), 5, 50, 20)
TINY = Scale(64, 2, 2, 2, 4, 4, 64, (16, 16), 2, 2, 6)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    what: str
    seconds: float | None = None
    lowest: float | None = None
    highest: float | None = None
    tflops_per_s: float | None = None
    peak_gib: float | None = None
    note: str = ""


@dataclass
class Bench:
    """Device, sizes and the rows so far."""

    device: torch.device
    scale: Scale
    rows: list[Row]

    @property
    def dtype(self) -> torch.dtype:
        """bf16, as trained."""
        return torch.bfloat16

    def row(
        self,
        group: str,
        what: str,
        make: Callable[[], tuple[Callable[[], Any], str]],
        flops: int = 0,
        *,
        repeats: int | None = None,
    ) -> Row:
        """Build what `make` returns (call, note), time it and record the row, whatever happens."""
        self._release()
        call: Callable[[], Any] | None = None
        try:
            call, note = make()
            row = self._timed(group, what, call, flops, note, repeats or self.scale.repeats)
        except NotMeasured as reason:
            row = Row(group, what, note=f"not measured: {reason}")
        except torch.OutOfMemoryError:
            row = Row(group, what, note="OOM")
        except Exception as problem:
            # One broken kernel must not cost the other rows.
            first = (str(problem).splitlines() or [""])[0][:120]
            row = Row(group, what, note=f"failed: {type(problem).__name__}: {first}")
        del call
        self._release()
        self.rows.append(row)
        print(line(row), flush=True)
        return row

    def _release(self) -> None:
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _timed(
        self, group: str, what: str, call: Callable[[], Any], flops: int, note: str, repeats: int
    ) -> Row:
        call()
        self._synchronize()
        took = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            self._synchronize()
            took.append(time.perf_counter() - begin)
        middle = statistics.median(took)
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / GIB if cuda else None
        rate = flops / middle / 1e12 if flops else None
        return Row(group, what, middle, min(took), max(took), rate, peak, note)


def line(row: Row) -> str:
    """A row as text."""
    if row.seconds is None:
        return f"{row.group:7} {row.what:44} {row.note}"
    spread = f"{row.seconds:9.4f} s ({row.lowest:.4f} to {row.highest:.4f})"
    rate = "" if row.tflops_per_s is None else f" {row.tflops_per_s:8.1f} TFLOP/s"
    peak = "" if row.peak_gib is None else f" {row.peak_gib:6.1f} GiB peak"
    return f"{row.group:7} {row.what:44} {spread}{rate}{peak} {row.note}".rstrip()


def stack(bench: Bench, doubles: int, singles: int, attend: Attend) -> Blocks:
    """Random blocks on the device, bf16."""
    scale = bench.scale
    with torch.device(bench.device):
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        try:
            return Blocks(doubles, singles, scale.width, scale.heads, attend, scale.text)
        finally:
            torch.set_default_dtype(before)


def inputs(bench: Bench) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(tokens, time embedding, rotary tables) of one sample."""
    scale, generator = bench.scale, torch.Generator(bench.device).manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "device": bench.device}
    x = torch.randn(1, scale.tokens, scale.width, dtype=bench.dtype, **options)
    temb = torch.randn(1, scale.width, dtype=bench.dtype, **options)
    angles = torch.randn(scale.tokens, scale.width // scale.heads // 2, **options)
    angles = angles.repeat_interleave(2, dim=-1)
    return x, temb, (angles.cos(), angles.sin())


def blocks_flops(scale: Scale, doubles: int, singles: int) -> tuple[int, int]:
    """(forward, forward + backward) of the blocks alone: two depths' difference."""
    head = scale.width // scale.heads
    deep, none = (
        flux_flops(FluxShape(d, s, head, scale.heads), scale.grid**2, scale.text)
        for d, s in ((doubles, singles), (0, 0))
    )
    return deep.forward - none.forward, deep.model - none.model


def backward_call(model: Blocks, bench: Bench, repeat: Callable[..., Tensor]) -> Callable[[], None]:
    """Forward and backward with gradients of the input too."""
    x, temb, rope = inputs(bench)
    x.requires_grad_()

    def call() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x, temb, rope, repeat).sum().backward()

    return call


def forward_call(model: Blocks, bench: Bench) -> Callable[[], Tensor]:
    """Forward without gradients."""
    x, temb, rope = inputs(bench)

    def call() -> Tensor:
        with torch.no_grad():
            return model(x, temb, rope, plain)

    return call


def attentions(bench: Bench) -> Iterator[tuple[str, Callable[[], Attend]]]:
    """(name, maker) of the attention back ends."""
    yield "SDPA default", lambda: sdpa(None)
    if bench.device.type == "cuda":
        yield "SDPA flash", lambda: sdpa(SDPBackend.FLASH_ATTENTION)
        yield "SDPA cuDNN", lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
        yield "SDPA efficient", lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION)
    yield "FA3", flash3


def measure_blocks(bench: Bench) -> str:
    """One double and one single block; returns the fastest back end's name."""
    forward, training = blocks_flops(bench.scale, 1, 1)
    best, fastest = "SDPA default", float("inf")
    for name, attend in attentions(bench):
        bench.row(
            "blocks",
            f"forward, {name}",
            lambda attend=attend: (forward_call(stack(bench, 1, 1, attend()), bench), ""),
            forward,
        )
        row = bench.row(
            "blocks",
            f"forward + backward, {name}",
            lambda attend=attend: (backward_call(stack(bench, 1, 1, attend()), bench, plain), ""),
            training,
        )
        if row.seconds is not None and row.seconds < fastest:
            best, fastest = name, row.seconds
    attend = dict(attentions(bench))[best]

    def variant(
        repeat: Callable[..., Tensor], *, compiled: bool = False, fused: bool = False
    ) -> tuple[Callable[[], None], str]:
        model = stack(bench, 1, 1, attend())
        if fused:
            for module in model.modules():
                if hasattr(module, "fuse"):
                    module.fuse()
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=True)
        return backward_call(model, bench, repeat), best

    for what, make in (
        ("fused QKV", lambda: variant(plain, fused=True)),
        ("checkpointing: selective", lambda: variant(selective)),
        ("checkpointing: blocks", lambda: variant(whole_blocks)),
        ("compiled per block", lambda: variant(plain, compiled=True)),
        ("compiled, fused QKV", lambda: variant(plain, compiled=True, fused=True)),
    ):
        bench.row("blocks", f"forward + backward, {what}", make, training)

    def float8() -> tuple[Callable[[], Tensor], str]:
        if not hasattr(torch, "_scaled_mm") or bench.device.type != "cuda":
            raise NotMeasured("fp8 products need a GPU")
        model = stack(bench, 1, 1, attend())
        exact = forward_call(model, bench)().float()
        to_float8(model)
        call = forward_call(model, bench)
        error = ((call().float() - exact).norm() / exact.norm()).item()
        return call, f"{best}; relative output error {error:.2e}"

    bench.row("blocks", "forward, fp8 linears (approximate)", float8, forward)
    return best


def measure_training(bench: Bench, attend: Callable[[], Attend]) -> None:
    """A whole optimizer step at the largest depth that fits."""
    scale = bench.scale
    for part in (1.0, 0.75, 0.5, 0.25):
        doubles, singles = (max(1, int(n * part)) for n in (scale.doubles, scale.singles))

        def make(doubles: int = doubles, singles: int = singles) -> tuple[Callable[[], None], str]:
            model = stack(bench, doubles, singles, attend())
            # Moments take the weights' dtype: no float32 masters, unlike the trainer.
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=False)
            backward = backward_call(model, bench, whole_blocks)

            def call() -> None:
                backward()
                optimizer.step()

            return call, (
                f"1 image; {doubles} + {singles} of {scale.doubles} + {scale.singles} blocks, bf16 "
                "weights, gradients and moments, blocks checkpointed, embedders left out"
            )

        flops = blocks_flops(scale, doubles, singles)[1]
        what = f"training step, {doubles} + {singles} blocks"
        if bench.row("train", what, make, flops).note != "OOM":
            return


def measure_sampling(bench: Bench, attend: Callable[[], Attend]) -> None:
    """One step, and all steps of an image, through all blocks."""
    scale = bench.scale
    forward = blocks_flops(scale, scale.doubles, scale.singles)[0]
    note = f"{scale.doubles} + {scale.singles} blocks, bf16, embedders left out"

    def make(steps: int) -> tuple[Callable[[], None], str]:
        step = forward_call(stack(bench, scale.doubles, scale.singles, attend()), bench)

        def call() -> None:
            for _ in range(steps):
                step()

        return call, note

    bench.row("sample", "sampling step", lambda: make(1), forward)
    count = scale.sampling_steps
    bench.row("sample", f"{count} steps", lambda: make(count), count * forward, repeats=1)


def measure_vae(bench: Bench) -> None:
    """Encode and decode, whole and tiled."""
    scale = bench.scale
    levels = len(scale.vae_widths)
    shape = AutoencoderShape(block_out_channels=scale.vae_widths)

    def model() -> Any:
        try:
            from components.models.autoencoder_f16 import AutoencoderKLF16
        except ImportError as missing:
            raise NotMeasured(f"no {missing.name}") from None
        with torch.device(bench.device):
            torch.manual_seed(0)
            vae = AutoencoderKLF16(
                **vars(shape),
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                norm_num_groups=min(32, scale.vae_widths[0]),
            )
        return vae.to(bench.dtype).eval()

    def make(what: str, tiled: bool) -> tuple[Callable[[], Tensor], str]:
        vae = model()
        if tiled:
            # Norms refuse a single latent pixel.
            vae.set_tile_size(max(scale.image_px // 4, 2 * vae.tile_multiple))
            vae.enable_tiling()
        options: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
        image = torch.zeros(1, 3, scale.image_px, scale.image_px, **options)
        edge = scale.image_px // shape.compression
        latents = torch.zeros(1, shape.latent_channels, edge, edge, **options)

        def call() -> Tensor:
            with torch.no_grad():
                if what == "encode":
                    return vae.encode(image).latent_dist.mode()
                return vae.decode(latents).sample

        return call, "overlapping tiles" if tiled else ""

    for what, products in (("encode", encoder_products), ("decode", decoder_products)):
        flops = total(products(shape, scale.image_px, scale.image_px)).forward
        for tiled in (False, True):
            name = f"VAE {what}, {'tiled' if tiled else 'whole'}"
            # Tiles overlap, so the whole image's operations are no measure of their rate.
            bench.row("vae", name, lambda w=what, t=tiled: make(w, t), 0 if tiled else flops)


def machine(device: torch.device) -> str:
    """Device, torch and Python in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all?")
    parser.add_argument("--rows", default=",".join(GROUPS), help="groups, separated by commas")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    wanted = arguments.rows.split(",")
    if unknown := sorted(set(wanted) - set(GROUPS)):
        parser.error(f"--rows {','.join(unknown)}: choose from {', '.join(GROUPS)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; to check the script alone use --tiny --device cpu")
    device = torch.device(arguments.device)
    bench = Bench(device, TINY if arguments.tiny else TRUE, [])
    command = " ".join(["python", "benchmarks/gpu/measure.py", *sys.argv[1:]])
    print(f"{command}\n{machine(device)}, {bench.scale.tokens} tokens, batch 1", flush=True)
    best = measure_blocks(bench) if "blocks" in wanted else "SDPA default"
    attend = dict(attentions(bench))[best]
    if "train" in wanted:
        measure_training(bench, attend)
    if "sample" in wanted:
        measure_sampling(bench, attend)
    forward = blocks_flops(bench.scale, bench.scale.doubles, bench.scale.singles)[0]
    if "adapter" in wanted:
        measure_adapters(bench, forward)
    if "ways" in wanted:
        measure_ways(bench, forward)
    if "vae" in wanted:
        measure_vae(bench)
    if arguments.json:
        values = {"command": command, "machine": machine(device), "scale": asdict(bench.scale)}
        values["rows"] = [asdict(row) for row in bench.rows]
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
