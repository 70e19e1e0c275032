"""Where an iteration of rl.py spends its time, and how often it waits for the device.

    python bench/iteration.py                                   # the miniature of runs/laptop.sh
    python bench/iteration.py --model DIR --data FILE --steps 8

rl.main runs as it ships for a few steps, with a clock around what it calls; a function's time is
its own, without that of clocked functions inside. CPU seconds of one process with one thread, so
that other work on the machine does not count. The first step, which warms up, is left out.
"""

import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; rl.py then leaves it alone
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import model  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from common import batches, checkpoint, data, distributed  # noqa: E402
from common.log import RunLog, run_main  # noqa: E402

PARTS = {  # what is clocked, by the row of the table it counts for
    "model, forward": [(model.Qwen25VL, name) for name in ("logps", "values", "logits")],
    "model, backward": [(distributed, "backward")],
    "optimiser": [(torch.optim.AdamW, "step"), (distributed, "clip_gradients")],
    "sampler": [(rollout.TorchSampler, "generate"), (rollout.TorchSampler, "sync")],
    "rewards and behaviours": [(rl, "grade"), (rl, "describe")],
    "packing": [(batches, "exchange"), (rl, "share_packs")],
    "records": [
        (batches, "trace_rows"),
        (batches, "row_of"),
        (batches, "save_rollouts"),
        (RunLog, "append"),
    ],
    "problems": [(data.Stream, "batch")],
    "checkpoints": [(checkpoint.Saver, "save")],
}
INNER = {"model, forward", "model, backward", "optimiser", "sampler"}


@dataclass(frozen=True)
class Config:
    """What is run."""

    model: str = "out/laptop/coldstart/model"  # as rl.py's
    data: str = "out/laptop/data/train.jsonl"
    steps: int = 6  # the first is not counted
    out: str = "out/iteration"  # run directory, removed and made anew


class Clock:
    """CPU seconds of the innermost clocked function, by name; "" is everything else."""

    def __init__(self):
        self.spent, self.inside, self.since = Counter(), [""], time.process_time()

    def turn(self):
        now = time.process_time()
        self.spent[self.inside[-1]] += now - self.since
        self.since = now

    def around(self, owner, name: str, row: str):
        wrapped = getattr(owner, name)

        def clocked(*arguments, **options):
            self.turn()
            # the sampler's forward is the sampler's
            self.inside.append("sampler" if "sampler" in self.inside else row)
            try:
                return wrapped(*arguments, **options)
            finally:
                self.turn()
                self.inside.pop()

        setattr(owner, name, clocked)


def main(cfg: Config):
    shutil.rmtree(cfg.out, ignore_errors=True)
    clock, plain_log = Clock(), RunLog.log

    def log(self, step, *rest, **options):
        plain_log(self, step, *rest, **options)
        if step == 0:
            clock.turn()
            clock.spent.clear()

    RunLog.log = log
    for row, places in PARTS.items():
        for owner, name in places:
            clock.around(owner, name, row)
    rl.main(rl.Config(model=cfg.model, data=cfg.data, out=cfg.out, steps=cfg.steps))
    clock.turn()
    whole, steps = sum(clock.spent.values()), cfg.steps - 1
    print("\n| part | CPU s a step | share |\n|---|---|---|")
    for row in (*PARTS, ""):
        spent = clock.spent[row]
        print(f"| {row or 'all else'} | {spent / steps:.3f} | {spent / whole:.1%} |")
    others = sum(clock.spent[row] for row in {*PARTS, ""} - INNER) / whole
    print(f"\noutside model, optimiser and sampler: {others:.1%} of {whole / steps:.2f} s a step")


if __name__ == "__main__":
    run_main(main, Config)
