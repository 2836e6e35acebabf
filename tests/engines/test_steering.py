"""Withdrawing one request, forbidden tokens, and what else could have been drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.layout import causal_layout
from rorqual.records import Completion, GenerateRequest
from tests.engines.test_local import VOCABULARY, assert_alike, mixed_requests, request, tiny_model


def run(engine: LocalEngine) -> dict[str, Completion]:
    done = {}
    while engine.num_unfinished:
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_an_aborted_request_leaves_the_others_as_they_were(kind: str, step: int) -> None:
    """Waiting, in the middle of its prompt, or decoding: the others draw the same, and every slot is free again."""
    model = tiny_model(kind)
    requests = mixed_requests()
    expected = {c.request_id: c for c in LocalEngine(model, EngineConfig(num_slots=24)).generate(requests)}
    engine = LocalEngine(model, EngineConfig(num_slots=5, prefill_chunk_tokens=9))
    engine.submit(requests)
    ended = {}
    for _ in range(step):
        ended |= {completion.request_id: completion for completion in engine.step()}
    victims = [r.request_id for r in requests[::3] if r.request_id not in ended]
    assert [engine.abort(name) for name in victims] == [True] * len(victims)
    ended |= run(engine)
    assert ended.keys() == {r.request_id for r in requests} - set(victims)
    for name, completion in ended.items():
        assert_alike(completion, expected[name])
    assert engine.num_in_flight == 0
    assert engine.table.requests == [None] * 5
    again = [r for r in requests if r.request_id in victims]
    for completion in engine.generate(again):
        assert_alike(completion, expected[completion.request_id])


def test_nobody_to_abort() -> None:
    engine = LocalEngine(tiny_model())
    assert engine.abort("x") is False
    engine.submit([request("x", [5, 6])])
    assert engine.abort("x") is True
    assert engine.abort("x") is False
    assert engine.num_unfinished == 0


def test_tokens_are_seen_as_they_are_drawn() -> None:
    engine = LocalEngine(tiny_model(), EngineConfig(num_slots=4))
    requests = mixed_requests(1)
    engine.submit(requests)
    seen: dict[str, list[int]] = {r.request_id: [] for r in requests}
    while engine.num_unfinished:
        completions = engine.step()
        for name, drawn in engine.drawn({name: len(ids) for name, ids in seen.items()}).items():
            seen[name] += drawn.token_ids
        for completion in completions:
            assert list(completion.token_ids[: len(seen[completion.request_id])]) == seen[completion.request_id]
            assert len(completion.token_ids) - len(seen[completion.request_id]) == 1


def test_alternatives_are_those_of_the_model_itself() -> None:
    """Whatever the temperature: log-probs of an uncached pass at temperature 1."""
    model = tiny_model()
    asked = [
        GenerateRequest(request_id=r.request_id, prompt_ids=r.prompt_ids, params=r.params, num_alternatives=count)
        for r, count in zip(mixed_requests(1), [None, 0, 1, 5, 100, 2], strict=True)
    ]
    for r, completion in zip(asked, LocalEngine(model, EngineConfig(num_slots=3)).generate(asked), strict=True):
        noted = completion.alternatives
        if r.num_alternatives is None:
            assert noted is None
            continue
        assert noted is not None
        context = torch.tensor([*r.prompt_ids, *completion.token_ids])[:-1]
        with torch.no_grad():
            hidden = model(context, causal_layout([len(context)])).hidden
            logprobs = model.logits(hidden[len(r.prompt_ids) - 1 :]).log_softmax(-1)
        best, ids = logprobs.topk(min(r.num_alternatives, VOCABULARY))
        assert noted.num == best.shape[1]
        assert len(noted) == len(completion.token_ids)
        own = logprobs[torch.arange(len(noted)), torch.tensor(completion.token_ids.tolist())]
        assert noted.logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-9)
        assert noted.top_logprobs.tolist() == pytest.approx(best.flatten().tolist(), abs=1e-9)
        assert noted.ids.tolist() == ids.flatten().tolist()


def test_alternatives_survive_a_restart() -> None:
    model = tiny_model()
    asked = [
        GenerateRequest(request_id=r.request_id, prompt_ids=r.prompt_ids, params=r.params, num_alternatives=2)
        for r in mixed_requests(1)
    ]
    expected = LocalEngine(model, EngineConfig(num_slots=3)).generate(asked)
    engine = LocalEngine(model, EngineConfig(num_slots=3))
    engine.submit(asked)
    found = {c.request_id: c for _ in range(3) for c in engine.step()}
    other = LocalEngine(model, EngineConfig(num_slots=3))
    other.load_state_dict(engine.state_dict())
    found |= run(other)
    for completion in expected:
        assert found[completion.request_id].alternatives == completion.alternatives


class Even:
    """Only even tokens, and all of them after `free_after`."""

    def __init__(self, free_after: int = 10**9) -> None:
        self.seen: list[int] = []
        self._free_after = free_after

    def allowed(self) -> np.ndarray | None:
        return None if len(self.seen) >= self._free_after else np.arange(VOCABULARY) % 2 == 0

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_constraint_binds_its_own_request_alone(kind: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype)
    requests = mixed_requests()
    plain = LocalEngine(model, EngineConfig(num_slots=8)).generate(requests)
    bound = {r.request_id: Even(4 if index % 2 else 10**9) for index, r in enumerate(requests) if index % 3 == 0}
    engine = LocalEngine(model, EngineConfig(num_slots=8))
    engine.submit(requests, bound)
    done = run(engine)
    odd = 0
    for completion in plain:
        found = done[completion.request_id]
        if completion.request_id not in bound:
            assert_alike(found, completion)
            continue
        constraint = bound[completion.request_id]
        assert constraint.seen == list(found.token_ids)
        limit = constraint._free_after
        assert all(token % 2 == 0 for token in found.token_ids[:limit])
        assert all(np.isfinite(value) for value in (*found.logprobs, *found.entropies))
        odd += sum(token % 2 for token in found.token_ids[limit:])
    assert odd
    assert engine.constraints == {}


def test_a_constraint_that_leaves_nothing_and_one_that_cannot_be_saved() -> None:
    class Nothing(Even):
        def allowed(self) -> np.ndarray | None:
            return np.zeros(VOCABULARY, dtype=bool)

    engine = LocalEngine(tiny_model())
    engine.submit([request("x", [5, 6])], {"x": Nothing()})
    with pytest.raises(ValueError, match="constrained; let them end or abort"):
        engine.state_dict()
    with pytest.raises(ValueError, match="leaves no token"):
        engine.step()
    engine.cancel()
    assert engine.constraints == {}
