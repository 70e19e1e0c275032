"""sources.py: the real layouts of the public sets, small and made here, read without the net."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from PIL import Image

from common import data
from curation import sources
from curation.sources import SOURCES, Dropped, last_box, named, read
from reward import grade

REAL = Path(__file__).parents[1] / ".." / "shared" / "data"


def png(shade: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 200)).save(file, kind)
    return file.getvalue()


def cell(shade: int) -> dict:
    """A picture in a cell of parquet, as `datasets` stores it."""
    return {"bytes": png(shade), "path": None}


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TRACE = "<think>Two and two.</think>\n\nIt is \\boxed{4}."


def math(place: Path) -> None:
    for k, subject in enumerate(sources.SUBJECTS):
        row = {"problem": f"What is {k} + 1?", "level": "Level 2", "type": subject}
        row["solution"] = f"First \\boxed{{9}}, no: \\boxed{{\\frac{{{k + 1}}}{{1}}}}."
        write_parquet(place / subject / "train-00000-of-00001.parquet", [row])
        write_parquet(place / subject / "test-00000-of-00001.parquet", [row | {"problem": "test"}])


def numinamath(place: Path) -> None:
    row = {"problem": "Find $x$ if $2x=8$.", "solution": "...", "answer": "4"}
    row |= {"problem_type": "Algebra", "question_type": "math-word-problem"}
    row |= {"problem_is_valid": "Yes", "solution_is_valid": "Yes", "source": "olympiads"}
    proof = row | {"question_type": "proof", "answer": "proof"}
    bad = [row | {"answer": "notfound"}, row | {"problem_is_valid": "Incomplete"}]
    write_parquet(place / "data" / "train-00000-of-00001.parquet", [row, proof, *bad])


def tulu3_math(place: Path) -> None:
    rows = []
    for k, end in enumerate(("The final answer is $7$. I hope it is correct.", "So \\boxed{8}.")):
        turns = [
            {"role": "user", "content": f"Q{k}?"},
            {"role": "assistant", "content": f"A.\n{end}"},
        ]
        rows.append({"id": f"personas_math_{k}", "prompt": f"Q{k}?", "messages": turns})
    write_parquet(place / "data" / "train-00000-of-00002.parquet", rows[:1])
    write_parquet(place / "data" / "train-00001-of-00002.parquet", rows[1:])


def openr1_math(place: Path) -> None:
    row = {"problem": "What is 2 + 2?", "solution": "4", "answer": "4", "source": "amc_aime"}
    row |= {"uuid": "u1", "generations": [TRACE, TRACE, TRACE, "It is \\boxed{4}.", TRACE]}
    row["is_reasoning_complete"] = [True, False, True, True, True]
    row["correctness_math_verify"] = [True, True, False, True, False]
    row["correctness_llama"] = [False, False, False, False, True]
    write_parquet(place / "data" / "train-00000-of-00001.parquet", [row])


def aime(place: Path) -> None:
    rows = [("2023-I-1", 2023, 1, "110"), ("2024-I-1", 2024, 1, "204")]
    keys = ("ID", "Year", "Problem Number", "Answer")
    rows = [
        dict(zip(keys, row, strict=True)) | {"Question": "Find m+n.", "Part": "I"} for row in rows
    ]
    write_parquet(place / "data" / "train-00000-of-00001.parquet", rows)


def orz(place: Path) -> None:
    def pair(answer):
        truth = {"value": answer, "pass_at_n": 0.25}
        return [
            {"from": "human", "value": "Find it."},
            {"from": "assistant", "ground_truth": truth},
        ]

    write_text(place / "orz_math_57k_collected.json", json.dumps([pair("33"), pair("\\frac12")]))


def geometry3k(place: Path) -> None:
    row = {"images": [cell(1)], "problem": "<image>Find x.", "answer": "5 \\sqrt { 3 }"}
    write_parquet(place / "data" / "train-00000-of-00001.parquet", [row, row | {"answer": "12"}])
    write_parquet(
        place / "data" / "test-00000-of-00001.parquet", [row | {"problem": "<image>test"}]
    )


def geoqa(place: Path) -> None:
    row = {"image": cell(2), "problem": "What is angle A?", "solution": "<answer> 145° </answer>"}
    write_parquet(place / "data" / "train-00000-of-00001.parquet", [row])


def iconqa(place: Path) -> None:
    row = {"question": "How many?", "query_image": cell(3), "grade": "grade1", "choices": None}
    row |= {"choice_image_0": None, "choice_image_1": None}
    three = {"question_id": "4", "ques_type": "choose_img", "answer": "choice_2.png"}
    three |= {"choices": "choice_0.png,choice_1.png,choice_2.png", "choice_image_0": cell(4)}
    rows = [
        row | {"question_id": "1", "ques_type": "choose_txt", "choices": "4,6", "answer": "6"},
        row | {"question_id": "2", "ques_type": "fill_in_blank", "answer": "10"},
        row
        | {"question_id": "3", "ques_type": "choose_img", "answer": "choice_1.png"}
        | {"choice_image_0": cell(4), "choice_image_1": cell(5)}
        | {"choices": "choice_0.png,choice_1.png"},
        row | three | {"choice_image_1": cell(5)},  # the third picture has no column
    ]
    write_parquet(place / "data" / "val-00000-of-00001.parquet", rows)


def pixmo_count(place: Path) -> None:
    digest = sha256(png(6)).hexdigest()
    row = {"image_url": "https://x/y.jpg", "image_sha256": digest, "count": 3, "label": "cats"}
    write_parquet(place / "data" / "train-00000-of-00001.parquet", [row | {"points": [{"x": 1.0}]}])
    write_bytes(place / "images" / digest, png(6))


def chartqa(place: Path) -> None:
    row = {"image": cell(7), "query": "What is the value?", "label": ["0.57"]}
    row["human_or_machine"] = 0
    write_parquet(place / "data" / "train-00000-of-00003.parquet", [row, row | {"label": ["Yes"]}])


def puzzlevqa(place: Path) -> None:
    row = {"image": "images/c/c_0.png", "question": "Which colour?", "options": ["red", "blue"]}
    row |= {"answer": "blue", "caption": "", "explanation": "", "deduction": ""}
    write_text(place / "color_grid.json", lines([row]))  # JSON lines, whatever the name says
    write_text(place / "venn.json", lines([row | {"answer": "red"}]))
    write_bytes(place / "images" / "c" / "c_0.png", png(8))


def algopuzzlevqa(place: Path) -> None:
    row = {"image": "images/k/k_0.jpg", "question": "Which day?", "answer": "Sunday"}
    two = row | {"options": ["Sunday", "Monday"]}
    write_text(place / "calendar.json", lines([row | {"solution": {"month": 8}}, two]))
    write_bytes(place / "images" / "k" / "k_0.jpg", png(9, kind="JPEG"))


def tqa(place: Path) -> None:
    verl(place / "tqa_train")


def verl(place: Path) -> None:
    row = {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "T?"}]}
    row |= {"images": [cell(10)], "reward_model": {"ground_truth": "B", "style": "rule"}}
    write_parquet(place / "train-00000-of-00001.parquet", [row])


def all_verl(place: Path) -> None:
    for config in named("openmmreasoner").configs:
        verl(place / config)


def vero(place: Path) -> None:
    row = {"prompt": {"content": "T?", "role": "user"}, "image": cell(10)}
    row |= {"reward_model": {"ground_truth": "7"}, "reward_type": "numeric"}
    write_parquet(place / "train-0.parquet", [row, row | {"reward_type": "llm_judge"}])


def virl39k(place: Path) -> None:
    row = {"question": "<image><image>Which?", "answer": "\\boxed{A}", "qid": "q1"}
    row |= {"image": ["images/a.png", "images/b.png"], "category": "geometry"}
    write_parquet(place / "39Krelease.parquet", [row])
    for name in "ab":
        write_bytes(place / "images" / f"{name}.png", png(ord(name)))


def geos(place: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nFind x."}, {"from": "gpt", "value": "12"}]
    row = {"id": "g", "image": cell(3), "conversations": turns}
    write_parquet(place / "GEOS(MathV360K)" / "train-00000-of-00001.parquet", [row])


BARE = TRACE.removeprefix("<think>")  # as R1's chat template leaves it


def deepmath(place: Path) -> None:
    row = {"question": "2 + 2?", "final_answer": "4", "r1_solution_1": BARE, "r1_solution_2": ""}
    write_parquet(place / "data" / "train-0.parquet", [row | {"r1_solution_3": TRACE}])


def octomed(place: Path) -> None:
    row = {"question": "2 + 2?", "answer": "4", "responses": [TRACE, "4"]}
    write_parquet(place / "data" / "train-0.parquet", [row])


def chat(place: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": TRACE}]
    write_parquet(place / "data" / "train-0.parquet", [{"messages": turns}])


def sharegpt(place: Path) -> None:
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": TRACE}]
    code = [turns[0], {"from": "gpt", "value": "<think>A loop.</think>print(4)"}]
    rows = [{"conversations": turns, "difficulty": 7}, {"conversations": code, "difficulty": None}]
    write_text(place / "train.jsonl", lines(rows))


def am(place: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2?", "info": {"reference_answer": "4.0"}}]
    about = {"reference_answer": None, "think_content": "Two.", "answer_content": "It is 4."}
    turns.append({"role": "assistant", "content": TRACE, "info": about})
    write_text(place / "train.jsonl", lines([{"messages": turns}]))


def scienceqa(place: Path) -> None:
    row = {"image": cell(11), "question": "Which is an animal?", "choices": ["moss", "hen"]}
    row |= {"answer": 1, "hint": "", "grade": "grade2", "lecture": "", "solution": ""}
    rows = [row, row | {"image": None, "hint": "Read this.", "answer": 0}]
    write_parquet(place / "data" / "train-00000-of-00001-1028f23e353fbe3e.parquet", rows)


def mmk12(place: Path) -> None:
    row = {"id": "k1", "question": "<image>Find $$a$$ and $$b$$.", "answer": "$$1$$ $$2$$"}
    row |= {"subject": "math", "image": cell(12)}
    write_parquet(place / "data" / "train-00000-of-00003.parquet", [row])
    write_parquet(place / "data" / "test-00000-of-00001.parquet", [row | {"id": "t1"}])


def atomthink(place: Path) -> None:
    asked = (
        "<image>\nRules.\nTHE GIVEN QUESTION:\n<image>Find x.\nHISTORICAL REASONING STEPS:\nNone"
    )
    solved = {"from": "gpt", "value": "Step 1: add.\nStep 2: The final answer is: 12."}
    row = {"image": "geo/a.png", "conversations": [{"from": "human", "value": asked}, solved]}
    write_text(place / "AMATH-SFT.json", json.dumps([row]))
    write_bytes(place / "images" / "geo" / "a.png", png(13))


MADE = {  # set: how its copy is made, answers of its rows, reasons of its drops
    "math": (math, [f"\\frac{{{k}}}{{1}}" for k in range(1, 8)], []),
    "numinamath": (numinamath, ["4"], ["no answer", "no answer", "flagged by the set"]),
    "tulu3_math": (tulu3_math, ["7", "8"], []),
    "openr1_math": (
        openr1_math,
        ["4", "4"],
        ["trace incomplete", "trace not verified", "trace without <think>"],
    ),
    "aime": (aime, ["110"], ["held out"]),
    "orz_57k": (orz, ["33", "\\frac12"], []),
    "orz_72k": (orz, ["33", "\\frac12"], []),
    "orz_13k_hard": (orz, ["33", "\\frac12"], []),
    "geometry3k": (geometry3k, ["5 \\sqrt { 3 }", "12"], []),
    "geoqa": (geoqa, ["145°"], []),
    "iconqa": (iconqa, ["B", "10", "B"], ["options without pictures"]),
    "pixmo_count": (pixmo_count, ["3"], []),
    "chartqa": (chartqa, ["0.57", "Yes"], []),
    "puzzlevqa": (puzzlevqa, ["B", "A"], []),
    "algopuzzlevqa": (algopuzzlevqa, ["Sunday", "A"], []),
    "tqa": (tqa, ["B"], []),
    "scienceqa": (scienceqa, ["B", "A"], []),
    "mmk12": (mmk12, ["$$1$$, $$2$$"], []),
    "atomthink": (atomthink, ["12"], []),
    "geos": (geos, ["12"], []),
    "deepmath": (deepmath, ["4", "4"], ["no trace"]),
    "octomed_orz": (octomed, ["4"], ["trace without <think>"]),
    "mixture_of_thoughts": (chat, ["4"], []),
    "openthoughts3": (sharegpt, ["4", None], []),
    "am_r1_distilled": (am, ["4.0"], []),
    "mmr1_rl": (geometry3k, ["5 \\sqrt { 3 }", "12"], []),
    "mmrl": (geometry3k, ["5 \\sqrt { 3 }", "12"], []),
    "virl39k_embedded": (geometry3k, ["5 \\sqrt { 3 }", "12"], []),
    "virl39k": (virl39k, ["A"], []),
    "openmmreasoner": (all_verl, ["B"] * 6, []),
    "mmpr_tiny": (verl, ["B"], []),
    "vero": (vero, ["7"], ["graded otherwise"]),
    "clevr_cogen": (geoqa, ["145°"], []),
    "multimodal_open_r1": (geoqa, ["145°"], []),
}


def collect(name, place, tmp_path, **options) -> tuple[list[dict], list[Dropped]]:
    found = list(read(name, place, images_to=tmp_path / "out" / "images", **options))
    drops = [row for row in found if isinstance(row, Dropped)]
    return [row for row in found if not isinstance(row, Dropped)], drops


def jsonl(tmp_path: Path, rows: list[dict]) -> Path:
    write_text(tmp_path / "rows.jsonl", lines(rows))
    return tmp_path / "rows.jsonl"


# ---- every set


def test_every_set_of_the_table_has_a_made_copy_here():
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names) and set(names) == {*MADE}


@pytest.mark.parametrize("name", MADE)
def test_a_set_in_its_own_layout_becomes_rows_that_data_py_and_the_matcher_take(name, tmp_path):
    make, answers, reasons = MADE[name]
    make(tmp_path / "set")
    rows, drops = collect(name, tmp_path / "set", tmp_path)
    assert [row.get("answer") for row in rows] == answers
    assert [drop.reason for drop in drops] == reasons
    assert all(drop.id.startswith(f"{name}/") and drop.detail for drop in drops)
    assert json.loads(json.dumps(rows)) == rows, "a row holds JSON values only"
    for row in rows:
        if "answer" in row:
            problem = data.problem_of(row["id"], row, tmp_path / "out")
            said = f"\\boxed{{{row['answer']}}}"
            assert grade(problem.answer, said, choices=problem.choices).score == 1
            for image in problem.images:
                data.load_image(image)
        assert row["id"].startswith(f"{name}/") and row["source"] == name
        assert set(row["origin"]) == {"set", "split", "index", "license"}
        assert row["prompt"].count("<image>") == len(row["images"]), "a marker for each picture"
        if "response" in row and "answer" in row:
            response = data.example_of(row["id"], row, tmp_path / "out").response
            assert response.replace("<think>\n", "<think>") == TRACE
    traces = (openr1_math, deepmath, octomed, chat, sharegpt, am)
    assert ("response" in rows[0]) == (make in traces)
    assert len({row["id"] for row in rows}) == len(rows)


def test_questions_read_as_their_set_means_them(tmp_path):
    for name in ("iconqa", "vero", "scienceqa", "atomthink", "pixmo_count", "math"):
        MADE[name][0](tmp_path / name)
    prompts = {
        name: [row["prompt"] for row in collect(name, tmp_path / name, tmp_path)[0]]
        for name in ("iconqa", "vero", "scienceqa", "atomthink", "pixmo_count", "math")
    }
    assert prompts["iconqa"] == [
        "<image>How many?\nChoices:\n(A) 4\n(B) 6",
        "<image>How many?",
        "<image>How many?\nChoices:\n(A) <image>\n(B) <image>",
    ]
    assert prompts["vero"] == ["<image>T?"]
    assert prompts["scienceqa"][1] == "Read this.\nWhich is an animal?\nChoices:\n(A) moss\n(B) hen"
    assert prompts["atomthink"] == ["<image>Find x."]
    assert prompts["pixmo_count"] == ["<image>How many cats are there in the picture?"]
    assert "test" not in prompts["math"], "the test files lie beside the train files"


def test_the_hub_route_streams_the_same_rows_as_the_local_one(tmp_path):
    geometry3k(tmp_path / "made")
    table = pq.read_table(tmp_path / "made" / "data" / "train-00000-of-00001.parquet")
    features = {"images": List(ImageColumn()), "problem": Value("string")}
    features = Features(features | {"answer": Value("string")})
    (tmp_path / "set" / "data").mkdir(parents=True)
    path = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    Dataset.from_list(table.to_pylist(), features=features).to_parquet(path)
    orz(tmp_path / "pairs")
    for name, place in (("geometry3k", tmp_path / "set"), ("orz_57k", tmp_path / "pairs")):
        on_hub = replace(
            named(name), hub=str(place)
        )  # `datasets` takes a directory as it takes an id
        streamed, _ = collect(on_hub, None, tmp_path)
        local, _ = collect(on_hub, place, tmp_path)
        assert streamed == local and len(local) == 2


@pytest.mark.parametrize("name", ["orz_13k_hard", "vero", "pixmo_count", "atomthink"])
def test_a_set_that_the_hub_cannot_give_says_so_at_once(name, tmp_path):
    with pytest.raises(ValueError, match=f"set {name}: .*place="):
        read(name, images_to=tmp_path)


def test_a_set_becomes_a_file_with_what_was_dropped_and_where_it_came_from(tmp_path, capsys):
    openr1_math(tmp_path / "set")
    out = tmp_path / "raw" / "openr1.jsonl"
    sources.main(sources.Config("openr1_math", str(tmp_path / "set"), out=str(out)))
    rows, dropped = (
        [json.loads(line) for line in p.open()] for p in (out, out.with_suffix(".dropped.jsonl"))
    )
    assert rows == [
        r
        for r in read("openr1_math", tmp_path / "set", images_to=tmp_path / "x")
        if isinstance(r, dict)
    ]
    assert [(row["step"], row["reason"]) for row in dropped] == [
        ("read", "trace incomplete"),
        ("read", "trace not verified"),
        ("read", "trace without <think>"),
    ]
    report = json.loads(out.with_suffix(".report.json").read_text())
    reasons = {row["reason"]: 1 for row in dropped}
    assert report["steps"] == {"read": {"openr1_math": {"in": 5, "kept": 2, "reasons": reasons}}}
    assert [*report["inputs"]] == ["../set"] and "2 of 93,733 rows" in capsys.readouterr().out
    assert not list(out.parent.glob("*.part"))


def test_a_set_of_which_nothing_can_be_used_fails(tmp_path):
    write_text(
        tmp_path / "set" / "train.jsonl", lines([{"solution": "", "problem": "x", "level": 1}])
    )
    with pytest.raises(SystemExit, match="no row of math can be used"):
        sources.main(sources.Config("math", str(tmp_path / "set"), out=str(tmp_path / "o.jsonl")))
    with pytest.raises(ValueError, match="needs --out"):
        sources.Config("math")
    with pytest.raises(ValueError, match="need a --set"):
        sources.Config(out="x.jsonl")


def test_the_table_prints_a_line_for_each_set():
    command = [sys.executable, Path(sources.__file__)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == len(SOURCES) + 1
    assert all(re.search(rf"^{s.name} .* {s.certainty} ", printed, re.M) for s in SOURCES)


# ---- what is wrong with a set


def test_a_missing_column_names_the_set_the_place_and_what_is_there(tmp_path):
    row = {"image": cell(1), "question": "Find x.", "answer": "1"}
    write_parquet(tmp_path / "data" / "train-0.parquet", [row])
    with pytest.raises(ValueError, match=r"set geometry3k, .*train-0.parquet: no column") as error:
        collect("geometry3k", tmp_path, tmp_path)
    assert "['images', 'problem']; there are ['answer', 'image', 'question']" in str(error.value)
    with pytest.raises(ValueError, match=r"rows.jsonl: no column \['options'\]"):
        collect("puzzlevqa", jsonl(tmp_path, [row | {"image": "a.png"}]), tmp_path)
    on_hub = replace(named("geometry3k"), hub=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="no column"):
        collect(on_hub, None, tmp_path)


def test_a_place_without_the_split_or_with_half_of_it_is_refused(tmp_path):
    geometry3k(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="of split 'validation', but .*train-00000"):
        collect("geometry3k", tmp_path / "set", tmp_path, split="validation")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        collect("geometry3k", tmp_path / "nowhere", tmp_path)
    write_parquet(tmp_path / "math" / "algebra" / "train-0.parquet", [{"problem": ""}])
    with pytest.raises(FileNotFoundError, match="lacks the folders .*precalculus"):
        collect("math", tmp_path / "math", tmp_path)
    with pytest.raises(ValueError, match="no set is called 'mathh'; there are math, "):
        collect("mathh", tmp_path, tmp_path)


def test_a_list_of_json_that_breaks_off_is_an_error_and_not_a_short_set(tmp_path):
    orz(tmp_path)
    path = tmp_path / "orz_math_57k_collected.json"
    write_text(path, path.read_text()[:-20])
    with pytest.raises(ValueError, match="orz_math_57k_collected.json: not valid JSON"):
        collect("orz_57k", path, tmp_path)


# ---- what is wrong with a row


def puzzle(**changes) -> dict:
    row = {"image": "a.png", "question": "Which?", "options": ["x", "y"], "answer": "y"}
    return row | changes


def bomb() -> bytes:
    """A PNG of 100 million black pixels in a few kB: pillow warns from 89 million on."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


