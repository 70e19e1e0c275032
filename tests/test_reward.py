r"""Does the matcher pay for right answers only? One group of tests a policy rule, then labelled
pairs, then attacks, then oracles: hypothesis writes one value in many ways, and plain Fractions,
or sympy, say what is equal.

    pytest tests/test_reward.py
"""

import json
import multiprocessing
import random
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import sympy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from work import lines_run

import reward
from reward import Verdict, grade


def score(gold, box, **options):
    return grade(gold, f"so the answer is $\\boxed{{{box}}}$.", **options).score


def all_equal(gold, boxes, expected):
    assert {box: score(gold, box) for box in boxes} == dict.fromkeys(boxes, float(expected))


# --- rule 1: which box counts


@pytest.mark.parametrize(
    ("response", "status", "answer"),
    [
        (r"I think \boxed{3}. No: \boxed{4}", "match", "4"),
        (r"first \boxed{4}, which is wrong, hence \boxed{3}", "mismatch", "3"),
        (r"\boxed{4} and then much text without a box", "match", "4"),
        (r"\boxed {4}", "match", "4"),
        (r"\boxed{\boxed{4}}", "match", r"\boxed{4}"),
        (r"\boxed{\text{not }\boxed{4}}", "mismatch", r"\text{not }\boxed{4}"),
        ("the answer is 4", "no_box", None),
        (r"\fbox{4}", "no_box", None),
        ("", "no_box", None),
        (r"\boxed{4", "unclosed", None),
        (r"\boxed{4} no, \boxed{", "unclosed", None),
        (r"\boxed{4\}", "unclosed", None),
        (r"\boxed{4} or \boxed{5}", "hedged", "4, 5"),
        (r"$\boxed{4}$ / $\boxed{5}$", "hedged", "4, 5"),
        (r"\boxed{4 \text{ or } 5}", "hedged", r"4 \text{ or } 5"),
        (r"\boxed{}", "unparsed", ""),
        (r"\boxed{\square}", "unparsed", r"\square"),
    ],
)
def test_rule_1_the_last_closed_box_counts_and_every_score_has_a_status(response, status, answer):
    assert grade("4", response) == Verdict(float(status == "match"), status, answer)


def test_rule_1_boxes_joined_by_commas_and_and_are_one_list():
    assert grade("3, 4", r"The roots are $\boxed{4}$ and $\boxed{3}$.").score == 1
    assert grade("2,3,5", r"\boxed{2}, \boxed{3}, and \boxed{5}").score == 1
    assert grade("1,2", r"$x = \boxed{1}$ and $y = \boxed{2}$").score == 1
    assert grade("2", r"$x = \boxed{1}$, so $y = \boxed{2}$").score == 1
    assert grade("1/2", r"\boxed{\frac12 \text{ or } 0.5}").score == 1
    assert grade("4", r"\boxed{1}, \boxed{2}, \boxed{3}, \boxed{4}").score == 0


def test_rule_1_escaped_braces_do_not_close_the_box():
    assert grade(r"\{1,2\}", r"\boxed{\{2,1\}}").answer == r"\{2,1\}"
    assert grade(r"\frac{1}{2}", r"\boxed{\frac{1}{2}} \}").score == 1


# --- rule 2: numbers


def test_rule_2_one_half_in_all_its_spellings():
    spellings = [
        ".5",
        "0.50",
        "1/2",
        r"\frac12",
        r"\dfrac{1}{2}",
        r"\frac { 2 } { 4 }",
        "{1 \\over 2}",
    ]
    spellings += [r"50\%", "½", r"\left(\frac{1}{2}\right)", r"2^{-1}", r"$\tfrac12$", r"5e-1"]
    all_equal(r"\frac{1}{2}", spellings, True)


def test_rule_2_close_is_not_equal():
    all_equal("10000", ["10001", "9999.99999", "1000", "1e5"], False)
    all_equal(r"\frac13", ["0.33", "0.3333333333333333333", r"\frac{1}{3.0001}"], False)
    all_equal(r"\frac{1}{2^{120}}", [r"\frac{1}{2^{121}}", "0"], False)
    all_equal(r"\pi", ["3.14", "22/7", "3.14159265358979"], False)


