"""One problem through the six steps of rl.py, from RUN/trace.jsonl, as a page of text.

Of each step rl.py keeps samples of one problem, token by token: what the sampler thought of the
token (log p), what the critic expected before it (value V), and what it is credited with (advantage
A). common/batches.py chooses and writes them; the report shows them in colour.

    python -m tools.trace --run out/ovr_7b/rl --step 40       # default: out/laptop/rl
"""

import math
from dataclasses import dataclass
from pathlib import Path

from common.batches import read_trace
from common.log import run_main


@dataclass(frozen=True)
class Config:
    run: str = "out/laptop/rl"  # run directory of rl.py
    step: int = -1  # -1: the last one in which samples differ in their reward


def page(rows: list[dict]) -> str:
    first, count = rows[0], len(rows[0]["images"])
    shown = f"{count} picture{'s' if count > 1 else ''}, " if count else ""
    lines = [f"step {first['step']}", f"1 sample     {first['id']}: {first['prompt']!r}"]
    lines += [f"             {shown}reference answer {first['answer']}"]
    lines += [f"             #{row['sample']}  {row['response']}" for row in rows]
    for row in rows:
        cut = "" if row["stopped"] else ", cut at the length budget"
        lines += [f"2 reward     #{row['sample']}  {row['status']}{cut}, reward {row['reward']:g}"]
    lines += [f"3 pack       {', '.join(str(row['length']) for row in rows)} trained tokens"]
    best, worst = (pick(rows, key=lambda row: row["reward"]) for pick in (max, min))
    for row in [best] if best is worst else [best, worst]:
        lines += [f"4 advantages #{row['sample']}, reward {row['reward']:g}"]
        lines += ["             token           log p   value V  advantage A   5 update"]
        values = row["values"] or [math.nan] * len(row["tokens"])  # grpo has no critic
        columns = row["tokens"], row["logps"], values, row["advantages"]
        for token, logp, value, a in zip(*columns, strict=True):
            push = "likelier" if a > 0 else "less likely" if a < 0 else "-"
            lines += [f"             {token:14} {logp:6.2f} {value:9.2f} {a:12.2f}   {push}"]
    return "\n".join([*lines, "6 sync       the sampler gets the new weights"])


def main(cfg: Config):
    print(page(read_trace(Path(cfg.run), cfg.step)))


if __name__ == "__main__":
    run_main(main, Config)
