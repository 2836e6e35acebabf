"""The sparsify recipe on a micro model: from scratch and from a checkpoint, interrupted and exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from rorqual.cli.export import export_policy
from rorqual.cli.policies import load_policy
from rorqual.models.checkpoints import load_checkpoint, save_checkpoint
from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.recipes import sparsify, stage, text_stage
from rorqual.recipes.progress import SilentProgress
from rorqual.recipes.sparsify import SparsifyConfig
from rorqual.recipes.text_stage import TextStageConfig
from rorqual.store.run import Run
from rorqual.text.corpus import Sequences, TextConfig
from rorqual.text.needle import NeedleConfig, Needles
from rorqual.text.tokenizer import train_tokenizer
from rorqual.train.optim import OptimizerConfig

STAGES = ("pretrain", "warmup", "sparse", "control")
VOCABULARY = 320


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        lines = [f"value_{i} = {i * number} + {i % 7}  # sum {number}" for i in range(40)]
        (folder / f"part{number}.py").write_text("\n".join(lines))
    return folder


def tiny_model(kind: str) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "context_window": 64,
        "initializer_range": 0.1,
    }
    if kind == "gqa":
        return ModelConfig(family="llama", **sizes)
    mla = MLAConfig(q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6)
    rope = msgspec.structs.replace(ModelConfig(family="llama", **sizes).rope, interleaved=True)
    return ModelConfig(family="deepseek_v3", mla=mla, rope=rope, **{**sizes, "num_kv_heads": 4, "head_dim": 10})


def micro(texts: Path, **changes: Any) -> SparsifyConfig:
    steps = TextStageConfig(
        num_steps=4,
        sequences_per_step=2,
        token_budget=50,
        checkpoint_every_steps=2,
        optimizer=OptimizerConfig(learning_rate=3e-3),
    )
    settings: dict[str, Any] = {
        "num_threads": 1,
        "text": TextConfig(paths=(str(texts),), held_out_share=0.3),
        "sequence_length": 48,
        "dsa": DSAConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=4),
        "pretrain": steps,
        "warmup": steps,
        "sparse": steps,
        "evaluation_sequences": 4,
        "control": True,
    }
    if not changes.get("checkpoint"):
        settings["model"] = tiny_model("mla")
    return SparsifyConfig(**{**settings, **changes})


def run_recipe(directory: Path, config: SparsifyConfig) -> None:
    with Run.open(directory, config, sparsify.seeds(config), ["test"], recipe="sparsify") as run:
        sparsify.main(config, run, SilentProgress())


def contents(directory: Path, stages: Sequence[str] = STAGES) -> dict[str, Any]:
    run = Run.read(directory)
    found: dict[str, Any] = {}
    for name in stages:
        checkpoint = run.latest_checkpoint(name)
        assert checkpoint is not None
        for file in ("model.safetensors", "optimizer.safetensors"):
            found[f"{name}/{file}"] = (Path(checkpoint.path) / file).read_bytes()
    for path in run.path.glob("selection_maps/*.json"):
        found[path.name] = path.read_bytes()
    for row in run.metrics():
        found[f"{row['stage']}/{row['step']}"] = {key: value for key, value in row.items() if key != "seconds"}
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.fixture(scope="module")
def finished(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(directory, micro(texts))
    return directory


def test_every_stage_does_its_part(finished: Path) -> None:
    run = Run.read(finished)
    assert [name for name in run.stages() if "held_out" not in name] == list(STAGES)
    warmup, sparse = run.metrics("warmup"), run.metrics("sparse")
    assert "cross_entropy" not in warmup[0] and "indexer/kl/1" in warmup[0]
    assert sparse[0]["loss"] == pytest.approx(sparse[0]["cross_entropy"] + 2 * sparse[0]["indexer/kl"], rel=1e-5)
    held_out = {name: run.metrics(f"held_out_{name}")[0] for name in ("dense", "warmup", "sparse", "control")}
    assert held_out["warmup"]["held_out/cross_entropy"] == held_out["dense"]["held_out/cross_entropy"]
    assert held_out["sparse"]["held_out/cross_entropy"] < held_out["dense"]["held_out/cross_entropy"]
    for name in ("warmup", "sparse"):
        assert 0.0 < held_out[name]["held_out/recall"] < 1.0
        assert held_out[name]["held_out/kl_over_uniform"] > 0.0
    assert "held_out/recall" not in held_out["control"]
    assert not any("needle" in name for row in run.metrics() for name in row)


def test_models_with_indexers_leave_a_picture_of_what_they_select(finished: Path) -> None:
    run = Run.read(finished)
    assert [run.read_selection_maps(label) is not None for label in ("dense", "warmup", "sparse", "control")] == [
        False,
        True,
        True,
        False,
    ]
    for label in ("warmup", "sparse"):
        maps = run.read_selection_maps(label)
        assert maps is not None and (maps["num_tokens"], maps["top_k"]) == (48, 6)
        assert [layer["layer"] for layer in maps["layers"]] == [0, 1]
        for layer in maps["layers"]:
            assert [sum(row) for row in layer["attention"]] == pytest.approx([1.0] * 48, abs=48 * 5e-5)
            assert [sum(row) for row in layer["selected"]] == [min(query + 1, 6) for query in range(48)]


def test_needles_are_mixed_into_every_stage_and_measured_of_every_model(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the sequences have a line and its question, with their own weight in the loss, the others are text."""
    packed: list[tuple[list[int], float]] = []
    pack, found = text_stage.pack_documents, []

    def spy(documents: Sequence[Any], token_budget: int, **settings: Any) -> Any:
        packed.extend((ids.tolist(), w[-1]) for ids, w in zip(documents, settings["weights"], strict=True))
        return pack(documents, token_budget, **settings)

    def keep(*given: Any) -> Needles:
        found.append(Needles(*given))
        return found[0]

    monkeypatch.setattr(text_stage, "pack_documents", spy)
    monkeypatch.setattr(text_stage, "Needles", keep)
    needle = NeedleConfig(share=0.5, answer_weight=7.0, documents_per_depth=3, depths=(0, 100))
    run_recipe(tmp_path / "run", micro(texts, needle=needle))
    chosen = [found[0].chosen(index) for index in (*range(24), *range(16, 24))]
    assert [weight for _, weight in packed] == [7.0 if each else 1.0 for each in chosen]
    for number in range(4):
        assert 0 < sum(chosen[8 * number : 8 * number + 8]) < 8
    assert packed[24:] == packed[16:24], "the control has the same needles"
    for label in ("dense", "warmup", "sparse", "control"):
        (figures,) = Run.read(tmp_path / "run").metrics(f"held_out_{label}")
        assert {name for name in figures if "needle" in name} == {
            "needle/accuracy",
            "needle/accuracy/0",
            "needle/accuracy/100",
        }


