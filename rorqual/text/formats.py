"""Message formats as data: the strings that published models put around what is said, and which thinking they keep.

    deepseek_v32   DSML calls, results in plain tags, a header that says whether the policy thinks
    deepseek_r1    `<think>` opened by the prompt, calls as JSON in a fence
    deepseek_v3    the same without thinking
    chat           the tiny models that are trained here: user and assistant tokens, no tools
    template_format(text)   a plain text with a place for the question, for base models

Another format is another value of `Format`; no code depends on a name.
"""

from __future__ import annotations

from typing import Literal

from rorqual.records import Record
from rorqual.text.response import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from rorqual.text.retention import Retention

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
DSML = "｜DSML｜"


class Header(Record):
    """What stands before the policy's turn, by whether its thinking is in the context: `<think>` or `</think>`."""

    thinking: str = ""
    direct: str = ""


class ParameterTags(Record):
    """Arguments one by one: open, name, kind, "true" or "false", value, the value itself, close.

    "true" marks a string, written as it is; anything else is JSON.
    """

    open: str
    kind: str
    value: str
    close: str
    separator: str


class CallTags(Record):
    """A block of calls: block_open, then for each call call_open, name, arguments, the arguments, call_close.

    separator stands between calls; parameters is None where the arguments are one JSON text.
    """

    block_open: str
    call_open: str
    arguments: str
    call_close: str
    separator: str
    block_close: str
    parameters: ParameterTags | None = None


class ResultTags(Record):
    """A block of results, in the order of their calls."""

    block_open: str
    result_open: str
    result_close: str
    separator: str
    block_close: str


class Format(Record):
    """One way to write a conversation.

    user, assistant: before a user's text, and after it, where the policy speaks. One message of the policy ends with
        the tokenizer's end-of-sentence token; `begins_with_bos` says how the conversation begins.
    joins_user_messages: `assistant` stands only after the last of several user messages.
    user_header, results_header: what follows a user's message and a block of results.
    thinking: "until_close" - everything before the first `</think>`; "one_block" - exactly one well-formed block, else
        all of the text is content; "none" - the format has no thinking.
    policy_opens_thinking: the policy may write `<think>` itself where no header did.
    marks: control tokens that the format is made of; inside the text of a message they are out of place.
    spoken: control tokens that the policy's text may hold; elsewhere they are read as plain characters.
    calls, results: None for a format without tools.
    developer: what precedes the text of a developer message; empty for a format without that role.
    tools_section, schema_section: what tells of tools and of a response format, with `{tools}` (one JSON line each)
        and `{schema}`; they follow the text of a leading system message, `section_break` before each.
    single_turn: holds one user message and its answer.
    """

    name: str
    user: str
    assistant: str
    begins_with_bos: bool = True
    joins_user_messages: bool = False
    user_header: Header = Header()
    results_header: Header = Header()
    thinking: Literal["until_close", "one_block", "none"] = "none"
    policy_opens_thinking: bool = False
    marks: tuple[str, ...] = (BOS, EOS, USER, ASSISTANT)
    spoken: tuple[str, ...] = ()
    calls: CallTags | None = None
    results: ResultTags | None = None
    developer: str = ""
    tools_section: str = ""
    schema_section: str = ""
    section_break: str = "\n\n"
    retention: Retention = "all"
    single_turn: bool = False


_TOOLS_SECTION = f"""\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the \
user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{{tools}}
</functions>
"""

DEEPSEEK_V32 = Format(
    name="deepseek_v32",
    user=USER,
    assistant=ASSISTANT,
    user_header=Header(thinking=THINK_OPEN, direct=THINK_CLOSE),
    results_header=Header(thinking="\n\n" + THINK_OPEN, direct="\n\n" + THINK_CLOSE),
    thinking="until_close",
    marks=(BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML),
    calls=CallTags(
        block_open=f"\n\n<{DSML}function_calls>\n",
        call_open=f'<{DSML}invoke name="',
        arguments='">\n',
        call_close=f"\n</{DSML}invoke>",
        separator="\n",
        block_close=f"\n</{DSML}function_calls>",
        parameters=ParameterTags(
            open=f'<{DSML}parameter name="',
            kind='" string="',
            value='">',
            close=f"</{DSML}parameter>",
            separator="\n",
        ),
    ),
    results=ResultTags(
        block_open="\n\n<function_results>\n",
        result_open="<result>",
        result_close="</result>",
        separator="\n",
        block_close="\n</function_results>",
    ),
    developer="\n\n# The user's message is: ",
    tools_section=_TOOLS_SECTION,
    schema_section=("## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{schema}"),
    retention="since_last_user",
)

_TOOL_MARKS = tuple(
    f"<｜tool▁{name}｜>"
    for name in (
        *("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"),
        *("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"),
    )
)

DEEPSEEK_V3 = Format(
    name="deepseek_v3",
    user=USER,
    assistant=ASSISTANT,
    joins_user_messages=True,
    marks=(BOS, EOS, USER, ASSISTANT, *_TOOL_MARKS),
    calls=CallTags(
        block_open="<｜tool▁calls▁begin｜>",
        call_open="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        arguments="\n```json\n",
        call_close="\n```<｜tool▁call▁end｜>",
        separator="\n",
        block_close="<｜tool▁calls▁end｜>",
    ),
    results=ResultTags(
        block_open="<｜tool▁outputs▁begin｜>",
        result_open="<｜tool▁output▁begin｜>",
        result_close="<｜tool▁output▁end｜>",
        separator="\n",
        block_close="<｜tool▁outputs▁end｜>",
    ),
)

DEEPSEEK_R1 = Format(
    name="deepseek_r1",
    user=USER,
    assistant=ASSISTANT,
    joins_user_messages=True,
    user_header=Header(thinking=THINK_OPEN + "\n"),
    thinking="until_close",
    policy_opens_thinking=True,
    marks=(*DEEPSEEK_V3.marks, THINK_OPEN, THINK_CLOSE),
    calls=DEEPSEEK_V3.calls,
    results=DEEPSEEK_V3.results,
    retention="since_last_user",
)

CHAT = Format(
    name="chat",
    user=USER,
    assistant=ASSISTANT,
    user_header=Header(thinking=THINK_OPEN),
    thinking="one_block",
    policy_opens_thinking=True,
    spoken=(THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE),
)

FORMATS: dict[str, Format] = {each.name: each for each in (CHAT, DEEPSEEK_V3, DEEPSEEK_R1, DEEPSEEK_V32)}

CONVERSATION_TEMPLATE = (
    "Below, a user asks a question and an assistant answers it. The assistant first reasons step by step between "
    "<think> and </think>, then gives only the final answer between <answer> and </answer>.\n"
    "User: {question}\nAssistant:"
)
"""For base models that know no chat tokens; the idea is R1-Zero's template (arXiv 2501.12948, table 1)."""


def template_format(template: str, begins_with_bos: bool) -> Format:
    """The format of a plain text with `{question}` in the user's place: one question, one answer, parsed as `chat`.

    Raises: ValueError for a template that does not hold `{question}` exactly once.
    """
    if template.count("{question}") != 1:
        raise ValueError("EncodingConfig.template must hold {question}, the place of the user's text, once.")
    before, _, after = template.partition("{question}")
    return Format(
        name="template",
        user=before,
        assistant=after,
        begins_with_bos=begins_with_bos,
        user_header=CHAT.user_header,
        thinking=CHAT.thinking,
        policy_opens_thinking=True,
        marks=(),
        spoken=CHAT.spoken,
        single_turn=True,
    )
