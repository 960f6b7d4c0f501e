"""`compilable`: what PyTorch does where no operator of our own applies, which torch.compile may do in its place.

It fuses what PyTorch would do one after another. As the number of threads it is a choice of the whole process, made
when a rank starts (`engine.torch_compile`), because plain functions have nowhere else to find it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from phalanx.errors import PhalanxError

P = ParamSpec("P")
R = TypeVar("R")


class Compilable(Generic[P, R]):
    """A function of tensors. Compiled when it is first called after `use_compiler(True)`, for any number of rows."""

    def __init__(self, function: Callable[P, R]) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__.strip("_")
        self.called = False  # while it was compiled
        self._function = self._call = function

    def __call__(self, *arguments: P.args, **settings: P.kwargs) -> R:
        return self._call(*arguments, **settings)

    def compile(self, wanted: bool) -> None:
        self.called = False
        self._call = self._compiled if wanted else self._function

    @functools.cached_property
    def _compiled(self) -> Callable[P, R]:
        # Rounded wherever PyTorch rounds: a fused sum would else reach a norm in float32.
        options: dict[str, str | int | bool | Callable[..., object]] = {"emulate_precision_casts": True}
        compiled = torch.compile(self._function, dynamic=True, fullgraph=True, options=options)

        def call(*arguments: P.args, **settings: P.kwargs) -> R:
            self.called = True
            return compiled(*arguments, **settings)

        return call


_ALL: list[Compilable[Any, Any]] = []


def compilable(function: Callable[P, R]) -> Compilable[P, R]:
    """A decorator. The function takes and returns tensors and numbers, and changes none."""
    made = Compilable(function)
    _ALL.append(made)
    return made


def use_compiler(device: torch.device, wanted: bool) -> None:
    """Whether what is called from now on is compiled. Raises PhalanxError where PyTorch cannot compile for `device`."""
    if wanted:
        try:
            torch.compile(_probe, dynamic=True, fullgraph=True)(torch.zeros(3, device=device))
        except Exception as error:  # of many kinds, private to PyTorch
            cause = str(error).strip().splitlines()[0]
            needed = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton and a C compiler"
            raise PhalanxError(
                f"engine.torch_compile: PyTorch cannot compile for {device.type} here ({cause}); install {needed}, or "
                "set it to false"
            ) from error
    for each in _ALL:
        each.compile(wanted)


def compiled_names() -> list[str]:
    """Of the functions that were called since the compiler was asked for."""
    return sorted(each.name for each in _ALL if each.called)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
