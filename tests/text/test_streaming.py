"""The streaming parser equals the parser of the whole, wherever the text is cut, and gives what is certain at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.text.detokenize import Detokenizer
from rorqual.text.encoding import Encoding
from rorqual.text.formats import DEEPSEEK_R1, DEEPSEEK_V3, DEEPSEEK_V32
from rorqual.text.parsing import Grammar, parse_text
from rorqual.text.streaming import Delta, StreamParser, join_deltas
from tests.text.conversations import DIRECT, SPELLED, TOKENIZER, V32, encoding, ids_of
from tests.text.test_parsing import CALLED, CLOSE, END, GOOD, MALFORMED, OPEN, said

SHORT = [
    "r</think>c" + END,
    "</think>" + OPEN + GOOD + CLOSE + END,
    "r</think>c" + OPEN + GOOD + "\n" + GOOD + CLOSE,
    "r</thin</think>\n\n<" + OPEN + GOOD + CLOSE + "x",
    "never closed",
    *["</think>c" + OPEN + GOOD + "\n" + bad + CLOSE for bad in MALFORMED],
    "</think>c" + OPEN + GOOD[:-3],
    f"</think>a{END}b{END}",
    "<think>r</think><think>",
]
GRAMMARS = [
    Grammar(DEEPSEEK_V32, opened=True),
    Grammar(DEEPSEEK_V32, opened=False),
    Grammar(DEEPSEEK_R1, opened=False),
    Grammar(DEEPSEEK_V3, opened=False),
]
ENCODINGS = [V32, DIRECT, *(encoding(form) for form in ("deepseek_r1", "chat")), encoding("chat", open_thinking=False)]


def check_text(text: str, cuts: Sequence[int], grammar: Grammar) -> list[Delta]:
    stream = StreamParser(grammar, eos=END)
    deltas = [stream.feed_text(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    last, parsed = stream.finish()
    assert parsed == parse_text(text, grammar, eos=END)
    check_joined([*deltas, last], parsed.message)
    return [*deltas, last]


def check_ids(ids: Sequence[int], cuts: Sequence[int], chosen: Encoding) -> None:
    stream = chosen.stream([])
    deltas = [stream.feed(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    last, parsed = stream.finish()
    assert parsed == chosen.parse(ids, [])
    check_joined([*deltas, last], parsed.message)


def check_joined(deltas: list[Delta], message: object) -> None:
    whole = join_deltas(deltas)
    expected = (message.thinking, message.content, message.tool_calls)  # type: ignore[attr-defined]
    assert (whole.thinking, whole.content, whole.tool_calls) == expected


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["v32", "direct", "r1", "v3"])
@pytest.mark.parametrize("text", SHORT)
def test_every_cut_and_letter_by_letter(text: str, grammar: Grammar) -> None:
    for cut in range(len(text) + 1):
        check_text(text, [cut], grammar)
    check_text(text, range(1, len(text)), grammar)


@pytest.mark.parametrize("chosen", ENCODINGS, ids=["v32", "direct", "r1", "chat", "written thinking"])
@pytest.mark.parametrize("text", [*SHORT, "a日é" + END])
def test_every_cut_and_token_by_token(text: str, chosen: Encoding) -> None:
    for ids in (ids_of(text), TOKENIZER.encode(text)):
        for cut in range(len(ids) + 1):
            check_ids(ids, [cut], chosen)
        check_ids(ids, range(1, len(ids)), chosen)


PIECES = st.sampled_from([*SPELLED, GOOD, OPEN, CLOSE, END, *MALFORMED, "\n", "</", "a", "日"]) | st.text(max_size=3)


@st.composite
def cut_up(draw: st.DrawFn, items: st.SearchStrategy[Sequence]) -> tuple[Sequence, list[int]]:
    whole = draw(items)
    return whole, sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))


@settings(max_examples=300, deadline=None)
@given(cut_up(st.lists(PIECES, max_size=12).map("".join)), st.sampled_from(GRAMMARS))
def test_random_cuts_of_text(given_text: tuple[str, list[int]], grammar: Grammar) -> None:
    check_text(*given_text, grammar)


@settings(max_examples=300, deadline=None)
@given(cut_up(st.lists(PIECES, max_size=12).map(lambda pieces: ids_of("".join(pieces)))), st.sampled_from(ENCODINGS))
def test_random_cuts_of_tokens(given_ids: tuple[Sequence[int], list[int]], chosen: Encoding) -> None:
    check_ids(*given_ids, chosen)


@pytest.mark.slow
@settings(max_examples=20000, deadline=None)
@given(cut_up(st.lists(PIECES, max_size=20).map("".join)), st.sampled_from(GRAMMARS))
def test_many_random_cuts_of_text(given_text: tuple[str, list[int]], grammar: Grammar) -> None:
    check_text(*given_text, grammar)


def test_what_is_certain_is_given_at_once() -> None:
    deltas = check_text("ab</think>c" + OPEN + GOOD + CLOSE, range(1, 11 + len(OPEN + GOOD + CLOSE)), GRAMMARS[0])
    assert [delta.thinking for delta in deltas[:2]] == ["a", "b"]
    assert deltas[10].content == "c"
    calls = [index for index, delta in enumerate(deltas) if delta.tool_calls]
    assert calls == [10 + len(OPEN + GOOD)], "with its closing tag, not with that of the block"
    waiting = check_text("ab</thin</think>", range(1, 16), GRAMMARS[0])
    assert [delta.thinking for delta in waiting[:9]] == ["a", "b", "", "", "", "", "", "", "</thin"]


def test_plain_chat_streams_unless_it_may_be_a_block_of_thinking() -> None:
    chat = encoding("chat", open_thinking=False)
    stream = chat.stream()
    assert stream.feed(ids_of("seven")).content == "seven"
    held = chat.stream()
    assert not held.feed(ids_of(" <think>seven</think>eight"))
    assert held.finish()[0] == Delta(thinking="seven", content="eight")


def test_a_stop_token_is_left_out_only_at_the_end() -> None:
    stream = V32.stream()
    assert not stream.feed(ids_of("</think>" + END))
    assert stream.feed(ids_of("a")).content == END + "a"
    last, parsed = stream.finish()
    assert not last
    assert [problem.kind for problem in parsed.problems] == ["special_token"]


def test_deltas_that_the_whole_contradicts_are_an_error() -> None:
    stream = StreamParser(Grammar(DEEPSEEK_V32, opened=True))
    stream.feed_text("abc")
    stream._transcript.text = "x"
    with pytest.raises(AssertionError, match="not the beginning"):
        stream.finish()


@given(
    st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.sampled_from(sorted(TOKENIZER.control_tokens)), max_size=30)
)
def test_text_of_tokens_as_they_come(ids: list[int]) -> None:
    one_by_one, at_once = Detokenizer(TOKENIZER), Detokenizer(TOKENIZER)
    pieces = [piece for token in ids for piece in one_by_one.feed([token])] + list(one_by_one.finish())
    whole = [*at_once.feed(ids), *at_once.finish()]
    assert "".join(piece.text for piece in pieces) == "".join(piece.text for piece in whole) == TOKENIZER.decode(ids)
    controls = [TOKENIZER.control_tokens[token] for token in ids if token in TOKENIZER.control_tokens]
    assert [piece.text for piece in pieces if piece.is_control] == controls


def test_no_half_character_is_shown() -> None:
    ids = TOKENIZER.encode("é日")
    detokenizer = Detokenizer(TOKENIZER)
    shown = ["".join(piece.text for piece in detokenizer.feed([token])) for token in ids]
    assert len(ids) > 2
    assert [text for text in shown if text] == ["é", "日"]
    assert list(detokenizer.finish()) == []


def test_a_long_argument_is_read_once() -> None:
    """Letter by letter; a parser that begins anew with every letter would take minutes."""
    text = "</think>" + OPEN + GOOD.replace(">x<", f">{'long ' * 8000}<") + CLOSE
    deltas = check_text(text, range(1, len(text)), GRAMMARS[0])
    assert sum(len(delta.tool_calls) for delta in deltas) == 1
    assert said(parse_text(text, GRAMMARS[0]))[2] == [CALLED[0].replace('"x"', f'"{"long " * 8000}"')]
