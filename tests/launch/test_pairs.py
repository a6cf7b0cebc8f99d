"""Nodes that reduce a tensor in pairs: who is at fault."""

import pytest

from megahybrid.launch.pairs import PairResult, find_bad_nodes, rounds


@pytest.mark.parametrize("count", range(2, 12))
def test_every_node_is_in_two_pairs_and_in_one_at_a_time(count: int) -> None:
    nodes = [f"n{number}" for number in range(count)]
    plan = rounds(nodes)
    for part in plan:
        met = [node for pair in part for node in pair]
        assert len(met) == len(set(met))
    met = [node for part in plan for pair in part for node in pair]
    assert {met.count(node) for node in nodes} == {1 if count == 2 else 2}
    assert len(plan) <= 3


def _answers(nodes: list[str], bad: set[str], slow: str = "") -> list[PairResult]:
    found = []
    for part in rounds(nodes):
        for pair in part:
            works = not bad & set(pair)
            speed = 1.0 if slow in pair else 20.0
            for node in pair:
                if node not in bad:
                    found.append(
                        PairResult(pair, speed if works else None, "" if works else "timeout")
                    )
    return found


@pytest.mark.parametrize("bad", [{"n0"}, {"n3"}, {"n1", "n2"}, {"n0", "n4"}, set()])
def test_who_reaches_nobody_is_named_and_nobody_else(bad: set[str]) -> None:
    nodes = [f"n{number}" for number in range(6)]
    verdict = find_bad_nodes(nodes, _answers(nodes, bad), 4)
    assert set(verdict.bad) == bad
    if bad == {"n3"}:
        assert verdict.bad == {"n3": "does not reach n2 (timeout)"}
        assert verdict.summary == "pairs: 4 of 6 reach each other, at 20 to 20 GiB/s"


def test_of_three_nodes_the_bad_one_is_known_and_of_two_both_are_in_doubt() -> None:
    assert set(find_bad_nodes(["a", "b", "c"], _answers(["a", "b", "c"], {"b"}), 4).bad) == {"b"}
    verdict = find_bad_nodes(["a", "b"], [], 4)
    assert verdict.bad["a"] == "does not reach b, or that one is at fault (no answer)"
    assert set(verdict.bad) == {"a", "b"}


def test_a_broken_link_between_good_nodes_costs_one_of_them() -> None:
    nodes = ["a", "b", "c", "d"]
    answers = [a for a in _answers(nodes, set()) if a.pair != ("b", "c")]
    assert set(find_bad_nodes(nodes, answers, 4).bad) == {"c"}


def test_a_node_that_is_slow_with_everyone_is_named() -> None:
    nodes = [f"n{number}" for number in range(6)]
    verdict = find_bad_nodes(nodes, _answers(nodes, set(), slow="n2"), 4)
    assert verdict.bad == {"n2": "all-reduce at 1 GiB/s (20 between others)"}
    # Of three pairs two are slow: nobody can say which node it is.
    assert find_bad_nodes(nodes[:3], _answers(nodes[:3], set(), slow="n2"), 4).bad == {}


def test_where_nobody_reaches_anybody_the_nodes_are_not_at_fault() -> None:
    assert find_bad_nodes(
        ["a", "b", "c"], _answers(["a", "b", "c"], {"a", "b", "c"}), 4
    ).no_pair_error
    pair, error = ("a", "b"), "ModuleNotFoundError: No module named 'torch'"
    assert find_bad_nodes(["a", "b"], [PairResult(pair, None, error)] * 2, 4).no_pair_error == error
    assert (
        find_bad_nodes(
            ["a", "b"], [PairResult(pair, None, "no answer in 90 s")] * 2, 4
        ).no_pair_error
        is None
    )
