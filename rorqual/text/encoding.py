"""Messages -> token ids, and what the policy wrote -> a message, for conversations without tools.

    <bos> system <user> question <assistant> [<think>]    the prompt; what follows is sampled
    <user> question <assistant> [<think>]                 a later turn, appended to the ids that were sampled

A conversation only grows: `prompt` renders its start once, `follow_up` gives the ids that come after what was sampled.
Text that was sampled is never tokenised again, so every token that is trained on is one that was drawn.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rorqual.records import Message, Record, ToolSpec
from rorqual.text.response import THINK_CLOSE, THINK_OPEN, join_thinking, split_thinking
from rorqual.text.tokenizer import SPECIAL_TOKENS, Tokenizer

STRUCTURE = tuple(SPECIAL_TOKENS[name] for name in ("think_open", "think_close", "answer_open", "answer_close"))
"""Tags that an assistant's text may hold as tokens; every other special token in it is read as plain characters."""

CONVERSATION_TEMPLATE = (
    "Below, a user asks a question and an assistant answers it. The assistant first reasons step by step between "
    "<think> and </think>, then gives only the final answer between <answer> and </answer>.\n"
    "User: {question}\nAssistant:"
)
"""For base models that know no chat tokens; the idea is R1-Zero's template (arXiv 2501.12948, table 1)."""


class EncodingConfig(Record):
    """How a conversation becomes tokens.

    open_thinking: the prompt ends with `<think>`, so that the policy starts inside its reasoning.
    template: text with `{question}` in place of chat tokens, for a base model; one turn only. Empty: chat tokens.
    stop: further special tokens, by their text, that end a completion as the end-of-sentence token does.
    """

    open_thinking: bool = False
    template: str = ""
    stop: tuple[str, ...] = ()


class Encoding:
    """Renders and parses for one tokenizer and one config."""

    def __init__(self, tokenizer: Tokenizer, config: EncodingConfig | None = None) -> None:
        """Raises: ValueError for a tokenizer without a token that is needed, or a template without `{question}`."""
        self.tokenizer = tokenizer
        self.config = config or EncodingConfig()
        if self.config.template and "{question}" not in self.config.template:
            raise ValueError("EncodingConfig.template must hold {question}, the place of the user's text.")
        if not self.config.template:
            _require_chat_tokens(tokenizer)
        self.stop_token_ids = (tokenizer.special_id("eos"), *map(self._stop_id, self.config.stop))

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> array[int]:
        """Ids of a conversation up to where the policy speaks; it must end with a user message.

        Raises: ValueError for tools, tool messages, an empty conversation, or one that ends with the assistant.
        """
        if tools:
            raise ValueError("This encoding has no tools. Use tasks without tools.")
        if not messages or messages[-1].role != "user":
            raise ValueError("A prompt must end with a user message: the policy speaks next.")
        return self._template_prompt(messages) if self.config.template else self.conversation(messages)[0]

    def follow_up(self, messages: Sequence[Message], last_token_id: int) -> array[int]:
        """Ids that come between what was sampled last, which ended with `last_token_id`, and the policy's next turn.

        Raises: ValueError in template mode, for anything but user messages, and for no message at all.
        """
        if self.config.template:
            raise ValueError("A template holds one turn. Leave EncodingConfig.template empty for several turns.")
        if not messages or any(message.role != "user" for message in messages):
            raise ValueError(f"Only user messages can follow, got {[message.role for message in messages]}.")
        end = self.tokenizer.special_id("eos")
        ids = array("i") if last_token_id == end else array("i", [end])
        for message in messages:
            ids += self._user_turn(message)
        return ids

    def conversation(self, messages: Sequence[Message]) -> tuple[array[int], array[int]]:
        """(ids, sampled) of a whole conversation, for supervised training: sampled is 1 on what the assistant says.

        Raises: ValueError for a tool message, or for the template mode, whose prompt is `prompt`'s.
        """
        if self.config.template:
            prompt, answers = self._template_prompt(messages[:-1]), [messages[-1]]
        else:
            prompt, answers = array("i", [self.tokenizer.special_id("bos")]), list(messages)
        ids, sampled = prompt, array("b", bytes(len(prompt)))
        for message in answers:
            part = self._message(message)
            ids += part
            sampled.extend([int(message.role == "assistant")] * len(part))
        return ids, sampled

    def parse(self, completion_ids: Sequence[int]) -> Message:
        """What the policy wrote, as a message. Never raises.

        Without exactly one well-formed think block at the start, `thinking` is empty and `content` is the whole
        text, the `<think>` of the prompt included, so that `join_thinking` gives what a reward has to judge.
        """
        ids = list(completion_ids)
        if ids and ids[-1] in self.stop_token_ids and self.tokenizer.decode(ids[-1:]) not in STRUCTURE:
            ids = ids[:-1]
        text = (THINK_OPEN if self.config.open_thinking else "") + self.tokenizer.decode(ids)
        parts = split_thinking(text)
        if parts is None or not parts[0]:
            return Message(role="assistant", content=text)
        return Message(role="assistant", thinking=parts[0], content=parts[1])

    def _message(self, message: Message) -> array[int]:
        if message.role == "system":
            return self.tokenizer.encode(message.content)
        if message.role == "user":
            return self._user_turn(message)
        if message.role == "assistant":
            return self._assistant_turn(message)
        raise ValueError("This encoding has no tool messages. Use tasks without tools.")

    def _user_turn(self, message: Message) -> array[int]:
        ids = array("i", [self.tokenizer.special_id("user")])
        ids += self.tokenizer.encode(message.content)
        ids.append(self.tokenizer.special_id("assistant"))
        return ids + self._opening()

    def _assistant_turn(self, message: Message) -> array[int]:
        text = join_thinking(message)
        if self.config.open_thinking:  # the prompt already holds the opening tag
            text = text.removeprefix(THINK_OPEN) if text.startswith(THINK_OPEN) else THINK_CLOSE + text
        return self._structured(text) + array("i", [self.tokenizer.special_id("eos")])

    def _template_prompt(self, messages: Sequence[Message]) -> array[int]:
        if len(messages) != 1 or messages[0].role != "user":
            roles = [message.role for message in messages]
            raise ValueError(
                f"A template takes exactly one user message, got {roles}. Put instructions into the template."
            )
        has_bos = "bos" in self.tokenizer.special_tokens
        ids = array("i", [self.tokenizer.special_id("bos")] if has_bos else [])
        for part in self.tokenizer.split_special(self.config.template):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.tokenizer.encode(part.replace("{question}", messages[0].content))
        return ids + self._opening()

    def _opening(self) -> array[int]:
        return self._structured(THINK_OPEN) if self.config.open_thinking else array("i")

    def _structured(self, text: str) -> array[int]:
        ids = array("i")
        for part in self.tokenizer.split_special(text, STRUCTURE):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self.tokenizer.encode(part)
        return ids

    def _stop_id(self, text: str) -> int:
        parts = self.tokenizer.split_special(text)
        if len(parts) != 1 or not isinstance(parts[0], int):
            raise ValueError(f"EncodingConfig.stop names {text!r}, which is not a special token of this tokenizer.")
        return parts[0]


def _require_chat_tokens(tokenizer: Tokenizer) -> None:
    missing = [
        SPECIAL_TOKENS[name] for name in ("bos", "eos", "user", "assistant") if name not in tokenizer.special_tokens
    ]
    if missing:
        raise ValueError(
            f"The tokenizer has no chat tokens {missing}. Set EncodingConfig.template for a base model without them."
        )
