"""Tokenizers against transformers' own, and decoding token by token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from phalanx.errors import ModelError, RequestError
from phalanx.models.config import DecoderConfig
from phalanx.models.gguf_file import read_gguf
from phalanx.models.gguf_tokenizer import gguf_tokenizer
from phalanx.models.hf_tokenizer import hf_tokenizer
from phalanx.models.resolve import ModelSource
from phalanx.models.tokenizer import Tokenizer, byte_alphabet

Write = Callable[..., Path]

CORPUS = [
    "Hello, world!",
    "The capital of France is",
    "",
    " ",
    "  two spaces ahead, and behind  ",
    "tabs\tand\n\nnew\r\nlines \n ",
    "It's we'll I'd THEY'RE",
    "naïve café — “quotes” … ÀÉÎ",
    "e\u0301 decomposed, \ufb01 ligature",
    "日本語のテキストと中文、한국어도",
    "Привет, мир! שלום עולם مرحبا",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "2024 1,234.56 7 x1y22 ½ Ⅳ ²",
    "1  2   3",
    "def f(x: int) -> int:\n    return x ** 2  # π\n",
    "\u00a0no-break\u200bzero-width\ufeff",
    "{'json': [1, 2, null]}\\n</tag>",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
]


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: ModelSource) -> Tokenizer:
    return smollm2.tokenizer()


@pytest.fixture(scope="module")
def smollm2_reference(smollm2: ModelSource) -> Any:
    """transformers' reading of the same file, with SmolLM2's own cutting of text, which it has not by that name."""
    path = Path(smollm2.location)
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return reference


@pytest.mark.parametrize("text", CORPUS)
def test_the_builtin_models_tokens_are_those_of_transformers(
    smollm2_tokenizer: Tokenizer, smollm2_reference: Any, text: str
) -> None:
    ids = smollm2_reference.encode(text)
    assert smollm2_tokenizer.encode(text) == ids
    for skip in (True, False):
        assert smollm2_tokenizer.decode(ids, skip) == smollm2_reference.decode(ids, skip_special_tokens=skip)


def test_what_the_builtin_model_says_of_its_tokens(smollm2_tokenizer: Tokenizer, smollm2_reference: Any) -> None:
    assert smollm2_tokenizer.eos_token_ids == (smollm2_reference.eos_token_id,)
    assert smollm2_tokenizer.bos_token_id == smollm2_reference.bos_token_id
    assert smollm2_tokenizer.bos_token == smollm2_reference.bos_token
    assert smollm2_tokenizer.eos_token == smollm2_reference.eos_token
    assert smollm2_tokenizer.chat_template == smollm2_reference.chat_template
    assert smollm2_tokenizer.vocab_size == len(smollm2_reference)


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_tokens_decode_as_in_transformers_and_a_stream_gives_the_same(
    smollm2_tokenizer: Tokenizer, smollm2_reference: Any, ids: list[int], skip: bool
) -> None:
    whole = smollm2_tokenizer.decode(ids, skip)
    assert whole == smollm2_reference.decode(ids, skip_special_tokens=skip)
    stream = smollm2_tokenizer.stream(skip)
    assert "".join(stream.push(token) for token in ids) + stream.finish() == whole


def test_a_character_is_held_back_until_its_last_byte(smollm2_tokenizer: Tokenizer) -> None:
    ids = smollm2_tokenizer.encode("𓀀!")
    assert len(ids) > 2
    stream = smollm2_tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert pieces[:-2] == [""] * (len(ids) - 2)
    assert pieces[-2:] == ["𓀀", "!"]
    assert stream.finish() == ""


def test_a_character_that_never_ends_is_marked_at_the_end(smollm2_tokenizer: Tokenizer) -> None:
    stream = smollm2_tokenizer.stream()
    assert stream.push(smollm2_tokenizer.encode("𓀀")[0]) == ""
    assert stream.finish() == "\ufffd"


def test_ids_past_the_vocabulary_have_no_text(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.decode([49152, 60000]) == ""


def test_text_that_is_not_unicode_is_the_requests_fault(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"not valid Unicode.*character 2"):
        smollm2_tokenizer.encode("ab\ud800")


def byte_level_metadata(pre: str, **extra: Any) -> dict[str, Any]:
    """A byte-level vocabulary of the 256 bytes and a few merges, as GGUF stores it."""
    merges = ["Ġ t", "h e", "Ġt he", "1 2", "12 3", "Ġ Ġ", "e r", "' s", "l l"]
    tokens = [
        *byte_alphabet().values(),
        *(merge.replace(" ", "") for merge in merges),
        "<|begin|>",
        "<|end|>",
        "<think>",
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **extra,
    }


def from_gguf(write: Write, metadata: dict[str, Any], model: dict[str, Any], tensors: dict[str, Any]) -> Tokenizer:
    from phalanx.models.gguf_config import gguf_decoder_config

    file = read_gguf(write(model | metadata, tensors))
    return gguf_tokenizer(file, gguf_decoder_config(file))


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
@pytest.mark.parametrize("text", CORPUS[:-1])  # the last has a token that transformers adds to vocabularies without it
def test_other_ways_of_cutting_text_are_those_of_transformers(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any], pre: str, text: str
) -> None:
    ours = from_gguf(write_gguf, byte_level_metadata(pre), tiny_gguf_metadata, tiny_gguf_tensors)
    path = Path(ours.source)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", CORPUS)
def test_qwen2_cuts_and_normalises_as_transformers_own_class(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any], text: str
) -> None:
    metadata = byte_level_metadata("qwen2")
    ours = from_gguf(write_gguf, metadata, tiny_gguf_metadata, tiny_gguf_tensors)
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=merges, unk_token=None, eos_token="<|end|>", pad_token="<|end|>"
    )
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_control_tokens_are_special_and_user_defined_ones_are_text(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any]
) -> None:
    tokenizer = from_gguf(write_gguf, byte_level_metadata("gpt-2"), tiny_gguf_metadata, tiny_gguf_tensors)
    ids = tokenizer.encode("a<think>b<|end|>")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "a<think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<think>b<|end|>"


@pytest.mark.parametrize(
    ("pre", "flags", "around"),
    [
        ("llama-bpe", {}, (1, 0)),
        ("llama-bpe", {"add_bos_token": False}, (0, 0)),
        ("gpt-2", {}, (0, 0)),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, (1, 1)),
    ],
)
def test_what_is_put_around_a_text_is_what_the_file_says(
    write_gguf: Write,
    tiny_gguf_metadata: dict[str, Any],
    tiny_gguf_tensors: dict[str, Any],
    pre: str,
    flags: dict[str, bool],
    around: tuple[int, int],
) -> None:
    metadata = byte_level_metadata(pre, **{f"tokenizer.ggml.{key}": value for key, value in flags.items()})
    tokenizer = from_gguf(write_gguf, metadata, tiny_gguf_metadata, tiny_gguf_tensors)
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [bos] * around[0] + plain + [eos] * around[1]


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    pieces = ["▁", "t", "h", "e", "a", "r", "▁t", "he", "▁the", "er", "▁a", "the", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(5 * index % 13) for index in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }


@pytest.mark.parametrize("text", ["the heart", "there a", "tea. Öl 日本 😀", "a", "", "the\nthe  the ", "héhé</s>"])
def test_a_sentencepiece_vocabulary_cuts_and_joins_as_transformers(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any], text: str
) -> None:
    ours = from_gguf(write_gguf, sentencepiece_metadata(), tiny_gguf_metadata, tiny_gguf_tensors)
    path = Path(ours.source)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


def test_a_leading_space_goes_from_a_text_but_stays_in_a_continuation(
    write_gguf: Write, tiny_gguf_metadata: dict[str, Any], tiny_gguf_tensors: dict[str, Any]
) -> None:
    tokenizer = from_gguf(write_gguf, sentencepiece_metadata(), tiny_gguf_metadata, tiny_gguf_tensors)
    ids = tokenizer.encode("the the", add_special_tokens=False)
    alone, after = tokenizer.stream(), tokenizer.stream(continuation=True)
    assert "".join(map(alone.push, ids)) == tokenizer.decode(ids) == "the the"
    assert "".join(map(after.push, ids)) == " the the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'; supported: gpt2 .*, llama"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2'; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is None; supported: .*convert the model again"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges holds 'a b c'"),
        ({"tokenizer.ggml.merges": ["zz top"]}, "do not fit together"),
        ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id is 999; supported: 0 to 267"),
        ({"tokenizer.ggml.tokens": ["x"] * 400}, "has 400 tokens, but the embedding 320 rows"),
    ],
)
def test_a_tokenizer_that_is_not_understood_is_refused_by_name(
    write_gguf: Write,
    tiny_gguf_metadata: dict[str, Any],
    tiny_gguf_tensors: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    merged = byte_level_metadata("gpt-2") | changes
    metadata = {key: value for key, value in merged.items() if value is not None}
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{message}"):
        from_gguf(write_gguf, metadata, tiny_gguf_metadata, tiny_gguf_tensors)


@pytest.fixture
def saved(tmp_path: Path, smollm2_reference: Any) -> Path:
    """The built-in model's tokenizer as a Hugging Face directory."""
    smollm2_reference.save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_gives_the_tokens_of_transformers(saved: Path, tiny: DecoderConfig, smollm2_reference: Any) -> None:
    tokenizer = hf_tokenizer(saved, tiny)
    for text in CORPUS:
        assert tokenizer.encode(text) == smollm2_reference.encode(text)
    assert tokenizer.bos_token == smollm2_reference.bos_token
    assert tokenizer.eos_token_ids == (smollm2_reference.eos_token_id,)
    assert tokenizer.chat_template == smollm2_reference.chat_template


