"""The captioning model of a local folder, in Qwen2-VL's architecture with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from skimage import data

from components.chat.prompts import Prompt
from components.corpus.captions.local import LocalCaptioner, caption_locally, check_folder
from components.corpus.tiny_captioner import write_tiny_captioner
from components.files.parquet_files import write_parquet
from components.files.weight_folders import WeightsMissing, folder_digest
from components.images.decoding import ImageUndecodable
from components.settings.schema import Settings, load_settings, parse_settings
from components.signals.candidate import DERIVATIVES_SCHEMA, derivative_jpeg

ROOT = Path(__file__).parents[4]
PROMPT = Prompt("test-1", "Describe it.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny"
    write_tiny_captioner(path, seed=0)
    return path


def jpeg(n: int) -> bytes:
    # Of two shapes, so that a batch has prompts of two lengths.
    return derivative_jpeg(np.roll(data.astronaut()[::4, :: 4 + 4 * (n % 2)], n * 5, axis=1), 128)


def test_a_batch_gets_the_captions_of_its_pictures_alone(folder: Path) -> None:
    captioner = LocalCaptioner(folder, "cpu")
    pictures = [jpeg(n) for n in range(4)]
    together = captioner(pictures, PROMPT, 12)
    assert together == [captioner([picture], PROMPT, 12)[0] for picture in pictures]
    assert len({text for text, _ in together}) == len(pictures)
    assert all(ended for _, ended in together)
    # Another question, another answer; the prompt of a system is part of it.
    assert captioner(pictures, Prompt("x", "What colour is it?"), 12) != together
    assert captioner(pictures, Prompt("x", PROMPT.text, "You are a boat."), 12) != together
    with pytest.raises(ImageUndecodable):
        captioner([b"not a picture"], PROMPT, 12)


def test_what_reaches_its_limit_has_not_ended(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "endless")
    settings = tmp_path / "endless" / "generation_config.json"
    settings.write_text(settings.read_text().replace('"forced_eos_token_id"', '"unused"'))
    answers = LocalCaptioner(tmp_path / "endless", "cpu")([jpeg(0), jpeg(2)], PROMPT, 3)
    assert [ended for _, ended in answers] == [False, False]


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    write_tiny_captioner(tmp_path / "again", seed=0)
    write_tiny_captioner(tmp_path / "other", seed=1)
    weights = [path / "model.safetensors" for path in (folder, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights[0].read_bytes()


def test_a_folder_that_is_missing_damaged_or_another_is_named_with_the_command(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeightsMissing, match=r"caption\.local\.folder.*nowhere.*hf download"):
        check_folder(tmp_path / "nowhere")
    text_alone = tmp_path / "text"
    shutil.copytree(folder, text_alone)
    (text_alone / "processor_config.json").unlink()
    with pytest.raises(WeightsMissing, match="not a model that looks at pictures"):
        check_folder(text_alone)
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(WeightsMissing, match="no chat template"):
        LocalCaptioner(mute, "cpu")
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsMissing, match="usable captioning model") as caught:
        LocalCaptioner(cut, "cpu")
    assert "\n" not in str(caught.value)


def local_settings(folder: Path, **changes: object) -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    values["runtime"]["workers"] = 1
    values["signals"] |= {"timeout_s": 300.0, "retries": 0}
    local = {"folder": str(folder), "batch_size": 3, "max_new_tokens": 12}
    values["caption"] |= {"provider": "local", "local": local, "min_words": 2}
    values["caption"]["translate"]["provider"] = "none"
    for name, value in changes.items():
        values["caption"][name] = value
    return parse_settings(values)


@pytest.mark.slow
def test_one_bad_picture_costs_its_own_caption_alone_and_nothing_is_asked_twice(
    folder: Path, tmp_path: Path
) -> None:
    names = [f"{n:064x}" for n in range(7)]
    rows = [
        {"image_id": name, "height": 8, "width": 8, "jpeg": b"no jpeg" if n == 4 else jpeg(n)}
        for n, name in enumerate(names)
    ]
    derivatives = tmp_path / "derivatives.parquet"
    write_parquet(pa.Table.from_pylist(rows, schema=DERIVATIVES_SCHEMA), derivatives)
    settings = local_settings(folder)
    wanted = [name for n, name in enumerate(names) if n != 1]

    def write(settings: Settings, state: str = "state") -> object:
        return caption_locally(
            wanted, derivatives, settings, PROMPT, state_dir=tmp_path / state, root=tmp_path
        )

    found = write(settings)
    assert set(found.written) == set(wanted)
    broken = found.written[names[4]]
    assert (broken.status, broken.text) == ("error", None)
    assert "ImageUndecodable" in str(broken.detail)
    others = {name: one for name, one in found.written.items() if name != names[4]}
    here = LocalCaptioner(folder, "cpu")
    for n in (0, 6):
        assert others[names[n]].text == here([jpeg(n)], PROMPT, 12)[0][0].strip()
    assert found.name == f"tiny sha256:{folder_digest(folder)}, prompt test-1"
    # Other bounds of the checks read what is there: no worker starts, whose weights are gone.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()}
    strict = write(local_settings(folder, min_words=100, max_words=200))
    assert {one.status for one in strict.written.values()} == {"too_short", "error"}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "state").iterdir()} == before
