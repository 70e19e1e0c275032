"""benchmarks.py: the official columns of every benchmark, small and made here, read to the end."""

import base64
import io
import json
import random
import re
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_rows
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from common import data
from evaluation import benchmarks, metrics
from evaluation.benchmarks import BENCHMARKS, CHOICES, FREE, LETTERS, YES_NO, Unfit, named, read
from reward import grade

SHARED = Path(__file__).parents[1] / ".." / "shared"


def png(seed: int) -> bytes:
    file, rng = io.BytesIO(), random.Random(seed)
    Image.new("RGB", (9, 7), tuple(rng.randrange(256) for _ in "rgb")).save(file, "png")
    return file.getvalue()


def cell(seed: int) -> dict:
    """A picture as `datasets` stores it."""
    return {"bytes": png(seed), "path": None}


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def collect(bench, place, tmp_path, limit=0) -> tuple[list[dict], list[str]]:
    """Items, and the reasons of what is left out."""
    bench = named(bench) if isinstance(bench, str) else bench
    (tmp_path / "out").mkdir(exist_ok=True)
    items, dropped = read(bench, str(place or ""), tmp_path / "out" / "images", limit)
    return items, [re.split("[,:]", reason)[0] for reason in dropped.values()]


# ---- made copies: {benchmark: (file: rows, golds, reasons of the drops)}

