"""The operators in the shapes of a model: how to call them, and the least that they must move and calculate.

Shapes: T tokens of a step, H hidden size, F feed-forward columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from phalanx import kernels
from phalanx.engine.kv_budget import page_size_on
from phalanx.kernels import Experts, PackedExperts, PackedWeight, SamplingRows, WeightFormat, choose_packing
from phalanx.kernels.linear_table import Held
from phalanx.launcher.bench_kernels import optional_peers
from phalanx.launcher.bench_kernels.pages import Pages
from phalanx.launcher.bench_kernels.quantised import formats_on, peers, quantised, taken

EPS = 1e-5
TOP = 50
CACHED_BYTES = 1 << 28  # inputs of one operator, so that it does not find them in a cache
MOST_COPIES = 16


class Sizes(NamedTuple):
    """hidden, ffn: sizes. queries, keys: numbers of heads. head_dim. vocab: rows. experts: of `ffn` columns each, of
    which a token passes `chosen`; 0 for a feed-forward alone.
    """

    hidden: int
    queries: int
    keys: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    chosen: int = 0


MODELS = {
    "smollm2-135m": Sizes(576, 9, 3, 64, 1536, 49152),
    "1b": Sizes(2048, 32, 8, 64, 8192, 128256),
    "8b": Sizes(4096, 32, 8, 128, 14336, 128256),
    "qwen3-30b-a3b": Sizes(2048, 32, 4, 128, 768, 151936, experts=128, chosen=8),
}


# Rows of operators on rows, and (sequences, length) of decode steps, by the kind of device.
LOADS = {
    "cpu": ((1, 32, 512), ((1, 256), (1, 4096), (32, 256))),
    "cuda": ((1, 16, 64, 512, 4096), ((1, 1024), (1, 4096), (16, 1024), (64, 4096))),
}


class Case(NamedTuple):
    """One operator in one shape. call, peer: with the number of a copy of the inputs; peer: PyTorch's own, None where
    it has none that is comparable, or what `peer_name` says. num_bytes, num_flops: the least to be moved and
    calculated, once.
    """

    operator: str
    load: str
    call: Callable[[int], object]
    peer: Callable[[int], object] | None
    num_copies: int
    num_bytes: float
    num_flops: float = 0.0
    peer_name: str = "torch"


class Maker(NamedTuple):
    """Makes the cases of a model on a device. only: how the names of operators begin."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    only: str = ""

    def cases(self, rows: tuple[int, ...], contexts: tuple[tuple[int, int], ...]) -> Iterator[Case]:
        """rows: T of operators on rows. contexts: (sequences, length) of decode steps."""
        for num_rows in rows:
            yield from self._wanted(self.row_cases(num_rows))
            yield from self.product_cases(num_rows)
        if self.sizes.experts:
            yield from self.mixture_cases(rows)
        for num_rows in (1, 32):
            yield from self._wanted(self.search_cases(num_rows))
        if "paged_attention".startswith(self.only):
            for num, length in contexts:
                yield from self.attention_cases([1] * num, [length] * num, f"decode {num} at {length}")
            yield from self.attention_cases([512], [512], "prefill 512")
        for num, length in contexts:
            for name in kernels.KV_DTYPES:
                if f"paged_attention {name}".startswith(self.only):
                    yield self.narrow_case(num, length, f"decode {num} at {length}", name)
        for num_rows in rows:
            yield from self.quantised_cases(num_rows)

    def _wanted(self, cases: Iterator[Case]) -> Iterator[Case]:
        return (case for case in cases if case.operator.startswith(self.only))

    def row_cases(self, num_rows: int) -> Iterator[Case]:
        sizes, load = self.sizes, f"{num_rows} rows"
        copies = _num_copies(num_rows * sizes.hidden * self.dtype.itemsize)
        x, residual = self._random(2, copies, num_rows, sizes.hidden)
        weight = self._random(sizes.hidden)
        moved = x[0].nbytes

        def norm(i: int) -> torch.Tensor:
            return F.rms_norm(x[i], (sizes.hidden,), weight, EPS)

        def add_norm(i: int) -> torch.Tensor:
            return F.rms_norm(x[i] + residual[i], (sizes.hidden,), weight, EPS)

        plain = Case("rms_norm", load, lambda i: kernels.rms_norm(x[i], weight, EPS), norm, copies, 2 * moved)
        yield from _beside(plain, optional_peers.norms(x, weight, EPS))
        added = Case(
            "add_rms_norm",
            load,
            lambda i: kernels.add_rms_norm(x[i], residual[i], weight, EPS),
            add_norm,
            copies,
            4 * moved,
        )
        yield from _beside(added, optional_peers.added_norms(x, residual, weight, EPS))
        yield Case(
            "add_rms_norm int8",
            load,
            lambda i: kernels.add_rms_norm_quantised(x[i], residual[i], weight, EPS, torch.int8),
            None,
            copies,
            3 * moved + x[0].numel(),
        )
        gate_copies = _num_copies(2 * num_rows * sizes.ffn * self.dtype.itemsize)
        gate_up = self._random(gate_copies, num_rows, 2 * sizes.ffn)
        gated = Case(
            "silu_mul",
            load,
            lambda i: kernels.silu_mul(gate_up[i]),
            lambda i: F.silu(gate_up[i, :, : sizes.ffn]) * gate_up[i, :, sizes.ffn :],
            gate_copies,
            1.5 * gate_up[0].nbytes,
        )
        yield from _beside(gated, optional_peers.gates(gate_up))
        qkv = self._random(copies, num_rows, (sizes.queries + 2 * sizes.keys) * sizes.head_dim)
        size = page_size_on(self.device.type)
        cache = self._random(2, num_rows // size + 1, size, sizes.keys, sizes.head_dim)
        positions = torch.arange(num_rows, device=self.device)
        frequencies = kernels.rope_frequencies(sizes.head_dim, 10000.0).to(self.device)
        table = kernels.rope_table(positions, frequencies, self.dtype)
        yield Case(
            "rope_and_write_kv",
            load,
            lambda i: kernels.rope_and_write_kv(qkv[i], table, cache[0], cache[1], positions),
            None,
            copies,
            2 * qkv[0].nbytes,
        )

    def product_cases(self, num_rows: int) -> Iterator[Case]:
        for name, (outputs, inputs) in self._products(num_rows).items():
            if f"linear {name}".startswith(self.only):  # before weights are made
                yield self._product(f"linear {name}", num_rows, outputs, inputs)

    def quantised_cases(self, num_rows: int) -> Iterator[Case]:
        """Of the products of a layer."""
        for name, (outputs, inputs) in self._products(num_rows).items():
            for held_name, held in formats_on(self.device).items():
                operator = f"linear_{held_name} {name}"
                if name != "head" and operator.startswith(self.only):
                    yield from self._quantised(operator, held_name, held, num_rows, outputs, inputs)

    def _quantised(
        self, operator: str, name: Held, held: WeightFormat, num_rows: int, outputs: int, inputs: int
    ) -> Iterator[Case]:
        """A case a peer. What quantises activations is not counted: the norm or the gate in front does."""
        copies = _num_copies(outputs * inputs * held.bits // 8)
        x = self._random(num_rows, inputs)
        plains = [self._random(outputs, inputs) for _ in range(_num_copies(outputs * inputs * self.dtype.itemsize))]
        weights = quantised(plains[0], held, copies)
        rows = taken(x, weights[0])
        moved = weights[0].nbytes + num_rows * (inputs * (1 if rows is not x else x.itemsize) + outputs * x.itemsize)
        for peer_name, peer in peers(name, x, plains, held):
            yield Case(
                operator,
                f"{num_rows} x {outputs} x {inputs}",
                lambda i: kernels.linear(rows, weights[i]),
                peer,
                copies,
                moved,
                2.0 * num_rows * outputs * inputs,
                peer_name,
            )

    def _products(self, num_rows: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each."""
        sizes = self.sizes
        heads = (sizes.queries + 2 * sizes.keys) * sizes.head_dim
        shapes = {
            "qkv": (heads, sizes.hidden),
            "o": (sizes.hidden, sizes.queries * sizes.head_dim),
        }
        if not sizes.experts:
            shapes |= {"gate_up": (2 * sizes.ffn, sizes.hidden), "down": (sizes.hidden, sizes.ffn)}
        if num_rows <= 64:
            shapes["head"] = (sizes.vocab, sizes.hidden)
        return shapes

    def mixture_cases(self, rows: tuple[int, ...]) -> Iterator[Case]:
        """Of one layer, whose experts are too large for a cache."""
        sizes = self.sizes
        if "route".startswith(self.only):
            for num_rows in rows:
                yield self._routing(self._random(num_rows, sizes.experts))
        if "expert_ffn".startswith(self.only):
            gate_up = self._held_experts(self._random(sizes.experts, 2 * sizes.ffn, sizes.hidden))
            down = self._held_experts(self._random(sizes.experts, sizes.hidden, sizes.ffn))
            for num_rows in rows:
                yield self._mixture(num_rows, gate_up, down)

    def _routing(self, logits: torch.Tensor) -> Case:
        num_rows, chosen = len(logits), self.sizes.chosen
        moved = logits.nbytes + num_rows * chosen * 8
        return Case(
            "route", f"{num_rows} rows", lambda _: kernels.route(logits, chosen, renormalise=True), None, 1, moved
        )

    def _mixture(self, num_rows: int, gate_up: Experts, down: Experts) -> Case:
        """By a random routing. Its bytes are those of the experts that it chooses."""
        sizes = self.sizes
        x = self._random(num_rows, sizes.hidden)
        experts, weights = kernels.route(self._random(num_rows, sizes.experts), sizes.chosen, renormalise=True)
        read = len(set(experts.flatten().tolist())) / sizes.experts * (gate_up.nbytes + down.nbytes)
        return Case(
            "expert_ffn",
            f"{num_rows} rows, {sizes.chosen} of {sizes.experts}",
            lambda _: kernels.expert_ffn(x, experts, weights, gate_up, down),
            None,
            1,
            read + 2 * x.nbytes,
            2.0 * num_rows * sizes.chosen * 3 * sizes.ffn * sizes.hidden,
        )

    def _held_experts(self, weight: torch.Tensor) -> Experts:
        if not choose_packing(self.dtype, self.device).usable:
            return weight
        return PackedExperts(map(PackedWeight.pack, weight))

    def _product(self, name: str, num_rows: int, outputs: int, inputs: int) -> Case:
        copies = _num_copies(outputs * inputs * self.dtype.itemsize)
        x = self._random(num_rows, inputs)
        weights = [self._random(outputs, inputs) for _ in range(copies)]
        packs = choose_packing(self.dtype, self.device).usable
        held = [PackedWeight.pack(weight) if packs else weight for weight in weights]
        moved = held[0].nbytes + (inputs + outputs) * num_rows * self.dtype.itemsize
        return Case(
            name,
            f"{num_rows} x {outputs} x {inputs}",
            lambda i: kernels.linear(x, held[i]),
            lambda i: F.linear(x, weights[i]),
            copies,
            moved,
            2.0 * num_rows * outputs * inputs,
        )

    def search_cases(self, num_rows: int) -> Iterator[Case]:
        load = f"{num_rows} rows of {self.sizes.vocab}"
        copies = _num_copies(num_rows * self.sizes.vocab * 4)
        logits = torch.randn(copies, num_rows, self.sizes.vocab, device=self.device)
        moved = logits[0].nbytes
        yield Case("argmax", load, lambda i: kernels.argmax(logits[i]), lambda i: logits[i].argmax(1), copies, moved)
        yield Case(
            f"top {TOP}", load, lambda i: kernels.top(logits[i], TOP), lambda i: logits[i].topk(TOP), copies, moved
        )
        if self.device.type == "cpu":
            return  # there `sample` is only defined, and the engine draws by the two above
        numbers = torch.arange(num_rows, device=self.device)
        wide = torch.ones(num_rows, dtype=torch.float64, device=self.device)
        rows = SamplingRows(wide, 0 * numbers, 0.9 * wide, 0 * wide, numbers, numbers)
        yield Case("sample top_p", load, lambda i: kernels.sample(logits[i], rows), None, copies, moved)

    def attention_case(self, new: list[int], lengths: list[int], load: str) -> Case:
        """Beside PyTorch's."""
        return next(self.attention_cases(new, lengths, load))

    def attention_cases(self, new: list[int], lengths: list[int], load: str) -> Iterator[Case]:
        sizes = self.sizes
        pages = self._pages(new, lengths)
        pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in zip(new, lengths, strict=True))
        moved = 2 * (sum(lengths) * sizes.keys + sum(new) * sizes.queries) * sizes.head_dim * self.dtype.itemsize
        flops = 4.0 * pairs * sizes.queries * sizes.head_dim
        copies = pages.keys.shape[0]
        peer = self._sdpa(len(new), new[0], lengths[0], copies)
        case = Case("paged_attention", load, pages.attend, peer, copies, moved, flops)
        others = optional_peers.decodes(pages.query, pages.keys, pages.values, pages.tables, lengths, pages.scale)
        yield from _beside(case, others if max(new) == 1 else iter(()))

    def narrow_case(self, num_sequences: int, length: int, load: str, kv_cache_dtype: str) -> Case:
        """Decodes over pages in 8 bits, beside the same over pages of the model's dtype."""
        sizes = self.sizes
        pages = self._pages([1] * num_sequences, [length] * num_sequences)
        narrow = pages.narrow(kernels.KV_DTYPES[kv_cache_dtype])
        read = 2 * num_sequences * length * sizes.keys * (sizes.head_dim + torch.bfloat16.itemsize)
        return Case(
            f"paged_attention {kv_cache_dtype}",
            load,
            narrow.attend,
            pages.attend,
            pages.keys.shape[0],
            read + 2 * pages.query.nbytes,
            4.0 * num_sequences * length * sizes.queries * sizes.head_dim,
            f"{self.dtype} pages".removeprefix("torch."),
        )

    def _pages(self, new: list[int], lengths: list[int]) -> Pages:
        """Full of random numbers."""
        sizes, size = self.sizes, page_size_on(self.device.type)
        pages_each = -(-max(lengths) // size)
        tables = torch.randperm(len(lengths) * pages_each).view(len(lengths), pages_each)
        kv_of_query = [head * sizes.keys // sizes.queries for head in range(sizes.queries)]
        copies = _num_copies(2 * tables.numel() * size * sizes.keys * sizes.head_dim * self.dtype.itemsize)
        keys, values = self._random(2, copies, tables.numel(), size, sizes.keys, sizes.head_dim)
        return Pages(
            keys,
            values,
            self._random(sum(new), sizes.queries, sizes.head_dim),
            tables,
            kernels.plan_attention(tables, new, lengths, page_size=size, window=None, device=self.device),
            kernels.group_heads(kv_of_query, sizes.keys, self.device),
            sizes.head_dim**-0.5,
        )

    def _sdpa(self, num_sequences: int, new: int, length: int, copies: int) -> Callable[[int], object]:
        """PyTorch's attention, which reads keys and values of sequences side by side."""
        sizes = self.sizes
        query = self._random(num_sequences, sizes.queries, new, sizes.head_dim)
        kv = self._random(2, copies, num_sequences, sizes.keys, length, sizes.head_dim)
        return lambda i: F.scaled_dot_product_attention(query, kv[0, i], kv[1, i], is_causal=new > 1, enable_gqa=True)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def _beside(case: Case, others: optional_peers.Calls) -> Iterator[Case]:
    """The case, and once more beside each of the other peers."""
    yield case
    for name, call in others:
        yield case._replace(peer=call, peer_name=name)


def _num_copies(num_bytes: int) -> int:
    return max(1, min(MOST_COPIES, CACHED_BYTES // num_bytes))
