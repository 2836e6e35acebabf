"""The records that cross a package border, in the order in which data flows.

    Task -> Trajectory (of Segments) -> Evidence -> Score -> TrainSample

Every record is frozen, keyword-only and torch-free. Long numeric columns are `array.array`: compact, comparable with
`==`, and readable by numpy, torch and Arrow without a copy. `to_json` and `from_json` carry any record both ways.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, Literal, TypeVar, dataclass_transform

import msgspec

RecordType = TypeVar("RecordType")

if TYPE_CHECKING:
    IntArray = array[int]
    FloatArray = array[float]
else:  # msgspec evaluates the annotations, and `array` takes no type argument before Python 3.12
    IntArray = FloatArray = array


class _RecordMeta(msgspec.StructMeta):
    """Hands keyword-only down to subclasses, as msgspec does with its other settings."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **settings: Any) -> _RecordMeta:
        return super().__new__(cls, name, bases, namespace, **{"kw_only": True, **settings})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, metaclass=_RecordMeta, frozen=True, forbid_unknown_fields=True):
    """Base of every record: frozen, keyword-only, strict."""


# ---------------------------------------------------------------------------------------------------- conversation


class ToolCall(Record):
    """One call of a tool by the model; `arguments` is JSON text, `id` is unique in its conversation.

    `ToolCall(id="c1", name="add", arguments='{"a": 1, "b": 2}')`
    """

    id: str
    name: str
    arguments: str


class ToolSpec(Record):
    """A tool as the model sees it; `parameters` is a JSON schema.

    `ToolSpec(name="add", description="Add two integers.", parameters={"type": "object", "properties": {...}})`
    """

    name: str
    description: str
    parameters: dict[str, Any]


class Message(Record):
    """One message. Thinking is kept apart from content, so that a retention policy can drop the one without the other.

    A developer message begins a user turn, as a user message does. A tool message names the call that it answers.
    `Message(role="assistant", thinking="4+3=7", content="<answer>7</answer>")`
    """

    role: Literal["system", "user", "developer", "assistant", "tool"]
    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Task(Record):
    """One problem: what the model is shown, and what the environment and the rewards need to judge it.

    `Task(task_id="chain_sum/train/17", environment="dialogue", domain="mathematics",
    messages=(Message(role="user", content="4 + 3 ="),),
    payload={"dataset": "chain_sum", "entry": {"question": "4 + 3 =", "answer": "7", "metadata": {}}})`
    """

    task_id: str
    environment: str
    domain: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    payload: dict[str, Any] = {}


# -------------------------------------------------------------------------------------------------------- sampling


class SamplingParams(Record):
    """How to draw tokens. `temperature=0` is greedy; `top_p=1`, `top_k=0`, `min_p=0` leave the distribution whole.

    Truncation is applied after the temperature, in the order top-k, top-p, min-p. `seed` and the number of tokens drawn
    so far fix each draw, whatever else shares the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        ranges = {
            "temperature": self.temperature == 0.0 or 1e-6 <= self.temperature < math.inf,
            "top_p": 0.0 < self.top_p <= 1.0,
            "top_k": self.top_k >= 0,
            "min_p": 0.0 <= self.min_p < 1.0,
            "max_new_tokens": self.max_new_tokens >= 1,
        }
        for name, valid in ranges.items():
            if not valid:
                raise ValueError(f"SamplingParams.{name} = {getattr(self, name)} is out of range.")

    @property
    def truncates(self) -> bool:
        """Whether the support is cut, so that kept-token sets must be recorded."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


class KeptTokens(Record):
    """The sampling mask: for sampled token i, the support was `ids[offsets[i]:offsets[i+1]]`, in ascending order.

    `KeptTokens(offsets=array("q", [0, 2, 3]), ids=array("i", [5, 9, 7]))`: first 5 or 9 could be drawn, then only 7.
    """

    offsets: IntArray
    ids: IntArray

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Routes(Record):
    """The experts that the sampler chose: `experts` is [num_tokens, num_layers, experts_per_token], flattened.

    `Routes(experts=array("h", [0, 3, 1, 2]), num_layers=1, experts_per_token=2)` holds two tokens.
    """

    experts: IntArray
    num_layers: int
    experts_per_token: int

    def __len__(self) -> int:
        return len(self.experts) // (self.num_layers * self.experts_per_token)


class Selections(Record):
    """The keys that sparse attention selected while sampling: `positions` is [num_tokens, num_layers, top_k],
    flattened, of the layers with an indexer. A token's selection is ascending, -1 behind its last key.

    `Selections(positions=array("i", [0, -1, 0, 1]), num_layers=1, top_k=2)` holds two tokens.
    """

    positions: IntArray
    num_layers: int
    top_k: int

    def __len__(self) -> int:
        return len(self.positions) // (self.num_layers * self.top_k)


class GenerateRequest(Record):
    """Continue `prompt_ids`. `request_id` is the caller's, unique among requests in flight.

    `GenerateRequest(request_id="t17#0.0", prompt_ids=array("i", [1, 44, 12]), params=SamplingParams(seed=3))`
    """

    request_id: str
    prompt_ids: IntArray
    params: SamplingParams


