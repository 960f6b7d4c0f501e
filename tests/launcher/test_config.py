from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from phalanx.errors import ConfigError, Problem
from phalanx.launcher.config import load_config
from phalanx.launcher.schema import Config, Section
from phalanx.launcher.yaml_document import MAX_FILE_BYTES
from phalanx.parallel.layout import StageRequest


def problems_in(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Problem]:
    """Every problem of a bad configuration, by path."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    by_path = {problem.path: problem for problem in caught.value.problems}
    assert len(by_path) == len(caught.value.problems), "two problems at one path"
    return by_path


def problem_in(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Problem:
    """The only problem of a bad configuration."""
    (problem,) = problems_in(source, overrides).values()
    return problem


def model_with(**sections: Any) -> dict[str, Any]:
    return {"model": "tiny", **sections}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | bytes, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# What a good file means


def test_a_model_is_all_that_must_be_given() -> None:
    config = load_config({"model": "smollm2-135m"})
    assert config.model.path == "smollm2-135m"
    assert (config.model.dtype, config.cluster.ray, config.cluster.device) == ("auto", "local", "auto")
    assert config.parallel.stage_requests() == [StageRequest()]
    assert (config.engine.page_size, config.engine.kv_cache, config.engine.kv_cache_share) == (None, "auto", None)
    assert (config.engine.max_waiting, config.engine.prefix_cache) == (None, True)


def test_a_model_may_be_given_as_a_section() -> None:
    config = load_config({"model": {"path": "tiny", "dtype": "float32", "max_length": 128}})
    assert (config.model.path, config.model.dtype, config.model.max_length) == ("tiny", "float32", 128)


def test_a_file_with_every_section_is_read(write: Any) -> None:
    path = write(
        "model: {path: tiny, revision: main}\n"
        "cluster: {ray: 'head:6379', device: cuda, device_memory: 80GB, gpus_per_rank: 0.5, interface: eth0}\n"
        "parallel: {tensor: 2, pipeline: 3, replicas: 2}\n"
        "comm: {backend: gloo, timeout_s: 5}\n"
        "engine: {kv_cache: 1.5GiB, seed: 7}\n"
        "serve:\n"
    )
    config = load_config(path)
    assert config.cluster.device_memory == 80_000_000_000
    assert config.cluster.elsewhere
    assert config.parallel.stage_requests() == [StageRequest(2)] * 3
    assert config.parallel.num_ranks == 12
    assert config.comm.timeout_s == 5.0
    assert config.engine.kv_cache == 1_610_612_736


def test_stages_become_the_requests_of_a_layout() -> None:
    stages = [{"layers": 20, "tensor": 3, "weights": [2, 1, 1]}, {"node": "b", "accelerator": "H100"}]
    config = load_config(model_with(cluster={"ray": "auto"}, parallel={"stages": stages}))
    assert config.parallel.stage_requests() == [
        StageRequest(3, 20, (2.0, 1.0, 1.0)),
        StageRequest(1, None, None, "b", "H100"),
    ]


@pytest.mark.parametrize("ray", ["none", "local", "auto", "head:6379", "10.0.0.1:10001", "[fe80::1]:6379", "a.b-c_d:1"])
def test_every_way_to_reach_ray_is_accepted(ray: str) -> None:
    assert load_config(model_with(cluster={"ray": ray})).cluster.ray == ray


def test_a_config_cannot_be_changed() -> None:
    config = load_config({"model": "tiny"})
    with pytest.raises(ValidationError):
        config.model = None  # type: ignore[assignment]


def test_a_config_survives_a_round_trip_through_plain_data() -> None:
    config = load_config(model_with(parallel={"stages": [{"tensor": 2, "weights": [1, 2]}, {"layers": 4}]}))
    assert load_config(config.model_dump(exclude_unset=True)) == config


def test_every_setting_has_a_description() -> None:
    def fields_of(section: type[Section]) -> list[str]:
        return [f"{section.__name__}.{name}" for name, field in section.model_fields.items() if not field.description]

    sections: list[type[Section]] = [Config, *Section.__subclasses__()]
    assert [name for section in sections for name in fields_of(section)] == []


# Where a model lies


def test_a_model_beside_the_file_is_found_from_any_directory(write: Any, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert load_config(write("model: weights\n")).model.path == str(tmp_path / "weights")


def test_a_model_that_is_not_beside_the_file_keeps_its_name(write: Any) -> None:
    assert load_config(write("model: Qwen/Qwen3-0.6B\n")).model.path == "Qwen/Qwen3-0.6B"


def test_a_model_in_the_home_folder_is_made_whole(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write("model: ~/weights\n")).model.path == str(tmp_path / "weights")


# Overrides


def test_an_override_replaces_a_value_with_the_type_that_yaml_gives_it() -> None:
    config = load_config(
        {"model": "tiny"},
        [
            "parallel.tensor=3",
            "model.dtype=float16",
            "cluster.spread_stage=true",
            "comm.timeout_s=2.5",
            "cluster.ray='none'",
        ],
    )
    assert (config.parallel.tensor, config.model.path, config.model.dtype) == (3, "tiny", "float16")
    assert (config.cluster.spread_stage, config.comm.timeout_s, config.cluster.ray) == (True, 2.5, "none")


def test_an_override_reaches_into_lists_and_may_add_the_next_item() -> None:
    data = model_with(parallel={"stages": [{"tensor": 2}, {"tensor": 1}]})
    config = load_config(data, ["parallel.stages.0.tensor=3", "parallel.stages.2.layers=4"])
    assert [request.num_ranks for request in config.parallel.stage_requests()] == [3, 1, 1]
    assert config.parallel.stage_requests()[2].num_layers == 4


def test_an_override_may_be_a_whole_list_or_section() -> None:
    config = load_config(
        {"model": "tiny"}, ["parallel={stages: [{tensor: 2}, {}]}", "parallel.stages.0.weights=[1, 3]"]
    )
    assert config.parallel.stage_requests() == [StageRequest(2, None, (1.0, 3.0)), StageRequest()]


def test_an_override_makes_the_containers_it_needs() -> None:
    assert load_config({"model": "tiny"}, ["parallel.stages.0.tensor=2"]).parallel.stage_requests() == [StageRequest(2)]


def test_an_override_with_null_goes_back_to_the_default() -> None:
    data = model_with(parallel={"stages": [{"tensor": 2}]})
    config = load_config(data, ["parallel.stages=null", "parallel.tensor=4"])
    assert config.parallel.stage_requests() == [StageRequest(4)]


def test_later_overrides_win_and_the_given_data_is_left_alone() -> None:
    data = model_with(engine={"seed": 1})
    assert load_config(data, ["engine.seed=2", "engine.seed=3"]).engine.seed == 3
    assert data == {"model": "tiny", "engine": {"seed": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.seed", "a dotted key, `=` and a value"),
        ("=3", "a dotted key, `=` and a value"),
        ("engine..seed=3", "a dotted key, `=` and a value"),
        ("engine.seed=[1", "not valid YAML"),
        ("parallel.stages.5.tensor=2", "a list of 1"),
        ("parallel.stages.first.tensor=2", "a list of 1"),
        ("parallel.stages.0.tensor.x=2", "single value 1"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(override: str, message: str) -> None:
    problem = problem_in(model_with(parallel={"stages": [{"tensor": 1}]}), [override])
    assert problem.path == f"--set {override}"
    assert message in problem.message


def test_a_bad_value_from_an_override_is_not_blamed_on_a_line_of_the_file(write: Any) -> None:
    problem = problem_in(write("model: tiny\nengine:\n  seed: 3\n"), ["engine.seed=x"])
    assert (problem.path, problem.line) == ("engine.seed", None)
    assert problem.found is not None
    assert "--set" in problem.found


# What is wrong with a file: all of it at once, with path, line, value, allowed and suggestion

BAD_FILE = """\
model:
  path: tiny
  dtype: bf16
