"""The built-in engine: continuous batching over a key-value cache, on any device torch has.

In: GenerateRequests. Out: Completions with behaviour log-probs, kept-token sets, expert routes and the weight version.
Each `step` admits what fits, advances prefills by one chunk, and draws one token for every sequence that decodes.
A prompt that several requests share is prefilled once, and a prompt that continues what a slot still holds (the next
turn of a conversation) is prefilled from where they part.

Shapes: R rows, Q queries a row, D hidden, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rorqual.engines.sampling import LogitsNotFinite, Sampler
from rorqual.engines.slots import SlotTable
from rorqual.engines.steering import Constraint, Drawn, alternatives_row, forbid, log_probs
from rorqual.models.cache import cached_layout
from rorqual.models.decoder import Decoder
from rorqual.models.index_keys import IndexKeys
from rorqual.records import Completion, GenerateRequest, Record, from_json, to_json

INITIAL_CAPACITY = 128


class EngineConfig(Record):
    """num_slots: sequences in the cache at once, ended ones kept for reuse included. prefill_chunk_tokens: most
    prompt tokens, padding included, that one step feeds. context_window: 0 takes the model's. record_selections: return
    which keys sparse attention selected, to be replayed in training: 4 bytes a key, layer and token. index_keys: how
    the cache keeps the keys of sparse attention's indexers, see `models.index_keys`; fp8 takes a quarter of float32."""

    num_slots: int = 64
    prefill_chunk_tokens: int = 8192
    context_window: int = 0
    record_selections: bool = False
    index_keys: IndexKeys = "model"

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        for name, least in (("num_slots", 1), ("prefill_chunk_tokens", 1), ("context_window", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"EngineConfig.{name} = {getattr(self, name)}; expected at least {least}.")


class LocalEngine:
    """Implements `contracts.Engine` on a Decoder that it only reads."""

    def __init__(self, model: Decoder, config: EngineConfig | None = None, weight_version: int = 0) -> None:
        self.model, self.config = model, config or EngineConfig()
        self.weight_version = weight_version
        self.context_window = self.config.context_window or model.config.context_window
        if self.context_window > model.config.context_window:
            raise ValueError(
                f"engine.context_window = {self.context_window}, and the model was made for "
                f"{model.config.context_window} tokens. Lower it, or set 0 to take the model's."
            )
        capacity = min(INITIAL_CAPACITY, self.context_window)
        remembered = (self.config.record_selections, self.config.index_keys)
        self.table = SlotTable(model, self.config.num_slots, capacity, self.context_window, *remembered)
        self.queue: deque[GenerateRequest] = deque()
        self.undelivered: list[Completion] = []
        self.num_decoding = 0
        self.num_steps = 0
        self.constraints: dict[str, Constraint] = {}
        self.sampler: tuple[list[GenerateRequest | None], Sampler] = ([], Sampler([]))

    # --------------------------------------------------------------------------------------------------- contract

    @property
    def num_unfinished(self) -> int:
        """Requests whose completion no `step` or `generate` has returned yet."""
        return self.num_in_flight + len(self.undelivered)

    @property
    def num_in_flight(self) -> int:
        """Requests that wait or are being answered."""
        return len(self.queue) + sum(request is not None for request in self.table.requests)

    def submit(self, requests: Sequence[GenerateRequest], constraints: Mapping[str, Constraint] | None = None) -> None:
        """Queue requests; `constraints`, by request id, say which tokens may come.

        Raises: ValueError for an empty prompt, one that fills the window, or an id in flight; then none of the requests
        is queued.
        """
        if self.model.embed_tokens.weight.dtype != self.table.cache.dtype:
            raise ValueError(
                f"The model is {self.model.embed_tokens.weight.dtype} now, and was {self.table.cache.dtype} when this "
                "engine was built; build another engine after the cast."
            )
        in_flight = {r.request_id for r in (*self.queue, *self.table.requests, *self.undelivered) if r is not None}
        for request in requests:
            self._check(request, in_flight)
            in_flight.add(request.request_id)
        self.queue.extend(requests)
        self.constraints |= constraints or {}

    def step(self) -> list[Completion]:
        """Advance all requests; the completions that ended, those first that ended during a call of `generate`."""
        self.undelivered += self._advance()
        delivered, self.undelivered = self.undelivered, []
        return delivered

    @torch.inference_mode()
    def _advance(self) -> list[Completion]:
        self.num_steps += 1
        if self.model.training:  # walking through all modules each step would cost more than a small model's layer
            self.model.eval()
        finished = self._decode() if self.num_decoding else []
        self._admit()
        return finished + self._prefill()

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Run `requests` to their end, alone or beside others in flight, and return them in their order.

        Others that end meanwhile are returned by the next `step`.
        """
        self.submit(requests)
        done: dict[str, Completion] = {}
        wanted = {request.request_id for request in requests}
        while not wanted <= done.keys():
            for completion in self._advance():
                if completion.request_id in wanted:
                    done[completion.request_id] = completion
                else:
                    self.undelivered.append(completion)
        return [done[request.request_id] for request in requests]

    def drawn(self, since: Mapping[str, int]) -> dict[str, Drawn]:
        """For each request in flight that has drawn tokens: those after its first `since` ones, 0 where it is not
        named. What ended is in the completions of `step` instead."""
        found = {}
        for slot, request in enumerate(self.table.requests[: self.num_decoding]):
            if request is not None:
                first = since.get(request.request_id, 0)
                start = int(self.table.prompt_length[slot]) + first
                ids = self.table.tokens[slot, start : int(self.table.length[slot])]
                alternatives = self.table.noted_alternatives(slot, first)
                found[request.request_id] = Drawn(array("i", ids.astype(np.int32).tobytes()), alternatives)
        return found

    def abort(self, request_id: str) -> bool:
        """Withdraw one request between two steps; the others draw what they would have drawn.

        What the cache holds of it stays for prompts that begin alike. False when no such request is in flight.
        """
        self.constraints.pop(request_id, None)
        waiting = [request for request in self.queue if request.request_id != request_id]
        if len(waiting) < len(self.queue):
            self.queue = deque(waiting)
            return True
        for slot, request in enumerate(self.table.requests):
            if request is not None and request.request_id == request_id:
                self._leave(slot)
                return True
        return False

    def cancel(self) -> None:
        """Give up every request that waits or is being answered. Nothing cached survives."""
        self.queue.clear()
        self.constraints.clear()
        self.num_decoding = 0
        self.table.clear()

    def load_weights(self, source: Decoder, version: int) -> None:
        """Sample from `source`'s weights from now on; nothing cached survives. `source` may be the engine's own model.

        Raises: ValueError while requests are in flight, since one completion would then come from two policies.
        """
        if self.num_in_flight:
            raise ValueError(
                f"{self.num_in_flight} requests are in flight; let them end before new weights are loaded, or cancel "
                "them."
            )
        if source is not self.model:
            self.model.load_state_dict(source.state_dict())
        self.weight_version = version
        self.table.forget()

    def state_dict(self) -> dict[str, Any]:
        """Queue, slots and cache: all that the coming steps depend on but the weights.

        Raises: ValueError while a constrained request is in flight; what a constraint has seen cannot be saved.
        """
        if self.constraints:
            raise ValueError(f"Requests {list(self.constraints)} are constrained; let them end or abort them first.")
        return {
            "table": self.table.state_dict(),
            "queue": [to_json(request).decode() for request in self.queue],
            "undelivered": to_json(self.undelivered).decode(),
            "num_decoding": self.num_decoding,
            "num_steps": self.num_steps,
            "weight_version": self.weight_version,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.table.load_state_dict(state["table"])
        self.queue = deque(from_json(request, GenerateRequest) for request in state["queue"])
        self.undelivered = from_json(state["undelivered"], list[Completion])
        self.num_decoding, self.num_steps = int(state["num_decoding"]), int(state["num_steps"])
        self.weight_version = int(state["weight_version"])

    # ----------------------------------------------------------------------------------------------------- phases

    def _check(self, request: GenerateRequest, in_flight: set[str]) -> None:
        name, length = request.request_id, len(request.prompt_ids)
        if name in in_flight:
            raise ValueError(f"Request {name!r} is already in flight; give each request an id of its own.")
        if length == 0:
            raise ValueError(f"Request {name!r} has an empty prompt; give it at least the begin-of-sentence token.")
        if length >= self.context_window:
            raise ValueError(
                f"Request {name!r} has a prompt of {length} tokens, and the window holds {self.context_window}, the "
                "answer included. Shorten the prompt or raise engine.context_window."
            )
        out_of_range = [t for t in request.prompt_ids if not 0 <= t < self.model.config.vocab_size]
        if out_of_range:
            raise ValueError(
                f"Request {name!r} holds token {out_of_range[0]}; the vocabulary has {self.model.config.vocab_size}."
            )

    def _admit(self) -> None:
        """Give free slots to queued requests. One whose prompt is being prefilled right now waits, and then shares
        it."""
        pending = {
            bytes(r.prompt_ids)
            for slot, r in enumerate(self.table.requests)
            if r is not None and self._missing(slot) > 0
        }
        waiting: deque[GenerateRequest] = deque()
        while self.queue:
            request = self.queue.popleft()
            key = bytes(request.prompt_ids)
            if key in pending:
                waiting.append(request)
                continue
            prompt = np.asarray(request.prompt_ids, dtype=np.int32)
            source, shared = self.table.longest_prefix(prompt)
            if shared == len(prompt) == self.table.prompt_length[source]:
                if not self._fork(request, source):
                    waiting.append(request)
                    break
                continue
            if not self._start(request, source, min(shared, len(prompt) - 1)):
                waiting.append(request)
                break
            pending.add(key)
        self.queue.extendleft(reversed(waiting))

    def _start(self, request: GenerateRequest, source: int, shared: int) -> bool:
        """Begin a prefill after the `shared` tokens that `source` holds; False when no slot is free."""
        slot = self.table.free_slot(self.num_decoding)
        if slot is None:
            return False
        self.table.occupy(slot, request, self.num_steps)
        self.table.copy_prefix(source, slot, shared) if shared else None
        return True

    def _fork(self, request: GenerateRequest, source: int) -> bool:
        """Start from a prompt that `source` has finished; its first token is drawn with the coming prefills."""
        slot = self.table.free_slot(self.num_decoding)
        if slot is None:
            return False
        length, family = int(self.table.prompt_length[source]), self.table.family[source]
        self.table.last_used[source] = self.num_steps
        in_place = slot == source and self.table.requests[slot] is None
        self.table.occupy(slot, request, self.num_steps)
        self.table.family[slot] = family
        if in_place:
            self.table.cached[slot] = length
            return True
        self.table.copy_prefix(source, slot, length)
        self.table.prompt_hidden[slot] = self.table.prompt_hidden[source]
        return True

    def _prefill(self) -> list[Completion]:
        """Feed one chunk of prompts; then draw the first token of all that are complete, and of those that share
        them."""
        table = self.table
        slots = [s for s in range(self.num_decoding, table.num_slots) if table.requests[s] is not None]
        unfed = sorted((s for s in slots if table.cached[s] < table.prompt_length[s]), key=self._missing)
        if unfed:
            self._feed_chunk(unfed)
            self._admit()
        ready = [
            s
            for s in range(self.num_decoding, table.num_slots)
            if table.requests[s] is not None and table.cached[s] == table.prompt_length[s]
        ]
        if not ready:
            return []
        for slot in ready:
            table.swap(slot, self.num_decoding)
            self.num_decoding += 1
        first = self.num_decoding - len(ready)
        return self._draw(range(first, self.num_decoding), table.prompt_hidden[first : self.num_decoding])

    def _missing(self, slot: int) -> int:
        return int(self.table.prompt_length[slot] - self.table.cached[slot])

    def _feed_chunk(self, slots: list[int]) -> None:
        """The shortest prompts first, as many as the chunk holds; a prompt longer than the chunk is fed in parts.

        Rows are padded to the longest, which may go past a row's end but not past the window.
        """
        table, budget = self.table, self.config.prefill_chunk_tokens
        count, furthest = 1, int(table.cached[slots[0]])
        while count < len(slots) and (count + 1) * self._missing(slots[count]) <= budget:
            furthest = max(furthest, int(table.cached[slots[count]]))
            if furthest + self._missing(slots[count]) > self.context_window:
                break
            count += 1
        rows = np.array(slots[:count])
        num_queries = min(self._missing(slots[count - 1]), budget)
        new = np.minimum(table.prompt_length[rows] - table.cached[rows], num_queries)
        starts = table.cached[rows].copy()
        table.grow(int(starts.max()) + num_queries)
        positions_RQ = starts[:, None] + np.arange(num_queries)
        layout = cached_layout(rows.tolist(), starts, num_queries, table.cache)
        output = self.model.forward_cached(self._tensor(table.tokens[rows[:, None], positions_RQ]), table.cache, layout)
        table.record_routes(rows, positions_RQ, output.routes)
        table.record_selections(rows, positions_RQ, output.selections)
        table.cached[rows] += new
        table.prompt_hidden[rows] = output.hidden[self._tensor(np.arange(len(rows))), self._tensor(new - 1)]

    def _decode(self) -> list[Completion]:
        """One token for each decoding slot."""
        table, rows = self.table, np.arange(self.num_decoding)
        table.grow(int(table.length[rows].max()) + 1)
        positions_RQ = (table.length[rows] - 1)[:, None]
        shared = table.shared_prompts(self.num_decoding)
        layout = cached_layout(range(self.num_decoding), positions_RQ[:, 0], 1, table.cache, shared)
        output = self.model.forward_cached(self._tensor(table.tokens[rows[:, None], positions_RQ]), table.cache, layout)
        table.record_routes(rows, positions_RQ, output.routes)
        table.record_selections(rows, positions_RQ, output.selections)
        table.cached[rows] = table.length[rows]
        return self._draw(range(self.num_decoding), output.hidden[:, 0])

    def _draw(self, slots: range, hidden_RD: Tensor) -> list[Completion]:
        """Draw the next token of consecutive slots, note everything about it, and retire those that ended."""
        table, rows = self.table, slice(slots.start, slots.stop)
        sampler, place = self._sampler(table.requests[rows]), table.length[rows]
        drawn = place - table.prompt_length[rows]
        requests = table.requests[rows]
        logits_RV = self.model.logits(hidden_RD)
        logprobs = log_probs(logits_RV, requests)
        try:
            draws = sampler.draw(forbid(logits_RV, requests, self.constraints), drawn)
        except LogitsNotFinite as error:
            asked = [table.requests[slots.start + row] for row in error.rows[:3]]
            named = ", ".join(repr(request.request_id) for request in asked if request is not None)
            raise ValueError(f"{error} Requests: {named}. `cancel` frees the engine for other weights.") from error
        table.grow(int(place.max()) + 1)
        token_R = table.note(slots, draws)
        for row, logprob_V in logprobs.items():
            count = getattr(requests[row], "num_alternatives", 0)
            table.alternatives[slots.start + row].append(alternatives_row(logprob_V, int(token_R[row]), count))
        self._tell_constraints(requests, token_R)
        stopped = sampler.stops(token_R)
        ended = stopped | (drawn + 1 >= sampler.max_new_R) | (table.length[rows] >= self.context_window)
        reasons = {row: "stop" if stopped[row] else "length" for row in np.flatnonzero(ended).tolist()}
        return [self._retire(slots.start + row, reason) for row, reason in reversed(reasons.items())][::-1]

    def _sampler(self, requests: list[GenerateRequest | None]) -> Sampler:
        """That of the last draw, where the same requests draw again."""
        drew, sampler = self.sampler
        if len(drew) != len(requests) or any(a is not b for a, b in zip(drew, requests, strict=True)):
            sampler = Sampler([request.params for request in requests if request is not None])
            self.sampler = (requests, sampler)
        return sampler

    def _retire(self, slot: int, finish_reason: str) -> Completion:
        """Hand out the completion of a decoding slot and leave its tokens behind for reuse. Called from the last slot
        down."""
        completion = self.table.completion(slot, finish_reason, self.weight_version)
        self.constraints.pop(completion.request_id, None)
        self._leave(slot)
        return completion

    def _leave(self, slot: int) -> None:
        """Free a slot; what it holds stays for reuse."""
        self.table.requests[slot] = None
        self.table.last_used[slot] = self.num_steps
        if slot < self.num_decoding:
            self.num_decoding -= 1
            self.table.swap(slot, self.num_decoding)

    def _tell_constraints(self, requests: list[GenerateRequest | None], token_R: np.ndarray) -> None:
        for request, token in zip(requests, token_R.tolist(), strict=True):
            constraint = self.constraints.get(request.request_id) if request is not None else None
            if constraint is not None:
                constraint.accept(token)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.model.embed_tokens.weight.device)
