"""Where the weights of learned metrics come from: file, size, licence and the command for them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Weights:
    """Where a learned metric's weights come from; sizes are approximate downloads."""

    path: str
    """File or folder below the repository's `weights/`."""
    size: str
    license: str
    command: str
    """What fetches them into `path` on a machine with network access."""
    repository: str | None = None
    """Hub repository; its snapshot in the hub's cache serves as well."""
    files: tuple[str, ...] = ()
    """Files that the folder must hold beside its weights."""
    also: tuple[Weights, ...] = ()
    """Further weights that the metric needs."""
    holds_network: bool = True
    """Whether a folder must hold a weights file; False for a tokenizer alone."""


def hub(
    folder: str,
    repository: str,
    size: str,
    license_name: str,
    *files: str,
    needs: tuple[str, ...] = ("config.json",),
    also: tuple[Weights, ...] = (),
) -> Weights:
    """Weights in a hub repository, fetched with the hub's own client."""
    wanted = "".join(f" {file}" for file in files)
    command = f"hf download {repository}{wanted} --local-dir weights/{folder}"
    return Weights(folder, size, license_name, command, repository, needs, also)


def lpips_heads(backbone: str) -> Weights:
    """The linear heads, which the lpips package carries."""
    return Weights(
        f"lpips/heads-{backbone}.pth",
        "6 to 7 KB",
        "BSD-2-Clause",
        f"copy weights/v0.1/{backbone}.pth of the lpips package to "
        f"weights/lpips/heads-{backbone}.pth",
    )


CLIP_L14 = hub(
    "clip-vit-large-patch14",
    "openai/clip-vit-large-patch14",
    "1.7 GB",
    "MIT",
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    needs=("model.safetensors", "config.json", "tokenizer.json"),
)
CLIP_H14_TOKENIZER = replace(
    hub(
        "clip-vit-h-14-tokenizer",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "4 MB",
        "MIT",
        "tokenizer.json",
        needs=("tokenizer.json",),
    ),
    holds_network=False,
)
INCEPTION = Weights(
    path="inception/pt_inception-2015-12-05-6726825d.pth",
    size="91 MiB",
    license="Apache-2.0",
    command="copy pt_inception-2015-12-05-6726825d.pth (release fid_weights of the pytorch-fid "
    "project) to weights/inception/",
)
