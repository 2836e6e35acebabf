"""The pre-training stage: a language model of worked solutions, from random weights, on the corpus of synth/worked.py.

In: a corpus, an encoding, a model. Out: the model's weights moved, and checkpoints that a killed run goes on from.
The data cursor is one integer: documents are made from their index.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

from rorqual.models.decoder import Decoder
from rorqual.recipes.progress import Progress
from rorqual.recipes.stage import StagePlan, run_stage
from rorqual.records import Message, Record
from rorqual.store.run import Run
from rorqual.synth.worked import Corpus, Document
from rorqual.text.encoding import Encoding
from rorqual.text.tokenizer import Tokenizer, train_tokenizer
from rorqual.train.data import PackedBatch, pack_documents
from rorqual.train.objectives import language_model_objective
from rorqual.train.optim import OptimizerConfig

STAGE = "pretrain"


class PretrainConfig(Record):
    """Length and pace of pre-training. prompt_weight: loss weight of the question's tokens, 1 for those of the
    answer. checkpoint_activations: train in less memory and more time, see `models.decoder.Decoder`."""

    num_steps: int = 1000
    documents_per_step: int = 64
    token_budget: int = 8192
    checkpoint_activations: bool = False
    prompt_weight: float = 0.1
    checkpoint_every_steps: int = 200
    optimizer: OptimizerConfig = OptimizerConfig()


class TokenizerConfig(Record):
    """path: a tokenizer.json, or a directory with one; empty trains one on the first `num_documents` of the corpus.

    split_words: see `text.tokenizer.train_tokenizer`.
    """

    path: str = ""
    num_documents: int = 4000
    split_words: bool = True


def prepare_tokenizer(config: TokenizerConfig, vocab_size: int, texts: Iterable[str], run: Run) -> Tokenizer:
    """The tokenizer of the run, else the one that the config names, else one trained on `texts` now; it is saved with
    the run.

    Raises: ValueError when it has more tokens than `vocab_size`, the model's rows.
    """
    directory = run.path / "tokenizer"
    if (directory / "tokenizer.json").exists():
        return Tokenizer.load(directory)
    if config.path:
        tokenizer = Tokenizer.load(config.path)
    else:
        tokenizer = train_tokenizer(texts, vocab_size, split_words=config.split_words)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size} embeddings; set "
            "model.vocab_size to at least that."
        )
    tokenizer.save(directory)
    return tokenizer


def corpus_texts(corpus: Corpus, num_documents: int) -> Iterator[str]:
    """The first documents of the corpus, to train a tokenizer on."""
    for index in range(num_documents):
        document = corpus.document(index)
        yield document.question + document.response


def encode_document(document: Document, encoding: Encoding, prompt_weight: float) -> tuple[array[int], array[float]]:
    """Ids and loss weights of one document as the conversation that RL will sample: question, then response."""
    messages = (Message(role="user", content=document.question), Message(role="assistant", content=document.response))
    rendered = encoding.render(messages)
    return rendered.token_ids, array("f", [1.0 if each else prompt_weight for each in rendered.sampled])


def run_pretrain(
    config: PretrainConfig, model: Decoder, corpus: Corpus, encoding: Encoding, run: Run, progress: Progress
) -> None:
    """Train `model` in place; resumes from the newest checkpoint of this run."""
    model.checkpoint_activations = config.checkpoint_activations

    def batches(step: int) -> list[PackedBatch]:
        documents = _documents(corpus, encoding, step, config)
        ids, weights = [ids for ids, _ in documents], [weights for _, weights in documents]
        return pack_documents(ids, config.token_budget, weights=weights, device=model.embed_tokens.weight.device)

    plan = StagePlan(
        STAGE, config.num_steps, config.checkpoint_every_steps, config.optimizer, batches, language_model_objective
    )
    run_stage(plan, model, run, progress)


def _documents(
    corpus: Corpus, encoding: Encoding, step: int, config: PretrainConfig
) -> Sequence[tuple[array[int], array[float]]]:
    first = step * config.documents_per_step
    indices = range(first, first + config.documents_per_step)
    return [encode_document(corpus.document(index), encoding, config.prompt_weight) for index in indices]
