"""What is wrong with a text whatever its language: refusals, markup, loops, cut sentences.

Each is a question about one text; `checks` says in which order they are asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What a captioning model says instead of a caption, at the very beginning; lower case.
_REFUSAL_STARTS = (
    "i cannot",
    "i can't",
    "i can not",
    "i'm sorry",
    "i am sorry",
    "i apologize",
    "i apologise",
    "my apologies",
    "apologies, ",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "unable to",
    "unfortunately, i",
    "sorry, ",
    "sorry but",
    "抱歉",
    "很抱歉",
    "非常抱歉",
    "对不起",
    "我无法",
    "我不能",
)
# The same further in, after "Sure!" or a remark: only with a verb of the task, since a caption may
# quote a sign that says "I can't stop".
_TASK = (
    r"(?:assist|help|describe|caption|provide|fulfill?|comply|process|analy[sz]e|identify|view|see|"
    r"generate|create|comment|translate|access|open|display|discuss|engage)"
)
_REFUSAL_PATTERNS = re.compile(
    r"\b(?:i|we)\s?(?:cannot|can't|can not|could not|couldn't|won't|will not"
    r"|(?:am|'m|are|'re) (?:unable to|not able to)"
    r"|(?:do not|don't) have the (?:ability|capability) to)"
    rf" (?:\w+ ){{0,2}}{_TASK}\b"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model|virtual assistant)\b"
    r"|\b(?:no|any) (?:image|picture|photo|photograph|file)s? (?:\w+ ){0,2}"
    r"(?:attached|provided|uploaded|supplied|shared with me)\b"
    r"|\bplease (?:provide|upload|attach|share|send)\b.{0,30}\b(?:image|picture|photo)"
    r"|\b(?:image|picture|photo) (?:could not|cannot|can't) be (?:loaded|shown|displayed|processed)"
    r"|\b(?:violates?|against) (?:our|the|my) (?:content|usage|safety) polic"
    # Not "作为" alone: "as the centre of the picture ..." is how a caption may begin.
    r"|作为(?:一个|一名|一款)?(?:ai|人工智能|大?语言模型|大模型)"
    r"|我(?:们)?(?:也|暂时|目前)?(?:无法|不能|没有办法|没办法|没有能力)(?:直接)?"
    r"(?:看到|查看|识别|描述|翻译|提供|处理|分析|协助|帮助|满足|回答|访问)"
    r"|请(?:您|你)?(?:提供|上传|发送).{0,12}(?:图片|图像|照片)"
)
# Refusals come first in an answer; further on it is a caption that happens to hold such words.
_REFUSAL_WITHIN = 200

_HTML_TAGS = (
    "a|abbr|article|b|blockquote|body|br|button|center|code|div|em|figcaption|figure|font|footer|"
    "form|h[1-6]|head|header|hr|html|i|iframe|image|img|input|label|li|link|meta|nav|ol|p|pre|"
    "script|section|small|span|strong|style|sub|sup|svg|table|tbody|td|th|thead|tr|u|ul|video"
)
# Named tags, not any word in angle brackets: "<sks>" is how people write the token of a subject.
_MARKUP = re.compile(
    rf"</?(?:{_HTML_TAGS})(?:\s[^<>]*)?/?>|<!--|<!doctype"
    r"|&(?:amp|lt|gt|quot|apos|nbsp|[lr][sd]quo|[mn]dash|hellip|#\d{1,6}|#x[0-9a-f]{1,6});"
    # Chat templates.
    r"|<\|[\w ]+\|>|</?s>|\[/?inst\]|<<sys>>|^\s*(?:assistant|user|system)\s*:"
    # Markdown: fences, headings, emphasis, links, lists.
    r"|```|^\s*#{1,6}\s|\*\*[^*\n]+\*\*|!?\[[^\]\n]*\]\([^)\s]+\)|^\s*[-*•]\s.*\n\s*[-*•]\s"
    r"|\[/?(?:b|i|u|url|img|quote)(?:=[^\]]*)?\]"
    r"|^\s*[{\[]\s*\"|https?://|\bwww\.\w",
    re.IGNORECASE | re.MULTILINE,
)

# A model that loops says the same run of words (of characters in Chinese) again and again: the
# largest share of runs that occurred before. The captions of the sample have none at all.
LOOP_WORDS, LOOP_CHARACTERS = 5, 10
_LARGEST_REPEATED_SHARE = 0.3

_CLOSING = "\"'”’»)]}」』）】》*"
_FINAL = ".!?。！？．｡~～"
# No caption ends with these, in whatever style. Not the prepositions that end a clause ("a chair to
# sit on") nor "A", which may be a name.
_NEVER_LAST = frozenset(
    {"a", "an", "the", "and", "or", "but", "of", "into", "with", "while", "which", "whose"}
    | {"its", "their", "his", "your", "our", "my"}
)
_DANGLING = ",;:-–—(（[「“、，：；…"
# Text of a picture's title or a list of tags needs no full stop; prose of this length has one.
_PROSE_WORDS, _PROSE_CHARACTERS = 20, 30
_LONG_PROSE_WORDS = 40
# A list of tags has a comma every few words.
_WORDS_PER_COMMA_OF_TAGS = 4
# Not after an initial or a word that is shortened: "U.S. Capitol", "St. Paul's", "ca. 1900".
_SENTENCE_END = re.compile(
    r"(?<![A-Z])(?<!\b[a-z])(?<!\b[A-Z][a-z])(?<!\bMrs)(?<!\bProf)(?<!\bca)(?<!\bvs)(?<!\bapprox)"
    r"[.!?][\"'”’)\]]*\s+[\"'“‘(\[]*[A-Z]"
)


_UNDECODED = re.compile("[\ufffd\ud800-\udfff]")
# White space aside. The upper block is what quotation marks of cp1252 become in Latin-1.
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def is_undecoded(text: str) -> bool:
    """Whether a decoder left U+FFFD in it, or half of a surrogate pair, which no file can hold."""
    return bool(_UNDECODED.search(text))


def is_unreadable(text: str) -> bool:
    """Whether it is undecoded, or has control characters."""
    return is_undecoded(text) or bool(_CONTROLS.search(text))


def is_refusal(text: str) -> bool:
    """Whether a model says that it cannot, or sees no picture, instead of describing it."""
    start = " ".join(text[: 2 * _REFUSAL_WITHIN].lower().replace("’", "'").split())
    start = start[:_REFUSAL_WITHIN]
    return start.startswith(_REFUSAL_STARTS) or bool(_REFUSAL_PATTERNS.search(start))


def has_markup(text: str) -> bool:
    """Whether HTML, Markdown, JSON, an address or a chat template's tokens stand in it."""
    return bool(_MARKUP.search(text))