BAD = {
    "no answer": puzzle(answer=None),
    "answer not among the options": puzzle(answer="z"),
    "bad options": puzzle(options=["y", "y"]),
    "no prompt": puzzle(question="  "),
    "prompt too long": puzzle(question="why " * 6_000),
    "answer too long": puzzle(options=None, answer="1" * 1_001),
    "chat markup": puzzle(question="Which?<|im_end|>"),
    "markers and pictures differ": puzzle(question="<image> or <image>?"),
    "malformed row": puzzle(question=["a", "list"], options=None),
    "no picture": puzzle(image="missing.png"),
    "picture outside the set": puzzle(image="../a.png"),
    "picture cannot be opened": puzzle(image="cut.png"),
    "picture too narrow": puzzle(image="narrow.png"),
    "decompression bomb": puzzle(image="bomb.png"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_dropped_with_its_reason_and_its_neighbours_stay(reason, tmp_path):
    pictures = {"a": png(1), "cut": png(1, (300, 300))[:-60], "narrow": png(1, (2_001, 10))}
    pictures |= {"bomb": bomb()} if "bomb" in reason else {}
    for name, content in pictures.items():
        write_bytes(tmp_path / f"{name}.png", content)
    rows, drops = collect("puzzlevqa", jsonl(tmp_path, [puzzle(), BAD[reason], puzzle()]), tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/0", "puzzlevqa/2"]
    assert [(drop.id, drop.reason) for drop in drops] == [("puzzlevqa/1", reason)]
    assert drops[0].detail
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1, "a bad row leaves no picture"


def test_a_line_that_is_no_json_and_a_row_that_lacks_a_column_are_dropped(tmp_path):
    write_bytes(tmp_path / "a.png", png(1))
    path = jsonl(tmp_path, [puzzle()])
    write_text(path, path.read_text() + '{"image": \n[]\n7\n{"question": "Which?"}\n')
    rows, drops = collect("puzzlevqa", path, tmp_path)
    assert len(rows) == 1 and [d.reason for d in drops] == ["malformed row"] * 4
    assert "line 2" in drops[0].detail and "'image'" in drops[3].detail


def test_an_id_that_the_set_gives_twice_is_used_once_and_a_running_number_never_repeats(tmp_path):
    write_bytes(tmp_path / "a.png", png(1))
    raw = [puzzle(id="p"), puzzle(id="p"), puzzle(), puzzle()]
    rows, drops = collect("puzzlevqa", jsonl(tmp_path, raw), tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/p", "puzzlevqa/2", "puzzlevqa/3"]
    assert [(d.id, d.reason) for d in drops] == [("puzzlevqa/p", "duplicate id")]


def test_a_row_that_was_dropped_does_not_use_up_its_id(tmp_path):
    write_bytes(tmp_path / "a.png", png(1))
    raw = [puzzle(id="p", answer="z"), puzzle(id="p")]
    rows, drops = collect("puzzlevqa", jsonl(tmp_path, raw), tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/p"] and len(drops) == 1


def test_a_picture_that_is_not_what_its_hash_says_is_dropped(tmp_path):
    pixmo_count(tmp_path / "set")
    (path,) = (tmp_path / "set" / "images").iterdir()
    path.write_bytes(png(200))
    rows, drops = collect("pixmo_count", tmp_path / "set", tmp_path)
    assert not rows and drops[0].reason == "picture has changed"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"image": None}, "no picture"),
        ({"image": "iVBORw0KGgo" * 400}, "no picture"),  # base64 where a path should be
        ({"image": {"bytes": "iVBORw0KGgo", "path": None}}, "no picture"),
        ({"question": "half a \ud835 character"}, "malformed row"),
        ({"options": 7}, "malformed row"),
        ({"id": {"a": 1}, "options": {}, "answer": []}, "malformed row"),
    ],
)
def test_a_row_of_wrong_types_is_dropped_and_never_a_crash(changes, reason, tmp_path):
    write_bytes(tmp_path / "a.png", png(1))
    path = jsonl(tmp_path, [puzzle(), puzzle(**changes), puzzle()])
    rows, drops = collect("puzzlevqa", path, tmp_path)
    assert len(rows) == 2 and [drop.reason for drop in drops] == [reason]


def test_pictures_that_are_missing_as_a_whole_are_no_text_problem(tmp_path):
    row = {"images": None, "problem": "Find x.", "answer": "5"}
    rows, drops = collect("geometry3k", jsonl(tmp_path, [row]), tmp_path)
    assert not rows and drops[0].reason == "no picture"


def test_a_set_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="set puzzlevqa: .*holds no rows"):
        collect("puzzlevqa", jsonl(tmp_path, []), tmp_path)


