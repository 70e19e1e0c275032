"""Graded replies -> numbers that can be trusted: scores with intervals, chance, and comparisons.

    rows ──METRICS[name]──▶ Measure (U units x H ratios) ──estimate──▶ score, error, 95 % interval
         rows whose score is the chance of a guess ──────────────────▶ chance, by the same code
         rows whose truncated replies count as right ────────────────▶ upper bound, by the same code

A row is a reply: {"id", "sample", "score": 0..1 | None, "status", "extracted", "answer"} and, where
its benchmark has them, "category", "group", "seen", "tokens", "judge_score". Each metric is a ratio
of sums over units that are independent of each other: an item, DynaMath's question with its
variants, WeMath's problem with its steps, MME's image. The bootstrap draws units anew, never
replies. Only the sums matter, and few units differ in what they add, so it draws how often each
*kind* of unit comes (a multinomial): the same distribution, 10,000 draws in milliseconds.

"All of a group right" is a product of scores. For scores of 0 and 1 that is all(); for the chances
of independent guesses it is the expectation, which is why chance needs no code of its own.

What cannot be parsed is wrong. A score of None (no rule can grade it) leaves its item out, and is
counted. Rule and judge are two columns. Shares are 0..1, MME's sums points; `table` prints percent.

    summary = metrics.summarise("worst of variants", rows, items=items, paper={"worst": 33.5})
    print(metrics.table({"dynamath": summary}))
    metrics.compare("accuracy", rows_before, rows_after)["difference"]
"""

import math
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # of the bootstrap: the ends of an interval move by 2 % of its width between seeds
LEVEL = 0.95  # of every interval
Z = 1.959964  # normal quantile of LEVEL, for Wilson
NOTABLE = 0.05  # share of truncated replies above which the upper bound is told; EVALUATION.md
VARIANTS = 10  # of a DynaMath question
STEPS = [{f"{n}steps_{i}" for i in range(1, n + 1)} | {f"{n}steps_multi"} for n in (2, 3)]  # WeMath
PERCEPTION = (  # MME's categories; 200 points each
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "ocr"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation"),
    *("text_translation", "code_reasoning"),
)
SUMS = {name: "perception" for name in PERCEPTION} | {name: "cognition" for name in COGNITION}


class Measure(NamedTuple):
    """A metric as H ratios of sums over U independent units."""

    names: tuple[str, ...]  # of the scores; one more than H if the mean stands before them
    units: list  # (U,) names
    above: np.ndarray  # (U, H) what a unit adds to the numerators
    below: np.ndarray  # (U, H) what it adds to the denominators
    members: list[frozenset]  # (U,) ids of its items
    strata: list  # (U,) a unit is drawn in place of one of its own stratum
    mean: bool = False  # the first score is the plain mean of the H ratios


