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


def problem(name: str, prompt: str, answer: str = "5", **columns) -> dict:
    return {"id": name, "source": "s", "prompt": prompt, "answer": answer, **columns}


def said(conclusion: str, thought: str = THOUGHT) -> dict:
    return {"response": f"<think>{thought}</think>{conclusion}"}


ROW = problem("s/1", "What is the sum of 17 and 15?", "32", **said("The sum is \\boxed{32}."))


def reason(line: bytes | None = None, **columns) -> str:
    line, cfg = line or json.dumps(ROW | columns).encode(), curate.Config((), "sft", "x")
    return curate.examine(line, "rows.jsonl", "rows.jsonl, byte 0", cfg)[1]


def gold(answer: str, **columns) -> dict:
    return {"answer": answer, **said(f"\\boxed{{{answer}}}"), **columns}


OPTION = "the sum, which is what you get when you add both of the numbers"
LINES = [f"Case {i}: {i} * {i + 3} = {i * (i + 3)}, which is not a square." for i in range(60)]
DROPPED = [
    ("malformed", {"line": b'{"id": "1", '}),
    ("malformed", {"line": b'{"id": "1", "source": "s", "prompt": "x y", "answer": "1"}'}),
    ("malformed", {"precision": True}),  # of what RL reads, in a row for SFT
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
    ("no_box", said("It is \\boxed{32", THOUGHT)),
    ("no_box", said("The sum is 32.", THOUGHT + " \\boxed{32}")),  # the thought is no answer
    ("no_box", said("It is \\boxed{ }")),
    ("no_box", said("\\boxed{32} or \\boxed{33}")),
    ("refusal", said("As an AI language model, I say \\boxed{32}.")),
    ("refusal", said("\\boxed{32}", THOUGHT + " I'm sorry, but I can't do more.")),
    ("refusal", said("\\boxed{32}", "I cannot see the image, so I guess. " + THOUGHT)),
    ("mixed_script", said("\\boxed{32}", THOUGHT + " 因此 it is done.")),
    ("mixed_script", said("\\boxed{32}", THOUGHT + " Это верно.")),
    ("repetition", said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 60)),
    ("repetition", said("\\boxed{32}", "\n".join(LINES * 4))),
    ("proof", gold("1", prompt="Prove that the square of an odd number is odd.")),
    ("unjudgeable", {"answer": "answers may vary"}),
    ("unjudgeable", {"answer": "because the sum of angles does not depend on where the point was"}),
    ("unjudgeable", {"answer": "x" * 201}),
    ("unjudgeable", {"answer": "\\frac{1}{"}),
    ("wrong_box", said("First \\boxed{32}. No: \\boxed{33}.")),
]
KEPT = [
    {"response": f"\n <think>{THOUGHT}</think>\\boxed{{32}}\n"},
    {"prompt": "NÃO, «MAÇÃ»: São Paulo, Ângulo 32°, naïve œuvre — 17 and 15?"},
    {"prompt": "Answer yes or no: is 32 the sum? Enter your answer as \\boxed{}."},
    said("So I'm sorry, I was wrong at first; we cannot divide by zero. \\boxed{32}"),
    said("\\boxed{32}", THOUGHT + " The group Ш, the cardinal ℵ, the angle αβγ and the letter Ж."),
    said("\\boxed{32}", "\n".join(LINES)),  # an honest enumeration
    said("\\boxed{32}", THOUGHT + " Wait, let me check again." * 3 + THOUGHT),
    gold("是", prompt="十七加十五等于三十二吗？ 是 or 否") | said("所以 \\boxed{是}"),
    gold("6", prompt="求边长为三、四、五的三角形的面积。"),  # without a blank
    gold("4", prompt="Show that x = 2 solves it, and find the other root."),
    gold("(-\\infty, 2) \\cup [3, \\infty)"),
    gold(OPTION, choices=[OPTION, "32"]),
    {"answer": "B", "choices": ["blue", "red"]} | said("\\boxed{red}"),
    {"answer": "3.15", "precision": 0.02} | said("\\boxed{3.14}"),
]


@pytest.mark.parametrize("why", curate.REASONS["rules"].split())
def test_a_rule_drops_what_it_is_for(why):
    rows = [columns for name, columns in DROPPED if name == why]
    assert rows and {reason(**columns) for columns in rows} == {why}


@pytest.mark.parametrize("columns", KEPT, ids=range(len(KEPT)))
def test_no_rule_drops_an_honest_row(columns):
    assert reason(**columns) == ""


