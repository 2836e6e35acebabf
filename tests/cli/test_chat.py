"""`rorqual chat` as a person drives it: commands, tools, streaming, interruption, here and behind an endpoint."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rorqual.cli import main as command_line
from rorqual.cli.calculator import compute, run_tool
from rorqual.cli.chat import _Screen
from rorqual.cli.main import main
from rorqual.cli.policies import load_policy
from rorqual.cli.speakers import Listener, Speaker
from rorqual.engines.local import LocalEngine
from rorqual.models.checkpoints import save_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.records import ToolCall
from rorqual.text.streaming import Delta, join_deltas
from rorqual.text.tokenizer import train_tokenizer
from tests.engines.http_server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    config = ModelConfig(
        family="qwen3",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        context_window=128,
        qk_norm=True,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(model, folder)
    train_tokenizer(["4 + 3 = 7, wait <think>"] * 9, 300).save(folder)
    return folder


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs `rorqual chat` on lines that are typed, and gives what is shown."""

    def run(arguments: list[str], *lines: str) -> str:
        waiting = iter([*lines, "/quit"])
        monkeypatch.setattr(command_line.console, "input", lambda prompt: next(waiting))
        monkeypatch.setenv("COLUMNS", "300")
        assert main(["chat", *arguments]) == 0
        assert next(waiting, None) is None, "all lines were read"
        return capsys.readouterr().out

    return run


def test_a_conversation_with_an_endpoint_thinks_calls_saves_and_loads(server, typed, tmp_path) -> None:
    place = ["--base-url", server.url, "--model", "m", "--tool", "calculator"]
    kept = tmp_path / "kept.jsonl"
    shown = typed(place, "2+2?", "/think on", "again?", "/context", "/tools", "/help", f"/save {kept}", "/nonsense")
    for words in (
        "let me see\n",
        '→ calculator {"expression": "2+2"}',
        "← 4",
        "answer 1",
        "answer 2",
        "9 + 7 tokens in the last call",
        "retention since_last_user",
        "calculator: Compute",
        "There is no command '/nonsense'",
    ):
        assert words in shown
    assert "chat_template_kwargs" not in server.bodies[0]
    assert server.bodies[2]["chat_template_kwargs"]["thinking"] is True
    assert "reasoning_content" in server.bodies[1]["messages"][1], "within a user turn thinking stays"
    assert not any("reasoning_content" in each for each in server.bodies[2]["messages"]), "a user message drops it"
    messages = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [each["role"] for each in messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert messages[2]["tool_call_id"] == "c1"
    assert "answer 3" in typed([*place, "--load", str(kept)], "more?")
    kept.write_text(json.dumps(messages))
    assert "answer 3" in typed([*place, "--load", str(kept)], "more?")


def test_questions_come_through_a_pipe_too(server, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nmore?\n"))
    assert main(["chat", "--base-url", server.url, "--model", "m"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("answer 1") < shown.index("answer 2")
    assert "›" not in shown


def test_a_server_that_fails_is_said_and_the_conversation_goes_on(server, typed, capsys) -> None:
    server.behaviour = "ends early"
    place = ["--base-url", server.url, "--model", "m"]
    assert "stream ended before" in typed(place, "hello")
    assert main(["chat", *place, "-q", "hello"]) == 2
    assert "stream ended before" in capsys.readouterr().err
    server.behaviour = ""
    assert "answer 1" in typed(place, "hello")


def test_ctrl_c_stops_the_answer_and_not_the_program(checkpoint: Path, typed, monkeypatch) -> None:
    step, calls = LocalEngine.step, []

    def interrupted(engine: LocalEngine):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(LocalEngine, "step", interrupted)
    shown = typed([str(checkpoint), "--max-new-tokens", "6"], "4 + 3 =", "and now?", "/context")
    assert "Stopped." in shown
    assert "tokens (" in shown
    assert "<｜User｜>4 + 3 =" in shown, "what was asked before the stop stays"
    assert "<｜User｜>and now?" in shown


def test_an_answer_cannot_steer_the_terminal(capsys) -> None:
    screen = _Screen(Console())
    screen.delta(Delta(content="a\x1b[2Jb\x07\x9bc\nd"))
    screen.end()
    assert capsys.readouterr().out == "a[2Jbc\nd\n"


def test_what_a_stop_left_is_shown_as_it_will_be_rendered(checkpoint: Path, typed, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text('{"role": "user", "content": "4 + 3 ="}\n{"role": "assistant", "content": "7"}\n')
    shown = typed([str(checkpoint), "--load", str(kept)], "/context")
    assert "of 128 tokens · to be rendered anew" in shown
    assert "<｜User｜>4 + 3 =<｜Assistant｜>7" in shown


def test_the_local_answer_comes_in_pieces_and_is_the_same(checkpoint: Path) -> None:
    class Ear(Listener):
        def __init__(self) -> None:
            self.heard: list[Delta] = []

        def delta(self, delta: Delta) -> None:
            self.heard += [delta] if delta else []

    ear = Ear()
    message = Speaker(load_policy(checkpoint, None, False, "cpu"), 1.0, 1.0, 12, 0).answer("4 + 3 =", ear)
    assert join_deltas(ear.heard).content == message.content
    assert len(ear.heard) > 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give a run or checkpoint, or --base-url"),
        (["x", "--base-url", "http://x/v1", "--model", "m"], "one of the two"),
        (["--base-url", "http://x/v1"], "go together"),
        (["--base-url", "http://x/v1", "--model", "m", "--tool", "rm"], "there is no such tool"),
        (["--base-url", "ftp://x", "--model", "m"], "base_url"),
        (["--base-url", "http://x/v1", "--model", "m", "--key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY holds no key"),
        (["--base-url", "http://x/v1", "--model", "m", "--load", "/nowhere"], "--load /nowhere"),
        (["--base-url", "http://x/v1", "--model", "m", "--format", "chat"], "--format is for a checkpoint"),
        (["{checkpoint}", "--tool", "calculator"], "has no tool calls"),
        (["{checkpoint}", "--format", "nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_one_message(arguments, words, checkpoint, capsys) -> None:
    assert main(["chat", *(each.format(checkpoint=checkpoint) for each in arguments)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2 + 3 * 4", 14), ("-(1 - 3) ** 2", -4), ("7 // 2 + 7 % 2", 4), ("1 / 4", 0.25), ("2 ** 10", 1024)],
)
def test_the_calculator_computes(expression: str, value: float) -> None:
    assert compute(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "__import__('os')",
        "a",
        "(1).real",
        "'a' * 9",
        "[1] * 3",
        "True + 1",
        "(-8) ** 0.5",
        "1 if 1 else 2",
        "",
        "1;2",
        "1 / 0",
        "1e308 ** 2",
        "2j",
        "(" * 150,
        "1" * 400,
        "f'{1}'",
        "1 << 999999",
    ],
)
def test_the_calculator_refuses_the_rest(expression: str) -> None:
    call = ToolCall(id="c", name="calculator", arguments=json.dumps({"expression": expression}))
    assert run_tool(call).startswith("Error: ")


def test_a_bad_call_has_an_error_as_its_result() -> None:
    for name, arguments in (("rm", "{}"), ("calculator", "{"), ("calculator", "{}"), ("calculator", "[]")):
        assert run_tool(ToolCall(id="c", name=name, arguments=arguments)).startswith("Error: ")