GPQA = {"Record ID": "rec1", "Question": "Which?\n", "High-level domain": "Physics"}
GPQA |= {"Correct Answer": "right\n"} | {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
MMLU_PRO = {"question": "Which?", "category": "law", "answer_index": 2, "src": "x"}
MMLU_PRO |= {"options": ["p", "q", "r", "N/A"], "answer": "C", "cot_content": ""}
MATHVISTA = {"question": "How long?", "image": "images/1.jpg", "decoded_image": cell(1)}
MATHVISTA |= {"choices": None, "unit": None, "precision": None, "question_type": "free_form"}
MATHVISTA["metadata"] = {"source": "GeoQA+", "task": "geometry problem solving"}
MATHVISION = {"image": "images/1.jpg", "decoded_image": cell(2), "subject": "logic", "level": 1}
MATHVERSE = {"problem_index": "1", "question": "", "image": cell(3), "question_type": "free-form"}
MATHVERSE |= {"problem_version": "Vision Only", "query_cot": "Please ..."}
MATHVERSE["metadata"] = {"source": "Geo3D_collected", "subfield": "Volume", "subject": "Solid"}
DYNAMATH = {"image": "images/1.png", "decoded_image": cell(4), "subject": "algebra"}
WEMATH = {"question": "Find it.", "option": "A. 3, 5; B. 4.5;C. B; D. 7.", "image_path": cell(5)}
WEMATH |= {"split": "testmini", "knowledge concept": "Area", "question number": 1}
LOGICVISTA = {"image": cell(6), "skill": ["spatial"], "broad_capability": ["ocr"], "reasoning": ""}
MMMU = {"subject": "Art", "image_1": cell(7), "image_2": cell(8), "image_3": None}
CHARXIV = {"image": cell(9), "category": "cs", "num_subplots": 4, "subplot_loc": None}
CHARXIV |= {"subplot_row": 1, "subplot_col": 2, "reasoning_q_source": 1}
MMBENCH = {"question": "Which?", "A": "cat", "B": "dog", "C": None, "D": "nan", "hint": "nan"}
MMBENCH |= {"category": "scene", "L2-category": "x", "image": cell(10), "source": "scienceqa"}
HALLUSION = {"category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": "1"}
HALLUSION["question"] = "Is it?"
HALLUSION |= {"visual_input": "1", "image": cell(11), "sample_note": "", "filename": "./a.png"}
POPE = {"question": "Is there a cat in the image?", "image": cell(12), "category": "random"}
MME = {"image": cell(13), "category": "code_reasoning"}
BLINK = {"question": "Which?", "choices": ["the left", "the right"], "explanation": ""}
BLINK |= {"prompt": "Which is near?\nSelect from the following.\n(A) the left\n(B) the right"}
BLINK |= {"image_1": cell(14), "image_2": cell(15), "image_3": None, "image_4": None}


def wemath() -> list[dict]:
    keys = ("2steps_1", "2steps_2", "2steps_multi")
    keys = [("2steps_7", key) for key in keys] + [("3steps_7", key) for key in keys]
    keys = [(name, key.replace("2steps", name[:6])) for name, key in keys] + [
        ("3steps_7", "3steps_3")
    ]
    return [WEMATH | {"ID": name, "key": key, "answer": "C"} for name, key in keys]


def mmbench() -> list[dict]:
    rows = [MMBENCH | {"index": 241, "answer": "A"}]
    rows.append(MMBENCH | {"index": 1_000_241, "answer": "B", "A": "dog", "B": "cat"})
    three = MMBENCH | {"C": "hen", "hint": "Look left."}
    return rows + [three | {"index": k * 1_000_000 + 7, "answer": "CBA"[k]} for k in range(3)]


def dynamath(variants=range(1, 11)) -> dict[str, list[dict]]:
    rows = [
        {"id": "1", "question": "Which? choices: (A) 1 (B) 2 (C) 3", "ground_truth": "B"},
        {"id": "2", "question": "What is the slope?", "ground_truth": "0.3333"},
    ]
    kinds = ("multiple choice", "float")
    rows = [DYNAMATH | row | {"answer_type": kind} for row, kind in zip(rows, kinds, strict=True)]
    return {f"data/sample_variant{k}-00000-of-00001.parquet": rows for k in variants}


def charxiv() -> list[dict]:
    asked = {"descriptive_q1": 1, "descriptive_q2": 8, "descriptive_q3": 13, "descriptive_q4": 18}
    asked |= {"descriptive_a1": "Not Applicable", "descriptive_a2": "0.25"}
    asked |= {"descriptive_a3": "macro, micro", "descriptive_a4": "2 by 2"}
    answers = ((1, "Joint-CNN"), (2, "the left one"), (3, "94"), (4, "3.50"))
    return [
        CHARXIV | asked | {"reasoning_q": "Which?", "reasoning_a": answer, "reasoning_a_type": kind}
        for kind, answer in answers
    ]


def mme(folder: str = "code_reasoning") -> list[dict]:
    rows = []
    for name in ("0020.png", "0021.png"):
        for word, answer in (("Java", "Yes"), ("Python", "No")):
            text = f"Is it {word}? Please answer yes or no."
            row = {"question_id": f"{folder}/{name}", "question": text, "answer": answer}
            rows.append(MME | row)
    return rows


AIME = [{"problem": "Find m+n.", "solution": "", "answer": "073", "url": "", "id": 60}]
PHYX = {"index": "1", "question": "How fast?", "answer": "3 m/s", "category": "Mechanics"}
PHYX["image"] = base64.b64encode(png(16)).decode()
REAL = {"image": cell(17), "image_path": "a.webp"}

MADE = {
    "aime2024": ({"data/train-00000-of-00001.parquet": AIME}, ["73"], []),
    "aime2025": ({"train.jsonl": [{"problem": "Find n.", "answer": "70"}]}, ["70"], []),
    "math500": (
        {
            "test.jsonl": [
                {"problem": "1/2?", "solution": "", "answer": "\\frac{1}{2}", "level": 1}
                | {"subject": "Algebra", "unique_id": "test/algebra/1.json"}
            ]
        },
        ["\\frac{1}{2}"],
        [],
    ),
    "gpqa_diamond": (
        {"train.jsonl": [GPQA, GPQA | {"Record ID": "rec2"}, GPQA | {"Record ID": "rec5"}]},
        ["A", "A", "C"],
        [],
    ),
    "mmlu": (
        {
            "all/test-00000-of-00001.parquet": [
                {"question": "Which?", "subject": "law", "choices": [*"wxyz"], "answer": 2}
            ]
        },
        ["C"],
        [],
    ),
    "mmlu_pro": (
        {"data/test-00000-of-00001.parquet": [MMLU_PRO | {"question_id": k} for k in (70, 71)]},
        ["C", "A"],
        [],
    ),
    "mathvista": (
        {
            "data/testmini-00000-of-00001.parquet": [
                MATHVISTA | {"pid": "1", "answer": "1.2", "answer_type": "float", "precision": 1.0},
                MATHVISTA | {"pid": "2", "answer": "7", "answer_type": "integer", "unit": "cm"},
                MATHVISTA
                | {"pid": "3", "answer": "18", "answer_type": "text", "unit": None}
                | {"choices": ["9", "12", "18", "18"], "metadata": {"source": "KVQA", "task": "t"}},
                MATHVISTA | {"pid": "4", "answer": "[0, 2, 5]", "answer_type": "list"},
                MATHVISTA
                | {"pid": "5", "answer": "no", "answer_type": "text", "choices": ["9", "12"]},
            ],
            "data/test-00000-of-00001.parquet": [
                MATHVISTA | {"pid": "9", "answer": "", "answer_type": "x"}
            ],
        },
        ["1.2", "7", "C", "[0, 2, 5]"],
        ["answer not among the options"],
    ),
    "mathvision": (
        {
            "data/test-00000-of-00001.parquet": [
                MATHVISION
                | {
                    "id": "1",
                    "question": "See:\n<image1>\nHow many?",
                    "options": [],
                    "answer": "6",
                },
                MATHVISION
                | {"id": "2", "question": "An ant <image1> at <image2>?", "options": [*"ABCDE"]}
                | {"answer": "D"},
            ],
            "data/testmini-00000-of-00001.parquet": [
                MATHVISION | {"id": "9", "question": "Mini?", "options": [], "answer": "1"}
            ],
        },
        ["6", "D"],
        [],
    ),
    "mathverse": (
        {
            "testmini.parquet": [
                MATHVERSE | {"sample_index": "5", "answer": "4\\sqrt{6}"},
                MATHVERSE
                | {"sample_index": "10", "question_type": "multi-choice", "answer": "C\nD"}
                | {"metadata": {"source": "GeoQA", "subfield": "Angle", "subject": "Plane"}},
                MATHVERSE | {"sample_index": "11", "problem_version": "Text Lite", "answer": "1"},
            ]
        },
        ["4\\sqrt{6}", "C, D"],
        ["not the vision-only version"],
    ),
    "dynamath": (dynamath(), ["B", "0.3333"] * 10, []),
    "wemath": ({"data/testmini-00000-of-00001-adbfe2.parquet": wemath()}, ["C"] * 7, []),
    "logicvista": (
        {
            "data/test-00000-of-00001.parquet": [
                LOGICVISTA
                | {"id": "v1_0", "question": "Select from A, B, C, and D.", "answer": "A, C"},
                LOGICVISTA | {"id": "v1_1", "question": "(A) yes (B) no", "answer": "B"},
                LOGICVISTA | {"id": "v1_2", "question": "Select from 1-5", "answer": "3"},
                LOGICVISTA | {"id": "v1_3", "question": "Which?", "answer": ""},
            ]
        },
        ["A, C", "B", "3"],
        ["no answer"],
    ),
    "mmmu_pro": (
        {
            "standard (10 options)/test-00000-of-00002.parquet": [
                MMMU
                | {"id": "test_Art_1", "question": "From <image 1>: like <image 1>?", "answer": "B"}
                | {"options": "['It\\'s <image 2>', 'b', \"c\", 'd']"},
                MMMU | {"id": "test_Art_2", "question": "Q?", "answer": "A", "options": "[1, 2"},
            ],
            "vision/test-00000-of-00001.parquet": [{"id": "other"}],
        },
        ["B"],
        ["bad options"],
    ),
    "mmmu_pro_vision": (
        {
            "vision/test-00000-of-00001.parquet": [
                {"id": "t1", "image": cell(18), "options": "['a', 'b']", "answer": "B"}
                | {"subject": "Art"}
            ]
        },
        ["B"],
        [],
    ),
    "charxiv_reasoning": (
        {"validation.parquet": charxiv()},
        ["Joint-CNN", "the left one", "94", "3.50"],
        [],
    ),
    "charxiv_descriptive": (
        {"validation.parquet": charxiv()[:1], "test.parquet": charxiv()},
        ["Not Applicable", "0.25", "macro, micro", "2 by 2"],
        [],
    ),
    "mmbench_en": (
        {"en/dev-00000-of-00001.parquet": mmbench(), "cn/dev-00000-of-00001.parquet": []},
        ["A", "B", "C", "B", "A"],
        [],
    ),
    "mmbench_cn": ({"cn/dev-00000-of-00001.parquet": mmbench()}, ["A", "B", "C", "B", "A"], []),
    "blink": (
        {
            f"{task}/val-00000-of-00001.parquet": [
                BLINK | {"idx": f"val_{task}_1", "sub_task": task, "answer": "(B)"}
            ]
            for task in benchmarks.BLINK
        },
        ["B"] * 14,
        [],
    ),
    "mmstar": (
        {
            "mmstar.parquet": [
                {"index": 0, "question": "Which?\nOptions: A: x, B: y, C: z, D: w", "answer": "D"}
                | {"image": cell(19), "category": "math", "l2_category": "g", "bench": "x"}
                | {"meta_info": {"source": "ScienceQA", "split": "test", "image_path": ""}}
            ]
        },
        ["D"],
        [],
    ),
    "hallusionbench": (
        {
            "data/image-00000-of-00001.parquet": [
                HALLUSION | {"question_id": str(k), "question": f"Is it {k}?", "gt_answer": gold}
                for k, gold in enumerate("10")
            ]
            + [HALLUSION | {"question_id": "0", "figure_id": "2", "gt_answer": "1"}]
            + [HALLUSION | {"question_id": "9", "visual_input": "0", "gt_answer": "1"}],
            "data/non_image-00000-of-00001.parquet": [HALLUSION | {"question_id": "5"}],
        },
        ["Yes", "No", "Yes"],
        ["a question without picture"],
    ),
    "pope": (
        {
            "data/test-00000-of-00001.parquet": [
                POPE | {"id": "0", "question_id": "1", "answer": "yes", "image_source": "COCO"},
                POPE | {"id": "1", "question_id": "2", "answer": "no", "image_source": "COCO"},
                POPE | {"question_id": "1", "answer": "yes", "category": "popular"},
                POPE | {"question_id": "3", "answer": "perhaps"},
            ]
        },
        ["Yes", "No", "Yes"],
        ["no answer"],
    ),
    "realworldqa": (
        {
            "data/test-00000-of-00001.parquet": [
                REAL | {"question": text, "answer": answer}
                for text, answer in (
                    ("Which?\nA. left\nB. right\nPlease answer directly with the letter.", "B"),
                    ("How many cars?\nPlease answer directly with a single word or number.", "3"),
                    ("Is it a car?\n\nPlease answer directly with a single word or number.", "Yes"),
                )
            ]
        },
        ["B", "3", "Yes"],
        [],
    ),
    "phyx": (
        {
            "PhyX_mini_OE.parquet": [PHYX, PHYX | {"index": "2", "image": base64.b64encode(b"no")}],
            "PhyX_mini_MC.parquet": [PHYX | {"index": "7"}],
        },
        ["3 m/s"],
        ["picture cannot be opened"],
    ),
    "mme": ({"data/test-00000-of-00004.parquet": mme()}, ["Yes", "No"] * 2, []),
    "mmvet": (
        {
            "data/test-00000-of-00001.parquet": [
                {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5"}
                | {"image": cell(20), "image_source": "", "capability": "ocr,math"}
            ]
        },
        ["-1<AND>-5"],
        [],
    ),
}
MADE["mathvision_mini"] = (MADE["mathvision"][0], ["1"], [])
SIMPLE_ONLY = ("puzzlevqa", "algopuzzlevqa", "mmk12", "bbh")


def make(name: str, place: Path, change=lambda rows: rows) -> Path:
    """Writes the made copy; `change` sees the rows of each file first."""
    for file, rows in MADE[name][0].items():
        path = place / file
        if rows := change(rows):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_parquet(path, rows) if path.suffix == ".parquet" else write_rows(path, rows)
    return place


# ---- every benchmark


def test_every_benchmark_of_the_table_has_a_made_copy_here():
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names) and set(names) == {*MADE, *SIMPLE_ONLY}
    assert all(bool(benchmark.hub) != (benchmark.name in SIMPLE_ONLY) for benchmark in BENCHMARKS)


@pytest.mark.parametrize("name", MADE)
def test_a_benchmark_in_its_official_columns_becomes_items_that_data_py_and_grading_take(
    name, tmp_path
):
    _, golds, reasons = MADE[name]
    bench, place = named(name), make(name, tmp_path / "set")
    items, drops = collect(name, place, tmp_path)
    assert [item["answer"] for item in items] == golds
    assert drops == reasons
    assert json.loads(json.dumps(items)) == items, "an item holds JSON values only"
    assert len({item["id"] for item in items}) == len(items)
    problems = data.read_problems(write_rows(tmp_path / "out" / "items.jsonl", items))
    for item, problem in zip(items, problems, strict=True):
        options = {"choices": problem.choices, "precision": problem.precision}
        verdict = grade(problem.answer, f"\\boxed{{{item['answer']}}}", **options)
        assert verdict.score == 1 or bench.judge == "only", (item["id"], verdict)
        assert item["prompt"].count("<image>") == len(item["images"]) == len(problem.images)
        assert item["judge"] == (bench.judge != "no")
        assert item["id"].startswith(f"{name}/") and item["source"] == name
        asked = next(how for how in benchmarks.KINDS if item["prompt"].endswith(how))
        assert item["kind"] == benchmarks.KINDS[asked]
        assert (item["chance"] > 0) == (item["kind"] != "free" and "," not in item["answer"])
        assert "choices" not in item or item["chance"] == 1 / len(item["choices"])
        assert bench.group == "" or bench.group in item["group"]


@pytest.mark.parametrize("name", [name for name in MADE if named(name).metric != "judge"])
def test_the_metric_of_the_table_takes_its_items_and_has_the_papers_scores(name, tmp_path):
    items, _ = collect(name, make(name, tmp_path / "set"), tmp_path)
    told = {"sample": 0, "score": 1.0, "status": "ok"}
    rows = [item | told | {"extracted": item["answer"]} for item in items]
    scores = metrics.measure(named(name).metric, rows).point()
    asked = {*named(name).paper} - {"perception"} - ({"mean"} if "mmmu" in name else set())
    assert asked <= {*scores} and (name == "mme" or next(iter(scores.values())) == 1)


def test_prompts_say_what_the_set_means(tmp_path):
    def prompts(name: str) -> list[str]:
        items, _ = collect(name, make(name, tmp_path / name), tmp_path)
        return [item["prompt"] for item in items]

    assert prompts("mathvista") == [
        f"<image>How long?\n\nGive a decimal number; digits after the point: 1. {FREE}",
        f"<image>How long? (Unit: cm)\n\nGive an integer. {FREE}",
        f"<image>How long?\nChoices:\n(A) 9\n(B) 12\n(C) 18\n\n{CHOICES}",
        f"<image>How long?\n\nGive a list, as [1, 2, 3]. {FREE}",
    ]
    assert prompts("mathvision")[0] == f"See:\n<image>\nHow many?\n\n{FREE}"
    assert prompts("mathvision")[1].startswith("<image>An ant image 1 at image 2?\nChoices:\n(A) A")
    choices = "(A) It's <image>\n(B) b\n(C) c\n(D) d"
    assert prompts("mmmu_pro") == [f"From <image>: like image 1?\nChoices:\n{choices}\n\n{CHOICES}"]
    assert prompts("mmmu_pro_vision") == [
        f"<image>Answer the question in the picture.\n\n{CHOICES}"
    ]
    assert prompts("wemath")[0].split("\n")[2:6] == ["(A) 3, 5", "(B) 4.5", "(C) B", "(D) 7."]
    assert prompts("mmbench_en")[2].startswith("<image>Look left.\nWhich?\nChoices:\n(A) cat\n(B)")
    assert prompts("blink")[0] == f"<image><image>{BLINK['prompt']}\n\n{CHOICES}"
    assert prompts("logicvista")[1] == f"<image>(A) yes (B) no\n\n{LETTERS}"
    assert prompts("mme")[0] == f"<image>Is it Java?\n\n{YES_NO}"
    assert prompts("realworldqa") == [
        f"<image>Which?\nA. left\nB. right\n\n{CHOICES}",
        f"<image>How many cars?\n\n{FREE}",
        f"<image>Is it a car?\n\n{YES_NO}",
    ]
    assert [p.split("\n")[0] for p in prompts("charxiv_descriptive")] == [
        "<image>For the subplot in row 1 and column 2, what is the title?",
        "<image>For the subplot in row 1 and column 2, by how much do neighbouring ticks of the "
        "x-axis differ?",
        "<image>For the subplot in row 1 and column 2, which labels has the legend?",
        "<image>How are the subplots laid out?",
    ]
    hints = [p.removesuffix(FREE).split("\n\n")[1].strip() for p in prompts("charxiv_reasoning")]
    assert [len(hint) > 10 for hint in hints] == [True] * 4
    assert hints[3] == "Give a decimal number; digits after the point: 2."


def test_groups_and_categories_are_what_the_metrics_take_together(tmp_path):
    def values(name: str, column: str) -> list:
        return [item.get(column) for item in collect(name, tmp_path / name, tmp_path)[0]]

    for name in (
        "wemath",
        "mmbench_en",
        "dynamath",
        "hallusionbench",
        "mme",
        "mathvista",
        "mmstar",
    ):
        make(name, tmp_path / name)
    assert values("wemath", "group")[5] == {"problem": "3steps_7", "part": "3steps_multi", "of": 4}
    assert values("mmbench_en", "group")[1] == {"question": "241", "rotation": 1, "of": 2}
    assert values("dynamath", "group")[3] == {"question": "2", "variant": 2}
    figure, question = "VD/illusion/0/1", "VD/illusion/0/0"
    told = {"set": "VD/illusion/0", "figure": figure, "question": question}
    assert values("hallusionbench", "group")[0] == told
    assert values("mme", "group")[0] == {"image": "code_reasoning/code_reasoning/0020.png", "of": 2}
    assert values("mathvista", "seen") == [True, True, False, True]
    assert values("mathvista", "precision") == [1, None, None, None]
    assert values("mmstar", "seen") == [True] and values("mmbench_en", "seen") == [True] * 5


def test_every_numbered_question_of_charxiv_can_be_asked_of_every_kind_of_plot(tmp_path):
    rows = []
    for where in ({}, {"subplot_row": 0}, {"subplot_loc": "the inner plot"}):
        for number in range(1, 20, 4):
            asked = {f"descriptive_q{k}": min(number + k - 1, 19) for k in (1, 2, 3, 4)}
            rows.append(charxiv()[0] | where | asked)
    write_parquet(tmp_path / "val.parquet", rows)
    items, drops = collect("charxiv_descriptive", tmp_path / "val.parquet", tmp_path)
    assert len(items) == 60 and not drops
    assert {item["category"] for item in items} == {f"question {k}" for k in range(1, 20)}
    assert items[20]["prompt"].startswith("<image>For this plot, what is the title?")
    assert items[40]["prompt"].startswith("<image>For the inner plot, what is the title?")
    assert all(item["rubric"].startswith("Right if the answer is ") for item in items)


# ---- shuffles


def test_a_shuffle_depends_on_the_id_alone_and_the_gold_follows_it():
    seen = Counter()
    for k in range(2_000):
        item = benchmarks.gpqa(GPQA | {"Record ID": f"rec{k}"})
        assert item == benchmarks.gpqa(GPQA | {"Record ID": f"rec{k}"})
        assert item["choices"]["ABCD".index(item["answer"])] == "right"
        assert sorted(item["choices"]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        seen[tuple(item["choices"])] += 1
    letters = Counter({x: 0 for x in "ABCD"})
    for order, count in seen.items():
        letters["ABCD"[order.index("right")]] += count
    assert len(seen) == 24 and min(seen.values()) > 45, "83 expected of each order"
    assert min(letters.values()) > 430 and max(letters.values()) < 570, letters
    ranks = [int(sha256(f"recABC/{k}".encode()).hexdigest(), 16) for k in range(4)]
    order = [letter for _, letter in sorted(zip(ranks, "wxyz", strict=True))]
    assert benchmarks.shuffled("recABC", [*"wxyz"], 0) == (order, order.index("w"))
    assert order == [*"zyxw"], "on any machine"


def test_a_filler_is_no_option_of_mmlu_pro_and_the_gold_follows():
    raw = MMLU_PRO | {"question_id": 5, "options": ["N/A", "q", "N/A", "s"], "answer": "D"}
    item = benchmarks.mmlu_pro(raw)
    assert sorted(item["choices"]) == ["q", "s"]
    assert item["choices"]["AB".index(item["answer"])] == "s"


def test_options_are_not_shuffled_where_letters_are_drawn_or_an_order_is_part_of_the_question():
    raw = {"question": "Which?", "subject": "law", "choices": [*"wxyz"], "answer": 1}
    assert benchmarks.mmlu(raw)["choices"] == [*"wxyz"]
    assert benchmarks.blink(BLINK | {"idx": "1", "sub_task": "x", "answer": "(A)"})["choices"] == [
        "the left",
        "the right",
    ]


# ---- gaps, limits, splits


@pytest.mark.parametrize(
    "name, left_out, group",
    [("wemath", 2, "2steps_7 (2 of 3)"), ("wemath", 6, "3steps_7 (3 of 4)")]
    + [("mmbench_en", 1, "241 (1 of 2)"), ("mmbench_cn", 4, "7 (2 of 3)")]
    + [("mme", 3, "code_reasoning/code_reasoning/0021.png (1 of 2)")],
)
def test_a_group_with_a_gap_is_refused_by_its_name(name, left_out, group, tmp_path):
    make(name, tmp_path / "set", lambda rows: rows[:left_out] + rows[left_out + 1 :])
    with pytest.raises(ValueError, match=f"benchmark {name}: 1 of 2 groups .*{re.escape(group)}"):
        collect(name, tmp_path / "set", tmp_path)


def test_a_dropped_row_leaves_a_gap_too(tmp_path):
    make("mme", tmp_path / "set", lambda rows: [rows[0] | {"answer": "Perhaps"}, *rows[1:]])
    with pytest.raises(ValueError, match="1 of 2 groups by image have gaps"):
        collect("mme", tmp_path / "set", tmp_path)


def test_a_limit_counts_items_or_whole_groups(tmp_path):
    for name in ("mathvista", "wemath", "mmbench_en", "dynamath", "hallusionbench"):
        make(name, tmp_path / name)
    counts = {
        name: len(collect(name, tmp_path / name, tmp_path, limit=1)[0])
        for name in ("mathvista", "wemath", "mmbench_en", "dynamath", "hallusionbench")
    }
    assert counts == {"mathvista": 1, "wemath": 3, "mmbench_en": 2} | {
        "dynamath": 10,
        "hallusionbench": 2,
    }


def test_a_variant_of_dynamath_that_is_not_there_is_named_and_never_read_from_another(tmp_path):
    for file, rows in dynamath([*range(1, 7), *range(8, 11)]).items():
        write_parquet(tmp_path / "set" / file, rows)
    with pytest.raises(FileNotFoundError, match="no file of split 'sample_variant7', but .*nt10-0"):
        collect("dynamath", tmp_path / "set", tmp_path)
    for file, rows in dynamath().items():  # as the Hub calls them
        write_parquet(tmp_path / "hub" / file.replace("_variant", ""), rows)
    assert len(collect("dynamath", tmp_path / "hub", tmp_path)[0]) == 20


def test_an_item_that_two_files_have_is_read_once(tmp_path):
    for k in (0, 1):
        write_parquet(tmp_path / f"phyx_mini_oe-0000{k}-of-00002.parquet", [PHYX])
    items, drops = collect("phyx", tmp_path, tmp_path)
    assert len(items) == 1 and drops == ["duplicate id"]


def test_the_hub_route_gives_the_same_items_as_the_local_one(tmp_path):
    for name in ("pope", "mmbench_en"):
        rows = MADE[name][0][next(iter(MADE[name][0]))]
        rows = [{key: row.get(key) for key in rows[0]} for row in rows]
        kinds = {
            key: ImageColumn() if key == "image" else Value("int64" if key == "index" else "string")
            for key in rows[0]
        }
        split = named(name).split.replace("dev", "validation")
        path = tmp_path / name / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        Dataset.from_list(rows, features=Features(kinds)).to_parquet(path)
        # `datasets` takes a directory as it takes an id
        bench = replace(named(name), hub=str(tmp_path / name), configs=(None,), split=split)
        streamed, dropped = collect(bench, None, tmp_path)
        local, also_dropped = collect(bench, tmp_path / name, tmp_path)
        assert streamed == local and dropped == also_dropped and len(local) == len(MADE[name][1])


# ---- what is wrong


COLUMNS = {"aime2024": "problem", "math500": "unique_id", "mathvista": "metadata", "pope": "answer"}
COLUMNS |= {"wemath": "key", "mme": "question_id", "mmbench_en": "index", "blink": "prompt"}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_missing_column_is_named_with_those_that_are_there(name, tmp_path):
    column, others = COLUMNS[name], {"something": "else"}

    def without(rows: list[dict]) -> list[dict]:
        return [others | {k: v for k, v in row.items() if k != column} for row in rows]

    make(name, tmp_path / "set", without)
    wanted = rf"{name}, .*no column '{column}'; there are \[.*'som"
    with pytest.raises(ValueError, match=wanted):
        collect(name, tmp_path / "set", tmp_path)


def test_places_and_names_that_do_not_exist_are_refused_and_case_does_not_matter(tmp_path):
    with pytest.raises(ValueError, match="no benchmark is called 'mathvisio'; there are aime2024,"):
        named("mathvisio")
    assert named("MathVista").name == "mathvista" and named("MMMU-Pro").name == "mmmu_pro"
    with pytest.raises(FileNotFoundError, match="mmlu, .*nowhere: no file of split 'test'"):
        collect("mmlu", tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match="benchmark bbh is read from a local copy .*--place DIR"):
        collect("bbh", None, tmp_path)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("gpqa_diamond", {"Correct Answer": None}, "malformed row"),
        ("math500", {"answer": ""}, "no answer"),
        ("math500", {"problem": " "}, "no prompt"),
        ("mmlu", {"answer": 4}, "answer not among the options"),
        ("mmlu", {"answer": "?"}, "answer not among the options"),
        ("mmlu_pro", {"answer": "X"}, "malformed row"),
        ("wemath", {"option": "3 or 4"}, "bad options"),
        ("wemath", {"key": "steps"}, "malformed row"),
        ("mmmu_pro", {"question": "<image 3>?"}, "no picture"),
        ("mmmu_pro", {"options": None}, "bad options"),
        ("charxiv_descriptive", {"descriptive_q1": 20}, "malformed row"),
        ("charxiv_reasoning", {"reasoning_a_type": 5}, "malformed row"),
        ("phyx", {"image": "abc"}, "malformed row"),
        ("hallusionbench", {"gt_answer": "2"}, "malformed row"),
        ("blink", {"answer": "(hidden)"}, "answer not among the options"),
        ("blink", {"answer": "(C)"}, "answer not among the options"),
        ("mmmu_pro_vision", {"answer": "C"}, "answer not among the options"),
        ("mathverse", {"metadata": None}, "malformed row"),
    ],
)
def test_a_bad_row_is_dropped_with_its_reason(name, change, reason, tmp_path):
    file = next(iter(MADE[name][0]))
    path = tmp_path / "set" / file
    write_parquet(path.with_suffix(".parquet"), [MADE[name][0][file][0] | change])
    bench = replace(named(name), configs=named(name).configs[:1])
    items, drops = collect(bench, tmp_path / "set", tmp_path)
    assert not items and drops[0] == reason


