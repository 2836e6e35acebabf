"""The library of documents: solvable by its tools alone, the same every time, and every wrong call has an answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rorqual.envs.document_graph import (
    FAILED,
    DocumentGraph,
    DocumentGraphConfig,
    DocumentGraphEnvironment,
    document_task,
    graph_of,
    parts_in,
    run_tool,
)
from rorqual.records import Message, Task, ToolCall, from_json, to_json
from rorqual.text.arguments import write_json

SHAPES = [
    DocumentGraphConfig(),
    DocumentGraphConfig(num_parts=3, depth=2, num_trails=2, decoy_depth=5, num_pages=3, num_results=2),
    DocumentGraphConfig(num_parts=8, depth=1, num_trails=2, decoy_depth=1, num_pages=1, page_words=0),
    DocumentGraphConfig(num_parts=1, depth=5, num_trails=1),
    DocumentGraphConfig(num_parts=2, depth=4, num_trails=3, decoy_depth=2),
]


def call(name: str, call_id: str = "1", **arguments: object) -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=write_json(arguments))


def search(task: Task, query: str) -> list[str]:
    return re.findall(r"\[(D\d+)\]", run_tool(graph_of(task), call("search", query=query)))


def read(task: Task, document: str) -> str:
    """All pages of a document."""
    pages = graph_of(task).config.num_pages
    return "".join(run_tool(graph_of(task), call("open", id=document, page=page)) for page in range(1, pages + 1))


def walk(task: Task, document: str) -> Iterator[str]:
    """The documents of a trail, from `document` on, as the pages lead."""
    while True:
        text = read(task, document)
        yield text
        name = re.search(r"Continued under the name of (\w+ \w+)", text)
        if name is None:
            return
        document = search(task, name[1])[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_answer_is_found_with_the_tools_and_stands_on_one_trail_for_each_part(shape: DocumentGraphConfig) -> None:
    task = document_task(shape, seed=3)
    subject = re.search(r"the seal of (\w+)\?", task.messages[0].content)[1]
    parts = []
    for part in range(1, shape.num_parts + 1):
        leads = search(task, f"seal of {subject} part {part}")[: shape.num_trails]
        assert len(leads) == shape.num_trails
        trails = [list(walk(task, lead)) for lead in leads]
        wanted = re.compile(rf"Part {part} of the seal of {subject} is (\d{{4}})")
        found = [wanted.search("".join(trail)) for trail in trails]
        assert sum(match is not None for match in found) == 1
        for trail, match in zip(trails, found, strict=True):
            assert len(trail) == (shape.depth if match else shape.decoy_depth)
            assert match is None or wanted.search(trail[-1]), "the part stands at the end of its trail"
        parts += [match[1] for match in found if match]
    assert "-".join(parts) == task.payload["answer"]


def test_decoys_hold_numbers_of_seals_with_other_names() -> None:
    task = document_task(DocumentGraphConfig(num_trails=4, decoy_depth=6), seed=1)
    graph = graph_of(task)
    subjects = re.findall(r"Part 1 of the seal of (\w+) is", " ".join(each.note for each in graph.documents.values()))
    assert len(subjects) == len(set(subjects)) == 4
    assert subjects.count(graph.subject) == 1


def test_a_world_follows_from_its_config_and_seed() -> None:
    shape = SHAPES[1]
    task = document_task(shape, 5)
    assert document_task(shape, 5) == task == from_json(to_json(task), Task)
    first, second = DocumentGraph(shape, 5), DocumentGraph(shape, 5)
    assert first.documents == second.documents == graph_of(from_json(to_json(task), Task)).documents
    assert [first.open(each, 2) for each in first.documents] == [second.open(each, 2) for each in second.documents]
    others = {document_task(each, seed).payload["answer"] for each in SHAPES[1:2] for seed in range(50)}
    assert len(others) == 50


def test_size_of_a_page_is_that_of_the_config_and_changes_nothing_else() -> None:
    small, large = (DocumentGraph(DocumentGraphConfig(page_words=words, num_pages=1), 0) for words in (10, 300))
    for graph, words in ((small, 10), (large, 300)):
        body = graph.open(next(iter(graph.documents)), 1).partition("\n")[2]
        assert len(re.sub(r"\(.*?\)", "", body).split()) == words


def test_search_gives_the_best_first_and_no_more_than_asked_for() -> None:
    graph = DocumentGraph(DocumentGraphConfig(num_results=3), 0)
    name = list(graph.documents.values())[2].title.partition(":")[0]
    lines = graph.search(name).splitlines()
    assert lines[0] == f'Results for "{name}":'
    assert name in lines[1]
    assert len(graph.search(f"seal {name} papers").splitlines()) == 4
    assert name in graph.search(f"seal {name} papers").splitlines()[1], "rare words count more"
    assert graph.search("Xyzzy").splitlines()[1:] == ["nothing"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (call("open", id="D1", page=1), "no document 'D1'"),
        (call("open", id="FIRST", page=3), "pages 1 to 2"),
        (call("open", id="FIRST", page=0), "pages 1 to 2"),
        (call("open", id="FIRST", page=True), "must be an integer, got True"),
        (call("open", id="FIRST", page="1"), "must be an integer, got '1'"),
        (call("open", id="FIRST"), "'page' must be an integer"),
        (call("search", words="x"), "'query' must be a string"),
        (call("close"), "no tool 'close'"),
        (ToolCall(id="1", name="search", arguments="{"), ""),
        (ToolCall(id="1", name="search", arguments='["x"]'), ""),
    ],
)
def test_a_wrong_call_has_a_result_that_says_what_is_wrong(wrong: ToolCall, words: str) -> None:
    task = document_task(DocumentGraphConfig(), 0)
    first = next(iter(graph_of(task).documents))
    wrong = ToolCall(id="1", name=wrong.name, arguments=wrong.arguments.replace("FIRST", first))
    said = Message(role="assistant", tool_calls=(wrong,))
    (result,) = DocumentGraphEnvironment().respond(task, [*task.messages, said])
    assert result.content.startswith(FAILED)
    assert words in result.content
    assert result.tool_call_id == "1"


def test_environment_answers_calls_one_by_one_ends_without_and_counts() -> None:
    task = document_task(DocumentGraphConfig(num_parts=1, depth=1, num_pages=1), 0)
    graph, environment = graph_of(task), DocumentGraphEnvironment()
    messages = list(environment.start(task))
    assert messages == list(task.messages)
    true = next(each for each in graph.documents.values() if graph.answer in each.note)
    calls = (call("search", "a", query="x"), call("open", "b", id=true.document_id, page=1), call("close", "c"))
    for turn in (calls, calls[:1]):
        messages.append(Message(role="assistant", tool_calls=turn))
        results = environment.respond(task, messages)
        assert [each.tool_call_id for each in results] == [each.id for each in turn]
        messages += results
    assert parts_in(graph, [messages[3].content]) == [0]
    messages.append(Message(role="assistant", thinking="So.", content=f"<answer>{graph.answer}</answer>"))
    assert environment.respond(task, messages) == ()
    evidence = environment.evidence(task, messages, (), "stop")
    assert evidence.answer == task.payload["answer"]
    assert evidence.facts == {"num_calls": 4, "num_failed_calls": 1, "num_repeated_calls": 1, "parts_read": [0]}
    bare = environment.evidence(task, task.messages, (), "prompt_too_long")
    assert (bare.answer, bare.facts["num_calls"], bare.facts["parts_read"]) == (None, 0, [])


def test_shapes_that_make_no_sense_and_tasks_of_others_are_refused() -> None:
    with pytest.raises(ValueError, match="num_trails = 0"):
        DocumentGraphConfig(num_trails=0)
    with pytest.raises(ValueError, match=r"2,000 documents"):
        DocumentGraphConfig(num_parts=50, decoy_depth=50)
    other = Task(task_id="t", environment="dialogue", domain="x", messages=(Message(role="user", content="?"),))
    with pytest.raises(ValueError, match="holds no document graph"):
        DocumentGraphEnvironment().start(other)


def test_imports_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rorqual.envs.document_graph"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
