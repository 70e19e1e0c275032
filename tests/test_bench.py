"""bench/gpu.py at miniature size: every part finds something, wrong kernels get no figures.
bench/long_tail.py: its engine against one that counts step by step, and what its rules gain.
The others run, small.
"""

import json
import math
import sys
from collections import deque
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from common.data import Problem
from model import attend
from rollout import Rollout
from tools import plan

ROOT = Path(__file__).resolve().parents[1]
# last: other files there are called as those they measure
sys.path.append(str(ROOT / "bench"))
import gpu  # noqa: E402
import long_tail  # noqa: E402
from conftest import finished  # noqa: E402

THEMES = "--themes coldstart update rollout --documents 4 --updates 32 32 --rollouts 2 4 16 0.8"


@pytest.mark.skipif(gpu.CUDA, reason="a CPU has other kernels, and no memory of its own")
def test_every_part_leaves_figures_and_says_what_the_planner_should_assume(tmp_path, monkeypatch):
    """Uncompiled (test_distributed.py compiles), with a prediction that test_plan.py looks into."""
    predicted = create_autospec(plan.measure, return_value=(0.001, 0.002, 0.0))
    monkeypatch.setattr(plan, "measure", predicted)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    leave = torch.distributed.destroy_process_group  # and the process of the tests goes on
    monkeypatch.setattr(gpu.distributed, "finish", lambda world: leave())
    out = tmp_path / "deep" / "gpu.json"
    gpu.main(gpu.Config(size="mini", out=str(out)))
    found = json.loads(out.read_text())
    assert [*found["parts"]] == [part for part in gpu.SECONDS if part != "stages"]
    for part, rows in found["parts"].items():
        good = [row for row in rows if "error" not in row]
        assert good and (part == "attention" or good == rows)  # kernels that a CPU has not
        assert all(row["passes" if part == "parity" else "ms"] > 0 for row in good)
    assert {"cudnn", "varlen"} <= {r["candidate"] for r in found["parts"]["attention"]}
    assert found["plan"].keys() == {"mfu", "decode"}
    for name, (assumed, measured) in found["plan"].items():
        assert assumed == getattr(plan.Config, name) and 0 < measured < 1


def test_a_wrong_kernel_and_a_decoder_that_drifts_get_no_figures(monkeypatch):
    seen = {"all": lambda n: lambda *qkv: attend(*qkv, [*n], causal=False)}
    seen |= {"nan": lambda n: lambda *qkv: attend(*qkv, [*n], causal=True) * math.nan}
    seen |= {"right": lambda n: lambda *qkv: attend(*qkv, [*n], causal=True)}
    monkeypatch.setattr(gpu, "CANDIDATES", seen)
    rows = gpu.attention(gpu.Bench(*gpu.MINI))
    assert {row["candidate"] for row in rows if "ms" in row} == {"right"}
    failed = {row["candidate"] for row in rows if row.get("error") == "parity failed"}
    assert failed == {"all", "nan"}
    parity = [{"recompute": "full", "compiled": False, "passes": False}]
    bench = gpu.Bench(*gpu.MINI, found={"parity": parity})
    row = gpu.trained(bench, gpu.TINY, (8,), ("full", False), 0, lambda: lambda: None)
    assert row["error"] == "parity failed" and "ms" not in row


def test_mfu_is_the_flops_of_all_documents_over_peak_and_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: 0.5 * next(clock))  # a call: 0.5 s
    bench, n = gpu.Bench(*gpu.MINI, tflops=1e-6), (50, 33, 21)
    row = gpu.trained(bench, gpu.TINY, n, ("none", False), 0, lambda: lambda: None)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128  # q, o; k, v; gate, up, down
    flops = 6 * (2 * layer + 512 * 64) * 104 + 6 * 2 * 64 * (50**2 + 33**2 + 21**2)
    assert row["ms"] == 500 and row["per_second"] == 208
    assert row["mfu"] == pytest.approx(flops / 0.5 / 1e6)


def test_a_part_that_does_not_fit_or_has_no_time_left_says_so():
    for limits, error in (({"room": 10.0}, "does not fit"), ({"until": 0.0}, "no time left")):
        bench = gpu.Bench(*gpu.MINI, **limits)
        assert gpu.attempt(bench, {}, dict, needs=11.0)["error"] == error


def step_by_step(lengths: list[int], slots: int, per_step: float, per_key: float) -> list[float]:
    """When each response ends on one engine, counted token by token."""
    running, waiting, ends, now = {}, deque(enumerate(lengths)), {}, 0.0
    while running or waiting:
        while waiting and len(running) < slots:
            i, length = waiting.popleft()
            running[i] = [0, length]
        # keys of a token: all before it, and on average half of itself
        now += per_step + per_key * sum(plan.PROMPT + done + 0.5 for done, _ in running.values())
        for i, state in [*running.items()]:
            state[0] += 1
            if state[0] == state[1]:
                ends[i] = now
                del running[i]
    return [ends[i] for i in range(len(lengths))]


@pytest.mark.parametrize("stop", [None, 4])
def test_the_engine_of_the_simulation_takes_the_time_of_one_that_counts_its_tokens(stop):
    lengths, problem = [5, 40, 3, 4, 17, 29, 1, 8], Problem("p", "", "")
    rollouts = [Rollout(problem, i, None, 0) for i in range(len(lengths))]
    rest = {r.name: n for r, n in zip(rollouts, lengths, strict=True)}
    engine = long_tail.Engine(3, 0.5, 1e-3)
    enough = (lambda ended, of: ended >= stop) if stop else None
    aside = long_tail.sample(deque([rollouts]), [engine], 99, rest, enough)
    ends = step_by_step(lengths, 3, 0.5, 1e-3)
    assert engine.time == pytest.approx(sorted(ends)[(stop or 8) - 1])
    names = {r.name for r in aside}
    assert len(names) == (8 - stop if stop else 0)
    for r in rollouts:
        assert (len(r.response_ids) < rest[r.name]) == (r.name in names)
    assert engine.busy <= 3 * engine.time and engine.full <= engine.time


def test_longest_first_shortens_the_tail_and_putting_aside_ends_it():
    cfg = long_tail.Config(problems=32, samples=4, sampler_batch=16)
    rows = [long_tail.simulate(cfg, 4, *way) for way in ((False, 1.0), (True, 1.0), (True, 0.8))]
    idle = [row["idle"] for row in rows]
    assert 0 < idle[2] < idle[1] < idle[0] < 1 and idle[2] < 0.3 * idle[0]
    assert rows[0]["aside"] == rows[1]["aside"] == 0 < rows[2]["aside"] < 128
    assert rows[2]["sample"] < rows[1]["sample"] < rows[0]["sample"] < rows[0]["step"]


def test_the_benches_of_a_cpu_pass_their_gates_and_print_a_table(mini, tmp_path):
    """At small sizes: a change of what they measure or clock is seen here."""
    model = f"--model {mini.model} --data {mini.train} --steps 2 --out {tmp_path}/run"
    commands = {
        f"bench/cpu.py --rounds 1 {THEMES}": "rollout",
        f"bench/iteration.py {model}": "records",
    }
    for command, last_row in commands.items():
        output = finished([sys.executable, *command.split()], ROOT, {}, 300)
        assert f"\n| {last_row} | " in output, output[-3000:]
