"""Which problems a run trains on, and which it holds out: fixed by the config, so that any stage can ask.

The corpus takes the first entries of the train split, RL takes those from `RL_FIRST_INDEX` on, and evaluation takes
problems of the test split that neither of them shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.envs.dialogue import ReasoningGymTasks, canonical_question, take_held_out
from rorqual.records import Task

RL_FIRST_INDEX = 2**29
"""Index, in the train split, of the first task of RL."""


@dataclass(frozen=True)
class Problems:
    """The data sets of a run. num_documents: how many the base is pre-trained on, 0 for a base that is read.

    num_rl_tasks: how many tasks RL shows.
    """

    sources: Sequence[ReasoningGymTasks]
    num_documents: int
    num_rl_tasks: int

    def corpus_task(self, index: int) -> Task:
        """The task whose solution is document `index` of the corpus, in the order of `synth.worked.Corpus`."""
        number, source = divmod(index, len(self.sources))
        return self.sources[source].task("train", number)

    def rl_task(self, index: int) -> Task:
        """Training task `index`; the data sets take turns."""
        number, source = divmod(index, len(self.sources))
        return self.sources[source].task("train", RL_FIRST_INDEX + number)

    def trained_questions(self) -> set[str]:
        """Every question that pre-training or RL shows, in the form that `held_out` compares."""
        questions = {canonical_question(self.rl_task(index)) for index in range(self.num_rl_tasks)}
        return questions | {canonical_question(self.corpus_task(index)) for index in range(self.num_documents)}

    def held_out(self, num_problems: int) -> list[Task]:
        """`num_problems` of each data set that no training shows.

        Raises: ValueError naming the data set that has not so many.
        """
        trained = self.trained_questions()
        return [task for source in self.sources for task in take_held_out(source.tasks("test"), trained, num_problems)]
