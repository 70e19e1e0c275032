"""Scores, intervals and tests against naive loops, exact enumeration and published figures."""

import csv
import itertools
import json
import math
import random
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


def summary(metric, rows, paper=None):
    items = {row["id"]: row for row in rows}
    return metrics.summarise(metric, rows, [*items.values()], paper)


def headline(metric, rows):
    return {name: of["score"] for name, of in summary(metric, rows)["headline"].items()}


def test_avg_at_k_is_the_mean_of_the_items_means_with_the_interval_of_the_items():
    rng = random.Random(0)
    chances = [rng.random() for _ in range(60)]
    rows = [row(i, float(rng.random() < p), j) for i, p in enumerate(chances) for j in range(8)]
    means = [sum(r["score"] for r in rows[8 * i : 8 * i + 8]) / 8 for i in range(60)]
    whole = summary("avg@k", rows)
    score, low, high, n = whole["headline"]["accuracy"].values()
    assert score == approx(sum(means) / 60) and (n, whole["n"], whole["k"]) == (60, 60, 8)
    error = np.std(means) / math.sqrt(60)
    assert (low, high) == approx((score - 1.96 * error, score + 1.96 * error), abs=0.005)
    assert error > 1.5 * math.sqrt(score * (1 - score) / len(rows))


def test_drawing_kinds_of_units_is_drawing_units():
    terms = np.array([[0.0, 1], [0, 1], [0.5, 1], [1, 1], [1, 2]])
    rng = np.random.default_rng(1)
    naive = np.array([terms[rng.integers(0, 5, 5)].sum(axis=0) for _ in range(20_000)])
    ours = metrics.bootstrap(terms, 20_000)
    np.testing.assert_allclose(ours.mean(axis=0), naive.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(naive.T), rtol=0.05, atol=0.01)
    assert (metrics.bootstrap(terms, 9) == metrics.bootstrap(terms, 9)).all()


def test_wilson_gives_the_intervals_at_the_papers_numbers():
    """AIME24 45.7..78.3 (one sample), MathVision-mini 46..57, DynaMath 29.5..37.7."""
    for share, n, ends in ((0.635, 30, (45.7, 78.3)), (0.335, 501, (29.5, 37.7))):
        assert tuple(round(100 * x, 1) for x in metrics.wilson(share, n)) == ends
    for k in (1, 4):  # a model that always fails does not get an interval of no width
        rows = [row(i, 0.0, j) for i in range(30) for j in range(k)]
        score = summary("accuracy", rows)["headline"]["accuracy"]
        assert score["score"] == score["low"] == 0 and score["high"] == approx(0.1135, abs=1e-3)


def test_the_majority_is_the_mean_over_all_ways_to_break_the_tie_and_unparsed_never_wins():
    rng = random.Random(5)
    for _ in range(200):
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(rng.randint(0, 7))]
        right = [float(answer == "a") for answer in answers]
        count = Counter(answer for answer in answers if answer is not None)
        top = [answer for answer, n in count.items() if n == max(count.values())]
        assert metrics.majority(answers, right) == approx(("a" in top) / max(1, len(top)))
    assert metrics.majority(["\\frac{1}{2}", "0.5", "3", "3"], [1.0, 1.0, 0.0, 0.0]) == 0.5
    assert metrics.majority(["1/2", "0.5", "3"], [1.0, 1.0, 0.0]) == 1  # one answer, written twice


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert metrics.pass_at_k(n, right, k) == approx(share, abs=1e-12)
    rows = [row(name, float(i < right), i, extracted="xy"[i < right])
            for name, right in (("a", 2), ("b", 3)) for i in range(4)]  # fmt: skip
    scores = {name: of["score"] for name, of in summary("avg@k", rows)["samples"].items()}
    expected = {"pass@1": 5 / 8, "pass@2": (1 - 1 / 6 + 1) / 2, "pass@4": 1, "maj@4": 0.75}
    assert scores == approx(expected)


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
    """[(gold, said)] -> rows; said None: unparsed."""
    return [row(i, float(said == gold), answer=gold, extracted=said, chance=0.5,
                status="ok" if said else "unparsed")
            for i, (gold, said) in enumerate(pairs)]  # fmt: skip


def mme(table):
    """{category: [(score, score) of an image]} -> rows."""
    return [grouped(f"{of}/{i}/{j}", score, 0.5, image=f"{of}/{i}") | {"category": of}
            for of, images in table.items() for i, pair in enumerate(images)
            for j, score in enumerate(pair)]  # fmt: skip


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
        scores = metrics.point("strict and loose", wemath(problems))
        assert {name: 525 * scores[name] for name in count} == approx(count)
        for how in ("strict", "loose"):
            right = 525 - count["IG"] / 2 - count[f"RM {how}"] - count["IK"]
            assert scores[how] == approx(right / 525, abs=1e-12)


