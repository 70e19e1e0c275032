"""The table of stages over several seeds, as Markdown: mean and standard error over runs.

    for s in 0 1 2; do bash runs/laptop.sh --controls --seed $s --out out/seed$s; done
    python bench/seeds.py --runs out/seed0 out/seed1 out/seed2

Reads each run's results.json. The standard error is over seeds (sd / sqrt(runs)): it holds what the
choice of held-out problems does not: other weights, data and rollouts. Of three seeds it is
itself uncertain by half. A run that lacks a stage is left out of that row, and n says so.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.log import run_main  # noqa: E402

COLUMNS = {  # of a stage in results.json -> head of the column
    "image_accuracy": "image, greedy",
    "image_accuracy_sampled": "image, sampled",
    "text_accuracy": "text, greedy",
    "text_accuracy_sampled": "text, sampled",
    "read_accuracy": "digits read",
    "perception_accuracy": "plain reading",
}
BEHAVIORS = ("visual_reflection", "verification", "backtracking")  # sampled, on pictures


@dataclass(frozen=True)
class Config:
    """Which runs to put together."""

    runs: tuple[str, ...]  # directories with a results.json each


def cell(values: list[float | None]) -> str:
    """`0.91 ± 0.01` over the runs that measured it."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.2f}"
    variance = sum((v - mean) ** 2 for v in known) / (len(known) - 1)
    return f"{mean:.2f} ± {math.sqrt(variance / len(known)):.2f}"


def main(cfg: Config):
    results = [json.loads((Path(run) / "results.json").read_text()) for run in cfg.runs]
    names = list(dict.fromkeys(name for r in results for name in r["stages"]))
    heads = [*COLUMNS.values(), "thinks", *(b.replace("_", " ") for b in BEHAVIORS), "seeds"]
    print("| stage | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name in names:
        stages = [r["stages"][name] for r in results if name in r["stages"]]
        row = [cell([s.get(column) for s in stages]) for column in COLUMNS]
        row += [cell([s["thinks"]["image"] for s in stages])]
        row += [cell([s["behaviors"]["image"].get(b) for s in stages]) for b in BEHAVIORS]
        print(f"| {name} | " + " | ".join([*row, str(len(stages))]) + " |")
    for run, result in zip(cfg.runs, results, strict=True):
        spent = ", ".join(f"{k} {v:.0f} s" for k, v in result["seconds"].items())
        print(f"\n{run}: {spent}")


if __name__ == "__main__":
    run_main(main, Config)
