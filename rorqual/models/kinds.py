"""Which attention a config asks for, and what each kind keeps of a token in the cache."""

from __future__ import annotations

from rorqual.models.attention import GroupedQueryAttention, MultiHeadLatentAttention
from rorqual.models.cache import Column
from rorqual.models.config import ModelConfig
from rorqual.models.index_keys import IndexKeys, index_column
from rorqual.models.nsa import NUM_COLUMNS, NativeSparseAttention
from rorqual.models.sparse import SparseGroupedQueryAttention, SparseLatentAttention

Attention = GroupedQueryAttention | MultiHeadLatentAttention | NativeSparseAttention


def build_attention(config: ModelConfig, layer: int) -> Attention:
    """The attention of one layer: grouped-query or latent (`config.mla`), with an indexer (`config.dsa`) or without; or
    native sparse attention (`config.nsa`)."""
    if config.nsa is not None:
        return NativeSparseAttention(config)
    if config.dsa is not None:
        return SparseLatentAttention(config, layer) if config.mla else SparseGroupedQueryAttention(config, layer)
    return MultiHeadLatentAttention(config) if config.mla else GroupedQueryAttention(config)


def cache_columns(config: ModelConfig, layer: int, index_keys: IndexKeys = "model") -> tuple[Column, ...]:
    """What a token leaves in the cache: keys and values (three times, and once more compressed, under native sparse
    attention), or latent and rotated key together; then the index key of a layer that has an indexer."""
    if config.mla is not None:
        main: tuple[Column, ...] = (Column(config.mla.kv_lora_rank + config.mla.qk_rope_head_dim),)
    else:
        main = (Column(config.num_kv_heads * config.head_dim),) * (2 if config.nsa is None else NUM_COLUMNS)
    if config.dsa is None or layer not in config.indexer_layers:
        return main
    return (*main, index_column(config.dsa.head_dim, index_keys))
