"""Native sparse attention in the model: packed, cached, trained, and what its config refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.models.cache import cached_layout
from rorqual.models.checkpoints import load_checkpoint, save_checkpoint
from rorqual.models.config import MLAConfig, NSAConfig
from rorqual.models.decoder import Decoder
from rorqual.models.layout import TokenRun, causal_layout, layout_from_runs

KIND = "gqa+nsa"


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed))


def test_packed_equals_separate(tiny_decoder: Callable[..., Decoder]) -> None:
    """Sequences beside each other, some shorter than a block, and completions behind a prompt that is packed once."""
    decoder = tiny_decoder(KIND)
    with torch.no_grad():
        lengths = [3, 17, 11, 12, 1]
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


@pytest.mark.parametrize("chunks", ((1,), (12,), (4, 1, 3, 1)), ids=str)
def test_cached_equals_packed(tiny_decoder: Callable[..., Decoder], chunks: tuple[int, ...]) -> None:
    """Rows of unlike length, in slots that hold rubbish, fed token by token, at once and in unequal pieces."""
    decoder, lengths = tiny_decoder(KIND), (12, 7, 19)
    sequences = [random_ids(length, length) for length in lengths]
    padded_RT = torch.stack([F.pad(ids, (0, 40 - len(ids))) for ids in sequences])
    with torch.no_grad():
        expected = [decoder(ids, causal_layout([len(ids)])).hidden for ids in sequences]
        cache = decoder.new_cache(num_slots=5, capacity=40)
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
                torch.testing.assert_close(output.hidden[row, :count], whole[real], rtol=1e-9, atol=1e-9)
                fed[row] = min(fed[row] + width, len(ids))
            step += 1


def test_a_copied_prefix_carries_its_compressed_blocks(tiny_decoder: Callable[..., Decoder]) -> None:
    """A slot that takes over 9 tokens of another goes on as if it had read them itself."""
    decoder, ids = tiny_decoder(KIND), random_ids(14)
    with torch.no_grad():
        expected = decoder(ids, causal_layout([14])).hidden
        cache = decoder.new_cache(num_slots=2, capacity=16)
        decoder.forward_cached(ids[None], cache, cached_layout([0], [0], 14, cache))
        cache.copy_tokens(0, 1, 9)
        output = decoder.forward_cached(ids[None, 9:], cache, cached_layout([1], [9], 5, cache))
    torch.testing.assert_close(output.hidden[0], expected[9:], rtol=1e-9, atol=1e-9)


def test_float32_agrees_with_float64(tiny_decoder: Callable[..., Decoder]) -> None:
    """Compiled kernels serve the one and torch the other. Room for all blocks, so that rounding moves no choice."""
    sizes = NSAConfig(block_length=6, block_stride=2, selected_length=4, num_selected=6, num_local=1, window=3)
    precise, ids, layout = tiny_decoder(KIND, nsa=sizes), random_ids(23), causal_layout([23])
    with torch.no_grad():
        expected = precise(ids, layout).hidden
        torch.testing.assert_close(precise.float()(ids, layout).hidden.double(), expected, rtol=1e-4, atol=1e-5)


def test_it_is_causal_and_reads_far_back(tiny_decoder: Callable[..., Decoder]) -> None:
    """A changed token changes nothing before it, and reaches a token that is out of the window by compression."""
    decoder, ids = tiny_decoder(KIND), random_ids(24)
    changed = ids.clone()
    changed[9] = (changed[9] + 1) % 61
    with torch.no_grad():
        before, after = (decoder(each, causal_layout([24])).hidden for each in (ids, changed))
    assert torch.equal(before[:9], after[:9])
    assert (before[9:] - after[9:]).abs().amax(dim=-1).min() > 1e-6


def test_every_parameter_learns(tiny_decoder: Callable[..., Decoder]) -> None:
    """All but the keys that only a selection could have moved: no gradient passes through the choice of blocks."""
    decoder, ids = tiny_decoder(KIND), random_ids(30)
    hidden = decoder.train()(ids, causal_layout([30])).hidden
    F.cross_entropy(decoder.logits(hidden[:-1]), ids[1:]).backward()
    silent = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_tiny_model_learns_to_copy(tiny_decoder: Callable[..., Decoder]) -> None:
    """Training from scratch: a sequence that repeats itself out of the window's reach is learnt."""
    decoder = tiny_decoder(KIND, initializer_range=0.1).float().train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    ids = random_ids(16).repeat(2)
    losses = []
    for _ in range(60):
        hidden = decoder(ids, causal_layout([32])).hidden
        loss = F.cross_entropy(decoder.logits(hidden[:-1]), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_checkpointed_activations_give_the_same_gradients(tiny_decoder: Callable[..., Decoder]) -> None:
    gradients = []
    for checkpointed in (False, True):
        decoder, ids = tiny_decoder(KIND).train(), random_ids(20)
        decoder.checkpoint_activations = checkpointed
        decoder.logits(decoder(ids, causal_layout([20])).hidden).square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_round_trip_through_a_checkpoint(tiny_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    decoder, ids, layout = tiny_decoder(KIND).float(), random_ids(12), causal_layout([12])
    save_checkpoint(decoder, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.config == decoder.config
    with torch.no_grad():
        assert torch.equal(again(ids, layout).hidden, decoder(ids, layout).hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"block_stride": 5}, "must divide block_length"),
        ({"selected_length": 5}, "must divide selected_length"),
        ({"num_selected": 1, "num_initial": 1}, "leaves no room"),
        ({"window": 0}, "NSAConfig.window = 0"),
        ({"block_length": 0}, "NSAConfig.block_length = 0"),
    ),
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(
    tiny_decoder: Callable[..., Decoder], change: dict[str, int], message: str
) -> None:
    sizes = {"block_length": 6, "block_stride": 2, "selected_length": 4, "num_selected": 2, "num_initial": 0}
    with pytest.raises(ValueError, match=message):
        tiny_decoder(KIND, nsa=NSAConfig(**{**sizes, "num_local": 1, **change}))


def test_it_goes_with_no_other_attention(tiny_decoder: Callable[..., Decoder]) -> None:
    with pytest.raises(ValueError, match="go together"):
        tiny_decoder(KIND, nsa=None)
    with pytest.raises(ValueError, match="go together"):
        tiny_decoder("gqa", nsa=NSAConfig())
    with pytest.raises(ValueError, match="neither mla nor dsa"):
        tiny_decoder(KIND, mla=MLAConfig())
