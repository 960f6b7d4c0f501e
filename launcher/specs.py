"""From a run plan to what the hosts and the ranks are told."""

from __future__ import annotations

from phalanx.engine.messages import CommSettings, KVMeasure, ProfileSettings, RankSpec
from phalanx.launcher.hosts import ClusterSettings
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.schema import Config
from phalanx.models.config import DecoderConfig
from phalanx.models.params import rank_params
from phalanx.models.tensor_entry import TensorEntry


def cluster_settings(config: Config, plan: RunPlan, *, apart: bool = False) -> ClusterSettings:
    """Where the ranks of a formation run and what each takes. apart: none of them in this process."""
    return ClusterSettings(
        ray=config.cluster.ray,
        device=plan.device,
        cpus_per_rank=plan.cpus_per_rank,
        gpus_per_rank=plan.gpus_per_rank,
        interface=config.cluster.interface,
        spread_stage=config.cluster.spread_stage,
        start_timeout_s=config.cluster.start_timeout_s,
        apart=apart,
        pin_cores=config.cluster.pin_cores,
    )


def rank_specs(
    config: Config,
    plan: RunPlan,
    model: DecoderConfig,
    entries: dict[str, TensorEntry] | None,
    replica: int,
    *,
    trace: bool = False,
    profile: ProfileSettings | None = None,
) -> list[RankSpec]:
    """A specification for each rank of a replica. Addresses and the secret are the formation's to fill in.

    A rank is told only where the tensors lie that it holds. entries: None for ranks that load nothing.
    trace, profile: see `RankSpec`.
    """
    pool = plan.kv_pool
    measure = None
    if pool.measured:
        assert pool.share is not None
        measure = KVMeasure(
            share=pool.share,
            device_part=plan.gpus_per_rank,
            limit_pages=pool.limit_pages,
            least_pages=pool.least_pages,
            copies=plan.layout.replicas,
        )
    specs = []
    for place in plan.layout.places(replica):
        held = {piece.tensor for param in rank_params(model, plan.layout, place) for piece in param.slices}
        specs.append(
            RankSpec(
                replica=replica,
                rank=place.rank,
                layout=plan.layout,
                config=model,
                entries={} if entries is None else {name: entries[name] for name in sorted(held)},
                dtype=plan.dtype,
                device=plan.device,
                num_threads=plan.num_threads,
                num_pages=plan.num_pages,
                page_size=plan.page_size,
                max_sequences=config.engine.max_sequences,
                max_batch_tokens=config.engine.max_batch_tokens,
                max_length=plan.max_length,
                comm=CommSettings(
                    store="",
                    backend=plan.backend,
                    interface=config.cluster.interface,
                    timeout_s=config.comm.timeout_s,
                    overlap=config.comm.overlap,
                    compress=config.comm.compress,
                ),
                engine="",
                secret="",
                measure=measure,
                trace=trace,
                cuda_graphs=config.engine.cuda_graphs,
                torch_compile=config.engine.torch_compile,
                profile=profile,
                quantization=plan.quantization,
                kv_cache_dtype=config.engine.kv_cache_dtype,
            )
        )
    return specs
