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


def test_each_behaviour_is_heard_in_english_and_in_the_miniature_and_none_in_plain_sentences():
    said = [(name, text) for name in NAMES for text in SAYS[name]]
    assert [(name, text) for name, text in said if name not in shown(text)] == []
    assert {text: shown(text) for text in PLAIN if shown(text)} == {}


@pytest.mark.skipif(not CASES.exists(), reason="the labelled sentences are not here")
def test_the_labelled_sentences_are_told_apart():
    renamed = {"divide_and_conquer": "visual_divide_and_conquer"}
    renamed |= {"goal_driven_tracing": "goal_driven_visual_tracing"}
    for row in map(json.loads, CASES.read_text().splitlines()):
        name = renamed.get(row["behaviour"], row["behaviour"])
        assert (name in shown(row["text"])) == row["label"], row


def test_a_behaviour_counts_once_in_a_sentence_and_spans_are_the_sentences_themselves():
    text = "3.5 cm. Let me check, let me verify it. \n\nWait, that is wrong!  So 4\nLet me check"
    pieces = [(span.name, text[span.start : span.end]) for span in behaviors.find(text)]
    checks = [("verification", "Let me check, let me verify it."), ("verification", "Let me check")]
    assert pieces == [checks[0], ("backtracking", "Wait, that is wrong!"), checks[1]]
    assert behaviors.find(text)[-1].end == len(text), "not where its words stand first"
    assert count(text) == dict.fromkeys(NAMES, 0) | {"verification": 2, "backtracking": 1}


def test_doubt_or_again_makes_it_reflection_and_not_verification():
    assert shown("Let me check the sum.") == {"verification"}
    assert "verification" not in shown("Wait, that is wrong, let me check the sum.")
    seen = shown("Hmm, let me check this with the picture again.")
    assert "visual_reflection" in seen and "visual_verification" not in seen


def test_thinking_ends_at_the_last_closing_tag():
    assert thinking("<think> a </think> b </think> answer") == "a </think> b"
    assert thinking("<think>\na\n</think>\n\nanswer") == "a"
    assert thinking("cut off in the mid") == "cut off in the mid"
    assert thinking("<think> cut off") == "cut off"
    assert thinking("</think> answer") == thinking("") == ""


CHECK, LOOK, BACK = "Let me check.", "Look at the figure again.", "Wait, that is wrong."


def test_only_the_thought_is_searched_and_no_sentence_that_repeats_the_question():
    question = "Let me check whether you can look at the figure again. What is the angle at C?"
    response = f"<think>\nThe question: {question} I see. {CHECK} It is 40.\n</think> {BACK}"
    spans = behaviors.find_in_thought(response, question)
    assert [(name, response[a:b]) for name, a, b in spans] == [("verification", CHECK)]
    heard = {name for name, *_ in behaviors.find_in_thought(response, "")}
    assert heard == {"verification", "visual_reflection"}
    assert behaviors.find_in_thought("", question) == []


def graded(response, score=1.0, tokens=500) -> dict:
    row = {"id": response, "response": response, "score": score, "tokens": tokens}
    return row | {"spans": behaviors.find(response)}


def test_graded_rows_tell_rates_by_score_and_without_the_visual_sentences():
    both = "Let me check this against the picture."
    rows = [graded(CHECK), graded(f"{CHECK} {CHECK}", 0.0), graded(CHECK, 0.4)]
    found = behaviors.summarise([*rows, graded(both, None), graded("nothing")])
    assert found["rates"]["verification"] == 0.8 and found["rates"]["visual_verification"] == 0.2
    assert found["without_visual"]["verification"] == 0.6
    assert [found["by_score"][s]["verification"] for s in ("right", "wrong")] == [0.5, 1.0]
    assert set(behaviors.summarise([])["rates"].values()) == {0.0}


