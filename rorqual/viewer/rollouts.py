"""A few groups of a few steps, chosen to show the course of each stage and to fit the page."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from rorqual.records import Segment
from rorqual.store.run import Run
from rorqual.store.tables import ScoredTrajectory
from rorqual.viewer.tokens import TokenTexts

STEPS_PER_STAGE = 8
GROUPS_PER_STEP = 6
MEMBERS_PER_GROUP = 16


def collect_rollouts(run: Run, max_bytes: int, texts: TokenTexts) -> list[dict[str, Any]]:
    """Sources (stages, then evaluations) with their steps, groups and members, `max_bytes` of JSON at most in all.

    The budget is dealt out one group of every step at a time, so that a long run loses groups before it loses steps.
    """
    steps = [*_training_steps(run), *_evaluations(run)]
    left = max_bytes
    for rank in range(GROUPS_PER_STEP):
        for step, groups in steps:
            if rank < len(groups):
                group = _group(groups[rank])
                size = len(msgspec.json.encode(group))
                if size <= left:
                    left -= size
                    step["groups"].append(group)
    for step, _ in steps:
        for group in step["groups"]:
            for member in group["members"]:
                for segment in member["segments"]:
                    texts.add(segment["ids"])
    sources: dict[str, list[dict[str, Any]]] = {}
    for step, _ in steps:
        if step["groups"]:
            sources.setdefault(step.pop("source"), []).append(step)
    return [{"source": source, "steps": steps} for source, steps in sources.items()]


Step = tuple[dict[str, Any], list[list[ScoredTrajectory]]]


def _training_steps(run: Run) -> Iterable[Step]:
    stages = [path.name for path in sorted((run.path / "trajectories").glob("*")) if path.is_dir()]
    order = run.stages()
    for stage in sorted(stages, key=lambda name: (order.index(name) if name in order else len(order), name)):
        steps = run.trajectory_steps(stage)
        for step in spread(steps, STEPS_PER_STAGE):
            groups = _grouped(run.read_trajectories(stage, step), lambda row: row.trajectory.group_id)
            yield {"source": stage, "step": step, "groups": []}, _most_telling(groups)


def _evaluations(run: Run) -> Iterable[Step]:
    for name in run.eval_summaries():
        groups = _grouped(run.read_eval(name), lambda row: row.trajectory.task_id)
        yield {"source": f"evaluation: {name}", "step": 0, "groups": []}, spread(groups, GROUPS_PER_STEP)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `items`, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _grouped(rows: Sequence[ScoredTrajectory], key: Any) -> list[list[ScoredTrajectory]]:
    groups: dict[str, list[ScoredTrajectory]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _most_telling(groups: list[list[ScoredTrajectory]]) -> list[list[ScoredTrajectory]]:
    """Groups whose members differ most in reward first: these are the ones that train."""
    return sorted(groups, key=lambda rows: -statistics.pvariance([row.score.total for row in rows]))


def _group(rows: list[ScoredTrajectory]) -> dict[str, Any]:
    ranked = sorted(rows, key=lambda row: -row.score.total)
    question = next((m.content for m in reversed(rows[0].trajectory.messages) if m.role == "user"), "")
    return {
        "group": rows[0].trajectory.group_id,
        "task": rows[0].trajectory.task_id,
        "question": question,
        "size": len(rows),
        "members": [_member(row) for row in spread(ranked, MEMBERS_PER_GROUP)],
    }


def _member(row: ScoredTrajectory) -> dict[str, Any]:
    return {
        "id": row.trajectory.trajectory_id,
        "reward": row.score.total,
        "parts": row.score.parts,
        "problem": row.score.error or row.trajectory.error,
        "advantage": row.advantage,
        "training": row.training,
        "end": row.trajectory.end,
        "answer": row.trajectory.evidence.answer,
        "num_tokens": row.trajectory.evidence.num_sampled_tokens,
        "segments": [_segment(segment) for segment in row.trajectory.segments],
    }


def _segment(segment: Segment) -> dict[str, Any]:
    """Tokens, and for the sampled ones alone, in their order, log-prob, entropy and size of the kept set."""
    where = [i for i, sampled in enumerate(segment.sampled) if sampled]
    kept = segment.kept
    return {
        "ids": segment.token_ids.tolist(),
        "sampled": _runs(segment.sampled),
        "logprobs": [round(segment.logprobs[i], 3) for i in where],
        "entropies": [round(segment.entropies[i], 3) for i in where],
        "kept": [end - start for start, end in pairwise(kept.offsets)] if kept is not None else None,
        "kept_mass": round(segment.kept_mass, 4),
        "weight_version": segment.weight_version,
        "break_reason": segment.break_reason,
    }


def _runs(flags: array[int]) -> list[int]:
    """Run lengths of a 0/1 column, the first run being of zeros: [0, 0, 1] is [2, 1]; [1, 1] is [0, 2]."""
    lengths, current = [0], 0
    for flag in flags:
        if flag != current:
            lengths.append(0)
            current = flag
        lengths[-1] += 1
    return lengths
