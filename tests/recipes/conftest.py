"""A recipe small enough to run many times, and what of a run must not differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.config import load_config
from rorqual.recipes import r1_zero
from rorqual.recipes.progress import SilentProgress
from rorqual.records import to_json
from rorqual.store.run import Run

MICRO = Path(__file__).with_name("micro.toml")

TIMES = ("seconds", "seconds/generate", "seconds/train")


def run_micro(directory: Path, settings: Sequence[str] = ()) -> None:
    config = load_config(MICRO, r1_zero.Config, settings)
    with Run.open(directory, config, r1_zero.seeds(config)) as run:
        r1_zero.main(config, run, SilentProgress())


def contents(directory: Path) -> dict[str, Any]:
    """All that a finished run holds but times: final weights and trajectories bit for bit, metrics, evaluations.

    An interrupted evaluation goes on sample by sample, beside others than before: the same tokens are drawn, but their
    log-probs may differ in the last bit. So its texts and scores are compared.
    """
    run = Run.read(directory)
    found: dict[str, Any] = {}
    for stage in ("pretrain", "rl", "control"):
        checkpoint = run.latest_checkpoint(stage)
        assert checkpoint is not None
        found[f"weights/{stage}"] = (Path(checkpoint.path) / "model.safetensors").read_bytes()
        found[f"optimizer/{stage}"] = (Path(checkpoint.path) / "optimizer.safetensors").read_bytes()
        found[f"metrics/{stage}"] = [
            {key: value for key, value in line.items() if key not in TIMES} for line in run.metrics(stage)
        ]
        for step in run.trajectory_steps(stage):
            found[f"trajectories/{stage}/{step}"] = to_json(run.read_trajectories(stage, step))
    for name in run.eval_summaries():
        found[f"evals/{name}"] = [(row.trajectory.messages, row.score) for row in run.read_eval(name)]
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same. pytest itself would take minutes to lay two files of weights side by side."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the micro recipe."""
    num_threads = torch.get_num_threads()
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_micro(directory)
    torch.set_num_threads(num_threads)
    return directory
