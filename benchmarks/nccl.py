"""What NCCL costs a rank on this GPU, and what the channel through host memory takes from a product beside it.

    python benchmarks/nccl.py [--json benchmarks/results/gpu-nccl.json]

First table, in a group of one: the thread's time for a call, the GPU's time for it, and the GPU's in a CUDA graph, for
the bare binding, for blocking and for asynchronous calls. In a group of one NCCL copies an all-gather and leaves out an
all-reduce in place, so that the rest is what the calls themselves cost.

Second table, two ranks on this GPU: copies to the host in pieces, alone and under products of 8192 x 8192 in bfloat16,
and the channel over gloo likewise; each beside its link (copies alone; gloo between host memories alone). Wanted: at
least 0.9 of the link's rate under products, and products at most 3 % slower. Medians over alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore, PrefixStore

from phalanx.comm import Communicator, GroupSpec, create_communicator
from phalanx.comm.gpu import CudaGpu
from phalanx.comm.host_staged import StagedCommunicator
from phalanx.comm.nccl_binding import DATA_TYPES
from phalanx.comm.nccl_cupy import find_cupy
from phalanx.comm.torch_backend import PIECE_BYTES, GlooCommunicator

SIZES = (8 << 10, 512 << 10, 16 << 20)
CALLS = 200
PRODUCT = 8192
MESSAGE_BYTES = 64 << 20
MESSAGES = 4
WANTED_RATE, WANTED_SLOWER = 0.9, 1.03

Call = Callable[[], object]


def event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def gpu_us(call: Call, calls: int = CALLS) -> float:
    """The GPU's microseconds for one of `calls` calls. A spin in front lets the thread get ahead, so that it is the GPU
    that is timed wherever the GPU is the slower one."""
    begin, end = event(), event()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / calls


def thread_us(call: Call) -> float:
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(CALLS):
        call()
    ended_s = time.perf_counter()
    torch.cuda.synchronize()
    return (ended_s - began_s) * 1e6 / CALLS


def graph_us(call: Call) -> float:
    """In a graph of `CALLS` calls."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    taken = gpu_us(graph.replay, 1) / CALLS
    graph.reset()
    return taken


