"""The miniature's run directory into results.json for programs and report.html for people.

    data/test.jsonl, STAGE/{run.json,metrics.jsonl}, rl/trace.jsonl   ─┐
    eval/STAGE/{greedy,sampled}/graded.jsonl, eval/STAGE/skills.json,  ├▶ results.json, report.html
    eval/rl/forbid_WORD/graded.jsonl                                  ─┘

    python -m miniature.report --run out/laptop       # other runs, too: --run out/ovr_7b

Numbers and figures are made here; what the page says stands in the template beside this file. Every
claim on it compares measured shares, and what was not run is "not in this run". Greedy answers give
a rate its plain name, those at temperature 1 the ending `_sampled`; rates of the lexicon (CBR, BTR)
are of sampled answers. Rows of test.jsonl may name their `group` and patterns to `watch`.
"""

import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np

from common.batches import read_trace
from common.log import run_main
from common.records import read_rows
from evaluation import behaviors, gallery, metrics

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

STAGES = {  # order of every table and figure: directory -> (name, what it is, colour)
    "base": ("Base", "sees and answers at once, never reasons", "#8b93a1"),
    "coldstart": ("Cold start", "reasoning shown in text alone", "#3f83d6"),
    "rl": ("Cold start + RL", "then PPO on pictures and text", "#e0702f"),
    "forbid_again": ("RL, no “again”", "the same model; it may not say the word", "#eba682"),
    "forbid_wait": ("RL, no “wait”", "the same model; it may not say the word", "#dcbba8"),
    "average": ("Average", "of the last checkpoints of RL", "#a8552a"),
    "rl_without_coldstart": ("RL alone", "the same RL, straight from the base", "#9b72b8"),
    "rl_random_total": ("RL, random totals", "no check can tell anything", "#c2528b"),
    "rl_no_smudged": ("RL, nothing smudged", "the first look is always right", "#6f9a3c"),
    "rl_grpo": ("Cold start + GRPO", "group advantages, no critic", "#c79a1e"),
    "coldstart_text_only": ("Text-only cold start", "no pictures to describe either", "#3aa6a0"),
    "rl_text_only": ("Text-only + RL", "the same RL, from that one", "#2f8f5b"),
}
MAIN = ("base", "coldstart", "rl")
HABITS = {  # what the miniature's rows watch for: name -> (in words, colour)
    "check": ("checks the total", "#1f9d8b"),
    "second_look": ("second look at the smudge", "#d9487d"),
    "need": ("states a goal", "#8b93a1"),
    "plan": ("states a plan", "#b09a52"),
    "idle_look": ("idle look at a clear item", "#6f97c9"),
    "reread": ("reads all again", "#a786c0"),
}
HABIT_CURVES = [("rl", f"{name}/smudged_picture", *look) for name, look in HABITS.items()]
USELESS = {"need", "plan", "idle_look", "reread"}  # in the miniature's world
BINS = 10  # of RL steps, where a curve is asked whether it fell and rose
EXAMPLES = 5  # problems with the answers of all stages
END = 1000  # tokens that are shown of a long response, at its beginning and at its end
INK, GRID = "#010203", "#030201"  # stand-ins: become currentColor and var(--line), light or dark


@dataclass(frozen=True)
class Config:
    run: Path = Path("out/laptop")  # directory of the miniature; the report is written into it
    step: int = -1  # of RL, shown token by token; -1: the last in which samples differ in reward


# ---------------------------------------------------------------- reading and measuring


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval; None where nothing was measured."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    def above(self, other: "Rate") -> bool:
        """Larger by more than chance: 0 lies below Newcombe's interval (1998, method 10)."""
        below, over = self.value - self.low, other.high - other.value
        return self.value - other.value > math.hypot(below, over)


def share(records: list[dict], *names: str) -> Rate:
    """Share of the answers that show one of the names. The interval is Wilson's, with as many
    observations as make his variance the one between problems: k samples of a problem are not k
    independent observations."""
    by_problem = defaultdict(list)
    for record in records:
        by_problem[record["id"]].append(not record["shown"].isdisjoint(names))
    if not by_problem:
        return Rate()
    shown, answers = np.array([(sum(s), len(s)) for s in by_problem.values()]).T  # (P,), (P,)
    p = float(shown.sum() / answers.sum())
    variance = float(((shown - p * answers) ** 2).sum() / answers.sum() ** 2)
    n = p * (1 - p) / variance if variance > 1e-9 else len(shown)
    return Rate(p, *metrics.wilson(p, n))