def babble(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghij", k=5)) for _ in range(count))


def babbled(names) -> list[dict]:
    rng = random.Random(7)
    return [problem(str(name), babble(rng, 20)) for name in names]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curated(tmp_path, rows: list[dict | bytes], **settings) -> tuple[list, dict, dict]:
    """(ids of rows kept, dropped ones by id, {step: {source: counts}})"""
    source, out = tmp_path / "old" / "rows.jsonl", tmp_path / "new" / "rl.jsonl"
    source.parent.mkdir(exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    source.write_bytes(b"\n".join(lines))
    given = {"rows": (str(source),), "kind": "rl", "out": str(out)}
    curate.main(curate.Config(**given | settings))
    dropped = {row["id"]: row for row in read(out.with_suffix(".dropped.jsonl"))}
    steps = json.loads(out.with_suffix(".report.json").read_text())["steps"]
    return [row["id"] for row in read(out)], dropped, steps


LONG = (
    "A farmer has 12 apples and gives some of them to each of his neighbours, who live along the "
    "river, so that nobody has more than anybody else and the rest is as small as it can be. How "
    "many apples are left to him if there are 7 neighbours in the village and none is away today?"
)


def test_duplicates_are_found_and_near_misses_stay(tmp_path):
    """A row that goes is named after the one that stays."""
    rows = [
        problem("first", LONG),
        problem("first louder", "Problem 3. " + LONG.upper()),
        problem("first typo", LONG.replace("neighbours in", "neighbors in")),
        problem("digit", LONG.replace("12 apples", "13 apples")),
        problem("answer", LONG.replace("left to him", "left to them"), "6"),
        problem("first", "Another problem that bears a name which was given away."),
        problem("first typo again", LONG.replace("neighbours in", "neighbors in")),
        problem("plus", "Compute 2 + 3."),
        problem("minus", "Compute 2 - 3."),
        problem("minus dash", "compute 2−3"),
        problem("half", "Find $\\dfrac12$ of an eight-digit number \\left( x \\right)."),
        problem("half braced", "Find \\frac{1}{2} of an eight digit number (x)."),
        problem("area", "求 三角形的面积"),
        problem("perimeter", "求 三角形的周长"),
        problem("grid", "A grid:\nS . #\n. . E"),
        problem("other_grid", "A grid:\nS # .\n. . E"),
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    same = dict.fromkeys(("first louder", "minus dash", "half braced"), "same_words")
    near = dict.fromkeys(("first typo", "first typo again"), "near")
    found = {name: row["reason"] for name, row in dropped.items()}
    assert found == same | near | {"first": "repeated_id"}
    assert all(row["detail"] == f"as {name.split()[0]}" for name, row in dropped.items())
    assert kept == "first digit answer plus minus half area perimeter grid other_grid".split()


def roots(rows: list[dict]) -> np.ndarray:
    facts = np.zeros(len(rows), curate.FACT)
    for row, fact in zip(rows, facts, strict=True):
        alike.describe({"images": [], "answer": None} | row, fact)
    return alike.repeats(facts)


def test_made_problems_repeat_where_they_are_equal_and_hardly_elsewhere():
    """Prompts of a family differ in little: a grid, a number; or in a name and nothing else."""
    quick = tuple(family for family in logic.FAMILIES if family != "zebra_puzzles")
    rows = [logic.problem(5, i, quick) for i in range(1_100)]
    prompts, root = [row["prompt"] for row in rows], roots(rows)
    unequal = [i for i, first in enumerate(root) if prompts[first] != prompts[i]]
    assert len(unequal) < 5 and len(set(root)) == len(set(prompts)) - len(unequal)


def jaccard(a: str, b: str) -> float:
    a, b = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a.split(), b.split()))
    return len(a & b) / len(a | b)


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
    for i, root in enumerate(roots([{"prompt": text} for text in texts])):
        first = i - i % 4
        similarity = jaccard(texts[first], texts[i])
        assert root in ([first] if similarity > 0.9 else [i] if similarity < 0.65 else [first, i])


def test_a_chain_of_likenesses_does_not_drop_what_is_unlike_the_row_that_stays():
    """Windows that slide over a text: each is like the next, the first is not like the fifth."""
    rng, texts = random.Random(2), []
    for _ in range(20):
        long = babble(rng, 270)
        texts += [long[6 * at : 6 * (at + 200)].strip() for at in range(0, 70, 14)]
    root = roots([{"prompt": text} for text in texts])
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
    Image.new("L", (2, 900)).save(folder / "thin.png")  # what no stage would take
    Image.new("I;16", (30, 30)).save(folder / "grey.png")
    rows = [
        problem(name, "<image>How many corners?", images=[f"images/{name}.png"])
        for name in ("a", "b", "same", "gone", "bomb", "cut", "thin", "grey")
    ]
    kept, dropped, _ = curated(tmp_path, rows)
    assert kept == ["a", "b"] and dropped.pop("same")["reason"] == "same_words"
    assert {row["reason"] for row in dropped.values()} == {"lost_picture"} and len(dropped) == 5
    assert "decompression bomb" in dropped["bomb"]["detail"]
    assert [p.id for p in data.read_problems(tmp_path / "new" / "rl.jsonl")] == ["a", "b"]


BOILERPLATE = (
    "can be written in the form $\\frac{m}{n}$ where $m$ and $n$ are relatively prime positive "
    "integers. Find $m+n$."
)
SHAPES = "<image>Which of the shapes that you see in the drawing has most corners, which has least?"
DICE = f"Nine dice are thrown. The chance that two of them agree {BOILERPLATE}"
TESTS = [
    {"id": "t/long", "prompt": LONG},
    {"id": "t/aime", "prompt": DICE},
    {"id": "t/anybody's", "prompt": "Find x."},
    {"id": "t/short", "question": "How many primes are below fifty?", "prompt": "Think."},
    {"id": "t/drawing", "prompt": SHAPES, "images": ["t.png"]},
]


def test_planted_test_questions_are_found_and_boilerplate_is_not(tmp_path):
    picture(tmp_path / "tests" / "t.png", 7)
    picture(tmp_path / "old" / "again.jpg", 7, size=12)
    picture(tmp_path / "old" / "other.png", 8)
    (tmp_path / "old" / "copy.png").write_bytes((tmp_path / "tests" / "t.png").read_bytes())
    tests = write_rows(tmp_path / "tests" / "t.jsonl", TESTS)
    rows = [
        problem("quoted", f"Here is one from a contest. {LONG} Think step by step, then answer."),
        problem("varied", LONG.replace("12 apples", "19 apples").replace("today", "now")),
        problem("aime", f"The area of the smallest such triangle with whole sides {BOILERPLATE}"),
        problem("short", "how many primes are below FIFTY"),
        problem("short miss", "How many primes are below sixty?"),
        problem("anybody's", "Find x"),
        problem("copy", "<image>What colour is the largest one?", images=["copy.png"]),
        problem("again", "<image>What colour is the smallest one?", images=["again.jpg"]),
        problem("template", SHAPES, images=["other.png"]),
        problem("words of a template", SHAPES.removeprefix("<image>")[:40], images=["other.png"]),
    ]
    kept, dropped, _ = curated(tmp_path, rows, benchmarks=(tests,))
    assert kept == ["aime", "short miss", "anybody's", "template", "words of a template"]
    assert {row["reason"] for row in dropped.values()} == {"contaminated"}
    found = {"quoted": "t/long:", "varied": "t/long:", "short": "t/short:"}
    found |= {"copy": "t/drawing:", "again": "t/drawing:"}
    assert {name: row["detail"].split()[1] for name, row in dropped.items()} == found


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


def test_another_seed_draws_other_rows_and_a_larger_count_adds_to_the_smaller(tmp_path):
    draws = {
        (seed, count): set(curated(tmp_path, babbled(range(200)), seed=seed, count=count)[0])
        for seed, count in ((0, 50), (0, 80), (1, 50))
    }
    assert draws[0, 50] < draws[0, 80] and draws[0, 50] != draws[1, 50]


def mixture(rng: random.Random, count: int) -> list[dict]:
    """Rows of three sources: good ones, each kind of bad one (short ones of it), copies."""
    bad = [of for _, of in DROPPED if "line" not in of and len(str(of)) < 9_000]
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
        files = [path.read_bytes() for path in sorted((tmp_path / "new").glob("*.jsonl"))]
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


def test_a_line_that_is_no_row_is_a_dropped_row_under_the_name_of_its_place(tmp_path):
    first, second = babbled("ab")
    kept, dropped, _ = curated(tmp_path, [first, b'{"id": "\xff"', second])
    place = f"{tmp_path / 'old' / 'rows.jsonl'}, byte {len(json.dumps(first)) + 1}"
    assert kept == ["a", "b"] and dropped.keys() == {place}
    assert dropped[place]["reason"] == "malformed" and "'utf-8' codec" in dropped[place]["detail"]


def test_a_row_without_an_id_gets_the_name_of_its_place(tmp_path):
    rows = [{name: of for name, of in row.items() if name != "id"} for row in babbled("ab")]
    kept, dropped, _ = curated(tmp_path, [*rows, rows[0]])
    assert len(kept) == 2 and [row["detail"] for row in dropped.values()] == [f"as {kept[0]}"]
    assert [p.id for p in data.read_problems(tmp_path / "new/rl.jsonl")] == kept


def test_what_leads_nowhere_stops_the_run_and_is_named(tmp_path):
    rows, tests = write_rows(tmp_path / "a.jsonl", []), tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match="would be overwritten"):
        curate.Config((rows,), "rl", f"{tmp_path}/./a.jsonl")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        curate.Config((rows,), "rl", "b.jsonl", passes=(f"{tmp_path}/gone.jsonl",))
    with pytest.raises(SystemExit, match="no row stays of 1"):
        curated(tmp_path, [{"id": "1", "question": "no such column"}])
    with pytest.raises(ValueError, match="t.jsonl, line 1: column 'prompt' is missing"):
        curated(tmp_path, babbled("a"), benchmarks=(write_rows(tests, [{"id": "t"}]),))


