"""The one settings schema: every value of `params.yaml`, typed, bounded and documented.

Values live in `conf/` (profiles) and in the composed `params.yaml`; this module holds no defaults
except where a settings object is part of a public function signature (`SnrHuberSettings`).
Unknown or out-of-range keys raise `SettingsError`, one line per problem.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from components.settings.captions import CaptionSettings
from components.settings.corpus import (
    ImagesSettings,
    IngestSettings,
    PeopleSettings,
    QualitySettings,
    SelectSettings,
    SignalsSettings,
    SlicesSettings,
    ValidateSettings,
)
from components.settings.evaluation import (
    EvaluateSettings,
    GenerateSettings,
    PromoteSettings,
    RefinerSettings,
)
from components.settings.field_errors import field_message, field_name
from components.settings.models import BucketsSettings, ModelsSettings
from components.settings.objective import ObjectiveSettings
from components.settings.runtime import ProjectSettings, RuntimeSettings
from components.settings.section import Section
from components.settings.training import DitStageSettings, LatentsSettings, VaeSettings
from components.settings.yaml_files import YamlRefused, read_yaml


class SettingsError(ValueError):
    """Bad settings; the message names file, field, value and allowed range, one problem a line."""


class Settings(Section):
    """All of `params.yaml`."""

    project: ProjectSettings
    runtime: RuntimeSettings
    ingest: IngestSettings
    signals: SignalsSettings
    quality: QualitySettings
    people: PeopleSettings
    select: SelectSettings
    caption: CaptionSettings
    validation: ValidateSettings
    slices: SlicesSettings
    images: ImagesSettings
    buckets: BucketsSettings
    models: ModelsSettings
    vae: VaeSettings
    latents: LatentsSettings
    objective: ObjectiveSettings
    dit_stage1: DitStageSettings
    dit_stage2: DitStageSettings
    generate: GenerateSettings
    refiner: RefinerSettings
    evaluate: EvaluateSettings
    promote: PromoteSettings

    def unscored_rule(self) -> str | None:
        """One line naming a rule whose scores no scorer gives: it would reject all; None: none."""
        scorer = self.people.nsfw.scorer
        needs = {
            "max_nsfw": (self.select.max_nsfw, scorer != "none", "another scorer than none"),
            "max_drawing": (self.select.max_drawing, scorer == "nsfwjs", "nsfwjs"),
        }
        for rule, (limit, is_scored, wanted) in needs.items():
            if limit is not None and not is_scored:
                return (
                    f"select.{rule} = {limit:g} would reject every photograph: nothing scores "
                    f"them; set people.nsfw.scorer to {wanted}, or select.{rule} to null"
                )
        return None

    def doubts(self) -> list[tuple[str, str]]:
        """What these settings cannot reach, though they are valid: (stage, one line).

        No reasons to refuse: a trial of five steps is one with a warm-up of twenty.
        """
        found = [
            (
                name,
                f"warmup_steps {stage.warmup_steps} exceeds steps {stage.steps}: learning_rate "
                f"ends at {stage.learning_rate * stage.steps / stage.warmup_steps:.3g}, not "
                f"{stage.learning_rate:g}",
            )
            for name, stage in (("dit_stage1", self.dit_stage1), ("dit_stage2", self.dit_stage2))
            if stage.warmup_steps > stage.steps
        ]
        limit, least = self.ingest.max_megapixels, self.select.min_pixels
        if least > limit * 1e6:
            text = f"min_pixels {least:,} exceeds ingest.max_megapixels {limit:g}: none can pass"
            found.append(("select", text))
        asked = {
            "min_twin_psnr_db": ("generate.twins", self.generate.twins),
            "min_training_images_loss_drop": (
                "dit_stage1.validation_training_images",
                self.dit_stage1.validation_training_images,
            ),
        }
        found += [
            ("promote", f"{rule} cannot be met: {name} is 0")
            for rule, (name, measured) in asked.items()
            if getattr(self.promote, rule) is not None and not measured
        ]
        return found


def _nearest_key(location: tuple[str | int, ...]) -> str | None:
    """The known key closest to the last part of an unknown `location`."""
    model: type[BaseModel] = Settings
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return None
        model = field.annotation
    close = difflib.get_close_matches(str(location[-1]), list(model.model_fields), n=1, cutoff=0.4)
    return close[0] if close else None


# A key pasted where its variable's name belongs, or a password in an address, is not repeated.
_MAY_HOLD_A_SECRET = ("api_key_env", "base_url")
_NO_SECTION = ("model_type", "model_attributes_type", "dict_type")
_COMPOSE = "`ultraflux config compose --profile embedded`"


def _describe(error: Any, where: str) -> str:
    """One line for one pydantic error."""
    location = error["loc"]
    name = field_name(error) or "settings"
    if error["type"] == "extra_forbidden":
        nearest = _nearest_key(location)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        return f"{where}: unknown key '{name}'{hint}"
    if error["type"] == "missing":
        return f"{where}: missing key '{name}'"
    if error["type"] in _NO_SECTION and error["input"] is None:
        return f"{where}: {name} is empty: write its keys below it; {_COMPOSE} writes all of them"
    if location and location[-1] in _MAY_HOLD_A_SECRET:
        return f"{where}: {name} (value not shown): {field_message(error)}"
    # A rule between fields speaks of them by name; the whole section would bury it.
    value = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    return f"{where}: {name}{value}: {_remedy(error) or field_message(error)}"


def _remedy(error: Any) -> str | None:
    """What to write in place of a value that is no section or list; None: pydantic says it well."""
    if error["type"] in _NO_SECTION:
        return "must be a section: keys with values, indented below it"
    if error["type"] != "tuple_type":
        return None
    # `generate --size` has the width first.
    is_size = re.fullmatch(r"\d+\s*x\s*\d+", str(error["input"]))
    example = ", here [HEIGHT, WIDTH]" if is_size else ""
    return f"must be a list, in brackets or with a dash before each item{example}"


def parse_settings(values: Any, *, where: str = "params.yaml") -> Settings:
    """Validate a nested mapping.

    Args:
        values: what YAML gave, sections by name.
        where: file name for messages.

    Raises:
        SettingsError: every problem on a line of its own: field, value, allowed range.
    """
    if values is None:
        raise SettingsError(f"{where}: empty; {_COMPOSE} writes params.yaml")
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected a mapping of sections, got {type(values).__name__}")
    try:
        return Settings.model_validate(values)
    except ValidationError as problem:
        errors = problem.errors()
        # Items that are wrong do not count for pydantic, which then says that there are too few.
        inside = {error["loc"][:-1] for error in errors}
        lines = [
            _describe(error, where)
            for error in errors
            if error["type"] != "too_short" or error["loc"] not in inside
        ]
        raise SettingsError("\n".join(lines)) from None


def load_settings(path: Path) -> Settings:
    """Read and validate a `params.yaml`.

    Raises:
        SettingsError: file missing, not YAML that DVC reads alike, or not valid settings.
    """
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        raise SettingsError(f"{path}: not found; run {_COMPOSE}") from None
    except YamlRefused as problem:
        raise SettingsError(str(problem)) from None
    return parse_settings(values, where=path.name)
