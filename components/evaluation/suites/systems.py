"""Systems under test: whatever puts a picture to a prompt.

A system is written NAME=SPEC; SPEC is one of

    a folder of pictures       by file name to the suite's items, or by number (2 before 10)
    references                 the suite's own pictures
    command:TEMPLATE           any program; see `CommandSystem`
    trained                    the weights that this project's pipeline trained
    ultraflux:FOLDER           UltraFlux or FLUX.1-dev weights with F16 latents (`ultraflux
                               generate`'s layouts); what they lack is in weights/FLUX.1-dev
    diffusers:FOLDER           any saved diffusers pipeline: Flux, Sana, PixArt-Sigma ...
    vae:FOLDER                 an autoencoder, for the reconstruction suite
    a name of `PRESETS`        published weights below weights/

Pictures that a system makes are kept below the evaluation's folder, one per item, with what made
them inside: a run that was killed makes the rest, and other weights or settings make all of them
anew. Nothing is fetched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from components.evaluation.suites.picture_checks import left_out
from components.evaluation.suites.step_clock import PipelinePaint
from components.evaluation.suites.suites import SuiteItem, item_name
from components.evaluation.suites.system import (
    IMAGE_SUFFIXES,
    References,
    Sampling,
    System,
    SystemFailed,
    is_finished,
    item_key,
)
from components.files.install_hints import download_command
from components.files.natural_order import natural_key
from components.files.weight_folders import WeightsMissing, folder_digest, resolve_folder
from components.generation.image_metadata import save_with_metadata
from components.generation.sampling import (
    KEY_CHUNK,
    GenerationRequest,
    SamplerSettings,
    generate_images,
    load_model,
    model_sources,
    paint_requests,
    sampler_settings,
)
from components.models.backbones import BACKBONES
from components.telemetry.progress import track

if TYPE_CHECKING:
    from components.models.loading.memory_modes import MemoryModes
    from components.models.loading.released import ModelSources
    from components.models.loading.sampling_speed import SamplingSpeed
    from components.settings.models import Quantisation
    from components.settings.schema import Settings

_NAMED_IN_MESSAGES = 3


@dataclass(frozen=True)
class FolderSystem:
    """Pictures that exist already."""

    name: str
    folder: Path
    known: frozenset[str] = frozenset()
    """Ids of the whole suite, where only a part of it is asked for."""
    _said: list[str] = field(default_factory=list, compare=False, repr=False)

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Remarking`."""
        return tuple(self._said)

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """By name where every item's id is a file's name, else in natural order if counts agree."""
        self._said.clear()
        if not self.folder.is_dir():
            raise SystemFailed(f"{self.name}: {self.folder} is not a folder")
        files = sorted(
            (
                path
                for path in self.folder.iterdir()
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
            ),
            key=lambda path: natural_key(path.name),
        )
        by_name: dict[str, Path] = {}
        for path in files:
            other = by_name.setdefault(item_name(path.stem), path)
            if other != path:
                raise SystemFailed(
                    f"{self.name}: {other.name} and {path.name} in {self.folder} are both for "
                    f"'{path.stem}'; remove one"
                )
        missing = [item.id for item in items if item.id not in by_name]
        if not missing:
            self._said.extend(left_out(by_name, self.known | {item.id for item in items}))
            return [by_name[item.id] for item in items]
        if len(missing) == len(items) and len(files) == len(items):
            # Said, since a folder that was numbered by anything else would give wrong numbers.
            self._said.append(
                f"no file has an item's name, so the {len(files)} pictures were matched by their "
                f"order (2 before 10): {files[0].name} is item {items[0].id}, ... "
                f"{files[-1].name} is item {items[-1].id}"
            )
            return files
        named = ", ".join(missing[:_NAMED_IN_MESSAGES])
        raise SystemFailed(
            f"{self.name}: {self.folder} has {len(files)} pictures for {len(items)} items; "
            f"{len(items) - len(missing)} match by name and these do not: {named}"
            f"{', ...' if len(missing) > _NAMED_IN_MESSAGES else ''}. Name the files after the "
            "items, or give exactly one per item (then their order counts, 2 before 10)"
        )