def scored(path: Path, column: str, values: dict, **columns) -> str:
    return write_rows(path, [{"id": i, column: v, **columns} for i, v in values.items()])


def source_of(name: str) -> str:
    return name.rstrip("0123456789")


def test_abnormal_losses_go_by_the_median_and_mad_of_their_source(tmp_path):
    """Of few rows by those of all; where all losses are alike, they still have some spread."""
    rng, losses, naive = random.Random(6), {}, {"hard11": "not_scored"}
    for source, centre, spread in (("easy", 0.4, 0.05), ("hard", 1.2, 0.05), ("flat", 0.5, 0)):
        losses |= {f"{source}{i}": rng.gauss(centre, spread) for i in range(60)}
    losses |= {"easy7": 1.2, "hard3": 9.0, "hard11": None}  # easy7: normal for "hard"
    losses |= {"easy8": 0.65}  # 4 standard deviations, which are 6 MADs
    losses |= {"flat5": 0.59, "flat6": 0.61, "few0": 0.6, "few1": 5.0, "few2": 5.1}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    for name, loss in known.items():
        source = source_of(name)
        own = [of for other, of in known.items() if source in (source_of(other), "few")]
        median = np.median(own)
        spread = max(1.4826 * np.median(np.abs(own - median)), 0.02)
        naive |= {name: "abnormal_loss"} if loss > median + 5 * spread else {}
    rows = [row | {"source": source_of(row["id"])} for row in babbled(losses)]
    file = scored(tmp_path / "l.jsonl", "loss", losses)
    _, dropped, _ = curated(tmp_path, rows, losses=(file,))
    assert {name: row["reason"] for name, row in dropped.items()} == naive
    assert naive.keys() == {"hard11", "easy7", "hard3", "flat6", "few1", "few2"}


