"""Graded replies -> numbers that can be trusted: scores with intervals, chance, and comparisons.

    rows ─by unit─▶ METRICS[name].terms ─▶ {score: (right, of)} of each unit ─sum / sum─▶ scores
                                                 └─ bootstrap over units ─▶ errors, 95 % intervals

A row is a reply: {"id", "sample", "score": 0..1 | None, "status", "extracted", "answer"} and, where
its benchmark has them, "category", "group", "seen", "tokens", "judge_score". A metric is a function
of the rows of one unit, which says what the unit adds. Units are independent of each other: an
item, DynaMath's question with its variants, WeMath's problem with its steps, MME's image. The
bootstrap draws units anew, never replies.

"All of a group right" is a product of scores. For scores of 0 and 1 that is all(); for the chances
of independent guesses it is the expectation, so chance is the metric of rows whose score is the
chance of a guess, and the upper bound that of rows whose truncated replies count as right.

What cannot be parsed is wrong. A score of None (no rule can grade it) leaves its unit out, and is
counted. Rule and judge are two columns. Shares are 0..1, MME's sums points; `table` prints percent.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # of the bootstrap: the ends of an interval move by 2 % of its width between seeds
LEVEL = (0.025, 0.975)  # ends of every interval
Z = 1.959964  # normal quantile of LEVEL, for Wilson
NOTABLE = 0.05  # share of truncated replies above which the upper bound is told
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


# --- the metrics: the rows of one unit and one sample -> {score: (right, of)} ---------------------


def accuracy(run: list[dict]) -> dict:
    return {"accuracy": (run[0]["score"], 1)}


def worst_of_variants(run: list[dict]) -> dict:
    """DynaMath: a question is its ten variants; one that is missing is wrong, in all three."""
    if len({row["group"]["variant"] for row in run}) < len(run) or len(run) > VARIANTS:
        raise ValueError(f"question {run[0]['group']['question']!r} has a variant twice")
    scores = [row["score"] for row in run] + [0.0] * (VARIANTS - len(run))
    best = 1 - math.prod(1 - score for score in scores)
    return {"worst": (math.prod(scores), 1), "average": (sum(scores), VARIANTS), "best": (best, 1)}


def strict_and_loose(run: list[dict]) -> dict:
    """WeMath: m, the whole problem; s, its steps. A whole problem without its steps is by rote.

    inadequate knowledge IK = not m, not all s; inadequate generalisation IG = not m, all s;
    complete mastery CM = m and all s (loose: any s); rote memorisation RM = m and the rest.
    Score = 1 - IG / 2 - RM - IK = CM + IG / 2.
    """
    scores = {row["group"]["part"]: row["score"] for row in run}
    if set(scores) not in STEPS or len(scores) < len(run):
        problem = run[0]["group"]["problem"]
        raise ValueError(f"WeMath's problem {problem} lacks steps: it has {sorted(scores)}")
    m = next(score for part, score in scores.items() if part.endswith("multi"))
    steps = [score for part, score in scores.items() if not part.endswith("multi")]
    every, some = math.prod(steps), 1 - math.prod(1 - score for score in steps)
    shares = {"IK": (1 - m) * (1 - every), "IG": (1 - m) * every}
    shares |= {"CM strict": m * every, "RM strict": m * (1 - every)}
    shares |= {"CM loose": m * some, "RM loose": m * (1 - some)}
    told = {how: shares[f"CM {how}"] + shares["IG"] / 2 for how in ("strict", "loose")}
    return {name: (share, 1) for name, share in (told | shares).items()}


def circular(run: list[dict]) -> dict:
    """MMBench: a question counts only if all its rotations are right; rows: each for itself."""
    scores, group = [row["score"] for row in run], run[0]["group"]
    if len(run) != group.get("of", len(run)):
        raise ValueError(f"question {group} has {len(run)} of its rotations: it wants them all")
    return {"circular": (math.prod(scores), 1), "rows": (sum(scores), len(scores))}


def hallusion(run: list[dict]) -> dict:
    """HallusionBench: aAcc of replies; fAcc of figures and qAcc of questions that are all right.
    Figures and questions cross inside a set, so the set is the unit."""
    told = {"aAcc": (sum(row["score"] for row in run), len(run))}
    for name, kind in (("fAcc", "figure"), ("qAcc", "question")):
        groups = defaultdict(lambda: 1.0)
        for row in run:
            groups[row["group"][kind]] *= row["score"]
        told[name] = (sum(groups.values()), len(groups))
    return told


def f1(run: list[dict]) -> dict:
    """POPE: yes is positive. An unparsed reply says neither: wrong, and no yes of the model's."""
    [row] = run
    gold, score = str(row["answer"]).strip().lower(), row["score"]
    if gold not in ("yes", "no"):
        raise ValueError(f"{row['id']}: the gold {row['answer']!r} is neither yes nor no")
    said_yes = row["status"] == "ok" and str(row["extracted"]).strip().lower() == "yes"
    hit = score * (gold == "yes")
    said = hit + (1 - score) * (gold == "no" and said_yes)
    told = {"f1": (2 * hit, said + (gold == "yes")), "accuracy": (score, 1)}
    return told | {"precision": (hit, said), "recall": (hit, gold == "yes"), "yes ratio": (said, 1)}


