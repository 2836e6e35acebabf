"""The context benchmark: its policy sees only its prompt, its accounts add up, and its order holds on a few tasks."""

from __future__ import annotations

import random
import re
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rorqual.envs.document_graph import OPEN, SEARCH, DocumentGraphConfig, DocumentGraphEnvironment, document_task
from rorqual.records import Message, ToolCall
from rorqual.rollout.context import ContextConfig
from rorqual.text.openai import message_from_openai

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import context as benchmark
import context_session as session
from scripted_reader import ReaderConfig, ScriptedReader, look, next_turn, summary, trails

WORLD = DocumentGraphConfig(num_parts=2, depth=2, num_trails=2, decoy_depth=6, page_words=20)
BUDGET = session.Budget(num_steps=60, num_tokens=5000)
QUESTION = document_task(WORLD, 0).messages[0].content
SUBJECT = re.search(r"seal of (\w+)\?", QUESTION)[1]
LEADS = f"""Results for "seal of {SUBJECT} part 1":
[D11] Seal of {SUBJECT}, part 1: the Ann papers
[D12] Seal of {SUBJECT}, part 1: the Bee papers
[D13] Seal of {SUBJECT}, part 2: the Cor papers
"""
PAGE = f"[D11] Seal of {SUBJECT}, part 1: the Ann papers. Page 1 of 2. (Continued under the name of Una Vex)"


def said(text: str, seed: int = 0, config: ReaderConfig | None = None) -> Message:
    return next_turn(text, random.Random(seed), config or ReaderConfig(), "call_")


def only_call(text: str) -> tuple[str, str]:
    (call,) = said(text).tool_calls
    return call.name, call.arguments


def played(strategy: str, seed: int = 0, window: int = 2000, budget: session.Budget = BUDGET, **config: Any) -> Any:
    encoding = session.make_encoding(WORLD)
    policy = session.PromptPolicy(ScriptedReader(encoding))
    managed = ContextConfig(strategy=strategy, reserve_tokens=96, **config)
    task = document_task(WORLD, seed)
    return session.play(task, DocumentGraphEnvironment(), policy, encoding, managed, (window, budget))


# --------------------------------------------------------------------------------------------------------- the reader


def test_reader_does_what_it_sees_a_reason_for_and_repeats_what_it_no_longer_sees() -> None:
    search = ("search", f'{{"query": "seal of {SUBJECT} part 1"}}')
    assert only_call(QUESTION) == search
    assert trails(look(QUESTION + LEADS), 1) == {
        "Ann": ("open", {"id": "D11", "page": 1}),
        "Bee": ("open", {"id": "D12", "page": 1}),
    }
    without_note = PAGE.replace("Continued under the name of Una Vex", "again")
    assert trails(look(QUESTION + without_note), 1)["Ann"] == ("open", {"id": "D11", "page": 2})
    assert trails(look(QUESTION + PAGE), 1)["Ann"] == ("search", {"query": "Una Vex"})
    assert trails(look(QUESTION + PAGE), 1)[""] == ("search", {"query": f"seal of {SUBJECT} part 1"}), "it forgot"
    found = PAGE + '\nResults for "Una Vex":\n[D14] Una Vex: the Ann papers\n'
    assert trails(look(QUESTION + LEADS + found), 1)["Ann"] == ("open", {"id": "D14", "page": 1})
    dead = found + "[D14] Una Vex: the Ann papers. Page 1 of 2.\nwool (Nothing more is known)."
    assert trails(look(QUESTION + LEADS + dead), 1) == {"Bee": ("open", {"id": "D12", "page": 1})}


def test_reader_takes_no_number_of_another_seal_and_answers_when_it_sees_all() -> None:
    wrong = f"{PAGE} Part 1 of the seal of Other is 1111"
    assert look(QUESTION + wrong).parts == {}
    right = [f"\n[D1{n}] X Y: the Z papers. Page 1 of 2. (Part {n} of the seal of {SUBJECT} is 000{n})" for n in (1, 2)]
    assert said(QUESTION + right[0]).tool_calls, "one part is missing"
    assert said(QUESTION + right[1] + right[0]).content == "<answer>0001-0002</answer>"


