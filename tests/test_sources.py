"""sources.py and sets.py: the real layouts of the public sets, small and made here, no network."""

import io
import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageColumn
from huggingface_hub import HfApi
from PIL import Image

from common import data
from common.sets import Dropped, named
from curation import sources
from curation.sources import SOURCES, read
from reward import grade


def png(shade: int, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 200)).save(file, kind)
    return file.getvalue()


def cell(shade: int) -> dict:
    """A picture in a cell of parquet, as `datasets` stores it."""
    return {"bytes": png(shade), "path": None}


def put(place: Path, files: dict) -> Path:
    """{name: bytes, or rows as parquet or JSON lines}; a row that is bytes is a line as it is."""
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in content)
            path.write_bytes(b"\n".join(lines))
    return place


# ---- made copies: {set: (its files; answers of its rows; reasons of drops)}

TRACE = "<think>Two and two.</think>\n\nIt is \\boxed{4}."
BARE = TRACE.removeprefix("<think>")  # as R1's chat template leaves it
TRAIN = "data/train-00000-of-00001.parquet"


# fmt: off
def turns(style: str, prompt: str, reply: str) -> list[dict]:
    """`style` gives the names of the speakers, of the column of the speaker and of the text."""
    user, assistant, speaker, text = style.split()
    return [{speaker: user, text: prompt}, {speaker: assistant, text: reply}]


CHAT, SHARE = "user assistant role content", "human gpt from value"
MATH = {"problem": "What is 1?", "level": "Level 2",
        "solution": "First \\boxed{9}, no: \\boxed{\\frac{1}{1}}."}
NUMINA = {"problem": "Find $x$ if $2x=8$.", "answer": "4", "question_type": "math-word-problem",
          "problem_is_valid": "Yes", "source": "olympiads"}
TULU = [{"id": f"p{k}", "prompt": "Q?", "messages": turns(CHAT, "Q?", f"A.\n{end}")} for k, end in
        enumerate(("The final answer is $7$. I hope it is correct.", "So \\boxed{8}."))]
AIME = {"ID": "1", "Year": 2023, "Problem Number": 1, "Question": "Find m+n.", "Answer": "110"}
OPENR1 = {"problem": "What is 2 + 2?", "answer": "4", "source": "amc_aime", "uuid": "u1",
          "generations": [TRACE, TRACE, TRACE, "It is \\boxed{4}.", TRACE],
          "is_reasoning_complete": [True, False, True, True, True],
          "correctness_math_verify": [True, True, False, True, False],
          "correctness_llama": [False, False, False, False, True]}
ORZ = [[{"from": "human", "value": "Find it."},
        {"from": "assistant", "ground_truth": {"value": answer, "pass_at_n": 0.25}}]
       for answer in ("33", "\\frac12")]
GEOMETRY = {"images": [cell(1)], "problem": "<image>Find x.", "answer": "5 \\sqrt { 3 }"}
GEOQA = {"image": cell(2), "problem": "What is angle A?", "solution": "<answer> 145° </answer>"}
PUZZLE = {"image": "a.png", "question": "Which?", "options": ["x", "y"], "answer": "y"}
TWO = "choice_0.png,choice_1.png"
ICONQA = [{"question": "How many?", "question_id": str(k), "ques_type": kind, "choices": choices,
           "answer": answer, "query_image": cell(3), "grade": "grade1", "choice_image_0": cell(4),
           "choice_image_1": cell(5)} for k, (kind, choices, answer) in enumerate((
               ("choose_txt", "4,6", "6"), ("fill_in_blank", None, "10"),
               ("choose_img", TWO, "choice_1.png"),
               ("choose_img", f"{TWO},choice_2.png", "choice_2.png")))]  # a third has no column
DIGEST = sha256(png(6)).hexdigest()
PIXMO = {"image_url": "https://x/y.jpg", "image_sha256": DIGEST, "count": 3, "label": "cats"}
CHART = {"image": cell(7), "query": "What is the value?", "label": ["0.57"]}
VERL = {"prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "T?"}],
        "images": [cell(10)], "reward_model": {"ground_truth": "B", "style": "rule"}}
VERO = {"prompt": {"content": "T?", "role": "user"}, "image": cell(10),
        "reward_model": {"ground_truth": "7"}, "reward_type": "numeric"}
