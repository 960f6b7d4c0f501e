"""Where the tensors of a GGUF file lie, under their canonical names."""

from __future__ import annotations

import re

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig
from phalanx.models.encodings import ENCODINGS
from phalanx.models.families import FAMILIES, expected_tensors
from phalanx.models.gguf_config import ROPE_FACTORS, gguf_encoding
from phalanx.models.gguf_file import GgufFile
from phalanx.models.inventory import check_inventory
from phalanx.models.tensor_entry import TensorEntry

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_entries(file: GgufFile, config: DecoderConfig) -> dict[str, TensorEntry]:
    """Every tensor that `config` needs, by canonical name.

    The factors of Llama 3.1's rotary scaling are left out: `gguf_config` has turned them into `config.rope`.
    Raises ModelError, naming file and tensor, for one that is missing, misshapen, unexpected, of an unsupported type,
    or cut off by the end of the file.
    """
    interleaved = next(family.gguf_interleaved for family in FAMILIES if family.name == config.family)
    expected = expected_tensors(config)
    entries: dict[str, TensorEntry] = {}
    for stored, tensor in file.tensors.items():
        if stored == ROPE_FACTORS:
            continue
        name = gguf_tensor_name(stored)
        if name is None or name not in expected:
            raise ModelError(f"{file.path}: unexpected tensor {stored}: a {config.family} model has none of this name")
        encoding = gguf_encoding(file, stored)
        block_values = ENCODINGS[encoding].block_values
        if not tensor.shape or tensor.shape[-1] % block_values:
            raise ModelError(
                f"{file.path}: tensor {stored} has rows of {tensor.shape[-1:]} values, not whole {encoding} blocks of"
                f" {block_values}"
            )
        rotated = interleaved and re.search(r"\.self_attn\.[qk]_proj\.", name)
        entries[name] = TensorEntry(
            file=str(file.path),
            offset=tensor.offset,
            num_bytes=ENCODINGS[encoding].num_bytes(tensor.shape),
            shape=tensor.shape,
            encoding=encoding,
            interleaved_head_dim=config.shape.head_dim if rotated else 0,
        )
    check_inventory(entries, expected, str(file.path))
    return entries


def gguf_tensor_name(name: str) -> str | None:
    """The canonical name of a tensor of a GGUF file, or None for one that is not known."""
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    part = _LAYER_NAMES.get(match[2]) if match else None
    return f"model.layers.{int(match[1])}.{part}.{match[3]}" if match and part else None
