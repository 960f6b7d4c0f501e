"""`phalanx generate`: complete prompts and stream the text as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from phalanx.launcher.llm import LLM
    from phalanx.launcher.served import Prompt


def generate(
    config: Annotated[Path, typer.Argument(help="YAML file.", metavar="CONFIG")],
    prompt: Annotated[
        list[str] | None, typer.Option("-p", "--prompt", help="Prompt; `-` reads standard input. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE.jsonl",
            help='One prompt a line: {"prompt": "text"} or {"prompt_token_ids": [..]}, each with sampling parameters '
            "of its own where wanted.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most new tokens.")] = 128,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Completions of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens that reach this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this fraction as likely as the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the random draws.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the text. Repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of the text.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are messages in the model's chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt, in order, then one with a summary.")
    ] = False,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE.json",
            dir_okay=False,
            help="Write every step and transfer of all ranks on one clock, for ui.perfetto.dev.",
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            dir_okay=False,
            help="Draw when each rank worked on which step and what it waited for.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: parallel.tensor=3. Repeatable."),
    ] = None,
) -> None:
    """Complete prompts with the model of CONFIG; the text goes to standard output as it comes, all else to standard
    error.
    """
    from phalanx.engine.sampling_params import SamplingParams
    from phalanx.launcher.bench.report import model_name
    from phalanx.launcher.commands.bench import check_outputs, plotter
    from phalanx.launcher.config import load_config
    from phalanx.launcher.generate_output import await_reports, print_as_json, print_as_text
    from phalanx.launcher.llm import LLM
    from phalanx.launcher.progress import StartProgress
    from phalanx.launcher.prompts import PromptLine, read_prompts
    from phalanx.launcher.trace_file import write_trace

    defaults = SamplingParams(
        max_tokens=max_tokens,
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    # What is wrong with the prompts' form is found before anything is started.
    lines = [PromptLine(_text(text), defaults) for text in prompt or ()]
    if prompts is not None:
        lines += read_prompts(prompts, defaults)
    if not lines:
        raise typer.BadParameter("give at least one prompt with -p TEXT or --prompts FILE.jsonl")
    check_outputs(trace_file, plot_file)
    plot_runs = None if plot_file is None else plotter("phalanx.launcher.trace_plot", "plot_runs")
    settings = load_config(config, overrides or ())
    with StartProgress() as progress:
        llm = LLM.from_config(settings, on_progress=progress.update, trace=bool(trace_file or plot_file))
    with llm:
        progress.show_startup(llm.startup, llm.plan)
        inputs = [_chat(llm, line.prompt) if chat else line.prompt for line in lines]
        show = print_as_json if as_json else print_as_text
        show(llm, inputs, [line.params for line in lines])
        if trace_file is not None or plot_file is not None:
            if not await_reports(llm):
                typer.echo("not all ranks have told of their last steps, which are not in the trace", err=True)
            run = llm.traced()
            if trace_file is not None:
                write_trace(run, trace_file)
            if plot_runs is not None and plot_file is not None:
                plot_runs(f"{model_name(settings)}, {llm.plan.layout}", [("generate", run)], plot_file)


def _text(prompt: str) -> str:
    return typer.get_text_stream("stdin").read() if prompt == "-" else prompt


def _chat(llm: LLM, prompt: Prompt) -> Prompt:
    return llm.chat_prompt([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
