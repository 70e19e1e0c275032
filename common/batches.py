"""What each step of rl.py samples, and what of it is kept on disk.

    stream of problems ──longest first──▶ sampler ──▶ this rank's rollouts, and what has not ended
    rollouts of all ranks ──record──▶ RUN/rollouts/step_000012.npz, before they are learnt from

    rollouts and packs ──row_of, trace_rows──▶ lines of RUN/rollouts.jsonl and trace.jsonl

Problems are known by their place in the stream: step s of P problems has the places from s P on.
A run that resumes in a step that was cut off reads its record instead of sampling again, and what
the step before had put aside goes on from its tokens. Negative places are a second order of the
same problems, which take over the slots of --resample.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from common import checkpoint, data, distributed
from common.data import ImageSettings, Rollout
from common.packs import exchange
from common.records import places_and_rows
from reward import Verdict

TRACED = 4  # samples of a problem, as many right as wrong ones where there are

# ---- a step on disk


def record_of(run: Path, step: int) -> Path:
    """What was sampled in a step: a run that resumes there reads it instead of sampling again."""
    return run / f"rollouts/step_{step:06}.npz"


def record(run: Path, step: int, rollouts: list[Rollout]):
    """Writes what was sampled, before it is learnt from; what no resume will read again goes."""
    file = record_of(run, step)
    file.parent.mkdir(exist_ok=True)
    save_rollouts(file, rollouts)
    # of the step before a checkpoint, too: what is unfinished in it goes on where a run resumes
    oldest = record_of(run, max(0, min(checkpoint.complete_steps(run), default=0) - 1))
    for old in file.parent.glob("step_*.npz"):
        if old.name < oldest.name:
            old.unlink()


def save_rollouts(path: str | Path, rollouts: list[Rollout]):
    """The rollouts of one step, those that go on as well; 8 bytes a token, whole or not at all."""
    rows = [
        (r.problem.id, r.index, r.sample, r.stopped, r.verdict, float(r.reward))
        + (r.seed, r.unfinished, r.stale)
        for r in rollouts
    ]
    part = Path(f"{path}.part")
    with part.open("wb") as file:
        np.savez(
            file,
            rows=json.dumps(rows).encode(),
            ends=np.cumsum([len(r.response_ids) for r in rollouts]),
            ids=np.concatenate([np.array(r.response_ids, np.int32) for r in rollouts]),
            logps=np.concatenate([np.array(r.logps, np.float32) for r in rollouts]),
        )
    part.replace(path)


def load_rollouts(
    path: str | Path, stream: data.Stream, tokenizer, settings: ImageSettings, unfinished=False
) -> list[Rollout]:
    """What save_rollouts wrote, bit for bit, with the problems at their places in the stream.
    unfinished: only what goes on in the next step.
    """
    with np.load(path) as saved:
        rows, ends = json.loads(saved["rows"].item()), saved["ends"][:-1]
        ids, logps = (np.split(saved[name], ends) for name in ("ids", "logps"))
    chosen = [one for one in zip(rows, ids, logps, strict=True) if one[0][-2] or not unfinished]
    names = {i: name for (name, i, *_), _, _ in chosen}
    problems = {i: stream[i] for i in names}
    if names != {i: p.id for i, p in problems.items()}:
        raise ValueError(
            f"{path} is of other problems than these, so data or settings have changed: restore "
            "them, or delete the file to sample the step again"
        )
    prompts = {i: data.encode_problem(p, tokenizer, settings) for i, p in problems.items()}
    rollouts = []
    for (_, i, sample, stopped, verdict, *rest), own, of_own in chosen:
        sampled = (problems[i], sample, prompts[i], i, own.tolist(), of_own.tolist(), stopped)
        text = tokenizer.decode(own, skip_special_tokens=True)
        rollouts.append(Rollout(*sampled, text, verdict and Verdict(*verdict), *rest))
    return rollouts


# ---- the order of sampling, and its end


def longest_first(batch: dict, lengths: dict[str, tuple], unfinished: list[Rollout]) -> list[int]:
    """The order in which problems are handed out: a long response that starts last is a tail in
    which most of the engine idles. No rollout changes by it.

    First come those that go on, then those never seen (each may be the longest, and one that is
    short costs nothing in front), then by falling mean of add_lengths(), from an epoch earlier.
    """
    going_on = {r.index for r in unfinished}

    def rank(index: int) -> tuple:
        _, tokens, responses = lengths.get(batch[index].id, (None, math.inf, 1))
        return index not in going_on, -tokens / responses

    return sorted(batch, key=rank)


def add_lengths(lengths: dict[str, tuple], rollouts: list[Rollout]) -> dict[str, tuple]:
    """Into `lengths`: {problem id: (its place in the stream, tokens, responses)} of the responses
    that have ended since it was drawn there; older ones are forgotten. -> what is new
    """
    for r in rollouts:
        place, tokens, responses = lengths.get(r.problem.id, (r.index, 0, 0))
        before = (tokens, responses) if place == r.index else (0, 0)
        lengths[r.problem.id] = r.index, before[0] + len(r.response_ids), before[1] + 1
    return {r.problem.id: lengths[r.problem.id] for r in rollouts}


def read_lengths(run: Path) -> dict[str, tuple]:
    """What add_lengths() knew when the steps ended that stand in the run's log."""
    file, lengths = run / "lengths.jsonl", {}
    for line in file.open(encoding="utf-8") if file.exists() else ():
        lengths |= json.loads(line)["lengths"]
    return lengths