VIRL = {"question": "<image><image>Which?", "answer": "\\boxed{A}", "qid": "q1",
        "image": ["images/a.png", "images/b.png"], "category": "geometry"}
AM = turns(CHAT, "2 + 2?", TRACE)
AM[0]["info"] = {"reference_answer": "4.0"}
AM[1]["info"] = {"reference_answer": None, "answer_content": "It is 4."}
DEEP = {"question": "2 + 2?", "final_answer": "4", "r1_solution_1": BARE, "r1_solution_2": "",
        "r1_solution_3": TRACE}
SCIENCE = {"image": cell(11), "question": "Which is an animal?", "choices": ["moss", "hen"],
           "answer": 1, "hint": "", "grade": "grade2", "lecture": "", "solution": ""}
MMK12 = {"id": "k1", "question": "<image>Find $$a$$ and $$b$$.", "answer": "$$1$$ $$2$$",
         "subject": "math", "image": cell(12)}
ATOM = {"image": "geo/a.png", "conversations": turns(
    SHARE, "<image>\nTHE GIVEN QUESTION:\n<image>Find x.\nHISTORICAL REASONING STEPS:\nNone",
    "Step 1: add.\nStep 2: The final answer is: 12.")}
GEOS = {"id": "g", "image": cell(3), "conversations": turns(SHARE, "<image>\nFind x.", "12")}
SHARED_CHATS = [
    {"conversations": turns(SHARE, "2 + 2?", TRACE), "difficulty": 7},
    {"conversations": turns(SHARE, "2 + 2?", "<think>A.</think>print(4)"), "difficulty": None},
]

PAIRS = ({"orz_math_57k_collected.json": json.dumps(ORZ).encode()}, ["33", "\\frac12"], [])
ANGLES = ({TRAIN: [GEOQA]}, ["145°"], [])
FREE_GEOMETRY = (
    {TRAIN: [GEOMETRY, GEOMETRY | {"answer": "12"}],
     "data/test-00000-of-00001.parquet": [GEOMETRY | {"problem": "<image>test"}]},
    ["5 \\sqrt { 3 }", "12"], [])
