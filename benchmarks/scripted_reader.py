"""A scripted policy for the document graph: token ids of a context in, token ids of its next turn out.

It stands in for a model where none is at hand, and is built so that it cannot know which strategy manages its context:
it is a function of the prompt's token ids and a seed, keeps nothing between calls, and knows no regime. Its rules:

1. *It knows what it sees.* Documents, pages, pointers and parts count if they stand in the context; nothing else does.
   It does not repeat a search or an opening that it sees, and does repeat one that it no longer sees. This is how any
   model works whose only memory is its context.
2. *It works on the first part that it does not see, and answers when it sees all.* A plain plan; it makes no mistakes
   of reading, so that what differs between strategies is what they left in the context.
3. *It anchors.* Of the trails that it could go on with, it draws one with probability proportional to
   n ** anchoring, n being how often the trail's name stands in the context, its own words included. The more of a
   trail it sees, the surer it goes on with it, right or wrong. Models do this: what was repeated in the context is
   repeated with growing probability (Xu et al. 2022, arXiv 2206.02369). `anchoring=0` draws evenly: no anchor at all.
   Above 1 the urn is superlinear and settles on one trail sooner or later, which need not be the true one.
4. *Asked for a summary, it writes down where everything stands*: all parts; for the part that it works on, the leads
   that it has not followed; of each trail that it has, the notes of the newest `notes_per_trail` documents. So a
   summary is faithful, has a bounded length, and still names most often what was followed most.
5. *A trail whose end it sees is not gone on with.* The search for leads, where it does not see its results, counts as
   one more trail, named once.

The text of the environment is read with the patterns below; the writing is that of `Encoding`.
"""

from __future__ import annotations

import random
import re
from array import array
from collections import Counter
from typing import NamedTuple

from rorqual.records import Message, Record, ToolCall
from rorqual.text.arguments import write_json
from rorqual.text.encoding import Encoding

QUESTION = re.compile(r"What is the seal of (\w+)\? It has (\d+) parts?")
SIGHT = re.compile(
    r"\[(?P<document>D\d+)\] (?P<name>[\w ,]+): the (?P<collection>\w+) papers"
    r"(?:\. Page (?P<page>\d+) of (?P<pages>\d+))?"
    r"|Continued under the name of (?P<pointer>\w+ \w+)"
    r"|Part (?P<part>\d+) of the seal of (?P<subject>\w+) is (?P<number>\d{4})"
    r"|(?P<dead>Nothing more is known)"
    r'|Results for "(?P<query>[^"\n]+)"'
)
END = "Nothing more is known"
COLLECTION = re.compile(r"the (\w+) papers")


class ReaderConfig(Record):
    """anchoring: see rule 3. notes_per_trail: see rule 4."""

    anchoring: float = 2.0
    notes_per_trail: int = 3


class Sight(NamedTuple):
    """What can be known from a context.

    parts: number by part, from 1. titles: name and collection of each document, that seen last last. pages_read: by
    document. num_pages: of those of which a page was read. notes: by document, header and note as its page has them,
    newest last. pointers: the name that a document points to. queries: searches whose results are seen. mentions: how
    often each collection is named.
    """

    subject: str
    num_parts: int
    parts: dict[int, str]
    titles: dict[str, tuple[str, str]]
    pages_read: dict[str, set[int]]
    num_pages: dict[str, int]
    notes: dict[str, str]
    pointers: dict[str, str]
    queries: set[str]
    mentions: Counter[str]


def look(text: str) -> Sight:
    """Read a context. Raises: ValueError when it holds no question."""
    question = QUESTION.search(text)
    if question is None:
        raise ValueError("The context holds no question of a document graph.")
    sight = Sight(question[1], int(question[2]), {}, {}, {}, {}, {}, {}, set(), Counter())
    sight.mentions.update(COLLECTION.findall(text))
    page = ""
    for match in SIGHT.finditer(text, question.end()):
        found = match.groupdict()
        if document := found["document"]:
            sight.titles.pop(document, None)
            sight.titles[document] = (found["name"], found["collection"])
            page = ""
            if found["page"]:
                page = document
                sight.pages_read.setdefault(document, set()).add(int(found["page"]))
                sight.num_pages[document] = int(found["pages"])
                header = f"{match[0]}."
        elif found["query"]:
            sight.queries.add(found["query"])
        elif page:
            sight.notes[page] = f"{sight.notes.pop(page, header)} {match[0]}."
            if found["pointer"]:
                sight.pointers[page] = found["pointer"]
        if found["part"] and found["subject"] == sight.subject:
            sight.parts[int(found["part"])] = found["number"]
    return sight


