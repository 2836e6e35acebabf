"""The command line: `rorqual VERB`. Each verb reads its arguments, calls one function, and shows the result.

A ValueError is for the person at the keyboard: it becomes one message and exit code 2. `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from rorqual.cli import chat as chatting
from rorqual.cli import serving, tables
from rorqual.cli.doctor import examine
from rorqual.cli.evaluation import EvalCommand, run_evaluation
from rorqual.cli.export import export_policy
from rorqual.cli.manual import manual_page
from rorqual.cli.options import parse_table
from rorqual.cli.policies import load_policy
from rorqual.cli.progress import RichProgress
from rorqual.cli.speakers import EndpointSpeaker, Speaker, Talker
from rorqual.config import load_config, read_recipe_name
from rorqual.engines.http import EndpointConfig
from rorqual.recipes.catalog import RECIPES
from rorqual.records import SamplingParams
from rorqual.store.run import Run
from rorqual.viewer.report import write_report

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="rorqual",
    help="Turn a pretrained language model into one that reasons: published recipes, one command each.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Place = Annotated[Path, typer.Argument(help="A run directory, or a checkpoint in Hugging Face's layout.")]
Stage = Annotated[str | None, typer.Option(help="Which stage of a run; by default the last one that was trained.")]
Template = Annotated[
    bool, typer.Option("--template", help="Ask by a plain-text template: for a base model without chat tokens.")
]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]


@app.callback()
def top(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Turn a pretrained language model into one that reasons: published recipes, one command each."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file; its key `recipe` names the recipe.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, as section.key=value; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; by default runs/RECIPE-FILE.")] = None,
) -> None:
    """Run a recipe. Interrupted at any moment, the same command goes on from the last checkpoint.

    A reward of your own, `name = "my_module:my_function"`, is looked for in the working directory too.

    Examples:

        rorqual run configs/r1_zero/tiny.toml

        rorqual run configs/r1_zero/tiny.toml --set seed=1 --set grpo.num_steps=20 --out runs/short

        rorqual run configs/r1_zero/tiny.toml --set 'tasks=[{name="leg_counting", options={max_animals=3}}]' --out runs/legs
    """  # noqa: E501
    _see_working_directory()
    name = read_recipe_name(config)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(RECIPES)}."
        raise ValueError(f"{config}: there is no recipe {name!r}{hint}")
    _run_recipe(name, config, settings or (), out or Path("runs") / f"{name}-{config.stem}")


@app.command()
def sparsify(
    checkpoint: Annotated[Path, typer.Argument(help="A dense checkpoint in Hugging Face's layout.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Files or directories of text; repeatable. By default Python's own library."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; by default DeepSeek's numbers.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, as section.key=value; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; by default runs/sparsify-CHECKPOINT.")] = None,
) -> None:
    """Give a dense model sparse attention (DSA): warm up its indexers, then train it sparse.

    Interrupted at any moment, the same command goes on from the last checkpoint. Write the result with `convert`.

    Examples:

        rorqual sparsify checkpoints/Qwen3-0.6B --text corpus/ --set device=cuda --set sequence_length=8192 --set dsa.top_k=512

        rorqual convert runs/sparsify-Qwen3-0.6B checkpoints/Qwen3-0.6B-sparse
    """  # noqa: E501
    given = [f"checkpoint={json.dumps(str(checkpoint))}"]
    if text:
        given.append(f"text.paths={json.dumps([str(path) for path in text])}")
    directory = out or Path("runs") / f"sparsify-{checkpoint.resolve().name}"
    _run_recipe("sparsify", config, [*given, *(settings or ())], directory)


def _run_recipe(name: str, config: Path | None, settings: Sequence[str], directory: Path) -> None:
    recipe = RECIPES[name]
    settings_of_run = load_config(config, recipe.Config, settings)
    recipe.check(settings_of_run)
    command = ["rorqual", *sys.argv[1:]]
    with Run.open(directory, settings_of_run, recipe.seeds(settings_of_run), command, recipe=name) as store:
        if len(store.manifest["sessions"]) > 1:
            console.print(f"Going on with {directory}.", highlight=False)
        try:
            recipe.main(settings_of_run, store, RichProgress(console))
        except KeyboardInterrupt:
            errors.print(_where_it_goes_on(store), highlight=False)
            raise
        tables.show_evaluations(console, store)
    console.print(f"Finished. See it with: rorqual report {directory}", highlight=False)


@app.command(name="eval")
def evaluate(
    policy: Place,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="A benchmark by name, or any reasoning-gym data set; by default a run's own held-out problems."
        ),
    ] = None,
    options: Annotated[
        str | None, typer.Option(help="Options of the data set as a TOML table; the others are the benchmark's.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="How to sample: greedy, r1 or v32.")] = "greedy",
    problems: Annotated[
        int | None,
        typer.Option(help="Number of problems, of each data set of a run; by default the benchmark's or the run's."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each problem; by default the protocol's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest response; by default the protocol's.")] = None,
    stage: Stage = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where every sample is kept; by default under runs/.")] = None,
    slots: Annotated[
        int, typer.Option(help="Sequences at a time; fewer need less memory, and the same command with fewer goes on.")
    ] = 64,
    template: Template = False,
    device: Device = "cpu",
) -> None:
    """Evaluate a policy on held-out problems; every sample is kept, and an interrupted evaluation goes on.

    A policy of a run is asked as in its training, and none of the problems it was trained on. Without a benchmark it
    meets held-out problems of its run, judged by the run's rewards; a reward of your own is looked for in the working
    directory too. What goes on draws the same tokens, with log-probs equal up to rounding.

    Examples:

        rorqual eval runs/demo --protocol greedy

        rorqual eval runs/demo --benchmark chain_sum --options '{min_terms=6, max_terms=6, max_digits=1}' --out runs/six

        rorqual eval ./Qwen3-0.6B --benchmark gcd --protocol r1 --problems 50 --max-new-tokens 4096 --device cuda
    """
    _see_working_directory()
    command = EvalCommand(
        policy=str(policy),
        benchmark=benchmark,
        options=parse_table("--options", options) if options is not None else {},
        protocol=protocol,
        problems=problems,
        samples=samples,
        max_new_tokens=max_new_tokens,
        stage=stage,
        seed=seed,
        template=template,
        device=device,
    )
    directory = run_evaluation(command, out, ["rorqual", *sys.argv[1:]], RichProgress(console), slots)
    tables.show_evaluations(console, Run.read(directory))
    console.print(f"Every sample is in {directory}/evals.", highlight=False)


@app.command()
def chat(
    policy: Annotated[
        Path | None, typer.Argument(help="A run directory, or a checkpoint in Hugging Face's layout.")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask this one question and stop.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    tool: Annotated[list[str] | None, typer.Option(help="A tool that may be called: calculator; repeatable.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on from messages that /save kept.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Talk to an OpenAI-compatible server instead.")] = None,
    model: Annotated[str | None, typer.Option(help="The name of the model on that server.")] = None,
    key_variable: Annotated[str, typer.Option(help="The environment variable that holds the server's key.")] = "",
    format: Annotated[str | None, typer.Option(help="Message format of a checkpoint, such as deepseek_v32.")] = None,
    stage: Stage = None,
    template: Template = False,
    device: Device = "cpu",
) -> None:
    """Talk to a policy; its thinking is shown dimmed. Commands: /think, /context, /tools, /save, /help, /quit.

    Examples:

        rorqual chat runs/demo

        rorqual chat runs/demo --stage pretrain -q "Calculate 3 + 4 - 1 - 8 - 7."

        rorqual chat --base-url http://127.0.0.1:8000/v1 --model deepseek --tool calculator
    """
    chatting.check_chat(question, temperature, top_p, max_new_tokens)
    chatting.check_place(policy, base_url, model, format)
    messages = chatting.load_messages(load) if load is not None else []
    speaker: Talker
    if base_url is not None:
        endpoint = EndpointConfig(base_url=base_url, model=model or "", key_variable=key_variable)
        params = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        speaker = EndpointSpeaker(endpoint, params, tool or ())
    else:
        loaded = chatting.in_format(load_policy(policy or "", stage, template, device), format)
        speaker = Speaker(loaded, temperature, top_p, max_new_tokens, seed, tool or ())
    if messages and speaker.single_turn:
        raise ValueError(f"{speaker.label} answers single questions, so it cannot go on from --load {load}.")
    speaker.messages += messages
    chatting.converse(console, speaker, question)


@app.command()
def serve(
    policy: Annotated[
        Path | None, typer.Argument(help="A run directory, or a checkpoint in Hugging Face's layout.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(help="Address of an OpenAI-compatible server to stand in front of, in place of POLICY."),
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable that holds that server's key.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; anything but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free port.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; other users of the machine can see this option.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key that clients must send.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default where it is from.")] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="Message format: chat, deepseek_v3, deepseek_r1 or deepseek_v32.")
    ] = None,
    retention: Annotated[
        str | None, typer.Option(help="Which past thinking stays: since_last_user, all or none.")
    ] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Whether the model thinks unless a request says so.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="What to leave out when the window fills: none, discard_all, discard_75 and so on."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer that counts an upstream's tokens for --context, with --format.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Window of an upstream's model, in tokens, for --context.")] = None,
    slots: Annotated[int, typer.Option(help="Answers at a time; each needs memory for its context.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; one more is refused with 429.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer to ask for; 0 is what the window leaves.")] = 0,
    stage: Stage = None,
    template: Template = False,
    device: Device = "cpu",
) -> None:
    """Serve a policy at an OpenAI-compatible address, or stand in front of another server and manage its context.

    Needs the extra `serve`. Listens on this machine alone unless told otherwise.

    Examples:

        rorqual serve runs/demo

        rorqual serve ./DeepSeek-V3.2 --format deepseek_v32 --thinking --device cuda --name deepseek

        rorqual serve --upstream http://127.0.0.1:30000 --retention since_last_user --port 8001

        rorqual serve --upstream https://api.example.com --upstream-key-env EXAMPLE_KEY --context discard_all --tokenizer ./DeepSeek-V3.2 --format deepseek_v32 --window 131072
    """  # noqa: E501
    command = serving.ServeCommand(
        policy=policy,
        upstream=upstream,
        upstream_key_env=upstream_key_env,
        host=host,
        port=port,
        api_key=api_key,
        api_key_file=api_key_file,
        name=name,
        form=form,
        retention=retention,
        thinking=thinking,
        context=context,
        tokenizer=tokenizer,
        window=window,
        slots=slots,
        max_waiting=max_waiting,
        max_new_tokens=max_new_tokens,
        stage=stage,
        template=template,
        device=device,
    )
    serving.serve(command, console)


@app.command()
def convert(
    policy: Place,
    out: Annotated[Path, typer.Argument(help="The directory to write, readable by transformers.")],
    stage: Stage = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a policy as a Hugging Face checkpoint, tokenizer included.

    Examples:

        rorqual convert runs/demo exported

        rorqual convert runs/demo exported-base --stage pretrain --dtype bfloat16
    """
    label = export_policy(policy, out, stage, dtype)
    console.print(f"Wrote {label} to {out}; load it with AutoModelForCausalLM.from_pretrained.", highlight=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write one self-contained HTML page about a run: results, curves, and rollouts token by token.

    Examples:

        rorqual report runs/demo
    """
    path = write_report(run)
    console.print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in any browser.", highlight=False)


@app.command()
def doctor(out: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path("runs")) -> None:
    """Say what is installed, what is missing, and what to do about it. Exit code 1 when something needed is amiss.

    Examples:

        rorqual doctor
    """
    findings = examine(out)
    tables.show_findings(console, findings)
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


@app.command(hidden=True)
def docs() -> None:
    """Print the manual page that `make docs` keeps in docs/cli.md."""
    sys.stdout.write(manual_page(typer.main.get_command(app)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        app(given, prog_name="rorqual")
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:
            goes_on = given[:1] == ["eval"]
            errors.print("[yellow]Stopped.[/yellow]" + (" The same command plays what is missing." if goes_on else ""))
        return int(stop.code or 0)
    except ValueError as error:
        if debug:
            raise
        errors.print(f"[bold red]Error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return EXIT_USAGE
    return 0


def _see_working_directory() -> None:
    """Let a reward's module be imported from where the command was typed, after every installed one."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _where_it_goes_on(store: Run) -> str:
    """Where the same command takes a run up again: the last step that any stage sealed."""
    for stage in reversed(store.stages()):
        steps = sorted(path.name for path in (store.path / "checkpoints" / stage).glob("step_*"))
        if steps:
            return f"The same command goes on from the last checkpoint: {stage}, step {int(steps[-1][5:])}."
    return "There is no checkpoint yet: the same command starts anew."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    errors.print(f"[yellow]Warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
