"""common/packs.py: each document once, ranks that hardly wait, prompts that stand once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import Document, Prompt
from common.packs import filler_pack, make_pack, pack_alone, plan_packs
from model import mrope_positions


def flops(length):
    """A 7B model, forward and backward: 6 x 7.07e9 a token, and attention."""
    return 42.4e9 * length + 0.60e6 * length**2


def rows_of(plan):
    """The packs that run together, one of each rank."""
    return list(zip(*plan, strict=True))


def step_cost(plan, lengths, cost):
    return sum(max(sum(cost(lengths[i]) for i in pack) for pack in row) for row in rows_of(plan))


def check_plan(plan, lengths, budget, ranks):
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    packs = [pack for rank in plan for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= budget for pack in packs)
    assert all(any(row) for row in rows_of(plan))  # none where all ranks would run fillers
    needed = math.ceil(sum(lengths) / budget)
    assert len(packs) <= 2 * needed + ranks


COSTS = st.sampled_from([float, lambda n: n**2, lambda n: 10**17 * n, flops])
ITEMS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60)


@given(ITEMS, st.integers(50, 200), st.integers(1, 8), COSTS)
@settings(max_examples=300)
def test_a_plan_has_every_document_once_in_equally_many_packs_a_rank(items, budget, ranks, cost):
    lengths, groups = [length for length, _ in items], [group for _, group in items]
    plan = plan_packs(lengths, groups, budget, ranks, cost)
    check_plan(plan, lengths, budget, ranks) if items else None
    assert items or plan == [[]] * ranks
    renamed = [("c", "e", "b", "d", "a")[group] for group in groups]  # hashed anew in each process
    assert plan_packs(lengths, renamed, budget, ranks, cost) == plan


def partitions(items):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]


def cheapest_step(lengths, budget, ranks, cost):
    """Over every way to share documents out to packs; falling packs in rows are then the best."""
    durations = []
    for packs in partitions(list(range(len(lengths)))):
        if all(sum(lengths[i] for i in pack) <= budget for pack in packs):
            loads = sorted((sum(cost(lengths[i]) for i in pack) for pack in packs), reverse=True)
            durations.append(sum(loads[::ranks]))
    return min(durations)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(2, 4), COSTS)
@settings(max_examples=150)
def test_a_step_lasts_at_most_four_thirds_of_the_shortest_that_is_possible(lengths, ranks, cost):
    plan = plan_packs(lengths, range(len(lengths)), 16, ranks, cost)
    shortest = cheapest_step(lengths, 16, ranks, cost)
    assert shortest * (1 - 1e-9) <= step_cost(plan, lengths, cost) <= shortest * 4 / 3


def rl_batch(documents):
    """Groups of 16: log-normal lengths that are alike in a group, mean 10k, cut at 48k."""
    rng = np.random.default_rng(0)
    groups = np.arange(documents) // 16
    alike = rng.normal(size=documents // 16)[groups]
    spread = np.exp(0.8 * (alike + rng.normal(size=documents)) / 2**0.5 - 0.32)
    return np.clip(10_000 * spread, 300, 48_000).astype(int).tolist(), groups.tolist()


@pytest.mark.parametrize(
    "documents, ranks, lost",
    [(256, 8, 0.005), (2048, 8, 0.002), (512, 64, 0.03), (2048, 64, 0.015), (8192, 64, 0.002)],
)
def test_ranks_hardly_wait_for_each_other_in_a_real_batch(documents, ranks, lost):
    lengths, groups = rl_batch(documents)
    share = sum(map(flops, lengths)) / ranks  # of one rank, if nobody ever waited
    plan = plan_packs(lengths, groups, 65_536, ranks, flops)
    check_plan(plan, lengths, 65_536, ranks)
    assert step_cost(plan, lengths, flops) / share - 1 < lost
    assert len(plan[0]) <= math.ceil(sum(lengths) / 65_536 / ranks) + 1


def test_equal_cost_counts_and_not_equal_tokens_and_ranks_without_documents_get_fillers():
    lengths = [60_000, *[6_000] * 10]
    (long,), (short,) = plan_packs(lengths, range(11), 65_536, 2, lambda n: n)
    assert {len(long), len(short)} == {1, 10}
    plan = plan_packs(lengths, range(11), 65_536, 2, lambda n: n**2)
    assert sorted(len(packs[0]) for packs in plan) == [1, 10]
    plan = plan_packs([5, 5], [0, 1], 10, 4)
    assert sorted(len(packs[0]) for packs in plan) == [0, 0, 1, 1]


def test_samples_of_a_problem_stay_together_where_no_rank_waits_for_that():
    lengths, groups = [10] * 64, [i // 8 for i in range(64)]
    plan = plan_packs(lengths, groups, 640, 1)
    assert all(pack == sorted(pack) for pack in plan[0])
    scattered = [i % 8 for i in range(64)]  # samples of a problem lie apart in the batch
    apart = plan_packs(lengths, scattered, 80, 1)
    assert all(len({scattered[i] for i in pack}) == 1 for pack in apart[0])


def test_a_document_over_the_budget_is_refused_with_its_length():
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a pack holds 10"):
        plan_packs([3, 11], [0, 1], 10)


# ---- one pack

PAD, STOP = 7, 9  # an image token; a token that ends a turn


def prompt_of(*parts, seed=0):
    """Of tokens and of pictures, which are given as (t, h, w)."""
    ids, offsets, grids, patches = [], [], [], []
    for part in parts:
        if isinstance(part, tuple):
            offsets.append(len(ids))
            grids.append(part)
            ids += [PAD] * (part[1] * part[2] // 4)
            noise = torch.Generator().manual_seed(100 * seed + len(grids))
            patches.append(torch.randn(part[1] * part[2], 1176, generator=noise))
        else:
            ids.append(part)
    patches = torch.cat(patches) if patches else None
    return Prompt(ids, ids, patches, tuple(grids), tuple(offsets))


def test_a_pack_holds_whole_documents_and_trains_responses_only():
    # The stop token stands in the prompt too, and a response token is 0: lengths decide, not ids.
    documents = [
        Document(prompt_of(5, STOP, 6), [0, 8, STOP]),
        Document(prompt_of(1, 2), [3, STOP]),
    ]
    pack = pack_alone(documents)
    assert pack.members == [1, 0] and pack.lengths == [4, 6]  # short to long
    assert pack.ids.tolist() == [1, 2, 3, STOP, 5, STOP, 6, 0, 8, STOP]
    assert pack.targets.tolist() == [3, STOP, 0, 8, STOP]  # stop tokens included
    assert pack.rows.tolist() == [1, 2, 6, 7, 8] and pack.counts == [2, 3]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 3
    assert pack.patches is None and pack.grids == [] and not len(pack.slots)
    indices = (pack.ids, pack.slots, pack.sources, pack.rows, pack.targets)
    assert {tensor.dtype for tensor in indices} == {torch.int64}


@pytest.mark.parametrize("share_prompts", [False, True])
def test_every_row_position_and_picture_of_a_document_is_its_own(share_prompts):
    shared = prompt_of(1, (1, 4, 6), 2, (1, 4, 4), 3)
    other, plain = prompt_of((1, 6, 4), 4, seed=1), prompt_of(1, 2, 3)
    answers = [(shared, 7), (shared, 3), (plain, 4), (other, 0), (shared, 5), (plain, 2)]
    documents = [Document(prompt, list(range(20, 20 + n))) for prompt, n in answers]
    pack = make_pack(documents, [4, 1, 0, 3, 2, 5], share_prompts)
    assert pack.members == [4, 1, 0, 3, 2, 5] and pack.counts == [7, 3, 4, 0, 5, 2]
    copies = 2 * len(shared.ids) + len(plain.ids) if share_prompts else 0
    assert len(pack.ids) == sum(map(len, documents)) - copies
    assert len(pack.patches) == (64 if share_prompts else 144)
    assert len(set(pack.slots.tolist())) == len(pack.slots) == (16 if share_prompts else 36)

    # A tower that gives each merged row the mean of its four patches; reference: one at a time.
    features = torch.zeros(len(pack.ids), 1176)
    features[pack.slots] = pack.patches.reshape(-1, 4, 1176).mean(dim=1)[pack.sources]
    assert (pack.expand is None) == (not share_prompts)
    every = pack.expand if share_prompts else torch.arange(len(pack.ids))
    rows, targets = pack.rows.split(pack.counts), pack.targets.split(pack.counts)
    for i, (document, own) in enumerate(zip(documents, every.split(pack.lengths), strict=True)):
        assert pack.ids[own].tolist() == document.ids
        images = [*zip(document.prompt.offsets, document.prompt.grids, strict=True)]
        assert torch.equal(pack.positions[:, own], mrope_positions(len(document), images))
        assert targets[i].tolist() == document.response_ids
        first = len(document.prompt.ids) - 1
        assert rows[i].tolist() == own[first : first + len(targets[i])].tolist()
        expected = torch.zeros(len(document), 1176)
        if document.prompt.grids:
            pictures = torch.tensor(document.ids) == PAD
            expected[pictures] = document.prompt.patches.reshape(-1, 4, 1176).mean(dim=1)
        assert torch.equal(features[own], expected)


def test_image_tokens_that_were_sampled_are_text_and_not_pictures():
    pack = make_pack([Document(prompt_of(1, (1, 4, 4)), [2, PAD, PAD])])
    assert pack.slots.tolist() == [1, 2, 3, 4] and pack.sources.tolist() == [0, 1, 2, 3]


def test_a_filler_pack_trains_nothing_and_moves_like_any_other():
    filler = filler_pack().to("cpu")
    assert not len(filler.targets) and filler.members == [] and filler.patches is None
    assert filler.lengths == [2] and filler.positions.tolist() == [[0, 1]] * 3