# ---- pieces


@pytest.mark.parametrize(
    "question, count",
    [
        ("It costs less. Select from A, B and C. (A) True (B)False (C)Insufficient", 3),
        ("Which one? Select from A, B, C, D, and E.", 5),
        ("Which?\nOptions: A: cat, B: dog, C: hen, D: cow", 4),
        ("Which?\nA. left\nB. right", 2),
        ("Angle A. What is it?", 0),
        ("Which figure can be made from these shapes?", 0),
        ("Options:\n" + "\n".join(f"({x}) {x}" for x in "ABCDEFGHIJ"), 10),
    ],
)
def test_options_in_a_question_are_counted(question, count):
    assert benchmarks.options_in(question) == count


@pytest.mark.parametrize(
    "text, options",
    [
        ("A. 3, 5; B. 4.5;C. B; D. 7.", ["3, 5", "4.5", "B", "7."]),
        ("A. B; B. C; C. A; D. No correct answer", ["B", "C", "A", "No correct answer"]),
        ("A. to ;C.  ;B. up ;C. ;C. off ;C.;D. none", ["to ;C.", "up ;C.", "off ;C.", "none"]),
        ("A. 4 B. 3 C. 2 ;D. 1", ["4", "3", "2", "1"]),
        ("A. turn O ;O.;B. at ∠AB;E.; C. No", ["turn O ;O.", "at ∠AB;E.", "No"]),
        ("A. Yes;B. No.; F. No correct answer", ["Yes", "No.", "No correct answer"]),
        ("A. 5 cm。； B. 6", ["5 cm。", "6"]),
    ],
)
def test_options_of_wemath_are_read_by_their_letters_in_order(text, options):
    """The set has each of these forms, ten of its 1,740 rows but the first two."""
    assert benchmarks.wemath_options(text) == options


