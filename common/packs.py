"""Documents of unequal length become packs of equal work, for one rank or many.

    rollouts of each rank    ──exchange──▶ all rollouts of the batch, on every rank, in one order
    lengths of all documents ──plan_packs──▶ which rank packs which documents
    documents of one pack    ──make_pack──▶ Pack: what the model reads, and what is trained in it

A pack is a micro-batch: whole documents back to back up to a budget of tokens, no padding, no cut.
What is trained follows from lengths, never from token ids: a mask of `ids == pad` also masks the
stop token. Attention grows with the square of a document's length (PaLM, arXiv 2204.02311, app. B):
one of 64k tokens takes 1.7 times as long as eight of 8k. Hence documents are balanced by FLOPs.
Dimensions: T tokens of a pack, R trained, S patches, M image tokens.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.data import MERGE_SIZE, PATCH_VALUES, Document, Prompt, image_tokens
from model import Inputs, mrope_positions

PIECE = 16  # samples of a problem stay together up to 1/16 of a pack: fine enough to balance


# ------------------------------------------------------------------ one pack


@dataclass(kw_only=True)
class Pack(Inputs):
    """What the model reads, what is trained in it, and what RL knows of each trained token."""

    rows: Tensor  # (R,) int64: of each trained token, the row before it, where it is predicted
    targets: Tensor  # (R,) int64: the ids of the trained tokens
    counts: list[int]  # trained tokens of each document; their sum is R
    members: list[int]  # index of each document in the batch
    names: list[str]  # of the documents, for error messages
    logps: Tensor | None = None  # (R,) float32, by the sampler when it drew the token
    stale: Tensor | None = None  # (R,) bool: drawn in an earlier step, by the policy of that time
    old_logps: Tensor | None = None  # (R,) by the trainer before the first of several policy steps
    rewards: Tensor | None = None  # (R,) zero but for a document's last token
    values: Tensor | None = None  # (R,) the critic's, before the token
    advantages: Tensor | None = None  # (R,)
    returns: Tensor | None = None  # (R,) the critic's targets

    def __post_init__(self):
        tokens, patches = len(self.ids), 0 if self.patches is None else len(self.patches)
        rows = tokens if self.expand is None else len(self.expand)
        assert sum(self.lengths) == rows, f"lengths sum to {sum(self.lengths)}, not {rows} rows"
        trained = (sum(self.counts),)
        assert self.rows.shape == self.targets.shape == trained, f"{self.rows.shape}, {trained}"
        assert sum(map(math.prod, self.grids)) == patches, f"{self.grids} for {patches} patches"
        shown = (0, patches // MERGE_SIZE**2)  # 0: a blank picture
        assert len(self.slots) in shown, f"{len(self.slots)} tokens show {patches} patches"

    def to(self, device: torch.device | str) -> "Pack":
        """Onto a GPU from pinned memory: the host goes on and does not wait for the copy."""
        if torch.device(device).type == "cpu":
            return self
        moved = copy(self)  # it was checked already, and to check on the GPU is to wait for it
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.pin_memory().to(device, non_blocking=True))
        return moved


def make_pack(
    documents: Sequence, members: Sequence[int] | None = None, share_prompts: bool = False
) -> Pack:
    """One pack of `documents` (anything with prompt, response_ids and name), in this order.

    members: their indices in the batch. share_prompts: a `prompt` object that several documents
    have (samples of one problem) stands once with its pictures, and all but attention runs once for
    it: of 16 responses as long as their prompt 17 parts are left of 32. Attention reads each
    document's rows through `expand`; log-probs and gradients stay the same, to rounding.
    """
    ids, positions, expand, rows, length = [], [], [], [], 0
    patches, grids, slots, starts = [], [], [], {}  # starts: of prompts that stand in ids
    responses = [torch.as_tensor(document.response_ids).long() for document in documents]
    for document, response in zip(documents, responses, strict=True):
        prompt, size = document.prompt, len(document.prompt.ids)
        images = list(zip(prompt.offsets, prompt.grids, strict=True))
        places = mrope_positions(size + len(response), images, MERGE_SIZE)
        start = starts.get(id(prompt)) if share_prompts else None
        if start is None:
            start = starts[id(prompt)] = length
            length += size
            ids.append(torch.tensor(prompt.ids))
            positions.append(places[:, :size])
            patches += [prompt.patches] if images else []
            grids += prompt.grids
            slots += [torch.arange(image_tokens(g, MERGE_SIZE)) + start + o for o, g in images]
        own = torch.cat([torch.arange(size) + start, torch.arange(len(response)) + length])
        length += len(response)
        ids.append(response)
        positions.append(places[:, size:])
        expand.append(own)
        rows.append(own[size - 1 : -1])  # each response token is predicted by the row before it
    every = torch.cat(expand)
    return Pack(
        ids=torch.cat(ids),
        positions=torch.cat(positions, dim=1),
        lengths=[len(own) for own in expand],
        patches=torch.cat(patches) if patches else None,
        grids=grids,
        slots=torch.cat([torch.zeros(0, dtype=torch.int64), *slots]),
        expand=every if len(every) > length else None,
        rows=torch.cat(rows),
        targets=torch.cat(responses),
        counts=[len(response) for response in responses],
        members=list(range(len(documents)) if members is None else members),
        names=[document.name for document in documents],
    )


def pack_alone(documents: Sequence) -> Pack:
    """All documents in one pack, from short to long: attention takes equal lengths as one batch."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    return make_pack([documents[i] for i in order], order)


