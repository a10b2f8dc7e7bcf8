"""Photographs that are not plain sRGB, through ingest to select and the commands: what is said."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from icc_bytes import ADOBE, cmyk_profile, rgb_profile
from PIL import Image, ImageCms, ImageOps
from typer.testing import CliRunner

from components.corpus.manifest import read_table
from components.images.aspect_buckets import Bucket, fit_to_bucket
from components.settings.schema import Settings, load_settings, parse_settings
from components.signals.candidate import measure_image
from components.telemetry.metric_log import MetricLog
from components.training.encoding.latents import EncodingItem, load_image
from flows.cli import app
from flows.commands.corpus import look
from flows.stages.contract import StageContext

ROOT = Path(__file__).parents[3]
ADOBE_RGB = rgb_profile("Adobe RGB (1998)", ADOBE, 563 / 256)
STAGES = ("source", "ingest", "signals", "quality", "people", "select")


def scene(height: int = 240, width: int = 320) -> Image.Image:
    rng = np.random.default_rng(11)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = smooth + rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path) -> None:
    folder.mkdir()
    photo = scene()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "plain.jpg", quality=95)
    photo.save(folder / "turned.jpg", quality=95, exif=turned)
    photo.save(folder / "wide.png", icc_profile=ADOBE_RGB)
    photo.convert("CMYK").save(folder / "inks.jpg", quality=95, icc_profile=cmyk_profile("inks"))
    deep = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    cut_out = photo.convert("RGBA")
    cut_out.putalpha(Image.new("L", photo.size, 0))
    cut_out.putpixel((3, 3), (1, 2, 3, 255))
    cut_out.save(folder / "cut-out.png")
    whole = (folder / "plain.jpg").read_bytes()
    (folder / "no-end.jpg").write_bytes(whole[:-2])
    comment = bytearray((folder / "wide.png").read_bytes())
    comment[comment.index(b"iCCP") + 20] ^= 1
    (folder / "broken-profile.png").write_bytes(comment)
    inks = bytearray((folder / "inks.jpg").read_bytes())
    # Pixels that are missing inside: whatever the rest decodes to, it ends too early.
    del inks[len(inks) // 2 : -200]
    (folder / "damaged-inks.jpg").write_bytes(inks)


def settings() -> Settings:
    values = load_settings(ROOT / "params.yaml").model_dump(mode="json")
    contracts = ROOT / "data" / "contracts"
    values["validation"] = {n: str(contracts / f"{n}.yaml") for n in values["validation"]}
    values["ingest"] |= {"source": "photos", "attribution": None}
    values["select"] |= {"exclusions": str(ROOT / "conf" / "exclusions.csv")}
    values["select"] |= {"min_pixels": 1, "near_duplicate_distance": None, "min_entropy_bits": 1}
    values["people"] |= {"boxes": None}
    values["signals"] |= {"timeout_s": 60.0}
    return parse_settings(values)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_photographs(root / "photos")
    for stage in STAGES:
        state = root / "runs" / stage
        log = MetricLog(state / "metrics.jsonl")
        context = StageContext(stage, settings(), root, state, log)
        importlib.import_module(f"flows.stages.{stage}").run(context)
    return root


def table_of(project: Path, stage: str) -> pd.DataFrame:
    table = read_table(project / "data" / stage / "manifest.parquet")
    return table.set_index(table["uri"].map(lambda uri: Path(uri).name))


def test_ingest_knows_both_sizes_and_how_the_file_is_to_be_seen(project: Path) -> None:
    table = table_of(project, "ingest")
    row = table.loc["turned.jpg"]
    assert (row["width"], row["height"]) == (240, 320)
    assert (row["stored_width"], row["stored_height"], row["orientation"]) == (320, 240, 6)
    assert row["aspect_ratio"] == 0.75
    assert table["color_space"].to_dict() == {
        "plain.jpg": "untagged",
        "turned.jpg": "untagged",
        "wide.png": "Adobe RGB (1998)",
        "inks.jpg": "CMYK: inks",
        "deep.png": "untagged",
        "cut-out.png": "untagged",
        "no-end.jpg": "untagged",
        "broken-profile.png": "untagged",
        "damaged-inks.jpg": "CMYK: inks",
    }
    assert table["bit_depth"].to_dict() == dict.fromkeys(table.index, 8) | {"deep.png": 16}
    assert table.index[table["has_alpha"].eq(True)].tolist() == ["cut-out.png"]


def test_damage_and_transparency_reject_and_the_rest_is_noted(project: Path) -> None:
    table = table_of(project, "select")
    assert table["reject_reason"].dropna().to_dict() == {
        "cut-out.png": "transparency",
        "damaged-inks.jpg": "integrity",
    }
    assert table.loc["cut-out.png", "alpha_fraction"] > 0.9999
    assert "jpeg" in table.loc["damaged-inks.jpg", "integrity"]
    notes = table["decode_note"].dropna()
    assert notes["no-end.jpg"] == "no end marker (EOI)"
    assert notes["broken-profile.png"] == "broken PNG chunk iCCP left out"
    assert "I;16" in notes["deep.png"]
    assert "plain.jpg" not in notes.index


def test_a_turned_photograph_gets_a_portrait_bucket_and_an_upright_derivative(
    project: Path,
) -> None:
    row = table_of(project, "select").loc["turned.jpg"]
    assert row["bucket_height"] > row["bucket_width"]
    pictures = pq.read_table(project / "data" / "signals" / "derivatives.parquet").to_pandas()
    small = pictures.set_index("image_id").loc[row["image_id"]]
    assert (small["height"], small["width"]) == (320, 240)
    with Image.open(io.BytesIO(small["jpeg"])) as image:
        assert image.height > image.width


def test_published_signals_are_of_the_file_as_stored(project: Path) -> None:
    table = table_of(project, "select")
    published = ["entropy_bits", "flat_fraction", "glcm_score", "glcm_entropy_bits"]
    for name in ("turned.jpg", "no-end.jpg"):
        assert table.loc[name, published].equals(table.loc["plain.jpg", published]), name
    # The same pixels under a profile or none: only what is seen differs.
    same = table.loc[["wide.png", "broken-profile.png"], published]
    assert same.nunique().eq(1).all()
    assert table.loc["deep.png", "entropy_bits"] > 6
    # The hash is of what is seen.
    assert table.loc["turned.jpg", "pdq_hash"] != table.loc["plain.jpg", "pdq_hash"]


def test_the_command_measures_both_policies(project: Path) -> None:
    def measured(name: str) -> dict[str, object]:
        done = CliRunner().invoke(app, ["measure", "--json", str(project / "photos" / name)])
        assert done.exit_code == (2 if name.startswith("damaged") else 0), done.output
        found: dict[str, object] = json.loads(done.stdout)
        return found

    turned, plain = measured("turned.jpg"), measured("plain.jpg")
    assert (turned["width"], turned["height"]) == (320, 240)
    assert (turned["upright_width"], turned["upright_height"]) == (240, 320)
    assert turned["entropy_bits"] == plain["entropy_bits"]
    assert measured("wide.png")["color_space"] == "Adobe RGB (1998)"
    assert measured("deep.png")["bit_depth"] == 16
    assert measured("cut-out.png")["alpha_fraction"] == pytest.approx(1, abs=1e-4)
    assert "damaged" in str(measured("damaged-inks.jpg")["error"])
    assert measure_image(project / "photos" / "no-end.jpg").get("error") is None


def viewer(path: Path, bucket: Bucket) -> np.ndarray:
    """The crop of an independent rendering."""
    with Image.open(path) as image:
        icc = image.info.get("icc_profile")
        shown = ImageOps.exif_transpose(image)
    if icc is not None:
        shown = ImageCms.profileToProfile(
            shown,
            ImageCms.ImageCmsProfile(io.BytesIO(icc)),
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    return np.asarray(fit_to_bucket(shown.convert("RGB"), bucket))


def test_corpus_look_writes_exactly_what_the_encoder_gets(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "params.yaml", project)
    monkeypatch.setattr(look, "project_root", lambda: project)
    names = ("turned.jpg", "wide.png", "inks.jpg")
    photos = [str(project / "photos" / name) for name in names]
    call = ["corpus", "look", *photos, "missing.jpg", "-n", "4", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 1
    assert "missing.jpg: no candidate" in done.output
    table = table_of(project, "select")
    for name in names:
        row = table.loc[name]
        bucket = Bucket(int(row["bucket_height"]), int(row["bucket_width"]))
        written = np.asarray(Image.open(tmp_path / f"{Path(name).stem}-{row['image_id'][:8]}.png"))
        path = project / "photos" / name
        item = EncodingItem(row["image_id"], "train", path, bucket)
        encoded = load_image(item).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(written, np.rint((encoded + 1) * 127.5))
        np.testing.assert_array_equal(written, viewer(path, bucket))
        assert not (tmp_path / f"{Path(name).stem}-{row['image_id'][:8]}-latent.png").exists()
    assert "320x240 JPEG untagged, 8 bits, orientation 6 -> seen 240x320" in done.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 384
    # Without a row: the nearest bucket.
    other = CliRunner().invoke(app, ["corpus", "look", "-n", "0"])
    assert (other.exit_code, "nothing to look at" in other.output) == (2, True)
    nothing = tmp_path / "nothing.parquet"
    pq.write_table(
        pq.read_table(project / "data" / "select" / "manifest.parquet").slice(0, 0), nothing
    )
    other = CliRunner().invoke(app, ["corpus", "look", "-n", "1", "--manifest", str(nothing)])
    assert (other.exit_code, "no photograph that is readable" in other.output) == (1, True)
