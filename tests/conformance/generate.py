"""Write the golden vectors of DSA: `python -m tests.conformance.generate`. docs/conformance.md says how to use them.

All is float64, from the twins in `rorqual/ops/dsa.py`; inputs are short decimals. The seed of a case is one by which no
score stands so close to the last selected one that rounding could decide, and by which every trap - a mistake that real
projects have made - selects other keys than it should.

Shapes: T tokens, D hidden, W width of the query input, I index heads, C index dimension, P its rotary part, S selected
keys, H heads, G key-value heads, E head dimension, V value dimension.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.ops import dsa

FOLDER = Path(__file__).parent / "dsa"
THETA = 100.0
LEAST_GAP = 1e-3
"""Between the score of the last selected key and that of the first one left out."""

Inputs = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------ indexer


def indexer(inputs: Inputs, settings: dict[str, Any], mistake: str = "") -> dict[str, Tensor]:
    """Index queries, keys, weights and scores of hidden states, by the definition; `mistake` makes one of MISTAKES."""
    positions_T = torch.cat([torch.arange(length) for length in settings["document_lengths"]])
    heads, width = settings["num_heads"], settings["head_dim"]
    q_TIC = (inputs["query_input"] @ inputs["wq_b"].T).unflatten(-1, (heads, width))
    k_TC = inputs["x"] @ inputs["wk"].T
    if mistake == "k_norm as RMSNorm":
        k_TC = torch.nn.functional.rms_norm(k_TC, (width,), inputs["k_norm.weight"], settings["k_norm_eps"])
    else:
        bias = None if mistake == "k_norm without bias" else inputs["k_norm.bias"]
        k_TC = torch.nn.functional.layer_norm(k_TC, (width,), inputs["k_norm.weight"], bias, settings["k_norm_eps"])
    q_TIC, k_T1C = (turn(each, positions_T, settings, mistake) for each in (q_TIC, k_TC.unsqueeze(1)))
    if settings["hadamard"]:
        q_TIC, k_T1C = dsa.hadamard(q_TIC), dsa.hadamard(k_T1C)
    weight_TI = inputs["x"] @ inputs["weights_proj"].T
    if mistake == "weights_proj in bfloat16":
        weight_TI = (inputs["x"].bfloat16() @ inputs["weights_proj"].bfloat16().T).double()
    weight_TI = weight_TI * heads**-0.5 * width**-0.5
    k_TC = k_T1C[:, 0]
    if mistake == "no ReLU":
        scores_TT = torch.einsum("tic,sc,ti->ts", q_TIC, k_TC, weight_TI)
    else:
        scores_TT = dsa.index_scores(q_TIC[None], k_TC[None], weight_TI[None])[0]
    return {"q": q_TIC, "k": k_TC, "weights": weight_TI, "scores": scores_TT}


def turn(x_TIC: Tensor, positions_T: Tensor, settings: dict[str, Any], mistake: str) -> Tensor:
    """Rotary positions on the first `rope_dim` dimensions, pair by pair. Turned pairs keep their places."""
    rope_dim, interleaved = settings["rope_dim"], settings["interleaved"]
    if mistake == "no positions":
        return x_TIC
    if mistake == "the other pairing":
        interleaved = not interleaved
    first = x_TIC.shape[-1] - rope_dim if mistake == "positions on the last dimensions" else 0
    half = rope_dim // 2
    angle_TH = positions_T[:, None] * THETA ** -(torch.arange(half) * 2.0 / rope_dim).double()
    cos_T1H, sin_T1H = angle_TH.cos()[:, None], angle_TH.sin()[:, None]
    places = torch.arange(first, first + rope_dim)
    one, two = (places[0::2], places[1::2]) if interleaved else (places[:half], places[half:])
    turned_TIC = x_TIC.clone()
    turned_TIC[..., one] = x_TIC[..., one] * cos_T1H - x_TIC[..., two] * sin_T1H
    turned_TIC[..., two] = x_TIC[..., two] * cos_T1H + x_TIC[..., one] * sin_T1H
    return turned_TIC


MISTAKES = (
    "the other pairing",
    "positions on the last dimensions",
    "no positions",
    "k_norm as RMSNorm",
    "k_norm without bias",
    "weights_proj in bfloat16",
    "no ReLU",
)


def visible(document_lengths: list[int]) -> Tensor:
    """[T, T]: a token sees itself and what precedes it in its own document."""
    document_T = torch.repeat_interleave(torch.arange(len(document_lengths)), torch.tensor(document_lengths))
    index_T = torch.arange(len(document_T))
    return (index_T[None] <= index_T[:, None]) & (document_T[None] == document_T[:, None])


def selection(scores_TT: Tensor, visible_TT: Tensor, top_k: int) -> list[list[int]]:
    """The selected tokens of each query, ascending."""
    selected_TS = dsa.select(scores_TT[None], visible_TT[None], top_k)[0]
    return [[key for key in row if key >= 0] for row in selected_TS.tolist()]


def least_gap(scores_TT: Tensor, visible_TT: Tensor, top_k: int) -> float:
    gaps = [math.inf]
    for scores_T, visible_T in zip(scores_TT, visible_TT, strict=True):
        ranked = scores_T[visible_T].sort(descending=True).values
        if len(ranked) > top_k:
            gaps.append(float(ranked[top_k - 1] - ranked[top_k]))
    return min(gaps)


def draw_indexer(seed: int, settings: dict[str, Any]) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden, width = sum(settings["document_lengths"]), 12, 8
    heads, dim = settings["num_heads"], settings["head_dim"]

    def decimals(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).double().mul(100).round().div(100)

    return {
        "x": decimals(tokens, hidden),
        "query_input": decimals(tokens, width),
        "wq_b": decimals(heads * dim, width, scale=0.5),
        "wk": decimals(dim, hidden, scale=0.5),
        "k_norm.weight": 1 + decimals(dim, scale=0.3),
        "k_norm.bias": decimals(dim, scale=0.5),
        "weights_proj": decimals(heads, hidden, scale=0.5),
    }


def indexer_case(name: str, description: str, seed: int, **changes: Any) -> dict[str, Any]:
    settings = {
        "num_heads": 4,
        "head_dim": 8,
        "rope_dim": 4,
        "rope_theta": THETA,
        "interleaved": False,
        "hadamard": False,
        "k_norm_eps": 1e-6,
        "top_k": 5,
        "document_lengths": [20],
        **changes,
    }
    visible_TT, top_k = visible(settings["document_lengths"]), settings["top_k"]
    inputs = draw_indexer(seed, settings)
    found = indexer(inputs, settings)
    selected = selection(found["scores"], visible_TT, top_k)
    traps = {each: selection(indexer(inputs, settings, each)["scores"], visible_TT, top_k) for each in MISTAKES}
    if len(settings["document_lengths"]) > 1:
        traps["documents not kept apart"] = selection(found["scores"], visible([len(visible_TT)]), top_k)
    if least_gap(found["scores"], visible_TT, top_k) < LEAST_GAP or selected in traps.values():
        raise ValueError(
            f"{name}: with seed {seed} rounding could decide, or a mistake goes unseen; take another seed."
        )
    found["scores"] = found["scores"].masked_fill(~visible_TT, math.nan)
    return case("indexer", name, description, settings, inputs, {**found, "selected": selected}, traps)


# ------------------------------------------------------------------------------------------------------------- scores


def scores_case(name: str, description: str, inputs: Inputs, fp8: bool, top_k: int) -> dict[str, Any]:
    """From index queries and keys on. The inputs are exact in float32, and so is all that FP8 makes of them."""
    q_TIC, k_TC = (dsa.fp8_round(each) if fp8 else each for each in (inputs["q"], inputs["k"]))
    scores_TT = dsa.index_scores(q_TIC[None], k_TC[None], inputs["weights"][None])[0]
    visible_TT = visible([len(k_TC)])
    expected: dict[str, Any] = {"scores": scores_TT.masked_fill(~visible_TT, math.nan)}
    traps: dict[str, Any] = {}
    if fp8:
        expected |= {f"{side}_scale": dsa.fp8_quantize(inputs[side])[1].double() for side in ("q", "k")}
        expected |= {"q_rounded": q_TIC, "k_rounded": k_TC}
    else:
        later = dsa.select(scores_TT.flip(1)[None], visible_TT.flip(1)[None], top_k)[0]
        last = len(k_TC) - 1
        traps["the later of equal scores"] = [sorted(last - key for key in row if key >= 0) for row in later.tolist()]
    expected["selected"] = selection(scores_TT, visible_TT, top_k)
    return case("scores", name, description, {"top_k": top_k, "fp8": fp8}, inputs, expected, traps)


def fp8_inputs() -> Inputs:
    """Powers of two, borders of a scale, ties of rounding, subnormals, a vector of zeros, and plain numbers."""
    generator = torch.Generator().manual_seed(0)
    k_TC = torch.randint(-512, 513, (10, 8), generator=generator).double() / 64
    k_TC[1] = 0.0
    k_TC[2] = torch.tensor([448.0, 1.0, 17.0, 19.0, 2**-9, 2**-10, 3 * 2**-10, -448.0])
    k_TC[3] = torch.tensor([449.0, 1.0, 17.0, 19.0, 2**-8, 2**-9, 3 * 2**-9, -464.0])
    k_TC[4] = 2.0**-14
    q_TIC = torch.randint(-512, 513, (10, 3, 8), generator=generator).double() / 64
    return {"q": q_TIC, "k": k_TC, "weights": torch.randint(-64, 65, (10, 3), generator=generator).double() / 64}


def plateau_inputs() -> Inputs:
    """Most products are negative, so that ReLU leaves many scores at exactly 0; some keys are equal."""
    generator = torch.Generator().manual_seed(1)
    k_TC = torch.randint(-8, 3, (14, 4), generator=generator).double()
    k_TC[9] = k_TC[4]
    q_TIC = torch.randint(0, 3, (14, 2, 4), generator=generator).double()
    return {"q": q_TIC, "k": k_TC, "weights": torch.randint(-2, 5, (14, 2), generator=generator).double()}


# ---------------------------------------------------------------------------------------------------------- attention


def attention_case(name: str, description: str, heads: int, groups: int, value_dim: int) -> dict[str, Any]:
    """Attention over a given selection, and the indexer's loss over it and over all visible keys."""
    generator, tokens, dim, top_k = torch.Generator().manual_seed(heads), 9, 6, 4

    def decimals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double().mul(100).round().div(100)

    inputs = {"q": decimals(tokens, heads, dim), "k": decimals(tokens, groups, dim)}
    inputs["v"] = inputs["k"][..., :value_dim] if name == "attention_latent" else decimals(tokens, groups, value_dim)
    inputs["scores"] = decimals(tokens, tokens)
    visible_TT, scale = visible([tokens]), 0.4
    batch = [inputs[each][None] for each in ("q", "k", "v")]
    sparse, whole = (dsa.select(inputs["scores"][None], visible_TT[None], number) for number in (top_k, tokens))
    expected = {
        "selected": selection(inputs["scores"], visible_TT, top_k),
        "output": dsa.sparse_attention(*batch, sparse, scale)[0],
        "dense_output": dsa.sparse_attention(*batch, whole, scale)[0],
    }
    for stage, selected in (("sparse", sparse), ("warmup", whole)):
        kl, uniform = dsa.indexer_kl(batch[0], batch[1], scale, inputs["scores"][None], selected)
        expected |= {f"{stage}_kl": kl[0], f"{stage}_kl_of_uniform": uniform[0]}
    return case("attention", name, description, {"top_k": top_k, "scale": scale}, inputs, expected, {})


