"""runlog.py: what stands in a run directory, what a resume cuts off, what Ctrl-C does."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runlog import RunLog, clock, compact, progress, stop_on_signal

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
        log.rollouts([{"step": step, "id": f"p{i}"} for i in range(2)])
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
    code = "import sys, runlog; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