@pytest.mark.parametrize(("anchoring", "share"), [(0.0, 0.5), (1.0, 0.75), (2.0, 0.9)])
def test_reader_is_drawn_to_what_it_sees_most(anchoring: float, share: float) -> None:
    text = QUESTION + LEADS + "I follow the Bee papers. " * 2
    config = ReaderConfig(anchoring=anchoring)
    drawn = Counter(said(text, seed, config).tool_calls[0].arguments for seed in range(2000))
    assert drawn['{"id": "D12", "page": 1}'] / 2000 == pytest.approx(share, abs=0.03)


def test_a_summary_stands_in_for_the_context_it_was_made_of() -> None:
    pages = [f"\n[D2{n}] N{n} M: the Bee papers. Page 1 of 2. Continued under the name of N{n + 1} M" for n in range(5)]
    text = QUESTION + f"\n[D9] A B: the Q papers. Page 2 of 2. (Part 1 of the seal of {SUBJECT} is 0001)" + LEADS
    sight = look(text.replace("part 1", "part 2") + "".join(pages))
    written = summary(sight, 2, ReaderConfig(notes_per_trail=3))
    again = look(QUESTION + written)
    assert again.parts == sight.parts == {1: "0001"}
    assert trails(again, 2) == trails(sight, 2), "it goes on as it would have"
    assert set(again.notes) == {"D22", "D23", "D24"}, "of a trail, the newest documents"


def test_reader_is_a_function_of_prompt_and_seed_whatever_it_saw_before() -> None:
    encoding = session.make_encoding(WORLD)
    used, task = ScriptedReader(encoding), document_task(WORLD, 0)
    long = encoding.prompt(task.messages, task.tools)
    other = encoding.prompt(document_task(WORLD, 1).messages, task.tools)
    grown = long + encoding.tokenizer.encode(LEADS)
    for ids in (long, grown, other, grown, long):
        for seed in range(3):
            assert used.turn_ids(ids, seed) == ScriptedReader(encoding).turn_ids(ids, seed)


# ------------------------------------------------------------------------------------------------------- the accounts


@pytest.mark.parametrize("strategy", ["none", "summary", "discard_75", "discard_all", "parallel_fewest_step"])
def test_no_strategy_spends_more_than_the_budget(strategy: str) -> None:
    for budget in (session.Budget(num_steps=7, num_tokens=5000), session.Budget(num_steps=60, num_tokens=333)):
        for seed in range(3):
            spent = played(strategy, seed, budget=budget).spent
            assert spent.num_steps <= budget.num_steps
            assert spent.num_generated <= budget.num_tokens
            assert spent.num_prefilled_cached <= spent.num_prefilled


def test_with_a_prefix_cache_every_token_that_was_not_written_is_prefilled_once() -> None:
    policy = session.PromptPolicy(ScriptedReader(session.make_encoding(WORLD)))
    lengths: list[int] = []

    class Recording:
        def turn_ids(self, conversation: Any, max_new_tokens: int, seed: int) -> array[int]:
            ids = policy.turn_ids(conversation, max_new_tokens, seed)
            lengths.append(len(conversation.prompt_ids))
            lengths.append(len(ids))
            return ids

    task, encoding = document_task(WORLD, 0), session.make_encoding(WORLD)
    result = session.play(task, DocumentGraphEnvironment(), Recording(), encoding, ContextConfig(), (100_000, BUDGET))
    prompts, written = lengths[::2], lengths[1::2]
    assert result.solved
    assert result.spent.num_prefilled == sum(prompts)
    assert result.spent.num_generated == sum(written)
    assert result.spent.num_prefilled_cached == prompts[-1] - sum(written[:-1])


def test_resets_are_counted_with_what_is_left_after_them() -> None:
    assert played("none", 2).spent.num_resets == 0
    discarded = [played("discard_all", seed).spent for seed in range(4)]
    summed = [played("summary", seed).spent for seed in range(4)]
    assert all(each.num_resets > 0 for each in discarded + summed)
    assert {share for each in discarded for share in each.recalled} == {0.0}
    assert {share for each in summed for share in each.recalled} == {1.0}


