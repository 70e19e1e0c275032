"""What each step of rl.py samples, and what of it is kept on disk.

    stream of problems ──longest first──▶ sampler ──▶ this rank's rollouts, and what has not ended
    rollouts of all ranks ──▶ RUN/rollouts/step_000012.npz, before they are learnt from
    rollouts and packs ──row_of, trace_rows──▶ lines of RUN/rollouts.jsonl and trace.jsonl

Problems are known by their place in the stream: step s of P problems has the places from s P on.
Negative places are a second order of the same problems, which take over the slots of --resample. A
run that resumes in a step that was cut off reads its record instead of sampling again, and what the
step before had put aside goes on from its tokens.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from common import checkpoint, data, distributed
from common.data import ImageSettings, Rollout
from common.packs import exchange
from common.records import places_and_rows, read_rows
from reward import Verdict

LOGGED = 16  # decoded rollouts a step in rollouts.jsonl
TRACED = 4  # samples of a problem, as many right as wrong ones where there are

# ---- a step on disk


def record_of(run: Path, step: int) -> Path:
    """What was sampled in a step: a run that resumes there reads it instead of sampling again."""
    return run / f"rollouts/step_{step:06}.npz"


def save_rollouts(path: str | Path, rollouts: list[Rollout]):
    """The rollouts of one step, those that go on as well; 8 bytes a token, whole or not at all."""
    rows = [
        vars(r) | dict(problem=r.problem.id, prompt=None, text="", response_ids=None, logps=None)
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
    """What save_rollouts wrote, bit for bit, with the problems at their places in the stream; none
    without a file. unfinished: only what goes on in the next step.
    """
    # rank 0 looks for all: a shared disk may tell ranks different things
    if not distributed.everyone(Path(path).exists())[0]:
        return []
    try:
        with np.load(path) as saved:
            rows, ends = json.loads(saved["rows"].item()), saved["ends"][:-1]
            ids, logps = (np.split(saved[name], ends) for name in ("ids", "logps"))
    except (BadZipFile, ValueError, EOFError) as error:
        cure = "delete it to sample the step again"
        raise ValueError(f"{path} is damaged ({error}): {cure}") from error
    rollouts, known = [], {}
    for row, *arrays in zip(rows, ids, logps, strict=True):
        if unfinished and not row["unfinished"]:
            continue
        place, verdict = row["index"], row["verdict"]
        if place not in known:
            known[place] = stream[place], data.encode_prompt(stream[place], tokenizer, settings)
        problem, prompt = known[place]
        if row["problem"] != problem.id:
            raise ValueError(
                f"{path} is of other problems than these, so data or settings have changed: "
                "restore them, or delete the file to sample the step again"
            )
        row |= dict(problem=problem, prompt=prompt, verdict=verdict and Verdict(*verdict))
        row["response_ids"], row["logps"] = (array.tolist() for array in arrays)
        row["text"] = tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        rollouts.append(Rollout(**row))
    return rollouts


# ---- the order of sampling, and its end


def longest_first(batch: dict, lengths: dict[str, tuple], unfinished: list[Rollout]) -> list[int]:
    """The order in which problems are handed out: a long response that starts last is a tail in
    which most of the engine idles. First come those that go on, then those never seen (each may be
    the longest), then by falling mean, from an epoch earlier. No rollout changes by it.
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
        place, tokens, responses = lengths.get(r.problem.id, (None, 0, 0))
        if place != r.index:
            tokens, responses = 0, 0
        lengths[r.problem.id] = r.index, tokens + len(r.response_ids), responses + 1
    return {r.problem.id: lengths[r.problem.id] for r in rollouts}


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


def newest_problems(rollouts: list[Rollout], count: int) -> dict[int, int]:
    """{place: slot} of the last problems that have taken the `count` slots of a step, by slot. The
    places of --resample are negative, more so in each round.
    """
    latest_last = sorted({r.index for r in rollouts}, reverse=True)
    takers = {(place if place >= 0 else -1 - place) % count: place for place in latest_last}
    return {place: slot for slot, place in sorted(takers.items())}


