"""A tiny SentencePiece-like tokenizer, and what tests of guides ask of masks."""

from __future__ import annotations

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers

from phalanx.engine.guide import Guide
from phalanx.models.tokenizer import Tokenizer

TINY_VOCAB = 299  # padded: the tokenizer has 270


def sentencepiece() -> Tokenizer:
    """A token a byte, some pieces, a user's own token, and a text that begins with a space of its own."""
    pieces = ["▁", "a", "b", "aa", "ab", "▁a", '{"', '":', "1", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[("a", "a"), ("a", "b"), ("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, source="tiny", bos_token_id=1, eos_token_ids=(2,))


def tokens_in(mask: bytes) -> list[int]:
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return [int(token) for token in np.flatnonzero(bits)]


def follows(guide: Guide, tokens: list[int]) -> bool:
    """Whether each token is allowed where it comes, and then the end, token 2."""
    for token in tokens:
        if token not in tokens_in(guide.allowed()):
            return False
        guide.accept(token)
    return 2 in tokens_in(guide.allowed())
