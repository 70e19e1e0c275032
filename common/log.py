"""The run directory: what was run, with what, and what happened at every step.

    RUN/run.json        config, data and its hashes, command line, commit, versions, start; later
                        `seconds_total`
    RUN/metrics.jsonl   one JSON object a step: {"step": n, "seconds": s, name: float, ...}
    RUN/rollouts.jsonl  decoded samples with their verdicts, each with the "step" it was drawn in
    RUN/heartbeat/      where every rank is, and the stacks of those that are there for too long
    RUN/checkpoints/, RUN/model/  belong to checkpoints.py; this file never touches them

The line on the screen and the row in metrics.jsonl hold the same floats under the same names, so a
number seen in a terminal can be found in a plot. Both are written by rank 0 alone (`main=True`); on
the other ranks every method returns at once, so a training loop needs no `if rank == 0`. The
heartbeat is written by every rank.

Steps count from 0. A resumed run passes `start`, the first step it will do: rows at or after it
come from the part that is about to be repeated, and are cut off, so no step stands there twice.

    log, pulse = RunLog("out/demo", config, steps=100), Pulse("out/demo", rank=0)
    with stop_on_signal() as stop:
        for step in range(100):
            pulse("learn", step)
            metrics = {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.2}
            log.log(step, metrics | pulse.seconds(), show=("loss", "lr"))
            if stop.requested: ...  # write a checkpoint, print stop.advice, leave
    log.close()
    pulse.close()
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from common.provenance import command_line, provenance

TIME = "%Y-%m-%dT%H:%M:%S%z"


class RunLog:
    """One run directory, open for writing on rank 0. `config` is any dataclass.

    Where it has a non-empty `wandb` field (a project name), the rows also go to Weights & Biases.
    """

    def __init__(self, directory, config, steps: int, main: bool = True, start: int = 0):
        self.directory, self.steps, self.main, self.start = Path(directory), steps, main, start
        self.began = self.last = time.perf_counter()
        self.earlier, self.wandb = 0.0, None  # seconds spent before a resume; the wandb run
        if not main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self.earlier = _truncate(self.directory / "metrics.jsonl", start)
        for name in ("rollouts", "tokens"):
            _truncate(self.directory / f"{name}.jsonl", start)
        self.about = provenance(config) | {
            "started": time.strftime(TIME),
            "start_step": start,
            "steps": steps,
        }
        self._write_about()
        self.metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        if project := getattr(config, "wandb", ""):
            self.wandb = _start_wandb(project, self.directory, self.about["config"])

    def log(self, step: int, metrics: dict[str, float], show: Sequence[str] = ()) -> None:
        """Append the step to metrics.jsonl and print one line with the metrics named in `show`.

        The seconds of phases (Pulse.seconds) and peak_gb stand in brackets at its end. A NaN is
        written as NaN (Python's json reads it back): hiding it would hide the bug.
        """
        if not self.main:
            return
        missing = [name for name in show if name not in metrics]
        assert not missing, f"asked to show {missing}, but step {step} measured {sorted(metrics)}"
        now = time.perf_counter()
        row = {"step": step, "seconds": round(now - self.last, 4)}
        row |= {name: float(value) for name, value in metrics.items()}
        self.last = now
        _append(self.metrics, [row])
        if self.wandb is not None:
            self.wandb.log(row, step=step)
        elapsed = now - self.began
        left = elapsed / max(1, step + 1 - self.start) * (self.steps - step - 1)
        shown = "  ".join(f"{name} {compact(row[name]):>6}" for name in show)
        costs = f"  {costs}" if (costs := spent(row)) else ""
        width = len(str(self.steps))
        print(
            f"step {step:>{width}}/{self.steps}  {shown}{costs}  {clock(elapsed)} < {clock(left)}",
            flush=True,
        )

    def append(self, name: str, rows: Iterable[dict]) -> None:
        """Rows of a step into NAME.jsonl, "rollouts" or "tokens"; every row holds its "step", so
        that a resume can cut it off.
        """
        if self.main:
            with (self.directory / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                _append(file, rows)

    def close(self) -> None:
        """Write `seconds_total` (saving included, all parts of a resumed run) and close."""
        if not self.main:
            return
        self.about["seconds_total"] = round(self.earlier + time.perf_counter() - self.began, 2)
        self._write_about()
        self.metrics.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write_about(self) -> None:
        text = json.dumps(self.about, indent=1, default=str, ensure_ascii=False)
        part = self.directory / "run.json.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.directory / "run.json")  # a kill leaves the old one or the new one


class Pulse:
    """Where this rank is, for how long, and what it cost. One a process, on every rank.

        pulse("answer", step)   # a phase begins: RUN/heartbeat/rank_00003.json says so
        pulse.seconds()         # {"seconds_answer": 1.2, ...} since the last call

    A hang has no message: one rank misses a collective and all others wait in it, silently.
    `cat RUN/heartbeat/*.json` shows who is behind. A rank that begins no phase for `minutes` (0:
    never mind) also appends the Python stacks of its threads to rank_00003.stack, again and again
    while it lasts. `since` tells a file that an earlier start with more ranks has left.

    A thread waits and calls faulthandler.dump_traceback, and so needs the GIL. Waiting collectives
    and .item() let go of it; C code that does not (a regular expression run wild) goes undumped,
    but the heartbeat still names phase and pid, for `py-spy dump`. Not dump_traceback_later, which
    needs no GIL: reading stacks while their threads run, it crashed Python 3.11 in one of 1 to 200
    dumps, and a phase that is only slow must not die of being watched.

    Seconds are wall-clock and add up to the time between two calls of seconds(). On a GPU they are
    honest where a phase ends by reading a result (.item(), .tolist()): kernels are only queued
    before that, and the wait would be charged to the phase that reads next.
    """

    def __init__(self, directory: str | Path, rank: int, minutes: float = 30.0):
        self.path = Path(directory) / f"heartbeat/rank_{rank:05}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self.limit, self.now, self.spent = 60 * minutes, {}, {}
        self.beaten, self.closed = threading.Event(), False
        if minutes:
            threading.Thread(target=self._watch, daemon=True, name="pulse").start()

    def __call__(self, phase: str, step: int) -> None:
        """`phase` of `step` begins, and the one before ends."""
        self._count()
        self.now = self.who | {"step": step, "phase": phase, "since": time.strftime(TIME)}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.now) + "\n")
        part.replace(self.path)  # a reader sees the old line or the new one, never half of one
        self.beaten.set()

    def seconds(self) -> dict[str, float]:
        """Of each phase since the last call, the one under way included up to now."""
        self._count()
        spent, self.spent = self.spent, {}
        return {f"seconds_{phase}": round(seconds, 4) for phase, seconds in spent.items()}

    def close(self) -> None:
        """The phase "closed" lasts for ever: no stacks any more."""
        self.closed = True
        self("closed", self.now.get("step", 0))

    def _count(self) -> None:
        now = time.perf_counter()
        if self.now:
            phase = self.now["phase"]
            self.spent[phase] = self.spent.get(phase, 0.0) + now - self.began
        self.began = now

    def _watch(self) -> None:
        self.beaten.wait()  # the first phase
        while True:
            self.beaten.clear()
            if self.closed:  # looked at after clear(): a close in between is not slept through
                return
            if not self.beaten.wait(self.limit):
                self._dump()

    def _dump(self) -> None:
        path, now = self.path.with_suffix(".stack"), self.now
        where = f"rank {now['rank']} ({now['host']}, pid {now['pid']})"
        what = f"{where} is in phase {now['phase']} of step {now['step']} since {now['since']}"
        print(f"{what}; its stacks are in {path}", file=sys.stderr, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime(TIME)}: {what}. Who is behind? cat {path.parent}/*.json: the rank"
                " with the earliest step and phase is the one that the others wait for, and its"
                " .stack says where it is. The main thread stands last.\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


class stop_on_signal:
    """`with stop_on_signal() as stop:` turns the first Ctrl-C or SIGTERM into `stop.requested`.

    The loop looks at it where a step ends and everything is consistent, writes a checkpoint, prints
    `stop.advice` and leaves. The second signal has its ordinary effect: it kills. A scheduler may
    send SIGTERM to one rank only, so with several ranks take the maximum over ranks first.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, main: bool = True):
        self.requested, self.main, self.previous = False, main, {}

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        self.requested = True
        self.__exit__()  # the next signal meets the ordinary handlers
        if self.main:
            name = signal.Signals(number).name
            print(f"\n{name}: finishing this step, then a checkpoint; again kills", flush=True)

    @property
    def advice(self) -> str:
        """What to type to go on: the same command, which finds its newest checkpoint."""
        return f"stopped; to resume: {command_line()}"


