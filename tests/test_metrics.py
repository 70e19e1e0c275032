"""Scores, intervals and tests against naive loops, exact enumeration and published figures."""

import csv
import itertools
import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from evaluation import metrics

PUBLISHED = Path(__file__).parents[2] / "shared/data/regression"
approx = pytest.approx


def row(name, score, sample=0, **more):
    """A graded reply, which is its own item. Its status is ok, or what `more` says."""
    own = {"id": str(name), "sample": sample, "score": score, "status": "ok", "extracted": "7"}
    return own | {"answer": "7", "chance": 0.0} | more


def rows_of(scores, **more):
    return [row(i, float(score), **more) for i, score in enumerate(scores)]


def grouped(name, score, chance=0.0, **group):
    return row(name, float(score), group=group, chance=chance)


def dynamath(table):
    """{question: [score of each variant]} -> rows."""
    return [grouped(f"{q}/{v}", score, question=q) for q, variants in table.items()
            for v, score in enumerate(variants)]  # fmt: skip


def wemath(problems):
    """{problem: (scores of the steps, score of the whole)} -> rows."""
    return [grouped(f"{problem}/{part}", score, 0.25, problem=problem, part=f"2steps_{part}")
            for problem, (steps, whole) in problems.items()
            for part, score in [*enumerate(steps, 1), ("multi", whole)]]  # fmt: skip


def yes_no(pairs):
    """[(gold, said)] -> rows; said None: truncated."""
    return [row(i, float(said == gold), answer=gold, extracted=said, chance=0.5,
                status="ok" if said else "truncated")
            for i, (gold, said) in enumerate(pairs)]  # fmt: skip


def mme(table):
    """{category: [(score, score) of an image]} -> rows."""
    return [grouped(f"{of}/{i}/{j}", score, 0.5, image=f"{of}/{i}") | {"category": of}
            for of, images in table.items() for i, pair in enumerate(images)
            for j, score in enumerate(pair)]  # fmt: skip


def summary(metric, rows, paper=None):
    items = {row["id"]: row for row in rows}
    return metrics.summarise(metric, rows, [*items.values()], paper)


def headline(metric, rows):
    return {name: of["score"] for name, of in summary(metric, rows)["headline"].items()}


