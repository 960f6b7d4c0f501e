"""`phalanx bench kernels`: what each operator takes, beside its peers and what the device could do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phalanx.launcher.commands.bench import JsonFile, check_outputs, command_line, plotter


def bench_kernels(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", help="Whose shapes: smollm2-135m, 1b, 8b or qwen3-30b-a3b.")] = "1b",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; by default a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    only: Annotated[str, typer.Option("--only", help="Operators whose name begins so.")] = "",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="On a CPU; by default all cores.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Readings of each, of which the median counts.")] = 7,
    json_file: JsonFile = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", dir_okay=False, help="Draw the operators under the roofline."),
    ] = None,
) -> None:
    """Time of each operator in a model's shapes, its bytes and operations counted, and the share that it reaches of
    what the same run measures copying memory (on a CPU: reading it) and multiplying large matrices. Starts no ranks.
    """
    import json
    import platform

    import torch
    from rich.console import Console
    from rich.table import Table

    from phalanx.errors import PhalanxError
    from phalanx.kernels import triton_gpu
    from phalanx.kernels.ceilings import measure_ceilings
    from phalanx.launcher.bench.report import processor
    from phalanx.launcher.bench_kernels.cases import LOADS, MODELS, Maker
    from phalanx.launcher.bench_kernels.measure import read_case
    from phalanx.launcher.bench_kernels.optional_peers import told_of_missing
    from phalanx.launcher.machine import this_machine
    from phalanx.native import find_native, resize_pool

    check_outputs(json_file, plot_file)
    plot_roofline = None if plot_file is None else plotter("phalanx.launcher.bench_kernels.plot", "plot_roofline")
    if model not in MODELS:
        raise PhalanxError(f"--model {model} is unknown; choose one of {', '.join(MODELS)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise PhalanxError(f"--dtype {dtype} is unknown; choose bfloat16, float16 or float32")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise PhalanxError("--device cuda: PyTorch sees no GPU here; leave it out to measure the CPU")
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    num_threads = threads or this_machine().num_cores
    torch.set_num_threads(num_threads)
    resize_pool(num_threads)
    name = torch.cuda.get_device_name() if on_gpu else f"{processor()}, {num_threads} threads"
    built = f"{triton_gpu.find_triton().told}{told_of_missing()}" if on_gpu else find_native().told
    maker = Maker(MODELS[model], getattr(torch, dtype), place, only)
    console = Console(highlight=False)
    readings = []
    with torch.inference_mode():
        ceilings = measure_ceilings(place, maker.dtype)
        console.print(f"{name}; {built}")
        console.print(
            f"{'copies' if on_gpu else 'reads'} {ceilings.bytes_per_s / 1e9:.1f} GB/s, multiplies {dtype} at "
            f"{ceilings.flops_per_s / 1e9:.0f} GFLOP/s"
        )
        for case in maker.cases(*LOADS[place.type]):
            readings.append(read_case(case, ceilings, place, rounds))
    table = Table("operator", "shape", "µs", "least µs", "of roofline", "torch µs", "torch / this", box=None)
    for reading in readings:
        peer = reading.peer_us
        table.add_row(
            reading.operator,
            reading.load,
            f"{reading.taken_us:.1f}",
            f"{reading.least_us:.1f}",
            f"{reading.share:.0%}",
            "" if peer is None else f"{peer:.1f}",
            "" if peer is None else f"{peer / reading.taken_us:.2f}{reading.not_torch}",
        )
    console.print(table)
    if json_file is not None:
        report = {
            "benchmark": "kernels",
            "command": command_line(context),
            "device": name,
            "operators": built,
            "model": model,
            "dtype": dtype,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            **ceilings._asdict(),
            "readings": [{**reading._asdict(), "share": reading.share} for reading in readings],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_roofline is not None and plot_file is not None:
        plot_roofline(f"{model}, {dtype} on {name}", ceilings, readings, plot_file)
