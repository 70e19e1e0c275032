"""Scores, intervals and tests against naive loops, exact enumeration and published figures."""

import csv
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from evaluation import metrics

PUBLISHED = Path(__file__).parents[2] / "shared/data/regression"


def row(name, score, sample=0, **more):
    """A graded reply, which is its own item. Its status is ok, or what `more` says."""
    told = {"id": str(name), "sample": sample, "score": score, "status": "ok", "extracted": "7"}
    return told | {"answer": "7", "tokens": 10, "chance": 0.0} | more


def rows_of(scores, **more):
    return [row(i, float(score), **more) for i, score in enumerate(scores)]


def scores(metric, rows):
    return metrics.measure(metric, rows).point()


def summary(metric, rows, **more):
    items = {row["id"]: row for row in rows}
    return metrics.summarise(metric, rows, [*items.values()], **more)


def headline(metric, rows):
    return {name: of["score"] for name, of in summary(metric, rows)["headline"].items()}


def grouped(name, score, sample=0, answer="A", **group):
    return row(name, float(score), sample, group=group, answer=answer)


# --- avg@k and intervals --------------------------------------------------------------------------


def test_avg_at_k_is_the_mean_over_items_of_their_means():
    rows = [row("a", s, i) for i, s in enumerate([1.0, 1.0, 0.0, 1.0])]
    rows += [row("b", s, i) for i, s in enumerate([0.0, 0.0, 0.0, 1.0])]
    told = summary("avg@k", rows)
    assert told["headline"].keys() == {"avg@4"} and (told["n"], told["k"]) == (2, 4)
    assert told["headline"]["avg@4"]["score"] == 0.5  # (3/4 + 1/4) / 2


def test_the_standard_error_is_that_of_the_items_not_of_the_replies():
    rng = random.Random(0)
    chances = [rng.random() for _ in range(60)]
    rows = [row(i, float(rng.random() < p), j) for i, p in enumerate(chances) for j in range(8)]
    means = [sum(r["score"] for r in rows if r["id"] == str(i)) / 8 for i in range(60)]
    exact = np.std(means, ddof=1) / math.sqrt(60)
    told = metrics.estimate(metrics.measure("avg@k", rows))["accuracy"]
    assert told["error"] == pytest.approx(exact, rel=0.03)
    mean = sum(means) / 60
    assert told["error"] > 1.5 * math.sqrt(mean * (1 - mean) / len(rows))


def test_drawing_kinds_of_units_is_drawing_units():
    terms = np.array([[0.0, 1], [0, 1], [0.5, 1], [1, 1], [1, 2]])
    rng = np.random.default_rng(1)
    naive = np.array([terms[rng.integers(0, 5, 5)].sum(axis=0) for _ in range(20_000)])
    ours = metrics.bootstrap(terms, 20_000)
    np.testing.assert_allclose(ours.mean(axis=0), naive.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(naive.T), rtol=0.05, atol=0.01)
    for level in (0.025, 0.5, 0.975):
        pair = [np.quantile(drawn, level, axis=0) for drawn in (ours, naive)]
        np.testing.assert_allclose(*pair, atol=0.5)
    assert metrics.bootstrap(terms.reshape(5, 2, 1), 9).shape == (9, 2, 1)
    assert (metrics.bootstrap(terms, 9) == metrics.bootstrap(terms, 9)).all()
    assert (metrics.bootstrap(terms, 9) != metrics.bootstrap(terms, 9, seed=1)).any()


def test_the_bootstrap_interval_covers_the_truth_in_95_of_100_experiments():
    """300 experiments of 100 items x 4 samples, item difficulties uniform: the truth is 0.5."""
    rng = np.random.default_rng(7)
    means = rng.binomial(4, rng.random((300, 100))) / 4  # (300, 100)
    covered, metric = 0, metrics.METRICS["accuracy"]
    for experiment in means:
        terms = np.stack([experiment, np.ones(100)], axis=-1)[:, None]
        measured = metrics.Measure(metric, ["accuracy"], [*range(100)], terms)
        told = metrics.estimate(measured, draws=2_000)["accuracy"]
        assert told["interval"] == "bootstrap"
        covered += told["low"] <= 0.5 <= told["high"]
    assert 0.91 <= covered / 300 <= 0.985  # 0.95 +- 3 standard errors of 0.0126


