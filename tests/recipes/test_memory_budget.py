"""The config for Qwen3-0.6B fits one GPU with 80 GB: bytes counted from the model's own tensors, none of them real.

Shapes: T packed tokens, D hidden.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rorqual.config import load_config
from rorqual.engines.local import EngineConfig
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Block, BlockInput, Decoder
from rorqual.models.layout import causal_layout
from rorqual.recipes.r1_zero import R1ZeroConfig

GIGABYTE = 10**9
FLOAT32 = 4
QWEN3_0P6B = ModelConfig(
    family="qwen3",
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    context_window=32_768,
    tie_embeddings=True,
    qk_norm=True,
)
LEFT_FREE = 10 * GIGABYTE
"""For what is not counted: the driver, prefills and draws, and memory that the allocator cannot hand out again."""


@pytest.fixture(scope="module")
def shipped() -> R1ZeroConfig:
    return load_config(Path(__file__).parents[2] / "configs" / "r1_zero" / "qwen3_0p6b.toml", R1ZeroConfig)


@pytest.fixture(scope="module")
def weightless() -> Decoder:
    with torch.device("meta"):
        return Decoder(QWEN3_0P6B)


def cache_bytes(model: Decoder, engine: EngineConfig) -> int:
    """The cache at full length, and one column more while it grows."""
    columns = [c for layer in model.new_cache(engine.num_slots, engine.context_window).columns for c in layer]
    return sum(column.nbytes for column in columns) + max(column.nbytes for column in columns)


def block_bytes_per_token() -> int:
    """What backward through a block of the real widths keeps, measured, and the keys and values that a GPU repeats."""
    num_tokens = 32
    block = Block(QWEN3_0P6B, layer=0)
    known = {parameter.data_ptr() for parameter in block.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rotations = Decoder(_without_layers()).rotations(torch.arange(num_tokens), torch.float32)
    x_TD = torch.zeros(num_tokens, QWEN3_0P6B.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x_TD, rotations, causal_layout([num_tokens]), BlockInput())
    own_keys = 2 * QWEN3_0P6B.num_heads * QWEN3_0P6B.head_dim * FLOAT32
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // num_tokens + own_keys


def _without_layers() -> ModelConfig:
    return ModelConfig(
        **{name: getattr(QWEN3_0P6B, name) for name in QWEN3_0P6B.__struct_fields__}
        | {"num_layers": 0, "vocab_size": 8}
    )


def activation_bytes(config: R1ZeroConfig) -> int:
    """Backward's kept tensors, as much again for the gradients of one block, the mask as a bias, and the log-probs."""
    tokens, one_block = config.grpo.token_budget, block_bytes_per_token()
    block_input = QWEN3_0P6B.hidden_size * FLOAT32
    layers = QWEN3_0P6B.num_layers
    kept = layers * block_input + one_block if config.grpo.checkpoint_activations else layers * one_block
    padded, window = 1.25, config.grpo.engine.context_window
    mask = int(tokens * padded * window * padded) * (1 + FLOAT32)
    unembedding_gradient = 2 * QWEN3_0P6B.vocab_size * QWEN3_0P6B.hidden_size * FLOAT32
    return tokens * (kept + one_block + 4 * block_input) + mask + unembedding_gradient


def test_the_sizes_are_those_of_the_checkpoint(weightless: Decoder) -> None:
    assert weightless.num_parameters == 596_049_920
    per_token = sum(column.nbytes for layer in weightless.new_cache(1, 1).columns for column in layer)
    assert per_token == 28 * 8192


def test_training_fits(shipped: R1ZeroConfig, weightless: Decoder) -> None:
    """Weights, gradients, two moments, the engine's copy and the reference; the cache stays while weights move."""
    assert shipped.dtype == "float32"
    copies = 6 * weightless.num_parameters * FLOAT32
    total = copies + cache_bytes(weightless, shipped.grpo.engine) + activation_bytes(shipped)
    assert total + LEFT_FREE < 80 * GIGABYTE


def test_evaluation_fits(shipped: R1ZeroConfig, weightless: Decoder) -> None:
    """The base and the policy; the engine samples from the policy itself."""
    total = 2 * weightless.num_parameters * FLOAT32 + cache_bytes(weightless, shipped.evaluation.engine)
    assert total + LEFT_FREE < 80 * GIGABYTE
