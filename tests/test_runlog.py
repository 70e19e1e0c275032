"""runlog.py: what stands in a run directory, what a resume cuts off, what Ctrl-C does, and what a
rank that hangs leaves behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from common import log as runlog
from common.log import (
    Pulse,
    RunLog,
    clock,
    compact,
    progress,
    spent,
    stop_on_signal,
)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Config:
    lr: float = 1e-4
    wandb: str = ""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(directory, steps, start=0, main=True):
    log = RunLog(directory, Config(), steps=5, main=main, start=start)
    for step in range(start, steps):
        log.log(step, {"loss": 1.0 / (step + 1), "lr": 1e-4}, show=("loss",))
        log.append("rollouts", [{"step": step, "id": f"p{i}"} for i in range(2)])
    return log


def test_the_screen_and_the_file_hold_the_same_numbers(tmp_path, capsys):
    run(tmp_path, 5).close()
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) == 5 and screen[3].startswith("step 3/5  loss   0.25  0:00 < 0:00")
    written = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in written] == [0, 1, 2, 3, 4]
    assert written[3]["loss"] == 0.25 and written[3]["seconds"] >= 0 and written[3]["lr"] == 1e-4
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"] == {"lr": 1e-4, "wandb": ""} and about["seconds_total"] >= 0
    assert {"command", "commit", "versions", "started"} <= about.keys()
    assert {"python", "torch", "transformers"} <= about["versions"].keys()


def test_a_resumed_run_holds_every_step_once(tmp_path):
    run(tmp_path, 4)  # killed after step 3; its last checkpoint stands after step 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')  # cut in the middle of a line
    run(tmp_path, 5, start=2).close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path / "rollouts.jsonl")] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]
    run(tmp_path, 1).close()  # from the beginning again
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [0]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    run(tmp_path / "rank1", 5, main=False).close()
    assert not (tmp_path / "rank1").exists() and capsys.readouterr().out == ""


def test_wandb_is_only_missed_by_who_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        RunLog(tmp_path, Config(wandb="ovr"), steps=1)


def test_the_first_interrupt_asks_and_the_second_kills(capsys):
    # a process started in the background (nohup, &) inherits an ignored SIGINT: set Python's own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_on_signal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "again kills" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "to resume: python" in stop.advice


def test_progress_is_silent_off_rank_0(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(3), "count")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_numbers_are_short_and_readable():
    values = (0, 0.41321, 12.34, 1234.5, 3e-5, 2e7, 120, float("nan"))
    assert [compact(v) for v in values] == "0 0.413 12.3 1,234 3e-05 2.0e+07 120 nan".split()
    assert [clock(s) for s in (7, 75, 3675)] == ["0:07", "1:15", "1:01:15"]


def test_runlog_needs_no_torch():
    code = "import sys; from common import log; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_line_ends_with_what_the_phases_cost(tmp_path, capsys):
    log = RunLog(tmp_path, Config(), steps=5)
    costs = {"seconds_ask": 0.01, "seconds_answer": 1.234, "seconds_learn": 1310.0, "peak_gb": 0.9}
    log.log(0, {"loss": 1.0, "lr": 0.5} | costs, show=("loss",))
    line = capsys.readouterr().out
    assert line == "step 0/5  loss      1  [learn 1,310 s, 0.9 GB]  0:00 < 0:00\n"
    assert costs.items() <= rows(tmp_path / "metrics.jsonl")[0].items()
    assert spent({"seconds_ask": 0.014, "seconds_answer": 1.234}) == "[ask 0.01 answer 1.23 s]"
    assert spent({"peak_gb": 71.23}) == "[71.2 GB]" and spent({"seconds": 3.0, "loss": 1.0}) == ""


# ---- the heartbeat

HANGS = """
import threading, time
from common.log import Pulse

def all_gather_that_nobody_else_enters():
    threading.Event().wait({wait})

pulse = Pulse({run!r}, rank=3, minutes=0.01)  # 0.6 s
time.sleep(0.8)  # before the first phase there is no limit
for step in range(10):
    pulse("answer", step)
    time.sleep(0.1)
pulse("learn", 9)
all_gather_that_nobody_else_enters()
pulse.close()
time.sleep(0.8)  # closed: no limit
"""


def hang(directory, wait):
    """What a process of ten quick phases and one of `wait` seconds says on stderr."""
    code = HANGS.format(run=str(directory), wait=wait)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_heartbeat_says_where_a_rank_is(tmp_path):
    pulse = Pulse(tmp_path, rank=3, minutes=0)
    pulse("answer", 7)
    file = tmp_path / "heartbeat/rank_00003.json"
    says = json.loads(file.read_text())
    age = time.time() - time.mktime(time.strptime(says.pop("since")[:19], "%Y-%m-%dT%H:%M:%S"))
    assert 0 <= age < 60 and says.pop("host")
    assert says == {"rank": 3, "pid": os.getpid(), "step": 7, "phase": "answer"}
    pulse("learn", 8)
    says = json.loads(file.read_text())
    assert (says["step"], says["phase"]) == (8, "learn") and file.read_text().count("\n") == 1
    pulse.close()
    assert json.loads(file.read_text())["phase"] == "closed"
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written


def test_a_hanging_phase_leaves_its_stacks(tmp_path):
    errors = hang(tmp_path, wait=1.6)  # the limit twice, and a bit
    dump = (tmp_path / "heartbeat/rank_00003.stack").read_text()
    first = dump.splitlines()[0]
    assert "rank 3" in first and "in phase learn of step 9 since 20" in first
    assert f"cat {tmp_path}/heartbeat/*.json" in first
    assert "rank_00003.stack" in errors and "phase learn of step 9" in errors
    assert dump.count("all_gather_that_nobody_else_enters") == dump.count("phase learn") >= 2
    assert "phase answer" not in dump and "phase closed" not in dump


def test_a_phase_in_time_leaves_no_stacks(tmp_path):
    errors = hang(tmp_path, wait=0.01)  # one second of phases, each far below 0.6 s
    assert not (tmp_path / "heartbeat/rank_00003.stack").exists() and not errors


def test_the_seconds_of_the_phases_add_up(tmp_path, monkeypatch):
    now, naive = [100.0], {}
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: now[0])
    pulse = Pulse(tmp_path, rank=0, minutes=0)
    assert pulse.seconds() == {}
    for phase, pause in [("ask", 0.25), ("answer", 50.0), ("learn", 2.5), ("answer", 3.0)]:
        pulse(phase, 0)
        now[0] += pause
        naive[f"seconds_{phase}"] = naive.get(f"seconds_{phase}", 0.0) + pause
    assert pulse.seconds() == naive == {**naive, "seconds_answer": 53.0}
    now[0] += 1.5  # the phase under way goes on
    pulse("tell", 0)
    now[0] += 0.5
    assert pulse.seconds() == {"seconds_answer": 1.5, "seconds_tell": 0.5}