def test_a_template_in_tokenizer_config_is_found(saved: Path, tiny: DecoderConfig) -> None:
    (saved / "chat_template.jinja").unlink(missing_ok=True)
    path = saved / "tokenizer_config.json"
    about = json.loads(path.read_text())
    for template in ("{{ 1 }}", [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ 1 }}"}]):
        path.write_text(json.dumps(about | {"chat_template": template}))
        assert hf_tokenizer(saved, tiny).chat_template == "{{ 1 }}"


def test_truncation_and_padding_saved_with_a_tokenizer_are_off(saved: Path, tiny: DecoderConfig) -> None:
    path = str(saved / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(path)
    assert len(hf_tokenizer(saved, tiny).encode("one two three four")) == 4
    assert len(hf_tokenizer(saved, tiny).encode("one")) == 1


def test_a_directory_without_tokenizer_json_says_how_to_make_it(tmp_path: Path, tiny: DecoderConfig) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: missing; .*save_pretrained"):
        hf_tokenizer(tmp_path, tiny)


def test_a_damaged_tokenizer_json_is_named(tmp_path: Path, tiny: DecoderConfig) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer that can be read"):
        hf_tokenizer(tmp_path, tiny)


def test_a_decoder_that_is_not_known_is_refused(tmp_path: Path, tiny: DecoderConfig) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="the decoder WordPiece is not supported; supported: ByteLevel"):
        hf_tokenizer(tmp_path, tiny)
