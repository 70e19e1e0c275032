"""One problem through the six steps of rl.py: its rows while it trains, and a page of text after.

    packs and rollouts of a step ──rows_of──▶ RUN/trace.jsonl ──▶ this page, and the report

Of each step rl.py keeps samples of one problem, token by token: what the sampler thought of the
token (log p), what the critic expected before it (value V), and what it is credited with (advantage
A). The problem is the first of the batch with right and wrong samples; with a picture, if one has.

    python -m tools.trace                                 # the last such step of out/laptop/rl
    python -m tools.trace --run out/ovr_7b/rl --step 40
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from common import distributed
from common.log import run_main
from common.records import places_and_rows

SAMPLES = 4  # of the problem, as many right as wrong ones where there are


@dataclass(frozen=True)
class Config:
    run: str = "out/laptop/rl"  # run directory of rl.py
    step: int = -1  # -1: the last one in which samples differ in their reward


# ------------------------------------------------------------------ while rl.py trains


def row_of(step: int, r, tokenizer) -> dict:
    """A rollout as a person reads it: a line of rollouts.jsonl."""
    ids = [int(token) for token in r.response_ids]
    row = {"step": step, "id": r.problem.id, "sample": r.sample, "source": r.problem.source}
    row |= {"prompt": r.problem.prompt, "answer": r.problem.answer, "image": bool(r.problem.images)}
    row |= {"response": tokenizer.decode(ids, skip_special_tokens=True), "length": len(ids)}
    return row | {"reward": r.reward, "status": r.verdict.status, "stopped": r.stopped}


def samples_to_trace(rollouts: list) -> list[int]:
    """Indices of samples of one problem, best and worst."""
    by_problem = groupby(range(len(rollouts)), key=lambda i: rollouts[i].index)
    groups = [[*members] for _, members in by_problem]
    groups = [g for g in groups if rollouts[g[0]].problem.images] or groups
    mixed = (g for g in groups if len({rollouts[i].reward for i in g}) > 1)
    best_first = sorted(next(mixed, groups[0]), key=lambda i: -rollouts[i].reward)
    return sorted({*best_first[: SAMPLES // 2], *best_first[-(SAMPLES // 2) :]})


def rows_of(step: int, rollouts: list, packs: list, tokenizer, world) -> list[dict]:
    """Lines of trace.jsonl, before the update; each rank knows of the tokens that it trains."""
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


# ------------------------------------------------------------------ the page


def read(run: Path, step: int) -> list[dict]:
    """The lines of one step of a run of rl.py. Those of all steps of a 7B run would fill memory."""
    file, rewards = run / "trace.jsonl", defaultdict(set)
    for _, row in places_and_rows(file):
        rewards[row["step"]].add(row["reward"])
    mixed = [s for s in rewards if len(rewards[s]) > 1]
    step = max(mixed or rewards) if step == -1 else step
    if step not in rewards:
        there = f"step {step} is not there; there are {min(rewards)} to {max(rewards)}"
        raise ValueError(f"{file}: {there}")
    return [row for _, row in places_and_rows(file) if row["step"] == step]


def page(rows: list[dict]) -> str:
    first, best, worst = (*rows[:1], *(f(rows, key=lambda row: row["reward"]) for f in (max, min)))
    count = len(first["images"])
    shown = f"{count} picture{'s' if count > 1 else ''}, " if count else ""
    lines = [f"step {first['step']}", f"1 sample     {first['id']}: {first['prompt']!r}"]
    lines += [f"             {shown}reference answer {first['answer']}"]
    lines += [f"             #{row['sample']}  {row['response']}" for row in rows]
    for row in rows:
        cut = "" if row["stopped"] else ", cut at the length budget"
        lines += [f"2 reward     #{row['sample']}  {row['status']}{cut}, reward {row['reward']:g}"]
    lines += [f"3 pack       {', '.join(str(row['length']) for row in rows)} trained tokens"]
    for row in [best] if best is worst else [best, worst]:
        lines += [f"4 advantages #{row['sample']}, reward {row['reward']:g}"]
        lines += ["             token           log p   value V  advantage A   5 update"]
        values = row["values"] or [math.nan] * len(row["tokens"])  # grpo has no critic
        columns = (row["tokens"], row["logps"], values, row["advantages"])
        for token, logp, value, advantage in zip(*columns, strict=True):
            push = "likelier" if advantage > 0 else "less likely" if advantage < 0 else "-"
            lines += [
                f"             {token:14} {logp:6.2f} {value:9.2f} {advantage:12.2f}   {push}"
            ]
    return "\n".join([*lines, "6 sync       the sampler gets the new weights"])


def main(cfg: Config):
    print(page(read(Path(cfg.run), cfg.step)))


if __name__ == "__main__":
    run_main(main, Config)
