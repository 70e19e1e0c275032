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

from common import data, sets
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


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def lines(rows: list) -> bytes:
    return b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)


def puzzle(**changes) -> dict:
    row = {"image": "a.png", "question": "Which?", "options": ["x", "y"], "answer": "y"}
    return row | changes


# ---- made copies: {set: (file: rows of parquet, or bytes; answers of its rows; reasons of drops)}

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
ICON = {"question": "How many?", "query_image": cell(3), "grade": "grade1", "choices": None,
        "choice_image_0": None, "choice_image_1": None}
TWO = {"ques_type": "choose_img", "choice_image_0": cell(4), "choice_image_1": cell(5)}
ICONQA = [
    ICON | {"question_id": "1", "ques_type": "choose_txt", "choices": "4,6", "answer": "6"},
    ICON | {"question_id": "2", "ques_type": "fill_in_blank", "answer": "10"},
    ICON | TWO | {"question_id": "3", "choices": "choice_0.png,choice_1.png",
                  "answer": "choice_1.png"},
    ICON | TWO | {"question_id": "4", "choices": "choice_0.png,choice_1.png,choice_2.png",
                  "answer": "choice_2.png"},  # the third picture has no column
]
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
    "puzzlevqa": ({"color_grid.json": lines([puzzle(image="images/c/c_0.png")]),  # JSON lines
                   "venn.json": lines([puzzle(answer="x")]),  # whatever the name says
                   "images/c/c_0.png": png(8), "images/a.png": png(8)}, ["B", "A"], []),
    "algopuzzlevqa": ({"calendar.json": lines([puzzle(image="images/k/k_0.jpg", answer="x")]),
                       "images/k/k_0.jpg": png(9, kind="JPEG")}, ["A"], []),
    "tqa": ({"tqa_train/train-0.parquet": [VERL]}, ["B"], []),
    "openmmreasoner": ({f"{config}/train-0.parquet": [VERL] for config in
                        sources.OPENMMREASONER}, ["B"] * 6, []),
    "mmpr_tiny": ({"train-0.parquet": [VERL]}, ["B"], []),
    "vero": ({"train-0.parquet": [VERO, VERO | {"reward_type": "llm_judge"}]}, ["7"],
             ["graded otherwise"]),
    "virl39k": ({"39Krelease.parquet": [VIRL], "images/a.png": png(97), "images/b.png": png(98)},
                ["A"], []),
    "octomed_orz": ({TRAIN: [{"question": "2 + 2?", "answer": "4", "responses": [TRACE, "4"]}]},
                    ["4"], ["trace without <think>"]),
    "am_r1_distilled": ({"train.jsonl": lines([{"messages": AM}])}, ["4.0"], []),
    "geos": ({"GEOS(MathV360K)/train-0.parquet": [GEOS]}, ["12"], []),
    "deepmath": ({TRAIN: [DEEP]}, ["4", "4"], ["no trace"]),
    "mixture_of_thoughts": ({TRAIN: [{"messages": turns(CHAT, "2 + 2?", TRACE)}]}, ["4"], []),
    "openthoughts3": ({"train.jsonl": lines(SHARED_CHATS)}, ["4", None], []),
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


def make(name: str, place: Path) -> Path:
    for file, content in MADE[name][0].items():
        if isinstance(content, bytes):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            (place / file).write_bytes(content)
        else:
            write_parquet(place / file, content)
    return place


def collect(name, place, tmp_path) -> tuple[list[dict], list[Dropped]]:
    source = named(SOURCES, name) if isinstance(name, str) else name
    rows = [*read(source, str(place), tmp_path / "out" / "images")]
    drops = [row for row in rows if isinstance(row, Dropped)]
    return [row for row in rows if not isinstance(row, Dropped)], drops


# ---- every set


@pytest.mark.parametrize("name", [source.name for source in SOURCES])
def test_a_set_in_its_own_layout_becomes_rows_that_data_py_and_the_matcher_take(name, tmp_path):
    _, answers, reasons = MADE[name]
    rows, drops = collect(name, make(name, tmp_path / "set"), tmp_path)
    assert [row.get("answer") for row in rows] == answers
    assert [drop.reason for drop in drops] == reasons
    assert all(drop.id.startswith(f"{name}/") and drop.detail for drop in drops)
    assert json.loads(json.dumps(rows)) == rows, "a row holds JSON values only"
    for row in rows:
        if "answer" in row:
            problem = data.problem_of(row["id"], row, tmp_path / "out")
            boxed = f"\\boxed{{{row['answer']}}}"
            assert grade(problem.answer, boxed, choices=problem.choices).score == 1
            for image in problem.images:
                data.load_image(image)
        assert row["id"].startswith(f"{name}/") and row["source"] == name
        assert set(row["origin"]) == {"set", "split", "index", "license"}
        assert row["prompt"].count("<image>") == len(row["images"]), "a marker for each picture"
        if "response" in row and "answer" in row:
            response = data.example_of(row["id"], row, tmp_path / "out").response
            assert response.replace("<think>\n", "<think>") == TRACE
    assert ("response" in rows[0]) == (name in TRACED)
    assert len({row["id"] for row in rows}) == len(rows)
    assert [row["prompt"] for row in rows] == PROMPTS.get(name, [row["prompt"] for row in rows])