def measure(greedy: list[dict], sampled: list[dict]) -> dict[str, Rate]:
    """All rates of one stage by their paths in results.json, as "groups.clear_text.check"."""
    found = {}
    for kind in ("image", "text"):
        one, many = ([r for r in rows if r["kind"] == kind] for rows in (greedy, sampled))
        found[f"{kind}_accuracy"] = share(one, "right")
        found[f"{kind}_accuracy_sampled"] = share(many, "right")
        spoken = many or one
        found[f"thinks.{kind}"] = share(spoken, "thinks")
        found |= {f"behaviors.{kind}.{name}": share(spoken, name) for name in behaviors.NAMES}
        # BTR = CBR_visual / CBR_linguistic, bootstrapped over problems; n/a under ten carriers
        shown = [[name in record["shown"] for name in behaviors.NAMES] for record in spoken]
        shown, ids = np.array(shown).reshape(-1, len(behaviors.NAMES)), [r["id"] for r in spoken]
        for (spoken_name, _), rate in behaviors.transfers(shown, ids).items():
            found[f"transfer.{kind}.{spoken_name}"] = Rate(*rate or ())
    for ending, rows in (("", greedy), ("_sampled", sampled)):
        for group in sorted({record["group"] for record in rows} - {None}):
            mine = [record for record in rows if record["group"] == group]
            wrong = [record for record in mine if "wrong_first" in record["shown"]]
            rates = {"accuracy": share(mine, "right")}
            rates |= {name: share(mine, name) for name in HABITS}
            rates["useless"] = share(mine, *USELESS)
            rates["second_look_where_wrong"] = share(wrong, "second_look")
            found |= {f"groups.{group}.{name}{ending}": rate for name, rate in rates.items()}
    return found


def read_records(folder: Path, problems: dict[str, dict]) -> list[dict]:
    """Graded answers with what they show: the lexicon's behaviours, their row's own patterns."""
    rows = read_rows(folder / "graded.jsonl")
    for row in rows:
        problem, said = problems.get(row["id"], {}), row["response"]
        row["kind"], row["group"] = "image" if row["image"] else "text", problem.get("group")
        marks = behaviors.watched(said, problem.get("watch", {})) | {"right": row["score"] == 1}
        marks["thinks"] = "</think>" in said and behaviors.thinking(said)
        row["shown"] = {name for name, there in marks.items() if there}
        row["shown"] |= {span.name for span in behaviors.find(said)}
    return rows


class Run:
    """What the directory holds. Absent stages are absent keys."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems = {row["id"]: row for row in read_rows(folder / "data/test.jsonl")}
        self.about, self.metrics = {}, {}  # stage -> run.json, metrics.jsonl
        self.answers, self.stages = {}, {}  # stage or forbid_WORD -> greedy records, measure(...)
        self.skills = {}  # stage -> skills.json, and scores of runs/eval.sh
        for file in sorted(folder.glob("*/run.json")):
            self.about[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
            self.metrics[file.parent.name] = read_rows(file.with_name("metrics.jsonl"))
        places = [*(folder / "eval").glob("*"), *(folder / "eval/rl").glob("forbid_*")]
        order = [*STAGES, *sorted(path.name for path in places)]
        for path in sorted(places, key=lambda path: order.index(path.name)):
            parts = [read_records(path / how, self.problems) for how in ("greedy", "sampled", "")]
            greedy, sampled = parts[0] or parts[2], parts[1]  # a forbidden word has greedy answers
            if greedy or sampled:
                self.answers[path.name], self.stages[path.name] = greedy, measure(greedy, sampled)
            if (path / "skills.json").exists():
                self.skills[path.name] = json.loads((path / "skills.json").read_text())
        for file in sorted(folder.glob("bench/*/end/*/summary.json")):
            summary = json.loads(file.read_text())
            skills = self.skills.setdefault(file.parts[-4], {})
            for score, value in summary["headline"].items():  # shares, but for the points of MME
                skills[f"{file.parent.name}, {score}"] = value["score"] * summary["scale"] / 100

    def seconds(self, stage: str) -> float:
        return sum(row["seconds"] for row in self.metrics.get(stage, ()))

    def curve(self, stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of one metric, steps that did not log it left out."""
        rows = self.metrics.get(stage, ())
        points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
        return tuple(np.array(points).reshape(-1, 2).T)

    def rate(self, stage: str, path: str) -> Rate:
        return self.stages.get(stage, {}).get(path, Rate())