def test_hallusionbench_agrees_with_naive_groups_and_draws_whole_sets():
    rng, rows, naive = random.Random(0), [], []
    for i, (place, figure, question) in enumerate(itertools.product(range(16), "abc", "wxyz")):
        group = {"set": place, "figure": f"{place}{figure}", "question": f"{place}{question}"}
        rows.append(grouped(i, rng.random() < 0.8, **group))
    for key in ("id", "figure", "question"):
        groups = defaultdict(list)
        for r in rows:
            groups[(r | r["group"])[key]].append(r["score"] == 1)
        naive.append(sum(map(all, groups.values())) / len(groups))
    whole = summary("hallusion", rows)
    assert [*whole["headline"]] == ["mean", "aAcc", "fAcc", "qAcc"]
    assert [of["score"] for of in whole["headline"].values()] == approx([sum(naive) / 3, *naive])
    assert all(of["low"] < of["score"] < of["high"] for of in whole["headline"].values())
    assert whole["headline"]["mean"]["n"] == 16
    assert json.loads(json.dumps(whole)) == whole  # a summary is JSON
    assert summary("hallusion", rows[::-1])["headline"] == whole["headline"]


def test_pope_reads_lists_as_a_naive_count_does():
    rng = random.Random(4)
    for _ in range(30):
        pairs = [(rng.choice(["yes", "no"]), rng.choice(["yes", "no", None])) for _ in range(25)]
        tp, fp = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
        positives = sum(gold == "yes" for gold, _ in pairs)
        expected = {"precision": tp / (tp + fp) if tp + fp else 0, "recall": tp / positives}
        expected |= {"f1": 2 * tp / (tp + fp + positives), "yes ratio": (tp + fp) / 25}
        expected |= {"accuracy": sum(gold == said for gold, said in pairs) / 25}
        assert metrics.point("f1", yes_no(pairs)) == approx(expected)
    assert summary("f1", yes_no([("yes", None), ("no", None)]))["chance"]["f1"] == 0.5


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


def test_the_upper_bound_counts_what_was_truncated_as_right():
    cut = [row(f"t{i}", 0.0, status="truncated", extracted=None) for i in range(10)]
    whole = summary("accuracy", rows_of([1] * 50 + [0] * 40) + cut)
    assert whole["truncated"] == 0.1 and whole["at_most"] == {"accuracy": 0.6}
    assert whole["status"] == {"ok": 90, "truncated": 10}
    assert "at_most" not in summary("accuracy", rows_of([1, 0]))
    rows = yes_no([("yes", "yes"), ("no", "yes"), ("yes", None), ("no", None)])
    rows = [r | {"status": "truncated"} if r["extracted"] is None else r for r in rows]
    assert summary("f1", rows)["at_most"]["f1"] == approx(2 * 2 / (2 * 2 + 1))


def test_what_no_rule_can_grade_is_left_out_with_its_samples_and_its_group_and_said_so():
    whole = summary("accuracy", rows_of([1, 1, 0], chance=0.5) + [row(f"j{i}", None) for i in "ab"])
    assert whole["headline"]["accuracy"]["score"] == approx(2 / 3)
    assert (whole["n"], whole["left_out"], whole["chance"]) == (3, 2, {"accuracy": 0.5})
    assert "x: 2 left out" in metrics.table({"x": whole})
    rows = [row("a", 1.0, 0), row("a", None, 1), row("b", 0.0, 0), row("b", 1.0, 1)]
    assert summary("avg@k", rows)["left_out"] == 1 and headline("avg@k", rows)["accuracy"] == 0.5
    first, *rows = wemath({"p": ([1, 1], 1), "q": ([1, 0, 1], 0)})
    whole = summary("strict and loose", [first | {"score": None}, *rows])
    assert (whole["left_out"], whole["n"], whole["headline"]["strict"]["n"]) == (3, 4, 1)
    whole = summary("accuracy", [row(i, None) for i in range(3)])  # MM-Vet without a judge: no 0
    assert whole["headline"] == {} and whole["left_out"] == 3
    assert metrics.table({"mmvet": whole}).count("mmvet") == 1


def test_rule_and_judge_stand_side_by_side_and_are_never_mixed():
    rows = [
        row(0, 1.0, judge_score=1.0),
        row(1, 0.0, judge_score=1.0),
        row(2, 0.0, judge_score=0.0),
        row(3, None, judge_score=1.0),  # the rule cannot tell
        row(4, 1.0, judge_score=None),  # the judge's verdict cannot be read
        row(5, 0.0, judge_score=None, status="truncated"),  # wrong, and no judge was asked
        row(6, 1.0),  # an item that needs no judge
    ]
    whole = summary("accuracy", rows, {"accuracy": 54.6})
    for scores, expected in ((whole, (3 / 6, 6, 1)), (whole["judge"], (3 / 5, 5, 1))):
        score = scores["headline"]["accuracy"]["score"]
        assert (score, scores["n"], scores["left_out"]) == expected
    text = metrics.table({"mathverse": whole})
    assert "accuracy, judge" in text and "mathverse, judge: 1 left out" in text
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["54.6", "54.6"]
    assert summary("accuracy", rows_of([1, 0]))["judge"] is None


