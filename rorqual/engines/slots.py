"""The slot table: what the engine knows of each sequence that occupies a row of the cache.

Slots [0, num_decoding) decode, one token a step, and are kept together so that the cache is read in place. The others
hold a prompt being prefilled, or what is left of an ended request, whose tokens a later prompt may reuse
(`longest_prefix`), or nothing.

Shapes: S slots, C capacity in tokens, D hidden, L mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.engines.sampling import Draws
from rorqual.engines.steering import pack_alternatives
from rorqual.models.cache import KVCache
from rorqual.models.decoder import Decoder
from rorqual.models.index_keys import IndexKeys
from rorqual.records import (
    Alternatives,
    Completion,
    GenerateRequest,
    KeptTokens,
    Routes,
    Selections,
    from_json,
    to_json,
)

ROW_COLUMNS = ("tokens", "logprobs", "entropies", "kept_mass")
REPLAY_COLUMNS = ("routes", "selections")
SLOT_COLUMNS = ("length", "cached", "prompt_length", "last_used", "family")


class SlotTable:
    """Per-slot columns, moved and copied together with the cache rows that they describe.

    tokens [S, C]: prompt, then drawn tokens; length: how many are known; cached: how many the cache holds;
    prompt_length: how many came with the request; last_used: step of the last use, for eviction; family: slots of
    one number hold the same prompt; prompt_hidden [S, D]: hidden state after the last prompt token; routes [S, C,
    L*K]; selections: likewise, where they are recorded; kept: one array of ids for each drawn token; alternatives: one
    row of `steering.alternatives_row` for each drawn token, where the request asks for them.
    """

    def __init__(
        self,
        model: Decoder,
        num_slots: int,
        capacity: int,
        max_capacity: int,
        record_selections: bool = False,
        index_keys: IndexKeys = "model",
    ) -> None:
        self.num_slots, self.capacity, self.max_capacity = num_slots, capacity, max_capacity
        self.cache: KVCache = model.new_cache(num_slots, capacity, index_keys)
        self.tokens = np.zeros((num_slots, capacity), dtype=np.int64)
        self.logprobs = np.zeros((num_slots, capacity), dtype=np.float32)
        self.entropies = np.zeros((num_slots, capacity), dtype=np.float32)
        self.kept_mass = np.ones((num_slots, capacity), dtype=np.float32)
        self.length = np.zeros(num_slots, dtype=np.int64)
        self.cached = np.zeros(num_slots, dtype=np.int64)
        self.prompt_length = np.zeros(num_slots, dtype=np.int64)
        self.last_used = np.full(num_slots, -1, dtype=np.int64)
        self.family = np.arange(num_slots)
        self.requests: list[GenerateRequest | None] = [None] * num_slots
        self.kept: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        self.alternatives: list[list[np.ndarray]] = [[] for _ in range(num_slots)]
        self.prompt_hidden = model.embed_tokens.weight.detach().new_zeros(num_slots, model.config.hidden_size)
        moe = model.config.moe
        self.route_shape = (len(model.config.moe_layers), moe.experts_per_token) if moe else (0, 0)
        self.routes = np.zeros((num_slots, capacity, self.route_shape[0] * self.route_shape[1]), dtype=np.int16)
        dsa = model.config.dsa if record_selections and model.config.attention == "dsa" else None
        self.selection_shape = (len(model.config.indexer_layers), dsa.top_k) if dsa else (0, 0)
        selected = self.selection_shape[0] * self.selection_shape[1]
        self.selections = np.zeros((num_slots, capacity, selected), dtype=np.int32)

    # ------------------------------------------------------------------------------------------------ occupancy

    def free_slot(self, num_decoding: int) -> int | None:
        """The slot without a request that was used longest ago; None when all are busy."""
        idle = [s for s in range(num_decoding, self.num_slots) if self.requests[s] is None]
        return min(idle, key=lambda s: (self.last_used[s], s)) if idle else None

    def longest_prefix(self, prompt: np.ndarray) -> tuple[int, int]:
        """The slot whose cached tokens share the longest beginning with `prompt`, and that length (0: none).

        Among equals, one whose own prompt is as long: `prompt_hidden` then has what follows from it.
        """
        usable = np.minimum(self.cached, len(prompt))
        candidates = np.flatnonzero((usable > 0) & (self.tokens[:, 0] == prompt[0]))
        best_slot, best = -1, (0, False)
        for slot in candidates.tolist():
            limit, alike = int(usable[slot]), int(self.prompt_length[slot]) == len(prompt)
            if (limit, alike) <= best:
                continue
            different = np.flatnonzero(self.tokens[slot, :limit] != prompt[:limit])
            shared = int(different[0]) if len(different) else limit
            if (shared, alike) > best:
                best_slot, best = slot, (shared, alike)
        return best_slot, best[0]

    def shared_prompts(self, num_rows: int) -> tuple[list[int], np.ndarray]:
        """For each of the first slots: the first of its family, and how many tokens of its prompt they share."""
        leaders: dict[int, int] = {}
        rows = [leaders.setdefault(family, row) for row, family in enumerate(self.family[:num_rows].tolist())]
        return rows, self.prompt_length[:num_rows]

    def occupy(self, slot: int, request: GenerateRequest, step: int) -> None:
        """Give `slot` to `request`, as the first of a new family; what the cache holds of it must be set by the
        caller."""
        self.grow(len(request.prompt_ids) + 1)
        prompt = np.asarray(request.prompt_ids, dtype=np.int32)
        self.tokens[slot, : len(prompt)] = prompt
        self.length[slot] = self.prompt_length[slot] = len(prompt)
        self.cached[slot] = 0
        self.family[slot] = self.family.max() + 1
        self.requests[slot] = request
        self.kept[slot] = []
        self.alternatives[slot] = []
        self.last_used[slot] = step

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` cached tokens of `source`."""
        if source != target:
            self.cache.copy_tokens(source, target, length)
            for name in REPLAY_COLUMNS:
                column = getattr(self, name)
                column[target, :length] = column[source, :length]
        self.cached[target] = length

    def swap(self, first: int, second: int) -> None:
        """Exchange two slots in every respect."""
        if first == second:
            return
        self.cache.swap(first, second, int(max(self.cached[first], self.cached[second])))
        pair, swapped = [first, second], [second, first]
        for name in (*ROW_COLUMNS, *SLOT_COLUMNS, *REPLAY_COLUMNS):
            column = getattr(self, name)
            column[pair] = column[swapped]
        self.prompt_hidden[pair] = self.prompt_hidden[swapped]
        self.requests[first], self.requests[second] = self.requests[second], self.requests[first]
        for lists in (self.kept, self.alternatives):
            lists[first], lists[second] = lists[second], lists[first]

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens a slot, at least doubling, up to `max_capacity`.

        Raises: ValueError for more than `max_capacity`.
        """
        if capacity <= self.capacity:
            return
        if capacity > self.max_capacity:
            raise ValueError(
                f"A slot would need {capacity} tokens, and the window holds {self.max_capacity}; raise "
                "engine.context_window."
            )
        extra = min(max(capacity, 2 * self.capacity), self.max_capacity) - self.capacity
        for name in (*ROW_COLUMNS, *REPLAY_COLUMNS):
            column = getattr(self, name)
            padding = [(0, 0), (0, extra)] + [(0, 0)] * (column.ndim - 2)
            setattr(self, name, np.pad(column, padding))
        self.cache.grow(self.capacity + extra)
        self.capacity += extra

    def forget(self) -> None:
        """Drop what ended requests left behind: it was computed by other weights."""
        self.cached[:] = 0
        self.last_used[:] = -1

    @torch.inference_mode()
    def clear(self) -> None:
        """Be as if just made: nobody's, and the cache without a NaN that attention would carry from row to row."""
        self.forget()
        self.requests = [None] * self.num_slots
        self.prompt_hidden.zero_()
        for columns in self.cache.columns:
            for column in columns:
                column.zero_()

    # --------------------------------------------------------------------------------------------------- results

    def record_routes(self, slots: np.ndarray, positions_RQ: np.ndarray, routes: Tensor | None) -> None:
        """Store the experts of tokens just fed; `routes` is [R*Q, L, K]."""
        if routes is not None:
            values = routes.flatten(1).to(torch.int16).cpu().numpy()
            self.routes[slots[:, None], positions_RQ] = values.reshape(*positions_RQ.shape, -1)

    def record_selections(self, slots: np.ndarray, positions_RQ: np.ndarray, selections: Tensor | None) -> None:
        """Store the keys that tokens just fed have selected; `selections` is [R*Q, L, at most K]."""
        if selections is not None and self.selection_shape[0]:
            padded = F.pad(selections, (0, self.selection_shape[1] - selections.shape[-1]), value=-1)
            values = padded.flatten(1).to(torch.int32).cpu().numpy()
            self.selections[slots[:, None], positions_RQ] = values.reshape(*positions_RQ.shape, -1)

    def note(self, slots: range, draws: Draws) -> np.ndarray:
        """Append a drawn token, and all that is known of it, to each of consecutive slots; returns the tokens."""
        rows, place = np.arange(slots.start, slots.stop), self.length[slots.start : slots.stop]
        token_R: np.ndarray = draws.token_R.cpu().numpy()
        self.tokens[rows, place] = token_R
        self.logprobs[rows, place] = draws.logprob_R.float().cpu().numpy()
        self.entropies[rows, place] = draws.entropy_R.float().cpu().numpy()
        self.kept_mass[rows, place] = draws.kept_mass_R.float().cpu().numpy()
        self.length[slots.start : slots.stop] += 1
        if len(draws.kept_ids_N):
            ends = np.cumsum(draws.kept_count_R.cpu().numpy())
            ids_N = draws.kept_ids_N.to(torch.int32).cpu().numpy()
            for slot, ids in zip(slots, np.split(ids_N, ends[:-1]), strict=True):
                self.kept[slot].append(ids)
        return token_R

    def completion(self, slot: int, finish_reason: str, weight_version: int) -> Completion:
        """What `slot` drew, as a record."""
        start, end = int(self.prompt_length[slot]), int(self.length[slot])
        request = self.requests[slot]
        assert request is not None
        return Completion(
            request_id=request.request_id,
            token_ids=array("i", self.tokens[slot, start:end].astype(np.int32).tobytes()),
            logprobs=array("f", self.logprobs[slot, start:end].tobytes()),
            entropies=array("f", self.entropies[slot, start:end].tobytes()),
            kept_mass=array("f", self.kept_mass[slot, start:end].tobytes()),
            finish_reason="stop" if finish_reason == "stop" else "length",
            weight_version=weight_version,
            kept=_pack_kept(self.kept[slot]) if request.params.truncates else None,
            routes=self._routes(slot, end - 1),
            selections=self._selections(slot, end - 1),
            alternatives=self.noted_alternatives(slot, 0),
        )

    def noted_alternatives(self, slot: int, first: int) -> Alternatives | None:
        """Of the tokens drawn from the `first`-th on; None where the request asks for none."""
        request = self.requests[slot]
        count = request.num_alternatives if request is not None else None
        return None if count is None else pack_alternatives(self.alternatives[slot][first:], count)

    def _routes(self, slot: int, length: int) -> Routes | None:
        if not self.route_shape[0]:
            return None
        experts = array("h", self.routes[slot, :length].tobytes())
        return Routes(experts=experts, num_layers=self.route_shape[0], experts_per_token=self.route_shape[1])

    def _selections(self, slot: int, length: int) -> Selections | None:
        num_layers, top_k = self.selection_shape
        if not num_layers:
            return None
        positions = array("i", self.selections[slot, :length].tobytes())
        return Selections(positions=positions, num_layers=num_layers, top_k=top_k)

    # ---------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """The slots that hold a request or reusable tokens: their columns, and their cache on the CPU, cut to the
        longest. Of the others only what decides the order in which slots are taken."""
        slots = np.flatnonzero(np.array([r is not None for r in self.requests]) | (self.cached > 0))
        width = int(np.maximum(self.length, self.cached)[slots].max(initial=0))
        num_cached = int(self.cached.max())
        state: dict[str, Any] = {name: getattr(self, name)[slots, :width] for name in (*ROW_COLUMNS, *REPLAY_COLUMNS)}
        state |= {name: getattr(self, name).copy() for name in SLOT_COLUMNS}
        state["slots"] = slots
        where = torch.from_numpy(slots).to(self.prompt_hidden.device)
        state["cache"] = [[column[where, :num_cached].cpu() for column in columns] for columns in self.cache.columns]
        state["prompt_hidden"] = self.prompt_hidden[where].cpu()
        state["requests"] = [None if r is None else to_json(r).decode() for r in self.requests]
        state["kept_ids"] = [np.concatenate(k) if k else np.zeros(0, dtype=np.int32) for k in self.kept]
        state["alternatives"] = [np.stack(rows) if rows else np.zeros((0, 1)) for rows in self.alternatives]
        state["kept_counts"] = [np.array([len(ids) for ids in k], dtype=np.int64) for k in self.kept]
        return state

    @torch.inference_mode()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: ValueError when the state is of another number of slots, or of a larger window."""
        if len(state["requests"]) != self.num_slots:
            raise ValueError(
                f"The saved engine has {len(state['requests'])} slots, this one {self.num_slots}; "
                "set engine.num_slots back."
            )
        self.clear()
        slots, width = np.asarray(state["slots"]), state["tokens"].shape[1]
        self.grow(width)
        for name in (*ROW_COLUMNS, *REPLAY_COLUMNS):
            getattr(self, name)[slots, :width] = np.asarray(state[name])
        for name in SLOT_COLUMNS:
            getattr(self, name)[:] = np.asarray(state[name])
        where = torch.from_numpy(slots).to(self.prompt_hidden.device)
        for columns, saved in zip(self.cache.columns, state["cache"], strict=True):
            for column, values in zip(columns, saved, strict=True):
                column[where, : values.shape[1]] = values.to(column.device)
        self.prompt_hidden[where] = state["prompt_hidden"].to(self.prompt_hidden.device)
        self.requests = [None if r is None else from_json(r, GenerateRequest) for r in state["requests"]]
        self.kept = [
            np.split(np.asarray(ids), np.cumsum(counts)[:-1]) if len(counts) else []
            for ids, counts in zip(state["kept_ids"], state["kept_counts"], strict=True)
        ]
        self.alternatives = [list(np.asarray(rows)) for rows in state["alternatives"]]


def _pack_kept(kept: list[np.ndarray]) -> KeptTokens:
    offsets = np.cumsum([0, *(len(ids) for ids in kept)], dtype=np.int64)
    return KeptTokens(
        offsets=array("q", offsets.tobytes()), ids=array("i", np.concatenate(kept).astype(np.int32).tobytes())
    )
