"""What the benchmarks of serving share: a tiny checkpoint that both sides read, and servers as processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import torch

from rorqual.models.checkpoints import save_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.text.tokenizer import train_tokenizer

START_SECONDS = 120.0
STOP_SECONDS = 20.0
SENTENCE = "the whale swims with its mouth open and keeps only what feeds it"
WORDS = SENTENCE.split()
CHAT_TEMPLATE = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for message in messages %}"
    "{{ '<｜User｜>' + message['content'] + '<｜Assistant｜>' }}{% endfor %}"
)
"""The format `chat` for one question, for servers that read a template."""


def write_chat_checkpoint(directory: Path, hidden_size: int = 128, context_window: int = 1024) -> Path:
    """A random Qwen2 with 4 layers and a tokenizer trained on a sentence, chat template included."""
    tokenizer = train_tokenizer([SENTENCE] * 9, 400)
    config = ModelConfig(
        family="qwen2",
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=hidden_size // 4,
        qkv_bias=True,
        context_window=context_window,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    tokenizer.save(directory)
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "pad"}
    save_checkpoint(
        model,
        directory,
        tokenizer_files=sorted(directory.glob("tokenizer*.json")),
        special_tokens={key: tokenizer.special_id(name) for key, name in names.items()},
    )
    return directory


@contextlib.contextmanager
def running(command: Sequence[str], port: int, path: str) -> Iterator[subprocess.Popen[str]]:
    """The process of a server on loopback, which is waited for at `path` and ends with the block, SIGTERM included."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _wait(process, f"http://127.0.0.1:{port}{path}")
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def rorqual_command(checkpoint: Path, port: int, slots: int, waiting: int) -> list[str]:
    options = ["--port", str(port), "--name", "tiny", "--slots", str(slots), "--max-waiting", str(waiting)]
    return [sys.executable, "-m", "rorqual.cli", "serve", str(checkpoint), *options]


def transformers_command(checkpoint: Path, port: int, continuous: bool) -> list[str]:
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    options += ["--continuous-batching"] if continuous else []
    return [str(Path(sys.executable).with_name("transformers")), "serve", str(checkpoint), *options]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return int(place.getsockname()[1])


def resident_mib(process: subprocess.Popen[str]) -> float:
    """Resident memory of a process, on Linux."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    if found is None:
        raise ValueError(f"/proc/{process.pid}/status has no VmRSS; memory can be measured on Linux only.")
    return int(found[1]) / 1024


def _wait(process: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended: {(process.stderr.read() if process.stderr else '')[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"No answer from {url} within {START_SECONDS:g} s.")
