"""Graded replies -> numbers that can be trusted: scores with intervals, chance, and comparisons.

    rows ─by unit─▶ metric(rows of a unit) = {score: (right, of)} ─sum / sum─▶ scores
                                                 └─ bootstrap over units ─▶ 95 % intervals

A row is a reply: {"id", "sample", "score": 0..1 | None, "status", "extracted", "answer"} and, where
its benchmark has them, "category", "group", "seen", "tokens", "judge_score". A metric is a plain
function of the rows of one unit, which says what the unit adds to each score. Units are independent
of each other: an item, DynaMath's question with its variants, WeMath's problem with its steps,
MME's image. The bootstrap draws units anew, never replies.

"All of a group right" is a product of scores. For scores of 0 and 1 that is all(); for the chances
of independent guesses it is the expectation, so chance is the metric of rows whose score is the
chance of a guess, and the upper bound that of rows whose truncated replies count as right.

What cannot be parsed is wrong. A score of None (no rule can grade it) leaves its unit out, and is
counted. Rule and judge are two lines. Shares are 0..1, MME's sums points; `table` prints percent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from statistics import fmean
from typing import NamedTuple

import numpy as np

from reward import grade

DRAWS = 10_000  # of the bootstrap: the ends of an interval move by 2 % of its width between seeds
LEVEL = (0.025, 0.975)  # ends of every interval
Z = 1.959964  # normal quantile of LEVEL, for Wilson
VARIANTS = 10  # of a DynaMath question
# MME's categories, 200 points each
PERCEPTION = "existence count position color posters celebrity scene landmark artwork ocr".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
COLUMNS = "benchmark,score of,score,95 % interval,n,k,chance,truncated,unparsed,at most,paper"


PARTS = {  # the accuracy is also given by each of these, where they tell rows apart
    "categories": lambda row: str(row.get("category")),
    "seen": lambda row: str(row.get("seen")),  # from a set that the paper trains on, too
    # a quarter of CharXiv's descriptive questions ask for what the chart does not have
    "applicable": lambda row: "not " * (row["answer"] == "Not Applicable") + "applicable",
}


def grouped(rows: Iterable[dict], key: Callable[[dict], Hashable]) -> dict[Hashable, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


# --- the metrics: the rows of one unit and one sample -> {score: (right, of)} ---------------------


def accuracy(rows: list[dict]) -> dict:
    return {"accuracy": (sum(row["score"] for row in rows), len(rows))}


def worst_of_variants(rows: list[dict]) -> dict:
    """DynaMath: a question is its ten variants; one that is missing is wrong, in all three."""
    scores = [row["score"] for row in rows] + [0.0] * (VARIANTS - len(rows))
    best = 1 - math.prod(1 - score for score in scores)
    return {"worst": (math.prod(scores), 1), "average": (sum(scores), VARIANTS), "best": (best, 1)}


def strict_and_loose(rows: list[dict]) -> dict:
    """WeMath: m, the whole problem; s, its steps. A whole problem without its steps is by rote.

    inadequate knowledge IK = not m, not all s; inadequate generalisation IG = not m, all s;
    complete mastery CM = m and all s (loose: any s); rote memorisation RM = m and the rest.
    Score = 1 - IG / 2 - RM - IK = CM + IG / 2.
    """
    [m] = [row["score"] for row in rows if row["group"]["part"].endswith("multi")]
    steps = [row["score"] for row in rows if not row["group"]["part"].endswith("multi")]
    all_steps, any_step = math.prod(steps), 1 - math.prod(1 - score for score in steps)
    shares = {"IK": (1 - m) * (1 - all_steps), "IG": (1 - m) * all_steps}
    for how, steps_right in (("strict", all_steps), ("loose", any_step)):
        shares |= {f"CM {how}": m * steps_right, f"RM {how}": m * (1 - steps_right)}
        shares[how] = shares[f"CM {how}"] + shares["IG"] / 2
    return {name: (share, 1) for name, share in shares.items()}


def circular(rows: list[dict]) -> dict:
    """MMBench: a question counts only if all its rotations are right; rows: each for itself."""
    scores = [row["score"] for row in rows]
    return {"circular": (math.prod(scores), 1), "rows": (sum(scores), len(scores))}


def hallusion(rows: list[dict]) -> dict:
    """HallusionBench: aAcc of replies; fAcc of figures and qAcc of questions that are all right.
    Figures and questions cross inside a set, so the set is the unit."""

    def all_right(kind: str) -> tuple[float, int]:
        groups = grouped(rows, lambda row: row["group"][kind]).values()
        return sum(math.prod(row["score"] for row in group) for group in groups), len(groups)

    right = sum(row["score"] for row in rows)
    return {"aAcc": (right, len(rows)), "fAcc": all_right("figure"), "qAcc": all_right("question")}


def mean_of_three(scores: dict) -> dict:
    return {"mean": (scores["aAcc"] + scores["fAcc"] + scores["qAcc"]) / 3}


def f1(rows: list[dict]) -> dict:
    """POPE: yes is positive. An unparsed reply says neither: wrong, and no yes of the model's."""
    [row] = rows
    positive, score = row["answer"].lower() == "yes", row["score"]
    yes = row["status"] == "ok" and str(row["extracted"]).strip().lower() == "yes"
    hit = score * positive
    said_yes = hit + (1 - score) * (not positive and yes)
    terms = {"f1": (2 * hit, said_yes + positive), "accuracy": (score, 1)}
    rates = {"precision": (hit, said_yes), "recall": (hit, positive), "yes ratio": (said_yes, 1)}
    return terms | rates