def finish_rule(cfg, step: int, unfinished: int, world) -> Callable | None:
    """Sampler.generate's `enough`: the rest is put aside once --finish-share of the responses has
    ended, but not in the last step. Engines count together, so that none waits for another's tail;
    the torch sampler counts by batch, so that its numbers do not hang on the clock.
    """
    share, in_flight = cfg.finish_share, unfinished + cfg.problems * cfg.samples
    if share == 1 or step == cfg.steps - 1:
        return None
    if cfg.sampler == "torch":
        return lambda ended, of: ended >= share * of
    in_all = distributed.running_sum(world, f"ended/{step}")
    return lambda ended, of: in_all(ended) >= share * in_flight


# ---- batches


def slot_of(index: int, cfg) -> int:
    """Which problem of its step: 0 to P - 1. One of --resample has the slot that it takes over."""
    return (index if index >= 0 else -1 - index) % cfg.problems


def groups_of(rollouts: list[Rollout], cfg) -> dict[int, list[Rollout]]:
    """{slot: samples of the problem that has it}, of several problems of the last one."""
    groups = {}
    for r in sorted(rollouts, key=lambda r: (r.index < 0, abs(r.index), r.sample)):
        group = groups.setdefault(slot_of(r.index, cfg), [])
        if group and group[0].index != r.index:
            group.clear()
        group.append(r)
    return groups


class Batches:
    """New problems of each step, what the step before left unfinished, and what is recorded of a
    step that was cut off. cfg: rl.Config.
    """

    def __init__(self, cfg, world, sampler, problems: Sequence, start: int):
        self.cfg, self.world, self.sampler, self.run = cfg, world, sampler, Path(cfg.out)
        self.stream = data.Stream(problems, cfg.seed)
        self.lengths = read_lengths(self.run) if world.main else {}
        self.recorded = []  # rollouts of all ranks, as the next
        self.unfinished = self.read(start - 1, unfinished=True) if start else []

    def read(self, step: int, unfinished: bool = False) -> list[Rollout]:
        """The record of a step, if there is one. Rank 0 looks for all: a shared disk may tell ranks
        different things."""
        file = record_of(self.run, step)
        if not distributed.everyone(file.exists())[0]:
            return []
        tools = self.sampler.tokenizer, self.sampler.settings
        return load_rollouts(file, self.stream, *tools, unfinished=unfinished)

    def sample(self, step: int, budget: int) -> list[Rollout]:
        """This rank's rollouts that have ended; those that have not go on in the next step."""
        cfg, world, before = self.cfg, self.world, self.unfinished
        places = range(step * cfg.problems, (step + 1) * cfg.problems)
        self.recorded = self.read(step)
        if self.recorded:
            mine = [r for r in self.recorded if self.is_mine(r.index) and r.index >= 0]
        else:
            batch = {i: self.stream[i] for i in (*dict.fromkeys(r.index for r in before), *places)}
            order = distributed.everyone(longest_first(batch, self.lengths, before))[0]  # rank 0's
            turns = distributed.my_problems(world, len(order), f"{step}", cfg.sampler == "vllm")
            how = dict(seed=(cfg.seed, step), indices=(order[k] for k in turns), unfinished=before)
            how["enough"] = finish_rule(cfg, step, len(before), world)
            mine = self.sampler.generate(batch, cfg.samples, budget, **how)
        self.unfinished, _ = exchange([r for r in mine if r.unfinished], self.stream, world)
        self.ended = len(before) + len(places) * cfg.samples - len(self.unfinished)
        return [r for r in mine if not r.unfinished]

    def others(self, step: int, budget: int, round: int, slots: list[int]) -> list[Rollout]:
        """Rollouts of the problems that take over these slots in a round of --resample."""
        cfg = self.cfg
        first = -1 - (step * cfg.resample + round - 1) * cfg.problems
        batch = {first - slot: self.stream[first - slot] for slot in range(cfg.problems)}
        places = [first - slot for slot in slots]
        if self.recorded:
            return [r for r in self.recorded if r.index in places]
        how = dict(seed=(cfg.seed, step, round), indices=places)
        return self.sampler.generate(batch, cfg.samples, budget, **how)

    def is_mine(self, index: int) -> bool:
        return slot_of(index, self.cfg) % self.world.size == self.world.rank

    def collect(self, step: int, rollouts: list[Rollout]) -> tuple[list[Rollout], list[int]]:
        """Records what all ranks have sampled. -> rollouts of all ranks that are learnt from, in
        the order of the batch, and the tokens of each. `counts` says what else there was.
        """
        every, lengths = exchange(rollouts, self.stream, self.world)
        fresh = sum(r.index >= 0 for r in every)
        assert fresh == self.ended, f"{fresh} rollouts, not {self.ended}"
        if self.world.main:
            record(self.run, step, every + self.unfinished)
        self.counts = {"unfinished": len(self.unfinished)}
        if not self.cfg.resample:
            return every, lengths
        self.counts["resampled"] = (len(every) - fresh) // self.cfg.samples
        tokens = {(r.index, r.sample): n for r, n in zip(every, lengths, strict=True)}
        newest = sum((group for _, group in sorted(groups_of(every, self.cfg).items())), [])
        return newest, [tokens[r.index, r.sample] for r in newest]

    def add_lengths(self, step: int, rollouts: list[Rollout]) -> dict:
        """A line of lengths.jsonl, which a resumed run knows the lengths by."""
        return {"step": step, "lengths": add_lengths(self.lengths, rollouts)}


