"""Attention over selected keys, in the model: against `transformers`, against dense attention, packed and cached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.models.cache import cached_layout
from rorqual.models.checkpoints import load_checkpoint, save_checkpoint
from rorqual.models.config import DSAConfig
from rorqual.models.decoder import Decoder
from rorqual.models.layout import TokenRun, causal_layout, layout_from_runs
from rorqual.ops import dsa

KINDS = ("gqa+dsa", "mla+dsa")
TOP_K = 5


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed))


def with_attention(decoder: Decoder, attention: str, **dsa_changes: Any) -> Decoder:
    """The same weights under another attention."""
    settings = msgspec.structs.replace(decoder.config.dsa, **dsa_changes)
    other = Decoder(msgspec.structs.replace(decoder.config, attention=attention, dsa=settings)).double().eval()
    other.load_state_dict(decoder.state_dict())
    return other


# ------------------------------------------------------------------------------------------------------- transformers


class Watched:
    """The indexers of a reference model: what they selected in its last call, and among which scores."""

    def __init__(self, reference: Any, top_k: int) -> None:
        self.selections: list[Tensor] = []
        self.indexers = [layer.self_attn.indexer for layer in reference.model.layers if layer.self_attn.indexer]
        for indexer in self.indexers:
            indexer.index_topk = top_k
            indexer.register_forward_hook(lambda module, inputs, output: self.selections.append(output[0].long()))

    def visible(self) -> list[Tensor]:
        """Each layer's selection as ours: ascending, without the picks from the future that early tokens make."""
        found = []
        for selected_TS in self.selections:
            future_TS = selected_TS > torch.arange(len(selected_TS))[:, None]
            ordered_TS = selected_TS.masked_fill(future_TS, 1 << 30).sort(dim=-1).values
            found.append(ordered_TS.masked_fill(ordered_TS == 1 << 30, -1))
        return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ("deepseek_v32", "glm_moe_dsa"))
def test_selections_and_logits_are_those_of_transformers(
    reference_model: Callable, family: str, seed: int, tmp_path: Path
) -> None:
    """Given the reference's selection, the logits are equal; left alone, each layer selects equally good keys."""
    reference = reference_model(family, seed, index_topk=TOP_K)
    reference.save_pretrained(tmp_path)
    decoder, token_ids_T = load_checkpoint(tmp_path), random_ids(40, seed)
    assert decoder.config.attention == "dsa"
    watched = Watched(reference, TOP_K)
    scores: list[Tensor] = []
    with torch.no_grad():
        expected_TV = reference(token_ids_T[None]).logits[0]
        theirs_TLS = torch.stack(watched.visible(), dim=1)
        free = decoder(token_ids_T, causal_layout([40]))
        forced = decoder(token_ids_T, causal_layout([40]), selections_TLS=theirs_TLS)
        decoder.kernels = "tiled"  # They select by `dsa.select`, which is shown the scores.
        spy = pytest.MonkeyPatch()
        with spy.context() as patch:
            patch.setattr(dsa, "select", recording(dsa.select, scores))
            decoder(token_ids_T, causal_layout([40]))
    assert len(watched.selections) == len(decoder.config.indexer_layers) == theirs_TLS.shape[1]
    error = (decoder.logits(forced.hidden) - expected_TV).abs().max() / expected_TV.abs().max()
    assert error < 1e-5
    # The first layer reads the same hidden states as the reference's, so its scores can be compared.
    assert_equally_good(scores[0][0], free.selections[:, 0], theirs_TLS[:, 0])
    assert torch.equal(forced.selections, theirs_TLS)


def recording(function: Callable, scores: list[Tensor]) -> Callable:
    def select(scores_RQK: Tensor, visible_RQK: Tensor, top_k: int) -> Tensor:
        scores.append(scores_RQK)
        return function(scores_RQK, visible_RQK, top_k)

    return select