@pytest.mark.parametrize("killed_at", (3, 6, 7, 11, 14))
def test_interrupted_and_resumed_is_bit_equal(
    finished: Path, texts: Path, killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in any stage, in front of a checkpoint or behind it."""
    calls = 0
    step: Callable[..., Any] = stage.train_step

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "train_step", interrupted)
        run_recipe(tmp_path / "run", micro(texts))
    run_recipe(tmp_path / "run", micro(texts))
    assert differing(contents(tmp_path / "run"), contents(finished)) == []


@pytest.mark.parametrize("name", ("sequences_per_step", "token_budget", "checkpoint_every_steps"))
def test_stages_without_length_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0; expected at least 1"):
        TextStageConfig(**{"num_steps": 1, "sequences_per_step": 1, "optimizer": OptimizerConfig(), name: 0})


def test_each_stage_trains_on_other_sequences_and_the_control_on_those_of_the_sparse_stage(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    take = Sequences.__getitem__
    monkeypatch.setattr(Sequences, "__getitem__", lambda self, index: asked.append(index) or take(self, index))
    run_recipe(tmp_path / "run", micro(texts, evaluation_sequences=1))
    assert asked == [0, *range(24), *range(16, 24)]  # One held out; then 4 steps of 2 for each stage.


@pytest.mark.parametrize("kind", ("gqa", "mla"))
def test_a_dense_checkpoint_becomes_a_sparse_one(kind: str, texts: Path, tmp_path: Path) -> None:
    """Read, trained, exported; what `transformers` can read gives the same logits there where k covers all keys."""
    tokenizer = train_tokenizer([path.read_text() for path in texts.iterdir()], VOCABULARY)
    tokenizer.save(tmp_path / "dense")
    dense = Decoder(tiny_model(kind))
    dense.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(dense, tmp_path / "dense")
    config = micro(texts, checkpoint=str(tmp_path / "dense"), control=False)
    run_recipe(tmp_path / "run", config)
    assert Run.read(tmp_path / "run").stages()[-1] == "held_out_sparse"
    policy = load_policy(tmp_path / "run", None, template=False, device="cpu")
    assert policy.model.config.attention == "dsa" and policy.label.startswith("run/sparse@4")
    assert export_policy(tmp_path / "run", tmp_path / "export", None, "float32") == policy.label
    again, ids = load_checkpoint(tmp_path / "export"), torch.arange(6)
    assert again.config == policy.model.config
    if kind == "mla":
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
        layout = causal_layout([6])
        with torch.no_grad():
            found = again.logits(again(ids, layout).hidden)
            torch.testing.assert_close(reference(ids[None]).logits[0], found, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="dsa_llama"):
            transformers.AutoConfig.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "x", "model": tiny_model("mla")}, "either `model`"),
        ({"sequence_length": 1}, "expected at least 2 tokens"),
        ({"evaluation_sequences": 0}, "at least 1 sequence"),
        ({"sequence_length": 65}, "sequence_length = 65 exceeds the model's window of 64"),
    ],
)
def test_settings_that_do_not_fit(texts: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro(texts, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dsa": DSAConfig(rope_dim=2, head_dim=8)}, r"rope_dim = 2, and the latent attention turns 4"),
        ({"text": TextConfig(paths=("/nowhere",))}, r"text.paths names /nowhere, which does not exist"),
        ({"device": "cuda"}, "torch sees no GPU here"),
        ({"device": "gpu"}, "device = 'gpu' is none that torch knows"),
    ],
)
def test_what_would_stop_a_run_is_found_before(texts: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    sparsify.check(micro(texts))
    with pytest.raises(ValueError, match=message):
        sparsify.check(micro(texts, **changes))