def test_a_trace_that_is_too_long_for_any_context_is_dropped(tmp_path):
    openr1_math(tmp_path)
    row = pq.read_table(tmp_path / "data" / "train-00000-of-00001.parquet").to_pylist()[0]
    row["generations"][0] = "<think>" + "so " * 200_000 + "</think>"
    rows, drops = collect("openr1_math", jsonl(tmp_path, [row]), tmp_path)
    assert [row["id"] for row in rows] == ["openr1_math/u1/4"]
    assert drops[0].reason == "response too long"


# ---- pictures, limits, memory


def test_a_picture_is_written_once_as_it_came_and_shared(tmp_path):
    names = {"a.png": png(1), "b.png": png(1), "c.jpg": png(2, kind="JPEG")}
    for name, content in names.items():
        write_bytes(tmp_path / name, content)
    path = jsonl(tmp_path, [puzzle(image=name) for name in names])
    rows, _ = collect("puzzlevqa", path, tmp_path)
    written = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}
    assert written == {
        f"{sha256(png(1)).hexdigest()[:16]}.png": png(1),
        f"{sha256(png(2, kind='JPEG')).hexdigest()[:16]}.jpg": png(2, kind="JPEG"),
    }
    assert rows[0]["images"] == rows[1]["images"] != rows[2]["images"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()}
    assert collect("puzzlevqa", path, tmp_path)[0] == rows
    assert before == {p: p.stat().st_mtime_ns for p in before}, "a second run writes nothing"


