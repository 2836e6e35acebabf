"""One question, one response: the environment of R1-Zero, and its tasks from the reasoning-gym library.

A task carries the library's whole entry in its payload, so that a stored run can be scored again later. Splits are
ranges of seeds that cannot overlap: a data set that is seeded with s makes its item i from s + i.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, cast

import reasoning_gym
from reasoning_gym.factory import DATASETS

from rorqual.records import EndReason, Evidence, Message, Record, Segment, Task, ToolCall, ToolSpec
from rorqual.text.response import join_thinking, parse_response

SPLITS: dict[str, range] = {
    "train": range(2**30),
    "validation": range(2**30, 2**30 + 2**29),
    "test": range(2**30 + 2**29, 2**31),
}
"""Split -> the seeds of its items. All lie below 2**32, the largest that numpy takes."""

CHUNK_SIZE = 1000
"""Items that share one data set object; some data sets draw a plan for all their items when they are built."""

REFUSED: dict[str, str] = {
    "boxnet": "it has no reference answer, so its scorer cannot be checked, and it raises on a number",
    "composite": "it is a mixture; give the data sets of the mixture one by one",
    "game_of_life_halting": "its scorer gives 1.0 to any non-empty text",
    "graph_color": "it has no reference answer, so its scorer cannot be checked",
    "intermediate_integration": "its reference can be an unevaluated integral, and its scorer takes that for an answer",
    "prime_factorization": "its scorer raises on an answer that is not a number",
    "propositional_logic": "it has no reference answer, so its scorer cannot be checked",
    "rubiks_cube": "it has no reference answer, so its scorer cannot be checked",
    "rush_hour": "it has no reference answer, so its scorer cannot be checked",
}
"""Data sets that must not train a policy -> why."""

DOMAINS: dict[str, str] = {
    "algebra": "mathematics",
    "arithmetic": "mathematics",
    "code": "programming",
    "geometry": "mathematics",
    "probability": "mathematics",
}
"""Category of the library -> domain of ours; every other category is "logic"."""


class DialogueConfig(Record):
    """`system`: a system message for every task; `suffix`: text added to every question, say a format instruction."""

    system: str = ""
    suffix: str = ""


class DialogueEnvironment:
    """Shows the question, takes one response, and takes it apart. Implements `contracts.Environment`."""

    def __init__(self, config: DialogueConfig | None = None) -> None:
        self.config = config or DialogueConfig()

    def start(self, task: Task) -> tuple[Message, ...]:
        """The task's messages under the system message, the suffix added to the last of them.

        Raises: ValueError for a task without a user message at its end.
        """
        if not task.messages or task.messages[-1].role != "user":
            raise ValueError(
                f"Task {task.task_id} does not end with a user message, so there is nothing to respond to."
            )
        *earlier, question = task.messages
        system = [Message(role="system", content=self.config.system)] if self.config.system else []
        return (*system, *earlier, Message(role="user", content=question.content + self.config.suffix))

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Nothing: the first response ends the episode."""
        return ()

    def tools(self, task: Task) -> tuple[ToolSpec, ...]:
        """None."""
        return ()

    async def call(self, task: Task, messages: Sequence[Message], call: ToolCall) -> str:
        """Raises: ValueError always: there are no tools."""
        raise ValueError(f"There is no tool {call.name!r}; there are none.")

    def evidence(self, task: Task, messages: Sequence[Message], segments: Sequence[Segment], end: str) -> Evidence:
        """The last response of the policy in its parts; an episode without one has an empty response."""
        written = [join_thinking(message) for message in messages[len(task.messages) :] if message.role == "assistant"]
        text = written[-1] if written else ""
        response = parse_response(text)
        return Evidence(
            response=text,
            thinking=response.thinking,
            answer=response.answer,
            num_sampled_tokens=sum(segment.num_sampled for segment in segments),
            end=cast(EndReason, end),
        )


class ReasoningGymConfig(Record):
    """One data set of the library. `options` go to its own config; `domain` defaults to what its category implies."""

    name: str
    options: dict[str, Any] = {}
    domain: str = ""

    def __post_init__(self) -> None:
        """Raises: ValueError for an unknown name, a refused data set, or an option that it does not have."""
        _check_name(self.name)
        _check_options(self.name, self.options)


