"""Weights that training starts from: what is wrong with a folder is one line before any step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.files.weight_folders import WeightsMissing
from components.models.loading.base_autoencoder import load_base_autoencoder
from components.models.tiny import build_tiny_autoencoder
from components.settings.models import AutoencoderSettings
from components.training.dit.job import DitJob, build_transformer

FILE = "diffusion_pytorch_model.safetensors"
FIRST = {"transformer": "x_embedder.weight", "autoencoder": "encoder.conv_in.weight"}
Tensors = dict[str, torch.Tensor]


def configured(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def stored(change: Callable[[Tensors, str], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        change(tensors, next(name for name in FIRST.values() if name in tensors))
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    return write


def index_that_lacks_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    del tensors[next(name for name in FIRST.values() if name in tensors)]
    (folder / FILE).unlink()
    save_file(tensors, folder / "part.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index))


def named(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / FILE).rename(folder / name)


def text(name: str, words: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(words)


FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (stored(lambda tensors, name: tensors.pop(name)), "1 tensors are missing"),
    (stored(lambda tensors, name: tensors.update(foo=tensors[name] + 0)), r"unknown \(foo\)"),
    (stored(lambda tensors, name: tensors[name].fill_(torch.nan)), "not finite"),
    (stored(lambda tensors, name: tensors[name][0].fill_(-torch.inf)), "not finite"),
    (index_that_lacks_a_tensor, "1 tensors are missing"),
    (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:99]), "readable"),
    (named("diffusion_pytorch_model.fp16.safetensors"), r"fp16\.safetensors is not read: rename"),
    (named("flux1-dev.safetensors"), r"flux1-dev\.safetensors is not read: rename"),
    (text("config.json", "{"), r"config\.json: not a model's configuration"),
    (text("config.json", "[]"), r"config\.json: not a model's configuration"),
]


def refused(load: Callable[[], object], folder: Path, said: str) -> None:
    with pytest.raises((ValueError, WeightsMissing), match=said) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        *FAULTS,
        (configured(num_single_layers=0), "tensors are unknown"),
        (configured(num_single_layers=2), "tensors are missing"),
        (configured(guidance_embeds=False), "tensors are unknown"),
        (configured(axes_dims_rope="x"), r"config\.json"),
    ],
)
def test_a_transformer_that_is_not_what_its_folder_says_is_not_trained_on(
    make_dit_job: Callable[..., DitJob], tmp_path: Path, fault, said: str
) -> None:
    job = make_dit_job(tmp_path)
    folder = tmp_path / "given"
    model = build_transformer(job, (16, 16), 16)
    model.save_pretrained(folder)
    given = job.model_copy(update={"initial_weights": folder})
    build_transformer(given, (16, 16), 16)
    fault(folder)
    refused(lambda: build_transformer(given, (16, 16), 16), folder, said)


@pytest.mark.parametrize(
    ("fault", "said"), [*FAULTS, (configured(layers_per_block=2), "tensors are missing")]
)
def test_an_autoencoder_that_is_not_what_its_folder_says_is_not_used(
    tmp_path: Path, fault, said: str
) -> None:
    folder = tmp_path / "given"
    build_tiny_autoencoder(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, seed=0
    ).save_pretrained(folder)
    settings = AutoencoderSettings.model_validate(
        {
            "pretrained": str(folder),
            "stride": 2,
            "decode_mode": "aligned",
            "tiny": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
        }
    )
    load_base_autoencoder(settings, 0)
    fault(folder)
    refused(lambda: load_base_autoencoder(settings, 0), folder, said)
