"""The `chat` verb: a conversation whose tokens only grow; what the policy wrote is never tokenised again."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rorqual.cli.options import check_option
from rorqual.cli.policies import Policy
from rorqual.engines.local import LocalEngine
from rorqual.envs.dialogue import DialogueEnvironment
from rorqual.records import GenerateRequest, Message, SamplingParams, Task
from rorqual.text.conversation import Conversation


class WindowFullError(ValueError):
    """A prompt that leaves no room for an answer."""


def check_chat(question: str | None, temperature: float, top_p: float, max_new_tokens: int) -> None:
    """What can be said before anything is loaded. Raises: ValueError naming the option."""
    if question is not None and not question.strip():
        raise ValueError("--question is empty; give a text, or leave it out for a conversation.")
    check_option("--temperature", temperature, temperature >= 0.0, "0 or more")
    check_option("--top-p", top_p, 0.0 < top_p <= 1.0, "above 0 and at most 1")
    check_option("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "1 or more")


class Speaker:
    """A policy in one conversation, asked as its run asked it: the same system message first, the same suffix.

    A policy of one turn starts anew with every question, and so does a conversation that has filled the window.
    """

    def __init__(self, policy: Policy, temperature: float, top_p: float, max_new_tokens: int, seed: int) -> None:
        """Raises: ValueError for a sampling setting out of range."""
        self.label = policy.label
        self.single_turn = policy.single_turn or bool(policy.encoding.config.template)
        self._encoding = policy.encoding
        self._environment = DialogueEnvironment(policy.dialogue)
        self._engine = LocalEngine(policy.model)
        self._max_new_tokens = max_new_tokens
        self._temperature, self._top_p, self._seed = temperature, top_p, seed
        self._turns = 0
        self._conversation: Conversation | None = None
        self._params(1)

    def answer(self, question: str) -> Message:
        """What the policy says next. Raises: WindowFullError; the next question then starts a new conversation."""
        task = Task(
            task_id="chat", environment="dialogue", domain="", messages=(Message(role="user", content=question),)
        )
        messages = self._environment.start(task)
        if self._conversation is None or self.single_turn:
            self._conversation = Conversation(self._encoding, messages)
        else:
            self._conversation.append(messages[-1:])
        prompt = self._conversation.prompt_ids
        room = self._engine.context_window - len(prompt)
        if room < 1:
            self._conversation = None
            raise WindowFullError(
                f"With this question the conversation fills the window of {self._engine.context_window} tokens; ask a "
                "shorter one, or start a new conversation."
            )
        request = GenerateRequest(request_id=str(self._turns), prompt_ids=prompt, params=self._params(room))
        (completion,) = self._engine.generate([request])
        self._turns += 1
        return self._conversation.append_sampled(completion).message

    def _params(self, room: int) -> SamplingParams:
        return SamplingParams(
            temperature=self._temperature,
            top_p=self._top_p,
            max_new_tokens=min(self._max_new_tokens, room),
            stop_token_ids=self._encoding.stop_token_ids,
            seed=self._seed + self._turns,
        )


def converse(console: Console, speaker: Speaker, question: str | None) -> None:
    """Answer one question, or read questions until an empty line or the end of the input."""
    if question is not None:
        _show(console, speaker.answer(question))
        return
    turns = " It answers single questions: each starts anew, and it knows nothing of the earlier ones."
    about = f"Talking to {speaker.label}.{turns if speaker.single_turn else ''} An empty line ends the conversation."
    console.print(Text(about, style="dim"))
    while True:
        try:
            asked = console.input("[bold]› [/bold]").strip()
        except EOFError:
            return
        if not asked:
            return
        try:
            _show(console, speaker.answer(asked))
        except WindowFullError as error:
            console.print(Text(f"{error} The next question starts anew.", style="yellow"))


def _show(console: Console, message: Message) -> None:
    if message.thinking:
        console.print(Text(message.thinking.strip("\n"), style="dim"))
    console.print(Text(message.content.strip()))
