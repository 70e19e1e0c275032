r"""Does the matcher pay for right answers only? One group of tests a policy rule, then labelled
pairs, then attacks, then oracles: hypothesis writes one value in many ways, and plain Fractions,
or sympy, say what is equal. Hostile inputs are counted in work, not in seconds.

    pytest tests/test_reward.py
"""

import json
import multiprocessing
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
import tyro
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from work import lines_run

import reward
from reward import Verdict, grade

warnings.filterwarnings("error", "the matcher failed")  # the net of grade must stay empty


def score(gold, box, **options):
    return grade(gold, f"so the answer is $\\boxed{{{box}}}$.", **options).score


# --- the policy

ENDS = [  # of responses to the gold 4
    (r"I think \boxed{3}. No: \boxed{4}", "match", "4"),
    (r"first \boxed{4}, which is wrong, hence \boxed{3}", "mismatch", "3"),
    (r"\boxed{4} and then much text without a box", "match", "4"), (r"\boxed {4}", "match", "4"),
    (r"\boxed{\boxed{4}}", "match", r"\boxed{4}"),
    (r"\boxed{\text{not }\boxed{4}}", "mismatch", r"\text{not }\boxed{4}"),
    ("the answer is 4", "no_box", None), (r"\fbox{4}", "no_box", None), ("", "no_box", None),
    (r"\boxed{4", "unclosed", None), (r"\boxed{4} no, \boxed{", "unclosed", None),
    (r"\boxed{4\}", "unclosed", None), (r"\boxed{4} or \boxed{5}", "hedged", r"4 \text{ or } 5"),
    (r"$\boxed{4}$ / $\boxed{5}$", "hedged", r"4 \text{ or } 5"),
    (r"\boxed{4} or \boxed{\frac82}", "match", r"4 \text{ or } \frac82"),
    (r"<think>\boxed{5}</think> It is \boxed{4}.", "match", "4"),
    (r"\boxed{4 \text{ or } 5}", "hedged", r"4 \text{ or } 5"), (r"\boxed{}", "unparsed", ""),
    (r"\boxed{\square}", "unparsed", r"\square"),
    ("\\boxed{4" + " " * 3_000 + "}", "too_big", None),
]  # fmt: skip


@pytest.mark.parametrize(("response", "status", "answer"), ENDS)
def test_rule_1_the_last_closed_box_counts_and_every_score_has_a_status(response, status, answer):
    assert grade("4", response) == Verdict(float(status == "match"), status, answer)


def test_rule_1_boxes_joined_by_and_are_a_list_but_not_those_joined_by_or():
    assert grade("4, 5", r"\boxed{4} and \boxed{5}").status == "match"
    assert grade("4, 5", r"\boxed{4} or \boxed{5}").status == "hedged"
    assert grade("5, 5", ("\\boxed{5" + " " * 1_500 + "},") * 2).status == "too_big"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(__file__).with_name(name).open()]


@pytest.mark.parametrize("rule", [f"rule_{n}" for n in range(1, 9)])
def test_each_example_of_a_policy_rule_has_its_verdict(rule):
    wrong, cases = [], [case for case in rows("reward_rules.jsonl") if case["kind"] == rule]
    for case in cases:
        options = {key: case.get(key) for key in ("choices", "precision", "digits")}
        verdict = grade(case["gold"], case["response"], **options)
        wrong += [(case, verdict)] if verdict.score != case["label"] else []
    assert {case["label"] for case in cases} == {0, 1} and not wrong


def test_the_command_line_explains_and_scores_files(tmp_path, capsys):
    def said(*arguments) -> str:
        tyro.cli(reward.main, args=arguments)
        return capsys.readouterr().out

    explained = said("--gold", "0.5", "--response", r"\boxed{\frac12}")
    assert "score 1" in explained and "0.5" in explained and "1/2" in explained
    cases = tmp_path / "cases.jsonl"
    right = {"gold": "1", "response": r"\boxed{1}", "label": 1}
    wrong = right | {"gold": "2", "kind": "odd"}
    cases.write_text(f"{json.dumps(right)}\n{json.dumps(wrong)}\n")
    scored = said(str(cases))
    assert "line 2 false negative odd" in scored and "1 of     2" in scored
    cases.write_text('{"gold": "1"}\n')
    with pytest.raises(SystemExit, match="line 1: .*response"):
        said(str(cases))