def scores_of(measure: Measure, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Sums (..., H) -> scores (..., H or H + 1). 0 / 0 is 0: who never says yes has precision 0."""
    ratios = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    if measure.mean:
        ratios = np.concatenate([ratios.mean(axis=-1, keepdims=True), ratios], axis=-1)
    return ratios


def point(measure: Measure) -> dict[str, float]:
    """{name: score} on the rows as they are."""
    scores = scores_of(measure, measure.above.sum(axis=0), measure.below.sum(axis=0))
    return dict(zip(measure.names, scores.tolist(), strict=True))


def collect(
    rows: Iterable[dict],
    names: tuple[str, ...],
    unit_of: Callable[[dict], Hashable],
    terms: Callable[[list[dict]], tuple],
    mean: bool = False,
) -> Measure:
    """The Measure whose unit adds `terms`, the mean over the samples.

    terms: rows of one unit and one sample -> (H numerators, H denominators). A sample counts as one
    pass over the benchmark: variants of different samples are never combined.
    """
    runs, ids = defaultdict(lambda: defaultdict(list)), defaultdict(set)
    for row in rows:
        runs[unit_of(row)][row["sample"]].append(row)
        ids[unit_of(row)].add(row["id"])
    each = [np.mean([terms(run) for run in samples.values()], axis=0) for samples in runs.values()]
    both = np.array(each, dtype=float)  # (U, 2, H)
    members, strata = list(map(frozenset, ids.values())), [0] * len(runs)
    return Measure(names, list(runs), both[:, 0], both[:, 1], members, strata, mean)


# --- the benchmarks' metrics: rows -> Measure -----------------------------------------------------


def by_group(name: str) -> Callable[[dict], Hashable]:
    return lambda row: row["group"][name]


def accuracy(rows: list[dict]) -> Measure:
    """Mean over items of the mean over their k samples: avg@k."""
    return collect(rows, ("accuracy",), operator.itemgetter("id"), lambda r: ([r[0]["score"]], [1]))


def worst_of_variants(rows: list[dict]) -> Measure:
    """DynaMath: a question is its ten variants; one that is missing is wrong, in all three."""

    def terms(run: list[dict]) -> tuple:
        seen = {row["group"]["variant"] for row in run}
        if len(seen) < len(run) or len(run) > VARIANTS:
            question = run[0]["group"]["question"]
            raise ValueError(f"question {question!r} has {len(run)} rows of variants {seen}")
        scores = [row["score"] for row in run] + [0.0] * (VARIANTS - len(run))
        best = 1 - math.prod(1 - score for score in scores)
        return [math.prod(scores), sum(scores) / VARIANTS, best], [1, 1, 1]

    return collect(rows, ("worst", "average", "best"), by_group("question"), terms)


def strict_and_loose(rows: list[dict]) -> Measure:
    """WeMath: m, the whole problem; s, its steps. A whole problem without its steps is by rote.

    inadequate knowledge IK = not m, not all s; inadequate generalisation IG = not m, all s;
    complete mastery CM = m and all s (loose: any s); rote memorisation RM = m and the rest.
    Score = 1 - IG / 2 - RM - IK = CM + IG / 2. ValueError names groups with steps missing.
    """
    names = ("strict", "loose", "IK", "IG", "CM strict", "RM strict", "CM loose", "RM loose")
    parts = defaultdict(list)
    for row in rows:
        parts[row["group"]["problem"], row["sample"]].append(row["group"]["part"])
    if broken := [p for (p, _), have in parts.items() if sorted(have) not in map(sorted, STEPS)]:
        why = f"{len(broken)} WeMath problems lack steps, or have some twice: {broken[:5]}"
        raise ValueError(f"{why}; score whole problems")

    def terms(run: list[dict]) -> tuple:
        m = math.prod(r["score"] for r in run if r["group"]["part"].endswith("multi"))
        steps = [r["score"] for r in run if not r["group"]["part"].endswith("multi")]
        every, none = math.prod(steps), math.prod(1 - score for score in steps)
        half = (1 - m) * every / 2
        mastery = [m * every, m * (1 - every), m * (1 - none), m * none]
        shares = [(1 - m) * (1 - every), (1 - m) * every, *mastery]
        return [m * every + half, m * (1 - none) + half, *shares], [1] * len(names)

    return collect(rows, names, by_group("problem"), terms)


def circular(rows: list[dict]) -> Measure:
    """MMBench: a question counts only if all its rotations are right; rows: each for itself."""

    def terms(run: list[dict]) -> tuple:
        scores, group = [row["score"] for row in run], run[0]["group"]
        if len(run) != group.get("of", len(run)):
            raise ValueError(f"question {group} has {len(run)} of its rotations: it wants them all")
        return [math.prod(scores), sum(scores)], [1, len(scores)]

    return collect(rows, ("circular", "rows"), by_group("question"), terms)


def hallusion(rows: list[dict]) -> Measure:
    """HallusionBench: aAcc of replies; fAcc of figures and qAcc of questions that are all right.

    Figures and questions cross inside a set, so the set is the unit: what hangs together by them.
    """
    set_of = {}
    for row in rows:
        figure, question = ((name, row["group"][name]) for name in ("figure", "question"))
        old, new = set_of.get(figure, figure), set_of.get(question, figure)
        if old != new:
            set_of = {key: new if of == old else of for key, of in set_of.items()}
        set_of[figure] = set_of[question] = new

    def right(run: list[dict], name: str) -> list[float]:
        groups = defaultdict(list)
        for row in run:
            groups[row["group"][name]].append(row["score"])
        return [math.prod(scores) for scores in groups.values()]

    def terms(run: list[dict]) -> tuple:
        each = [[row["score"] for row in run], right(run, "figure"), right(run, "question")]
        return list(map(sum, each)), list(map(len, each))

    names = ("mean", "aAcc", "fAcc", "qAcc")
    return collect(rows, names, lambda row: set_of["figure", row["group"]["figure"]], terms, True)


def f1(rows: list[dict]) -> Measure:
    """POPE: yes is positive. An unparsed reply says neither: wrong, and no yes of the model's."""

    def terms(run: list[dict]) -> tuple:
        [row] = run
        gold, score = yes_or_no(row), row["score"]
        hit = score * (gold == "yes")
        said = hit + (1 - score) * (gold == "no" and said_by(row) == "yes")
        return [2 * hit, score, hit, hit, said], [said + (gold == "yes"), 1, said, gold == "yes", 1]

    names = ("f1", "accuracy", "precision", "recall", "yes ratio")
    return collect(rows, names, operator.itemgetter("id"), terms)


def mme_sum(rows: list[dict]) -> Measure:
    """MME: per category 100 x (acc + acc+), acc+ of images with both questions right; summed."""
    category, questions = {}, Counter((row["group"]["image"], row["sample"]) for row in rows)
    for row in rows:
        category.setdefault(row["group"]["image"], row["category"].lower())
    if odd := [image for (image, _), count in questions.items() if count != 2]:
        raise ValueError(f"{len(odd)} MME images do not have two questions, as {odd[:5]}")
    if unknown := set(category.values()) - set(SUMS):
        raise ValueError(f"MME has no category {sorted(unknown)}; it has {', '.join(SUMS)}")
    images = Counter(category.values())
    names = tuple(s for s in ("perception", "cognition") if s in {SUMS[c] for c in images})

    def terms(run: list[dict]) -> tuple:
        of = category[run[0]["group"]["image"]]
        first, second = (row["score"] for row in run)
        points = 100 * ((first + second) / 2 + first * second) / images[of]
        return [points * (SUMS[of] == name) for name in names], [1 / len(category)] * len(names)

    measure = collect(rows, names, by_group("image"), terms)
    return measure._replace(strata=[category[image] for image in measure.units])


def mean_of_parts(rows: list[dict]) -> Measure:
    """MMMU-Pro: the mean of the accuracies of two forms of the same questions, drawn together."""
    parts = tuple(sorted({row["group"]["part"] for row in rows}))

    def terms(run: list[dict]) -> tuple:
        scores = [[r["score"] for r in run if r["group"]["part"] == part] for part in parts]
        return list(map(sum, scores)), list(map(len, scores))

    return collect(rows, ("mean", *parts), by_group("question"), terms, True)


def as_parts(parts: dict[str, list[dict]]) -> list[dict]:
    """{"standard10": rows, "vision": rows} -> the rows that "mean of parts" takes."""
    return [
        row | {"id": f"{name}/{row['id']}", "group": {"part": name, "question": row["id"]}}
        for name, rows in parts.items()
        for row in rows
    ]


class Metric(NamedTuple):
    measure: Callable[[list[dict]], Measure]
    headlines: int  # the first so many scores are the headline
    groups: tuple[str, ...] = ()  # what "group" has to name; the first is what has to be whole
    scale: int = 100  # what the table multiplies by, to speak the paper's unit


METRICS = {
    "accuracy": Metric(accuracy, 1),
    "avg@k": Metric(accuracy, 1),
    "judge": Metric(accuracy, 1),  # MM-Vet's 0..1, which no rule gives
    "worst of variants": Metric(worst_of_variants, 3, ("question", "variant")),
    "strict and loose": Metric(strict_and_loose, 2, ("problem", "part")),
    "circular": Metric(circular, 2, ("question",)),
    "hallusion": Metric(hallusion, 4, ("figure", "question")),
    "f1": Metric(f1, 2),
    "mme sum": Metric(mme_sum, 2, ("image",), scale=1),
    "mean of parts": Metric(mean_of_parts, 3, ("question", "part")),
}


def measure(metric: str, rows: list[dict]) -> Measure:
    """The Measure of rows that all have a score. ValueError on another metric, or rows amiss."""
    check(rows)
    for name in named(metric).groups:
        if lack := [row["id"] for row in rows if name not in (row.get("group") or {})]:
            raise ValueError(f"{metric!r} needs group {name!r}; rows without: {lack[:5]}")
    return METRICS[metric].measure(rows)


def named(metric: str) -> Metric:
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}: there are {', '.join(METRICS)}")
    return METRICS[metric]