def results(run: Run) -> dict:
    """results.json: every rate of a stage under its path, None where it was not measured."""
    of = {stage: {"skills": run.skills.get(stage, {})} for stage in run.stages}
    for stage, rates in run.stages.items():
        for path, rate in rates.items():
            node, *inner, name = of[stage], *path.split(".")
            for key in inner:
                node = node.setdefault(key, {})
            node[name] = rate.value
    words = [stage for stage in of if stage.startswith("forbid_")]
    seeds = [about["config"].get("seed") for about in run.about.values()]
    return {
        "seed": next(iter(seeds), None),
        "seconds": {stage: run.seconds(stage) for stage in run.metrics},
        "forbid": {word.removeprefix("forbid_"): of.pop(word) for word in words},
        "stages": of,
    }


# ---------------------------------------------------------------- figures and claims


def name_of(stage: str) -> str:
    return STAGES[stage][0] if stage in STAGES else stage.replace("_", " ")


def color_of(stage: str) -> str:
    return STAGES[stage][2] if stage in STAGES else "#777777"


def chart(title: str, draw: Callable, lost: list[str]) -> dict:
    """What draw(axes) draws, as an SVG in the page's colours, "" without draw; lost: labels of what
    is not in this run."""
    if not draw:
        return {"title": title, "svg": "", "lost": lost}
    salt = {"svg.hashsalt": title}  # so that no two charts share an id
    with plt.style.context([Path(__file__).with_suffix(".mplstyle"), salt]):
        canvas, axes = plt.subplots(figsize=(4.3, 2.75), layout="constrained")
        draw(axes)
        file = io.StringIO()
        canvas.savefig(file, format="svg")
        plt.close(canvas)
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'width="[^"]*pt"|height="[^"]*pt"', "", text, count=2)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return {"title": title, "svg": text, "lost": lost}


