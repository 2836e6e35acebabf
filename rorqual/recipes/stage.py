"""One training stage of a run: steps until the number is reached, metrics for each, checkpoints now and then, resume.

Pre-training and the stages of sparse training are this loop with other batches and objectives; what a step is trained
on depends on its number alone, so that a killed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.models.decoder import Decoder
from rorqual.recipes.progress import Progress
from rorqual.store.run import Run
from rorqual.train.checkpoint import load_training_state, save_training_state
from rorqual.train.data import PackedBatch
from rorqual.train.optim import OptimizerConfig, build_optimizer
from rorqual.train.step import Objective, train_step


@dataclass(frozen=True)
class StagePlan:
    """batches: the micro-batches of a step, by its number. objective: made for the batches of a step; None trains the
    indexers alone."""

    name: str
    num_steps: int
    checkpoint_every_steps: int
    optimizer: OptimizerConfig
    batches: Callable[[int], list[PackedBatch]]
    objective: Callable[[Sequence[PackedBatch]], Objective | None]


def run_stage(plan: StagePlan, model: Decoder, run: Run, progress: Progress) -> None:
    """Train `model` in place; resumes from the newest checkpoint of this stage."""
    optimizer = build_optimizer(model, plan.optimizer)
    done = 0
    checkpoint = run.latest_checkpoint(plan.name)
    if checkpoint is not None:
        load_training_state(Path(checkpoint.path), model, optimizer)
        done = checkpoint.step
    run.rewind(plan.name, done)
    with progress.bar(plan.name, plan.num_steps) as bar:
        for step in range(done, plan.num_steps):
            batches = plan.batches(step)
            stats = train_step(model, optimizer, batches, plan.objective(batches), plan.optimizer, step)
            figures = {"loss": stats.loss, "gradient_norm": stats.gradient_norm, "learning_rate": stats.learning_rate}
            figures |= {"num_tokens": stats.num_tokens, "seconds": stats.seconds, **stats.diagnostics.metrics()}
            run.append_metrics(plan.name, step + 1, figures)
            bar.advance(step + 1, {"loss": stats.loss})
            if (step + 1) % plan.checkpoint_every_steps == 0 or step + 1 == plan.num_steps:
                run.write_checkpoint(plan.name, step + 1, lambda path: save_training_state(path, model, optimizer, {}))
