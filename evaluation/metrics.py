"""Graded replies -> numbers that can be trusted: scores with intervals, chance, and comparisons.

    rows ─by unit─▶ metric(rows of a unit) = {score: (right, of)} ─sum / sum─▶ scores
                                                 └─ bootstrap over units ─▶ 95 % intervals

A row is a reply of graded.jsonl. Units are independent of each other: an item, DynaMath's question
with its variants, WeMath's problem with its steps. The bootstrap draws units, never replies. "All
right" is a product of scores: of 0 and 1 that is all(), of the chances of independent guesses the
expectation; so chance is the metric of rows whose score is the chance of a guess. What cannot be
parsed is wrong; a score of None (no rule can grade it) leaves its unit out, and is counted. Shares
are 0..1, MME's sums points; `table` prints percent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from statistics import fmean
from typing import NamedTuple

import numpy as np

from common.records import columns
from reward import grade

DRAWS = 10_000  # of the bootstrap: the ends of an interval move by 2 % of its width between seeds
LEVEL = (0.025, 0.975)  # ends of every interval
Z = 1.959964  # normal quantile of LEVEL, for Wilson
VARIANTS = 10  # of a DynaMath question
PERCEPTION = "existence count position color posters celebrity scene landmark artwork ocr".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
MME = dict.fromkeys(PERCEPTION, "perception") | dict.fromkeys(COGNITION, "cognition")
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
    Score = 1 - IG / 2 - RM - IK = CM + IG / 2."""
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
    terms = {"aAcc": (sum(row["score"] for row in rows), len(rows))}
    for name, kind in (("fAcc", "figure"), ("qAcc", "question")):
        groups = grouped(rows, lambda row, kind=kind: row["group"][kind]).values()
        all_right = [math.prod(row["score"] for row in group) for group in groups]
        terms[name] = (sum(all_right), len(groups))
    return terms


def f1(rows: list[dict]) -> dict:
    """POPE: yes is positive. An unparsed reply says neither: wrong, and no yes of the model's."""
    [row] = rows
    positive, score = row["answer"].lower() == "yes", row["score"]
    yes = str(row["extracted"]).strip().lower() == "yes"
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


def of_samples(rows: list[dict]) -> dict:
    """pass@1, 2, 4, ... k and maj@k; here the rows are all k samples of an item."""
    scores, k = [row["score"] for row in rows], len(rows)
    sizes = sorted({2**i for i in range(k.bit_length())} | {k})
    terms = {f"pass@{size}": (pass_at_k(k, scores.count(1.0), size), 1) for size in sizes}
    return terms | {f"maj@{k}": (majority([row["extracted"] for row in rows], scores), 1)}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k of the n samples is right, unbiased (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: list[str | None], scores: list[float]) -> float:
    """Expected score of the most frequent answer, ties broken by lot. None (unparsed) never wins.
    Answers that the matcher holds equal (1/2 and 0.5) are one kind, found by its first."""
    kinds = {}  # first answer -> scores of all that equal it
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            continue
        box = f"\\boxed{{{answer}}}"
        alike = (a for a in kinds if a == answer or grade(a, box, digits=6).score == 1)
        kinds.setdefault(next(alike, answer), []).append(score)
    votes = max(map(len, kinds.values()), default=0)
    winners = [fmean(kind) for kind in kinds.values() if len(kind) == votes]
    return fmean(winners) if winners else 0.0


class Metric(NamedTuple):
    terms: Callable[[list[dict]], dict]
    headline: tuple[str, ...] = ("accuracy",)  # scores that stand in the table
    unit: str = ""  # what makes a unit: a name in "group"; empty: the item alone
    scale: int = 100  # what the table multiplies by, to speak the paper's unit


METRICS = {
    "accuracy": Metric(accuracy),
    "avg@k": Metric(accuracy),
    "judge": Metric(accuracy),  # MM-Vet's 0..1, which no rule gives
    "worst of variants": Metric(worst_of_variants, ("worst", "average", "best"), "question"),
    "strict and loose": Metric(strict_and_loose, ("strict", "loose"), "problem"),
    "circular": Metric(circular, ("circular", "rows"), "question"),
    "hallusion": Metric(hallusion, ("mean", "aAcc", "fAcc", "qAcc"), "set"),
    "f1": Metric(f1, ("f1", "accuracy")),
    "mme sum": Metric(mme, ("perception", "cognition"), "image", scale=1),
    "both forms": Metric(accuracy, unit="question"),  # MMMU-Pro's, of which the paper has the mean
    "samples": Metric(of_samples),
}


# --- scores and intervals -------------------------------------------------------------------------


def unit_of(metric: str, row: dict) -> Hashable:
    name = METRICS[metric].unit
    return row["group"][name] if name else row["id"]


