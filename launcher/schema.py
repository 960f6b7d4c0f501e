"""The typed schema of a configuration: the only source of settings. `config.load_config` reads it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from phalanx.launcher.sizes import ALLOWED_SIZE, parse_size
from phalanx.parallel.layout import StageRequest

RAY_MODES = ("none", "local", "auto")


def _size(value: object) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", "not a size in bytes") from error


SizeBytes = Annotated[int, BeforeValidator(_size)]
_SIZE_FIELD: dict[str, Any] = {"allowed": ALLOWED_SIZE}


def _auto_or_size(value: object) -> object:
    return value if value == "auto" else _size(value)


AutoOrSizeBytes = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_size)]


class Section(BaseModel):
    """A section of the file. Unknown keys are refused; values keep the type that YAML gave them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and how it is held. `model: NAME` is short for `model: {path: NAME}`."""

    path: str = Field(
        min_length=1,
        description="Built-in name (smollm2-135m), local Hugging Face directory, .gguf file, shape:NAME (dimensions "
        "without weights, to check a layout) or hub id. A relative path is looked for beside the file first.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of weights, activations and, but for `engine.kv_cache_dtype`, the KV cache. auto: "
        "on GPUs float16 where the checkpoint is stored so, else bfloat16; on CPUs bfloat16 where they have "
        "instructions for it, else float32.",
    )
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit of a hub id.")
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of a sequence, prompt and output. null: what the model and the KV cache allow.",
    )
    quantization: Literal["auto", "none", "stored", "int8", "int4", "w8a8", "w4a8", "fp8"] = Field(
        default="auto",
        description="Of the matrices of products, head included. none: in model.dtype, dequantised where they are "
        "stored otherwise. stored: as the checkpoint has them: AWQ, GPTQ, FP8 and compressed-tensors by its "
        "config.json, of a GGUF file Q8_0, Q4_0 and Q4_1, the others in model.dtype. Quantised while they are loaded: "
        "int8: in 8 bits with a scale an output; int4: layers in 4 bits with a scale and an offset for 32 inputs, the "
        "head in 8; w8a8 and w4a8: the same, and activations of layers in 8 bits, too, with a scale for 64 inputs of a "
        "token on CPUs (32 with int4), for all on GPUs (with int4 as they are); fp8: E4M3 with a scale an output, the "
        "head in int8, activations of layers too on GPUs with units for it. auto: stored where config.json has a "
        "quantization_config, else none.",
    )


class ClusterSection(Section):
    """Where the ranks run and what each takes."""

    ray: str = Field(
        default="local",
        description="none: plain processes on this machine; local: a Ray of our own on this machine; auto: the Ray "
        "cluster that this machine belongs to; host:port: the Ray cluster with that head.",
        json_schema_extra={"allowed": "none, local, auto or host:port"},
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where this machine has a GPU, else cpu."
    )
    device_memory: SizeBytes | None = Field(
        default=None,
        description="Memory of one GPU, or what a rank on a CPU may use: `phalanx check` proves that what each rank "
        "holds fits. null: what this machine has; not proved for a cluster elsewhere.",
        json_schema_extra=_SIZE_FIELD,
    )
    cpus_per_rank: float | None = Field(
        default=None,
        gt=0,
        description="CPU cores that a rank takes, below 1 to share one; it computes with as many threads, at least one."
        " null: on this machine its cores dealt evenly over the ranks, on a cluster elsewhere 1.",
    )
    pin_cores: bool = Field(
        default=True,
        description="Whether ranks that share a machine's CPUs keep to cores of their own, which no other run's are.",
    )
    gpus_per_rank: float | None = Field(
        default=None,
        ge=0,
        description="GPUs that a rank takes: 1, below 1 to share one, or 0 on CPUs. null: 1 for cuda, less where this "
        "machine has fewer GPUs than ranks.",
        json_schema_extra={"allowed": "a number from 0 to 1"},
    )
    interface: str | None = Field(
        default=None,
        min_length=1,
        description="Network interface between ranks, such as eth0. null: the route to the first rank.",
    )
    spread_stage: bool = Field(
        default=False, description="Whether the ranks of one stage may be placed on several nodes."
    )
    start_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds all ranks have to be placed, loaded and ready."
    )

    @field_validator("ray")
    @classmethod
    def _ray_is_known(cls, value: str) -> str:
        host, colon, port = value.rpartition(":")
        is_address = bool(
            colon and re.fullmatch(r"[A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+\]", host) and port.isascii() and port.isdecimal()
        )
        if value not in RAY_MODES and not (is_address and 0 < int(port[:6]) < 2**16):
            raise PydanticCustomError("choice", "not a Ray cluster", {"choices": list(RAY_MODES)})
        return value

    @field_validator("gpus_per_rank")
    @classmethod
    def _one_gpu_at_most(cls, value: float | None) -> float | None:
        if value is not None and value > 1:
            raise PydanticCustomError("gpus_per_rank", "a rank runs on one GPU; more of them are more ranks")
        return value

    @property
    def elsewhere(self) -> bool:
        """Whether the ranks run on a cluster that this machine cannot speak for."""
        return self.ray not in ("none", "local")


class StageSection(Section):
    """One stage of the pipeline."""

    layers: int | None = Field(
        default=None, ge=1, description="Decoder layers. null: dealt so that the slowest stage is fastest."
    )
    tensor: int = Field(default=1, ge=1, le=1024, description="Tensor-parallel ranks.")
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="A rank's share of every layer in proportion to the others', one number a rank. null: even.",
        json_schema_extra={"allowed": "a list of numbers above 0, one a rank"},
    )
    node: str | None = Field(
        default=None, min_length=1, description="Ray node for its ranks: address, host name or label (key=value)."
    )
    accelerator: str | None = Field(
        default=None, min_length=1, description="Type of accelerator its ranks need, as Ray names it, such as H100."
    )


class ParallelSection(Section):
    """How the model is cut: `tensor` ranks a stage and `pipeline` stages, or `stages` one by one; and `replicas`."""

    tensor: int = Field(default=1, ge=1, le=1024, description="Tensor-parallel ranks of every stage.")
    pipeline: int = Field(default=1, ge=1, le=1024, description="Pipeline stages.")
    replicas: int = Field(
        default=1, ge=1, le=1024, description="Copies of the whole, each serving requests of its own."
    )
    head: Literal["auto", "last", "shared"] = Field(
        default="auto",
        description="Who multiplies by the language-model head, and holds it. last: the last stage. shared: the first "
        "stage and the last, each by a part of the vocabulary; with tied embeddings the first holds it in any case. "
        "auto: shared where that was measured to pay: in bfloat16 on one machine's CPUs, of a head that outweighs a "
        "tenth of a stage's layers.",
    )
    stages: tuple[StageSection, ...] | None = Field(
        default=None,
        strict=False,
        min_length=1,
        description="Stages one by one, in place of `tensor` and `pipeline`.",
        json_schema_extra={"allowed": "a list of stages, each with layers, tensor, weights, node, accelerator"},
    )

    def stage_requests(self) -> list[StageRequest]:
        """What is asked of each stage, in order."""
        if self.stages is None:
            return [StageRequest(num_ranks=self.tensor)] * self.pipeline
        return [
            StageRequest(stage.tensor, stage.layers, stage.weights, stage.node, stage.accelerator)
            for stage in self.stages
        ]

    @property
    def num_ranks(self) -> int:
        """Ranks of all replicas."""
        return self.replicas * sum(request.num_ranks for request in self.stage_requests())


class CommSection(Section):
    """How ranks reach each other."""

    backend: str = Field(
        default="auto", min_length=1, description="Communicator between the ranks of a stage; auto: the best at hand."
    )
    timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds an operation may wait for another rank. Between nodes of a Ray cluster a cut that lasts "
        "longer than Ray's own health checks allow, about a minute by default, ends the run in any case.",
    )
    overlap: Literal["auto", "none", "chunks", "parts", "sequence"] = Field(
        default="auto",
        description="Transfers behind compute. none: never. auto: between stages always, inside a stage the way that "
        "pays most by rates measured at the start and, on CPUs, seen since. By name, in all steps of 128 tokens and "
        "more: chunks: a product is cut, and summed behind the rest of it; parts: two parts of the tokens pass a block "
        "behind each other's sums; sequence: between reduce-scatter and all-gather each rank has its own part of the "
        "tokens.",
    )
    compress: Literal["none", "int8", "fp8"] = Field(
        default="none",
        description="How hidden states travel between stages on different machines: none: as they are; int8, fp8: a "
        "byte a value and a scale a token, for slow links; it changes results a little, fp8 less than int8.",
    )


class EngineSection(Section):
    """How requests are batched."""

    max_sequences: int = Field(default=64, ge=1, description="Most sequences running at once.")
    max_batch_tokens: int = Field(default=1024, ge=1, description="Most tokens computed in one step.")
    max_waiting: int | None = Field(
        default=None,
        ge=1,
        description="Most requests waiting to run, for each replica; those beyond are refused. null: without limit, "
        "but 1024 under `phalanx serve`.",
    )
    kv_cache: AutoOrSizeBytes = Field(
        default="auto",
        description="Memory for the KV cache, for each rank. auto: the same number of pages on every rank, as many as "
        "`kv_cache_share` of the free memory holds, and no more than `max_sequences` of the longest can use; on this "
        "machine's CPUs by what is free before the start, elsewhere and on GPUs measured once a rank is loaded and has "
        "run its largest steps.",
        json_schema_extra={"allowed": f"auto, or {ALLOWED_SIZE}"},
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        default="auto",
        description="Of the KV cache. auto: model.dtype. int8, fp8 (e4m3): a byte a number and, for each head of each "
        "token, a scale in 2 bytes, found when it is written: nearly twice as many tokens as in bfloat16. Both change "
        "results a little, int8 less.",
    )
    kv_cache_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share that `kv_cache: auto` takes of the memory that weights, work and graphs leave free. null: "
        "0.9 on GPUs; 0.3 on CPUs, whose memory other programs and the cache of files need too.",
    )
    page_size: int | None = Field(
        default=None, ge=4, le=1024, description="Tokens in a page of the KV cache. null: 16 on CPUs, 64 on GPUs."
    )
    prefix_cache: bool = Field(
        default=True, description="Whether requests that begin alike share the pages of what they have in common."
    )
    cuda_graphs: bool = Field(
        default=True,
        description="Whether GPUs run steps of one token a sequence as CUDA graphs: without the gaps between kernels, "
        "for some memory; the start-up table says where they cannot.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Whether torch.compile takes what no operator of ours does on a rank's device, norms, gates and "
        "rotation where PyTorch's would serve; the start takes longer by what it says, and needs a compiler.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of requests that give none.",
        json_schema_extra={"allowed": "a whole number from 0 to 2**63 - 1"},
    )


class ServeSection(Section):
    """The HTTP front, of `phalanx serve`."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen at; 0.0.0.0 for all of this machine's."
    )
    port: int = Field(default=8000, ge=0, lt=2**16, description="Port to listen at; 0 for any that is free.")
    model_name: str | None = Field(
        default=None, min_length=1, description="What requests call the model. null: `model.path` as it is written."
    )
    api_keys: str | None = Field(
        default=None,
        min_length=1,
        description="File with the keys that requests must show, one a line; read again when it changes. A relative "
        "path starts from the YAML file. null: no key is asked for.",
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="File with a Jinja chat template in place of the model's own. A relative path starts from the YAML "
        "file.",
    )
    tool_format: Literal["auto", "hermes", "llama", "mistral", "pythonic", "none"] = Field(
        default="auto", description="How the model writes tool calls. auto: as its chat template shows it."
    )
    max_body: SizeBytes = Field(default=2**20, description="Largest body of a request.", json_schema_extra=_SIZE_FIELD)
    body_timeout_s: float = Field(default=30.0, gt=0, description="Seconds the body of a request may take to come.")
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds a request may take, waiting included; it ends with what there is."
    )
    stalled_client_s: float = Field(
        default=60.0, gt=0, description="Seconds a client may leave what it is sent unread; then it is cut off."
    )
    drain_timeout_s: float = Field(
        default=60.0, ge=0, description="Seconds that running requests have to finish once the server is told to stop."
    )
    access_log: bool = Field(default=True, description="Whether to log a line of JSON for each request.")
    traces: str | None = Field(
        default=None,
        min_length=1,
        description="OTLP/HTTP endpoint for OpenTelemetry traces, such as http://collector:4318/v1/traces.",
    )


class Config(Section):
    """A whole configuration, valid in itself. Whether a model can be cut so is `check`'s to say."""

    model: ModelSection = Field(description="Which model, and how it is held.")
    cluster: ClusterSection = Field(
        default_factory=ClusterSection, description="Where the ranks run and what each takes."
    )
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="How the model is cut over ranks.")
    comm: CommSection = Field(default_factory=CommSection, description="How ranks reach each other.")
    engine: EngineSection = Field(default_factory=EngineSection, description="How requests are batched.")
    serve: ServeSection = Field(default_factory=ServeSection, description="The HTTP front, of `phalanx serve`.")