def test_rule_2_mixed_numbers_are_sums_and_juxtaposed_digits_are_nothing():
    all_equal("2.5", [r"2\frac{1}{2}", r"2 \frac12", "2 1/2", "2½"], True)
    all_equal("1", [r"2\frac{1}{2}", "1 0", "1 1"], False)
    all_equal("12", ["1 2", "21", r"1\frac{2}{1}"], False)


def test_rule_2_thousands_separators_group_by_three_or_not_at_all():
    all_equal("58500", ["58,500", r"58\,500", r"58{,}500", r"58,\!500"], True)
    all_equal("1000", ["1,00,0", "1,0,0,0", "(1,000)"], False)
    all_equal("(1,23)", ["(12,3)", "123"], False)
    all_equal("1,234", ["1.234", "1234,"], False)
    all_equal("2.74", ["2,74"], True)  # a decimal comma, where the gold is a decimal
    all_equal("2,5", ["2.5"], False)


def test_rule_2_leading_zeros_and_signs():
    all_equal("73", ["073", "+73", "73.", "73.0", "--73"], True)
    all_equal("-7", ["7", "7-", "- -7"], False)
    all_equal("-7", ["–7", "−7", "(-7)"], True)


def test_rule_2_precision_rounds_both_sides_and_only_when_asked():
    assert score("1.2", "1.24", precision=1.0) == 1
    assert score("1.2", "1.25", precision=1.0) == 0
    assert score("-0.5", "-0.45", precision=1.0) == 1
    assert score("1.2", "1.24") == 0


# --- rule 3: lists, sets, tuples, intervals


def test_rule_3_lists_and_sets_have_no_order():
    all_equal("1,-2", ["-2, 1", r"\{-2,1\}", r"1 \text{ and } -2", "1; -2"], True)
    all_equal("1,-2", ["1,2", "1", "1,-2,3", "(1,-2)"], False)
    all_equal("1,-2", ["1,1,-2"], True)  # one twice is still the same set
    all_equal("3,3,4", ["3,4", "3,4,4"], False)
    all_equal("(1,2),(3,4)", ["(3,4), (1,2)", r"\{(3,4),(1,2)\}"], True)
    all_equal("(1,2),(3,4)", ["(1,4),(3,2)", "1,2,3,4"], False)


def test_rule_3_sets_of_numbers_are_equal_however_they_are_put_together():
    holes = r"(-\infty,1)\cup(1,\infty)"
    all_equal(holes, [r"\mathbb{R} \setminus \{1\}", r"x \neq 1", r"x < 1 \text{ or } x > 1"], True)
    all_equal(holes, [r"\mathbb{R}", r"(-\infty,1]\cup(1,\infty)", "x = 1"], False)
    all_equal(
        "[1,5]", [r"[1,3]\cup[3,5]", r"[1,5] \cup \{2\}", r"[0,5]\cap[1,9]", r"1 \le x \le 5"], True
    )
    all_equal("[1,5]", [r"[1,3)\cup(3,5]", r"[1,3]\cup[4,5]", r"[1,5] \setminus \{3\}"], False)
    all_equal(r"\mathbb{R}", [r"(-\infty,\infty)", r"\text{all real numbers}"], True)


def test_rule_3_tuples_and_intervals_have_order_and_ends():
    all_equal(
        "(3,-4)", ["(3, -4)", r"\left(\frac{6}{2},-4\right)", "(x,y) = (3,-4)", "P(3,-4)"], True
    )
    all_equal("(3,-4)", ["(-4,3)", "3,-4", "[3,-4]", "(3,-4,0)"], False)
    all_equal("[0,1)", ["[0, 1)", r"\left[0,1.0\right)", r"0 \le x < 1"], True)
    all_equal("[0,1)", ["(0,1]", "(0,1)", "[0,1]", "[1,0)", "0,1"], False)
    all_equal(r"(-\infty, 3]", [r"x \leq 3", "3 >= x", r"2x \le 6", "(-∞, 3]"], True)
    all_equal(r"x > 2", ["x < 2", r"x \ge 2", "y > 2", "2"], False)


def test_rule_3_plus_minus_is_two_numbers():
    all_equal(r"\pm 2", ["2,-2", "±2", "-2 and 2", r"\{2, -2\}"], True)
    all_equal(r"\pm 2", ["2", "-2", r"\pm 3"], False)
    all_equal(r"1 \pm \sqrt{19}", [r"1-\sqrt{19}, 1+\sqrt{19}"], True)