def test_parts_of_a_set_are_told_apart():
    """Categories, what the paper trains on, and CharXiv's questions without an answer."""
    rows = [
        row(0, 1.0, category="algebra", seen=True),
        row(1, 0.0, category="algebra", seen=False),
        row(2, 1.0, category="graphs", seen=False, answer="Not Applicable"),
    ]
    whole = summary("accuracy", rows)
    for part, expected in (
        ("categories", {"algebra": (0.5, 2), "graphs": (1, 1)}),
        ("seen", {"True": (1, 1), "False": (0.5, 2)}),
        ("applicable", {"applicable": (0.5, 2), "not applicable": (1, 1)}),
    ):
        scores = {name: of["accuracy"] for name, of in whole[part].items()}
        assert {name: (of["score"], of["n"]) for name, of in scores.items()} == expected


def test_a_reply_that_is_missing_or_stands_twice_is_named():
    items = [row(name, 0) for name in "012"]
    rows = [row(name, 1.0, sample) for name in "012" for sample in (0, 1)]
    for replies, name in ((rows[1:], "'0', 0"), (rows[:4], "'2', 0"), (rows + rows[:1], "'0', 0"),
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


def test_a_comparison_lists_the_flipped_units_both_ways():
    both = metrics.compare("accuracy", rows_of([1, 1, 0, 0, 1]), rows_of([1, 0, 1, 1, 1])[::-1])
    assert sorted(both["gained"]) == ["2", "3"] and both["lost"] == ["1"] and both["sign"] == 1
    of = both["difference"]["accuracy"]
    assert (of["before"], of["after"]) == (0.6, 0.8) and of["low"] < 0.2 < of["high"]
    before = dynamath({"a": [1] * 10, "b": [0] * 10, "c": [0] + [1] * 9})
    after = dynamath({"a": [0] * 10, "b": [0] * 5 + [1] * 5, "c": [1] * 10})
    both = metrics.compare("worst of variants", before, after)
    assert (both["gained"], both["lost"]) == (["b", "c"], ["a"])
    assert both["difference"]["worst"]["before"] == both["difference"]["worst"]["after"]
    one, three = ([row(i, float(i < 2), j) for i in range(4) for j in range(k)] for k in (1, 3))
    both = metrics.compare("accuracy", one, three)  # of different k
    assert both["gained"] == both["lost"] == [] and both["sign"] == 1
    of = metrics.compare("accuracy", one, one[::-1])["difference"]["accuracy"]
    assert of["before"] == of["after"] and of["low"] == of["high"] == 0


def test_the_sign_test_is_the_exact_binomial_test():
    for gained, lost in itertools.combinations_with_replacement(range(6), 2):
        n = gained + lost
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        far = sum(abs(2 * k - n) >= abs(gained - lost) for k in outcomes)
        before, after = [0] * gained + [1] * (lost + 2), [1] * gained + [0] * lost + [1] * 2
        both = metrics.compare("accuracy", rows_of(before), rows_of(after))
        assert both["sign"] == approx(far / len(outcomes))


def test_the_interval_of_a_difference_is_of_pairs():
    rng = random.Random(0)
    before = [float(rng.random() < 0.5) for _ in range(400)]
    after = [max(b, float(i % 25 == 0)) for i, b in enumerate(before)]  # only ever better
    of = metrics.compare("accuracy", rows_of(before), rows_of(after))["difference"]["accuracy"]
    change = np.array(after) - before
    drawn = change[np.random.default_rng(0).integers(0, 400, (10_000, 400))].mean(axis=1)
    assert (of["low"], of["high"]) == approx(np.quantile(drawn, [0.025, 0.975]), abs=0.003)


def test_the_table_puts_the_papers_number_beside_ours():
    shares = summary("accuracy", rows_of([1, 1, 1, 0], chance=0.5), {"accuracy": 72.1})
    points = summary("mme sum", mme({"existence": [(1, 1), (1, 0)]}), {"perception": 1559.1})
    samples = summary("avg@k", [row(i, 1.0, j) for i in range(3) for j in range(4)])
    table = metrics.table({"mathvista": shares, "mme": points, "aime2024": samples})
    head, first, second, third = table.splitlines()
    assert head.split()[-1] == "paper" and first.split()[-1] == "72.1"
    assert first.split()[1:4] == ["accuracy", "75.0", "30.1"]
    assert "50.0" in first and "125.0" in second and second.endswith("1,559.1")
    assert head.index("chance") + len("chance") == first.index("50.0") + 4
    assert third.split()[:3] == ["aime2024", "avg@4", "100.0"]