@dataclass(frozen=True)
class PipelineSystem:
    """A saved diffusers pipeline, loaded by the class that its model_index.json names."""

    name: str
    folder: Path
    sampling: Sampling
    command: str = "copy a saved diffusers pipeline there"
    """What gets the weights."""

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """See `System.pictures`; one picture at a time, noise from a CPU generator."""
        identity = {"weights": folder_digest(self._found()), **asdict(self.sampling)}
        # Where and how weights are held changes no picture; tiles do, so their switch stays.
        del identity["device"], identity["memory"]
        if "vae-tiling" in self.sampling.memory:
            identity["vae_tiling"] = True
        out_dir.mkdir(parents=True, exist_ok=True)
        paths = [out_dir / f"{item.id}.png" for item in items]
        keys = [item_key(item, identity) for item in items]
        pending = [place for place, path in enumerate(paths) if not is_finished(path, keys[place])]
        if pending:
            paint = self.painter()
            done = len(items) - len(pending)
            for place in track(pending, self.name, total=len(items), initial=done):
                image = paint(items[place])
                fields = {
                    "prompt": items[place].prompt,
                    "seed": str(items[place].seed),
                    KEY_CHUNK: keys[place],
                }
                save_with_metadata(image, paths[place], fields)
        return paths

    def _found(self) -> Path:
        folder = resolve_folder(self.folder, self.name, self.command)
        if not (folder / "model_index.json").is_file():
            raise WeightsMissing(self.name, folder, self.command, "no model_index.json")
        return folder

    def painter(self) -> Callable[[SuiteItem], Image.Image]:
        """Load the pipeline; what is returned makes one picture.

        Raises:
            SystemFailed: the pipeline does not load, or cannot make the size.
            WeightsMissing: there is none.
        """
        self._found()
        import torch
        from diffusers import DiffusionPipeline

        from components.models.loading.memory_modes import place_pipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(
                self.folder,
                torch_dtype=getattr(torch, self.sampling.dtype),
                local_files_only=True,
                use_safetensors=True,
            )
            place_pipeline(pipeline, self._memory(), self.sampling.device)
        except (OSError, ValueError, AttributeError) as problem:
            reason = " ".join(str(problem).split())
            raise SystemFailed(f"{self.name}: {self.folder} does not load: {reason}") from None
        pipeline.set_progress_bar_config(disable=None, leave=False)
        options: dict[str, Any] = {
            "num_inference_steps": self.sampling.num_inference_steps,
            "guidance_scale": self.sampling.guidance_scale,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters:
            # Sana and PixArt would paint at a size of their own and resize.
            options["use_resolution_binning"] = False

        def paint(item: SuiteItem) -> Image.Image:
            image: Image.Image = pipeline(
                prompt=item.prompt,
                height=item.height,
                width=item.width,
                generator=torch.Generator("cpu").manual_seed(item.seed),
                **options,
            ).images[0]
            if image.size != (item.width, item.height):
                raise SystemFailed(
                    f"{self.name}: asked for {item.width}x{item.height} (width x height), the "
                    f"pipeline made {image.size[0]}x{image.size[1]}"
                )
            return image

        return PipelinePaint(pipeline, paint)

    def _memory(self) -> MemoryModes:
        memory = _held(self.sampling)
        if memory.offload == "block":
            raise SystemFailed(
                f"{self.name}: --memory block-offload is for ultraflux: systems; use model-offload"
            )
        return memory


def _held(sampling: Sampling) -> MemoryModes:
    """How weights are held while a system samples.

    Raises:
        SystemFailed: text encoders that go before the network is there cannot encode later prompts.
    """
    from components.models.loading.memory_modes import parse_memory

    memory = parse_memory(sampling.memory)
    if memory.text_first:
        raise SystemFailed("--memory text-first is of ultraflux generate; here use model-offload")
    return memory


@dataclass(frozen=True)
class UltraFluxSystem:
    """Weights that `ultraflux generate` loads: this project's own, or published UltraFlux ones."""

    name: str
    root: Path
    settings: Settings
    sampling: Sampling
    model: Path | None = None
    """None: what the pipeline trained."""
    base: Path | None = None
    transformer: Path | None = None
    """Instead of the model's."""
    command: str = "copy the weights there"
    """What gets the weights."""
    autoencoder: Path | None = None
    """Instead of the model's."""

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """See `System.pictures`."""
        sources, sampler = self._parts()
        from components.models.loading.released import source_digests

        made = generate_images(
            lambda: self._load(sources, sampler),
            [_request(item) for item in items],
            out_dir,
            sampler=sampler,
            digests=source_digests(sources, sampler.schedule),
            description=self.name,
        )
        return [out_dir / record.file for record in made]

    def painter(self) -> Callable[[SuiteItem], Image.Image]:
        """Load the model; what is returned makes one picture.

        Raises:
            WeightsMissing: a part is not there; the message names it.
        """
        return self._painter(*self._parts())[0]

    def painter_in(
        self, speed: SamplingSpeed, quantisation: Quantisation
    ) -> tuple[Callable[[SuiteItem], Image.Image], Any]:
        """What makes one picture in another way than the settings', and its transformer.

        Text encoders are whole.

        Raises:
            WeightsMissing: a part is not there; the message names it.
            ValueError: the way cannot run here.
        """
        sources, sampler = self._parts()
        sampler = replace(sampler, speed=speed, quantisation=quantisation, text_quantisation="none")
        return self._painter(sources, sampler)

    def _painter(
        self, sources: ModelSources, sampler: SamplerSettings
    ) -> tuple[Callable[[SuiteItem], Image.Image], Any]:
        pipeline = self._load(sources, sampler)

        def paint(item: SuiteItem) -> Image.Image:
            made = paint_requests(lambda: pipeline, None, [_request(item)], sampler, 1)
            ((_, image),) = made
            return image

        return PipelinePaint(pipeline, paint), pipeline.transformer

    def _load(self, sources: ModelSources, sampler: SamplerSettings) -> Any:
        memory = _held(self.sampling)
        return load_model(sources, sampler, device=self.sampling.device, memory=memory)

    def _parts(self) -> tuple[ModelSources, SamplerSettings]:
        """Where the weights are, and how they are sampled."""
        # Before the imports, which take seconds; `find_sources` names parts that are missing.
        for path in (self.transformer, self.model):
            if path is not None and not path.exists():
                raise WeightsMissing(self.name, path, self.command)
        if self.model is None:
            sources = model_sources(
                self.root,
                self.settings,
                transformer=self.transformer,
                autoencoder=self.autoencoder,
            )
        else:
            from components.models.loading.released import find_sources

            sources = find_sources(
                self.model,
                base=self.base,
                transformer=self.transformer,
                autoencoder=self.autoencoder,
            )
        own = sampler_settings(self.settings)
        wanted = self.sampling
        sampler = replace(
            own,
            num_inference_steps=wanted.num_inference_steps or own.num_inference_steps,
            guidance_scale=(
                own.guidance_scale if wanted.guidance_scale is None else wanted.guidance_scale
            ),
            dtype=wanted.dtype,
            vae_tiling=_held(wanted).vae_tiling,
        )
        return sources, sampler


def _request(item: SuiteItem) -> GenerationRequest:
    return GenerationRequest(
        prompt=item.prompt, seed=item.seed, height=item.height, width=item.width, name=item.id
    )


@dataclass(frozen=True)
class AutoencoderSystem:
    """References through an autoencoder and back."""

    name: str
    folder: Path
    sampling: Sampling

    def pictures(self, items: Sequence[SuiteItem], out_dir: Path) -> list[Path]:
        """See `System.pictures`; references have the items' sizes."""
        import torch

        from components.evaluation.measuring.reconstruction import reconstruct
        from components.files.weight_folders import file_digest
        from components.images.decoding import read_rgb
        from components.models.loading.released import load_autoencoder

        command = download_command("Owen777/UltraFlux-v1", "weights/UltraFlux", include=("vae/*",))
        resolve_folder(self.folder, self.name, command)
        identity = {"weights": folder_digest(self.folder), "dtype": self.sampling.dtype}
        out_dir.mkdir(parents=True, exist_ok=True)
        autoencoder = None
        paths = []
        for item in track(items, self.name, total=len(items)):
            if item.reference is None:
                raise SystemFailed(f"{self.name}: item {item.id} has no picture to reconstruct")
            key = item_key(item, {**identity, "image": file_digest(item.reference)})
            path = out_dir / f"{item.id}.png"
            paths.append(path)
            if is_finished(path, key):
                continue
            if autoencoder is None:
                dtype = getattr(torch, self.sampling.dtype)
                autoencoder = load_autoencoder(self.folder, dtype=dtype).to(self.sampling.device)
            rgb = reconstruct(autoencoder, np.asarray(read_rgb(item.reference).pixels))
            save_with_metadata(Image.fromarray(rgb), path, {KEY_CHUNK: key})
        return paths


@dataclass(frozen=True)
class Preset:
    """Published weights below weights/."""

    kind: str
    """ultraflux or diffusers."""
    folder: str
    command: str
    transformer: str | None = None


def _hub(repository: str, folder: str) -> str:
    return download_command(repository, f"weights/{folder}")


PRESETS: dict[str, Preset] = {
    "ultraflux-v1": Preset(
        "ultraflux", "UltraFlux-v1", _hub("Owen777/UltraFlux-v1", "UltraFlux-v1")
    ),
    "ultraflux-v1.1": Preset(
        "ultraflux",
        "UltraFlux-v1",
        _hub("Owen777/UltraFlux-v1-1-Transformer", "UltraFlux-v1-1-Transformer"),
        transformer="UltraFlux-v1-1-Transformer",
    ),
    **{
        backbone.name: Preset(
            "diffusers",
            backbone.repository.rpartition("/")[2],
            _hub(backbone.repository, backbone.repository.rpartition("/")[2]),
        )
        for backbone in BACKBONES.values()
    },
    "sana": Preset(
        "diffusers",
        "Sana_1600M_4Kpx_BF16_diffusers",
        _hub(
            "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers",
            "Sana_1600M_4Kpx_BF16_diffusers",
        ),
    ),
    "pixart-sigma": Preset(
        "diffusers",
        "PixArt-Sigma-XL-2-2K-MS",
        _hub("PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", "PixArt-Sigma-XL-2-2K-MS"),
    ),
}


def parse_system(text: str, root: Path, settings: Settings, sampling: Sampling) -> System:
    """The system of "NAME=SPEC".

    Args:
        text: see the module docstring.
        root: repository root.
        settings: of the project, for its own weights.
        sampling: for systems that make pictures.

    Raises:
        ValueError: no name, a name that is no file name, or an unknown SPEC.
    """
    from components.evaluation.suites.command_system import CommandSystem

    name, _, spec = text.partition("=")
    if not (spec and name.strip(".") and all(c.isalnum() or c in "._-" for c in name)):
        raise ValueError(
            f"--system {text}: expected NAME=SPEC, such as mine=pictures/ or "
            "ours=trained; a name has letters, digits, '.', '_' and '-', not dots alone"
        )
    weights = root / "weights"
    base = weights / "FLUX.1-dev"
    kind, colon, rest = spec.partition(":")
    if spec == "references":
        return References(name)
    if spec == "trained":
        return UltraFluxSystem(name, root, settings, sampling)
    if spec in PRESETS:
        preset = PRESETS[spec]
        if preset.kind == "diffusers":
            return PipelineSystem(name, weights / preset.folder, sampling, preset.command)
        transformer = weights / preset.transformer if preset.transformer else None
        model = weights / preset.folder
        return UltraFluxSystem(
            name, root, settings, sampling, model, base, transformer, preset.command
        )
    if colon and rest:
        makers: dict[str, Callable[[], System]] = {
            "folder": lambda: FolderSystem(name, Path(rest)),
            "command": lambda: CommandSystem(name, rest),
            "ultraflux": lambda: UltraFluxSystem(name, root, settings, sampling, Path(rest), base),
            "diffusers": lambda: PipelineSystem(name, Path(rest), sampling),
            "vae": lambda: AutoencoderSystem(name, Path(rest), sampling),
        }
        if kind in makers:
            return makers[kind]()
    folder = Path(spec)
    if (folder / "model_index.json").is_file():
        return PipelineSystem(name, folder, sampling)
    if (folder / "transformer").is_dir():
        return UltraFluxSystem(name, root, settings, sampling, folder, base)
    if folder.is_dir():
        return FolderSystem(name, folder)
    known = ", ".join(("references", "trained", *PRESETS))
    raise ValueError(
        f"--system {text}: '{spec}' is no folder, none of {known}, and does not start with "
        "folder:, command:, ultraflux:, diffusers: or vae:"
    )