def check(rows: list[dict]):
    """ValueError if there is none, a reply counts twice, a score is no share, or samples differ."""
    if not rows:
        raise ValueError("no row has a score: nothing to measure")
    if twice := [key for key, n in Counter((r["id"], r["sample"]) for r in rows).items() if n > 1]:
        raise ValueError(f"replies that stand twice (id, sample): {twice[:5]}")
    for row in rows:
        if row["score"] is None or not 0 <= row["score"] <= 1:  # NaN, too
            raise ValueError(f"{row['id']}: score {row['score']} is not between 0 and 1")
    count = Counter(row["id"] for row in rows)
    most = max(count.values())
    if fewer := [f"{name} has {n}" for name, n in count.items() if n < most]:
        raise ValueError(f"items have {most} samples, but {fewer[:5]}: sample the rest first")


# --- intervals ------------------------------------------------------------------------------------


def resampled(terms: np.ndarray, strata: list, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums of what U units add, each draw over U units drawn with replacement. (U, D) -> (draws, D)

    Units that add the same are one kind; how often each kind is drawn is multinomial.
    """
    rng, strata = np.random.default_rng(seed), np.array(strata)
    sums = np.zeros((draws, terms.shape[1]))
    for stratum in np.unique(strata):
        part = terms[strata == stratum]
        kinds, count = np.unique(part, axis=0, return_counts=True)
        sums += rng.multinomial(len(part), count / len(part), draws) @ kinds
    return sums


def estimate(measure: Measure, draws: int = DRAWS, seed: int = 0) -> dict[str, dict]:
    """{name: {"score", "error", "low", "high"}}: standard error and percentile interval.

    The bootstrap's deviation is too small by sqrt((U - 1) / U), which is put right. A mean of units
    that are each right or wrong gets Wilson's interval: the bootstrap's is [0, 0] where all fail.
    """
    terms, h = np.concatenate([measure.above, measure.below], axis=1), measure.above.shape[1]
    sums, count = resampled(terms, measure.strata, draws, seed), len(measure.units)
    drawn = scores_of(measure, sums[:, :h], sums[:, h:])  # (draws, H or H + 1)
    errors = drawn.std(axis=0) * math.sqrt(count / max(1, count - 1))
    ends = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    told = {}
    for i, (name, score) in enumerate(point(measure).items()):
        low, high, by = float(ends[0, i]), float(ends[1, i]), "bootstrap"
        if not measure.mean and np.isin(terms[:, i], (0, 1)).all() and (terms[:, h + i] == 1).all():
            low, high, by = *wilson(score * count, count), "wilson"
        error = float(errors[i]) if count > 1 else None  # one unit says nothing of the spread
        told[name] = {"score": score, "error": error, "low": low, "high": high, "interval": by}
    return told


def wilson(right: float, n: int, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): right of n. It is sane at 0 and at 1."""
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --- k samples of an item -------------------------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k of the n samples is right: 1 - C(n - c, k) / C(n, k).

    Unbiased; Chen et al. 2021 (Codex), eq. 1. ValueError if k samples are not there.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples: k has to be 1 to {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence, scores: Sequence[float], same: Callable = operator.eq) -> float:
    """Expected score of the most frequent answer, ties broken by lot. None never wins.

    answers: as extracted, None where unparsed. same(a, b): whether two are one answer, as 1/2 and
    0.5; an answer is compared with the first of each kind. Without any answer: 0.
    """
    kinds = []  # [(first answer, scores of all that equal it)]
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            continue
        for first, found in kinds:
            if same(first, answer):
                found.append(score)
                break
        else:
            kinds.append((answer, [score]))
    most = max((len(found) for _, found in kinds), default=0)
    top = [sum(found) / len(found) for _, found in kinds if len(found) == most]
    return sum(top) / len(top) if top else 0.0


def of_samples(rows: list[dict], same: Callable = operator.eq) -> Measure:
    """pass@1, 2, 4, ... k and maj@k of items with k samples each."""
    items = defaultdict(list)
    for row in rows:
        items[row["id"]].append(row)
    n = len(next(iter(items.values())))
    tries = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})

    def values(item: list[dict]) -> list[float]:
        scores, answers = [r["score"] for r in item], [r["extracted"] for r in item]
        passed = [pass_at_k(n, scores.count(1.0), k) for k in tries]
        return [*passed, majority(answers, scores, same)]

    names = (*(f"pass@{k}" for k in tries), f"maj@{n}")
    above = np.array([values(item) for item in items.values()], dtype=float)  # (U, H)
    units = list(items)
    members, strata = [frozenset([unit]) for unit in units], [0] * len(units)
    return Measure(names, units, above, np.ones_like(above), members, strata)


