"""Structured output: guides that follow a JSON schema, a regular expression, a list of choices or a grammar."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from phalanx.engine.grammar_compiler import GrammarTrials, Vocabulary, compile_grammar, llguidance_tokenizer
from phalanx.engine.guide import Guide, mask_of
from phalanx.engine.json_schema import schema_text
from phalanx.errors import RequestError
from phalanx.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_BYTES = 64 << 10

# By what a message of llguidance holds: what can be done about it. The first that fits.
_REMEDIES = (
    ("Unsatisfiable schema|NoExtension", "no text can satisfy it; change what contradicts itself"),
    (
        "Unimplemented keys|Unknown format|oneOf constraints",
        'leave that out, or give the schema `"x-guidance": {"lenient": true}`, which ignores what cannot be followed',
    ),
    (
        "takes more than|too (many|big|large|complex|deeply)|fuel|precomputation|recursion limit|max is|Unable to",
        "make it smaller: fewer alternatives and properties, lower counts, less nesting",
    ),
    ("look-?around|backreferences", "write it without: the syntax is that of https://docs.rs/regex"),
)


class Grammars:
    """Makes guides for one model's `SamplingParams(guide=...)`. Thread-safe.

    Each method compiles what it is given and returns a function that makes guides from that, in microseconds. It raises
    RequestError, with cause and remedy, within about a second, for what cannot be compiled or would take too much. A
    new grammar takes milliseconds, a hostile one up to a quarter of a second of a core, so a server calls these from a
    worker thread; other threads go on meanwhile. What was compiled (or refused) lately is kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_tokens: Collection[int],
        *,
        max_kept: int = 64,
        max_kept_bytes: int = 1 << 20,
    ) -> None:
        """vocab_size: of the model's logits. end_tokens: all are allowed where a text is complete, and nowhere else.

        max_kept, max_kept_bytes: number of compiled grammars kept, and the length of their sources together.
        """
        mask_of(end_tokens, vocab_size)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = sorted(end_tokens)
        self._max_kept = max_kept
        self._max_kept_bytes = max_kept_bytes
        self._kept: OrderedDict[str, LLMatcher | str] = OrderedDict()  # the latest used last; refusals too
        self._kept_bytes = 0
        self._keeping = threading.Lock()
        self._compiling = threading.Lock()
        self._compiler: tuple[LLTokenizer, GrammarTrials] | None = None

    def prepare(self) -> None:
        """What is else done for the first grammar: half a second, 0.1 s of it with the interpreter held (49k tokens).

        To be called before a server takes requests. Nothing where it is done, or the model has no end token.
        """
        with self._compiling:
            if self._compiler is None and self._end_tokens:
                vocabulary = self._vocabulary()
                trials = GrammarTrials(vocabulary)
                trials.start()
                self._compiler = llguidance_tokenizer(vocabulary), trials

    def json_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], Guide]:
        """JSON that satisfies a schema (draft 2020-12), its properties in the order of the schema.

        `x-guidance` at its top takes llguidance's options for what is supported and how it is written.
        """
        text = schema_text(schema)
        return self._guides("JSON schema", text, f"start: %json {text}", schema=text)

    def json_object(self) -> Callable[[], Guide]:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Callable[[], Guide]:
        r"""Text that a regular expression matches as a whole, in the syntax of Rust's regex crate; \d is [0-9]."""
        return self._regex("regular expression", pattern)

    def choice(self, choices: Sequence[str]) -> Callable[[], Guide]:
        """One of several texts."""
        if isinstance(choices, str) or not choices or not all(isinstance(each, str) and each for each in choices):
            raise RequestError(f"choices are {choices!r:.80}; allowed: a list of one text or more, none empty")
        return self._regex("list of choices", "|".join(re.escape(each) for each in choices))

    def grammar(self, text: str) -> Callable[[], Guide]:
        """Text that a context-free grammar derives from its rule `start`, in llguidance's variant of Lark's syntax."""
        return self._guides("grammar", text, text)

    def close(self) -> None:
        """Ends the process that tries grammars. Guides go on; a new grammar starts it again."""
        with self._compiling:
            if self._compiler is not None:
                self._compiler[1].close()

    def _regex(self, kind: str, pattern: str) -> Callable[[], Guide]:
        from llguidance import regex_to_lark

        _check_source(kind, pattern)
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # which regex_to_lark would leave out
            raise RequestError(f"the {kind} ends with a backslash that escapes nothing; write two for one in the text")
        lark = f"/{regex_to_lark(pattern, 'd')}/" if pattern else '""'
        return self._guides(kind, pattern, f"start: {lark}")

    def _guides(self, kind: str, source: str, grammar: str, schema: str | None = None) -> Callable[[], Guide]:
        _check_source(kind, source)
        if not self._end_tokens:
            raise RequestError("structured output needs a token that ends a text, and this model names none")
        found = self._find(grammar)
        if found is None:
            self.prepare()
            with self._compiling:  # one at a time, so that many do not take every core from the engine
                found = self._find(grammar)  # another thread may have had the same
                if found is None:
                    found = self._compile(kind, grammar, schema)
                    self._keep(grammar, found)
        if isinstance(found, str):
            raise RequestError(found)
        return partial(GrammarGuide, found, -(-self._vocab_size // 8))

    def _find(self, grammar: str) -> LLMatcher | str | None:
        with self._keeping:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _keep(self, grammar: str, compiled: LLMatcher | str) -> None:
        with self._keeping:
            self._kept[grammar] = compiled
            self._kept_bytes += len(grammar)
            while len(self._kept) > self._max_kept or self._kept_bytes > self._max_kept_bytes:
                oldest, _ = self._kept.popitem(last=False)
                self._kept_bytes -= len(oldest)

    def _compile(self, kind: str, grammar: str, schema: str | None) -> LLMatcher | str:
        """Or why it cannot be."""
        assert self._compiler is not None
        tokenizer, trials = self._compiler
        refusal = trials.refusal(grammar, schema)
        return compile_grammar(tokenizer, grammar) if refusal is None else _message(kind, refusal)

    def _vocabulary(self) -> Vocabulary:
        """By bytes, from our own decoder: a guided text is then what is decoded, whatever kind the tokenizer is."""
        tokens = [self._tokenizer.token_bytes(token, skip_special_tokens=False) for token in range(self._vocab_size)]
        special = {token for token in self._tokenizer.special_token_ids if token < self._vocab_size}
        return Vocabulary(tokens, sorted(special.union(self._end_tokens)), self._end_tokens)


class GrammarGuide:
    """Follows one text by a copy of a compiled matcher. After the end of the text it allows the end tokens alone."""

    def __init__(self, compiled: LLMatcher, num_bytes: int) -> None:
        """num_bytes: of a mask."""
        self._matcher = compiled.deep_copy()
        self._num_bytes = num_bytes

    def allowed(self) -> bytes:
        """RequestError where computing that takes more than the limits of llguidance."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RequestError(_message("grammar of this text", self._matcher.get_error()))
        return mask[: self._num_bytes]

    def accept(self, token: int) -> None:
        """RequestError for a token that was not allowed, and where going on takes more than the limits."""
        if not self._matcher.consume_token(token):
            raise RequestError(_message(f"grammar of this text, with token {token} drawn,", self._matcher.get_error()))


def _check_source(kind: str, source: str) -> None:
    try:
        size = len(source.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"the {kind} is not valid Unicode: a lone surrogate at character {error.start}") from error
    if size > MAX_SOURCE_BYTES:
        raise RequestError(
            f"the {kind} takes {size:,} bytes; allowed: {MAX_SOURCE_BYTES:,}. Give a shorter one, and say the "
            "rest in the prompt"
        )


def _message(kind: str, error: str) -> str:
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, error)), "correct it")
    return f"the {kind} cannot be followed: {_cause(error)}; {remedy}"


def _cause(error: str) -> str:
    """What is wrong, from a message of llguidance: without the place in a grammar that the client has not written."""
    lines = error.splitlines() or [""]
    cause = next((line for line in lines if line.startswith("error: ")), lines[0]).removeprefix("error: ")
    if cause.startswith("NoExtension"):
        cause = "nothing may come next"
    cause = re.sub(r"^(at )?\d+\(\d+\): ", "", cause)
    cause = re.sub(r'^(failed to compile JSON schema|failed to parse "%json"|lexer error|Parser Error): ', "", cause)
    cause = re.sub(r"^invalid regex .*\(in regex\): ", "", cause)
    return cause if len(cause) <= 300 else cause[:300] + "..."
