"""Curation: each rule on rows it must and must not drop, duplicates and test questions planted
among near misses, weights by hand, the same bytes from any number of workers, no row lost."""

import json
import random
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


def reason(line: bytes | None = None, **columns) -> str:
    line, cfg = line or json.dumps(ROW | columns).encode(), curate.Config((), "sft", "x")
    return curate.examine(line, "rows.jsonl", "rows.jsonl, byte 0", cfg)[1]


def said(conclusion: str, thought: str = THOUGHT) -> dict:
    return {"response": f"<think>{thought}</think>{conclusion}"}


def gold(answer: str, **columns) -> dict:
    return {"answer": answer, **said(f"\\boxed{{{answer}}}"), **columns}


REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
LINES = [f"Case {i}: {i} * {i + 3} = {i * (i + 3)}, which is not a square." for i in range(60)]
DROPPED = [
    ("malformed", {"line": b'{"id": "1", '}),
    ("malformed", {"line": b"[1]"}),
    ("malformed", {"line": b'{"id": "1", "source": "s", "prompt": "x y", "answer": "1"}'}),
    ("malformed", {"line": b"[" * 100_000}),
    ("malformed", {"id": " "}),
    ("malformed", {"source": "half a pair \ud83d"}),
    ("malformed", {"prompt": "<|im_start|>user What is 17 + 15?"}),
    ("malformed", {"prompt": "", "images": "a.png"}),
    ("malformed", {"precision": True}),
    ("malformed", {"answer": ["32"]}),
    ("lost_picture", {"images": ["nowhere.png"]}),
    ("mojibake", {"prompt": "The cafÃ© sells 17 and 15 cups. Sum?"}),
    ("mojibake", {"prompt": "Itâ€™s 17 and 15. Sum?"}),
    ("mojibake", said("The angle is 32Â° \ufffd \\boxed{32}")),
    ("degenerate_length", {"prompt": "32"}),
    ("degenerate_length", {"prompt": "word " * 5000}),
    ("degenerate_length", {"response": "x" * 262_145}),
    ("bad_thought", {"response": f"{THOUGHT} \\boxed{{32}}"}),
    ("bad_thought", {"response": f"<think>{THOUGHT} \\boxed{{32}}"}),
    ("bad_thought", {"response": f"<think>{THOUGHT}</think><think>no</think>\\boxed{{32}}"}),
    ("bad_thought", {"response": f"Well, <think>{THOUGHT}</think>\\boxed{{32}}"}),
    ("bad_thought", {"response": f"<think>\n</think>{THOUGHT} \\boxed{{32}}"}),
    ("bad_thought", {"response": "<think></think>\\boxed{32}"}),
    ("no_box", said("The sum is 32.")),
    ("no_box", said("It is \\boxed{32", THOUGHT)),
    ("no_box", said("The sum is 32.", THOUGHT + " \\boxed{32}")),  # the thought is no answer
    ("no_box", said("It is \\boxed{ }")),
    ("no_box", said("\\boxed{32} or \\boxed{33}")),
    ("refusal", said("As an AI language model, I say \\boxed{32}.")),
    ("refusal", said("\\boxed{32}", THOUGHT + " I'm sorry, but I can't do more.")),
    ("refusal", said("\\boxed{32}", "I cannot see the image, so I guess. " + THOUGHT)),
    ("mixed_script", said("\\boxed{32}", THOUGHT + " 因此 it is done.")),
    ("mixed_script", said("\\boxed{32}", THOUGHT + " Это верно.")),
    ("mixed_script", said("\\boxed{32}", THOUGHT + " ดังนั้น")),
    ("repetition", said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 60)),
    ("repetition", said("\\boxed{32}", "\n".join(LINES * 4))),
    ("proof", gold("1", prompt="Prove that the square of an odd number is odd.")),
    ("unjudgeable", {"answer": "proof"}),
    ("unjudgeable", {"answer": "answers may vary"}),
    ("unjudgeable", {"answer": "because the sum of angles does not depend on where the point was"}),
    ("unjudgeable", {"answer": "x" * 201}),
    ("unjudgeable", {"answer": "\\frac{1}{"}),
    ("wrong_box", said("The sum is \\boxed{33}.")),
    ("wrong_box", said("First \\boxed{32}. No: \\boxed{33}.")),
]
KEPT = [
    {},
    {"response": f"\n <think>{THOUGHT}</think>\\boxed{{32}}\n"},
    {"prompt": "NÃO, «MAÇÃ»: São Paulo, Ângulo 32°, naïve œuvre — 17 and 15?"},
    {"prompt": "Answer yes or no: is 32 the sum? Enter your answer as \\boxed{}."},
    said("So I'm sorry, I was wrong at first; we cannot divide by zero. \\boxed{32}"),
    said("**The sum is \\boxed{32}**"),
    said("\\boxed{32}", THOUGHT + " The group Ш, the cardinal ℵ, the angle αβγ and the letter Ж."),
    said("\\boxed{32}", "\n".join(LINES)),  # an honest enumeration
    said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 3 + THOUGHT),
    gold("是", prompt="十七加十五等于三十二吗？ 是 or 否") | said("所以 \\boxed{是}"),
    gold("4", prompt="Show that x = 2 solves it, and find the other root."),
    gold("(-\\infty, 2) \\cup [3, \\infty)"),
    gold("x^2 + 2x + 1"),
    gold("B", choices=["a very long option that goes on and on and on", "32"]),
    {"answer": "B", "choices": ["blue", "red"]} | said("\\boxed{red}"),
    {"answer": "3.15", "precision": 0.02} | said("\\boxed{3.14}"),
    {"answer": 32},
]


