"""benchmarks.py: the official columns of every benchmark, small and made here, read to the end."""

import base64
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from test_sources import cell, png, put

from common import data
from evaluation import benchmarks, metrics
from evaluation.benchmarks import BENCHMARKS, CHOICES, FREE, YES_NO, named, write_items
from reward import grade

SHARED = Path(__file__).parents[1] / ".." / "shared"


def collect(name: str, place, tmp_path, limit=0) -> tuple[list[dict], list[str]]:
    """Items, and the reasons of what is left out."""
    items, dropped = write_items(named(name), str(place), tmp_path / "out", limit)
    return items, [row.reason for row in dropped]


# ---- made copies: {benchmark: (file: rows, golds, reasons of the drops)}

# fmt: off
AIME = {"problem": "Find m+n.", "answer": "073", "id": 60}
MATH = {"problem": "1/2?", "answer": "\\frac{1}{2}", "subject": "Algebra", "unique_id": "a/1.json"}
GPQA = {"Record ID": "rec1", "Question": "Which?\n", "Correct Answer": "right\n"}
GPQA |= {f"Incorrect Answer {k}": f"wrong {k}" for k in (1, 2, 3)}
MMLU = {"question": "Which?", "subject": "law", "choices": [*"wxyz"], "answer": 2}
MMLU_PRO = {"question": "Which?", "category": "law", "options": ["p", "N/A", "q", "r"],
            "answer": "D"}  # a filler is no option
MATHVISTA = {"question": "How long?", "decoded_image": cell(1), "choices": None, "unit": None,
             "precision": None, "metadata": {"source": "GeoQA+", "task": "geometry"}}
MATHVISION = {"image": "images/1.jpg", "decoded_image": cell(2), "subject": "logic", "options": []}
MATHVERSE = {"question": "", "image": cell(3), "problem_version": "Vision Only",
             "metadata": {"source": "Geo3D_collected", "subfield": "Volume"}}
DYNAMATH = {"image": "images/1.png", "decoded_image": cell(4), "subject": "algebra"}
WEMATH = {"question": "Find it.", "option": "A. 3, 5; B. 4.5;C. B; D. 7.", "image_path": cell(5),
          "knowledge concept": "Area", "answer": "C"}
LOGICVISTA = {"image": cell(6), "skill": ["spatial"]}
MMMU = {"subject": "Art", "image_1": cell(7), "image_2": cell(8), "image_3": None}
VISION = {"id": "t1", "image": cell(18), "options": "['a', 'b']", "answer": "B", "subject": "Art"}
CHARXIV = {"image": cell(9), "subplot_loc": None, "subplot_row": 1, "subplot_col": 2,
           "reasoning_q": "Which?", "descriptive_q1": 1, "descriptive_q2": 8, "descriptive_q3": 13,
           "descriptive_q4": 18, "descriptive_a1": "Not Applicable", "descriptive_a2": "0.25",
           "descriptive_a3": "macro, micro", "descriptive_a4": "2 by 2"}
CHARTS = [CHARXIV | {"reasoning_a": answer, "reasoning_a_type": kind} for kind, answer in
          ((1, "Joint-CNN"), (2, "the left one"), (3, "94"), (4, "3.50"))]
MMBENCH = {"question": "Which?", "A": "cat", "B": "dog", "C": None, "D": "nan", "hint": "nan",
           "category": "scene", "image": cell(10), "source": "scienceqa"}
ROTATIONS = [MMBENCH | {"index": 241, "answer": "A"},
             MMBENCH | {"index": 1_000_241, "answer": "B", "A": "dog", "B": "cat"}]
ROTATIONS += [MMBENCH | {"C": "hen", "hint": "Look left.", "index": k * 1_000_000 + 7,
                         "answer": "CBA"[k]} for k in range(3)]
HALLUSION = {"category": "VD", "subcategory": "illusion", "set_id": "0", "figure_id": "1",
             "question": "Is it?", "visual_input": "1", "image": cell(11)}
POPE = {"question": "Is there a cat in the image?", "image": cell(12), "category": "random"}
MME = [{"image": cell(13), "category": "code_reasoning", "question_id": f"code_reasoning/{name}",
        "question": f"Is it {word}? Please answer yes or no.", "answer": answer}
       for name in ("0020.png", "0021.png") for word, answer in (("Java", "Yes"), ("Python", "No"))]