def test_rule_3_names_must_agree_when_there_are_several():
    all_equal("x=1, y=2", ["y=2, x=1", "(x,y)=(1,2)"], True)
    all_equal("x=1, y=2", ["x=2, y=1"], False)


def test_rule_2_a_decimal_stands_for_an_irrational_gold_only_when_asked():
    assert score(r"\pi", "3.14159", digits=6) == 1
    assert score(r"\sqrt{2}", "1.414214", digits=6) == 1
    assert score(r"\sqrt{2}", "-1.414214", digits=6) == 0
    for box in ("3.14", "3.1416", "3.14158", "3.1415926536000"):
        assert score(r"\pi", box, digits=6) == 0, box
    assert score(r"\frac13", "0.3333333", digits=6) == 0  # a rational gold has no excuse
    assert score(r"\pi", "3.14159") == 0


# --- rule 4: percent and units


def test_rule_4_percent_is_a_hundredth_or_the_unit_of_the_question():
    all_equal(r"50\%", ["50%", "0.5", "50", r"\frac12", r"50 \text{ percent}"], True)
    all_equal("25", [r"25\%"], True)
    all_equal("0.5", ["50", r"0.5\%"], False)
    all_equal("25", ["0.25", "2500"], False)


def test_rule_4_a_unit_may_be_left_out_but_not_contradicted():
    all_equal(r"5\text{ cm}", ["5", "5 cm", r"5\ \mathrm{cm}", r"5~\text{centimeters}"], True)
    all_equal(r"5\text{ cm}", [r"5\text{ m}", r"5\text{ cm}^2", r"50\text{ mm}", "6"], False)
    all_equal("25", [r"25 \text{ square units}", r"25\text{ cm}^2", r"25^\circ", r"\$25"], True)
    all_equal(r"\$36", [r"36\text{ cents}", r"36\text{ euros}", "36 million"], False)
    all_equal(r"60^\circ", ["60", "60°", r"60\text{ degrees}", r"60^{\circ}"], True)
    all_equal(r"5\text{ apples}", ["5", r"5 \text{ apples}"], True)
    all_equal(r"\text{minutes}", [r"\text{hours}", "5"], False)


# --- rule 5: equations and expressions


def test_rule_5_equations_match_up_to_a_factor_and_tautologies_never():
    all_equal("x^2+y^2=4", ["y^2 = 4-x^2", "2x^2+2y^2=8"], True)
    all_equal("y=2x+3", ["2x+3", "2x-y+3=0", "y = 3+2x"], True)
    all_equal("y=2x+3", ["y=2x-3", "0=0", "y=y", "z=2x+3"], False)
    all_equal(r"\angle 1 = 50^\circ", ["50", r"\angle 1 = 50", r"\angle = 50°"], True)
    all_equal(r"\angle\beta = \angle\alpha + \angle\gamma", [r"\beta - \alpha = \gamma"], True)
    all_equal("5", ["x=5", "|AB| = 5", r"\text{area} = 5", "5 = x", "2+3=5", "x=2+3=5"], True)
    all_equal("5", ["5=5", "2+4=5", r"x \text{ is not } = 5", "x=x", "x>4", "5x", "x"], False)
    all_equal("x=5", ["1=1", "x=5=6", "x=5, x=6"], False)
    all_equal("x=5", ["x=2+3=5", "x=2+2=5"], True)  # the last counts, as with boxes
    all_equal(r"\frac13", [r"x \approx \frac13", r"\frac13 \approx 0.33"], True)


def test_rule_5_expressions_are_compared_by_value():
    all_equal("(x+1)^2", ["x^2+2x+1", "1+x^2+x+x", "(1+x)(x+1)"], True)
    all_equal("(x+1)^2", ["x^2+1", "(y+1)^2", "(x-1)^2"], False)
    all_equal(r"3\sqrt{13}", [r"\sqrt{13}\cdot 3", r"\sqrt{117}", r"\frac{39}{\sqrt{13}}"], True)
    all_equal(r"3\sqrt{13}", [r"13\sqrt{3}", r"3\sqrt[3]{13}"], False)
    all_equal(r"\frac{5\pi}{3}", [r"\frac53\pi", "5π/3", r"\pi + \frac{2\pi}{3}"], True)
    all_equal("252", [r"\binom{10}{5}", r"{10 \choose 5}", r"\frac{10!}{5! \cdot 5!}"], True)
    all_equal("-1", ["i^2", r"(-1)^{3}", r"\sqrt[3]{-1}"], True)
    all_equal("x", [r"\sqrt{x^2}", "X", "|x|"], False)  # |x| is not x
    all_equal("x+iy", ["iy+x", r"i(y-ix)"], True)
    all_equal("x+iy", ["x-iy", "y+ix"], False)
    all_equal("x|y|", ["|y|x", r"x\sqrt{y^2}"], True)
    all_equal("x|y|", ["xy", "y|x|", "|xy|"], False)
    all_equal("|x-3|", ["|3-x|", r"\sqrt{(x-3)^2}", r"\left|x-3\right|"], True)


