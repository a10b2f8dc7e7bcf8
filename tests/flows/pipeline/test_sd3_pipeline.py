"""The DiT stages and sampling with the SD3 backbone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import yaml
from PIL import Image

from components.settings.schema import parse_settings
from components.telemetry.metric_log import MetricLog


@pytest.mark.parametrize(
    ("backbone", "held"),
    [("sd3", "UltraFluxTransformer2DModel"), ("flux", "SD3Transformer2DModel")],
)
def test_weights_of_the_other_backbone_stop_the_stage_with_one_line(
    root: Path, tmp_path: Path, backbone: str, held: str
) -> None:
    from flows.stages.contract import StageContext, StageFailed
    from flows.stages.dit import run_dit

    values = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    values["models"]["transformer"] |= {"backbone": backbone, "pretrained": "weights/dit"}
    settings = parse_settings(values)
    folder = tmp_path / "weights" / "dit"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": held}))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for name in ("latents/index", "text_embeddings/index", "slices/stage1"):
        (tmp_path / "data" / f"{name}.parquet").parent.mkdir(parents=True)
        (tmp_path / "data" / f"{name}.parquet").touch()
    log = MetricLog(tmp_path / "m.jsonl")
    context = StageContext("dit_stage1", settings, tmp_path, tmp_path, log)
    with pytest.raises(StageFailed, match=f"backbone is {backbone}: .*holds a {held}") as raised:
        run_dit(context, "stage1.parquet")
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_sd3_trains_in_both_stages_and_paints(small_clone: Callable[..., Path]) -> None:
    backbone = {
        "models.transformer.backbone": "sd3",
        "models.transformer.sd3.tiny.num_layers": 1,
    }
    project = small_clone("sd3", backbone)
    done = subprocess.run(
        ["dvc", "repro", "generate"], cwd=project, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("dit_stage1", "dit_stage2"):
        config = json.loads((project / "data" / stage / "ema" / "config.json").read_text())
        assert config["_class_name"] == "SD3Transformer2DModel"
    texts = pandas.read_parquet(project / "data" / "text_embeddings" / "index.parquet")
    # Two CLIPs' 77 positions before T5's 64.
    assert set(texts["text_tokens"]) == {77 + 64}
    assert (project / "data/text_embeddings/encoders/text_encoder_3/config.json").is_file()
    images = sorted((project / "data" / "generate" / "images").glob("*.png"))
    assert sorted(Image.open(path).size for path in images) == [(128, 128), (224, 96)]

    arguments = ["generate", "--prompt", "a red tree", "--size", "160x96", "--steps", "2"]
    pictures = []
    for folder, memory in (("one", "none"), ("two", "text-first")):
        painted = subprocess.run(
            ["ultraflux", *arguments, "--output", folder, "--memory", memory],
            cwd=project,
            capture_output=True,
            text=True,
        )
        assert painted.returncode == 0, painted.stderr
        pictures.append((project / painted.stdout.strip()).read_bytes())
    assert pictures[0] == pictures[1]