def curves(run: Run, title: str, series: list[tuple], share: bool = True) -> dict:
    """A figure of metrics over steps, each step faint, the mean of a tenth of them bold. series:
    (stage, metric, label, colour), the last two, if they are not given, of the stage."""
    series = [(s, m, *(look or (name_of(s), color_of(s)))) for s, m, *look in series]
    there = [one for one in series if len(run.curve(*one[:2])[0])]

    def draw(axes):
        for stage, metric, label, color in there:
            steps, values = run.curve(stage, metric)
            half = max(1, len(values) // 20)
            means = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
            axes.plot(steps, values, color=color, alpha=0.2, lw=1)
            axes.plot(steps, means, color=color, lw=2, label=label)
        axes.set(xlabel="step", ylim=(0, 1.02 if share else None))
        if share:
            axes.yaxis.set_major_formatter("{x:.0%}")
        axes.figure.legend(loc="outside lower center", ncols=2)

    return chart(title, there and draw, [one[2] for one in series if one not in there])


def bars(run: Run, title: str, stages: list[str], path: str) -> dict:
    """A figure of one rate, with its interval, by stage."""
    rates = {name_of(stage): (run.rate(stage, path), color_of(stage)) for stage in stages}
    there = {name: look for name, look in rates.items() if look[0].value is not None}
    top = max([1.0, *(rate.high for rate, _ in there.values())])  # a transfer rate may be 4

    def draw(axes):
        for y, (rate, color) in enumerate(there.values()):
            axes.barh(y, rate.value, 0.7, color=color, lw=0)
            axes.hlines(y, rate.low, rate.high, color=INK, lw=1, alpha=0.6)
            axes.text(rate.high + 0.02 * top, y, f"{100 * rate.value:.0f}", va="center")
        axes.set_yticks(range(len(there)), there)
        axes.yaxis.grid(visible=False)
        axes.set(xlim=(0, 1.12 * top), ylim=(len(there) - 0.4, -0.6))
        axes.xaxis.set_major_formatter("{x:.0%}")

    return chart(title, there and draw, [name for name in rates if name not in there])


def lines_of_lexicon(kind: str, names: list[str]) -> list[tuple]:
    colors = [matplotlib.colors.hsv_to_rgb((behaviors.HUES[n] / 360, 0.68, 0.8)) for n in names]
    pairs = zip(names, colors, strict=True)
    return [("rl", f"{kind}/{name}", name.replace("_", " "), color) for name, color in pairs]


def claim(run: Run, way: str, stages: list[str], paths: list[str], text: str) -> dict:
    """{text, holds, numbers}: do the rates, of stages or of paths, go this way from first to last?
    holds is None where it was not measured. way: rises, falls, stays; or dips, of first, lowest and
    last tenth of a curve, with 3 standard errors of a mean of steps where a Rate has 2: the lowest
    of ten is low by luck, too."""
    numbers = {}
    if way == "dips":
        values, rates = run.curve(*stages, *paths)[1], []
        for part in np.array_split(values, BINS) if len(values) >= 2 * BINS else ():
            mean, error = float(part.mean()), float(3 * part.std(ddof=1) / math.sqrt(len(part)))
            rates.append(Rate(mean, max(0.0, mean - error), min(1.0, mean + error)))
        if rates:
            lowest = min(rates, key=lambda rate: rate.value)
            numbers = {"first tenth": rates[0], "lowest tenth": lowest, "last tenth": rates[-1]}
    else:
        labels = map(name_of, stages) if len(paths) == 1 else (p.split(".")[1] for p in paths)
        rates = [run.rate(stage, path) for stage in stages for path in paths]
        pairs = zip(labels, rates, strict=True)
        numbers = {label: rate for label, rate in pairs if rate.value is not None}
    holds = None
    if len(numbers) > 1:
        first, *middle, last = numbers.values()
        rises, falls = last.above(first), first.above(last)
        ways = {"rises": rises, "falls": falls, "stays": not (rises or falls)}
        ways["dips"] = all(first.above(low) and last.above(low) for low in middle)
        holds = ways[way]
    return {"text": text, "holds": holds, "numbers": numbers}


# ---------------------------------------------------------------- the page


def picture(run: Run, name: str) -> str:
    """A small copy as a data URI; "" where the file is gone. Rows name files beside them, traces
    as they were found by rl.py."""
    path = Path(name) if Path(name).is_file() else run.folder / "data" / name
    return gallery.picture(path, side=320) if path.is_file() else ""


def examples(run: Run) -> list[dict]:
    """The first held-out pictures that not all stages solve, with their greedy answers."""
    stages, found = [stage for stage in MAIN if run.answers.get(stage)], []
    answers = {stage: {row["id"]: row for row in run.answers[stage]} for stage in stages}
    for i, problem in run.problems.items():
        of = {stage: by_id[i] for stage, by_id in answers.items() if i in by_id}
        if problem["images"] and not all("right" in row["shown"] for row in of.values()):
            found.append({"problem": problem, "answers": of})
    return found[:EXAMPLES]


def main(config: Config) -> None:
    run, root = Run(config.run), Path(__file__).parents[1]
    if not (run.stages or run.about or run.skills):
        why = "holds no STAGE/run.json, no eval/STAGE and no bench/STAGE"
        raise SystemExit(f"{config.run} {why}: nothing to report")
    rl = config.run / "rl"
    traced = read_trace(rl, config.step) if (rl / "trace.jsonl").exists() else []
    loader = jinja2.FileSystemLoader([root / "miniature", root / "common"])
    pages = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = pages.get_template("report.html").make_module(globals() | {"run": run, "traced": traced})
    (config.run / "results.json").write_text(json.dumps(results(run), indent=1) + "\n")
    (config.run / "report.html").write_text(str(page), encoding="utf-8", errors="replace")
    print(page.headline, f"{config.run / 'results.json'}  {config.run / 'report.html'}", sep="\n")


if __name__ == "__main__":
    run_main(main, Config)