def mme(run: list[dict]) -> dict:
    """MME: acc of replies, acc+ of images with both questions right, by category."""
    category = run[0]["category"].lower()
    if len(run) != 2 or category not in PERCEPTION + COGNITION:
        image = run[0]["group"]["image"]
        raise ValueError(f"MME's image {image} has {len(run)} questions, category {category}")
    first, second = (row["score"] for row in run)
    return {f"{category} acc": (first + second, 2), f"{category} acc+": (first * second, 1)}


def mme_sums(ratios: dict) -> dict:
    """100 x (acc + acc+), summed: 2,000 points of perception, 800 of cognition at the most."""
    sums = {}
    for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
        some = [100 * ratio for key, ratio in ratios.items() if key.rsplit(" ", 1)[0] in categories]
        sums |= {name: sum(some)} if some else {}
    return sums | ratios


def parts(run: list[dict]) -> dict:
    """MMMU-Pro: the accuracies of two forms of the same questions, drawn together."""
    told = {}
    for row in run:
        right, of = told.get(row["group"]["part"], (0, 0))
        told[row["group"]["part"]] = (right + row["score"], of + 1)
    return told


def with_mean(ratios: dict) -> dict:
    return {"mean": sum(ratios.values()) / len(ratios)} | ratios


class Metric(NamedTuple):
    terms: Callable[[list[dict]], dict]
    headlines: int  # the first so many scores are the headline
    unit: str = ""  # what makes a unit: a name in "group"; empty: the item alone
    combine: Callable[[dict], dict] = dict  # of the ratios to scores, numbers or arrays of draws
    scale: int = 100  # what the table multiplies by, to speak the paper's unit


METRICS = {
    "accuracy": Metric(accuracy, 1),
    "avg@k": Metric(accuracy, 1),
    "judge": Metric(accuracy, 1),  # MM-Vet's 0..1, which no rule gives
    "worst of variants": Metric(worst_of_variants, 3, "question"),
    "strict and loose": Metric(strict_and_loose, 2, "problem"),
    "circular": Metric(circular, 2, "question"),
    "hallusion": Metric(hallusion, 4, "set", with_mean),
    "f1": Metric(f1, 2),
    "mme sum": Metric(mme, 2, "image", mme_sums, scale=1),
    "mean of parts": Metric(parts, 3, "question", with_mean),
}


# --- scores and intervals -------------------------------------------------------------------------