def test_rule_5_functions_are_what_they_are():
    all_equal(r"\sin^2 x", [r"1-\cos^2 x", r"\frac{1-\cos 2x}{2}", r"(\sin x)^2", "sin(x)^2"], True)
    all_equal(r"\sin^2 x", [r"\sin x^2", r"\sin 2x", r"\cos^2 x", r"\sin^2 y"], False)
    all_equal(r"\frac{\pi}{4}", [r"\arctan 1", r"\tan^{-1} 1", r"\sin^{-1}\frac{\sqrt2}{2}"], True)
    all_equal(r"\frac12", [r"\sin 30^\circ", r"\cos\frac{\pi}{3}", r"\log_4 2"], True)
    all_equal("2", [r"\log 100", r"\ln e^2", r"\log_{10} 100", r"\lg 100"], True)
    all_equal(r"\ln x^2", [r"2\ln x", r"\ln(x \cdot x)", r"2 \ln |x|"], True)
    all_equal(r"\ln x^2", [r"\ln^2 x", r"\ln 2x", r"\ln y^2"], False)


def test_rule_5_whole_number_functions_are_compared_at_whole_numbers():
    all_equal(r"\binom{2n}{n}", [r"\frac{(2n)!}{(n!)^2}", r"\binom{2n}{n}"], True)
    all_equal("n!", [r"n \cdot (n-1)!", r"\frac{(n+1)!}{n+1}"], True)
    all_equal("n!", ["(n-1)!", "n! - 1", "n"], False)
    all_equal("(-1)^n", ["(-1)^{n+2}", r"\cos(n\pi)", r"\frac{1}{(-1)^n}"], True)
    all_equal(r"m - \lfloor m/2 \rfloor", [r"\lceil m/2 \rceil"], True)
    all_equal(r"\gcd(n,k)", [r"\gcd(k, n)", r"\frac{nk}{\text{lcm}(n,k)}"], True)