BLINK = {"choices": ["the left", "the right"], "image_1": cell(14), "image_2": cell(15),
         "image_3": None, "image_4": None, "prompt": "Which?\n(A) the left\n(B) the right"}
PHYX = {"index": "1", "question": "How fast?", "answer": "3 m/s", "category": "Mechanics",
        "image": base64.b64encode(png(16)).decode()}
REAL = {"image": cell(17)}
MMSTAR = {"index": 0, "question": "Which?\nOptions: A: x, B: y, C: z, D: w", "answer": "D",
          "image": cell(19), "category": "math", "meta_info": {"source": "ScienceQA"}}
MMVET = {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "image": cell(20),
         "capability": "ocr,math"}
STEPS = [WEMATH | {"ID": f"{n}steps_7", "key": f"{n}steps_{part}"} for n, parts in
         ((2, ("1", "2", "multi")), (3, ("1", "2", "multi", "3"))) for part in parts]
VARIANTS = [DYNAMATH | {"id": "1", "question": "Which? choices: (A) 1 (B) 2 (C) 3",
                        "ground_truth": "B", "answer_type": "multiple choice"},
            DYNAMATH | {"id": "2", "question": "What is the slope?", "ground_truth": "0.3333",
                        "answer_type": "float"}]


def parquet(where: str, *rows: dict) -> dict[str, list[dict]]:
    return {f"{where}-00000-of-00001.parquet": [*rows]}


