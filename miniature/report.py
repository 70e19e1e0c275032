"""The miniature's run directories into results.json for programs and report.html for people.

    python -m miniature.report --run out/laptop

Reads `data/test.jsonl` (the held-out problems), `STAGE/{run.json,metrics.jsonl}` of every stage and
control, and `eval/STAGE/{greedy,sampled,reading}/graded.jsonl` (one graded answer a row).
Whatever was not run is said to be "not run". The page is one file without a link: curves
are inline SVG and pictures data URIs, so it can be mailed. It redraws the paper's Figures 3, 5 and
6 from this run and Table 4 in miniature; from `bench/STAGE/STEP/BENCH`, the benchmarks that
runs/eval.sh has scored, Figure 4 and the whole Table 4. Every sentence that claims something is
computed here from what was measured, and says so when a claim of the paper did not come out. Where
`rl/trace.jsonl` is, single rollouts follow token by token (tokens.py), with the page's one script.

How numbers are made. Every rate is right / total, summed over problems; the unit of its standard
error is the problem (ratio estimator), as k samples of one are not k independent observations.
    p = sum_i r_i / sum_i t_i,   se^2 = n/(n-1) * sum_i (r_i - p t_i)^2 / (sum_i t_i)^2
CBR, the share of answers that show a behaviour, has t_i = answers. BTR, how much of a linguistic
behaviour reaches pictures, is visual over linguistic: r_i and t_i count the answers that show each.
Behaviour rates come from sampled answers (temperature 1), digits read from greedy ones. Rows that
ask for perception alone ("what is at B2 ?") have their own figure and stay out of the accuracies.
"""

import base64
import html
import io
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import numpy as np

from common.log import run_main
from evaluation import behaviors, metrics
from miniature import tokens

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first
from matplotlib.ticker import PercentFormatter  # noqa: E402

STAGES = {  # order of every table and figure: directory -> (name, what it is, colour)
    "base": ("Base", "sees and answers at once, never reasons", "#8b93a1"),
    "coldstart": ("Cold start", "reasoning shown in text alone, plus captions", "#3f83d6"),
    "rl": ("Cold start + RL", "then PPO on pictures and text", "#e0702f"),
    "rl_without_coldstart": ("RL alone", "control: the same RL, straight from the base", "#9b72b8"),
    "coldstart_text_only": ("Text-only cold start", "control: no captions of pictures", "#3aa6a0"),
    "rl_text_only": ("Text-only + RL", "control: RL from that one", "#2f8f5b"),
    "average": ("Average", "of the last three checkpoints of RL", "#a8552a"),
    "rl_grpo": ("Cold start + GRPO", "control: group advantages, no critic", "#c79a1e"),
}
MAIN = ("base", "coldstart", "rl")
BENCHED = (*MAIN, "average")  # what runs/eval.sh scores, in the order of training
PAIRS = behaviors.PAIRS  # (linguistic, visual), four of them
REFLECTION = "visual_reflection"
HUES = dict(zip(behaviors.NAMES, (345, 215, 150, 262, 32, 190, 85, 300), strict=True))  # of a mark
MODES = ("greedy", "sampled", "reading")  # directories under eval/STAGE
PERCEPTION = "miniature/reading"  # source of the rows that ask what a cell shows, and no sum
BINS = 10  # of RL steps in the behaviour curves
INK, GRID = "#010203", "#030201"  # stand-ins: become currentColor and var(--line), light or dark
SPAN = 2.0  # standard errors that make a difference between two stages a finding
VERBS = {1: "gained", -1: "lost", 0: "changed nothing clear"}  # by the sign of such a finding


@dataclass(frozen=True)
class Config:
    run: Path = Path("out/laptop")  # directory of the miniature; the report is written into it
    examples: int = 5  # held-out problems shown with the answers of every stage


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Rate:
    """A share with its standard error; None where nothing was measured."""

    value: float | None = None
    error: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "n/a"
        digits = 1 if 0 < self.value < 0.0995 else 0  # 2.5 %, but 63 %
        value, error = (f"{100 * x:.{digits}f}" for x in (self.value, self.error))
        return f"{value}\xa0±\xa0{error}\xa0%"

    def above(self, other: "Rate", span: float = SPAN) -> bool:
        """Larger by more than `span` standard errors of the difference."""
        if self.value is None or other.value is None:
            return False
        return bool(self.value - other.value > span * math.hypot(self.error, other.error))


def ratio(records: Iterable[dict], right: Callable, total: Callable = lambda record: 1) -> Rate:
    """Ratio estimator clustered by problem (see the header); two problems at the least."""
    sums = defaultdict(lambda: np.zeros(2))
    for record in records:
        sums[record["id"]] += right(record), total(record)
    r, t = np.array(list(sums.values())).reshape(-1, 2).T  # (P,), (P,)
    if len(r) < 2 or t.sum() == 0:
        return Rate()
    p = r.sum() / t.sum()
    return Rate(p, math.sqrt(len(r) / (len(r) - 1) * ((r - p * t) ** 2).sum()) / t.sum())


def shows(name: str) -> Callable:
    return lambda record: name in record["shown"]


def transfer(records: list[dict], linguistic: str, visual: str) -> Rate:
    """BTR = CBR_visual / CBR_linguistic; n/a under ten answers with the linguistic behaviour."""
    if sum(linguistic in record["shown"] for record in records) < behaviors.MIN_CARRIERS:
        return Rate()
    return ratio(records, shows(visual), shows(linguistic))


def thinks(record: dict) -> bool:
    """Something stands between <think> and </think>."""
    before, end, _ = record["response"].rpartition("</think>")
    return bool(end) and bool(before.replace("<think>", "").strip())


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_records(path: Path) -> list[dict]:
    """Graded answers, each with the set of behaviours that its response has `shown`."""
    rows = read_rows(path)
    for row in rows:
        row["shown"] = {span.name for span in behaviors.find(row["response"])}
    return rows


