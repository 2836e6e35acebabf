"""What both benchmarks share: the tiny checkpoint that each side loads, and tables of interleaved timings.

The model is a Qwen2 of 4 layers and hidden size 128 with random weights. Both sides read it from the same Hugging Face
directory, so they hold the same numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import os
import platform
import random
import statistics
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

SEED = 17

SPECIAL_TOKENS = {"unk_token": "w0", "pad_token": "w1", "eos_token": "w2"}


def write_checkpoint(directory: Path, vocabulary: int, context_window: int) -> Path:
    """A random Qwen2 and a tokenizer in which word `wN` is token N."""
    torch.manual_seed(SEED)
    transformers_logging.disable_progress_bar()
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_window,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL_TOKENS).save_pretrained(directory)
    return directory


def random_prompts(number: int, num_tokens: int, vocabulary: int) -> list[str]:
    """Texts of so many tokens each, without special tokens."""
    words = random.Random(SEED)
    return [" ".join(f"w{words.randrange(3, vocabulary)}" for _ in range(num_tokens)) for _ in range(number)]


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--rounds", type=int, default=rounds, help="measured turns of each side (default: %(default)s)")
    result.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: %(default)s)")
    return result


def conditions(threads: int, rounds: int, packages: Sequence[str]) -> str:
    """One line that says on what and how the figures were taken."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{rounds} rounds in turn, float32, {threads} threads; {machine}; {versions}."


def spread(seconds: Sequence[float]) -> str:
    """Minimum and median, in milliseconds."""
    return f"{1e3 * min(seconds):.1f} / {1e3 * statistics.median(seconds):.1f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: the first column left, the others right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the line that TRL's trainer prints each step."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def memory_at_rest() -> float:
    """Resident MiB of this process, after freed memory went back to the system; the peak is counted anew from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def memory_peak() -> float:
    """Most resident MiB of this process since `memory_at_rest`."""
    return _resident("VmHWM")


def _resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}; memory can be measured on Linux only.")