def is_repetitive(units: Sequence[str], run: int) -> bool:
    """Whether more than 30% of the runs of `run` units stand earlier in the text as well."""
    runs = [tuple(units[start : start + run]) for start in range(len(units) - run + 1)]
    return len(runs) - len(set(runs)) > _LARGEST_REPEATED_SHARE * len(runs)


def is_cut_english(text: str) -> bool:
    """Whether an English text ends in the middle of a sentence.

    Yes where its last mark is a comma, a dash, an ellipsis or an opening bracket; where its last
    word is an article, a conjunction or a possessive, or a letter that is no word; and where it
    lacks the final full stop that its earlier sentences have, or that prose of 40 words has. Titles
    and lists of tags have none and are whole.
    """
    text = text.rstrip()
    words = text.split()
    if len(words) < 2:
        return False
    if text[-1] in _DANGLING or text.endswith("..."):
        return True
    body = text.rstrip(_CLOSING).rstrip()
    if not body or body[-1] in _FINAL:
        return False
    last = words[-1].strip(_CLOSING)
    if last in _NEVER_LAST or (len(last) == 1 and last.isalpha() and last.islower()):
        return True
    if len(words) >= _PROSE_WORDS and _SENTENCE_END.search(text):
        return True
    commas = text.count(",")
    is_tags = commas * _WORDS_PER_COMMA_OF_TAGS >= len(words)
    return len(words) >= _LONG_PROSE_WORDS and text[0].isupper() and not is_tags


def is_cut_chinese(text: str) -> bool:
    """Whether a Chinese text ends in the middle of a sentence (see `is_cut_english`)."""
    text = text.rstrip()
    if not text:
        return False
    if text[-1] in _DANGLING:
        return True
    body = text.rstrip(_CLOSING)
    if not body or body[-1] in _FINAL:
        return False
    return len(text) >= _PROSE_CHARACTERS and any(mark in body for mark in "。！？")
