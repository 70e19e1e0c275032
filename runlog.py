"""The run directory: what was run, with what, and what happened at every step.

    RUN/run.json        config, command line, commit, versions, start; later `seconds_total`
    RUN/metrics.jsonl   one JSON object a step: {"step": n, "seconds": s, name: float, ...}
    RUN/rollouts.jsonl  decoded samples with their verdicts, each with the "step" it was drawn in
    RUN/checkpoints/, RUN/model/  belong to the trainers; this file never touches them

The line on the screen and the row in metrics.jsonl hold the same floats under the same names, so a
number seen in a terminal can be found in a plot. Both are written by rank 0 alone (`main=True`); on
the other ranks every method returns at once, so a training loop needs no `if rank == 0`.

Steps count from 0. A resumed run passes `start`, the first step it will do: rows at or after it
come from the part that is about to be repeated, and are cut off, so no step stands there twice.

    log = RunLog("out/demo", config, steps=100)
    with stop_on_signal() as stop:
        for step in range(100):
            ...
            log.log(step, {"loss": 0.5, "lr": 1e-4, "grad_norm": 1.2}, show=("loss", "lr"))
            if stop.requested: ...  # write a checkpoint, print stop.advice, leave
    log.close()
"""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "vllm")  # versions that change a run


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
        _truncate(self.directory / "rollouts.jsonl", start)
        self.about = {
            "config": dataclasses.asdict(config),
            "command": command_line(),
            "commit": _commit(),
            "versions": {"python": sys.version.split()[0]} | _versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "start_step": start,
            "steps": steps,
        }
        self._write_about()
        self.metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.samples = (self.directory / "rollouts.jsonl").open("a", encoding="utf-8")
        if project := getattr(config, "wandb", ""):
            self.wandb = _start_wandb(project, self.directory, self.about["config"])

    def log(self, step: int, metrics: dict[str, float], show: Sequence[str] = ()) -> None:
        """Append the step to metrics.jsonl and print one line with the metrics named in `show`.

        A NaN is written as NaN (Python's json reads it back): hiding it would hide the bug.
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
        width = len(str(self.steps))
        print(
            f"step {step:>{width}}/{self.steps}  {shown}  {clock(elapsed)} < {clock(left)}",
            flush=True,
        )

    def rollouts(self, rows: Iterable[dict]) -> None:
        """Append decoded rollouts; every row holds its "step", so that a resume can cut it off."""
        if self.main:
            _append(self.samples, rows)

    def close(self) -> None:
        """Write `seconds_total` (saving included, all parts of a resumed run) and close."""
        if not self.main:
            return
        self.about["seconds_total"] = round(self.earlier + time.perf_counter() - self.began, 2)
        self._write_about()
        self.metrics.close()
        self.samples.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _write_about(self) -> None:
        text = json.dumps(self.about, indent=1, default=str, ensure_ascii=False)
        (self.directory / "run.json").write_text(text + "\n", encoding="utf-8")


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


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def command_line() -> str:
    """The command that started this process, torchrun's own part rebuilt from its environment."""
    here = [os.path.relpath(sys.argv[0])] + sys.argv[1:]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *here])
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // local
    return shlex.join(["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={local}", *here])


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


def _commit() -> dict | None:
    """{"hash", "dirty"} of the checkout this file lies in; None without git or without a commit."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return {"hash": head, "dirty": bool(git("status", "--porcelain"))} if head else None
    except FileNotFoundError:  # no git on this machine
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # vllm is optional
    return found


def _start_wandb(project: str, directory: Path, config: dict):
    try:
        import wandb
    except ModuleNotFoundError as error:
        message = "the config asks for wandb, which is not installed: pip install wandb"
        raise SystemExit(message + ", or leave --wandb empty") from error
    return wandb.init(project=project, name=directory.name, dir=str(directory), config=config)
