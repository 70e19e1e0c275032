"""extract.py: what counts as an answer, what never does, and what official verdicts say to it."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from work import lines_run

import reward
from evaluation import extract

SHARED = Path(__file__).resolve().parents[2] / "shared"
OFFICIAL = SHARED / "data" / "regression" / "official_outputs.jsonl"
KINDS = ["choice", "yes/no", "free"]
CHOICES = ["red", "blue", "12 cm", "15 cm", "A cube"]


def table(rows: dict, choices=CHOICES, kind: str | None = None):
    """{reply: its answer, or the status if there is none}"""
    found = {reply: extract.extract(reply, choices=choices, kind=kind) for reply in rows}
    assert all((v.answer is None) == (v.status != "ok") for v in found.values())
    said = {reply: v.answer or v.status for reply, v in found.items()}
    assert {reply: said[reply] for reply in rows if said[reply] != rows[reply]} == {}


# fmt: off
def test_an_option_may_be_given_by_letter_by_text_or_by_both():
    table({
        "Ans: C": "C", "\\boxed{12}": "C", "*Answer*: D": "D", "I'd go with (D).": "D", "(b)": "B",
        "Long.\n\n**Answer: C. 12 cm**": "C", "D is correct.": "D", "It must be D": "D",
        "So, the best choice would be D": "D", "The answer choice is (B)": "B",
        "the answer is $\\mathbf{C}$": "C", 'The answer is "C".': "C", "answer is b) blue": "B",
        "<answer> (C) 12 cm </answer>": "C", '{"answer": "D", "why": "because"}': "D",
        "The answer, it seems, is most likely C": "C", "The answer is A cube.": "E",
        "So the length is 15 cm, which corresponds to D.": "D", "\\(15\\text{ cm}\\)": "D",
        "The shape with the largest area is (D).": "D", "The closest option to 14.5 is D.": "D",
        "the correct choice is C, since it fits.": "C", "Therefore, option C is correct.": "C",
        "So I choose (C).": "C", "Option C": "C", "A": "A", "Final answer: (C)": "C", "Blue.": "B",
        "Thus, the answer is:\n\nC": "C", "It is 12 cm.\n\nAnswer: C) 12 cm": "C", "12 cm": "C",
        "Answer is (C)12 cm": "C", "**(C) 12 cm**": "C", "**Final Answer**\n\n(C)": "C",
    })
    table({"Yes, because it is.": "A", "No.": "B"}, choices=["Yes", "No"])
    table({"Answer: 9^9^9^9": "unparsed", "Answer: $$": "unparsed"})  # of what is too much, none


def test_a_box_comes_first_then_the_last_statement_that_says_something():
    table({
        "\\boxed{A} then \\boxed{B}": "B", "\\boxed{\\text{\\textbf{D}}}. Answer: A": "D",
        "\\boxed{99}": "99", "\\boxed{=12}": "C", "\\boxed{D": "unparsed", "\\boxed{}": "unparsed",
        "Answer: A. \\boxed{ = }": "unparsed", "\\boxed{A} or \\boxed{B}": "unparsed",
        "Answer: B\n\nWait. Answer: C": "C", "The answer is A? No. The answer is D.": "D",
        "The answer is C. Option A is wrong.": "C", "The answer is clear: option C.": "C",
        "The answer is D. This answer is correct.": "D", "The correct answer is C, not A.": "C",
    })
    table({"\\boxed{\\frac{1}{\\sqrt{2}}}": "\\frac{1}{\\sqrt{2}}"}, choices=None)


def test_several_letters_are_a_set():
    rows = {"Answer: A, C": "A, C", "The answer is C and A.": "A, C", "A and C": "A, C",
            "Both A and C are correct.": "A, C", "(A), (C), and (D)": "A, C, D"}
    table(rows)
    table(rows, choices=None, kind="choice")
    replies = {"The answers are C and A": 1, "\\boxed{AC}": 1, "The answer is A": 0}
    assert {reply: extract.grade("A, C", reply).score for reply in replies} == replies


def test_yes_and_no_are_read_where_they_answer_and_not_where_other_words_begin_with_them():
    table({
        "yes.": "yes", "Hence, no.": "no", "Yes there is": "yes", "**Yes**, it is.": "yes",
        "The picture shows it, so it is yes": "yes", "A long text. So, yes, it is 5.": "yes",
        "Yes, at first. So the answer is no.": "no", "\\boxed{\\text{Yes, there is}}": "yes",
        "I see a dog.\n\nYes.": "yes", "I would say no.": "no", "No, I cannot see a dog.": "no",
        'The answer is "no", since it is red.': "no", "Yes, at first.\nThus, no.": "unparsed",
    } | dict.fromkeys((
        "Nothing is there.", "Yesterday it rained.", "No dogs are visible.", "Yes or no? Hard.",
        "Answer: yes or no", "It is no longer so.",
    ), "unparsed"), choices=None, kind="yes/no")


def test_a_value_is_taken_whole_with_its_unit_and_without_its_reason():
    table({
        "42": "42", "The answer is 42 cm because it is.": "42 cm", "So x = 42.": "42",
        "Therefore, the area is 42 square cm.": "42 square cm", "**12**": "12", "blue": "blue",
        "The final answer is \\(\\frac{1}{2}\\).": "\\frac{1}{2}", "Answer: 3.14": "3.14",
        "Answer: -5": "-5", "The answer is (2, 3).": "(2, 3)", "Answer: $5.50": "$5.50",
        "The answer is $[0,1)$.": "[0,1)", "So the total is:\n\n\\[ 5 + 3 = 8 \\]": "8",
        "Answer: x = 5, y = 3": "x = 5, y = 3", "Answer: about 5 km": "5 km", "Answer: .5": ".5",
        "Answer: 5 (as said)": "5", "It is 5 because 2 + 3 is 5.": "5", "<answer>12</answer>": "12",
        "The answer is Not Applicable.": "Not Applicable", "Answer: 1.5 m/s. It moves": "1.5 m/s",
        "The answer is 5 where x is 3.": "5", "The closest value to 4.5 is 4.": "4",
        "The answer is $6 / 2 = 3$.": "6 / 2 = 3", "The answer is 5. This answer is correct.": "5",
        "Answer: red, blue and green": "red, blue and green", "I can't say more: x = 5.": "5",
        "To find the answer\nwe add 5 and 6": "unparsed",
    }, choices=None)


def test_chinese_replies_are_read_where_they_conclude():
    table({
        "选项B": "B", "所以选C": "C", "故选：D": "D", "因此，正确答案是（B）。": "B",
        "应选择B。": "B", "所以正确的选项是C": "C", "选项B正确": "B", "正确答案：B. blue": "B",
        "答案选（C）": "C", "综上，选B，因为它最大": "B", "选项A错误": "unparsed",
        "不选A": "unparsed", "排除选项B，比较选项C和D。": "unparsed", "A是三角形的中点": "unparsed",
    })


def test_nothing_is_guessed():
    replies = ["A dog is in the picture.", "I think it is big.", "I", "A circle and B circle.",
               "Vitamin C is important.", "Answer: K", "A's height is 5", "Therefore, D = 5.",
               "So A is the midpoint of BC.", "So I can answer a question.", "13 cm",
               "A. red\nB. blue\nC. 12 cm\nD. 15 cm", "The answer is 14 cm.",
               "In figure A there is a dog. In figure B there is a cat.",
               "(A) has a larger area than (B).", "None of the options."]
    found = {reply: extract.grade("A", reply, choices=CHOICES[:4]) for reply in replies}
    assert {r: v for r, v in found.items() if v.score or (v.answer or "X") in "ABCDE"} == {}


def test_two_letters_or_a_negation_are_unparsed():
    replies = ["The answer is either A or B.", "The answer is A or B", "A/B", "\\boxed{A or B}",
               "Answer: A or maybe C", "Neither A nor B.", "It is not option B.", "(A) is wrong.",
               "Answer: G",  # there are five
               "Therefore, options B and C are possible.", "So C and D grow (D to E).",
               "The answer isn't A.", "So we eliminate option A."]
    table(dict.fromkeys(replies, "unparsed"))


def test_only_what_stands_after_the_last_thought_counts():
    table({
        "<think>Answer: A</think>Answer: B": "B", "Answer: A</think>B": "B", "": "empty",
        "<think>\\boxed{A}</think> \n": "empty", "<think>Answer: A": "unparsed", " \n": "empty",
        "a</think>Answer: A <think> no": "unparsed", "<think>a</think>A<think>b</think>C": "C",
    })


def test_a_refusal_is_told_apart_unless_an_answer_follows():
    replies = ["I'm sorry, I can't help with that.", "It cannot be determined.",
               "I am unable to view images.", "I can’t assist with this question."]
    for kind in KINDS:
        table(dict.fromkeys(replies, "refused"), choices=None, kind=kind)
    table({"Sorry, I made a mistake. The answer is C.": "C", "I cannot see it. Answer: B": "B"})


FIVE = {"choices": CHOICES}
LETTERS = {"choices": ["d", "a", "b", "c"]}
UNITS = {"choices": ["9", "$11 \\mathrm{~km}$"]}


@pytest.mark.parametrize("gold, reply, options, score, status", [
    ("D", "A closer look shows blue. Answer: (D)", FIVE, 1, "ok"),  # BLINK took the first letter
    ("A", "A closer look shows nothing.", FIVE, 0, "unparsed"),
    ("yes", "Yes, a dog lies there.", {}, 1, "ok"),  # POPE: the whole reply had to be yes
    ("no", "It shows a cat.", {}, 0, "unparsed"),  # not a "no"
    ("Yes", "The dog is brown, so the answer is yes.", {}, 1, "ok"),  # MME: 4 characters
    ("no", "Nowhere but here: yes.", {}, 0, "ok"),
    ("A", "I'm sorry, I can't view images.", FIVE, 0, "refused"),  # MMMU-Pro: a random letter
    ("B", "$s=\\boxed{11 \\text{ km}}$", UNITS, 1, "ok"),  # MATH-V lost units in options
    ("A", "\\boxed{\\text{(A)}} \\frac{1}{2}", {"choices": ["$\\frac12$", "$1$"]}, 1, "ok"),
    ("D", "Answer: D", LETTERS, 1, "ok"),  # GPQA: texts of options are letters
    ("A", "\\boxed{d}", LETTERS, 1, "ok"),
    ("A", "The answer is A, C", FIVE, 0, "ok"),
    ("B", "14.9", {"choices": ["10", "15", "20"]}, 0, "unparsed"),  # MathVista: the nearest one
    ("\\pi", "The answer is 3.14159", {}, 1, "ok"),  # six digits
    ("\\pi", "The answer is 3.14", {}, 0, "ok"),
    ("3.7", "The answer is 3.72", {"precision": 1}, 1, "ok"),
    ("3.7", "The answer is 3.72", {}, 0, "ok"),
    ("5", "Answer: 5}{", {}, 0, "unparsed"),  # would close its box early
    ("C", "\\boxed{C}", FIVE | {"finish": "length"}, 0, "truncated"),  # whatever stands in it
    ("", "The answer is 1", {}, None, "ok"),  # LogicVista: a gold that cannot be read
    ("", "I think", {"finish": "length"}, None, "truncated"),
])
def test_a_reply_scores_what_it_says(gold, reply, options, score, status):
    verdict = extract.grade(gold, reply, **options)
    assert (verdict.score, verdict.status) == (score, status), verdict


WORDS = ["answer is ", "Answer: ", "A", " or ", "(B)", "\\boxed{", "}", "{", "yes", "no", "\n",
         "**", "$", "</think>", "<think>", ". ", "=", "5", "\\text{", "I can't", "red"]
HOSTILE = [
    "{", "}", "answer is ", "answer is\n", "answer ", "\\boxed{", "\\boxed{1}", "\\text{", "A or ",
    "**", "(A) ", "$", "yes ", "so ", ". ", "\n", " ", "(", "1", "is ", "= ", "answer to ", "'",
    "\\frac", "<think>", "the answer is A cube or ", "</think>", "I cannot ", "option A ", "a/",
    "^{", "answer, ", "# ", "0123456789" * 20, "(A)(B)", "1,",
]
# fmt: on


@given(st.lists(st.sampled_from(WORDS) | st.text()), st.sampled_from(KINDS), st.booleans())
def test_no_text_and_no_mixture_of_its_own_words_makes_it_raise(parts, kind, has_choices):
    choices = CHOICES if has_choices else None
    verdict = extract.grade("B", "".join(parts), choices=choices, kind=kind)
    assert verdict.score in (0.0, 1.0) and (verdict.score == 0.0 or verdict.status == "ok")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_are_little_work(kind):
    for unit in HOSTILE:
        reply = unit * (100_000 // len(unit))
        for text in (reply, reply + "\nAnswer: " + reply, "Answer: A" + reply):
            work = lines_run(extract.grade, "A", text, choices=CHOICES * 2, kind=kind)
            assert work < 60_000, f"{unit!r}: {work} lines"  # the most is 30,000


@pytest.mark.skipif(not SHARED.exists(), reason="the recorded replies are not here")
def test_what_the_reward_calls_right_is_right_here():
    for case in map(json.loads, (SHARED / "reward_cases.jsonl").read_text().splitlines()):
        options = {name: case.get(name) for name in ("choices", "precision")}
        ours = extract.grade(case["gold"], case["response"], **options)
        paid = reward.grade(case["gold"], case["response"], digits=6, **options)
        assert ours.score == paid.score or paid.status == "no_box", (case, ours, paid)


@pytest.mark.skipif(not SHARED.exists(), reason="the recorded replies are not here")
def test_official_verdicts_agree_and_nothing_that_is_officially_right_is_lost():
    official = [json.loads(line) for line in OFFICIAL.read_text().splitlines()]
    for row in official:
        choices = row["options"] or None
        row["ours"] = extract.grade(row["answer"], row["response"], choices=choices)
    rows = [row for row in official if row["bench"] == "mmmu_pro"]
    assert sum(row["ours"].score == row["official_correct"] for row in rows) >= len(rows) - 1
    rows = [row for row in official if row["bench"] == "mathvision"]
    assert all(row["ours"].score for row in rows if row["official_correct"])
    assert sum(row["ours"].score for row in rows) >= 67  # officially 56: units in options
    statuses = Counter(row["ours"].status for row in official)
    assert statuses["ok"] >= 767 and statuses["refused"] >= 27  # the official rules guess here
    assert statuses.total() - statuses["ok"] - statuses["refused"] == statuses["unparsed"]
