"""Reading slices of tensors: their values, the bytes that it costs, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phalanx.errors import ModelError
from phalanx.models.checkpoint import DTYPES, Checkpoint
from phalanx.models.config import DecoderConfig
from phalanx.models.encodings import ENCODINGS
from phalanx.models.gguf_file import read_gguf
from phalanx.models.gguf_index import gguf_entries
from phalanx.models.safetensors_index import safetensors_entries
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.split import Interval, Split

QUANTISED = [name for name in ENCODINGS if name not in DTYPES]

# Where the half-precision scales lie in a block: gguf quantises all but the K types, whose blocks are made of random
# bytes.
SCALE_BYTES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(encoding: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    kind = gguf.GGMLQuantizationType[encoding]
    rng = np.random.default_rng(5)
    if encoding not in SCALE_BYTES:
        blocks: np.ndarray[Any, Any] = gguf.quants.quantize(
            rng.standard_normal((rows, columns), dtype=np.float32), kind
        )
        return blocks
    values, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for offset in SCALE_BYTES[encoding]:
        scales = rng.uniform(0.01, 1.0, raw.shape[:2]).astype(np.float16)
        raw[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def blocks_checkpoint(path: Path, encoding: str, rows: int, columns: int) -> tuple[Checkpoint, np.ndarray[Any, Any]]:
    """A file of blocks after 7 bytes of something else, and gguf's values of all of them."""
    blocks = random_blocks(encoding, rows, columns)
    path.write_bytes(b"\xff" * 7 + blocks.tobytes())
    whole = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[encoding])
    entry = TensorEntry(str(path), 7, blocks.nbytes, (rows, columns), encoding)
    return Checkpoint({"w": entry}), whole


def test_block_sizes_are_ggufs() -> None:
    for name, encoding in ENCODINGS.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (encoding.block_values, encoding.block_bytes) == sizes


@pytest.mark.parametrize("encoding", QUANTISED)
def test_quantised_slices_equal_ggufs_values_of_the_whole(tmp_path: Path, encoding: str) -> None:
    checkpoint, whole = blocks_checkpoint(tmp_path / "w", encoding, 6, 1024)
    with checkpoint:
        assert np.isfinite(whole).all()
        np.testing.assert_array_equal(checkpoint.read("w").numpy(), whole)
        part = checkpoint.read("w", Interval(1, 5), Interval(300, 777))
        assert part.dtype is torch.float32
        np.testing.assert_array_equal(part.numpy(), whole[1:5, 300:777])


@pytest.mark.parametrize("encoding", QUANTISED)
def test_quantised_columns_read_only_the_blocks_that_cover_them(tmp_path: Path, encoding: str) -> None:
    checkpoint, _ = blocks_checkpoint(tmp_path / "w", encoding, 6, 1024)
    values, size = ENCODINGS[encoding].block_values, ENCODINGS[encoding].block_bytes
    with checkpoint:
        checkpoint.read("w", Interval(1, 5), Interval(values - 1, values + 1))  # over one border: two blocks a row
        assert checkpoint.bytes_read == 4 * 2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_float_slices_keep_dtype_and_values_and_read_their_own_bytes(
    tmp_path: Path, dtype: torch.dtype, data: st.DataObject
) -> None:
    def interval(size: int) -> Interval:
        start = data.draw(st.integers(0, size - 1))
        return Interval(start, data.draw(st.integers(start + 1, size)))

    whole = torch.randn(9, 33).to(dtype)
    path = tmp_path / "w"
    path.write_bytes(b"x" + whole.view(torch.uint8).numpy().tobytes())
    name = next(name for name, stored in DTYPES.items() if stored is dtype)
    rows, columns = interval(9), interval(33)
    with Checkpoint({"w": TensorEntry(str(path), 1, whole.nbytes, (9, 33), name)}) as checkpoint:
        part = checkpoint.read("w", rows, columns)
        assert part.dtype is dtype
        assert part.is_contiguous()
        assert torch.equal(part, whole[rows.slice, columns.slice])
        assert checkpoint.bytes_read == part.nbytes


def test_a_dtype_can_be_asked_for(tmp_path: Path) -> None:
    checkpoint, whole = blocks_checkpoint(tmp_path / "w", "Q8_0", 8, 64)
    with checkpoint:
        assert torch.equal(checkpoint.read("w", dtype=torch.bfloat16), torch.from_numpy(whole).bfloat16())


def test_a_matrix_larger_than_a_chunk_is_whole(tmp_path: Path) -> None:
    checkpoint, whole = blocks_checkpoint(tmp_path / "w", "Q4_0", 700, 1024)
    with checkpoint:
        np.testing.assert_array_equal(checkpoint.read("w", Interval(3, 699)).numpy(), whole[3:699])


