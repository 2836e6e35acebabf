"""The indexer's loss query by query, with its gradients, as loops for one core; the torch twin is `dsa.indexer_kl`.

In: the main attention's queries and keys, the indexer's, and what each query selects, or nothing where all that it sees
counts. The main attention is a constant, and the loss is linear in the queries' weights, which are given, so that value
and gradient are taken in one sweep: with p the target and I the scores, dI = (softmax(I) - p) * weight.

Shapes: X queries of a tile, K keys, S selected keys, N keys that count for a query, H heads, G key-value heads, E key
width, I index heads, C index dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rorqual.ops.cpu.compiled import compiled
from rorqual.ops.cpu.gathered import add_outer, dots, mix, present, softmax
from rorqual.ops.cpu.select import kth_largest, to_rank


class Queries(NamedTuple):
    """Of the main attention [X, H, E], of the indexer [X, I, C] with its heads' weights [X, I], and the last key that
    each one sees [X]."""

    main: np.ndarray
    indexer: np.ndarray
    head_weight: np.ndarray
    last: np.ndarray


class Keys(NamedTuple):
    """Of the main attention [K, G, E], of the indexer [K, 1, C], and which are valid [K], empty where all are."""

    main: np.ndarray
    indexer: np.ndarray
    valid: np.ndarray


class Gradients(NamedTuple):
    """Of index queries [X, I, C] and heads' weights [X, I], written; of index keys [K, 1, C], added to."""

    index_q: np.ndarray
    head_weight: np.ndarray
    index_k: np.ndarray


