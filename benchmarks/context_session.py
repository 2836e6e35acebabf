"""One task under one strategy: a policy, its tools and a managed context, with an account of what was spent."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import msgspec
import numpy as np
from scripted_reader import written

from rorqual.contracts import Environment
from rorqual.envs.document_graph import DocumentGraphConfig, document_task, graph_of, parts_in
from rorqual.records import Completion, EndReason, Evidence, Message, Record, Task, ToolCall
from rorqual.rollout.context import ContextConfig, ContextManager
from rorqual.rollout.episode import EpisodeKey
from rorqual.text.arguments import read_object, write_json
from rorqual.text.conversation import Conversation
from rorqual.text.encoding import Encoding, EncodingConfig
from rorqual.text.openai import message_from_openai, message_to_openai
from rorqual.text.tokenizer import train_tokenizer

VOCABULARY, SMALLEST_VOCABULARY = 1500, 300
TRAINING_SEEDS = range(1_000_000, 1_000_020)
"""Worlds whose text trains the tokenizer; no task is made of them."""


class Policy(Protocol):
    """What speaks next."""

    def turn_ids(self, conversation: Conversation, max_new_tokens: int, seed: int) -> array[int]:
        """The ids of the next turn for what stands in the context of `conversation`, end-of-sentence included."""
        ...


class Reading(Protocol):
    """A policy that is a function of the ids of its prompt; `scripted_reader.ScriptedReader` is one."""

    def turn_ids(self, prompt_ids: array[int], seed: int) -> array[int]: ...


class PromptPolicy:
    """Shows a reader the prompt's ids, and nothing else."""

    def __init__(self, reader: Reading) -> None:
        self._reader = reader

    def turn_ids(self, conversation: Conversation, max_new_tokens: int, seed: int) -> array[int]:
        return self._reader.turn_ids(conversation.prompt_ids, seed)


class EndpointPolicy:
    """A model behind an OpenAI-compatible endpoint. It sees the messages of the context; tokens are counted here.

    client: an `openai.OpenAI`. options: of every request, such as the temperature.
    """

    def __init__(self, client: Any, model: str, encoding: Encoding, tools: Sequence[Any], options: dict[str, Any]):
        self._client, self._model, self._encoding = client, model, encoding
        self._tools = [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in tools]
        self._options = options

    def turn_ids(self, conversation: Conversation, max_new_tokens: int, seed: int) -> array[int]:
        answer = self._client.chat.completions.create(
            model=self._model,
            messages=[message_to_openai(message) for message in conversation.context_messages],
            tools=self._tools,
            max_tokens=max_new_tokens,
            seed=seed % 2**31,
            **self._options,
        )
        message = message_from_openai(answer.choices[0].message.model_dump(exclude_none=True))
        calls = tuple(msgspec.structs.replace(call, arguments=_object(call)) for call in message.tool_calls)
        return written(self._encoding, msgspec.structs.replace(message, tool_calls=calls))


class Budget(Record):
    """What one task may cost under any strategy: model calls, and tokens that the model writes."""

    num_steps: int = 160
    num_tokens: int = 16_000


class Spent(Record):
    """What was done. Sums over runs where a strategy has several.

    num_steps: model calls, those for summaries included. num_generated: tokens that the policy wrote. num_prefilled:
    tokens of all prompts. num_prefilled_cached: those of them that no earlier prompt of the task began with, as a
    server with an unbounded prefix cache computes them. recalled: parts in the context after each reset, as a share of
    those that some result held. managing_seconds: inside the context manager; speaking_seconds: inside the policy.
    """

    num_steps: int = 0
    num_generated: int = 0
    num_prefilled: int = 0
    num_prefilled_cached: int = 0
    num_resets: int = 0
    num_repeated_calls: int = 0
    recalled: tuple[float, ...] = ()
    managing_seconds: float = 0.0
    speaking_seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Outcome(Record):
    """runs: of each run the steps it took and whether it gave an answer, and whether that is right."""

    solved: bool
    spent: Spent
    runs: tuple[tuple[int, bool, bool], ...]


def solved_within(result: Outcome, num_steps: int) -> bool:
    """Whether the strategy would have solved it with a smaller budget of steps: its runs are one after the other."""
    spent, answered = 0, []
    for steps, has_answer, is_right in result.runs:
        spent += steps
        if spent <= num_steps and has_answer:
            answered.append((steps, is_right))
    return bool(answered) and min(answered)[1]


@lru_cache(maxsize=8)
def make_encoding(config: DocumentGraphConfig) -> Encoding:
    """DeepSeek-V3.2's messages with a tokenizer trained on the text of such worlds; the same every time."""
    settings = EncodingConfig(format="deepseek_v32", open_thinking=True)
    bytes_only = Encoding(train_tokenizer([], SMALLEST_VOCABULARY), settings)
    texts: list[str] = []
    for seed in TRAINING_SEEDS:
        task = document_task(config, seed)
        graph = graph_of(task)
        spoken = list(graph.documents)[:1]
        texts += [graph.search(graph.documents[each].title) for each in graph.documents]
        texts += [graph.open(each, page) for each in graph.documents for page in range(1, config.num_pages + 1)]
        calls = [("search", {"query": f"seal of {graph.subject} part 1"}), ("open", {"id": spoken[0], "page": 1})]
        for name, arguments in calls:
            call = ToolCall(id="1", name=name, arguments=write_json(arguments))
            said = Message(role="assistant", thinking="I follow the papers.", tool_calls=(call,))
            texts.append(
                bytes_only.render([*task.messages, said, Message(role="tool", tool_call_id="1")], task.tools).text
            )
    return Encoding(train_tokenizer(texts, VOCABULARY), settings)


