"""A run directory to write to, and strategies that make any trajectory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import strategies as st

from rorqual.records import (
    BreakReason,
    ContextAction,
    ContextEvent,
    Evidence,
    KeptTokens,
    Message,
    Record,
    Routes,
    Score,
    Segment,
    Selections,
    ToolCall,
    Trajectory,
)
from rorqual.store.run import Run
from rorqual.store.tables import ScoredTrajectory


class Inner(Record):
    rate: float = 0.1


class Settings(Record):
    seed: int = 1
    inner: Inner = Inner()


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run.open(tmp_path / "run", Settings(), {"run": 1}, ["rorqual", "run"]) as run:
        yield run


WORDS = st.text('aé鯨 \n\0"', max_size=6)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = st.dictionaries(WORDS, FINITE, max_size=3)
ENDS = st.sampled_from(["stop", "length", "turn_limit", "prompt_too_long", "environment_failed"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def kept_tokens(draw: st.DrawFn, count: int) -> KeptTokens:
    sets = [sorted(draw(st.sets(st.integers(0, 2**31 - 1), min_size=1, max_size=4))) for _ in range(count)]
    offsets = [0]
    for ids in sets:
        offsets.append(offsets[-1] + len(ids))
    return KeptTokens(offsets=array("q", offsets), ids=array("i", [i for ids in sets for i in ids]))


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    sampled = draw(st.lists(st.integers(0, 1), max_size=6))
    length = len(sampled)

    def column(code: str, values: st.SearchStrategy[Any]) -> array[Any]:
        return array(code, draw(st.lists(values, min_size=length, max_size=length)))

    experts = array("h", draw(st.lists(st.integers(0, 300), min_size=4 * length, max_size=4 * length)))
    keys = array("i", draw(st.lists(st.integers(-1, 2**31 - 1), min_size=3 * length, max_size=3 * length)))
    return Segment(
        token_ids=column("i", st.integers(0, 2**31 - 1)),
        sampled=array("b", sampled),
        logprobs=column("f", FLOATS),
        entropies=column("f", FLOATS),
        weight_version=draw(st.integers(0, 2**40)),
        kept=draw(st.none() | kept_tokens(sum(sampled))),
        kept_mass=draw(st.floats(0, 1)),
        routes=draw(st.none() | st.just(Routes(experts=experts, num_layers=2, experts_per_token=2))),
        selections=draw(st.none() | st.just(Selections(positions=keys, num_layers=1, top_k=3))),
        parent=draw(st.none() | st.integers(0, 5)),
        break_reason=draw(st.sampled_from([None, *get_args(BreakReason)])),
    )


CALLS = st.builds(ToolCall, id=WORDS, name=WORDS, arguments=WORDS)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "developer", "assistant", "tool"]),
    content=WORDS,
    thinking=WORDS,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    tool_call_id=st.none() | WORDS,
)
EVIDENCE = st.builds(
    Evidence,
    response=WORDS,
    thinking=st.none() | WORDS,
    answer=st.none() | WORDS,
    num_sampled_tokens=st.integers(0, 10**6),
    end=ENDS,
    facts=st.dictionaries(WORDS, JSON, max_size=3),
)
COUNTS = st.integers(0, 10**6)
EVENTS = st.builds(
    ContextEvent,
    kind=st.sampled_from(get_args(ContextAction)),
    turn=COUNTS,
    tokens_before=COUNTS,
    tokens_after=COUNTS,
    num_calls_before=COUNTS,
    num_calls_after=COUNTS,
)
TRAJECTORIES = st.builds(
    Trajectory,
    trajectory_id=WORDS,
    task_id=WORDS,
    group_id=WORDS,
    domain=WORDS,
    segments=st.lists(segments(), max_size=3).map(tuple),
    messages=st.lists(MESSAGES, max_size=3).map(tuple),
    evidence=EVIDENCE,
    end=ENDS,
    error=st.none() | WORDS,
    events=st.lists(EVENTS, max_size=2).map(tuple),
)
ROWS = st.builds(
    ScoredTrajectory,
    trajectory=TRAJECTORIES,
    score=st.builds(Score, total=FINITE, parts=NUMBERS, error=st.none() | WORDS),
    advantage=st.none() | FINITE,
    training=NUMBERS,
)


def make_row(name: str, reward: float = 1.0) -> ScoredTrajectory:
    """A small row that is told from others by its name."""
    segment = Segment(
        token_ids=array("i", [1, 44, 7]),
        sampled=array("b", [0, 0, 1]),
        logprobs=array("f", [0.0, 0.0, -0.5]),
        entropies=array("f", [0.0, 0.0, 0.7]),
        weight_version=3,
        kept=KeptTokens(offsets=array("q", [0, 2]), ids=array("i", [7, 9])),
    )
    evidence = Evidence(response="7", thinking=None, answer="7", num_sampled_tokens=1, end="stop")
    trajectory = Trajectory(
        trajectory_id=name,
        task_id="t",
        group_id="g",
        domain="mathematics",
        segments=(segment,),
        messages=(Message(role="user", content="4 + 3 ="),),
        evidence=evidence,
        end="stop",
    )
    return ScoredTrajectory(trajectory=trajectory, score=Score(total=reward, parts={"accuracy": reward}), advantage=0.5)