def test_parallel_runs_are_those_of_none_and_the_shortest_answer_counts() -> None:
    together, alone = played("parallel_fewest_step", 1, parallel_runs=2), played("none", 1)
    assert together.runs[0] == alone.runs[0]
    assert together.spent.num_steps == sum(steps for steps, *_ in together.runs)
    result = session.Outcome(
        solved=True, spent=session.Spent(), runs=((9, True, False), (5, True, True), (3, False, False))
    )
    assert [session.solved_within(result, steps) for steps in (8, 9, 14, 17)] == [False, False, True, True]


def test_common_prefix() -> None:
    one, two = array("i", [1, 2, 3, 4]), array("i", [1, 2, 9])
    assert [session.common_prefix(a, b) for a, b in ((one, two), (one, one), (one, one[:2]), (two, array("i")))] == [
        2,
        4,
        2,
        0,
    ]


# -------------------------------------------------------------------------------------------------- endpoint and table


class Endpoint:
    """Answers as the reader would, from the messages that it is sent; the first call has broken arguments."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        self.requests.append({"messages": messages, **options})
        text = "\n".join(message_from_openai(each).content for each in messages)
        message = said(text, len(messages))
        functions = [{"name": each.name, "arguments": each.arguments} for each in message.tool_calls]
        if len(self.requests) == 1:
            functions[0]["arguments"] = "{"
        calls = [{"id": "c", "type": "function", "function": each} for each in functions]
        found = {"role": "assistant", "content": message.content} | ({"tool_calls": calls} if calls else {})
        return SimpleNamespace(
            choices=[SimpleNamespace(message=SimpleNamespace(model_dump=lambda exclude_none: found))]
        )


def test_a_model_behind_an_endpoint_sees_the_context_and_is_told_what_was_wrong() -> None:
    encoding, endpoint = session.make_encoding(WORLD), Endpoint()
    policy = session.EndpointPolicy(endpoint, "m", encoding, (SEARCH, OPEN), {"temperature": 0.5})
    task = document_task(WORLD, 0)
    result = session.play(task, DocumentGraphEnvironment(), policy, encoding, ContextConfig(), (50_000, BUDGET))
    assert result.solved
    first, second = endpoint.requests[0], endpoint.requests[1]
    assert (first["model"], first["temperature"]) == ("m", 0.5)
    assert [each["function"]["name"] for each in first["tools"]] == ["search", "open"]
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2]["content"].startswith("Error: Argument 'query' must be a string")


def test_order_turns_round_between_the_regimes_and_tables_and_plot_are_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "curves.html"
    some = ["none", "summary", "discard_all"]
    benchmark.main(["--seeds", "8", "--steps", "100", "--jobs", "1", "--plot", str(plot), "--strategies", *some])
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (none|summary|discard_all) \| ([\d.]+) \([\d.–]+\) \| (\d+) ", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == some * 2
    (none_a, summary_a, discard_a), (none_b, summary_b, discard_b) = (
        [(float(share), int(steps)) for _, share, steps in rows[start : start + 3]] for start in (0, 3)
    )
    assert none_a[0] < summary_a[0] < discard_a[0]
    assert discard_a[1] < summary_a[1]
    assert summary_b[0] > max(none_b[0], discard_b[0])
    assert "minus discard_all" in printed
    page = plot.read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=", page), "nothing is loaded"


def test_calls_of_the_reader_are_read_back_as_they_were_meant() -> None:
    encoding = session.make_encoding(WORLD)
    call = ToolCall(id="call_0", name="open", arguments='{"id": "D11", "page": 1}')
    message = Message(role="assistant", thinking="I follow the Ann papers.", tool_calls=(call,))
    parsed = encoding.parse(session.written(encoding, message), tools=(SEARCH, OPEN))
    assert (parsed.message, parsed.problems) == (message, ())
