"""How long engines idle behind the longest responses of a step, and what shortens it: a simulation.

    python bench/long_tail.py                        # two minutes of a core; no model, no GPU
    python bench/long_tail.py --share 0.9 --gpus 64

Lengths are lognormal, cut at the paper's 48k. A problem has a mean length of its own, around which
its responses vary: what it took an epoch ago tells something, not all. Each GPU has an engine with
as many slots as its cache holds average responses (tools/plan.py); a free slot takes the next
response. The order of the problems, what is known of their lengths and the rule that puts responses
aside are rl.py's own functions. A decode step reads the weights once, and for each response the
keys and values of its tokens; what goes on is read again (a forward pass).

Printed are means over the steps of the second epoch: the share of the slots' time in which they
were empty, until the last engine was done; seconds of the sampling and of the whole step; which
part of the step would be gone, were all slots full. Speed is what tools/plan.py assumes.
"""

import heapq
import math
import random
import sys
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rl  # noqa: E402
from common import batches, data, distributed  # noqa: E402
from common.log import run_main  # noqa: E402
from model import train_flops  # noqa: E402
from rollout import Rollout, go_on  # noqa: E402
from tools import plan  # noqa: E402

ALONE = distributed.World(0, 1, torch.device("cpu"))  # all simulated ranks count in one process
EPOCH = 4  # steps in which every problem comes once
WAYS = {"as they come": (False, False), "longest first": (True, False), "both": (True, True)}


@dataclass(frozen=True)
class Config:
    """What is simulated: a step of runs/ovr_7b.sh."""

    gpus: tuple[int, ...] = (8, 16, 64, 512)  # H100
    share: float = 0.8  # --finish-share of the rows "both"
    problems: int = 512  # a step
    samples: int = 16  # responses a problem
    budget: int = 49152  # tokens that a response may have
    sampler_batch: int = 128  # responses that an engine has taken and not finished
    kv_cache_gb: float = 40.0  # 7B: 57 kB a token
    spread: float = 0.8  # assumed: deviation of the logarithm of all lengths
    spread_of_problems: float = 0.6  # assumed: the part of it that is between problems
    seed: int = 0


@dataclass
class Engine:
    """One GPU's: what it has taken runs in its slots, or waits for one."""

    slots: int
    per_step: float  # seconds to read the weights
    per_key: float  # seconds to read keys and values of a token
    running: list = field(default_factory=list)  # heap of (last step, name, first step, rollout)
    waiting: deque = field(default_factory=deque)
    step: int = 0
    time: float = 0.0
    context: int = 0  # tokens of all that runs
    busy: float = 0.0  # seconds that slots were taken, over all slots
    full: float = 0.0  # seconds that the same work takes in full slots

    def seconds(self, steps: int) -> float:
        """Of so many decode steps of what runs, which grows by a token a step."""
        read = steps * (self.context + len(self.running) * steps / 2)
        return steps * self.per_step + read * self.per_key

    def end(self) -> float:
        """When the next response ends."""
        return self.time + self.seconds(self.running[0][0] - self.step)

    def advance(self, steps: int):
        seconds, count = self.seconds(steps), len(self.running)
        self.time, self.step = self.time + seconds, self.step + steps
        self.busy += count * seconds
        self.full += seconds - steps * self.per_step * (1 - count / self.slots)
        self.context += count * steps

    def advance_to(self, time: float):
        """The last whole step before then: the root of a quadratic equation."""
        a, b = self.per_key * len(self.running) / 2, self.per_step + self.per_key * self.context
        left = max(0.0, time - self.time)
        self.advance(int(2 * left / (b + math.sqrt(b * b + 4 * a * left))))

    def fill(self, rest: dict):
        while self.waiting and len(self.running) < self.slots:
            r = self.waiting.popleft()
            heapq.heappush(self.running, (self.step + rest[r.name], r.name, self.step, r))
            self.context += plan.PROMPT + len(r.response_ids)

    def leave(self) -> Rollout:
        """The next response ends or is put aside, with the tokens that it has by now."""
        _, _, first, r = heapq.heappop(self.running)
        r.response_ids = range(len(r.response_ids) + self.step - first)  # their number counts
        self.context -= plan.PROMPT + len(r.response_ids)
        return r


def sample(groups: deque, engines: list[Engine], batch: int, rest: dict, enough) -> list[Rollout]:
    """Runs the engines until all has ended, or enough: -> what is put aside. groups: the rollouts
    of each problem, taken when an engine has room. rest: tokens that are left to each rollout.
    """
    largest, ended = max(map(len, groups)), 0

    def take(engine: Engine) -> bool:
        in_flight = len(engine.running) + len(engine.waiting)
        if room := groups and (not in_flight or in_flight + largest <= batch):
            engine.waiting.extend(groups.popleft())
        return bool(room)

    while any([take(engine) for engine in engines]):  # in turn: each prepares a prompt meanwhile
        pass
    for engine in engines:
        engine.fill(rest)
    events = [(engine.end(), i) for i, engine in enumerate(engines) if engine.running]
    heapq.heapify(events)
    while events and not (enough and enough(ended, len(rest)) and not groups):
        now, i = heapq.heappop(events)
        engine = engines[i]
        engine.advance(engine.running[0][0] - engine.step)
        while engine.running and engine.running[0][0] <= engine.step:
            engine.leave()
            ended += 1
        while take(engine):
            pass
        engine.fill(rest)
        if engine.running:
            heapq.heappush(events, (engine.end(), i))
    aside = []
    for engine in engines:
        engine.advance_to(now)
        aside += [engine.leave() for _ in [*engine.running]] + [*engine.waiting]
    return aside


