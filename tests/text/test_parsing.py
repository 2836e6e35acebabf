"""What a policy may write wrong: each gives a message, and a problem with its place and text; nothing is ever lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.records import Message, ToolSpec
from rorqual.text.arguments import read_json, read_object
from rorqual.text.encoding import Encoding
from rorqual.text.formats import CHAT, DEEPSEEK_V3, DEEPSEEK_V32
from rorqual.text.parsing import CallReader, Grammar, Parsed, Transcript, parse_text
from tests.text.conversations import DIRECT, SPELLED, TOKENIZER, V32, encoding, ids_of

FIND = ToolSpec(name="find", description="", parameters={})
OPEN, CLOSE = "\n\n<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"
END = "<｜end▁of▁sentence｜>"


def invoke(*parameters: str, name: str = "find") -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>"


def parameter(name: str, value: str, string: str = "true") -> str:
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


def read(text: str, chosen: Encoding = V32) -> Parsed:
    return chosen.parse(ids_of(text), [FIND])


def found(parsed: Parsed) -> list[tuple[str, int, str]]:
    return [(problem.kind, problem.position, problem.raw) for problem in parsed.problems]


def said(parsed: Parsed) -> tuple[str, str, list[str]]:
    message = parsed.message
    return message.thinking, message.content, [f"{call.name}({call.arguments})" for call in message.tool_calls]


GOOD = invoke(parameter("q", "x"))
CALLED = ['find({"q": "x"})']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r</think>c" + END, ("r", "c", [])),
        ("r</think>c", ("r", "c", [])),
        ("</think>", ("", "", [])),
        ("r</think>" + OPEN + GOOD + CLOSE + END, ("r", "", CALLED)),
        ("r</think>\n" + OPEN + GOOD + "\n" + GOOD + CLOSE, ("r", "\n", CALLED * 2)),
        ("</think>c" + OPEN + invoke("") + CLOSE, ("", "c", ["find({})"])),
        ("</think>" + OPEN + invoke(parameter("n", "1e5", "false")) + CLOSE, ("", "", ['find({"n": 1e5})'])),
        ("</think>" + OPEN + invoke(parameter("n", " [1, {}]", "false")) + CLOSE, ("", "", ['find({"n":  [1, {}]})'])),
        ("</think>" + OPEN + invoke(parameter("q", 'a"\n\\')) + CLOSE, ("", "", ['find({"q": "a\\"\\n\\\\"})'])),
    ],
)
def test_well_formed(text: str, expected: tuple[str, str, list[str]]) -> None:
    parsed = read(text)
    assert said(parsed) == expected
    assert parsed.problems == ()
    assert parsed.text == text.removesuffix(END)


BROKEN_TAG = GOOD.replace("</｜DSML｜invoke>", "</｜DSML｜call>")
NO_KIND = invoke('<｜DSML｜parameter name="q">x</｜DSML｜parameter>')
TWICE = invoke(parameter("q", "x"), parameter("q", "y"))
UNCLOSED_VALUE = invoke(parameter("q", "x").replace("</｜DSML｜parameter>", ""), parameter("p", "y"))
SHOUTED = invoke(parameter("q", "x", "yes"))
MALFORMED = [BROKEN_TAG, NO_KIND, TWICE, UNCLOSED_VALUE, SHOUTED, "find()", ""]


@pytest.mark.parametrize(
    ("text", "expected", "problems"),
    [
        ("all of it", ("all of it", "", []), [("unclosed_thinking", "all of it")]),
        ("", ("", "", []), [("unclosed_thinking", "")]),
        ("a<think>b</think>c", ("a<think>b", "c", []), [("special_token", "<think>")]),
        ("r</think>a<think>b", ("r", "a<think>b", []), [("special_token", "<think>")]),
        ("</think>a<｜User｜>b", ("", "a<｜User｜>b", []), [("special_token", "<｜User｜>")]),
        (f"</think>a{END}b", ("", f"a{END}b", []), [("special_token", END)]),
        ("</think>a｜DSML｜b", ("", "a｜DSML｜b", []), [("special_token", "｜DSML｜")]),
        ("</think>" + OPEN + GOOD, ("", "", CALLED), [("unclosed_calls", "")]),
        ("</think>" + OPEN + GOOD + CLOSE[:9], ("", CLOSE[:9], CALLED), [("unclosed_calls", CLOSE[:9])]),
        ("</think>c" + OPEN + GOOD[:40], ("", "c" + OPEN + GOOD[:40], []), [("unclosed_calls", OPEN + GOOD[:40])]),
        ("</think>c" + OPEN + GOOD[:-5], ("", "c" + OPEN + GOOD[:-5], []), [("unclosed_calls", OPEN + GOOD[:-5])]),
        ("</think>c" + OPEN, ("", "c" + OPEN, []), [("unclosed_calls", OPEN)]),
        *[
            (
                "</think>c" + OPEN + bad + CLOSE,
                ("", "c" + OPEN + bad + CLOSE, []),
                [("malformed_call", OPEN + bad + CLOSE)],
            )
            for bad in MALFORMED
        ],
        *[
            (
                "</think>c" + OPEN + GOOD + "\n" + bad + CLOSE,
                ("", "c\n" + bad + CLOSE, CALLED),
                [("malformed_call", "\n" + bad + CLOSE)],
            )
            for bad in MALFORMED
        ],
        ("</think>" + OPEN + GOOD * 2 + CLOSE, ("", GOOD + CLOSE, CALLED), [("malformed_call", GOOD + CLOSE)]),
        ("</think>c" + OPEN + GOOD + CLOSE + " and", ("", "c and", CALLED), [("text_after_calls", " and")]),
        (
            "</think>" + OPEN + invoke(parameter("n", "one", "false")) + CLOSE,
            ("", "", ['find({"n": "one"})']),
            [("bad_json", "one")],
        ),
        ("</think>" + OPEN + invoke("", name="lose") + CLOSE, ("", "", ["lose({})"]), [("unknown_tool", "lose")]),
        (
            "</think>" + OPEN + invoke(parameter("q", "<think>")) + CLOSE,
            ("", "", ['find({"q": "<think>"})']),
            [("special_token", "<think>")],
        ),
    ],
)
def test_malformed(text: str, expected: tuple[str, str, list[str]], problems: list[tuple[str, str]]) -> None:
    parsed = read(text)
    assert said(parsed) == expected
    assert [(kind, raw) for kind, _, raw in found(parsed)] == problems
    for problem in parsed.problems:
        assert problem.position == (parsed.text.rindex(problem.raw) if problem.raw else len(parsed.text))


def test_calls_inside_the_thinking_are_not_made() -> None:
    text = "r" + OPEN + GOOD + CLOSE
    unclosed = read(text)
    assert said(unclosed) == (text, "", [])
    assert found(unclosed)[0] == ("unclosed_thinking", 0, text)
    assert {raw for _, _, raw in found(unclosed)[1:]} == {"｜DSML｜"}
    closed = read(text + "</think>c")
    assert said(closed) == (text, "c", [])
    assert {(kind, raw) for kind, _, raw in found(closed)} == {("special_token", "｜DSML｜")}


NO_JSON = ["NaN", "Infinity", "1e999", '"\\ud800"', "1,", "", "[" * 5000, "[" * 101 + "]" * 101, "9" * 5000, "'a'"]


@pytest.mark.parametrize("value", NO_JSON)
def test_what_is_no_json_is_kept_as_a_string(value: str) -> None:
    parsed = read("</think>" + OPEN + invoke(parameter("n", value, "false")) + CLOSE)
    assert [problem.kind for problem in parsed.problems] == ["bad_json"]
    assert json.loads(parsed.message.tool_calls[0].arguments) == {"n": value}
    again = V32.render([Message(role="user"), parsed.message])
    assert parameter("n", value) in again.text


def test_nesting_that_counts_as_json() -> None:
    assert read_json("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="deep"):
        read_json("[" * 101 + "]" * 101)
    with pytest.raises(ValueError, match="a list, not an object"):
        read_object("[]")


def test_without_a_list_of_tools_any_name_will_do() -> None:
    text = "</think>" + OPEN + invoke("", name="lose") + CLOSE
    assert V32.parse(ids_of(text)).problems == ()
    assert [problem.kind for problem in V32.parse(ids_of(text), []).problems] == ["unknown_tool"]


def test_calls_are_numbered_behind_their_prefix() -> None:
    text = "</think>" + OPEN + GOOD + "\n" + GOOD + CLOSE
    assert [call.id for call in V32.parse(ids_of(text), call_prefix="t3_").message.tool_calls] == ["t3_0", "t3_1"]


def test_without_thinking_the_content_begins_at_once() -> None:
    assert said(read("c" + OPEN + GOOD + CLOSE, DIRECT)) == ("", "c", CALLED)
    assert found(read("r</think>c", DIRECT)) == [("special_token", 1, "</think>")]


def test_calls_as_json_in_a_fence() -> None:
    v3 = encoding("deepseek_v3")
    one = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n```json\n{}\n```<｜tool▁call▁end｜>"
    whole = f"c<｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜>"
    assert said(read(whole, v3)) == ("", "c", ["find({})"] * 2)
    bad = read(whole.replace("{}", "{]"), v3)
    assert said(bad) == ("", "c", ["find({])"] * 2)
    assert [(kind, raw) for kind, _, raw in found(bad)] == [("bad_json", "{]")] * 2
    unclosed = read(whole[: whole.index("\n```<") + 4], v3)
    assert [kind for kind, _, _ in found(unclosed)] == ["unclosed_calls"]
    swallowing = read(whole.replace("\n```<｜tool▁call▁end｜>", "", 1), v3)
    assert [kind for kind, _, _ in found(swallowing)] == ["malformed_call"]
    assert swallowing.message.tool_calls == ()


def test_one_block_of_thinking_or_none() -> None:
    chat = encoding("chat", open_thinking=False)
    for text in ("<think>a", "a</think>", "x<think>a</think>", "<think>a</think></think>"):
        parsed = chat.parse(ids_of(text))
        assert parsed.message.content == text
        assert [problem.kind for problem in parsed.problems] == ["malformed_thinking"]
    assert chat.parse(ids_of("<think>a</think>b")).problems == chat.parse(ids_of("plain")).problems == ()
    assert [p.kind for p in chat.parse(ids_of("a<｜User｜>b")).problems] == ["special_token"]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*SPELLED, GOOD, OPEN, CLOSE, END, "\n", parameter("q", "x"), NO_KIND, "a", "é"]), max_size=8
    ),
    st.sampled_from(["deepseek_v32", "deepseek_r1", "deepseek_v3", "chat"]),
    st.booleans(),
)
def test_no_text_is_lost_and_none_raises(pieces: list[str], form: str, as_tokens: bool) -> None:
    chosen = encoding(form)
    ids = TOKENIZER.encode("".join(pieces), allow_special=as_tokens)
    parsed = chosen.parse(ids)
    message, text = parsed.message, parsed.text
    assert text == TOKENIZER.decode(ids[:-1] if ids and ids[-1] == TOKENIZER.special_id("eos") else ids)
    opened = "<think>" if form == "chat" else ""
    for part in (message.thinking, *[piece for piece in message.content.split("\n") if not message.tool_calls]):
        assert part in opened + text
    for problem in parsed.problems:
        assert text.startswith(problem.raw, problem.position)
    if not message.tool_calls:
        rest = (opened + text).replace("<think>", "").replace("</think>", "")
        assert (message.thinking + message.content).replace("<think>", "").replace("</think>", "") == rest
    history = [Message(role="user"), message]
    if message.tool_calls:
        assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    assert chosen.render(history).token_ids, "whatever was written can be in the next context"


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
def test_any_tokens_are_read(ids: list[int]) -> None:
    parsed = V32.parse(ids)
    assert parsed.text == TOKENIZER.decode(ids[:-1] if ids and ids[-1] == TOKENIZER.special_id("eos") else ids)


def test_text_from_elsewhere() -> None:
    grammar = Grammar(DEEPSEEK_V32, opened=True)
    parsed = parse_text("r</think>c" + OPEN + GOOD + CLOSE + END, grammar, eos=END)
    assert said(parsed) == ("r", "c", CALLED)
    assert parsed.problems == ()
    nothing = parse_text("｜DSML｜", Grammar(DEEPSEEK_V3, opened=False))
    assert (nothing.message.content, nothing.problems) == ("｜DSML｜", ())
    with pytest.raises(ValueError, match="no calls"):
        CallReader(Transcript(), Grammar(CHAT, opened=False), 0)
