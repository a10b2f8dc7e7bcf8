"""Tokenizers in the layouts of CLIP and T5, trained on captions: for encoders without weights.

No torch on import: the caption stage counts tokens without it.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_CONTEXT = 77
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# CLIP marks the end of a word in its last symbol, so "cat" alone and in "category" differ.
WORD_END = "</w>"


def learn_merges(words: Counter[tuple[str, ...]], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of a word count, most frequent pair first.

    Written out because the trainers of `tokenizers` iterate over randomly seeded hash maps and
    break ties differently in every process; here ties go to the smaller pair.

    Args:
        words: symbols of each distinct word, with its number of occurrences.
        count: most merges to learn; fewer when no pair occurs twice.

    Returns:
        Merges in order.
    """
    # Distinct words with their counts: a corpus repeats its words, so a merge visits each once.
    current = dict(words)
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        # Counted anew after every merge: slower than updating, and nothing to get wrong at tiny
        # sizes.
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, occurrences in current.items():
            for pair in pairwise(symbols):
                pairs[pair] += occurrences
        if not pairs:
            break
        # Most frequent first, then the smaller pair: the only order that every process agrees on.
        best, occurrences = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        # A pair that occurs once would only spell one word of the training text.
        if occurrences < 2:
            break
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for symbols, word_count in current.items():
            joined = _apply_merge(symbols, best)
            merged[joined] = merged.get(joined, 0) + word_count
        current = merged
    return merges


def _apply_merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    # Most words do not hold the pair; the tuple itself is returned for them.
    if pair[0] not in symbols:
        return symbols
    out: list[str] = []
    index = 0
    while index < len(symbols):
        # From left to right without overlap, as the tokenizer applies merges: "aaa" gives "aa",
        # "a".
        if symbols[index : index + 2] == pair:
            out.append(pair[0] + pair[1])
            index += 2
        else:
            out.append(symbols[index])
            index += 1
    return tuple(out)


def train_clip_tokenizer(captions: Sequence[str], vocab_size: int) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's layout: 256 bytes, 256 word-final bytes, merges, two specials.

    Args:
        captions: training text.
        vocab_size: wanted size; the 514 fixed entries are always there.

    Returns:
        Tokenizer with a context of 77.
    """
    empty = CLIPTokenizer()
    # CLIP's own rules from an empty tokenizer: words are cut in training as they will be in use.
    normalizer = empty.backend_tokenizer.normalizer
    splitter = empty.backend_tokenizer.pre_tokenizer
    words: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(caption)):
            words[(*word[:-1], word[-1] + WORD_END)] += 1
    # Sorted: the library returns it in no fixed order, and ids must not depend on the process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # All 256 bytes alone and at a word's end: every text is spelled without an unknown token.
    entries = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    # Two for the special tokens, which stand last, as in CLIP.
    merges = learn_merges(words, max(0, vocab_size - len(entries) - 2))
    # Two merge orders can spell the same token; the vocabulary holds it once.
    entries = list(dict.fromkeys([*entries, *(a + b for a, b in merges)]))
    vocab = {entry: index for index, entry in enumerate([*entries, CLIP_START, CLIP_END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_CONTEXT)


def train_t5_tokenizer(captions: Sequence[str], vocab_size: int) -> T5TokenizerFast:
    """SentencePiece unigram model in T5's layout (pad 0, end 1, unknown 2), without sentinels.

    Args:
        captions: training text.
        vocab_size: wanted size; raised where the text has more distinct characters.

    Returns:
        Tokenizer with a context of 512.
    """
    import sentencepiece

    characters = len(set("".join(captions)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        # sentencepiece refuses a vocabulary that cannot hold every character and its own control
        # symbols.
        vocab_size=max(vocab_size, characters + 16),
        # A short text cannot fill the wanted size; without this it would be an error.
        hard_vocab_limit=False,
        character_coverage=1.0,
        # Text is taken as it is: captions may be Chinese, and NFKC would change their punctuation.
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        # T5 has no start token.
        bos_id=-1,
        # One thread: the sums of its EM steps, and so the scores, depend on the split.
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    # Sentinels belong to T5's pre-training; an encoder of prompts never sees one.
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def training_text(captions: Sequence[str]) -> list[str]:
    """Captions that say something, stripped.

    Raises:
        ValueError: none does.
    """
    texts = [caption.strip() for caption in captions if caption.strip()]
    if not texts:
        raise ValueError("captions: no text to train tokenizers on")
    return texts