# ---- what of a step people look at


def row_of(step: int, r, tokenizer) -> dict:
    """A rollout as a person reads it: a line of rollouts.jsonl."""
    ids = [int(token) for token in r.response_ids]
    row = {"step": step, "id": r.problem.id, "sample": r.sample, "source": r.problem.source}
    row |= {"prompt": r.problem.prompt, "answer": r.problem.answer, "image": bool(r.problem.images)}
    row |= {"response": tokenizer.decode(ids, skip_special_tokens=True), "length": len(ids)}
    return row | {"reward": r.reward, "status": r.verdict.status, "stopped": r.stopped}


def samples_to_trace(rollouts: list) -> list[int]:
    """Indices of samples, best and worst, of the first problem that has right and wrong ones; of
    one with a picture, if there is any.
    """
    by_problem = groupby(range(len(rollouts)), key=lambda i: rollouts[i].index)
    groups = [[*members] for _, members in by_problem]
    groups = [g for g in groups if rollouts[g[0]].problem.images] or groups
    mixed = (g for g in groups if len({rollouts[i].reward for i in g}) > 1)
    best_first = sorted(next(mixed, groups[0]), key=lambda i: -rollouts[i].reward)
    return sorted({*best_first[: TRACED // 2], *best_first[-(TRACED // 2) :]})


def trace_rows(step: int, rollouts: list, packs: list, tokenizer, world) -> list[dict]:
    """Lines of trace.jsonl, before the update: of one problem what is known of every token, its
    log-prob, value and advantage. Each rank knows of the tokens that it trains.
    """
    chosen, mine = samples_to_trace(rollouts), {}
    for pack in packs:
        columns = [pack.advantages] if pack.values is None else [pack.advantages, pack.values]
        by_document = zip(*(column.split(pack.counts) for column in columns), strict=True)
        for i, numbers in zip(pack.members, by_document, strict=False):  # a filler has no members
            if i in chosen:
                mine[i] = [short(column.tolist()) for column in numbers]
    numbers, rows = distributed.union(world, mine), []
    for i in chosen:
        r, (advantages, *values) = rollouts[i], numbers[i]
        row = row_of(step, r, tokenizer)
        row |= {"images": [image for image in r.problem.images if isinstance(image, str)]}
        row |= {"tokens": [tokenizer.decode([int(token)]) for token in r.response_ids]}
        row |= {"logps": short(r.logps), "values": values[0] if values else None}
        rows.append(row | {"advantages": advantages})
    return rows


def short(numbers) -> list[float]:
    """Four digits each: a line of a 48k-token response is long enough."""
    return [float(f"{float(x):.4g}") for x in numbers]


def read_trace(run: Path, step: int) -> list[dict]:
    """The lines of trace.jsonl of one step; -1: the last in which samples differ in their reward.
    Those of all steps of a 7B run would fill memory.
    """
    file, rewards = run / "trace.jsonl", defaultdict(set)
    for _, row in places_and_rows(file):
        rewards[row["step"]].add(row["reward"])
    mixed = [s for s in rewards if len(rewards[s]) > 1]
    step = max(mixed or rewards) if step == -1 else step
    if step not in rewards:
        there = f"step {step} is not there; there are {min(rewards)} to {max(rewards)}"
        raise ValueError(f"{file}: {there}")
    return [row for _, row in places_and_rows(file) if row["step"] == step]
