"""Taking a response apart: the parts come back, and nothing malformed passes for a part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.records import Message
from rorqual.text.response import Response, find_boxed, join_thinking, parse_response, split_thinking

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", " ", "7"]


def response(thinking: str | None, answer: str | None, well_formed: bool) -> Response:
    return Response(thinking=thinking, answer=answer, well_formed=well_formed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>4+3=7</think> <answer>7</answer>", response("4+3=7", "7", True)),
        ("\n<think>\na\n</think>\n<answer> 7\n</answer>\n", response("\na\n", "7", True)),
        ("<think></think><answer>7</answer>", response("", "7", True)),
        ("<think>a</think>So it is \\boxed{7}.", response("a", "7", True)),
        ("<think>a</think>So <answer>7</answer>", response("a", "7", False)),
        ("<think>a</think><answer>7</answer> I hope", response("a", "7", False)),
        ("<think>a</think><answer>7</answer><answer>8</answer>", response("a", None, False)),
        ("<think>a</think><answer>7", response("a", None, False)),
        ("<think>a</think>7</answer>", response("a", None, False)),
        ("<think>a</think></answer>7<answer>", response("a", None, False)),
        ("<think>a</think><answer> </answer>", response("a", None, False)),
        ("<think>a</think>\\boxed{7} or \\boxed{8}", response("a", None, False)),
        ("<think>a</think>7", response("a", None, False)),
        ("<think>\\boxed{7} <answer>7</answer></think>", response("\\boxed{7} <answer>7</answer>", None, False)),
        ("<answer>7</answer>", response(None, "7", False)),
        ("the answer is \\boxed{7}", response(None, "7", False)),
        ("hm <think>a</think><answer>7</answer>", response(None, None, False)),
        ("<think>a<answer>7</answer>", response(None, None, False)),
        ("a</think><answer>7</answer>", response(None, None, False)),
        ("</think>a<think><answer>7</answer>", response(None, None, False)),
        ("<think>a</think><think>b</think><answer>7</answer>", response(None, None, False)),
        ("<think><think>a</think><answer>7</answer>", response(None, None, False)),
        ("", response(None, None, False)),
    ],
)
def test_cases(text: str, expected: Response) -> None:
    assert parse_response(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed {x^{2^{n}}} holds", "x^{2^{n}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{1", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{\boxed{1}}", None),
        (r"\boxed{}", None),
        ("boxed{1}", None),
    ],
)
def test_boxed_content_keeps_its_nested_braces(text: str, expected: str | None) -> None:
    assert find_boxed(text) == expected


@given(st.lists(st.sampled_from(TAGS)).map("".join))
def test_whatever_is_written_is_taken_apart_soundly(text: str) -> None:
    found = parse_response(text)
    assert not found.well_formed or (found.thinking is not None and found.answer is not None)
    assert found.answer is None or (found.answer and found.answer == found.answer.strip() and found.answer in text)
    if found.thinking is not None:
        assert text.count("<think>") == text.count("</think>") == 1
        assert f"<think>{found.thinking}</think>" in text


@given(st.text(), st.text())
def test_a_message_joins_to_the_text_that_splits_into_it(thinking: str, content: str) -> None:
    text = join_thinking(Message(role="assistant", thinking=thinking, content=content))
    if thinking and "think>" not in thinking + content:
        assert split_thinking(text) == (thinking, content)