MADE = {
    "math": ({f"{subject}/{split}-0.parquet": [MATH | {"problem": split}]
              for subject in sources.SUBJECTS for split in ("train", "test")},
             ["\\frac{1}{1}"] * 7, []),
    "numinamath": ({TRAIN: [NUMINA, NUMINA | {"question_type": "proof", "answer": "proof"},
                            NUMINA | {"answer": "notfound"},
                            NUMINA | {"problem_is_valid": "Incomplete"}]},
                   ["4"], ["no answer", "no answer", "flagged by the set"]),
    "tulu3_math": ({"data/train-00000-of-00002.parquet": TULU[:1],
                    "data/train-00001-of-00002.parquet": TULU[1:]}, ["7", "8"], []),
    "openr1_math": ({TRAIN: [OPENR1]}, ["4", "4"],
                    ["trace incomplete", "trace not verified", "trace without <think>"]),
    "aime": ({TRAIN: [AIME, AIME | {"Year": 2024}]}, ["110"], ["held out"]),
    "orz_57k": PAIRS, "orz_72k": PAIRS, "orz_13k_hard": PAIRS,
    "geometry3k": FREE_GEOMETRY, "mmr1_rl": FREE_GEOMETRY, "mmrl": FREE_GEOMETRY,
    "virl39k_embedded": FREE_GEOMETRY,
    "geoqa": ANGLES, "clevr_cogen": ANGLES, "multimodal_open_r1": ANGLES,
    "iconqa": ({"data/val-00000-of-00001.parquet": ICONQA}, ["B", "10", "B"],
               ["options without pictures"]),
    "pixmo_count": ({TRAIN: [PIXMO, PIXMO | {"image_sha256": "0" * 64}],
                     f"images/{DIGEST}": png(6), "images/" + "0" * 64: png(7)},
                    ["3"], ["picture has changed"]),
    "chartqa": ({TRAIN: [CHART, CHART | {"label": ["Yes"]}]}, ["0.57", "Yes"], []),
    "puzzlevqa": ({"color_grid.json": [PUZZLE | {"image": "images/c/c_0.png"}],  # JSON lines,
                   "venn.json": [PUZZLE | {"answer": "x"}],  # whatever the name says
                   "images/c/c_0.png": png(8), "images/a.png": png(8)}, ["B", "A"], []),
    "algopuzzlevqa": ({"calendar.json": [PUZZLE | {"image": "images/k/k_0.jpg", "answer": "x"}],
                       "images/k/k_0.jpg": png(9, kind="JPEG")}, ["A"], []),
    "tqa": ({"tqa_train/train-0.parquet": [VERL]}, ["B"], []),
    "openmmreasoner": ({f"{config}/train-0.parquet": [VERL] for config in
                        sources.OPENMMREASONER}, ["B"] * 6, []),
    "mmpr_tiny": ({"train-0.parquet": [VERL]}, ["B"], []),
    "vero": ({"rows.parquet": [VERO, VERO | {"reward_type": "llm_judge"}],
              "dataset_infos.json": b"{}"}, ["7"], ["graded otherwise"]),
    "virl39k": ({"39Krelease.parquet": [VIRL], "images/a.png": png(97), "images/b.png": png(98)},
                ["A"], []),
    "octomed_orz": ({TRAIN: [{"question": "2 + 2?", "answer": "4", "responses": [TRACE, "4"]}]},
                    ["4"], ["trace without <think>"]),
    "am_r1_distilled": ({"train.jsonl": [{"messages": AM}]}, ["4.0"], []),
    "geos": ({"GEOS(MathV360K)/train-0.parquet": [GEOS]}, ["12"], []),
    "deepmath": ({f"deeper/{TRAIN}": [DEEP]}, ["4", "4"], ["no trace"]),
    "mixture_of_thoughts": ({TRAIN: [{"messages": turns(CHAT, "2 + 2?", TRACE)}]}, ["4"], []),
    "openthoughts3": ({"train.jsonl": SHARED_CHATS}, ["4", None], []),
    "scienceqa": ({"data/train-00000-of-00001-1028f23e353fbe3e.parquet":
                   [SCIENCE, SCIENCE | {"image": None, "hint": "Read this.", "answer": 0}]},
                  ["B", "A"], []),
    "mmk12": ({TRAIN: [MMK12], "data/test-00000-of-00001.parquet": [MMK12 | {"id": "t1"}]},
              ["$$1$$, $$2$$"], []),
    "atomthink": ({"AMATH-SFT.json": json.dumps([ATOM]).encode(), "images/geo/a.png": png(13)},
                  ["12"], []),
}
TRACED = ("openr1_math", "deepmath", "octomed_orz", "mixture_of_thoughts", "openthoughts3",
          "am_r1_distilled")
HEN = "Which is an animal?\nChoices:\n(A) moss\n(B) hen"
PROMPTS = {
    "iconqa": ["<image>How many?\nChoices:\n(A) 4\n(B) 6", "<image>How many?",
               "<image>How many?\nChoices:\n(A) <image>\n(B) <image>"],
    "scienceqa": [f"<image>{HEN}", f"Read this.\n{HEN}"],
    "atomthink": ["<image>Find x."],
    "pixmo_count": ["<image>How many cats are there in the picture?"],
    "math": ["train"] * 7,  # the test files lie beside them
}
# fmt: on


def collect(name: str, place, tmp_path, **changes) -> tuple[list[dict], list[Dropped]]:
    """Rows and drops. changes: to the set's line in the table."""
    source = replace(named(SOURCES, name), **changes)
    rows = [*read(source, str(place), tmp_path / "out" / "images")]
    drops = [row for row in rows if isinstance(row, Dropped)]
    return [row for row in rows if not isinstance(row, Dropped)], drops


# ---- every set


@pytest.mark.parametrize("name", [source.name for source in SOURCES])
def test_a_set_in_its_own_layout_becomes_rows_that_data_py_and_the_matcher_take(name, tmp_path):
    files, answers, reasons = MADE[name]
    rows, drops = collect(name, put(tmp_path / "set", files), tmp_path)
    assert [row.get("answer") for row in rows] == answers
    assert [drop.reason for drop in drops] == reasons
    assert json.loads(json.dumps(rows)) == rows, "a row holds JSON values only"
    for row in rows:
        assert row["id"].startswith(f"{name}/") and row["source"] == name
        assert set(row["origin"]) == {"set", "split", "index", "license"}
        assert row["prompt"].count("<image>") == len(row["images"]), "a marker for each picture"
        assert ("response" in row) == (name in TRACED)
        if "answer" not in row:
            continue
        problem, boxed = data.problem_of("", row, tmp_path / "out"), f"\\boxed{{{row['answer']}}}"
        assert grade(problem.answer, boxed, choices=problem.choices).score == 1
        for image in problem.images:
            data.load_image(image)
        if "response" in row:
            response = data.example_of("", row, tmp_path / "out").response
            assert response.replace("<think>\n", "<think>") == TRACE
    assert [row["prompt"] for row in rows] == PROMPTS.get(name, [row["prompt"] for row in rows])


