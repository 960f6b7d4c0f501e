"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from phalanx.serve.answers import Detokenized, Tokenized
from phalanx.serve.conversation import Conversation
from phalanx.serve.errors import ApiError
from phalanx.serve.logprobs import token_text
from phalanx.serve.protocol import DetokenizeRequest, TokenizeRequest
from phalanx.serve.service import Service


async def tokenize(service: Service, wanted: TokenizeRequest) -> Tokenized:
    service.check_model(wanted.model)
    if (wanted.prompt is None) == (wanted.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    tokenizer = service.engine.tokenizer
    if wanted.prompt is not None:
        text, special = wanted.prompt, wanted.add_special_tokens is not False
        service.check_size(len(text))
        tokens = await service.beside(len(text), lambda: tokenizer.encode(text, special))
    else:
        tokens = await service.chat_tokens(Conversation.of(wanted, wanted.tools))
    texts: list[str] | None = None
    if wanted.return_token_strs:
        texts = await service.beside(len(tokens), lambda: [token_text(tokenizer, token) for token in tokens])
    return {"count": len(tokens), "max_model_len": service.max_length, "tokens": tokens, "token_strs": texts}


async def detokenize(service: Service, wanted: DetokenizeRequest) -> Detokenized:
    service.check_model(wanted.model)
    tokens, vocab_size = wanted.tokens, service.engine.vocab_size
    wrong = next((token for token in tokens if token >= vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"token {wrong} is not in the vocabulary; allowed: 0 to {vocab_size - 1}", param="tokens")
    tokenizer = service.engine.tokenizer
    return {"prompt": await service.beside(len(tokens), lambda: tokenizer.decode(tokens, skip_special_tokens=False))}