# --- chance, parts, yes and no --------------------------------------------------------------------


def guess(item: dict) -> float:
    """Chance of a guess: the item's own "chance", else one letter of the choices, yes or no by a
    coin, and 0 for a free answer. A gold of several letters ("A, C") is out of one letter's reach.
    """
    answer = str(item["answer"]).strip()
    if "chance" in item:
        return item["chance"]
    if choices := item.get("choices"):
        return 0.0 if re.fullmatch(r"[A-Z](?:\s*,\s*[A-Z])+", answer) else 1 / len(choices)
    return 0.5 if answer.lower() in ("yes", "no") else 0.0


def chance(metric: str, items: list[dict]) -> dict[str, float]:
    """{name: expected score of guessing each item by itself}: exact where the metric is a mean of
    sums and products of scores; for F1's ratios the ratio of the expectations.
    """
    guessed = {"sample": 0, "status": "ok", "extracted": "yes"}
    return point(measure(metric, [item | guessed | {"score": guess(item)} for item in items]))


def at_most(metric: str, rows: list[dict]) -> dict[str, float]:
    """{name: score if every truncated reply had been right}."""
    right = {"score": 1.0}
    return point(measure(metric, [r | right if r["status"] == "truncated" else r for r in rows]))


def yes_or_no(row: dict) -> str:
    if (gold := str(row["answer"]).strip().lower()) not in ("yes", "no"):
        raise ValueError(f"{row['id']}: the gold {row['answer']!r} is neither yes nor no")
    return gold