MADE = {
    "aime2024": (parquet("data/train", AIME), ["73"], []),
    "aime2025": ({"train.jsonl": [{"problem": "Find n.", "answer": "70"}]}, ["70"], []),
    "math500": ({"test.jsonl": [MATH]}, ["\\frac{1}{2}"], []),
    "gpqa_diamond": ({"train.jsonl": [GPQA | {"Record ID": f"rec{k}"} for k in (1, 2, 5)]},
                     ["A", "A", "C"], []),
    "mmlu": (parquet("all/test", MMLU, MMLU | {"answer": 4}), ["C"],
             ["answer not among the options"]),
    "mmlu_pro": (parquet("data/test", *(MMLU_PRO | {"question_id": k} for k in (70, 71)),
                         MMLU_PRO | {"question_id": 72, "answer": "X"}),
                 ["C", "A"], ["malformed row"]),
    "mathvista": (
        parquet("data/testmini",
                MATHVISTA | {"pid": "1", "answer": "1.2", "answer_type": "float", "precision": 1.0},
                MATHVISTA | {"pid": "2", "answer": "7", "answer_type": "integer", "unit": "cm"},
                MATHVISTA | {"pid": "3", "answer": "18", "choices": ["9", "12", "18", "18"],
                             "metadata": {"source": "KVQA", "task": "t"}},
                MATHVISTA | {"pid": "4", "answer": "[0, 2, 5]", "answer_type": "list"},
                MATHVISTA | {"pid": "5", "answer": "no", "choices": ["9", "12"]})
        | parquet("data/test", MATHVISTA),
        ["1.2", "7", "C", "[0, 2, 5]"], ["answer not among the options"]),
    "mathvision": (
        parquet("data/test",
                MATHVISION | {"id": "1", "question": "See:\n<image1>\nHow many?", "answer": "6"},
                MATHVISION | {"id": "2", "question": "An ant <image1> at <image2>?",
                              "options": [*"ABCDE"], "answer": "D"})
        | parquet("data/testmini", MATHVISION | {"id": "9", "question": "Mini?", "answer": "1"}),
        ["6", "D"], []),
    "mathverse": (
        {"testmini.parquet": [
            MATHVERSE | {"sample_index": "5", "answer": "4\\sqrt{6}"},
            MATHVERSE | {"sample_index": "10", "answer": "C\nD"},
            MATHVERSE | {"sample_index": "11", "problem_version": "Text Lite", "answer": "1"}]},
        ["4\\sqrt{6}", "C, D"], ["not the vision-only version"]),
    "dynamath": ({file: rows for k in range(1, 11) for file, rows in
                  parquet(f"data/sample{k}", *VARIANTS).items()}, ["B", "0.3333"] * 10, []),
    "wemath": (parquet("data/testmini", *STEPS, STEPS[0] | {"ID": "8", "option": "3 or 4"}),
               ["C"] * 7, ["bad options"]),
    "logicvista": (
        parquet("data/test", *(LOGICVISTA | {"id": str(k), "question": text, "answer": answer}
                               for k, (text, answer) in enumerate((
                                   ("Select from A, B, C, and D.", "A, C"),
                                   ("(A) yes (B) no", "B"), ("Select from 1-5", "3"),
                                   ("Which?", ""))))),
        ["A, C", "B", "3"], ["no answer"]),
    "mmmu_pro": (
        parquet("standard (10 options)/test",
                MMMU | {"id": "1", "question": "From <image 1>: like <image 1>?", "answer": "B",
                        "options": "['It\\'s <image 2>', 'b', \"c\", 'd']"},
                MMMU | {"id": "2", "question": "Q?", "answer": "A", "options": "[1, 2"},
                MMMU | {"id": "3", "question": "<image 3>?", "answer": "A", "options": "[1, 2]"})
        | parquet("vision/test", {"id": "other"}), ["B"], ["malformed row", "no picture"]),
    "mmmu_pro_vision": (parquet("vision/test", VISION), ["B"], []),
    "charxiv_reasoning": ({"val.parquet": CHARTS}, ["Joint-CNN", "the left one", "94", "3.50"], []),
    "charxiv_descriptive": ({"validation.parquet": CHARTS[:1], "test.parquet": CHARTS},
                            ["Not Applicable", "0.25", "macro, micro", "2 by 2"], []),
    "mmbench_en": (parquet("en/dev", *ROTATIONS) | parquet("cn/dev"), [*"ABCBA"], []),
    "mmbench_cn": (parquet("cn/dev", *ROTATIONS), [*"ABCBA"], []),
    "blink": ({file: rows for task in benchmarks.BLINK for file, rows in parquet(
        f"{task}/val", *(BLINK | {"idx": f"{task}_{answer}", "sub_task": task, "answer": answer}
                         for answer in ("(B)", "(hidden)"))
    ).items()}, ["B"] * 14, ["answer not among the options"] * 14),
    "mmstar": ({"mmstar.parquet": [MMSTAR]}, ["D"], []),
    "hallusionbench": (
        parquet("data/image",
                HALLUSION | {"question_id": "0", "question": "Is it 0?", "gt_answer": "1"},
                HALLUSION | {"question_id": "1", "question": "Is it 1?", "gt_answer": "0"},
                HALLUSION | {"question_id": "0", "figure_id": "2", "gt_answer": "1"},
                HALLUSION | {"question_id": "8", "gt_answer": "2"},
                HALLUSION | {"question_id": "9", "visual_input": "0", "gt_answer": "1"})
        | parquet("data/non_image", HALLUSION | {"question_id": "5"}),
        ["Yes", "No", "Yes"], ["malformed row", "a question without picture"]),
    "pope": (
        parquet("data/test",
                POPE | {"question_id": "1", "answer": "yes"},
                POPE | {"question_id": "2", "answer": "no"},
                POPE | {"question_id": "1", "answer": "yes", "category": "popular"},
                POPE | {"question_id": "3", "answer": "perhaps"}),
        ["Yes", "No", "Yes"], ["no answer"]),
    "realworldqa": (
        parquet("data/test", *(REAL | {"question": text, "answer": answer} for text, answer in (
            ("Which?\nA. left\nB. right\nPlease answer directly with the letter.", "B"),
            ("How many cars?\nPlease answer directly with a single word or number.", "3"),
            ("Is it a car?\n\nPlease answer directly with a single word or number.", "Yes")))),
        ["B", "3", "Yes"], []),
    "phyx": ({"PhyX_mini_OE.parquet":
              [PHYX, PHYX | {"index": "2", "image": base64.b64encode(b"no").decode()},
               PHYX | {"index": "3", "image": "abc"}],
              "PhyX_mini_MC.parquet": [PHYX | {"index": "7"}]},
             ["3 m/s"], ["picture cannot be opened", "malformed row"]),
    "mme": (parquet("data/test", *MME), ["Yes", "No"] * 2, []),
    "mmvet": (parquet("data/test", MMVET), ["-1<AND>-5"], []),
}
MADE["mathvision_mini"] = (MADE["mathvision"][0], ["1"], [])

