"""A new architecture is one folder and one line of the registry: followed in a copy, and run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

SETTINGS = '''\
"""Settings that only the toy has."""

from components.settings.section import Count, Section


class ToySettings(Section):
    """Shape of the toy."""

    width: Count
'''

TRANSFORMER = '''\
"""A transformer without attention: one linear map of each latent pixel, moved by text and time."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class ToyTransformer2DModel(ModelMixin, ConfigMixin):
    """Takes (B, C, h, w)."""

    @register_to_config
    def __init__(self, toy_width: int, channels: int, text_width: int, pooled_width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, toy_width, 1)
        self.text = nn.Linear(text_width + pooled_width + 1, toy_width)
        self.leave = nn.Conv2d(toy_width, channels, 1)

    def forward(self, latents, t, text, pooled):
        condition = self.text(torch.cat([text.mean(1), pooled, t[:, None].to(text)], dim=1))
        return self.leave(torch.relu(self.enter(latents) + condition[:, :, None, None]))
'''

BACKBONE = '''\
"""The toy as a backbone: with Flux' text encoders, and no pipeline yet."""

from components.models.backbone import Backbone, bare_model
from components.models.toy.settings import ToySettings


class ToyBackbone(Backbone):
    """`ToyTransformer2DModel`."""

    name = "toy"
    title = "Toy"
    settings = ToySettings
    config_key = "toy_width"
    folder_classes = ("ToyTransformer2DModel",)
    repository = "nobody/toy"
    weights_folder = "toy"
    published_name = "toy"

    def build_tiny(self, settings, widths, latent_channels, seed):
        import torch

        from components.models.toy.transformer import ToyTransformer2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = settings.own("toy", ToySettings).width
            return ToyTransformer2DModel(width, latent_channels, *widths)

    def load(self, folder, settings):
        from components.models.toy.transformer import ToyTransformer2DModel

        return ToyTransformer2DModel.from_pretrained(folder, local_files_only=True)

    def load_released(self, path, *, dtype, rope_variant):
        return self.load(path, None).to(dtype).eval()

    def text_family(self):
        from components.models.text_encoders import FLUX_TEXT

        return FLUX_TEXT

    def pipeline_class(self):
        raise NotImplementedError

    def predict(self, transformer, noised, t, text, pooled, *, guidance_scale, dtype):
        return transformer(noised.to(dtype), t, text.to(dtype), pooled.to(dtype)).float()

    def shape(self, transformer):
        config = bare_model(transformer).config
        return config.channels, config.text_width, config.pooled_width

    def tensor_shapes(self, config):
        latents = (-1, config["channels"], -1, -1)
        return {"latents": latents}, {"sample": latents}

    def usage(self, config):
        return "`ToyTransformer2DModel.from_pretrained` loads this folder."
'''

LINE_BEFORE = "for b in (FluxBackbone(), Sd3Backbone())}"
LINE_AFTER = "for b in (FluxBackbone(), Sd3Backbone(), ToyBackbone())}"
IMPORT = "from components.models.sd3.backbone import Sd3Backbone\n"

RUN = """\
import sys
from pathlib import Path

import yaml

from components.settings.schema import SettingsError, parse_settings

values = yaml.safe_load(Path(sys.argv[1]).read_text())
transformer = values["models"]["transformer"]
transformer |= {"backbone": "toy", "toy": {"width": 8}}
settings = parse_settings(values)
for change, line in (
    ({"backbone": "toi"}, "did you mean 'toy'?"),
    ({"toy": {"widht": 8, "width": 8}}, "models.transformer.toy.widht'; did you mean 'width'?"),
):
    wrong = values | {"models": values["models"] | {"transformer": transformer | change}}
    try:
        parse_settings(wrong)
    except SettingsError as problem:
        assert str(problem).endswith(line), problem
    else:
        raise AssertionError(change)
assert "torch" not in sys.modules

import torch

from components.models.backbones import BACKBONES, backbone_in, backbone_of, check_stores
from components.objectives.objective import objective_loss
from components.planning.model_shapes import networks
from components.planning.transformer import Transformer
from components.training.dit.velocity import NoisedBatch, predict_velocity

toy = BACKBONES["toy"]
model = toy.build_tiny(settings.models.transformer, (12, 6), 4, seed=0)
assert backbone_of(model) is toy
check_stores(model, (12, 6), 4, [(4, 6)])
generator = torch.Generator().manual_seed(1)
draw = lambda *shape: torch.randn(shape, generator=generator)
latents, noise, text, pooled = draw(2, 4, 4, 6), draw(2, 4, 4, 6), draw(2, 5, 12), draw(2, 6)
batch = NoisedBatch(("a", "b"), latents, noise, torch.tensor([0.2, 0.7]), text, pooled)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    velocity = predict_velocity(model, batch, 1.0, torch.float32)
    loss = objective_loss(settings.objective, velocity, batch.latents, batch.noise, batch.t).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
model.save_pretrained("saved")
assert backbone_in(Path("saved")) is toy
again = toy.load(Path("saved"), settings.models.transformer)
assert torch.equal(
    predict_velocity(model, batch, 1.0, torch.float32),
    predict_velocity(again, batch, 1.0, torch.float32),
)
tokens = Transformer(networks(settings, Path()), settings).text_tokens
assert tokens == settings.models.text_encoders.max_sequence_length
print("trained")
"""


def test_a_new_backbone_is_one_folder_and_one_line_of_the_registry(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "components", tmp_path / "components", ignore=ignored)
    folder = tmp_path / "components" / "models" / "toy"
    folder.mkdir()
    files = {
        "__init__.py": '"""A toy."""\n',
        "settings.py": SETTINGS,
        "transformer.py": TRANSFORMER,
        "backbone.py": BACKBONE,
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    registry = tmp_path / "components" / "models" / "backbones.py"
    text = registry.read_text(encoding="utf-8")
    assert LINE_BEFORE in text
    text = text.replace(LINE_BEFORE, LINE_AFTER)
    text = text.replace(IMPORT, IMPORT + "from components.models.toy.backbone import ToyBackbone\n")
    registry.write_text(text, encoding="utf-8")
    (tmp_path / "follow.py").write_text(RUN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "follow.py", str(ROOT / "params.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("trained")


def test_sd3_is_named_only_in_its_folder_and_the_registry() -> None:
    # The paper's table has rows of that name: data, not a special case.
    allowed = {"components/models/backbones.py", "components/metrics/published.py"}
    naming = {
        path.relative_to(ROOT).as_posix()
        for room in ("components", "flows")
        for path in (ROOT / room).rglob("*.py")
        if "sd3" in path.read_text(encoding="utf-8").lower()
    }
    assert {name for name in naming if not name.startswith("components/models/sd3/")} == allowed
