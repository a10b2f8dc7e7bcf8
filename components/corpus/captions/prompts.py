"""What a model is asked for, and how its answer becomes plain text.

The built-in prompts are in our own words and ask for what the paper describes (UltraFlux supplement
2.1): a detailed English caption of subject, setting, composition, light and style, about 125 tokens
long, and its translation to Simplified Chinese. An edited prompt gets a new version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.chat.prompts import Prompt, load_prompt
from components.settings.captions import CaptionSettings, TranslateSettings

CAPTION_PROMPTS = {
    "detailed-1": (
        "Describe this photograph for a text-to-image training set. Write one paragraph of plain "
        "English, about 90 to 110 words (roughly 125 tokens). Name the main subject first with "
        "its visible attributes: kind, number, colour, material, pose or action. Go on with the "
        "setting and what stands in front of and behind the subject, the composition and camera "
        "viewpoint, the light (source, direction, hardness, time of day), the palette, and the "
        "style and mood. Say only what can be seen: no guesses about names, places, dates, "
        "equipment or intentions, and quote lettering only if it can be read. Answer with the "
        "caption alone, without a title, list, preamble or remark about the picture being a "
        "picture."
    )
}
TRANSLATION_PROMPTS = {
    "simplified-chinese-1": (
        "Translate the image caption below into natural written Simplified Chinese. Keep every "
        "detail and its order, add nothing, and leave nothing out; words that are quoted as "
        "lettering in the picture stay as they are. Answer with the translation alone."
    )
}


def prompt_of(
    part: CaptionSettings | TranslateSettings, built_in: Mapping[str, str], root: Path
) -> Prompt:
    """The prompt that the settings name: a file of theirs, else a built-in one.

    Raises:
        ValueError: unknown version; missing, empty or non-UTF-8 file.
    """
    file = root / part.prompt_file if part.prompt_file else None
    return load_prompt(part.prompt_version, file, built_in)