@pytest.mark.parametrize("why", curate.REASONS["rules"].split())
def test_a_rule_drops_what_it_is_for(why):
    rows = [columns for name, columns in DROPPED if name == why]
    assert rows and {reason(**columns) for columns in rows} == {why}


@pytest.mark.parametrize("columns", KEPT, ids=range(len(KEPT)))
def test_no_rule_drops_an_honest_row(columns):
    assert reason(**columns) == ""


def jaccard(a: str, b: str) -> float:
    a, b = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a.split(), b.split()))
    return len(a & b) / len(a | b)


def babble(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(count))


WORDS = {  # the same words, or not
    ("Find $\\dfrac12$ of \\left( x \\right).", "find \\frac{1}{2} of (x)"): True,
    ("Problem 12: What is it?", "what is it"): True,
    ("Compute 2 + 3", "Compute 2 - 3"): False,
    ("Compute 2 − 3", "Compute 2-3"): True,
    ("An eight-digit number", "an eight digit number"): True,
    ("求三角形的面积", "求三角形的周长"): False,
    ("A grid:\nS . #\n. . E", "A grid:\nS # .\n. . E"): False,
}


def test_words_are_what_a_prompt_asks_not_how_it_is_set():
    assert {pair: alike.words(pair[0]) == alike.words(pair[1]) for pair in WORDS} == WORDS


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curated(tmp_path, rows: list[dict], **settings) -> tuple[list[str], dict[str, dict], dict]:
    """(ids of rows kept, dropped ones by id, {step: {source: counts}})"""
    (tmp_path / "old").mkdir(exist_ok=True, parents=True)
    source, out = write_rows(tmp_path / "old" / "rows.jsonl", rows), tmp_path / "new" / "rl.jsonl"
    curate.main(curate.Config(**{"rows": (source,), "kind": "rl", "out": str(out)} | settings))
    dropped = {row["id"]: row for row in read(out.with_suffix(".dropped.jsonl"))}
    steps = json.loads(out.with_suffix(".report.json").read_text())["steps"]
    return [row["id"] for row in read(out)], dropped, steps


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
        row = row if isinstance(row, dict) else {"prompt": row, "images": [], "answer": None}
        alike.describe(row, fact)
    return alike.repeats(facts)