def test_the_hub_route_streams_the_same_rows_as_the_local_one(tmp_path):
    text = {"problem": Value("string"), "answer": Value("string")}
    features = Features({"images": List(ImageColumn())} | text)
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = [GEOMETRY, GEOMETRY | {"answer": "12"}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set" / TRAIN)
    make("orz_57k", tmp_path / "pairs")
    for name, place in (("geometry3k", tmp_path / "set"), ("orz_57k", tmp_path / "pairs")):
        source = replace(named(SOURCES, name), hub=str(place))  # `datasets` takes a directory, too
        streamed, _ = collect(source, "", tmp_path)
        local, _ = collect(source, place, tmp_path)
        assert streamed == local and len(local) == 2


def test_a_hub_out_of_reach_is_said_at_once_with_what_to_do(tmp_path, monkeypatch):
    def unreachable(self, name, timeout):
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(FileNotFoundError, match="hiyouga/geometry3k .*no network.*--place DIR"):
        collect("geometry3k", "", tmp_path)


@pytest.mark.parametrize("name", [source.name for source in SOURCES if source.local])
def test_a_set_that_the_hub_cannot_give_says_so_at_once(name, tmp_path):
    with pytest.raises(ValueError, match=f"set {name}: .*--place"):
        collect(name, "", tmp_path)


def test_a_set_becomes_a_file_with_what_was_dropped_and_where_it_came_from(tmp_path, capsys):
    place, out = make("openr1_math", tmp_path / "set"), tmp_path / "raw" / "openr1.jsonl"
    sources.main(sources.Config("openr1_math", str(place), out=str(out)))
    written = [json.loads(line) for line in out.open()]
    assert written == collect("openr1_math", place, tmp_path)[0]
    dropped = [json.loads(line) for line in out.with_suffix(".dropped.jsonl").open()]
    reasons = MADE["openr1_math"][2]
    assert [(row["step"], row["reason"]) for row in dropped] == [("read", r) for r in reasons]
    report = json.loads(out.with_suffix(".report.json").read_text())
    counts = {"in": 5, "kept": 2, "reasons": dict.fromkeys(reasons, 1)}
    assert report["steps"] == {"read": {"openr1_math": counts}}
    assert [*report["inputs"]] == ["../set"] and "2 of 93,733 rows" in capsys.readouterr().out
    sources.main(sources.Config("openr1_math", str(place), out=str(out), limit=1))
    assert [json.loads(line) for line in out.open()] == written[:1], "the limit counts good rows"


def test_a_set_of_which_nothing_can_be_used_fails_and_so_does_one_without_a_file(tmp_path):
    place = jsonl(tmp_path, [MATH | {"solution": ""}])
    with pytest.raises(SystemExit, match="no row of math can be used"):
        sources.main(sources.Config("math", str(place), out=str(tmp_path / "o.jsonl")))
    for half in ({"set": "math"}, {"out": "x.jsonl"}):
        with pytest.raises(ValueError, match="--set and --out"):
            sources.Config(**half)


def test_the_table_prints_a_line_for_each_set(capsys):
    sources.main(sources.Config())
    printed = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in printed[1:]]
    assert names == [source.name for source in SOURCES] and len({*names}) == len(names)


# ---- what is wrong with a set


def jsonl(tmp_path: Path, rows: list[dict]) -> Path:
    """rows.jsonl and pictures beside it."""
    pictures = {"a": png(1), "cut": png(1, (300, 300))[:-60], "narrow": png(1, (2_001, 10))}
    for name, content in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    return tmp_path / "rows.jsonl"


def test_a_missing_column_names_the_set_the_place_and_what_is_there(tmp_path):
    place = jsonl(tmp_path, [{"image": "a.png", "question": "Find x.", "answer": "1"}])
    match = r"geometry3k, .*rows.jsonl: no column 'problem'; .*\['answer', 'image', 'question'\]"
    with pytest.raises(ValueError, match=match):
        collect("geometry3k", place, tmp_path)
    place = jsonl(tmp_path, [{name: VERL[name] for name in ("prompt", "reward_model")}])
    with pytest.raises(ValueError, match="no column 'image'"):  # and no text problem
        collect("tqa", place, tmp_path)


def test_a_place_without_the_set_or_with_half_of_it_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        collect("geometry3k", tmp_path / "nowhere", tmp_path)
    write_parquet(tmp_path / "math" / "algebra" / "train-0.parquet", [{"problem": ""}])
    with pytest.raises(FileNotFoundError, match="lacks the folders .*precalculus"):
        collect("math", tmp_path / "math", tmp_path)
    with pytest.raises(ValueError, match="none is called 'mathh'; there are math, "):
        collect("mathh", "", tmp_path)
    (tmp_path / "orz.json").write_text(json.dumps(ORZ)[:-20])  # an error and not a short set
    with pytest.raises(ValueError, match="orz.json: not valid JSON"):
        collect("orz_57k", tmp_path / "orz.json", tmp_path)