def test_wilson_gives_the_intervals_at_the_papers_numbers_and_solves_its_own_equation():
    """AIME24 45.7..78.3 (one sample), MathVision-mini 46..57, DynaMath 29.5..37.7."""
    for share, n, ends in ((0.635, 30, (45.7, 78.3)), (0.335, 501, (29.5, 37.7))):
        assert tuple(round(100 * x, 1) for x in metrics.wilson(share * n, n)) == ends
    assert [round(100 * x) for x in metrics.wilson(0.518 * 304, 304)] == [46, 57]
    for right, n in ((0, 5), (3, 30), (250, 500), (5, 5)):
        for end in metrics.wilson(right, n):
            if 0 < end < 1:  # (p - end)^2 = z^2 end (1 - end) / n
                gap = (right / n - end) ** 2 - metrics.Z**2 * end * (1 - end) / n
                assert abs(gap) < 1e-12


def test_a_model_that_always_fails_does_not_get_an_interval_of_no_width():
    told = summary("accuracy", rows_of([0] * 30))["headline"]["accuracy"]
    assert told["score"] == told["low"] == 0 and told["interval"] == "wilson"
    assert told["high"] == pytest.approx(0.1135, abs=1e-3)
    assert summary("accuracy", rows_of([1]))["headline"]["accuracy"]["error"] is None  # one item


# --- pass@k, maj@k --------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert metrics.pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_the_majority_is_the_mean_over_all_ways_to_break_the_tie_and_unparsed_never_wins():
    rng = random.Random(5)
    for _ in range(200):
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(rng.randint(1, 7))]
        right = [float(answer == "a") for answer in answers]
        count = Counter(answer for answer in answers if answer is not None)
        top = [answer for answer, n in count.items() if n == max(count.values())]
        expected = sum(answer == "a" for answer in top) / len(top) if top else 0
        assert metrics.majority(answers, right) == pytest.approx(expected)
    assert metrics.majority([], []) == 0


def test_the_caller_says_which_answers_are_equal():
    answers, right = ["1/2", "0.5", "3", "3"], [1.0, 1.0, 0.0, 0.0]
    assert metrics.majority(answers, right) == 0
    same = lambda a, b: Fraction(a) == Fraction(b)  # noqa: E731
    assert metrics.majority(answers, right, same) == 0.5
    assert metrics.majority(answers[:3], right[:3], same) == 1


def test_a_summary_of_k_samples_has_pass_and_majority_over_items():
    rows = [row("a", float(i < 2), i, extracted="xy"[i < 2]) for i in range(4)]
    rows += [row("b", float(i < 3), i, extracted="xy"[i < 3]) for i in range(4)]
    told = summary("avg@k", rows)["samples"]
    assert list(told) == ["pass@1", "pass@2", "pass@4", "maj@4"]
    assert told["pass@1"]["score"] == (2 / 4 + 3 / 4) / 2
    assert told["pass@2"]["score"] == pytest.approx((1 - 1 / 6 + 1) / 2)
    assert told["maj@4"]["score"] == (0.5 + 1) / 2


# --- DynaMath, WeMath -----------------------------------------------------------------------------


def dynamath(table):
    """{question: [score of each variant]} -> rows."""
    return [
        grouped(f"{q}/{v}", score, question=q, variant=v)
        for q, variants in table.items()
        for v, score in enumerate(variants)
    ]


def test_dynamath_counts_a_missing_variant_as_wrong_and_refuses_one_that_stands_twice():
    rows = dynamath({"a": [1] * 10, "b": [1] * 9, "c": [0] * 10, "d": [1] + [0] * 9})
    told = summary("worst of variants", rows)
    assert headline("worst of variants", rows) == {"worst": 0.25, "average": 0.5, "best": 0.75}
    assert told["missing_variants"] == 1 and told["units"] == 4
    assert "dynamath: 1 missing variants, counted as wrong" in metrics.table({"dynamath": told})
    rows[3]["group"]["variant"] = 2
    with pytest.raises(ValueError, match="question 'a' has a variant twice"):
        metrics.measure("worst of variants", rows)


