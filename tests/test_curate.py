"""Curation: each rule on rows it must and must not drop, duplicates and test questions planted
among near misses, weights by hand, the same bytes from any number of workers, no row lost."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common import data
from curation import alike, curate, logic

THOUGHT = (
    "We add the two numbers. First the ones: seven and five are twelve, so two stays and one is "
    "carried. Then the tens: one and one and the one carried make three."
)
ROW = {
    "id": "s/1",
    "source": "s",
    "prompt": "What is the sum of 17 and 15?",
    "response": f"<think>{THOUGHT}</think>The sum is \\boxed{{32}}.",
    "answer": "32",
}


def reason(**columns) -> str | None:
    number, _ = curate.judge(ROW | columns)
    return curate.REASONS[number][1] if number else None


def said(conclusion: str, thought: str = THOUGHT) -> dict:
    return {"response": f"<think>{thought}</think>{conclusion}"}


def gold(answer: str, **columns) -> dict:
    return {"answer": answer, **said(f"\\boxed{{{answer}}}"), **columns}


REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
LINES = [f"Case {i}: {i} * {i + 3} = {i * (i + 3)}, which is not a square." for i in range(60)]
DROPPED = {
    "malformed": [
        {"prompt": "<|im_start|>user What is 17 + 15?"},
        {"prompt": "<image> and <image>: add.", "images": ["a.png"]},
        {"response": "  "},
        {"prompt": 7},
        {"images": "a.png"},
        {"images": [{"path": "a.png"}]},
        {"choices": "A, B"},
        {"choices": []},
        {"precision": "0.1"},
        {"precision": True},
        {"answer": ["32"]},
    ],
    "mojibake": [
        {"prompt": "The cafÃ© sells 17 and 15 cups. Sum?"},
        {"prompt": "Itâ€™s 17 and 15. Sum?"},
        said("The angle is 32Â° \ufffd \\boxed{32}"),
        {"prompt": "half a pair \ud83d of 17 and 15"},
    ],
    "degenerate_length": [
        {"prompt": "32"},
        {"prompt": "word " * 5000},
        {"response": "<think></think>\\boxed{32}"},
        {"response": "x" * 262_145},
    ],
    "bad_thought": [
        {"response": f"{THOUGHT} \\boxed{{32}}"},
        {"response": f"<think>{THOUGHT} \\boxed{{32}}"},
        {"response": f"<think>{THOUGHT}</think><think>no</think>\\boxed{{32}}"},
        {"response": f"Well, <think>{THOUGHT}</think>\\boxed{{32}}"},
        {"response": f"<think>\n</think>{THOUGHT} \\boxed{{32}}"},
    ],
    "no_box": [
        said("The sum is 32."),
        said("It is \\boxed{32", THOUGHT),
        said("The sum is 32.", THOUGHT + " \\boxed{32}"),  # a box in the thought is not the answer
        said("It is \\boxed{ }"),
        said("\\boxed{32} or \\boxed{33}"),
    ],
    "refusal": [
        said("As an AI language model, I say \\boxed{32}."),
        said("\\boxed{32}", THOUGHT + " I'm sorry, but I can't do more."),
        said("\\boxed{32}", "I cannot see the image, so I guess. " + THOUGHT),
    ],
    "truncated": [
        said("So \\boxed{32}. And the other one is of"),
        said("So \\boxed{32}, and then,"),
        said("So \\boxed{32}. ```python\nprint(1)"),
        said("So \\boxed{32}. \\[ x = 3"),
    ],
    "mixed_script": [
        said("\\boxed{32}", THOUGHT + " 因此 it is done."),
        said("\\boxed{32}", THOUGHT + " Это верно."),
        said("\\boxed{32}", THOUGHT + " ดังนั้น"),
    ],
    "proof": [gold("1", prompt="Prove that the square of an odd number is odd.")],
    "unjudgeable": [
        {"answer": "proof"},
        {"answer": " "},
        {"answer": "answers may vary"},
        {"answer": "because the sum of the angles does not depend on where the point was put"},
        {"answer": "x" * 201},
        {"answer": "\\frac{1}{"},
    ],
    "leak": [
        {"prompt": "What is 17 + 15? Answer: 32"},
        {"prompt": "What is 17 + 15?\n(The answer is $32$.)\nExplain."},
        {"prompt": "What is 17 + 15? \\boxed{32}"},
        gold("\\frac{1}{2}", prompt="Halve one. Ans: \\frac{1} {2}"),
    ],
    "wrong_box": [said("The sum is \\boxed{33}."), said("First \\boxed{32}. No: \\boxed{33}.")],
    "repetition": [
        said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 60),
        said("\\boxed{32}", "\n".join(LINES) + " no" * 2000),  # a loop at the end only
        said("\\boxed{32}", "\n".join(LINES * 4)),
    ],
    "lost_picture": [{"images": ["nowhere.png"], "folder": "."}],
}
KEPT = [
    {},
    {"response": f"\n <think>{THOUGHT}</think>\\boxed{{32}}\n"},
    {"prompt": "NÃO, «MAÇÃ»: São Paulo, Ângulo 32°, naïve œuvre — 17 and 15?"},
    {"prompt": "Answer yes or no: is 32 the sum? Enter your answer as \\boxed{}."},
    {"prompt": "The answer is 32.5 if rounded up. What is it rounded down?"},
    {"prompt": "If the answer is 32, what was asked of 17 and 15?"},
    gold("yes", prompt="Is 17 + 15 even? Answer: yes or no"),
    {"prompt": "There are 32 teeth. How many teeth are there?"},  # silly, but the matcher can judge
    said("So I'm sorry, I was wrong at first; we cannot divide by zero. \\boxed{32}"),
    said("**The sum is \\boxed{32}**"),
    said(
        "Hence\n\\[\n\\begin{aligned} a &= 1 \\\\[4pt] b &= 2 \\end{aligned}\n\\]\n\\boxed{32} cm"
    ),
    said("\\boxed{32}", THOUGHT + " The group Ш, the cardinal ℵ, the angle αβγ and the letter Ж."),
    said("\\boxed{32}", "\n".join(LINES)),  # an honest enumeration
    said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 3 + THOUGHT),
    gold("是", prompt="十七加十五等于三十二吗？ 是 or 否") | said("所以 \\boxed{是}"),
    gold("4", prompt="Show that x = 2 solves it, and find the other root."),
    gold("(-\\infty, 2) \\cup [3, \\infty)"),
    gold("x^2 + 2x + 1"),
    gold("B", choices=["a very long option that goes on and on and on", "32"]),
    {"answer": 32},
]


@pytest.mark.parametrize("name", DROPPED)
def test_a_rule_drops_what_it_is_for(name):
    assert [reason(**columns) for columns in DROPPED[name]] == [name] * len(DROPPED[name])


@pytest.mark.parametrize("columns", KEPT, ids=range(len(KEPT)))
def test_no_rule_drops_an_honest_row(columns):
    assert reason(**columns) is None


def test_every_rule_has_a_test_and_a_reason():
    assert set(DROPPED) == {rule.__name__ for rule in curate.RULES}
    assert all(len(why) > 20 for step, _, why in curate.REASONS if step == "rules")


# ---- duplicates


def shingles(text: str) -> set:
    tokens = text.split()
    return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}


def babble(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefghij", k=5)) for _ in range(count)]


def test_minhash_and_its_sketch_estimate_the_jaccard_similarity():
    rng, errors = random.Random(0), []
    for _ in range(150):
        a = babble(rng, rng.randint(30, 200))
        b = a[: rng.randint(0, len(a))] + babble(rng, rng.randint(0, 60))
        exact = [shingles(" ".join(x)) for x in (a, b)]
        if not exact[1]:
            continue
        jaccard = len(exact[0] & exact[1]) / len(exact[0] | exact[1])
        signed = [alike.signature(x) for x in (a, b)]
        errors.append((signed[0] == signed[1]).mean() - jaccard)
        errors.append(float(alike.similarity(*map(alike.sketch, signed))) - jaccard)
    assert np.sqrt(np.mean(np.square(errors))) < 0.05  # sqrt(J (1 - J) / 128) is 0.044 at most
    assert abs(np.mean(errors)) < 0.015  # and no bias


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Find $\\dfrac12$ of \\left( x \\right).", "find \\frac{1}{2} of (x)", True),
        ("3. What is it?", "What is it?", True),
        ("Problem 12: What is it?", "what is it", True),
        ("Compute 2 + 3", "Compute 2 - 3", False),
        ("Compute 2 − 3", "Compute 2-3", True),
        ("Compute 6 × 3", "Compute 6 ÷ 3", False),
        ("Compute 3!", "Compute 3", False),
        ("An eight-digit number", "an eight digit number", True),
        ("求三角形的面积", "求三角形的周长", False),
        ("A grid:\nS . #\n. . E", "A grid:\nS # .\n. . E", False),
    ],
)
def test_words_are_what_a_prompt_asks_not_how_it_is_set(a, b, same):
    assert (alike.words(a) == alike.words(b)) is same


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curated(tmp_path, rows: list[dict], **settings) -> tuple[list[dict], dict[str, dict], dict]:
    """(rows kept, dropped ones by id, report)"""
    settings = {"kind": "rl", "out": str(tmp_path / "new" / "rl.jsonl")} | settings
    source = write_rows(tmp_path / "old" / "rows.jsonl", rows)
    report = curate.main(curate.Config(rows=(source,), **settings))
    out = Path(settings["out"])
    return read(out), {row["id"]: row for row in read(out.with_suffix(".dropped.jsonl"))}, report


def problem(name: str, prompt: str, answer: str = "5", **columns) -> dict:
    return {"id": name, "source": "s", "prompt": prompt, "answer": answer, **columns}


LONG = (
    "A farmer has 12 apples and gives some of them to each of his neighbours, who live along the "
    "river, so that nobody has more than anybody else and the rest is as small as it can be. How "
    "many apples are left to him if there are 7 neighbours in the village and none is away today?"
)


def test_duplicates_are_found_and_near_misses_stay(tmp_path):
    rows = [
        problem("first", LONG),
        problem("case", "Problem 3. " + LONG.upper()),  # the same words
        problem("typo", LONG.replace("neighbours in the village", "neighbors in the village")),
        problem("digit", LONG.replace("12 apples", "13 apples")),
        problem("answer", LONG.replace("left to him", "left to them"), "6"),
        problem("first", "Another problem that bears a name which was given away."),
        problem("short", "Compute 2 + 3."),
        problem("minus", "Compute 2 - 3."),
        problem("copy of the typo", LONG.replace("neighbours in", "neighbors in")),
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert [row["id"] for row in kept] == ["first", "digit", "answer", "short", "minus"]
    reasons = {name: (row["reason"], row["detail"]) for name, row in dropped.items()}
    assert reasons == {
        "case": ("same_words", "as first"),
        "typo": ("near", "as first"),
        "copy of the typo": ("near", "as first"),
        "first": ("repeated_id", "as first"),
    }


def roots(texts: list[str]) -> np.ndarray:
    facts = np.zeros(len(texts), curate.FACT)
    for text, fact in zip(texts, facts, strict=True):
        curate.compare_by({"prompt": text, "folder": "."}, fact)
    return alike.repeats(facts)


def test_made_problems_repeat_only_where_they_are_equal(tmp_path):
    """Prompts of a family differ in little: a grid, a name, a number."""
    rows = list(logic.problems(1_100, 5))
    kept, dropped, _ = curated(tmp_path, rows)
    seen, equal = set(), set()
    for row in rows:
        (equal if row["prompt"] in seen else seen).add(row["prompt"])
    wrongly = [i for i, d in dropped.items() if d["step"] == "duplicates"]
    assert {row["prompt"] for row in rows if row["id"] in wrongly} == equal


def test_near_duplicates_agree_with_exact_jaccard_on_random_texts():
    """Every pair over 0.9 is found, none under 0.65; the first of each family stays."""
    rng, texts = random.Random(1), []
    for _ in range(60):
        base = babble(rng, 120)
        for changes in (0, 1, 2, 6):
            text = list(base)
            for place in rng.sample(range(120), changes):
                text[place] = babble(rng, 1)[0]
            texts.append(" ".join(text))
    root = roots(texts)
    for i in range(len(texts)):
        first = i - i % 4
        a, b = shingles(texts[first]), shingles(texts[i])
        jaccard = len(a & b) / len(a | b)
        assert root[i] in (first, i)  # never of another family
        if jaccard > 0.9:
            assert root[i] == first
        if jaccard < 0.65:
            assert root[i] == i


def test_a_chain_of_likenesses_does_not_drop_what_is_unlike_the_row_that_stays():
    """Windows that slide over a text: each is like the next, the first is not like the fifth."""
    rng, texts = random.Random(2), []
    for _ in range(20):
        long = babble(rng, 270)
        texts += [" ".join(long[at : at + 200]) for at in range(0, 70, 14)]
    root = roots(texts)
    assert (root != np.arange(len(texts))).sum() > 20
    for i, first in enumerate(root):
        a, b = shingles(texts[first]), shingles(texts[i])
        assert len(a & b) / len(a | b) > 0.68


def picture(path: Path, seed: int, size: int = 120) -> Path:
    rng, image = random.Random(seed), Image.new("RGB", (120, 120), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        draw.polygon([(rng.randrange(120), rng.randrange(120)) for _ in range(3)], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((size, size)).save(path)
    return path


def test_pictures_are_part_of_a_problem_and_found_from_the_new_file(tmp_path):
    for name, seed in {"a": 1, "b": 2, "same": 1}.items():
        picture(tmp_path / "old" / "images" / f"{name}.png", seed)
    rows = [
        problem(name, "<image>How many corners?", images=[f"images/{name}.png"])
        for name in ("a", "b", "same", "lost")
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert [row["id"] for row in kept] == ["a", "b"]
    assert dropped["same"]["reason"] == "same_words" and dropped["lost"]["reason"] == "lost_picture"
    assert [p.id for p in data.read_problems(tmp_path / "new" / "rl.jsonl")] == ["a", "b"]


# ---- benchmarks

BOILERPLATE = (
    "can be written in the form $\\frac{m}{n}$ where $m$ and $n$ are relatively prime positive "
    "integers. Find $m+n$."
)
SHAPES = "<image>Which of the shapes that you see in the drawing has most corners, which has least?"
TESTS = [
    {"id": "t/long", "prompt": LONG},
    {
        "id": "t/aime",
        "prompt": f"Nine dice are thrown onto a round table, and those that fall from it are "
        f"thrown again until none does. The probability that two of them agree {BOILERPLATE}",
    },
    {"id": "t/short", "prompt": "How many primes are below fifty?"},
    {
        "id": "t/drawing",
        "prompt": SHAPES,
    },
]


def test_planted_test_questions_are_found_and_boilerplate_is_not(tmp_path):
    picture(tmp_path / "tests" / "t.png", 7)
    picture(tmp_path / "old" / "again.jpg", 7, size=90)
    picture(tmp_path / "old" / "other.png", 8)
    (tmp_path / "old" / "copy.png").write_bytes((tmp_path / "tests" / "t.png").read_bytes())
    tests = write_rows(
        tmp_path / "tests" / "t.jsonl", [*TESTS[:3], TESTS[3] | {"images": ["t.png"]}]
    )
    rows = [
        problem("quoted", f"Here is one from a contest. {LONG} Think step by step, then answer."),
        problem("varied", LONG.replace("12 apples", "19 apples").replace("today", "now")),
        problem("excerpt", LONG[: LONG.index(" How many")] + " How many apples?"),
        problem("aime", f"The area of the smallest such triangle with whole sides {BOILERPLATE}"),
        problem("short", "how many primes are below FIFTY"),
        problem("short miss", "How many primes are below sixty?"),
        problem("copy", "<image>What colour is the largest one?", images=["copy.png"]),
        problem("again", "<image>What colour is the smallest one?", images=["again.jpg"]),
        problem("template", SHAPES, images=["other.png"]),
    ]
    kept, dropped, _ = curated(tmp_path, rows, benchmarks=(tests,))
    assert [row["id"] for row in kept] == ["aime", "short miss", "template"]
    assert {row["reason"] for row in dropped.values()} == {"contaminated"}
    pairs = {row["id"]: row for row in read(tmp_path / "new" / "rl.contaminated.jsonl")}
    assert {name: (row["benchmark_id"], row["kind"]) for name, row in pairs.items()} == {
        "quoted": ("t/long", "text"),
        "varied": ("t/long", "text"),
        "excerpt": ("t/long", "text"),
        "short": ("t/short", "words"),
        "copy": ("t/drawing", "image"),
        "again": ("t/drawing", "image_near"),
    }


def test_what_all_questions_of_a_benchmark_are_told_is_not_part_of_them(tmp_path):
    told = "Think step by step. Put the final answer in \\boxed{}."
    asked = {"id": "b/1", "question": "How many primes are below fifty?"}
    tests = write_rows(tmp_path / "t.jsonl", [asked | {"prompt": f"{asked['question']} {told}"}])
    rows = [problem("same", asked["question"]), problem("other", "How many cats are there?")]
    kept, dropped, _ = curated(tmp_path, rows, benchmarks=(tests,))
    assert [row["id"] for row in kept] == ["other"] and [*dropped] == ["same"]


def test_containment_is_the_share_of_the_question_that_stands_in_the_prompt(tmp_path):
    rng = random.Random(2)
    question, other = babble(rng, 37), babble(rng, 60)  # 30 runs of eight words
    tests = alike.read_benchmarks([{"id": "t", "prompt": " ".join(question), "images": []}])
    for shared, expected in ((37, 1.0), (25, 0.6), (24, None)):  # 30, 18, 17 runs
        row = {"prompt": " ".join(question[:shared] + other), "folder": "."}
        found = [(name, score) for name, score, _ in alike.contaminations(row, tests)]
        assert found == ([("t", expected)] if expected else [])


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the repository")
def test_real_benchmarks_overlap_where_they_are_known_to_and_nowhere_else(tmp_path):
    """MathVision has items of MATH500 (here two of its 304); no boilerplate of AIME is flagged."""
    paths = {}
    for name in ("math500", "mathvision_mini", "aime2024", "aime2025", "mmk12_eval", "bbh"):
        rows = read(REAL / name / f"{name}.jsonl")
        paths[name] = tmp_path / f"{name}.jsonl"
        write_rows(paths[name], [problem(row["id"], row["question"]) for row in rows])
    found = set()
    for path in paths.values():
        others = [str(other) for other in paths.values() if other != path]
        tests = alike.read_benchmarks(curate.test_rows(others))
        for _, row in curate.rows_of(path, 0, path.stat().st_size):
            found |= {(row["id"], test) for test, _, _ in alike.contaminations(row, tests)}
    known = {("math500_004", "mathvision_2665"), ("math500_301", "mathvision_2636")}
    assert found == known | {(b, a) for a, b in known}


# ---- strata and weights


def test_weights_are_the_size_of_the_stratum_to_the_minus_alpha():
    uniform, strata = np.array([0.5, 0.1, 0.9, 0.5]), np.array([3, 3, 3, 8])
    for alpha in (0.0, 0.5, 1.0):
        by_hand = [-math.log(u) / n**-alpha for u, n in zip(uniform, (3, 3, 3, 1), strict=True)]
        assert np.allclose(curate.sampling_keys(uniform, strata, alpha), by_hand)


def test_alpha_0_keeps_the_proportions_and_alpha_1_makes_strata_equal():
    strata = np.repeat([0, 1], [9000, 1000])
    uniform = np.random.default_rng(0).random(10_000)
    rare = [
        (strata[curate.chosen(uniform, strata, alpha, 500)] == 1).mean() for alpha in (0, 0.5, 1)
    ]
    # sqrt(1000) / (sqrt(1000) + sqrt(9000)) = 0.25; a little less, as the rare ones run out
    assert np.allclose(rare, [0.1, 0.25, 0.5], atol=0.05)
    assert curate.chosen(uniform, strata, 0.5, 0).tolist() == list(range(10_000))


# ---- the whole


def mixture(rng: random.Random, count: int) -> list[dict]:
    """Rows of three sources: good ones, each kind of bad one, copies."""
    bad = [columns for group in list(DROPPED.values())[:-1] for columns in group]
    rows = []
    for i in range(count):
        text = " ".join(babble(rng, 40))
        row = ROW | {"prompt": f"What is it? {text}", "level": rng.choice([1, 2, None])}
        if rng.random() < 0.3:
            row |= rng.choice(bad)
        elif rows and rng.random() < 0.2:
            row["prompt"] = rng.choice(rows)["prompt"]
        rows.append(row | {"id": f"{i}", "source": rng.choice("abc")})
    return rows


def test_any_number_of_workers_writes_the_same_bytes_and_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "CHUNK", 20_000)  # many pieces
    rows = mixture(random.Random(3), 300)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    tests = write_rows(tmp_path / "t.jsonl", [{"id": "t", "prompt": rows[5]["prompt"]}])
    written = []
    for workers in (1, 2, 3):
        out = tmp_path / f"{workers}"
        report = curate.main(
            curate.Config(
                (source,), "sft", f"{out}/sft.jsonl", (tests,), count=60, seed=5, workers=workers
            )
        )
        assert not list(out.glob("*.part"))
        written.append({path.name: path.read_bytes() for path in out.glob("*.jsonl")})
        about = json.loads((out / "sft.report.json").read_text())
        assert {name: about[name] for name in report} == report
        written[-1]["report"] = [about[name] for name in ("steps", "strata", "losses", "why")]
    assert written[0] == written[1] == written[2] and len(written[0]) == 4
    kept, dropped = read(out / "sft.jsonl"), read(out / "sft.dropped.jsonl")
    assert sorted(row["id"] for row in kept + dropped) == sorted(row["id"] for row in rows)
    assert len(kept) == 60 and {row["step"] for row in dropped} == set(curate.STEPS) - {
        "loss",
        "passes",
    }
    for source in "abc":
        left = sum(row["source"] == source for row in rows)
        for step in curate.STEPS:
            of = report["steps"][step][source]
            assert of["in"] == left == of["kept"] + sum(of["reasons"].values())
            left = of["kept"]
        assert left == sum(row["source"] == source for row in kept)
    assert sum(of["kept"] for of in report["strata"].values()) == 60
    order = {row["id"]: i for i, row in enumerate(rows)}
    assert [order[row["id"]] for row in kept] == sorted(order[row["id"]] for row in kept)
    assert len(data.read_examples(out / "sft.jsonl")) == 60  # stage 1 reads what was written


def test_another_seed_draws_other_rows_and_a_larger_count_adds_to_the_smaller(tmp_path):
    rng = random.Random(4)
    rows = [problem(f"{i}", " ".join(babble(rng, 30))) for i in range(200)]
    draws = {}
    for seed, count in ((0, 50), (0, 80), (1, 50)):
        kept, _, _ = curated(tmp_path / f"{seed}-{count}", rows, seed=seed, count=count)
        draws[seed, count] = {row["id"] for row in kept}
    assert draws[0, 50] < draws[0, 80] and draws[0, 50] != draws[1, 50]


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_pieces_of_a_file_hold_each_line_once(tmp_path, size):
    rng = random.Random(size)
    rows = [{"id": str(i), "text": "ä" * rng.randrange(40)} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows))  # no last newline
    total = path.stat().st_size
    found = [
        row["id"]
        for at in range(0, total, size)
        for _, row in curate.rows_of(path, at, min(at + size, total))
    ]
    assert found == [row["id"] for row in rows]


def test_lines_that_are_no_rows_are_dropped_rows_under_the_name_of_their_place(tmp_path):
    good = [problem(f"{i}", " ".join(babble(random.Random(i), 20))) for i in range(3)]
    lines = {
        b'{"id": "1", "source": "s", "prompt": "x"}': "['answer'] missing",
        b'{"id": "1", ': "not JSON",
        b"[1]": "not a row",
        b'{"id": [1], "source": "s", "prompt": "x y", "answer": "1"}': "id is [1]",
        b'{"id": " ", "source": "s", "prompt": "x y", "answer": "1"}': "id is ' '",
        b'{"id": "1", "source": "s", "prompt": "\xff y", "answer": "1"}': "not JSON",
        b"[" * 100_000: "not JSON",
    }
    source = tmp_path / "rows.jsonl"
    all_lines = [json.dumps(good[0]).encode(), *lines, *(json.dumps(g).encode() for g in good[1:])]
    source.write_bytes(b"\n".join(all_lines))
    for workers in (1, 2):
        out = tmp_path / f"{workers}" / "rl.jsonl"
        report = curate.main(curate.Config((str(source),), "rl", str(out), workers=workers))
        assert [row["id"] for row in read(out)] == ["0", "1", "2"]
        dropped = read(out.with_suffix(".dropped.jsonl"))
        places = [sum(len(line) + 1 for line in all_lines[: i + 1]) for i in range(len(lines))]
        assert [row["id"] for row in dropped] == [f"rows.jsonl, byte {at}" for at in places]
        for row, detail in zip(dropped, lines.values(), strict=True):
            assert row["reason"] == "unreadable" and row["detail"].startswith(detail), row
        of = report["steps"]["rules"]["rows.jsonl"]
        assert of == {"in": len(lines), "kept": 0, "reasons": {"unreadable": len(lines)}}


def test_a_file_of_which_nothing_stays_says_so_and_fails(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"id": "1", "question": "no such column"}])
    with pytest.raises(SystemExit, match="no row stays of 1"):
        curate.main(curate.Config((path,), "rl", str(tmp_path / "out.jsonl")))


def test_odd_text_in_any_column_does_not_stop_a_run(tmp_path):
    rng, odd = random.Random(8), "half \ud83d"
    rows = [problem(f"{i}", " ".join(babble(rng, 20))) for i in range(4)]
    rows[0] |= {"source": odd, "level": odd}
    rows[1] |= {"id": odd}
    rows[2] |= {"origin": {"note": odd}}
    kept, dropped, report = curated(tmp_path, rows)
    assert len(kept) == 4 and not dropped and "half ?" in report["steps"]["rules"]


def test_a_decompression_bomb_is_a_lost_picture(tmp_path):
    picture(tmp_path / "old" / "good.png", 1)
    Image.new("1", (30_000, 3_000)).save(tmp_path / "old" / "bomb.png")  # 90 MPixel in 11 kB
    (tmp_path / "old" / "cut.png").write_bytes((tmp_path / "old" / "good.png").read_bytes()[:200])
    rows = [
        problem(name, f"What is {name}?", images=[f"{name}.png"])
        for name in ("good", "bomb", "cut", "gone")
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert [row["id"] for row in kept] == ["good"]
    assert {row["reason"] for row in dropped.values()} == {"lost_picture"}
    assert "decompression bomb" in dropped["bomb"]["detail"]


# ---- scores


def scored(path: Path, column: str, values: dict, **columns) -> str:
    return write_rows(path, [{"id": i, column: v, **columns} for i, v in values.items()])


def test_abnormal_losses_go_by_the_median_and_mad_of_their_source(tmp_path):
    rng = random.Random(6)
    rows, losses = [], {}
    for source, centre in (("easy", 0.4), ("hard", 1.2)):
        for i in range(60):
            name = f"{source}{i}"
            rows.append(problem(name, " ".join(babble(rng, 20)), source=source))
            losses[name] = rng.gauss(centre, 0.05)
    losses["easy7"], losses["hard3"], losses["hard9"] = 1.2, 9.0, 0.1  # easy7: normal for "hard"
    losses["hard11"] = None
    kept, dropped, report = curated(
        tmp_path, rows, losses=(scored(tmp_path / "l.jsonl", "loss", losses),)
    )
    naive = {}
    for source in ("easy", "hard"):
        own = sorted(v for i, v in losses.items() if i.startswith(source) and v is not None)
        median = float(np.median(own))
        spread = 1.4826 * float(np.median([abs(v - median) for v in own]))
        for name, value in losses.items():
            if name.startswith(source) and value is not None:
                if value > median + 5 * spread:
                    naive[name] = "loss_high"
                elif value < median - 5 * spread:
                    naive[name] = "loss_low"
    assert {i: row["reason"] for i, row in dropped.items()} == naive | {"hard11": "not_scored"}
    assert naive == {"easy7": "loss_high", "hard3": "loss_high", "hard9": "loss_low"}
    about = json.loads((tmp_path / "new" / "rl.report.json").read_text())["losses"]
    assert set(about) == {"easy", "hard"} and 0.1 < about["hard"][0] < 1.2 < about["hard"][1] < 9


def test_few_rows_are_judged_by_the_losses_of_all():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(1, 0.1, 200), [1.1, 5.0, 5.1]])
    sources = np.array([0] * 200 + [1] * 3)
    low, high = curate.loss_bounds(losses, sources, 5)[1]
    assert 0.3 < low < 0.7 and 1.3 < high < 1.7
    same = curate.loss_bounds(np.full(100, 0.5), np.zeros(100), 5)[0]
    assert same == pytest.approx((0.4, 0.6))  # all alike: the least spread


def test_problems_that_are_solved_never_or_always_go_and_the_histogram_stays(tmp_path):
    rng = random.Random(7)
    names = [f"p{i}" for i in range(24)]
    passes = {name: i % 5 for i, name in enumerate(names)} | {"p23": None}
    rows = [problem(name, " ".join(babble(rng, 20))) for name in names]
    file = scored(tmp_path / "p.jsonl", "passes", passes, samples=4)
    kept, dropped, report = curated(tmp_path, rows, passes=(file,))
    reasons = {0: "never_solved", 4: "always_solved", None: "not_tried"}
    assert {i: row["reason"] for i, row in dropped.items()} == {
        i: reasons[v] for i, v in passes.items() if v in reasons
    }
    about = json.loads((tmp_path / "new" / "rl.report.json").read_text())
    assert about["passes"] == {"s": [sum(v == k for v in passes.values()) for k in range(5)]}
    levels = {label.split(" / ")[1]: of["in"] for label, of in report["strata"].items()}
    assert levels == {
        "hard": sum(v == 1 for v in passes.values()),
        "medium": sum(v == 2 for v in passes.values()),
        "easy": sum(v == 3 for v in passes.values()),
    }


def test_a_row_without_a_score_stops_the_run_unless_an_earlier_step_dropped_it(tmp_path):
    rng = random.Random(9)
    rows = [problem(f"p{i}", " ".join(babble(rng, 20))) for i in range(3)]
    rows[2]["answer"] = "proof"
    file = scored(tmp_path / "p.jsonl", "passes", {"p0": 1}, samples=4)
    with pytest.raises(ValueError, match="1 of the 2 rows that are left have no score"):
        curated(tmp_path, rows, passes=(file,))
    more = scored(tmp_path / "q.jsonl", "passes", {"p1": 2}, samples=4)
    kept, _, _ = curated(tmp_path, rows, passes=(file, more))
    assert [row["id"] for row in kept] == ["p0", "p1"]
    other = scored(tmp_path / "r.jsonl", "passes", {"p1": 2}, samples=8)
    with pytest.raises(ValueError, match=r"tried \[4, 8\] times"):
        curated(tmp_path, rows, passes=(file, other))
    with pytest.raises(ValueError, match="not a file of score.py with 'loss'"):
        curated(tmp_path, rows, losses=(file,))


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"answer": "-3.5"}, "number"),
        ({"answer": "$1,024$"}, "number"),
        ({"answer": "3/4"}, "number"),
        ({"answer": 7}, "number"),
        ({"answer": "30^\\circ"}, "number"),
        ({"answer": "\\frac{1}{2}"}, "expression"),
        ({"answer": "2x + 1"}, "expression"),
        ({"answer": "(1, 2)"}, "expression"),
        ({"answer": "Anna, Boris"}, "words"),
        ({"answer": "yes"}, "words"),
        ({"answer": "B", "choices": ["1", "2"]}, "choice"),
        ({}, ""),
    ],
)
def test_the_format_of_an_answer_is_part_of_its_stratum(columns, expected):
    assert curate.answer_format(columns) == expected
    stratum = curate.stratum_of({"source": "s", "level": 2} | columns, np.inf)
    assert stratum == ("s", "2", expected)


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="would be overwritten"):
        curate.Config((a,), "rl", f"{tmp_path}/./a.jsonl")
    with pytest.raises(ValueError, match="workers"):
        curate.Config((a,), "rl", "b.jsonl", workers=0)
    with pytest.raises(ValueError, match="named twice"):
        curate.Config((a, f"{tmp_path}/./a.jsonl"), "rl", "b.jsonl")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        curate.Config((a,), "rl", "b.jsonl", benchmarks=(f"{tmp_path}/gone.jsonl",))


def test_a_broken_test_question_stops_the_run(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [problem("1", "What is it?")])
    for line, message in (({"id": "t"}, "t has no prompt"), ({"prompt": "x"}, "missing")):
        tests = write_rows(tmp_path / "t.jsonl", [line])
        with pytest.raises(ValueError, match=message):
            curate.main(curate.Config((rows,), "rl", str(tmp_path / "b.jsonl"), (tests,)))


def test_curation_does_not_load_torch():
    code = "import sys; from curation import curate; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