@pytest.mark.parametrize(
    "files, split, expected",
    [
        ("a_train.json b_test.json", "train", "a_train.json"),
        ("data/test-0.parquet data/testmini-0.parquet", "test", "data/test-0.parquet"),
        ("data/rows.parquet", "data", "data/rows.parquet"),
        ("val.parquet test.parquet", "validation", "val.parquet"),
        ("sample1-0.parquet sample10-0.parquet", "sample_variant1", "sample1-0.parquet"),
        ("image-0.parquet non_image-0.parquet", "image", "image-0.parquet"),
        ("one.json two.json", "train", "one.json two.json"),
        ("deeper/train-1.json", "train", "deeper/train-1.json"),
        ("dataset_infos.json rows.parquet", "train", "rows.parquet"),
        ("test.parquet rows.parquet", "train", ""),
    ],
)
def test_files_of_a_split_are_those_that_name_it_or_all_where_none_names_one(
    files, split, expected, tmp_path
):
    for file in files.split():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    if expected:
        assert sets.files_of(tmp_path, split) == [tmp_path / file for file in expected.split()]
    else:
        with pytest.raises(FileNotFoundError, match="give the file itself"):
            sets.files_of(tmp_path, split)


# ---- what is wrong with a row


BAD = [
    ("no answer", puzzle(answer=None)),
    ("answer not among the options", puzzle(answer="z")),
    ("bad options", puzzle(options=["y", "y"])),
    ("no prompt", puzzle(question="  ")),
    ("answer too long", puzzle(answer="1" * 10_001)),
    ("chat markup", puzzle(question="Which?<|im_end|>")),
    ("markers and pictures differ", puzzle(question="<image> or <image>?")),
    ("malformed row", puzzle(question=["a", "list"])),
    ("malformed row", puzzle(question="half a \ud835 character")),
    ("malformed row", {"question": "Which?"}),
    ("malformed row", []),
    ("malformed row", b'{"image": '),
    ("no picture", puzzle(image=None)),
    ("no picture", puzzle(image="missing.png")),
    ("picture outside the set", puzzle(image="../a.png")),
    ("picture cannot be opened", puzzle(image="cut.png")),
    ("picture cannot be opened", puzzle(image="bomb.png")),
    ("picture too narrow", puzzle(image="narrow.png")),
]


@pytest.mark.parametrize("reason, row", BAD)
def test_a_bad_row_is_dropped_with_its_reason_and_its_neighbours_stay(reason, row, tmp_path):
    if is_bomb := "bomb.png" in str(row):  # 100 million black pixels in a few kB
        Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    rows, drops = collect("puzzlevqa", jsonl(tmp_path, [puzzle(), row, puzzle()]), tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/0", "puzzlevqa/2"]
    assert [(d.id, d.reason) for d in drops] == [("puzzlevqa/1", reason)] and drops[0].detail
    assert "bomb" in drops[0].detail or not is_bomb
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1, "a bad row leaves no picture"


def test_an_id_that_the_set_gives_twice_is_used_once_and_a_dropped_row_does_not_use_it_up(tmp_path):
    raw = [puzzle(id="p", image="b.png"), puzzle(id="p"), puzzle(id="p"), puzzle(), puzzle()]
    rows, drops = collect("puzzlevqa", jsonl(tmp_path, raw), tmp_path)
    assert [row["id"] for row in rows] == ["puzzlevqa/p", "puzzlevqa/3", "puzzlevqa/4"]
    reasons = [("puzzlevqa/p", "no picture"), ("puzzlevqa/p", "duplicate id")]
    assert [(d.id, d.reason) for d in drops] == reasons


def test_a_picture_is_written_once_as_it_came_and_shared(tmp_path):
    path = jsonl(tmp_path, [puzzle(image=name) for name in ("a.png", "b.png", "c.jpg")])
    jpeg = png(2, kind="JPEG")
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "c.jpg").write_bytes(jpeg)
    rows, _ = collect("puzzlevqa", path, tmp_path)
    files = {p.name: p.read_bytes() for p in (tmp_path / "out" / "images").iterdir()}
    first, last = (sha256(content).hexdigest()[:16] for content in (png(1), jpeg))
    assert files == {f"{first}.png": png(1), f"{last}.jpeg": jpeg}
    assert rows[0]["images"] == rows[1]["images"] != rows[2]["images"]


@pytest.mark.parametrize(
    "answer, letter", [("7", "A"), (7, "A"), (1, "C"), ("B", "B"), ("(b)", "B"), ("A", "D")]
)
def test_an_option_is_given_by_its_text_or_else_by_its_letter(answer, letter):
    """Real PuzzleVQA: options ["7", "5", "1", ..], answer the number 1, which is no index."""
    assert sources.chosen("Which?", [7, "5", "1", "A"], answer)["answer"] == letter