def test_the_limit_counts_good_rows(tmp_path):
    write_bytes(tmp_path / "a.png", png(1))
    path = jsonl(tmp_path, [puzzle(answer="z"), *[puzzle()] * 5])
    rows, drops = collect("puzzlevqa", path, tmp_path, limit=3)
    assert len(rows) == 3 and len(drops) == 1


def test_another_split_has_other_ids(tmp_path):
    geometry3k(tmp_path / "set")
    rows, _ = collect("geometry3k", tmp_path / "set", tmp_path, split="test")
    assert [row["id"] for row in rows] == ["geometry3k/test-0"]
    assert rows[0]["origin"]["split"] == "test" and rows[0]["prompt"] == "<image>test"


def test_memory_is_bounded_by_a_batch_and_not_by_the_set(tmp_path):
    """A file of 40 MB takes less than 20 MB, of which 1 MB a picture column is read ahead."""
    rng = np.random.default_rng(0)
    schema = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("images", pa.list_(schema)), ("problem", pa.string())])
    schema = schema.append(pa.field("answer", pa.string()))
    with pq.ParquetWriter(tmp_path / "train-0.parquet", schema) as writer:
        for _ in range(20):  # row groups, as the Hub writes them
            rows = []
            for _ in range(20):
                file = io.BytesIO()
                pixels = rng.integers(0, 256, (183, 183, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                cells = [{"bytes": file.getvalue(), "path": None}]
                rows.append({"images": cells, "problem": "<image>Find x.", "answer": "1"})
            writer.write_table(pa.Table.from_pylist(rows, schema))
    code = (
        "import sys, tracemalloc, pyarrow as pa\n"
        "from pathlib import Path\n"
        "from sources import read\n"
        "tracemalloc.start(); n = 0\n"
        "for row in read('geometry3k', sys.argv[1], images_to=Path(sys.argv[2])): n += 1\n"
        "print(n, tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", code, tmp_path, tmp_path / "images"]
    root = Path(sources.__file__).parent
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    count, peak = map(int, run.stdout.split())
    size = (tmp_path / "train-0.parquet").stat().st_size
    assert count == 400 and size > 35e6 and peak < size / 2, f"{peak / 1e6:.0f} of {size / 1e6} MB"


# ---- pieces, and real items


@pytest.mark.parametrize(
    "text, box",
    [
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} and an open \\boxed{2", "1"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\fbox{3}", "3"),
        ("so $\\boxed 5$.", "5"),
        ("none", None),
    ],
)
def test_the_last_closed_box_of_a_solution_is_its_answer(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    "answer, letter", [("7", "A"), (7, "A"), (1, "C"), ("B", "B"), ("(b)", "B"), ("A", "D")]
)
def test_an_option_is_given_by_its_text_or_else_by_its_letter(answer, letter):
    """Real PuzzleVQA: options ["7", "5", "1", ..], answer the number 1, which is no index."""
    assert sources.chosen("Which?", [7, "5", "1", "A"], answer)["answer"] == letter


def test_an_index_counts_from_0_and_lies_among_the_options():
    letters = [sources.chosen("Which?", ["1", "0"], k, is_index=True)["answer"] for k in (0, 1)]
    assert letters == ["A", "B"]
    for k in (-1, 2):
        with pytest.raises(sources.Unfit, match="answer not among"):
            sources.chosen("Which?", ["1", "0"], k, is_index=True)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real items lie beside the repository")
@pytest.mark.parametrize(
    "name, folder, count",
    [("puzzlevqa", "puzzlevqa", 200), ("algopuzzlevqa", "algopuzzlevqa", 72)]
    + [("mmk12", "mmk12_eval", 150)],
)
def test_real_items_are_read_without_loss_and_their_own_answers_are_right(
    name, folder, count, tmp_path
):
    rows, drops = collect(name, REAL / folder, tmp_path)
    assert len(rows) == count and not drops
    for row in rows:
        problem = data.problem_of(row["id"], row, tmp_path / "out")
        verdict = grade(problem.answer, f"\\boxed{{{row['answer']}}}", choices=problem.choices)
        assert verdict.score == 1, (row["id"], row["answer"], verdict)
