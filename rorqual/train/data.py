"""Packed micro-batches: documents or train samples laid end to end within a token budget, group prompts stored once.

The last token of a sequence predicts nothing and is not fed, so the fed tokens are exactly those with a recorded
route. A prompt that several samples share is fed once; its last token predicts the first completion token of every one
of them, so `predict_index_N` repeats there while the targets differ.

Shapes: T packed (fed) tokens, N targets, S sequences, L mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.models.layout import PackedLayout, TokenRun, layout_from_runs
from rorqual.models.moe import FREE_ROUTE
from rorqual.records import TrainSample
from rorqual.train.logprobs import KeptBatch


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch. A sequence is never split over micro-batches.

    token_ids_T: what is fed. predict_index_N: the packed token whose hidden state predicts `target_N`.
    sequence_index_N: which sequence a target belongs to; targets are ordered by sequence. weight_N: loss weight of each
    target, for the language-model objective. trajectory_ids, trajectory_length_S: the trajectory that each sequence is
    a segment of, and the targets of all of it, whichever micro-batches they are in. indexer_weight_T: weight of each
    fed token in the indexers' loss, None where it is not asked for. The others are for reinforcement learning, None or
    empty otherwise. Log-probs are in nats.
    """

    token_ids_T: Tensor
    layout: PackedLayout
    predict_index_N: Tensor
    target_N: Tensor
    sequence_index_N: Tensor
    sample_ids: tuple[str, ...]
    weight_N: Tensor | None = None
    behaviour_N: Tensor | None = None
    proximal_N: Tensor | None = None
    reference_N: Tensor | None = None
    advantage_S: Tensor | None = None
    domains_S: tuple[str, ...] = ()
    trajectory_ids: tuple[str, ...] = ()
    trajectory_length_S: Tensor | None = None
    kept: KeptBatch | None = None
    routes_TLK: Tensor | None = None
    selections_TLS: Tensor | None = None
    indexer_weight_T: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_targets(self) -> int:
        return len(self.target_N)


@dataclass(frozen=True, eq=False)
class _Sequence:
    """ids: every token. targets: positions of the trained tokens, ascending, none at 0."""

    name: str
    ids: NDArray[np.int32]
    targets: NDArray[np.int64]
    prompt_length: int = 0
    weights: NDArray[np.float32] | None = None
    sample: TrainSample | None = None

    @property
    def num_fed(self) -> int:
        return len(self.ids) - 1


def pack_documents(
    documents: Sequence[Any],
    token_budget: int,
    *,
    weights: Sequence[Any] | None = None,
    device: torch.device | None = None,
) -> list[PackedBatch]:
    """Documents (1-D integer arrays) for the language-model objective: every token but the first is a target.

    weights: one array a document, as long as it; a token of weight 0 is fed but is no target (SFT prompts, tool
    results).
    A document longer than `token_budget` gets a batch of its own.
    Raises: ValueError naming the document that has fewer than two tokens, or no target, or ill-fitting weights.
    """
    sequences = []
    for index, document in enumerate(documents):
        ids = np.asarray(document, dtype=np.int32)
        weight = np.ones(len(ids), np.float32) if weights is None else np.asarray(weights[index], dtype=np.float32)
        if weight.shape != ids.shape:
            raise ValueError(f"document {index} has {len(ids)} tokens but {len(weight)} weights; expected one a token.")
        targets = np.flatnonzero(weight[1:]) + 1
        if not len(targets):
            raise ValueError(f"document {index} of {len(ids)} tokens has no target; leave it out of the batch.")
        sequences.append(_Sequence(f"document {index}", ids, targets, weights=weight[targets]))
    return _pack([[sequence] for sequence in sequences], token_budget, device)


def pack_samples(
    samples: Sequence[TrainSample],
    token_budget: int,
    *,
    share_prefix: bool = True,
    keep_routing: bool = True,
    keep_sampling_mask: bool = True,
    device: torch.device | None = None,
) -> list[PackedBatch]:
    """Train samples for the policy objective: the sampled tokens are the targets.

    share_prefix: samples of one group whose prompts (and the prompts' routes and selections) are equal stay together
    and feed the prompt once; where they exceed `token_budget` together, they are split and the prompt is fed once a
    part. A sample longer than the budget gets a batch of its own. keep_routing (experts, and the keys of sparse
    attention) and keep_sampling_mask: whether to replay what the sampler recorded. Samples with and without kept-token
    sets never share a batch. The result depends only on the arguments.
    Raises: ValueError naming a sample without a prompt or without sampled tokens, or whose columns disagree.
    """
    sequences = [_sequence(sample) for sample in samples]
    batches = []
    for truncated in (False, True):
        chosen = [s for s in sequences if (keep_sampling_mask and _sample(s).kept is not None) == truncated]
        clusters = _clusters(chosen, keep_routing) if share_prefix else [[sequence] for sequence in chosen]
        parts = [part for cluster in clusters for part in _split(cluster, token_budget)]
        batches += _pack(parts, token_budget, device, keep_routing=keep_routing, keep_sampling_mask=truncated)
    return batches


