"""Captions: those that came with the images, those that models write, and what both must pass."""

from components.corpus.captions.checks import check_chinese, check_english

__all__ = ["check_chinese", "check_english"]
