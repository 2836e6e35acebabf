"""A library of linked documents with `search` and `open`: an answer in parts, each at the end of a trail of clues.

    question ─ search ─► leads, one collection each ─ open ─► page: "continued under the name of Hestor Vane"
                              │                                   └─ search ─► next document ─ open ─► ... ─► a part
                              └─ all but one are decoys: trails that begin alike, go on longer, and end nowhere

`num_parts` parts behind `depth` documents each make k = num_parts * depth clues. Two corners of this space ask for
opposite things of a policy whose context is too short for its history. With one part and many long decoys, what is in
the context is mostly a wrong lead, and forgetting it helps. With many parts, each of them near, everything found must
be held together, and forgetting it hurts. A world is a pure function of its config and seed; so is every tool result.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import msgspec

from rorqual.records import EndReason, Evidence, Message, Record, Segment, Task, ToolCall, ToolSpec
from rorqual.text.arguments import read_object
from rorqual.text.response import join_thinking, parse_response

SYLLABLES = ("an", "bel", "cor", "dun", "el", "far", "gro", "hes", "il", "jor", "kal", "lem", "mor", "nes", "or", "pra",
             "quin", "ros", "sil", "tam", "ul", "ver", "wen", "yas", "zor")  # fmt: skip
"""What names are made of."""

WORDS = ("the", "of", "a", "in", "harbour", "letter", "winter", "clerk", "ledger", "river", "copied", "old", "market",
         "sealed", "bridge", "tower", "wrote", "again", "under", "lamp", "paper", "north", "garden", "stone", "ship",
         "silver", "morning", "counted", "street", "carried", "wool", "grain", "watch", "road", "hill")  # fmt: skip
"""What the rest of a page is made of: text that costs tokens and says nothing."""


class DocumentGraphConfig(Record):
    """The shape of a world.

    num_parts: numbers that make up the answer. depth: documents on the true trail to each. num_trails: trails that
    begin alike for each part; one is true. decoy_depth: documents on a wrong one. num_pages: of a document; what it has
    to say stands on one of them. page_words: words of a page, the size of tool outputs. num_results: of a search.
    """

    num_parts: int = 1
    depth: int = 4
    num_trails: int = 4
    decoy_depth: int = 12
    num_pages: int = 2
    page_words: int = 60
    num_results: int = 6

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field that is out of range."""
        smallest = {"page_words": 0}
        for name in self.__struct_fields__:
            if getattr(self, name) < smallest.get(name, 1):
                raise ValueError(f"DocumentGraphConfig.{name} = {getattr(self, name)} is out of range.")
        if self.num_parts * self.num_trails * max(self.depth, self.decoy_depth) > 2000:
            raise ValueError("The world has more than 2,000 documents. Take fewer parts, trails or documents on them.")


class Document(NamedTuple):
    """One document. note: what it has to say; it stands on page `note_page`, counted from 1."""

    document_id: str
    title: str
    note: str
    note_page: int


SEARCH = ToolSpec(
    name="search",
    description="Search the titles of all documents. Gives the best matches, one a line: [id] title.",
    parameters={
        "type": "object",
        "properties": {"query": {"type": "string", "description": "Words to look for, such as a name."}},
        "required": ["query"],
    },
)

OPEN = ToolSpec(
    name="open",
    description="Read one page of a document.",
    parameters={
        "type": "object",
        "properties": {
            "id": {"type": "string", "description": "The id of a document, such as D104."},
            "page": {"type": "integer", "description": "Which page, from 1."},
        },
        "required": ["id", "page"],
    },
)


def document_task(config: DocumentGraphConfig, seed: int) -> Task:
    """The task of one world. Its payload holds the world's config and seed, and the answer."""
    graph = DocumentGraph(config, seed)
    parts = "1 part" if config.num_parts == 1 else f"{config.num_parts} parts"
    question = (
        f"What is the seal of {graph.subject}? It has {parts}, each a number of four digits. Look it up with search "
        f'and open; the leads to part 1 are found by searching "seal of {graph.subject} part 1". Several collections '
        "claim to lead to a part, one does. Other seals have similar names. Answer with all parts in order, joined by "
        "hyphens, as <answer>...</answer>."
    )
    return Task(
        task_id=f"document_graph/{config.num_parts}x{config.depth}/{seed}",
        environment="document_graph",
        domain="search",
        messages=(Message(role="user", content=question),),
        tools=(SEARCH, OPEN),
        payload={"config": msgspec.to_builtins(config), "seed": seed, "answer": graph.answer},
    )


