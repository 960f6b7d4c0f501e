"""Writes a model in the forms that peers read, with the same weights in each, and prints where it is.

    python benchmarks/peers/export_model.py {huggingface,gguf} [--model smollm2-135m] [--dtype bfloat16]

The built-in file of smollm2-135m is quantised (Q4_1, its embedding Q8_0). Either form holds its dequantised values,
rounded once to the dtype: a Hugging Face directory written by transformers, or a GGUF file with the original's
metadata, whose matrices may be blocks of Q8_0 too; as Q4_1 it is the built-in file itself. The models of
SYNTHETIC have random weights, for there is no such model on every machine, and the tokenizer of the built-in one; they
are made by transformers, and their GGUF file is made of that. All are kept beside the original.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phalanx.models.resolve import resolve_model

MODEL = "smollm2-135m"
SYNTHETIC: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    }
}
MODELS = (MODEL, *SYNTHETIC)
_GGUF_TYPES = {"bfloat16": "BF16", "float32": "F32"}
QUANTISED = ("Q8_0", "Q4_1")  # of the built-in model alone


def export_huggingface(source: Path, target: Path, dtype: str) -> None:
    """Weights, configuration and tokenizer, as `from_pretrained` and vLLM read them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def export_gguf(source: Path, target: Path, dtype: str) -> None:
    """Matrices in `dtype`, or in blocks of that name; vectors in float32 as llama.cpp wants them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields[Keys.General.ARCHITECTURE].contents())
    matrices = _GGUF_TYPES.get(dtype, dtype)
    writer.add_file_type(LlamaFileType.ALL_F32 if matrices == "F32" else LlamaFileType[f"MOSTLY_{matrices}"])
    written = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    for name, field in reader.fields.items():
        if name not in written:
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        kind = GGMLQuantizationType[matrices if len(tensor.shape) > 1 else "F32"]
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_synthetic(source: Path, target: Path, dtype: str, name: str) -> None:
    """A directory as `export_huggingface` writes it; vocabulary and tokenizer are those of `source`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=8192, **SYNTHETIC[name])
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(target)
    tokenizer.save_pretrained(target)


def synthetic_gguf(source: Path, made: Path, target: Path, dtype: str) -> None:
    """The directory `made` as GGUF: the metadata of `source`, with the sizes of the model."""
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quantize
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(made, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(target, arch="llama")
    for name, field in GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    writer.add_name(made.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        tensor = weight
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:  # llama.cpp turns neighbours against each other, transformers halves
            rows = weight.view(heads, 2, -1, weight.shape[1])
            tensor = rows.transpose(1, 2).reshape(weight.shape)
        kind = GGMLQuantizationType[_GGUF_TYPES[dtype] if tensor.dim() > 1 else "F32"]
        written = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(written, quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SUFFIXES: Mapping[str, str] = {"huggingface": "", "gguf": ".gguf"}


def exported(form: str, dtype: str, model: str = MODEL) -> Path:
    """Where the model lies in this form and dtype, written first where it does not.

    Raises ValueError for QUANTISED in another form, or of another model, than there is.
    """
    if dtype in QUANTISED and (form, model) != ("gguf", MODEL):
        raise ValueError(f"{model} cannot be written as {form} in {dtype}; only {MODEL} as gguf can")
    source = Path(resolve_model(MODEL).location)
    if dtype == "Q4_1":
        return source
    name = f"exported-{dtype}" if model == MODEL else f"{model}-{dtype}"
    target = source.parent / f"{name}{SUFFIXES[form]}"
    if target.exists():
        return target
    write: Callable[[Path], None]
    if model == MODEL:
        export = {"huggingface": export_huggingface, "gguf": export_gguf}[form]
        write = lambda path: export(source, path, dtype)  # noqa: E731
    elif form == "huggingface":
        write = lambda path: make_synthetic(source, path, dtype, model)  # noqa: E731
    else:
        made = exported("huggingface", dtype, model)
        write = lambda path: synthetic_gguf(source, made, path, dtype)  # noqa: E731
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=".export-") as scratch:
        write(Path(scratch) / target.name)
        (Path(scratch) / target.name).replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=SUFFIXES)
    parser.add_argument("--model", choices=MODELS, default=MODEL)
    parser.add_argument("--dtype", choices=(*_GGUF_TYPES, *QUANTISED), default="bfloat16")
    arguments = parser.parse_args()
    try:
        print(exported(arguments.form, arguments.dtype, arguments.model))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