def said_by(row: dict) -> str:
    said = str(row["extracted"]).strip().lower()
    return said if row["status"] == "ok" and said in ("yes", "no") else "unparsed"


def by_part(metric: str, rows: list[dict], part_of: Callable[[dict], str]) -> dict[str, dict]:
    """{part: {"n", "metric", its headlines}}; plain accuracy where a unit lies in two parts."""
    parts, lies = defaultdict(list), {}
    for row in rows:
        parts[part_of(row)].append(row)
        lies[row["id"]] = part_of(row)
    if any(len({lies[name] for name in ids}) > 1 for ids in measure(metric, rows).members):
        metric = "accuracy"
    first, told = METRICS[metric].headlines, {}
    for part, some in sorted(parts.items()):
        told[part] = {"n": len({row["id"] for row in some}), "metric": metric}
        told[part] |= dict(list(estimate(measure(metric, some)).items())[:first])
    return told


def categories(metric: str, rows: list[dict]) -> dict[str, dict]:
    """by_part of the rows' categories; for MME with acc and acc+ of each."""
    told = by_part(metric, rows, lambda row: str(row.get("category")))
    if metric == "mme sum":
        for name, of in told.items():
            some = [row for row in rows if row["category"] == name]
            acc = point(accuracy(some))["accuracy"]
            [points] = point(measure(metric, some)).values()
            of |= {"acc": acc, "acc+": points / 100 - acc}
    return told


# --- judge and rule -------------------------------------------------------------------------------


