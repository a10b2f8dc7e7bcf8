"""Settings of captions and translations: endpoints, their prices, prompts and checks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.settings.section import Count, NonNegative, Section

# A prompt file is a dependency of the stage, so it lives where dvc.yaml looks.
PromptFile = Annotated[str, Field(pattern=r"^conf/prompts/[\w.-]+\.txt$")]


class EndpointSettings(Section):
    """A model behind an OpenAI-compatible chat completions API (vLLM, Gemini, ...)."""

    # Neither user:password@ nor ?key=: secrets come from the environment alone.
    base_url: Annotated[str, Field(pattern=r"^https?://[^@/?#\s]+(/[^@?#\s]*)?$")]
    """Such as http://127.0.0.1:8000/v1; "/chat/completions" is appended."""
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")] | None
    """Name of the environment variable with the key, never the key; None: no key is sent."""
    temperature: Annotated[float, Field(ge=0, le=2)]
    max_tokens: Count
    """Of one answer; an answer that reaches it has status `truncated`."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 2)] | None
    """Sampling seed, plus one when an answer failed its checks; None: not sent."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None
    """For models that think before they answer (and bill it); None: not sent."""
    requests_per_minute: Annotated[float, Field(gt=0)]
    concurrency: Annotated[int, Field(ge=1, le=256)]
    """Requests in flight."""
    timeout_s: Annotated[float, Field(gt=0)]
    """Of one request, from its start to the last byte."""
    retries: Annotated[int, Field(ge=0, le=20)]
    """After 429, 5xx, a lost connection, a timeout or an answer that cannot be read."""
    input_usd_per_million: NonNegative | None
    """Price of a million tokens that are sent, in USD, from the provider's price list of today; 0
    for a model on a machine of yours. Required where a cost cap is set; None: not known."""
    output_usd_per_million: NonNegative | None
    """The same for tokens that the model writes."""

    @property
    def has_prices(self) -> bool:
        """Whether what a request costs can be said."""
        return None not in (self.input_usd_per_million, self.output_usd_per_million)


class TranslateSettings(Section):
    """Chinese captions."""

    provider: Literal["none", "shipped", "endpoint"]
    """`none`, `shipped`: only what came with the images; `endpoint`: where none came, made from the
    English caption."""
    prompt_version: str
    """Name of a prompt in components/corpus/captions/prompts.py, or of yours in `prompt_file`."""
    prompt_file: PromptFile | None
    endpoint: EndpointSettings | None

    @model_validator(mode="after")
    def _endpoint_is_described(self) -> TranslateSettings:
        if self.provider == "endpoint" and self.endpoint is None:
            raise ValueError("caption.translate.endpoint must be given for provider 'endpoint'")
        return self


class LocalCaptionSettings(Section):
    """An image-text-to-text model of transformers on this machine or on Ray's."""

    folder: Annotated[str, Field(min_length=1)]
    """Folder with weights (safetensors), processor and chat template, such as a clone of
    Qwen/Qwen2.5-VL-7B-Instruct."""
    batch_size: Annotated[int, Field(ge=1, le=1024)]
    """Pictures in one pass; part of what is kept between runs."""
    max_new_tokens: Count
    """Of one caption; a caption that reaches it has status `truncated`."""


class CaptionSettings(Section):
    """Captions."""

    ordered = (("min_words", "max_words"),)

    provider: Literal["shipped", "endpoint", "local", "fixed"]
    """`shipped`: only what came with the images. The others caption images where none came:
    `endpoint` and `local` by a vision-language model that looks at the derivative, behind a server
    or from a folder of weights (`local`); `fixed` by one `text` for all."""
    text: str | None
    """For `fixed`, such as "a photo of sks dog". Taken as it stands, whatever its length."""
    local: LocalCaptionSettings | None
    provided: Literal["keep", "replace_failed", "ignore"]
    """Captions that came with the images, in their records (metadata, lists, archives), in `file`
    or in text files beside them. All are checked. `keep`: they stay, also with a status other than
    ok, and no model is asked; `replace_failed`: models are asked where the checks fail; `ignore`:
    as if none came."""
    file: str
    """For a folder of photographs: a JSONL file in it with file, caption_en, caption_zh. Where it
    has no line for a photograph, or is not there, the text file beside it counts (a.txt beside
    a.jpg)."""
    min_words: Annotated[int, Field(ge=0)]
    max_words: Count
    """English length outside [min_words, max_words] marks the caption as failed."""
    prompt_version: str
    """Name of a prompt in components/corpus/captions/prompts.py, or of yours in `prompt_file`."""
    prompt_file: PromptFile | None
    """Text file with the exact prompt to send instead of a built-in one."""
    max_cost_usd: NonNegative | None
    """Hard cap on what captions and translations under these settings cost, over all runs; None:
    no cap, for models that cost nothing by the token."""
    endpoint: EndpointSettings | None
    translate: TranslateSettings

    @model_validator(mode="after")
    def _parts_fit(self) -> CaptionSettings:
        if self.provider == "endpoint" and self.endpoint is None:
            raise ValueError("caption.endpoint must be given when caption.provider is 'endpoint'")
        if self.provider == "local" and self.local is None:
            raise ValueError("caption.local must be given when caption.provider is 'local'")
        if self.provider == "fixed" and not (self.text or "").strip():
            raise ValueError("caption.text must say something when caption.provider is 'fixed'")
        if self.provider != "shipped" and self.translate.provider == "shipped":
            raise ValueError(
                "caption.translate.provider 'shipped' needs caption.provider 'shipped': "
                "a shipped translation is not one of a caption that was made here; set it to none"
            )
        if self.provider == "shipped" and self.provided == "ignore":
            raise ValueError(
                "caption.provided 'ignore' needs another caption.provider than 'shipped', with "
                "which there would be no captions at all"
            )
        return self

    def missing_prices(self) -> str | None:
        """One line naming the price settings that a cost cap needs; None: nothing is missing.

        Not part of the schema, because a price belongs to whoever pays it: profiles leave it open.
        """
        if self.max_cost_usd is None:
            return None
        parts = (
            ("caption.endpoint", self.provider, self.endpoint),
            ("caption.translate.endpoint", self.translate.provider, self.translate.endpoint),
        )
        missing = [
            f"{name}.{price}"
            for name, provider, endpoint in parts
            if provider == "endpoint" and endpoint is not None
            for price in ("input_usd_per_million", "output_usd_per_million")
            if getattr(endpoint, price) is None
        ]
        if not missing:
            return None
        return (
            f"caption.max_cost_usd ({self.max_cost_usd:g}) needs prices: set "
            f"{', '.join(missing)} to USD per million tokens from the provider's price list (0 for "
            "a model that you serve), or caption.max_cost_usd to null for no cap"
        )
