"""Phalanx, for measure.py: one rank, or the layout of a configuration file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from phalanx import LLM, SamplingParams


@contextmanager
def serving(
    *,
    model: str,
    dtype: str,
    num_threads: int,
    max_length: int,
    config: str | None = None,
    quantization: str = "auto",
) -> Iterator[Callable[[Sequence[tuple[list[int], int]]], list[list[int]]]]:
    """config: a YAML file whose layout, engine and communicators are taken. The ranks share the process's cores."""
    sections: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype, "max_length": max_length, "quantization": quantization},
        "cluster": {"ray": "none", "device": "cpu"},
    }
    with LLM.from_yaml(config, **sections) if config else LLM(**sections) as llm:

        def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
            params = [SamplingParams(max_tokens=num_new, ignore_eos=True) for _, num_new in requests]
            return [list(output.token_ids) for output in llm.generate([prompt for prompt, _ in requests], params)]

        yield generate
