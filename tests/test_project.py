"""The promises that stand outside the code: README and docs tell the truth, scripts start."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

import coldstart
import rl
from common.client import Endpoint

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = {"coldstart": coldstart, "rl": rl}


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks, broken ones joined, comments and variables taken off."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]


def script_of(line: str) -> tuple[str, str]:
    """The module that a command runs, or the shell script; and what follows it."""
    options = r"(?: (?!-m )--?[\w-]+(?:[ =][^-\s]\S*)?)*?"  # of torchrun
    run = rf"(?:python|torchrun){options} (?:-m ([\w.]+)|(\S+)\.py)(.*)"
    if shell := re.search(r"bash (runs/\w+\.sh)(.*)", line):
        return shell[1], shell[2]
    if found := re.search(run, line):
        return (found[1] or found[2].replace("/", ".")), found[3]
    return "", ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_a_script_that_exists_with_flags_that_it_has(page):
    for line in commands(page):
        script, rest = script_of(line)
        if script.endswith(".sh"):
            assert (ROOT / script).is_file(), line
            text = (ROOT / script).read_text()
            known = "eval.py" in text  # whose flags may follow
            assert all(known or flag in text for flag in re.findall(r"--[\w-]+", rest)), line
        elif script and script not in ("pytest", "http.server"):
            file = ROOT / f"{script.replace('.', '/')}.py"
            assert file.is_file(), line
            known = set(re.findall(r"^    (\w+): ", file.read_text(), flags=re.M))
            known |= set(re.findall(r'"--([\w-]+)"', file.read_text()))
            if "Config(Endpoint)" in file.read_text():
                known |= {f.name for f in fields(Endpoint)}
            if script == "tools.doctor":  # takes the flags of the stage that it is asked about
                known |= {f.name for stage in STAGES.values() for f in fields(stage.Config)}
            for flag in re.findall(r"\s--([a-z][\w-]*)", rest.split("|")[0]):
                assert flag.replace("-", "_") in known or flag in known, (line, flag)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def settings_of(script: str, stage: str) -> list[str]:
    """What a script under runs/ gives to a stage, its variables as they stand."""
    text = (ROOT / "runs" / script).read_text().replace("\\\n", " ")
    numbers = dict(re.findall(r"(\w+)=\$\{\w+:-(\d+)\}", text))
    (line,) = re.findall(rf"torchrun .*? {stage}\.py (.*)", text)
    return shlex.split(re.sub(r"\$(\w+)", lambda m: numbers.get(m[1], m[0]), line))


def config_of(script: str, stage: str):
    return tyro.cli(STAGES[stage].Config, args=settings_of(script, stage))


@pytest.mark.parametrize("script", ["small_gpu.sh", "one_gpu.sh", "ovr_7b.sh"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_scripts_for_gpus_give_settings_that_exist_and_agree(script, stage):
    config_of(script, stage)  # __post_init__ checks relations


def test_the_full_run_has_the_numbers_of_the_paper():
    """OVR, sec. 4.1; what it leaves open is not looked at."""
    one, two = config_of("ovr_7b.sh", "coldstart"), config_of("ovr_7b.sh", "rl")
    assert (one.epochs, one.batch_packs, one.batch_rows, one.lr) == (5, 640, 0, 2e-4)
    assert one.pack_tokens == one.max_tokens == 64 * 1024 and not one.replay
    assert (two.problems, two.samples, two.policy_steps, two.critic_steps) == (512, 16, 1, 4)
    assert two.lengths == ((0, 24 * 1024), (300, 32 * 1024), (700, 48 * 1024))
    assert 900 <= two.steps <= 1000 and two.algorithm == "ppo" and two.sampler == "vllm"
    assert (two.lr, two.critic_lr, two.warmup) == (1e-6, 5e-6, 50)
    assert (rl.GAMMA, two.lam, two.epsilon) == (1, 1, 0.2)
    assert (rl.BETAS, rl.WEIGHT_DECAY) == ((0.9, 0.95), 0)


IN_HELP_ALONE = set(  # how a run is kept, watched and named
    "columns out compile valid valid_every save_every save_minutes keep_every eval_data eval_every "
    "wandb tensorboard seed lora_alpha".split()
)


def shown(value) -> str:
    """A setting as docs/recipe.md writes it."""
    if isinstance(value, tuple):
        parts = [str(x) for pair in value for x in (pair if isinstance(pair, tuple) else (pair,))]
        return " ".join(parts) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_has_every_setting_with_the_values_of_the_laptop_and_of_the_7b_run(stage):
    text = (ROOT / "docs/recipe.md").read_text().split(f"## {stage}.py")[1].split("\n## ")[0]
    rows = {}
    for line in re.findall(r"^\| `.*\|$", text, flags=re.M):
        name, _, _, at_7b, laptop, *_ = [cell.strip().strip("`") for cell in line.split("|")[1:]]
        rows[name] = (at_7b, laptop)
    default, full = STAGES[stage].Config(), config_of("ovr_7b.sh", stage)
    names = [f.name for f in fields(default)]
    assert [*rows] == [name for name in names if name not in IN_HELP_ALONE]
    for name in rows:
        values = shown(getattr(full, name)), shown(getattr(default, name))
        assert rows[name] == values, f"{name} is {rows[name]} in docs/recipe.md, {values} in truth"


@pytest.mark.parametrize(
    "module",
    "coldstart rl eval reward tools.average tools.plan tools.doctor tools.trace tools.ask "
    "miniature.world miniature.base miniature.report curation.curate evaluation.judge".split(),
)
def test_help_explains_the_settings_of_every_script(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert not left.value.code and "--" in capsys.readouterr().out


def test_the_matcher_and_the_lexicon_load_without_torch():
    code = "import reward, evaluation.behaviors, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_module_can_be_imported_and_cores_are_counted_on_macos():
    """Which has no sched_getaffinity."""
    folders = ("", "common/", "curation/", "evaluation/", "miniature/", "tools/")
    files = [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    code = f"import os; del os.sched_getaffinity; import {', '.join(modules)}"
    code += "; from common import distributed; distributed.start()"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # start() counts
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and len(modules) > 30, ran.stderr[-2000:]


def test_a_user_error_is_one_line_that_names_the_culprit_and_the_cure(tmp_path):
    for arguments, message in (
        (["--problems", "2"], "--problems 2"),
        (["--model", str(tmp_path), "--data", "nowhere.jsonl"], "config.json"),
    ):
        command = [sys.executable, "rl.py", "--out", str(tmp_path / "out"), *arguments]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode != 0 and "Traceback" not in ran.stderr, ran.stderr[-2000:]
        assert message in ran.stderr and len(ran.stderr.splitlines()) < 10
