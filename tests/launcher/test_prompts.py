"""Reading prompts from a file of JSON lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import ConfigError
from phalanx.launcher.prompts import read_prompts

DEFAULTS = SamplingParams(max_tokens=7, temperature=0.5)


def write(folder: Path, text: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text(text)
    return path


def test_text_and_token_ids_with_parameters_of_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "Hello"}\n\n{"prompt_token_ids": [1, 2], "max_tokens": 3, "temperature": 0, "stop": ["x"]}\n',
    )
    first, second = read_prompts(path, DEFAULTS)
    assert first == ("Hello", DEFAULTS)
    assert second == ([1, 2], SamplingParams(max_tokens=3, temperature=0, stop=("x",)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "malformed"),
        ("[1]", "an object such as"),
        ("{}", "either `prompt` or `prompt_token_ids`"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "either `prompt` or `prompt_token_ids`"),
        ('{"prompt": 3}', "Expected `str`"),
        ('{"prompt_token_ids": ["a"]}', "Expected `int`"),
        ('{"prompt": "a", "temprature": 1}', "did you mean 'temperature'"),
        ('{"prompt": "a", "max_tokens": "many"}', "max_tokens"),
        ('{"prompt": "a", "max_tokens": 2.5}', "max_tokens"),
        ('{"prompt": "a", "seed": "x"}', "seed"),
        ('{"prompt": "a", "top_p": 7}', "top_p is 7; allowed: above 0, up to 1"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        read_prompts(write(tmp_path, f'{{"prompt": "good"}}\n{line}\n'), DEFAULTS)
    [problem] = wrong.value.problems
    assert problem.line == 2
    assert message in problem.message


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "a\u2028b\u0085c", "stop": "x"}\n')
    [line] = read_prompts(path, DEFAULTS)
    assert line.prompt == "a\u2028b\u0085c"
    assert line.params.stop == ("x",)


def test_all_wrong_lines_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as wrong:
        read_prompts(write(tmp_path, "{}\n{}\n"), DEFAULTS)
    assert [problem.line for problem in wrong.value.problems] == [1, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.jsonl"):
        read_prompts(tmp_path / "missing.jsonl", DEFAULTS)


def test_biases_are_keyed_by_token_ids_as_text(tmp_path: Path) -> None:
    [line] = read_prompts(write(tmp_path, '{"prompt": "a", "logit_bias": {"5": -1.5}, "n": 2}'), DEFAULTS)
    assert line.params.logit_bias == ((5, -1.5),)
    assert line.params.n == 2