def unit_sums(metric: str, rows: list[dict]) -> tuple[list[str], np.ndarray]:
    """Names of H scores, and what each of U units adds to their right and of: (U, H, 2). Variants
    of different samples are never combined. Both are sorted, so two runs have them in one order."""
    units = grouped(rows, lambda row: unit_of(metric, row))
    terms = []  # of each unit: {name: what it adds}
    for unit in sorted(units, key=str):
        terms.append(defaultdict(lambda: np.zeros(2)))
        for sample in grouped(units[unit], lambda row: row["sample"]).values():
            for name, pair in METRICS[metric].terms(sample).items():
                terms[-1][name] += pair
    names = sorted({name for of in terms for name in of})
    return names, np.array([[of[name] for name in names] for of in terms])


def scores_of(metric: str, names: list[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (..., H, 2) -> {name: (...)}. 0 / 0 is 0: who never says yes has precision 0."""
    right, of = np.moveaxis(sums, -1, 0)
    ratios = np.divide(right, of, out=np.zeros_like(right), where=of > 0)
    scores, totals = dict(zip(names, np.moveaxis(ratios, -1, 0), strict=True)), Counter()
    if metric == "hallusion":
        totals["mean"] = (scores["aAcc"] + scores["fAcc"] + scores["qAcc"]) / 3
    elif metric == "mme sum":  # up to 2,000 points of perception, 800 of cognition
        for category, points in scores.items():
            totals[MME[category]] += points
    return scores | totals


def point(metric: str, rows: list[dict]) -> dict[str, float]:
    names, sums = unit_sums(metric, rows)
    return {name: float(x) for name, x in scores_of(metric, names, sums.sum(axis=0)).items()}


def bootstrap(terms: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums of what U units add, each draw over U units with replacement: (U, ...) -> (draws, ...).
    Few units differ in what they add, so it draws how often each *kind* of unit comes (a
    multinomial): the same distribution, 10,000 draws in milliseconds."""
    flat = terms.reshape(len(terms), -1)
    kinds, count = np.unique(flat, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(flat), count / len(flat), draws)
    return (drawn @ kinds).reshape(draws, *terms.shape[1:])


def estimate(metric: str, rows: list[dict]) -> dict[str, dict]:
    """{name: {"score", "low", "high", "n"}}: 95 % interval, number of units. A mean of units that
    are each right or wrong gets Wilson's interval: the bootstrap's is [0, 0] where all fail."""
    names, sums = unit_sums(metric, rows)
    n, drawn, estimates = len(sums), scores_of(metric, names, bootstrap(sums)), {}
    for name, score in scores_of(metric, names, sums.sum(axis=0)).items():
        low, high = np.quantile(drawn[name], LEVEL).tolist()
        right, of = sums[:, names.index(name)].T if name in names else ([np.nan], [1])  # a total
        if np.all(of == of[0]) and np.isin(right, (0, of[0])).all():
            low, high = wilson(float(score), n)
        estimates[name] = {"score": float(score), "low": low, "high": high, "n": n}
    return estimates


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share of n (1927). It is sane at 0 and at 1."""
    shrink = 1 + Z * Z / n
    centre = (share + Z * Z / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --- one benchmark, two runs, the table -----------------------------------------------------------


def summarise(metric: str, rows: list[dict], items: list[dict], paper: dict | None = None) -> dict:
    """All numbers of one benchmark, as JSON. metric: a key of METRICS; items: what was asked, each
    with its "chance"; paper: {name of a headline: the paper's number, in its unit}. "judge" is the
    same by the judge alone, of the rows it was asked about; truncated or empty is wrong anyway."""
    samples = {row["sample"] for row in rows} or {0}
    replies = Counter((item["id"], sample) for item in items for sample in samples)
    replies.subtract((row["id"], row["sample"]) for row in rows)
    if wrong := [reply for reply, count in replies.items() if count]:
        raise ValueError(f"replies (id, sample) missing or not asked for: {wrong[:5]}")
    by_judge, judge = {"truncated": 0.0, "empty": 0.0}, None
    judged = [
        row | {"score": by_judge.get(row["status"], row["judge_score"])}
        for row in rows
        if "judge_score" in row
    ]
    if judged:
        ids = {row["id"] for row in judged}
        judge = score_all(metric, judged, [item for item in items if item["id"] in ids])
    return score_all(metric, rows, items) | {"paper": paper or {}, "judge": judge}


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
    # of guessing each item by itself: exact but for F1's ratios, of which it is that of the means
    guess = {"sample": 0, "extracted": "yes"}
    guesses = [item | guess | {"score": item["chance"]} for item in items if item["id"] in ids]
    summary["chance"] = point(metric, guesses)
    if metric == "worst of variants":
        summary["missing_variants"] = VARIANTS * summary["headline"]["worst"]["n"] - len(ids)
    if status["truncated"]:  # the score if each of these replies had been right
        full = {"truncated": {"score": 1.0}}
        summary["at_most"] = point(metric, [row | full.get(row["status"], {}) for row in graded])
    for part, part_of in PARTS.items():
        groups = grouped(graded, part_of)
        if len(groups) > 1:
            summary[part] = {name: estimate("accuracy", groups[name]) for name in sorted(groups)}
    if k > 1:
        summary["samples"] = estimate("samples", [row | {"sample": 0} for row in graded])
    return summary


def scored(metric: str, rows: list[dict]) -> list[dict]:
    """Without the units of which a reply has no score: what is left of them is not like the rest,
    and a group with a gap measures something else."""
    lost = {unit_of(metric, row) for row in rows if row["score"] is None}
    return [row for row in rows if unit_of(metric, row) not in lost]


def compare(metric: str, before: list[dict], after: list[dict]) -> dict:
    """after - before on the same items: paired bootstrap, sign test, flipped units. difference:
    {name: before, after, and the interval of the difference}. gained, lost: units whose mean score
    rose and fell; sign: p of their sign test, which with one sample and one item a unit is
    McNemar's exact test."""
    runs = [scored(metric, rows) for rows in (before, after)]
    one, other = ({(r["id"], r["answer"], unit_of(metric, r)) for r in rows} for rows in runs)
    if one != other or not one:
        gaps = sorted(one ^ other, key=str)[:5] or "rules score none of their replies"
        raise ValueError(f"the runs do not share their items (id, gold, unit): {gaps}")
    (names, old), (_, new) = (unit_sums(metric, rows) for rows in runs)
    pairs = np.stack([old, new], axis=1)  # (U, 2, H, 2): units are drawn in pairs
    drawn = np.concatenate([pairs.sum(axis=0)[None], bootstrap(pairs)])  # first the runs themselves
    old_scores, new_scores = (scores_of(metric, names, drawn[:, run]) for run in (0, 1))
    difference = {}
    for name, old in old_scores.items():
        new = new_scores[name]
        low, high = np.quantile(new[1:] - old[1:], LEVEL).tolist()
        difference[name] = {"before": old[0], "after": new[0], "low": low, "high": high}
    units = [grouped(rows, lambda row: unit_of(metric, row)) for rows in runs]
    # scores are 0 or 1, so equal shares are equal floats, whatever k
    old, new = ({u: fmean(r["score"] for r in rows) for u, rows in of.items()} for of in units)
    gained = [unit for unit in old if new[unit] > old[unit]]
    lost = [unit for unit in old if new[unit] < old[unit]]
    # two-sided p of a fair coin: 2 P(X <= fewer) for X ~ Binomial(flips, 1/2), at most 1
    flips, fewer = len(gained) + len(lost), min(len(gained), len(lost))
    sign = min(1.0, 2 * sum(math.comb(flips, i) for i in range(fewer + 1)) / 2**flips)
    return {"difference": difference, "gained": gained, "lost": lost, "sign": sign}


def table(summaries: dict[str, dict]) -> str:
    """{benchmark: summary} -> plain text, a line for each headline, rule and judge apart; below it
    what is left out. Accuracy over k samples is avg@k."""
    lines, notes = [COLUMNS.split(",")], []
    for benchmark, summary in summaries.items():
        judge = {", judge": summary | summary["judge"]} if summary["judge"] else {}
        for by, scores in ({"": summary} | judge).items():
            k, scale, most = scores["k"], scores["scale"], scores.get("at_most", {})
            for name, of in scores["headline"].items():
                values = of["score"], of["low"], of["high"], scores["chance"][name], most.get(name)
                values = ("–" if value is None else f"{value * scale:.1f}" for value in values)
                score, low, high, chance, at_most = values
                label = f"avg@{k}" if name == "accuracy" and k > 1 else name
                line = [benchmark, label + by, score, f"{low} .. {high}", f"{scores['n']:,}"]
                line += [f"{k}", chance, f"{scores['truncated']:.1%}", f"{scores['unparsed']:.1%}"]
                paper = scores["paper"].get(name)
                lines.append([*line, at_most, "–" if paper is None else f"{paper:,}"])
            lost = {"left out: cannot be graded": scores["left_out"]}
            lost["missing variants, counted as wrong"] = scores.get("missing_variants")
            notes += [f"{benchmark}{by}: {count:,} {why}" for why, count in lost.items() if count]
    return "\n".join([columns(lines, words=2), *notes])
