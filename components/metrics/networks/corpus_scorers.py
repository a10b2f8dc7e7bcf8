"""Learned quality of one image: MUSIQ, and Q-Align and ArtiMuse as the corpus uses them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.files.weight_folders import WeightsMissing
from components.images.arrays import ImageArray

if TYPE_CHECKING:
    from components.corpus.quality.qalign import QAlign
    from components.corpus.quality.scorer_protocol import ScorerClient
    from components.metrics.metric import Picture
    from components.metrics.networks.musiq import MusiqMetric


ARTIMUSE_URL = "ULTRAFLUX_ARTIMUSE_URL"
_JPEG_QUALITY = 95


def open_musiq(file: Path, digest: str, device: str) -> MusiqMetric:
    """MUSIQ from a checkpoint file, whose parameters may stand under `params`.

    Raises:
        ValueError: the file holds another network.
    """
    import torch

    from components.metrics.networks.musiq import MusiqMetric

    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    # The published file wraps its parameters; one saved from a network does not.
    state = state.get("params", state)
    try:
        # "module." is what training on several GPUs leaves in the names.
        return MusiqMetric(
            {key.removeprefix("module."): value for key, value in state.items()}, digest, device
        )
    except RuntimeError as problem:
        raise ValueError(f"{file}: not a MUSIQ checkpoint: {str(problem).split(':')[0]}") from None


class QAlignMetric:
    """`metrics.ImageMetric` over the corpus's Q-Align."""

    def __init__(self, network: QAlign, digest: str) -> None:
        """Keep the network.

        Args:
            network: with its weights.
            digest: of the folder.
        """
        self.ids = ("qalign",)
        self.weights_digest = digest
        self._network = network

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the picture beyond its pixels is not used."""
        return {"qalign": self._network(rgb)}


class ArtiMuseMetric:
    """`metrics.ImageMetric` over a scorer process (`components.corpus.quality.scorer_protocol`).

    The picture travels as a JPEG of quality 95 without chroma subsampling; the server squashes it
    to 448 px.
    """

    def __init__(self, client: ScorerClient) -> None:
        """Ask the server who it is.

        Args:
            client: of a running server.

        Raises:
            ScorerUnavailable: no server there.
        """
        self.ids = ("artimuse",)
        self._client = client
        # Asked once and sent with each picture: a server restarted with other weights is an error,
        # not another row of the same metric.
        self._identity = client.identity()
        self.weights_digest = self._identity.weights

    def measure(self, rgb: ImageArray, picture: Picture) -> dict[str, float | None]:
        """See `ImageMetric.measure`; the picture beyond its pixels is not used.

        Raises:
            ItemRejected: the server cannot score the picture.
            ScorerChanged: it is another one than at the start.
        """
        from PIL import Image

        buffer = io.BytesIO()
        # Chroma in full: 4:2:0 would blur colour before the scorer sees it.
        Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return {"artimuse": self._client.score(buffer.getvalue(), self._identity)}


def artimuse_url() -> str:
    """The scorer's address from the environment.

    Raises:
        WeightsMissing: not set; the message says how to start a server.
    """
    url = os.environ.get(ARTIMUSE_URL, "")
    if not url:
        raise WeightsMissing(
            "ArtiMuse scorer",
            f"${ARTIMUSE_URL} (not set)",
            "python -m components.corpus.quality.artimuse_server --weights weights/artimuse, then "
            f"export {ARTIMUSE_URL}=http://127.0.0.1:8765",
        )
    return url
