"""Training and sampling at 4096x4096 stay within one card, by formula and by trace."""

from __future__ import annotations

import dataclasses
import sys

import card_limits
import pytest

OFFLOADED = card_limits.ROWS[-1]


@pytest.mark.slow
@pytest.mark.parametrize("row", card_limits.ROWS, ids=lambda row: row.what)
def test_a_card_is_enough(row):
    planned, traced = card_limits.needed(row)
    assert traced <= row.limit_gib
    # An upper bound where tiles are decoded.
    assert 0.97 < planned / traced < 1.2


@pytest.mark.slow
def test_the_script_prints_its_rows_and_fails_beyond_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card_limits.py", "--row", OFFLOADED.what])
    assert card_limits.main() == 0
    assert f"| {OFFLOADED.what} |" in capsys.readouterr().out
    monkeypatch.setattr(card_limits, "ROWS", (dataclasses.replace(OFFLOADED, limit_gib=1.0),))
    assert card_limits.main() == 1
    assert "BEYOND" in capsys.readouterr().out
