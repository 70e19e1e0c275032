"""How fast curate.py is, and what memory it takes, on generated traces of 6 kB.

    python bench/curate.py --gigabytes 0.5 2 --workers 2 --out out/bench_curate

Each size is generated, curated in a process of its own and deleted. A row is a logic problem
(logic.py) with a trace of random words; one row in ten is a copy, nearly a copy, or damaged. Peak
memory is the proportional share (PSS) of all processes of the run, looked at four times a second;
it has to grow by the 164 bytes a row that curate.py keeps, and by little else.
"""

import json
import multiprocessing
import random
import shutil
import string
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.log import progress, run_main  # noqa: E402
from curation import logic  # noqa: E402

TRACE = 6_000  # characters
FAMILIES = tuple(family for family in logic.FAMILIES if family != "zebra_puzzles")  # slow to make
PART = 2_000  # rows that a worker generates at a time


@dataclass(frozen=True)
class Config:
    gigabytes: tuple[float, ...] = (0.5, 2.0)  # sizes of the generated files
    workers: int = 2  # processes of curate.py
    out: str = "out/bench_curate"  # deleted at the end


def lines(part: int) -> str:
    rng = random.Random(part)
    letters = string.ascii_lowercase
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(4_000)]
    rows = []
    for i in range(part * PART, (part + 1) * PART):
        row = logic.problem(0, i, FAMILIES)
        trace = " ".join(rng.choices(words, k=TRACE // 6)) + "."
        kind = rng.random()
        if kind < 0.03 and rows:
            row["prompt"] = rng.choice(rows)["prompt"]
        elif kind < 0.06:
            row["prompt"] += " Think well."
        elif kind < 0.08:
            trace = (trace[:60] + " ") * 100
        response = f"<think>\n{trace}\n</think>\n\nThe answer is \\boxed{{{row['answer']}}}."
        rows.append(row | {"response": response if kind < 0.98 else response[: TRACE // 2]})
    return "".join(json.dumps(row) + "\n" for row in rows)


def generate(path: Path, size: float) -> int:
    """-> rows of a file of `size` bytes"""
    first = len(lines(0))
    parts = range(max(1, round(size / first)))
    with path.open("w") as file, multiprocessing.Pool() as pool:
        for text in progress(pool.imap(lines, parts), "generating", total=len(parts)):
            file.write(text)
    return len(parts) * PART


def memory(pid: int) -> int:
    """Bytes of a process and of those it started, shared pages by their share."""
    try:
        pss = Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0  # it has ended
    return int(pss) * 1024 + sum(memory(int(child)) for child in children)


def main(cfg: Config):
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{'file':>9}{'rows':>10}{'kept':>10}{'seconds':>9}{'rows/min/core':>15}{'peak MB':>9}")
    for gigabytes in cfg.gigabytes:
        rows = generate(out / "rows.jsonl", gigabytes * 1e9)
        size = (out / "rows.jsonl").stat().st_size
        command = [sys.executable, "-m", "curation.curate", "--rows", str(out / "rows.jsonl")]
        command += ["--kind", "sft", "--out", str(out / "sft.jsonl"), "--workers", str(cfg.workers)]
        start, peak = time.monotonic(), 0
        with (out / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(0.25)
        seconds = time.monotonic() - start
        if process.returncode:
            sys.exit((out / "log").read_text()[-3000:])
        steps = json.loads((out / "sft.report.json").read_text())["steps"]
        kept = sum(of["kept"] for of in steps["sample"].values())
        rate = rows / seconds * 60 / cfg.workers
        print(
            f"{size / 1e9:7.2f}GB{rows:10,}{kept:10,}{seconds:9.0f}{rate:15,.0f}{peak / 1e6:9.0f}"
        )
    shutil.rmtree(out)


if __name__ == "__main__":
    run_main(main, Config)
