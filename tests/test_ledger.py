"""The ledger says what the stages are given: against tyro, and the scripts as bash runs them."""

import ast
import importlib
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

from tools import ledger

ROOT = Path(__file__).parent.parent


def rows_of(stage: str, root: Path = ROOT) -> dict[str, tuple[str, ...]]:
    """{setting: (what it is, paper, 7B, laptop, source)} of a stage's table."""
    block = ledger.generate(root).split(ledger.STAGES[stage][0])[1].split("\n\n")[1]
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()[2:])
    return {name.strip("`"): tuple(cells) for name, *cells in rows}


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_every_setting_is_a_row_or_one_of_execution(stage):
    names = {f.name for f in fields(importlib.import_module(stage).Config)}
    (line,) = re.findall(rf"^Only how .*{stage}\.py.*: (.*)\.$", ledger.generate(), flags=re.M)
    rows, others = set(rows_of(stage)), set(re.findall("`(.+?)`", line))
    assert rows | others == names and not rows & others and "lr" in rows and "out" in others


def test_the_known_numbers_stand_in_the_columns_of_the_paper_and_of_7b():
    first = dict(lr="2e-4", batch="640", epochs="5")
    second = dict(lr="1e-6", problems="512", samples="16", lengths="24k, 32k, 48k", warmup="50")
    for stage, told in ("coldstart", first), ("rl", second):
        for name, value in told.items():
            _, paper, full, laptop, source = rows_of(stage)[name]
            assert paper == full == value != laptop and source.startswith("OVR sec. 4.1")
    assert "sft_replay" in rows_of("coldstart")["replay"][3]  # a flag of runs/laptop.sh


def test_a_changed_default_comment_or_flag_shows_and_a_new_setting_must_be_placed(tmp_path):
    def edit(name: str, pattern: str, new: str):
        text = re.sub(pattern, new, (tmp_path / name).read_text(), flags=re.M)
        (tmp_path / name).write_text(text)

    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    for stage in ledger.STAGES:
        shutil.copy(ROOT / f"{stage}.py", tmp_path)
    edit("coldstart.py", "^    batch: .*", "    batch: int = 48  # rows; paper: 7; ours: x")
    edit("runs/ovr_7b.sh", "--batch 640", "--batch 641")
    row = rows_of("coldstart", tmp_path)["batch"]
    assert row == ("rows", "7", "641", "48", "OVR sec. 4.1; ours: x")
    edit("runs/ovr_7b.sh", "--batch 641", "--batches 641")
    with pytest.raises(ValueError, match=r"ovr_7b\.sh gives --batches"):
        ledger.generate(tmp_path)
    edit("coldstart.py", "^    batch: ", "    momentum: float = 0.5  # new\n    batch: ")
    with pytest.raises(ValueError, match=r"coldstart\.py, momentum: name it in RECIPE or in EXEC"):
        ledger.generate(tmp_path)


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
@pytest.mark.parametrize("script", ["ovr_7b.sh", "laptop.sh"])
def test_the_values_are_those_that_tyro_makes_of_what_bash_gives(stage, script, tmp_path):
    stubs = "source() { :; }; python() { :; }; torchrun() { printf '%s\\0' \"$@\" END; }; . "
    command = ["bash", "-c", f"{stubs}'{ROOT}/runs/{script}'"]
    env = {"PATH": "/usr/bin:/bin", "SFT": "$SFT", "RL": "$RL"}  # as the ledger names them
    told = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    (call,) = (call for call in told.split("END\0") if f"\0{stage}.py\0" in call)
    args = call.split(f"\0{stage}.py\0")[1].split("\0")[:-1]
    values = ledger.values_of(ROOT, stage, script)
    given = [word for name, words in values.items() for word in (f"--{name}", *words)]
    stage, words_for_bools = importlib.import_module(stage), (tyro.conf.FlagConversionOff,)
    said = tyro.cli(stage.Config, args=given, config=words_for_bools)
    assert said == tyro.cli(stage.Config, args=args)


def test_a_comment_is_meaning_paper_source_and_reason():
    read = ledger.read_comment
    assert read("x; paper: 2 (sec. 3.3); laptop: few") == ("x", "2", "OVR sec. 3.3; laptop: few")
    assert read('x; "paper": 0.2. No effect') == ("x", "0.2", "OVR sec. 4.1; No effect")
    assert read("x; ORZ code") == ("x", "not said", "ORZ code")


def test_each_deviation_has_its_reason_and_names_a_function_that_exists():
    for row in ledger.DEVIATIONS:
        file, name = row[-1].split(":")
        found = ast.parse((ROOT / file).read_text())
        for part in name.split("."):
            (found,) = [n for n in found.body if getattr(n, "name", None) == part]
        assert len(row) == 6 and all(row) and row[0] in ("OVR", "ORZ")


def test_it_is_written_between_its_markers_and_nowhere_else(tmp_path):
    file, frame = tmp_path / "README.md", f"a\n{ledger.BEGIN}\n%s{ledger.END}\nb\n"
    file.write_text(frame % "old\n")
    ledger.main(ledger.Config(str(file)))
    assert file.read_text() == frame % ledger.generate()
    file.write_text("a\nb\n")
    with pytest.raises(ValueError, match="put them there, a line each"):
        ledger.main(ledger.Config(str(file)))


def test_the_readme_has_the_ledger_of_today():
    _, *block = (ROOT / "README.md").read_text().split(f"{ledger.BEGIN}\n")
    if not block:
        pytest.skip("README.md has no place for the ledger yet: the two markers are missing")
    assert block[0].split(ledger.END)[0] == ledger.generate()