class Measure(NamedTuple):
    """A metric as H ratios of sums over U independent units."""

    metric: Metric
    names: list[str]  # (H,) of the ratios
    units: list  # (U,) names
    terms: np.ndarray  # (U, H, 2) what a unit adds to numerators and denominators

    def scores(self, sums: np.ndarray) -> dict:
        """Sums (..., H, 2) -> {name: (...)}. 0 / 0 is 0: who never says yes has precision 0."""
        above, below = np.moveaxis(sums, -1, 0)
        ratios = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return self.metric.combine(dict(zip(self.names, np.moveaxis(ratios, -1, 0), strict=True)))

    def point(self) -> dict[str, float]:
        return {name: float(score) for name, score in self.scores(self.terms.sum(axis=0)).items()}


def unit_of(metric: Metric, row: dict) -> Hashable:
    if metric.unit and metric.unit not in (row.get("group") or {}):
        raise ValueError(f"{row['id']}: the metric needs a group {metric.unit!r} of it")
    return row["group"][metric.unit] if metric.unit else row["id"]


def measure(metric: str, rows: list[dict]) -> Measure:
    """What each unit adds, its mean over the samples: a sample counts as one pass over the
    benchmark, and variants of different samples are never combined."""
    check(rows)
    of, runs = METRICS[metric], defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[unit_of(of, row)][row["sample"]].append(row)
    told = [[of.terms(run) for run in samples.values()] for samples in runs.values()]
    names = [*dict.fromkeys(name for unit in told for run in unit for name in run)]
    full = [
        np.mean([[run.get(name, (0, 0)) for name in names] for run in unit], axis=0)
        for unit in told
    ]
    return Measure(of, names, [*runs], np.array(full, dtype=float))


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
    if fewer := [f"{name} has {n}" for name, n in count.items() if n < max(count.values())]:
        raise ValueError(f"items have {max(count.values())} samples, but {fewer[:5]}: sample again")


def bootstrap(terms: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Sums of what U units add, each draw over U units with replacement: (U, ...) -> (draws, ...).

    Few units differ in what they add, so it draws how often each *kind* of unit comes (a
    multinomial): the same distribution, 10,000 draws in milliseconds.
    """
    flat = terms.reshape(len(terms), -1)
    kinds, count = np.unique(flat, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(flat), count / len(flat), draws)
    return (drawn @ kinds).reshape(draws, *terms.shape[1:])


def estimate(measured: Measure, draws: int = DRAWS, seed: int = 0) -> dict[str, dict]:
    """{name: {"score", "error", "low", "high", "interval"}}: standard error and 95 % interval.

    The bootstrap's deviation is too small by sqrt((U - 1) / U), which is put right. A mean of units
    that are each right or wrong gets Wilson's interval: the bootstrap's is [0, 0] where all fail.
    """
    drawn, n = measured.scores(bootstrap(measured.terms, draws, seed)), len(measured.units)
    told = {}
    for name, score in measured.point().items():
        low, high, by = *np.quantile(drawn[name], LEVEL).tolist(), "bootstrap"
        if name in measured.names:
            right, of = measured.terms[:, measured.names.index(name)].T
            if np.isin(right, (0, 1)).all() and (of == 1).all():
                low, high, by = *wilson(score * n, n), "wilson"
        # one unit says nothing of the spread
        error = float(drawn[name].std()) * math.sqrt(n / (n - 1)) if n > 1 else None
        told[name] = {"score": score, "error": error, "low": low, "high": high, "interval": by}
    return told


def wilson(right: float, n: float, z: float = Z) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): right of n. It is sane at 0 and at 1."""
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


# --- k samples of an item -------------------------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that one of k of the n samples is right: 1 - C(n - c, k) / C(n, k).

    Unbiased; Chen et al. 2021 (Codex), eq. 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence, scores: Sequence[float], same: Callable = operator.eq) -> float:
    """Expected score of the most frequent answer, ties broken by lot. None (unparsed) never wins.

    same(a, b): whether two are one answer, as 1/2 and 0.5; compared with the first of each kind.
    """
    kinds = []  # [(first answer, scores of all that equal it)]
    for answer, score in zip(answers, scores, strict=True):
        found = next((scores for first, scores in kinds if same(first, answer)), None)
        if found is None and answer is not None:
            kinds.append((answer, found := []))
        if answer is not None:
            found.append(score)
    most = max((len(found) for _, found in kinds), default=0)
    top = [sum(found) / len(found) for _, found in kinds if len(found) == most]
    return sum(top) / len(top) if top else 0.0


