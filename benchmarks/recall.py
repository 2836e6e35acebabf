"""Can it still find one key among many? A synthetic recall task: dense attention, DSA in its two stages, and NSA.

The first half of a document are passages of eight tokens, no token twice; the second half are the same passages in
another order. After its first token a passage can be recited only by looking at where it stood, so a selection of keys
that misses it shows as a wrong answer, by depth: where in the first half it stands.
Needs `pip install rorqual[bench]`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import SEED, conditions, markdown_table, parser
from torch import Tensor

from rorqual.models.config import DSAConfig, ModelConfig, NSAConfig
from rorqual.models.convert import with_attention, with_indexers
from rorqual.models.decoder import Decoder
from rorqual.models.layout import causal_layout
from rorqual.train.indexer import train_indexers_only

PASSAGE = 8

DEPTHS = 5
"""Equal parts of the first half, from the first passage to the last."""


def documents(number: int, length: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], and the passage that the next token must be recited from, -1 where it cannot be: [B, T]."""
    passages = length // 2 // PASSAGE
    first = torch.stack([torch.randperm(vocabulary, generator=generator)[: length // 2] for _ in range(number)])
    order = torch.stack([torch.randperm(passages, generator=generator) for _ in range(number)])
    second = first.unflatten(1, (passages, PASSAGE)).gather(1, order[..., None].expand(-1, -1, PASSAGE)).flatten(1)
    asked = order[..., None].repeat(1, 1, PASSAGE)
    asked[..., -1] = -1
    return torch.cat((first, second), dim=1), torch.cat((torch.full_like(first, -1), asked.flatten(1)), dim=1)


def build(length: int, kind: str) -> Decoder:
    nsa = NSAConfig(block_length=8, block_stride=4, selected_length=8, num_selected=4, window=16, compressor_size=64)
    model = Decoder(
        ModelConfig(
            family="qwen3",
            vocab_size=length,
            hidden_size=128,
            intermediate_size=256,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            context_window=length,
            qk_norm=True,
            tie_embeddings=True,
            initializer_range=0.05,
            attention=kind,
            nsa=nsa if kind == "nsa" else None,
        )
    )
    model.initialize(torch.Generator().manual_seed(SEED))
    return model


def loss_of(model: Decoder, ids: Tensor, place: Tensor, index_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens that can be recited, with the indexers' loss where it is weighted; and whether each
    is predicted [B, T], False elsewhere."""
    number, length = ids.shape
    output = model(ids.flatten(), causal_layout([length] * number), indexer_weight_T=index_weight)
    logits = model.logits(output.hidden).unflatten(0, (number, length))
    asked = place[:, :-1] >= 0
    loss = F.cross_entropy(logits[:, :-1][asked], ids[:, 1:][asked])
    for each in output.indexer_losses:
        loss = loss + each.total
    right = torch.zeros_like(place, dtype=torch.bool)
    right[:, :-1] = asked & (logits[:, :-1].argmax(-1) == ids[:, 1:])
    return loss, right


def train(model: Decoder, steps: int, rate: float, chosen: argparse.Namespace, say: Callable[[str], None]) -> None:
    """AdamW, warmed up and cooled down. What is frozen stays so; an indexer that is there learns too.

    From scratch, short documents come first, as many tokens a step: reciting is learned from them.
    """
    curriculum = (4, 4, 2, 2, 1, 1, 1, 1, 1, 1) if model.config.dsa is None else (1,)
    generator = torch.Generator().manual_seed(SEED + 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95))
    num_tokens = chosen.batch * chosen.length
    weight = torch.full((num_tokens,), 1 / num_tokens) if model.config.dsa is not None else None
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.2 * steps))
        shorter = curriculum[step * len(curriculum) // steps]
        ids, place = documents(chosen.batch * shorter, chosen.length // shorter, chosen.length, generator)
        loss, right = loss_of(model, ids, place, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            say(f"  step {step + 1} of {steps}: loss {float(loss.detach()):.3f}, {accuracy(right, place):.1%}")


def accuracy(right: Tensor, place: Tensor) -> float:
    return float(right.sum() / (place >= 0).sum())


@torch.no_grad()
def measure(model: Decoder, chosen: argparse.Namespace) -> list[str]:
    """Accuracy on documents that nobody trained on: all of it, then by depth."""
    generator = torch.Generator().manual_seed(SEED + 2)
    model.eval()
    passages, total, hits = chosen.length // 2 // PASSAGE, torch.zeros(DEPTHS), torch.zeros(DEPTHS)
    for _ in range(chosen.held_out // chosen.batch):
        ids, place = documents(chosen.batch, chosen.length, chosen.length, generator)
        _, right = loss_of(model, ids, place, None)
        depth = place[place >= 0] * DEPTHS // passages
        total += torch.bincount(depth, minlength=DEPTHS)
        hits += torch.bincount(depth, weights=right[place >= 0].float(), minlength=DEPTHS)
    return [f"{float(hits.sum() / total.sum()):.1%}", *(f"{share:.1%}" for share in (hits / total).tolist())]


def main() -> None:
    options = parser(__doc__.splitlines()[0] if __doc__ else "", rounds=1)
    options.add_argument("--length", type=int, default=128, help="tokens of a document (default: %(default)s)")
    options.add_argument("--batch", type=int, default=32, help="documents a step (default: %(default)s)")
    options.add_argument("--steps", type=int, default=1500, help="of dense and NSA training (default: %(default)s)")
    options.add_argument("--stage-steps", type=int, default=100, help="of warm-up, of sparse (default: %(default)s)")
    options.add_argument("--held-out", type=int, default=64, help="documents measured (default: %(default)s)")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    started, rows = time.perf_counter(), []

    def say(line: str) -> None:
        print(line, flush=True)

    def stage(name: str, model: Decoder, steps: int, rate: float) -> None:
        say(name)
        train(model, steps, rate, chosen, say)

    dense = build(chosen.length, "dense")
    stage("dense", dense, chosen.steps, 3e-3)
    rows.append(["dense", *measure(dense, chosen)])
    dsa = DSAConfig(top_k=chosen.length // 16, num_heads=4, head_dim=32, rope_dim=16)
    indexed = with_indexers(dense, dsa, torch.Generator().manual_seed(SEED))
    rows.append(["DSA, indexers untrained", *measure(with_attention(indexed, "dsa"), chosen)])
    train_indexers_only(indexed)
    stage("warm-up", indexed, chosen.stage_steps, 3e-3)
    sparse = with_attention(indexed, "dsa").requires_grad_(True)
    rows.append(["DSA after warm-up", *measure(sparse, chosen)])
    stage("sparse", sparse, chosen.stage_steps, 3e-4)
    rows.append(["DSA after sparse training", *measure(sparse, chosen)])
    native = build(chosen.length, "nsa")
    stage("NSA from scratch", native, chosen.steps, 3e-3)
    rows.append(["NSA from scratch", *measure(native, chosen)])
    depths = [f"depth {100 * d // DEPTHS}–{100 * (d + 1) // DEPTHS} %" for d in range(DEPTHS)]
    print(f"\n{markdown_table(['model', 'right', *depths], rows)}\n")
    minutes = (time.perf_counter() - started) / 60
    print(
        f"Documents of {chosen.length} tokens, k = {chosen.length // 16}; chance is about {2 / chosen.length:.1%}; "
        f"{chosen.steps} steps of {chosen.batch * chosen.length:,} tokens, {chosen.stage_steps} of a DSA stage; "
        f"{minutes:.1f} min. {conditions(chosen.threads, 1, ('torch', 'rorqual'))}"
    )


if __name__ == "__main__":
    main()
