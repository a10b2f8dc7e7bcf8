"""NSFW scores of nsfwjs' MobileNetV2: five classes of a 224-pixel picture, in plain torch.

The network comes from the npm package nsfwjs 4.4 (MIT, Infinite Red; 2.6 MB of 8-bit weights);
`ultraflux weights get nsfwjs` fetches it. It was trained on scraped pictures with the labels of
their sources: a filter for a corpus of photographs, not a moderator of single pictures and no
judge of age. Its class of drawings tells photographs from drawings on the side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from components.corpus.people.layers_model import LayersModel, read_layers_model
from components.corpus.people.nsfwjs_package import COMMAND, MODEL_FILE, WEIGHTS_FILE
from components.files.weight_folders import WeightsMissing

CLASSES = ("Drawing", "Hentai", "Neutral", "Porn", "Sexy")
"""In the order of the network's outputs."""

FOLDER = Path("weights/nsfwjs")
"""Where the command puts it, from the root of the clone."""

INPUT_PX = 224


def network_input(pixels: np.ndarray) -> torch.Tensor:
    """(1, 3, 224, 224) float32, 0 to 1: squashed bilinearly with aligned corners.

    As the package does, without smoothing first: its network saw pictures that way.

    Args:
        pixels: (H, W, 3) uint8, RGB.
    """
    values = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).permute(2, 0, 1)[None]
    return F.interpolate(values, (INPUT_PX, INPUT_PX), mode="bilinear", align_corners=True)


@dataclass(frozen=True)
class NsfwClasses:
    """Probabilities of `CLASSES` and what the corpus keeps of them."""

    probabilities: tuple[float, ...]

    @property
    def nsfw_score(self) -> float:
        """Porn + Hentai, 0 to 1.

        Sexy does not count: bathing suits and underwear are in it, which the human channel holds
        by right.
        """
        return min(self.of("Porn") + self.of("Hentai"), 1.0)

    @property
    def drawing_score(self) -> float:
        """Drawing + Hentai, 0 (a photograph) to 1 (a drawing): Hentai are drawings too."""
        return min(self.of("Drawing") + self.of("Hentai"), 1.0)

    def of(self, name: str) -> float:
        """Probability of one class."""
        return self.probabilities[CLASSES.index(name)]


@dataclass(frozen=True)
class NsfwNetwork:
    """The network on a device."""

    model: LayersModel
    device: str

    def classify(self, pixels: np.ndarray) -> NsfwClasses:
        """Classes of a picture; what was shrunk before looks smoother than the package's input.

        Args:
            pixels: (H, W, 3) uint8, RGB.
        """
        (values,) = self.model(network_input(pixels).to(self.device)).tolist()
        return NsfwClasses(tuple(values))


def load_network(folder: Path, device: str = "cpu") -> NsfwNetwork:
    """The network from a local folder.

    Raises:
        WeightsMissing: `model.json` or `weights.bin` is not there.
        ValueError: another kind of network.
    """
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            reason = f"no {name}" if folder.is_dir() else ""
            raise WeightsMissing("nsfwjs' network (people.nsfw.weights)", folder, COMMAND, reason)
    model = read_layers_model(folder / MODEL_FILE, folder / WEIGHTS_FILE, device)
    network = NsfwNetwork(model, device)
    # One look at black: a graph whose shapes do not fit is refused before any photograph.
    try:
        found = len(network.classify(np.zeros((2, 2, 3), np.uint8)).probabilities)
    except RuntimeError as problem:
        line = str(problem).splitlines()[0]
        raise ValueError(f"people.nsfw.weights: {folder.name}: {line}") from None
    if found != len(CLASSES):
        raise ValueError(
            f"people.nsfw.weights: {folder.name}: {found} classes, expected {len(CLASSES)}: "
            f"{', '.join(CLASSES)}"
        )
    return network
