"""The benchmark of quality on a micro size: both arms, the table, the gates; a second call trains nothing."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from rich.console import Console

from rorqual.models.config import NSAConfig
from rorqual.recipes import pretrain_text, sparsify
from rorqual.text.corpus import TextConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("sparse_quality", FOLDER / "sparse_quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sparse_quality", module)  # Its dataclass looks itself up there.
    spec.loader.exec_module(module)
    return module


def test_both_arms_make_a_table_and_are_not_repeated(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        lines = [f"value_{i} = {i * number} + {i % 7}  # sum {number}" for i in range(80)]
        (tmp_path / f"part{number}.py").write_text("\n".join(lines))
    sizes = {"hidden_size": 24, "intermediate_size": 32, "head_dim": 16, "context_window": 128, "vocab_size": 320}
    size = benchmark.Size(
        model=msgspec.structs.replace(benchmark.SMALL.model, **sizes),
        length=128,
        nsa=NSAConfig(
            block_length=4, block_stride=2, selected_length=4, num_selected=4, num_local=1, window=8, compressor_size=8
        ),
        steps=(3, 2, 2),
        sequences_per_step=1,
        text=TextConfig(paths=(str(tmp_path),), held_out_share=0.3),
        evaluation_sequences=2,
    )
    console = Console(file=io.StringIO())
    arms = [
        (sparsify, benchmark.dsa_config(size, 1), tmp_path / "dsa"),
        (pretrain_text, benchmark.nsa_config(size, 1), tmp_path / "nsa"),
    ]
    dsa, nsa = (benchmark.run_arm(*arm, console) for arm in arms)
    table = benchmark.rows(dsa, nsa, size)
    assert [row[0] for row in table] == [
        "full attention",
        "NSA from scratch",
        "full attention, indexers warmed up",
        "full attention, trained on",
        "DSA",
    ]
    losses = {
        label: dsa.metrics(f"held_out_{label}")[0]["held_out/cross_entropy"] for label in ("dense", "control", "sparse")
    }
    native = nsa.metrics("held_out_pretrain")[0]["held_out/cross_entropy"]
    assert [table[index][2] for index in (0, 1, 3, 4)] == [
        f"{loss:.4f}" for loss in (losses["dense"], native, losses["control"], losses["sparse"])
    ]
    assert table[1][3] == f"{100 * (native / losses['dense'] - 1):+.2f}", "the base saw as many tokens"
    assert table[4][3] == f"{100 * (losses['sparse'] / losses['control'] - 1):+.2f}", "so did the control"
    assert len(table[4][6].split()) == 2
    of_dsa, of_nsa = benchmark.gates(dsa, nsa)
    assert f"{losses['sparse'] / losses['control'] - 1:+.2%}" in of_dsa and "NSA" in of_nsa
    assert benchmark.conditions(dsa, nsa, size, 1).startswith("Sequences of 128 tokens, k = 8;")
    for module in (sparsify, pretrain_text):
        monkeypatch.setattr(module, "main", lambda *given: pytest.fail("it trains again"))
    assert benchmark.rows(*(benchmark.run_arm(*arm, console) for arm in arms), size) == table
