"""Tiny transformers on the bundled photographs: three objectives, three RoPE variants, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/objective_experiment.py [--seeds 3] [--steps 150]

Phase 1 trains on five sizes that lie inside the RoPE window, as FLUX was; phase 2 goes on at larger
sizes beyond it, as UltraFlux does. After both the velocity error on held-out photographs (fixed
noise, eight noise levels) is measured per Haar band, at trained sizes and at unseen ones.

Inside the window the `official` spectrum is the plain one, so after phase 1 those two cells share
their weights and differ at unseen sizes only; `paper` snaps frequencies everywhere and is trained
on its own. Each training run leaves one JSON file; a later start reads what is there, so a killed
run continues and `--only-seed` lets several processes share the work.

Errors are compared level by level and averaged geometrically, which makes the ratio of velocity
errors and the ratio of data-prediction errors (t^2 times each) the same number.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from components.diagnostics.figures import COLOURS, save_figure
from components.files.figures import new_figure
from components.files.whole_files import write_bytes
from components.images.aspect_buckets import Bucket, fit_to_bucket, nearest_bucket
from components.images.decoding import read_rgb
from components.images.pixel_range import to_model
from components.models.tiny import build_tiny_autoencoder, build_tiny_transformer
from components.objectives.haar import haar
from components.objectives.objective import objective_loss
from components.settings.objective import ObjectiveSettings, SnrHuberSettings
from components.training.dit.curriculum import NoiseLevels, draw_noise, keyed_generator
from components.training.dit.validation import NOISE_LEVELS
from components.training.dit.velocity import NoisedBatch, predict_velocity
from components.training.encoding.latents import encode

ROOT = Path(__file__).resolve().parents[1]
# Whole scenes: no other photograph shows any of them.
HELD_OUT = (
    "jad-limcaco-square.jpg",
    "mount-batok-java.jpg",
    "red-cherry-leaves.jpg",
    "sean-afnan-5x4.jpg",
    "vents-du-sud.jpg",
)
KINDS = {"FM": "flow_matching", "WLF": "wavelet", "SNR-HW": "snr_huber"}
VARIANTS = ("flux", "official", "paper")
WINDOW = 16
# Edge lengths in tokens, (height, width).
INSIDE = ((12, 12), (10, 14), (14, 10), (9, 16), (16, 9))
BEYOND = ((20, 20), (18, 24), (24, 18))
UNSEEN = ((8, 20), (20, 8), (12, 30), (30, 12), (24, 24))
# Rows of the tables: sizes whose squared errors are pooled.
SIZE_GROUPS = {
    "inside": INSIDE,
    "2.5:1, same area": UNSEEN[:2],
    "2.5:1, larger": UNSEEN[2:4],
    "1:1, larger": UNSEEN[4:],
    "beyond": BEYOND,
}
EVALUATION_SEED = 20252
TEXT_WIDTH = 16
# Of the reduced photographs: all sizes fit into the larger.
SHORT_EDGES_PX = (1024, 512)
LOW_NOISE, HIGH_NOISE = slice(0, 4), slice(4, 8)
ALL_BANDS, LL, HIGH = slice(0, 4), slice(0, 1), slice(1, 4)

Size = tuple[int, int]
LatentMaps = dict[str, Tensor]
"""Latents (16, H/16, W/16) of whole photographs by "file name/short edge"."""


@dataclass(frozen=True)
class Plan:
    """What decides the numbers, besides the constants above."""

    steps: int = 150
    """Of phase 1."""
    beyond_steps: int = 30
    """Of phase 2."""
    batch: int = 8
    beyond_batch: int = 4
    learning_rate: float = 4e-3
    beyond_learning_rate: float = 1e-3
    heads: int = 2
    axes_dims_rope: tuple[int, int, int] = (4, 14, 14)


def objective(name: str) -> ObjectiveSettings:
    """Settings of an objective of `KINDS`; WLF compares data predictions."""
    return ObjectiveSettings(
        kind=KINDS[name],  # type: ignore[arg-type]
        wavelet_space="x0",
        snr_huber=SnrHuberSettings(),
    )


def latent_maps(paths: Sequence[Path], cache: Path) -> LatentMaps:
    """Latents of whole photographs at two scales, from `cache` where it exists.

    The tiny encoder maps every 16 px patch on its own, so a part of these latents is what the part
    of the photograph would give, and crops cost nothing.
    """
    if not cache.exists():
        autoencoder = build_tiny_autoencoder()
        found = {}
        for path in paths:
            image = Image.fromarray(read_rgb(path).pixels)
            for edge in SHORT_EDGES_PX:
                longer = 3 * edge // 2
                shapes = [Bucket(edge, edge), Bucket(edge, longer), Bucket(longer, edge)]
                bucket = nearest_bucket(image.height, image.width, shapes)
                pixels = to_model([np.asarray(fit_to_bucket(image, bucket))])
                found[f"{path.name}/{edge}"] = encode(autoencoder, pixels)[0].contiguous()
        write_bytes(cache, save(found))
    return load(cache.read_bytes())


def cut(maps: LatentMaps, size: Size, generator: torch.Generator) -> tuple[str, Tensor]:
    """A random crop of a random map: (its name, latents (16, 2 tokens_h, 2 tokens_w))."""
    height, width = 2 * size[0], 2 * size[1]
    fitting = [n for n in sorted(maps) if maps[n].shape[1] >= height and maps[n].shape[2] >= width]
    name = fitting[int(torch.randint(len(fitting), (), generator=generator))]
    _, rows, columns = maps[name].shape
    top = int(torch.randint(rows - height + 1, (), generator=generator))
    left = int(torch.randint(columns - width + 1, (), generator=generator))
    return f"{name}/{top}+{left}", maps[name][:, top : top + height, left : left + width]


def held_out_crops(maps: LatentMaps, size: Size) -> tuple[list[str], Tensor]:
    """One fixed crop of every photograph: names and (N, 16, 2 tokens_h, 2 tokens_w)."""
    crops = []
    for photograph in sorted({name.split("/")[0] for name in maps}):
        own = {name: z for name, z in maps.items() if name.startswith(f"{photograph}/")}
        key = f"{photograph}/{size[0]}x{size[1]}"
        crops.append(cut(own, size, keyed_generator(EVALUATION_SEED, -100, key)))
    return [name for name, _ in crops], torch.stack([z for _, z in crops])


def noised(names: Sequence[str], latents: Tensor, noise: Tensor, t: Tensor) -> NoisedBatch:
    """A batch without text: one zero token, zero pooled vector."""
    count = len(names)
    text, pooled = torch.zeros(count, 1, TEXT_WIDTH), torch.zeros(count, TEXT_WIDTH)
    return NoisedBatch(tuple(names), latents, noise, t, text, pooled)


@dataclass(frozen=True)
class Phase:
    """One stretch of training."""

    sizes: Sequence[Size]
    steps: int
    batch: int
    peak: float
    """Highest learning rate."""
    first_step: int = 0
    """Of the draws, so that no two phases share noise."""


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth, then a cosine to zero."""
    warm_up = max(1, steps // 10)
    return peak * min((step + 1) / warm_up, 0.5 * (1.0 + math.cos(math.pi * step / steps)))


def train(
    model: nn.Module, maps: LatentMaps, settings: ObjectiveSettings, phase: Phase, seed: int
) -> None:
    """AdamW in place; equal seeds give equal batches, noise and levels whatever the objective.

    No gradient clipping: it would treat objectives of different scale differently, while AdamW
    itself does not see the scale.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.peak, weight_decay=0.01)
    for step in range(phase.steps):
        key = phase.first_step + step
        rng = keyed_generator(seed, key, "batch")
        size = phase.sizes[int(torch.randint(len(phase.sizes), (), generator=rng))]
        chosen, latents = zip(*(cut(maps, size, rng) for _ in range(phase.batch)), strict=True)
        shape = (latents[0].shape[0], 2 * size[0], 2 * size[1])
        noise, t = draw_noise(
            seed, key, chosen, range(phase.batch), shape, NoiseLevels("logit_normal")
        )
        part = noised(chosen, torch.stack(latents), noise, t)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, phase.steps, phase.peak)
        optimizer.zero_grad()
        loss = objective_loss(
            settings,
            predict_velocity(model, part, 1.0, torch.float32),
            part.latents,
            part.noise,
            part.t,
        )
        loss.mean().backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, maps: LatentMaps, sizes: Sequence[Size]) -> dict[str, Any]:
    """Velocity errors of held-out crops, per size, noise level and Haar band.

    Returns:
        {"12x30": {"square", "absolute": (8, 4) sums over coefficients, "target": (8, 4) the
        energy of v* = eps - z, "coefficients": of one band}}. Data errors are t and t^2 times.
    """
    result = {}
    for size in sizes:
        names, latents = held_out_crops(maps, size)
        rows: dict[str, list[list[float]]] = {"square": [], "absolute": [], "target": []}
        for level, t in enumerate(NOISE_LEVELS):
            draws = (keyed_generator(EVALUATION_SEED, -1 - level, name) for name in names)
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws])
            part = noised(names, latents, noise, torch.full((len(names),), t))
            target = noise - latents
            bands = haar(predict_velocity(model, part, 1.0, torch.float32) - target)
            rows["square"].append([float(b.double().square().sum()) for b in bands])
            rows["absolute"].append([float(b.double().abs().sum()) for b in bands])
            rows["target"].append([float(b.double().square().sum()) for b in haar(target)])
        result[f"{size[0]}x{size[1]}"] = {**rows, "coefficients": latents.numel() // 4}
    return result


def tiny_transformer(plan: Plan, variant: str, seed: int) -> nn.Module:
    return build_tiny_transformer(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=plan.heads,
        axes_dims_rope=plan.axes_dims_rope,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_variant=variant,  # type: ignore[arg-type]
        rope_window=WINDOW,
        seed=seed,
    )


def run_cell(
    plan: Plan,
    name: str,
    trained_variant: str,
    seed: int,
    train_maps: LatentMaps,
    test_maps: LatentMaps,
) -> dict[str, Any]:
    """Both phases of one objective, one trained spectrum and one seed.

    Returns:
        {"inside": {variant: errors after phase 1}, "beyond": {variant: errors after phase 2}};
        the spectrum `flux` gives the variants `flux` and `official`, `paper` only itself.
    """
    settings = objective(name)
    inside = Phase(INSIDE, plan.steps, plan.batch, plan.learning_rate)
    beyond = Phase(
        BEYOND, plan.beyond_steps, plan.beyond_batch, plan.beyond_learning_rate, plan.steps
    )
    base = tiny_transformer(plan, trained_variant, seed)
    train(base, train_maps, settings, inside, seed)
    variants = ("flux", "official") if trained_variant == "flux" else (trained_variant,)
    cell: dict[str, Any] = {"inside": {}, "beyond": {}}
    for variant in variants:
        model = tiny_transformer(plan, variant, seed)
        model.load_state_dict(base.state_dict())
        cell["inside"][variant] = measure(model, test_maps, INSIDE + UNSEEN)
        train(model, train_maps, settings, beyond, seed)
        cell["beyond"][variant] = measure(model, test_maps, INSIDE + UNSEEN + BEYOND)
    return cell


def digest(plan: Plan, photographs: Sequence[str], held_out: Sequence[str]) -> str:
    """Names the folder of results that belong together."""
    settings = {
        **asdict(plan),
        "photographs": list(photographs),
        "held_out": list(held_out),
        "sizes": SIZE_GROUPS,
        "window": WINDOW,
        "short_edges": SHORT_EDGES_PX,
        "evaluation_seed": EVALUATION_SEED,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def cell_bytes(cell: dict[str, Any]) -> bytes:
    """A result as it is stored."""
    return (json.dumps(cell, sort_keys=True) + "\n").encode()


def run_cells(
    plan: Plan, photographs: Path, folder: Path, seeds: Sequence[int], held_out: Sequence[str]
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Results of all training runs; what `folder` has from the same plan is not done again.

    Returns:
        (objective, trained spectrum, seed) to the result of `run_cell`.
    """
    paths = sorted(photographs.glob("*.jpg"))
    folder = folder / digest(plan, [path.name for path in paths], held_out)
    folder.mkdir(parents=True, exist_ok=True)
    maps = latent_maps(paths, folder / "latents.safetensors")
    testing = {name: z for name, z in maps.items() if name.split("/")[0] in held_out}
    training = {name: z for name, z in maps.items() if name not in testing}
    results = {}
    # A seed is finished before the next begins, so that a table can be had early.
    cells = [(name, v, seed) for seed in seeds for name in KINDS for v in ("flux", "paper")]
    for name, variant, seed in cells:
        path = folder / f"{KINDS[name]}-{variant}-{seed}.json"
        if not path.exists():
            print(f"training {name}, {variant}, seed {seed}", flush=True)
            cell = run_cell(plan, name, variant, seed, training, testing)
            write_bytes(path, cell_bytes(cell))
        results[name, variant, seed] = json.loads(path.read_text(encoding="utf-8"))
    return results


class Comparison:
    """Errors of finished cells, and their ratios to flow matching with plain RoPE."""

    def __init__(self, results: dict[tuple[str, str, int], dict[str, Any]]) -> None:
        self._results = results
        self.seeds = sorted({seed for _, _, seed in results})

    def levels(
        self,
        cell: tuple[str, str, str, int],
        group: str,
        bands: slice = HIGH,
        kind: str = "square",
    ) -> np.ndarray:
        """Sum over a group's sizes, (8 levels,); cell: (phase, objective, variant, seed)."""
        phase, name, variant, seed = cell
        trained = "paper" if variant == "paper" else "flux"
        sizes = self._results[name, trained, seed][phase][variant]
        tables = [np.array(sizes[f"{h}x{w}"][kind]) for h, w in SIZE_GROUPS[group]]
        return np.sum(tables, axis=0)[:, bands].sum(axis=1)

    def ratio(
        self,
        cell: tuple[str, str, str],
        group: str,
        *,
        base: tuple[str, str] = ("FM", "flux"),
        bands: slice = HIGH,
        levels: slice = slice(0, 8),
        kind: str = "square",
    ) -> np.ndarray:
        """Geometric mean over levels of the error ratio to `base` of the same seed, (seeds,)."""
        phase, name, variant = cell
        ratios = []
        for seed in self.seeds:
            own = self.levels((phase, name, variant, seed), group, bands, kind)
            reference = self.levels((phase, *base, seed), group, bands, kind)
            ratios.append(math.exp(float(np.log(own / reference)[levels].mean())))
        return np.array(ratios)

    def absolute(self, phase: str, name: str, variant: str, group: str) -> np.ndarray:
        """High-frequency velocity error over the target's energy, mean over levels, (seeds,)."""
        shares = []
        for seed in self.seeds:
            cell = (phase, name, variant, seed)
            share = self.levels(cell, group) / self.levels(cell, group, kind="target")
            shares.append(float(share.mean()))
        return np.array(shares)


def mean_and_spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds (n - 1)."""
    spread = values.std(ddof=1) if len(values) > 1 else float("nan")
    return f"{values.mean():.3f} ± {spread:.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(compared: Comparison) -> str:
    """All tables, as Markdown."""
    cells = [(name, variant) for name in KINDS for variant in VARIANTS]
    columns: dict[str, Callable[[tuple[str, str, str]], np.ndarray]] = {
        "all bands": lambda c: compared.ratio(c, "inside", bands=ALL_BANDS),
        "LL": lambda c: compared.ratio(c, "inside", bands=LL),
        "HF": lambda c: compared.ratio(c, "inside"),
        "HF, t < 0.5": lambda c: compared.ratio(c, "inside", levels=LOW_NOISE),
        "HF, t > 0.5": lambda c: compared.ratio(c, "inside", levels=HIGH_NOISE),
        "HF, absolute error": lambda c: compared.ratio(c, "inside", kind="absolute"),
    }
    text = "Trained sizes after phase 1, ratio to FM with plain RoPE\n\n"
    text += markdown(
        ["objective", "RoPE", *columns],
        [
            [
                name,
                variant,
                *(mean_and_spread(f(("inside", name, variant))) for f in columns.values()),
            ]
            for name, variant in cells
            if variant != "official"  # the same weights and the same numbers as `flux`
        ],
    )
    for phase, title in (("inside", "after phase 1"), ("beyond", "after phase 2")):
        groups = [g for g in SIZE_GROUPS if g != "beyond" or phase == "beyond"]
        for label, bands in (("HF error", HIGH), ("LL error", LL)):
            text += f"\n{label} by size {title}, ratio to FM with plain RoPE at that size\n\n"
            rows = []
            for n, v in cells:
                ratios = [compared.ratio((phase, n, v), g, bands=bands) for g in groups]
                rows.append([n, v, *map(mean_and_spread, ratios)])
            text += markdown(["objective", "RoPE", *groups], rows)
        text += f"\nHF error of FM with plain RoPE {title}, share of the target's energy\n\n"
        text += markdown(
            groups, [[mean_and_spread(compared.absolute(phase, "FM", "flux", g)) for g in groups]]
        )
    return text


def figure(compared: Comparison, folder: Path) -> Path:
    """Left: HF error of the objectives by noise level; others: RoPE variants by size."""
    drawing = new_figure(14.0, 4.4)
    axes = drawing.subplots(1, 3)
    for name, colour in zip(KINDS, ("#4c72b0", "#55a868", "#c44e52"), strict=True):
        cells = [("inside", name, "flux", seed) for seed in compared.seeds]
        plain = [("inside", "FM", "flux", seed) for seed in compared.seeds]
        curves = np.array(
            [
                compared.levels(own, "inside") / compared.levels(reference, "inside")
                for own, reference in zip(cells, plain, strict=True)
            ]
        )
        axes[0].plot(NOISE_LEVELS, curves.T, ".", color=colour, alpha=0.5)
        axes[0].plot(NOISE_LEVELS, curves.mean(axis=0), color=colour, label=name)
    axes[0].set(xlabel="noise level t", title="trained sizes, plain RoPE, after phase 1")
    groups = [group for group in SIZE_GROUPS if group != "beyond"]
    for axis, bands, title in ((axes[1], HIGH, "HF"), (axes[2], LL, "LL")):
        for shift, variant in enumerate(("official", "paper")):
            for place, group in enumerate(groups):
                # Against plain RoPE under the same objective, so that only the variant differs.
                values = np.concatenate(
                    [
                        compared.ratio(("inside", n, variant), group, base=(n, "flux"), bands=bands)
                        for n in KINDS
                    ]
                )
                x = np.full(len(values), place + 0.2 * shift - 0.1)
                label = variant if place == 0 else None
                axis.plot(x, values, "o", color=COLOURS[variant], alpha=0.6, label=label)
        axis.set_xticks(range(len(groups)), [g.replace(", ", "\n") for g in groups], fontsize=8)
        axis.set_title(f"{title} error, RoPE variants, after phase 1")
    for axis in axes:
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.legend()
    axes[0].set_ylabel("HF error / that of FM with plain RoPE")
    axes[1].set_ylabel("error / that of plain RoPE, same objective")
    return save_figure(drawing, folder, "objective_experiment")[0]


def main() -> None:
    """Train what is missing, print the tables, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-seed", type=int, default=None, help="train one seed, no tables")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--beyond-steps", type=int, default=Plan.beyond_steps)
    parser.add_argument("--photographs", type=Path, default=ROOT / "data" / "sample")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "objective_experiment")
    options = parser.parse_args()
    plan = Plan(steps=options.steps, beyond_steps=options.beyond_steps)
    only = options.only_seed
    seeds = range(options.seeds) if only is None else (only,)
    results = run_cells(plan, options.photographs, options.out, seeds, HELD_OUT)
    if only is not None:
        return
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"\n{hardware}, torch {torch.__version__}, {plan}; HF = LH + HL + HH\n")
    compared = Comparison(results)
    print(tables(compared))
    print(figure(compared, options.out))


if __name__ == "__main__":
    main()
