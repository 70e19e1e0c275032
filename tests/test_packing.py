"""packing.py: each document once, and ranks that hardly wait, against brute force and first-fit."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.packing import plan


def flops(length):
    """A 7B model, forward and backward: 6 x 7.07e9 a token, and attention."""
    return 42.4e9 * length + 0.60e6 * length**2


def rows_of(dealt):
    """The bins that run together, one of each rank."""
    return list(zip(*dealt, strict=True))


def step_cost(dealt, lengths, cost):
    loads = [[sum(cost(lengths[i]) for i in b) for b in row] for row in rows_of(dealt)]
    return sum(map(max, loads))


def check_plan(dealt, lengths, budget, ranks):
    assert len(dealt) == ranks and len({len(bins) for bins in dealt}) == 1
    bins = [b for rank in dealt for b in rank]
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    assert all(any(row) for row in rows_of(dealt))  # none where all ranks would run fillers
    needed = math.ceil(sum(lengths) / budget)
    assert len(bins) <= (2 * needed + ranks if ranks > 1 else max(1, 2 * needed - 1))


COSTS = st.sampled_from([float, lambda n: n**2, lambda n: 20 * n + n**2, flops])
ITEMS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60)


@given(ITEMS, st.integers(50, 200), st.integers(1, 8), COSTS)
@settings(max_examples=300, deadline=None)
def test_a_plan_has_every_document_once_in_equally_many_bins_a_rank(items, budget, ranks, cost):
    lengths, groups = [length for length, _ in items], [group for _, group in items]
    dealt = plan(lengths, groups, budget, ranks, cost)
    check_plan(dealt, lengths, budget, ranks) if items else None
    assert items or dealt == [[]] * ranks
    renamed = [("c", "e", "b", "d", "a")[group] for group in groups]  # hashed anew in each process
    assert plan(lengths, renamed, budget, ranks, cost) == dealt


def partitions(items):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def cheapest_step(lengths, budget, ranks, cost):
    """Over every way to share documents out to bins; falling bins in rows are then the best."""
    found = []
    for bins in partitions(list(range(len(lengths)))):
        if all(sum(lengths[i] for i in b) <= budget for b in bins):
            loads = sorted((sum(cost(lengths[i]) for i in b) for b in bins), reverse=True)
            found.append(sum(loads[::ranks]))
    return min(found)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(2, 4), COSTS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_step_lasts_at_most_four_thirds_of_the_shortest_that_is_possible(lengths, ranks, cost):
    dealt = plan(lengths, range(len(lengths)), 16, ranks, cost)
    shortest = cheapest_step(lengths, 16, ranks, cost)
    assert shortest * (1 - 1e-9) <= step_cost(dealt, lengths, cost) <= shortest * 4 / 3


def rl_batch(documents):
    """Groups of 16: log-normal lengths that are alike in a group, mean 10k, cut at 48k."""
    rng = np.random.default_rng(0)
    groups = np.arange(documents) // 16
    alike = rng.normal(size=documents // 16)[groups]
    spread = np.exp(0.8 * (alike + rng.normal(size=documents)) / 2**0.5 - 0.32)
    return np.clip(10_000 * spread, 300, 48_000).astype(int).tolist(), groups.tolist()


def first_fit_in_turn(lengths, budget, ranks):
    """What a plan replaces: documents in order to the first bin with room, bins dealt in turn."""
    bins = []
    for i, length in enumerate(lengths):
        room = (b for b in bins if sum(lengths[j] for j in b) + length <= budget)
        bin_ = next(room, None)
        if bin_ is None:
            bins.append(bin_ := [])
        bin_.append(i)
    bins += [[] for _ in range(-len(bins) % ranks)]
    return [bins[rank::ranks] for rank in range(ranks)]


@pytest.mark.parametrize(
    "documents, ranks, bound, before",
    [(256, 8, 1.02, 1.2), (2048, 8, 1.01, 1.1), (512, 64, 1.08, 1.8), (2048, 64, 1.03, 1.2)],
)
def test_ranks_hardly_wait_for_each_other_in_a_real_batch(documents, ranks, bound, before):
    lengths, groups = rl_batch(documents)
    share = sum(map(flops, lengths)) / ranks  # of one rank, if nobody ever waited
    dealt = plan(lengths, groups, 65_536, ranks, flops)
    check_plan(dealt, lengths, 65_536, ranks)
    assert step_cost(dealt, lengths, flops) / share < bound
    totals = [sum(flops(lengths[i]) for b in bins for i in b) for bins in dealt]
    assert max(totals) / share < bound
    # as few bins as hold the tokens in equal numbers a rank, or one more row
    assert len(dealt[0]) <= math.ceil(sum(lengths) / 65_536 / ranks) + 1
    naive = first_fit_in_turn(lengths, 65_536, ranks)
    assert step_cost(naive, lengths, flops) / share > before


def test_a_batch_of_the_paper_is_planned_in_a_moment():
    lengths, groups = rl_batch(8192)  # 512 problems x 16 samples
    began = time.process_time()
    dealt = plan(lengths, groups, 65_536, 64, flops)
    assert time.process_time() - began < 2  # about 0.3 s
    assert step_cost(dealt, lengths, flops) < 1.01 * sum(map(flops, lengths)) / 64


def test_equal_cost_counts_and_not_equal_tokens():
    lengths, square = [40] + [10] * 12, lambda n: n**2
    by_tokens = plan(lengths, range(13), 200, 2)
    assert [sum(lengths[i] for b in bins for i in b) for bins in by_tokens] == [80, 80]
    assert step_cost(by_tokens, lengths, square) == 1600 + 4 * 100  # and 8 x 100 beside it
    by_cost = plan(lengths, range(13), 200, 2, square)
    assert [sorted(b) for (b,) in by_cost] == [[0], [*range(1, 13)]]  # 1600 and 12 x 100


def test_long_documents_meet_long_ones_where_all_bins_cannot_cost_the_same():
    # Two ranks, two rows. Each long document is more than a fourth of all: beside each other they
    # take 60 + 20, and 60 + 60 if each had short ones beside it.
    dealt = plan([60, 60, 20, 20], range(4), 60, 2)
    assert [[0], [1]] in ([*row] for row in rows_of(dealt))
    assert step_cost(dealt, [60, 60, 20, 20], float) == 80


def test_samples_of_a_prompt_are_placed_together_and_no_rank_waits_for_that():
    def shown(dealt):  # pictures that pass the tower: one for each prompt in a bin
        return sum(len({groups[i] for i in b}) for bins in dealt for b in bins)

    lengths, groups = [10] * 64, [i % 4 for i in range(64)]  # alone: 4 prompts x 16, shuffled
    assert shown(plan(lengths, groups, 160)) == 4

    lengths, groups = rl_batch(2048)
    lengths = [length // 10 for length in lengths]  # 8 ranks, 128 prompts; early in a run
    together = plan(lengths, groups, 65_536, 8, flops)
    apart = plan(lengths, range(2048), 65_536, 8, flops)
    assert shown(together) < 3 * 128 < 10 * 128 < shown(apart)
    assert step_cost(together, lengths, flops) < 1.005 * step_cost(apart, lengths, flops)


def test_more_ranks_than_documents_get_fillers():
    dealt = plan([5, 9, 7], "aaa", 10, 4)
    assert sorted(dealt) == [[[]], [[0]], [[1]], [[2]]]
    assert plan([], [], 10, 2) == [[], []]


def test_a_document_over_the_budget_is_named_by_the_plan():
    with pytest.raises(ValueError, match="document 1: 11 tokens .* budget of 10; .* filter_long"):
        plan([10, 11], "ab", 10, 2)
