"""A model under another attention: a dense one with indexers added, and one whose indexers begin to select.

Nothing is copied: the parameters of the result are those of the given model.
"""

from __future__ import annotations

import msgspec
import torch

from rorqual.models.config import DSAConfig, ModelConfig
from rorqual.models.decoder import Decoder


def with_indexers(model: Decoder, dsa: DSAConfig, generator: torch.Generator) -> Decoder:
    """A dense model with an untrained indexer beside the attention of each layer; it computes what it did before.

    DeepSeek-V3 becomes a DeepSeek-V3.2. The indexers' matrices are drawn as the model's own were
    (`initializer_range`), from `generator`.
    Raises: ValueError for a model that has indexers, or MLA whose rotary dimension is not the indexer's.
    """
    old = model.config
    if old.dsa is not None:
        raise ValueError("The model has indexers already; there is nothing to add.")
    if old.mla is not None and dsa.rope_dim != old.mla.qk_rope_head_dim:
        raise ValueError(
            f"dsa.rope_dim = {dsa.rope_dim}, and the latent attention turns {old.mla.qk_rope_head_dim} dimensions: "
            "other software takes one number for both. Set them equal."
        )
    family = "deepseek_v32" if old.family == "deepseek_v3" else old.family
    config = msgspec.structs.replace(old, family=family, attention="dense", dsa=dsa)
    fresh = Decoder(config)
    fresh.initialize(generator)
    weight = model.embed_tokens.weight
    return _with_parameters(fresh.to(weight.device, weight.dtype), model)


def with_attention(model: Decoder, attention: str) -> Decoder:
    """The model with "dense" or "dsa" attention. Raises: ValueError for "dsa" without indexers."""
    config = msgspec.convert({**msgspec.to_builtins(model.config), "attention": attention}, ModelConfig)
    with torch.device("meta"):
        other = Decoder(config)
    return _with_parameters(other, model)


def _with_parameters(target: Decoder, source: Decoder) -> Decoder:
    """`target` with the parameters and buffers of `source` where it has them."""
    own = {**dict(target.named_parameters()), **dict(target.named_buffers())}
    given = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    target.load_state_dict({name: given.get(name, own[name]) for name in target.state_dict()}, assign=True)
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(given[name].requires_grad if name in given else True)
    target.kernels = source.kernels
    return target.train(source.training)