def test_variants_of_different_samples_are_not_combined():
    rows = dynamath({"a": [1] * 10})
    rows += [r | {"sample": 1, "score": float(i > 0)} for i, r in enumerate(rows)]
    assert scores("worst of variants", rows)["worst"] == 0.5


def test_dynamaths_official_table_gives_its_official_figures():
    path = PUBLISHED / "dynamath_gpt4o_variants.csv"
    if not path.exists():
        pytest.skip("the official table is not here")
    with path.open() as file:
        lines = [line for line in csv.reader(file) if line[0][:1] == "Q" and line[0][1:].isdigit()]
    rows = dynamath({line[0]: [cell == "correct" for cell in line[1:11]] for line in lines})
    told = {name: round(100 * of, 1) for name, of in headline("worst of variants", rows).items()}
    assert len(lines) == 501 and told == {"worst": 34.7, "average": 63.3, "best": 90.2}


def wemath(problems):
    """{problem: (scores of the steps, score of the whole)} -> rows."""
    rows = []
    for problem, (steps, whole) in problems.items():
        keys = [f"{len(steps)}steps_{i + 1}" for i in range(len(steps))]
        keys += [f"{len(steps)}steps_multi"]
        for key, score in zip(keys, [*steps, whole], strict=True):
            more = {"problem": problem, "part": key}
            rows.append(grouped(f"{problem}/{key}", score, **more) | {"chance": 0.25})
    return rows


def official(problems):
    """strict and loose score as published: (n - IG / 2 - RM - IK) / n; counts by name."""
    count = Counter()
    for steps, whole in problems.values():
        if whole:
            count["CM strict" if all(steps) else "RM strict"] += 1
            count["CM loose" if any(steps) else "RM loose"] += 1
        else:
            count["IG" if all(steps) else "IK"] += 1
    n = len(problems)
    lost = n - count["IG"] / 2 - count["IK"]
    return (lost - count["RM strict"]) / n, (lost - count["RM loose"]) / n, count


def full_size(draw):
    return {i: ([draw() for _ in range(2 if i < 360 else 3)], draw()) for i in range(525)}


def test_wemath_agrees_with_the_published_formula():
    assert headline("strict and loose", wemath(full_size(lambda: 1))) == {"strict": 1, "loose": 1}
    rng = random.Random(2)
    for p in (0.2, 0.5, 0.9):
        problems = full_size(lambda p=p: int(rng.random() < p))
        strict, loose, count = official(problems)
        told = scores("strict and loose", wemath(problems))
        assert (told["strict"], told["loose"]) == pytest.approx((strict, loose), abs=1e-12)
        assert {name: 525 * told[name] for name in count} == pytest.approx(count)


def test_wemaths_chance_is_the_exact_expectation_over_all_outcomes():
    expected = {}
    for steps in (2, 3):
        expected[steps] = [Fraction(0), Fraction(0)]
        for outcome in itertools.product((0, 1), repeat=steps + 1):
            weight = math.prod(Fraction(1, 4) if right else Fraction(3, 4) for right in outcome)
            of_one = official({0: (outcome[:-1], outcome[-1])})
            for i in (0, 1):
                expected[steps][i] += weight * Fraction(of_one[i])
    told = metrics.chance("strict and loose", wemath(full_size(lambda: 0)))
    for i, name in enumerate(("strict", "loose")):
        exact = (360 * expected[2][i] + 165 * expected[3][i]) / 525
        assert told[name] == pytest.approx(float(exact), abs=1e-12)
    assert (round(100 * told["strict"], 2), round(100 * told["loose"], 2)) == (2.99, 13.83)


def test_wemath_refuses_a_problem_without_all_its_steps():
    rows = wemath({"p1": ([1, 1], 1), "p2": ([1, 0, 1], 1)})
    with pytest.raises(ValueError, match="WeMath's problem p2 lacks steps"):
        metrics.measure("strict and loose", [r for r in rows if r["id"] != "p2/3steps_2"])


