"""GGUF files: header, configuration and tensors, against gguf's reader and transformers' loading."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from phalanx.errors import ModelError
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.families import expected_tensors
from phalanx.models.gguf_config import gguf_decoder_config
from phalanx.models.gguf_file import GgufArray, read_gguf
from phalanx.models.gguf_index import gguf_entries
from phalanx.models.hf_config import decoder_config
from phalanx.models.resolve import ModelSource

Write = Callable[..., Path]
Metadata = dict[str, Any]
Arrays = dict[str, Any]


def test_the_header_is_what_ggufs_own_reader_sees(write_gguf: Write, tiny_gguf_tensors: Arrays) -> None:
    metadata = {
        "a.text": "grüße",
        "a.flag": True,
        "a.int": 7,
        "a.float": 0.5,
        "a.words": ["x", "", "Ġü"],
        "a.numbers": [1, 2, 3],
        "a.scores": [0.5, -1.0],
        "general.alignment": 64,
    }
    path = write_gguf(metadata, tiny_gguf_tensors, "Q8_0")
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for key, value in ours.metadata.items():
        expected = theirs.fields[key].contents()
        assert (value.tolist() if isinstance(value, GgufArray) else value) == expected
    assert set(ours.metadata) | {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == set(theirs.fields)
    found = {tensor.name: tensor for tensor in theirs.tensors}
    assert list(ours.tensors) == list(found)
    for name, tensor in ours.tensors.items():
        assert tensor.offset == found[name].data_offset
        assert tensor.shape == tuple(reversed([int(size) for size in found[name].shape]))
        assert tensor.type_id == found[name].tensor_type


def test_a_header_cut_anywhere_is_an_error_that_names_the_file(
    write_gguf: Write, tmp_path: Path, tiny_gguf_metadata: Metadata
) -> None:
    whole = write_gguf({**tiny_gguf_metadata, "a.words": ["x", "y"]}, {"t": np.zeros((1, 4))}).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, read_gguf(tmp_path / "model.gguf").tensors["t"].offset - 32, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf: (truncated|not a GGUF file|cannot be read)"):
            read_gguf(cut)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\3\4" + b"\0" * 40, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1; supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian; supported"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "more than .* damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99), "k has the unknown type 99"),
    ],
)
def test_what_is_no_supported_gguf_file_is_refused(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(head)
    with pytest.raises(ModelError, match=rf"w\.gguf.*{message}"):
        read_gguf(path)


def test_the_configuration_is_what_transformers_reads(
    write_gguf: Write, tiny: DecoderConfig, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    path = write_gguf(tiny_gguf_metadata | {"tokenizer.ggml.eos_token_id": 9}, tiny_gguf_tensors)
    theirs = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    expected = decoder_config(json.loads(theirs.to_json_string()) | {"architectures": ["LlamaForCausalLM"]})
    ours = gguf_decoder_config(read_gguf(path))
    assert (ours.shape, ours.rope, ours.max_position) == (expected.shape, expected.rope, expected.max_position)
    assert (ours.norm_eps, ours.tie_embeddings) == (expected.norm_eps, expected.tie_embeddings)
    assert ours.sliding_window is None


def test_the_builtin_models_configuration_is_the_published_one(smollm2: ModelSource) -> None:
    """HuggingFaceTB/SmolLM2-135M-Instruct, config.json."""
    published = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }
    expected = decoder_config(published)
    assert smollm2.config.norm_eps == pytest.approx(1e-5)
    assert replace(smollm2.config, norm_eps=1e-5) == expected


def test_tensors_equal_those_that_transformers_loads(
    write_gguf: Write, tiny: DecoderConfig, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    path = write_gguf(tiny_gguf_metadata, tiny_gguf_tensors, "Q8_0")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = model.state_dict()
    file = read_gguf(path)
    with Checkpoint(gguf_entries(file, gguf_decoder_config(file))) as checkpoint:
        assert set(checkpoint.entries) == set(state)
        for name, tensor in state.items():
            torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


def test_query_and_key_rows_come_back_as_the_converter_found_them(
    write_gguf: Write, tiny: DecoderConfig, tiny_tensors: dict[str, torch.Tensor], tiny_gguf_metadata: Metadata,
    tiny_gguf_tensors: Arrays,
) -> None:  # fmt: skip
    file = read_gguf(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors))
    with Checkpoint(gguf_entries(file, gguf_decoder_config(file))) as checkpoint:
        for name, tensor in tiny_tensors.items():
            assert torch.equal(checkpoint.read(name), tensor), name


def test_qwen_files_carry_rows_in_order_with_biases_and_norms(write_gguf: Write, tiny: DecoderConfig) -> None:
    for arch, config in (
        ("qwen2", replace(tiny, family="qwen2", qkv_bias=True, tie_embeddings=True)),
        ("qwen3", replace(tiny, family="qwen3", qk_norm=True)),
    ):
        tensors = {name: torch.randn(shape) for name, shape in expected_tensors(config).items()}
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], tiny.shape.num_layers)
        stored = {names.get_name(name, try_suffixes=(".weight", ".bias")): t.numpy() for name, t in tensors.items()}
        sizes = {
            f"{arch}.{key}": value
            for key, value in {
                "block_count": 2,
                "context_length": 128,
                "embedding_length": 256,
                "feed_forward_length": 512,
                "attention.head_count": 8,
                "attention.head_count_kv": 4,
                "attention.key_length": 32,
                "attention.value_length": 32,
                "attention.layer_norm_rms_epsilon": 2.0**-16,
            }.items()
        }
        file = read_gguf(write_gguf(sizes, stored, "BF16", arch=arch, name=f"{arch}.gguf"))
        found = gguf_decoder_config(file)
        assert found == replace(config, norm_eps=2.0**-16, dtype="bfloat16")
        with Checkpoint(gguf_entries(file, found)) as checkpoint:
            for name, tensor in tensors.items():
                value = checkpoint.read(name)
                assert torch.equal(value, tensor.to(value.dtype)), name


@pytest.mark.parametrize(("encoding", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q4_0", "bfloat16")])
def test_the_data_type_is_that_of_most_matrices(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays, encoding: str, dtype: str
) -> None:
    file = read_gguf(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors, encoding))
    assert gguf_decoder_config(file).dtype == dtype


def test_every_end_token_the_file_names_is_one(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    ends = {"tokenizer.ggml.eos_token_id": 9, "tokenizer.ggml.eot_token_id": 8, "tokenizer.ggml.eom_token_id": 9}
    file = read_gguf(write_gguf(tiny_gguf_metadata | ends, tiny_gguf_tensors))
    assert gguf_decoder_config(file).eos_token_ids == (9, 8)


def llama3_factors(config: DecoderConfig, **changes: float) -> Any:
    """transformers' own frequencies with Llama 3.1's scaling, as divisors of the plain ones."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    shape = config.shape
    settings = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_query_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling, **changes},
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](settings, "cpu")
    plain = 5e5 ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(
    write_gguf: Write, tiny: DecoderConfig, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays, factor: float
) -> None:
    tensors = tiny_gguf_tensors | {"rope_freqs.weight": llama3_factors(tiny, factor=factor)}
    file = read_gguf(write_gguf(tiny_gguf_metadata | {"llama.rope.freq_base": 5e5}, tensors))
    config = gguf_decoder_config(file)
    assert config.rope.factor == pytest.approx(factor, rel=1e-6)
    assert replace(config.rope, factor=factor) == RopeConfig(5e5, "llama3", factor, 1.0, 4.0, 8192)
    assert "rope_freqs.weight" not in gguf_entries(file, config)