def test_a_list_of_options_may_be_a_list_in_a_list():
    assert benchmarks.literal_list("[['A', 'B', 'none']]") == ["A", "B", "none"]
    assert benchmarks.literal_list("['1', 2]") == ["1", "2"]
    for broken in ("[1, 2", None, "[]", "7", "[" * 5_000):
        with pytest.raises(Unfit, match="bad options"):
            benchmarks.literal_list(broken)


def test_pictures_stand_where_they_are_named_once_and_the_unnamed_ones_in_front():
    item = {"prompt": "b <image 2> a <image1> again <image 2>"}
    assert benchmarks.placed(item, {1: "one", 2: "two", 3: "three"}) == {
        "prompt": "<image>b <image> a <image> again image 2",
        "images": ["three", "two", "one"],
    }


def test_sets_that_the_paper_trains_on_are_known_by_the_names_that_others_give_them():
    seen = ("GeoQA+", "GeoQA", "Geometry3K", "GEOS", "IconQA", "scienceqa", "ScienceQA_TEST", "TQA")
    assert all(map(benchmarks.is_seen, seen))
    others = ("UniGeo", "KVQA", "Geo2D_collected", "TextVQA", "FigureQA", "PlotQA", "", None)
    assert not any(map(benchmarks.is_seen, others))


