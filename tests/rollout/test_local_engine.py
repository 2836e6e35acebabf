"""Rollouts over the real engine: a mixture-of-experts policy, several turns, interrupted and resumed."""

from __future__ import annotations

import torch

from rorqual.engines.local import LocalEngine
from rorqual.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from rorqual.models.decoder import Decoder
from rorqual.records import SamplingParams, to_json
from rorqual.rollout.episode import EpisodeConfig
from rorqual.rollout.group import Group, Rollouts
from rorqual.text.encoding import Encoding
from tests.rollout.fakes import Interviewer, make_task

TASKS = [make_task(f"sum/train/{index}", f"{index} + 3 =") for index in range(3)]
CONFIG = EpisodeConfig(sampling=SamplingParams(max_new_tokens=12, top_p=0.9), context_window=96, max_turns=2)


def make_rollouts(encoding: Encoding) -> Rollouts:
    mla = MLAConfig(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=8)
    config = ModelConfig(
        family="deepseek_v3",
        vocab_size=encoding.tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        context_window=96,
        rope=RopeConfig(interleaved=True),
        mla=mla,
        moe=MoEConfig(num_experts=4, experts_per_token=2, expert_intermediate_size=8, dense_layers=(0,)),
    )
    model = Decoder(config).eval()
    model.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():  # an end token that is likely, so that episodes have a second turn
        model.lm_head.weight[encoding.stop_token_ids[0]] *= 30.0
    return Rollouts(LocalEngine(model), {"interview": Interviewer(1)}, encoding, CONFIG, group_size=3, run_seed=4)


def play(rollouts: Rollouts, finished: list[Group]) -> bytes:
    while rollouts.num_unfinished:
        finished = finished + rollouts.step()
    return to_json(finished)


def test_interrupted_equals_uninterrupted_and_segments_are_complete(encoding: Encoding) -> None:
    walker = make_rollouts(encoding)
    walker.add(TASKS, step=0)
    states, finished = [], []
    while walker.num_unfinished:
        states.append((walker.state_dict(), list(finished)))
        finished += walker.step()
    expected = to_json(finished)
    assert len(states) > 4
    for state, before in states[::3]:
        resumed = make_rollouts(encoding)
        resumed.load_state_dict(state)
        assert play(resumed, before) == expected
    trajectories = [trajectory for group in finished for trajectory in group.trajectories]
    assert len({trajectory.end for trajectory in trajectories}) > 1
    for trajectory in trajectories:
        (segment,) = trajectory.segments
        assert segment.kept is not None
        assert segment.routes is not None
        assert (len(segment.kept), len(segment.routes)) == (segment.num_sampled, len(segment.token_ids) - 1)