ROTATIONS = {"a": [1, 1, 1, 1], "b": [1, 1, 0], "c": [0, 0], "d": [1, 1]}
VARIANTS = dynamath({"a": [1] * 10, "b": [1] * 9, "c": [0] * 10, "d": [1] + [0] * 9})
ONCE = dynamath({"a": [1] * 10})
AGAIN = [r | {"sample": 1, "score": float(i > 0)} for i, r in enumerate(ONCE)]
BY_HAND = [
    # a missing variant is wrong, and those of two samples are never mixed
    ("worst of variants", VARIANTS, {"worst": 0.25, "average": 0.5, "best": 0.75}),
    ("worst of variants", ONCE + AGAIN, {"worst": 0.5, "average": 0.95, "best": 1}),
    ("circular", dynamath(ROTATIONS), {"circular": 0.5, "rows": 8 / 11}),
    # existence: 5 of 8 right, 2 of 4 images: 62.5 + 50; OCR: 3 of 4 and 1 of 2: 75 + 50
    ("mme sum", mme({"existence": [(1, 1), (1, 0), (0, 0), (1, 1)], "OCR": [(1, 0), (1, 1)]}),
     {"perception": 237.5}),
    ("mme sum", mme(dict.fromkeys(metrics.MME, [(1, 1)])), {"perception": 2000, "cognition": 800}),
    ("f1", yes_no([("yes", "no"), ("no", "no")]), {"f1": 0, "accuracy": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("metric, rows, expected", BY_HAND)
def test_a_metric_gives_what_is_counted_by_hand(metric, rows, expected):
    assert headline(metric, rows) == approx(expected)


def test_dynamaths_official_table_gives_its_official_figures():
    path = PUBLISHED / "dynamath_gpt4o_variants.csv"
    if not path.exists():
        pytest.skip("the official table is not here")
    with path.open() as file:
        lines = [line for line in csv.reader(file) if line[0][:1] == "Q" and line[0][1:].isdigit()]
    rows = dynamath({line[0]: [cell == "correct" for cell in line[1:11]] for line in lines})
    scores = {name: round(100 * of, 1) for name, of in headline("worst of variants", rows).items()}
    assert len(lines) == 501 and scores == {"worst": 34.7, "average": 63.3, "best": 90.2}


def test_wemath_agrees_with_the_published_formula():
    rng = random.Random(2)
    for p in (0.2, 0.5, 0.9):
        problems, count = {}, Counter()
        for i in range(525):
            whole, *steps = (int(rng.random() < p) for _ in range(3 if i < 360 else 4))
            problems[i] = steps, whole
            for how, known in (("strict", all(steps)), ("loose", any(steps))):
                count[f"{'CM' if known else 'RM'} {how}"] += whole
            count["IG" if all(steps) else "IK"] += 1 - whole
        for how in ("strict", "loose"):
            count[how] = 525 - count["IG"] / 2 - count[f"RM {how}"] - count["IK"]
        scores = metrics.point("strict and loose", wemath(problems))
        assert {name: 525 * score for name, score in scores.items()} == approx(count)


def test_hallusionbench_agrees_with_naive_groups_and_draws_whole_sets():
    rng, rows, naive = random.Random(0), [], {}
    for i, (place, figure, question) in enumerate(itertools.product(range(16), "abc", "wxyz")):
        group = {"set": place, "figure": f"{place}{figure}", "question": f"{place}{question}"}
        rows.append(grouped(i, rng.random() < 0.8, **group))
    for name, key in (("aAcc", "id"), ("fAcc", "figure"), ("qAcc", "question")):
        groups = defaultdict(list)
        for r in rows:
            groups[(r | r["group"])[key]].append(r["score"])
        naive[name] = np.mean([all(scores) for scores in groups.values()])
    naive["mean"] = sum(naive.values()) / 3
    whole = summary("hallusion", rows)
    assert {name: of["score"] for name, of in whole["headline"].items()} == approx(naive)
    for of in whole["headline"].values():
        assert of["n"] == 16 and of["low"] < of["score"] < of["high"]
    assert summary("hallusion", rows[::-1])["headline"] == whole["headline"]


def test_pope_reads_lists_as_a_naive_count_does():
    rng = random.Random(4)
    for _ in range(30):
        pairs = [(rng.choice(["yes", "no"]), rng.choice(["yes", "no", None])) for _ in range(25)]
        tp, fp = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
        positives = sum(gold == "yes" for gold, _ in pairs)
        expected = {"precision": tp / (tp + fp), "recall": tp / positives}
        expected |= {"f1": 2 * tp / (tp + fp + positives), "yes ratio": (tp + fp) / 25}
        expected |= {"accuracy": sum(gold == said for gold, said in pairs) / 25}
        assert metrics.point("f1", yes_no(pairs)) == approx(expected)


CROSSED = [dict(figure=f, question=q, set="s") for f, q in itertools.product("ab", "xyz")]
GUESSES = {
    "accuracy": [row(0, 0.0, chance=0.25), row(1, 0.0, chance=0.5)],
    "mme sum": mme({"ocr": [(0, 0)], "existence": [(0, 0)] * 2}),
    "worst of variants": [r | {"chance": 0.25} for r in dynamath({"a": [0] * 10})],
    "circular": [grouped(f"{q}{i}", 0, 1 / 3, question=q) for q in "ab" for i in range(3)],
    "hallusion": [grouped(i, 0, 0.5, **group) for i, group in enumerate(CROSSED)],
    "strict and loose": wemath({"p": ([0, 0], 0), "q": ([0, 0, 0], 0)}),
}


@pytest.mark.parametrize("metric, rows", GUESSES.items())
def test_chance_is_the_mean_score_over_all_outcomes_of_independent_guesses(metric, rows):
    expected = Counter()
    for outcome in itertools.product((0.0, 1.0), repeat=len(rows)):
        pairs = [*zip(rows, outcome, strict=True)]
        weight = math.prod(abs(1 - right - of["chance"]) for of, right in pairs)
        scores = metrics.point(metric, [of | {"score": right} for of, right in pairs])
        for name, score in scores.items():
            expected[name] += weight * score
    assert summary(metric, rows)["chance"] == approx(expected)


def test_avg_pass_and_maj_at_k_agree_with_naive_counts_and_have_the_interval_of_the_items():
    rng = random.Random(0)
    tries = [[float(rng.random() < i / 60) for _ in range(6)] for i in range(60)]
    rows = [row(i, score, j, extracted="xy"[int(score)])
            for i, scores in enumerate(tries) for j, score in enumerate(scores)]  # fmt: skip
    whole, means = summary("avg@k", rows), np.mean(tries, axis=1)
    score, low, high, n = whole["headline"]["accuracy"].values()
    assert score == approx(means.mean()) and (n, whole["n"], whole["k"]) == (60, 60, 6)
    error = means.std() / math.sqrt(60)
    assert (low, high) == approx((score - 1.96 * error, score + 1.96 * error), abs=0.005)
    assert error > 1.5 * math.sqrt(score * (1 - score) / len(rows))
    expected = {"maj@6": np.mean((means > 0.5) + (means == 0.5) / 2)}  # ties are broken by lot
    for k in (1, 2, 4, 6):  # the share of subsets with a right sample
        subsets = [[*itertools.combinations(scores, k)] for scores in tries]
        expected[f"pass@{k}"] = np.mean([[any(subset) for subset in of] for of in subsets])
    assert {name: of["score"] for name, of in whole["samples"].items()} == approx(expected)


def test_wilson_gives_the_intervals_at_the_papers_numbers():
    """AIME24 of one sample, DynaMath; and a model that always fails."""
    for share, n, ends in ((0.635, 30, (45.7, 78.3)), (0.335, 501, (29.5, 37.7))):
        assert [100 * end for end in metrics.wilson(share, n)] == approx(ends, abs=0.05)
    for k in (1, 4):
        rows = [row(i, 0.0, j) for i in range(30) for j in range(k)]
        score = summary("accuracy", rows)["headline"]["accuracy"]
        assert score == approx({"score": 0, "low": 0, "high": 0.1135, "n": 30}, abs=1e-3)


def test_the_majority_is_the_mean_over_all_ways_to_break_the_tie_and_unparsed_never_wins():
    rng = random.Random(5)
    for _ in range(200):
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(rng.randint(0, 7))]
        right = [float(answer == "a") for answer in answers]
        count = Counter(answer for answer in answers if answer is not None)
        top = [answer for answer, n in count.items() if n == max(count.values())]
        assert metrics.majority(answers, right) == approx(("a" in top) / max(1, len(top)))
    # one answer, written twice
    assert metrics.majority(["\\frac{1}{2}", "0.5", "3", "3"], [1.0, 1.0, 0.0, 0.0]) == 0.5


def test_the_upper_bound_counts_what_was_truncated_as_right():
    whole = summary("f1", yes_no([("yes", "yes"), ("no", "yes"), ("yes", None), ("no", None)]))
    assert (whole["truncated"], whole["status"]) == (0.5, {"ok": 2, "truncated": 2})
    assert whole["at_most"]["f1"] == approx(2 * 2 / (2 * 2 + 1))
    assert (whole["at_most"]["accuracy"], whole["chance"]["f1"]) == (0.75, 0.5)


def test_what_no_rule_can_grade_is_left_out_with_its_samples_and_its_group_and_said_so():
    first, *others = wemath({"p": ([1, 1], 1), "q": ([1, 0, 1], 0)})
    one_lacks = [row("a", 1.0, 0), row("a", None, 1), row("b", 0.0, 0), row("b", 1.0, 1)]
    for metric, rows, left_out, scores in (
        ("accuracy", [*rows_of([1, 1, 0]), row("x", None)], 1, {"accuracy": 2 / 3}),
        ("avg@k", one_lacks, 1, {"accuracy": 0.5}),
        ("strict and loose", [first | {"score": None}, *others], 3, {"strict": 0, "loose": 0}),
        ("judge", [row(i, None) for i in range(3)], 3, {}),  # MM-Vet without a judge: no 0
    ):
        whole = summary(metric, rows)
        assert {name: of["score"] for name, of in whole["headline"].items()} == approx(scores)
        assert whole["left_out"] == left_out
        assert f"x: {left_out} left out" in metrics.table({"x": whole})


def test_rule_and_judge_stand_side_by_side_and_are_never_mixed():
    scores = [(1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]  # by the rule, by the judge
    scores += [(None, 1.0), (1.0, None)]  # the one cannot tell, the other cannot be read
    rows = [row(i, by_rule, judge_score=by_judge) for i, (by_rule, by_judge) in enumerate(scores)]
    rows += [row("wrong, and not judged", 0.0, judge_score=None, status="truncated")]
    rows += [row("needs no judge", 1.0)]
    whole = summary("accuracy", rows, {"accuracy": 54.6})
    for scores, expected in ((whole, (3 / 6, 6, 1)), (whole["judge"], (3 / 5, 5, 1))):
        score = scores["headline"]["accuracy"]["score"]
        assert (score, scores["n"], scores["left_out"]) == expected
    _, rule, judge, *notes = metrics.table({"mathverse": whole}).splitlines()
    assert re.match(r"mathverse +accuracy +50.0 .* 54.6$", rule)
    assert re.match(r"mathverse +accuracy, judge +60.0 .* 54.6$", judge)
    assert "mathverse, judge: 1 left out" in notes[1]


def test_parts_of_a_set_are_told_apart():
    """Categories, what the paper trains on, and CharXiv's questions without an answer."""
    rows = rows_of([1, 0, 1], category="algebra", seen=False)
    rows[0] |= {"seen": True}
    rows[2] |= {"category": "graphs", "answer": "Not Applicable"}
    whole = summary("accuracy", rows)
    for part, scores in (
        ("categories", {"algebra": 0.5, "graphs": 1}),
        ("seen", {"True": 1, "False": 0.5}),
        ("applicable", {"applicable": 0.5, "not applicable": 1}),
    ):
        assert {name: of["accuracy"]["score"] for name, of in whole[part].items()} == scores


def test_a_reply_that_is_missing_or_stands_twice_is_named():
    items = [row(name, 0) for name in "012"]
    rows = [row(name, 1.0, sample) for name in "012" for sample in (0, 1)]
    for replies, name in ((rows[1:], "'0', 0"), (rows + rows[:1], "'0', 0"),
                          ([*rows, row("3", 1.0)], "'3', 0"), ([], "'0', 0")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"\[\({name}\)"):
            metrics.summarise("accuracy", replies, items)


def test_two_runs_are_compared_on_the_same_items_golds_and_groups_only():
    one, ungraded = rows_of([1, 0, 1]), [row(0, None)]
    apart = [[grouped(i, 1, question=i // n) for i in range(4)] for n in (2, 3)]
    for metric, before, after, named in (
        ("accuracy", one, rows_of([1, 0, 1, 1])[1:], r"\[\('0', .*, \('3', "),
        ("accuracy", one, [one[0] | {"answer": "8"}, *one[1:]], "'0', '7', .*'0', '8'"),
        ("circular", *apart, "'7', 0.*'7', 1"),
        ("judge", ungraded, ungraded, ""),
    ):
        with pytest.raises(ValueError, match="do not share their items .*" + named):
            metrics.compare(metric, before, after)


def test_flipped_units_are_counted_both_ways_and_their_sign_test_is_the_exact_binomial_test():
    for gained, lost in itertools.combinations_with_replacement(range(6), 2):
        n = gained + lost
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        far = sum(abs(2 * k - n) >= abs(gained - lost) for k in outcomes)
        before, after = [0] * gained + [1] * (lost + 2), [1] * gained + [0] * lost + [1] * 2
        both = metrics.compare("accuracy", rows_of(before), rows_of(after)[::-1])
        assert (len(both["gained"]), len(both["lost"])) == (gained, lost)
        assert both["sign"] == approx(far / len(outcomes))
    one, three = ([row(i, float(i < 2), j) for i in range(4) for j in range(k)] for k in (1, 3))
    both = metrics.compare("accuracy", one, three)  # of different k
    assert both["gained"] == both["lost"] == [] and both["sign"] == 1


def test_a_comparison_is_of_units_and_not_of_rows():
    before = dynamath({"a": [1] * 10, "b": [0] * 10, "c": [0] + [1] * 9})
    after = dynamath({"a": [0] * 10, "b": [0] * 5 + [1] * 5, "c": [1] * 10})
    both = metrics.compare("worst of variants", before, after)
    assert (both["gained"], both["lost"]) == (["b", "c"], ["a"])
    assert both["difference"]["worst"]["before"] == both["difference"]["worst"]["after"]


def test_the_interval_of_a_difference_is_of_pairs():
    rng = random.Random(0)
    before = [float(rng.random() < 0.5) for _ in range(400)]
    after = [max(b, float(i % 25 == 0)) for i, b in enumerate(before)]  # only ever better
    both = metrics.compare("accuracy", rows_of(before), rows_of(after)[::-1])
    of, change = both["difference"]["accuracy"], np.array(after) - before
    drawn = change[np.random.default_rng(0).integers(0, 400, (10_000, 400))].mean(axis=1)
    assert (of["before"], of["after"]) == approx((np.mean(before), np.mean(after)))
    assert (of["low"], of["high"]) == approx(np.quantile(drawn, [0.025, 0.975]), abs=0.003)


def test_the_table_gives_points_where_the_paper_does_with_the_interval_and_chance():
    rows = mme({"existence": [(1, 1), (1, 0)]})
    table = metrics.table({"mme": summary("mme sum", rows, {"perception": 1559.1})})
    assert re.match(r"mme +perception +125.0 .* 75.0 .* 1,559.1$", table.splitlines()[1])