# ---- the simple columns


def test_a_local_copy_in_the_simple_columns_is_read_like_the_official_one(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(1))
    rows = [
        {"id": "m1", "question": "Which?", "options": ["x", "A"], "answer": "A"},
        {"id": "m2", "question": "Which?\n(A) x\n(B) y", "answer": "B", "category": "logic"},
        {"id": "m3", "question": "Find a, b.", "answer": "$$1$$ $$2$$", "image": "images/a.png"},
        {"id": "m4", "question": "Is it?", "answer": "no"},
        {"id": "m5", "question": "Find n.", "answer": 7, "image": "images/gone.png"},
    ]
    place = Path(write_rows(tmp_path / "copy.jsonl", rows)).parent
    for name in ("mathvision", "math500", "logicvista", "mmk12", "phyx", "mmlu"):
        items, drops = collect(name, place, tmp_path)
        assert [item["answer"] for item in items] == ["A", "B", "$$1$$, $$2$$", "No"]
        assert items[0]["choices"] == ["x", "A"] and items[1]["category"] == "logic"
        assert items[1]["prompt"].endswith(LETTERS if name == "logicvista" else CHOICES)
        assert items[2]["prompt"] == f"<image>Find a, b.\n\n{FREE}"
        assert items[3]["prompt"] == f"Is it?\n\n{YES_NO}"
        assert drops == ["no picture images/gone.png"]
    with pytest.raises(ValueError, match="mme, .*no column 'category'"):
        collect("mme", place, tmp_path)


