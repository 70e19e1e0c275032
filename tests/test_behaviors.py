"""Does the lexicon fire where a reader would, and are the rates what their definitions say?"""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation import behaviors
from evaluation.behaviors import NAMES, PAIRS, count, counted, thinking

# fmt: off
SAYS = {
    "backtracking": ["Wait, that can't be, the sign is wrong.", "Scratch that, x is negative.",
        "Hmm, this contradicts the first equation.", "I made a mistake in the second line.",
        "wait , that is not right ."],
    "subgoal_setting": ["First, we need to find the slope.", "Step 2: solve for y.",
        "Before we can add them, we have to find a common denominator.",
        "first list items , then add up .", "<think> first list items , then add up ."],
    "verification": ["Let me check this with n = 2.", "Let's verify the result.",
        "Plugging x = 4 back in gives 16.", "Does this satisfy both equations?", "let me check ."],
    "backward_chaining": ["To get 60, we need a multiple of 12.", "so i need each digit .",
        "Working backwards, the price was 40.",
        "Suppose the answer is D, then the side would be 3."],
    "visual_reflection": ["Let me look at the figure again.", "I should recheck the diagram.",
        "On second look, the arrow points up.", "Perhaps I misread the chart.",
        "look again at A 4 .", "read again : A 4 B 3 C 1 D 2 ."],
    "visual_divide_and_conquer": ["Let me look at the left part of the figure.",
        "We can split the region into two rectangles.", "I will go through the panels one by one."],
    "visual_verification": ["Let me check this against the picture.",
        "That agrees with the diagram.", "The value 7 is consistent with the label in the figure."],
    "goal_driven_visual_tracing": ["To answer this, let me look for the tallest bar.",
        "To find the height, I need to see the label in the diagram.",
        "We want the angle at C, so we should find the triangle in the figure that contains it."],
}
PLAIN = [
    "So the answer is 12.", "The figure shows two circles.", "The second train is faster.",
    "He went back home again.", "The step size is 20.", "Tom came first in the race.",
    "The table has a check mark in each row.", "T 12 A 4 = 8 B 3 = 5 .",
    "A 4 B maybe 3 C 1 D 2 . unclear B ,", "(B) 12: This is incorrect, the order is wrong.",
    "He leaves in a direction that does not create a dead end.", "The rabbit is on step 10.",
    "Checking the options:", "Let's check which shape is used once.",
    "Substitute x back to find y:", "The total is 40, which means that n = 4 if we need it.",
    "Let's review the timeline in the image:", "Let's look at the problem again.",
    "A line of symmetry is a line that divides a shape into two halves.",
    "Now, let's consider the right triangle ABC.",
    "Therefore, the choice that best fits the image is:",
    "To solve this problem, we need to analyze the graph.",
]  # the second half: false hits of an earlier lexicon in real replies
# fmt: on
CASES = Path(__file__).resolve().parents[2] / "shared" / "behavior_cases.jsonl"


def shown(text):
    return {name for name, number in count(text).items() if number}


@pytest.mark.parametrize("name", NAMES)
def test_each_behaviour_is_heard_in_english_and_in_the_miniature(name):
    assert [text for text in SAYS[name] if name not in shown(text)] == []


def test_plain_sentences_say_nothing():
    assert {text: shown(text) for text in PLAIN if shown(text)} == {}


@pytest.mark.skipif(not CASES.exists(), reason="the labelled sentences are not here")
def test_the_labelled_sentences_are_told_apart():
    renamed = {"divide_and_conquer": "visual_divide_and_conquer"}
    renamed |= {"goal_driven_tracing": "goal_driven_visual_tracing"}
    for row in map(json.loads, CASES.read_text().splitlines()):
        name = renamed.get(row["behaviour"], row["behaviour"])
        assert (name in shown(row["text"])) == row["label"], row


def test_a_behaviour_counts_once_in_a_sentence_and_again_in_the_next():
    once = "Let me check, let me verify, let me double-check it."
    assert count(f"{once} {once}\n{once}")["verification"] == 3


def test_doubt_or_again_makes_it_reflection_and_not_verification():
    assert shown("Let me check the sum.") == {"verification"}
    assert "verification" not in shown("Wait, that is wrong, let me check the sum.")
    seen = shown("Hmm, let me check this with the picture again.")
    assert "visual_reflection" in seen and "visual_verification" not in seen


