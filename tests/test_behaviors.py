"""Does the lexicon fire where a reader would, and are the rates what their definitions say?

pytest tests/test_behaviors.py
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import behaviors
from behaviors import NAMES, PAIRS, count, find, rates, thinking, transfer_interval, transfer_rates

SAYS = {
    "backtracking": [
        "Wait, that can't be, the sign is wrong.",
        "Hmm, this contradicts the first equation.",
        "Scratch that, x is negative.",
        "I made a mistake in the second line.",
        "wait , that is not right .",
        "wait , 33 is not right .",
    ],
    "subgoal_setting": [
        "First, we need to find the slope.",
        "Step 2: solve for y.",
        "Before we can add them, we have to find a common denominator.",
        "first list cells , then add up .",
    ],
    "verification": [
        "Let me check this with n = 2.",
        "Let's verify the result.",
        "Plugging x = 4 back in gives 16.",
        "Does this satisfy both equations?",
        "let me check .",
    ],
    "backward_chaining": [
        "To get 60, we need a multiple of 12.",
        "Working backwards, the price was 40.",
        "Suppose the answer is D, then the side would be 3.",
        "so i need each digit .",
    ],
    "visual_reflection": [
        "Let me look at the figure again.",
        "I should recheck the diagram.",
        "On second look, the arrow points up.",
        "Perhaps I misread the chart.",
        "look at A3 again : A3 1 = 10 .",
    ],
    "visual_divide_and_conquer": [
        "Let me look at the left part of the figure.",
        "We can split the region into two rectangles.",
        "I will go through the panels one by one.",
    ],
    "visual_verification": [
        "Let me check this against the picture.",
        "That agrees with the diagram.",
        "The value 7 is consistent with the label in the figure.",
    ],
    "goal_driven_visual_tracing": [
        "To find the height, I need to see the label in the diagram.",
        "To answer this, let me look for the tallest bar.",
        "We want the angle at C, so we should find the triangle in the figure that contains it.",
    ],
}
PLAIN = [
    "So the answer is 12.",
    "The figure shows two circles.",
    "The second train is faster.",
    "He went back home again.",
    "The step size is 20.",
    "Tom came first in the race.",
    "The table has a check mark in each row.",
    "A1 4 = 4 A2 5 = 9",
    "17 is the same . good .",
]


def shown(text):
    return {name for name, number in count(text).items() if number}


@pytest.mark.parametrize("name", NAMES)
def test_each_behaviour_is_heard_in_english_and_in_the_miniature(name):
    assert [text for text in SAYS[name] if name not in shown(text)] == []


def test_plain_sentences_say_nothing():
    assert {text: shown(text) for text in PLAIN if shown(text)} == {}


def test_a_trace_of_the_miniature_shows_exactly_what_it_was_made_of():
    trace = (
        "<think> i need the sum of the grid . so i need each digit . "
        "first list cells , then add up . "
        "A1 4 = 4 A2 5 = 9 A3 2 = 11 wait , that is not right . 9 . look at A3 again : A3 1 = 10 . "
        "let me check . read again : A1 4 = 4 A2 5 = 9 A3 1 = 10 10 is the same . good . </think> "
        "answer \\boxed{ 10 }"
    )
    wanted = dict.fromkeys(NAMES, 0) | dict.fromkeys(behaviors.LINGUISTIC, 1)
    assert count(thinking(trace)) == wanted | {"visual_reflection": 1}
    assert not shown("<think> A1 4 = 4 A2 5 = 9 </think> answer \\boxed{ 9 }")


def test_a_behaviour_counts_once_in_a_sentence_and_again_in_the_next():
    once = "Let me check, let me verify, let me double-check it."
    assert count(once)["verification"] == 1
    assert count(f"{once} {once}\n{once}")["verification"] == 3


def test_doubt_or_again_makes_it_reflection_and_not_verification():
    assert "verification" in shown("Let me check the sum.")
    assert "verification" not in shown("Wait, that is wrong, let me check the sum.")
    assert "verification" not in shown("Let me check the sum again.")
    seen = shown("Hmm, let me check this with the picture again.")
    assert "visual_reflection" in seen and "visual_verification" not in seen


def test_spans_are_the_sentences_themselves():
    text = "The sum is 3.5 cm. Let me check this. \n\nWait, that is wrong!  So 4"
    pieces = {span.name: text[span.start : span.end] for span in find(text)}
    assert pieces == {"verification": "Let me check this.", "backtracking": "Wait, that is wrong!"}


def test_thinking_ends_at_the_last_closing_tag():
    assert thinking("<think> a </think> b </think> answer") == "a </think> b"
    assert thinking("<think>\na\n</think>\n\nanswer") == "a"
    assert thinking("cut off in the mid") == "cut off in the mid"
    assert thinking("<think> cut off") == "cut off"
    assert thinking("</think> answer") == thinking("") == ""


CHECK, LOOK, BACK = "Let me check.", "Look at the figure again.", "Wait, that is wrong."


def test_rates_are_shares_of_responses_not_counts():
    found = rates([f"{CHECK} {CHECK}", f"{CHECK} {BACK}", "nothing", "nothing"])
    assert (found["verification"], found["backtracking"]) == (0.5, 0.25)
    assert set(rates([]).values()) == {0.0}


def test_transfer_is_visual_over_linguistic_and_not_defined_under_ten_carriers():
    backtracking = ("backtracking", "visual_reflection")
    assert PAIRS[0] == backtracking
    texts = [f"{BACK} {LOOK}"] * 4 + [BACK] * 6 + ["nothing"] * 5
    assert transfer_rates(texts)[backtracking] == pytest.approx(0.4)
    assert transfer_rates(texts[1:])[backtracking] is None
    assert transfer_rates([])[backtracking] is None
    assert transfer_interval(texts[1:], backtracking) is None


def test_the_bootstrap_agrees_with_a_naive_one_and_draws_whole_problems():
    rng = np.random.default_rng(1)
    pair = PAIRS[0]
    flags = rng.random((60, 2)) < [0.7, 0.3]
    texts = [f"{BACK if spoken else ''} {LOOK if seen else ''}" for spoken, seen in flags]
    low, high = transfer_interval(texts, pair, draws=4000)
    naive = []
    for _ in range(4000):
        drawn = flags[rng.integers(60, size=60)]
        naive.append(drawn[:, 1].sum() / drawn[:, 0].sum())
    assert (low, high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.04)
    assert low < transfer_rates(texts)[pair] < high
    assert (low, high) == transfer_interval(texts, pair, draws=4000)  # the seed decides

    copies = [text for text in texts for _ in range(8)]  # eight equal samples are no new evidence
    problems = [f"problem {i // 8}" for i in range(len(copies))]
    wide = transfer_interval(copies, pair, items=problems, draws=4000)
    assert wide == pytest.approx((low, high), abs=0.04)
    narrow = transfer_interval(copies, pair, draws=4000)
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcAB wait.!?\n\n ", max_size=200))
def test_sentences_lose_no_word_and_never_overlap(text):
    spans = list(behaviors.sentences(text))
    assert " ".join(text[a:b] for a, b in spans).split() == text.split()
    assert all(a < b for a, b in spans)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
