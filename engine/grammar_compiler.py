"""Compiles grammars with llguidance (https://github.com/guidance-ai/llguidance), each in a process of its own first.

What a client sends can take the compiler minutes (`multipleOf: 9999991`), gigabytes (`a?` 100,000 times) or the whole
stack (a `$ref` that names a `$ref`, 2,000 times), and its own limits hold none of the three. So a grammar is first
tried in a process forked for it, with little time, memory and stack: if something must end, it is that process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import msgspec

from phalanx.engine.json_schema import can_end

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TRIAL_CPU_S = 0.25
TRIAL_MEMORY_BYTES = 1 << 30
TRIAL_STACK_BYTES = 2 << 20  # a quarter of what a thread has by default: what passes here passes there

# Forcing is when llguidance takes the text that must follow, tokenises it, and allows only the first of those tokens.
# Without it every token that the text may go on with is allowed, as `Guide` says; masks are as fast; and texts that are
# very long and all forced, as of `(x{1000}){1000}`, are not walked to their end in one step.
_HEADER = '\n%llguidance {"no_forcing": true}\n'

# Of the lexer of one completion, about 1 kB each. A string of limited length takes about four a character.
_MAX_LEXER_STATES = 100_000


class Vocabulary(msgspec.Struct, frozen=True, array_like=True):
    """What llguidance is told of a tokenizer. tokens: their bytes, by id; empty for one without text.

    special_tokens: those that no text consists of, whatever their bytes. end_tokens: those of them that end a text.
    """

    tokens: list[bytes]
    special_tokens: list[int]
    end_tokens: list[int]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A vocabulary in the form that llguidance wants it."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: None = None

    def __call__(self, text: bytes | str) -> NoReturn:
        raise NotImplementedError("nothing is tokenised: forcing is off")


def llguidance_tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    """The tables for masks over a vocabulary: 0.1 s for 49,152 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = _Tokens(vocabulary.tokens, vocabulary.special_tokens, vocabulary.end_tokens[0])
    return LLTokenizer(TokenizerWrapper(tokens), eos_token=vocabulary.end_tokens)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of a text, its first mask computed; in its error state where that cannot be done.

    grammar: in llguidance's variant of Lark's syntax. The interpreter is free for other threads meanwhile.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar + _HEADER, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


class _Trial(msgspec.Struct, frozen=True, array_like=True):
    """A grammar to be tried, and the JSON schema that it was made from."""

    grammar: str
    schema: str | None


class _Verdict(msgspec.Struct, frozen=True, array_like=True):
    """reason: why the grammar cannot be used, empty where it can. exit_code: of the trial, or minus its signal."""

    reason: str
    exit_code: int


class GrammarTrials:
    """Tries grammars in a process that forks another for each. It ends with `close`, or with the process we are in."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def refusal(self, grammar: str, schema: str | None = None) -> str | None:
        """Why a grammar cannot be used, or None where it can. Blocks; trials are made one after another."""
        trial = _Trial(grammar, schema)
        with self._lock:
            try:
                line = _ask(self._running(), trial)
            except (OSError, RuntimeError):  # somebody ended the process just now
                self._process = None
                line = _ask(self._running(), trial)
        verdict = msgspec.json.decode(line, type=_Verdict)
        match verdict.exit_code:
            case 0:
                return verdict.reason or None
            case code if code == -signal.SIGPROF:
                return f"it takes more than {TRIAL_CPU_S} s to compile"
            case _:
                return (
                    f"compiling it takes more than {TRIAL_MEMORY_BYTES >> 20} MiB of memory or "
                    f"{TRIAL_STACK_BYTES >> 20} MiB of stack"
                )

    def start(self) -> None:
        """Starts the process, where it is not running; a trial does so too."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """Ends the process; another trial would start it again."""
        with self._lock:
            if self._process is not None:
                self._process.communicate()
                self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "phalanx.engine.grammar_compiler"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where the runtime of a trial that runs out of memory says so
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # an interrupt at the terminal is not for it
            )
            _ask(self._process, self._vocabulary)
        return self._process


def _ask(process: subprocess.Popen[bytes], message: Vocabulary | _Trial) -> bytes:
    """One line there and one back."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(message) + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that tries grammars ended with status {process.wait()}")
    return line


def main() -> None:
    """Answers each line of standard input with one: a vocabulary first, then trials, until the input ends."""
    vocabulary = msgspec.json.decode(sys.stdin.buffer.readline(), type=Vocabulary)
    tokenizer = llguidance_tokenizer(vocabulary)
    _answer(_Verdict("", 0))
    for line in sys.stdin.buffer:
        trial = msgspec.json.decode(line, type=_Trial)
        read_end, write_end = os.pipe()
        process = os.fork()
        if not process:
            exit_code = 1
            try:
                os.write(write_end, _tried(tokenizer, trial).encode()[:4096])
                exit_code = 0
            finally:
                os._exit(exit_code)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            reason = pipe.read().decode(errors="replace")
        _, status = os.waitpid(process, 0)
        _answer(_Verdict(reason, os.waitstatus_to_exitcode(status)))


def _answer(verdict: _Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


def _tried(tokenizer: LLTokenizer, trial: _Trial) -> str:
    """Why a grammar cannot be used, empty where it can; or a signal ends this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (TRIAL_MEMORY_BYTES, TRIAL_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_STACK, (TRIAL_STACK_BYTES, TRIAL_STACK_BYTES))
    signal.setitimer(signal.ITIMER_PROF, TRIAL_CPU_S)
    matcher = compile_grammar(tokenizer, trial.grammar)
    if matcher.is_error():
        return matcher.get_error()
    if trial.schema is not None and not can_end(json.loads(trial.schema)):
        return "Unsatisfiable schema: what it requires holds itself, so that no text would ever end"
    return ""


if __name__ == "__main__":
    main()