# --- MMBench, HallusionBench, POPE, MME, MMMU-Pro -------------------------------------------------


def test_a_question_counts_only_if_all_its_rotations_are_right():
    table = {"a": [1, 1, 1, 1], "b": [1, 1, 0], "c": [0, 0], "d": [1, 1]}
    rows = [grouped(f"{q}{i}", s, question=q) for q in table for i, s in enumerate(table[q])]
    assert scores("circular", rows) == {"circular": 0.5, "rows": pytest.approx(8 / 11)}
    told = summary("circular", rows)["headline"]
    assert (told["circular"]["interval"], told["rows"]["interval"]) == ("wilson", "bootstrap")
    with pytest.raises(ValueError, match="has 3 of its rotations"):
        short = [grouped(f"a{i}", 1, question="a", of=4) for i in range(3)]
        metrics.measure("circular", short)


def hallusion_rows():
    """Real figures and questions; which replies are right is drawn."""
    path, rng = PUBLISHED / "hallusion_result_sample.json", random.Random(0)
    if path.exists():
        real = json.loads(path.read_text())
    else:
        cells = itertools.product("ab", range(8), range(3), range(4))
        names = ("category", "set_id", "figure_id", "question_id")
        real = [dict(zip(names, cell, strict=True)) | {"subcategory": ""} for cell in cells]
    rows = []
    for i, r in enumerate(real):
        place = (r["category"], r["subcategory"], r["set_id"])
        group = {"figure": (*place, r["figure_id"]), "question": (*place, r["question_id"])}
        rows.append(grouped(i, rng.random() < 0.8, answer="yes", set=place, **group))
    return rows


def test_hallusionbench_agrees_with_naive_groups_and_draws_whole_sets():
    rows = hallusion_rows()
    naive = []
    for name in ("figure", "question"):
        groups = defaultdict(list)
        for r in rows:
            groups[r["group"][name]].append(r["score"] == 1)
        naive.append(sum(map(all, groups.values())) / len(groups))
    naive = [sum(r["score"] for r in rows) / len(rows), *naive]
    told = summary("hallusion", rows)
    assert list(told["headline"]) == ["mean", "aAcc", "fAcc", "qAcc"]
    found = [of["score"] for of in told["headline"].values()]
    assert found == pytest.approx([sum(naive) / 3, *naive])
    assert all(of["low"] < of["score"] < of["high"] for of in told["headline"].values())
    assert told["units"] == len({r["group"]["set"] for r in rows})
    assert json.loads(json.dumps(told)) == told  # a summary is JSON
    other = summary("hallusion", random.Random(1).sample(rows, len(rows)))["headline"]
    assert all(of == pytest.approx(other[name]) for name, of in told["headline"].items())


def yes_no(pairs):
    """[(gold, said)] -> rows; said None: unparsed."""
    told = [(gold, said, "ok" if said else "unparsed") for gold, said in pairs]
    return [
        row(i, float(said == gold), answer=gold, extracted=said, status=status, chance=0.5)
        for i, (gold, said, status) in enumerate(told)
    ]


def test_pope_reads_lists_as_a_naive_count_does():
    rng = random.Random(4)
    for _ in range(30):
        pairs = [(rng.choice(["yes", "no"]), rng.choice(["yes", "no", None])) for _ in range(25)]
        tp, fp = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
        positives = sum(gold == "yes" for gold, _ in pairs)
        told = scores("f1", yes_no(pairs))
        assert told["precision"] == pytest.approx(tp / (tp + fp) if tp + fp else 0)
        assert told["recall"] == pytest.approx(tp / positives)
        assert told["f1"] == pytest.approx(2 * tp / (tp + fp + positives))
        assert told["yes ratio"] == pytest.approx((tp + fp) / 25)  # unparsed says neither


