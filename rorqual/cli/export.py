"""The `convert` verb: a policy of a run, or another checkpoint, written in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from rorqual.cli.policies import load_policy
from rorqual.models.checkpoints import save_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_policy(place: Path, out: Path, stage: str | None, dtype: str) -> str:
    """Write the checkpoint with its tokenizer; returns the policy's label. Raises: ValueError for an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    policy = load_policy(place, stage, template=False, device="cpu")
    files = [path for path in sorted(policy.tokenizer_folder.glob("tokenizer*.json")) if path.is_file()]
    tokenizer = policy.encoding.tokenizer
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
    special: dict[str, int | list[int]] = {
        key: tokenizer.special_id(name) for key, name in names.items() if name in tokenizer.special_tokens
    }
    save_checkpoint(policy.model, out, dtype=DTYPES[dtype], tokenizer_files=files, special_tokens=special)
    return policy.label
