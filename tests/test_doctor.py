"""doctor.py: a sound set-up passes every check; a broken one ends in the check that is for it, and
the culprit is named. (test_planted.py has masters in bfloat16, test_lora.py adapters.)
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows

import coldstart
import rl
from common import checkpoint, distributed, packs
from common.distributed import World
from tools import doctor

ALONE = World(0, 1, torch.device("cpu"))
OPEN, ANSWER = "<|im_start|> {{", "<|im_start|> assistant "  # in the miniature's chat template
CHECKS = ["template", "golds", "packing", "update", "disk"]


@pytest.fixture
def copy(mini, tmp_path) -> SimpleNamespace:
    """The miniature, to be broken: its model directory, and its problems beside their pictures."""
    shutil.copytree(mini.model, tmp_path / "model")
    shutil.copytree(Path(mini.train).parent / "images", tmp_path / "images")
    rows = [json.loads(line) for line in Path(mini.train).read_text().splitlines()]
    return SimpleNamespace(model=tmp_path / "model", rows=rows, folder=tmp_path)


def edit_template(copy, old: str, new: str):
    file = copy.model / "tokenizer_config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def after(patch, where, name: str, change):
    """What where.name() returns is changed."""
    call = getattr(where, name)

    def changed(*arguments, **options):
        change(result := call(*arguments, **options))
        return result

    patch.setattr(where, name, changed)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


# fmt: off
BROKEN = [  # what is done to the copy or by monkeypatch; what ends the doctor, and what it says
    (lambda c, p: edit_template(c, OPEN, f"<|im_start|> {OPEN}"),
     "template", "rows.jsonl, line 1 has <|im_start|> twice in a row.*chat_template"),
    (lambda c, p: edit_template(c, ANSWER, ""), "template", "rows.jsonl, line 1 ends in ''"),
    (lambda c, p: c.rows[3].update(answer="\\frac{1}{"),
     "golds", r"rows.jsonl, line 4: '\\\\frac\{1\}\{' cannot be graded"),
    (lambda c, p: c.rows[5].update(answer="E", choices=["1", "2", "3", "4"]),
     "golds", "line 6: 'E' is not one choice"),
    (lambda c, p: after(
        p, packs, "make_pack", lambda pack: setattr(pack, "lengths", [sum(pack.lengths)])),
     "packing", r"rows.jsonl, line .*attend\(\)"),
    (lambda c, p: after(p, distributed, "load", lambda m: m.model.norm.requires_grad_(False)),
     "update", "model.norm.weight is 0 .*requires_grad"),
    (lambda c, p: after(p, distributed, "load", lambda m: m.visual.requires_grad_(True)),
     "update", "visual.patch_embed.proj.weight is 0.0"),
    (lambda c, p: {"lr": 1e-12}, "update", "masters move at --lr 1e-12.*too coarse"),
    (lambda c, p: p.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=9)),
     "disk", "GB left.*a run needs 0.0"),
    (lambda c, p: p.setattr(checkpoint, "publish", full_disk), "disk", "No space left on device"),
]
# fmt: on


@pytest.mark.parametrize("change, check, words", BROKEN)
def test_what_is_broken_ends_in_the_check_that_is_for_it(
    change, check, words, copy, monkeypatch, capsys
):
    settings = change(copy, monkeypatch)
    rows, out = write_rows(copy.folder / "rows.jsonl", copy.rows), str(copy.folder / "out")
    settings = settings if isinstance(settings, dict) else {}
    with pytest.raises((ValueError, OSError), match=words):
        doctor.examine(rl.Config(str(copy.model), rows, out=out, **settings), ALONE)
    passed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert passed == CHECKS[: CHECKS.index(check)] and not list(copy.folder.glob("out/*"))


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