def test_rule_5_matrices_are_compared_entry_by_entry():
    gold = r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    same = [
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & \frac82 \\ \end{pmatrix}",
    ]
    same += [r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"]
    same += [r"\frac12\begin{pmatrix} 2 & 4 \\ 6 & 8 \end{pmatrix}"]
    same += [
        r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"
    ]
    all_equal(gold, same, True)
    all_equal(
        gold,
        [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"],
        False,
    )
    all_equal(r"\begin{pmatrix}1\\2\end{pmatrix}", ["(1,2)", r"\langle 1, 2\rangle"], True)


# --- rule 6: letters


def test_rule_6_letters_in_the_ways_people_mark_them():
    good = ["B", "(B)", r"\text{(B)}", r"\textbf{B}", "B.", "B) 12", r"(B)\ \frac12", "B: A cube"]
    all_equal("B", good + [r"\text{Option B}", r"\text{B. yellow}"], True)
    bad = [
        "A",
        "A, B",
        "BD",
        "ABCD",
        r"\text{not B}",
        "A or B",
        "B or C",
        "A) or B)",
        "b",
        "B is wrong",
    ]
    all_equal("B", bad + ["B/C", "A: 3, B: 4"], False)
    all_equal("BD", ["B, D", r"\text{B and D}", "(D), (B)"], True)
    all_equal("BD", ["B", "D", "ABD"], False)


def test_rule_6_with_choices_a_value_stands_for_the_one_option_it_equals():
    colours = ("red", "blue", "Yellow", "This cannot be told for certain.")
    assert score("C", r"\text{yellow}", choices=colours) == 1
    assert score("D", r"\text{This cannot be told for certain}", choices=colours) == 1
    assert score("Yellow", "C", choices=colours) == 1
    assert score("C", "blue", choices=colours) == 0
    assert score("B", "0.5", choices=(r"\frac13", r"\frac12")) == 1
    assert score("B", "0.5", choices=("0.50", r"\frac12")) == 0  # two options equal it
    assert score("C", "4", choices=("2π", "3π", "4π")) == 0
    orders = ("3-1-2", "2-1-3", "1-2-3")  # as sums two of them are equal
    assert score("B", "2-1-3", choices=orders) == 1
    assert score("A", "2-1-3", choices=orders) == 0
    assert score("B", "1.06", choices=(r"$\textdollar 0.40$", r"$\textdollar 1.06$")) == 1


def test_rule_6_an_option_whose_text_is_a_letter_is_not_its_label():
    letters = ("d", "a", "b", "c")
    assert score("D", "d", choices=letters) == 0
    assert score("A", "d", choices=letters) == 1
    assert score("D", "D", choices=letters) == 1


# --- rule 7: golds


def test_rule_7_damaged_golds_are_mended():
    for gold in ("\x0crac{36}{13}", r"$\frac{36}{13}$", r"\boxed{\frac{36}{13}}", "36/13."):
        assert score(gold, r"\frac{36}{13}") == 1, gold
    assert score("69{degrees}", "69") == 1
    assert score(r"x_1=1,\quadx_2=2", "1, 2") == 1
    assert score("4\text{ cm}", "4 cm") == 1  # a tab where \t of \text was


def test_rule_7_an_unreadable_gold_is_never_rewarded():
    for gold in ("", "  ", "$$", "9" * 1200 + "," * 700):
        assert grade(gold, r"\boxed{5}")[:2] == (0.0, "gold_unparsed")
        assert score(gold, gold) == 0


def test_rule_8_words_are_equal_without_case_symbols_with_it():
    all_equal(r"\text{Evelyn}", ["Evelyn", r"\text{evelyn}", r"\mathrm{Evelyn}"], True)
    all_equal(r"\text{Yes}", ["no", r"\text{Yes/No}", r"\text{yes or no}", "1"], False)
    all_equal("S", ["s", "5"], False)
    all_equal("3:30", ["03:30", "3 : 30", "3:30 PM"], True)
    all_equal("3:30", ["3.30", "1:10", "6:60"], False)
    all_equal("3:30 p.m.", [r"3:30\text{ PM}", r"3{:}30 \text{ p.m.}"], True)
    all_equal("3:30 p.m.", [r"3:30\text{ AM}", r"\text{3:31 pm}"], False)
    all_equal("3:4", ["6:8", r"3 \text{ to } 4", r"\frac34", "0.75"], True)
    all_equal("3:4", ["4:3", "3:4:5", r"\frac43"], False)


# --- rule 8: words, and the command line


def test_rule_8_words_units_and_dates_in_their_usual_spellings():
    all_equal(
        r"9.8 \text{ m/s}^2",
        [r"9.8\ \mathrm{m/s^2}", r"9.8 m/s^2", "9.8", r"9.8\text{ m s}^{-2}"],
        True,
    )
    all_equal(r"9.8 \text{ m/s}^2", [r"9.8 \text{ m/s}", r"9.8\text{ km/s}^2", "98"], False)
    all_equal("July 4, 2020", [r"\text{4 July 2020}", r"\text{July 4th, 2020}"], True)
    all_equal("July 4, 2020", [r"\text{July 5, 2020}", r"\text{June 4, 2020}"], False)
    all_equal(
        "2 h 5 min", ["2h 5m", r"125\text{ minutes}", r"2\text{ hours and }5\text{ minutes}"], True
    )
    all_equal("2 h 5 min", ["2h 15m", "125", r"2\text{ hours}"], False)
    all_equal("H_2O", [r"\mathrm{H_2O}", r"\ce{H2O}", "H₂O"], True)
    all_equal("Yes", ["是", "oui", r"\text{yes}"], True)
    all_equal("12", ["१२", "１２", r"12 \text{ apples}", r"\text{twelve}"], True)
    all_equal("(a) 5 (b) 7", ["(a) 5, (b) 7", "(5, 7)"], True)
    all_equal("(a) 5 (b) 7", ["(a) 7 (b) 5", "5"], False)


def test_the_command_line_explains_and_scores_files(tmp_path):
    run = [sys.executable, "reward.py"]
    root = Path(reward.__file__).parent
    said = subprocess.run([*run, "--gold", "0.5", "--response", r"\boxed{\frac12}"], cwd=root,
                          capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert "score 1" in said and "0.5" in said and "1/2" in said and "decided by values" in said
    cases = tmp_path / "cases.jsonl"
    rows = [{"gold": "1", "response": r"\boxed{1}", "label": 1}]
    rows += [{"gold": "2", "response": r"\boxed{1}", "label": 1, "kind": "odd"}]
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = subprocess.run(
        [*run, str(cases)], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert "line 2 false negative odd" in said and "1 of     2" in said
    cases.write_text('{"gold": "1"}\n')
    failed = subprocess.run([*run, str(cases)], cwd=root, capture_output=True, text=True)
    assert failed.returncode and "line 1" in failed.stderr and "response" in failed.stderr


# --- odd texts: each ends in a verdict, by the rule beside it

ODD = [
    ("5", "1 3/2", 0),  # no mixed number
    ("5", r"3\overline{3}", 0),
    ("5", r"\frac1.52", 0),
    ("a_{1", "a_1", 1),  # a damaged gold is compared like words
    ("5", r"\begin{pmatrix}1&2\\3\end{pmatrix}", 0),  # rows of different lengths
    ("5", r"\begin{pmatrix}1&2\end{pmatrix}\begin{pmatrix}1&2\end{pmatrix}", 0),
    ("5", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^2", 0),  # powers of matrices are not read
    ("5", r"\begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}1\\2\end{pmatrix}", 0),
    ("5", r"2^{20000} \cdot 2^{20000}", 0),
    (
        r"\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}1\\2\end{pmatrix}",
        r"2\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}2\\4\end{pmatrix}",
        1,
    ),
    (
        r"\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}1\\2\end{pmatrix}",
        r"\begin{pmatrix}x\\y\end{pmatrix} = \begin{pmatrix}1\\3\end{pmatrix}",
        0,
    ),
    ("x", "x^{2^{70}}", 0),
    (r"\sqrt{10^{90}+1}", r"\sqrt{1+10^{90}}", 1),  # too long to look for a whole root
    ("5", r"\lfloor i \rfloor", 0),
    ("5", r"\log_1 5", 0),
    ("5", r"\ln 0", 0),
    ("5", r"\max(3, 5, 2)", 1),
    ("5", r"\max(3, 5, i)", 0),
    ("\\min(\\pi, 3)", "3", 1),
    ("5", "1," * 100, 0),
    ("3:30 pm", "x:30 pm", 0),
    (r"5 \text{ cm } 3 \text{ kg}", r"5 \text{ cm } 3 \text{ kg}", 1),
    ("x > 2", "1 < x > 2", 0),
    ("x > 2", r"1 < 2 \in x", 0),
    ("x > 2", "1 < x < 2 < 3", 0),
    ("x < y < z", "x < y < z", 1),
    ("x < 4", "2x < x + 4", 1),
    ("x < 4", "x < i", 0),
    ("|x| < 1", "|x| < -1", 0),
    ("|x-1| > 2", r"x < -1 \text{ or } x > 3", 1),
    (r"\frac1x < 2", "2 > 1/x", 1),
    (r"\sqrt{x-2} < 1", r"\sqrt{x-2} < 1.0", 1),
    (r"[0,1) \cup", r"[0,1)", 0),
    (r"(0, a) \cup (b, c)", r"(b, c) \cup (0, a)", 1),  # ends without an order
    (r"(0,1) \cup (2,3)", "x < 1, y", 0),
    (r"(0,1) \cup (2,3)", "(3,2), (1,0)", 0),
    ("a:b", "a:c", 0),
    ("a:b", r"a : b", 1),
    (r"5 \text{ m/s}", "5 m*x", 0),
    (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n} k", 1),  # written alike, not summed
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", 0),
    ("96\n376", "96, 376", 1),
    (r"\overline{z}", "z", 0),
    ("sinx", r"\sin x", 1),
]


@pytest.mark.parametrize(("gold", "box", "expected"), ODD)
def test_odd_texts_end_in_a_verdict(gold, box, expected):
    verdict, _ = reward.explain(gold, f"\\boxed{{{box}}}")
    assert verdict.score == expected


def test_a_fault_of_the_matcher_costs_one_answer_and_not_the_run(monkeypatch):
    monkeypatch.setattr(reward, "clean", lambda text: 1 / 0)
    with pytest.warns(match="failed on gold '1/2': ZeroDivisionError"):
        assert grade("1/2", r"\boxed{0.5}") == (0.0, "unparsed", None)
    with pytest.raises(ZeroDivisionError):
        reward.explain("1/2", r"\boxed{0.5}")


# --- labelled pairs

PAIRS = Path(__file__).with_name("reward_pairs.jsonl")  # written without a look at reward.py


def test_the_labelled_pairs_are_graded_as_a_careful_human_does():
    cases = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    assert len(cases) > 1_600 and {case["label"] for case in cases} == {0, 1}
    wrong = []
    for case in cases:
        verdict, rule = reward.explain(case["gold"], case["response"], case.get("choices"))
        if verdict.score != case["label"]:
            wrong.append((case["kind"], case["gold"], verdict, rule))
    assert not wrong


# --- attacks


ATTACKS = [
    "__import__('os').system('touch {marker}')",
    "[5,__import__('os').system('touch {marker}')][0]",
    "exec(\"open('{marker}','w')\")",
    "open('{marker}','w').write('5')",
    "x.__class__.__mro__[-1].__subclasses__()",
    "quit()",
    "int('5')",
    "5 if True else 4",
    "solve(x-5,x)[0]",
    "f'5'",
    "5; import os",
    "raise SystemExit",
]


def test_code_is_never_run_and_never_paid(tmp_path):
    marker = tmp_path / "executed"
    for attack in ATTACKS:
        assert score("5", attack.replace("{marker}", str(marker))) == 0, attack
    assert not marker.exists()


def test_vague_answers_earn_nothing():
    vague = ["~", "?", "x", r"\ldots", "5,6,7,8", "[4,6]", r"\mathbb{R}", "NaN", r"\frac00", "5!!"]
    vague += [
        r"\text{5 or 6}",
        r"\text{either 5 or 6}",
        r"5 \to 6",
        r"\neq 5",
        "5_{10}",
        "5,",
        "5.5.5",
    ]
    vague += ["(5", "5)", "[5]", "5|", "5/", "5+", r"5\%\%", "0/0+5", r"5\text{ or so}", "1O", "⁵"]
    all_equal("5", vague, False)
    all_equal("0", [r"\infty-\infty", r"\text{None}", "0/0", "0=0"], False)
    all_equal("1", ["0^0", "1=1", r"\text{True}"], False)


HEAVY = [
    "9^{9^{9^9}}",
    "9**9**9**9",
    "10^{1000000000}",
    "(10^9)!",
    r"\binom{10^9}{5}",
    "9" * 1_900,
    "1/" * 900 + "1",
    "(" * 900 + "5" + ")" * 900,
    "x^" * 290 + "x",
    r"\sqrt" * 300 + "2",
    r"\frac" * 300 + "12",
    "-" * 1_900 + "5",
    ",".join(["(x+y+z+w+1)^{20}"] * 35),
    "x=(" + "(x+y+z+w+1)^9,x=(" * 25 + ")" * 26,
    r"(1+\sqrt{2}+\sqrt{3}+\sqrt5+\sqrt7)^{20}",
    r"\text{" * 300 + "}" * 300,
    "1," * 900,
    "or " * 600,
    "5" + " " * 1_900,
    "1e9999",
    ",".join(["x^2=2^{30000}x+y"] * 60),
    "`a " * 290,
]


@pytest.mark.parametrize("box", HEAVY, ids=lambda box: box[:16])
def test_heavy_boxes_are_little_work(box):
    verdicts = []
    work = lines_run(lambda: verdicts.append(grade("5", f"\\boxed{{{box}}}")))
    assert work < 400_000  # of the heaviest a third, which is 30 ms
    assert verdicts[0].score == (box.strip() == "5")


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 50_000,
        "\\boxed{5}," * 50_000,
        "{" * 1_000_000,
        "\\boxed{" + "{" * 1_000_000,
        "\\boxed{" * 500 + "5" + "}" * 500,
    ],
    ids=lambda response: response[:10],
)
def test_heavy_responses_are_little_work(response):
    assert lines_run(grade, "7", response) < 60_000


TWINS = [
    (r"\sin^2 x", r"1-\cos^2 x", 1),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3", 1),
    ("x", "|x|", 0),
]


def grade_twins(_=None):
    return [score(gold, box) for gold, box, _ in TWINS] * 5


def test_it_works_in_many_threads_at_once_and_after_a_fork():
    right = [float(label) for *_, label in TWINS] * 5
    verdicts = []
    work = [threading.Thread(target=lambda: verdicts.append(grade_twins())) for _ in range(8)]
    for thread in work:
        reward.read_gold.cache_clear()
        thread.start()
    for thread in work:
        thread.join()
    assert verdicts == [right] * 8
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(grade_twins, range(4)) == [right] * 4


def test_the_order_of_questions_changes_nothing():
    rng, pairs = (
        random.Random(0),
        [(a, b) for a, b, _ in TWINS] + [("[1,2]", "1<=x<=2"), ("n!", "n")],
    )
    first = [score(*pair) for pair in pairs]
    for _ in range(5):
        order = rng.sample(range(len(pairs)), len(pairs))
        assert [score(*pairs[i]) for i in order] == [first[i] for i in order]


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        alphabet="\\{}()[]frac sqrt boxed text 0123456789.,+-*/^_=<>%$`'\"xyπ½ABor", max_size=80
    )
)
def test_no_text_makes_it_raise(text):
    for response in (text, f"\\boxed{{{text}}}"):
        verdict, _ = reward.explain("5", response)  # grade has a net under it
        assert verdict.status in reward.STATUSES and (verdict.score == 1) == (
            verdict.status == "match"
        )
    assert reward.explain(text, "\\boxed{5}")[0].status in reward.STATUSES


# --- the oracle


@st.composite
def spelled_fraction(draw):
    """(value, text): the value stays a Fraction, the text is one of many ways to write it."""
    n, d = draw(st.integers(-999, 999)), draw(st.integers(1, 60))
    value, k = Fraction(n, d), draw(st.integers(1, 9))
    sign, n = "-" if n < 0 else "", abs(n)
    spellings = [
        f"{sign}\\frac{{{n * k}}}{{{d * k}}}",
        f"{sign}{n}/{d}",
        f"\\dfrac{{{sign}{n}}}{{{d}}}",
    ]
    spellings += [
        f"{sign}({n * k}/{d * k})",
        f"{sign}{n} \\cdot {d}^{{-1}}",
        f"\\({sign}{n} \\div {d}\\)",
    ]
    if n > d and n % d:
        spellings.append(f"{sign}{n // d}\\frac{{{n % d}}}{{{d}}}")
    if 10**6 % d == 0:
        spellings += [f"{sign}{n * 10**6 // d}e-6", f"{sign}{n // d}.{n % d * 10**6 // d:06d}"]
        spellings.append(f"{sign}{Fraction(n, d) * 10**6 * 100 // 1}e-6\\%")
    return value, draw(st.sampled_from(spellings))


@settings(max_examples=400, deadline=None)
@given(spelled_fraction(), spelled_fraction())
def test_fractions_match_exactly_when_they_are_equal(one, other):
    assert score(one[1], one[1]) == 1
    for gold, answer in ((one, other), (other, one)):
        if "%" in gold[1] + answer[1]:
            continue  # a percent may stand for its hundredfold: rule 4, tested by hand
        assert score(gold[1], answer[1]) == (gold[0] == answer[0])


@settings(max_examples=200, deadline=None)
@given(spelled_fraction(), st.data())
def test_every_spelling_of_a_fraction_is_right(one, data):
    value = one[0]
    assert score(f"{value.numerator}/{value.denominator}", one[1]) == 1
    delta = data.draw(st.sampled_from([Fraction(1, 10**9), Fraction(-1, 7), Fraction(1)]))
    near = value + delta
    assert score(f"{near.numerator}/{near.denominator}", one[1].replace("\\%", "")) == (
        100 * value == near if "%" in one[1] else 0
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(1, 30), st.integers(0, 400), st.integers(1, 30))
def test_roots_match_exactly_when_their_squares_do(a, b, c, d):
    gold, box = f"{b}\\sqrt{{{a}}}", f"{d}\\sqrt{{{c}}}"
    assert score(gold, box) == (b * b * a == d * d * c)


x, y = sympy.symbols("x y")


@st.composite
def expression(draw, depth=3):
    """A sympy expression of x, y, whole numbers, pi, roots, quotients and functions."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(
            st.sampled_from([x, y, sympy.pi, sympy.sqrt(2), *map(sympy.Integer, range(1, 8))])
        )
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
    differ = any(abs(u - v) > 1e-9 * abs(u) for u, v in zip(before, after, strict=True))
    assume(differ)
    assert score(sympy.latex(e), sympy.latex(near)) == 0