def test_factors_of_one_scale_nothing(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    file = read_gguf(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors | {"rope_freqs.weight": np.ones(16)}))
    assert gguf_decoder_config(file).rope == RopeConfig(10000.0)


def test_other_factors_are_refused(
    write_gguf: Write, tiny: DecoderConfig, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    tensors = tiny_gguf_tensors | {"rope_freqs.weight": llama3_factors(tiny, low_freq_factor=2.0)}
    file = read_gguf(write_gguf(tiny_gguf_metadata | {"llama.rope.freq_base": 5e5}, tensors))
    with pytest.raises(ModelError, match=r"tensor rope_freqs\.weight holds factors up to 8 that are not Llama 3\.1's"):
        gguf_decoder_config(file)


@pytest.mark.parametrize(
    "scaling", [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}]
)
def test_linear_scaling_is_read(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays, scaling: Metadata
) -> None:
    scaling = {f"llama.{key}": value for key, value in scaling.items()}
    file = read_gguf(write_gguf(tiny_gguf_metadata | scaling, tiny_gguf_tensors))
    assert gguf_decoder_config(file).rope == RopeConfig(10000.0, "linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; supported: none, linear"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count is 16; supported: 32, the width of a head"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; supported: 0"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5; supported: absent"),
        ({"llama.attention.head_count": [8, 8]}, "llama.attention.head_count .*supported: a whole number"),
        ({"split.count": 3}, "one of 3 parts of a split GGUF; join them"),
    ],
)
def test_what_would_change_the_results_is_refused_by_name(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays, changes: Metadata, message: str
) -> None:
    file = read_gguf(write_gguf(tiny_gguf_metadata | changes, tiny_gguf_tensors))
    with pytest.raises(ModelError, match=rf"model\.gguf: {message}"):
        gguf_decoder_config(file)