def test_spans_are_the_sentences_themselves():
    text = "The sum is 3.5 cm. Let me check this. \n\nWait, that is wrong!  So 4"
    pieces = {span.name: text[span.start : span.end] for span in behaviors.find(text)}
    assert pieces == {"verification": "Let me check this.", "backtracking": "Wait, that is wrong!"}


def test_thinking_ends_at_the_last_closing_tag():
    assert thinking("<think> a </think> b </think> answer") == "a </think> b"
    assert thinking("<think>\na\n</think>\n\nanswer") == "a"
    assert thinking("cut off in the mid") == "cut off in the mid"
    assert thinking("<think> cut off") == "cut off"
    assert thinking("</think> answer") == thinking("") == ""


CHECK, LOOK, BACK = "Let me check.", "Look at the figure again.", "Wait, that is wrong."


def presence(texts):
    return counted([behaviors.find(text) for text in texts]) > 0


def test_the_interval_of_a_transfer_agrees_with_a_naive_bootstrap_and_draws_whole_problems():
    flags = np.random.default_rng(1).random((60, 2)) < [0.7, 0.3]
    shown = presence([f"{BACK if spoken else ''} {LOOK if seen else ''}" for spoken, seen in flags])
    _, low, high = behaviors.transfers(shown, range(60))[PAIRS[0]]
    sums = flags[np.random.default_rng(2).integers(60, size=(4000, 60))].sum(axis=1)
    naive = np.quantile(sums[:, 1] / sums[:, 0], [0.025, 0.975])
    assert (low, high) == pytest.approx(naive, abs=0.04)
    copies = shown.repeat(8, axis=0)  # eight equal samples are no new evidence
    problems = [f"problem {i // 8}" for i in range(480)]
    assert behaviors.transfers(copies, problems)[PAIRS[0]][1:] == pytest.approx(
        (low, high), abs=0.04
    )


def test_only_the_thought_is_searched_and_no_sentence_that_repeats_the_question():
    question = "Let me check whether you can look at the figure again. What is the angle at C?"
    response = f"<think>\nThe question: {question} I see. {CHECK} It is 40.\n</think> {BACK}"
    spans = behaviors.find_in_thought(response, question)
    assert [(name, response[a:b]) for name, a, b in spans] == [("verification", CHECK)]
    heard = {name for name, *_ in behaviors.find_in_thought(response, "")}
    assert heard == {"verification", "visual_reflection"}
    assert behaviors.find_in_thought("", question) == []


def test_a_rows_own_patterns_are_watched():
    patterns = {"check": r"let me check", "idle": r"look at [A-C]\d again"}
    assert behaviors.watched("let me check B2", patterns) == {"check": True, "idle": False}
    assert behaviors.watched("x", {}) == {}


def graded(response, score=1.0, tokens=500) -> dict:
    row = {"id": response, "response": response, "score": score, "tokens": tokens}
    return row | {"spans": behaviors.find(response)}


def test_graded_rows_tell_rates_by_score_and_without_the_visual_sentences():
    both = "Let me check this against the picture."
    rows = [graded(CHECK), graded(f"{CHECK} {CHECK}", 0.0), graded("nothing", 0.4)]
    found = behaviors.summarise([*rows, graded(both, None), graded("nothing")])
    assert found["rates"]["verification"] == 0.6 and found["rates"]["visual_verification"] == 0.2
    assert found["without_visual"]["verification"] == 0.4
    assert [found["by_score"][s]["verification"] for s in ("right", "wrong")] == [0.5, 0.5]
    assert set(behaviors.summarise([])["rates"].values()) == {0.0}


def test_counts_are_means_and_per_1000_tokens_and_early_rates_of_the_first_2000():
    late = graded(f"{'x. ' * 50} {CHECK}", tokens=4000)  # in the last of its 4,000 tokens
    rows = [late, graded(f"{CHECK} {CHECK} {CHECK}", tokens=1000), graded(CHECK, tokens=None)]
    found = behaviors.summarise(rows)
    assert found["rates"]["verification"] == 1
    assert found["mean_count"]["verification"] == pytest.approx(5 / 3)
    assert found["per_1000_tokens"]["verification"] == pytest.approx(4 / 5)  # of known length
    assert found["first_2000_tokens"]["verification"] == 0.5
    assert not {"per_1000_tokens", "first_2000_tokens"} & set(behaviors.summarise(rows[2:]))


