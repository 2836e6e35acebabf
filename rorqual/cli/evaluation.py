"""The `eval` verb: a policy from the disk, a benchmark, a protocol -> a run directory that holds every sample."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from rorqual.cli.options import check_option
from rorqual.cli.policies import Policy, load_policy
from rorqual.cli.progress import RichProgress
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.envs.dialogue import DialogueEnvironment, ReasoningGymTasks
from rorqual.evals.benchmarks import BENCHMARKS, Benchmark, benchmark, load_tasks
from rorqual.evals.fingerprint import weights_fingerprint
from rorqual.evals.runner import PROTOCOLS, Player, Protocol, evaluate
from rorqual.records import Record, Task
from rorqual.rewards.rules import RewardConfig, load_rewards
from rorqual.store.run import Run

OWN = "own"
"""Name of an evaluation on the problems that the policy's own run holds out."""


class EvalCommand(Record):
    """What was asked for; it is the config of the run that keeps the samples.

    benchmark: None for the run's own problems.
    """

    policy: str
    benchmark: str | None
    options: dict[str, Any]
    protocol: str
    problems: int | None
    samples: int | None
    max_new_tokens: int | None
    stage: str | None
    seed: int
    template: bool
    device: str


def run_evaluation(
    command: EvalCommand, out: Path | None, argv: Sequence[str], progress: RichProgress, num_slots: int = 64
) -> Path:
    """Evaluate, and return the directory that holds every sample. Raises: ValueError for an unknown name.

    A policy of a run is asked as its run asked it, and no problem that the run trained on. num_slots is no part of
    what was asked for: an evaluation that ran out of memory goes on with fewer.
    """
    check_option("--slots", num_slots, num_slots >= 1, "1 or more")
    check_option("--problems", command.problems, (command.problems or 0) >= 1, "1 or more")
    protocol = chosen_protocol(command)
    bench = chosen_benchmark(command)
    policy = load_policy(command.policy, command.stage, command.template, command.device)
    problems = _problems(command, bench, policy)
    player = Player(
        label=policy.label,
        engine=LocalEngine(policy.model, EngineConfig(num_slots=num_slots)),
        environments={"dialogue": DialogueEnvironment(policy.dialogue)},
        encoding=policy.encoding,
        rewards=load_rewards(problems.rewards),
        fingerprint=weights_fingerprint(policy.model),
    )
    name = f"{problems.name}-{protocol.name}"
    directory = out or Path("runs") / f"eval-{policy.label.replace('/', '-')}-{name}"
    with (
        Run.open(directory, command, {"run": command.seed}, argv, recipe="eval") as run,
        progress.bar(name, len(problems.tasks) * protocol.num_samples) as bar,
    ):
        tell = lambda done, wanted: bar.advance(done)  # noqa: E731
        evaluate(run, name, problems.tasks, player, protocol, command.seed, tell)
    return directory


class Problems(NamedTuple):
    """What is asked, and what judges the answers."""

    name: str
    tasks: list[Task]
    rewards: tuple[RewardConfig, ...]


def chosen_benchmark(command: EvalCommand) -> Benchmark | None:
    """The benchmark that the command names, with its options in place; None for the run's own problems.

    Raises: ValueError for an unknown data set, or an option that it does not have.
    """
    if command.benchmark is None:
        if command.options:
            raise ValueError("--options are those of a data set; name it with --benchmark.")
        if (Path(command.policy) / "config.json").exists():
            raise _no_problems(command)
        return None
    bench = benchmark(command.benchmark)
    bench = msgspec.structs.replace(
        bench, options={**bench.options, **command.options}, num_problems=command.problems or bench.num_problems
    )
    ReasoningGymTasks(bench.dataset, bench.options)
    return bench


def _problems(command: EvalCommand, bench: Benchmark | None, policy: Policy) -> Problems:
    if command.benchmark is not None and bench is not None:
        return Problems(command.benchmark, load_tasks(bench, policy.trained_questions()), bench.rewards)
    if policy.own is None:
        raise _no_problems(command)
    own = policy.own
    return Problems(OWN, own.held_out(command.problems or own.num_problems), own.rewards)


def _no_problems(command: EvalCommand) -> ValueError:
    return ValueError(
        f"{command.policy} is a checkpoint, which has no problems of its own; name some with --benchmark: "
        f"{', '.join(BENCHMARKS)}, or any reasoning-gym data set."
    )


def chosen_protocol(command: EvalCommand) -> Protocol:
    """The preset with the command's own numbers in place. Raises: ValueError naming the presets, or the option."""
    if command.protocol not in PROTOCOLS:
        raise ValueError(
            f"There is no protocol {command.protocol!r}{_nearest(command.protocol, PROTOCOLS)}; there are "
            f"{', '.join(PROTOCOLS)}."
        )
    check_option("--samples", command.samples, (command.samples or 0) >= 1, "1 or more")
    check_option("--max-new-tokens", command.max_new_tokens, (command.max_new_tokens or 0) >= 1, "1 or more")
    protocol = PROTOCOLS[command.protocol]
    limit = command.max_new_tokens or protocol.sampling.max_new_tokens
    sampling = msgspec.structs.replace(protocol.sampling, max_new_tokens=limit)
    return msgspec.structs.replace(protocol, num_samples=command.samples or protocol.num_samples, sampling=sampling)


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
