"""The miniature over several seeds, as Markdown: mean ± standard error over runs, stage by stage.

    for s in 0 1 2; do bash runs/laptop.sh --controls --seed $s --out out/seed$s; done
    python bench/seeds.py --runs out/seed0 out/seed1 out/seed2 --figure docs/stages.png

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

import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.log import run_main  # noqa: E402
from evaluation import behaviors  # noqa: E402

STAGES = "base coldstart rl average rl_without_coldstart rl_random_total rl_no_smudged rl_grpo"
STAGES = f"{STAGES} coldstart_text_only rl_text_only".split()
NAMES = ("greedy", "sampled", "forbid_again", "forbid_wait")
GROUPS = ("smudged_picture", "clear_picture", "smudged_text", "clear_text")
HABITS = ("think", "check", "need", "plan", "idle_look", "reread")
BARS = (  # of the figure: label, stage, evaluation, colour
    ("base", "base", "greedy", "#8a929e"),
    ("cold start on text", "coldstart", "greedy", "#3d82d6"),
    ("cold start + RL", "rl", "greedy", "#e0702f"),
    ("the same, “again” forbidden", "rl", "forbid_again", "#eba57f"),
    ("RL without the cold start", "rl_without_coldstart", "greedy", "#9b6fb8"),
    ("RL, totals say nothing", "rl_random_total", "greedy", "#bb8b8b"),
)
CURVES = (  # metrics of rl.py, and how they are drawn
    (("check/smudged_picture",), "checks the total", "#e0702f"),
    (("reward/smudged_picture",), "right", "#2f8f57"),
    (
        tuple(f"{habit}/smudged_picture" for habit in ("need", "plan", "idle_look", "reread")),
        "a useless habit",
        "#8a929e",
    ),
)


@dataclass(frozen=True)
class Config:
    """Which runs to put together."""

    runs: tuple[str, ...]  # directories of runs/laptop.sh
    group: str = "smudged_picture"  # whose habits are shown
    figure: str = ""  # PNG to draw: what the stages solve, what RL does to the habits


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()] if path.exists() else []


def measure(run: Path, stage: str, name: str, group: str) -> dict[str, float]:
    """Accuracy of each group, habits of one, transfer of backtracking on pictures. {} if not run"""
    rows = {row["id"]: row for row in read(run / "data/test.jsonl")}
    found, pictured = defaultdict(list), []
    for record in read(run / f"eval/{stage}/{name}/graded.jsonl"):
        row = rows[record["id"]]
        found[row["group"]].append(record["score"])
        thought = behaviors.thinking(record["response"])
        pictured += [(record["id"], behaviors.find(thought))] if row["images"] else []
        if row["group"] == group:
            for habit, pattern in row["watch"].items():
                found[habit].append(re.search(pattern, record["response"]) is not None)
    means = {key: statistics.mean(values) for key, values in found.items()}
    if means.get("wrong_first"):
        means["repair"] = means["repair"] / means["wrong_first"]
    elif "repair" in means:
        del means["repair"]  # no first reading to repair
    shown = behaviors.counted([spans for _, spans in pictured]) > 0
    of_pairs = behaviors.transfers(shown, [problem for problem, _ in pictured])
    transfer = of_pairs["backtracking", "visual_reflection"]
    return means | ({} if transfer is None else {"transfer": transfer[0]})


def cell(values: list[float]) -> str:
    """`0.91 ± 0.01` over the runs that measured it."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def draw_bill(axis, run: Path):
    """The first smudged bill of the held-out ones, as the model sees it."""
    rows = read(run / "data/test.jsonl")
    row = next(row for row in rows if row["group"] == "smudged_picture")
    axis.imshow(Image.open(run / "data" / row["images"][0]), interpolation="nearest")
    axis.set_title(f"“{row['prompt'].removeprefix('<image> ')}”", loc="left")
    axis.set_axis_off()


def draw_bars(axis, runs: list[Path]):
    for place, (_, stage, name, color) in enumerate(BARS):
        found = [measure(run, stage, name, "smudged_picture") for run in runs]
        shares = [100 * each["smudged_picture"] for each in found if each]
        mean, spread = statistics.mean(shares), statistics.stdev(shares) / math.sqrt(len(shares))
        axis.barh(place, mean, xerr=spread, color=color, height=0.72)
        axis.text(mean + spread + 1.5, place, f"{mean:.0f}", va="center")
    axis.set_yticks(range(len(BARS)), [label for label, *_ in BARS])
    axis.invert_yaxis()
    axis.set(xlim=(0, 112), xticks=[0, 50, 100])
    axis.set_title("smudged pictures solved, % (greedy)", loc="left")


def draw_curves(axis, runs: list[Path]):
    """Each seed thinly, their mean boldly."""
    logs = [read(run / "rl/metrics.jsonl") for run in runs]
    for names, label, color in CURVES:
        lines = [[100 * statistics.mean(row[n] for n in names) for row in log] for log in logs]
        for line in lines:
            axis.plot(line, color=color, lw=0.6, alpha=0.35)
        mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
        axis.plot(mean, color=color, lw=2.4, label=label)
    axis.set(ylim=(0, 102), xlabel="RL step", yticks=[0, 50, 100])
    axis.set_title("sampled on smudged pictures while RL trains, %", loc="left")
    axis.legend(frameon=False, loc="center right")


def draw(file: str, runs: list[Path]):
    plt.rcParams |= {"font.size": 9, "axes.titlesize": 9, "font.family": "DejaVu Sans"}
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 2.9), width_ratios=(1.25, 2, 2), layout="constrained"
    )
    draw_bill(axes[0], runs[0])
    draw_bars(axes[1], runs)
    draw_curves(axes[2], runs)
    for axis in axes[1:]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main(cfg: Config):
    if cfg.figure:
        draw(cfg.figure, [Path(run) for run in cfg.runs])
    columns = [*GROUPS, *HABITS, "repair", "transfer"]
    heads = [name.replace("_", " ") for name in columns]
    print("| stage | " + " | ".join([*heads, "seeds"]) + " |")
    print("|---" * (len(heads) + 2) + "|")
    found = 0
    for stage in STAGES:
        for name in NAMES:
            runs = [measure(Path(run), stage, name, cfg.group) for run in cfg.runs]
            runs = [run for run in runs if run]
            cells = [cell([run[key] for run in runs if key in run]) for key in columns]
            found += len(runs)
            if runs:
                print(f"| {stage}, {name} | " + " | ".join([*cells, str(len(runs))]) + " |")
    if not found:
        raise ValueError(f"{', '.join(cfg.runs)}: no eval/STAGE/NAME as runs/laptop.sh makes them")


if __name__ == "__main__":
    run_main(main, Config)