def next_turn(text: str, draw: random.Random, config: ReaderConfig, turn: str) -> Message:
    """What the policy says in the context `text`. turn: begins the ids of its calls."""
    sight = look(text)
    missing = [part for part in range(1, sight.num_parts + 1) if part not in sight.parts]
    if _asked_for_summary(text):
        return Message(role="assistant", content=summary(sight, missing[0] if missing else sight.num_parts, config))
    if not missing:
        answer = "-".join(sight.parts[part] for part in range(1, sight.num_parts + 1))
        return Message(role="assistant", thinking="I see all parts.", content=f"<answer>{answer}</answer>")
    options = trails(sight, missing[0])
    if not options:
        return Message(role="assistant", thinking="No trail is left.", content="<answer>unknown</answer>")
    weights = [max(sight.mentions[name], 1) ** config.anchoring for name in options]
    (chosen,) = draw.choices(list(options), weights)
    name, arguments = options[chosen]
    call = ToolCall(id=f"{turn}0", name=name, arguments=write_json(arguments))
    thinking = f"I follow the {chosen} papers." if chosen else f"I look for leads to part {missing[0]}."
    return Message(role="assistant", thinking=thinking, tool_calls=(call,))


def trails(sight: Sight, part: int) -> dict[str, tuple[str, dict[str, object]]]:
    """Collection -> the call that goes on with it; "" -> the search for leads, where its results are not seen."""
    options: dict[str, tuple[str, dict[str, object]]] = {}
    if lead_query(sight, part) not in sight.queries:
        options[""] = ("search", {"query": lead_query(sight, part)})
    known = {name for name, _ in sight.titles.values()} | sight.queries
    ended = {sight.titles[document][1] for document, note in sight.notes.items() if END in note}
    for document, (name, collection) in sight.titles.items():
        if collection in ended or _lead_part(sight, name) not in (part, 0):
            continue
        if document not in sight.notes:
            read = sight.pages_read.get(document, set())
            unread = [page for page in range(1, sight.num_pages.get(document, 1) + 1) if page not in read]
            if unread:
                options[collection] = ("open", {"id": document, "page": unread[0]})
        elif document in sight.pointers and sight.pointers[document] not in known:
            options[collection] = ("search", {"query": sight.pointers[document]})
    return options


def summary(sight: Sight, part: int, config: ReaderConfig) -> str:
    """What is known, while the reader works on `part`. In the environment's words, so that it is read like those."""
    lines = [
        f"Part {index} of the seal of {sight.subject} is {number}." for index, number in sorted(sight.parts.items())
    ]
    trails: dict[str, list[str]] = {}
    for document, note in sight.notes.items():
        name, collection = sight.titles[document]
        if _lead_part(sight, name) in (part, 0) and f"of the seal of {sight.subject} is" not in note:
            trails.setdefault(collection, []).append(note)
    if lead_query(sight, part) in sight.queries:
        lines.append(f'Results for "{lead_query(sight, part)}":')
    for document, (name, collection) in sight.titles.items():
        if _lead_part(sight, name) == part and collection not in trails:
            lines.append(f"[{document}] {name}: the {collection} papers")
    for notes in trails.values():
        lines += notes[-config.notes_per_trail :]
    return "\n".join(lines) or "Nothing was found yet."


def lead_query(sight: Sight, part: int) -> str:
    return f"seal of {sight.subject} part {part}"


def _lead_part(sight: Sight, name: str) -> int:
    """Which part a document called `name` is a lead to; 0 for one further on a trail."""
    match = re.fullmatch(rf"Seal of {sight.subject}, part (\d+)", name)
    return int(match[1]) if match else 0


class ScriptedReader:
    """The policy as tokens: `turn_ids(prompt_ids, seed)`. Holds the text of its last prompt only to decode less."""

    def __init__(self, encoding: Encoding, config: ReaderConfig | None = None) -> None:
        self._encoding = encoding
        self._config = config or ReaderConfig()
        self._decoded: tuple[array[int], str] = (array("i"), "")

    def turn_ids(self, prompt_ids: array[int], seed: int) -> array[int]:
        """What it says next, its end-of-sentence token included."""
        message = next_turn(self._text(prompt_ids), random.Random(seed), self._config, "call_")
        return written(self._encoding, message)

    def _text(self, ids: array[int]) -> str:
        known, text = self._decoded
        if ids[: len(known)] != known:
            known, text = array("i"), ""
        text += self._encoding.tokenizer.decode(ids[len(known) :])
        self._decoded = (ids[:], text)
        return text


def written(encoding: Encoding, message: Message) -> array[int]:
    """The ids by which a policy would say `message`."""
    rendered = encoding.render([Message(role="user", content="?"), message])
    return array("i", [i for i, sampled in zip(rendered.token_ids, rendered.sampled, strict=True) if sampled])


def _asked_for_summary(text: str) -> bool:
    last_user = text[text.rfind("<｜User｜>") :]
    return "Summarise" in last_user and "What is the seal" not in last_user