class Completion(Record):
    """What the engine drew for one request.

    logprobs: behaviour log-prob of each drawn token, under the distribution it was drawn from (tempered, truncated,
        renormalised), in nats. entropies: of that same distribution, in nats. kept: None when nothing was truncated.
    kept_mass: probability that the truncation kept, before renormalising. routes: of every token that was fed to the
        model, prompt included and the last drawn token excluded; None for a dense model. selections: of the same
        tokens, where the engine records them.
    """

    request_id: str
    token_ids: IntArray
    logprobs: FloatArray
    entropies: FloatArray
    kept_mass: FloatArray
    finish_reason: Literal["stop", "length"]
    weight_version: int
    kept: KeptTokens | None = None
    routes: Routes | None = None
    selections: Selections | None = None


# ------------------------------------------------------------------------------------------------------ trajectory


BreakReason = Literal["new_user", "tool_results", "summary", "discard_75", "discard_all", "truncation"]


class Segment(Record):
    """One exact token context; inside a segment the context only grows.

    All columns but `kept`, `routes` and `selections` have one entry a token. `sampled` is 1 where the policy drew the
    token, `logprobs` and `entropies` are 0 elsewhere. `kept` has one set for each sampled token; `routes` and
    `selections` one row for each token but the last. A segment that rewrites an earlier one of its trajectory names it:
    `parent` is its index, `break_reason` why it was left.
    `Segment(token_ids=array("i", [1, 44, 7]), sampled=array("b", [0, 0, 1]), logprobs=array("f", [0, 0, -0.5]), ...)`
    """

    token_ids: IntArray
    sampled: IntArray
    logprobs: FloatArray
    entropies: FloatArray
    weight_version: int
    kept: KeptTokens | None = None
    kept_mass: float = 1.0
    routes: Routes | None = None
    selections: Selections | None = None
    parent: int | None = None
    break_reason: BreakReason | None = None

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first sampled one: what the members of a group share."""
        return self.sampled.index(1) if 1 in self.sampled else len(self.sampled)


EndReason = Literal[
    "stop", "length", "turn_limit", "prompt_too_long", "environment_failed", "sandbox_failed", "judge_failed"
]


class Evidence(Record):
    """What an environment saw, enough to score the trajectory again without it.

    response: all text that the policy wrote; thinking and answer: its parts, None where tags are missing or malformed.
    `Evidence(response="<think>4+3=7</think> <answer>7</answer>", thinking="4+3=7", answer="7", num_sampled_tokens=12,
    end="stop")`
    """

    response: str
    thinking: str | None
    answer: str | None
    num_sampled_tokens: int
    end: EndReason
    facts: dict[str, Any] = {}


ContextAction = Literal["summary", "discard_75", "discard_all", "truncation", "parallel_fewest_step"]


class ContextEvent(Record):
    """One time that context management changed what the policy sees.

    turn: messages that the policy had said by then. tokens_before, tokens_after: of the context, up to where the policy
    speaks. A context whose results alone were truncated has as many calls after as before.
    `ContextEvent(kind="discard_all", turn=9, tokens_before=820, tokens_after=64, num_calls_before=9,
    num_calls_after=0)`
    """

    kind: ContextAction
    turn: int
    tokens_before: int
    tokens_after: int
    num_calls_before: int
    num_calls_after: int


class Trajectory(Record):
    """One episode, whatever happened: a failed rollout is a trajectory with a reason, never a missing row.

    events: what context management did, in order.
    """

    trajectory_id: str
    task_id: str
    group_id: str
    domain: str
    segments: tuple[Segment, ...]
    messages: tuple[Message, ...]
    evidence: Evidence
    end: EndReason
    error: str | None = None
    events: tuple[ContextEvent, ...] = ()


class Score(Record):
    """What the rewards made of one Evidence: `Score(total=1.1, parts={"accuracy": 1.0, "format": 1.0})`.

    `parts` are unweighted; `total` is their weighted sum. `error` names a reward that raised; such a score trains
    nothing.
    """

    total: float
    parts: dict[str, float]
    error: str | None = None


class TrainSample(Record):
    """One segment with its credit, ready to be packed: what the trainer needs and nothing else.

    `advantage` holds for every sampled token of the sample. Samples with equal `group_id` and equal first
    `prompt_length` tokens share their prompt in the packed batch. Columns are as in Segment.
    """

    sample_id: str
    group_id: str
    domain: str
    token_ids: IntArray
    sampled: IntArray
    behaviour_logprobs: FloatArray
    prompt_length: int
    advantage: float
    weight_version: int
    kept: KeptTokens | None = None
    routes: Routes | None = None
    selections: Selections | None = None


# ------------------------------------------------------------------------------------------------------------ JSON


def to_json(record: Any) -> bytes:
    """Any record, or a list or dict of records, as JSON; an array becomes `{"typecode": "i", "values": [...]}`."""
    return msgspec.json.encode(record, enc_hook=_encode_array)


def from_json(data: bytes | str, kind: type[RecordType]) -> RecordType:
    """The inverse of `to_json`. Raises: msgspec.ValidationError naming the path of the bad field."""
    return msgspec.json.decode(data, type=kind, dec_hook=_decode_array)


def _encode_array(value: Any) -> dict[str, Any]:
    if isinstance(value, array):
        return {"typecode": value.typecode, "values": value.tolist()}
    raise NotImplementedError(f"{type(value).__name__} is not part of any record.")


def _decode_array(kind: Any, value: Any) -> array[Any]:
    return array(value["typecode"], value["values"])
