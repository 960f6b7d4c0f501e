"""Writes the built-in model in the forms that peers read, with the same weights in each, and prints where it is.

    python benchmarks/peers/export_model.py {huggingface,gguf} [--dtype bfloat16]

The built-in file is quantised (Q4_1). Either form holds its dequantised values, rounded once to the dtype: a Hugging
Face directory written by transformers, or a GGUF file with the original's metadata. Both are kept beside the original.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from phalanx.models.resolve import resolve_model

MODEL = "smollm2-135m"
_GGUF_TYPES = {"bfloat16": "BF16", "float32": "F32"}


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
    """Matrices in `dtype`, vectors in float32 as llama.cpp wants them."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, LlamaFileType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, arch=reader.fields[Keys.General.ARCHITECTURE].contents())
    file_type = LlamaFileType.ALL_F32 if dtype == "float32" else LlamaFileType.MOSTLY_BF16
    writer.add_file_type(file_type)
    written = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    for name, field in reader.fields.items():
        if name not in written:
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        kind = GGMLQuantizationType[_GGUF_TYPES[dtype] if len(tensor.shape) > 1 else "F32"]
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMS: Mapping[str, tuple[str, Callable[[Path, Path, str], None]]] = {
    "huggingface": ("", export_huggingface),
    "gguf": (".gguf", export_gguf),
}


def exported(form: str, dtype: str) -> Path:
    """Where the model lies in this form and dtype, written first where it does not."""
    source = Path(resolve_model(MODEL).location)
    suffix, export = FORMS[form]
    target = source.parent / f"exported-{dtype}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=source.parent, prefix=".export-") as scratch:
            export(source, Path(scratch) / target.name, dtype)
            (Path(scratch) / target.name).replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--dtype", choices=_GGUF_TYPES, default="bfloat16")
    arguments = parser.parse_args()
    print(exported(arguments.form, arguments.dtype))


if __name__ == "__main__":
    main()
