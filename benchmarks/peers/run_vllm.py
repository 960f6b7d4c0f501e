"""vLLM on a CPU, for measure.py: its offline engine, eager, in one process and with a thread bound to each core.

Left to itself it starts three processes and keeps a core free for two of them; with the few cores of a small machine
that is slower in every figure. What the environment says goes before what is set here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


@contextmanager
def serving(
    *, model: str, dtype: str, num_threads: int, max_length: int
) -> Iterator[Callable[[Sequence[tuple[list[int], int]]], list[list[int]]]]:
    """num_threads: as many as the process has cores, to which the environment above binds them."""
    llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=max_length)

    def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True) for _, num_new in requests],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    yield generate