def test_made_problems_repeat_where_they_are_equal_and_hardly_elsewhere():
    """Prompts of a family differ in little: a grid, a number; or in a name and nothing else."""
    quick = tuple(family for family in logic.FAMILIES if family != "zebra_puzzles")
    rows = [logic.problem(5, i, quick) for i in range(1_100)]
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
DICE = (
    "Nine dice are thrown onto a round table, and those that fall from it are thrown again until "
    f"none does. The probability that two of them agree {BOILERPLATE}"
)
TESTS = [
    {"id": "t/long", "prompt": LONG},
    {"id": "t/aime", "prompt": DICE},
    {"id": "t/short", "question": "How many primes are below fifty?", "prompt": "Think."},
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
    assert {name: row["detail"].split()[1] for name, row in dropped.items()} == {
        "quoted": "t/long:",
        "varied": "t/long:",
        "short": "t/short:",
        "copy": "t/drawing:",
        "again": "t/drawing:",
    }


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data beside the repository")
def test_real_benchmarks_overlap_where_they_are_known_to_and_nowhere_else():
    """MathVision has items of MATH500 (here two of its 304); no boilerplate of AIME is flagged."""
    names = ("math500", "mathvision_mini", "aime2024", "aime2025", "mmk12_eval", "bbh")
    rows = {name: read(REAL / name / f"{name}.jsonl") for name in names}
    found = set()
    for name in names:
        others = [row for other in names if other != name for row in rows[other]]
        tests = alike.Benchmarks([(row["id"], row["question"], []) for row in others])
        for row in rows[name]:
            asked = {"prompt": row["question"], "images": []}
            found |= {(row["id"], t) for t, *_ in tests.hits(asked)}
    known = {("math500_004", "mathvision_2665"), ("math500_301", "mathvision_2636")}
    assert found == known | {(b, a) for a, b in known}


# ---- strata and weights


def test_alpha_0_keeps_the_proportions_and_alpha_1_makes_strata_equal():
    facts, shares = np.zeros(10_000, curate.FACT), []
    facts["stratum"] = np.repeat([3, 8], [9000, 1000])
    facts["id"] = np.random.default_rng(0).integers(0, 2**64, 10_000, dtype=np.uint64)
    for alpha, count in ((0, 500), (0.5, 500), (1, 500), (1, 0)):
        reason = np.full(10_000, "", object)
        curate.sample(reason, facts, curate.Config((), "rl", "x", alpha=alpha, count=count))
        assert (reason == "").sum() == (count or 10_000)
        shares.append((facts["stratum"][reason == ""] == 8).mean())
    # sqrt(1000) / (sqrt(1000) + sqrt(9000)) = 0.25; a little less, as the rare ones run out
    assert np.allclose(shares, [0.1, 0.25, 0.5, 0.1], atol=0.05)


# ---- the whole


def mixture(rng: random.Random, count: int) -> list[dict]:
    """Rows of three sources: good ones, each kind of bad one, copies."""
    bad = [of for _, of in DROPPED if not of.keys() & {"id", "source", "line", "images"}]
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
    rows, written = mixture(random.Random(3), 300), []
    tests = write_rows(tmp_path / "t.jsonl", [{"id": "t", "prompt": rows[5]["prompt"]}])
    settings = {"kind": "sft", "benchmarks": (tests,), "count": 60, "seed": 5}
    for workers, chunk in ((1, 10**9), (3, 64)):  # pieces that begin in lines, and where lines do
        monkeypatch.setattr(curate, "CHUNK", chunk)
        kept, dropped, steps = curated(tmp_path, rows, workers=workers, **settings)
        files = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
        assert files.keys() == {"rl.jsonl", "rl.dropped.jsonl", "rl.report.json"}
        del files["rl.report.json"]
        written.append((files, steps))
    assert written[0] == written[1]
    order = [row["id"] for row in rows]
    assert sorted([*kept, *dropped], key=order.index) == order
    assert kept == sorted(kept, key=order.index)
    assert {row["step"] for row in dropped.values()} == {*curate.REASONS} - {"loss", "passes"}
    for source in "abc":
        left = sum(row["source"] == source for row in rows)
        for step in curate.REASONS:
            of = steps[step][source]
            assert of["in"] == left == of["kept"] + sum(of["reasons"].values())
            left = of["kept"]
        assert left == sum(row["source"] == source and row["id"] in kept for row in rows)
    assert len(data.read_examples(tmp_path / "new" / "rl.jsonl")) == 60  # as stage 1 does


def test_another_seed_draws_other_rows_and_a_larger_count_adds_to_the_smaller(tmp_path):
    draws = {
        (seed, count): set(curated(tmp_path, babbled(200), seed=seed, count=count)[0])
        for seed, count in ((0, 50), (0, 80), (1, 50))
    }
    assert draws[0, 50] < draws[0, 80] and draws[0, 50] != draws[1, 50]


def test_a_line_that_is_no_row_is_a_dropped_row_under_the_name_of_its_place(tmp_path):
    good = [json.dumps(row).encode() for row in babbled(2)]
    source, out = tmp_path / "rows.jsonl", tmp_path / "new" / "rl.jsonl"
    source.write_bytes(b"\n".join([good[0], b'{"id": "\xff"', good[1]]))
    curate.main(curate.Config((str(source),), "rl", str(out)))
    assert [row["id"] for row in read(out)] == ["0", "1"]
    (dropped,) = read(out.with_suffix(".dropped.jsonl"))
    assert dropped["id"] == f"{source}, byte {len(good[0]) + 1}"
    assert dropped["reason"] == "malformed" and "'utf-8' codec" in dropped["detail"]


def test_a_file_of_which_nothing_stays_says_so_and_fails(tmp_path):
    with pytest.raises(SystemExit, match="no row stays of 1"):
        curated(tmp_path, [{"id": "1", "question": "no such column"}])


# ---- scores


def scored(path: Path, column: str, values: dict, **columns) -> str:
    return write_rows(path, [{"id": i, column: v, **columns} for i, v in values.items()])


def test_abnormal_losses_go_by_the_median_and_mad_of_their_source(tmp_path):
    rng, rows, losses, naive = random.Random(6), [], {}, {"hard11": "not_scored"}
    for source, centre in (("easy", 0.4), ("hard", 1.2)):
        rows += [row | {"id": source + row["id"]} for row in babbled(60, len(rows), source=source)]
        losses |= {f"{source}{i}": rng.gauss(centre, 0.05) for i in range(60)}
    losses |= {"easy7": 1.2, "hard3": 9.0, "hard11": None}  # easy7: normal for "hard"
    for source in ("easy", "hard"):
        own = {i: v for i, v in losses.items() if i.startswith(source) and v is not None}
        median = float(np.median([*own.values()]))
        spread = 1.4826 * float(np.median([abs(v - median) for v in own.values()]))
        naive |= {i: "abnormal_loss" for i, v in own.items() if v > median + 5 * spread}
    file = scored(tmp_path / "l.jsonl", "loss", losses)
    _, dropped, _ = curated(tmp_path, rows, losses=(file,))
    assert {i: row["reason"] for i, row in dropped.items()} == naive and len(naive) == 3


def test_few_rows_are_judged_by_the_losses_of_all_and_equal_losses_have_some_spread():
    normal = np.random.default_rng(0).normal(1, 0.1, 200)
    losses, reason = np.concatenate([normal, [1.1, 5.0, 5.1]]), np.full(203, "", object)
    sources = np.array(["many"] * 200 + ["few"] * 3, object)
    curate.drop_abnormal(reason, losses, sources, 5)
    assert reason[200:].tolist() == ["", "abnormal_loss", "abnormal_loss"]
    alike, reason = np.array([0.5] * 98 + [0.59, 0.61]), np.full(100, "", object)
    curate.drop_abnormal(reason, alike, sources[:100], 5)
    assert reason[97:].tolist() == ["", "", "abnormal_loss"]


def test_problems_that_are_solved_never_or_always_go_and_thirds_of_the_rates_are_strata(tmp_path):
    passes = {f"{i}": 1 + (i < 3) for i in range(100)}
    passes |= {"97": None, "98": 0, "99": 4}
    file = scored(tmp_path / "p.jsonl", "passes", passes, samples=4)
    kept, dropped, _ = curated(tmp_path, babbled(100), passes=(file,), count=10, alpha=3)
    reasons = {row["id"]: row["reason"] for row in dropped.values() if row["step"] == "passes"}
    assert reasons == {"97": "not_tried", "98": "never_solved", "99": "always_solved"}
    assert kept[:3] == ["0", "1", "2"]  # of their third, they weigh 30,000 times as much as others


def test_a_row_without_a_score_stops_the_run_unless_an_earlier_step_dropped_it(tmp_path):
    rows = babbled(3)
    rows[2]["answer"] = "proof"
    file = scored(tmp_path / "p.jsonl", "passes", {"0": 1}, samples=4)
    with pytest.raises(ValueError, match="1 of the 2 rows that are left have no score"):
        curated(tmp_path, rows, passes=(file,))
    more = scored(tmp_path / "q.jsonl", "passes", {"1": 2}, samples=8)
    assert curated(tmp_path, rows, passes=(file, more))[0] == ["0", "1"]


def test_an_input_that_is_missing_or_would_be_overwritten_is_refused(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [])
    with pytest.raises(ValueError, match="would be overwritten"):
        curate.Config((a,), "rl", f"{tmp_path}/./a.jsonl")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        curate.Config((a,), "rl", "b.jsonl", passes=(f"{tmp_path}/gone.jsonl",))


def test_a_broken_test_question_stops_the_run(tmp_path):
    tests = write_rows(tmp_path / "t.jsonl", [{"id": "t"}])
    with pytest.raises(ValueError, match="t.jsonl, line 1: column 'prompt' is missing"):
        curated(tmp_path, babbled(1), benchmarks=(tests,))