class DocumentGraph:
    """One world: its documents, and what the tools say of them."""

    def __init__(self, config: DocumentGraphConfig, seed: int) -> None:
        self.config = config
        self._random = random.Random(f"{msgspec.json.encode(config).decode()}|{seed}")
        self._page_seed = f"{seed}|{config.page_words}"
        self._names: set[str] = set()
        self.subject = self._name()
        self.parts = tuple(self._number() for _ in range(config.num_parts))
        documents = [document for part in range(config.num_parts) for document in self._trails_to(part)]
        self.documents = {document.document_id: document for document in documents}
        self._index: dict[str, list[str]] = defaultdict(list)
        for document in documents:
            for word in _words_of(document.title):
                self._index[word].append(document.document_id)

    @property
    def answer(self) -> str:
        return "-".join(self.parts)

    def search(self, query: str) -> str:
        """Titles that hold words of the query, best first; a word counts one over the number of titles that hold it."""
        scores: Counter[str] = Counter()
        for word in sorted(_words_of(query)):
            for document_id in self._index.get(word, ()):
                scores[document_id] += 1.0 / len(self._index[word])  # type: ignore[assignment]
        best = sorted(scores, key=lambda each: (-scores[each], each))[: self.config.num_results]
        lines = [f"[{each}] {self.documents[each].title}" for each in best]
        return f'Results for "{query}":\n' + ("\n".join(lines) if lines else "nothing")

    def open(self, document_id: str, page: int) -> str:
        """A page. Raises: ValueError for an unknown document or page, in words for the policy."""
        document = self.documents.get(document_id)
        if document is None:
            raise ValueError(f"There is no document {document_id!r}. Search for one.")
        if not 1 <= page <= self.config.num_pages:
            raise ValueError(f"Document {document_id} has pages 1 to {self.config.num_pages}; there is no page {page}.")
        words = random.Random(f"{self._page_seed}|{document_id}|{page}")
        text = [words.choice(WORDS) for _ in range(self.config.page_words)]
        if page == document.note_page:
            text.insert(words.randrange(len(text) + 1), f"({document.note})")
        return f"[{document_id}] {document.title}. Page {page} of {self.config.num_pages}.\n{' '.join(text)}."

    # ----------------------------------------------------------------------------------------------------- its making

    def _trails_to(self, part: int) -> list[Document]:
        """The true trail and its decoys, in one order of ids that gives nothing away."""
        true_trail = self._random.randrange(self.config.num_trails)
        trails = [self._trail(part, index == true_trail) for index in range(self.config.num_trails)]
        return [document for trail in trails for document in trail]

    def _trail(self, part: int, is_true: bool) -> list[Document]:
        length = self.config.depth if is_true else self.config.decoy_depth
        names = [f"Seal of {self.subject}, part {part + 1}", *(self._full_name() for _ in range(length - 1))]
        collection = self._name()
        trail = []
        for place, name in enumerate(names):
            notes = [f"Continued under the name of {names[place + 1]}"] if place + 1 < length else []
            if place + 1 == self.config.depth:
                subject, number = (self.subject, self.parts[part]) if is_true else (self._name(), self._number())
                notes.append(f"Part {part + 1} of the seal of {subject} is {number}")
            note = ". ".join(notes) or "Nothing more is known"
            note_page = self._random.randint(1, self.config.num_pages)
            trail.append(Document(self._document_id(), f"{name}: the {collection} papers", note, note_page))
        return trail

    def _number(self) -> str:
        return f"{self._random.randrange(10_000):04d}"

    def _full_name(self) -> str:
        return f"{self._name()} {self._name()}"

    def _name(self) -> str:
        return self._new(lambda: "".join(self._random.choice(SYLLABLES) for _ in range(3)).capitalize())

    def _document_id(self) -> str:
        return self._new(lambda: f"D{self._random.randrange(1000, 10_000)}")

    def _new(self, draw: Any) -> str:
        while (name := draw()) in self._names:
            pass
        self._names.add(name)
        return cast(str, name)


