"""The changes that docs/change-it.md describes: each is applied to a copy of the project as `git
apply` does it, its own command runs two steps of the miniature, and what it promises is looked at.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import finished

import rl

ROOT = Path(__file__).resolve().parents[1]
CHANGES = sorted((ROOT / "docs/changes").glob("*.patch"))
COPIED = "common curation evaluation miniature tools docs".split()
# Of two groups of four, with 1 and 2 right: what is left of (r - mean) / std.
GROUPS = [[1.0, 0, 0, 0], [1, 1, 0, 0]]
CENTRED = [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]


def changed(tmp_path: Path, patch: Path) -> Path:
    """A copy of the project with the patch applied."""
    copy = tmp_path / "project"
    copy.mkdir()
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # in no repository around it
    command = ["git", "apply", "--verbose", str(patch)]
    applied = subprocess.run(command, cwd=copy, env=alone, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    return copy


def run(copy: Path, patch: Path, small: dict[str, str]) -> str:
    """Runs the patch's own command, in the copy, with small settings before its own."""
    (line,) = re.findall(r"^Run: (.*)$", patch.read_text(), flags=re.M)
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word in small)
    if "--out" in small[words[at]] and "--out" in words:  # the test looks where it has said
        del words[words.index("--out") : words.index("--out") + 2]
    start = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    start["torchrun"].append("--standalone")
    command = [*start[words[0]], *words[1 : at + 1], *small[words[at]].split(), *words[at + 1 :]]
    return finished(command, copy, {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}, 300)


def value(copy: Path, expression: str):
    """What Python in the copy says of its own rl.py."""
    code = f"import json, rl, torch; print(json.dumps({expression}))"
    environment = {"PYTHONPATH": str(copy)}
    return json.loads(finished([sys.executable, "-c", code], copy, environment, 60))


def advantages_of(copy: Path) -> list[list[float]]:
    return value(copy, f"rl.group_advantages(torch.tensor({GROUPS})).tolist()")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(mini, tmp_path_factory) -> list[dict]:
    """The metrics of the project as it is."""
    small = dict(steps=2, problems=4, samples=4, lengths=((0, 12),), pack_tokens=1024)
    out = str(tmp_path_factory.mktemp("plain"))
    rl.main(rl.Config(model=mini.model, data=mini.train, out=out, lr=1e-2, warmup=1, **small))
    return rows(Path(out) / "metrics.jsonl")


def not_normalised(copy, tmp_path, plain):
    assert advantages_of(copy) == CENTRED


def against_the_others(copy, tmp_path, plain):
    wanted = [pytest.approx([a * 4 / 3 for a in group]) for group in CENTRED]
    assert advantages_of(copy) == wanted


def discounted(copy, tmp_path, plain):
    (first, *_), before = rows(tmp_path / "out/metrics.jsonl"), plain[0]
    assert first["reward"] == before["reward"] > 0
    assert 0 < first["return_mean"] < before["return_mean"]


def shorter_is_better(copy, tmp_path, plain):
    for row in rows(tmp_path / "out/rollouts.jsonl"):
        right = row["status"] == "match" and row["stopped"]
        assert row["reward"] == pytest.approx(right - 0.002 * row["length"])


def share_of_right_answers(copy, tmp_path, plain):
    for row in rows(tmp_path / "out/metrics.jsonl"):
        assert row["right"] == row["reward"]  # of the reward as it ships


def held_to_the_start(copy, tmp_path, plain):
    first, second = rows(tmp_path / "out/metrics.jsonl")
    assert abs(first["kl"]) < 1e-6 < abs(second["kl"])
    assert first["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)  # at the start: 0
    assert second["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-3)


def likelier_tokens_alone(copy, tmp_path, plain):
    first, before = rows(tmp_path / "out/metrics.jsonl")[0], plain[0]
    assert first["surprisal"] < before["surprisal"] and first["logp_diff"] < 1e-5


def its_rows_become_items(copy, tmp_path, plain):
    items = rows(copy / "out/bench/amc23/items.jsonl")
    assert [(item["id"], item["answer"]) for item in items] == [("amc23/0", "4"), ("amc23/1", "12")]
    assert all(i["prompt"].startswith("what is A ?") and "boxed" in i["prompt"] for i in items)


def own_rows_are_trained_on(copy, tmp_path, plain):
    sampled = rows(tmp_path / "out/rollouts.jsonl")
    assert {row["answer"] for row in sampled} == {"5", "B", "7.0", "6"}


def differences(copy, tmp_path, plain):
    for row in rows(tmp_path / "data/train.jsonl"):
        digits = dict(re.findall(r"([A-D]) (\d)", row["bill"]))
        a, b = re.search(r"what is (.) - (.) \?", row["prompt"]).groups()
        if row["group"].startswith("clear"):
            assert int(row["answer"]) == int(digits[a]) - int(digits[b])


PROMISES = {
    "dr-grpo": not_normalised,
    "rloo": against_the_others,
    "flag": discounted,
    "own-reward": shorter_is_better,
    "metric": share_of_right_answers,
    "kl": held_to_the_start,
    "top-p": likelier_tokens_alone,
    "benchmark": its_rows_become_items,
    "own-data": own_rows_are_trained_on,
    "subtraction": differences,
}


@pytest.mark.parametrize("patch", CHANGES, ids=lambda patch: patch.stem)
def test_a_change_applies_runs_and_does_what_it_says(mini, plain, tmp_path, patch):
    copy = changed(tmp_path, patch)
    amc = [{"id": i, "question": "what is A ?", "answer": a} for i, a in enumerate((4.0, 12.0))]
    (tmp_path / "amc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in amc))
    own, out = f"--model {mini.model}", f"--out {tmp_path}/out"
    rl_py = f"{own} {out} --data {mini.train} --steps 2 --problems 4 --samples 4 --lengths 0 12"
    small = {"rl.py": f"{rl_py} --pack-tokens 1024 --lr 1e-2 --warmup 1"}
    small["evaluation.benchmarks"] = f"--place {tmp_path}/amc.jsonl"
    small["miniature.world"] = "--files train sft --train 16 --sft 4"
    printed = run(copy, patch, small)
    assert "rl.py" not in patch.read_text().split("\n\n")[1] or "step 1/2" in printed
    if patch.stem == "subtraction":
        shutil.copytree(copy / "out/minus/data", tmp_path / "data")
    PROMISES[patch.stem](copy, tmp_path, plain)


def test_every_change_is_described_and_every_description_has_its_change():
    text = (ROOT / "docs/change-it.md").read_text()
    assert {*re.findall(r"\(changes/([\w-]+)\.patch\)", text)} == {patch.stem for patch in CHANGES}
    assert "```diff" not in text  # a diff in the text is one that nobody applies
