"""How long one model call takes on the built-in engine, to compare what context management costs with."""

from __future__ import annotations

import time
from array import array
from statistics import median

import torch

from rorqual.engines.local import EngineConfig, LocalEngine
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.records import GenerateRequest, SamplingParams

VOCABULARY = 1500


def engine_call_seconds(prompt_tokens: int, new_tokens: int, num_calls: int = 6) -> float:
    """Median over calls, the first left out, without a prefix cache, on a random model of 4 layers and hidden size 128.

    The smallest that the other benchmarks run: one that is good for something takes longer, and the share is smaller.
    """
    config = ModelConfig(
        family="qwen3",
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        context_window=prompt_tokens + new_tokens + 1,
        qk_norm=True,
    )
    model = Decoder(config).eval()
    model.initialize(torch.Generator().manual_seed(0))
    engine = LocalEngine(model, EngineConfig(num_slots=1))
    seconds = []
    for call in range(num_calls):
        prompt = array("i", [(7 * place + call) % VOCABULARY for place in range(prompt_tokens)])
        params = SamplingParams(max_new_tokens=new_tokens, seed=call)
        started = time.perf_counter()
        engine.generate([GenerateRequest(request_id=str(call), prompt_ids=prompt, params=params)])
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