def test_pope_reads_yes_in_any_case_and_only_of_replies_that_were_parsed():
    said = [("Yes", "ok"), ("yes", "refused"), (None, "truncated")]
    rows = [
        row(i, 0.0, answer="No", extracted=w, status=status) for i, (w, status) in enumerate(said)
    ]
    assert scores("f1", rows)["yes ratio"] == pytest.approx(1 / 3)
    assert headline("f1", yes_no([("yes", "no"), ("no", "no")]))["f1"] == 0
    with pytest.raises(ValueError, match="'maybe' is neither yes nor no"):
        metrics.measure("f1", yes_no([("maybe", "yes")]))


def mme(table):
    """{category: [(score, score) of an image]} -> rows."""
    return [
        grouped(f"{of}/{i}/{j}", score, image=f"{of}/{i}") | {"category": of, "chance": 0.5}
        for of, images in table.items()
        for i, pair in enumerate(images)
        for j, score in enumerate(pair)
    ]


def test_mme_sums_acc_and_acc_plus_of_each_category():
    every = mme({of: [(1, 1)] * 3 for of in metrics.PERCEPTION + metrics.COGNITION})
    assert headline("mme sum", every) == pytest.approx({"perception": 2000, "cognition": 800})
    rows = mme({"existence": [(1, 1), (1, 0), (0, 0), (1, 1)], "OCR": [(1, 0), (1, 1)]})
    told = scores("mme sum", rows)
    # existence: 5 of 8 right, 2 of 4 images: 62.5 + 50; OCR: 3 of 4 and 1 of 2: 75 + 50
    assert told["perception"] == pytest.approx(237.5) and "cognition" not in told
    assert (told["existence acc"], told["existence acc+"]) == pytest.approx((0.625, 0.5))
    with pytest.raises(ValueError, match="MME's image OCR/1 has 1 questions"):
        metrics.measure("mme sum", rows[:-1])
    with pytest.raises(ValueError, match="category juggling"):
        metrics.measure("mme sum", mme({"juggling": [(1, 1)]}))


def test_mmes_interval_is_that_of_images_drawn_anew():
    rng = random.Random(0)
    table = {of: [(rng.random() < 0.8, rng.random() < 0.8) for _ in range(20)] for of in
             ("existence", "count", "color")}  # fmt: skip
    told = metrics.estimate(metrics.measure("mme sum", mme(table)))["perception"]
    generator, naive = np.random.default_rng(0), []
    for _ in range(3_000):
        total = 0
        for images in table.values():
            drawn = np.array(images, dtype=float)[generator.integers(0, 20, 20)]
            total += 100 * (drawn.mean() + drawn.prod(axis=1).mean())
        naive.append(total)
    assert told["error"] == pytest.approx(np.std(naive), rel=0.08)
    assert told["low"] == pytest.approx(np.quantile(naive, 0.025), abs=8)


def test_mmmu_pro_is_the_mean_of_its_two_forms_and_draws_a_question_in_both():
    rng = random.Random(0)
    easy = [rng.random() for _ in range(300)]
    standard, vision = (
        [row(f"{name}/q{i}", float(e < bar)) for i, e in enumerate(easy)]
        for name, bar in (("mmmu_pro", 0.6), ("mmmu_pro_vision", 0.4))
    )
    rows = metrics.as_parts({"mmmu_pro": standard, "mmmu_pro_vision": vision})
    told = summary("mean of parts", rows)
    a, b = (sum(r["score"] for r in part) / 300 for part in (standard, vision))
    found = {name: of["score"] for name, of in told["headline"].items()}
    assert found == pytest.approx({"mean": (a + b) / 2, "mmmu_pro": a, "mmmu_pro_vision": b})
    per_question = [(x["score"] + y["score"]) / 2 for x, y in zip(standard, vision, strict=True)]
    exact = np.std(per_question, ddof=1) / math.sqrt(300)
    assert told["headline"]["mean"]["error"] == pytest.approx(exact, rel=0.03)
    assert told["units"] == 300


# --- chance ---------------------------------------------------------------------------------------