# -------------------------------------------------------------------------------------------------------- packing


def _pack(
    clusters: Sequence[list[_Sequence]],
    token_budget: int,
    device: torch.device | None,
    keep_routing: bool = False,
    keep_sampling_mask: bool = False,
) -> list[PackedBatch]:
    bins = first_fit_decreasing([_num_fed(cluster) for cluster in clusters], token_budget)
    return [
        _batch([clusters[index] for index in members], device, keep_routing, keep_sampling_mask) for members in bins
    ]


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, each within `capacity` or holding one larger item alone. Ties keep their order.

    Raises: ValueError for a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"token_budget = {capacity}; expected at least 1.")
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = next((i for i, free in enumerate(room) if sizes[index] <= free), None)
        if place is None:
            bins.append([index])
            room.append(capacity - sizes[index])
        else:
            bins[place].append(index)
            room[place] -= sizes[index]
    return [sorted(members) for members in bins]


def _clusters(sequences: Sequence[_Sequence], keep_routing: bool) -> list[list[_Sequence]]:
    """Sequences that may feed their prompt once: same group, same prompt, and the same experts and keys for it."""
    clusters: dict[tuple[str, bytes, tuple[bytes, ...]], list[_Sequence]] = {}
    for sequence in sequences:
        replayed = (_routes(sequence), _selections(sequence)) if keep_routing else ()
        of_prompt = tuple(b"" if rows is None else rows[: sequence.prompt_length].tobytes() for rows in replayed)
        key = (_sample(sequence).group_id, sequence.ids[: sequence.prompt_length].tobytes(), of_prompt)
        clusters.setdefault(key, []).append(sequence)
    return list(clusters.values())


def _split(cluster: list[_Sequence], token_budget: int) -> list[list[_Sequence]]:
    prompt_length = cluster[0].prompt_length
    if len(cluster) == 1 or _num_fed(cluster) <= token_budget:
        return [cluster]
    sizes = [sequence.num_fed - prompt_length for sequence in cluster]
    bins = first_fit_decreasing(sizes, max(token_budget - prompt_length, 1))
    return [[cluster[index] for index in members] for members in bins]


def _num_fed(cluster: Sequence[_Sequence]) -> int:
    shared = cluster[0].prompt_length * (len(cluster) - 1)
    return sum(sequence.num_fed for sequence in cluster) - shared


# -------------------------------------------------------------------------------------------------------- one batch


def _batch(
    clusters: Sequence[list[_Sequence]], device: torch.device | None, keep_routing: bool, keep_sampling_mask: bool
) -> PackedBatch:
    runs: list[TokenRun] = []
    fed: list[tuple[_Sequence, slice]] = []
    predict: list[NDArray[np.int64]] = []
    for cluster in clusters:
        _lay_out(cluster, runs, fed, predict)
    members = [sequence for cluster in clusters for sequence in cluster]
    samples = [sequence.sample for sequence in members if sequence.sample is not None]
    weights = [sequence.weights for sequence in members if sequence.weights is not None]
    counts = np.array([len(sequence.targets) for sequence in members])
    return PackedBatch(
        token_ids_T=_tensor([sequence.ids[part] for sequence, part in fed], np.int64, device),
        layout=layout_from_runs(runs, device),
        predict_index_N=_tensor(predict, np.int64, device),
        target_N=_tensor([sequence.ids[sequence.targets] for sequence in members], np.int64, device),
        sequence_index_N=_tensor([np.repeat(np.arange(len(members)), counts)], np.int64, device),
        sample_ids=tuple(sequence.name for sequence in members),
        weight_N=_tensor(weights, np.float32, device) if weights else None,
        behaviour_N=_tensor([_behaviour(sequence) for sequence in members], np.float32, device) if samples else None,
        advantage_S=_tensor([np.array([s.advantage for s in samples])], np.float32, device) if samples else None,
        domains_S=tuple(sample.domain for sample in samples),
        trajectory_ids=tuple(_trajectory_id(sample) for sample in samples),
        trajectory_length_S=_tensor([np.array(_trajectory_lengths(members))], np.int64, device) if samples else None,
        kept=_kept(members, device) if keep_sampling_mask else None,
        routes_TLK=_replayed([(_routes(each), part) for each, part in fed], device) if keep_routing else None,
        selections_TLS=_replayed([(_selections(each), part) for each, part in fed], device) if keep_routing else None,
    )


def _lay_out(
    cluster: Sequence[_Sequence],
    runs: list[TokenRun],
    fed: list[tuple[_Sequence, slice]],
    predict: list[NDArray[np.int64]],
) -> None:
    """Append one cluster: a lone sequence as one run, several as the prompt and then one run for each continuation."""
    prompt_start = runs[-1].start + runs[-1].length if runs else 0
    prompt_length = cluster[0].prompt_length if len(cluster) > 1 else 0
    start = prompt_start + prompt_length
    if prompt_length:
        runs.append(TokenRun(prompt_start, prompt_length))
        fed.append((cluster[0], slice(0, prompt_length)))
    for sequence in cluster:
        length = sequence.num_fed - prompt_length
        if length:
            prefix = (prompt_start, prompt_length) if prompt_length else (0, 0)
            runs.append(TokenRun(start, length, *prefix))
            fed.append((sequence, slice(prompt_length, sequence.num_fed)))
        before = sequence.targets - 1
        predict.append(before + np.where(before < prompt_length, prompt_start, start - prompt_length))
        start += length