class ReasoningGymTasks:
    """All tasks of one data set: `task("train", 17)` is made when asked for and is always the same.

    `ReasoningGymTasks("chain_sum", {"min_terms": 2, "max_terms": 3})`
    """

    def __init__(self, name: str, options: dict[str, Any] | None = None, domain: str = "") -> None:
        """Raises: ValueError for an unknown name (with the nearest ones), a refused data set, or a bad option."""
        self.name = name
        self.options = dict(options or {})
        _check_name(name)
        _check_options(name, self.options)
        self._options_json = json.dumps(self.options, sort_keys=True)
        self.domain = domain or DOMAINS.get(_dataset(name, self._options_json, 0, 1).category, "logic")

    @classmethod
    def from_config(cls, config: ReasoningGymConfig) -> ReasoningGymTasks:
        """The tasks that a config names."""
        return cls(config.name, config.options, config.domain)

    def task(self, split: str, index: int) -> Task:
        """Item `index` of `split`.

        Raises: ValueError for an unknown split, an index outside it, or an item that the library fails to make.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r}; there are {', '.join(SPLITS)}.")
        seeds = SPLITS[split]
        if not 0 <= index < len(seeds):
            raise ValueError(f"Index {index} is outside split {split!r}, which has {len(seeds)} items.")
        chunk, offset = divmod(index, CHUNK_SIZE)
        data = _dataset(self.name, self._options_json, seeds.start + chunk * CHUNK_SIZE, CHUNK_SIZE)
        try:
            entry = json.loads(json.dumps(data[offset], default=_plain))
        except Exception as error:
            raise ValueError(
                f"{self.name} could not make item {index} of split {split!r} ({type(error).__name__}: {error}). "
                f"Check its options {self.options} or choose another index."
            ) from error
        return Task(
            task_id=f"{self.name}/{split}/{index}",
            environment="dialogue",
            domain=self.domain,
            messages=(Message(role="user", content=entry["question"]),),
            payload={"dataset": self.name, "options": self.options, "entry": entry},
        )

    def tasks(self, split: str, start: int = 0) -> Iterator[Task]:
        """The tasks of `split` in order, from item `start` on."""
        for index in range(start, len(SPLITS[split])):
            yield self.task(split, index)


def question_of(task: Task) -> str:
    """The text by which a repeated question is recognised: the last message."""
    return task.messages[-1].content


SUM_QUESTION = re.compile(
    r"(?:State the final answer to the following arithmetic problem:|Calculate|What is|Solve|Compute|Evaluate:)\s*"
    r"(-?\d+(?:\s*[+-]\s*-?\d+)+)\s*[=.?]"
)
"""A question of chain_sum or basic_arithmetic that is a plain sum: integers, plus and minus, no parentheses."""

SUM_TERM = re.compile(r"([+-]?)\s*(-?\d+)")


def canonical_question(task: Task) -> str:
    """What two tasks share when they are the same problem: `canonical_text` of the question."""
    return canonical_text(question_of(task))


def canonical_text(question: str) -> str:
    """A plain sum as its sorted signed terms, whatever its order and wording; any other question as it is.

    "Calculate 4 + 3 - 5." and "Calculate 3 - 5 + 4." are both "-5 +3 +4". The result is its own canonical text.
    """
    match = SUM_QUESTION.fullmatch(question.strip())
    if match is None:
        return question
    terms = [-int(number) if sign == "-" else int(number) for sign, number in SUM_TERM.findall(match[1])]
    return " ".join(f"{term:+d}" for term in sorted(terms))


def held_out(tasks: Iterable[Task], exclude_questions: Collection[str]) -> Iterator[Task]:
    """Those `tasks` that are neither the same problem as one of `exclude_questions` nor as one given before.

    Different seeds can make the same small question; this keeps what was trained on out of an evaluation. Questions
    are compared by their `canonical_text`, so that a sum whose terms changed places is no new problem.
    """
    seen = {canonical_text(question) for question in exclude_questions}
    for task in tasks:
        question = canonical_question(task)
        if question not in seen:
            seen.add(question)
            yield task


def take_held_out(tasks: Iterable[Task], exclude_questions: Collection[str], count: int) -> list[Task]:
    """The first `count` of `held_out`, looked for among the first 100 * count + 1000 tasks.

    Raises: ValueError naming the data set when it holds too few problems that were not trained on.
    """
    most_scanned = 100 * count + 1000
    remaining = iter(tasks)
    head = list(islice(remaining, 1))
    taken = list(islice(held_out(chain(head, islice(remaining, most_scanned - 1)), exclude_questions), count))
    if len(taken) < count:
        name = f"{head[0].payload.get('dataset')} with options {head[0].payload.get('options')}" if head else "No task"
        raise ValueError(
            f"{name} gave {len(taken)} distinct held-out problems among its first {most_scanned} tasks where {count} "
            "were wanted; the others were trained on or repeat one another. Ask for fewer problems, train on fewer, or "
            "choose options with more variety, say more terms or digits."
        )
    return taken


def _check_name(name: str) -> None:
    if name in REFUSED:
        raise ValueError(f"Data set {name!r} is refused: {REFUSED[name]}. Choose another one.")
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS.keys() - REFUSED.keys(), n=3, cutoff=0.5)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise ValueError(f"reasoning-gym has no data set {name!r}{hint}.")


def _check_options(name: str, options: Collection[str]) -> None:
    reserved = sorted({"seed", "size"}.intersection(options))
    if reserved:
        raise ValueError(f"Options {reserved} of {name} are set by the split; leave them out.")
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"Data set {name!r} has no options {', '.join(unknown)}; it has {', '.join(sorted(known)) or 'none'}. If "
            "they were meant for another data set, clear them: options = {} in the file, or on the command line, for "
            "the first data set, --set 'tasks.0.options={}'."
        )


@lru_cache(maxsize=32)
def _dataset(name: str, options_json: str, seed: int, size: int) -> Any:
    """One chunk of a data set. Raises: ValueError when the library refuses the options."""
    options = json.loads(options_json)
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:
        raise ValueError(
            f"reasoning-gym refuses the options {options} of {name} ({type(error).__name__}: {error}). "
            f"Its options are those of {DATASETS[name][1].__name__}."
        ) from error


def _plain(value: Any) -> Any:
    """JSON form of what metadata may hold besides JSON's own types. Raises: TypeError for anything unforeseen."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")