def test_an_unknown_architecture_is_refused(write_gguf: Write, tiny_gguf_tensors: Arrays) -> None:
    file = read_gguf(write_gguf({}, tiny_gguf_tensors, arch="gpt-oss"))
    with pytest.raises(ModelError, match=r"general.architecture is 'gpt-oss'; supported: llama, qwen2, qwen3"):
        gguf_decoder_config(file)


def broken(tensors: Arrays, change: str) -> Arrays:
    name = "blk.1.ffn_up.weight"
    match change:
        case "missing":
            return {key: value for key, value in tensors.items() if key != name}
        case "misshapen":
            return tensors | {name: np.zeros((512, 128))}
        case "unexpected":
            return tensors | {"blk.0.ffn_gate_inp.weight": np.zeros((8, 256))}
        case _:
            return tensors | {name: (np.zeros((512, 144), np.uint8), "IQ4_NL")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("misshapen", r"tensor model\.layers\.1\.mlp\.up_proj\.weight has shape \[512, 128\], .* \[512, 256\]"),
        ("unexpected", r"unexpected tensor blk\.0\.ffn_gate_inp\.weight"),
        ("encoding", r"tensor blk\.1\.ffn_up\.weight has ggml type 20, which is not supported; supported: F32"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays, change: str, message: str
) -> None:
    file = read_gguf(write_gguf(tiny_gguf_metadata, broken(tiny_gguf_tensors, change)))
    with pytest.raises(ModelError, match=rf"model\.gguf: {message}"):
        gguf_entries(file, gguf_decoder_config(file))


def test_a_truncated_file_is_named_with_the_tensor(
    write_gguf: Write, tiny_gguf_metadata: Metadata, tiny_gguf_tensors: Arrays
) -> None:
    path = write_gguf(tiny_gguf_metadata, tiny_gguf_tensors)
    last = read_gguf(path).tensors[list(tiny_gguf_tensors)[-1]]
    with path.open("r+b") as file:
        file.truncate(last.offset + 4)
    parsed = read_gguf(path)
    with pytest.raises(ModelError, match=r"model\.gguf: truncated: tensor lm_head\.weight ends at byte"):
        gguf_entries(parsed, gguf_decoder_config(parsed))


def test_a_tensor_twice_in_one_file_is_named(tmp_path: Path) -> None:
    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    info = text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 0)
    path = tmp_path / "w.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + info + info + b"\0" * 64)
    with pytest.raises(ModelError, match=r"w\.gguf: tensor w appears twice"):
        read_gguf(path)
