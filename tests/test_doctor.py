"""doctor.py: a sound set-up passes every check; a broken one fails in the check that is for it, and
the culprit is named. (test_planted.py has more: a stale sampler, masters in bfloat16.)
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import write_rows
from PIL import Image
from safetensors.torch import load_file, save_file

import coldstart
import rl
from common import checkpoint, distributed, packs
from common.distributed import World
from rollout import TorchSampler
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]
ALONE = World(0, 1, torch.device("cpu"))
OPEN, ANSWER = "<|im_start|> {{", "<|im_start|> assistant "  # in the miniature's chat template


@pytest.fixture
def copy(mini, tmp_path) -> SimpleNamespace:
    """The miniature, to be broken: its model directory, and its problems beside their pictures."""
    shutil.copytree(mini.model, tmp_path / "model")
    shutil.copytree(Path(mini.train).parent / "images", tmp_path / "images")
    rows = [json.loads(line) for line in Path(mini.train).read_text().splitlines()]
    return SimpleNamespace(model=tmp_path / "model", rows=rows, folder=tmp_path)


def examined(copy, **changed) -> dict:
    rows, out = write_rows(copy.folder / "rows.jsonl", copy.rows), str(copy.folder / "out")
    return doctor.examine(rl.Config(str(copy.model), rows, out=out, **changed), ALONE)


def edit(copy, name: str, **changed):
    file = copy.model / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def edit_template(copy, old: str, new: str):
    file = copy.model / "tokenizer_config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def edit_weights(copy, change):
    file = copy.model / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def after(patch, where, name: str, change):
    """What where.name() returns is changed."""
    call = getattr(where, name)

    def changed(*arguments, **options):
        change(result := call(*arguments, **options))
        return result

    patch.setattr(where, name, changed)


def cut_picture(copy):
    file = copy.folder / copy.rows[4]["images"][0]
    Image.effect_noise((280, 140), 50).save(file)
    file.write_bytes(file.read_bytes()[:20000])  # its header and first lines are whole


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def sync_without_the_tower(patch):
    sync = TorchSampler.sync
    keep = lambda weights: (pair for pair in weights if pair[0].startswith("model"))  # noqa: E731
    patch.setattr(TorchSampler, "sync", lambda self, weights: sync(self, keep(weights)))


# fmt: off
BROKEN = [  # what is done to the copy or by monkeypatch; what fails, and what it says
    (lambda c, p: edit(c, "config.json", eos_token_id=12),
     "model", "<|im_end|> is 2, in config.json {12}"),
    (lambda c, p: edit_weights(c, lambda w: w.pop("model.norm.weight")),
     "model", "missing model.norm.weight"),
    (lambda c, p: c.rows[2].update(answer=""),
     "rows", "rows.jsonl, line 3: column 'answer' is empty"),
    (lambda c, p: c.rows[0].update(decoded_image=c.rows[0].pop("images")),
     "rows", "line 1: column 'decoded_image' is not read"),
    (lambda c, p: cut_picture(c),
     "rows", "rows.jsonl, line 5: ", "damaged picture"),
    (lambda c, p: {"prompt_tokens": 8},
     "rows", "0 of 12 have at most 8 tokens"),
    (lambda c, p: edit_template(c, OPEN, f"<|im_start|> {OPEN}"),
     "template", "train-0 has <|im_start|> twice in a row", "chat_template"),
    (lambda c, p: edit_template(c, ANSWER, ""),
     "template", "train-0 ends in ''"),
    (lambda c, p: c.rows[3].update(answer="\\frac{1}{"),
     "reward", "train-3: '\\\\frac{1}{' cannot be graded", "rows.jsonl"),
    (lambda c, p: c.rows[5].update(answer="E", choices=["1", "2", "3", "4"]),
     "reward", "train-5: 'E' is not one choice"),
    (lambda c, p: edit(c, "config.json", tie_word_embeddings=True),
     "start", "lm_head.weight"),
    (lambda c, p: after(
        p, packs, "make_pack", lambda pack: setattr(pack, "lengths", [sum(pack.lengths)])),
     "packing", "train-", "attend()"),
    (lambda c, p: sync_without_the_tower(p),
     "sampler", "sync() leaves some"),
    (lambda c, p: after(p, distributed, "load", lambda m: m.model.norm.requires_grad_(False)),
     "update", "model.norm.weight is 0", "requires_grad"),
    (lambda c, p: after(p, distributed, "load", lambda m: m.visual.requires_grad_(True)),
     "update", "visual.patch_embed.proj.weight is 0.0"),
    (lambda c, p: {"lr": 1e-12},
     "update", "masters move at --lr 1e-12: too coarse"),
    (lambda c, p: p.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=9)),
     "disk", "GB left: a run needs 0.0", "three checkpoints"),
    (lambda c, p: p.setattr(checkpoint, "publish", full_disk),
     "disk", "No space left on device"),
]
# fmt: on


@pytest.mark.parametrize("change, check, words", [(f, name, words) for f, name, *words in BROKEN])
def test_what_is_broken_fails_in_the_check_that_is_for_it(change, check, words, copy, monkeypatch):
    settings = change(copy, monkeypatch)
    results = examined(copy, **settings if isinstance(settings, dict) else {})
    status, said = results.pop(check)
    assert status == "FAIL" and all(part in said for part in words), said
    assert {status for status, _ in results.values()} == {"PASS"}  # and nothing after it ran
    assert not list(copy.folder.glob("out/*"))


def test_a_sound_set_up_passes_every_check_and_its_files_stay_as_they_were(copy, mini, capsys):
    copy.rows[0]["level"] = 3
    results = examined(copy)
    assert [*results] == [check.__name__ for check in doctor.CHECKS]
    assert {status for status, _ in results.values()} == {"PASS"}
    assert "12 with 6 pictures" in results["rows"][1] and "level" in capsys.readouterr().out
    assert not list(copy.folder.glob("out/*"))
    for file in Path(mini.model).iterdir():
        assert (copy.model / file.name).read_bytes() == file.read_bytes()


def test_rows_with_responses_pass_the_cold_start_which_has_no_rewards_and_no_sampler(
    mini, tmp_path
):
    cfg = coldstart.Config(model=mini.model, data=mini.sft, out=str(tmp_path))
    results = doctor.examine(cfg, ALONE)
    assert not {"reward", "sampler"} & results.keys() and "disk" in results
    assert {status for status, _ in results.values()} == {"PASS"}


def test_a_failed_check_makes_the_exit_status_1(copy):
    copy.rows[3]["answer"] = "\\frac{1}{"
    rows = write_rows(copy.folder / "rows.jsonl", copy.rows)
    command = [sys.executable, "-m", "tools.doctor", "rl", "--model", str(copy.model)]
    done = subprocess.run([*command, "--data", rows], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "FAIL  reward" in done.stdout, done.stderr
