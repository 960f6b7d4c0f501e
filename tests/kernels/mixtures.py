"""Mixtures of experts to be computed, and what is to come out, by the formulas in float64."""

from __future__ import annotations

from functools import cached_property

import torch


def routed(logits: torch.Tensor, chosen: int, score: str, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts int64, weights float64), [T, K]: best first, of equals the first."""
    exact = logits.double()
    scores = exact.exp() / exact.exp().sum(1, keepdim=True) if score == "softmax" else 1 / (1 + (-exact).exp())
    experts = exact.sort(dim=1, descending=True, stable=True).indices[:, :chosen]
    weights = scores.gather(1, experts)
    return experts, weights / weights.sum(1, keepdim=True) if renormalise else weights


class Mixture:
    """Inputs of `expert_ffn`, rows of x with gaps between them, and its result in float64. With one expert more than
    is chosen, at least, some have no tokens.
    """

    def __init__(
        self,
        tokens: int,
        hidden: int,
        columns: int,
        experts: int,
        chosen: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.x = torch.randn(tokens, hidden + 8, device=device).to(dtype)[:, :hidden]
        self.gate_up = (torch.randn(experts, 2 * columns, hidden, device=device) * (2 / hidden) ** 0.5).to(dtype)
        self.down = (torch.randn(experts, hidden, columns, device=device) / columns**0.5).to(dtype)
        logits = torch.randn(tokens, experts, device=device)
        logits[:, experts // 2] += 3  # many rows for one expert
        chosen_experts, self._weights = routed(logits, chosen, "softmax", True)
        self.experts, self.weights = chosen_experts.int(), self._weights.float()

    @cached_property
    def exact(self) -> torch.Tensor:
        """By the weights that it has when it is first asked for."""
        exact = torch.zeros(self.x.shape, dtype=torch.float64, device=self.x.device)
        x = self.x.double()
        for token, experts in enumerate(self.experts.tolist()):
            for expert, weight in zip(experts, self._weights[token], strict=True):
                gate, up = (self.gate_up[expert].double() @ x[token]).chunk(2)
                exact[token] += weight * (self.down[expert].double() @ (gate / (1 + (-gate).exp()) * up))
        return exact
