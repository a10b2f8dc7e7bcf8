"""The name of a profile that `ultraflux new` makes; the command itself: test_rehearsal.py."""

from __future__ import annotations

import pytest

from flows.commands.corpus.new import _profile_name


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("My Photos (2024)", "my-photos-2024"),
        ("Ünï cödé", "uni-code"),
        # The same name as a file system that takes letters and accents apart gives it.
        ("Ca\u0301diz", "cadiz"),
        ("ﬁlm", "film"),
        ("照片", "photos"),
        ("照片 2024", "2024"),
        ("...", "photos"),
        ("", "photos"),
    ],
)
def test_a_folders_name_becomes_a_profiles(folder: str, expected: str) -> None:
    assert _profile_name(folder) == expected