def test_problems_that_are_solved_never_or_always_go_and_thirds_of_the_rates_are_strata(tmp_path):
    passes = {f"{i}": 1 + (i < 3) for i in range(100)}
    passes |= {"97": None, "98": 0, "99": 4}
    file = scored(tmp_path / "p.jsonl", "passes", passes, samples=4)
    kept, dropped, _ = curated(tmp_path, babbled(passes), passes=(file,), count=10, alpha=3)
    reasons = {row["id"]: row["reason"] for row in dropped.values() if row["step"] == "passes"}
    assert reasons == {"97": "not_tried", "98": "never_solved", "99": "always_solved"}
    assert kept[:3] == ["0", "1", "2"]  # of their third, they weigh 30,000 times as much as others


def test_a_row_without_a_score_stops_the_run_unless_an_earlier_step_dropped_it(tmp_path):
    rows = babbled(range(3))
    rows[2]["answer"] = "proof"
    file = scored(tmp_path / "p.jsonl", "passes", {"0": 1}, samples=4)
    with pytest.raises(ValueError, match="1 of the 2 rows that are left have no score"):
        curated(tmp_path, rows, passes=(file,))
    more = scored(tmp_path / "q.jsonl", "passes", {"1": 2}, samples=8)
    assert curated(tmp_path, rows, passes=(file, more))[0] == ["0", "1"]