def progress(iterable: Iterable, description: str, total: int | None = None) -> tqdm:
    """A tqdm bar: silent off rank 0, and one line in 30 s where stderr is no terminal."""
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=description,
        total=total,
        leave=False,
        disable=int(os.environ.get("RANK", 0)) != 0,
        mininterval=0.1 if terminal else 30,
        maxinterval=10 if terminal else 60,
        dynamic_ncols=terminal,
    )


def compact(value: float) -> str:
    """At most about six characters: 0.4132, 12.5, 1,234, 3e-05."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e6 else f"{value:.1e}"
    if float(value).is_integer():
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 0.001 else f"{value:.0e}"


def spent(metrics: dict[str, float]) -> str:
    """{"seconds_answer": 1.23, "seconds_tell": 0.001, "peak_gb": 0.9} -> [answer 1.23 s, 0.9 GB].

    Phases under a hundredth of the whole are left out: metrics.jsonl has them.
    """
    phases = {n[8:]: seconds for n, seconds in metrics.items() if n.startswith("seconds_")}
    least = 0.01 * sum(phases.values())
    long = [f"{name} {compact(round(s, 2))}" for name, s in phases.items() if s >= least]
    costs = [" ".join(long) + " s"] if long else []
    if "peak_gb" in metrics:
        costs.append(f"{compact(round(metrics['peak_gb'], 2))} GB")
    return f"[{', '.join(costs)}]" if costs else ""


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _append(file, rows: Iterable[dict]) -> None:
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()  # a killed run keeps every finished step


def _truncate(path: Path, start: int) -> float:
    """Cut the file at its first row of step >= start; returns the seconds of the rows that stay.

    Rows lie in the order of their steps and a real run's rollouts fill gigabytes, so the file is
    read line by line and cut in place. A last line that a kill left unfinished goes too.
    """
    if not path.exists():
        return 0.0
    end, seconds = 0, 0.0
    with path.open("rb") as file:
        for line in file if start else ():
            if not line.endswith(b"\n") or (row := json.loads(line))["step"] >= start:
                break
            end, seconds = end + len(line), seconds + row.get("seconds", 0.0)
    os.truncate(path, end)
    return seconds


def _start_wandb(project: str, directory: Path, config: dict):
    try:
        import wandb
    except ModuleNotFoundError as error:
        message = "the config asks for wandb, which is not installed: pip install wandb"
        raise SystemExit(message + ", or leave --wandb empty") from error
    return wandb.init(project=project, name=directory.name, dir=str(directory), config=config)
