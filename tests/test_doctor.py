"""doctor.py: a sound set-up passes every check; a broken one ends in the check that is for it, and
the culprit is named. (test_planted.py has leaking packs and masters in bfloat16, test_lora.py
adapters.)
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import write_rows

import coldstart
import rl
from common import checkpoint, distributed
from tools import doctor

ALONE = distributed.World(0, 1, torch.device("cpu"))
OPEN, ANSWER = "<|im_start|> {{", "<|im_start|> assistant "  # in the miniature's chat template
CHECKS = ["pictures", "golds", "template", "packing", "gradient", "update", "disk"]


def edit_template(folder: Path, old: str, new: str):
    file = folder / "model/tokenizer_config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def loaded(patch, part: str, learns: bool):
    """A part of the policy learns, or not, against its settings."""
    load = distributed.load

    def changed(*arguments):
        model = load(*arguments)
        model.get_submodule(part).requires_grad_(learns)
        return model

    patch.setattr(distributed, "load", changed)


SMALL = Mock(return_value=SimpleNamespace(free=9))
FULL = Mock(side_effect=OSError(28, "No space left on device"))
# fmt: off
BROKEN = [  # what is done to rows, folder or code; the check that ends the doctor; what it says
    (lambda r, f, p: r[3].update(answer="\\frac{1}{"), "golds", r"line 4: .* cannot be graded"),
    (lambda r, f, p: r[5].update(answer="E", choices=[*"1234"]), "golds", "line 6: 'E' is not one"),
    (lambda r, f, p: edit_template(f, OPEN, f"<|im_start|> {OPEN}"), "template", "<.im_start"),
    (lambda r, f, p: edit_template(f, ANSWER, ""), "template", "rows.jsonl, line .* reads"),
    (lambda r, f, p: loaded(p, "model.norm", False), "gradient", "model.norm.weight is 0"),
    (lambda r, f, p: loaded(p, "visual", True), "gradient", "visual.patch_embed.proj.weight is"),
    (lambda r, f, p: p.setattr(doctor.shutil, "disk_usage", SMALL), "disk", "a run needs 0.0"),
    (lambda r, f, p: p.setattr(checkpoint, "publish", FULL), "disk", "No space left on device"),
]
# fmt: on


@pytest.mark.parametrize("change, check, words", BROKEN)
def test_what_is_broken_ends_in_the_check_that_is_for_it(
    change, check, words, mini, tmp_path, monkeypatch, capsys
):
    shutil.copytree(mini.model, tmp_path / "model")
    shutil.copytree(Path(mini.train).parent / "images", tmp_path / "images")
    rows = [json.loads(line) for line in Path(mini.train).read_text().splitlines()]
    change(rows, tmp_path, monkeypatch)
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    cfg = rl.Config(model, write_rows(tmp_path / "rows.jsonl", rows), out=out)
    with pytest.raises((ValueError, OSError), match=words):
        doctor.examine(cfg, ALONE)
    passed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert passed == CHECKS[: CHECKS.index(check)] and not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("stage, data", [(rl, "train"), (coldstart, "sft")])
def test_a_sound_set_up_passes_every_check_and_nothing_stays_of_it(
    stage, data, mini, tmp_path, capsys
):
    before = [file.read_bytes() for file in sorted(Path(mini.model).iterdir())]
    cfg = stage.Config(model=mini.model, data=getattr(mini, data), out=str(tmp_path / "out"))
    doctor.examine(cfg, ALONE)
    passed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert passed == [["PASS", check] for check in CHECKS if stage is rl or check != "golds"]
    assert not list(tmp_path.glob("out/*"))
    assert [file.read_bytes() for file in sorted(Path(mini.model).iterdir())] == before
