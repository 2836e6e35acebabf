"""Drawing tokens: temperature, top-k, top-p, min-p, and the record of what could have been drawn.

In: logits and one SamplingParams a row. Out: the token, its log-prob under the very distribution it was drawn from,
that distribution's entropy, the mass that truncation kept, and the kept ids: what "keep sampling mask" replays in
training (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

A draw is the inverse of the cumulative distribution, in ascending token order, at a number that depends only on the
request's seed and on how many tokens it has drawn: it does not depend on which requests share the batch.

Shapes: R rows, V vocabulary, W candidates of a row (the most probable ones), N kept ids in all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rorqual.ops.cpu.compiled import array, serves
from rorqual.ops.cpu.draw import draw_whole
from rorqual.records import SamplingParams

FIRST_CANDIDATES = 64
"""Truncation looks at this many of the most probable tokens first, and at all of them where these do not suffice."""

CHUNK = 256
"""Vocabulary chunk of the two-level search for a draw from a whole distribution."""


Kind = Callable[[Tensor, Sequence[SamplingParams], Tensor], "Draws"]


@dataclass(frozen=True)
class Draws:
    """One drawn token a row. kept_ids_N lists the support of each row in turn, `kept_count_R` ids each; 0 means the
    whole."""

    token_R: Tensor
    logprob_R: Tensor
    entropy_R: Tensor
    kept_mass_R: Tensor
    kept_ids_N: Tensor
    kept_count_R: Tensor


def uniforms(seed_R: np.ndarray, counter_R: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each (seed, counter): the SplitMix64 output function applied to their mix."""
    with np.errstate(over="ignore"):
        z = seed_R.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + counter_R.astype(np.uint64)
        for _ in range(2):
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class LogitsNotFinite(ValueError):
    """Logits from which nothing can be drawn. rows: which ones, in the order of the draw."""

    def __init__(self, rows: list[int], num_rows: int) -> None:
        self.rows = rows
        super().__init__(
            f"The model's logits are NaN or infinite in {len(rows)} of {num_rows} rows (first: row {rows[0]}). The "
            "weights are damaged or diverged: go back to an earlier checkpoint, or lower the learning rate."
        )


