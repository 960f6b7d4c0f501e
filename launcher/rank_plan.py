"""What one rank of a planned run holds in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phalanx.launcher.schema import EngineSection
from phalanx.models.config import DecoderConfig
from phalanx.models.params import kv_bytes_per_token, rank_params
from phalanx.models.quantization import scheme_of
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.layout import Layout, RankPlace

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_CUDA_CONTEXT_BYTES = 2**30  # context, kernels and communicator buffers of one process; about 0.6 to 1 GB on an H100


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds. kv_bytes: its pages, by estimate where it is to measure, 0 where nothing is known of them.
    weight_bytes: in the run's dtype, which is from above where a CPU's products hold them in 12 bits (`PackedWeight`);
    of quantised matrices integers and scales. cut_bytes: of these, what they take because cuts fall into groups: scales
    that several ranks hold, or one rank several times, and room between inputs whose groups are scattered.
    narrow_bytes_per_token: as kv_bytes_per_token, with `engine.kv_cache_dtype: int8`.
    work_bytes: an estimate, from above, of what a step's activations and logits take, and on a GPU a process by itself.
    All in bytes but `parameters`.
    """

    place: RankPlace
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    narrow_bytes_per_token: int
    work_bytes: int
    kv_bytes: int = 0
    cut_bytes: int = 0

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
    entries: Mapping[str, TensorEntry] | None = None,
) -> RankPlan:
    """What the rank at `place` holds beside its pages. entries: of the checkpoint, as far as they are known."""
    params = rank_params(model, layout, place)
    weight_bytes = cut_bytes = 0
    for param in params:
        scheme = scheme_of(quantization, param, entries or {}, model)
        if scheme is None:
            weight_bytes += param.num_elements * DTYPE_BYTES[dtype]
        else:
            held = scheme.held_bytes(param)
            weight_bytes += held
            if param.slices[0].shape[1] < param.slices[0].width:
                cut_bytes += held - scheme.share_bytes(param)
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
    elif stage.head:
        work += engine.max_sequences * stage.head[part].size * DTYPE_BYTES[dtype] * 2
    if device == "cuda":
        work += _CUDA_CONTEXT_BYTES
    return RankPlan(
        place=place,
        parameters=sum(param.num_elements for param in params),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes_per_token(model, layout, place, DTYPE_BYTES[dtype], engine.kv_cache_dtype),
        narrow_bytes_per_token=kv_bytes_per_token(model, layout, place, DTYPE_BYTES[dtype], "int8"),
        work_bytes=work,
        cut_bytes=cut_bytes,
    )
