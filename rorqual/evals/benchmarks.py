"""Benchmarks by name: which problems, and which rewards judge them. How they are sampled is a Protocol's business."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rorqual.envs.dialogue import ReasoningGymTasks, take_held_out
from rorqual.records import Record, Task
from rorqual.rewards.rules import RewardConfig


class Benchmark(Record):
    """`num_problems` distinct problems of one reasoning-gym data set, from seeds that no other split can draw.

    `Benchmark(dataset="chain_sum", options={"min_terms": 2, "max_terms": 3}, num_problems=200)`
    """

    dataset: str
    options: dict[str, Any] = {}
    split: str = "test"
    num_problems: int = 200
    rewards: tuple[RewardConfig, ...] = (RewardConfig(name="accuracy"), RewardConfig(name="format", weight=0.0))


BENCHMARKS: dict[str, Benchmark] = {
    "chain_sum": Benchmark(dataset="chain_sum"),
    "chain_sum_small": Benchmark(
        dataset="chain_sum", options={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    ),
    "basic_arithmetic": Benchmark(dataset="basic_arithmetic"),
    "countdown": Benchmark(dataset="countdown"),
    "gcd": Benchmark(dataset="gcd"),
    "knights_knaves": Benchmark(dataset="knights_knaves"),
    "leg_counting": Benchmark(dataset="leg_counting"),
    "simple_equations": Benchmark(dataset="simple_equations"),
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name, or the reasoning-gym data set of that name with the library's own options."""
    return BENCHMARKS.get(name, Benchmark(dataset=name))


def load_tasks(benchmark: Benchmark, exclude_questions: Collection[str] = ()) -> list[Task]:
    """The problems, each once, none of `exclude_questions` (what was trained on).

    Raises: ValueError when the data set has not that many distinct problems.
    """
    source = ReasoningGymTasks(benchmark.dataset, benchmark.options)
    return take_held_out(source.tasks(benchmark.split), exclude_questions, benchmark.num_problems)