def test_vectors_are_sliced_by_rows(tmp_path: Path) -> None:
    whole = torch.arange(10, dtype=torch.float32)
    (tmp_path / "b").write_bytes(whole.numpy().tobytes())
    with Checkpoint({"b": TensorEntry(str(tmp_path / "b"), 0, 40, (10,), "F32")}) as checkpoint:
        assert torch.equal(checkpoint.read("b", Interval(2, 5)), whole[2:5])
        assert checkpoint.bytes_read == 12


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
def test_each_of_four_ranks_reads_about_a_quarter(
    source: str,
    tiny: DecoderConfig,
    tiny_directory: Path,
    write_gguf: Callable[..., Path],
    tiny_gguf_metadata: dict[str, Any],
    tiny_gguf_tensors: dict[str, Any],
) -> None:
    if source == "gguf":
        entries = gguf_entries(read_gguf(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors, "Q4_1")), tiny)
    else:
        entries = safetensors_entries(tiny_directory, tiny)
    total = sum(entry.num_bytes for entry in entries.values())
    heads = Split.even(tiny.shape.num_query_heads, 4)
    queries, keys = heads.scaled(tiny.shape.head_dim), heads.covering(2).scaled(tiny.shape.head_dim)
    ffn, vocab = Split.even(tiny.shape.ffn_size, 4), Split.even(tiny.shape.vocab_size, 4)
    by_rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": ffn, "up_proj": ffn}
    by_rows |= {"embed_tokens": vocab, "lm_head": vocab}
    by_columns = {"o_proj": queries, "down_proj": ffn}
    read = []
    for rank in range(4):
        with Checkpoint(entries) as checkpoint:
            for name in entries:
                part = name.split(".")[-2]
                rows = by_rows[part][rank] if part in by_rows else None
                checkpoint.read(name, rows, by_columns[part][rank] if part in by_columns else None)
            read.append(checkpoint.bytes_read)
    norms = sum(entry.num_bytes for entry in entries.values() if len(entry.shape) == 1)
    assert sum(read) == total + 3 * norms  # every byte once, but for the norms, which each rank holds
    assert all(count / total == pytest.approx(0.25, abs=0.02) for count in read)


def test_threads_read_the_same_and_lose_no_count(tiny: DecoderConfig, tiny_directory: Path) -> None:
    entries = safetensors_entries(tiny_directory, tiny)
    names = list(entries) * 8
    with Checkpoint(entries) as checkpoint, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(checkpoint.read, names))
        assert checkpoint.bytes_read == 8 * sum(entry.num_bytes for entry in entries.values())
        assert all(torch.equal(value, checkpoint.read(name)) for name, value in zip(names, together, strict=True))


def test_interleaved_rows_are_put_back_by_heads(
    tiny: DecoderConfig,
    tiny_tensors: dict[str, torch.Tensor],
    write_gguf: Callable[..., Path],
    tiny_gguf_metadata: dict[str, Any],
    tiny_gguf_tensors: dict[str, Any],
) -> None:
    entries = gguf_entries(read_gguf(write_gguf(tiny_gguf_metadata, tiny_gguf_tensors)), tiny)
    name, head_dim = "model.layers.1.self_attn.q_proj.weight", tiny.shape.head_dim
    with Checkpoint(entries) as checkpoint:
        part = checkpoint.read(name, Interval(3, 7).scaled(head_dim))
        assert torch.equal(part, tiny_tensors[name][3 * head_dim : 7 * head_dim])
        with pytest.raises(IndexError, match="cuts a head"):
            checkpoint.read(name, Interval(1, 40))


def test_entries_travel_as_msgpack(tiny: DecoderConfig, tiny_directory: Path) -> None:
    entries = safetensors_entries(tiny_directory, tiny)
    entries["q"] = replace(next(iter(entries.values())), interleaved_head_dim=32)
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(entries), type=dict[str, TensorEntry])
    assert there == entries


def test_a_file_missing_on_this_machine_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.bin.*tensor w .*same path"):
        Checkpoint({"w": TensorEntry(str(tmp_path / "gone.bin"), 0, 4, (1,), "F32")}).read("w")


def test_a_file_cut_after_indexing_is_named(tmp_path: Path) -> None:
    checkpoint, _ = blocks_checkpoint(tmp_path / "w", "Q8_0", 8, 64)
    with (tmp_path / "w").open("r+b") as file:
        file.truncate(300)
    with checkpoint, pytest.raises(ModelError, match=r"truncated: tensor w .*file ends at 300"):
        checkpoint.read("w")


def test_a_tensor_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match="'nothing' is not in the checkpoint"):
        Checkpoint({}).read("nothing")


@pytest.mark.parametrize("rows", [Interval(0, 9), Interval(-1, 2), Interval(3, 3)])
def test_a_slice_outside_of_the_tensor_is_refused(tmp_path: Path, rows: Interval) -> None:
    checkpoint, _ = blocks_checkpoint(tmp_path / "w", "Q8_0", 8, 64)
    with checkpoint, pytest.raises(IndexError, match="dimension of 8"):
        checkpoint.read("w", rows)