def _tensor(parts: Sequence[NDArray[Any]], dtype: Any, device: torch.device | None) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)


def _trajectory_id(sample: TrainSample) -> str:
    return sample.sample_id if sample.trajectory_id is None else sample.trajectory_id


def _trajectory_lengths(members: Sequence[_Sequence]) -> list[int]:
    lengths = [(_sample(sequence).trajectory_length, len(sequence.targets)) for sequence in members]
    return [own if whole is None else whole for whole, own in lengths]


def _behaviour(sequence: _Sequence) -> NDArray[np.float32]:
    return np.asarray(_sample(sequence).behaviour_logprobs, dtype=np.float32)[sequence.targets]


def _kept(members: Sequence[_Sequence], device: torch.device | None) -> KeptBatch:
    sizes, ids = [np.zeros(1, np.int64)], []
    for sequence in members:
        kept = _sample(sequence).kept
        assert kept is not None
        sizes.append(np.diff(np.asarray(kept.offsets)))
        ids.append(np.asarray(kept.ids))
    offsets = np.cumsum(np.concatenate(sizes))
    return KeptBatch(_tensor([offsets], np.int64, device), _tensor(ids, np.int64, device))


def _replayed(rows: Sequence[tuple[NDArray[Any] | None, slice]], device: torch.device | None) -> Tensor | None:
    """What was recorded of the fed tokens, [T, L, K]; -1 for sequences of which nothing was, which leaves the model
    free. None if nothing was of any."""
    present = [recorded for recorded, _ in rows if recorded is not None]
    if not present:
        return None
    shapes = {recorded.shape[1:] for recorded in present}
    if len(shapes) > 1:
        raise ValueError(f"recorded choices have {sorted(shapes)} layers and choices a token; expected one shape.")
    shape, dtype = shapes.pop(), present[0].dtype
    parts = [
        np.full((part.stop - part.start, *shape), FREE_ROUTE) if recorded is None else recorded[part]
        for recorded, part in rows
    ]
    return _tensor(parts, dtype, device)


# -------------------------------------------------------------------------------------------------------- one sample


def _sequence(sample: TrainSample) -> _Sequence:
    num_tokens, prompt_length = len(sample.token_ids), sample.prompt_length
    sampled = np.asarray(sample.sampled, dtype=bool)
    _require(prompt_length >= 1, sample, "its prompt is empty, so nothing predicts the first sampled token")
    _require(bool(sampled.any()), sample, "it has no sampled token, so there is nothing to train")
    _require(
        len(sampled) == num_tokens == len(sample.behaviour_logprobs),
        sample,
        f"{num_tokens} tokens, {len(sampled)} sampled marks and {len(sample.behaviour_logprobs)} log-probs",
    )
    targets = np.flatnonzero(sampled)
    whole = sample.trajectory_length
    _require(
        whole is None or (whole >= len(targets) and sample.trajectory_id is not None),
        sample,
        f"it has {len(targets)} sampled tokens of the {whole} of trajectory {sample.trajectory_id}",
    )
    _require(
        prompt_length <= targets[0], sample, f"prompt_length is {prompt_length}, but token {targets[0]} was sampled"
    )
    if sample.kept is not None:
        num_kept = len(sample.kept)
        _require(num_kept == len(targets), sample, f"{num_kept} kept-token sets for {len(targets)} sampled tokens")
    if sample.routes is not None:
        num_routes = len(sample.routes)
        _require(num_routes == num_tokens - 1, sample, f"{num_routes} rows of routes for {num_tokens - 1} fed tokens")
    if sample.selections is not None:
        rows = len(sample.selections)
        _require(rows == num_tokens - 1, sample, f"{rows} rows of selections for {num_tokens - 1} fed tokens")
    return _Sequence(sample.sample_id, np.asarray(sample.token_ids, np.int32), targets, prompt_length, sample=sample)


def _require(holds: bool, sample: TrainSample, problem: str) -> None:
    if not holds:
        raise ValueError(f"sample {sample.sample_id} cannot be packed: {problem}.")


def _sample(sequence: _Sequence) -> TrainSample:
    assert sequence.sample is not None
    return sequence.sample


def _routes(sequence: _Sequence) -> NDArray[np.int16] | None:
    routes = _sample(sequence).routes
    if routes is None:
        return None
    return np.asarray(routes.experts, np.int16).reshape(-1, routes.num_layers, routes.experts_per_token)


def _selections(sequence: _Sequence) -> NDArray[np.int32] | None:
    selections = _sample(sequence).selections
    if selections is None:
        return None
    return np.asarray(selections.positions, np.int32).reshape(-1, selections.num_layers, selections.top_k)
