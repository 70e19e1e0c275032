"""Curation: each rule on rows it must and must not drop, duplicates and test questions planted
among near misses, weights by hand, the same bytes from any number of workers, no row lost."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
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


def reason(**columns) -> str:
    return next(curate.faults(ROW | columns), ("", ""))[0]


def said(conclusion: str, thought: str = THOUGHT) -> dict:
    return {"response": f"<think>{thought}</think>{conclusion}"}


def gold(answer: str, **columns) -> dict:
    return {"answer": answer, **said(f"\\boxed{{{answer}}}"), **columns}


REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
LINES = [f"Case {i}: {i} * {i + 3} = {i * (i + 3)}, which is not a square." for i in range(60)]
DROPPED = {
    "unreadable": [{"unreadable": "not JSON"}],
    "malformed": [
        {"prompt": "<|im_start|>user What is 17 + 15?"},
        {"prompt": "<image> and <image>: add.", "images": ["a.png"]},
        {"prompt": 7},
        {"images": "a.png"},
        {"images": [{"path": "a.png"}]},
        {"choices": "A, B"},
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
        {"response": "x" * 262_145},
    ],
    "bad_thought": [
        {"response": f"{THOUGHT} \\boxed{{32}}"},
        {"response": f"<think>{THOUGHT} \\boxed{{32}}"},
        {"response": f"<think>{THOUGHT}</think><think>no</think>\\boxed{{32}}"},
        {"response": f"Well, <think>{THOUGHT}</think>\\boxed{{32}}"},
        {"response": f"<think>\n</think>{THOUGHT} \\boxed{{32}}"},
        {"response": "<think></think>\\boxed{32}"},
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
    assert reason(**columns) == ""


def test_every_rule_has_a_test():
    assert set(DROPPED) == {why for why, (step, _) in curate.REASONS.items() if step == "rules"}


# ---- duplicates


def shingles(text: str) -> set:
    tokens = text.split()
    return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}


def jaccard(a: str, b: str) -> float:
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def babble(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(count))


def test_signatures_estimate_the_jaccard_similarity():
    rng, errors = random.Random(0), []
    for _ in range(150):
        a = babble(rng, rng.randint(30, 200))
        b = a[: 6 * rng.randint(0, 30)] + babble(rng, rng.randint(5, 60))
        same = alike.signature(a.split()) == alike.signature(b.split())
        errors.append(same.mean() - jaccard(a, b))
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


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curated(tmp_path, rows: list[dict], **settings) -> tuple[list[str], dict[str, dict], dict]:
    """(ids of rows kept, dropped ones by id, report)"""
    (tmp_path / "old").mkdir(exist_ok=True, parents=True)
    source, out = write_rows(tmp_path / "old" / "rows.jsonl", rows), tmp_path / "new" / "rl.jsonl"
    curate.main(curate.Config(rows=(source,), **{"kind": "rl", "out": str(out)} | settings))
    dropped = {row["id"]: row for row in read(out.with_suffix(".dropped.jsonl"))}
    report = json.loads(out.with_suffix(".report.json").read_text())
    return [row["id"] for row in read(out)], dropped, report


def problem(name: str, prompt: str, answer: str = "5", **columns) -> dict:
    return {"id": name, "source": "s", "prompt": prompt, "answer": answer, **columns}


def babbled(count: int, seed: int = 7, **columns) -> list[dict]:
    rng = random.Random(seed)
    return [problem(f"{i}", babble(rng, 20), **columns) for i in range(count)]


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
        problem("plus", "Compute 2 + 3."),
        problem("minus", "Compute 2 - 3."),
        problem("copy of the typo", LONG.replace("neighbours in", "neighbors in")),
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert kept == ["first", "digit", "answer", "plus", "minus"]
    assert {name: (row["reason"], row["detail"]) for name, row in dropped.items()} == {
        "case": ("same_words", "as first"),
        "typo": ("near", "as first"),
        "copy of the typo": ("near", "as first"),
        "first": ("repeated_id", "as first"),
    }


def roots(rows: list[dict | str]) -> np.ndarray:
    facts = np.zeros(len(rows), curate.FACT)
    for row, fact in zip(rows, facts, strict=True):
        curate.compare_by(row if isinstance(row, dict) else {"prompt": row}, fact)
    return alike.repeats(facts)


def test_made_problems_repeat_where_they_are_equal_and_hardly_elsewhere():
    """Prompts of a family differ in little: a grid, a number; or in a name and nothing else."""
    quick = tuple(family for family in logic.FAMILIES if family != "zebra_puzzles")
    rows = list(logic.problems(1_100, 5, quick))
    prompts, root = [row["prompt"] for row in rows], roots(rows)
    unequal = [i for i, first in enumerate(root) if prompts[first] != prompts[i]]
    assert len(unequal) < 5 and len(set(root)) == len(set(prompts)) - len(unequal)


def test_near_duplicates_agree_with_exact_jaccard_on_random_texts():
    """Every pair over 0.9 is found, none under 0.65; the first of each family stays."""
    rng, texts = random.Random(1), []
    for _ in range(60):
        base = babble(rng, 120).split()
        for changes in (0, 1, 2, 6):
            text = list(base)
            for place in rng.sample(range(120), changes):
                text[place] = babble(rng, 1)
            texts.append(" ".join(text))
    for i, root in enumerate(roots(texts)):
        first = i - i % 4
        similarity = jaccard(texts[first], texts[i])
        assert root in ([first] if similarity > 0.9 else [i] if similarity < 0.65 else [first, i])


def test_a_chain_of_likenesses_does_not_drop_what_is_unlike_the_row_that_stays():
    """Windows that slide over a text: each is like the next, the first is not like the fifth."""
    rng, texts = random.Random(2), []
    for _ in range(20):
        long = babble(rng, 270)
        texts += [long[6 * at : 6 * (at + 200)].strip() for at in range(0, 70, 14)]
    root = roots(texts)
    assert (root != np.arange(len(texts))).sum() > 20
    assert all(jaccard(texts[i], texts[first]) > 0.68 for i, first in enumerate(root))


def picture(path: Path, seed: int, size: int = 120) -> None:
    rng, image = random.Random(seed), Image.new("RGB", (120, 120), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        draw.polygon([(rng.randrange(120), rng.randrange(120)) for _ in range(3)], fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((size, size)).save(path)


def test_pictures_are_part_of_a_problem_and_found_from_the_new_file(tmp_path):
    folder = tmp_path / "old" / "images"
    for name, seed in {"a": 1, "b": 2, "same": 1}.items():
        picture(folder / f"{name}.png", seed)
    Image.new("1", (30_000, 3_000)).save(folder / "bomb.png")  # 90 MPixel in 11 kB
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    rows = [
        problem(name, "<image>How many corners?", images=[f"images/{name}.png"])
        for name in ("a", "b", "same", "gone", "bomb", "cut")
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert kept == ["a", "b"] and dropped.pop("same")["reason"] == "same_words"
    assert {row["reason"] for row in dropped.values()} == {"lost_picture"} and len(dropped) == 3
    assert "decompression bomb" in dropped["bomb"]["detail"]
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
    {  # what all questions of a benchmark are told is not part of them
        "id": "t/short",
        "question": "How many primes are below fifty?",
        "prompt": "How many primes are below fifty? Think. Put the answer in \\boxed{}.",
    },
    {"id": "t/drawing", "prompt": SHAPES, "images": ["t.png"]},
]


def test_planted_test_questions_are_found_and_boilerplate_is_not(tmp_path):
    picture(tmp_path / "tests" / "t.png", 7)
    picture(tmp_path / "old" / "again.jpg", 7, size=90)
    picture(tmp_path / "old" / "other.png", 8)
    (tmp_path / "old" / "copy.png").write_bytes((tmp_path / "tests" / "t.png").read_bytes())
    tests = write_rows(tmp_path / "tests" / "t.jsonl", TESTS)
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
        problem("words of a template", SHAPES.removeprefix("<image>")[:40], images=["other.png"]),
    ]
    kept, dropped, _ = curated(tmp_path, rows, benchmarks=(tests,))
    assert kept == ["aime", "short miss", "template", "words of a template"]
    assert {row["reason"] for row in dropped.values()} == {"contaminated"}
    pairs = read(tmp_path / "new" / "rl.contaminated.jsonl")
    assert {row["id"]: (row["benchmark_id"], row["kind"]) for row in pairs} == {
        "quoted": ("t/long", "text"),
        "varied": ("t/long", "text"),
        "excerpt": ("t/long", "text"),
        "short": ("t/short", "text"),
        "copy": ("t/drawing", "image"),
        "again": ("t/drawing", "image"),
    }


def test_containment_is_the_share_of_the_question_that_stands_in_the_prompt():
    rng = random.Random(2)
    question, other = babble(rng, 37).split(), babble(rng, 60)  # 30 runs of eight words
    tests = alike.read_benchmarks([{"id": "t", "prompt": " ".join(question), "images": []}])
    for shared, expected in ((37, 1.0), (25, 0.6), (24, None)):  # 30, 18, 17 runs
        row = {"prompt": " ".join(question[:shared]) + " " + other}
        found = [(name, score) for name, score, _ in alike.contaminations(row, tests)]
        assert found == ([("t", expected)] if expected else [])


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the repository")
def test_real_benchmarks_overlap_where_they_are_known_to_and_nowhere_else():
    """MathVision has items of MATH500 (here two of its 304); no boilerplate of AIME is flagged."""
    names = ("math500", "mathvision_mini", "aime2024", "aime2025", "mmk12_eval", "bbh")
    rows = {name: read(REAL / name / f"{name}.jsonl") for name in names}
    for row in sum(rows.values(), []):
        row |= {"prompt": row["question"], "images": []}
    found = set()
    for name in names:
        tests = alike.read_benchmarks(
            row for other in names if other != name for row in rows[other]
        )
        found |= {
            (row["id"], t) for row in rows[name] for t, _, _ in alike.contaminations(row, tests)
        }
    known = {("math500_004", "mathvision_2665"), ("math500_301", "mathvision_2636")}
    assert found == known | {(b, a) for a, b in known}


# ---- strata and weights


def draw(ids: np.ndarray, strata: np.ndarray, **settings) -> np.ndarray:
    """The strata of the rows that are drawn."""
    facts, reason = np.zeros(len(ids), curate.FACT), np.full(len(ids), "", object)
    facts["id"], facts["stratum"] = ids, strata
    curate.sample(reason, facts, curate.Config((), "rl", "x", **settings))
    return strata[reason == ""]


def test_alpha_0_keeps_the_proportions_and_alpha_1_makes_strata_equal():
    strata = np.repeat([3, 8], [9000, 1000])
    ids = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    rare = [(draw(ids, strata, alpha=alpha, count=500) == 8).mean() for alpha in (0, 0.5, 1)]
    # sqrt(1000) / (sqrt(1000) + sqrt(9000)) = 0.25; a little less, as the rare ones run out
    assert np.allclose(rare, [0.1, 0.25, 0.5], atol=0.05)
    assert draw(ids, strata).tolist() == strata.tolist()


# ---- the whole


def mixture(rng: random.Random, count: int) -> list[dict]:
    """Rows of three sources: good ones, each kind of bad one, copies."""
    bad = [columns for group in list(DROPPED.values())[1:-1] for columns in group]
    rows = []
    for i in range(count):
        row = ROW | {"prompt": f"What is it? {babble(rng, 40)}", "level": rng.choice([1, 2, None])}
        if rng.random() < 0.3:
            row |= rng.choice(bad)
        elif rows and rng.random() < 0.2:
            row["prompt"] = rng.choice(rows)["prompt"]
        rows.append(row | {"id": f"{i}", "source": rng.choice("abc")})
    return rows


def test_any_number_of_workers_writes_the_same_bytes_and_loses_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "CHUNK", 20_000)  # many pieces
    rows, written = mixture(random.Random(3), 300), []
    tests = write_rows(tmp_path / "t.jsonl", [{"id": "t", "prompt": rows[5]["prompt"]}])
    settings = {"kind": "sft", "benchmarks": (tests,), "count": 60, "seed": 5}
    for workers in (1, 3):
        kept, dropped, report = curated(tmp_path, rows, workers=workers, **settings)
        assert not list((tmp_path / "new").glob("*.part"))
        written.append({p.name: p.read_bytes() for p in (tmp_path / "new").glob("*.jsonl")})
        written[-1]["report"] = {name: report[name] for name in ("steps", "strata", "output")}
    assert written[0] == written[1] and len(written[0]) == 4
    order = [row["id"] for row in rows]
    assert sorted([*kept, *dropped], key=order.index) == order
    assert kept == sorted(kept, key=order.index)
    assert {row["step"] for row in dropped.values()} == set(curate.STEPS) - {"loss", "passes"}
    for source in "abc":
        left = sum(row["source"] == source for row in rows)
        for step in curate.STEPS:
            of = report["steps"][step][source]
            assert of["in"] == left == of["kept"] + sum(of["reasons"].values())
            left = of["kept"]
        assert left == sum(row["source"] == source and row["id"] in kept for row in rows)
    assert sum(of["kept"] for of in report["strata"].values()) == 60
    assert len(data.read_examples(tmp_path / "new" / "rl.jsonl")) == 60  # as stage 1 does


def test_another_seed_draws_other_rows_and_a_larger_count_adds_to_the_smaller(tmp_path):
    draws = {
        (seed, count): set(curated(tmp_path, babbled(200), seed=seed, count=count)[0])
        for seed, count in ((0, 50), (0, 80), (1, 50))
    }
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
        for _, row in curate.rows_of(str(path), start=at, end=min(at + size, total))
    ]
    assert found == [row["id"] for row in rows]


def test_lines_that_are_no_rows_are_dropped_rows_under_the_name_of_their_place(tmp_path):
    lines = {
        b'{"id": "1", "source": "s", "prompt": "x"}': "answer is None; the row has",
        b'{"id": "1", ': "Expecting",
        b"[1]": "not a row",
        b'{"id": [1], "source": "s", "prompt": "x y", "answer": "1"}': "id is [1]",
        b'{"id": " ", "source": "s", "prompt": "x y", "answer": "1"}': "id is ' '",
        b'{"id": "1", "source": "s", "prompt": "\xff y", "answer": "1"}': "'utf-8' codec",
        b"[" * 100_000: "maximum recursion",
    }
    good = [json.dumps(row).encode() for row in babbled(3)]
    all_lines = [good[0], *lines, *good[1:]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(all_lines))
    out = tmp_path / "new" / "rl.jsonl"
    report = curate.main(curate.Config((str(tmp_path / "rows.jsonl"),), "rl", str(out)))
    assert [row["id"] for row in read(out)] == ["0", "1", "2"]
    places = [sum(len(line) + 1 for line in all_lines[: i + 1]) for i in range(len(lines))]
    dropped = read(out.with_suffix(".dropped.jsonl"))
    assert [row["id"] for row in dropped] == [f"rows.jsonl, byte {at}" for at in places]
    for row, detail in zip(dropped, lines.values(), strict=True):
        assert row["reason"] == "unreadable" and row["detail"].startswith(detail), row
    of = report["steps"]["rules"]["rows.jsonl"]
    assert of == {"in": len(lines), "kept": 0, "reasons": {"unreadable": len(lines)}}


def test_a_file_of_which_nothing_stays_says_so_and_fails(tmp_path):
    with pytest.raises(SystemExit, match="no row stays of 1"):
        curated(tmp_path, [{"id": "1", "question": "no such column"}])


def test_odd_text_in_any_column_does_not_stop_a_run(tmp_path):
    rows, odd = babbled(4), "half \ud83d"
    rows[0] |= {"source": odd, "level": odd}
    rows[1] |= {"id": odd}
    rows[2] |= {"origin": {"note": odd}}
    kept, dropped, report = curated(tmp_path, rows)
    assert len(kept) == 4 and not dropped and "half ?" in report["steps"]["rules"]


# ---- scores


def scored(path: Path, column: str, values: dict, **columns) -> str:
    return write_rows(path, [{"id": i, column: v, **columns} for i, v in values.items()])


def test_abnormal_losses_go_by_the_median_and_mad_of_their_source(tmp_path):
    rng, rows, losses, naive = random.Random(6), [], {}, {"hard11": "not_scored"}
    for source, centre in (("easy", 0.4), ("hard", 1.2)):
        rows += [row | {"id": source + row["id"]} for row in babbled(60, len(rows), source=source)]
        losses |= {f"{source}{i}": rng.gauss(centre, 0.05) for i in range(60)}
    losses |= {"easy7": 1.2, "hard3": 9.0, "hard9": 0.1, "hard11": None}  # easy7: normal for "hard"
    for source in ("easy", "hard"):
        own = {i: v for i, v in losses.items() if i.startswith(source) and v is not None}
        median = float(np.median([*own.values()]))
        spread = 1.4826 * float(np.median([abs(v - median) for v in own.values()]))
        naive |= {i: "loss_high" for i, v in own.items() if v > median + 5 * spread}
        naive |= {i: "loss_low" for i, v in own.items() if v < median - 5 * spread}
    file = scored(tmp_path / "l.jsonl", "loss", losses)
    _, dropped, report = curated(tmp_path, rows, losses=(file,))
    assert {i: row["reason"] for i, row in dropped.items()} == naive and len(naive) == 4
    low, high = report["losses"]["hard"]
    assert 0.1 < low < 1.2 < high < 9 and set(report["losses"]) == {"easy", "hard"}


def test_few_rows_are_judged_by_the_losses_of_all_and_equal_losses_have_some_spread():
    normal = np.random.default_rng(0).normal(1, 0.1, 200)
    losses, reason = np.concatenate([normal, [1.1, 5.0, 5.1]]), np.full(203, "", object)
    sources = np.array(["many"] * 200 + ["few"] * 3, object)
    low, high = curate.drop_abnormal(reason, losses, sources, 5)["few"]
    assert 0.3 < low < 0.7 and 1.3 < high < 1.7
    assert reason[200:].tolist() == ["", "loss_high", "loss_high"]
    same = curate.drop_abnormal(np.full(100, "", object), np.full(100, 0.5), sources[:100], 5)
    assert same == {"many": pytest.approx([0.4, 0.6])}


def test_problems_that_are_solved_never_or_always_go_and_the_others_are_strata(tmp_path):
    passes = {f"{i}": i % 5 for i in range(24)} | {"23": None}
    file = scored(tmp_path / "p.jsonl", "passes", passes, samples=4)
    _, dropped, report = curated(tmp_path, babbled(24), passes=(file,))
    reasons = {0: "never_solved", 4: "always_solved", None: "not_tried"}
    assert {i: row["reason"] for i, row in dropped.items()} == {
        i: reasons[v] for i, v in passes.items() if v in reasons
    }
    names = {1: "hard", 2: "medium", 3: "easy"}
    assert {label.split(" / ")[-1]: of["in"] for label, of in report["strata"].items()} == {
        name: [*passes.values()].count(v) for v, name in names.items()
    }


def test_a_row_without_a_score_stops_the_run_unless_an_earlier_step_dropped_it(tmp_path):
    rows = babbled(3)
    rows[2]["answer"] = "proof"
    file = scored(tmp_path / "p.jsonl", "passes", {"0": 1}, samples=4)
    with pytest.raises(ValueError, match="1 of the 2 rows that are left have no score"):
        curated(tmp_path, rows, passes=(file,))
    more = scored(tmp_path / "q.jsonl", "passes", {"1": 2}, samples=8)
    assert curated(tmp_path, rows, passes=(file, more))[0] == ["0", "1"]
    with pytest.raises(ValueError, match="not a file of score.py with 'loss'"):
        curated(tmp_path, rows, losses=(file,))


@pytest.mark.parametrize(
    "expected, answers",
    {
        "number": ["-3.5", "$1,024$", "3/4", 7, "30^\\circ"],
        "expression": ["\\frac{1}{2}", "2x + 1", "(1, 2)"],
        "words": ["Anna, Boris", "yes"],
    }.items(),
)
def test_the_format_of_an_answer_is_part_of_its_stratum(expected, answers):
    for answer in answers:
        row = {"source": "s", "level": 2, "answer": answer}
        assert curate.stratum_of(row) == ("s", "2", expected)
        assert curate.stratum_of(row | {"choices": ["1", "2"]}) == ("s", "2", "choice")
    assert curate.stratum_of({"source": "s"}) == ("s", "", "")


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="would be overwritten"):
        curate.Config((a,), "rl", f"{tmp_path}/./a.jsonl")
    with pytest.raises(ValueError, match="workers"):
        curate.Config((a,), "rl", "b.jsonl", workers=0)
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        curate.Config((a,), "rl", "b.jsonl", benchmarks=(f"{tmp_path}/gone.jsonl",))


def test_a_broken_test_question_stops_the_run(tmp_path):
    for i, (line, message) in enumerate([({"id": "t"}, "t: no prompt"), ({}, "id is None")]):
        tests = write_rows(tmp_path / f"{i}.jsonl", [line])
        with pytest.raises(ValueError, match=f"benchmark .*{i}.jsonl, .*{message}"):
            curated(tmp_path, babbled(1), benchmarks=(tests,))


def test_curation_does_not_load_torch():
    code = "import sys; from curation import curate; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