def of_samples(rows: list[dict], same: Callable = operator.eq) -> Measure:
    """pass@1, 2, 4, ... k and maj@k of items with k samples each."""
    items = defaultdict(list)
    for row in rows:
        items[row["id"]].append(row)
    n = len(rows) // len(items)
    tries = sorted({2**i for i in range(n.bit_length())} | {n})
    values = []
    for item in items.values():
        scores, answers = [r["score"] for r in item], [r["extracted"] for r in item]
        passed = [pass_at_k(n, scores.count(1.0), k) for k in tries]
        values.append([*passed, majority(answers, scores, same)])
    terms = np.stack([np.array(values), np.ones_like(values)], axis=-1)
    return Measure(
        METRICS["accuracy"], [*(f"pass@{k}" for k in tries), f"maj@{n}"], [*items], terms
    )


# --- one benchmark --------------------------------------------------------------------------------


def chance(metric: str, items: list[dict]) -> dict[str, float]:
    """{name: expected score of guessing each item by itself}: exact where the metric is a mean of
    sums and products of scores; for F1's ratios the ratio of the expectations."""
    guess = {"sample": 0, "status": "ok", "extracted": "yes"}
    rows = []
    for item in items:
        letters = item.get("choices") or ()  # of older items, which do not tell their chance
        share = item.get("chance", 1 / len(letters) if letters else 0.0)
        rows.append(item | guess | {"score": share})
    return measure(metric, rows).point()


def at_most(metric: str, rows: list[dict]) -> dict[str, float]:
    """{name: score if every truncated reply had been right}."""
    best = [row | ({"score": 1.0} if row["status"] == "truncated" else {}) for row in rows]
    return measure(metric, best).point()


def scored(metric: str, rows: list[dict]) -> list[dict]:
    """Without the units of which a reply has no score: what is left of them is not like the rest,
    and a group with a gap measures something else."""
    of = METRICS[metric]
    lost = {unit_of(of, row) for row in rows if row["score"] is None}
    return [row for row in rows if unit_of(of, row) not in lost] if lost else rows


def by_judge(metric: str, rows: list[dict]) -> dict | None:
    """The same metric by the judge alone, on the items that it was asked about; None without any.

    What was truncated or empty needs no judge and is wrong. Where the judge's verdict could not be
    read (judge_score None), the unit is left out and counted. agreement: of rows with both scores.
    """
    cut = {"truncated": 0.0, "empty": 0.0}
    asked = [row for row in rows if "judge_score" in row]
    if not asked:
        return None
    judged = [row | {"score": cut.get(row["status"], row["judge_score"])} for row in asked]
    kept = scored(metric, judged)
    both = [r for r in asked if None not in (r["score"], r["judge_score"])]
    same = sum(row["score"] == row["judge_score"] for row in both)
    told = renamed(estimate(measure(metric, kept)), k_of(kept)) if kept else {}
    return {
        "headline": headline(metric, told),
        "n": len({row["id"] for row in kept}),
        "no_verdict": len({row["id"] for row in asked}) - len({row["id"] for row in kept}),
        "agreement": same / len(both) if both else None,
    }


def by_part(rows: list[dict], part_of: Callable[[dict], str]) -> dict[str, dict]:
    """{part: {"n", "accuracy": with its interval}}."""
    found = defaultdict(list)
    for row in rows:
        found[part_of(row)].append(row)
    return {
        part: {"n": len({row["id"] for row in some})} | estimate(measure("accuracy", some), 1000)
        for part, some in sorted(found.items())
    }


