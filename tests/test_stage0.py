"""runs/data.sh from end to end: local copies of sets, a teacher that knows the answers over HTTP, a
language model, the miniature as the model to be trained; then the stages on what came out."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import teacher
from conftest import finished, write_rows
from test_score import plain  # noqa: F401  a small causal language model
from test_sources import TRAIN, put

from common import data
from curation import logic

ROOT = Path(__file__).resolve().parents[1]
LOGIC = 44  # each of eleven families four times


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def stage0(what: str, out: Path, **ours) -> str:
    environment = {"OUT": str(out), "WORKERS": "2", "OMP_NUM_THREADS": "1"}
    return finished(["bash", "runs/data.sh", what], ROOT, environment | ours, 500)


@pytest.fixture(scope="module")
def sft(tmp_path_factory, plain) -> Path:  # noqa: F811
    """out/ after `runs/data.sh sft`: R1 traces of a set, and logic problems given to a teacher."""
    place, out = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("sft")
    row = {"problem": "What is 2 + 2, and why?", "solution": "4", "answer": "4", "uuid": "u"}
    row |= {"source": "amc", "is_reasoning_complete": [True, True, False]}
    thought = "We count two and then two more, on our fingers, which gives us four fingers in all. "
    good = f"<think>{thought * 2}</think>\n\nIt is \\boxed{{4}}."
    row |= {"generations": [good, good.replace("4", "5"), good]}
    row |= {"correctness_math_verify": [True, True, True], "correctness_llama": None}
    put(place, {TRAIN: [row]})
    known = write_rows(place / "known.jsonl", [logic.problem(0, i) for i in range(LOGIC)])
    test = {"id": "bench/1", "question": logic.problem(0, 10)["prompt"]}
    bench = write_rows(place / "bench.jsonl", [test])
    server = teacher.serve([known])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    options = {"SETS": f"openr1_math={place}", "LOGIC": str(LOGIC), "LM": plain, "URL": url}
    options |= {"TEACHER": teacher.NAME, "SCORE": "--tokens 512", "BENCHMARKS": bench}
    stage0("sft", out, **options)
    server.shutdown()
    return out


def test_sets_and_a_teacher_become_the_rows_of_the_cold_start(sft):
    rows = read(sft / "sft.jsonl")
    assert len(data.read_examples(sft / "sft.jsonl")) == len(rows) > 30
    assert {row["source"] for row in rows} >= {"openr1_math", "logic/calendar_arithmetic"}
    origins = {row["id"]: row["origin"] for row in rows}
    assert origins["openr1_math/u/0"]["set"] == "open-r1/OpenR1-Math-220k"
    taught = [o for o in origins.values() if "distilled" in o]
    assert len(taught) == len(rows) - 1 and {o["distilled"]["model"] for o in taught} == {"teacher"}
    assert origins["logic/maze/0-7"]["index"] == 7
    assert "logic/zebra_puzzles/0-10" not in origins  # a test question


def test_every_row_that_is_not_there_has_a_step_and_a_reason(sft):
    raw = {r["id"] for name in ("openr1_math", "logic") for r in read(sft / f"raw/{name}.jsonl")}
    gone = [r for p in ("problems", "distilled", "sft") for r in read(sft / f"{p}.dropped.jsonl")]
    assert all(row["reason"] and row["step"] for row in gone)
    kept, lost = {row["id"] for row in read(sft / "sft.jsonl")}, {row["id"] for row in gone}
    assert kept | lost == raw and not kept & lost
    tested = next(row for row in gone if row["id"] == "logic/zebra_puzzles/0-10")
    assert tested["step"] == "benchmarks" and "bench/1: text 1.0" in tested["detail"]
    assert any(r["id"] == "openr1_math/u/1" and r["reason"] == "wrong_box" for r in gone)
    funnel = json.loads((sft / "problems.report.json").read_text())["steps"]
    counts = funnel["benchmarks"].values()
    assert [sum(of[side] for of in counts) for side in ("in", "kept")] == [LOGIC, LOGIC - 1]
    for of in (of for step in funnel.values() for of in step.values()):
        assert of["in"] == of["kept"] + sum(of["reasons"].values())
    assert "sft.scores.jsonl" in json.loads((sft / "sft.report.json").read_text())["inputs"]


def test_pictures_and_the_model_to_be_trained_become_the_problems_of_rl(mini, tmp_path):
    rows = [row for row in read(Path(mini.train)) if row["images"]]
    raw = []
    for row in rows:
        picture = (Path(mini.train).parent / row["images"][0]).read_bytes()
        raw.append({"problem": row["prompt"], "answer": row["answer"]})
        raw[-1]["images"] = [{"bytes": picture, "path": None}]
    put(tmp_path / "set", {TRAIN: raw})
    options = {"SETS": f"geometry3k={tmp_path / 'set'}", "LOGIC": "0", "MODEL": mini.model}
    options["PASSES"] = "--samples 4 --max-tokens 12 --prompt-tokens 64"
    stage0("rl", tmp_path / "out", **options)
    kept = read(tmp_path / "out" / "rl.jsonl")
    scores = {row["id"]: row["passes"] for row in read(tmp_path / "out" / "rl.scores.jsonl")}
    assert len(scores) == len(rows)
    assert {row["id"] for row in kept} == {i for i, n in scores.items() if 0 < n < 4} != set()
    about = json.loads((tmp_path / "out" / "rl.scores.report.json").read_text())
    solved = [list(scores.values()).count(passes) for passes in range(5)]
    assert about["passes"]["geometry3k"]["problems"] == solved
    command = "torchrun --standalone rl.py --steps 1 --problems 4 --samples 2 --critic-steps 1"
    command += " --lengths 0 12 --prompt-tokens 64 --pack-tokens 256"
    command += f" --model {mini.model} --data {tmp_path}/out/rl.jsonl --out {tmp_path}/run"
    finished([sys.executable, "-m", "torch.distributed.run", *command.split()[1:]], ROOT, {}, 300)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_second_call_does_nothing_anew_and_a_word_that_is_no_stage_is_refused(sft):
    before = {path: path.stat().st_mtime_ns for path in sft.glob("*.jsonl")}
    options = {"SETS": "openr1_math=gone", "LOGIC": str(LOGIC), "URL": "http://127.0.0.1:1/v1"}
    stage0("sft", sft, **options, TEACHER="teacher")
    assert {path: path.stat().st_mtime_ns for path in sft.glob("*.jsonl")} == before
    done = subprocess.run(["bash", "runs/data.sh", "both"], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 2 and b"sft or rl, not both" in done.stdout
