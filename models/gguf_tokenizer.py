"""A tokenizer from the metadata of a GGUF file.

GGUF stores a vocabulary, its merges or scores, and the name of a kind of tokenizer; the rest (how text is cut before
merging, what is put around it) belongs to the kind. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phalanx.errors import ModelError
from phalanx.models.config import DecoderConfig
from phalanx.models.fields import Fields
from phalanx.models.gguf_file import GgufFile
from phalanx.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_PREFIX = "tokenizer.ggml."
_SPACE_MARK = "\u2581"

# Types of tokens: enum llama_token_type in llama.h.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How a byte-level vocabulary cuts text before merging, as in the tokenizer.json of the models it is named after.

    patterns: regular expressions applied in turn, each on the pieces left by the one before; what matches is a piece.
    nfc: whether text is normalised to NFC first. whole_words: whether a piece that is a token is taken as it is,
    unmerged.
    adds_bos: whether a text starts with the first token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LLAMA3_PRE = _PreTokenizer((_LLAMA3,), whole_words=True, adds_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer((_GPT2,)),
    "smollm": _PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "qwen2": _PreTokenizer((_QWEN2,), nfc=True),
    "tekken": _PreTokenizer((_TEKKEN,), whole_words=True, adds_bos=True),
}


def gguf_tokenizer(file: GgufFile, config: DecoderConfig) -> Tokenizer:
    """The tokenizer that a GGUF file describes: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).

    Raises ModelError, naming file, key and value, for another kind, or one whose way of cutting text is not known.
    """
    fields = Fields(file.metadata, str(file.path))
    tokens = file.array(_PREFIX + "tokens")
    if tokens is None:
        raise ModelError(f"{file.path}: {_PREFIX}tokens is missing: the file carries no tokenizer; use one that does")
    if len(tokens) > config.shape.vocab_size:
        raise ModelError(
            f"{file.path}: {_PREFIX}tokens has {len(tokens)} tokens, but the embedding {config.shape.vocab_size} rows"
        )
    types = file.array(_PREFIX + "token_type") or [_NORMAL] * len(tokens)
    match fields.get(_PREFIX + "model"):
        case "gpt2":
            backend, adds_bos = _byte_level(file, fields, tokens)
        case "llama":
            backend, adds_bos = _sentencepiece(file, fields, tokens, types), True
        case _:
            raise fields.refusal(_PREFIX + "model", "gpt2 (byte-level BPE), llama (SentencePiece BPE)")
    _add_tokens(backend, tokens, types)
    if fields.get(_PREFIX + "add_bos_token") is not None:
        adds_bos = fields.flag(_PREFIX + "add_bos_token")
    bos, eos = config.bos_token_id, fields.token_id(_PREFIX + "eos_token_id")
    adds_eos = fields.flag(_PREFIX + "add_eos_token")
    for key, token in (("bos", bos), ("eos", eos)):
        if token is not None and not 0 <= token < len(tokens):
            raise fields.refusal(f"{_PREFIX}{key}_token_id", f"0 to {len(tokens) - 1}")
    _add_around(backend, tokens, bos if adds_bos else None, eos if adds_eos else None)
    template = fields.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        source=str(file.path),
        bos_token_id=bos,
        eos_token_ids=config.eos_token_ids,
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level(file: GgufFile, fields: Fields, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = PRE_TOKENIZERS.get(fields.get(_PREFIX + "pre") or "")
    if kind is None:
        raise fields.refusal(
            _PREFIX + "pre",
            ", ".join(PRE_TOKENIZERS)
            + ". Files without it, from before May 2024, do not say how text is to be cut: convert the model again",
        )
    merges = file.array(_PREFIX + "merges")
    if merges is None:
        raise ModelError(f"{file.path}: {_PREFIX}merges is missing; a tokenizer of model gpt2 needs it")
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not separator or " " in right:
            raise ModelError(f"{file.path}: {_PREFIX}merges holds {merge!r}, not two tokens with a space between")
        pairs.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=kind.whole_words))
    except Exception as error:  # the library raises a bare Exception, as for a merge of tokens not in the vocabulary
        raise ModelError(f"{file.path}: {_PREFIX}merges and tokens do not fit together: {error}") from error
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, kind.adds_bos


def _sentencepiece(file: GgufFile, fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """BPE over characters, bytes where a character is not in the vocabulary, spaces written as U+2581."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.array(_PREFIX + "scores")
    if scores is None or len(scores) != len(tokens) or len(types) != len(tokens):
        raise ModelError(
            f"{file.path}: {_PREFIX}scores and token_type must have one entry for each of {len(tokens)} tokens"
        )
    unknown = fields.integer(_PREFIX + "unknown_token_id", 0)
    vocab = {token: index for index, token in enumerate(tokens)}
    if not 0 <= unknown < len(tokens):
        raise fields.refusal(_PREFIX + "unknown_token_id", f"0 to {len(tokens) - 1}")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, tokens, scores, types),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    with_prefix = fields.get(_PREFIX + "add_space_prefix")
    steps: list[Any] = [normalizers.Replace(" ", _SPACE_MARK)]
    decode: list[Any] = [decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if with_prefix is None or with_prefix:
        steps.insert(0, normalizers.Prepend(_SPACE_MARK))
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(decode)
    return backend


def _merges(
    vocab: dict[str, int], tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose joint piece scores best; this lists every such pair, best first."""
    ranked = []
    for piece, score, kind in zip(tokens, scores, types, strict=True):
        if kind == _NORMAL:
            for cut in range(len(piece) - 1, 0, -1):
                left, right = piece[:cut], piece[cut:]
                if left in vocab and right in vocab:
                    ranked.append((score, left, right))
    ranked.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in ranked]


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Tokens that are found in text before anything else: control tokens, special, and those that a user defined."""
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(tokens, types, strict=False)
                if found == kind and token
            ]
        )


def _add_around(backend: tokenizers.Tokenizer, tokens: Sequence[str], bos: int | None, eos: int | None) -> None:
    """What `add_special_tokens` puts before and after a text."""
    from tokenizers import processors

    # By neutral names: a token's own text may hold the characters of the template's syntax.
    around = [("bos", bos), ("eos", eos)]
    special: list[Any] = [
        {"id": name, "ids": [token], "tokens": [tokens[token]]} for name, token in around if token is not None
    ]
    if special:
        single: list[Any] = ["$A"]
        single = (["bos"] if bos is not None else []) + single + (["eos"] if eos is not None else [])
        backend.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=special)