class Batches:
    """New problems of each step, what the step before left unfinished, and what is recorded of a
    step that was cut off. cfg: rl.Config.
    """

    def __init__(self, cfg, world, sampler, problems: Sequence, start: int):
        self.cfg, self.world, self.sampler, self.run = cfg, world, sampler, Path(cfg.out)
        self.stream, self.lengths = data.Stream(problems, cfg.seed), {}
        for row in read_rows(self.run / "lengths.jsonl") if world.main else ():
            self.lengths |= row["lengths"]
        self.unfinished = self.read(start - 1, unfinished=True) if start else []  # of all ranks

    def read(self, step: int, unfinished: bool = False) -> list[Rollout]:
        """What all ranks have sampled in a step, if that is recorded."""
        tools = self.sampler.tokenizer, self.sampler.settings
        return load_rollouts(record_of(self.run, step), self.stream, *tools, unfinished)

    def sample(self, step: int, budget: int) -> list[Rollout]:
        """This rank's rollouts that have ended; those that have not go on in the next step."""
        cfg, world, before = self.cfg, self.world, self.unfinished
        places = range(step * cfg.problems, (step + 1) * cfg.problems)
        self.recorded = self.read(step)
        if self.recorded:
            fresh = [r for r in self.recorded if r.index >= 0]  # not of --resample
            mine = [r for r in fresh if r.index % world.size == world.rank]
        else:
            batch = {i: self.stream[i] for i in (*dict.fromkeys(r.index for r in before), *places)}
            order = distributed.everyone(longest_first(batch, self.lengths, before))[0]  # rank 0's
            turns = distributed.my_problems(world, len(order), f"{step}", cfg.sampler == "vllm")
            how = dict(seed=(cfg.seed, step), indices=(order[k] for k in turns), unfinished=before)
            how["enough"] = finish_rule(cfg, step, len(before), world)
            mine = self.sampler.generate(batch, cfg.samples, budget, **how)
        self.unfinished = exchange([r for r in mine if r.unfinished], self.stream)
        self.ended = len(before) + len(places) * cfg.samples - len(self.unfinished)
        return [r for r in mine if not r.unfinished]

    def others(self, step: int, budget: int, round: int, slots: list[int]) -> list[Rollout]:
        """Rollouts of the problems that take over these slots in a round of --resample."""
        cfg = self.cfg
        first = -1 - (step * cfg.resample + round - 1) * cfg.problems
        places = [first - slot for slot in slots]
        if self.recorded:
            return [r for r in self.recorded if r.index in places]
        batch = {first - slot: self.stream[first - slot] for slot in range(cfg.problems)}
        how = dict(seed=(cfg.seed, step, round), indices=places)
        return self.sampler.generate(batch, cfg.samples, budget, **how)

    def collect(self, step: int, rollouts: list[Rollout]) -> list[Rollout]:
        """Records what all ranks have sampled. -> those that are learnt from, in the order of the
        batch. `counts` says what else there was.
        """
        every = exchange(rollouts, self.stream)
        fresh = sum(r.index >= 0 for r in every)
        assert fresh == self.ended, f"{fresh} rollouts, not {self.ended}"
        if self.world.main:
            file = record_of(self.run, step)
            file.parent.mkdir(exist_ok=True)
            save_rollouts(file, every + self.unfinished)
            # a run that resumes reads that of the step before, too: what is unfinished goes on
            oldest = min(checkpoint.complete_steps(self.run), default=0) - 1
            for old in file.parent.glob("step_*.npz"):
                if old.name < record_of(self.run, max(0, oldest)).name:
                    old.unlink()
        self.counts = {"unfinished": len(self.unfinished)}
        if self.cfg.resample:
            self.counts["resampled"] = (len(every) - fresh) // self.cfg.samples
            slots = newest_problems(every, self.cfg.problems)
            every = sorted((r for r in every if r.index in slots), key=lambda r: slots[r.index])
        self.new_lengths = add_lengths(self.lengths, every)
        return every

    def rows(self, step: int, rollouts: list[Rollout], packs: list) -> dict[str, list[dict]]:
        """{name of a file of the run: its new lines}"""
        tokenizer = self.sampler.tokenizer
        return {
            "rollouts": [row_of(step, r, tokenizer) for r in rollouts[:LOGGED]],
            "trace": trace_rows(step, rollouts, packs, tokenizer),
            "lengths": [{"step": step, "lengths": self.new_lengths}],
        }


