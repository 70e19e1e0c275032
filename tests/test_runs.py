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

import coldstart
import eval  # noqa: A004
import rl

ROOT = Path(__file__).resolve().parents[1]
NOTE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$NOTES"
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; shift; done
case $out in *coldstart|*rl|*rl_text) [ "$out" = "${STOPS:-}" ] || mkdir -p "$out/model" ;; esac
"""


def run(tmp_path: Path, script: str, status: int = 0, **ours) -> tuple[str, list[str]]:
    """-> what it prints, and the programs that it has started."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/setup.sh").write_text(f"export PATH={tmp_path}:$PATH\n")
    for name in (script.split()[0], "gpu.sh"):
        shutil.copy(ROOT / "runs" / name, tmp_path / "runs")
    for name in ("torchrun", "python"):
        (tmp_path / name).write_text(NOTE)
        (tmp_path / name).chmod(0o755)
    for name in ("sft.jsonl", "rl.jsonl", "notes"):
        (tmp_path / name).touch()
    environment = os.environ | {"NOTES": f"{tmp_path}/notes", "OUT": f"{tmp_path}/out"}
    environment |= {"SFT": "sft.jsonl", "RL": "rl.jsonl"} | ours
    command = ["bash", *f"runs/{script}".split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    return done.stdout, (tmp_path / "notes").read_text().splitlines()


def settings(line: str) -> coldstart.Config | rl.Config:
    """What torchrun was given for a stage; Config refuses what does not go together."""
    stage, own = re.search(r" (coldstart|rl)\.py (.*)", line).groups()
    return tyro.cli({"coldstart": coldstart, "rl": rl}[stage].Config, args=own.split())


@pytest.mark.parametrize("script", ["small_gpu.sh", "one_gpu.sh", "ovr_7b.sh"])
@pytest.mark.parametrize("started, stopped", [(3, ""), (1, "coldstart"), (2, "rl")])
def test_stages_follow_one_another_and_a_stage_that_was_stopped_is_not_followed_by_the_next(
    tmp_path, script, started, stopped
):
    printed, lines = run(tmp_path, script, STOPS=str(tmp_path / "out" / stopped))
    starts = ("torchrun .* coldstart.py", "torchrun .* rl.py", "python -m tools.average --models")
    assert len(lines) == started and all(map(re.match, starts, lines))
    for line in lines[:2]:
        assert settings(line).out and "--max-restarts 3" in line and "--shutdown-timeout" in line
    assert f"{stopped} has stopped" in printed or not stopped
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in printed


def test_the_7b_run_can_end_with_the_cold_start_whose_pass_rates_choose_the_problems(tmp_path):
    printed, (line,) = run(tmp_path, "ovr_7b.sh", RL="")
    assert "coldstart.py" in line and "RL=problems.jsonl goes on" in printed


def test_the_7b_run_names_rows_that_are_not_there_before_it_starts(tmp_path):
    printed, lines = run(tmp_path, "ovr_7b.sh", status=2, RL="rll.jsonl")
    assert "rll.jsonl is not there" in printed and not lines


def test_rl_starts_from_a_released_cold_start_with_the_papers_numbers(tmp_path):
    cfg = settings(*run(tmp_path, "from_coldstart.sh")[1])
    assert (cfg.model, cfg.data) == ("Kangheng/OVR-7B-ColdStart", "rl.jsonl")
    assert (cfg.algorithm, cfg.problems, cfg.samples) == ("ppo", 512, 16)
    assert (cfg.lr, cfg.critic_lr, cfg.warmup, cfg.lengths) == (1e-6, 5e-6, 50, ((0, 24576),))


@pytest.mark.parametrize("stops", ["", "rl"])
def test_a_third_stage_on_text_alone_goes_on_from_the_second_unless_that_was_stopped(
    tmp_path, stops
):
    own = {"TEXT": "text.jsonl", "MODEL": "me/mine", "STEPS": "7", "LENGTHS": "0 4096 5 8192"}
    _, lines = run(tmp_path, "from_coldstart.sh", STOPS=f"{tmp_path}/out/{stops}", **own)
    second, *third = map(settings, lines)
    assert (second.model, second.data, second.steps) == ("me/mine", "rl.jsonl", 7)
    of_third = [(cfg.model, cfg.data, cfg.lengths) for cfg in third]
    wanted = (f"{second.out}/model", "text.jsonl", ((0, 4096), (5, 8192)))
    assert of_third == ([] if stops else [wanted])


def test_on_a_cpu_a_model_is_served_in_float32_by_a_name_with_the_tokens_of_its_card(tmp_path):
    """vLLM would take bfloat16, and the directory for the name."""
    for folder in ("model", "no_gpu", ".venv-vllm/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "model/README.md").write_text("    vllm serve model --max-model-len 4096\n")
    (tmp_path / ".venv-vllm/why.txt").touch()
    (tmp_path / ".venv-vllm/bin/python").symlink_to(tmp_path / "python")
    (tmp_path / "no_gpu/nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "no_gpu/nvidia-smi").chmod(0o755)
    path = f"{tmp_path}/no_gpu:{os.environ['PATH']}"
    _, (line,) = run(tmp_path, "serve.sh model 8001 --seed 1", PATH=path, NAME="")
    wanted = [f"--model {tmp_path}/model", "--served-model-name ovr", "--port 8001"]
    wanted += ["--generation-config vllm", "--max-model-len 4096", "--dtype float32"]
    assert not [words for words in wanted if f" {words} " not in line]
    assert line.endswith(" --seed 1")


def own_names() -> list[str]:
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return own[:1] + [socket.gethostname()]


@pytest.mark.parametrize("head", [*own_names(), "10.1.2.3"])
def test_of_several_nodes_the_first_alone_makes_the_average_by_name_or_address(tmp_path, head):
    _, (first, _, *average) = run(tmp_path, "ovr_7b.sh", NODES="2", HEAD=head)
    assert "--nnodes 2 " in first and f"--rdzv-endpoint {head}:29500" in first
    assert len(average) == (head != "10.1.2.3")


def test_the_script_scores_what_is_not_scored_yet_and_the_report_shows_it(mini, tmp_path):
    """Base: there. Cold start: its end, a checkpoint, and one that is its end once more."""
    for folder in ("base/model", "coldstart/model", "coldstart/checkpoints/step_000002/model"):
        shutil.copytree(mini.model, tmp_path / folder)
    other = tmp_path / "coldstart/checkpoints/step_000001/model"
    shutil.copytree(mini.model, other)
    weights = safetensors.numpy.load_file(other / "model.safetensors")
    halved = {name: weight / 2 for name, weight in weights.items()}
    safetensors.numpy.save_file(halved, other / "model.safetensors", {"format": "pt"})
    small = {"data": mini.text, "max_tokens": 8, "out": f"{tmp_path}/bench/base/end/mine"}
    eval.main(eval.Config(f"{tmp_path}/base/model", bench=("mine",), **small))
    command = ["bash", "runs/eval.sh", str(tmp_path), "--max-tokens", "8"]
    output = finished(command, ROOT, {"BENCHES": f"mine={mini.text}"}, 300)
    said = re.findall(r"^== (.* mine)$", output, flags=re.M)
    assert said == ["coldstart/end mine", "coldstart/step_000001 mine"]
    assert "step_000002 is the end of its stage" in output
    page = " ".join(re.sub("<[^>]*>", " ", (tmp_path / "report.html").read_text()).split())
    files = [tmp_path / f"bench/{stage}/end/mine/summary.json" for stage in ("base", "coldstart")]
    scores = [json.loads(file.read_text())["headline"]["accuracy"]["score"] for file in files]
    assert "mine, accuracy " + " ".join(f"{100 * score:.1f}" for score in scores) in page