def test_transfer_is_visual_over_linguistic_of_ten_carriers_at_least():
    rows = [graded(f"{BACK} {BACK} {LOOK}")] * 4 + [graded(BACK)] * 6 + [graded("nothing")] * 10
    found, few = behaviors.summarise(rows), behaviors.summarise(rows[1:])
    assert (found["rates"]["backtracking"], found["rates"]["visual_reflection"]) == (0.5, 0.2)
    assert found["transfer"]["visual_reflection"] == pytest.approx(0.4)
    low, high = found["transfer_interval"]["visual_reflection"]
    assert low < 0.4 < high
    assert few["transfer"]["visual_reflection"] is None
    assert few["transfer_interval"]["visual_reflection"] is None


def lexicon_and_judge(rng, rate, sens, spec, responses, judged):
    true = rng.random(responses) < rate
    found = np.where(true, rng.random(responses) < sens, rng.random(responses) < 1 - spec)
    return found, [bool(t) if i < judged else None for i, t in enumerate(true)]


def test_a_judged_sample_puts_the_rate_of_the_lexicon_right():
    rng = np.random.default_rng(0)
    draws = [lexicon_and_judge(rng, 0.3, 0.7, 0.95, 1500, judged=300) for _ in range(100)]
    rate, low, high = np.array([behaviors.corrected_rate(*draw) for draw in draws]).T
    heard = np.mean([found.mean() for found, _ in draws])
    assert heard == pytest.approx(0.245, abs=0.01)  # 0.3 * 0.7 + 0.7 * 0.05
    assert rate.mean() == pytest.approx(0.3, abs=0.01)
    assert ((low <= 0.3) & (0.3 <= high)).sum() >= 88


def test_the_correction_is_the_formula_on_a_table_done_by_hand():
    # judged: 40 yes (30 heard), 60 no (12 heard); 100 not judged, 38 heard: rate 80 / 200
    found = [1] * 30 + [0] * 10 + [1] * 12 + [0] * 48 + [1] * 38 + [0] * 62
    said = [1] * 40 + [0] * 60 + [None] * 100
    sens, spec = 30 / 40, 48 / 60
    rate, low, high = behaviors.corrected_rate(found, said)
    assert rate == pytest.approx((0.4 + spec - 1) / (sens + spec - 1))
    assert 0 <= low < rate < high <= 1
    assert behaviors.corrected_rate(found, [3 * s if s else s for s in said])[0] == rate  # counts


def test_no_rate_is_corrected_by_a_handful_or_where_the_lexicon_is_deaf():
    rng = np.random.default_rng(1)
    few = lexicon_and_judge(rng, 0.5, 0.8, 0.8, responses=400, judged=12)
    deaf = lexicon_and_judge(rng, 0.5, 0.5, 0.5, responses=4000, judged=2000)
    for found, said in (few, deaf, ([True] * 50, [None] * 50), ([], [])):
        assert behaviors.corrected_rate(found, said) is None


def test_the_difference_of_two_sets_agrees_with_a_naive_loop_over_problems():
    rng, look = np.random.default_rng(2), NAMES.index("visual_reflection")
    items = [i for i in range(40) for _ in range(1 + i % 5)]  # of one problem one sample to five
    likes = rng.random(40)
    seen = presence([LOOK if rng.random() < likes[item] else "nothing" for item in items])
    blank = presence([LOOK if rng.random() < 0.6 * likes[item] else "nothing" for item in items])
    gaps = seen.astype(int) - blank
    found = behaviors.means(gaps, items)
    rate, low, high = found["visual_reflection"]
    by_problem = [gaps[np.array(items) == i, look] for i in range(40)]
    draws = rng.integers(40, size=(2000, 40))
    naive = [np.concatenate([by_problem[i] for i in drawn]).mean() for drawn in draws]
    assert rate == pytest.approx(gaps[:, look].mean())
    assert (low, high) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.01)
    assert found["verification"] == (0.0, 0.0, 0.0)
    assert behaviors.means(np.ones((len(items), 8)), items)["verification"] == (1, 1, 1)
