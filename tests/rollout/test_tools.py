"""Episodes with tools: what the policy asks for is run, every mistake is answered, every failure is a value."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from rorqual.records import Message, SamplingParams, Score, Task, ToolCall, ToolSpec, to_json
from rorqual.rl.samples import FAILED_ENDS, train_samples
from rorqual.rollout.context import ContextConfig
from rorqual.rollout.episode import EpisodeConfig, EpisodeKey
from rorqual.rollout.group import Group, Rollouts
from rorqual.rollout.tools import ToolConfig
from tests.rollout.fakes import FakeEngine, Interviewer, make_task
from tests.text.conversations import TOKENIZER, V32, ids_of
from tests.text.test_parsing import CLOSE, END, OPEN, invoke, parameter

TASK = make_task("find/train/1", "where is x?")
ANSWER = "so</think>It is here." + END


class Library(Interviewer):
    """Has a tool `find`. `behaviour`: query -> what `find` does; else it gives the query back.

    running: calls at work now. most: the most there ever were. asked: every query in the order of its start.
    """

    def __init__(self, behaviour: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.behaviour = behaviour or {}
        self.running = self.most = 0
        self.asked: list[str] = []

    def tools(self, task: Task) -> tuple[ToolSpec, ...]:
        return (ToolSpec(name="find", description="Find.", parameters={}),)

    async def call(self, task: Task, messages: Sequence[Message], call: ToolCall) -> str:
        query = json.loads(call.arguments)["q"]
        self.asked.append(query)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.01)
            does = self.behaviour.get(query, query.upper())
            if isinstance(does, list):
                does = does.pop(0)
            if isinstance(does, Exception):
                raise does
            if does == "hang":
                await asyncio.sleep(60)
            return str(does)
        finally:
            self.running -= 1


def calls(*queries: str) -> str:
    return "look</think>" + OPEN + "\n".join(invoke(parameter("q", query)) for query in queries) + CLOSE + END


def rollouts(library: Library, said: Sequence[str], group_size: int = 1, **settings: Any) -> Rollouts:
    """Rollouts of a policy that says `said`, one text a draw."""
    keys = [EpisodeKey(run_seed=0, step=0, task_id=TASK.task_id, sample_index=index) for index in range(group_size)]
    script = {key.request_id(turn): ids_of(text) for key in keys for turn, text in enumerate(said)}
    engine = FakeEngine(TOKENIZER.vocab_size, context_window=4000, max_in_flight=8, script=script)
    fields = {"context_window": 4000, "max_turns": 8, "tools": ToolConfig(backoff=0.001)} | settings
    config = EpisodeConfig(sampling=SamplingParams(max_new_tokens=200), **fields)
    return Rollouts(engine, {"interview": library}, V32, config, group_size, run_seed=0)


def results(group: Group, index: int = 0) -> list[str]:
    return [message.content for message in group.trajectories[index].messages if message.role == "tool"]


def no_thread_of_tools() -> bool:
    return all(thread.name != "tools" for thread in threading.enumerate())


def test_calls_of_one_turn_run_at_the_same_time_and_are_answered_in_order() -> None:
    library = Library()
    (group,) = rollouts(library, [calls("a", "b", "c"), calls("d"), ANSWER]).run([TASK], step=0)
    (trajectory,) = group.trajectories
    assert (trajectory.end, trajectory.error) == ("stop", None)
    assert results(group) == ["A", "B", "C", "D"]
    assert library.most == 3
    assert [message.role for message in trajectory.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    (segment,) = trajectory.segments
    assert segment.num_sampled == sum(len(ids_of(text)) for text in [calls("a", "b", "c"), calls("d"), ANSWER])
    assert no_thread_of_tools()


def test_mistakes_of_the_policy_are_told_to_it() -> None:
    library = Library({"bad": ValueError("nothing is called bad")})
    unknown = (
        "look</think>" + OPEN + invoke(parameter("q", "x"), name="delete") + "\n" + invoke(parameter("q", "a")) + CLOSE
    )
    unclosed = "look</think>" + OPEN + invoke(parameter("q", "a")) + "\n" + '<｜DSML｜invoke name="find"'
    nothing = "look</think>" + OPEN + "rubbish"
    said = [calls("bad"), unknown + END, unclosed + END, nothing + END, ANSWER]
    (group,) = rollouts(library, said).run([TASK], step=0)
    (trajectory,) = group.trajectories
    assert trajectory.end == "stop"
    assert results(group)[0] == "Error: nothing is called bad"
    assert results(group)[1] == "Error: there is no tool 'delete'; there are: find."
    assert results(group)[2] == "A"
    assert results(group)[3].startswith("A\nError: the tool call at character")
    (told,) = [message.content for message in trajectory.messages[1:] if message.role == "user"]
    assert told.startswith("Error: the tool call at character") and "malformed" in told
    assert library.asked == ["bad", "a", "a"]


def test_infrastructure_is_retried_and_then_ends_the_episode_with_its_own_reason() -> None:
    library = Library({"flaky": [ConnectionError("away"), ConnectionError("away"), "back"]})
    (group,) = rollouts(library, [calls("flaky"), ANSWER]).run([TASK], step=0)
    assert (group.trajectories[0].end, results(group), len(library.asked)) == ("stop", ["back"], 3)
    dead = Library({"dead": ConnectionError("away")})
    (group,) = rollouts(dead, [calls("a", "dead"), ANSWER]).run([TASK], step=0)
    (trajectory,) = group.trajectories
    assert (trajectory.end, trajectory.evidence.end) == ("tool_failed", "tool_failed")
    assert trajectory.error == "OSError: find failed 3 times, the last time with ConnectionError: away"
    assert trajectory.segments[0].num_sampled == len(ids_of(calls("a", "dead"))), "what was drawn is kept"
    assert "tool_failed" in FAILED_ENDS, "it is no wrong answer"
    slow = Library({"slow": "hang"})
    config = ToolConfig(timeout=0.03, retries=1, backoff=0.0)
    (group,) = rollouts(slow, [calls("slow"), ANSWER], tools=config).run([TASK], step=0)
    assert (group.trajectories[0].end, len(slow.asked), slow.running) == ("tool_failed", 2, 0)


def test_a_tool_that_breaks_is_the_environments_fault_and_is_not_repeated() -> None:
    library = Library({"bug": KeyError("index")})
    (group,) = rollouts(library, [calls("bug", "a"), ANSWER]).run([TASK], step=0)
    assert group.trajectories[0].end == "environment_failed"
    assert (group.trajectories[0].error, library.asked.count("bug"), library.running) == ("KeyError: 'index'", 1, 0)


def test_turns_and_tokens_end_an_episode_before_tools_are_run_in_vain() -> None:
    library = Library()
    (group,) = rollouts(library, [calls("a"), calls("b"), ANSWER], max_turns=2).run([TASK], step=0)
    assert (group.trajectories[0].end, library.asked) == ("turn_limit", ["a"])
    first = len(ids_of(calls("a")))
    for more in (0, 3):
        limited = rollouts(Library(), [calls("a"), ANSWER], max_sampled_tokens=first + more)
        (group,) = limited.run([TASK], step=0)
        (trajectory,) = group.trajectories
        assert (trajectory.end, trajectory.evidence.num_sampled_tokens) == ("token_limit", first + more)


def test_a_summary_is_drawn_on_the_same_engine_and_starts_a_segment() -> None:
    prompt = len(V32.prompt(TASK.messages, Library().tools(TASK)))
    long = "word " * 60
    said = [calls("long"), "so</think>x is on shelf 3" + END, ANSWER]
    context = ContextConfig(strategy="summary", threshold=0.5, summary_tokens=40)
    player = rollouts(Library({"long": long}), said, context_window=2 * (prompt + 80), context=context, max_turns=2)
    (group,) = player.run([TASK], step=0)
    (trajectory,) = group.trajectories
    assert trajectory.end == "stop", "a summary is no turn"
    assert [event.kind for event in trajectory.events] == ["summary"]
    assert [segment.num_sampled for segment in trajectory.segments] == [len(ids_of(text)) for text in said]
    samples = train_samples(trajectory, Score(total=1.0, parts={}), 0.5)
    assert [sum(sample.sampled) for sample in samples] == [len(ids_of(text)) for text in said]
    assert {(sample.advantage, sample.trajectory_length) for sample in samples} == {
        (0.5, sum(map(len, map(ids_of, said))))
    }
    last = TOKENIZER.decode(trajectory.segments[-1].token_ids)
    assert "x is on shelf 3" in last and "word word" not in last
    assert len({request.params.seed for request in player._engine.submitted}) == 3


def test_without_room_and_without_a_strategy_the_episode_ends_with_length() -> None:
    prompt = len(V32.prompt(TASK.messages, Library().tools(TASK)))
    player = rollouts(Library({"long": "word " * 400}), [calls("long"), ANSWER], context_window=prompt + 100)
    (group,) = player.run([TASK], step=0)
    assert group.trajectories[0].end == "length"


def test_an_episode_that_is_late_ends_alone_and_leaves_nothing_running() -> None:
    library = Library({"hang": "hang"})
    player = rollouts(library, [calls("hang"), ANSWER], group_size=2, time_limit=5.0)
    now = [0.0]
    player.clock = lambda: now[0]
    player.add([TASK], step=0)
    while player._engine.num_unfinished:
        assert player.step() == []
    now[0] = 6.0
    (group,) = player.step()
    assert [t.end for t in group.trajectories] == ["time_limit"] * 2
    assert (library.running, player._engine.num_unfinished) == (0, 0)
    player.cancel()
    assert no_thread_of_tools()


@pytest.mark.parametrize("num_steps", [0, 5, 60])
def test_cancellation_withdraws_requests_and_tools(num_steps: int) -> None:
    library = Library({"hang": "hang"})
    player = rollouts(library, [calls("hang"), ANSWER], group_size=3)
    player.add([TASK], step=0)
    for _ in range(num_steps):
        if player._engine.num_unfinished:
            player.step()
    (group,) = player.cancel()
    assert [t.end for t in group.trajectories] == ["cancelled"] * 3
    assert (library.running, player._engine.num_unfinished, player.num_unfinished) == (0, 0, 0)
    assert no_thread_of_tools()
    assert player.run([TASK], step=1)[0].trajectories[0].end != "cancelled", "they can be used again"


def test_interrupted_anywhere_the_same_trajectories_and_no_tool_is_run_twice_that_has_answered() -> None:
    said = [calls("a", "b"), calls("c"), ANSWER]
    expected = to_json(rollouts(Library(), said, group_size=2).run([TASK], step=0))
    walker = rollouts(Library(), said, group_size=2)
    walker.add([TASK], step=0)
    states, finished = [], []
    while walker.num_unfinished:
        states.append(walker.state_dict())
        finished += walker.step()
    assert to_json(finished) == expected
    for state in states[:: max(len(states) // 8, 1)]:
        library = Library()
        resumed = rollouts(library, said, group_size=2)
        resumed.load_state_dict(state)
        groups: list[Group] = []
        while resumed.num_unfinished:
            groups += resumed.step()
        assert to_json(groups) == expected
        answered = sum(
            len(each["messages"]) for e in json.loads(state["groups"])[0]["episodes"] for each in e["results"]
        )
        assert len(library.asked) == 6 - answered


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"max_sampled_tokens": 0}, {"time_limit": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            EpisodeConfig(sampling=SamplingParams(), context_window=9, **settings)
    with pytest.raises(ValueError, match="whole episodes"):
        EpisodeConfig(
            sampling=SamplingParams(), context_window=9, context=ContextConfig(strategy="parallel_fewest_step")
        )
    with pytest.raises(ValueError, match="ToolConfig.retries"):
        ToolConfig(retries=-1)
