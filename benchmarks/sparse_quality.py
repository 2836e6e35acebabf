"""What sparse attention costs in quality: DSA after a dense base, and NSA from scratch, each beside dense attention.

One small model at 2,048 tokens on the Python standard library's sources. Two run directories:

    dsa    dense pre-training -> warm-up -> sparse with k = T/16, and the control: the base trained on as long
    nsa    the same sequences in the same order from the first step on, with Native Sparse Attention

Each is one process on one core (`--arm`), so that two cores train both at once; a call without `--arm` trains what is
left and prints the table. An interrupted call goes on where it was, and each directory has its report (`rorqual
report`). `--small` is a smoke check.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from common import markdown_table
from rich.console import Console

from rorqual.cli.progress import RichProgress
from rorqual.models.config import DSAConfig, ModelConfig, NSAConfig
from rorqual.models.convert import with_indexers
from rorqual.models.decoder import Decoder
from rorqual.recipes import pretrain_text, sparsify
from rorqual.recipes.pretrain_text import PretrainTextConfig
from rorqual.recipes.sparsify import SparsifyConfig
from rorqual.recipes.text_stage import HELD_OUT, TextStageConfig
from rorqual.store.run import Run
from rorqual.text.corpus import TextConfig
from rorqual.train.optim import OptimizerConfig

DENSE_GATE = 0.01
"""Sparse training may lose so much of the loss of dense attention at equal tokens."""


@dataclass(frozen=True)
class Size:
    """What `--small` makes less of. steps: of pre-training, warm-up and sparse training."""

    model: ModelConfig
    length: int
    nsa: NSAConfig
    steps: tuple[int, int, int]
    sequences_per_step: int
    text: TextConfig
    evaluation_sequences: int


FULL = Size(
    model=ModelConfig(
        family="qwen3",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=704,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        context_window=2048,
        qk_norm=True,
        tie_embeddings=True,
        initializer_range=0.05,
    ),
    length=2048,
    nsa=NSAConfig(
        block_length=16, block_stride=8, selected_length=16, num_selected=8, window=64, compressor_size=64
    ),  # It selects 128 tokens, as DSA does here.
    steps=(500, 80, 120),
    sequences_per_step=2,
    text=TextConfig(max_bytes=0),
    evaluation_sequences=32,
)

SMALL = Size(
    model=msgspec.structs.replace(
        FULL.model, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, vocab_size=512
    ),
    length=512,
    nsa=msgspec.structs.replace(FULL.nsa, num_selected=4, num_local=1, window=32, compressor_size=16),
    steps=(20, 10, 10),
    sequences_per_step=2,
    text=TextConfig(max_bytes=2_000_000),
    evaluation_sequences=4,
)


def stage(size: Size, num_steps: int, learning_rate: float) -> TextStageConfig:
    return TextStageConfig(
        num_steps=num_steps,
        sequences_per_step=size.sequences_per_step,
        token_budget=size.sequences_per_step * size.length,
        checkpoint_every_steps=50,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, schedule="cosine", warmup_steps=num_steps // 20, total_steps=num_steps
        ),
    )


def common_settings(size: Size, threads: int) -> dict[str, Any]:
    """What both runs have in common: the text, its length, pre-training."""
    return {
        "num_threads": threads,
        "sequence_length": size.length,
        "evaluation_sequences": size.evaluation_sequences,
        "text": size.text,
        "pretrain": stage(size, size.steps[0], 3e-3),
    }


def dsa_config(size: Size, threads: int) -> SparsifyConfig:
    return SparsifyConfig(
        model=size.model,
        dsa=DSAConfig(top_k=size.length // 16, num_heads=4, head_dim=32, rope_dim=16),
        warmup=stage(size, size.steps[1], 3e-3),
        sparse=stage(size, size.steps[2], 3e-4),
        control=True,
        **common_settings(size, threads),
    )


def nsa_config(size: Size, threads: int) -> PretrainTextConfig:
    model = msgspec.structs.replace(size.model, attention="nsa", nsa=size.nsa)
    return PretrainTextConfig(model=model, **common_settings(size, threads))


def run_arm(recipe: Any, config: Any, directory: Path, console: Console) -> Run:
    """Run what is left of it; of an arm that is finished nothing is done again."""
    name, last = recipe.__name__.rpartition(".")[2], "control" if recipe is sparsify else pretrain_text.STAGE
    with Run.open(directory, config, recipe.seeds(config), ["benchmarks/sparse_quality.py"], recipe=name) as run:
        if not run.metrics(f"{HELD_OUT}{last}"):
            recipe.main(config, run, RichProgress(console))
    return Run.read(directory)


def rows(dsa: Run, nsa: Run, size: Size) -> list[list[str]]:
    """One a model, against the dense model that saw as many tokens."""
    found = {label: dsa.metrics(f"{HELD_OUT}{label}")[0] for label in ("dense", "warmup", "sparse", "control")}
    (native,) = nsa.metrics(f"{HELD_OUT}{pretrain_text.STAGE}")
    dense_size, indexed_size, native_size = num_parameters(size)
    return [
        row("full attention", dense_size, found["dense"], None),
        row("NSA from scratch", native_size, native, found["dense"]),
        row("full attention, indexers warmed up", indexed_size, found["warmup"], found["dense"]),
        row("full attention, trained on", dense_size, found["control"], None),
        row("DSA", indexed_size, found["sparse"], found["control"]),
    ]


def row(name: str, parameters: int, figures: dict[str, Any], against: dict[str, Any] | None) -> list[str]:
    def shown(key: str, form: str) -> str:
        return form.format(figures[key]) if key in figures else "–"

    recalls = by_number(figures, "held_out/recall/")
    return [
        name,
        f"{parameters / 1e6:.2f}",
        f"{loss_of(figures):.4f}",
        "–" if against is None else f"{100 * gap(figures, against):+.2f}",
        shown("held_out/kl_over_uniform", "{:.2f}"),
        shown("held_out/recall", "{:.1%}"),
        " ".join(f"{100 * share:.0f}" for share in recalls) or "–",
    ]


def by_number(figures: dict[str, Any], prefix: str) -> list[float]:
    """The figures that end in a number behind `prefix`, by that number."""
    names = [name for name in figures if name.startswith(prefix)]
    return [figures[name] for name in sorted(names, key=lambda name: int(name.removeprefix(prefix)))]


def loss_of(figures: dict[str, Any]) -> float:
    return float(figures["held_out/cross_entropy"])


def gap(figures: dict[str, Any], against: dict[str, Any]) -> float:
    """Relative to the loss of `against`; positive is worse."""
    return loss_of(figures) / loss_of(against) - 1.0


def gates(dsa: Run, nsa: Run) -> list[str]:
    """One line a gate, with what was found."""
    sparse, control, dense = (dsa.metrics(f"{HELD_OUT}{label}")[0] for label in ("sparse", "control", "dense"))
    (native,) = nsa.metrics(f"{HELD_OUT}{pretrain_text.STAGE}")
    of_dsa, of_nsa = gap(sparse, control), gap(native, dense)
    return [
        f"- DSA within {DENSE_GATE:.0%} of the loss of full attention at equal tokens: {of_dsa:+.2%}, "
        f"{'held' if of_dsa <= DENSE_GATE else 'missed'}.",
        "- NSA from scratch no worse than full attention at equal tokens: "
        f"{of_nsa:+.2%}, {'held' if of_nsa <= 0.0 else 'missed'}.",
    ]


def num_parameters(size: Size) -> tuple[int, int, int]:
    """Dense, with indexers, NSA."""
    with torch.device("meta"):
        dense = Decoder(size.model)
        native = Decoder(nsa_config(size, 1).model)
        indexed = with_indexers(Decoder(size.model), dsa_config(size, 1).dsa, torch.Generator())
    return dense.num_parameters, indexed.num_parameters, native.num_parameters


def conditions(dsa: Run, nsa: Run, size: Size, threads: int) -> str:
    """One line on what was trained, for how long, and where."""
    stages = {name: dsa.metrics(name) for name in ("pretrain", "warmup", "sparse", "control")}
    stages["nsa"] = nsa.metrics(pretrain_text.STAGE)
    parts = [
        f"{name} {sum(row['num_tokens'] for row in lines) / 1e6:.2f}M tokens in {minutes(lines):.1f} min"
        for name, lines in stages.items()
    ]
    return (
        f"Sequences of {size.length:,} tokens, k = {size.length // 16}; loss in nats a token on "
        f"{size.evaluation_sequences} held-out sequences; gap to the full attention above it, at equal tokens; recall "
        f"over the queries that see more than k keys, by layer in %. {'; '.join(parts)}. float32, {threads} threads an "
        f"arm; {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; torch {version('torch')}."
    )


def minutes(lines: Sequence[dict[str, Any]]) -> float:
    return float(sum(line["seconds"] for line in lines)) / 60


HEAD = ("model", "M parameters", "loss", "gap %", "KL/uniform", "recall", "recall by layer")


def main() -> None:
    parser = argparse.ArgumentParser(description="What sparse attention costs in quality.")
    parser.add_argument("--small", action="store_true", help="a smoke check of two minutes; its figures mean nothing")
    parser.add_argument("--out", type=Path, help="of the run directories (default: runs/sparse_quality[_small])")
    parser.add_argument("--arm", choices=("dsa", "nsa"), help="train this one alone, without a table")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each arm (default: %(default)s)")
    chosen = parser.parse_args()
    size = SMALL if chosen.small else FULL
    out = chosen.out or Path("runs") / ("sparse_quality_small" if chosen.small else "sparse_quality")
    console = Console(stderr=True)
    arms = {
        "dsa": (sparsify, dsa_config(size, chosen.threads), out / "dsa"),
        "nsa": (pretrain_text, nsa_config(size, chosen.threads), out / "nsa"),
    }
    if chosen.arm:
        run_arm(*arms[chosen.arm], console)
        return
    dsa, nsa = (run_arm(*arm, console) for arm in arms.values())
    print(markdown_table(HEAD, rows(dsa, nsa, size)))
    print(f"\n{conditions(dsa, nsa, size, chosen.threads)}\n")
    print("\n".join(gates(dsa, nsa)))


if __name__ == "__main__":
    main()