cluster:
  device: gpu
  ray: lokal
  interface: no
parallel:
  tensr: 2
  replicas: "2"
  stages:
    - layers: 0
      weights: [1, 2]
    - {tensor: 2, weights: [1, -2]}
engine:
  kv_cache: 12 gigs
  page_size: 1.5
  max_sequences: 2000
  tensor: 4
comm: []
"""


def test_every_problem_is_told_at_once_with_its_line(write: Any) -> None:
    found = {path: problem.line for path, problem in problems_in(write(BAD_FILE)).items()}
    assert found == {
        "model.dtype": 3,
        "cluster.device": 5,
        "cluster.ray": 6,
        "cluster.interface": 7,
        "parallel.tensr": 9,
        "parallel.replicas": 10,
        "parallel.stages.0.layers": 12,
        "parallel.stages.0.weights": 13,
        "parallel.stages.1.weights.1": 14,
        "engine.max_batch_tokens": 15,
        "engine.kv_cache": 16,
        "engine.page_size": 17,
        "engine.tensor": 19,
        "comm": 20,
    }


@pytest.mark.parametrize(
    ("sections", "path", "suggestion"),
    [
        ({"parallel": {"tensr": 2}}, "parallel.tensr", "did you mean `tensor`?"),
        ({"paralel": {}}, "paralel", "did you mean `parallel`?"),
        ({"parallel": {"stages": [{"layer": 3}]}}, "parallel.stages.0.layer", "did you mean `layers`?"),
        ({"tensor": 2}, "tensor", "`tensor` belongs to the section `parallel`"),
        ({"engine": {"dtype": "float32"}}, "engine.dtype", "`dtype` belongs to the section `model`"),
        ({"kv_cach": 2}, "kv_cach", "did you mean `engine.kv_cache`?"),
        ({"cluster": {"ray": "lokal"}}, "cluster.ray", "did you mean `local`?"),
        ({"model": {"path": "tiny", "dtype": "bfloat"}}, "model.dtype", "did you mean `bfloat16`?"),
        ({"parallel": {"tensor": "2"}}, "parallel.tensor", "remove the quotes: 2"),
        ({"engine": {"zebra": 2}}, "engine.zebra", None),
    ],
)
def test_a_slip_is_answered_with_what_was_probably_meant(
    sections: dict[str, Any], path: str, suggestion: str | None
) -> None:
    problem = problem_in(model_with(**sections))
    assert (problem.path, problem.suggestion) == (path, suggestion)


@pytest.mark.parametrize(
    ("sections", "path", "allowed"),
    [
        ({"parallel": {"tensor": 0}}, "parallel.tensor", "a whole number, at least 1 and at most 1024"),
        ({"parallel": {"tensor": True}}, "parallel.tensor", "a whole number, at least 1 and at most 1024"),
        ({"parallel": {"tensor": 2.0}}, "parallel.tensor", "a whole number, at least 1 and at most 1024"),
        ({"parallel": {"tensor": None}}, "parallel.tensor", "a whole number, at least 1 and at most 1024"),
        (
            {"parallel": {"stages": []}},
            "parallel.stages",
            "a list of stages, each with layers, tensor, weights, node, accelerator",
        ),
        (
            {"parallel": {"stages": 3}},
            "parallel.stages",
            "a list of stages, each with layers, tensor, weights, node, accelerator",
        ),
        (
            {"parallel": {"stages": [3]}},
            "parallel.stages.0",
            "a section with layers, tensor, weights, node, accelerator",
        ),
        ({"cluster": {"spread_stage": "yes"}}, "cluster.spread_stage", "true or false"),
        ({"cluster": {"gpus_per_rank": 2}}, "cluster.gpus_per_rank", "a number from 0 to 1"),
        ({"comm": {"timeout_s": float("inf")}}, "comm.timeout_s", "a number, above 0"),
        ({"engine": {"kv_cache": "lots"}}, "engine.kv_cache", "auto, or bytes as a whole number"),
        ({"engine": {"kv_cache": True}}, "engine.kv_cache", "KiB"),
        ({"engine": {"kv_cache_share": 0}}, "engine.kv_cache_share", "a number, above 0 and at most 1 (or null)"),
        ({"engine": {"max_waiting": 0}}, "engine.max_waiting", "a whole number, at least 1 (or null)"),
        (
            {"engine": {"zebra": 2}},
            "engine.zebra",
            "max_sequences, max_batch_tokens, max_waiting, kv_cache, kv_cache_dtype, kv_cache_share, page_size, "
            "prefix_cache, cuda_graphs, torch_compile, seed",
        ),
        ({"serve": {"port": 65536}}, "serve.port", "below 65536"),
        ({"model": {"path": ""}}, "model.path", "text"),
        ({"model": 3}, "model", "path, dtype, revision, max_length"),
        ({"model": ["tiny"]}, "model", "path, dtype, revision, max_length"),
    ],
)
def test_what_is_allowed_is_said(sections: dict[str, Any], path: str, allowed: str) -> None:
    problem = problem_in(model_with(**sections))
    assert problem.path == path
    assert problem.allowed is not None
    assert allowed in problem.allowed


@pytest.mark.parametrize(
    "ray", ["head", "head:", ":6379", "head:0", "head:99999", "a b:1", "head:6379:1", "head:²", ""]
)
def test_an_address_of_ray_needs_host_and_port(ray: str) -> None:
    assert problem_in(model_with(cluster={"ray": ray})).path == "cluster.ray"


def test_a_missing_model_is_told_beside_the_rest() -> None:
    assert set(problems_in({"engine": {"seed": -1}})) == {"model", "engine.seed"}
    assert problem_in({}).suggestion == "model: smollm2-135m"
    assert problem_in({"model": None}).path == "model.path"


def test_keys_that_are_no_text_are_refused(write: Any) -> None:
    problems = problems_in(write("model: tiny\nengine:\n  3: 4\non: 1\n"))
    assert {problem.message for problem in problems.values()} == {"a key must be text"}
    assert len(problems) == 2


# Rules between settings


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"parallel": {"tensor": 2, "stages": [{}]}}, "parallel.tensor"),
        ({"parallel": {"pipeline": 2, "stages": [{}]}}, "parallel.pipeline"),
        ({"parallel": {"stages": [{"tensor": 3, "weights": [1, 1]}]}}, "parallel.stages.0.weights"),
        ({"parallel": {"stages": [{"node": "a"}]}}, "parallel.stages.0.node"),
        (
            {"cluster": {"ray": "none"}, "parallel": {"stages": [{"accelerator": "H100"}]}},
            "parallel.stages.0.accelerator",
        ),
        ({"cluster": {"device": "cuda", "gpus_per_rank": 0}}, "cluster.gpus_per_rank"),
        ({"cluster": {"device": "cpu", "gpus_per_rank": 1}}, "cluster.gpus_per_rank"),
        ({"engine": {"max_batch_tokens": 32, "max_sequences": 64}}, "engine.max_batch_tokens"),
        ({"engine": {"kv_cache": "1GiB", "kv_cache_share": 0.5}}, "engine.kv_cache_share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, Any], path: str) -> None:
    assert problem_in(model_with(**sections)).path == path


def test_rules_are_tried_beside_bad_values_elsewhere() -> None:
    data = model_with(parallel={"tensor": 2, "stages": [{"layers": -1}]}, engine={"seed": "x"})
    assert set(problems_in(data)) == {"parallel.tensor", "parallel.stages.0.layers", "engine.seed"}


def test_a_rule_says_nothing_about_a_value_that_is_bad_itself() -> None:
    data = model_with(engine={"max_sequences": "many", "max_batch_tokens": 1})
    assert set(problems_in(data)) == {"engine.max_sequences"}


# Files that are no configuration


def test_a_key_given_twice_is_refused_with_both_lines(write: Any) -> None:
    problem = problem_in(write("model: tiny\nengine:\n  seed: 1\n  page_size: 8\n  seed: 2\n"))
    assert (problem.path, problem.line) == ("engine.seed", 5)
    assert "line 3" in problem.message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("model: tiny\nparallel: [1, 2\nengine: {}\n", 3, "flow sequence"),
        ("model: tiny\n\tengine: 2\n", 2, "not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']\n", 1, "could not determine a constructor"),
        ("model: tiny\n---\nmodel: other\n", 2, "document"),
        ("? [1, 2]\n: 3\n", 1, "unhashable key"),
        ("model: &a [*a]\n", 1, "more than a configuration can hold"),
        ("a: " + "[" * 200 + "]" * 200, 1, "more than a configuration can hold"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(write: Any, text: str, line: int, message: str) -> None:
    problem = problem_in(write(text))
    assert problem.line == line
    assert message in problem.message


def test_aliases_that_unfold_without_end_are_refused(write: Any) -> None:
    layers = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'x'}]" for i in range(12))
    assert "more than a configuration can hold" in problem_in(write(layers)).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model: \xff\n", "is not UTF-8"),
        (b"#" * (MAX_FILE_BYTES + 1), "too large"),
        (b"just words", "a mapping of sections"),
        (b"- a\n- b\n", "a mapping of sections"),
        (b"model: 2020-99-99\n", "month"),
    ],
)
def test_what_is_no_mapping_of_text_is_refused(write: Any, text: bytes, message: str) -> None:
    assert message in problem_in(write(text)).message


def test_a_file_that_is_not_there_is_told_as_a_problem(tmp_path: Path) -> None:
    assert "No such file" in problem_in(tmp_path / "none.yaml").message
    assert "directory" in problem_in(tmp_path).message


def test_an_empty_file_lacks_a_model(write: Any) -> None:
    assert problem_in(write("# nothing\n")).path == "model"


def test_problems_name_the_file(write: Any) -> None:
    path = write("model: tiny\nengine: {zebra: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: 1 problem"):
        load_config(path)


# Whatever comes in, what comes out is a configuration or a list of problems

NAMES = sorted({name for section in Section.__subclasses__() for name in section.model_fields})
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["auto", "1GiB"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.one_of(st.sampled_from(NAMES), st.integers()), VALUES, max_size=5))
def test_any_data_is_a_configuration_or_a_list_of_problems(data: dict[Any, Any]) -> None:
    try:
        load_config(data)
    except ConfigError as error:
        assert error.problems


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), VALUES, max_size=3), st.data())
def test_any_override_is_applied_or_told_as_a_problem(data: dict[str, Any], draw: st.DataObject) -> None:
    keys = draw.draw(st.lists(st.sampled_from([*NAMES, "0", "1", "stages", "²", ""]), min_size=1, max_size=4))
    value = draw.draw(st.text(alphabet="ab1[]{}:,&*!\"' -\t#", max_size=6))
    try:
        load_config(data, [".".join(keys) + "=" + value])
    except ConfigError as error:
        assert error.problems


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="model: \n-[]{}&*a!'\"#?|>\t0.", max_size=40))
def test_any_text_is_a_configuration_or_a_list_of_problems(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-{os.getpid()}.yaml"
    path.write_text(text)
    try:
        load_config(path)
    except ConfigError as error:
        assert error.problems