def measure_calls(rounds: int) -> list[dict[str, Any]]:
    found = find_cupy()
    if found.binding is None:
        raise SystemExit(f"needs NCCL through CuPy: {found.told}")
    rows = []
    bare = found.binding.join(1, found.binding.unique_id(), 0)
    with create_communicator("nccl", rank=0, size=1, device="cuda") as comm:
        for num_bytes in SIZES:
            x, y = (torch.randn(num_bytes // 2, device="cuda").bfloat16() for _ in range(2))
            dtype = DATA_TYPES[x.dtype]

            def bare_call(x: torch.Tensor = x, y: torch.Tensor = y, dtype: int = dtype) -> None:
                stream = torch.cuda.current_stream().cuda_stream
                bare.all_gather(x.data_ptr(), y.data_ptr(), x.numel(), dtype, stream)

            def reduce(x: torch.Tensor = x) -> None:
                comm.all_reduce(x)

            def gather(x: torch.Tensor = x) -> None:
                comm.all_gather(x)

            def beside(x: torch.Tensor = x) -> None:
                comm.all_gather(x, async_op=True).wait()

            ways: dict[str, Call] = {
                "bare all_gather": bare_call,
                "all_reduce": reduce,
                "all_gather": gather,
                "all_gather, asynchronous": beside,
            }
            readings: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
            for _ in range(rounds + 1):
                for way, call in ways.items():
                    readings[way].append((thread_us(call), gpu_us(call), graph_us(call)))
            for way, taken in readings.items():
                thread, gpu, graph = (statistics.median(column) for column in zip(*taken[1:], strict=True))
                rows.append({"bytes": num_bytes, "way": way, "thread_us": thread, "gpu_us": gpu, "in_graph_us": graph})
    bare.destroy()
    return rows


class Products:
    """Products on the current stream."""

    def __init__(self) -> None:
        self._a, self._b, self._c = (
            torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        self.ms = self.run(20)
        self.ms = self.run(20)

    def run(self, num: int, beside: Call = lambda: None) -> float:
        """Milliseconds of one of `num`. beside: called when they have been enqueued."""
        begin, end = event(), event()
        begin.record()
        for _ in range(num):
            torch.mm(self._a, self._b, out=self._c)
        end.record()
        beside()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / num


def row(link: list[float], alone: list[float], under: list[float], plain: list[float], with_it: list[float]) -> Any:
    """Rates in bytes per second, times of a product in milliseconds."""
    rates = [statistics.median(each) for each in (link, alone, under)]
    slower = statistics.median(b / a for a, b in zip(plain, with_it, strict=True))
    return {
        "link_gb_s": rates[0] / 1e9,
        "alone_gb_s": rates[1] / 1e9,
        "under_products_gb_s": rates[2] / 1e9,
        "of_link": rates[2] / rates[0],
        "product_ms": statistics.median(plain),
        "product_slower": slower,
        "holds": rates[2] >= WANTED_RATE * rates[0] and slower <= WANTED_SLOWER,
    }


def measure_copies(products: Products, rounds: int) -> Any:
    """Copies to the host in pieces, on a stream beside, into two pinned buffers; the rate that the hardware gives."""
    gpu = CudaGpu(torch.cuda.current_device())
    source = torch.randint(0, 255, (MESSAGE_BYTES,), dtype=torch.uint8, device="cuda")
    buffers, stream = [gpu.pinned(PIECE_BYTES) for _ in range(2)], gpu.new_stream()

    def copy(repeats: int) -> Callable[[], float]:
        """Enqueues; then gives the rate."""
        begin, end = event(), event()
        begin.record(stream)
        for _ in range(repeats):
            for index, piece in enumerate(torch.split(source, PIECE_BYTES)):
                gpu.copy(buffers[index % 2], piece, stream)
        end.record(stream)

        def rate() -> float:
            return repeats * MESSAGE_BYTES / (float(begin.elapsed_time(end)) / 1e3)

        return rate

    alone: list[float] = []
    under: list[float] = []
    plain: list[float] = []
    with_it: list[float] = []
    for _ in range(rounds + 1):
        waiting = copy(16)
        torch.cuda.synchronize()
        alone.append(waiting())
        num = max(4, math.ceil(16 * MESSAGE_BYTES / alone[-1] * 1e3 / products.ms))
        plain.append(products.run(num))
        got: list[Callable[[], float]] = []
        with_it.append(products.run(num, lambda got=got: got.append(copy(16))))  # type: ignore[misc]
        under.append(got[0]())
    return row(alone[1:], alone[1:], under[1:], plain[1:], with_it[1:])


def measure_channel(products: Products, rounds: int) -> Any:
    """The channel from one rank to another, both on this GPU, over gloo on the loopback interface."""
    store = HashStore()
    x = torch.randint(0, 255, (MESSAGE_BYTES,), dtype=torch.uint8, device="cuda")
    into, host, host_into = torch.empty_like(x), x.cpu(), torch.empty(MESSAGE_BYTES, dtype=torch.uint8)
    total = MESSAGES * MESSAGE_BYTES

    def spec(group: str, rank: int, device: str) -> GroupSpec:
        return GroupSpec(rank, 2, group, device, 60.0, PrefixStore(group, store), "127.0.0.1")

    with ThreadPoolExecutor(2) as pool:
        staged: list[Communicator] = list(
            pool.map(lambda rank: StagedCommunicator(spec("staged", rank, "cuda")), (0, 1))
        )
        plain_ones: list[Communicator] = list(
            pool.map(lambda rank: GlooCommunicator(spec("plain", rank, "cpu")), (0, 1))
        )

        def pass_on(comms: list[Communicator], source: torch.Tensor, target: torch.Tensor) -> float:
            """Bytes per second of messages sent one after another."""

            def receive() -> None:
                with torch.cuda.stream(receiving):
                    for _ in range(MESSAGES):
                        comms[1].recv(target, 0)
                    torch.cuda.current_stream().synchronize()

            began_s = time.perf_counter()
            arrived = pool.submit(receive)
            for handle in [comms[0].send(source, 1, async_op=True) for _ in range(MESSAGES)]:
                handle.wait()
            arrived.result()
            return total / (time.perf_counter() - began_s)

        receiving = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        sending = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        link: list[float] = []
        alone: list[float] = []
        under: list[float] = []
        plain: list[float] = []
        with_it: list[float] = []

        def beside() -> None:
            with torch.cuda.stream(sending):  # else its wait for the copies would be behind the products
                under.append(pass_on(staged, x, into))

        for _ in range(rounds + 1):
            link.append(pass_on(plain_ones, host, host_into))
            alone.append(pass_on(staged, x, into))
            num = max(4, math.ceil(total / alone[-1] * 1e3 / products.ms))
            plain.append(products.run(num))
            with_it.append(products.run(num, beside))
        if not torch.equal(into, x):
            raise SystemExit("what arrived is not what was sent")
        list(pool.map(lambda comm: comm.close(), [*staged, *plain_ones]))
    return row(link[1:], alone[1:], under[1:], plain[1:], with_it[1:])


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    calls = Table(title=f"µs a call in a group of one; {result['nccl']}", title_justify="left", box=None)
    for name in ("bytes", "call", "thread", "GPU", "in a graph"):
        calls.add_column(name, justify="left" if name == "call" else "right")
    for each in result["calls"]:
        figures = [f"{each[key]:.1f}" for key in ("thread_us", "gpu_us", "in_graph_us")]
        calls.add_row(f"{each['bytes']:,}", each["way"], *figures)
    console.print(calls)
    staged = Table(title="through host memory, GB/s", title_justify="left", box=None)
    for name in ("", "link", "alone", "under products", "of link", "product ms", "product slower", "holds"):
        staged.add_column(name, justify="right")
    for name, each in result["host_staged"].items():
        rates = [f"{each[key]:.2f}" for key in ("link_gb_s", "alone_gb_s", "under_products_gb_s", "of_link")]
        times = [f"{each['product_ms']:.3f}", f"{each['product_slower']:.3f}", "yes" if each["holds"] else "no"]
        staged.add_row(name, *rates, *times)
    console.print(staged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU, with NCCL through CuPy")
    with torch.inference_mode():
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": find_cupy().told,
            "cores": len(os.sched_getaffinity(0)),
            "rounds": arguments.rounds,
            "calls": measure_calls(arguments.rounds),
        }
        products = Products()
        result["host_staged"] = {
            "copies to the host": measure_copies(products, arguments.rounds),
            "channel over gloo": measure_channel(products, arguments.rounds),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


if __name__ == "__main__":
    main()
