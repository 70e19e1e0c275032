"""The scripts for GPUs, with the programs that they start replaced by ones that note how; and the
one that scores a run's models, as it is."""

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import safetensors.numpy
import tyro
from conftest import finished

import eval  # noqa: A004
import rl

ROOT = Path(__file__).resolve().parents[1]
NOTE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$NOTES"
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
case $out in *coldstart|*rl|*rl_text) [ "$out" = "${STOPS:-}" ] || mkdir -p "$out/model" ;; esac
"""


def run(tmp_path: Path, script: str, **ours) -> tuple[str, list[str]]:
    """-> what it prints, and the programs that it has started."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/setup.sh").write_text(f"export PATH={tmp_path}:$PATH\n")
    (tmp_path / "runs" / script).write_text((ROOT / "runs" / script).read_text())
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text(NOTE)
        (tmp_path / name).chmod(0o755)
    notes = {"NOTES": str(tmp_path / "notes"), "OUT": str(tmp_path / "out")}
    environment = os.environ | notes | {"SFT": "sft.jsonl", "RL": "rl.jsonl"} | ours
    command = ["bash", str(tmp_path / "runs" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout, (tmp_path / "notes").read_text().splitlines()


def addresses() -> list[str]:
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return own[:1] + [socket.gethostname()]


@pytest.mark.parametrize("script", ["small_gpu.sh", "one_gpu.sh", "ovr_7b.sh"])
def test_torchrun_waits_for_a_checkpoint_and_starts_again_by_itself(tmp_path, script):
    printed, (stage_1, stage_2, average) = run(tmp_path, script)
    for line, stage in (stage_1, "coldstart.py"), (stage_2, "rl.py"):
        assert line.startswith("torchrun") and f" {stage} " in line
        assert "--max-restarts 3" in line and "--shutdown-timeout" in line
    assert average.startswith("python -m tools.average --models")
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in printed


@pytest.mark.parametrize("script", ["small_gpu.sh", "one_gpu.sh", "ovr_7b.sh"])
@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_a_stage_that_was_stopped_is_not_followed_by_the_next(tmp_path, script, stage):
    printed, started = run(tmp_path, script, STOPS=str(tmp_path / "out" / stage))
    assert len(started) == 1 + (stage == "rl") and f"{stage} has stopped" in printed


def rl_settings(line: str) -> rl.Config:
    """What torchrun was given for rl.py; Config refuses what does not go together."""
    assert "--max-restarts 3" in line and "--shutdown-timeout" in line
    return tyro.cli(rl.Config, args=line.split(" rl.py ")[1].split())


def test_rl_starts_from_a_released_cold_start_with_the_papers_numbers(tmp_path):
    _, (line,) = run(tmp_path, "from_coldstart.sh")
    cfg = rl_settings(line)
    assert (cfg.model, cfg.data) == ("Kangheng/OVR-7B-ColdStart", "rl.jsonl")
    assert (cfg.algorithm, cfg.problems, cfg.samples) == ("ppo", 512, 16)
    assert (cfg.lr, cfg.critic_lr, cfg.warmup, cfg.lengths) == (1e-6, 5e-6, 50, ((0, 24576),))


def test_a_third_stage_on_text_alone_goes_on_from_the_second(tmp_path):
    own = {"TEXT": "text.jsonl", "MODEL": "me/mine", "STEPS": "7", "LENGTHS": "0 4096 5 8192"}
    _, lines = run(tmp_path, "from_coldstart.sh", **own)
    second, third = map(rl_settings, lines)
    assert (second.model, second.data, second.steps) == ("me/mine", "rl.jsonl", 7)
    assert (third.model, third.data) == (f"{second.out}/model", "text.jsonl")
    assert second.out != third.out and second.lengths == third.lengths == ((0, 4096), (5, 8192))


def test_a_second_stage_that_was_stopped_is_not_followed_by_the_third(tmp_path):
    own = {"TEXT": "text.jsonl", "STOPS": str(tmp_path / "out/rl")}
    printed, lines = run(tmp_path, "from_coldstart.sh", **own)
    assert len(lines) == 1 and "rl has stopped" in printed


@pytest.mark.parametrize("head", addresses())
def test_of_several_nodes_the_first_makes_the_average_by_name_or_address(tmp_path, head):
    _, started = run(tmp_path, "ovr_7b.sh", NODES="2", HEAD=head)
    assert started[-1].startswith("python -m tools.average")
    assert f"--rdzv-endpoint {head}:29500" in started[0]


def test_no_other_node_makes_it(tmp_path):
    _, started = run(tmp_path, "ovr_7b.sh", NODES="2", HEAD="10.1.2.3")
    assert len(started) == 2


def test_the_script_scores_what_is_not_scored_yet_and_the_report_shows_it(mini, tmp_path):
    """Base: there. Cold start: its end, a checkpoint, and one that is its end once more."""
    for folder in ("base/model", "coldstart/model", "coldstart/checkpoints/step_000002/model"):
        shutil.copytree(mini.model, tmp_path / folder)
    other = tmp_path / "coldstart/checkpoints/step_000001/model"
    shutil.copytree(mini.model, other)
    weights = safetensors.numpy.load_file(other / "model.safetensors")
    halved = {name: weight / 2 for name, weight in weights.items()}
    safetensors.numpy.save_file(halved, other / "model.safetensors", {"format": "pt"})
    there = tmp_path / "bench/base/end/mine"
    small = {"data": mini.text, "max_tokens": 8}
    eval.main(eval.Config(f"{tmp_path}/base/model", bench=("mine",), out=str(there), **small))
    before = {path: path.stat().st_mtime_ns for path in there.iterdir()}
    command = ["bash", "runs/eval.sh", str(tmp_path), "--max-tokens", "8"]
    output = finished(command, ROOT, {"BENCHES": f"mine={mini.text}"}, 200)
    said = re.findall(r"^== (.* mine)$", output, flags=re.M)
    assert said == ["coldstart/end mine", "coldstart/step_000001 mine"]
    assert "step_000002 is the end of its stage" in output
    assert {path: path.stat().st_mtime_ns for path in there.iterdir()} == before
    page = " ".join(re.sub("<[^>]*>", " ", (tmp_path / "report.html").read_text()).split())
    files = [tmp_path / f"bench/{stage}/end/mine/summary.json" for stage in ("base", "coldstart")]
    scores = [json.loads(file.read_text())["headline"]["accuracy"]["score"] for file in files]
    assert "mine, accuracy " + " ".join(f"{100 * score:.1f}" for score in scores) in page