def measure(greedy: list[dict], sampled: list[dict], problems: dict[str, dict]) -> dict:
    """All that is said about one stage: {"image_accuracy": Rate, "behaviors": {...}, ...}."""
    perception = [record for record in greedy if record["source"] == PERCEPTION]
    found = {"behaviors": {}, "thinks": {}, "transfer": {}}
    for kind in ("image", "text"):
        best, drawn = (
            [r for r in rows if r["image"] == (kind == "image") and r["source"] != PERCEPTION]
            for rows in (greedy, sampled)
        )
        spoken = drawn or best
        found[f"{kind}_accuracy"] = ratio(best, lambda record: record["score"])
        found[f"{kind}_accuracy_sampled"] = ratio(drawn, lambda record: record["score"])
        found["behaviors"][kind] = {name: ratio(spoken, shows(name)) for name in behaviors.NAMES}
        found["thinks"][kind] = ratio(spoken, thinks)
        found["transfer"][kind] = {pair[0]: transfer(spoken, *pair) for pair in PAIRS}
        if kind == "image":
            found["n"] = len({record["id"] for record in best or drawn})
            found["read_accuracy"] = reading(best or drawn, problems)
    found["perception_accuracy"] = ratio(perception, lambda record: record["score"])
    return found


def reading(records: list[dict], problems: dict[str, dict]) -> Rate:
    """Share of the digits named while reasoning about a picture that are the picture's digits."""
    from miniature.world import read_accuracy  # here: other pages use this file without torch

    counts = [read_accuracy(problems[record["id"]], record["response"]) for record in records]
    rows = [{"id": r["id"], "count": count} for r, count in zip(records, counts, strict=True)]
    return ratio(rows, lambda row: row["count"][0], lambda row: row["count"][1])


@dataclass(frozen=True)
class Run:
    """What the directory holds. Absent stages are absent keys."""

    problems: dict[str, dict]  # id -> row of test.jsonl
    pictures: Path  # the directory that image paths are relative to
    about: dict[str, dict]  # stage -> run.json
    metrics: dict[str, list[dict]]  # stage -> metrics.jsonl
    seconds: dict[str, float]  # stage -> time to train it
    answers: dict[str, list[dict]]  # stage -> greedy records, perception rows left out
    stages: dict[str, dict]  # stage -> measure(...)
    benchmarks: dict[str, list["Scored"]]  # benchmark -> its models, in the order of training
    unscored: list[str]  # directories under bench/ that are left out, and why


def read_run(directory: Path) -> Run:
    data = directory / "data"
    problems = {row["id"]: row for row in read_rows(data / "test.jsonl")}
    trained = {path.parent.name for path in directory.glob("*/run.json")}
    known = trained | {path.name for path in (directory / "eval").glob("*") if path.is_dir()}
    about, logged, seconds, answers, stages = {}, {}, {}, {}, {}
    for name in [*(s for s in STAGES if s in known), *sorted(known - STAGES.keys())]:
        if name in trained:
            about[name] = json.loads((directory / name / "run.json").read_text(encoding="utf-8"))
            logged[name] = read_rows(directory / name / "metrics.jsonl")
            seconds[name] = sum(row["seconds"] for row in logged[name])
        files = [directory / "eval" / name / how / "graded.jsonl" for how in MODES]
        greedy, sampled, reading = map(read_records, files)
        if greedy or sampled:
            stages[name] = measure(greedy + reading, sampled, problems)
            answers[name] = [record for record in greedy if record["source"] != PERCEPTION]
    scored = read_benchmarks(directory)
    return Run(problems, data, about, logged, seconds, answers, stages, *scored)


@dataclass(frozen=True)
class Scored:
    """One model on one benchmark: RUN/bench/STAGE/STEP/BENCH."""

    stage: str
    step: float  # of a checkpoint; infinite for the stage's last model, whose STEP is `end`
    scores: dict[str, dict]  # headlines, by rule or else by judge: name -> estimate
    summary: dict
    folder: Path


def read_benchmarks(directory: Path) -> tuple[dict[str, list[Scored]], list[str]]:
    """{benchmark: its models in the order of training}; what is left out, with the reason."""
    models, left_out = defaultdict(list), []
    for folder in sorted(path for path in directory.glob("bench/*/*/*") if path.is_dir()):
        stage, step, name = folder.parts[-3:]
        file = folder / "summary.json"
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        scores = summary and (summary["headline"] or (summary["judge"] or summary)["headline"])
        if scores and stage in BENCHED:
            number = math.inf if step == "end" else int(step.removeprefix("step_"))
            models[name].append(Scored(stage, number, scores, summary, folder))
            continue
        why = "is no stage of the recipe" if scores else "has no score, which wants a judge"
        left_out.append(f"{stage}/{step}/{name} {why if summary else 'is not finished'}")
    for found in models.values():
        found.sort(key=lambda model: (BENCHED.index(model.stage), model.step))
    return dict(models), left_out


def last_models(models: list[Scored]) -> dict[str, Scored]:
    return {model.stage: model for model in models if model.step == math.inf}


def results(run: Run) -> dict:
    """results.json: every rate under its name, its error as NAME_se, null = not measured."""

    def plain(value, field: str):
        if isinstance(value, dict):
            return {key: plain(inner, field) for key, inner in value.items()}
        return getattr(value, field) if isinstance(value, Rate) else value

    stages = {}
    for stage, found in run.stages.items():
        errors = {f"{k}_se": plain(v, "error") for k, v in found.items() if k != "n"}
        stages[stage] = plain(found, "value") | errors
    seeds = [about["config"].get("seed") for about in run.about.values()]
    return {"seed": seeds[0] if seeds else None, "seconds": run.seconds, "stages": stages}


# ---------------------------------------------------------------- figures


def name_of(stage: str) -> str:
    return STAGES.get(stage, (stage.replace("_", " "),))[0]


def color_of(stage: str) -> str:
    return STAGES[stage][2] if stage in STAGES else "#777777"


def words(name: str) -> str:
    return name.replace("_", " ")


