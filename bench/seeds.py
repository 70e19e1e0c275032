"""The miniature over several seeds, as Markdown: mean ± standard error over runs, stage by stage.

    for s in 0 1 2; do bash runs/laptop.sh --controls --seed $s --out out/seed$s; done
    python bench/seeds.py --runs out/seed0 out/seed1 out/seed2

Reads what eval.py has graded (RUN/eval/STAGE/NAME/graded.jsonl) beside the rows that were asked
(RUN/data/test.jsonl), which say what kind of bill each is and which habits to watch for. The
standard error is over seeds, sd / sqrt(runs): other weights, data and rollouts.
"""

import json
import math
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.log import run_main  # noqa: E402
from evaluation import behaviors  # noqa: E402

STAGES = "base coldstart rl average rl_without_coldstart rl_random_total rl_no_smudged rl_grpo"
STAGES = f"{STAGES} coldstart_text_only rl_text_only".split()
NAMES = ("greedy", "sampled", "forbid_again", "forbid_wait")
GROUPS = ("smudged_picture", "clear_picture", "smudged_text", "clear_text")
HABITS = ("think", "check", "need", "plan", "idle_look", "reread")


@dataclass(frozen=True)
class Config:
    """Which runs to put together."""

    runs: tuple[str, ...]  # directories of runs/laptop.sh
    group: str = "smudged_picture"  # whose habits are shown


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def measure(run: Path, stage: str, name: str, group: str) -> dict[str, float]:
    """Accuracy of each group, habits of one, transfer of backtracking on pictures. {} if not run"""
    rows = {row["id"]: row for row in read(run / "data/test.jsonl")}
    found, pictured = defaultdict(list), []
    for record in read(run / f"eval/{stage}/{name}/graded.jsonl"):
        row = rows[record["id"]]
        found[row["group"]].append(record["score"])
        pictured += [behaviors.thinking(record["response"])] if row["images"] else []
        if row["group"] == group:
            for habit, pattern in row["watch"].items():
                found[habit].append(re.search(pattern, record["response"]) is not None)
    means = {key: statistics.mean(values) for key, values in found.items()}
    if means.get("wrong_first"):
        means["repair"] = means["repair"] / means["wrong_first"]
    elif "repair" in means:
        del means["repair"]  # no first reading to repair
    transfer = behaviors.transfer_rates(behaviors.presence(pictured))[
        "backtracking", "visual_reflection"
    ]
    return means | ({} if transfer is None else {"transfer": transfer})


def cell(values: list[float]) -> str:
    """`0.91 ± 0.01` over the runs that measured it."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def main(cfg: Config):
    columns = [*GROUPS, *HABITS, "repair", "transfer"]
    heads = [name.replace("_", " ") for name in columns]
    print("| stage | " + " | ".join([*heads, "seeds"]) + " |")
    print("|---" * (len(heads) + 2) + "|")
    for stage in STAGES:
        for name in NAMES:
            runs = [measure(Path(run), stage, name, cfg.group) for run in cfg.runs]
            runs = [run for run in runs if run]
            cells = [cell([run[key] for run in runs if key in run]) for key in columns]
            if runs:
                print(f"| {stage}, {name} | " + " | ".join([*cells, str(len(runs))]) + " |")


if __name__ == "__main__":
    run_main(main, Config)