# --------------------------------------------------------------------------------------------------------------- files


def case(
    kind: str,
    name: str,
    description: str,
    settings: dict[str, Any],
    inputs: Inputs,
    expected: dict[str, Any],
    traps: dict[str, Any],
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "description": description,
        "settings": settings,
        "inputs": {key: plain(value) for key, value in inputs.items()},
        "expected": {key: plain(value) for key, value in expected.items()},
        "selected_by_mistake": traps,
    }


def plain(value: Any) -> Any:
    """Nested lists of numbers with 12 digits; NaN, which marks what is not visible, as null."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.12g}")
    return value


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "indexer_v32": lambda: indexer_case("indexer_v32", "DeepSeek-V3.2: rotary halves, first dimensions.", seed=48),
    "indexer_glm": lambda: indexer_case(
        "indexer_glm", "GLM-MoE-DSA: rotary pairs are neighbours, first dimensions.", seed=21, interleaved=True
    ),
    "indexer_hadamard": lambda: indexer_case(
        "indexer_hadamard", "As V3.2, turned by a Hadamard matrix: the same scores.", seed=48, hadamard=True
    ),
    "indexer_packed": lambda: indexer_case(
        "indexer_packed",
        "Three documents in one row; positions begin anew in each. Early queries see fewer than k keys.",
        seed=56,
        document_lengths=[3, 11, 8],
    ),
    "scores_plateau": lambda: scores_case(
        "scores_plateau", "Many equal scores: the lower position is selected.", plateau_inputs(), fp8=False, top_k=4
    ),
    "scores_fp8": lambda: scores_case(
        "scores_fp8", "Queries and keys in e4m3, a ue8m0 scale for each vector.", fp8_inputs(), fp8=True, top_k=4
    ),
    "attention_grouped": lambda: attention_case(
        "attention_grouped", "Six heads share two key-value heads, and one selection a query.", 6, 2, 5
    ),
    "attention_latent": lambda: attention_case(
        "attention_latent", "MQA: the value is the first part of the key that all heads share.", 4, 1, 4
    ),
}


def text_of(value: dict[str, Any]) -> str:
    """JSON with one line for each innermost row."""
    parts = []
    for section, content in value.items():
        if not isinstance(content, dict):
            parts.append(f"  {json.dumps(section)}: {json.dumps(content)}")
            continue
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(each)}" for key, each in content.items())
        parts.append(f"  {json.dumps(section)}: {{\n{lines}\n  }}" if content else f"  {json.dumps(section)}: {{}}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write every case anew."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in CASES.items():
        (FOLDER / f"{name}.json").write_text(text_of(make()), encoding="utf-8")


if __name__ == "__main__":
    main()
