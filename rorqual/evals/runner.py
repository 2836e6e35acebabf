"""Play k samples of every problem, keep every one, and say what they show.

Each sample is an episode of its own, whose seed follows from the evaluation's seed, the problem and the sample's
number: an evaluation that was interrupted goes on sample by sample and draws the tokens that it would have drawn. Their
log-probs are equal up to rounding, since other sequences may share the batch.
"""

from __future__ import annotations

import hashlib
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec

from rorqual.contracts import Engine, Environment, Reward
from rorqual.evals.statistics import Interval, Values, mean_at_k, mean_pass_at_k
from rorqual.records import Record, SamplingParams, Score, Task, Trajectory, to_json
from rorqual.rewards.rules import score
from rorqual.rollout.episode import EpisodeConfig
from rorqual.rollout.group import Rollouts
from rorqual.store.run import Run
from rorqual.store.tables import ScoredTrajectory
from rorqual.text.encoding import Encoding
from rorqual.text.reflection import corrects_itself
from rorqual.text.response import parse_response

NOT_OBTAINED = (
    "prompt_too_long",
    "environment_failed",
    "tool_failed",
    "sandbox_failed",
    "judge_failed",
    "time_limit",
    "cancelled",
)
"""Ends that say nothing of the policy's skill: such a sample is missing, never wrong."""


class Protocol(Record):
    """How to sample: `num_samples` of each problem. pass_at: the k of pass@k. metric: the part of the score to average.

    context_window: most tokens of one episode, prompt included; None takes what the engine has.
    """

    name: str
    num_samples: int
    sampling: SamplingParams
    pass_at: tuple[int, ...] = (1,)
    metric: str = "accuracy"
    context_window: int | None = None
    max_turns: int = 1


R1_PROTOCOL = Protocol(
    name="r1",
    num_samples=64,
    sampling=SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=32768),
    pass_at=(1, 8, 64),
)
"""DeepSeek-R1's evaluation (arXiv 2501.12948, section 3): pass@1 as the mean of 64 samples."""

V32_PROTOCOL = Protocol(
    name="v32",
    num_samples=16,
    sampling=SamplingParams(temperature=1.0, max_new_tokens=131072),
    pass_at=(1, 8),
    context_window=131072,
)
"""DeepSeek-V3.2's evaluation (arXiv 2512.02556): temperature 1, 128K window. The number of samples is our choice."""

GREEDY = Protocol(name="greedy", num_samples=1, sampling=SamplingParams(temperature=0.0, max_new_tokens=32768))
"""One sample, the likeliest token at each place."""

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in (R1_PROTOCOL, V32_PROTOCOL, GREEDY)}


@dataclass(frozen=True)
class Player:
    """Who plays, where, and who judges.

    label: which policy this is, such as "base" or a checkpoint's path. fingerprint: `weights_fingerprint` of it; an
    evaluation that was begun with other weights is then refused.
    """

    label: str
    engine: Engine
    environments: Mapping[str, Environment]
    encoding: Encoding
    rewards: Mapping[str, tuple[Reward, float]]
    fingerprint: str = ""


class EvalSummary(Record):
    """What an evaluation showed. Rates are over the samples obtained; `missing` says how the others ended.

    parse_failure_rate: no answer could be read. mean, over_problems, fixed_set: see `statistics.mean_at_k`.
    """

    name: str
    label: str
    protocol: Protocol
    num_problems: int
    samples_requested: int
    samples_obtained: int
    missing: dict[str, int]
    mean: float
    over_problems: Interval | None
    fixed_set: Interval | None
    pass_at: dict[str, float]
    truncation_rate: float
    parse_failure_rate: float
    well_formed_rate: float
    corrects_itself_rate: float
    mean_tokens: float


def evaluate(
    run: Run,
    name: str,
    tasks: Sequence[Task],
    player: Player,
    protocol: Protocol,
    seed: int = 0,
    on_sample: Callable[[int, int], object] | None = None,
) -> EvalSummary:
    """Evaluate `player` on `tasks`, storing every sample in `run` under `name`; goes on where it was interrupted.

    A stored sample whose reward raised is judged again and not sampled again, so a reward can be repaired.
    on_sample: called with the number of samples done and asked for. Warns when samples are missing.
    Raises: ValueError for no task or two of one id; StoreError when `name` holds an evaluation of something else.
    """
    _check_tasks(tasks)
    run.begin_eval(name, _plan(tasks, player, protocol, seed))
    done = {_sample_key(row.trajectory): row for row in _judged_again(run.read_eval(name), tasks, player.rewards)}
    wanted = [(task, number) for task in tasks for number in range(protocol.num_samples)]
    pending = [(task, number) for task, number in wanted if (task.task_id, number) not in done]
    rollouts = _rollouts(player, protocol, seed)
    queue = iter(pending)
    while len(done) < len(wanted):
        for task, number in islice(queue, IN_FLIGHT - rollouts.num_unfinished):
            rollouts.add([task], step=number)
        for group in rollouts.step():
            row = _judged(group.task, group.trajectories[0], player.rewards)
            run.append_eval_sample(name, row)
            done[_sample_key(row.trajectory)] = row
            if on_sample is not None:
                on_sample(len(done), len(wanted))
    rows = [done[task.task_id, number] for task, number in wanted]
    summary = summarize(name, player.label, protocol, rows)
    sealed: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(summary))
    if pending or run.eval_summaries().get(name) != sealed:
        run.finish_eval(name, rows, sealed)
    return summary


