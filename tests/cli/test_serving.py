"""`rorqual serve`: a checkpoint is served by the program itself, and a mistake is one message before anything loads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from rorqual.cli import serving
from rorqual.cli.main import main
from rorqual.models.checkpoints import save_checkpoint
from rorqual.models.decoder import Decoder
from rorqual.server import run as running
from tests.server.servers import MODEL, TOKENIZER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    model = Decoder(MODEL)
    model.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(model, folder)
    TOKENIZER.save(folder)
    return folder


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    """The program itself on a free port, and where it says that it serves."""
    command = [sys.executable, "-m", "rorqual.cli", "serve", *options, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "UPSTREAM_KEY": "hidden-key"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline() if process.stdout else ""
    found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.communicate()[0])
    return process, found[1]


def end(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=20)[0]
    finally:
        process.kill()


def test_a_checkpoint_and_a_front_of_it(checkpoint: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("hidden-key\n")
    behind, url = start(
        str(checkpoint), "--api-key-file", str(key), "--format", "deepseek_v32", "--name", "mine", "--thinking"
    )
    front, front_url = start("--upstream", url, "--upstream-key-env", "UPSTREAM_KEY")
    try:
        for address, given in ((url, "hidden-key"), (front_url, "any")):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=given, max_retries=0, timeout=60)
            assert [model.id for model in client.models.list()] == ["mine"]
            messages: Any = [{"role": "user", "content": "hello"}]
            answer = client.chat.completions.create(model="mine", messages=messages, max_tokens=5)
            assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        assert httpx.get(url + "/v1/models").status_code == 401
    finally:
        said = end(front) + end(behind)
    assert {behind.returncode, front.returncode} <= {0, 130}  # 0 where a shell in the background ignores the interrupt
    assert "hidden-key" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give a run or a checkpoint"),
        (["x", "--upstream", "http://127.0.0.1:1"], "not both"),
        (["--upstream", "ftp://x"], "not the address of a server"),
        (["--upstream", "http://127.0.0.1:1", "--name", "x"], "--name is about a policy of ours"),
        (["--upstream", "http://127.0.0.1:1", "--context", "discard_all"], "give --tokenizer, --format and --window"),
        (["--upstream", "http://127.0.0.1:1", "--tokenizer", "x"], "give --context, --window and --format"),
        (["--upstream", "http://127.0.0.1:1", "--upstream-key-env", "NO_SUCH_KEY"], "no variable NO_SUCH_KEY"),
        (["x", "--upstream-key-env", "A"], "names the key of an --upstream"),
        (["x", "--tokenizer", "y"], "leave them out"),
        (["x", "--host", "0.0.0.0"], "needs --api-key-file"),
        (["x", "--api-key", "a", "--api-key-file", "b"], "not both"),
        (["x", "--api-key-file", "/no/such/file"], "cannot be read"),
        (["x", "--retention", "some"], "since_last_user"),
        (["x", "--format", "klingon"], "deepseek_v32"),
        (["x", "--format", "chat", "--template"], "leave --format out"),
        (["x", "--context", "forget"], "discard_all"),
        (["x", "--context", "summary"], "cannot be served"),
        (["x", "--slots", "0"], "--slots"),
        (["x", "--port", "-1"], "--port"),
        (["no/such/place"], "neither a run"),
    ],
)
def test_mistakes_are_one_message(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.startswith("Error:")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(running, "PACKAGES", ("starlette", "no_such_package"))
    assert main(["serve", "x"]) == 2
    assert 'needs no_such_package. Install the extra: pip install "rorqual[serve]"' in capsys.readouterr().err


def test_a_policy_is_served_with_what_was_asked_for(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the engine, without a socket."""
    made: list[Any] = []
    monkeypatch.setattr(
        serving, "make_server", lambda backend, config, metrics: made.append((backend, config)) or _Idle()
    )
    options = ["--slots", "3", "--max-waiting", "4", "--max-new-tokens", "50", "--context", "discard_75"]
    assert main(["serve", str(checkpoint), "--port", "0", "--format", "deepseek_v3", *options]) == 0
    ((backend, config),) = made
    assert backend.policy.name == "tiny"
    assert backend.policy.encoding.format.name == "deepseek_v3"
    assert backend.policy.context.config.strategy == "discard_75"
    assert backend.policy.context.window == 512
    assert backend.thread.engine.table.num_slots == 3
    assert backend.thread.max_requests == 7
    assert config.limits.max_new_tokens == 50


class _Idle:
    def run(self, sockets: list[Any]) -> None:
        assert sockets[0].getsockname()[0] == "127.0.0.1"
