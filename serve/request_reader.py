"""Bodies of requests, read into what the engine is asked: checked, in the model's template, in tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from phalanx.models.chat import render_chat
from phalanx.models.tokenizer import Tokenizer
from phalanx.serve.answers import Detokenized, Tokenized
from phalanx.serve.conversation import Conversation
from phalanx.serve.errors import ApiError, body_error
from phalanx.serve.logprobs import token_text
from phalanx.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

RequestT = TypeVar("RequestT", bound=BaseModel)


class CompletionRead(NamedTuple):
    """A request for completions, and its prompts in token ids. The request keeps its prompt only where `echo` does."""

    wanted: CompletionRequest
    prompts: list[list[int]]


class ChatRead(NamedTuple):
    """A request for the next message, and its conversation in token ids. The request has no messages left."""

    wanted: ChatRequest
    prompt: list[int]


class RequestReader:
    """Knows of a model what is needed to read requests for it; nothing of an engine. It can be pickled.

    Its methods take the bytes of a body. They raise ApiError for one that cannot be served, and PhalanxError for
    messages that the template refuses.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, chat_template: str | None, model_name: str, max_length: int, vocab_size: int
    ) -> None:
        """max_length: most tokens of a prompt and its answer. vocab_size: of the model."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._model_name = model_name
        self._max_length = max_length
        self._vocab_size = vocab_size

    def completion(self, body: bytes) -> CompletionRead:
        wanted = _parsed(body, CompletionRequest)
        self._check_model(wanted.model)
        _check_completion(wanted)
        given = wanted.prompt
        items: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        for each in items:
            self._check_size(len(each), tokens=not isinstance(each, str))
        special = wanted.add_special_tokens is not False
        prompts = [self._encode(each, special) if isinstance(each, str) else each for each in items]
        return CompletionRead(wanted if wanted.echo else wanted.model_copy(update={"prompt": ""}), prompts)

    def chat(self, body: bytes) -> ChatRead:
        wanted = _parsed(body, ChatRequest)
        self._check_model(wanted.model)
        _check_chat(wanted)
        tools = wanted.tools if wanted.tool_choice != "none" else None
        text = self._rendered(Conversation.of(wanted, tools))
        return ChatRead(wanted.model_copy(update={"messages": []}), self._encode(text, add_special_tokens=False))

    def tokenize(self, body: bytes) -> Tokenized:
        wanted = _parsed(body, TokenizeRequest)
        self._check_model(wanted.model)
        if (wanted.prompt is None) == (wanted.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if wanted.prompt is not None:
            self._check_size(len(wanted.prompt))
            tokens = self._tokenizer.encode(wanted.prompt, wanted.add_special_tokens is not False)
        else:
            text = self._rendered(Conversation.of(wanted, wanted.tools))
            tokens = self._tokenizer.encode(text, add_special_tokens=False)
        texts = [token_text(self._tokenizer, token) for token in tokens] if wanted.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self._max_length, "tokens": tokens, "token_strs": texts}

    def detokenize(self, body: bytes) -> Detokenized:
        wanted = _parsed(body, DetokenizeRequest)
        self._check_model(wanted.model)
        highest = self._vocab_size - 1
        wrong = next((token for token in wanted.tokens if token > highest), None)
        if wrong is not None:
            raise ApiError(400, f"token {wrong} is not in the vocabulary; allowed: 0 to {highest}", param="tokens")
        return {"prompt": self._tokenizer.decode(wanted.tokens, skip_special_tokens=False)}

    @cached_property
    def max_prompt_bytes(self) -> int:
        """A text that is longer cannot fit the model: no token stands for more than the longest one's bytes.

        Found out when it is first asked for, in a tenth of a second for 49k tokens.
        """
        tokenizer = self._tokenizer
        longest = max(
            len(tokenizer.token_bytes(token, skip_special_tokens=False)) for token in range(tokenizer.vocab_size)
        )
        return 2 * longest * self._max_length  # a tokenizer's normalizer may shorten what it reads

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Tokens of a prompt that fits."""
        tokens = self._tokenizer.encode(text, add_special_tokens)
        self._check_size(len(tokens), tokens=True)  # here, since even passing on what is too long takes long
        return tokens

    def _rendered(self, conversation: Conversation) -> str:
        """The text of a conversation in the model's template."""
        self._check_size(conversation.num_characters)
        return render_chat(
            self._chat_template,
            conversation.messages,
            add_generation_prompt=conversation.add_generation_prompt,
            bos_token=self._tokenizer.bos_token,
            eos_token=self._tokenizer.eos_token,
            tools=conversation.tools,
            **conversation.settings,
        )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model_name:
            raise ApiError(
                404,
                f"the model {name[:100]!a} is not served here; allowed: {self._model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_size(self, size: int, *, tokens: bool = False) -> None:
        """Raises ApiError for a prompt of so many characters that is too long whatever its tokens are, before they are
        looked for; or for one of so many tokens.
        """
        if size > (self._max_length if tokens else self.max_prompt_bytes):
            raise ApiError(
                400,
                f"the prompt has {size} {'tokens' if tokens else 'characters'}, but at most {self._max_length} tokens "
                "fit (model.max_length); shorten it",
                param="prompt",
                code="context_length_exceeded",
            )


T = TypeVar("T")
Read = Callable[[RequestReader, bytes], T]
"""One of the reader's methods."""


def _parsed(body: bytes, wanted: type[RequestT]) -> RequestT:
    """A body as one of the models: straight from its bytes, and with every problem at once."""
    try:
        return wanted.model_validate_json(body)
    except ValidationError as error:
        raise body_error(error, wanted.model_fields) from None


def _check_completion(wanted: CompletionRequest) -> None:
    """Fields that do not go together."""
    if wanted.best_of is not None and wanted.best_of != (wanted.n or 1):
        raise ApiError(400, f"best_of is {wanted.best_of}; allowed: as many as n ({wanted.n or 1})", param="best_of")
    if wanted.max_tokens == 0 and not wanted.echo:
        raise ApiError(400, "max_tokens is 0; allowed: at least 1, or 0 together with echo", param="max_tokens")
    if wanted.stream and (wanted.prompt_logprobs is not None or (wanted.echo and wanted.logprobs is not None)):
        raise ApiError(
            400,
            "log-probabilities of the prompt do not come in a stream; leave out stream, or ask for neither echo "
            "with logprobs nor prompt_logprobs",
            param="stream",
        )


def _check_chat(wanted: ChatRequest) -> None:
    """Fields that do not go together."""
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs; set logprobs to true", param="top_logprobs")
    if wanted.max_tokens == 0:
        raise ApiError(400, "max_tokens is 0; allowed: at least 1", param="max_tokens")
    if wanted.max_completion_tokens is not None and wanted.max_tokens not in (None, wanted.max_completion_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    if wanted.tool_choice not in (None, "none", "auto") and not wanted.tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
