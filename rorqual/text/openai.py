"""Messages and tools as the OpenAI chat format has them <-> records.

Servers disagree whether thinking is called `reasoning_content` or `reasoning`: both are read, both are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from rorqual.records import Message, ToolCall, ToolSpec
from rorqual.text.arguments import write_json

_ROLES = ("system", "user", "developer", "assistant", "tool")
_THINKING = ("reasoning_content", "reasoning")


def message_from_openai(message: Mapping[str, Any]) -> Message:
    """One message. Content may be a text, a list of text parts, or missing.

    Raises: ValueError for an unknown role, content that is not text, two different reasonings, or a call that is not
    one of a function.
    """
    role = message.get("role")
    if role not in _ROLES:
        raise ValueError(f"A message has the role {role!r}; give one of {', '.join(_ROLES)}.")
    said = {text for name in _THINKING if (text := message.get(name))}
    if len(said) > 1 or not all(isinstance(text, str) for text in said):
        raise ValueError("A message has two different reasonings. Give `reasoning_content` or `reasoning`, as text.")
    return Message(
        role=cast(Any, role),
        content=_text(message.get("content")),
        thinking="".join(said),
        tool_calls=tuple(_call(call) for call in message.get("tool_calls") or ()),
        tool_call_id=message.get("tool_call_id"),
    )


def message_to_openai(message: Message) -> dict[str, Any]:
    """The inverse of `message_from_openai`, with thinking under both of its names."""
    answer: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking:
        answer |= dict.fromkeys(_THINKING, message.thinking)
    if message.tool_calls:
        answer["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        answer["tool_call_id"] = message.tool_call_id
    return answer


def tool_from_openai(tool: Mapping[str, Any]) -> ToolSpec:
    """One tool. `strict` asks for constrained sampling and is no part of what a model is shown, so it is left out.

    Raises: ValueError for anything but a function with a name, and for a field that would be lost.
    """
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise ValueError('A tool is not a function. Give {"type": "function", "function": {"name": ..., ...}}.')
    unknown = set(function) - {"name", "description", "parameters", "strict"}
    if unknown or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(
            f"A tool needs a name, and may have a description and parameters; {sorted(unknown) or 'no name'} given."
        )
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"The parameters of tool {function['name']} are not a JSON schema. Give an object.")
    return ToolSpec(name=function["name"], description=function.get("description") or "", parameters=dict(parameters))


def _call(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not isinstance(call.get("id"), str):
        raise ValueError("A tool call needs an id and a function with a name and arguments.")
    arguments = function.get("arguments", "{}")
    return ToolCall(
        id=call["id"], name=name, arguments=arguments if isinstance(arguments, str) else write_json(arguments)
    )


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError("The content of a message is not text. Give a string, or parts of the type text.")
