"""ModelConfig: one typed description for every family that the decoder supports. No torch."""

from __future__ import annotations

from typing import Literal

from rorqual.records import Record

Family = Literal["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa"]


class RopeConfig(Record):
    """Rotary position embedding. `scaling` "llama3" and "yarn" use the fields below them; "linear" uses `factor` alone.

    `interleaved` pairs dimensions (0,1), (2,3), ... (DeepSeek); otherwise (0, d/2), (1, d/2+1), ... (Llama, Qwen).
    YaRN: arXiv 2309.00071; `mscale` and `mscale_all_dim` are DeepSeek's names for its attention temperature.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


class MLAConfig(Record):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). `q_lora_rank=None` projects queries directly."""

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128


class MoEConfig(Record):
    """Mixture of experts: DeepSeekMoE with a sigmoid gate (arXiv 2412.19437), or Qwen's softmax gate.

    dense_layers: indices of layers that keep a plain MLP. num_groups and groups_per_token limit the choice to the
    best groups. balance_rate: step by which the selection bias of each expert moves against its load, per optimiser
    step.
    """

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    num_shared_experts: int = 0
    num_groups: int = 1
    groups_per_token: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_weights: bool = True
    routed_scaling: float = 1.0
    dense_layers: tuple[int, ...] = ()
    balance_rate: float = 1e-3


class DSAConfig(Record):
    """DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): a lightning indexer beside each layer's
    attention, and how many keys it selects.

    top_k: keys a query attends to. num_heads and head_dim: those of the indexer. rope_dim: its rotary dimensions, which
    come first; `interleaved` says how they pair (DeepSeek-V3.2's do not, unlike those of its main attention; GLM's do).
    shared_layers: layers without an indexer, which take the selection of the layer below (IndexShare, arXiv
    2603.12201). hadamard and fp8: turn queries and keys, and round them as the release does before they are scored.
    """

    top_k: int = 2048
    num_heads: int = 64
    head_dim: int = 128
    rope_dim: int = 64
    interleaved: bool = False
    k_norm_eps: float = 1e-6
    hadamard: bool = False
    fp8: bool = False
    shared_layers: tuple[int, ...] = ()


class NSAConfig(Record):
    """Native Sparse Attention (arXiv 2502.11089, section 3); the defaults are the paper's.

    All in tokens but num_*: compressed blocks of `block_length` (l) begin every `block_stride` (d), and each becomes
    one key and one value by a perceptron with `compressor_size` hidden units. Of blocks of `selected_length` (l'),
    `num_selected` (n) are read, among them always the `num_initial` first and the `num_local` latest. `window` (w) is
    how many of the latest tokens are read beside them, the query's own included.
    """

    block_length: int = 32
    block_stride: int = 16
    selected_length: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    compressor_size: int = 256


class ModelConfig(Record):
    """A decoder-only transformer. `mla=None` is grouped-query attention; `moe=None` is dense.

    attention: "dense" attends to all keys; with `dsa` set it still carries the indexers, to be warmed up. "dsa" attends
    to what they select. "nsa" has the three branches of `nsa` instead, from the first step of training on.
    Raises: ValueError naming the field for sizes that do not fit together.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_window: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention: Literal["dense", "dsa", "nsa"] = "dense"
    dsa: DSAConfig | None = None
    nsa: NSAConfig | None = None
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.mla is None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig.num_kv_heads = {self.num_kv_heads} must divide num_heads = {self.num_heads}; "
                "each key-value head serves an equal group of query heads."
            )
        rope_dim = self.mla.qk_rope_head_dim if self.mla else self.head_dim
        if rope_dim % 2:
            raise ValueError(f"The rotary dimension is {rope_dim}; it must be even.")
        if self.moe is not None:
            _check_experts(self.moe)
        if self.attention == "dsa" and self.dsa is None:
            raise ValueError('ModelConfig.attention = "dsa" needs ModelConfig.dsa, the sizes of the indexer.')
        if self.dsa is not None:
            _check_indexer(self.dsa, self.num_layers)
        if (self.attention == "nsa") != (self.nsa is not None):
            raise ValueError('ModelConfig.attention = "nsa" and ModelConfig.nsa, the sizes of its blocks, go together.')
        if self.nsa is not None:
            _check_blocks(self.nsa)
            if self.mla is not None or self.dsa is not None:
                raise ValueError("ModelConfig.nsa has keys and values of its own and goes with neither mla nor dsa.")

    @property
    def indexer_layers(self) -> tuple[int, ...]:
        """Indices of the layers with an indexer of their own; selections are recorded in this order."""
        if self.dsa is None:
            return ()
        return tuple(i for i in range(self.num_layers) if i not in self.dsa.shared_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP is a mixture of experts; routes are recorded in this order."""
        if self.moe is None:
            return ()
        return tuple(i for i in range(self.num_layers) if i not in self.moe.dense_layers)


def _check_experts(moe: MoEConfig) -> None:
    if moe.num_experts % moe.num_groups:
        raise ValueError(f"MoEConfig.num_groups = {moe.num_groups} must divide num_experts = {moe.num_experts}.")
    reachable = moe.groups_per_token * (moe.num_experts // moe.num_groups)
    if not 1 <= moe.experts_per_token <= reachable:
        raise ValueError(
            f"MoEConfig.experts_per_token = {moe.experts_per_token} is out of range: {moe.groups_per_token} groups "
            f"hold {reachable} experts."
        )


def _check_blocks(nsa: NSAConfig) -> None:
    for name in nsa.__struct_fields__:
        least = 0 if name == "num_initial" else 1
        if getattr(nsa, name) < least:
            raise ValueError(f"NSAConfig.{name} = {getattr(nsa, name)}; expected at least {least}.")
    for name in ("block_length", "selected_length"):
        if getattr(nsa, name) % nsa.block_stride:
            raise ValueError(
                f"NSAConfig.block_stride = {nsa.block_stride} must divide {name} = {getattr(nsa, name)}: importance is "
                "counted in strides."
            )
    if nsa.num_selected < nsa.num_initial + nsa.num_local:
        raise ValueError(
            f"NSAConfig.num_selected = {nsa.num_selected} leaves no room for the num_initial = {nsa.num_initial} and "
            f"num_local = {nsa.num_local} blocks that are always read."
        )


def _check_indexer(dsa: DSAConfig, num_layers: int) -> None:
    for name in ("top_k", "num_heads", "head_dim"):
        if getattr(dsa, name) < 1:
            raise ValueError(f"DSAConfig.{name} = {getattr(dsa, name)}; expected at least 1.")
    if dsa.rope_dim % 2 or not 0 <= dsa.rope_dim <= dsa.head_dim:
        raise ValueError(
            f"DSAConfig.rope_dim = {dsa.rope_dim} must be even and at most head_dim = {dsa.head_dim}: it is the rotary "
            "part of an index head."
        )
    if dsa.hadamard and dsa.head_dim & (dsa.head_dim - 1):
        raise ValueError(f"DSAConfig.hadamard needs a head_dim that is a power of two; it is {dsa.head_dim}.")
    if 0 in dsa.shared_layers or not set(dsa.shared_layers) <= set(range(num_layers)):
        raise ValueError(
            f"DSAConfig.shared_layers = {list(dsa.shared_layers)}: layer 0 has no layer below it to take a selection "
            f"from, and the model has {num_layers} layers."
        )
