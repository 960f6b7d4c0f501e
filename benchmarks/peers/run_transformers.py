"""transformers, for measure.py: `generate`, for several requests on one left-padded batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


@contextmanager
def serving(
    *, model: str, dtype: str, num_threads: int, max_length: int
) -> Iterator[Callable[[Sequence[tuple[list[int], int]]], list[list[int]]]]:
    """Requests that run together ask for equally many new tokens. Its cache grows, so max_length is not used."""
    logging.disable_progress_bar()
    torch.set_num_threads(num_threads)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    decoder.generation_config.eos_token_id = None

    def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        (num_new,) = {num_new for _, num_new in requests}
        width = max(len(prompt) for prompt, _ in requests)
        padding = [width - len(prompt) for prompt, _ in requests]
        rows = decoder.generate(
            torch.tensor([[0] * pad + prompt for pad, (prompt, _) in zip(padding, requests, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        return [row[width:].tolist() for row in rows]

    yield generate