class DocumentGraphEnvironment:
    """Runs the calls of the policy; a message without calls ends the episode. Implements `contracts.Environment`."""

    def start(self, task: Task) -> tuple[Message, ...]:
        """The question. Raises: ValueError for a task of another environment."""
        graph_of(task)
        return task.messages

    def respond(self, task: Task, messages: Sequence[Message]) -> tuple[Message, ...]:
        """One result for each call, also for one that is wrong, which says what is; nothing after an answer."""
        graph = graph_of(task)
        return tuple(
            Message(role="tool", content=run_tool(graph, call), tool_call_id=call.id)
            for call in messages[-1].tool_calls
        )

    def evidence(self, task: Task, messages: Sequence[Message], segments: Sequence[Segment], end: str) -> Evidence:
        """The last message in its parts, with facts on what was read.

        num_calls, num_failed_calls; num_repeated_calls: same tool and arguments as one before, what forgetting costs;
        parts_read: indices of the parts whose number some result held.
        """
        said = [message for message in messages[len(task.messages) :] if message.role == "assistant"]
        text = join_thinking(said[-1]) if said else ""
        response = parse_response(text)
        results = [message.content for message in messages if message.role == "tool"]
        calls = Counter((call.name, call.arguments) for message in said for call in message.tool_calls)
        graph = graph_of(task)
        return Evidence(
            response=text,
            thinking=response.thinking,
            answer=response.answer,
            num_sampled_tokens=sum(segment.num_sampled for segment in segments),
            end=cast(EndReason, end),
            facts={
                "num_calls": calls.total(),
                "num_failed_calls": sum(result.startswith(FAILED) for result in results),
                "num_repeated_calls": calls.total() - len(calls),
                "parts_read": parts_in(graph, results),
            },
        )


FAILED = "Error: "
"""How the result of a call begins that could not be run."""


def run_tool(graph: DocumentGraph, call: ToolCall) -> str:
    """What the tool says to one call. A call that cannot be run has a result too, which says why."""
    try:
        arguments = read_object(call.arguments)
        if call.name == "search":
            return graph.search(_argument(arguments, "query", str))
        if call.name == "open":
            return graph.open(_argument(arguments, "id", str), _argument(arguments, "page", int))
        raise ValueError(f"There is no tool {call.name!r}; there are search and open.")
    except ValueError as error:
        return f"{FAILED}{error}"


def parts_in(graph: DocumentGraph, texts: Sequence[str]) -> list[int]:
    """Indices of the parts of the answer that stand in one of `texts`, in the words of their document."""
    wanted = [
        f"Part {index + 1} of the seal of {graph.subject} is {number}" for index, number in enumerate(graph.parts)
    ]
    return [index for index, words in enumerate(wanted) if any(words in text for text in texts)]


def graph_of(task: Task) -> DocumentGraph:
    """The world of a task. Raises: ValueError for a task that is not of this environment."""
    if not {"config", "seed", "answer"} <= task.payload.keys():
        raise ValueError(f"Task {task.task_id} holds no document graph; make tasks with `document_task`.")
    return _graph(json.dumps(task.payload["config"], sort_keys=True), task.payload["seed"])


@lru_cache(maxsize=64)
def _graph(config_json: str, seed: int) -> DocumentGraph:
    return DocumentGraph(msgspec.json.decode(config_json, type=DocumentGraphConfig), seed)


def _argument(arguments: dict[str, Any], name: str, kind: type[Any]) -> Any:
    value = arguments.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        words = {str: "a string", int: "an integer"}[kind]
        raise ValueError(f"Argument {name!r} must be {words}, got {value!r}.")
    return value


def _words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
