"""The bodies of OpenAI's chat and completion endpoints as records: what is read, and what is answered.

An unknown field is refused, because an ignored one would change what the client gets without a word. Fields that only
the provider's billing or storage reads are accepted and have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from rorqual.records import Record
from rorqual.server.errors import invalid

Body = TypeVar("Body")
Text = Annotated[str, Meta(max_length=4 * 2**20)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=100.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]
Stop = str | Annotated[list[StopText], Meta(max_length=16)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]

# -------------------------------------------------------------------------------------------------------- what is asked


class TextPart(Record):
    """A part of a message's content; only text is understood."""

    type: Literal["text"]
    text: Text


class FunctionCall(Record):
    name: Name
    arguments: Text = "{}"


class ToolCallBody(Record):
    id: Name
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class ChatMessage(Record):
    """One message. Thinking may be called `reasoning_content` or `reasoning`; the fields that are None are those that
    OpenAI's own client sends back with an answer."""

    role: Literal["system", "user", "developer", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: Annotated[list[ToolCallBody], Meta(max_length=1024)] | None = None
    tool_call_id: Name | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionSpec(Record):
    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Record):
    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(Record):
    name: Name


class NamedTool(Record):
    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Record):
    """A schema with a name; `schema` is enforced whether `strict` is set or not."""

    name: Name
    description: Text | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Record, tag_field="type", tag="text"):
    pass


class ObjectFormat(Record, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Record, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class StreamOptions(Record):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ThinkingSwitch(Record):
    """DeepSeek's own way to turn thinking on or off."""

    type: Literal["enabled", "disabled"]


class TemplateOptions(Record):
    """vLLM's and SGLang's way: one of the two names."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatRequest(Record):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    n: Count | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolBody], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking: ThinkingSwitch | None = None
    chat_template_kwargs: TemplateOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionRequest(Record):
    """The body of `/v1/completions`. prompt: a text, token ids, or a list of such."""

    prompt: Text | Annotated[list[Text | TokenId | list[TokenId]], Meta(min_length=1)]
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    n: Count | None = None
    best_of: Count | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None


def read_body(data: bytes, kind: type[Body]) -> Body:
    """Raises: ApiError (400) that names the field."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        words = str(error)
        place = words.rpartition(" - at `$.")[2].rstrip("`") if " - at `$." in words else None
        raise invalid(words, param=place) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"The body is not JSON that can be read: {words}. Send one JSON object in UTF-8.") from error


# ----------------------------------------------------------------------------------------------------- what is answered


class TokenLogprob(Record):
    """bytes is None for a token that is only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(Record):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(Record):
    """One entry for each token that was drawn, those of thinking and control tokens included."""

    content: list[ChosenLogprob]
    refusal: None = None


class CompletionTokensDetails(Record):
    reasoning_tokens: int


class Usage(Record):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails


FinishReason = Literal["stop", "length", "tool_calls"]


class CallAnswer(Record):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class CallDelta(Record):
    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ChatAnswerMessage(Record):
    content: str | None
    role: Literal["assistant"] = "assistant"
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CallAnswer] | UnsetType = UNSET
    refusal: None = None


class ChatChoice(Record):
    index: int
    message: ChatAnswerMessage
    finish_reason: FinishReason
    logprobs: ChoiceLogprobs | None = None


class ChatCompletion(Record):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(Record):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(Record):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: ChoiceLogprobs | None = None


class ChatChunk(Record):
    """One event of a stream; the last before `[DONE]` has no choices and the usage, where the client asked for it."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


class TextLogprobs(Record):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Record):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None = None


class TextCompletion(Record):
    """A whole completion, or one event of a stream."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Record):
    """`max_model_len` is what vLLM calls the window."""

    id: str
    created: int
    max_model_len: int
    owned_by: str = "rorqual"
    object: Literal["model"] = "model"


class ModelList(Record):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class ErrorDetail(Record):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Record):
    error: ErrorDetail


class Health(Record):
    status: Literal["ok"]