# ---- what of a step people look at


def row_of(step: int, r, tokenizer) -> dict:
    """A rollout as a person reads it: a line of rollouts.jsonl."""
    ids = [int(token) for token in r.response_ids]
    row = {"step": step, "id": r.problem.id, "sample": r.sample, "source": r.problem.source}
    row |= {"prompt": r.problem.prompt, "answer": r.problem.answer, "image": bool(r.problem.images)}
    row |= {"response": tokenizer.decode(ids, skip_special_tokens=True), "length": len(ids)}
    return row | {"reward": r.reward, "status": r.verdict.status, "stopped": r.stopped}


def trace_rows(step: int, rollouts: list, packs: list, tokenizer) -> list[dict]:
    """Lines of trace.jsonl: of one problem what is known of every token, its log-prob, value and
    advantage. Of the problems with a picture (of all, if none has one) it is the first with right
    and wrong samples, or else the first. Each rank knows of the tokens that it trains.
    """
    groups = [[*g] for _, g in groupby(enumerate(rollouts), key=lambda pair: pair[1].index)]
    groups = [g for g in groups if g[0][1].problem.images] or groups
    groups = [g for g in groups if len({r.reward for _, r in g}) > 1] or groups
    best_first = sorted(groups[0], key=lambda pair: -pair[1].reward)
    chosen = dict(best_first[: TRACED // 2] + best_first[-(TRACED // 2) :])
    mine = {}
    for pack in packs:
        for name in ("values", "advantages"):
            column = getattr(pack, name)
            columns = () if column is None else column.split(pack.counts)  # grpo has no values
            for i, numbers in zip(pack.members, columns, strict=False):  # a filler has no members
                if i in chosen:
                    mine[i, name] = short(numbers.tolist())
    numbers, rows = distributed.union(mine), []
    for i, r in sorted(chosen.items()):
        row = row_of(step, r, tokenizer)
        row["images"] = [image for image in r.problem.images if isinstance(image, str)]
        row["tokens"] = [tokenizer.decode([int(token)]) for token in r.response_ids]
        row |= {"logps": short(r.logps), "values": numbers.get((i, "values"))}
        rows.append(row | {"advantages": numbers[i, "advantages"]})
    return rows


def short(numbers) -> list[float]:
    """Four digits each: a line of a 48k-token response is long enough."""
    return [float(f"{float(x):.4g}") for x in numbers]


def read_trace(run: Path, step: int) -> list[dict]:
    """The lines of trace.jsonl of one step; -1: the last in which samples differ in their reward.
    Those of all steps of a 7B run would fill memory.
    """
    file, found, mixed, there = run / "trace.jsonl", [], False, []
    for number, rows in groupby((row for _, row in places_and_rows(file)), lambda r: r["step"]):
        rows = [*rows]
        differ = len({row["reward"] for row in rows}) > 1
        if number == step or (step == -1 and differ >= mixed):
            found, mixed = rows, differ
        there.append(number)
    if not found:
        steps = f"{there[0]} to {there[-1]}" if there else "none"
        raise ValueError(f"{file}: step {step} is not there; there are {steps}")
    return found