class Sampler:
    """Draws for a batch of requests. What their parameters say is worked out once, while the same ones draw."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        self.params = params
        self.seed_R = np.fromiter((p.seed & 0xFFFFFFFFFFFFFFFF for p in params), dtype=np.uint64, count=len(params))
        self.max_new_R = np.array([p.max_new_tokens for p in params])
        most = max((len(p.stop_token_ids) for p in params), default=0)
        self.stop_RS = np.array([[*p.stop_token_ids] + [-1] * (most - len(p.stop_token_ids)) for p in params])
        groups: dict[Kind, list[int]] = {}
        for row, p in enumerate(params):
            kind = _draw_greedy if p.temperature == 0.0 else _draw_truncated if p.truncates else _draw_whole
            groups.setdefault(kind, []).append(row)
        self.groups = [(kind, rows, [params[row] for row in rows]) for kind, rows in groups.items()]

    def draw(self, logits_RV: Tensor, counter_R: np.ndarray) -> Draws:
        """Draw one token a row. `counter_R`: tokens that each request has drawn so far. Logits may be overwritten.

        Raises: LogitsNotFinite for rows whose logits hold NaN, or of which the highest is infinite.
        """
        logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
        uniform_R = torch.from_numpy(uniforms(self.seed_R, counter_R)).to(logits_RV.device)
        if len(self.groups) == 1:
            return self.groups[0][0](logits_RV, self.params, uniform_R)
        parts = []
        for kind, rows, params in self.groups:
            index = torch.tensor(rows, device=logits_RV.device)
            parts.append((rows, kind(logits_RV[index], params, uniform_R[index])))
        return _merge(parts, len(self.params))

    def stops(self, token_R: np.ndarray) -> np.ndarray:
        """Whether each row drew one of its stop tokens."""
        result: np.ndarray = (self.stop_RS == token_R[:, None]).any(axis=1)
        return result


def _draw_greedy(logits_RV: Tensor, params: Sequence[SamplingParams], uniform_R: Tensor) -> Draws:
    """The most probable token; a point mass, so its log-prob and entropy are 0."""
    best_R, token_R = logits_RV.max(dim=-1)
    _refuse_unbounded(best_R)
    mass_R = (best_R - logits_RV.logsumexp(dim=-1)).exp()
    zero_R = torch.zeros_like(mass_R)
    count_R = torch.zeros_like(token_R)
    return Draws(token_R, zero_R, zero_R.clone(), mass_R, token_R[:0], count_R)


def _draw_whole(logits_RV: Tensor, params: Sequence[SamplingParams], uniform_R: Tensor) -> Draws:
    """Few passes over [R, V], and one more tensor of its size: shift by the maximum, exponentiate, sum by chunks;
    nothing is normalised but what is asked. Logits are held in base 2, because exp2 is several times faster than exp.
    """
    highest_R = logits_RV.amax(dim=-1)
    _refuse_unbounded(highest_R)
    if serves(logits_RV):
        return _draw_whole_in_one_pass(logits_RV, highest_R, params, uniform_R)
    shifted_RV = logits_RV.sub_(highest_R[:, None])
    shifted_RV.mul_(_base_2_scale(logits_RV, params)).clamp_(min=-1e4)  # -inf times a weight of 0 would be NaN.
    weights_RV = shifted_RV.exp2()
    token_R, total_R = _invert(weights_RV, uniform_R)
    log_total_R, ln2 = total_R.log(), math.log(2)
    logprob_R = shifted_RV.gather(1, token_R[:, None])[:, 0] * ln2 - log_total_R
    entropy_R = log_total_R - weights_RV.mul_(shifted_RV).sum(dim=-1) * ln2 / total_R
    count_R = torch.zeros_like(token_R)
    logprob_R, entropy_R = logprob_R.to(logits_RV.dtype), entropy_R.to(logits_RV.dtype)
    return Draws(token_R, logprob_R, entropy_R, torch.ones_like(logprob_R), token_R[:0], count_R)


def _draw_whole_in_one_pass(
    logits_RV: Tensor, highest_R: Tensor, params: Sequence[SamplingParams], uniform_R: Tensor
) -> Draws:
    """The same by a compiled loop."""
    num_rows = len(logits_RV)
    scale_R = np.fromiter((1.0 / p.temperature for p in params), dtype=np.float32, count=num_rows)
    token_R = torch.empty(num_rows, dtype=torch.int64)
    logprob_R, entropy_R = logits_RV.new_empty(2, num_rows)
    given = (array(logits_RV), array(highest_R), scale_R, array(uniform_R))
    draw_whole(*given, token_R.numpy(), logprob_R.numpy(), entropy_R.numpy())
    return Draws(token_R, logprob_R, entropy_R, torch.ones_like(logprob_R), token_R[:0], torch.zeros_like(token_R))


def _draw_truncated(logits_RV: Tensor, params: Sequence[SamplingParams], uniform_R: Tensor) -> Draws:
    logits_RV = _tempered(logits_RV, params)
    normalizer_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    _refuse_unbounded(normalizer_R1[:, 0])
    ids_RW, probs_RW, kept_RW = _candidates(logits_RV, normalizer_R1, params)
    vocabulary = logits_RV.shape[1]
    ids_RW, order_RW = ids_RW.masked_fill(~kept_RW, vocabulary).sort(dim=-1)
    probs_RW = probs_RW.masked_fill(~kept_RW, 0.0).gather(1, order_RW)
    mass_R = probs_RW.sum(dim=-1)
    cumulative_RW = probs_RW.double().cumsum(dim=-1)
    place_R = torch.searchsorted(cumulative_RW, (uniform_R * cumulative_RW[:, -1])[:, None], right=True)[:, 0]
    count_R = kept_RW.sum(dim=-1)
    place_R1 = torch.minimum(place_R, count_R - 1)[:, None]
    probs_RW = probs_RW / mass_R[:, None]
    return Draws(
        token_R=ids_RW.gather(1, place_R1)[:, 0],
        logprob_R=probs_RW.gather(1, place_R1)[:, 0].log(),
        entropy_R=-torch.special.xlogy(probs_RW, probs_RW).sum(dim=-1),
        kept_mass_R=mass_R,
        kept_ids_N=ids_RW[ids_RW < vocabulary],
        kept_count_R=count_R,
    )


def _candidates(
    logits_RV: Tensor, normalizer_R1: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable tokens of each row, descending: ids, probabilities, and which of them truncation keeps.

    A row that keeps all of its first candidates might keep more; such rows are looked at again with all their tokens.
    """
    vocabulary = logits_RV.shape[1]
    width = min(vocabulary, max(FIRST_CANDIDATES, *(p.top_k for p in params)))
    values_RW, ids_RW = logits_RV.topk(width, dim=-1)
    probs_RW = (values_RW - normalizer_R1).exp()
    kept_RW = _keep(probs_RW, params)
    unsure = [r for r in kept_RW[:, -1].nonzero().flatten().tolist() if width < vocabulary and not params[r].top_k]
    if not unsure:
        return ids_RW, probs_RW, kept_RW
    values_UV, ids_UV = logits_RV[unsure].sort(dim=-1, descending=True)
    probs_UV = (values_UV - normalizer_R1[unsure]).exp()
    kept_UV = _keep(probs_UV, [params[r] for r in unsure])
    widest = int(kept_UV.sum(dim=-1).max())
    wider = (0, widest - width)
    ids, probs, kept = (torch.nn.functional.pad(x, wider) for x in (ids_RW, probs_RW, kept_RW))
    ids[unsure], probs[unsure], kept[unsure] = ids_UV[:, :widest], probs_UV[:, :widest], kept_UV[:, :widest]
    return ids, probs, kept