def left_out(metric: str, rows: list[dict]) -> set:
    """Ids of the items that no rule can grade (score None), and of what they would leave in pieces.

    All samples of such an item go, since those that a rule could grade are not like the others, and
    so do the other steps of its problem. For the same reason all items go where nothing is left but
    replies that needed no reading (cut off, empty): they would make a score of 0.
    """
    whole = named(metric).groups[:1]

    def unit(row: dict) -> Hashable:
        return (row.get("group") or {}).get(whole[0], row["id"]) if whole else row["id"]

    without = {row["id"] for row in rows if row["score"] is None}
    lost = {unit(row) for row in rows if row["id"] in without}
    out = {row["id"] for row in rows if unit(row) in lost}
    if out and not any(row["status"] == "ok" for row in rows if row["id"] not in out):
        return {row["id"] for row in rows}
    return out


def scored(metric: str, rows: list[dict]) -> list[dict]:
    out = left_out(metric, rows)
    return [row for row in rows if row["id"] not in out]


def by_judge(metric: str, rows: list[dict], draws: int, seed: int) -> dict | None:
    """The same metric by the judge alone, on the items that it was asked about; None without any.

    What was truncated or empty needs no judge and is wrong. Where the judge's verdict could not be
    read (judge_score None), the item is left out and counted. agreement: of rows with both scores.
    """
    cut = {"truncated": 0.0, "empty": 0.0}
    asked = [
        row | {"score": cut.get(row["status"], row["judge_score"])}
        for row in rows
        if "judge_score" in row
    ]
    if not asked:
        return None
    kept = scored(metric, asked)
    told = estimate(measure(metric, kept), draws, seed) if kept else {}
    told = renamed(told, counts(kept)["k"])
    both = [r for r in rows if r["score"] is not None and r.get("judge_score") is not None]
    same = sum(row["score"] == row["judge_score"] for row in both)
    return {
        "headline": dict(list(told.items())[: METRICS[metric].headlines]),
        "n": len({row["id"] for row in kept}),
        "no_verdict": len(left_out(metric, asked)),
        "agreement": same / len(both) if both else None,
    }


# --- one benchmark --------------------------------------------------------------------------------


