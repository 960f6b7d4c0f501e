"""`route`, `expert_ffn`: a mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) with gates (Shazeer 2020, arXiv
2002.05202), as Mixtral (Jiang et al. 2024, arXiv 2401.04088) and Qwen3 have it:

y = sum over the chosen experts e of weight_e * down_e (silu(gate_e x) * up_e x).

Shapes: T tokens, H hidden size, E experts, K of them chosen for a token, F columns of each expert on this rank.
"""

from __future__ import annotations

from typing import Literal

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.gated_mul import silu_mul
from phalanx.kernels.largest import top
from phalanx.kernels.linear import linear
from phalanx.kernels.packed import Weight
from phalanx.kernels.weight_on_gpu import numbers_of
from phalanx.kernels.widen import widen


class PackedExperts(tuple[Weight, ...]):
    """A matrix of each expert, packed or quantised: a step reads those of the chosen ones."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self)


Experts = torch.Tensor | PackedExperts
"""A matrix of each expert: [E, out, in], or packed ones."""


def route(
    logits_TE: torch.Tensor, num_chosen: int, *, score: Literal["softmax", "sigmoid"] = "softmax", renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts [T, K] int32, weights [T, K] float32): of each token the experts with the largest logits, best first, of
    equal ones the first, and what their outputs are multiplied by.

    score: what a weight is, of all E logits, calculated in float32. renormalise: whether the weights of a token are
    divided by their sum.
    """
    gpu = triton_gpu.operators_for(logits_TE)
    if gpu is not None:
        return gpu.route(logits_TE, num_chosen, score, renormalise)  # type: ignore[no-any-return]
    logits_TE = widen(logits_TE)
    largest_TK, experts_TK = top(logits_TE, num_chosen)
    if score == "sigmoid":
        weights_TK = largest_TK.sigmoid()
        if renormalise:
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    elif renormalise:
        weights_TK = largest_TK.softmax(1)
    else:
        weights_TK = (largest_TK - logits_TE.logsumexp(1, keepdim=True)).exp()
    return experts_TK.int(), weights_TK


def expert_ffn(
    x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: Experts, down: Experts
) -> torch.Tensor:
    """This rank's part of y, [T, H], of the dtype of x; the parts of all ranks add up to y.

    gate_up: [E, 2 F, H], the gates first. down: [E, H, F]. experts, weights: as `route` gives them, experts of a token
    all different. What an expert makes of a token is rounded to the dtype; the sum over K is in float32, and in an
    order that does not depend on other tokens.
    """
    gpu = triton_gpu.operators_for(x_TH)
    if gpu is not None and isinstance(gate_up, torch.Tensor):
        return gpu.expert_ffn(x_TH, experts_TK, weights_TK, gate_up, down)  # type: ignore[no-any-return]
    if gpu is not None and isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
        numbers = numbers_of(gate_up), numbers_of(down)
        if numbers[0] is not None and numbers[1] is not None:
            return gpu.expert_ffn_quantised(x_TH, experts_TK, weights_TK, *numbers[0], *numbers[1])  # type: ignore[no-any-return]
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    token, weight = order // experts_TK.shape[1], weights_TK.flatten()[order].unsqueeze(1)
    counts = flat.bincount(minlength=len(gate_up)).tolist()
    used = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in used]
    # All products first, one behind the other: with sums between them a decode step took a tenth longer.
    ys = [
        linear(silu_mul(linear(rows, gate_up[expert])), down[expert])
        for expert, rows in zip(used, torch.split(x_TH[token], sizes), strict=True)
    ]
    total_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for y, rows, scale in zip(ys, torch.split(token, sizes), torch.split(weight, sizes), strict=True):
        total_TH.index_add_(0, rows, widen(y) * scale)
    return total_TH.to(x_TH.dtype)
