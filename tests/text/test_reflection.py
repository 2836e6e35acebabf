"""Self-correction is recognised as a whole word, in any case, wherever it stands."""

from __future__ import annotations

import pytest

from rorqual.text.reflection import CORRECTION_MARKERS, corrects_itself


@pytest.mark.parametrize("marker", CORRECTION_MARKERS)
def test_every_marker_counts_in_any_case(marker: str) -> None:
    assert corrects_itself(f"4+3=8\n{marker.capitalize()}, 4+3=7")
    assert corrects_itself(marker.upper())


@pytest.mark.parametrize("text", ["", "4+3=7", "the waiter came", "unmistakeable", "<think>4+3=7</think>"])
def test_plain_text_and_parts_of_words_do_not_count(text: str) -> None:
    assert not corrects_itself(text)
