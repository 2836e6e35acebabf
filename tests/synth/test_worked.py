"""The corpus keeps its stated shares, is fixed by (seed, index), and scores as its forms promise."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import reasoning_gym

from rorqual.envs.dialogue import ReasoningGymTasks
from rorqual.synth.scratchpad import CORRECTION
from rorqual.synth.worked import Corpus, CorpusConfig, Document, Source, train_source
from rorqual.text.reflection import corrects_itself

WELL_FORMED = re.compile(r"<think>.+</think> <answer>([^<>]+)</answer>", re.DOTALL)
DIRECT = re.compile(r"<answer>([^<>]+)</answer>")


def make_items(dataset: str, seed: int = 7) -> Any:
    options = {"min_terms": 3, "max_terms": 5, "max_digits": 1} if dataset == "chain_sum" else {}
    return reasoning_gym.create_dataset(dataset, seed=seed, size=100_000, **options)


def make_corpus(*datasets: str, **config: Any) -> Corpus:
    sources = [Source(dataset=name, entry=make_items(name).__getitem__) for name in datasets]
    return Corpus(CorpusConfig(**config), sources)


def only(form: str, **config: Any) -> dict[str, Any]:
    shares = {f"{name}_share": 0.0 for name in ("direct", "reasoned", "self_correcting", "malformed")}
    return {**shares, f"{form}_share": 1.0, **config}


def stated_score(items: Any, document: Document, index: int, pattern: re.Pattern[str]) -> float:
    match = pattern.fullmatch(document.response)
    assert match is not None, document.response
    assert match.group(1) == document.answer
    return float(items.score_answer(match.group(1), items[index]))


def test_shares_of_forms_are_kept() -> None:
    num_documents = 4000
    corpus = make_corpus(
        "chain_sum", direct_share=0.4, reasoned_share=0.3, self_correcting_share=0.2, malformed_share=0.1
    )
    counts = Counter(corpus.document(index).form for index in range(num_documents))
    for form, share in corpus.config.form_shares.items():
        deviation = (share * (1 - share) / num_documents) ** 0.5
        assert counts[form] / num_documents == pytest.approx(share, abs=4.5 * deviation)


def test_the_first_documents_teach_the_skill_alone() -> None:
    corpus = make_corpus("chain_sum", num_skill_documents=1000)
    early = Counter(corpus.document(index).form for index in range(1000))
    assert set(early) == {"reasoned", "self_correcting"}
    assert early["self_correcting"] / 1000 == pytest.approx(corpus.config.self_correcting_share, abs=0.043)
    plain = make_corpus("chain_sum")
    assert all(corpus.document(index) == plain.document(index) for index in range(1000, 1200))


def test_share_of_wrong_steps_is_kept_and_they_make_answers_wrong() -> None:
    items, corpus = make_items("chain_sum"), make_corpus("chain_sum", **only("reasoned", wrong_step_share=0.1))
    num_steps = num_slips = num_wrong = num_with_one_slip = 0
    for index in range(2000):
        document = corpus.document(index)
        num_steps += document.response.count("=") + 1
        num_slips += document.num_kept_slips
        if document.num_kept_slips == 1:
            num_with_one_slip += 1
            num_wrong += stated_score(items, document, index, WELL_FORMED) < 1.0
    assert num_slips / num_steps == pytest.approx(0.1, abs=4.5 * (0.09 / num_steps) ** 0.5)
    assert num_wrong == num_with_one_slip > 100


def test_share_of_noisy_answers_is_kept() -> None:
    items, corpus = make_items("chain_sum"), make_corpus("chain_sum", **only("direct", noisy_answer_share=0.3))
    wrong = sum(stated_score(items, corpus.document(index), index, DIRECT) < 1.0 for index in range(2000))
    assert wrong / 2000 == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("dataset", ["chain_sum", "leg_counting", "gcd", "spell_backward", "lcm"])
def test_without_wrong_steps_every_reasoned_document_is_right(dataset: str) -> None:
    items, corpus = make_items(dataset), make_corpus(dataset, **only("reasoned", wrong_step_share=0.0))
    for index in range(200):
        assert stated_score(items, corpus.document(index), index, WELL_FORMED) == 1.0


@pytest.mark.parametrize("dataset", ["chain_sum", "leg_counting", "products", "spell_backward"])
def test_self_correcting_documents_correct_once_and_end_right(dataset: str) -> None:
    items, corpus = make_items(dataset), make_corpus(dataset, **only("self_correcting", wrong_step_share=0.5))
    for index in range(200):
        document = corpus.document(index)
        assert stated_score(items, document, index, WELL_FORMED) == 1.0
        assert corrects_itself(document.response)
        assert document.response.count(CORRECTION) == 1


def test_malformed_documents_lack_a_tag() -> None:
    corpus = make_corpus("chain_sum", **only("malformed"))
    for document in map(corpus.document, range(300)):
        assert not WELL_FORMED.fullmatch(document.response)
        assert not DIRECT.fullmatch(document.response)
        assert document.answer in document.response


def test_a_document_depends_on_seed_and_index_alone() -> None:
    first, again = make_corpus("chain_sum", "leg_counting"), make_corpus("chain_sum", "leg_counting")
    forwards = [first.document(index) for index in range(200)]
    backwards = [again.document(index) for index in reversed(range(200))]
    assert forwards == backwards[::-1]
    other = make_corpus("chain_sum", "leg_counting", seed=1)
    assert [other.document(index) for index in range(200)] != forwards


def test_sources_take_turns_and_no_entry_is_used_twice() -> None:
    asked: dict[str, list[int]] = {"chain_sum": [], "lcm": []}

    def source(dataset: str) -> Source:
        items = make_items(dataset)

        def entry(index: int) -> Any:
            asked[dataset].append(index)
            return items[index]

        return Source(dataset=dataset, entry=entry)

    corpus = Corpus(CorpusConfig(), [source("chain_sum"), source("lcm")])
    assert [corpus.document(index).dataset for index in range(6)] == ["chain_sum", "lcm"] * 3
    assert asked == {"chain_sum": [0, 1, 2], "lcm": [0, 1, 2]}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"direct_share": 0.5}, "sum to 1.05"),
        ({"wrong_step_share": 1.5}, "wrong_step_share = 1.5"),
        ({"malformed_share": -0.1}, "malformed_share = -0.1"),
        ({"num_skill_documents": -1}, "num_skill_documents = -1"),
    ],
)
def test_shares_out_of_range_are_refused_by_name(config: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        CorpusConfig(**config)


@pytest.mark.parametrize("dataset", ["chain_sum", "leg_counting", "letter_counting", "number_sorting"])
def test_documents_of_the_train_split_ask_its_questions(dataset: str) -> None:
    tasks = ReasoningGymTasks(dataset)
    corpus = Corpus(CorpusConfig(), [train_source(tasks)])
    for index in range(50):
        assert corpus.document(index).question == tasks.task("train", index).messages[-1].content


def test_a_corpus_without_sources_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one source"):
        Corpus(CorpusConfig(), [])
