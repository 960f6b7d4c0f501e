"""Which replica a prompt goes to."""

from __future__ import annotations

from phalanx.engine.router import BLOCK, SLACK, Router


def prompt(first: int, num_blocks: int = 3) -> list[int]:
    return [first] * (BLOCK * num_blocks) + [7]


def test_a_new_prompt_goes_to_the_replica_with_the_least_to_do() -> None:
    assert Router(3).route(prompt(1), [4, 2, 3]) == 1


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    router = Router(2)
    assert router.route(prompt(1), [1, 0]) == 1
    assert router.route([*prompt(1), 8, 9], [0, 1]) == 1
    assert router.route(prompt(2), [0, 1]) == 0


def test_the_longest_known_beginning_counts() -> None:
    router = Router(2)
    router.route(prompt(1, 1), [0, 1])
    router.route(prompt(1, 1)[:BLOCK] + prompt(2, 2), [9, 0])  # its beginning is on a replica with too much to do
    assert router.route(prompt(1, 1)[:BLOCK] + prompt(2, 2), [1, 2]) == 1


def test_load_outweighs_a_known_beginning() -> None:
    router = Router(2)
    router.route(prompt(1), [0, 1])
    assert router.route(prompt(1), [SLACK, 0]) == 0
    assert router.route(prompt(1), [SLACK + 1, 0]) == 1
    assert router.route(prompt(1), [0, 0]) == 1, "from then on it is known there"


def test_short_prompts_go_by_load_alone() -> None:
    router = Router(2)
    assert router.route([1, 2, 3], [0, 1]) == 0
    assert router.route([1, 2, 3], [1, 0]) == 1