def test_the_hub_route_streams_the_same_rows_as_the_local_one(tmp_path):
    text = {"problem": Value("string"), "answer": Value("string")}
    features = Features({"images": List(ImageColumn())} | text)
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = [GEOMETRY, GEOMETRY | {"answer": "12"}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / TRAIN)
    put(tmp_path / "pairs", PAIRS[0])
    for name, place in (("geometry3k", tmp_path / "set"), ("orz_57k", tmp_path / "pairs")):
        hub = str(place)  # `datasets` takes a directory, too
        streamed, _ = collect(name, "", tmp_path, hub=hub)
        local, _ = collect(name, place, tmp_path, hub=hub)
        assert streamed == local and len(local) == 2


def test_what_the_hub_cannot_give_says_at_once_how_to_place_it(tmp_path, monkeypatch):
    def unreachable(self, name, timeout):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(FileNotFoundError, match="hiyouga/geometry3k .*no network.*--place DIR"):
        collect("geometry3k", "", tmp_path)
    for source in (source for source in SOURCES if source.local):
        with pytest.raises(ValueError, match=f"set {source.name}: .*--place"):
            collect(source.name, "", tmp_path)


def test_a_set_becomes_a_file_with_what_was_dropped_and_where_it_came_from(tmp_path, capsys):
    files, _, reasons = MADE["openr1_math"]
    place, out = put(tmp_path / "set", files), tmp_path / "raw" / "openr1.jsonl"
    sources.main(sources.Config("openr1_math", str(place), out=str(out)))
    written = [json.loads(line) for line in out.open()]
    assert written == collect("openr1_math", place, tmp_path)[0]
    dropped = [json.loads(line) for line in out.with_suffix(".dropped.jsonl").open()]
    assert [(row["step"], row["reason"]) for row in dropped] == [("read", r) for r in reasons]
    report = json.loads(out.with_suffix(".report.json").read_text())
    counts = {"in": 5, "kept": 2, "reasons": dict.fromkeys(reasons, 1)}
    assert report["steps"] == {"read": {"openr1_math": counts}}
    assert [*report["inputs"]] == ["../set"] and "2 of 93,733 rows" in capsys.readouterr().out
    sources.main(sources.Config("openr1_math", str(place), out=str(out), limit=1))
    assert [json.loads(line) for line in out.open()] == written[:1], "the limit counts good rows"


def test_a_set_of_no_use_fails_and_without_a_set_the_table_is_shown(tmp_path, capsys):
    place = puzzles(tmp_path, {"answer": "z"})
    with pytest.raises(SystemExit, match="no row of puzzlevqa can be used"):
        sources.main(sources.Config("puzzlevqa", str(place), out=str(tmp_path / "o.jsonl")))
    with pytest.raises(ValueError, match="--set and --out"):
        sources.Config(set="math")
    capsys.readouterr()
    sources.main(sources.Config())
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert shown == [source.name for source in SOURCES]


# ---- what is wrong with a set


def test_a_place_without_the_set_or_with_half_of_it_is_refused(tmp_path):
    files = {
        "geometry.jsonl": [{"question": "Find x.", "answer": "1"}],
        "tqa.jsonl": [{name: VERL[name] for name in ("prompt", "reward_model")}],
        "orz.json": json.dumps(ORZ)[:-20].encode(),  # an error and not a short set
        "math/algebra/train.jsonl": [MATH],
        "other/test.jsonl": [MATH],
        "other/rows.jsonl": [MATH],  # of which split?
    }
    put(tmp_path, files)
    refusals = {
        ("geometry3k", "geometry.jsonl"): "geometry3k, .*geometry.jsonl: no column 'problem'; "
        r".*\['answer', 'question'\]",
        ("tqa", "tqa.jsonl"): "no column 'image'",  # no picture makes it no text problem
        ("orz_57k", "orz.json"): "orz.json: not valid JSON",
        ("math", "math"): "lacks the folders .*precalculus",
        ("geometry3k", "other"): "no file of split 'train', .*give the file itself",
        ("geometry3k", "nowhere"): "nowhere",
        ("mathh", "math"): "none is called 'mathh'; there are math, ",
    }
    for (name, place), culprit in refusals.items():
        with pytest.raises((ValueError, FileNotFoundError), match=culprit):
            collect(name, tmp_path / place, tmp_path)


