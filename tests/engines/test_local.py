"""The local engine against the packed forward pass, against itself under other schedules, and interrupted."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.config import DSAConfig, MLAConfig, ModelConfig, MoEConfig, NSAConfig, RopeConfig
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.records import Completion, GenerateRequest, SamplingParams

VOCABULARY = 50


def tiny_model(kind: str = "mla", dtype: torch.dtype = torch.float64) -> Decoder:
    """ "mla" has experts. "+dsa" selects 6 keys, "+nsa" reads 2 blocks of 4."""
    kind, _, sparse = kind.partition("+")
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=12)
    moe = MoEConfig(
        num_experts=8,
        experts_per_token=2,
        expert_intermediate_size=16,
        num_shared_experts=1,
        num_groups=4,
        groups_per_token=2,
        dense_layers=(0,),
    )
    blocks = NSAConfig(
        block_length=4, block_stride=2, selected_length=4, num_selected=2, num_initial=0, num_local=1, window=3
    )
    config = ModelConfig(
        family="deepseek_v3" if kind == "mla" else "qwen3",
        attention=sparse or "dense",
        dsa=DSAConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=8) if sparse == "dsa" else None,
        nsa=blocks if sparse == "nsa" else None,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4 if kind == "mla" else 2,
        head_dim=8,
        context_window=64,
        rope=RopeConfig(interleaved=kind == "mla"),
        mla=mla if kind == "mla" else None,
        moe=moe if kind == "mla" else None,
        qk_norm=kind != "mla",
        initializer_range=0.3,
    )
    model = Decoder(config).to(dtype).eval()
    model.initialize(torch.Generator().manual_seed(1))
    return model


def request(name: str, prompt: list[int], **params: Any) -> GenerateRequest:
    defaults = {"max_new_tokens": 12, "stop_token_ids": (3,), "top_p": 0.9}
    return GenerateRequest(
        request_id=name, prompt_ids=array("i", prompt), params=SamplingParams(**{**defaults, **params})
    )


def mixed_requests(group_size: int = 4) -> list[GenerateRequest]:
    """Six prompts of lengths 1 to 20, each asked for by a group, under four kinds of sampling."""
    generator = torch.Generator().manual_seed(3)
    kinds: list[dict[str, Any]] = [
        {},
        {"top_p": 1.0},
        {"temperature": 0.0},
        {"top_k": 5, "min_p": 0.01, "temperature": 1.3},
    ]
    requests = []
    for group, length in enumerate([1, 20, 7, 7, 13, 2]):
        prompt = torch.randint(4, VOCABULARY, (length,), generator=generator).tolist()
        for member in range(group_size):
            requests.append(request(f"{group}.{member}", prompt, seed=100 * group + member, **kinds[member % 4]))
    return requests


def generate(model: Decoder, requests: list[GenerateRequest], **config: int) -> list[Completion]:
    return LocalEngine(model, EngineConfig(**config)).generate(requests)


def assert_alike(first: Completion, second: Completion) -> None:
    assert first.token_ids == second.token_ids
    assert first.kept == second.kept
    assert first.routes == second.routes
    assert first.finish_reason == second.finish_reason
    assert list(first.logprobs) == pytest.approx(list(second.logprobs), abs=1e-6)


@pytest.mark.parametrize("kind", ["mla", "gqa", "mla+dsa", "gqa+dsa", "gqa+nsa"])
@pytest.mark.parametrize(("num_slots", "chunk"), [(1, 3), (3, 5), (8, 100), (24, 8192)])
def test_what_is_drawn_does_not_depend_on_the_schedule(kind: str, num_slots: int, chunk: int) -> None:
    model = tiny_model(kind)
    requests = mixed_requests()
    alone = [generate(model, [r], num_slots=1)[0] for r in requests]
    together = generate(model, requests, num_slots=num_slots, prefill_chunk_tokens=chunk)
    for first, second in zip(alone, together, strict=True):
        assert_alike(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["mla", "gqa", "mla+dsa", "gqa+dsa", "gqa+nsa"])
def test_records_equal_the_packed_forward_pass(kind: str, dtype: torch.dtype) -> None:
    """Log-probs over the kept set, entropies, kept mass and routes, recomputed by one uncached pass.

    In float32 compiled kernels decode, and torch recomputes.
    """
    model = tiny_model(kind, dtype)
    requests = mixed_requests()
    for r, completion in zip(requests, generate(model, requests, num_slots=5, prefill_chunk_tokens=9), strict=True):
        context = torch.tensor([*r.prompt_ids, *completion.token_ids])[:-1]
        with torch.no_grad():
            output = model(context, causal_layout([len(context)]))
            logits = model.logits(output.hidden)[len(r.prompt_ids) - 1 :]
        assert completion.routes is None or completion.routes.experts == array("h", output.routes.flatten().tolist())
        for place, token in enumerate(completion.token_ids):
            if r.params.temperature == 0.0:
                assert token == int(logits[place].argmax()) and completion.logprobs[place] == 0.0
                continue
            logprobs = (logits[place] / r.params.temperature).log_softmax(-1)
            kept = list(range(VOCABULARY))
            if completion.kept is not None:
                kept = list(completion.kept.ids[completion.kept.offsets[place] : completion.kept.offsets[place + 1]])
            within = logprobs[kept].log_softmax(-1)
            assert completion.logprobs[place] == pytest.approx(float(within[kept.index(token)]), abs=1e-5)
            assert completion.kept_mass[place] == pytest.approx(float(logprobs[kept].exp().sum()), abs=1e-5)
            assert completion.entropies[place] == pytest.approx(float(-(within.exp() * within).sum()), abs=1e-5)


@pytest.mark.parametrize("kind", ["mla+dsa", "gqa+dsa"])
def test_selections_equal_those_of_the_packed_forward_pass(kind: str) -> None:
    """Recorded over prefills in chunks, shared prompts and decoding; not at all unless it is asked for."""
    model, requests = tiny_model(kind), mixed_requests()
    assert all(each.selections is None for each in generate(model, requests[:2]))
    engine = LocalEngine(model, EngineConfig(num_slots=5, prefill_chunk_tokens=9, record_selections=True))
    for r, completion in zip(requests, engine.generate(requests), strict=True):
        context = torch.tensor([*r.prompt_ids, *completion.token_ids])[:-1]
        with torch.no_grad():
            expected_TLS = model(context, causal_layout([len(context)])).selections
        assert expected_TLS is not None and completion.selections is not None
        found_TLS = torch.tensor(completion.selections.positions).view(len(context), -1, 6)
        width = expected_TLS.shape[-1]
        assert torch.equal(found_TLS[..., :width], expected_TLS) and (found_TLS[..., width:] == -1).all()


def test_a_shared_prompt_is_prefilled_once() -> None:
    model = tiny_model()
    engine = LocalEngine(model, EngineConfig(num_slots=16))
    fed = count_fed_tokens(engine)
    engine.generate([request(str(i), list(range(4, 24)), seed=i, max_new_tokens=1) for i in range(16)])
    assert sum(fed) == 20


def test_a_later_turn_reuses_the_cached_prefix() -> None:
    model = tiny_model()
    engine = LocalEngine(model, EngineConfig(num_slots=4))
    first = engine.generate([request("turn 1", list(range(4, 20)), seed=1, max_new_tokens=6, stop_token_ids=())])[0]
    second_prompt = [*range(4, 20), *first.token_ids, 30, 31, 32]
    fed = count_fed_tokens(engine)
    second = engine.generate([request("turn 2", second_prompt, seed=2, max_new_tokens=1)])[0]
    assert sum(fed) == 4  # the last token drawn was never fed; then the three new ones
    assert_alike(second, generate(model, [request("turn 2", second_prompt, seed=2, max_new_tokens=1)])[0])


def test_all_who_share_a_prompt_start_in_the_step_that_ends_its_prefill() -> None:
    engine = LocalEngine(tiny_model(), EngineConfig(num_slots=8))
    engine.submit([request(str(i), list(range(4, 24)), seed=i, stop_token_ids=()) for i in range(8)])
    engine.step()
    assert engine.num_decoding == 8
    assert engine.table.length.tolist() == [21] * 8


def test_all_who_share_a_prompt_start_together_beside_a_longer_one_that_begins_alike() -> None:
    engine = LocalEngine(tiny_model(), EngineConfig(num_slots=8))
    engine.generate([request("longer", list(range(4, 24)), max_new_tokens=1)])
    engine.submit([request(str(i), list(range(4, 14)), seed=i, stop_token_ids=()) for i in range(8)])
    engine.step()
    assert engine.num_decoding == 8


def test_the_cache_never_outgrows_the_window() -> None:
    """Neither by doubling, nor by padding: of two prompts fed at once, one goes on after 150 tokens, one begins."""
    model = tiny_model("gqa")
    model.config = msgspec.structs.replace(model.config, context_window=200)
    config = EngineConfig(num_slots=3)
    first = [4 + i % 40 for i in range(150)]
    asked = [request("on", [*first, *range(4, 24)], seed=1), request("new", [9 + i % 30 for i in range(100)], seed=2)]
    asked.append(request("full", [5 + i % 7 for i in range(180)], seed=3, max_new_tokens=50, stop_token_ids=()))
    alone = [LocalEngine(model, config).generate([r])[0] for r in asked]
    engine = LocalEngine(model, config)
    engine.generate([request("first", first, max_new_tokens=1)])
    together = engine.generate(asked)
    assert engine.table.capacity == engine.table.cache.capacity == 200
    for mine, theirs in zip(together, alone, strict=True):
        assert_alike(mine, theirs)
    assert len(together[2].token_ids) == 20


def count_fed_tokens(engine: LocalEngine) -> list[int]:
    fed: list[int] = []
    forward_cached = engine.model.forward_cached

    def counting(token_ids_RQ: torch.Tensor, *arguments: Any) -> Any:
        fed.append(token_ids_RQ.numel())
        return forward_cached(token_ids_RQ, *arguments)

    engine.model.forward_cached = counting  # type: ignore[method-assign]
    return fed


@pytest.mark.parametrize(("num_slots", "kind"), [(2, "mla"), (7, "mla"), (5, "mla+dsa"), (5, "gqa+nsa")])
def test_interrupted_at_any_step_and_resumed_is_the_same(num_slots: int, kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float32)
    config = EngineConfig(num_slots=num_slots, prefill_chunk_tokens=16, record_selections=True)
    uninterrupted = LocalEngine(model, config)
    uninterrupted.submit(mixed_requests())
    states, history = [], []
    while uninterrupted.num_unfinished:
        states.append(uninterrupted.state_dict())
        history.append(uninterrupted.step())
    for cut in range(0, len(states), 5):
        resumed = LocalEngine(model, config)
        resumed.load_state_dict(states[cut])
        assert [resumed.step() for _ in history[cut:]] == history[cut:]
        assert not resumed.num_unfinished


def test_the_state_holds_what_is_used_and_no_more() -> None:
    """Of 16 slots, one that ended and two in flight; nothing once new weights have made the cache void."""
    model = tiny_model("gqa", dtype=torch.float32)
    config = EngineConfig(num_slots=16)
    engine = LocalEngine(model, config)
    engine.generate([request("ended", list(range(4, 24)), max_new_tokens=1)])
    engine.submit([request(name, list(range(30, end)), stop_token_ids=()) for name, end in (("a", 35), ("b", 38))])
    engine.step()
    engine.step()
    state = engine.state_dict()
    assert len(state["table"]["slots"]) == 3
    for column in (tensor for columns in state["table"]["cache"] for tensor in columns):
        assert column.shape == (3, 20, 16)
        assert column.device.type == "cpu"
    assert state["table"]["tokens"].shape == (3, 21)
    resumed = LocalEngine(model, config)
    resumed.load_state_dict(state)
    for _ in range(12):
        assert resumed.step() == engine.step()
    fed = count_fed_tokens(resumed)
    resumed.generate([request("again", [*range(4, 24), 25, 26], max_new_tokens=1)])
    assert sum(fed) == 2
    engine.load_weights(model, version=1)
    assert all(tensor.numel() == 0 for columns in engine.state_dict()["table"]["cache"] for tensor in columns)


def test_a_state_of_a_larger_window_is_refused() -> None:
    engine = LocalEngine(tiny_model())
    engine.submit([request("a", [5] * 40)])
    engine.step()
    with pytest.raises(ValueError, match="need 41 tokens.*window holds 30.*raise engine.context_window"):
        LocalEngine(tiny_model(), EngineConfig(context_window=30)).load_state_dict(engine.state_dict())


def test_generate_keeps_what_others_finish_for_the_next_step() -> None:
    model = tiny_model()
    short = request("short", [5, 6], max_new_tokens=2, stop_token_ids=())
    long = request("long", [7, 8], max_new_tokens=9, stop_token_ids=())
    engine = LocalEngine(model, EngineConfig(num_slots=2))
    engine.submit([short])
    assert [completion.request_id for completion in engine.generate([long])] == ["long"]
    assert engine.num_unfinished == 1
    with pytest.raises(ValueError, match="'short' is already in flight"):
        engine.submit([short])
    resumed = LocalEngine(model, EngineConfig(num_slots=2))
    resumed.load_state_dict(engine.state_dict())
    for each in (engine, resumed):
        (completion,) = each.step()
        assert_alike(completion, generate(model, [short])[0])
        assert each.num_unfinished == 0
        assert each.step() == []


def test_new_weights_forget_the_cache_and_carry_a_version() -> None:
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    engine = LocalEngine(model, EngineConfig(num_slots=2))
    ask = request("a", [5, 6, 7, 8], seed=4)
    before = engine.generate([ask])[0]
    engine.load_weights(other, version=7)
    after = engine.generate([ask])[0]
    assert (before.weight_version, after.weight_version) == (0, 7)
    assert_alike(after, generate(other, [ask])[0])
    assert list(after.logprobs) != list(before.logprobs)


def test_new_weights_are_refused_while_requests_are_in_flight() -> None:
    engine = LocalEngine(tiny_model())
    engine.submit([request("a", [5])])
    with pytest.raises(ValueError, match="1 requests are in flight"):
        engine.load_weights(tiny_model(), version=1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty prompt"), (list(range(4, 50)) * 2, "prompt of 92 tokens.*window holds 64"), ([4, 99], "token 99")],
)
def test_bad_prompts_are_refused_and_nothing_is_queued(prompt: list[int], message: str) -> None:
    engine = LocalEngine(tiny_model())
    with pytest.raises(ValueError, match=message):
        engine.submit([request("good", [5]), request("bad", prompt)])
    assert engine.num_unfinished == 0


def test_an_id_in_flight_is_refused() -> None:
    engine = LocalEngine(tiny_model())
    engine.submit([request("a", [5])])
    with pytest.raises(ValueError, match="'a' is already in flight"):
        engine.submit([request("a", [6])])


def test_the_window_ends_a_completion() -> None:
    completion = generate(tiny_model(), [request("a", [5] * 60, max_new_tokens=50, stop_token_ids=())])[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 4


def reference_logprobs(model: Decoder, asked: GenerateRequest, completion: Completion) -> torch.Tensor:
    """Of the drawn tokens, from the whole sequence at once; for requests without truncation."""
    tokens = torch.tensor([*asked.prompt_ids, *completion.token_ids])
    with torch.no_grad():
        logits_TV = model.logits(model(tokens[:-1], causal_layout([len(tokens) - 1])).hidden)
    drawn = tokens[len(asked.prompt_ids) :]
    return logits_TV[len(asked.prompt_ids) - 1 :].log_softmax(-1).gather(1, drawn[:, None])[:, 0]


def test_many_rows_read_the_prompts_of_their_own_groups() -> None:
    """More rows than a compiled block takes at once, of three groups whose prompts differ in length."""
    model = tiny_model("gqa", torch.float32)
    requests = [
        request(f"{group}.{member}", list(range(4 + group, 4 + group + length)), seed=member, top_p=1.0)
        for member in range(16)
        for group, length in enumerate((20, 3, 11))
    ]
    for asked, completion in zip(requests, generate(model, requests, num_slots=64), strict=True):
        expected = reference_logprobs(model, asked, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs.tolist()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("mla", "gqa", "gqa+dsa", "gqa+nsa"))
def test_an_interrupted_step_leaves_nothing_wrong_behind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the forward pass and the draw, the request goes on as if nothing had been, and so does the turn
    that continues it."""
    model, undisturbed = tiny_model(kind), LocalEngine(tiny_model(kind))
    engine, logits, calls = LocalEngine(model, EngineConfig(num_slots=1)), model.logits, 0

    def interrupted(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return logits(hidden)

    monkeypatch.setattr(model, "logits", interrupted)
    asked = request("a", [5, 6, 7], temperature=0.0)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([asked])
    done: list[Completion] = []
    while engine.num_unfinished:
        done += engine.step()
    assert_alike(done[0], undisturbed.generate([asked])[0])
    following = request("b", [5, 6, 7, *done[0].token_ids, 9], seed=3)
    assert_alike(engine.generate([following])[0], undisturbed.generate([following])[0])


def test_nan_names_the_request_and_cancel_frees_the_engine() -> None:
    model, healthy = tiny_model("gqa"), tiny_model("gqa")
    engine = LocalEngine(model, EngineConfig(num_slots=2))
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite.*Requests: 'bad'.*`cancel` frees the engine"):
        engine.generate([request("bad", [5, 6, 7])])
    with pytest.raises(ValueError, match="cancel them"):
        engine.load_weights(healthy, version=1)
    engine.cancel()
    assert engine.num_unfinished == 0
    engine.load_weights(healthy, version=1)
    asked = request("good", [5, 6, 7])
    assert_alike(engine.generate([asked])[0], generate(healthy, [asked])[0])


@pytest.mark.parametrize("typecode", ("h", "l", "q"))
def test_prompts_of_any_integer_type(typecode: str) -> None:
    model, asked = tiny_model(), request("a", [5, 6, 7, 8])
    other = GenerateRequest(request_id="a", prompt_ids=array(typecode, [5, 6, 7, 8]), params=asked.params)
    assert_alike(generate(model, [other])[0], generate(model, [asked])[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_slots": 0}, "num_slots = 0; expected at least 1"),
        ({"prefill_chunk_tokens": 0}, "prefill_chunk_tokens = 0; expected at least 1"),
        ({"context_window": -1}, "context_window = -1; expected at least 0"),
        ({"context_window": 1000}, "context_window = 1000, and the model was made for 64"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalEngine(tiny_model(), EngineConfig(**settings))


def test_a_model_cast_under_its_engine_is_noticed() -> None:
    model = tiny_model("gqa")
    engine = LocalEngine(model)
    model.float()
    with pytest.raises(ValueError, match=r"torch.float32 now, and was torch.float64.*build another engine"):
        engine.generate([request("a", [5])])
