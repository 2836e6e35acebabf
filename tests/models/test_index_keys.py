"""The cache's formats for index keys: what they hold, and that nothing is lost where the model rounds as they do."""

from __future__ import annotations

from array import array

import msgspec
import pytest
import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models import index_keys as index_keys_module
from rorqual.models.cache import cached_layout
from rorqual.models.config import DSAConfig, ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.models.index_keys import DTYPES, index_column, pack_index_keys, unpack_index_keys
from rorqual.ops import dsa
from rorqual.records import GenerateRequest, SamplingParams

TOP_K = 5


def decoder(fp8: bool) -> Decoder:
    config = ModelConfig(
        family="qwen3",
        vocab_size=31,
        hidden_size=32,
        intermediate_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        context_window=64,
        attention="dsa",
        dsa=DSAConfig(top_k=TOP_K, num_heads=3, head_dim=16, rope_dim=4, fp8=fp8),
        initializer_range=0.3,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(3))
    return model.eval()


def decode(model: Decoder, index_keys: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and selections of 20 tokens, one a step."""
    cache, found = model.new_cache(1, 20, index_keys), []
    ids = torch.randint(31, (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for step in range(20):
            output = model.forward_cached(ids[None, step : step + 1], cache, cached_layout(range(1), [step], 1, cache))
            selected = output.selections[0]
            padded = torch.nn.functional.pad(selected, (0, TOP_K - selected.shape[-1]), value=-1)
            found.append((output.hidden[0, 0], padded))
    hidden, selected = zip(*found, strict=True)
    return torch.stack(hidden), torch.stack(selected)


def test_a_key_of_the_release_takes_132_bytes() -> None:
    column = index_column(128, "fp8")
    assert column.width * column.dtype.itemsize == 132


@pytest.mark.parametrize("index_keys", DTYPES)
def test_what_is_read_is_what_was_written_but_for_rounding(index_keys: str) -> None:
    keys = torch.randn(3, 7, 16) * torch.logspace(-6, 6, 7)[:, None]
    dtype = index_column(16, index_keys).dtype or torch.float32
    expected = dsa.fp8_round(keys) if index_keys == "fp8" else keys.to(dtype)
    stored = pack_index_keys(keys, dtype)
    assert stored.shape[-1] == index_column(16, index_keys).width
    assert torch.equal(unpack_index_keys(stored), expected)


@pytest.mark.parametrize("num_keys", [1, 20_000])
def test_the_compiled_form_reads_every_byte_as_torch_does(num_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randint(256, (2, num_keys, 16 + 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stored[..., 16:] = torch.rand(2, num_keys, 1).exp2().view(torch.uint8)
    found = unpack_index_keys(stored)
    monkeypatch.setattr(index_keys_module, "available", lambda: False)
    assert torch.equal(found.nan_to_num(nan=-1.0), unpack_index_keys(stored).nan_to_num(nan=-1.0))


def test_fp8_loses_nothing_of_a_model_that_rounds_its_keys() -> None:
    model = decoder(fp8=True)
    for found, expected in zip(decode(model, "fp8"), decode(model, "model"), strict=True):
        assert torch.equal(found, expected)


def test_rounded_keys_select_for_a_model_that_does_not_round() -> None:
    """Most selections stay; the first layer's are those of rounded keys."""
    model = decoder(fp8=False)
    (hidden, selected), (_, exact) = decode(model, "fp8"), decode(model, "model")
    assert torch.isfinite(hidden).all()
    assert (selected == exact).float().mean() > 0.8
    assert not torch.equal(selected, exact)


def test_the_engine_keeps_its_index_keys_as_it_is_told() -> None:
    model = decoder(fp8=True)
    prompt = array("i", [1, 2, 3, 4, 5, 6, 7])
    request = GenerateRequest(request_id="a", prompt_ids=prompt, params=SamplingParams(max_new_tokens=9, seed=1))
    engines = [LocalEngine(model, EngineConfig(num_slots=2, index_keys=each)) for each in ("fp8", "model")]
    found, expected = (engine.generate([request])[0] for engine in engines)
    assert found.token_ids == expected.token_ids
    sizes = [engine.table.cache.columns[0][-1].element_size() for engine in engines]
    assert sizes == [1, 4]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="index_keys = 'int4'; expected one of model, float32, bfloat16, fp8"):
        index_column(8, "int4")
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"index_keys": "int4"}, EngineConfig)
