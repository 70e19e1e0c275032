"""Which document goes into which pack of which rank: equal work for all ranks at the same time.

    plan(lengths, groups, budget, ranks, cost) -> for each rank its bins, for each bin its documents

A bin is a micro-batch of at most `budget` tokens, which is what memory allows. The ranks run their
k-th bins together and meet at every layer (FSDP gathers its weights there), so that all wait for
the costliest of them. A token costs more in a long document, whose attention grows with the square
of its length (PaLM, arXiv 2204.02311, app. B): one document of 64k tokens takes 1.7 times as long
as eight of 8k. Hence bins are weighed by their FLOPs, not by their tokens.

Every rank computes the same plan from the same lengths: nothing has to be agreed on. Of 8,192
responses of lognormal length on 64 ranks 0.5 % of the time is lost to waiting; first-fit bins dealt
out in turn lose 28 % (tests/test_packing.py).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np


def plan(
    lengths: Sequence[int],
    groups: Sequence,
    budget: int,
    ranks: int = 1,
    cost: Callable[[int], float] = float,
) -> list[list[list[int]]]:
    """For each rank its bins, for each bin the indices of its documents; an empty bin is a filler.

    Every rank gets equally many bins. All run their k-th together and wait for the slowest: a step
    lasts as long as the costliest k-th bins take, summed over k. So documents are laid out as rows
    of bins that cost the same; equal tokens are not equal cost. The better of two fillings is
    taken: row after row (long documents meet long ones), or all bins as one wide row (all equal).

    groups: documents of a prompt, placed several at a time and where the last ones went, unless a
        rank would wait for that.
    cost: FLOPs of a document of so many tokens, linear and quadratic; by default its tokens.
    """
    for i, length in enumerate(lengths):
        if length > budget:
            raise ValueError(
                f"document {i}: {length} tokens exceed the budget of {budget}; raise it, or leave "
                f"the document out with filter_long"
            )
    if not lengths:
        return [[] for _ in range(ranks)]
    costs = [cost(length) for length in lengths]
    needed = -(-sum(lengths) // (budget * ranks)) * ranks  # bins, by tokens
    # an eighth of a bin is fine enough to balance; alone a process has nobody to wait for
    limits = (budget / 8, sum(costs) / needed / 8) if ranks > 1 else (budget, math.inf)
    pieces = falling(pieces_of(lengths, costs, groups, *limits), costs)
    bins = fill_rows(pieces, lengths, costs, groups, budget, ranks)
    fillings = [bins]
    if len(bins) > ranks > 1:
        fillings.append(fill_rows(pieces, lengths, costs, groups, budget, len(bins)))
    # one that needed a second wide row has twice the bins
    plans = [deal(filling, costs, ranks) for filling in fillings if len(filling) == len(bins)]
    return min(plans, key=lambda dealt: duration(dealt, costs))


def total(members: list[int], values: Sequence[float]) -> float:
    return sum(values[i] for i in members)


def falling(bins: list[list[int]], costs: list[float]) -> list[list[int]]:
    """Costliest first; of equals, the earlier one first."""
    return sorted(bins, key=lambda members: -total(members, costs))


def duration(dealt: list[list[list[int]]], costs: list[float]) -> float:
    """Of a step: each row of bins that run together takes as long as its costliest."""
    rows = zip(*dealt, strict=True)
    return sum(max(total(members, costs) for members in row) for row in rows)


def pieces_of(
    lengths: Sequence[int], costs: list[float], groups: Sequence, tokens: float, load: float
) -> list[list[int]]:
    """Each group in its order, cut where a piece would exceed `tokens` or the cost `load`."""
    pieces, newest = [], {}  # of each group: its newest piece, the piece's tokens and cost
    for i, (group, length, cost) in enumerate(zip(groups, lengths, costs, strict=True)):
        piece, t, c = newest.get(group, ([], 0, 0.0))
        t, c = t + length, c + cost
        if not piece or t > tokens or c > load:
            piece, t, c = [], length, cost
            pieces.append(piece)
        piece.append(i)
        newest[group] = piece, t, c
    return pieces


def fill_rows(
    pieces: list[list[int]],
    lengths: Sequence[int],
    costs: list[float],
    groups: Sequence,
    budget: int,
    width: int,
) -> list[list[int]]:
    """Rows of `width` bins, one after the other in one list; the pieces come costliest first.

    A bin takes a piece that fits its tokens and does not make it the costliest of its row; only the
    row's cheapest bin may become that. A piece goes where its group was last, else to the cheapest
    bin of the first row that takes it: longest-processing-time in a row, first-fit over the rows.
    At most about twice as many bins as needed: a row is opened only when no other takes a document.
    """
    room, load = np.full((1, width), budget), np.zeros((1, width))  # the last row is still empty
    bins, last, todo = [], {}, pieces[::-1]
    while todo:
        piece = todo.pop()
        tokens, work, group = total(piece, lengths), total(piece, costs), groups[piece[0]]
        most = np.maximum(load.max(1) - work, load.min(1))
        takes = (room >= tokens) & (load <= most[:, None])
        b = last.get(group)
        if b is None or not takes.flat[b]:
            row = int(takes.any(1).argmax())
            b = row * width + int(np.where(takes[row], load[row], np.inf).argmin())
        if b >= len(bins):
            if len(piece) > 1:  # smaller ones may find room yet
                todo += [[i] for i in reversed(piece)]
                continue
            bins += [[] for _ in range(width)]
            room = np.vstack([room, np.full((1, width), budget)])
            load = np.vstack([load, np.zeros((1, width))])
        bins[b] += piece
        room.flat[b] -= tokens
        load.flat[b] += work
        last[group] = b
    return bins


def deal(bins: list[list[int]], costs: list[float], ranks: int) -> list[list[list[int]]]:
    """Rows of bins that cost alike; in each the costliest goes to the rank with least so far."""
    bins, dealt, totals = falling(bins, costs), [[] for _ in range(ranks)], [0.0] * ranks
    for first in range(0, len(bins), ranks):
        for b, rank in enumerate(sorted(range(ranks), key=totals.__getitem__), start=first):
            dealt[rank].append(bins[b])
            totals[rank] += total(bins[b], costs)
    return dealt
