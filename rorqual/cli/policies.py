"""A policy by its place on the disk: a run directory, or a checkpoint in Hugging Face's layout."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from rorqual.envs.dialogue import DialogueConfig
from rorqual.models.checkpoints import load_checkpoint
from rorqual.models.decoder import Decoder
from rorqual.recipes.catalog import RECIPES
from rorqual.records import Task
from rorqual.rewards.rules import RewardConfig
from rorqual.store.files import StoreError
from rorqual.store.run import Run
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.formats import CONVERSATION_TEMPLATE
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.checkpoint import load_weights


@dataclass(frozen=True)
class Policy:
    """A model with what turns text into its tokens, and how its run asked it.

    label: where it comes from. dialogue: the system message and suffix that it was trained with. trained_questions:
    those that its run showed it; none are known of a checkpoint that was read from elsewhere. own: the problems of its
    run, None for such a checkpoint. single_turn: whether it was trained to answer one question and no second one.
    """

    label: str
    model: Decoder
    encoding: Encoding
    tokenizer_folder: Path
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    trained_questions: Callable[[], Collection[str]] = frozenset
    own: OwnProblems | None = None
    single_turn: bool = False


@dataclass(frozen=True)
class OwnProblems:
    """What a run evaluates its policies on. held_out: so many problems of each data set, which no training showed."""

    held_out: Callable[[int], list[Task]]
    num_problems: int
    rewards: tuple[RewardConfig, ...]


def check_device(name: str) -> None:
    """Raises: ValueError when torch knows no such device, or has none here."""
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here ({reason}). Give cpu, or a device that `rorqual doctor` lists, such "
            "as cuda or cuda:0."
        ) from error


def load_policy(place: str | Path, stage: str | None, template: bool, device: str) -> Policy:
    """Load a policy. stage: which one of a run, the last that has a checkpoint by default.

    template: render questions by a plain-text template, for a base model without chat tokens; a run knows this itself.
    Raises: ValueError when `place` is neither a run nor a checkpoint, or has no such stage, when `template` is given
    for a run, or for a device that is not here.
    """
    check_device(device)
    folder = Path(place)
    if (folder / "manifest.json").exists():
        if template:
            raise ValueError(f"{folder} is a run, which knows how it asks; leave --template out.")
        return _from_run(folder, stage, device)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is neither a run (no manifest.json) nor a checkpoint (no config.json). Give the directory that "
            "`rorqual run` made, or one downloaded from Hugging Face."
        )
    if stage is not None:
        raise ValueError(f"{folder} is a checkpoint, which has no stages; leave --stage out.")
    encoding = EncodingConfig(template=CONVERSATION_TEMPLATE if template else "")
    model = load_checkpoint(folder, device=device)
    return Policy(folder.name, model, Encoding(Tokenizer.load(folder), encoding), folder, single_turn=template)


def _from_run(folder: Path, stage: str | None, device: str) -> Policy:
    run = Run.read(folder)
    name = run.manifest["recipe"]
    if name not in RECIPES:
        made = f"by the recipe {name!r}, which is not here" if name else "without a recipe"
        raise ValueError(
            f"{folder} was made {made}, so its policy cannot be loaded; give a run of {' or '.join(RECIPES)}."
        )
    config = msgspec.convert(run.config, RECIPES[name].Config)
    stages = [each for each in run.stages() if (folder / "checkpoints" / each).is_dir()]
    if not stages:
        raise ValueError(
            f"{folder} has no checkpoint yet; its first one comes with `rorqual run`, which goes on there."
        )
    if stage is not None and stage not in stages:
        raise ValueError(f"{folder} has no checkpoint of stage {stage!r}; it has: {', '.join(stages)}.")
    chosen = stage or _trained_stage(stages)
    checkpoint = run.latest_checkpoint(chosen)
    if checkpoint is None:
        raise StoreError(f"{folder} has no finished checkpoint of stage {chosen!r} yet.")
    recipe = RECIPES[name]
    model = recipe.architecture(config, chosen)
    load_weights(Path(checkpoint.path) / "model.safetensors", model)
    policy = Policy(
        label=f"{folder.resolve().name}/{chosen}@{checkpoint.step}",
        model=model.to(device),
        encoding=Encoding(Tokenizer.load(folder / "tokenizer"), getattr(config, "encoding", EncodingConfig())),
        tokenizer_folder=folder / "tokenizer",
        single_turn=True,  # every recipe plays one turn
    )
    if not hasattr(recipe, "problems"):
        return policy
    return replace(
        policy,
        dialogue=config.dialogue,
        trained_questions=lambda: _trained_questions(name, config),
        own=OwnProblems(lambda number: _held_out(name, config, number), config.evaluation.num_problems, config.rewards),
    )


def _trained_questions(recipe: str, config: Any) -> Collection[str]:
    questions: Collection[str] = RECIPES[recipe].problems(config).trained_questions()
    return questions


def _held_out(recipe: str, config: Any, num_problems: int) -> list[Task]:
    tasks: list[Task] = RECIPES[recipe].problems(config).held_out(num_problems)
    return tasks


def _trained_stage(stages: list[str]) -> str:
    """The last stage that is not a control experiment."""
    return next((stage for stage in reversed(stages) if "control" not in stage), stages[-1])