CHOICE_LIST = "(A) It's <image>\n(B) b\n(C) c\n(D) d"
PROMPTS = {  # how the first ones begin
    "mathvista": [f"<image>How long?\n\nGive a decimal number; digits after the point: 1. {FREE}",
                  f"<image>How long? (Unit: cm)\n\nGive an integer. {FREE}",
                  f"<image>How long?\nChoices:\n(A) 9\n(B) 12\n(C) 18\n\n{CHOICES}",
                  f"<image>How long?\n\nGive a list, as [1, 2, 3]. {FREE}"],
    "mathvision": ["<image>See:\nimage 1\nHow", "<image>An ant image 1 at image 2?\nCh"],
    "mmmu_pro": [f"From <image>: like image 1?\nChoices:\n{CHOICE_LIST}\n\n{CHOICES}"],
    "mmmu_pro_vision": [f"<image>Answer the question in the picture.\n\n{CHOICES}"],
    "mmbench_en": ["<image>Which?", "", "<image>Look left.\nWhich?\nChoices:\n(A) cat\n(B)"],
    "blink": [f"<image><image>{BLINK['prompt']}\n\n{CHOICES}"],
    "logicvista": ["", f"<image>(A) yes (B) no\n\n{CHOICES}"],
    "mme": [f"<image>Is it Java?\n\n{YES_NO}"],
    "realworldqa": [f"<image>Which?\nA. left\nB. right\n\n{CHOICES}",
                    "<image>How many cars?\n\nThink"],
    "charxiv_reasoning": ["", "", "", "<image>Which?\n\nGive a decimal number; digits after the "],
}
# fmt: on


def make(name: str, place: Path, change=lambda rows: rows) -> Path:
    """Writes the made copy; `change` sees the rows of each file first."""
    files = {file: change(rows) for file, rows in MADE[name][0].items()}
    return put(place, {file: rows for file, rows in files.items() if rows})


# ---- every benchmark


@pytest.mark.parametrize("name", [benchmark.name for benchmark in BENCHMARKS])
def test_a_benchmark_in_its_own_columns_becomes_items_that_data_py_and_grading_take(name, tmp_path):
    _, golds, reasons = MADE[name]
    bench, place = named(name), make(name, tmp_path / "set")
    items, drops = collect(name, place, tmp_path)
    assert [item["answer"] for item in items] == golds
    assert drops == reasons
    assert json.loads(json.dumps(items)) == items, "an item holds JSON values only"
    assert not wrong_about_themselves(items, tmp_path) or bench.judge == "only"
    for item in items:
        assert item["prompt"].count("<image>") == len(item["images"])
        assert item["judge"] == (bench.judge != "no")
        assert item["id"].startswith(f"{name}/") and item["source"] == name
        how = next(how for how in benchmarks.KINDS if item["prompt"].endswith(how))
        assert item["kind"] == benchmarks.KINDS[how]
        assert (item["chance"] > 0) == (item["kind"] != "free" and "," not in item["answer"])
        assert "choices" not in item or item["chance"] == 1 / len(item["choices"])
        assert bench.group == "" or bench.group in item["group"]
    for item, begin in zip(items, PROMPTS.get(name, ()), strict=False):
        assert item["prompt"].startswith(begin)
    if bench.metric != "judge":
        right = {"sample": 0, "score": 1.0, "status": "ok"}
        rows = [item | right | {"extracted": item["answer"]} for item in items]
        not_here = {"perception"} if name == "mme" else {"mean"} if "mmmu" in name else set()
        assert {*bench.paper} - not_here <= {*metrics.point(bench.metric, rows)}


def wrong_about_themselves(items: list[dict], tmp_path) -> dict:
    """{id: what the matcher says} of written items whose gold, as the answer, is not right."""
    wrong = {}
    problems = data.read_problems(tmp_path / "out" / "items.jsonl")
    for item, problem in zip(items, problems, strict=True):
        options = {"choices": problem.choices, "precision": problem.precision}
        verdict = grade(problem.answer, f"\\boxed{{{item['answer']}}}", **options)
        wrong |= {item["id"]: verdict} if verdict.score != 1 else {}
    return wrong


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real items lie beside the project")
@pytest.mark.parametrize("name, count", [
    ("aime2024", 30), ("aime2025", 30), ("math500", 500), ("mathvision_mini", 304),
    ("logicvista", 80),
])  # fmt: skip
def test_real_items_are_read_without_loss_and_their_golds_answer_themselves(name, count, tmp_path):
    items, drops = collect(name, SHARED / "data" / name, tmp_path)
    assert len(items) == count and not drops
    assert not wrong_about_themselves(items, tmp_path)