def assert_equally_good(scores_TT: Tensor, ours_TS: Tensor, theirs_TS: Tensor) -> None:
    """The selected scores, in order, are equal: two sets may differ where scores are."""
    for query in range(len(scores_TT)):
        sets = [selected[query][selected[query] >= 0] for selected in (ours_TS, theirs_TS)]
        assert len(sets[0]) == len(sets[1]) == min(query + 1, TOP_K)
        best, found = (scores_TT[query, each].sort().values for each in sets)
        torch.testing.assert_close(best, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ("dsa", "dense"))
def test_round_trip_through_a_checkpoint(
    tiny_decoder: Callable[..., Decoder], kind: str, attention: str, tmp_path: Path
) -> None:
    options = {"interleaved": True, "hadamard": True, "fp8": True, "k_norm_eps": 1e-5}
    decoder = with_attention(tiny_decoder(kind), attention, **options).float()
    save_checkpoint(decoder, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.config == decoder.config
    ids, layout = random_ids(12), causal_layout([12])
    with torch.no_grad():
        assert torch.equal(again(ids, layout).hidden, decoder(ids, layout).hidden)


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_k_keys_it_is_dense_attention(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Bit for bit where no sequence is longer; else the first k tokens to float64 precision, and the later ones not."""
    sparse = tiny_decoder(kind)
    dense = with_attention(sparse, "dense")
    with torch.no_grad():
        short = [each(random_ids(9), causal_layout([TOP_K, 4])).hidden for each in (sparse, dense)]
        long = [each(random_ids(12), causal_layout([12])).hidden for each in (sparse, dense)]
        all_selected = with_attention(sparse, "dsa", top_k=12)(random_ids(12), causal_layout([12])).hidden
    assert torch.equal(*short)
    assert torch.equal(all_selected, long[1])
    torch.testing.assert_close(long[0][:TOP_K], long[1][:TOP_K], rtol=1e-10, atol=1e-10)
    assert (long[0][TOP_K:] - long[1][TOP_K:]).abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Sequences beside each other, and completions behind a prompt that is packed once, of unlike lengths."""
    decoder = tiny_decoder(kind)
    with torch.no_grad():
        lengths = [3, 17, 11, 12]
        ids = random_ids(sum(lengths))
        packed = decoder(ids, causal_layout(lengths))
        for part, hidden in zip(ids.split(lengths), packed.hidden.split(lengths), strict=True):
            alone = decoder(part, causal_layout([len(part)])).hidden
            torch.testing.assert_close(hidden, alone, rtol=1e-10, atol=1e-10)

        runs = [TokenRun(0, 6), TokenRun(6, 4, 0, 6), TokenRun(10, 7, 0, 6), TokenRun(17, 9), TokenRun(26, 5, 17, 9)]
        shared_ids = random_ids(31, 1)
        shared = decoder(shared_ids, layout_from_runs(runs, padding_limit=3.0))
        for run in runs:
            prompt = shared_ids[run.prefix_start : run.prefix_start + run.prefix_length]
            whole = torch.cat([prompt, shared_ids[run.start : run.start + run.length]])
            alone = decoder(whole, causal_layout([len(whole)]))
            place = slice(run.start, run.start + run.length)
            torch.testing.assert_close(shared.hidden[place], alone.hidden[len(prompt) :], rtol=1e-10, atol=1e-10)
            expected = alone.selections[len(prompt) :]
            assert torch.equal(shared.selections[place][..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("chunks", ((1,), (12,), (4, 1, 3, 1)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_packed(tiny_decoder: Callable[..., Decoder], kind: str, chunks: tuple[int, ...]) -> None:
    """Rows of unlike length, in slots that hold rubbish; hidden states and selections."""
    decoder, lengths = tiny_decoder(kind), (12, 7, 10)
    sequences = [random_ids(length, length) for length in lengths]
    padded_RT = torch.stack([F.pad(ids, (0, 24 - len(ids))) for ids in sequences])
    with torch.no_grad():
        expected = [decoder(ids, causal_layout([len(ids)])) for ids in sequences]
        cache = decoder.new_cache(num_slots=5, capacity=24)
        for columns in cache.columns:
            for column in columns:
                column.fill_(7.0)
        fed, step = [0, 0, 0], 0
        while any(done < length for done, length in zip(fed, lengths, strict=True)):
            width = chunks[min(step, len(chunks) - 1)]
            rows_RQ = torch.stack([padded_RT[row, done : done + width] for row, done in enumerate(fed)])
            output = decoder.forward_cached(rows_RQ, cache, cached_layout([3, 0, 2], fed, width, cache))
            for row, (ids, whole) in enumerate(zip(sequences, expected, strict=True)):
                real = slice(fed[row], min(fed[row] + width, len(ids)))
                count = max(0, real.stop - real.start)
                torch.testing.assert_close(output.hidden[row, :count], whole.hidden[real], rtol=1e-9, atol=1e-9)
                ours = output.selections.unflatten(0, (3, width))[row, :count].sort(dim=-1, descending=True).values
                theirs = whole.selections[real].sort(dim=-1, descending=True).values
                shortest = min(ours.shape[-1], theirs.shape[-1])
                assert torch.equal(ours[..., :shortest], theirs[..., :shortest])
                assert (ours[..., shortest:] == -1).all() and (theirs[..., shortest:] == -1).all()
                fed[row] = min(fed[row] + width, len(ids))
            step += 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_selection_is_used(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    """Replay repeats the bits; another selection changes the output; one of another shape is refused."""
    decoder, ids, layout = tiny_decoder(kind), random_ids(20), causal_layout([8, 12])
    with torch.no_grad():
        free = decoder(ids, layout)
        assert free.selections.shape == (20, len(decoder.config.indexer_layers), TOP_K)
        again = decoder(ids, layout, selections_TLS=free.selections)
        assert torch.equal(again.hidden, free.hidden) and torch.equal(again.selections, free.selections)
        latest = torch.arange(20).where(torch.arange(20) < 8, torch.arange(20) - 8)
        own = (latest[:, None] - torch.arange(TOP_K).flip(0)).clamp(min=-1)[:, None].expand_as(free.selections)
        assert not torch.allclose(decoder(ids, layout, selections_TLS=own).hidden, free.hidden)
    layers = len(decoder.config.indexer_layers)
    for shape, dtype in (((20, 7, 5), torch.int64), ((20, layers, 4), torch.int64), ((20, layers, 5), torch.float32)):
        with pytest.raises(ValueError, match=r"recorded selections are \[20, .*sample anew"):
            decoder(ids, layout, selections_TLS=torch.zeros(shape, dtype=dtype))


def test_a_shared_layer_takes_the_selection_below(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder("mla+dsa")
    names = [name for name, _ in decoder.named_parameters() if ".indexer." in name]
    assert {int(name.split(".")[1]) for name in names} == {0, 1} and len(names) == 10
    assert [len(columns) for columns in decoder.new_cache(1, 4).columns] == [2, 2, 1]


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("attention", ("dense", "dsa"))
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_moves_its_own_parameters(tiny_decoder: Callable[..., Decoder], kind: str, attention: str) -> None:
    """The language model's loss gives the indexers no gradient, the indexers' loss gives the model none."""
    decoder, ids, layout = with_attention(tiny_decoder(kind), attention), random_ids(20), causal_layout([8, 12])
    weight_T = torch.full((20,), 1 / 20, dtype=torch.float64)
    output = decoder(ids, layout, indexer_weight_T=weight_T)
    assert len(output.indexer_losses) == len(decoder.config.indexer_layers)
    parameters = dict(decoder.named_parameters())
    indexers = {name for name in parameters if ".indexer." in name}
    sum(loss.total for loss in output.indexer_losses).backward(retain_graph=True)
    assert {name for name, each in parameters.items() if each.grad is not None and each.grad.any()} == indexers
    decoder.zero_grad()
    output.hidden.square().sum().backward()
    touched = {name for name, each in parameters.items() if each.grad is not None and each.grad.any()}
    assert touched and not touched & indexers
    for loss in output.indexer_losses:
        torch.testing.assert_close((loss.kl_T * weight_T).sum(), loss.total)
        assert (loss.kl_T > -1e-12).all() and (loss.uniform_T > -1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ("dense", "dsa"))
def test_losses_do_not_depend_on_packing(tiny_decoder: Callable[..., Decoder], kind: str, attention: str) -> None:
    decoder = with_attention(tiny_decoder(kind), attention)
    lengths = [3, 17, 11, 12]
    ids = random_ids(sum(lengths))
    weight_T = torch.rand(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    packed = decoder(ids, causal_layout(lengths), indexer_weight_T=weight_T).indexer_losses
    alone = [
        decoder(part, causal_layout([len(part)]), indexer_weight_T=weight).indexer_losses
        for part, weight in zip(ids.split(lengths), weight_T.split(lengths), strict=True)
    ]
    for layer, loss in enumerate(packed):
        torch.testing.assert_close(loss.total, sum(each[layer].total for each in alone))
        torch.testing.assert_close(loss.kl_T, torch.cat([each[layer].kl_T for each in alone]))
        torch.testing.assert_close(loss.uniform_T, torch.cat([each[layer].uniform_T for each in alone]))


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_nothing(tiny_decoder: Callable[..., Decoder], kind: str) -> None:
    ids, layout = random_ids(20), causal_layout([8, 12])
    weight_T = torch.full((20,), 0.05, dtype=torch.float64)
    gradients = []
    for checkpointed in (False, True):
        decoder = tiny_decoder(kind).train()
        decoder.checkpoint_activations = checkpointed
        output = decoder(ids, layout, indexer_weight_T=weight_T)
        (output.hidden.square().sum() + sum(loss.total for loss in output.indexer_losses)).backward()
        gradients.append({name: each.grad for name, each in decoder.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_options_of_the_indexer(tiny_decoder: Callable[..., Decoder]) -> None:
    """The Hadamard turn keeps every score; FP8 moves them a little; pairing, rotary size and weights matter."""
    decoder, ids, layout = tiny_decoder("gqa+dsa"), random_ids(30), causal_layout([30])

    def kl(**changes: Any) -> Tensor:
        other = with_attention(decoder, "dense", **changes)
        losses = other(ids, layout, indexer_weight_T=torch.ones(30, dtype=torch.float64)).indexer_losses
        return torch.stack([loss.total.detach() for loss in losses])

    plain = kl()
    torch.testing.assert_close(kl(hadamard=True), plain)
    for changes in ({"fp8": True}, {"fp8": True, "hadamard": True}):
        assert 0 < ((kl(**changes) - plain).abs() / plain).max() < 0.05
    for changes in ({"interleaved": True}, {"rope_dim": 8}, {"rope_dim": 0}):
        assert ((kl(**changes) - plain).abs() / plain).max() > 1e-4


def test_default_sizes_are_those_of_deepseek() -> None:
    assert DSAConfig() == DSAConfig(top_k=2048, num_heads=64, head_dim=128, rope_dim=64, interleaved=False)


def test_head_weights_are_float32_in_a_bfloat16_model(tiny_decoder: Callable[..., Decoder]) -> None:
    indexer = tiny_decoder("gqa+dsa").layers[0].self_attn.indexer.bfloat16()
    indexer.weights_proj.float()
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = tiny_decoder("gqa+dsa").rotations(torch.arange(6), torch.bfloat16).index
    weight = indexer(x, x, rotation).weight
    assert weight.dtype == torch.float32
    expected = x.float() @ indexer.weights_proj.weight.T * 3**-0.5 * 8**-0.5
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
