"""The `eval` verb: a policy from the disk, a benchmark, a protocol -> a run directory that holds every sample."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from rorqual.cli.policies import load_policy
from rorqual.cli.progress import RichProgress
from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.envs.dialogue import DialogueEnvironment, ReasoningGymTasks
from rorqual.evals.benchmarks import benchmark, load_tasks
from rorqual.evals.fingerprint import weights_fingerprint
from rorqual.evals.runner import PROTOCOLS, Player, Protocol, evaluate
from rorqual.records import Record
from rorqual.rewards.rules import load_rewards
from rorqual.store.run import Run


class EvalCommand(Record):
    """What was asked for; it is the config of the run that keeps the samples."""

    policy: str
    benchmark: str
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
    if num_slots < 1:
        raise ValueError(f"--slots {num_slots}: at least one sequence at a time is needed.")
    protocol = chosen_protocol(command)
    bench = benchmark(command.benchmark)
    if command.problems is not None:
        bench = msgspec.structs.replace(bench, num_problems=command.problems)
    ReasoningGymTasks(bench.dataset, bench.options)  # a wrong name is found before anything is loaded
    policy = load_policy(command.policy, command.stage, command.template, command.device)
    tasks = load_tasks(bench, policy.trained_questions())
    player = Player(
        label=policy.label,
        engine=LocalEngine(policy.model, EngineConfig(num_slots=num_slots)),
        environments={"dialogue": DialogueEnvironment(policy.dialogue)},
        encoding=policy.encoding,
        rewards=load_rewards(bench.rewards),
        fingerprint=weights_fingerprint(policy.model),
    )
    directory = out or Path("runs") / f"eval-{policy.label.replace('/', '-')}-{command.benchmark}-{protocol.name}"
    with Run.open(directory, command, {"run": command.seed}, argv, recipe="eval") as run:
        name = f"{command.benchmark}-{protocol.name}"
        with progress.bar(name, len(tasks) * protocol.num_samples) as bar:
            evaluate(run, name, tasks, player, protocol, command.seed, lambda done, wanted: bar.advance(done))
    return directory


def chosen_protocol(command: EvalCommand) -> Protocol:
    """The preset with the command's own numbers in place. Raises: ValueError naming the presets."""
    if command.protocol not in PROTOCOLS:
        raise ValueError(
            f"There is no protocol {command.protocol!r}{_nearest(command.protocol, PROTOCOLS)}; there are "
            f"{', '.join(PROTOCOLS)}."
        )
    protocol = PROTOCOLS[command.protocol]
    if command.samples is not None:
        if command.samples < 1:
            raise ValueError(f"--samples {command.samples}: at least one sample of each problem is needed.")
        protocol = msgspec.structs.replace(protocol, num_samples=command.samples)
    if command.max_new_tokens is not None:
        sampling = msgspec.structs.replace(protocol.sampling, max_new_tokens=command.max_new_tokens)
        protocol = msgspec.structs.replace(protocol, sampling=sampling)
    return protocol


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