def test_groups_and_categories_are_what_the_metrics_take_together(tmp_path):
    def values(name: str, column: str) -> list:
        items, _ = collect(name, make(name, tmp_path / name), tmp_path)
        return [item.get(column) for item in items]

    assert values("wemath", "group")[5] == {"problem": "3steps_7", "part": "3steps_multi", "of": 4}
    assert values("mmbench_en", "group")[1] == {"question": "241", "rotation": 1, "of": 2}
    assert values("dynamath", "group")[3] == {"question": "2", "variant": 2}
    parts = {"set": "VD/illusion/0", "figure": "VD/illusion/0/1", "question": "VD/illusion/0/0"}
    assert values("hallusionbench", "group")[0] == parts
    assert values("mme", "group")[0] == {"image": "code_reasoning/code_reasoning/0020.png", "of": 2}
    assert values("mathvista", "precision") == [1, None, None, None]
    for name, seen in (("mathvista", [1, 1, 0, 1]), ("mmstar", [1]), ("mmbench_en", [1] * 5)):
        assert values(name, "seen") == seen, "of a set that the paper trains on"
    origins = {"GEOS": 1, "ScienceQA_TEST": 1, "TQA": 1, "UniGeo": 0, "Geo2D_collected": 0, None: 0}
    assert {origin: benchmarks.is_seen(origin) for origin in origins} == origins
    assert len({*values("charxiv_reasoning", "rubric")}) == 4