def summarise(
    metric: str,
    rows: list[dict],
    *,
    items: list[dict] | None = None,
    paper: dict[str, float] | None = None,
    same: Callable = operator.eq,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict:
    """All numbers of one benchmark, as JSON; the headline first. metric: a key of METRICS.

    items: those that were asked, with "choices": for chance, and to name the ones without a reply
    (ValueError). paper: {name of a headline: the paper's number, in its unit}. same: equality of
    extracted answers, for maj@k.
    """
    if items is not None:
        all_answered(items, rows)
    kept, out = scored(metric, rows), left_out(metric, rows)
    summary = {"headline": {}, "metric": metric, "scale": named(metric).scale}
    summary |= counts(rows) | {"n": 0, "left_out": len(out)}
    summary["paper"] = renamed(paper or {}, summary["k"])
    if kept:
        summary |= by_rule(metric, kept, same, draws, seed)
    if items is not None and kept:
        graded = [item for item in items if item["id"] not in out]
        summary["chance"] = renamed(chance(metric, graded), summary["k"])
    summary["judge"] = by_judge(metric, rows, draws, seed)
    told = summary["headline"] | (summary["judge"] or summary)["headline"]
    if told and (unknown := sorted(set(summary["paper"]) - set(told))):
        raise ValueError(f"the paper's {unknown} is no headline of {metric!r}: {list(told)}")
    return summary


def all_answered(items: list[dict], rows: list[dict]):
    ids, have = {item["id"] for item in items}, {row["id"] for row in rows}
    if ids != have:
        less, more = sorted(ids - have)[:5], sorted(have - ids)[:5]
        raise ValueError(f"items without a reply: {less}; replies without an item: {more}")


def counts(rows: list[dict]) -> dict:
    """Sizes, statuses and lengths. Shares are of replies."""
    status, ids = Counter(row["status"] for row in rows), {row["id"] for row in rows}
    tokens = [row["tokens"] for row in rows if row.get("tokens") is not None]
    return {
        "n": len(ids),
        "k": len(rows) // max(1, len(ids)),
        "status": dict(status),
        "truncated": status["truncated"] / max(1, len(rows)),
        "unparsed": status["unparsed"] / max(1, len(rows)),
        "tokens": sum(tokens) / len(tokens) if tokens else None,
    }


def by_rule(metric: str, rows: list[dict], same: Callable, draws: int, seed: int) -> dict:
    """What `summarise` tells of the rows that have a score."""
    size, measured = counts(rows), measure(metric, rows)  # counts of the scored rows alone
    told = renamed(estimate(measured, draws, seed), size["k"])
    names = list(told)[: METRICS[metric].headlines]
    summary = {
        "headline": {name: told.pop(name) for name in names},
        "details": told,
        "n": size["n"],
        "units": len(measured.units),
    }
    if any(row.get("category") is not None for row in rows):
        summary["categories"] = categories(metric, rows)
    if size["truncated"] > NOTABLE:
        summary["at_most"] = renamed(at_most(metric, rows), size["k"])
    if any(row.get("seen") is not None for row in rows):
        known = {True: "seen", False: "unseen", None: "unknown"}
        summary["source"] = by_part(metric, rows, lambda row: known[row.get("seen")])
    if any(row["answer"] == "Not Applicable" for row in rows):  # a quarter of CharXiv descriptive
        apart = {True: "not applicable", False: "applicable"}
        parts = by_part(metric, rows, lambda row: apart[row["answer"] == "Not Applicable"])
        summary["applicable"] = parts
    if size["k"] > 1:
        summary["samples"] = estimate(of_samples(rows, same), draws, seed)
    return summary | own(metric, rows, measured)


def own(metric: str, rows: list[dict], measured: Measure) -> dict:
    """Counts that one metric alone has."""
    if metric == "worst of variants":
        asked = len({row["id"] for row in rows})
        return {"missing_variants": VARIANTS * len(measured.units) - asked}
    if metric == "strict and loose":
        shares = list(point(measured).items())[2:]
        return {"groups": {name: share * len(measured.units) for name, share in shares}}
    if metric == "f1":
        pairs = Counter((yes_or_no(row), said_by(row)) for row in rows)
        return {"said": {f"{gold}, said {said}": n for (gold, said), n in sorted(pairs.items())}}
    if metric == "mme sum":
        present = Counter(SUMS[name] for name in set(measured.strata))
        return {"out_of": {name: 200 * n for name, n in present.items()}}
    return {}


def renamed(scores: dict, k: int) -> dict:
    """accuracy over k samples is called avg@k; with one sample it keeps its name."""
    if k == 1 or list(scores) != ["accuracy"]:
        return scores
    return {f"avg@{k}": scores["accuracy"]}


# --- two runs -------------------------------------------------------------------------------------


def compare(
    metric: str, before: list[dict], after: list[dict], *, draws: int = DRAWS, seed: int = 0
) -> dict:
    """after - before on the same items: paired bootstrap, exact McNemar, flipped items.

    difference: {name: before, after, difference, low, high, p}; p is two-sided, from the
    draws on either side of 0. mcnemar: a unit is as good as its worst item; with one sample each
    that is right or wrong, with more its mean, and the test the sign test. gained, lost: ids.
    ValueError if the runs differ in items or golds. Items that one run left out differ, too.
    """
    before, after = scored(metric, before), scored(metric, after)
    same_items(before, after)
    a, b = measure(metric, before), measure(metric, after)
    place = {ids: i for i, ids in enumerate(b.members)}
    if a.names != b.names or set(place) != set(a.members):
        raise ValueError("the runs group the same items differently: make their items anew")
    order = [place[ids] for ids in a.members]
    terms = np.concatenate([a.above, a.below, b.above[order], b.below[order]], axis=1)  # (U, 4H)
    drawn = np.split(resampled(terms, a.strata, draws, seed), 4, axis=1)
    differences = scores_of(b, drawn[2], drawn[3]) - scores_of(a, drawn[0], drawn[1])
    was, now = point(a), point(b)
    changes = changed(before, after)
    return {
        "difference": {
            name: {"before": was[name], "after": now[name], **spread(column, now[name] - was[name])}
            for name, column in zip(a.names, differences.T, strict=True)
        },
        "mcnemar": mcnemar(a, before, after),
        "gained": [name for name, change in changes.items() if change > 0],
        "lost": [name for name, change in changes.items() if change < 0],
    }


def same_items(before: list[dict], after: list[dict]):
    """ValueError that names items which only one run has, or whose golds are not the same."""
    old, new = ({row["id"]: row["answer"] for row in run} for run in (before, after))
    if old.keys() != new.keys():
        raise ValueError(
            f"the runs have different items: {len(old.keys() - new.keys())} only before, as "
            f"{sorted(old.keys() - new.keys())[:5]}; {len(new.keys() - old.keys())} only after, as "
            f"{sorted(new.keys() - old.keys())[:5]}"
        )
    if moved := [f"{name}: {old[name]!r}, {new[name]!r}" for name in old if old[name] != new[name]]:
        raise ValueError(f"{len(moved)} items have another gold after: {moved[:5]}")


def spread(draws: np.ndarray, difference: float) -> dict[str, float]:
    """Interval and two-sided p of a difference, from its (draws,) bootstrap draws.

    The smallest p is 2 / (draws + 1), for draws cannot show less. Rounding of sums is no sign.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    fewer = min((draws <= 1e-9).sum(), (draws >= -1e-9).sum())
    p = min(1.0, 2 * (int(fewer) + 1) / (len(draws) + 1))
    return {"difference": difference, "low": float(low), "high": float(high), "p": p}


def item_means(rows: list[dict]) -> dict[Hashable, float]:
    scores = defaultdict(list)
    for row in rows:
        scores[row["id"]].append(row["score"])
    return {name: sum(found) / len(found) for name, found in scores.items()}


def changed(before: list[dict], after: list[dict]) -> dict[Hashable, float]:
    """{id: after - before of its mean score}."""
    old, new = item_means(before), item_means(after)
    return {name: new[name] - old[name] for name in old}


def mcnemar(measure: Measure, before: list[dict], after: list[dict]) -> dict:
    """Exact McNemar test (binomial, two-sided): units that became right against units that fell."""
    old, new = item_means(before), item_means(after)
    worst = [(min(old[i] for i in ids), min(new[i] for i in ids)) for ids in measure.members]
    gained, lost = sum(was < now for was, now in worst), sum(was > now for was, now in worst)
    return {"gained": gained, "lost": lost, "p": sign_test(gained, lost)}


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p of a fair coin: 2 P(X <= min) for X ~ Binomial(gained + lost, 1/2), at most 1."""
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


# --- the table ------------------------------------------------------------------------------------

COLUMNS = (
    *("benchmark", "score of", "score", "95 % interval", "n", "k", "chance"),
    *("truncated", "unparsed", "at most", "paper"),
)


def table(summaries: dict[str, dict]) -> str:
    """{benchmark: summary} -> plain text, a line for each headline; below it what is left out."""
    lines, notes = [COLUMNS], []
    for benchmark, summary in summaries.items():
        for name, told in summary["headline"].items():
            lines.append((benchmark, *cells(summary, name, told)))
        judge = summary["judge"] or {"headline": {}, "n": 0, "no_verdict": 0}
        for name, told in judge["headline"].items():
            shown = cells({**summary, "n": judge["n"], "chance": {}, "at_most": {}}, name, told)
            lines.append((benchmark, f"{name}, judge", *shown[1:]))
        for count, why in (
            (summary["left_out"], "left out of the rule's score: no rule can grade them"),
            (judge["no_verdict"], "left out of the judge's score: its verdict cannot be read"),
            (summary.get("missing_variants"), "missing variants, counted as wrong"),
        ):
            notes += [f"{benchmark}: {count:,} {why}"] if count else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        text = [f"{cell:{'<' if j < 2 else '>'}{widths[j]}}" for j, cell in enumerate(line)]
        lines[i] = "  ".join(text).rstrip()
    return "\n".join(lines + notes)


def cells(summary: dict, name: str, told: dict) -> tuple[str, ...]:
    """One line of the table after its first column."""
    scale = summary["scale"]

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value * scale:.1f}"

    paper = summary["paper"].get(name)
    return (
        name,
        f"{shown(told['score'])} ± {shown(told['error'])}",
        f"{shown(told['low'])} .. {shown(told['high'])}",
        f"{summary['n']:,}",
        str(summary["k"]),
        shown(summary.get("chance", {}).get(name)),
        f"{summary['truncated']:.1%}",
        f"{summary['unparsed']:.1%}",
        shown(summary.get("at_most", {}).get(name)),
        "–" if paper is None else f"{paper:,}",
    )