ODD = [  # texts on the edge of what is read: each ends in a verdict, by the rule beside it
    ("5", "1 3/2", 0),  # no mixed number
    ("a_{1", "a_1", 1),  # a damaged gold is compared like words
    ("5", r"\begin{pmatrix}1&2\\3\end{pmatrix}", 0),  # rows of different lengths
    ("5", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", 0),  # powers of matrices are not read
    (r"\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}1\\2\end{pmatrix}",
     r"\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}1\\3\end{pmatrix}", 0),
    ("5", r"2^{20000} \cdot 2^{20000}", 0), ("x", "x^{2^{70}}", 0),
    (r"\sqrt{10^{90}+1}", r"\sqrt{1+10^{90}}", 1),  # too long to look for a whole root
    ("5", r"\lfloor i \rfloor", 0), ("5", r"\log_1 5", 0), ("5", r"\ln 0", 0),
    ("5", r"\max(3, 5, 2)", 1), ("5", r"\max(3, 5, i)", 0), ("\\min(\\pi, 3)", "3", 1),
    ("3:30 pm", "x:30 pm", 0), ("a:b", "a:c", 0), (r"5 \text{ m/s}", "5 m*x", 0),
    ("x > 2", "1 < x > 2", 0), ("x > 2", "1 < x < 2 < 3", 0), ("x < y < z", "x < y < z", 1),
    ("x < 4", "2x < x + 4", 1), ("x < 4", "x < i", 0), ("|x| < 1", "|x| < -1", 0),
    ("|x-1| > 2", r"x < -1 \text{ or } x > 3", 1), (r"\frac1x < 2", "2 > 1/x", 1),
    (r"\sqrt{x-2} < 1", r"\sqrt{x-2} < 1.0", 1), (r"[0,1) \cup", r"[0,1)", 0),
    (r"(0, a) \cup (b, c)", r"(b, c) \cup (0, a)", 1),  # ends without an order
    (r"(0,1) \cup (2,3)", "(3,2), (1,0)", 0), ("96\n376", "96, 376", 1),
    (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k", 1),  # written alike, not summed
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", 0),
    (r"\overline{z}", "z", 0), ("sinx", r"\sin x", 1), (r"\{a, b\}", r"x = \{b, a\}", 1),
    ("x + y < 1", "2x + 2y < 2", 1), ("x + y < 1", "-x - y < -1", 0),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "box", "expected"), ODD)
def test_odd_texts_end_in_a_verdict(gold, box, expected):
    assert score(gold, box) == expected


def test_a_fault_of_the_matcher_costs_one_answer_and_not_the_run(monkeypatch):
    monkeypatch.setattr(reward, "clean", lambda text: 1 / 0)
    with pytest.warns(match="failed on gold '1/2': ZeroDivisionError"):
        assert grade("1/2", r"\boxed{0.5}") == (0.0, "failed", "0.5")


MISSES = {  # right answers that get 0, and why: what would read them is not worth its lines
    r"\text{2020-07-04}": "dates in figures", r"\text{third}": "ordinal numbers in words",
    r"2\text{ hours and }15\text{ minutes}": "sums of units",
    r"135 \text{ minutes}": "sums of units",
    r"y=\frac{6}{x}": "equations that differ by a factor with symbols",
    "5, 7": "a list for labelled parts", r"\frac{3}{4},\ 2": "a list for labelled parts",
    r"\begin{cases} m=4 \\ n=9 \end{cases}": "systems",
    r"\begin{aligned} p&=7 \\ q&=11 \end{aligned}": "systems",
    r"a_n = \begin{cases} 3 & n = 1 \\ 2n & n \ge 2 \end{cases}": "functions by cases",
}  # fmt: skip


def test_the_labelled_pairs_are_graded_as_a_careful_human_does():
    paid, missed = [], []
    for case in rows("reward_pairs.jsonl") + rows("reward_reports.jsonl"):
        verdict = grade(case["gold"], case["response"], choices=case.get("choices"))
        if verdict.score > case["label"]:
            paid.append((case, verdict))
        if verdict.score < case["label"]:
            missed.append(str(verdict.answer).strip())
    assert not paid
    assert sorted(missed) == sorted(MISSES)  # each once


# --- attacks

ATTACKS = [
    "__import__('os').system('touch {marker}')", "[5,__import__('os').system('touch {marker}')][0]",
    "exec(\"open('{marker}','w')\")", "open('{marker}','w').write('5')",
    "x.__class__.__mro__[-1].__subclasses__()", "quit()", "int('5')", "5 if True else 4",
    "solve(x-5,x)[0]", "f'5'", "5; import os", "raise SystemExit",
]  # fmt: skip


def test_code_is_never_run_and_never_paid(tmp_path):
    marker = tmp_path / "executed"
    for attack in ATTACKS:
        assert score("5", attack.replace("{marker}", str(marker))) == 0, attack
    assert not marker.exists()


def test_vague_answers_earn_nothing():
    vague = ["~", "?", "x", r"\ldots", "5,6,7,8", "[4,6]", r"\mathbb{R}", "NaN", r"\frac00", "5!!"]
    vague += [r"\text{5 or 6}", r"\text{either 5 or 6}", r"5 \to 6", r"\neq 5", "5_{10}", "5,"]
    vague += ["5.5.5", "(5", "5)", "[5]", "5|", "5/", "5+", r"5\%\%", "0/0+5", r"5\text{ or so}"]
    vague += ["1O", "⁵"]
    of_zero = [r"\infty-\infty", r"\text{None}", "0/0", "0=0"]
    for gold, boxes in (("5", vague), ("0", of_zero), ("1", ["0^0", "1=1", r"\text{True}"])):
        assert [box for box in boxes if score(gold, box)] == []


HEAVY = [
    "9^{9^{9^9}}", "9**9**9**9", "10^{1000000000}", "(10^9)!", r"\binom{10^9}{5}", "9" * 1_900,
    "1/" * 900 + "1", "(" * 900 + "5" + ")" * 900, "x^" * 290 + "x", r"\sqrt" * 300 + "2",
    r"\frac" * 300 + "12", "-" * 1_900 + "5", ",".join(["(x+y+z+w+1)^{20}"] * 35),
    "x=(" + "(x+y+z+w+1)^9,x=(" * 25 + ")" * 26, r"(1+\sqrt{2}+\sqrt{3}+\sqrt5+\sqrt7)^{20}",
    r"\text{" * 300 + "}" * 300, "1," * 900, "or " * 600, "5" + " " * 1_900, "1e9999",
    ",".join(["x^2=2^{30000}x+y"] * 60), "`a " * 290, ",".join(f"x={k}" for k in range(63)),
    " or ".join(f"x<{k}" for k in range(60)), "\\cup ".join(f"({k},{k + 1})" for k in range(60)),
    "+".join(["3^{9999}"] * 110), "\\frac" * 5 + "1" * 1_900, "0.1\\overline{" + "3" * 1_800 + "}",
    r"5\text{" + "m" * 1_000 + "}x", "5" + "m^{2}" * 60 + "x", "½" * 1_900,
]  # fmt: skip


@pytest.mark.parametrize("gold", ["5", "x > 2", "(1, 2)"])
@pytest.mark.parametrize("box", HEAVY, ids=lambda box: box[:16])
def test_heavy_boxes_are_little_work(box, gold):
    verdicts = []
    work = lines_run(lambda: verdicts.append(grade(gold, f"\\boxed{{{box}}}")))
    assert work < 150_000
    assert verdicts[0].score == (box.strip() == gold)


LONG = ["\\boxed{" * 50_000, "\\boxed{5}," * 50_000, "{" * 1_000_000, "\\boxed{" + "{" * 1_000_000,
        "\\boxed{" * 500 + "5" + "}" * 500]  # fmt: skip


@pytest.mark.parametrize("response", LONG, ids=lambda response: response[:10])
def test_heavy_responses_are_little_work(response):
    assert lines_run(grade, "7", response) < 60_000


def grade_odd(_=None) -> list[float]:
    return [score(gold, box) for gold, box, _ in ODD]


def test_it_works_in_many_threads_at_once_and_after_a_fork():
    right, verdicts = [float(expected) for *_, expected in ODD], []
    work = [threading.Thread(target=lambda: verdicts.append(grade_odd())) for _ in range(8)]
    for thread in work:
        reward.read_gold.cache_clear()
        thread.start()
    for thread in work:
        thread.join()
    assert verdicts == [right] * 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(grade_odd, range(4)) == [right] * 4


@settings(max_examples=300)
@given(st.text("\\{}()[]frac sqrt boxed text 0123456789.,+-*/^_=<>%$`'\"xyπ½ABor", max_size=80))
def test_no_text_makes_it_raise(text):
    for gold, response in (("5", text), ("5", f"\\boxed{{{text}}}"), (text, r"\boxed{5}")):
        verdict = grade(gold, response)
        assert verdict.status in reward.STATUSES
        assert verdict.score == (verdict.status == "match")


# --- the oracle


def spellings(value: Fraction, k: int) -> list[str]:
    n, d, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    texts = [f"{sign}\\frac{{{n * k}}}{{{d * k}}}", f"{sign}{n}/{d}",
             f"\\dfrac{{{sign}{n}}}{{{d}}}", f"{sign}({n * k}/{d * k})",
             f"{sign}{n} \\cdot {d}^{{-1}}", f"\\({sign}{n} \\div {d}\\)"]  # fmt: skip
    if n > d and n % d:
        texts.append(f"{sign}{n // d}\\frac{{{n % d}}}{{{d}}}")
    if 10**6 % d == 0:
        texts += [f"{sign}{n * 10**6 // d}e-6", f"{sign}{n // d}.{n % d * 10**6 // d:06d}"]
        texts.append(f"{sign}{n * 10**8 // d}e-6\\%")
    return texts


@settings(max_examples=600)
@given(st.fractions(-999, 999, max_denominator=60), st.integers(1, 9), st.data())
def test_spellings_of_fractions_match_exactly_when_their_values_are_equal(value, k, data):
    delta = data.draw(st.sampled_from([Fraction(1, 10**9), Fraction(-1, 7), Fraction(1)]))
    gold, box = (data.draw(st.sampled_from(spellings(value, k))) for _ in range(2))
    near = data.draw(st.sampled_from(spellings(value + delta, k)))
    assert score(gold, box) == 1
    if "%" not in gold + near:  # a percent may stand for its hundredfold: rule 4, tested by hand
        assert score(gold, near) == score(near, gold) == 0


x, y = sympy.symbols("x y")


@st.composite
def expression(draw, depth=3):
    """A sympy expression of x, y, whole numbers, pi, roots, quotients and functions."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        whole = map(sympy.Integer, range(1, 8))
        return draw(st.sampled_from([x, y, sympy.pi, sympy.sqrt(2), *whole]))
    a, b = draw(expression(depth - 1)), draw(expression(depth - 1))
    kind = draw(st.sampled_from("+-*/^r" * 3 + "scelt"))
    n = draw(st.integers(2, 3))
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b, "^": a**n, "r": sympy.root(a, n)}
    results |= {"s": sympy.sin(a), "c": sympy.cos(a), "e": sympy.exp(a), "l": sympy.log(a)}
    return (results | {"t": sympy.tan(a)})[kind]


REWRITES = [lambda e: e, sympy.expand, sympy.together, sympy.cancel, lambda e: e.rewrite(sympy.cos),
            lambda e: e.rewrite(sympy.exp), lambda e: sympy.expand(e, trig=True),
            sympy.radsimp]  # fmt: skip
STYLES = [{}, {"mul_symbol": "dot"}, {"fold_frac_powers": True},
          {"ln_notation": True}, {"root_notation": False}, {"mul_symbol": "times"}]  # fmt: skip
POINTS = [(sympy.Rational(1237, 4001), sympy.Rational(877, 2003)),
          (sympy.Rational(15091, 4001), sympy.Rational(10007, 3001))]  # fmt: skip


def numbers(e):
    """Values at the points, by sympy, or None where there is none."""
    values = [e.subs({x: u, y: v}).evalf(30) for u, v in POINTS]
    fine = all(v.is_number and v.is_finite and 1e-12 < abs(complex(v)) < 1e12 for v in values)
    return [complex(v) for v in values] if fine else None


@settings(max_examples=1_000)
@given(expression(), st.sampled_from(REWRITES), st.sampled_from(STYLES), st.sampled_from(STYLES))
def test_an_expression_rewritten_by_sympy_is_right(e, rewrite, one, other):
    try:
        same = rewrite(e)
    except (NotImplementedError, sympy.PolynomialError):
        assume(False)
    before, after = numbers(e), numbers(same)
    assume(before and after and e.count_ops() < 40 and same.count_ops() < 60)
    assume(all(abs(u - v) < 1e-9 * abs(u) for u, v in zip(before, after, strict=True)))
    assume(e.free_symbols == same.free_symbols)
    gold, box = sympy.latex(e, **one), sympy.latex(same, **other)
    assert score(gold, box) == 1


@settings(max_examples=1_000)
@given(expression(), expression(), st.data())
def test_an_expression_changed_a_little_is_wrong(e, other, data):
    """Another expression, or the same with one number or sign changed; sympy says by its values."""
    leaves = sorted((n for n in e.atoms(sympy.Integer) if n > 1), key=int)
    changed = [other, -e, e + 1, e * 2]
    changed += [e.xreplace({n: n + 1}) for n in leaves]
    near = data.draw(st.sampled_from(changed))
    before, after = numbers(e), numbers(near)
    assume(before and after and e.count_ops() < 40 and near.count_ops() < 40)
    assume(any(abs(u - v) > 1e-9 * abs(u) for u, v in zip(before, after, strict=True)))
    assert score(sympy.latex(e), sympy.latex(near)) == 0
