"""common/packs.py: each document once, ranks that hardly wait, prompts that stand once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import IMAGE, document

from common.data import Document, Prompt
from common.packs import filler_pack, make_pack, pack_alone, plan_packs
from model import mrope_positions


def flops(length):
    """A 7B model, forward and backward: 6 x 7.07e9 a token, and attention."""
    return 42.4e9 * length + 0.60e6 * length**2


def check_plan(plan, lengths, budget, ranks):
    assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
    packs = [pack for rank in plan for pack in rank]
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= budget for pack in packs)
    assert all(any(row) for row in zip(*plan, strict=True))  # none of fillers alone
    assert len(packs) <= 2 * (math.ceil(sum(lengths) / budget) + ranks)


COSTS = st.sampled_from([float, lambda n: n**2, lambda n: 10**17 * n, flops])
ITEMS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 4)), max_size=60)


@given(ITEMS, st.integers(50, 200), st.integers(1, 8), COSTS)
@settings(max_examples=300)
def test_a_plan_has_every_document_once_in_equally_many_packs_a_rank(items, budget, ranks, cost):
    lengths, groups = [length for length, _ in items], [group for _, group in items]
    plan = plan_packs(lengths, groups, budget, ranks, cost)
    check_plan(plan, lengths, budget, ranks)
    renamed = [("c", "e", "b", "d", "a")[group] for group in groups]  # hashed anew in each process
    assert plan_packs(lengths, renamed, budget, ranks, cost) == plan


def rl_batch(documents):
    """Groups of 16: log-normal lengths that are alike in a group, mean 10k, cut at 48k."""
    rng = np.random.default_rng(0)
    groups = np.arange(documents) // 16
    alike = rng.normal(size=documents // 16)[groups]
    spread = np.exp(0.8 * (alike + rng.normal(size=documents)) / 2**0.5 - 0.32)
    return np.clip(10_000 * spread, 300, 48_000).astype(int).tolist(), groups.tolist()


BATCHES = [(64, 16, 0.05), (256, 8, 0.005), (512, 64, 0.03), (8192, 64, 0.002)]


@pytest.mark.parametrize("documents, ranks, lost", BATCHES)
def test_ranks_hardly_wait_for_each_other_in_a_real_batch(documents, ranks, lost):
    lengths, groups = rl_batch(documents)
    share = sum(map(flops, lengths)) / ranks  # of one rank, if nobody ever waited
    plan = plan_packs(lengths, groups, 65_536, ranks, flops)
    check_plan(plan, lengths, 65_536, ranks)
    assert len(plan[0]) <= math.ceil(sum(lengths) / 65_536 / ranks) + 1

    def work(pack):
        return sum(flops(lengths[i]) for i in pack)

    # packs that run together take as long as the costliest of them
    taken = sum(max(map(work, row)) for row in zip(*plan, strict=True))
    assert taken / share - 1 < lost


def test_equal_cost_counts_and_samples_of_a_problem_stay_together_where_nobody_waits():
    lengths = [10, 6, 6, 6]
    for cost, loads in ((float, {16, 12}), (lambda n: n**2, {100, 108})):
        plan = plan_packs(lengths, range(4), 30, 2, cost)
        assert {sum(cost(lengths[i]) for i in packs[0]) for packs in plan} == loads
    fillers = plan_packs([5, 5], [0, 1], 10, 4)
    assert sorted(len(packs[0]) for packs in fillers) == [0, 0, 1, 1]
    scattered = [i % 8 for i in range(64)]  # samples of a problem lie apart in the batch
    (packs,) = plan_packs([10] * 64, scattered, 80)
    assert all(len({scattered[i] for i in pack}) == 1 for pack in packs)
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a pack holds 10"):
        plan_packs([3, 11], [0, 1], 10)


# ---- one pack

STOP = 9  # a token that ends a turn


def test_a_pack_holds_whole_documents_and_trains_responses_only():
    # The stop token stands in the prompt too, and a response token is 0: lengths decide, not ids.
    first, second = (Prompt(ids, ids, None, (), ()) for ids in ([5, STOP, 8], [1, 2]))
    pack = pack_alone([Document(first, [0, IMAGE, STOP]), Document(second, [3, STOP])])
    assert pack.members == [1, 0] and pack.lengths == [4, 6]  # short to long
    assert pack.ids.tolist() == [1, 2, 3, STOP, 5, STOP, 8, 0, IMAGE, STOP]
    assert pack.targets.tolist() == [3, STOP, 0, IMAGE, STOP]  # stop tokens included
    assert pack.rows.tolist() == [1, 2, 6, 7, 8] and pack.counts == [2, 3]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 3
    assert pack.patches is None and not len(pack.slots)  # a sampled image token is text
    filler = filler_pack().to("cpu")
    assert not len(filler.targets) and filler.members == [] and filler.lengths == [2]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_every_row_position_and_picture_of_a_document_is_its_own(share_prompts):
    shared, plain = document(1, (1, 4, 6), 2, (1, 4, 4), 3).prompt, document(5).prompt
    other = document((1, 6, 4), 4, seed=1).prompt
    answers = [(shared, 5), (shared, 7), (shared, 3), (other, 0), (plain, 4), (plain, 2)]
    documents = [Document(prompt, list(range(20, 20 + n))) for prompt, n in answers]
    pack = make_pack(documents, [4, 1, 0, 3, 2, 5], share_prompts)
    assert pack.members == [4, 1, 0, 3, 2, 5] and pack.counts == [5, 7, 3, 0, 4, 2]
    copies = 2 * len(shared.ids) + len(plain.ids) if share_prompts else 0
    assert len(pack.ids) == sum(map(len, documents)) - copies
    assert len(pack.patches) == (64 if share_prompts else 144)
    assert len(set(pack.slots.tolist())) == len(pack.slots) == len(pack.patches) // 4

    # A tower that gives each merged row the mean of its four patches; reference: one at a time.
    features = torch.zeros(len(pack.ids), 1176)
    features[pack.slots] = pack.patches.reshape(-1, 4, 1176).mean(dim=1)
    every = pack.expand if share_prompts else torch.arange(len(pack.ids))
    rows, targets = pack.rows.split(pack.counts), pack.targets.split(pack.counts)
    for i, (doc, own) in enumerate(zip(documents, every.split(pack.lengths), strict=True)):
        assert pack.ids[own].tolist() == doc.ids
        images = [*zip(doc.prompt.offsets, doc.prompt.grids, strict=True)]
        assert torch.equal(pack.positions[:, own], mrope_positions(len(doc), images))
        assert targets[i].tolist() == doc.response_ids
        first = len(doc.prompt.ids) - 1
        assert rows[i].tolist() == own[first : first + len(targets[i])].tolist()
        expected = torch.zeros(len(doc), 1176)
        if images:
            pictures = doc.prompt.patches.reshape(-1, 4, 1176).mean(dim=1)
            expected[torch.tensor(doc.ids) == IMAGE] = pictures
        assert torch.equal(features[own], expected)
