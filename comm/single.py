"""A group of one rank: every operation is checked and recorded like any other, and done at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.work import FINISHED, Work
from phalanx.errors import CommError
from phalanx.kernels import Recording, add_rms_norm


class SingleCommunicator(Communicator):
    """The communicator of a group of one; on any device. `send` and `recv` are refused: there is nobody else."""

    backend = "single"
    capturable = True

    def fused_all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is moved, so that nothing is recorded: a step of one rank has 60 of these."""
        return add_rms_norm(x, residual, weight, eps)

    def record_all_reduce(self, recording: Recording, x: torch.Tensor) -> None:
        pass

    def record_fused_all_reduce_rms_norm(
        self, recording: Recording, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        return FINISHED

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        output.copy_(x)
        return FINISHED

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        output.copy_(x)
        return FINISHED

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        return FINISHED

    def _start_send(self, x: torch.Tensor, to: int) -> Work:
        raise CommError(f"send to rank {to}: a group of one has no other rank")

    def _start_recv(self, x: torch.Tensor, source: int) -> Work:
        raise CommError(f"recv from rank {source}: a group of one has no other rank")

    def _start_barrier(self) -> Work:
        return FINISHED

    def _abort(self) -> None:
        """Nothing waits for anybody."""

    def _close(self) -> None:
        """Nothing is held."""
