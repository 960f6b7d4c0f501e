"""What `make gpu` says of the figures that were promised."""

from __future__ import annotations

from benchmarks.gpu_parts.promises import Promise, promises


def operator(name: str, load: str, **figures: float) -> dict[str, object]:
    return {"model": "8b", "operator": name, "load": load, **figures}


def held(promised: list[Promise], start: str) -> tuple[str, bool | None]:
    [found] = [each for each in promised if each.promise.startswith(start)]
    return found.measured, found.held


def test_promises_are_held_by_the_worst_reading_and_unmeasured_without_any() -> None:
    nothing = promises({})
    assert {each.held for each in nothing} == {None}
    operators = [
        operator("paged_attention", "decode 1 at 1024", us=5.85, share=0.3),
        operator("paged_attention", "decode 16 at 1024", us=22.0, share=0.9),
        operator("paged_attention", "decode 64 at 4096", us=370.0, share=0.98),
        operator("paged_attention", "prefill 16 x 1024", us=1.0, share=0.5, peer_over_this=0.95),
        operator("paged_attention", "prefill 32 x 512", us=1.0, share=0.5, peer_over_this=0.99),
        operator("paged_attention", "prefill 512", us=1.0, share=0.5, peer_over_this=0.1),
        operator("linear o", "4096 x 4096 x 4096", us=1.0, share=0.8, peer_over_this=0.98),
        operator("linear o", "1 x 4096 x 4096", us=1.0, share=0.8, peer_over_this=1.3),
        operator("linear o", "16 x 2048 x 2048", us=1.0, share=0.8, peer_over_this=1.1),
        {"model": "8b", "operator": "add_rms_norm", "load": "4096 rows", "error": "OutOfResources"},
        operator("add_rms_norm fp8", "4096 rows", us=1.0, share=0.91),
    ]
    found = promises({"operators 8b": {"operators": operators}})
    assert held(found, "decode attention, b1-16") == ("1.50 (b16 1024) to 2.00", False)
    assert held(found, "decode attention, b64") == ("0.98 (decode64at4096)", True)
    assert held(found, "prefill attention from 1k") == ("0.95 (prefill16x1024)", True)
    assert held(found, "prefill attention under 1k") == ("0.99 (prefill32x512)", False)
    assert held(found, "GEMM at 4096") == ("0.98 (4096x4096x4096)", True)
    assert held(found, "GEMM of m <= 16") == ("1.10 (16x2048x2048) to 1.30", False)
    assert held(found, "residual + RMSNorm") == ("0.91 (4096rows)", True)
    assert held(found, "the same: faster") == ("", None)


def test_two_ranks_on_a_gpu_are_unmeasured_where_nccl_refused_them() -> None:
    tests = {"passed": 20, "failed": 0, "skipped": 4, "ended": "done"}
    refused = promises({"tests of the comm layer": {**tests, "skips": {"needs two GPUs, or NCCL 2.30": 4}}})
    assert held(refused, "two ranks")[1] is None
    assert held(promises({"tests of the comm layer": {**tests, "skips": {}}}), "two ranks")[1] is True
    assert held(refused, "tests of the comm layer") == ("20 passed, 0 failed, 4 skipped", True)
    stopped = promises({"tests of operators": {**tests, "ended": "stopped"}})
    assert held(stopped, "tests of operators") == ("20 passed, 0 failed, 4 skipped; stopped", False)
