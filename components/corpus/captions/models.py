"""The captioning and the translating model over a manifest: one cache, one budget, one entry a row.

What came with an image stays (`CaptionSettings.provided`), models write the rest: English from the
picture, Chinese from a usable English caption that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from components.chat.client import ChatClient, job_of
from components.chat.prompts import Prompt
from components.chat.request_cache import RequestCache
from components.chat.spending import Budget
from components.corpus.captions.checks import (
    CaptionBatch,
    Captioned,
    Fill,
    Judged,
    Written,
    fill_english,
    filled,
    in_need,
    needs_chinese,
    needs_english,
)
from components.corpus.captions.prompts import CAPTION_PROMPTS, TRANSLATION_PROMPTS, prompt_of
from components.corpus.captions.writing import caption_images, translate_captions
from components.corpus.derivatives import read_derivatives
from components.settings.captions import CaptionSettings, EndpointSettings, TranslateSettings

_UNASKED = Judged(None, None, None, None, None)


@dataclass(frozen=True)
class _Model:
    """An endpoint, what it is asked and how the manifest names it."""

    endpoint: EndpointSettings
    prompt: Prompt

    @property
    def name(self) -> str:
        return f"{self.endpoint.model}, prompt {self.prompt.version}"


def _model(
    part: CaptionSettings | TranslateSettings, built_in: Mapping[str, str], root: Path
) -> _Model | None:
    """None where the provider is not an endpoint."""
    if part.provider != "endpoint" or part.endpoint is None:
        return None
    return _Model(part.endpoint, prompt_of(part, built_in, root))


def _fill_chinese(written: Mapping[str, Written], model: _Model, settings: CaptionSettings) -> Fill:
    def fill(batch: CaptionBatch) -> list[Judged]:
        return [
            _translated(row, written[image_id], model)
            if was_kept and needs_chinese(row, settings)
            else row
            for image_id, was_kept, row in zip(batch.image_ids, batch.kept, batch.rows, strict=True)
        ]

    return fill


def _translated(row: Judged, written: Written, model: _Model) -> Judged:
    """A translation that failed takes its status to the row."""
    return replace(
        row,
        chinese=written.text,
        status=written.status,
        translation_model=model.name if written.text else None,
        failed_english=False,
    )


def write_captions(
    batches: Callable[[], Iterable[CaptionBatch]],
    derivatives: Path,
    settings: CaptionSettings,
    *,
    derivative_px: int,
    cache: Path,
    root: Path,
) -> Captioned:
    """Captions of the kept rows by the models that `settings` names.

    Args:
        batches: the rows of the manifest, from the first, as often as they are asked for, with
            what is there so far: checked, "missing" where nothing is.
        derivatives: pictures for the captioning model, from the signals stage.
        settings: at least one provider is an endpoint.
        derivative_px: long edge of the derivatives.
        cache: file of the request cache; made when missing.
        root: where prompt files are found.

    Raises:
        ValueError: bad prompt or cache file; or a cost cap without prices.
        EndpointUnusable: an API key is missing.
        CaptioningStopped: cost cap reached or endpoint of no use; run again to go on.
    """
    if (missing := settings.missing_prices()) is not None:
        raise ValueError(missing)
    captioner = _model(settings, CAPTION_PROMPTS, root)
    translator = _model(settings.translate, TRANSLATION_PROMPTS, root)
    models = [model for model in (captioner, translator) if model is not None]
    fills: list[Fill] = []
    problems: list[str] = []
    with ExitStack() as stack:
        store = stack.enter_context(RequestCache(cache))
        jobs = [job_of(model.endpoint, model.prompt) for model in models]
        budget = Budget(store, jobs, settings.max_cost_usd)
        clients = {}
        # All clients first: a missing key of the translator is found before anything is paid.
        for model in models:
            clients[model] = ChatClient(model.endpoint, model.prompt, store, budget)
            stack.callback(clients[model].close)
        if captioner is not None:
            wanted = {one for one, _ in in_need(batches(), needs_english, settings)}
            written = caption_images(
                (item for item in read_derivatives(derivatives) if item.image_id in wanted),
                len(wanted),
                clients[captioner],
                captioner.prompt,
                settings,
                derivative_px=derivative_px,
            )
            # By id, since answers come in the order of the derivatives and rows are in the
            # manifest's.
            fills.append(fill_english(written, captioner.name, settings, unasked=_UNASKED))
            problems += [item.detail for item in written.values() if item.detail]
        if translator is not None:

            def usable() -> Iterator[tuple[str, Judged]]:
                return in_need((filled(one, fills) for one in batches()), needs_chinese, settings)

            written = translate_captions(
                ((image_id, row.english or "") for image_id, row in usable()),
                sum(1 for _ in usable()),
                clients[translator],
                translator.prompt,
                translator.endpoint.concurrency,
            )
            fills.append(_fill_chinese(written, translator, settings))
            problems += [item.detail for item in written.values() if item.detail]
        is_priced = all(model.endpoint.has_prices for model in models)
        return Captioned(fills, budget.spent_usd if is_priced else None, problems)