def draw(rng: random.Random, cfg: Config, middle: float) -> int:
    """Tokens of a response to a problem whose lengths lie around `middle`, a logarithm."""
    spread = math.sqrt(cfg.spread**2 - cfg.spread_of_problems**2)
    return min(cfg.budget, max(1, round(math.exp(rng.gauss(middle, spread)))))


def simulate(cfg: Config, gpus: int, ordered: bool, share: float) -> dict[str, float]:
    """Means over the steps of the second of two epochs."""
    rng, steps, c = random.Random(cfg.seed), 2 * EPOCH, plan.MODELS["7b"]
    planned = plan.Config(gpus=gpus, kv_cache_gb=cfg.kv_cache_gb, sampler_batch=cfg.sampler_batch)
    settings = rl.Config(sampler="vllm", finish_share=share, steps=steps + 1)
    settings = replace(settings, problems=cfg.problems, samples=cfg.samples)
    middle = math.log(planned.mean) - cfg.spread**2 / 2
    problems = [data.Problem(str(i), "", "") for i in range(EPOCH * cfg.problems)]
    middles = {p.id: rng.gauss(middle, cfg.spread_of_problems) for p in problems}
    stream, lengths, unfinished, ends, rows = data.Stream(problems, cfg.seed), {}, [], {}, []
    for step in range(steps):
        new = dict(enumerate(stream.batch(step, cfg.problems), step * cfg.problems))
        batch = {r.index: r.problem for r in unfinished} | new
        order = batches.longest_first(batch, lengths, unfinished) if ordered else batch
        groups = {i: [] for i in order}
        for r in unfinished:
            groups[r.index].append(go_on(r, r.problem, None))
        for i, p in new.items():
            # sample: one number for each response of the run, so that a name stands for one
            samples = range(i * cfg.samples, (i + 1) * cfg.samples)
            groups[i] = [Rollout(p, n, None, i) for n in samples]
            ends |= {r.name: draw(rng, cfg, middles[p.id]) for r in groups[i]}
        rollouts = sum(groups.values(), [])
        rest = {r.name: ends[r.name] - r.stale for r in rollouts}
        engines = engines_of(planned, c)
        enough = batches.finish_rule(settings, step, len(unfinished), ALONE)
        unfinished = sample(deque(groups.values()), engines, cfg.sampler_batch, rest, enough)
        aside = {r.name for r in unfinished}
        ended = [r for r in rollouts if r.name not in aside]
        batches.add_lengths(lengths, ended)
        again = sum(train_flops(c, plan.PROMPT + r.stale) for r in rollouts if r.stale) / 3
        rows.append(step_row(planned, engines, again, len(ended)) | {"aside": len(aside)})
    return {name: mean(row[name] for row in rows[EPOCH:]) for name in rows[0]}


def engines_of(planned: plan.Config, c) -> list[Engine]:
    slots, rate = plan.at_once(planned, c), 1e9 * plan.GPUS[planned.gpu][2] * planned.decode
    reads = plan.engine_gb(c) * 1e9 / rate, plan.token_bytes(c) / rate
    return [Engine(slots, *reads) for _ in range(planned.gpus)]


def step_row(planned: plan.Config, engines: list[Engine], again: float, ended: int) -> dict:
    """Idle share and seconds of one step. again: FLOPs of a forward of what goes on."""
    last = max(engine.time for engine in engines)
    reading = again / (1e12 * plan.GPUS[planned.gpu][1] * planned.mfu * len(engines))
    learning = plan.seconds(replace(planned, batch=ended), plan.MODELS["7b"])
    whole = reading + last + learning["critic"] + learning["policy"]
    idle = 1 - mean(engine.busy / engine.slots for engine in engines) / last
    lost = reading + last - mean(engine.full for engine in engines)
    return {"idle": idle, "sample": reading + last, "step": whole, "of step": lost / whole}


def main(cfg: Config):
    print(
        f"lengths: lognormal around {plan.Config.mean:,}, spread {cfg.spread:g}, of which between"
    )
    print(f"problems {cfg.spread_of_problems:g}; at most {cfg.budget:,}; seed {cfg.seed}\n")
    print("| GPUs | problems | slots idle | sampling | a step | of it idle | put aside |")
    print("|---|---|---|---|---|---|---|")
    for gpus in cfg.gpus:
        for way, (ordered, aside) in WAYS.items():
            row = simulate(cfg, gpus, ordered, cfg.share if aside else 1.0)
            seconds = f"{row['sample']:,.0f} s | {row['step']:,.0f} s | {row['of step']:.0%}"
            print(
                f"| {gpus} | {way} | {row['idle']:.0%} | {seconds} | {row['aside']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    run_main(main, Config)
