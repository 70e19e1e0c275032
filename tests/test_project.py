"""The promises that stand outside the code: imports point one way, the README tells the truth."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import readme
import tyro

import coldstart
import rl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FILES = {path.stem: path for path in ROOT.glob("*.py")}
# what each file may import of the project; `toy` makes the inputs that the stages default to
MAY_IMPORT = {
    "model": set(),
    "reward": set(),
    "behaviors": set(),
    "provenance": set(),
    "runlog": {"provenance"},
    "average": {"model"},
    "packing": set(),
    "logic": {"provenance", "runlog"},
    "sources": {"provenance", "runlog"},
    "alike": set(),
    "rules": {"alike", "reward"},
    "curate": {"alike", "rules", "provenance", "runlog"},
    "endpoint": set(),
    "distil": {"alike", "endpoint", "provenance", "reward", "rules", "runlog"},
    "score": {"data", "model", "parallel", "provenance", "reward", "rollout", "runlog"},
    "card": {"alike", "curate", "provenance", "report", "rules", "runlog"},
    "benchmarks": {"provenance", "runlog", "sources"},
    "extract": {"reward"},
    "metrics": set(),
    "plan": {"model", "parallel"},
    "gallery": {"alike", "behaviors", "report", "runlog"},
    "judge": {"behaviors", "endpoint", "extract", "provenance", "runlog"},
    "data": {"model", "packing"},
    "parallel": {"model", "data"},
    "checkpoints": {"model", "parallel", "provenance"},
    "rollout": {"model", "data", "runlog"},
    "toy": {"model", "data", "runlog"},
    "eval": {
        "behaviors",
        "benchmarks",
        "data",
        "endpoint",
        "extract",
        "gallery",
        "metrics",
        "model",
        "parallel",
        "provenance",
        "reward",
        "rollout",
        "runlog",
    },
    "tokens": set(),
    "report": {"behaviors", "metrics", "tokens", "toy"},
    "dealing": {"checkpoints", "data", "packing", "parallel", "rollout"},
    "telling": {"behaviors", "data", "parallel", "rollout"},
    "ledger": set(),
    "doctor": {"data", "model", "parallel", "plan", "reward", "rollout", "runlog"},
    "coldstart": {
        "checkpoints",
        "data",
        "model",
        "packing",
        "parallel",
        "plan",
        "provenance",
        "runlog",
        "toy",
    },
    "rl": {
        "checkpoints",
        "data",
        "dealing",
        "model",
        "parallel",
        "plan",
        "provenance",
        "reward",
        "rollout",
        "runlog",
        "telling",
        "toy",
    },
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_point_one_way(name):
    assert imported(FILES[name]) & set(FILES) <= MAY_IMPORT[name]


def test_the_model_imports_torch_safetensors_and_where_it_is_installed_flash_attn():
    assert imported(FILES["model"]) - set(sys.stdlib_module_names) <= {
        "torch",
        "safetensors",
        "flash_attn",
    }


@pytest.mark.parametrize("name", ["reward", "behaviors", "curate", "distil", "card", "sources"])
def test_what_reads_text_does_not_load_torch(name):
    code = f"import {name}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_opens_with_a_docstring_that_tells_its_story(name):
    story = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert story and 5 <= len(story.splitlines()) <= 40


def test_the_map_in_the_readme_names_every_file_with_its_number_of_lines():
    rows = dict(re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \|$", README, flags=re.M))
    truth = {name: str(len(path.read_text().splitlines())) for name, path in FILES.items()}
    assert rows == truth


def test_counts_links_to_functions_and_the_ledger_are_as_the_code_has_them():
    assert readme.refreshed(README) == README, "python tests/readme.py"
    for label, file, line in re.findall(r"\[`?(\w+)`?\]\(([\w/]+\.py)#L(\d+)\)", README):
        assert label in (ROOT / file).read_text().splitlines()[int(line) - 1]


def test_every_script_that_the_readme_runs_is_there():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
    scripts = set(re.findall(r"(?:runs/)?\w+\.(?:py|sh)", blocks))
    assert scripts and not [s for s in scripts if not (ROOT / s).exists()]


def test_every_option_that_the_readme_gives_exists():
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.S))
    for line in blocks.replace("\\\n", " ").splitlines():
        script = re.search(r"(\w+)\.py", line)
        for option in re.findall(r"--([a-z][\w-]*)", line.split("#")[0].split(".py")[-1]):
            text = FILES[script[1]].read_text()
            assert re.search(rf"^    {option.replace('-', '_')}: ", text, flags=re.M), (
                line,
                option,
            )


def settings_of(script: str, stage: str) -> list[str]:
    """What a script under runs/ gives to a stage, its variables as they stand."""
    text = (ROOT / "runs" / script).read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"torchrun .*? {stage}\.py (.*)", text)
    return shlex.split(line)


@pytest.mark.parametrize("script", ["one_gpu.sh", "ovr_7b.sh"])
@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_the_scripts_for_gpus_give_settings_that_exist_and_agree(script, stage):
    module = importlib.import_module(stage)
    tyro.cli(module.Config, args=settings_of(script, stage))  # __post_init__ checks relations


def test_the_full_run_has_the_numbers_of_the_paper():
    """OVR, sec. 4.1; what it leaves open is not looked at."""
    stage_1 = tyro.cli(coldstart.Config, args=settings_of("ovr_7b.sh", "coldstart"))
    assert (stage_1.epochs, stage_1.batch, stage_1.lr) == (5, 640, 2e-4)
    assert stage_1.pack_tokens == 64 * 1024 and not stage_1.replay
    stage_2 = tyro.cli(rl.Config, args=settings_of("ovr_7b.sh", "rl"))
    assert (stage_2.problems, stage_2.samples, stage_2.temperature) == (512, 16, 1)
    assert stage_2.lengths == (24 * 1024, 32 * 1024, 48 * 1024)
    assert stage_2.length_from == (0, 300, 700) and 900 <= stage_2.steps <= 1000
    assert (stage_2.lr, stage_2.critic_lr, stage_2.warmup) == (1e-6, 5e-6, 50)
    assert (stage_2.gamma, stage_2.lam, stage_2.epsilon, stage_2.critic_steps) == (1, 1, 0.2, 4)
    assert (stage_2.beta1, stage_2.beta2, stage_2.weight_decay) == (0.9, 0.95, 0)
    assert stage_2.algorithm == "ppo" and stage_2.sampler == "vllm"


def test_every_link_inside_the_project_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", README)
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize(
    "name", ["toy", "coldstart", "rl", "eval", "average", "report", "distil", "score"]
)
def test_help_explains_the_settings(name):
    command = [sys.executable, str(FILES[name]), "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--out" in result.stdout or "--run" in result.stdout