# ---- what is wrong with a row

BAD = [
    ("no answer", {"answer": None}),
    ("answer not among the options", {"answer": "z"}),
    ("bad options", {"options": ["y", "y"]}),
    ("no prompt", {"question": "  "}),
    ("answer too long", {"answer": "1" * 10_001}),
    ("chat markup", {"question": "Which?<|im_end|>"}),
    ("markers and pictures differ", {"question": "<image> or <image>?"}),
    ("malformed row", {"question": ["a", "list"]}),
    ("malformed row", {"question": "half a \ud835 character"}),
    ("malformed row", [{"question": "Which?"}]),
    ("malformed row", b'{"image": '),
    ("no picture", {"image": None}),
    ("no picture", {"image": "missing.png"}),
    ("picture outside the set", {"image": "../a.png"}),
    ("picture cannot be opened", {"image": "cut.png"}),
    ("picture cannot be opened", {"image": "bomb.png"}),
    ("picture cannot be opened", {"image": "narrow.png"}),
]


def puzzles(place: Path, *changes) -> Path:
    """rows.jsonl and a picture beside it. changes: to PUZZLE; or what stands there in its place."""
    rows = [PUZZLE | change if isinstance(change, dict) else change for change in changes]
    return put(place, {"a.png": png(1), "rows.jsonl": rows}) / "rows.jsonl"


def test_bad_rows_are_dropped_with_their_reasons_and_the_others_stay(tmp_path):
    put(tmp_path, {"cut.png": png(1, (300, 300))[:-60], "narrow.png": png(1, (2_001, 10))})
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")  # a few kB
    place = puzzles(tmp_path, {}, *(change for _, change in BAD), {})
    rows, drops = collect("puzzlevqa", place, tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/0", f"puzzlevqa/{len(BAD) + 1}"]
    reasons = [(f"puzzlevqa/{k}", reason) for k, (reason, _) in enumerate(BAD, start=1)]
    assert [(drop.id, drop.reason) for drop in drops] == reasons
    assert all(drop.detail for drop in drops) and "bomb" in drops[-2].detail
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 1, "a bad row leaves no picture"


def test_an_id_that_the_set_gives_twice_is_used_once_and_a_dropped_row_does_not_use_it_up(tmp_path):
    place = puzzles(tmp_path, {"id": "p", "image": "b.png"}, {"id": "p"}, {"id": "p"}, {}, {})
    rows, drops = collect("puzzlevqa", place, tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/p", "puzzlevqa/3", "puzzlevqa/4"]
    reasons = [("puzzlevqa/p", "no picture"), ("puzzlevqa/p", "duplicate id")]
    assert [(d.id, d.reason) for d in drops] == reasons


def test_a_picture_is_written_once_as_it_came_and_shared(tmp_path):
    put(tmp_path, {"b.png": png(1), "c.jpg": (jpeg := png(2, kind="JPEG"))})
    place = puzzles(tmp_path, {}, {"image": "b.png"}, {"image": "c.jpg"})
    rows, _ = collect("puzzlevqa", place, tmp_path)
    files = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}
    first, last = (sha256(content).hexdigest()[:16] for content in (png(1), jpeg))
    assert files == {f"{first}.png": png(1), f"{last}.jpeg": jpeg}
    assert rows[0]["images"] == rows[1]["images"] != rows[2]["images"]


def test_an_option_is_given_by_its_text_or_else_by_its_letter():
    """Real PuzzleVQA: options ["7", "5", "1", ..], answer the number 1, which is no index."""
    letters = {"7": "A", 7: "A", 1: "C", "B": "B", "(b)": "B", "A": "D"}
    options = [7, "5", "1", "A"]
    assert {a: sources.chosen("Which?", options, a)["answer"] for a in letters} == letters
