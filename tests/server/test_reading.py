"""Stop strings and the counting of tokens, for every way in which a text can be cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rorqual.server.reading import ChatReader, StopStrings, TextReader
from rorqual.text.streaming import join_deltas
from tests.text.conversations import TOKENIZER, V32, ids_of


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first stop string to be complete ends the text, the longest of them."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    st.text("ab ", max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    reader, given_text = StopStrings(stops), ""
    places = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(places):
        given_text += reader.feed(text[start : max(start, end)])
    given_text += reader.finish()
    assert (given_text, reader.found) == cut_by_hand(text, stops)


@given(st.data())
def test_a_chat_is_read_alike_however_its_tokens_come(data: st.DataObject) -> None:
    ids = ids_of("I add 🐋.</think>It is 7. STOP it.<｜end▁of▁sentence｜>")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    reader, deltas = ChatReader(V32, (), False, "c", ["STOP"]), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        deltas.append(reader.feed(ids[start:end]))
    last, end = reader.finish("stop")
    said = join_deltas([*deltas, last])
    assert (said.thinking, said.content, end) == ("I add 🐋.", "It is 7. ", "stop")
    assert reader.stopped
    assert reader.num_reasoning_tokens() == len(ids_of("I add 🐋."))


def test_half_a_character_waits_for_its_other_half() -> None:
    ids = TOKENIZER.encode("a🐋b")
    reader = TextReader(TOKENIZER, (), [])
    pieces = [reader.feed([token]) for token in ids]
    assert "".join(pieces) == "a🐋b"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 3
    half = TextReader(TOKENIZER, (), [])
    assert [half.feed(ids[:1]), half.feed(ids[1:2]), half.finish()] == ["a", "", "\ufffd"]
