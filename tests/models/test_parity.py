"""The decoder against `transformers`, in float32, on random tiny models of every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rorqual.models.cache import cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout

TOLERANCE = 1e-5
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
SEEDS = range(14)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def random_ids(length: int, seed: int) -> Tensor:
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def cached_logits(
    decoder: Decoder, sequences: Sequence[Tensor], slots: range | list[int], chunks: Sequence[int]
) -> list[Tensor]:
    """Feed each sequence in the given chunks (the last one repeats); rows that end early are fed padding."""
    longest = max(len(sequence) for sequence in sequences)
    cache = decoder.new_cache(num_slots=max(slots) + 2, capacity=longest + max(chunks))
    for columns in cache.columns:
        for column in columns:
            column.fill_(1e3)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    fed = [0] * len(sequences)
    step = 0
    while any(done < len(sequence) for done, sequence in zip(fed, sequences, strict=True)):
        width = chunks[min(step, len(chunks) - 1)]
        rows = [sequence[done : done + width] for done, sequence in zip(fed, sequences, strict=True)]
        token_ids_RQ = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        layout = cached_layout(slots, fed, width, cache)
        out_RQV = decoder.logits(decoder.forward_cached(token_ids_RQ, cache, layout).hidden)
        for row, part in enumerate(rows):
            logits[row].append(out_RQV[row, : len(part)])
            fed[row] += len(part)
        step += 1
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits(pair: Callable, family: str, seed: int) -> None:
    lengths = [(3, 40, 11), (1, 25, 25, 6), (33,), (4, 30)][seed % 4]
    token_ids_T = random_ids(sum(lengths), seed)
    model = pair(family, seed)
    with torch.no_grad():
        found = model.decoder.logits(model.decoder(token_ids_T, causal_layout(lengths)).hidden)
    expected = torch.cat([model.reference_logits(part) for part in token_ids_T.split(lengths)])
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("slots", "chunks"),
    [
        (range(1, 5), (1,)),
        ([4, 1, 6, 0], (1,)),
        (range(4), (40,)),
        ([3, 0, 5, 2], (7, 1)),
        ([0, 1, 5, 3], (5, 1, 3, 4, 1)),
    ],
    ids=["token by token", "slots in any order", "one prefill", "prefill then decode", "chunks"],
)
@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits(
    pair: Callable, family: str, seed: int, slots: range | list[int], chunks: tuple[int, ...]
) -> None:
    """Rows of unlike length share each call; the cache begins full of rubbish, so that a leak shows."""
    model = pair(family, seed)
    sequences = [random_ids(length, seed + length) for length in (9, 31, 2, 17)]
    for found, sequence in zip(cached_logits(model.decoder, sequences, slots, chunks), sequences, strict=True):
        assert relative_error(found, model.reference_logits(sequence)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuation(pair: Callable, family: str) -> None:
    """Prefill and greedy decoding draw the tokens that `generate` draws."""
    model = pair(family, 3)
    prompt = random_ids(8, 5)
    expected = model.reference.generate(prompt[None], max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
    cache = model.decoder.new_cache(num_slots=1, capacity=24)
    tokens, new = prompt, prompt
    with torch.no_grad():
        for _ in range(16):
            layout = cached_layout(range(1), [len(tokens) - len(new)], len(new), cache)
            hidden = model.decoder.forward_cached(new[None], cache, layout).hidden
            new = model.decoder.logits(hidden[0, -1:]).argmax(dim=-1)
            tokens = torch.cat([tokens, new])
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_bfloat16_forward(pair: Callable, reference_model: Callable, family: str, tmp_path) -> None:
    """In bfloat16 we stray from float32 no further than the reference does, by a margin."""
    model = pair(family, 0)
    token_ids_T = random_ids(30, 0)
    exact = model.reference_logits(token_ids_T)
    rough = reference_model(family, 0).bfloat16()
    decoder = Decoder(model.decoder.config)
    decoder.load_state_dict(model.decoder.state_dict())
    decoder.bfloat16()
    with torch.no_grad():
        found = decoder.logits(decoder(token_ids_T, causal_layout([30])).hidden).float()
        theirs = rough(token_ids_T[None]).logits[0].float()
    assert relative_error(found, exact) < 1.5 * relative_error(theirs, exact) + 0.01
    assert relative_error(found, exact) < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(pair: Callable, family: str) -> None:
    """The gradient of a random projection of the logits, by parameter; ties and stacked experts included."""
    model = pair(family, 1)
    token_ids_T = random_ids(20, 9)
    weight_TV = torch.randn(20, 61, generator=torch.Generator().manual_seed(0))
    model.reference.zero_grad()
    (model.reference(token_ids_T[None]).logits[0] * weight_TV).sum().backward()
    model.decoder.zero_grad()
    (model.decoder.logits(model.decoder(token_ids_T, causal_layout([20])).hidden) * weight_TV).sum().backward()
    theirs = {name.removeprefix("model."): parameter.grad for name, parameter in model.reference.named_parameters()}
    ours = {name: parameter.grad for name, parameter in model.decoder.named_parameters()}
    assert ours.keys() == theirs.keys()
    noise = 1e-7 * max(float(each.abs().max()) for each in theirs.values() if each is not None)
    for name, gradient in ours.items():
        if theirs[name] is None:
            assert gradient is None or not gradient.any()
            continue
        assert (gradient - theirs[name]).abs().max() < 1e-4 * theirs[name].abs().max() + noise, name