def test_chance_of_each_metric_is_what_many_guesses_score():
    """A random model, 3,000 times, through the shipped metric; the expectation samples nothing."""
    rng, half = random.Random(0), {"chance": 0.5}
    items = {
        "worst of variants": [r | half for r in dynamath({"q": [0] * 3})],
        "circular": [grouped(f"{q}{i}", 0, question=q) | {"chance": 1 / 3}
                     for q in "ab" for i in range(2 + (q == "b"))],
        "hallusion": [grouped(f"{f}{q}", 0, figure=f, question=q, set="s") | half
                      for f in "ab" for q in "xyz"],
        "mme sum": mme({"existence": [(0, 0)] * 2, "count": [(0, 0)], "code_reasoning": [(0, 0)]}),
        "strict and loose": wemath({"p": ([0, 0], 0), "q": ([0, 0, 0], 0)}),
    }  # fmt: skip
    for metric, asked in items.items():
        known, total = metrics.chance(metric, asked), Counter()
        for _ in range(3_000):
            replies = [i | {"score": float(rng.random() < i["chance"])} for i in asked]
            total.update(scores(metric, replies))
        scale = 200 if metric == "mme sum" else 1
        for name, expected in known.items():
            assert total[name] / 3_000 == pytest.approx(expected, abs=0.05 * scale), (metric, name)


def test_the_closed_forms_of_chance():
    every = mme({of: [(0, 0)] * 2 for of in metrics.PERCEPTION + metrics.COGNITION})
    told = metrics.chance("mme sum", every)  # 50 for acc and 25 for acc+ a category
    assert (told["perception"], told["cognition"]) == pytest.approx((750, 300))
    ten = [r | {"chance": 0.25} for r in dynamath({"a": [0] * 10})]
    told = metrics.chance("worst of variants", ten)
    assert told == pytest.approx({"worst": 0.25**10, "average": 0.25, "best": 1 - 0.75**10})
    balanced = metrics.chance("f1", yes_no([("yes", None), ("no", None)] * 5))
    assert balanced["f1"] == balanced["precision"] == balanced["accuracy"] == 0.5


# --- what stands beside the score -----------------------------------------------------------------