def play(
    task: Task,
    environment: Environment,
    policy: Policy,
    encoding: Encoding,
    config: ContextConfig,
    rest: tuple[int, Budget],
) -> Outcome:
    """Play `task` under a strategy. rest: tokens of the window, and the budget.

    Runs of `parallel_fewest_step` share the budget; the answer of the run with the fewest steps counts, of those that
    gave one. Which run that is needs no knowledge of the right answer.
    """
    window, budget = rest
    num_runs = config.parallel_runs if config.strategy == "parallel_fewest_step" else 1
    spent, runs = Spent(), []
    for index in range(num_runs):
        left = Budget(num_steps=budget.num_steps - spent.num_steps, num_tokens=budget.num_tokens - spent.num_generated)
        if left.num_steps < 1 or left.num_tokens < 1:
            break
        run = Run(task, environment, policy, encoding, ContextManager(config, window))
        evidence = run.play(EpisodeKey(run_seed=0, step=0, task_id=task.task_id, sample_index=index), left)
        right = evidence.answer == task.payload["answer"]
        runs.append((run.spent.num_steps, evidence.answer is not None, right))
        spent = spent + run.spent
    answered = [run for run in runs if run[1]]
    return Outcome(solved=bool(answered) and min(answered)[2], spent=spent, runs=tuple(runs))


class Run:
    """One run from the question to its end."""

    def __init__(
        self, task: Task, environment: Environment, policy: Policy, encoding: Encoding, manager: ContextManager
    ) -> None:
        self._task, self._environment, self._policy, self._manager = task, environment, policy, manager
        self._conversation = Conversation(encoding, environment.start(task), task.tools)
        self._seen: list[array[int]] = [self._conversation.prompt_ids[:]]
        self.spent = Spent(num_prefilled_cached=len(self._seen[0]))

    def play(self, key: EpisodeKey, budget: Budget) -> Evidence:
        """Speak, run tools, manage, until an answer, an overflow or the end of the budget."""
        conversation, end = self._conversation, "turn_limit"
        while self.spent.num_steps < budget.num_steps and self.spent.num_generated < budget.num_tokens:
            decision = self._managed(lambda: self._manager.before_call(conversation))
            if decision.kind == "overflow":
                end = "length"
                break
            most = min(decision.max_new_tokens, budget.num_tokens - self.spent.num_generated)
            completion = self._speak(key.seed(self.spent.num_steps), most)
            if decision.kind == "summary":
                text = conversation.append_aside(completion).message.content
                self._managed(lambda text=text: self._manager.take_summary(conversation, text))
                continue
            conversation.append_sampled(completion)
            results = self._environment.respond(self._task, conversation.messages)
            if completion.finish_reason == "length" or not results:
                end = "length" if completion.finish_reason == "length" else "stop"
                break
            conversation.append(results)
        return self._evidence(end)

    def _evidence(self, end: EndReason) -> Evidence:
        segments = self._conversation.segments()
        evidence = self._environment.evidence(self._task, self._conversation.messages, segments, end)
        repeated = evidence.facts.get("num_repeated_calls", 0)
        self.spent = msgspec.structs.replace(self.spent, num_repeated_calls=repeated)
        return evidence

    def _managed(self, act: Any) -> Any:
        """What context management does, timed, with the share of the parts read that are still seen after a reset."""
        num_events = len(self._manager.events)
        started = time.perf_counter()
        decision = act()
        seconds = time.perf_counter() - started
        recalled: tuple[float, ...] = ()
        if len(self._manager.events) > num_events:
            graph = graph_of(self._task)
            read = parts_in(graph, [message.content for message in self._conversation.messages])
            kept = parts_in(graph, [message.content for message in self._conversation.context_messages])
            recalled = (len(kept) / len(read),) if read else ()
        new = len(self._manager.events) - num_events
        self.spent = self.spent + Spent(managing_seconds=seconds, num_resets=new, recalled=recalled)
        return decision

    def _speak(self, seed: int, max_new_tokens: int) -> Completion:
        prompt = self._conversation.prompt_ids
        cached = max(common_prefix(prompt, seen) for seen in self._seen)
        started = time.perf_counter()
        ids = self._policy.turn_ids(self._conversation, max_new_tokens, seed)
        seconds = time.perf_counter() - started
        finish = "stop" if len(ids) <= max_new_tokens else "length"
        ids = ids[:max_new_tokens]
        self._seen[1:] = [prompt + ids]
        self.spent = self.spent + Spent(
            num_steps=1,
            num_generated=len(ids),
            num_prefilled=len(prompt),
            num_prefilled_cached=len(prompt) - cached,
            speaking_seconds=seconds,
        )
        zeros = array("f", bytes(4 * len(ids)))
        return Completion(
            request_id="",
            token_ids=ids,
            logprobs=zeros,
            entropies=zeros,
            kept_mass=array("f", [1.0]) * len(ids),
            finish_reason=finish,
            weight_version=0,
        )


def common_prefix(first: array[int], second: array[int]) -> int:
    """How many ids both begin with."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return int(np.argmax(np.frombuffer(first[:length], np.int32) != np.frombuffer(second[:length], np.int32)))


def _object(call: ToolCall) -> str:
    """Its arguments, or an object that holds them as text where they are none; the tool then says what is wrong."""
    try:
        read_object(call.arguments)
    except ValueError:
        return write_json({"unreadable": call.arguments})
    return call.arguments