def headline(metric: str, told: dict) -> dict:
    """The first scores; MME's categories are none, though one of its sums may be missing."""
    names = [name for name in told if not (metric == "mme sum" and " acc" in name)]
    return {name: told[name] for name in names[: METRICS[metric].headlines]}


def k_of(rows: list[dict]) -> int:
    return len(rows) // max(1, len({row["id"] for row in rows}))


def renamed(scores: dict, k: int) -> dict:
    """accuracy over k samples is called avg@k; with one sample it keeps its name."""
    return {f"avg@{k}": scores["accuracy"]} if k > 1 and [*scores] == ["accuracy"] else scores


def summarise(
    metric: str, rows: list[dict], items: list[dict], paper: dict | None = None, same=operator.eq
) -> dict:
    """All numbers of one benchmark, as JSON; the headline first. metric: a key of METRICS.

    items: those that were asked, each with its "chance". paper: {name of a headline: the paper's
    number, in its unit}. same: equality of extracted answers, for maj@k.
    """
    ids, have = {item["id"] for item in items}, {row["id"] for row in rows}
    if ids != have:
        less, more = sorted(ids - have)[:5], sorted(have - ids)[:5]
        raise ValueError(f"items without a reply: {less}; replies without an item: {more}")
    kept, status, k = scored(metric, rows), Counter(row["status"] for row in rows), k_of(rows)
    left, tokens = {row["id"] for row in kept}, [row.get("tokens") for row in rows]
    tokens = [count for count in tokens if count is not None]
    summary = {"headline": {}, "details": {}, "metric": metric, "scale": METRICS[metric].scale}
    summary |= {"n": len(left), "k": k, "left_out": len(have - left), "status": dict(status)}
    summary |= {name: status[name] / max(1, len(rows)) for name in ("truncated", "unparsed")}
    summary |= {"tokens": sum(tokens) / len(tokens) if tokens else None}
    summary |= {"paper": renamed(paper or {}, k), "judge": by_judge(metric, rows)}
    if kept:
        summary |= by_rule(metric, kept, same)
        asked = [item for item in items if item["id"] in left]
        summary["chance"] = renamed(chance(metric, asked), k)
    return summary


def by_rule(metric: str, rows: list[dict], same: Callable) -> dict:
    """What `summarise` tells of the rows that have a score."""
    k, measured = k_of(rows), measure(metric, rows)
    told = renamed(estimate(measured), k)
    summary = {"headline": headline(metric, told)}
    summary["details"] = {name: of for name, of in told.items() if name not in summary["headline"]}
    summary["units"] = len(measured.units)
    if metric == "worst of variants":
        missing = VARIANTS * len(measured.units) - len({row["id"] for row in rows})
        summary["missing_variants"] = missing
    if any(row.get("category") is not None for row in rows):
        summary["categories"] = by_part(rows, lambda row: str(row.get("category")))
    if sum(row["status"] == "truncated" for row in rows) > NOTABLE * len(rows):
        summary["at_most"] = renamed(at_most(metric, rows), k)
    if any(row.get("seen") is not None for row in rows):
        known = {True: "seen", False: "unseen", None: "unknown"}
        summary["source"] = by_part(rows, lambda row: known[row.get("seen")])
    if any(row["answer"] == "Not Applicable" for row in rows):  # a quarter of CharXiv descriptive
        apart = {True: "not applicable", False: "applicable"}
        summary["applicable"] = by_part(rows, lambda r: apart[r["answer"] == "Not Applicable"])
    if k > 1:
        summary["samples"] = estimate(of_samples(rows, same))
    return summary


def as_parts(parts: dict[str, list[dict]]) -> list[dict]:
    """{"standard10": rows, "vision": rows} -> the rows that "mean of parts" takes."""
    return [
        row | {"id": f"{name}/{row['id']}"} | {"group": {"part": name, "question": place}}
        for name, rows in parts.items()
        for place, row in ((row["id"].split("/", 1)[-1], row) for row in rows)
    ]