def full_pack(tokens: int) -> Pack:
    """One document of so many tokens, all of them trained: what a rank has to have room for."""
    return make_pack([Document(Prompt([0], [0], None, (), ()), [0] * (tokens - 1))])


def filler_pack() -> Pack:
    """Two tokens, none trained: for a rank that has run out of packs while others run theirs."""
    return make_pack([Document(Prompt([0, 0], [0, 0], None, (), ()), [])], members=[])


def with_blank_picture(pack: Pack, trains: bool = True) -> Pack:
    """A pack that runs the vision tower even without a picture of its own: where it trains, ranks
    gather its shards together and would wait for ever, and Adam wants a gradient of 0, not none. No
    token shows this picture.
    """
    if not trains or pack.patches is not None:
        return pack
    return replace(pack, patches=torch.zeros(MERGE_SIZE**2, PATCH_VALUES), grids=[(1, 2, 2)])


# ------------------------------------------------------------------ the rollouts of all ranks


def exchange(rollouts: list, problems: Sequence) -> list:
    """Every rank's rollouts on every rank, in the order of the batch. Ids and log-probs travel as
    arrays, 8 bytes a token, prompts without pictures; texts stay where they are.
    """
    mine, sent = {(r.index, r.sample): r for r in rollouts}, {}
    prompts = {}  # one object a problem, which pickle sends once
    for key, r in mine.items():
        bare = prompts[r.index] = prompts.get(r.index) or replace(r.prompt, patches=None)
        ids, logps = np.array(r.response_ids, np.int32), np.array(r.logps, np.float32)
        sent[key] = replace(r, problem=None, prompt=bare, text="", response_ids=ids, logps=logps)
    every = sorted(distributed.union(sent).items())
    return [mine.get(key) or replace(r, problem=problems[r.index]) for key, r in every]


