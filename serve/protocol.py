"""What clients may send: OpenAI's requests, with the extensions that other servers have. The OpenAPI document is made
of these models, so what they say is what is checked.

Unknown fields are refused: a setting that is misspelt must not be passed over. `null` stands for the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from phalanx.engine.sampling_params import (
    MAX_COMPLETIONS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_REPETITION_PENALTY,
    MAX_STOP_STRINGS,
    MIN_REPETITION_PENALTY,
)

MAX_PROMPTS = 2048
MAX_TOKENS = 2**31 - 1  # as a number on the wire; what fits the model is the engine's to say
MAX_STOP_TOKENS = 1024
MAX_PARTS = 1024  # of one message

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]


class Wire(BaseModel):
    """An object in a request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _kind_of_prompt(prompt: Any) -> str | None:
    """Which of the four forms a prompt has, by its first item: trying them all costs seconds where it is long."""
    if not isinstance(prompt, list):
        return "a text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else ""
    if isinstance(first, int):
        return "token ids"
    return "lists of token ids" if isinstance(first, list) else "a list of texts"


Prompt = Annotated[
    Annotated[Text, Tag("a text")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("a list of texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("lists of token ids")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a text, token ids, or a list of either",
    ),
]


class StreamOptions(Wire):
    include_usage: bool | None = Field(default=None, description="A last chunk without choices says the usage.")
    continuous_usage_stats: bool | None = Field(default=None, description="Every chunk says the usage so far.")


class JsonSchema(Wire):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Schemas are always followed strictly.")


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationRequest(Wire):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="As GET /v1/models lists it; null for the one that is served.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_COMPLETIONS)
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(
        default=None, ge=0, le=100, description="1 by default; 0 for the likeliest token."
    )
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = Field(
        default=None, description="Token ids, as text, and biases of -100 to 100."
    )
    response_format: ResponseFormat | None = None

    # Extensions, as other servers have them.
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS, description="-1 and 0 for all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    allowed_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = Field(default=None, description="Leaves control tokens out of the text.")
    return_token_ids: bool | None = Field(default=None, description="Answers name the tokens beside the text.")
    guided_json: dict[str, Any] | bool | str | None = Field(default=None, description="A JSON schema.")
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: Text | None = Field(default=None, description="In Lark's notation.")
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31, description="Lower comes first.")

    # Told by clients of OpenAI's own service; they change nothing here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class CompletionRequest(GenerationRequest):
    prompt: Prompt = Field(description="Text, token ids, or a list of either.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(default=None, description="Puts the prompt before each completion.")
    best_of: int | None = Field(default=None, ge=1, le=MAX_COMPLETIONS, description="Only as many as `n`.")
    suffix: Literal[""] | None = Field(default=None, description="Text is not filled in before another.")
    add_special_tokens: bool | None = Field(default=None, description="Whether texts begin with the model's own token.")


class TextPart(Wire):
    type: Literal["text"]
    text: str


class FunctionCall(Wire):
    name: str = Field(min_length=1)
    arguments: str = Field(description="JSON text.")


class ToolCallMessage(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of a conversation. What else clients keep in it, such as `refusal`, goes to the template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Wire):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: FunctionName


TemplateSettings = Annotated[
    dict[str, Any],
    Field(max_length=64, description="More variables of the chat template, such as enable_thinking."),
]


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=MAX_PROMPTS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="In place of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = Field(default=None, description="Goes to the chat template.")
    chat_template_kwargs: TemplateSettings | None = None
    add_generation_prompt: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TokenizeRequest(Wire):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateSettings | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
