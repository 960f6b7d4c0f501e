"""llama.cpp, for measure.py: the low-level interface of llama-cpp-python, whose high-level one runs a single sequence.

Prompts are decoded in batches of up to 2048 tokens (llama.cpp's default), then every sequence gets a token a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

MAX_SEQUENCES = 32


class Entry(NamedTuple):
    """A token of a batch. wanted: whether its logits are."""

    token: int
    position: int
    sequence: int
    wanted: bool


class Context:
    """A model with a key-value cache for MAX_SEQUENCES sequences of `max_length` tokens."""

    def __init__(self, path: str, num_threads: int, max_length: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MAX_SEQUENCES * max_length
        settings.n_seq_max = MAX_SEQUENCES
        settings.n_threads = settings.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.max_batch = llama_cpp.llama_n_batch(self._context)
        self._batch = llama_cpp.llama_batch_init(self.max_batch, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def forget(self) -> None:
        """Empties the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def decode(self, entries: Sequence[Entry]) -> dict[int, int]:
        """The most likely next token of each sequence whose logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, entry in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = entry.token, entry.position, entry.wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, entry.sequence
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(entries)} tokens returned {status}")
        return {entry.sequence: self._argmax(i) for i, entry in enumerate(entries) if entry.wanted}

    def _argmax(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._num_tokens,)).argmax())


def batches(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    source = iter(entries)
    while batch := list(islice(source, size)):
        yield batch


@contextmanager
def serving(
    *, model: str, dtype: str, num_threads: int, max_length: int
) -> Iterator[Callable[[Sequence[tuple[list[int], int]]], list[list[int]]]]:
    """dtype: of the weights in the GGUF file `model`."""
    context = Context(model, num_threads, max_length)

    def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        context.forget()
        outputs: list[list[int]] = [[] for _ in requests]
        prompts = (
            Entry(token, position, sequence, position + 1 == len(prompt))
            for sequence, (prompt, _) in enumerate(requests)
            for position, token in enumerate(prompt)
        )
        for batch in batches(prompts, context.max_batch):
            for sequence, token in context.decode(batch).items():
                outputs[sequence].append(token)
        while step := [
            Entry(new[-1], len(prompt) + len(new) - 1, sequence, True)
            for sequence, ((prompt, num_new), new) in enumerate(zip(requests, outputs, strict=True))
            if len(new) < num_new
        ]:
            for sequence, token in context.decode(step).items():
                outputs[sequence].append(token)
        return outputs

    yield generate
    context.close()