def mme(rows: list[dict]) -> dict:
    """MME's points of a category: 100 x (acc of replies + acc+ of images with both right)."""
    first, second = (row["score"] for row in rows)
    points = 100 * ((first + second) / 2 + first * second)
    return {rows[0]["category"].lower(): (points, 1)}


def mme_sums(points: dict) -> dict:
    """2,000 points of perception, 800 of cognition at the most; neither if nothing was asked."""
    kind = dict.fromkeys(PERCEPTION, "perception") | dict.fromkeys(COGNITION, "cognition")
    sums = Counter()
    for category, score in points.items():
        sums[kind[category]] += score
    return sums


def of_samples(rows: list[dict]) -> dict:
    """pass@1, 2, 4, ... k and maj@k; here the rows are all k samples of an item."""
    scores, k = [row["score"] for row in rows], len(rows)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    terms = {f"pass@{size}": (pass_at_k(k, scores.count(1.0), size), 1) for size in sizes}
    return terms | {f"maj@{k}": (majority([row["extracted"] for row in rows], scores), 1)}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k of the n samples is right, unbiased (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def same(a: str, b: str) -> bool:
    """Are two extracted answers one? 1/2 and 0.5 are."""
    return a == b or grade(a, f"\\boxed{{{b}}}", digits=6).score == 1


def majority(answers: list[str | None], scores: list[float]) -> float:
    """Expected score of the most frequent answer, ties broken by lot. None (unparsed) never wins.

    An answer is compared with the first of each kind.
    """
    kinds = {}  # first answer -> scores of all that equal it
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            first = next((known for known in kinds if same(known, answer)), answer)
            kinds.setdefault(first, []).append(score)
    votes = max(map(len, kinds.values()), default=0)
    winners = [sum(kind) / votes for kind in kinds.values() if len(kind) == votes]
    return sum(winners) / len(winners) if winners else 0.0


class Metric(NamedTuple):
    terms: Callable[[list[dict]], dict]
    headline: tuple[str, ...] = ("accuracy",)  # scores that stand in the table
    unit: str = ""  # what makes a unit: a name in "group"; empty: the item alone
    totals: Callable[[dict], dict] = lambda scores: {}  # scores made of the others
    scale: int = 100  # what the table multiplies by, to speak the paper's unit


METRICS = {
    "accuracy": Metric(accuracy),
    "avg@k": Metric(accuracy),
    "judge": Metric(accuracy),  # MM-Vet's 0..1, which no rule gives
    "worst of variants": Metric(worst_of_variants, ("worst", "average", "best"), "question"),
    "strict and loose": Metric(strict_and_loose, ("strict", "loose"), "problem"),
    "circular": Metric(circular, ("circular", "rows"), "question"),
    "hallusion": Metric(hallusion, ("mean", "aAcc", "fAcc", "qAcc"), "set", mean_of_three),
    "f1": Metric(f1, ("f1", "accuracy")),
    "mme sum": Metric(mme, ("perception", "cognition"), "image", mme_sums, scale=1),
    "both forms": Metric(accuracy, unit="question"),  # MMMU-Pro's, of which the paper has the mean
    "samples": Metric(of_samples),
}


# --- scores and intervals -------------------------------------------------------------------------


def unit_of(metric: str, row: dict) -> Hashable:
    name = METRICS[metric].unit
    return row["group"][name] if name else row["id"]


def unit_sums(metric: str, rows: list[dict]) -> tuple[list[str], np.ndarray]:
    """Names of H scores, and what each of U units adds to their right and of: (U, H, 2).

    Samples are counted one by one, so variants of different samples are never combined. Units and
    names are sorted: two runs of the same items have them at the same places.
    """
    units = grouped(rows, lambda row: unit_of(metric, row))
    terms = []  # of each unit: {name: what it adds}
    for unit in sorted(units, key=str):
        terms.append(defaultdict(lambda: np.zeros(2)))
        for run in grouped(units[unit], lambda row: row["sample"]).values():
            for name, pair in METRICS[metric].terms(run).items():
                terms[-1][name] += pair
    names = sorted({name for of in terms for name in of})
    return names, np.array([[of[name] for name in names] for of in terms])


def scores_of(metric: str, names: list[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (..., H, 2) -> {name: (...)}. 0 / 0 is 0: who never says yes has precision 0."""
    right, of = np.moveaxis(sums, -1, 0)
    ratios = np.divide(right, of, out=np.zeros_like(right), where=of > 0)
    scores = dict(zip(names, np.moveaxis(ratios, -1, 0), strict=True))
    return scores | METRICS[metric].totals(scores)


def point(metric: str, rows: list[dict]) -> dict[str, float]:
    names, sums = unit_sums(metric, rows)
    return {name: float(x) for name, x in scores_of(metric, names, sums.sum(axis=0)).items()}


def bootstrap(terms: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums of what U units add, each draw over U units with replacement: (U, ...) -> (draws, ...).

    Few units differ in what they add, so it draws how often each *kind* of unit comes (a
    multinomial): the same distribution, 10,000 draws in milliseconds.
    """
    flat = terms.reshape(len(terms), -1)
    kinds, count = np.unique(flat, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(flat), count / len(flat), draws)
    return (drawn @ kinds).reshape(draws, *terms.shape[1:])


def estimate(metric: str, rows: list[dict]) -> dict[str, dict]:
    """{name: {"score", "low", "high", "n"}}: 95 % interval, number of units.

    A mean of units that are each right or wrong gets Wilson's interval: the bootstrap's is [0, 0]
    where all fail.
    """
    names, sums = unit_sums(metric, rows)
    n, drawn, estimates = len(sums), scores_of(metric, names, bootstrap(sums)), {}
    for name, score in scores_of(metric, names, sums.sum(axis=0)).items():
        low, high = np.quantile(drawn[name], LEVEL).tolist()
        estimates[name] = {"score": float(score), "low": low, "high": high, "n": n}
    for name, (right, of) in zip(names, sums.transpose(1, 2, 0), strict=True):
        if (of == of[0]).all() and np.isin(right, (0, of[0])).all():
            low, high = wilson(estimates[name]["score"], n)
            estimates[name] |= {"low": low, "high": high}
    return estimates


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share of n (1927). It is sane at 0 and at 1."""
    shrink = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --- one benchmark --------------------------------------------------------------------------------


def chance(metric: str, items: list[dict]) -> dict[str, float]:
    """{name: expected score of guessing each item by itself}: exact where the metric is a mean of
    sums and products of scores; for F1's ratios the ratio of the expectations."""
    guess = {"sample": 0, "status": "ok", "extracted": "yes"}
    return point(metric, [item | guess | {"score": item["chance"]} for item in items])


def at_most(metric: str, rows: list[dict]) -> dict[str, float]:
    """{name: score if every truncated reply had been right}."""
    right = {"score": 1.0}
    return point(metric, [row | right if row["status"] == "truncated" else row for row in rows])


def scored(metric: str, rows: list[dict]) -> list[dict]:
    """Without the units of which a reply has no score: what is left of them is not like the rest,
    and a group with a gap measures something else."""
    lost = {unit_of(metric, row) for row in rows if row["score"] is None}
    return [row for row in rows if unit_of(metric, row) not in lost]


def summarise(metric: str, rows: list[dict], items: list[dict], paper: dict | None = None) -> dict:
    """All numbers of one benchmark, as JSON. metric: a key of METRICS; items: what was asked, each
    with its "chance"; paper: {name of a headline: the paper's number, in its unit}.

    "judge" is the same by the judge alone, of the rows that it was asked about. What was truncated
    or empty needs no judge and is wrong.
    """
    refuse_gaps(rows, items)
    judged, wrong = [row for row in rows if "judge_score" in row], {"truncated": 0.0, "empty": 0.0}
    judged = [row | {"score": wrong.get(row["status"], row["judge_score"])} for row in judged]
    ids = {row["id"] for row in judged}
    about = [item for item in items if item["id"] in ids]
    judge = score_all(metric, judged, about) if judged else None
    return score_all(metric, rows, items) | {"paper": paper or {}, "judge": judge}


def refuse_gaps(rows: list[dict], items: list[dict]) -> None:
    """ValueError if not each reply is there once."""
    samples = {row["sample"] for row in rows} or {0}
    count = Counter({(item["id"], sample): -1 for item in items for sample in samples})
    count.update((row["id"], row["sample"]) for row in rows)
    if wrong := [reply for reply, extra in count.items() if extra]:
        raise ValueError(f"replies (id, sample) missing or not asked for: {wrong[:5]}")


def score_all(metric: str, rows: list[dict], items: list[dict]) -> dict:
    """The summary of the scores that the rows have."""
    graded, status = scored(metric, rows), Counter(row["status"] for row in rows)
    ids, k = {row["id"] for row in graded}, len({row["sample"] for row in rows})
    summary = {"headline": {}, "metric": metric, "scale": METRICS[metric].scale, "n": len(ids)}
    summary |= {"k": k, "left_out": len(items) - len(ids), "status": dict(status)}
    summary |= {name: status[name] / max(1, len(rows)) for name in ("truncated", "unparsed")}
    if not graded:
        return summary
    scores = estimate(metric, graded)
    headline = [name for name in METRICS[metric].headline if name in scores]
    summary |= {"headline": {name: scores.pop(name) for name in headline}, "details": scores}
    summary["chance"] = chance(metric, [item for item in items if item["id"] in ids])
    if metric == "worst of variants":
        units = {row["id"]: unit_of(metric, row) for row in graded}
        summary["missing_variants"] = VARIANTS * len({*units.values()}) - len(units)
    if status["truncated"]:
        summary["at_most"] = at_most(metric, graded)
    for part, part_of in PARTS.items():
        groups = grouped(graded, part_of)
        if len(groups) > 1:
            summary[part] = {name: estimate("accuracy", groups[name]) for name in sorted(groups)}
    if k > 1:
        summary["samples"] = estimate("samples", [row | {"sample": 0} for row in graded])
    return summary


# --- two runs -------------------------------------------------------------------------------------


def compare(metric: str, before: list[dict], after: list[dict]) -> dict:
    """after - before on the same items: paired bootstrap, sign test, flipped units.

    difference: {name: before, after, and the interval of the difference}. gained, lost: units whose
    mean score rose and fell; sign: p of their sign test, which with one sample and one item a unit
    is McNemar's exact test.
    """
    before, after = scored(metric, before), scored(metric, after)
    one, other = (
        {(row["id"], row["answer"], unit_of(metric, row)) for row in rows}
        for rows in (before, after)
    )
    if one != other or not one:
        gaps = sorted(one ^ other, key=str)[:5]
        raise ValueError(f"the runs do not share their items (id, gold, unit): {gaps}")
    (names, old), (_, new) = unit_sums(metric, before), unit_sums(metric, after)
    pairs = np.stack([old, new], axis=1)  # (U, 2, H, 2): units are drawn in pairs
    drawn = np.concatenate([pairs.sum(axis=0)[None], bootstrap(pairs)])  # first the runs themselves
    old_scores, new_scores = (scores_of(metric, names, drawn[:, run]) for run in (0, 1))
    difference = {}
    for name, old in old_scores.items():
        new = new_scores[name]
        low, high = np.quantile(new[1:] - old[1:], LEVEL).tolist()
        difference[name] = {"before": old[0], "after": new[0], "low": low, "high": high}
    old_mean, new_mean = unit_means(metric, before), unit_means(metric, after)
    gained = [unit for unit in old_mean if new_mean[unit] > old_mean[unit]]
    lost = [unit for unit in old_mean if new_mean[unit] < old_mean[unit]]
    sign = sign_test(len(gained), len(lost))
    return {"difference": difference, "gained": gained, "lost": lost, "sign": sign}


def unit_means(metric: str, rows: list[dict]) -> dict[Hashable, float]:
    """Mean score of each unit's replies, the same to the bit for the same share of any k."""
    units = grouped(rows, lambda row: unit_of(metric, row))
    return {unit: fmean(row["score"] for row in units[unit]) for unit in units}


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p of a fair coin: 2 P(X <= min) for X ~ Binomial(gained + lost, 1/2), at most 1."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


# --- the table ------------------------------------------------------------------------------------


def table(summaries: dict[str, dict]) -> str:
    """{benchmark: summary} -> plain text, a line for each headline; below it what is left out."""
    lines, notes = [COLUMNS.split(",")], []
    for benchmark, summary in summaries.items():
        for by, scores in (("", summary), (", judge", summary | (summary["judge"] or {}))):
            if by and not summary["judge"]:
                continue
            lines += [[benchmark, *cells(scores, name, by)] for name in scores["headline"]]
            if scores["left_out"]:
                notes.append(f"{benchmark}{by}: {scores['left_out']:,} left out: cannot be graded")
            if missing := scores.get("missing_variants"):
                notes.append(f"{benchmark}{by}: {missing:,} missing variants, counted as wrong")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        text = [f"{cell:{'<' if j < 2 else '>'}{widths[j]}}" for j, cell in enumerate(line)]
        lines[i] = "  ".join(text).rstrip()
    return "\n".join(lines + notes)


def cells(summary: dict, name: str, by: str) -> list[str]:
    """One line of the table after its first column. accuracy over k samples is avg@k."""
    score, k, paper = summary["headline"][name], summary["k"], summary["paper"].get(name)
    values = score["score"], score["low"], score["high"], summary["chance"][name]
    point, low, high, chance = (f"{value * summary['scale']:.1f}" for value in values)
    label = f"avg@{k}" if name == "accuracy" and k > 1 else name
    line = [label + by, point, f"{low} .. {high}", f"{summary['n']:,}", str(k), chance]
    line += [f"{summary[share]:.1%}" for share in ("truncated", "unparsed")]
    most = summary.get("at_most", {}).get(name)
    line.append("–" if most is None else f"{most * summary['scale']:.1f}")
    return [*line, "–" if paper is None else f"{paper:,}"]
