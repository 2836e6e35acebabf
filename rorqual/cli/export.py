"""The `convert` verb: a policy of a run, or another checkpoint, written in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rorqual.cli.policies import load_policy
from rorqual.models.checkpoints import save_checkpoint
from rorqual.store.files import write_atomic

MARK = "rorqual_export.json"
"""A file that says which policy was exported, and that the directory may be written again."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_policy(place: Path, out: Path, stage: str | None, dtype: str) -> str:
    """Write the checkpoint with its tokenizer; returns the policy's label.

    Raises: ValueError for an unknown dtype, or when `out` holds something that no earlier export wrote.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    check_place(place, out)
    policy = load_policy(place, stage, template=False, device="cpu")
    files = [path for path in sorted(policy.tokenizer_folder.glob("tokenizer*.json")) if path.is_file()]
    tokenizer = policy.encoding.tokenizer
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
    special: dict[str, int | list[int]] = {
        key: tokenizer.special_id(name) for key, name in names.items() if name in tokenizer.special_tokens
    }
    write_atomic(out / MARK, lambda file: file.write(json.dumps({"policy": policy.label}).encode()))
    save_checkpoint(policy.model, out, dtype=DTYPES[dtype], tokenizer_files=files, special_tokens=special)
    return policy.label


def check_place(place: Path, out: Path) -> None:
    """Raises: ValueError unless `out` is new, empty, or an earlier export, and lies outside of `place`."""
    if place.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is the policy's own place, or lies in it; choose another directory to write.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a new or empty directory to write.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"{out} has files in it that no export wrote; choose a new or empty directory to write.")