def test_the_upper_bound_is_told_when_more_than_5_percent_are_truncated():
    cut = {"status": "truncated", "extracted": None}
    rows = rows_of([1] * 50 + [0] * 40) + [row(f"t{i}", 0.0, **cut) for i in range(10)]
    told = summary("accuracy", rows)
    assert told["truncated"] == 0.1 and told["at_most"] == {"accuracy": 0.6}
    assert told["status"] == {"ok": 90, "truncated": 10}
    few = summary("accuracy", rows_of([1] * 95) + rows[-5:])
    assert few["truncated"] == 0.05 and "at_most" not in few
    pairs = [("yes", "yes"), ("no", "yes"), ("yes", None), ("no", None)]
    rows = [r | {"status": "truncated"} if r["extracted"] is None else r for r in yes_no(pairs)]
    assert metrics.at_most("f1", rows)["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))


def test_what_no_rule_can_grade_is_left_out_with_its_samples_and_its_group_and_said_so():
    rows = rows_of([1, 1, 0], chance=0.5) + [row(f"j{i}", None) for i in range(4)]
    told = summary("accuracy", rows)
    assert told["headline"]["accuracy"]["score"] == pytest.approx(2 / 3)
    assert (told["n"], told["left_out"], told["chance"]) == (3, 4, {"accuracy": 0.5})
    assert "4 left out of the rule's score: no rule can grade them" in metrics.table({"x": told})
    rows = [row("a", 1.0, 0), row("a", None, 1), row("b", 0.0, 0), row("b", 1.0, 1)]
    told = summary("avg@k", rows)
    assert told["left_out"] == 1 and told["headline"]["avg@2"]["score"] == 0.5
    rows = wemath({"p": ([1, 1], 1), "q": ([1, 0, 1], 0)})
    rows[0]["score"] = None
    told = summary("strict and loose", rows)
    assert (told["left_out"], told["n"], told["units"]) == (3, 4, 1)
    told = summary("accuracy", [row(i, None) for i in range(3)])  # MM-Vet without a judge: no 0
    assert told["headline"] == {} and told["left_out"] == 3
    assert metrics.table({"mmvet": told}).count("mmvet") == 1


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
    told = summary("accuracy", rows, paper={"accuracy": 54.6})
    assert told["headline"]["accuracy"]["score"] == 3 / 6 and told["left_out"] == 1
    judge = told["judge"]
    assert judge["headline"]["accuracy"]["score"] == 3 / 5 and judge["n"] == 5
    assert judge["no_verdict"] == 1 and judge["agreement"] == 2 / 3
    text = metrics.table({"mathverse": told})
    assert "accuracy, judge" in text and "its verdict cannot be read" in text
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == ["54.6", "54.6"]
    assert summary("accuracy", rows_of([1, 0]))["judge"] is None
    rows = [row(i, 1.0, j, judge_score=float(j)) for i in range(3) for j in range(2)]
    assert summary("accuracy", rows)["judge"]["headline"].keys() == {"avg@2"}


def test_categories_seen_sources_and_not_applicable_are_told_apart():
    rows = [
        row(0, 1.0, category="algebra", seen=True),
        row(1, 0.0, category="algebra", seen=False),
        row(2, 1.0, category="graphs", seen=False),
        row(3, 1.0, category="graphs", seen=False, answer="Not Applicable"),
    ]
    told = summary("accuracy", rows)
    means = {name: of["accuracy"]["score"] for name, of in told["categories"].items()}
    assert means == {"algebra": 0.5, "graphs": 1.0}
    assert told["source"]["seen"]["n"] == 1 and told["source"]["unseen"]["n"] == 3
    assert told["applicable"]["not applicable"]["accuracy"]["score"] == 1
    assert told["applicable"]["applicable"]["accuracy"]["score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("metric", "rows", "message"),
    [
        ("accuracy", [row("a", 1.0), row("a", 0.0)], r"stand twice.*\('a', 0\)"),
        ("accuracy", [row("a", 1.0), row("b", 0.0), row("b", 0.0, 1)], "a has 1"),
        ("accuracy", [row("a", 2.0)], "a: score 2.0 is not between 0 and 1"),
        ("accuracy", [row("a", math.nan)], "a: score nan"),
        ("circular", [row("a", 1.0)], "a: the metric needs a group 'question'"),
    ],
)
def test_rows_amiss_are_refused_by_name(metric, rows, message):
    with pytest.raises(ValueError, match=message):
        summary(metric, rows)


def test_items_without_a_reply_are_named():
    items = [row(name, 0) for name in "012"]
    wanted = r"without a reply: \['2'\]; replies without an item: \[\]"
    with pytest.raises(ValueError, match=wanted):
        metrics.summarise("accuracy", rows_of([1, 0]), items)
    with pytest.raises(ValueError, match="no row has a score"):
        metrics.measure("accuracy", [])
    assert summary("accuracy", [])["headline"] == {}


# --- two runs -------------------------------------------------------------------------------------


def test_two_runs_are_compared_on_the_same_items_only():
    before, after = rows_of([1, 0, 1]), rows_of([1, 0, 1, 1])[1:]
    with pytest.raises(ValueError, match=r"1 only before, as \['0'\]; 1 only after, as \['3'\]"):
        metrics.compare("accuracy", before, after)
    other = [r | {"answer": "8"} for r in before]
    with pytest.raises(ValueError, match="3 items have another gold after: .\"0: '7', '8'"):
        metrics.compare("accuracy", before, other)
    before = [grouped(i, 1, question=i // 2) for i in range(4)]
    after = [grouped(i, 1, question=i % 2 + 5) for i in range(4)]
    with pytest.raises(ValueError, match="group the same items differently"):
        metrics.compare("circular", before, after)


def test_a_comparison_lists_the_flipped_items_both_ways():
    told = metrics.compare("accuracy", rows_of([1, 1, 0, 0, 1]), rows_of([1, 0, 1, 1, 1])[::-1])
    assert sorted(told["gained"]) == ["2", "3"] and told["lost"] == ["1"]
    assert told["mcnemar"] == {"gained": 2, "lost": 1, "p": 1.0}
    of = told["difference"]["accuracy"]
    assert (of["before"], of["after"]) == (0.6, 0.8) and of["difference"] == pytest.approx(0.2)


def test_the_sign_test_is_the_exact_binomial_test_and_counts_units():
    for gained, lost in itertools.product(range(7), range(7)):
        n = gained + lost
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        far = sum(abs(2 * k - n) >= abs(gained - lost) for k in outcomes)
        assert metrics.sign_test(gained, lost) == pytest.approx(far / len(outcomes))
    assert metrics.sign_test(3_000, 2_000) < 1e-40
    before = dynamath({"a": [1] * 10, "b": [0] * 10, "c": [0] + [1] * 9})
    after = dynamath({"a": [0] * 10, "b": [0] * 5 + [1] * 5, "c": [1] * 10})
    told = metrics.compare("worst of variants", before, after)
    assert told["mcnemar"] == {"gained": 2, "lost": 1, "p": 1.0}
    assert len(told["gained"]) == 6 and len(told["lost"]) == 10
    assert told["difference"]["worst"]["difference"] == 0


def test_the_paired_bootstrap_sees_what_unpaired_intervals_do_not():
    rng = random.Random(0)
    before = [rng.random() < 0.5 for _ in range(400)]
    after = [b or i % 25 == 0 for i, b in enumerate(before)]  # only ever better
    told = metrics.compare("accuracy", rows_of(before), rows_of(after))
    of = told["difference"]["accuracy"]
    assert of["low"] > 0 and of["p"] < 0.05 and not told["lost"]
    apart = [summary("accuracy", rows_of(r))["headline"]["accuracy"] for r in (before, after)]
    assert apart[1]["low"] < apart[0]["high"]
    change = np.array(after, float) - np.array(before, float)
    drawn = change[np.random.default_rng(0).integers(0, 400, (10_000, 400))].mean(axis=1)
    naive = np.quantile(drawn, [0.025, 0.975])
    assert (of["low"], of["high"]) == pytest.approx(naive, abs=0.005)


def test_p_is_twice_the_share_of_draws_on_the_smaller_side():
    draws = np.array([-1.0] * 4 + [1e-17] * 2 + [1.0] * 93)
    told = metrics.spread(draws, 0.5)
    assert told["p"] == 2 * (4 + 2 + 1) / 100 and told["difference"] == 0.5


def test_a_run_compared_with_itself_differs_in_nothing():
    for metric, rows in (
        ("hallusion", hallusion_rows()),
        ("mme sum", mme({"existence": [(1, 1), (1, 0)], "ocr": [(0, 1), (1, 1)]})),
    ):
        told = metrics.compare(metric, rows, rows[::-1])
        for of in told["difference"].values():
            assert of["difference"] == of["low"] == of["high"] == 0 and of["p"] == 1
        assert told["gained"] == told["lost"] == [] and told["mcnemar"]["p"] == 1


# --- the table ------------------------------------------------------------------------------------


def test_the_table_puts_the_papers_number_beside_ours():
    told = summary("accuracy", rows_of([1, 1, 1, 0], chance=0.5), paper={"accuracy": 72.1})
    points = mme({"existence": [(1, 1), (1, 0)]})
    points = summary("mme sum", points, paper={"perception": 1559.1})
    head, first, second = metrics.table({"mathvista": told, "mme": points}).splitlines()[:3]
    assert head.split()[-1] == "paper" and first.split()[-1] == "72.1"
    score, error = first.split("mathvista")[1].split()[1:4:2]  # 75.0 ± 25.0: sd 0.5 / sqrt(4)
    assert score == "75.0" and float(error) == pytest.approx(25, abs=0.5)
    assert "50.0" in first and "125.0" in second and second.endswith("1,559.1")
    assert head.index("chance") + len("chance") == first.index("50.0") + 4
    samples = [row(i, 1.0, j) for i in range(3) for j in range(4)]
    assert summary("avg@k", samples, paper={"accuracy": 63.5})["paper"] == {"avg@4": 63.5}
