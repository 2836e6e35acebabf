"""The pre-training corpus: worked solutions of reasoning-gym entries, in several forms, some of them with mistakes.

Comes in: entries of the train split, by index. Goes out: documents, made lazily and fixed by (config, sources, index),
so that a data cursor is one integer. How a question becomes a prompt and both become tokens is left to others.

The mixture makes a base model for R1-Zero: the commonest form answers at once, which a small model does badly, so the
base is weak; the reasoned forms are there, so it can explore; slips, noise and broken tags are there to be unlearnt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from rorqual.envs.dialogue import ReasoningGymTasks
from rorqual.records import Record
from rorqual.synth.scratchpad import Slip, Worked
from rorqual.synth.solvers import Entry, solve, wrong_answers

Form = Literal["direct", "reasoned", "self_correcting", "malformed"]


class CorpusConfig(Record):
    """What the corpus is made of. The four shares are of documents and sum to 1.

    direct_share: `<answer>7</answer>`, no thinking. reasoned_share: thinking, then the answer. self_correcting_share:
    reasoned, with one wrong step that is noticed and put right. malformed_share: reasoned or direct with tags missing.
    wrong_step_share: probability that a step of a reasoned or malformed document is wrong and goes unnoticed.
    noisy_answer_share: probability that an answer given without reasoning is not the right one.
    num_skill_documents: documents before this index teach the skill alone: what is direct or malformed later is
    reasoned in them. A tiny model learns the steps far sooner so, and the later documents still give it its habits.
    """

    seed: int = 0
    direct_share: float = 0.45
    reasoned_share: float = 0.3
    self_correcting_share: float = 0.1
    malformed_share: float = 0.15
    wrong_step_share: float = 0.05
    noisy_answer_share: float = 0.25
    num_skill_documents: int = 0

    def __post_init__(self) -> None:
        """Raises: ValueError naming the share that is out of range, or the sum."""
        for name in (*(f"{form}_share" for form in FORM_WRITERS), "wrong_step_share", "noisy_answer_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"CorpusConfig.{name} = {getattr(self, name)} is no share; give a number from 0 to 1.")
        if self.num_skill_documents < 0:
            raise ValueError(f"CorpusConfig.num_skill_documents = {self.num_skill_documents}; give 0 or more.")
        total = sum(self.form_shares.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"The shares of the forms sum to {total:.6g}, not to 1: {self.form_shares}.")

    def shares_at(self, index: int) -> dict[Form, float]:
        """Share of each form at this index: `form_shares`, except among the skill documents."""
        if index >= self.num_skill_documents:
            return self.form_shares
        return {"reasoned": 1.0 - self.self_correcting_share, "self_correcting": self.self_correcting_share}

    @property
    def form_shares(self) -> dict[Form, float]:
        """Share of each form once the skill documents are over."""
        return {
            "direct": self.direct_share,
            "reasoned": self.reasoned_share,
            "self_correcting": self.self_correcting_share,
            "malformed": self.malformed_share,
        }


class Source(Record):
    """Where entries come from: a reasoning-gym data set, and a function from index to entry (of its train split)."""

    dataset: str
    entry: Callable[[int], Entry]


def train_source(tasks: ReasoningGymTasks) -> Source:
    """The entries of the train split of these tasks."""
    return Source(dataset=tasks.name, entry=lambda index: tasks.task("train", index).payload["entry"])


class Document(Record):
    """One worked solution.

    `Document(dataset="chain_sum", form="direct", question="... 4 + 3 =", response="<answer>7</answer>", answer="7",
    num_kept_slips=0)`; `answer` is the one that `response` states, and `num_kept_slips` counts unnoticed wrong steps.
    """

    dataset: str
    form: Form
    question: str
    response: str
    answer: str
    num_kept_slips: int


class Corpus:
    """Documents by index. Sources take turns and no entry is used twice: document i is entry i // n of source i % n."""

    def __init__(self, config: CorpusConfig, sources: Sequence[Source]) -> None:
        """Raises: ValueError when there is no source."""
        if not sources:
            raise ValueError("A corpus needs at least one source; name a reasoning-gym data set in the config.")
        self.config = config
        self.sources = tuple(sources)

    def document(self, index: int) -> Document:
        """The document with this number, the same whenever and in whatever order it is asked for."""
        rng = Random(f"{self.config.seed}/{index}")
        source, entry = self._entry(index)
        shares = self.config.shares_at(index)
        form = rng.choices(list(shares), weights=list(shares.values()))[0]
        worked, response = FORM_WRITERS[form](source.dataset, entry, rng, self.config)
        return Document(
            dataset=source.dataset,
            form=form,
            question=entry["question"],
            response=response,
            answer=worked.answer,
            num_kept_slips=sum(step.slip == "kept" for step in worked.steps),
        )

    def _entry(self, index: int) -> tuple[Source, Entry]:
        source = self.sources[index % len(self.sources)]
        return source, source.entry(index // len(self.sources))


def _write_direct(dataset: str, entry: Entry, rng: Random, config: CorpusConfig) -> tuple[Worked, str]:
    gold = str(entry["answer"])
    answer = rng.choice(wrong_answers(gold)) if rng.random() < config.noisy_answer_share else gold
    return Worked(steps=(), answer=answer), f"<answer>{answer}</answer>"


def _write_reasoned(dataset: str, entry: Entry, rng: Random, config: CorpusConfig) -> tuple[Worked, str]:
    worked = _with_kept_slips(dataset, entry, rng, config)
    return worked, _reasoned_response(worked)


def _write_self_correcting(dataset: str, entry: Entry, rng: Random, config: CorpusConfig) -> tuple[Worked, str]:
    num_steps = len(solve(dataset, entry, rng).steps)
    slips: dict[int, Slip] = {rng.randrange(num_steps): "corrected"} if num_steps else {}
    worked = solve(dataset, entry, rng, slips)
    return worked, _reasoned_response(worked)


def _write_malformed(dataset: str, entry: Entry, rng: Random, config: CorpusConfig) -> tuple[Worked, str]:
    if rng.random() < 0.5:
        worked, response = _write_direct(dataset, entry, rng, config)
        return worked, rng.choice((worked.answer, response.removesuffix("</answer>")))
    worked, response = _write_reasoned(dataset, entry, rng, config)
    missing = rng.choice(("<think>", "</think> ", "<answer>", "</answer>"))
    return worked, response.replace(missing, "", 1)


def _with_kept_slips(dataset: str, entry: Entry, rng: Random, config: CorpusConfig) -> Worked:
    num_steps = len(solve(dataset, entry, rng).steps)
    slips: dict[int, Slip] = {step: "kept" for step in range(num_steps) if rng.random() < config.wrong_step_share}
    return solve(dataset, entry, rng, slips)


def _reasoned_response(worked: Worked) -> str:
    return f"<think>{worked.text}</think> <answer>{worked.answer}</answer>"


FORM_WRITERS: dict[Form, Callable[[str, Entry, Random, CorpusConfig], tuple[Worked, str]]] = {
    "direct": _write_direct,
    "reasoned": _write_reasoned,
    "self_correcting": _write_self_correcting,
    "malformed": _write_malformed,
}
