"""The `chat` verb: a conversation in the terminal, with the answer as it comes, commands, and tools that are shown."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from rorqual.cli.options import check_option
from rorqual.cli.policies import Policy
from rorqual.cli.speakers import Interrupted, Listener, Talker, WindowFullError
from rorqual.engines.http import EndpointUnavailable
from rorqual.records import Message, ToolCall
from rorqual.text.encoding import Encoding
from rorqual.text.openai import message_from_openai, message_to_openai
from rorqual.text.streaming import Delta

HELP = """/think on|off   whether the model thinks first
/context        what the model sees, and how much of its window that takes
/tools          the tools that it may call
/save FILE      keep the messages, one JSON object a line; --load FILE goes on from them
/help           this list
/quit           end; so does an empty line
Ctrl-C stops an answer."""


def check_chat(question: str | None, temperature: float, top_p: float, max_new_tokens: int) -> None:
    """What can be said before anything is loaded. Raises: ValueError naming the option."""
    if question is not None and not question.strip():
        raise ValueError("--question is empty; give a text, or leave it out for a conversation.")
    check_option("--temperature", temperature, temperature >= 0.0, "0 or more")
    check_option("--top-p", top_p, 0.0 < top_p <= 1.0, "above 0 and at most 1")
    check_option("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "1 or more")


def check_place(policy: Path | None, base_url: str | None, model: str | None, form: str | None) -> None:
    """Raises: ValueError unless there is one policy, here or behind an endpoint."""
    if (policy is None) == (base_url is None):
        raise ValueError("Give a run or checkpoint, or --base-url with --model; one of the two.")
    if (model is None) != (base_url is None):
        raise ValueError("--base-url and --model go together: the server, and the name of the model there.")
    if base_url is not None and form is not None:
        raise ValueError("--format is for a checkpoint; the server formats messages itself.")


def in_format(policy: Policy, form: str | None) -> Policy:
    """The policy, its messages in another format. Raises: ValueError as `Encoding` does."""
    if form is None:
        return policy
    config = msgspec.structs.replace(policy.encoding.config, format=form)
    return replace(policy, encoding=Encoding(policy.encoding.tokenizer, config))


def converse(console: Console, speaker: Talker, question: str | None) -> None:
    """Answer one question, or read questions until an empty line, /quit or the end of the input.

    Raises: ValueError when the one question cannot be answered.
    """
    if question is not None:
        try:
            _answer(console, speaker, question)
        except EndpointUnavailable as error:
            raise ValueError(str(error)) from None
        return
    turns = " It answers single questions: each starts anew, and it knows nothing of the earlier ones."
    ends = " An empty line ends the conversation, /help lists commands."
    about = f"Talking to {speaker.label}.{turns if speaker.single_turn else ''}{ends}"
    console.print(Text(about, style="dim"))
    while True:
        try:
            asked = console.input("[bold]› [/bold]" if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not asked or asked == "/quit":
            return
        try:
            _command(console, speaker, asked) if asked.startswith("/") else _answer(console, speaker, asked)
        except WindowFullError as error:
            console.print(Text(f"{error} The next question starts anew.", style="yellow"))
        except (ValueError, EndpointUnavailable, OSError) as error:
            console.print(_plain(str(error), "yellow"))


def save_messages(messages: list[Message], path: Path) -> None:
    """One message a line, as the OpenAI format has it."""
    path.write_bytes(b"".join(msgspec.json.encode(message_to_openai(message)) + b"\n" for message in messages))


def load_messages(path: Path) -> list[Message]:
    """What `/save` wrote, or one JSON list of messages. Raises: ValueError for anything else."""
    try:
        data = path.read_bytes().strip()
        lines = msgspec.json.decode(data) if data.startswith(b"[") else msgspec.json.Decoder().decode_lines(data)
        messages = [message_from_openai(line) for line in lines]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--load {path}: {error}. Give a file that /save wrote.") from None
    if messages and (messages[-1].role != "assistant" or messages[-1].tool_calls):
        raise ValueError(f"--load {path}: the conversation must end with an answer, not with an open question or call.")
    return messages


def _command(console: Console, speaker: Talker, line: str) -> None:
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/think" and argument in ("on", "off"):
        speaker.set_thinking(argument == "on")
        said = f"Thinking is {argument}."
    elif name == "/context":
        said = "\n".join(speaker.context())
    elif name == "/tools":
        said = "\n".join(f"{tool.name}: {tool.description}" for tool in speaker.tools) or "No tools; see --tool."
    elif name == "/save" and argument:
        save_messages(speaker.messages, Path(argument).expanduser())
        said = f"Kept {len(speaker.messages)} messages in {argument}."
    elif name == "/help":
        said = HELP
    else:
        raise ValueError(f"There is no command {line!r}.\n{HELP}")
    console.print(_plain(said, "dim"))


def _answer(console: Console, speaker: Talker, question: str) -> None:
    screen = _Screen(console)
    try:
        speaker.answer(question, screen)
    except Interrupted:
        screen.end()
        console.print(Text("Stopped.", style="yellow"))
    finally:
        screen.end()


CONTROL_CHARACTERS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def _plain(text: str, style: str = "") -> Text:
    """Text that somebody else wrote, without what would steer the terminal."""
    return Text(text.translate(CONTROL_CHARACTERS), style=style)


class _Screen(Listener):
    """Prints an answer as it comes: thinking dimmed, then the content, then calls and what they gave.

    White space at the start and end of a part waits until something follows it, and is left out if nothing does.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._part = ""
        self._space = ""
        self._open = False

    def delta(self, delta: Delta) -> None:
        self._say("thinking", delta.thinking, "dim")
        self._say("content", delta.content, "")
        for call in delta.tool_calls:
            self.end()
            self._console.print(_plain(f"→ {call.name} {call.arguments}", "cyan"))

    def result(self, call: ToolCall, text: str) -> None:
        self.end()
        self._console.print(_plain(f"← {text}", "cyan"))

    def end(self) -> None:
        """Ends the line and the part."""
        if self._open:
            self._console.print()
        self._part, self._space, self._open = "", "", False

    def _say(self, part: str, text: str, style: str) -> None:
        if not text:
            return
        if part != self._part:
            self.end()
            self._part = part
        text = self._space + text
        if not self._open:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._open = True
            self._console.print(_plain(shown, style), end="", soft_wrap=True)
