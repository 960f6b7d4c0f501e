"""`phalanx bench kernels`: what is counted, and that a run gives figures, a file and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from phalanx.cli import app
from phalanx.errors import PhalanxError
from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.bench_kernels import optional_peers
from phalanx.launcher.bench_kernels.cases import Maker, Sizes
from phalanx.launcher.bench_kernels.measure import read_case

SIZES = Sizes(hidden=64, queries=3, keys=1, head_dim=16, ffn=96, vocab=128)
CPU = torch.device("cpu")
MAKER = Maker(SIZES, torch.bfloat16, CPU)


def test_least_is_what_takes_longer() -> None:
    assert Ceilings(1e9, 1e12).least_us(8e9, 4e12) == 8e6
    assert Ceilings(1e12, 1e12).least_us(8e9, 4e12) == 4e6


def test_bytes_and_operations_of_a_product_and_of_attention() -> None:
    maker = Maker(SIZES, torch.float32, CPU)
    [product] = [case for case in maker.product_cases(4) if case.operator == "linear down"]
    assert product.num_flops == 2 * 4 * 64 * 96
    assert product.num_bytes == 4 * (64 * 96 + 4 * 96 + 4 * 64)
    decode = maker.attention_case([1, 1], [10, 10], "")
    assert decode.num_flops == 2 * 10 * 3 * 16 * 4  # a product for the score, one for the sum
    assert decode.num_bytes == 4 * 16 * (2 * 20 + 2 * 2 * 3)
    prefill = maker.attention_case([4], [4], "")
    assert prefill.num_flops == (1 + 2 + 3 + 4) * 3 * 16 * 4


def test_pages_in_8_bits_are_attended_to_as_such_beside_plain_ones() -> None:
    for name in ("int8", "fp8"):
        case = MAKER.narrow_case(2, 20, "", name)
        assert case.num_bytes == 2 * 2 * 20 * 1 * (16 + 2) + 2 * 2 * (2 * 3 * 16)
        assert case.peer_name == "bfloat16 pages"
        assert case.peer is not None
        found, plain = case.call(0), case.peer(0)
        assert isinstance(found, torch.Tensor)
        assert isinstance(plain, torch.Tensor)
        torch.testing.assert_close(found, plain, rtol=0.2, atol=0.1)
        assert not torch.equal(found, plain)


def test_every_case_can_be_called_with_every_copy_and_as_its_peer() -> None:
    for case in MAKER.cases((2,), ((2, 20),)):
        assert case.num_bytes > 0
        case.call(case.num_copies - 1)
        if case.peer is not None:
            case.peer(case.num_copies - 1)


def test_a_mixture_reads_the_experts_that_it_chooses() -> None:
    maker = Maker(SIZES._replace(experts=4, chosen=2), torch.float32, CPU)
    [one] = [case for case in maker.mixture_cases((1,)) if case.operator == "expert_ffn"]
    assert one.num_flops == 2 * 2 * 3 * 96 * 64
    assert one.num_bytes == 4 * (2 * 3 * 96 * 64 + 2 * 64)
    operators = {case.operator: case.call(0) for case in maker.cases((2,), ())}
    assert {"route", "expert_ffn"} <= set(operators)
    assert not {"linear gate_up", "linear down"} & set(operators)


def test_quantised_weights_are_read_in_their_bits() -> None:
    cases = {case.operator: case for case in MAKER.quantised_cases(4)}
    assert "linear_w4a16 down" in cases
    assert "linear_w8a16 qkv" in cases
    down = cases["linear_w8a16 down"]
    assert down.num_flops == 2 * 4 * 64 * 96
    assert 64 * 96 <= down.num_bytes - 2 * 4 * (64 + 96) <= 1.5 * 64 * 96  # and scales, rounded up to blocks
    down.call(down.num_copies - 1)


def test_a_peer_that_is_not_installed_is_named_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_peers, "MODULES", {"Nobody's kernels": "nobodys_kernels", "torch": "torch"})
    assert optional_peers.told_of_missing() == "; not installed, so not beside these: Nobody's kernels"
    assert optional_peers.installed("Nobody's kernels", "nobodys_kernels.ops", torch.device("cuda")) is None
    assert optional_peers.installed("torch", "torch.nn", torch.device("cuda")) is torch.nn
    [alone] = [case for case in MAKER.row_cases(2) if case.operator == "rms_norm"]
    assert alone.peer_name == "torch"


def test_another_peer_stands_beside_the_same_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = torch.nn.SiLU()
    monkeypatch.setattr(optional_peers, "gates", lambda gate_up: iter([("Another", lambda i: gate(gate_up[i]))]))
    ours, again = [case for case in MAKER.row_cases(2) if case.operator == "silu_mul"]
    assert (ours.peer_name, again.peer_name) == ("torch", "Another")
    reading = read_case(again, Ceilings(1e9, 1e9), CPU, rounds=1)
    assert reading.not_torch == ", Another"


def test_the_median_counts() -> None:
    reading = read_case(next(MAKER.row_cases(2)), Ceilings(1e9, 1e9), CPU, rounds=3)
    assert reading.taken_us > 0
    assert reading.peer_us is not None
    assert reading.share == reading.least_us / reading.taken_us


def test_a_run_without_ranks(tmp_path: Path) -> None:
    files = tmp_path / "kernels.json", tmp_path / "roofline.png"
    arguments = [
        "--model",
        "smollm2-135m",
        "--device",
        "cpu",
        "--only",
        "linear qkv",
        "--rounds",
        "1",
        "--threads",
        "2",
    ]
    done = CliRunner().invoke(
        app, ["bench", "kernels", *arguments, "--json", str(files[0]), "--plot", str(files[1])], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "of roofline" in done.stdout
    report = json.loads(files[0].read_text())
    assert {reading["operator"] for reading in report["readings"]} == {"linear qkv"}
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("option", "value"), [("--model", "70b"), ("--dtype", "int4")])
def test_what_it_does_not_know(option: str, value: str) -> None:
    done = CliRunner().invoke(app, ["bench", "kernels", option, value])
    assert isinstance(done.exception, PhalanxError)
    assert f"{value} is unknown; choose" in str(done.exception)
