"""What must hold between the settings of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from phalanx.errors import Problem
from phalanx.launcher.config_errors import problem_at
from phalanx.launcher.schema import Config
from phalanx.launcher.yaml_document import KeyPath, YamlDocument


class _Breach(NamedTuple):
    """path: where to mend it. reads: other settings that the rule looked at."""

    path: KeyPath
    message: str
    reads: tuple[KeyPath, ...] = ()
    found: object = ...
    allowed: str | None = None
    suggestion: str | None = None


def broken_rules(
    config: Config, dropped: Sequence[KeyPath], document: YamlDocument, overridden: Sequence[KeyPath]
) -> list[Problem]:
    """Problems between settings. Rules that read a setting in `dropped`, where no valid value is known, say nothing."""
    return [
        problem_at(
            breach.path,
            breach.message,
            document,
            overridden,
            found=breach.found,
            allowed=breach.allowed,
            suggestion=breach.suggestion,
        )
        for breach in _breaches(config)
        if not any(path[: len(gone)] == gone for path in (breach.path, *breach.reads) for gone in dropped)
    ]


def _breaches(config: Config) -> Iterator[_Breach]:
    yield from _parallel_breaches(config)
    yield from _cluster_breaches(config)
    yield from _engine_breaches(config)


def _parallel_breaches(config: Config) -> Iterator[_Breach]:
    parallel = config.parallel
    if parallel.stages is None:
        return
    for key in ("tensor", "pipeline"):
        if key in parallel.model_fields_set:
            yield _Breach(
                ("parallel", key),
                "`stages` already says this for each stage",
                (("parallel", "stages"),),
                getattr(parallel, key),
                suggestion=f"remove `{key}`, or `stages`",
            )
    for index, stage in enumerate(parallel.stages):
        path: KeyPath = ("parallel", "stages", index)
        if stage.weights is not None and len(stage.weights) != stage.tensor:
            yield _Breach(
                (*path, "weights"),
                f"{len(stage.weights)} weights for {stage.tensor} rank" + ("s" if stage.tensor > 1 else ""),
                ((*path, "tensor"),),
                list(stage.weights),
                "one number a rank",
                f"set tensor: {len(stage.weights)} if that many ranks are meant"
                if "tensor" not in stage.model_fields_set
                else None,
            )
        if stage.node is not None and not config.cluster.elsewhere:
            yield _Breach(
                (*path, "node"),
                f"cluster.ray is {config.cluster.ray}: all ranks run on this machine",
                (("cluster", "ray"),),
                stage.node,
                suggestion="remove `node`, or set cluster.ray to auto or host:port",
            )
        if stage.accelerator is not None and config.cluster.ray == "none":
            yield _Breach(
                (*path, "accelerator"),
                "without Ray nothing can choose an accelerator",
                (("cluster", "ray"),),
                stage.accelerator,
                suggestion="remove `accelerator`, or use Ray",
            )


def _cluster_breaches(config: Config) -> Iterator[_Breach]:
    cluster = config.cluster
    gpus = cluster.gpus_per_rank
    reads: tuple[KeyPath, ...] = (("cluster", "device"),)
    if cluster.device == "cuda" and gpus == 0:
        message = "ranks on cuda take a part of a GPU"
        yield _Breach(
            ("cluster", "gpus_per_rank"), message, reads, gpus, "above 0, at most 1", "remove it for one GPU a rank"
        )
    if cluster.device == "cpu" and gpus:
        yield _Breach(
            ("cluster", "gpus_per_rank"),
            "ranks on the CPU take no GPU",
            reads,
            gpus,
            "0",
            "remove it, or set cluster.device: cuda",
        )


def _engine_breaches(config: Config) -> Iterator[_Breach]:
    engine = config.engine
    if engine.max_batch_tokens < engine.max_sequences:
        yield _Breach(
            ("engine", "max_batch_tokens"),
            "a step must have room for one token of every running sequence",
            (("engine", "max_sequences"),),
            engine.max_batch_tokens,
            f"at least engine.max_sequences, which is {engine.max_sequences}",
        )
    if engine.kv_cache_share is not None and engine.kv_cache != "auto":
        yield _Breach(
            ("engine", "kv_cache_share"),
            "engine.kv_cache states a size, which is no share of anything",
            (("engine", "kv_cache"),),
            engine.kv_cache_share,
            suggestion="remove `kv_cache_share`, or set engine.kv_cache: auto",
        )