def share_packs(rollouts: list, cfg, cost: Callable, encode: Callable, world) -> list[list[Pack]]:
    """This rank's packs of each part of the batch, with the sampler's log-probs and the rewards.

    A part is whole problems and does not depend on the number of ranks, so that an optimiser that
    takes a step a part takes the same steps on any. cfg: parts, pack_tokens, train_vision. encode:
    a problem's prompt, for pictures of other ranks.
    """
    lengths, groups = [len(r.document) for r in rollouts], [r.index for r in rollouts]
    starts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
    edges = [starts[len(starts) * k // cfg.parts] for k in range(cfg.parts)] + [len(rollouts)]
    whole = [r for r in rollouts if r.prompt.patches is not None or not r.prompt.grids]
    prompts, shares = {r.index: r.prompt for r in whole}, []
    for first, end in pairwise(edges):
        plan = plan_packs(lengths[first:end], groups[first:end], cfg.pack_tokens, world.size, cost)
        shares.append([])
        for members in plan[world.rank]:
            members = sorted((first + i for i in members), key=lengths.__getitem__)
            for r in (rollouts[i] for i in members):
                if r.index not in prompts:
                    prompts[r.index] = encode(r.problem)
                r.prompt = prompts[r.index]  # samples share the object, and so its rows in a pack
            pack = rollout_pack([rollouts[i] for i in members], members)
            shares[-1].append(with_blank_picture(pack, cfg.train_vision))
    return shares


def rollout_pack(rollouts: list, members: list[int]) -> Pack:
    """A pack of rollouts; a filler, if there are none."""
    pack = make_pack(rollouts, members, share_prompts=True) if rollouts else filler_pack()
    pack.logps = torch.cat([torch.zeros(0), *(torch.as_tensor(r.logps) for r in rollouts)])
    pack.stale = torch.zeros(len(pack.targets), dtype=torch.bool)
    pack.rewards = torch.zeros(len(pack.targets))
    end = 0
    for r, count in zip(rollouts, pack.counts, strict=False):  # a filler counts none
        pack.stale[end : end + r.stale] = True
        end += count
        pack.rewards[end - 1] = r.reward
    return pack


# ------------------------------------------------------------------ which documents go where


def plan_packs(
    lengths: Sequence[int], groups: Sequence, budget: int, ranks: int = 1, cost: Callable = float
) -> list[list[list[int]]]:
    """For each rank its packs, for each pack the indices of its documents; an empty one: a filler.

    Every rank gets equally many packs, and all make the same plan. Ranks run their k-th packs
    together and wait for the costliest, as FSDP gathers each layer from all. So packs are filled
    row by row, one a rank, from the costliest documents on: long ones meet long ones.

    groups: the problem of each document, whose samples stay together as far as that costs no
    waiting, since they can share their prompt. cost: FLOPs of a document of so many tokens.
    """
    if max(lengths, default=0) > budget:
        longest = f"document {lengths.index(max(lengths))} has {max(lengths)} tokens"
        raise ValueError(f"{longest}, a pack holds {budget}: raise --pack-tokens, or leave it out")
    # as floats: the FLOPs of a batch, some 1e19, overflow 64 bits
    tokens, costs = np.array(lengths), np.array([float(cost(length)) for length in lengths])
    size, limit = budget, math.inf  # of a piece, and of a pack's cost: one rank waits for nobody
    if ranks > 1:
        rows = max(1, math.ceil(sum(lengths) / (budget * ranks)))  # that would hold all, gapless
        # somewhat above a pack's share, or the last pieces would find no place
        limit = 1.05 * costs.sum() / (rows * ranks) + min(costs, default=0)
        size = budget / PIECE
    packs, pieces = [], cut_groups(tokens, costs, groups, size, limit / PIECE)
    while pieces:
        row, rest = [[] for _ in range(ranks)], []
        room, load = np.full(ranks, budget), np.zeros(ranks)
        # a row that begins with a costly document may be as costly as that one
        most = max(limit, costs[pieces[0]].sum())
        for piece in pieces:  # into the cheapest pack that has room for its tokens and its cost
            piece_tokens, piece_cost = tokens[piece].sum(), costs[piece].sum()
            fits = (room >= piece_tokens) & (load + piece_cost <= most)
            best = int(np.where(fits, load, np.inf).argmin())
            if fits[best]:
                row[best] += piece
                room[best] -= piece_tokens
                load[best] += piece_cost
            else:
                rest.append(piece)
        packs, pieces = packs + row, rest
    packs.sort(key=lambda members: -costs[members].sum())  # what costs about the same runs together
    return [packs[rank::ranks] for rank in range(ranks)]


def cut_groups(tokens, costs, groups: Sequence, size: float, work: float) -> list[list[int]]:
    """Each group in its order, cut into pieces of at most so many tokens and FLOPs, or of one
    document; the costliest piece first.
    """
    pieces, newest = [], {}
    for i, group in enumerate(groups):
        piece = [*newest.get(group, []), i]
        if len(piece) > 1 and (tokens[piece].sum() > size or costs[piece].sum() > work):
            pieces.append(piece[:-1])
            piece = [i]
        newest[group] = piece
    return sorted([*pieces, *newest.values()], key=lambda piece: -costs[piece].sum())