def summarize(name: str, label: str, protocol: Protocol, rows: Sequence[ScoredTrajectory]) -> EvalSummary:
    """What stored samples show; warns when some are missing. Raises: ValueError when none was obtained.

    Either message holds the first error as it was raised.
    """
    obtained = [row for row in rows if _was_obtained(row)]
    missing: dict[str, int] = {}
    for row in rows:
        if not _was_obtained(row):
            reason = f"reward_failed: {row.score.error.partition(':')[0]}" if row.score.error else row.trajectory.end
            missing[reason] = missing.get(reason, 0) + 1
    if missing and obtained:
        warnings.warn(
            f"Evaluation {name}: {len(obtained)} of {len(rows)} samples were obtained; figures are over these alone. "
            f"The others: {missing}. {_first_error(rows)}",
            stacklevel=2,
        )
    if not obtained:
        raise ValueError(f"Evaluation {name} obtained none of its {len(rows)} samples: {missing}. {_first_error(rows)}")
    values = metric_values(obtained, protocol.metric)
    estimate = mean_at_k(values)
    fewest = min(len(samples) for samples in values.values())
    return EvalSummary(
        name=name,
        label=label,
        protocol=protocol,
        num_problems=estimate.num_problems,
        samples_requested=len(rows),
        samples_obtained=len(obtained),
        missing=missing,
        mean=estimate.mean,
        over_problems=estimate.over_problems,
        fixed_set=estimate.fixed_set,
        pass_at={str(k): mean_pass_at_k(values, k) for k in protocol.pass_at if k <= fewest},
        truncation_rate=_share(row.trajectory.end == "length" for row in obtained),
        parse_failure_rate=_share(row.trajectory.evidence.answer is None for row in obtained),
        well_formed_rate=_share(parse_response(row.trajectory.evidence.response).well_formed for row in obtained),
        corrects_itself_rate=_share(corrects_itself(row.trajectory.evidence.response) for row in obtained),
        mean_tokens=statistics.fmean(row.trajectory.evidence.num_sampled_tokens for row in obtained),
    )


def metric_values(rows: Sequence[ScoredTrajectory], metric: str) -> Values:
    """Values by problem, of the samples that were obtained: what `statistics` takes.

    Raises: ValueError when a score has no such part.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if not _was_obtained(row):
            continue
        if metric not in row.score.parts:
            raise ValueError(f"Scores have the parts {', '.join(row.score.parts)}; there is no {metric!r} to average.")
        values.setdefault(row.trajectory.task_id, []).append(row.score.parts[metric])
    return values


# ------------------------------------------------------------------------------------------------------------- private

IN_FLIGHT = 512
"""Episodes that are begun at once; the engine queues what it has no room for."""


def _rollouts(player: Player, protocol: Protocol, seed: int) -> Rollouts:
    window = protocol.context_window or player.engine.context_window
    config = EpisodeConfig(sampling=protocol.sampling, context_window=window, max_turns=protocol.max_turns)
    return Rollouts(player.engine, player.environments, player.encoding, config, group_size=1, run_seed=seed)


def _judged(task: Task, trajectory: Trajectory, rewards: Mapping[str, tuple[Reward, float]]) -> ScoredTrajectory:
    if trajectory.end in NOT_OBTAINED:
        return ScoredTrajectory(trajectory=trajectory, score=Score(total=0.0, parts={}))
    return ScoredTrajectory(trajectory=trajectory, score=score(task, trajectory.evidence, rewards))


def _judged_again(
    rows: Sequence[ScoredTrajectory], tasks: Sequence[Task], rewards: Mapping[str, tuple[Reward, float]]
) -> list[ScoredTrajectory]:
    """The rows, those whose reward raised with a new score: the response is kept, and the fault was not its own."""
    by_id = {task.task_id: task for task in tasks}
    return [
        row if row.score.error is None else _judged(by_id[row.trajectory.task_id], row.trajectory, rewards)
        for row in rows
    ]


def _first_error(rows: Sequence[ScoredTrajectory]) -> str:
    first = next(row for row in rows if not _was_obtained(row))
    error = first.score.error or first.trajectory.error or f"it ended with {first.trajectory.end}"
    return f"The first, of {first.trajectory.task_id}: {error}"


def _was_obtained(row: ScoredTrajectory) -> bool:
    return row.trajectory.end not in NOT_OBTAINED and row.score.error is None


def _sample_key(trajectory: Trajectory) -> tuple[str, int]:
    """(problem, number of the sample): the number is the step under which the rollouts played it."""
    return trajectory.task_id, int(trajectory.group_id.partition("/")[0])


def _plan(tasks: Sequence[Task], player: Player, protocol: Protocol, seed: int) -> dict[str, Any]:
    prompts = hashlib.sha256()
    for task in tasks:
        environment = player.environments.get(task.environment)
        if environment is None:
            have = ", ".join(player.environments)
            raise ValueError(f"Task {task.task_id} needs environment {task.environment!r}; there are: {have}.")
        prompts.update(player.encoding.prompt(environment.start(task), task.tools).tobytes() + b"|")
    return {
        "label": player.label,
        "weight_version": player.engine.weight_version,
        "weights_sha256": player.fingerprint,
        "protocol": msgspec.to_builtins(protocol),
        "seed": seed,
        "rewards": {name: weight for name, (_, weight) in player.rewards.items()},
        "num_tasks": len(tasks),
        "tasks_sha256": hashlib.sha256(to_json(list(tasks))).hexdigest(),
        "prompts_sha256": prompts.hexdigest(),
    }


def _check_tasks(tasks: Sequence[Task]) -> None:
    if not tasks:
        raise ValueError("There are no tasks to evaluate on.")
    seen: set[str] = set()
    for task in tasks:
        if task.task_id in seen:
            raise ValueError(f"Task {task.task_id} is given twice; every problem counts once.")
        seen.add(task.task_id)


def _share(flags: Any) -> float:
    return statistics.fmean(float(flag) for flag in flags)