# --- two runs -------------------------------------------------------------------------------------


def compare(metric: str, before: list[dict], after: list[dict]) -> dict:
    """after - before on the same items: paired bootstrap, sign test, flipped items.

    difference: {name: before, after, difference, low, high, p}; p is two-sided, from the draws on
    either side of 0. mcnemar: units whose mean score rose and fell; with one sample and one item a
    unit that is McNemar's exact test. gained, lost: ids. ValueError where items or golds differ.
    """
    before, after = scored(metric, before), scored(metric, after)
    same_items(before, after)
    a, b = measure(metric, before), measure(metric, after)
    place = {unit: i for i, unit in enumerate(b.units)}
    if set(place) != set(a.units):
        raise ValueError("the runs group the same items differently: make their items anew")
    terms = b.terms[[place[unit] for unit in a.units]][:, [b.names.index(name) for name in a.names]]
    drawn = bootstrap(np.stack([a.terms, terms], axis=1))  # (draws, 2, H, 2)
    old, new, was, now = a.scores(drawn[:, 0]), a.scores(drawn[:, 1]), a.point(), b.point()
    unit = lambda row: unit_of(a.metric, row)  # noqa: E731
    changes, units = changed(before, after, lambda row: row["id"]), changed(before, after, unit)
    gained, lost = (sum(sign * change > 0 for change in units.values()) for sign in (1, -1))
    return {
        "difference": {
            name: {"before": was[name], "after": now[name]}
            | spread(new[name] - old[name], now[name] - was[name])
            for name in was
        },
        "mcnemar": {"gained": gained, "lost": lost, "p": sign_test(gained, lost)},
        "gained": [name for name, change in changes.items() if change > 0],
        "lost": [name for name, change in changes.items() if change < 0],
    }


def same_items(before: list[dict], after: list[dict]):
    """ValueError that names items which only one run has, or whose golds are not the same."""
    old, new = ({row["id"]: row["answer"] for row in run} for run in (before, after))
    if old.keys() != new.keys():
        less, more = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
        raise ValueError(
            f"the runs have different items: {len(less)} only before, as {less[:5]}; "
            f"{len(more)} only after, as {more[:5]}"
        )
    if moved := [f"{name}: {old[name]!r}, {new[name]!r}" for name in old if old[name] != new[name]]:
        raise ValueError(f"{len(moved)} items have another gold after: {moved[:5]}")


def spread(draws: np.ndarray, difference: float) -> dict[str, float]:
    """Interval and two-sided p of a difference, from its (draws,) bootstrap draws.

    The smallest p is 2 / (draws + 1), for draws cannot show less. Rounding of sums is no sign.
    """
    low, high = np.quantile(draws, LEVEL).tolist()
    fewer = min((draws <= 1e-9).sum(), (draws >= -1e-9).sum())
    p = min(1.0, 2 * (int(fewer) + 1) / (len(draws) + 1))
    return {"difference": difference, "low": low, "high": high, "p": p}


def changed(before: list[dict], after: list[dict], key: Callable) -> dict[Hashable, float]:
    """{key of rows: after - before of their summed scores}."""
    change = defaultdict(float)
    for sign, rows in ((-1, before), (1, after)):
        for row in rows:
            change[key(row)] += sign * row["score"]
    return change


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
        lines += [(benchmark, *cells(summary, name)) for name in summary["headline"]]
        judge = summary["judge"] or {"headline": {}, "no_verdict": 0}
        beside = summary | judge | {"chance": {}, "at_most": {}}
        for name in judge["headline"]:
            lines.append((benchmark, f"{name}, judge", *cells(beside, name)[1:]))
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


def cells(summary: dict, name: str) -> tuple[str, ...]:
    """One line of the table after its first column."""
    told, paper = summary["headline"][name], summary["paper"].get(name)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value * summary['scale']:.1f}"

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