REAL_COUNTS = {"aime2024": 30, "aime2025": 30, "math500": 500, "mathvision_mini": 304}
REAL_COUNTS |= {"logicvista": 80, "puzzlevqa": 200, "algopuzzlevqa": 72, "mmk12": 150, "bbh": 150}


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real items lie beside the project")
@pytest.mark.parametrize("name", REAL_COUNTS)
def test_real_items_are_read_without_loss_and_their_golds_answer_themselves(name, tmp_path):
    folder = SHARED / "data" / ("mmk12_eval" if name == "mmk12" else name)
    items, drops = collect(name, folder, tmp_path)
    assert len(items) == REAL_COUNTS[name] and not drops
    for item, problem in zip(
        items,
        data.read_problems(write_rows(tmp_path / "out" / "items.jsonl", items)),
        strict=True,
    ):
        verdict = grade(problem.answer, f"\\boxed{{{item['answer']}}}", choices=problem.choices)
        assert verdict.score == 1, (item["id"], item["answer"], verdict)


# ---- the table


@pytest.mark.skipif(not (SHARED / "PAPER.md").is_file(), reason="the notes lie beside the project")
def test_the_papers_numbers_are_those_of_its_tables():
    text = (SHARED / "PAPER.md").read_text().split("## Evaluation")[1].split("## Cognitive")[0]
    said = {"Qwen2.5-VL-7B": Counter(), "+ cold start": Counter(), "OVR-7B": Counter()}
    for line in text.splitlines():
        who, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        who = "OVR-7B" if who == "+ multimodal RL" else who
        if who in said:
            said[who].update(float(x) for x in re.findall(r"\d+\.\d+", " ".join(cells)))
    papers = [p for b in BENCHMARKS if b.name != "mmmu_pro_vision" for p in b.paper.values()]
    for who, column in zip(said, range(3), strict=True):
        ours = Counter(paper[column] for paper in papers if paper[column] is not None)
        assert ours == said[who], who
    assert named("mathvision").paper == {"accuracy": (25.5, None, 51.8)}
    assert {of: ovr for of, (_, _, ovr) in named("wemath").paper.items()} == {
        "strict": 44.6,
        "loose": 64.8,
    }


