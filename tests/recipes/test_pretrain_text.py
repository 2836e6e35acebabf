"""Pre-training on text with each attention: learned, measured, interrupted and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from rorqual.cli.policies import load_policy
from rorqual.models.config import DSAConfig, ModelConfig, NSAConfig
from rorqual.recipes import pretrain_text, sparsify, stage
from rorqual.recipes.pretrain_text import PretrainTextConfig
from rorqual.recipes.progress import SilentProgress
from rorqual.recipes.sparsify import SparsifyConfig
from rorqual.recipes.text_stage import TextStageConfig
from rorqual.store.run import Run
from rorqual.text.corpus import TextConfig
from rorqual.text.needle import NeedleConfig
from rorqual.train.optim import OptimizerConfig

DENSE = ModelConfig(
    family="llama",
    vocab_size=320,
    hidden_size=24,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_window=64,
    initializer_range=0.1,
)
BLOCKS = NSAConfig(
    block_length=4, block_stride=2, selected_length=4, num_selected=4, num_local=1, window=6, compressor_size=8
)
NATIVE = msgspec.structs.replace(DENSE, attention="nsa", nsa=BLOCKS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        lines = [f"value_{i} = {i * number} + {i % 7}  # sum {number}" for i in range(40)]
        (folder / f"part{number}.py").write_text("\n".join(lines))
    return folder


def settings(texts: Path) -> dict[str, Any]:
    return {
        "num_threads": 1,
        "text": TextConfig(paths=(str(texts),), held_out_share=0.3),
        "sequence_length": 48,
        "evaluation_sequences": 4,
        "needle": NeedleConfig(share=0.5, value_tokens=2, documents_per_depth=2),
        "pretrain": TextStageConfig(
            num_steps=6,
            sequences_per_step=2,
            token_budget=50,
            checkpoint_every_steps=2,
            optimizer=OptimizerConfig(learning_rate=3e-3),
        ),
    }


def run_recipe(directory: Path, config: PretrainTextConfig) -> Run:
    with Run.open(directory, config, pretrain_text.seeds(config), ["test"], recipe="pretrain_text") as run:
        pretrain_text.main(config, run, SilentProgress())
    return Run.read(directory)


def weights(run: Run) -> bytes:
    checkpoint = run.latest_checkpoint("pretrain")
    assert checkpoint is not None
    return (Path(checkpoint.path) / "model.safetensors").read_bytes()


def figures(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics()]


@pytest.mark.parametrize("model", (DENSE, NATIVE), ids=("dense", "nsa"))
def test_it_learns_is_measured_and_goes_on_where_it_was_stopped(
    model: ModelConfig, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainTextConfig(model=model, **settings(texts))
    pretrain_text.check(config)
    finished = run_recipe(tmp_path / "finished", config)
    losses = [row["loss"] for row in finished.metrics("pretrain")]
    (held_out,) = finished.metrics("held_out_pretrain")
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert held_out["held_out/cross_entropy"] < 6.0 and 0.0 <= held_out["needle/accuracy"] <= 1.0
    assert not (finished.path / "selection_maps").exists()

    calls, step = 0, stage.train_step

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "train_step", interrupted)
        run_recipe(tmp_path / "stopped", config)
    resumed = run_recipe(tmp_path / "stopped", config)
    assert weights(resumed) == weights(finished) and figures(resumed) == figures(finished)
    policy = load_policy(tmp_path / "finished", None, template=False, device="cpu")
    assert policy.model.config == model and policy.label == "finished/pretrain@6"


def test_it_is_the_first_stage_of_sparsify(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, so that a dense base there is the control of another attention here."""
    alone = run_recipe(tmp_path / "alone", PretrainTextConfig(model=DENSE, **settings(texts)))
    short = msgspec.structs.replace(settings(texts)["pretrain"], num_steps=1)
    config = SparsifyConfig(
        model=DENSE,
        dsa=DSAConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=4),
        warmup=short,
        sparse=short,
        **settings(texts),
    )
    with Run.open(tmp_path / "sparse", config, sparsify.seeds(config), ["test"], recipe="sparsify") as run:
        sparsify.main(config, run, SilentProgress())
        assert weights(run) == weights(alone)
        (dense,), (own,) = run.metrics("held_out_dense"), alone.metrics("held_out_pretrain")
        assert {**dense, "stage": ""} == {**own, "stage": ""}


def test_settings_that_do_not_fit(texts: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length = 65 exceeds the model's window of 64"):
        PretrainTextConfig(model=DENSE, **{**settings(texts), "sequence_length": 65})
    indexed = msgspec.structs.replace(DENSE, dsa=DSAConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=4))
    with pytest.raises(ValueError, match="does not train indexers"):
        PretrainTextConfig(model=indexed, **settings(texts))
