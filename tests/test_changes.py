"""The changes that docs/change-it.md describes: each is applied to a copy of the project as `git
apply` does it, its own command runs two steps of the miniature, and what it promises is looked at.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import finished, write_rows

import rl

ROOT = Path(__file__).resolve().parents[1]
CHANGES = sorted((ROOT / "docs/changes").glob("*.patch"))
COPIED = "common curation evaluation miniature tools docs".split()
STARTED_BY = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}


def changed(tmp_path: Path, patch: Path) -> Path:
    """A copy of the project with the patch applied."""
    copy = tmp_path / "project"
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    alone = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # in no repository around it
    finished(["git", "apply", "--verbose", str(patch)], copy, alone, 60)
    return copy


def run(copy: Path, patch: Path, small: dict[str, str]) -> str:
    """Runs the patch's own command, in the copy, with small settings before its own."""
    (line,) = re.findall(r"^Run: (.*)$", patch.read_text(), flags=re.M)
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word in small)
    if "--out" in small[words[at]] and "--out" in words:  # the test looks where it has said
        del words[words.index("--out") : words.index("--out") + 2]
    own = [*words[1 : at + 1], *small[words[at]].split(), *words[at + 1 :]]
    environment = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return finished([*STARTED_BY[words[0]], *own], copy, environment, 300)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(mini, tmp_path_factory) -> list[dict]:
    """The metrics of the project as it is."""
    small = dict(steps=2, problems=4, samples=4, lengths=((0, 12),), pack_tokens=1024)
    out = str(tmp_path_factory.mktemp("plain"))
    rl.main(rl.Config(model=mini.model, data=mini.train, out=out, lr=1e-2, warmup=1, **small))
    return rows(Path(out) / "metrics.jsonl")


def advantages(copy: Path) -> list[list[float]]:
    """Of two groups of four, with 1 and 2 right, by the copy's own rl.py."""
    groups = "torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])"
    code = f"import rl, torch; print(rl.group_advantages({groups}).tolist())"
    return json.loads(finished([sys.executable, "-c", code], copy, {"PYTHONPATH": str(copy)}, 300))


def promise_of_dr_grpo(copy, tmp_path, plain):
    assert advantages(copy) == [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]


def promise_of_rloo(copy, tmp_path, plain):
    first, second = advantages(copy)
    assert first == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert second == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3])


def promise_of_flag(copy, tmp_path, plain):
    (first, *_), before = rows(tmp_path / "out/metrics.jsonl"), plain[0]
    assert first["reward"] == before["reward"] > 0
    assert 0 < first["return_mean"] < before["return_mean"]


def promise_of_own_reward(copy, tmp_path, plain):
    for row in rows(tmp_path / "out/rollouts.jsonl"):
        right = row["status"] == "match" and row["stopped"]
        assert row["reward"] == pytest.approx(right - 0.002 * row["length"])


def promise_of_metric(copy, tmp_path, plain):
    for row in rows(tmp_path / "out/metrics.jsonl"):
        assert row["right"] == row["reward"]  # of the reward as it ships


def promise_of_kl(copy, tmp_path, plain):
    first, second = rows(tmp_path / "out/metrics.jsonl")
    assert abs(first["kl"]) < 1e-6 < abs(second["kl"])
    assert first["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)  # at the start: 0
    assert second["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-3)


def promise_of_top_p(copy, tmp_path, plain):
    first, before = rows(tmp_path / "out/metrics.jsonl")[0], plain[0]
    assert first["surprisal"] < before["surprisal"] and first["logp_diff"] < 1e-5


def promise_of_benchmark(copy, tmp_path, plain):
    items = rows(copy / "out/bench/amc23/items.jsonl")
    assert [(item["id"], item["answer"]) for item in items] == [("amc23/0", "4"), ("amc23/1", "12")]
    assert all(i["prompt"].startswith("what is A ?") and "boxed" in i["prompt"] for i in items)


def promise_of_own_data(copy, tmp_path, plain):
    sampled = rows(tmp_path / "out/rollouts.jsonl")
    assert {row["answer"] for row in sampled} == {"5", "B", "7.0", "6"}


def promise_of_subtraction(copy, tmp_path, plain):
    for row in rows(copy / "out/minus/data/train.jsonl"):
        digits = dict(re.findall(r"([A-D]) (\d)", row["bill"]))
        a, b = re.search(r"what is (.) - (.) \?", row["prompt"]).groups()
        if row["group"].startswith("clear"):
            assert int(row["answer"]) == int(digits[a]) - int(digits[b])


@pytest.mark.parametrize("patch", CHANGES, ids=lambda patch: patch.stem)
def test_a_change_applies_runs_and_does_what_it_says(mini, plain, tmp_path, patch):
    copy = changed(tmp_path, patch)
    amc = [{"id": i, "question": "what is A ?", "answer": a} for i, a in enumerate((4.0, 12.0))]
    write_rows(tmp_path / "amc.jsonl", amc)
    small = {
        "rl.py": f"--model {mini.model} --data {mini.train} --out {tmp_path}/out --steps 2"
        " --problems 4 --samples 4 --lengths 0 12 --pack-tokens 1024 --lr 1e-2 --warmup 1",
        "evaluation.benchmarks": f"--place {tmp_path}/amc.jsonl",
        "miniature.world": "--files train sft --train 16 --sft 4",
    }
    run(copy, patch, small)
    promise = globals()[f"promise_of_{patch.stem.replace('-', '_')}"]
    promise(copy, tmp_path, plain)


def test_every_change_is_described_and_every_description_has_its_change():
    text = (ROOT / "docs/change-it.md").read_text()
    assert {*re.findall(r"\(changes/([\w-]+)\.patch\)", text)} == {patch.stem for patch in CHANGES}
    assert "```diff" not in text  # a diff in the text is one that nobody applies