def panel(title: str, note: str, draw: Callable) -> str:
    """One figure with its caption. `draw(axes)` returns False where there is nothing to draw."""
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.grid": True}
    style |= {"axes.edgecolor": GRID, "grid.color": GRID, "axes.spines.top": False}
    style |= {"axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9}
    style |= {f"{name}.color": INK for name in ("text", "xtick", "ytick")}
    style |= {"axes.labelcolor": INK, "axes.axisbelow": True, "grid.linewidth": 0.7}
    style |= {"xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": "none"}
    style |= {"axes.facecolor": "none", "savefig.facecolor": "none"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(4.3, 2.75), layout="constrained")
        drawn = draw(axes) is not False
        file = io.StringIO()
        figure.savefig(file, format="svg")
        plt.close(figure)
    body = svg(file.getvalue(), title) if drawn else '<p class="absent">not run</p>'
    return f"<figure><h3>{title}</h3>{body}<figcaption>{note}</figcaption></figure>"


def svg(text: str, title: str) -> str:
    """Matplotlib's file as a part of a page: no header, no links, the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'width="[^"]*pt"|height="[^"]*pt"', "", text, count=2)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)


def series(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, steps that did not log it left out."""
    points = [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]
    return tuple(np.array(points).reshape(-1, 2).T)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the run, the window cut at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def lines(axes, rows: list[dict], names: dict[str, tuple[str, str]], mean: bool = True) -> bool:
    """{metric: (label, colour)} over steps: raw values faint, their running mean bold."""
    for name, (label, color) in names.items():
        steps, values = series(rows, name)
        if len(steps):
            axes.plot(steps, values, color=color, alpha=0.3 if mean else 1, lw=1 if mean else 1.8)
            if mean:
                axes.plot(steps, smooth(values), color=color, lw=2, label=label)
            else:
                axes.lines[-1].set_label(label)
    axes.set_xlabel("step")
    if len(axes.lines) > 1 + mean:
        axes.legend(handlelength=1.2)
    return bool(axes.lines)


def percent(axes, top: float | None = 1.0) -> None:
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def bands(axes, rows: list[dict]) -> None:
    """The curriculum: one tinted band for each length budget, its tokens written on it."""
    steps, budgets = series(rows, "length_budget")
    for i, budget in enumerate(dict.fromkeys(budgets)):  # in order of appearance
        left, right = steps[budgets == budget][[0, -1]] + [-0.5, 0.5]
        axes.axvspan(left, right, color="#3f83d6", alpha=0.05 + 0.06 * i, lw=0)
        where = axes.get_xaxis_transform()
        middle = (left + right) / 2
        axes.text(middle, 0.03, f"≤ {budget:.0f}", transform=where, ha="center", fontsize=9)


def bars(axes, groups: dict[str, list[tuple[Rate, str]]], sideways: bool = False) -> bool:
    """Bars with standard errors and their values, {label under the group: [(Rate, colour)]}."""
    ticks, x = [], 0.0
    for bars_of_group in groups.values():
        places = [x + 0.8 * i for i in range(len(bars_of_group))]
        for place, (rate, color) in zip(places, bars_of_group, strict=True):
            if rate.value is None:
                continue
            whisker = {"color": INK, "lw": 1, "alpha": 0.6}
            text = {"text": f"{100 * rate.value:.0f}", "textcoords": "offset points"}
            end = rate.value + rate.error
            if sideways:
                axes.barh(-place, rate.value, 0.7, color=color, lw=0)
                axes.errorbar(rate.value, -place, xerr=rate.error, **whisker)
                axes.annotate(xy=(end, -place), xytext=(4, 0), va="center", **text)
            else:
                axes.bar(place, rate.value, 0.7, color=color, lw=0)
                axes.errorbar(place, rate.value, rate.error, **whisker)
                axes.annotate(xy=(place, end), xytext=(0, 2), ha="center", **text)
        ticks.append(sum(places) / len(places))
        x = places[-1] + (1.0 if sideways else 1.3)
    named, share = (axes.yaxis, axes.xaxis) if sideways else (axes.xaxis, axes.yaxis)
    named.set_ticks([-tick if sideways else tick for tick in ticks], list(groups))
    named.grid(visible=False)
    share.set_ticks([0, 0.25, 0.5, 0.75, 1])
    share.set_major_formatter(PercentFormatter(1, decimals=0))
    (axes.set_xlim if sideways else axes.set_ylim)(0, 1.12)
    return bool(axes.patches)


def stage_bars(axes, run: Run, key: str) -> bool:
    """One bar for each stage that has the number."""
    groups = {
        name_of(stage): [(found[key], color_of(stage))]
        for stage, found in run.stages.items()
        if found[key].value is not None
    }
    return bool(groups) and bars(axes, groups, sideways=True)


def hero(run: Run) -> str:
    note = "Greedy answers to problems no stage has trained on; whiskers are one standard error."
    title, key = "Picture problems solved", "image_accuracy"
    return panel(title, note, lambda axes: stage_bars(axes, run, key))


def figure_3(run: Run) -> list[str]:
    """Cold-start loss; RL reward; response length under the curriculum's budgets."""
    rl = run.metrics.get("rl", [])
    alone = run.metrics.get("rl_without_coldstart", [])
    blue, orange, purple = map(color_of, ("coldstart", "rl", "rl_without_coldstart"))

    def loss(axes):
        names = {"loss": ("training", blue), "valid_loss": ("held out", orange)}
        return lines(axes, run.metrics.get("coldstart", []), names)

    def reward(axes):
        names = {"reward_image": ("pictures", orange), "reward_text": ("text", blue)}
        drawn = lines(axes, rl, names)
        if drawn and alone:
            lines(axes, alone, {"reward_image": ("pictures, RL alone", purple)})
        percent(axes)
        return drawn

    def length(axes):
        drawn = lines(axes, rl, {"length": ("tokens", color_of("base"))})
        bands(axes, rl)
        axes.set_ylim(bottom=0)
        return drawn

    right = "Share of sampled answers that are right. Faint: each step; bold: a running mean."
    tokens = "Mean tokens of an answer. The bands are the curriculum's length budgets: an answer "
    tokens += "that is cut off earns nothing."
    return [
        panel("Cold start: loss", "Nats a token, on reasoning written in text alone.", loss),
        panel("RL: reward", right, reward),
        panel("RL: response length", tokens, length),
    ]


def behavior_curve(run: Run, name: str) -> list[tuple[float, Rate]]:
    """[(mean step, Rate)] of a metric that is a share, in bins of equally many RL steps.

    metrics.jsonl has the share of every rollout of a step, where rollouts.jsonl may keep a few. The
    error is that of a mean of steps; what the curve climbs inside a bin is counted as noise too.
    """
    steps, values = series(run.metrics.get("rl", []), name)
    if len(steps) < 2 * BINS:
        return []
    pairs = zip(np.array_split(steps, BINS), np.array_split(values, BINS), strict=True)
    return [(s.mean(), Rate(v.mean(), v.std(ddof=1) / math.sqrt(len(v)))) for s, v in pairs]


def figure_5(run: Run) -> list[str]:
    """Behaviours over RL, then CBR and BTR of each linguistic-visual pair by stage."""

    def over_steps(axes, kind, names):
        found = {name: behavior_curve(run, f"{kind}/{name}") for name in names}
        for name, points in found.items():
            steps = [step for step, _ in points]
            values = np.array([rate.value for _, rate in points])
            errors = np.array([rate.error for _, rate in points])
            area = {"color": mark_color(name), "alpha": 0.18, "lw": 0}
            axes.plot(steps, values, color=mark_color(name), lw=2, label=words(name))
            axes.fill_between(steps, values - errors, values + errors, **area)
        axes.set_xlabel("step")
        percent(axes, max(0.05, axes.get_ylim()[1]))
        return any(found.values()) and bool(axes.legend(handlelength=1.2))

    def pair(axes, linguistic, visual):
        groups = {}
        for stage in (stage for stage in MAIN if stage in run.stages):
            shown = run.stages[stage]["behaviors"]["image"]
            rate = run.stages[stage]["transfer"]["image"][linguistic].value
            label = f"{name_of(stage)}\nBTR {'n/a' if rate is None else f'{100 * rate:.0f} %'}"
            pale = color_of(stage) + "88"
            groups[label] = [(shown[linguistic], pale), (shown[visual], color_of(stage))]
        return bool(groups) and bars(axes, groups)

    seen = (REFLECTION, "visual_verification", "backtracking")
    spoken = ("backtracking", "verification", "subgoal_setting")
    share = "Share of sampled answers <em>to pictures</em> that show it, ± one standard error."
    text = "Linguistic behaviours in answers to text problems."
    first = [
        panel("Visual reflection during RL", share, lambda axes: over_steps(axes, "image", seen)),
        panel("The same run, on text", text, lambda axes: over_steps(axes, "text", spoken)),
    ]
    note = "Answers to pictures that show the linguistic (pale) and the visual one (solid)."
    return first + [
        panel(f"{words(a)} → {words(b)}", note, lambda axes, a=a, b=b: pair(axes, a, b))
        for a, b in PAIRS
    ]


# fmt: off
SEEING = (  # what is measured, title, how to read it
    ("read_accuracy", "Digits read right while reasoning",
     "Of the digits an answer names cell by cell, the share that stands in the picture."),
    ("perception_accuracy", "Single cells read right",
     "“What is at B2 ?”: perception alone, no sum to work out."),
    ("text_accuracy", "For comparison: text problems", "Solved with the grid written out."),
)
# fmt: on


def table_4(run: Run) -> list[str]:
    """What each stage costs in seeing, beside problems where there is nothing to see."""
    return [
        panel(title, note, lambda axes, key=key: stage_bars(axes, run, key))
        for key, title, note in SEEING
    ]


def figure_4(run: Run) -> list[str]:
    """Each benchmark's first score and interval; both stages are drawn one wide, however long."""
    scored = [model for models in run.benchmarks.values() for model in models]
    steps = {}  # of a stage, so far
    for stage in MAIN[1:]:
        at = [m.step for m in scored if m.stage == stage and m.step < math.inf]
        steps[stage] = max([len(run.metrics.get(stage, ())), *at])
    ends = [f"cold start\n{steps['coldstart']:,} steps", f"RL\n{steps['rl']:,} steps"]

    def place(model):
        share = min(1, model.step / max(1, steps.get(model.stage, 1)))
        return {"base": 0, "coldstart": share, "rl": 1 + share, "average": 2.45}[model.stage]

    def draw(axes, models):
        name, summary = next(iter(models[0].scores)), models[0].summary
        unit, x = summary["scale"], [place(model) for model in models]
        told = [next(iter(model.scores.values())) for model in models]
        colors = [color_of(model.stage) for model in models]
        y, low, high = ([unit * score[key] for score in told] for key in ("score", "low", "high"))
        axes.plot(x, y, color=INK, alpha=0.35, lw=1.2)
        axes.vlines(x, low, high, colors, lw=1.6)
        axes.scatter(x, y, 25, colors, zorder=3)
        axes.axvline(1, color=INK, lw=1, alpha=0.6)
        if (paper := summary["paper"].get(name)) is not None:
            axes.axhline(paper, color=INK, lw=1, ls="--", label="the paper's OVR-7B")
            axes.legend(handlelength=1.6)
        axes.set_xticks((0, 1, 2, 2.45), ["base", *ends, "average"])
        axes.set(xlim=(-0.15, 2.7), ylabel=f"{name}, {'points' if unit == 1 else '%'}")

    return [
        panel(html.escape(name), "", lambda axes, models=models: draw(axes, models))
        for name, models in run.benchmarks.items()
    ]


# fmt: off
INVARIANTS = (  # title, {metric: label}, what is healthy
    ("Sampler against trainer", {"logp_diff": "mean"},
     "|Δ log p| of the sampled tokens. fp32 on a CPU stays under 1e-4; a jump means that the "
     "sampler speaks with old weights."),
    ("Critic: explained variance", {"explained_variance": "explained variance"},
     "1 − Var(return − V) / Var(return). Near 0 at first, then rising; below 0 it misleads."),
    ("Critic: what it expects", {"value_mean": "mean V", "return_mean": "mean return"},
     "The two should meet: V is the critic's forecast of the reward."),
    ("Clipped tokens", {"clip_fraction": "clip fraction", "ratio_diff": "mean |ratio − 1|"},
     "0 with one policy step a batch: strictly on-policy, so the clip never acts."),
    ("Answers that earn nothing", {"truncated": "cut off", "no_box": "no box"},
     "A rising share cut off: the budget is too small, or the model rambles."),
    ("Entropy", {"entropy": "nats a token"},
     "Falls as the policy makes up its mind; at 0 there is nothing left to explore."),
    ("Gradient norms", {"grad_norm": "policy", "critic_grad_norm": "critic"},
     "Before clipping. Spikes here come before trouble elsewhere."),
    ("Losses", {"policy_loss": "policy", "value_loss": "critic"},
     "The policy's is near 0 by construction, no measure of progress; the critic's should fall."),
    ("Time", {"seconds": "seconds a step"}, "Grows with the length of the answers."),
)
# fmt: on


def invariants(run: Run) -> list[str]:
    palette = (color_of("rl"), color_of("coldstart"))

    def draw(axes, names):
        pairs = dict(zip(names, zip(names.values(), palette, strict=False), strict=True))
        if not lines(axes, run.metrics.get("rl", []), pairs, mean=False):
            return False
        values = np.concatenate([line.get_ydata() for line in axes.lines])
        if not values.any():
            axes.set_ylim(-0.05, 1)  # all zero: drawn as zero, not as noise around it
        elif "logp_diff" in names and values.min() > 0:
            axes.set_yscale("log")
        elif values.min() >= 0:
            axes.set_ylim(bottom=0)
        return True

    return [
        panel(title, note, lambda axes, n=names: draw(axes, n)) for title, names, note in INVARIANTS
    ]


# ---------------------------------------------------------------- prose, computed

VERDICTS = {  # of an insight: tone, what is said
    True: ("yes", "as in the paper"),
    None: ("half", "in part"),
    False: ("no", "not in this run"),
    "absent": ("absent", "not measured"),
}


def headline(run: Run) -> str:
    """The main finding in one sentence; what did not happen is not claimed."""
    if not {"base", "rl"} <= run.stages.keys():
        return "The three stages have not all been run and evaluated yet."
    base, rl = (run.stages[stage]["image_accuracy"] for stage in ("base", "rl"))
    if rl.above(base):
        text = f"Picture problems solved rose from {base} to <b>{rl}</b>"
    else:
        text = f"Picture problems solved did <b>not</b> clearly rise: {base} before, {rl} after"
    if "coldstart" in run.stages:
        looks = run.stages["coldstart"]["behaviors"]["image"][REFLECTION]
        before = run.stages["base"]["behaviors"]["image"][REFLECTION]
        if looks.above(before):
            early = f"Taught to reason in text alone, the model looked again in {looks} of its "
            early += "answers to pictures, which nobody had shown it; with RL on top, "
            text = early + text[0].lower() + text[1:]
    if "rl_without_coldstart" in run.stages:
        alone = run.stages["rl_without_coldstart"]["image_accuracy"]
        text += f"; the same RL without the cold start reached {alone}"
    return text + "."


def insight_early(run: Run) -> tuple:
    title = "Transfer comes very early: language alone already teaches looking again"
    if not {"base", "coldstart"} <= run.stages.keys():
        return title, "absent", "Needs the base and the cold start."
    base, cold = (run.stages[stage]["behaviors"]["image"][REFLECTION] for stage in MAIN[:2])
    think = [run.stages[stage]["thinks"]["image"] for stage in MAIN[:2]]
    text = (
        f"The cold start saw no picture in any reasoning trace. On pictures it thinks before it "
        f"answers in {think[1]} of the answers (base: {think[0]}) and reflects on what it sees in "
        f"{cold} (base: {base})."
    )
    verdict = True if cold.above(base) else (None if think[1].above(think[0]) else False)
    return title, verdict, text


def insight_amplified(run: Run) -> tuple:
    title = "Cold start memorises broadly; RL suppresses first, then amplifies what is useful"
    points = behavior_curve(run, f"image/{REFLECTION}")
    if not points:
        return title, "absent", f"Needs at least {2 * BINS} steps of RL."
    rates = [rate for _, rate in points]
    lowest = min(range(len(rates)), key=lambda i: rates[i].value)
    first, low, last = rates[0], rates[lowest], rates[-1]
    # the lowest of ten bins is low by luck too, hence 3 standard errors and not 2
    fell, rose = first.above(low, span=3), last.above(low, span=3)
    course = {
        (True, True): "fell, then came back",
        (True, False): "fell and stayed low: RL prunes what does not pay here",
        (False, True): "rose without a dip",
        (False, False): "did not move by more than its noise",
    }[fell, rose]
    text = (
        f"Over RL, visual reflection {course}: {first} of the answers to pictures in the first "
        f"tenth, {low} at its lowest (around step {points[lowest][0]:.0f}), {last} in the last."
    )
    broad = []
    for stage in MAIN:
        if stage in run.stages:
            shown = run.stages[stage]["behaviors"]["image"].values()
            count = sum(rate.value is not None and rate.value >= 0.05 for rate in shown)
            broad.append(f"{count} ({name_of(stage)})")
    if broad:
        text += " Behaviours of eight that stand in 5 % or more of those answers: "
        text += f"{', '.join(broad)}."
    return title, True if fell and rose else (None if fell or rose else False), text


def insight_strategic(run: Run) -> tuple:
    title = "Transfer is strategic: backtracking becomes visual reflection, "
    title += "verification hardly does"
    found = [run.stages[stage]["transfer"]["image"] for stage in MAIN if stage in run.stages]
    if len(found) < 3:
        return title, "absent", "Needs all three stages."
    look, check = ([rates[name] for rates in found] for name in ("backtracking", "verification"))
    text = (
        "Behaviour transfer rate, visual over linguistic, from base over cold start to RL: "
        f"backtracking → visual reflection {look[0]}, {look[1]}, {look[2]}; verification → visual "
        f"verification {check[0]}, {check[1]}, {check[2]}. In the paper 2.5, 8.2, 17.3 % and 25.1, "
        f"0.9, 1.5 %. n/a: under {behaviors.MIN_CARRIERS} answers with the linguistic behaviour."
    )
    if all(rate.value is None for rate in look[1:]):
        return title, "absent", text
    grows, chosen = look[2].above(look[1]), look[2].above(check[2])
    return title, True if grows and chosen else (None if grows or chosen else False), text


# ---------------------------------------------------------------- the page

COLUMNS = {  # of the table: heading -> where the number stands
    "pictures": lambda found: found["image_accuracy"],
    "pictures, sampled": lambda found: found["image_accuracy_sampled"],
    "text": lambda found: found["text_accuracy"],
    "text, sampled": lambda found: found["text_accuracy_sampled"],
    "thinks": lambda found: found["thinks"]["image"],
    "looks again": lambda found: found["behaviors"]["image"][REFLECTION],
    "reads right": lambda found: found["read_accuracy"],
}


def table(run: Run) -> str:
    """Stages and controls with standard errors; a phone shows each row as a card."""
    rows = []
    for stage in [*STAGES, *(stage for stage in run.stages if stage not in STAGES)]:
        facts = [STAGES[stage][1]] if stage in STAGES else []
        facts += [f"{run.seconds[stage]:.0f}\xa0s"] if stage in run.seconds else []
        row = f'<th scope="row"><i style="background:{color_of(stage)}"></i>{name_of(stage)}'
        row += f"<small>{'; '.join(facts)}</small></th>"
        if stage not in run.stages:
            row += f'<td class="absent" colspan="{len(COLUMNS)}">not run</td>'
        for heading, pick in COLUMNS.items() if stage in run.stages else ():
            rate = pick(run.stages[stage])
            value, *error = str(rate).removesuffix("\xa0%").split("\xa0±\xa0")
            row += f'<td data-name="{heading}"><span>{value}</span>'
            row += "".join(f"<small> ± {part}</small>" for part in error)
            width = f"width:{100 * (rate.value or 0):.0f}%"
            row += f'<b style="{width};background:{color_of(stage)}"></b></td>'
        rows.append(f"<tr{'' if stage in MAIN else ' class=control'}>{row}</tr>")
    return as_table(COLUMNS, rows)


def as_table(headings: Iterable[str], rows: list[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in headings)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def differences(run: Run) -> tuple[dict[tuple, dict], list[str]]:
    """{(benchmark, stage): {score: the stage minus the one before it}}, and what else to say."""
    found, remarks = {}, [f"Left out: {what}." for what in run.unscored]
    for name, models in run.benchmarks.items():
        asked = [model.summary["protocol"] | {"model": ""} for model in models]
        fields = sorted(set().union(*asked))
        if odd := [f for f in fields if any(p.get(f) != asked[0].get(f) for p in asked)]:
            remarks.append(f"{name}: its models were asked with different {', '.join(odd)}.")
        last = last_models(models)
        cut = {stage: model.summary["truncated"] for stage, model in last.items()}
        if many := [f"{s} {share:.0%}" for s, share in cut.items() if share > metrics.NOTABLE]:
            remarks.append(f"{name}: replies cut off, and so wrong: {', '.join(many)}.")
        for old, new in itertools.pairwise(MAIN):
            if old in last and new in last:
                rows = [read_rows(last[stage].folder / "graded.jsonl") for stage in (old, new)]
                try:
                    told = metrics.compare(last[new].summary["metric"], *rows)["difference"]
                    told = metrics.renamed(told, last[new].summary["k"])
                    found[name, new] = {score: told[score] for score in last[new].scores}
                except ValueError as error:  # other items, or scores by a judge alone
                    remarks.append(f"{name}, {old} and {new} cannot be compared: {error}.")
    return found, remarks


def benchmark_table(run: Run, found: dict[tuple, dict]) -> str:
    """The paper's Table 4: the stages' last models, and what cold start and RL have changed."""
    headings = [*map(name_of, BENCHED), "Cold start − base", "RL − cold start", "In the paper"]
    rows = []
    for name, models in run.benchmarks.items():
        unit, last = models[0].summary["scale"], last_models(models)
        sizes = [sorted({model.summary[key] for model in models}) for key in ("n", "k")]
        n, k = (" or ".join(f"{size:,}" for size in some) for some in sizes)
        for score in dict.fromkeys(score for model in models for score in model.scores):
            cells = []
            for stage in BENCHED:
                value, error = "not scored", ""
                if told := stage in last and last[stage].scores.get(score):
                    value = f"{unit * told['score']:.1f}"
                    error = "" if told["error"] is None else f" ± {unit * told['error']:.1f}"
                cells.append((value, error))
            for stage in MAIN[1:]:
                value, interval = "–", ""
                if told := found.get((name, stage), {}).get(score):
                    value = f"{unit * told['difference']:+.1f}"
                    value += "\xa0*" * (told["low"] > 0 or told["high"] < 0)
                    interval = f"<br>[{unit * told['low']:+.1f}, {unit * told['high']:+.1f}]"
                cells.append((value.replace("-", "−"), interval.replace("-", "−")))
            cells.append((models[0].summary["paper"].get(score, "–"), ""))
            row = f'<th scope="row">{html.escape(name)}<small>{score}; n {n}; k {k}</small></th>'
            for heading, (value, small) in zip(headings, cells, strict=True):
                row += f'<td data-name="{heading}"><span>{value}</span><small>{small}</small></td>'
            rows.append(f"<tr>{row}</tr>")
    return as_table(headings, rows)


def mark_color(name: str) -> str:
    red, green, blue = matplotlib.colors.hsv_to_rgb((HUES[name] / 360, 0.68, 0.80))
    return matplotlib.colors.to_hex((red, green, blue))


def highlighted(text: str) -> str:
    """The response with its behaviours marked; where two overlap the visual one is shown."""
    paint = [""] * len(text)
    for span in sorted(behaviors.find(text), key=lambda span: behaviors.NAMES.index(span.name)):
        paint[span.start : span.end] = [span.name] * (span.end - span.start)
    pieces = []
    for name, group in itertools.groupby(range(len(text)), key=lambda i: paint[i]):
        piece = html.escape("".join(text[i] for i in group))
        mark = f'<mark style="--h:{HUES[name]}" title="{words(name)}">' if name else ""
        pieces.append(f"{mark}{piece}{'</mark>' if mark else ''}")
    return "".join(pieces)


def data_uri(path: Path) -> str:
    kind = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def choose(run: Run, stages: list[str], count: int) -> list[tuple[str, str]]:
    """Held-out picture problems worth showing, [(why, id)]: gains, a failure, an easy one.

    Gains that show a behaviour after the cold start come first; the failure is there on purpose.
    """
    by_stage = {s: {r["id"]: r for r in run.answers[s] if r["image"]} for s in stages}
    shared = set.intersection(*(set(rows) for rows in by_stage.values())) if stages else set()
    ids = [i for i in by_stage[stages[-1]] if i in shared and run.problems[i].get("images")]

    def score(stage: str, i: str) -> float:
        return by_stage[stage][i]["score"]

    first, last = stages[0], stages[-1]
    later = stages[1:] or stages
    order = sorted(ids, key=lambda i: -max(len(by_stage[s][i]["shown"]) for s in later))
    gains = [i for i in order if score(first, i) < score(last, i)]
    fails = [i for i in order if score(last, i) == 0]
    easy = [i for i in order if all(score(stage, i) == 1 for stage in stages)]
    picked = [("Learned", i) for i in gains[: max(1, count - 2)]]
    picked += [("Still wrong", i) for i in fails[:1]] + [("Right throughout", i) for i in easy[:1]]
    return picked[:count]


def examples(run: Run, count: int) -> str:
    stages = [stage for stage in MAIN if run.answers.get(stage)]
    cards = []
    for why, i in choose(run, stages, count) if stages else ():
        problem = run.problems[i]
        alt = f'alt="the picture of problem {html.escape(i)}"'
        files = [run.pictures / path for path in problem["images"]]
        pictures = "".join(f'<img {alt} src="{data_uri(path)}">' for path in files)
        answers = []
        for stage in stages:
            record = next(record for record in run.answers[stage] if record["id"] == i)
            right = record["score"] == 1
            said = record["extracted"]
            said = "no answer" if said is None else f"says {said.strip()}"
            verdict = f"{'✓' if right else '✗'} {html.escape(said)}"
            answers.append(
                f'<div class="answer {"right" if right else "wrong"}" '
                f'style="--stage:{color_of(stage)}"><h4>{name_of(stage)}<span>{verdict}</span></h4>'
                f"<p>{highlighted(record['response'])}</p></div>"
            )
        question = html.escape(problem["prompt"].replace("<image>", "").strip())
        cards.append(
            f'<article><div class="ask">{pictures}<div><small>{why}</small><p>{question}</p>'
            f"<p>Right: <b>{html.escape(problem['answer'])}</b></p></div></div>"
            f'<div class="answers">{"".join(answers)}</div></article>'
        )
    marks = (f'<mark style="--h:{HUES[name]}">{words(name)}</mark> ' for name in behaviors.NAMES)
    body = "".join(cards) or '<p class="absent">not run</p>'
    return f'<p class="legend">{"".join(marks)}</p>{body}'


PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Open Vision Reasoner, in miniature</title><style>$css</style></head><body>
<header><div><p class="kicker">Open Vision Reasoner, in miniature</p>
<h1>$headline</h1>
<p class="facts">$facts</p></div>$hero</header>
<main>
<section id="stages"><h2>Stages and controls</h2>
<p>Per cent of $n held-out problems, ± one standard error. Pictures and text ask the same kind of
question; the text twin writes the grid out. Greedy unless it says sampled (temperature 1).
<em>Thinks</em> and <em>looks again</em> (visual reflection) are shares of the answers to pictures;
<em>reads right</em> is the share of digits read correctly while reasoning about one.</p>
$table</section>
<section id="figure-3"><h2>How it learned <span>the paper's Figure 3</span></h2>
<p>Stage 1 imitates reasoning written in text. Stage 2 rewards an answer with 1 if the boxed number
is right and 0 if not; nothing rewards reasoning as such. For RL on perception tasks alone, reward
and length here are the paper's Figure 6.</p>
<div class="grid">$figure_3</div></section>
<section id="insights"><h2>The paper's three insights, asked of this run</h2>
<div class="insights">$insights</div></section>
<section id="figure-5"><h2>Behaviours, from language to sight <span>the paper's Figure 5</span></h2>
<p>Four linguistic behaviours, each with a visual counterpart. The behaviour transfer rate (BTR) is
the visual one's share of answers over the linguistic one's.</p>
<div class="grid">$figure_5</div></section>
<section id="table-4"><h2>What reasoning costs in seeing <span>the paper's Table 4</span></h2>
<p>$perception_text</p><div class="grid">$table_4</div></section>
$benchmarks
<section id="invariants"><h2>Is the RL sound?</h2>
<p>Curves that should look a certain way whatever the model learns. When a run goes wrong, the first
sign is usually here.</p><div class="grid">$invariants</div></section>
<section id="examples"><h2>The same problems, before and after</h2>
<p>Held-out pictures, enlarged, with the greedy answer of each stage. Marked: the behaviours that
<code>behaviors.py</code> finds.</p>$examples</section>
$tokens
</main><footer><p>$footer</p></footer></body></html>
""")

BENCHMARKS = Template("""<section id="benchmarks"><h2>Benchmarks
<span>the paper's Figure 4 and Table 4</span></h2>
<p>The first score of each benchmark with its 95 % interval, from the base over the checkpoints of
both stages to the average. The two stages are drawn equally wide.</p>
<div class="grid">$figure_4</div>
<p class="under">± one standard error; n items, k samples of each. Differences are paired by item,
in brackets their 95 % interval; * where it excludes 0. $text</p>$table</section>""")

CSS = """
:root{--ink:#20242c;--soft:#667080;--paper:#fbfaf7;--card:#fff;--line:#e3e1da;--good:#2c8a57;
--bad:#c2483d;--half:#b07d17;--mark:80% 88%;--markink:24%}
@media (prefers-color-scheme:dark){:root{--ink:#e6e4de;--soft:#9aa3b2;--paper:#16181c;
--card:#1e2126;
--line:#343941;--good:#5fc08c;--bad:#ee8277;--half:#dcb04e;--mark:40% 28%;--markink:86%}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-size:16px}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 20px}
header{display:grid;grid-template-columns:1.25fr 1fr;gap:40px;align-items:center;padding-top:56px}
.kicker{margin:0 0 10px;color:var(--soft);font-size:14px;letter-spacing:.04em}
h1{font-size:27px;line-height:1.35;font-weight:500;margin:0 0 18px;letter-spacing:-.01em}
h1 b{color:#d9652a;font-weight:650}
.facts{color:var(--soft);margin:0;font-size:15px}
section{margin-top:64px}
h2{font-size:22px;font-weight:600;margin:0 0 6px;letter-spacing:-.01em}
h2 span{font-size:14px;font-weight:400;color:var(--soft);margin-left:8px;white-space:nowrap}
section>p{max-width:760px;color:var(--soft);margin:0 0 20px}section>.under{margin-top:20px}
.grid{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:18px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:14px 14px 12px}
figure h3{margin:0 0 6px;font-size:15px;font-weight:600}
figure h3::first-letter,.legend mark::first-letter{text-transform:uppercase}
figure svg{display:block;width:100%;height:auto;overflow:visible;color:var(--soft)}
figure svg text{font-family:inherit!important}
figcaption{font-size:13px;line-height:1.45;color:var(--soft);margin-top:8px}
.absent{color:var(--soft);font-style:italic}
figure .absent{display:grid;place-items:center;aspect-ratio:1.56;margin:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;background:var(--card);
border:1px solid var(--line);border-radius:12px;border-spacing:0;overflow:hidden;
border-collapse:separate}
th,td{text-align:left;padding:11px 12px;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;font-size:13px;font-weight:500;color:var(--soft)}
tbody th{font-weight:600;width:30%}td{white-space:nowrap;width:10%}
th i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
th small{display:block;font-weight:400;color:var(--soft);font-size:13px;padding-left:18px}
td span{font-weight:600}td small{font-weight:400;color:var(--soft)}
td b{display:block;height:4px;border-radius:2px;margin-top:6px;opacity:.8}
.control th{font-weight:500}
.insights{display:grid;gap:14px;margin-top:16px}
.insight{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--tone);
border-radius:12px;padding:16px 20px}
.insight h3{margin:0;font-size:17px;font-weight:600}
.insight .verdict{color:var(--tone);font-size:14px;font-weight:600;margin:2px 0 6px}
.insight p{margin:0;max-width:860px}
.yes{--tone:var(--good)}.half{--tone:var(--half)}.no{--tone:var(--bad)}
.insight.absent{--tone:var(--soft)}
.insight.absent{font-style:normal}
mark{background:hsl(var(--h) var(--mark));color:hsl(var(--h) 65% var(--markink));
border-radius:4px;
padding:1px 4px;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.legend{display:flex;flex-wrap:wrap;gap:6px;font-size:13px}
article{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:18px;
margin-top:18px}
.ask{display:flex;gap:20px;align-items:center;flex-wrap:wrap}
.ask p{margin:2px 0}.ask small{color:var(--soft)}
.ask img{width:252px;max-width:100%;image-rendering:pixelated;border-radius:6px;
border:1px solid var(--line)}
.answers{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:18px;margin-top:16px}
.answer{border-top:3px solid var(--stage);padding-top:8px}
.answer h4{margin:0;font-size:14px;font-weight:600;display:flex;justify-content:space-between;
gap:8px}
.answer p{margin:6px 0 0;font-size:14px;line-height:1.7;overflow-wrap:anywhere}
.right h4 span{color:var(--good)}.wrong h4 span{color:var(--bad)}
footer{color:var(--soft);font-size:13px;padding:48px 20px 40px;overflow-wrap:anywhere}
@media (max-width:900px){.grid{grid-template-columns:repeat(2,minmax(0,1fr))}
header{grid-template-columns:1fr;gap:24px;padding-top:36px}}
@media (max-width:640px){body{font-size:15px}h1{font-size:22px}section{margin-top:48px}
header,main,footer{padding-left:14px;padding-right:14px}h2 span{display:block;margin:0}
.grid,.answers{grid-template-columns:1fr}
thead{display:none}tbody{display:block}table{display:block}
tr{display:grid;grid-template-columns:1fr 1fr 1fr;padding:12px 14px;
border-top:1px solid var(--line)}
tr:first-child{border-top:0}tbody th{grid-column:1/-1;padding:0 0 4px;border:0}
tbody th{width:auto}td{width:auto;border:0;padding:6px 14px 6px 0}td[colspan]{padding:0 0 0 18px}
td[data-name]::before{content:attr(data-name);display:block;font-size:12px;color:var(--soft)}}
"""


def perception_text(run: Run) -> str:
    """Did the cold start cost perception, and did RL bring it back? In numbers."""
    text = "In the paper the cold start costs some perception and RL recovers a part of it."
    keys = {"perception_accuracy": "Single cells", "read_accuracy": "Digits in reasoning"}
    for key, what in keys.items():
        rates = [(stage, run.stages[stage][key]) for stage in MAIN if stage in run.stages]
        rates = [(stage, rate) for stage, rate in rates if rate.value is not None]
        course = ", ".join(f"{name_of(stage)} {rate}" for stage, rate in rates)
        text += f" {what}: {course or 'not measured'}"
        for (_, old), (stage, new) in itertools.pairwise(rates):
            text += f"; {name_of(stage)} {VERBS[new.above(old) - old.above(new)]}"
        text += "."
    return text


def benchmarks(run: Run) -> str:
    """The section of Figure 4 and Table 4; nothing where no benchmark was scored."""
    if not run.benchmarks and not run.unscored:
        return ""
    found, remarks = differences(run)
    text = ""
    for stage in MAIN[1:]:
        changes = [told for (_, new), of in found.items() if new == stage for told in of.values()]
        signs = [(told["low"] > 0) - (told["high"] < 0) for told in changes]
        course = ", ".join(f"{verb} in {signs.count(way)}" for way, verb in VERBS.items())
        text += f"{name_of(stage)}: {course} of {len(signs)}. " if signs else ""
    text += "Where nothing changes, one * in twenty is to be expected. " if found else ""
    text += html.escape(" ".join(remarks))
    figure, table = "".join(figure_4(run)), benchmark_table(run, found)
    return BENCHMARKS.substitute(figure_4=figure, text=text, table=table)


def page(run: Run, count: int) -> str:
    n = max((found["n"] for found in run.stages.values()), default=0)
    spent = sum(run.seconds.get(stage, 0) for stage in MAIN)
    facts = f"Base, cold start and RL trained in {spent:.0f} s, with every control "
    facts += f"{sum(run.seconds.values()):.0f} s. Seed {results(run)['seed']}."
    insights = ""
    for insight in (insight_early, insight_amplified, insight_strategic):
        title, verdict, text = insight(run)
        tone, said = VERDICTS[verdict]
        insights += f'<div class="insight {tone}"><h3>{title}</h3>'
        insights += f'<p class="verdict">{said}</p><p>{text}</p></div>'
    about = run.about.get("rl") or next(iter(run.about.values()), {})
    commit = (about.get("commit") or {}).get("hash") or "none"
    footer = [about.get("command", ""), f"commit {commit}"]
    footer += [f"{name} {version}" for name, version in about.get("versions", {}).items()]
    return PAGE.substitute(
        css=CSS,
        headline=headline(run),
        facts=facts,
        hero=hero(run),
        n=n,
        table=table(run),
        figure_3="".join(figure_3(run)),
        insights=insights,
        figure_5="".join(figure_5(run)),
        perception_text=perception_text(run),
        table_4="".join(table_4(run)),
        benchmarks=benchmarks(run),
        invariants="".join(invariants(run)),
        examples=examples(run, count),
        tokens=tokens.section(run.pictures.parent / "rl"),
        footer=html.escape(" · ".join(part for part in footer if part)),
    )


def main(config: Config) -> None:
    run = read_run(config.run)
    if not (run.stages or run.about or run.benchmarks):
        why = "holds no STAGE/run.json, no eval/STAGE and no bench/STAGE"
        raise SystemExit(f"{config.run} {why}: nothing to report")
    (config.run / "results.json").write_text(json.dumps(results(run), indent=1) + "\n")
    (config.run / "report.html").write_text(page(run, config.examples), encoding="utf-8")
    print(re.sub(r"<[^>]*>", "", headline(run)))
    print(f"{config.run / 'results.json'}  {config.run / 'report.html'}")


if __name__ == "__main__":
    run_main(main, Config)