def test_every_numbered_question_of_charxiv_can_be_asked_of_every_kind_of_plot(tmp_path):
    rows, numbers = [], [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    for where in ({}, {"subplot_row": 0}, {"subplot_loc": "the inner plot"}):
        for four in [*numbers, [17, 18, 19, 19]]:
            asked = {f"descriptive_q{k}": number for k, number in enumerate(four, start=1)}
            rows.append(CHARTS[0] | where | asked)
    items, drops = collect("charxiv_descriptive", put(tmp_path, {"val.parquet": rows}), tmp_path)
    assert len(items) == 60 and not drops
    assert {item["category"] for item in items} == {f"question {k}" for k in range(1, 20)}
    wheres = {0: "the subplot in row 1 and column 2", 20: "this plot", 40: "the inner plot"}
    for k, where in wheres.items():
        assert items[k]["prompt"].startswith(f"<image>For {where}, what is the title?\n\n")


def test_the_right_option_of_gpqa_stands_anywhere_by_its_id_alone():
    counts = Counter()
    for k in range(2_000):
        item = benchmarks.gpqa(GPQA | {"Record ID": f"rec{k}"})
        assert item["choices"]["ABCD".index(item["answer"])] == "right"
        counts[tuple(item["choices"])] += 1
    assert len(counts) == 24 and min(counts.values()) > 45, "83 expected of each order"


# ---- gaps, limits, splits


@pytest.mark.parametrize(
    "name, left_out, group",
    [("wemath", 6, "3steps_7 (3 of 4)"), ("mmbench_en", 1, "241 (1 of 2)")]
    + [("mme", 3, "code_reasoning/code_reasoning/0021.png (1 of 2)")],
)
def test_a_group_with_a_gap_is_refused_by_its_name(name, left_out, group, tmp_path):
    make(name, tmp_path / "set", lambda rows: rows[:left_out] + rows[left_out + 1 :])
    with pytest.raises(ValueError, match=f"benchmark {name}: 1 of 2 groups .*{re.escape(group)}"):
        collect(name, tmp_path / "set", tmp_path)


@pytest.mark.parametrize(
    "name, count",
    [("mathvista", 1), ("wemath", 3), ("mmbench_en", 2), ("dynamath", 10), ("hallusionbench", 2)],
)
def test_a_limit_counts_items_or_whole_groups(name, count, tmp_path):
    assert len(collect(name, make(name, tmp_path / name), tmp_path, limit=1)[0]) == count


# ---- pieces


def test_options_of_wemath_are_read_by_their_letters_in_order():
    """The set has the first six of these forms."""
    none = "No correct answer"
    forms = {
        "A. 3, 5; B. 4.5;C. B; D. 7.": ["3, 5", "4.5", "B", "7."],
        "A. B; B. C; C. A; D. none": ["B", "C", "A", "none"],
        "A. to ;C.  ;B. up ;C. ;C. off ;C.;D. none": ["to ;C.", "up ;C.", "off ;C.", "none"],
        "A. 4 B. 3 C. 2 ;D. 1": ["4", "3", "2", "1"],
        "A. turn O ;O.;B. at ∠AB;E.; C. No": ["turn O ;O.", "at ∠AB;E.", "No"],
        "A. Yes;B. No.; F. No correct answer": ["Yes", "No.", none],
        "A. 5 cm。； B. 6": ["5 cm。", "6"],
        "A. to C. x; B. A. ;C. E; F. No correct answer": ["to C. x", "A.", "E", none],
    }
    assert {text: benchmarks.wemath_options(text) for text in forms} == forms


def test_pictures_stand_where_they_are_named_once_and_the_unnamed_ones_in_front():
    item = {"prompt": "b <image 2> a <image1> again <image 2>"}
    assert benchmarks.placed(item, {1: "one", 2: "two", 3: "three"}) == {
        "prompt": "<image>b <image> a <image> again image 2",
        "images": ["three", "two", "one"],
    }


# ---- the simple columns


def test_a_local_copy_in_the_simple_columns_is_read_like_the_official_one(tmp_path):
    rows = [
        {"id": "m1", "question": "Which?", "options": ["x", "A"], "answer": "A"},
        {"id": "m2", "question": "Which?\n(A) x\n(B) y", "answer": "B", "category": "logic"},
        {"id": "m3", "question": "Find a.", "answer": "1", "image": "a.png"},
        {"id": "m4", "question": "Is it?", "answer": "no"},
        {"id": "m5", "question": "Find n.", "answer": 7, "image": "gone.png"},
    ]
    place = put(tmp_path / "copy", {"rows.jsonl": rows, "a.png": png(1)})
    items, drops = collect("mathvision", place, tmp_path)
    assert [item["answer"] for item in items] == ["A", "B", "1", "No"] and drops == ["no picture"]
    assert items[0]["choices"] == ["x", "A"] and items[1]["category"] == "logic"
    for item, end in zip(items, (CHOICES, f"(B) y\n\n{CHOICES}", FREE, YES_NO), strict=True):
        assert item["prompt"].endswith(end)
    with pytest.raises(ValueError, match="mme, .*no column 'category'"):
        collect("mme", place, tmp_path)


# ---- the table


@pytest.mark.skipif(not (SHARED / "PAPER.md").is_file(), reason="the notes lie beside the project")
def test_the_papers_numbers_are_those_of_its_tables():
    text = (SHARED / "PAPER.md").read_text().split("## Evaluation")[1].split("## Cognitive")[0]
    tables = {"Qwen2.5-VL-7B": Counter(), "+ cold start": Counter(), "OVR-7B": Counter()}
    for line in text.splitlines():
        model, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        model = "OVR-7B" if model == "+ multimodal RL" else model
        if model in tables:
            tables[model].update(float(x) for x in re.findall(r"\d+\.\d+", " ".join(cells)))
    papers = [p for b in BENCHMARKS if b.name != "mmmu_pro_vision" for p in b.paper.values()]
    for k, model in enumerate(tables):
        ours = Counter(paper[k] for paper in papers if paper[k] is not None)
        assert ours == tables[model], model
    assert [paper[-1] for paper in named("wemath").paper.values()] == [44.6, 64.8]


def test_benchmarks_become_files_of_items_and_what_is_left_out_is_said(tmp_path, capsys):
    place = make("pope", tmp_path / "pope")
    benchmarks.main(benchmarks.Config(("POPE",), str(tmp_path / "bench"), str(place)))
    written = [json.loads(line) for line in (tmp_path / "bench/pope/items.jsonl").open()]
    assert written == collect("pope", place, tmp_path)[0]
    assert "pope: 1 rows are left out: no answer, as ['pope/3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="math500: no row of .* can be used"):
        collect("math500", put(tmp_path, {"test.jsonl": [MATH | {"problem": ""}]}), tmp_path)
    with pytest.raises(FileNotFoundError, match="mme does not exist"):  # none of its own
        benchmarks.main(benchmarks.Config(("pope", "mme"), str(tmp_path / "b"), str(tmp_path)))
    assert re.search(r"^wemath .* 31.2 / 53.1 .* 44.6 / 64.8 ", benchmarks.table(), re.M)
