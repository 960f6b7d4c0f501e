"""What one rank of a planned run holds in memory."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.launcher.schema import EngineSection
from phalanx.models.config import DecoderConfig
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.models.quantization import held_bytes, scheme_of
from phalanx.parallel.layout import Layout, RankPlace

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_CUDA_CONTEXT_BYTES = 2**30  # context, kernels and communicator buffers of one process; about 0.6 to 1 GB on an H100


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds. kv_bytes: its pages, by estimate where it is to measure, 0 where nothing is known of them.
    weight_bytes: in the run's dtype, which is from above where a CPU's products hold them in 12 bits (`PackedWeight`);
    of matrices that are quantised while they are loaded, integers and scales.
    work_bytes: an estimate, from above, of what a step's activations and logits take, and on a GPU a process by itself.
    All in bytes but `parameters`.
    """

    place: RankPlace
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    work_bytes: int
    kv_bytes: int = 0

    @property
    def base_bytes(self) -> int:
        """All but the pages."""
        return self.weight_bytes + self.work_bytes

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.kv_bytes


def plan_rank(
    engine: EngineSection,
    model: DecoderConfig,
    layout: Layout,
    place: RankPlace,
    dtype: str,
    device: str,
    quantization: str = "none",
) -> RankPlan:
    """What the rank at `place` holds beside its pages."""
    params = rank_params(model, layout, place)
    weight_bytes = sum(held_bytes(scheme_of(quantization, param, {}), param, DTYPE_BYTES[dtype]) for param in params)
    stage = layout.stages[place.stage]
    part, shape = place.tensor_rank, model.shape
    heads = stage.query_heads[part].size + 2 * stage.kv_heads[part].size
    # A token's residual stream, its normed copy and a partial sum (float32 at most), then the widest of projections and
    # gated feed-forward; the logits of a step in float32, with a copy to sample from.
    widest = max(heads * shape.head_dim * 2, 3 * stage.ffn[part].size)
    if shape.num_experts:  # for each of a token's experts what it is given, its columns and what it makes of them
        widest = max(widest, shape.experts_per_token * (stage.ffn[part].size + 2 * shape.hidden_size))
    work = engine.max_batch_tokens * (3 * 4 * shape.hidden_size + DTYPE_BYTES[dtype] * widest)
    if stage.last:
        work += engine.max_sequences * stage.vocab[part].size * 4 * 2
    if device == "cuda":
        work += _CUDA_CONTEXT_BYTES
    return RankPlan(
        place=place,
        parameters=sum(param.num_elements for param in params),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token(model, layout, place, DTYPE_BYTES[dtype]),
        work_bytes=work,
    )
