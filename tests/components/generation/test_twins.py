"""Pictures that are to be laid beside the photographs whose captions they are from."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from components.generation.generation_list import read_generations
from components.generation.sampling import Generation, make_requests
from components.generation.twins import (
    LIST,
    TRAINED,
    TWINS,
    least_like,
    twin_requests,
    write_twins,
)
from components.settings.schema import Settings, load_settings

SIZES = ((256, 256), (192, 352), (352, 192), (160, 384))


@pytest.fixture
def settings(root: Path) -> Settings:
    values = load_settings(root / "params.yaml")
    generate = values.generate.model_copy(update={"sizes": SIZES, "prompts": 1, "twins": 3})
    return values.model_copy(update={"generate": generate})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    table = pd.DataFrame(
        [
            ("a", "a lake", 256, 256),
            ("b", None, 256, 256),
            ("c", "a hill", 192, 352),
            ("d", "", 192, 352),
            ("e", "a boat", 288, 224),
            ("f", "a leaf", 256, 256),
        ],
        columns=["image_id", "caption_en", "bucket_height", "bucket_width"],
    )
    (tmp_path / TRAINED).parent.mkdir(parents=True)
    table.to_parquet(tmp_path / TRAINED)
    return tmp_path


def test_each_captioned_image_comes_in_its_own_size_and_the_first_in_three_others(
    project: Path, settings: Settings
) -> None:
    made = [
        (one.source_image_id, one.prompt, one.height, one.width)
        for one in twin_requests(project, settings)
    ]
    assert made == [
        ("a", "a lake", 256, 256),
        ("a", "a lake", 192, 352),
        ("a", "a lake", 352, 192),
        ("a", "a lake", 160, 384),
        ("c", "a hill", 192, 352),
        ("e", "a boat", 288, 224),
    ]


def test_no_two_pictures_share_a_seed_or_a_name(project: Path, settings: Settings) -> None:
    made = twin_requests(project, settings)
    assert len({one.seed for one in made}) == len({one.name for one in made}) == len(made)
    # Nor with a picture of a held-out prompt of the same number and size.
    held_out = make_requests([("x", "a fox"), ("y", "a fir")], SIZES, settings.generate.seed)
    assert not {one.seed for one in made} & {one.seed for one in held_out}


def test_the_three_sizes_least_like_ones_own() -> None:
    assert least_like((256, 256), SIZES) == [(192, 352), (352, 192), (160, 384)]
    assert least_like((176, 368), SIZES) == [(256, 256), (352, 192), (160, 384)]


def test_none_are_asked_for_where_the_settings_say_so(tmp_path: Path, settings: Settings) -> None:
    none = settings.generate.model_copy(update={"twins": 0})
    assert twin_requests(tmp_path, settings.model_copy(update={"generate": none})) == []
    assert read_generations(tmp_path / TWINS / LIST) == []


def test_what_is_written_is_read_and_pictures_of_a_former_run_go(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "twin00_8x8.png").write_bytes(b"picture")
    generation = Generation(
        "ein See,\u2028 湖\x85", "twin00_8x8.png", 1, 8, 8, "0", "a", "k", {"vae": "1"}
    )
    folder = tmp_path / TWINS
    folder.mkdir(parents=True)
    (folder / "twin09_8x8.png").touch()
    write_twins([generation], tmp_path / "made", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["twin00_8x8.png", "twins.jsonl"]
    assert (folder / "twin00_8x8.png").read_bytes() == b"picture"
    (line,) = read_generations(folder / LIST)
    assert Generation(**line) == generation
    assert "湖" in json.dumps(line, ensure_ascii=False)