@compiled
def indexer_kl_rows(
    queries: Queries,
    keys: Keys,
    selected_XS: np.ndarray,
    scale: float,
    row_weight_X: np.ndarray,
    gradients: Gradients,
    kl_X: np.ndarray,
    uniform_X: np.ndarray,
) -> None:
    """KL(p || softmax(I)) and KL(p || uniform) of each query, in nats. selected_XS: of no queries for all keys."""
    num_queries, num_index_heads, _ = queries.indexer.shape
    most = len(keys.main) if len(selected_XS) == 0 else selected_XS.shape[1]
    present_N, target_N = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.float32)
    heads_JN = np.empty((queries.main.shape[1] // keys.main.shape[1], most), dtype=np.float32)
    products_IN, scores_N = np.empty((num_index_heads, most), dtype=np.float32), np.empty(most, dtype=np.float32)
    for x in range(num_queries):
        gradients.index_q[x] = np.float32(0.0)
        gradients.head_weight[x] = np.float32(0.0)
        kl_X[x], uniform_X[x] = np.float32(0.0), np.float32(0.0)
        count = _counted(selected_XS, x, queries.last[x], keys.valid, present_N)
        if count == 0:
            continue
        selected, target, scores = present_N[:count], target_N[:count], scores_N[:count]
        _target(queries.main[x], keys.main, selected, scale, heads_JN, target)
        _scores(queries.indexer[x], keys.indexer, queries.head_weight[x], selected, products_IN, scores)
        entropy, expected = 0.0, 0.0
        for n in range(count):
            if target[n] > np.float32(0.0):
                entropy -= target[n] * np.log(target[n])
            expected += target[n] * scores[n]
        lse = softmax(scores, count, 1.0)
        kl_X[x], uniform_X[x] = lse - expected - entropy, np.log(np.float64(count)) - entropy
        weight = row_weight_X[x]
        for n in range(count):
            scores[n] = (scores[n] - target[n]) * weight
        _score_gradients(queries, x, keys.indexer, selected, products_IN, scores, gradients)


@compiled
def recall_rows(queries: Queries, keys: Keys, scale: float, top_k: int, recall_X: np.ndarray) -> None:
    """How much of the main attention lies on the `top_k` visible keys of highest score, of equal ones the first."""
    most = len(keys.main)
    present_N, target_N = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.float32)
    heads_JN = np.empty((queries.main.shape[1] // keys.main.shape[1], most), dtype=np.float32)
    products_IN = np.empty((queries.indexer.shape[1], most), dtype=np.float32)
    scores_N, ranks_N = np.empty(most, dtype=np.float32), np.empty(most, dtype=np.uint32)
    bins, none = np.empty(2048, dtype=np.int64), np.empty((0, 0), dtype=np.int64)
    for x in range(len(queries.indexer)):
        count = _counted(none, x, queries.last[x], keys.valid, present_N)
        selected, target, scores, ranks = present_N[:count], target_N[:count], scores_N[:count], ranks_N[:count]
        if count <= top_k:
            recall_X[x] = np.float32(min(count, 1))
            continue
        _target(queries.main[x], keys.main, selected, scale, heads_JN, target)
        _scores(queries.indexer[x], keys.indexer, queries.head_weight[x], selected, products_IN, scores)
        bits = scores.view(np.int32)
        for n in range(count):
            ranks[n] = to_rank(bits[n])
        least, room = kth_largest(ranks, top_k, bins)
        total = 0.0
        for n in range(count):
            if ranks[n] > least:
                total += target[n]
            elif ranks[n] == least and room > 0:
                total += target[n]
                room -= 1
        recall_X[x] = np.float32(total)


@compiled
def _counted(selected_XS: np.ndarray, x: int, last: int, valid_K: np.ndarray, present_N: np.ndarray) -> int:
    """Lists the keys that count for a query: those selected, or all that it sees."""
    if len(selected_XS) > 0:
        return present(selected_XS[x], present_N)
    count = 0
    for k in range(last + 1):
        present_N[count] = k
        count += 1 if len(valid_K) == 0 or valid_K[k] else 0
    return count


@compiled
def _target(
    q_HE: np.ndarray,
    keys_KGE: np.ndarray,
    selected: np.ndarray,
    scale: float,
    heads_JN: np.ndarray,
    target_N: np.ndarray,
) -> None:
    """The main attention's share of each key, averaged over the heads."""
    sharing = len(heads_JN)
    target_N[:] = np.float32(0.0)
    for group in range(keys_KGE.shape[1]):
        dots(q_HE[group * sharing : (group + 1) * sharing], keys_KGE, group, selected, heads_JN)
        for j in range(sharing):
            head = heads_JN[j]
            softmax(head, len(selected), scale)
            for n in range(len(selected)):
                target_N[n] += head[n]
    share = np.float32(1.0 / len(q_HE))
    for n in range(len(selected)):
        target_N[n] *= share


@compiled
def _scores(
    q_IC: np.ndarray,
    keys_K1C: np.ndarray,
    head_weight_I: np.ndarray,
    selected: np.ndarray,
    products_IN: np.ndarray,
    scores_N: np.ndarray,
) -> None:
    """`sum_j w[j] ReLU(q[j] . k)`; leaves the products."""
    dots(q_IC, keys_K1C, 0, selected, products_IN)
    zero = np.float32(0.0)
    scores_N[:] = zero
    for i in range(len(q_IC)):
        weight, products = head_weight_I[i], products_IN[i]
        for n in range(len(selected)):
            scores_N[n] += weight * (zero if products[n] < zero else products[n])


@compiled
def _score_gradients(
    queries: Queries,
    x: int,
    keys_K1C: np.ndarray,
    selected: np.ndarray,
    products_IN: np.ndarray,
    slopes_N: np.ndarray,
    gradients: Gradients,
) -> None:
    """From the scores' gradients to those of weights, queries and keys; the products become their own gradients."""
    zero = np.float32(0.0)
    for i in range(len(products_IN)):
        weight, products, total = queries.head_weight[x, i], products_IN[i], np.float32(0.0)
        for n in range(len(selected)):
            total += slopes_N[n] * (zero if products[n] < zero else products[n])
            products[n] = slopes_N[n] * weight if products[n] > zero else zero
        gradients.head_weight[x, i] = total
    mix(products_IN, keys_K1C, 0, selected, gradients.index_q[x])
    add_outer(products_IN, queries.indexer[x], 0, selected, gradients.index_k)
