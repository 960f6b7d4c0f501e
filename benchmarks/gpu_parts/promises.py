"""What was promised of a GPU, beside what a run measured of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

# Paged decode attention of 32 query heads over 8 KV heads of 128, in µs on an H100: FlashAttention 3, as measured by
# ai-dynamo/aiconfigurator. By (sequences, context).
FA3_DECODE_US = {(1, 1024): 11.7, (1, 4096): 13.5, (16, 1024): 33.0}

# Products in fp8 of one row, in µs on an H100: the best that ai-dynamo/aiconfigurator measured. By (outputs, inputs).
FP8_ROW_US = {(2048, 2048): 5.9, (4096, 4096): 11.6}

Figures = Mapping[str, Any]


class Promise(NamedTuple):
    """held: None where it was not measured."""

    promise: str
    measured: str
    held: bool | None

    @property
    def told(self) -> str:
        return {True: "yes", False: "NO", None: "unmeasured"}[self.held]


def promises(parts: Mapping[str, Figures]) -> list[Promise]:
    """parts: figures by the names of parts, as far as there are any."""
    operators = [
        row for name, part in parts.items() if name.startswith("operators") for row in _rows(part, "operators")
    ]
    found = {
        (row["model"], row["operator"], row["load"]): row for row in operators if row.get("peer", "torch") == "torch"
    }
    at_8b = {(operator, load): row for (model, operator, load), row in found.items() if model == "8b"}
    norms = [row for (operator, load), row in at_8b.items() if operator.startswith("add_rms_norm") and "4096" in load]
    compiled = [row for row in norms if "peer_us" in row and "compile" in row["operator"]]
    prompts = [row for (_, load), row in at_8b.items() if load.startswith("prefill") and " x " in load]
    short = [row for row in prompts if _length(row) < 1024]
    long = [row for row in prompts if _length(row) >= 1024]
    decodes = [
        (f"b{num} {length}", us / at_8b["paged_attention", load]["us"])
        for (num, length), us in FA3_DECODE_US.items()
        if (load := f"decode {num} at {length}") and ("paged_attention", load) in at_8b
    ]
    at_64 = [row for (_, load), row in at_8b.items() if load == "decode 64 at 4096"]
    return [
        *(_tests(f"{name}: all pass", part) for name, part in parts.items() if name.startswith("tests")),
        _least("decode attention, b1-16 to 4k: >= 1.7 of FA3 as published", decodes, 1.7),
        _of_rows("decode attention, b64 4k: >= 0.97 of the bandwidth floor", at_64, "share", 0.97),
        _of_rows("residual + RMSNorm (+ 8 bits), 4096 rows: >= 0.9 of copies", norms, "share", 0.9),
        _of_rows("the same: faster than torch.compile", compiled, "peer_over_this", 1.0),
        _of_rows("GEMM at 4096-8192: >= 0.97 of cuBLAS", _squares(at_8b, large=True), "peer_over_this", 0.97),
        _of_rows("GEMM of m <= 16, K, N <= 4096: >= 1.2 of it", _squares(at_8b, large=False), "peer_over_this", 1.2),
        *_quantised(operators),
        _of_rows("prefill attention from 1k on: >= 0.9 of cuDNN", long, "peer_over_this", 0.9),
        _of_rows("prefill attention under 1k: faster", short, "peer_over_this", 1.0),
        _step(parts),
        *_comm(parts),
    ]


def _quantised(operators: Iterable[Figures]) -> list[Promise]:
    """Of `kernels.quantised_square_cases`."""

    def beside(held: str, peer: str, sizes: Iterable[int], rows: Iterable[int]) -> list[Figures]:
        loads = {f"{m} x {size} x {size}" for size in sizes for m in rows}
        return [
            row
            for row in operators
            if row["operator"] == f"linear_{held} o" and row.get("peer") == peer and row["load"] in loads
        ]

    few = {row["load"]: row["us"] for row in beside("fp8_w8a8", "torch", (2048, 4096), (1,))}
    gained = [(f"{n}x{k}", us / few[load]) for (n, k), us in FP8_ROW_US.items() if (load := f"1 x {n} x {k}") in few]
    ratio = "peer_over_this"
    return [
        _of_rows("W4A16, m 8-64, 8192^2: >= 2 of bf16", beside("w4a16", "torch", (8192,), (8, 16, 64)), ratio, 2.0),
        _of_rows("W4A16, m 8-64, 4096^2: >= 1.2 of bf16", beside("w4a16", "torch", (4096,), (8, 16, 64)), ratio, 1.2),
        _least("fp8, m 1: >= 1.5 of the best published", gained, 1.5),
        _of_rows(
            "fp8 8192^3: >= 0.97 of cuBLAS", beside("fp8_w8a8", "torch._scaled_mm", (8192,), (8192,)), ratio, 0.97
        ),
    ]


def _rows(part: Figures, name: str) -> list[Any]:
    return [row for row in part.get(name, ()) if "error" not in row]


def _length(row: Figures) -> int:
    return int(str(row["load"]).rpartition(" ")[2])


def _squares(rows: Mapping[tuple[str, str], Figures], *, large: bool) -> list[Figures]:
    """Products of `kernels.square_cases`, by their loads: rows x outputs x inputs."""
    found = []
    for (operator, load), row in rows.items():
        if operator == "linear o":
            m, n, k = map(int, load.split(" x "))
            if n == k and (m == n >= 4096 if large else m <= 16 and n <= 4096):
                found.append(row)
    return found


def _of_rows(promise: str, rows: Iterable[Figures], key: str, wanted: float) -> Promise:
    return _least(promise, [(str(row["load"]).replace(" ", ""), row[key]) for row in rows if key in row], wanted)


def _least(promise: str, ratios: list[tuple[str, float]], wanted: float) -> Promise:
    """Held by the worst of them."""
    if not ratios:
        return Promise(promise, "", None)
    where, worst = min(ratios, key=lambda each: each[1])
    best = max(ratio for _, ratio in ratios)
    spread = f"{worst:.2f} ({where})" if len(ratios) == 1 else f"{worst:.2f} ({where}) to {best:.2f}"
    return Promise(promise, spread, worst >= wanted)


def _tests(promise: str, part: Figures) -> Promise:
    if "passed" not in part:
        return Promise(promise, "", None)
    told = f"{part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped"
    return Promise(promise, told + ("" if part.get("ended") == "done" else f"; {part.get('ended')}"), _all_pass(part))


def _all_pass(part: Figures) -> bool:
    return part["failed"] == 0 and part["passed"] > 0 and part.get("ended") == "done"


def _step(parts: Mapping[str, Figures]) -> Promise:
    """By the way of the runner with graphs where there is one: that is what a rank does."""
    promise = "a decode step of 1B at b1: >= 0.65 of HBM bandwidth, in a graph"
    rows = {row["way"]: row for row in _rows(parts.get("end to end 1b", {}), "decode") if row["batch"] == 1}
    for way in ("graphs", "captured"):
        if way in rows:
            share = rows[way]["share_of_copy"]
            return Promise(promise, f"{share:.2f} ({way})", share >= 0.65)
    return Promise(promise, "", None)


def _comm(parts: Mapping[str, Figures]) -> list[Promise]:
    nccl = parts.get("nccl", {})
    calls = nccl.get("calls", ())
    told = f"{min(row['in_graph_us'] for row in calls):.1f} us a call in a graph" if calls else ""
    through = "through host memory under GEMMs: >= 0.9 of link, <= 3 % slower"
    staged = [
        Promise(
            f"{name}: {through}"[:64], f"{row['of_link']:.2f}, products x {row['product_slower']:.3f}", row["holds"]
        )
        for name, row in nccl.get("host_staged", {}).items()
    ]
    return [
        Promise("NCCL at world size 1, in and out of graphs", told, bool(calls) or None),
        _two_ranks(parts.get("tests of the comm layer", {})),
        *(staged or [Promise(through, "", None)]),
    ]


def _two_ranks(tests: Figures) -> Promise:
    """By its tests, which skip where the NCCL that is loaded refuses."""
    promise = "two ranks in one process on one GPU"
    refused = [why for why in tests.get("skips", {}) if "NCCL" in why]
    if "passed" not in tests or refused:
        return Promise(promise, refused[0][-40:] if refused else "", None)
    return Promise(promise, "its tests ran", _all_pass(tests))


def steps(parts: Mapping[str, Figures]) -> list[list[str]]:
    """The rows of the end-to-end table."""
    found = []
    for name, part in parts.items():
        if not name.startswith("end to end"):
            continue
        decode = _rows(part, "decode")
        for batch in dict.fromkeys(row["batch"] for row in decode):
            ways = {row["way"]: row for row in decode if row["batch"] == batch}
            columns = [_told(ways.get(way), _speed) for way in ("eager", "graphs", "captured")]
            [model] = {row["model"] for row in ways.values()}
            context = next(iter(ways.values()))["context"]
            found.append([f"{model} decode b{batch} at {context}", *columns])
        for row in _rows(part, "prefill"):
            told = f"{row['tokens_per_s']:.0f} tok/s, {row['share_of_products']:.0%} of products"
            found.append([f"{row['model']} prefill {row['prompt']}", told, "", ""])
    return found


def _speed(row: Figures) -> str:
    return f"{row['tokens_per_s']:.0f} tok/s, {row['share_of_copy']:.0%}"


def _told(row: Figures | None, told: Callable[[Figures], str]) -> str:
    return "" if row is None else told(row)