def test_counts_are_means_and_per_1000_tokens_and_early_rates_of_the_first_2000():
    late = graded(f"{'x. ' * 50} {CHECK}", tokens=4000)  # in the last of its 4,000 tokens
    rows = [late, graded(f"{CHECK} {CHECK} {CHECK}", tokens=1000), graded(CHECK, tokens=None)]
    found = behaviors.summarise(rows)
    assert found["mean_count"]["verification"] == pytest.approx(5 / 3)
    assert found["per_1000_tokens"]["verification"] == pytest.approx(4 / 5)  # of known length
    assert found["first_2000_tokens"]["verification"] == 0.5
    assert not {"per_1000_tokens", "first_2000_tokens"} & set(behaviors.summarise(rows[2:]))


def test_transfer_is_visual_over_linguistic_of_ten_carriers_at_least():
    rows = [graded(f"{BACK} {BACK} {LOOK}")] * 4 + [graded(BACK)] * 6 + [graded("nothing")] * 10
    for few, expected in ((0, pytest.approx(0.4)), (1, None)):
        found = behaviors.summarise(rows[few:])
        assert found["transfer"]["visual_reflection"] == expected
        assert (found["transfer_interval"]["visual_reflection"] is None) == bool(few)


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
    counts = [3] * 40 + [0] * 60 + [None] * 100
    sens, spec = 30 / 40, 48 / 60
    rate, low, high = behaviors.corrected_rate(found, counts)
    assert rate == pytest.approx((0.4 + spec - 1) / (sens + spec - 1))
    assert 0 <= low < rate < high <= 1


def test_no_rate_is_corrected_by_a_handful_or_where_the_lexicon_is_deaf():
    rng = np.random.default_rng(1)
    few = lexicon_and_judge(rng, 0.5, 0.8, 0.8, responses=400, judged=12)
    deaf = lexicon_and_judge(rng, 0.5, 0.5, 0.5, responses=4000, judged=2000)
    for found, said in (few, deaf, ([True] * 50, [None] * 50), ([], [])):
        assert behaviors.corrected_rate(found, said) is None


def naive_interval(values: np.ndarray, items: np.ndarray, statistic) -> np.ndarray:
    """95 % of what is seen where whole problems are drawn, one after the other."""
    of_problem = [values[items == item] for item in np.unique(items)]
    draws = np.random.default_rng(2).integers(len(of_problem), size=(2000, len(of_problem)))
    found = [statistic(np.concatenate([of_problem[k] for k in drawn])) for drawn in draws]
    return np.quantile(found, [0.025, 0.975])


def test_intervals_of_rates_and_transfers_agree_with_a_naive_loop_that_draws_whole_problems():
    rng, look = np.random.default_rng(1), NAMES.index("visual_reflection")
    items = np.array([i for i in range(40) for _ in range(1 + i % 5)])  # one sample to five
    likes = rng.random((40, 2))[items]  # samples of one problem are alike
    flags = rng.random((len(items), 2)) < likes
    texts = [f"{BACK if spoken else ''} {LOOK if seen else ''}" for spoken, seen in flags]
    shown = counted([behaviors.find(text) for text in texts]) > 0

    rate, *ends = behaviors.transfers(shown, items)[PAIRS[0]]
    assert rate == pytest.approx(flags[:, 1].sum() / flags[:, 0].sum())
    naive = naive_interval(flags, items, lambda drawn: drawn[:, 1].sum() / drawn[:, 0].sum())
    assert ends == pytest.approx(naive, abs=0.04)

    gaps = shown.astype(int) - (rng.random((len(items), 1)) < 0.4)  # of two runs
    rate, *ends = behaviors.means(gaps, items)["visual_reflection"]
    assert rate == pytest.approx(gaps[:, look].mean())
    assert ends == pytest.approx(naive_interval(gaps[:, look], items, np.mean), abs=0.02)
    assert behaviors.means(np.ones((len(items), 8)), items)["verification"] == (1, 1, 1)