@pytest.mark.skipif(
    not (SHARED / "benchmarks.json").is_file(), reason="the notes lie beside the project"
)
def test_every_benchmark_of_the_notes_is_in_the_table_with_its_size():
    ours = {"mathverse_vo": "mathverse", "mmmu_pro_standard10": "mmmu_pro", "mmbench": "mmbench_en"}
    rows = json.loads((SHARED / "benchmarks.json").read_text())
    assert len(rows) == 25
    for row in rows:
        bench = named(ours.get(row["name"], row["name"]))
        split = bench.split.split(", ")[0]
        assert bench.size == row["n"] and split in row["split"], row["name"]
        assert bench.hub in row["hf"] or bench.hub.startswith("lmms-lab-encoder/"), row["name"]


def test_every_prompt_asks_for_a_box_and_aime_is_asked_sixteen_times():
    assert all("\\boxed{}" in how for how in benchmarks.KINDS)
    asked = {b.name: (b.k, b.temperature) for b in BENCHMARKS if b.k > 1}
    assert asked == {"aime2024": (16, 1.0), "aime2025": (16, 1.0)}


def test_the_table_prints_a_line_for_each_benchmark():
    printed = benchmarks.table()
    assert len(printed.splitlines()) == len(BENCHMARKS) + 1
    assert all(re.search(rf"^{b.name} +{b.size:,} ", printed, re.M) for b in BENCHMARKS)
    assert re.search(r"^wemath .* 31.2 / 53.1 .* 44.6 / 64.8 ", printed, re.M)


def test_benchmarks_become_files_of_items_and_what_is_left_out_is_said(tmp_path, capsys):
    for name in ("pope", "math500"):
        make(name, tmp_path / name)
        cfg = benchmarks.Config((name.upper(),), str(tmp_path / "bench"), str(tmp_path / name))
        benchmarks.main(cfg)
    out = tmp_path / "bench" / "pope" / "items.jsonl"
    items = [json.loads(line) for line in out.open()]
    assert items == collect("pope", tmp_path / "pope", tmp_path)[0]
    assert len(data.read_problems(out)) == 3
    assert "pope: 1 rows are left out: no answer" in capsys.readouterr().out
    row = {"problem": "", "answer": "1", "subject": "x", "unique_id": "1"}
    place = write_rows(tmp_path / "test.jsonl", [row])
    with pytest.raises(ValueError, match="math500: no row of .* can be used"):
        benchmarks.main(benchmarks.Config(("math500",), str(tmp_path / "b"), place))
