"""The command line: each verb does its work on a tiny policy, and a mistake is one message."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rorqual.cli import evaluation, tables
from rorqual.cli import main as command_line
from rorqual.cli.doctor import EXTRAS, examine
from rorqual.cli.main import main
from rorqual.cli.manual import manual_page
from rorqual.cli.policies import Policy, load_policy
from rorqual.cli.speakers import Speaker
from rorqual.envs.dialogue import DialogueConfig, ReasoningGymConfig, ReasoningGymTasks, canonical_question
from rorqual.evals.benchmarks import BENCHMARKS, Benchmark, load_tasks
from rorqual.models.checkpoints import load_checkpoint, save_checkpoint
from rorqual.models.config import ModelConfig
from rorqual.models.decoder import Decoder
from rorqual.recipes.grpo import GrpoConfig
from rorqual.recipes.pretrain import PretrainConfig
from rorqual.recipes.problems import RL_FIRST_INDEX
from rorqual.recipes.r1_zero import R1ZeroConfig, problems
from rorqual.records import Record, SamplingParams
from rorqual.store.run import Run
from rorqual.text.tokenizer import Tokenizer, train_tokenizer
from rorqual.train.checkpoint import save_training_state
from rorqual.train.optim import OptimizerConfig, build_optimizer

MODEL = ModelConfig(
    family="qwen3",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_window=128,
    qk_norm=True,
)

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "max_digits": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    model = Decoder(MODEL)
    model.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(model, folder)
    train_tokenizer(["4 + 3 = 7, wait <think>"] * 9, 300).save(folder)
    return folder


def test_eval_keeps_every_sample_and_goes_on(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = ["--problems", "4", "--samples", "3", "--max-new-tokens", "8"]
    verb = [
        "eval",
        str(checkpoint),
        "--benchmark",
        "chain_sum",
        "--protocol",
        "r1",
        *numbers,
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(verb) == 0
    shown = capsys.readouterr().out
    assert "chain_sum-r1" in shown
    assert "12 of 12" in shown
    rows = Run.read(tmp_path / "out").read_eval("chain_sum-r1")
    assert len(rows) == 12
    assert {row.trajectory.evidence.num_sampled_tokens <= 8 for row in rows} == {True}
    assert main(verb) == 0
    assert Run.read(tmp_path / "out").read_eval("chain_sum-r1") == rows


def test_chat_answers_one_question_and_a_conversation(checkpoint, monkeypatch, capsys) -> None:
    once = ["chat", str(checkpoint), "-q", "4 + 3 =", "--max-new-tokens", "6"]
    assert main(once) == 0
    first = capsys.readouterr().out
    assert main(once) == 0
    assert capsys.readouterr().out == first
    questions = iter(["4 + 3 =", "and 2 more?", ""])
    monkeypatch.setattr(command_line.console, "input", lambda prompt: next(questions))
    assert main(["chat", str(checkpoint), "--max-new-tokens", "6"]) == 0
    assert first.strip() in capsys.readouterr().out
    assert main(["chat", str(checkpoint), "-q", "4 + 3 = " * 100]) == 2
    assert "fills the window of 128 tokens" in capsys.readouterr().err


def test_convert_writes_what_transformers_loads(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(model.config.eos_token_id).startswith("<｜end")


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of r1_zero with a checkpoint of each stage, whose weights differ."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = R1ZeroConfig(
        tasks=(ReasoningGymConfig(name="gcd"),),
        model=MODEL,
        pretrain=PretrainConfig(num_steps=2, documents_per_step=4),
        grpo=GrpoConfig(num_steps=2, tasks_per_step=4, sampling=SamplingParams(max_new_tokens=64)),
    )
    with Run.open(folder, config, {"run": 0}, recipe="r1_zero") as run:
        Tokenizer.load(checkpoint).save(folder / "tokenizer")
        for seed, stage in enumerate(("pretrain", "rl", "control")):
            model = Decoder(MODEL)
            model.initialize(torch.Generator().manual_seed(seed))
            optimizer = build_optimizer(model, OptimizerConfig())
            run.append_metrics(stage, 3, {})
            run.write_checkpoint(stage, 3, lambda path, m=model, o=optimizer: save_training_state(path, m, o, {}))
    return folder


@pytest.mark.parametrize(("options", "seed"), [([], 1), (["--stage", "pretrain"], 0), (["--stage", "control"], 2)])
def test_policy_of_a_run_is_that_of_its_stage(trained: Path, tmp_path: Path, options: list[str], seed: int) -> None:
    assert main(["convert", str(trained), str(tmp_path / "out"), *options]) == 0
    expected = Decoder(MODEL)
    expected.initialize(torch.Generator().manual_seed(seed))
    found = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_chat_and_eval_with_a_run(trained: Path, tmp_path: Path, capsys) -> None:
    assert main(["chat", str(trained), "-q", "4 + 3 =", "--max-new-tokens", "4"]) == 0
    assert main(["chat", str(trained), "--stage", "sft", "-q", "x"]) == 2
    assert "no checkpoint of stage 'sft'; it has: pretrain, rl, control" in capsys.readouterr().err
    numbers = ["--problems", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    assert main(["eval", str(trained), "--benchmark", "gcd", *numbers]) == 0
    assert Run.read(tmp_path / "out").eval_summaries()["gcd-greedy"]["label"] == "demo/rl@3"


DIALOGUE = DialogueConfig(system="Be brief.", suffix=" Think.")


@pytest.fixture(scope="module")
def stored_in_bfloat16(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Decoder]:
    """A run in float32 that began from a checkpoint in bfloat16 and has its own dialogue; and its policy."""
    folder = tmp_path_factory.mktemp("bfloat16")
    save_checkpoint(load_checkpoint(checkpoint), folder / "base", dtype=torch.bfloat16)
    policy = load_checkpoint(folder / "base", torch.float32)
    policy.initialize(torch.Generator().manual_seed(7))
    config = R1ZeroConfig(
        tasks=(ReasoningGymConfig(name="chain_sum", options=ONE_DIGIT),),
        checkpoint=str(folder / "base"),
        dialogue=DIALOGUE,
        grpo=GrpoConfig(num_steps=2, tasks_per_step=20),
    )
    with Run.open(folder / "run", config, {"run": 0}, recipe="r1_zero") as run:
        Tokenizer.load(checkpoint).save(folder / "run" / "tokenizer")
        optimizer = build_optimizer(policy, OptimizerConfig())
        run.append_metrics("rl", 2, {})
        run.write_checkpoint("rl", 2, lambda path: save_training_state(path, policy, optimizer, {}))
    return folder / "run", policy


def test_a_run_in_another_type_than_its_checkpoint(stored_in_bfloat16, tmp_path: Path) -> None:
    run, policy = stored_in_bfloat16
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    found = load_checkpoint(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), policy.parameters(), strict=True))
    assert main(["chat", str(run), "-q", "4 + 3 =", "--max-new-tokens", "4"]) == 0


def prompts_of(policy: Policy, *questions: str) -> list[str]:
    """The texts that a conversation gives to the engine."""
    speaker = Speaker(policy, 1.0, 1.0, 3, 0)
    asked = []
    submit = speaker._engine.submit
    speaker._engine.submit = lambda requests: asked.extend(requests) or submit(requests)
    for question in questions:
        speaker.answer(question)
    return [speaker._encoding.tokenizer.decode(request.prompt_ids) for request in asked]


def test_eval_and_chat_ask_as_the_run_did(stored_in_bfloat16) -> None:
    policy = load_policy(stored_in_bfloat16[0], None, False, "cpu")
    single = prompts_of(policy, "4 + 3 =", "and 2 more?")
    assert "Be brief.<｜User｜>4 + 3 = Think.<｜Assistant｜>" in single[0]
    assert single[1] == single[0].replace("4 + 3 =", "and 2 more?"), "a run of one turn starts anew"
    texts = prompts_of(dataclasses.replace(policy, single_turn=False), "4 + 3 =", "and 2 more?")
    assert texts[0] == single[0]
    assert texts[1].startswith(texts[0])
    assert texts[1].endswith("<｜User｜>and 2 more? Think.<｜Assistant｜>" + texts[0].partition("<｜Assistant｜>")[2])
    assert texts[1].count("Be brief.") == 1


def test_chat_says_that_turns_are_single_and_a_full_window_ends_a_turn_alone(
    trained: Path, checkpoint: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    questions = iter(["4 + 3 =", "4 + 3 = " * 100, "4 + 3 =", ""])
    monkeypatch.setattr(command_line.console, "input", lambda prompt: next(questions))
    assert main(["chat", str(checkpoint), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "each starts anew" not in said
    assert "fills the window of 128 tokens" in said
    assert "The next question starts anew" in said
    assert next(questions, "all were asked") == "all were asked"
    questions = iter([""])
    monkeypatch.setattr(command_line.console, "input", lambda prompt: next(questions))
    assert main(["chat", str(trained)]) == 0
    assert "each starts anew" in " ".join(capsys.readouterr().out.split())
    speaker = Speaker(load_policy(checkpoint, None, False, "cpu"), 0.0, 1.0, 4, 0)
    fresh = speaker.answer("4 + 3 =")
    with pytest.raises(ValueError, match="fills the window of 128 tokens"):
        speaker.answer("4 + 3 = " * 100)
    assert speaker.answer("4 + 3 =") == fresh


def test_template_is_for_checkpoints_alone(trained: Path, capsys) -> None:
    assert main(["chat", str(trained), "--template", "-q", "x"]) == 2
    assert "is a run, which knows how it asks" in capsys.readouterr().err


def test_convert_writes_over_its_own_exports_alone(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), str(out)]) == 0
    assert main(["convert", str(checkpoint), str(out), "--dtype", "bfloat16"]) == 0
    assert load_checkpoint(out, None).embed_tokens.weight.dtype == torch.bfloat16
    shutil.copytree(checkpoint, tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert main(["convert", str(checkpoint), str(tmp_path / "other")]) == 2
    assert "has files in it that no export wrote" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_a_run_without_a_checkpoint_or_a_recipe(tmp_path: Path, capsys) -> None:
    config = R1ZeroConfig(tasks=(ReasoningGymConfig(name="gcd"),), checkpoint="base")
    Run.open(tmp_path / "new", config, {}, recipe="r1_zero").close()
    assert main(["chat", str(tmp_path / "new")]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    Run.open(tmp_path / "bare", config, {}).close()
    assert main(["chat", str(tmp_path / "bare")]) == 2
    assert "was made without a recipe" in capsys.readouterr().err
    Run.open(tmp_path / "eval", config, {}, recipe="eval").close()
    assert main(["chat", str(tmp_path / "eval")]) == 2
    assert "was made by the recipe 'eval', which is not here" in capsys.readouterr().err


def test_eval_of_a_run_meets_its_own_held_out_problems(stored_in_bfloat16, tmp_path: Path) -> None:
    run, _ = stored_in_bfloat16
    verb = ["eval", str(run), "--problems", "9", "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    assert main(verb) == 0
    config = msgspec.convert(Run.read(run).config, R1ZeroConfig)
    rows = Run.read(tmp_path / "out").read_eval("own-greedy")
    assert [row.trajectory.task_id for row in rows] == [task.task_id for task in problems(config).held_out(9)]
    assert {tuple(row.score.parts) for row in rows} == {tuple(reward.name for reward in config.rewards)}


def test_options_of_a_data_set_replace_those_of_the_benchmark(checkpoint: Path, tmp_path: Path) -> None:
    numbers = ["--problems", "3", "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    options = ["--benchmark", "chain_sum_small", "--options", "{max_terms = 2, max_digits = 1}"]
    assert main(["eval", str(checkpoint), *options, *numbers]) == 0
    asked = [str(row.trajectory.messages) for row in Run.read(tmp_path / "out").read_eval("chain_sum_small-greedy")]
    assert all(re.search(r"problem: \d [+-] \d =", text) for text in asked)


def command_line_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script's way in: the working directory is not on the path before the program begins."""
    code = "import sys; from rorqual.cli.main import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_reward_of_the_working_directory(stored_in_bfloat16, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def seven(task, evidence):\n    return 0.75\n")
    shutil.copytree(stored_in_bfloat16[0], tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["config"]["rewards"].append({"name": "my_rewards:seven", "weight": 1.0})
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    answer = command_line_in(tmp_path, "eval", "run", "--problems", "1", "--max-new-tokens", "2", "--out", "out")
    assert answer.returncode == 0, answer.stderr
    (row,) = Run.read(tmp_path / "out").read_eval("own-greedy")
    assert row.score.parts["my_rewards:seven"] == 0.75
    (tmp_path / "r.toml").write_text(
        'recipe = "r1_zero"\ncheckpoint = "absent"\ntasks = [{name = "gcd"}]\n'
        'rewards = [{name = "accuracy"}, {name = "my_rewards:seven"}, {name = "my_rewards:eight"}]\n'
    )
    answer = command_line_in(tmp_path, "run", "r.toml")
    assert answer.returncode == 2
    assert "module 'my_rewards' has no attribute 'eight'" in answer.stderr


def test_names_of_evaluations_are_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    names = ["base-sampled", "control-sampled", "basic_arithmetic-greedy"]
    interval = {"low": 0.875, "high": 0.9625}
    summary = {"mean": 0.9, "over_problems": interval, "fixed_set": interval, "parse_failure_rate": 1.0}
    summary |= {"truncation_rate": 1.0, "mean_tokens": 1231.5, "samples_obtained": 1600, "samples_requested": 1600}
    with Run.open(tmp_path / "run", Toy(), {}) as run:
        for name in names:
            run.finish_eval(name, [], summary)
        console = Console(file=io.StringIO(), width=80)
        tables.show_evaluations(console, run)
    lines = console.file.getvalue().splitlines()
    assert all(any(line.startswith(name + " ") for line in lines) for name in names)
    assert max(map(len, lines)) <= 80
    assert console.file.getvalue().count("87.5–96.2%") == 6
    assert console.file.getvalue().count("1600 of") == 3
    wide = Console(file=io.StringIO(), width=140)
    tables.show_evaluations(wide, Run.read(tmp_path / "run"))
    assert wide.file.getvalue().count("1231.5") == 3


def test_eval_leaves_out_what_the_run_trained_on(stored_in_bfloat16, tmp_path: Path, monkeypatch, capsys) -> None:
    run, _ = stored_in_bfloat16
    bench = Benchmark(dataset="chain_sum", options=ONE_DIGIT, num_problems=30)
    monkeypatch.setitem(BENCHMARKS, "sums", bench)
    source = ReasoningGymTasks("chain_sum", ONE_DIGIT)
    trained = {canonical_question(source.task("train", RL_FIRST_INDEX + index)) for index in range(40)}
    assert trained & {canonical_question(task) for task in load_tasks(bench)}, "else this test shows nothing"
    verb = ["eval", str(run), "--benchmark", "sums", "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    assert main(verb) == 0
    rows = Run.read(tmp_path / "out").read_eval("sums-greedy")
    played = {row.trajectory.task_id for row in rows}
    asked = [canonical_question(task) for task in islice(source.tasks("test"), 400) if task.task_id in played]
    assert len(asked) == 30
    assert trained.isdisjoint(asked)
    tokenizer = Tokenizer.load(run / "tokenizer")
    ids = rows[0].trajectory.segments[0].token_ids
    assert "Be brief.<｜User｜>State the final" in tokenizer.decode(ids)
    assert " = Think.<｜Assistant｜>" in tokenizer.decode(ids)


def test_eval_of_other_weights_in_the_same_place_is_refused(checkpoint: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(checkpoint, tmp_path / "policy")
    numbers = ["--benchmark", "gcd", "--problems", "2", "--max-new-tokens", "2", "--out", str(tmp_path / "out")]
    assert main(["eval", str(tmp_path / "policy"), *numbers]) == 0
    other = load_checkpoint(tmp_path / "policy")
    with torch.no_grad():
        other.embed_tokens.weight[5, 3] += 0.01
    save_checkpoint(other, tmp_path / "policy")
    assert main(["eval", str(tmp_path / "policy"), *numbers]) == 2
    assert "weights_sha256" in capsys.readouterr().err


def test_slots_bound_the_sequences_in_the_cache(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    made = []
    engine = evaluation.LocalEngine
    monkeypatch.setattr(evaluation, "LocalEngine", lambda model, config: made.append(config) or engine(model, config))
    numbers = ["--benchmark", "gcd", "--problems", "5", "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    verb = ["eval", str(checkpoint), *numbers]
    assert main([*verb, "--slots", "2"]) == 0
    assert made[0].num_slots == 2
    assert "5 of 5" in capsys.readouterr().out
    assert main([*verb, "--slots", "3"]) == 0, "an evaluation may go on with other slots"
    assert main([*verb, "--slots", "0"]) == 2
    assert "--slots 0" in capsys.readouterr().err


class Toy(Record):
    steps: int = 3
    rate: float = 0.5


def toy_recipe(config: Toy, run: Run, progress) -> None:
    run.rewind("toy", 0)
    with progress.bar("toy", config.steps) as bar:
        for step in range(config.steps):
            run.append_metrics("toy", step + 1, {"loss": config.rate})
            bar.advance(step + 1, {"loss": config.rate})
    progress.say("done [here]")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    recipe = SimpleNamespace(Config=Toy, check=lambda config: None, seeds=lambda config: {"run": 1}, main=toy_recipe)
    monkeypatch.setitem(command_line.RECIPES, "toy", recipe)
    path = tmp_path / "toy.toml"
    path.write_text('recipe = "toy"\nsteps = 2\n')
    return path


def test_run_resumes_and_reports(toy: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    verb = ["run", str(toy), "--set", "rate=0.25", "--out", str(out)]
    assert main(verb) == 0
    assert Run.read(out).metrics() == [{"stage": "toy", "step": step, "loss": 0.25} for step in (1, 2)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["recipe"], manifest["config"]) == ("toy", {"steps": 2, "rate": 0.25})
    assert "Going on" not in capsys.readouterr().out
    assert main(verb) == 0
    assert "Going on" in capsys.readouterr().out
    assert main([*verb, "--set", "rate=1"]) == 2
    assert "rate: 0.25 then, 1.0 now" in capsys.readouterr().err
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()


def test_default_place_of_a_run(toy: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(toy)]) == 0
    assert (tmp_path / "runs" / "toy-toy" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (["run", "{toy}", "--set", "stpes=3"], 'did you mean "steps"'),
        (["run", "{toy}.absent"], "no such file"),
        (["report", "/nowhere/at/all"], "has no manifest.json"),
        (["eval", "{policy}", "--protocol", "greddy"], "did you mean 'greedy'"),
        (["eval", "{policy}", "--benchmark", "chian_sum"], "no data set 'chian_sum'; nearest: chain_sum"),
        (["eval", "{policy}", "--samples", "0"], "--samples 0 is out of range"),
        (["eval", "/nowhere", "--problems", "0"], "--problems 0 is out of range; it must be 1 or more"),
        (["eval", "/nowhere", "--problems", "-1"], "--problems -1 is out of range"),
        (["eval", "/nowhere", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["eval", "{policy}"], "no problems of its own; name some with --benchmark: chain_sum"),
        (["eval", "{policy}", "--options", "{{max_terms=3}}"], "name it with --benchmark"),
        (["eval", "{policy}", "--benchmark", "gcd", "--options", "3"], "--options '3' is not a TOML table"),
        (["eval", "{policy}", "--benchmark", "gcd", "--options", "{{"], "--options '{{' is not a TOML table"),
        (["eval", "{policy}", "--benchmark", "gcd", "--options", "{{legs=3}}"], "'gcd' has no options legs"),
        (["eval", "{policy}", "--benchmark", "gcd", "--device", "foo"], "--device foo cannot be used here"),
        (["chat", "/nowhere", "--temperature", "-1"], "--temperature -1 is out of range"),
        (["chat", "/nowhere", "--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["chat", "/nowhere", "-q", " "], "--question is empty"),
        (["chat", "{policy}", "-q", "x", "--device", "foo"], "--device foo cannot be used here"),
        (["chat", "{policy}", "-q", "x", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["chat", "/nowhere"], "neither a run"),
        (["chat", "{policy}", "--stage", "rl"], "has no stages"),
        (
            ["chat", "/nowhere", "--top-p", "2", "-q", "x"],
            "--top-p 2 is out of range; it must be above 0 and at most 1",
        ),
        (["convert", "{policy}", "{policy}"], "is the policy's own place"),
        (["convert", "{policy}", "{policy}/inside"], "is the policy's own place, or lies in it"),
        (["convert", "{policy}", "{policy}/config.json"], "lies in it"),
        (["convert", "{policy}", "{toy}"], "is a file"),
        (["convert", "{policy}", "/tmp/x", "--dtype", "int3"], "choose one of float32"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(verb, words, toy, checkpoint, capsys) -> None:
    assert main([part.format(toy=toy, policy=checkpoint) for part in verb]) == 2
    said = capsys.readouterr()
    assert words.replace("{{", "{") in said.err
    assert said.err.startswith("Error: ")
    assert "Traceback" not in said.err


def test_unknown_recipe_and_the_traceback_on_demand(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.toml"
    path.write_text('recipe = "r1_zreo"')
    assert main(["run", str(path)]) == 2
    assert "did you mean 'r1_zero'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="r1_zreo"):
        main(["run", str(path), "--debug"])


def test_interrupt_says_how_to_go_on(toy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(config, run, progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.RECIPES["toy"], "main", interrupted)
    assert main(["run", str(toy), "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err
    assert "no checkpoint yet: the same command starts anew" in said
    assert said.endswith("Stopped.\n")

    def interrupted_later(config, run, progress) -> None:
        for stage, steps in (("pretrain", 7), ("rl", 12), ("rl-eval", 0)):
            run.append_metrics(stage, steps, {})
            for step in range(5, steps, 5):
                run.write_checkpoint(stage, step, lambda path: (path / "weights").write_text("x"))
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line.RECIPES["toy"], "main", interrupted_later)
    assert main(["run", str(toy), "--out", str(tmp_path / "run")]) == 130
    assert "The same command goes on from the last checkpoint: rl, step 10." in capsys.readouterr().err


def test_doctor_finds_what_is_missing_and_says_what_to_do(tmp_path: Path, monkeypatch, capsys) -> None:
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    assert "can be written" in capsys.readouterr().out
    monkeypatch.setitem(EXTRAS, "report", ("no-such-package",))
    monkeypatch.setattr("rorqual.cli.doctor.MIN_FREE_BYTES", 10**18)
    found = {finding.what: finding for finding in examine(tmp_path / "not" / "yet")}
    assert found["no-such-package"].advice == 'pip install "rorqual[report]"'
    assert found["no-such-package"].state == "missing"
    assert found["disk"].state == "bad"
    assert found["run directory"].state == "good"
    assert main(["doctor", "--out", str(tmp_path)]) == 1


def test_too_many_threads_are_found(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    (threads,) = [finding for finding in examine(tmp_path) if finding.what == "threads"]
    assert threads.state == "bad"
    assert "OMP_NUM_THREADS" in threads.advice


def test_every_verb_has_help_with_an_example() -> None:
    group = typer.main.get_command(command_line.app)
    verbs = {name: command for name, command in group.commands.items() if not command.hidden}
    assert verbs.keys() == {"run", "sparsify", "eval", "chat", "serve", "convert", "report", "doctor"}
    for name, command in verbs.items():
        assert f"rorqual {name}" in command.help
        assert all(parameter.help for parameter in command.params)
    page = manual_page(group)
    assert "| `--set` | One setting, as section.key=value; repeatable. |" in page


def test_module_can_be_run() -> None:
    answer = subprocess.run([sys.executable, "-m", "rorqual.cli", "--help"], capture_output=True, text=True, check=True)
    assert "doctor" in answer.stdout


def test_sparsify_and_convert_make_a_sparse_checkpoint(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """The verb's own arguments, settings on top, another call that goes on, and the export."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(10):
        (text / f"{number}.txt").write_text(f"{number} + {number} = {2 * number}. " * 20)
    stage = "num_steps=1, sequences_per_step=2, token_budget=64, optimizer={learning_rate=1e-3}"
    settings = ["sequence_length=24", "dsa={top_k=4, num_heads=2, head_dim=8, rope_dim=4}", "text.held_out_share=0.3"]
    settings += [f"warmup={{{stage}}}", f"sparse={{{stage}}}"]
    command = ["sparsify", str(checkpoint), "--text", str(text), "--out", str(tmp_path / "run")]
    command += [part for setting in settings for part in ("--set", setting)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "of the attention found" in shown
    assert main(command) == 0
    assert "Going on with" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "sparse")]) == 0
    model = load_checkpoint(tmp_path / "sparse")
    assert model.config.attention == "dsa" and model.config.dsa is not None and model.config.dsa.top_k == 4
    assert main(["sparsify", str(tmp_path / "absent"), "--text", str(text)]) == 2
    assert "absent/config.json does not exist" in capsys.readouterr().err.replace("\n", "")
