"""What a rank's process must do without: each of these costs every rank memory, and the first request its time."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.kernels.instruction_sets import needs_native

UNWANTED = (
    *("ray", "transformers", "tokenizers", "fastapi", "uvicorn", "pydantic", "rich", "typer", "yaml", "jinja2"),
    *("gguf", "sympy", "mpmath", "numpy.testing", "torch._dynamo", "torch._inductor"),
)
REPORT = f"""
import sys
print(*(name for name in {UNWANTED} if name in sys.modules))
"""


def imported(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program + REPORT], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module", ["phalanx.engine.run_rank", "phalanx.launcher.nursery", "phalanx.launcher.rank_actor"]
)
def test_a_rank_imports_only_what_it_needs(module: str) -> None:
    assert imported(f"import {module}") == ""


@pytest.mark.parametrize("module", ["phalanx.launcher.rank_actor", "phalanx.launcher.llm"])
def test_actors_and_programs_without_a_rank_are_there_before_torch(module: str) -> None:
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@needs_native
def test_recording_a_step_imports_nothing_more() -> None:
    program = """
import torch
from phalanx.kernels import Arena, Recording, rms_norm
x, weight = torch.ones(2, 8), torch.ones(8)
with Recording(Arena()).record():
    rms_norm(x, weight, 1e-5)
"""
    assert imported(program) == ""
