"""Every shipped config loads, and the one for a real checkpoint runs on random weights of its architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from rorqual.config import load_config, read_recipe_name
from rorqual.models import decoder
from rorqual.recipes import r1_zero
from rorqual.recipes.catalog import RECIPES
from rorqual.recipes.progress import SilentProgress
from rorqual.store.run import Run
from rorqual.text.tokenizer import train_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs"

SMALL = [
    "device=cpu",
    "num_threads=1",
    "grpo.num_steps=1",
    "grpo.tasks_per_step=3",
    "grpo.group_size=4",
    "grpo.sampling.max_new_tokens=8",
    "grpo.engine.num_slots=8",
    "evaluation.num_problems=1",
    "evaluation.protocol.num_samples=4",
    "evaluation.protocol.pass_at=[1]",
    "evaluation.protocol.sampling.max_new_tokens=8",
    "evaluation.engine.num_slots=8",
    "rewards.2.options={ soft_limit = 4, hard_limit = 8 }",
]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_loads(path: Path) -> None:
    recipe = RECIPES[read_recipe_name(path)]
    config = load_config(path, recipe.Config)
    assert recipe.seeds(config)["run"] == config.seed


def random_qwen3(directory: Path, **sizes: int) -> None:
    """A Qwen3 checkpoint with random weights, and a tokenizer whose end token is Qwen's."""
    texts = ["User: what is 4 + 3? Assistant: <think> 4 + 3 = 7 </think> <answer>7</answer>"] * 20
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save(directory)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(vocab_size=tokenizer.vocab_size, tie_word_embeddings=True, **sizes)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def test_the_config_for_a_real_checkpoint_runs_on_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointed: list[bool] = []
    run_checkpointed = decoder._checkpointed
    monkeypatch.setattr(decoder, "_checkpointed", lambda *each: checkpointed.append(True) or run_checkpointed(*each))
    random_qwen3(
        tmp_path / "checkpoint",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )
    config = load_config(
        CONFIGS / "r1_zero" / "qwen3_0p6b.toml", r1_zero.Config, [*SMALL, f"checkpoint={tmp_path / 'checkpoint'}"]
    )
    with Run.open(tmp_path / "run", config, r1_zero.seeds(config)) as run:
        r1_zero.main(config, run, SilentProgress())
        assert run.metrics("rl")[0]["policy/mismatch/max"] < 1e-3
        assert checkpointed, "the config asks for checkpointed activations"
        assert list(run.eval_summaries()) == ["base-greedy", "base-r1", "rl-greedy", "rl-r1"]
