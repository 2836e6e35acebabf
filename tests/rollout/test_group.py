"""Rollouts: the same groups whatever shares the engine, and the same after an interruption at any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rorqual.records import Message, SamplingParams, Task, to_json
from rorqual.rollout.episode import EpisodeConfig
from rorqual.rollout.group import Group, Rollouts
from rorqual.text.encoding import Encoding
from tests.rollout.fakes import FakeEngine, Interviewer, make_task

CONFIG = EpisodeConfig(sampling=SamplingParams(max_new_tokens=9, top_p=0.9), context_window=120, max_turns=3)
TASKS = [make_task(f"sum/train/{index}", f"{index} + 3 =") for index in range(4)]


def make_rollouts(encoding: Encoding, group_size: int = 3, run_seed: int = 11, max_in_flight: int = 5) -> Rollouts:
    engine = FakeEngine(encoding.tokenizer.vocab_size, max_in_flight=max_in_flight)
    return Rollouts(engine, {"interview": Interviewer(2)}, encoding, CONFIG, group_size, run_seed)


def play(rollouts: Rollouts, finished: list[Group] | None = None) -> list[Group]:
    finished = list(finished or [])
    while rollouts.num_unfinished:
        finished += rollouts.step()
    return finished


def test_run_gives_groups_in_the_order_of_tasks_and_samples_in_theirs(encoding: Encoding) -> None:
    groups = make_rollouts(encoding).run(TASKS, step=2)
    assert [group.task for group in groups] == TASKS
    names = [[trajectory.trajectory_id for trajectory in group.trajectories] for group in groups]
    assert names == [[f"2/{task.task_id}#{index}" for index in range(3)] for task in TASKS]
    assert all(t.group_id == group.group_id for group in groups for t in group.trajectories)


def test_samples_differ_within_a_group_between_steps_and_between_runs(encoding: Encoding) -> None:
    def drawn(run_seed: int, step: int) -> list[bytes]:
        groups = make_rollouts(encoding, run_seed=run_seed).run(TASKS[:1], step)
        return [to_json(trajectory.segments) for trajectory in groups[0].trajectories]

    assert len(set(drawn(1, 0) + drawn(1, 1) + drawn(2, 0))) == 9


def test_a_group_does_not_depend_on_what_else_is_in_flight(encoding: Encoding) -> None:
    together = make_rollouts(encoding).run(TASKS, step=0)
    alone = [make_rollouts(encoding, max_in_flight=1).run([task], step=0)[0] for task in TASKS]
    assert to_json(together) == to_json(alone)


@pytest.mark.parametrize("max_in_flight", [2, 5])
def test_interrupted_at_every_step_equals_uninterrupted(encoding: Encoding, max_in_flight: int) -> None:
    def fresh() -> Rollouts:
        return make_rollouts(encoding, max_in_flight=max_in_flight)

    walker = fresh()
    walker.add(TASKS, step=0)
    states: list[tuple[dict[str, Any], list[Group], int]] = []
    finished: list[Group] = []
    while walker.num_unfinished:
        states.append((walker.state_dict(), list(finished), len(walker._engine.submitted)))
        finished += walker.step()
    asked = [request.request_id for request in walker._engine.submitted]
    assert len(states) > 20
    for state, before, num_submitted in states:
        resumed = fresh()
        resumed.load_state_dict(state)
        assert to_json(play(resumed, before)) == to_json(finished)
        assert [request.request_id for request in resumed._engine.submitted] == asked[num_submitted:]


def test_tasks_can_be_added_while_others_are_in_flight(encoding: Encoding) -> None:
    rollouts = make_rollouts(encoding)
    rollouts.add(TASKS[:2], step=0)
    finished = rollouts.step() + rollouts.step()
    rollouts.add(TASKS[2:], step=0)
    finished = play(rollouts, finished)
    by_name = {group.group_id: group for group in finished}
    expected = make_rollouts(encoding).run(TASKS, step=0)
    assert to_json([by_name[group.group_id] for group in expected]) == to_json(expected)


def test_the_members_of_a_group_are_submitted_together(encoding: Encoding) -> None:
    engine = FakeEngine(encoding.tokenizer.vocab_size)
    rollouts = Rollouts(engine, {"interview": Interviewer()}, encoding, CONFIG, 3, 0)
    rollouts.add(TASKS[:2], step=0)
    prompts = [request.prompt_ids for request in engine.submitted]
    assert prompts == [prompts[0]] * 3 + [prompts[3]] * 3
    assert prompts[0] != prompts[3]
    assert len({request.params.seed for request in engine.submitted}) == 6


def test_a_task_that_fits_nowhere_still_gives_its_group(encoding: Encoding) -> None:
    groups = make_rollouts(encoding).run([make_task(question="7 " * 200)], step=0)
    assert [trajectory.end for trajectory in groups[0].trajectories] == ["prompt_too_long"] * 3


def test_bad_use_is_refused(encoding: Encoding) -> None:
    rollouts = make_rollouts(encoding)
    rollouts.add(TASKS[:1], step=0)
    with pytest.raises(ValueError, match="already in flight"):
        rollouts.add(TASKS[:1], step=0)
    with pytest.raises(ValueError, match="fresh"):
        rollouts.load_state_dict(rollouts.state_dict())
    with pytest.raises(ValueError, match="group_size"):
        make_rollouts(encoding, group_size=0)
    with pytest.raises(ValueError, match="exceeds"):
        Rollouts(FakeEngine(9, context_window=100), {}, encoding, CONFIG, 2, 0)
    with pytest.raises(ValueError, match="needs environment 'interview'"):
        Rollouts(FakeEngine(9), {}, encoding, CONFIG, 2, 0).add(TASKS, 0)


class Mumbler(Interviewer):
    """Asks as often as its parent, in other words."""

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        asked = super().respond(task, messages)
        return tuple(Message(role="user", content="hm") for _ in asked)


@pytest.mark.parametrize("environment", [Interviewer(0), Mumbler(2)])
def test_resume_with_another_environment_is_refused(encoding: Encoding, environment: Interviewer) -> None:
    engine = FakeEngine(encoding.tokenizer.vocab_size)
    rollouts = Rollouts(engine, {"interview": Interviewer(2)}, encoding, CONFIG, 3, 11)
    rollouts.add(TASKS, step=0)
    while not any(request.request_id.endswith(".1") for request in engine.submitted):
        rollouts.step()
    other = Rollouts(FakeEngine(encoding.tokenizer.vocab_size), {"interview": environment}, encoding, CONFIG, 3, 11)
    with pytest.raises(ValueError, match="environment"):
        other.load_state_dict(rollouts.state_dict())


def test_resume_with_another_seed_or_group_size_is_refused(encoding: Encoding) -> None:
    rollouts = make_rollouts(encoding)
    rollouts.add(TASKS, step=0)
    with pytest.raises(ValueError, match="seed has changed"):
        make_rollouts(encoding, run_seed=12).load_state_dict(rollouts.state_dict())
    with pytest.raises(ValueError, match="have 3 episodes, these Rollouts 2"):
        make_rollouts(encoding, group_size=2).load_state_dict(rollouts.state_dict())


def test_an_engine_that_loses_a_request_is_found_out(encoding: Encoding) -> None:
    engine = FakeEngine(encoding.tokenizer.vocab_size)
    rollouts = Rollouts(engine, {"interview": Interviewer(2)}, encoding, CONFIG, 3, 11)
    rollouts.add(TASKS, step=0)
    engine.load_state_dict({"flight": []})
    with pytest.raises(ValueError, match="12 episodes wait"):
        rollouts.step()