def _keep(probs_RW: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Top-k, then top-p of what top-k left (the smallest set that reaches p), then min-p relative to the best."""
    device, vocabulary = probs_RW.device, probs_RW.shape[1]
    top_k_R1 = torch.tensor([min(p.top_k or vocabulary, vocabulary) for p in params], device=device)[:, None]
    top_p_R1 = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64)[:, None]
    min_p_R1 = torch.tensor([p.min_p for p in params], device=device, dtype=probs_RW.dtype)[:, None]
    limited_R1 = torch.tensor([p.top_k > 0 for p in params], device=device)[:, None]
    kept_RW = torch.arange(probs_RW.shape[1], device=device) < top_k_R1
    left_RW = (probs_RW * kept_RW).double()
    total_R1 = torch.where(limited_R1, left_RW.sum(dim=-1, keepdim=True), 1.0)
    before_RW = left_RW.cumsum(dim=-1) - left_RW
    kept_RW &= (before_RW < top_p_R1 * total_R1) | (top_p_R1 >= 1.0)
    kept_RW &= probs_RW >= min_p_R1 * probs_RW[:, :1]
    kept_RW[:, 0] = True
    return kept_RW


def _base_2_scale(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor | float:
    """log2(e) / temperature, [R, 1] where the rows' temperatures differ."""
    temperatures = {p.temperature for p in params}
    if len(temperatures) == 1:
        return math.log2(math.e) / temperatures.pop()
    scales = [math.log2(math.e) / p.temperature for p in params]
    return torch.tensor(scales, device=logits_RV.device, dtype=logits_RV.dtype)[:, None]


def _tempered(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    if all(p.temperature == 1.0 for p in params):
        return logits_RV
    temperature_R1 = torch.tensor([p.temperature for p in params], device=logits_RV.device, dtype=logits_RV.dtype)[
        :, None
    ]
    return logits_RV / temperature_R1


def _invert(weights_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which the cumulative weight passes `uniform * total`, by chunks, then inside one; and the
    total."""
    num_rows, vocabulary = weights_RV.shape
    if vocabulary <= CHUNK:
        inside_RV = weights_RV.double().cumsum(dim=-1)
        total_R1 = inside_RV[:, -1:].contiguous()
        place_R1 = torch.searchsorted(inside_RV, uniform_R[:, None] * total_R1, right=True)
        return torch.minimum(place_R1, torch.searchsorted(inside_RV, total_R1))[:, 0], total_R1[:, 0]
    padding = -vocabulary % CHUNK
    if padding:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, padding))
    chunks_RNC = weights_RV.view(num_rows, -1, CHUNK)
    cumulative_RN = chunks_RNC.sum(dim=-1).double().cumsum(dim=-1)
    target_R1 = (uniform_R * cumulative_RN[:, -1])[:, None]
    chunk_R1 = torch.searchsorted(cumulative_RN, target_R1, right=True).clamp_(max=cumulative_RN.shape[1] - 1)
    before_R1 = torch.where(chunk_R1 > 0, cumulative_RN.gather(1, (chunk_R1 - 1).clamp(min=0)), 0.0)
    rows = torch.arange(num_rows, device=weights_RV.device)
    inside_RC = chunks_RNC[rows, chunk_R1[:, 0]].double().cumsum(dim=-1)
    place_R1 = torch.searchsorted(inside_RC, target_R1 - before_R1, right=True)
    last_R1 = torch.searchsorted(inside_RC, inside_RC[:, -1:].contiguous())
    return (chunk_R1 * CHUNK + torch.minimum(place_R1, last_R1))[:, 0], cumulative_RN[:, -1]


def _merge(parts: list[tuple[list[int], Draws]], num_rows: int) -> Draws:
    """Rows of several kinds back in their order."""
    device = parts[0][1].token_R.device
    order = torch.tensor([row for rows, _ in parts for row in rows], device=device)
    place = torch.empty_like(order)
    place[order] = torch.arange(num_rows, device=device)
    supports = [ids for _, d in parts for ids in d.kept_ids_N.split(d.kept_count_R.tolist())]
    return Draws(
        token_R=torch.cat([d.token_R for _, d in parts])[place],
        logprob_R=torch.cat([d.logprob_R for _, d in parts])[place],
        entropy_R=torch.cat([d.entropy_R for _, d in parts])[place],
        kept_mass_R=torch.cat([d.kept_mass_R for _, d in parts])[place],
        kept_ids_N=torch.cat([supports[i] for i in place.tolist()]),
        kept_count_R=torch.cat([d.kept_count_R for _, d in parts])[place],
    )


def _refuse_unbounded(highest_R: Tensor) -> None:
    bad_R = ~highest_R.isfinite()
    if bool(bad_R.any()):
        raise LogitsNotFinite(bad_R.nonzero()[:, 0].tolist(), len(highest_R))
