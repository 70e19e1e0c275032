"""The promises that stand outside the code: README and docs tell the truth, scripts start."""

import importlib
import inspect
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

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = {"coldstart": coldstart, "rl": rl}
OPTIONS = r"(?: (?!-m )--?[\w-]+(?:[ =][^-\s]\S*)?)*?"  # of torchrun
SCRIPT = r"-m ([\w.]+)|(\S+)\.py"


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks, broken ones joined, comments taken off; and in its text."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`((?:python|torchrun|bash) [^`]+)`", page.read_text())
    return [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]


def flags_of(module: str) -> set[str]:
    """Of a script: the fields of its Config, or what its main() takes."""
    if module == "tools.doctor":  # takes the flags of the stage that it is asked about
        return flags_of("coldstart") | flags_of("rl")
    script = importlib.import_module(module)
    taken = fields(script.Config) if hasattr(script, "Config") else []
    names = [field.name for field in taken] or inspect.signature(script.main).parameters
    return {name.replace("_", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs_a_script_that_exists_with_flags_that_it_has(page):
    for line in commands(page):
        if shell := re.search(r"bash (runs/\w+\.sh)([^|]*)", line):
            text = (ROOT / shell[1]).read_text()
            if "eval.py" not in text:  # whose flags may follow
                assert all(flag in text for flag in re.findall(r"--[\w-]+", shell[2])), line
        elif run := re.search(rf"(?:python|torchrun){OPTIONS} (?:{SCRIPT})([^|]*)", line):
            module = run[1] or run[2].replace("/", ".")
            if module not in ("pytest", "http.server"):
                unknown = {*re.findall(r"\s--([a-z][\w-]*)", run[3])} - flags_of(module)
                assert not unknown, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_project_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def full(stage: str):
    """The settings that runs/ovr_7b.sh gives to a stage."""
    text = (ROOT / "runs/ovr_7b.sh").read_text().replace("\\\n", " ")
    numbers = dict(re.findall(r"(\w+)=\$\{\w+:-(\d+)\}", text))
    (line,) = re.findall(rf"torchrun .*? {stage}\.py (.*)", text)
    line = re.sub(r"\$(\w+)", lambda m: numbers.get(m[1], m[0]), line)
    return tyro.cli(STAGES[stage].Config, args=shlex.split(line))


def test_the_full_run_has_the_numbers_of_the_paper():
    """OVR, sec. 4.1; what it leaves open is not looked at."""
    one, two = full("coldstart"), full("rl")
    assert (one.epochs, one.batch_packs, one.batch_rows, one.lr) == (5, 640, 0, 2e-4)
    assert one.pack_tokens == one.max_tokens == 64 * 1024
    assert (two.problems, two.samples, two.policy_steps, two.critic_steps) == (512, 16, 1, 4)
    assert two.lengths == ((0, 24 * 1024), (300, 32 * 1024), (700, 48 * 1024))
    assert 900 <= two.steps <= 1000 and two.algorithm == "ppo" and two.sampler == "vllm"
    assert (two.lr, two.critic_lr, two.warmup) == (1e-6, 5e-6, 50)
    assert (rl.GAMMA, two.lam, two.epsilon) == (1, 1, 0.2)
    assert (rl.BETAS, rl.WEIGHT_DECAY) == ((0.9, 0.95), 0)


IN_HELP_ALONE = (  # how a run is kept, watched and named
    "columns out compile valid valid_every save_every save_minutes keep_every eval_data eval_every "
    "wandb tensorboard seed lora_alpha"
).split()


def shown(value) -> str:
    """A setting as docs/recipe.md writes it."""
    if isinstance(value, tuple):
        return " ".join(re.findall(r"[\w.]+", str(value))) or "none"
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
    default, at_7b = vars(STAGES[stage].Config()), vars(full(stage))
    wanted = {name: (shown(at_7b[name]), shown(default[name])) for name in default}
    assert rows == {name: pair for name, pair in wanted.items() if name not in IN_HELP_ALONE}


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
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_module_can_be_imported_and_cores_are_counted_on_macos():
    """Which has no sched_getaffinity."""
    folders = ("", "common.", "curation.", "evaluation.", "miniature.", "tools.")
    files = [(name, file) for name in folders for file in (ROOT / name[:-1]).glob("*.py")]
    modules = ", ".join(f"{name}{file.stem}" for name, file in files)
    code = f"import os; del os.sched_getaffinity; import {modules}"
    code += "; from common import distributed; distributed.start()"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # start() counts
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize(
    "arguments, culprit",
    [("--problems 2", "--problems 2"), ("--model . --data nowhere.jsonl", "config.json")],
)
def test_a_user_error_is_one_line_that_names_the_culprit_and_the_cure(tmp_path, arguments, culprit):
    command = [sys.executable, "rl.py", "--out", f"{tmp_path}/out", *arguments.split()]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode and "Traceback" not in ran.stderr and len(ran.stderr.splitlines()) < 10
    assert culprit in ran.stderr
