"""doctor.py: a sound set-up passes every check; of a broken one the check that is for it is the
first to fail, and names the culprit. (test_planted.py has more: a stale sampler, attention that
leaks, masters in bfloat16.)
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
import rollout
from common import data, distributed, packs
from rollout import TorchSampler
from tools import doctor, plan

ROOT = Path(__file__).resolve().parents[1]
ALONE = distributed.World(0, 1, torch.device("cpu"))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OPEN, ANSWER = "<|im_start|> {{", "<|im_start|> assistant "  # in the miniature's chat template


@pytest.fixture
def copy(mini, tmp_path) -> SimpleNamespace:
    """The miniature, to be broken: its model directory, and its problems beside their pictures."""
    shutil.copytree(mini.model, tmp_path / "model")
    shutil.copytree(Path(mini.train).parent / "images", tmp_path / "images")
    rows = [json.loads(line) for line in Path(mini.train).read_text().splitlines()]
    return SimpleNamespace(model=tmp_path / "model", rows=rows, folder=tmp_path)


def examined(copy, **changed) -> dict:
    rows = write_rows(copy.folder / "rows.jsonl", copy.rows)
    return doctor.examine(rl.Config(model=str(copy.model), data=rows, **changed), ALONE)


def names(results: dict, status: str) -> list[str]:
    return [name for name, (was, _) in results.items() if was == status]


# ------------------------------------------------------------------ broken


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


def rename_pictures(copy):
    for row in copy.rows:
        row["decoded_image"] = row.pop("images")


def cut_picture(copy):
    file = copy.folder / copy.rows[4]["images"][0]
    Image.effect_noise((280, 140), 50).save(file)
    file.write_bytes(file.read_bytes()[:20000])  # its header and first lines are whole


def leak(pack):
    pack.lengths = [sum(pack.lengths)]


def freeze_norm(model):
    model.model.norm.requires_grad_(False)


def sync_without_the_tower(patch):
    sync, seen = TorchSampler.sync, "model"
    some = lambda weights: (pair for pair in weights if pair[0].startswith(seen))  # noqa: E731
    patch.setattr(TorchSampler, "sync", lambda self, weights: sync(self, some(weights)))


# fmt: off
BROKEN = [  # what is done to the copy or by monkeypatch; what fails first, and what it says
    (lambda c, p: edit(c, "config.json", eos_token_id=12),
     "files", "<|im_end|> is 2, in config.json 12"),
    (lambda c, p: edit_weights(c, lambda w: w.pop("model.norm.weight")),
     "files", "missing model.norm.weight"),
    (lambda c, p: c.rows[2].update(answer=""),
     "rows", "rows.jsonl, line 3: column 'answer' is empty"),
    (lambda c, p: rename_pictures(c),
     "rows", "line 1: column 'decoded_image' is not read"),
    (lambda c, p: edit_template(c, OPEN, f"<|im_start|> {OPEN}"),
     "template", "train-0 has <|im_start|> twice in a row", "chat_template"),
    (lambda c, p: edit_template(c, ANSWER, ""),
     "template", "train-0 ends in ''"),
    (lambda c, p: c.rows[3].update(answer="\\frac{1}{"),
     "reward", "train-3: '\\\\frac{1}{' cannot be graded", "rows.jsonl"),
    (lambda c, p: c.rows[5].update(answer="E", choices=["1", "2", "3", "4"]),
     "reward", "train-5: 'E' is not one choice"),
    (lambda c, p: edit(c, "config.json", tie_word_embeddings=True),
     "start", HEAD),
    (lambda c, p: cut_picture(c),
     "pictures", "rows.jsonl, line 5: ", "damaged picture"),
    (lambda c, p: {"prompt_tokens": 8},
     "pictures", "0 of 12 prompts have at most 8 tokens"),
    (lambda c, p: p.setattr(data, "encode_response", lambda words, tokenizer: [9]),
     "stop", "trained {9}", "encode_response"),
    (lambda c, p: after(p, doctor, "open_sampler", lambda sampler: sampler.stops.clear()),
     "stop", "stops set()", "eos_token"),
    (lambda c, p: after(p, packs, "make_pack", leak),
     "packing", "train-", "attend()"),
    (lambda c, p: edit_weights(c, lambda w: w.update({HEAD: w[EMBEDDING].clone()})),
     "tied", "config.json", "tie_word_embeddings is False"),
    (lambda c, p: after(p, rollout, "load_model", lambda m: m.model.norm.weight.data.mul_(1.03)),
     "sampler", "weights, dtype or positions"),
    (lambda c, p: sync_without_the_tower(p),
     "sync", "sync() leaves old weights"),
    (lambda c, p: after(p, distributed, "load", freeze_norm),
     "gradient", "model.norm.weight has 0", "requires_grad"),
    (lambda c, p: after(p, distributed, "load", lambda model: model.visual.requires_grad_(True)),
     "gradient", "visual.patch_embed.proj.weight has 0.0"),
    (lambda c, p: {"lr": 1e-12},
     "precision", "masters move at --lr 1e-12: too coarse"),
]
# fmt: on


@pytest.mark.parametrize("change, check, words", [(f, name, words) for f, name, *words in BROKEN])
def test_what_is_broken_fails_in_the_check_that_is_for_it(change, check, words, copy, monkeypatch):
    settings = change(copy, monkeypatch)
    results = examined(copy, **settings if isinstance(settings, dict) else {})
    assert names(results, "FAIL")[:1] == [check], results
    assert all(part in results[check][1] for part in words), results[check][1]


@pytest.mark.parametrize("room, status", [(80, "PASS"), (24, "FAIL")])
def test_the_plan_is_held_against_the_memory_of_this_gpu(mini, monkeypatch, room, status):
    properties = SimpleNamespace(total_memory=room * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(plan, "peak_gb", lambda cfg: 40.0 * (cfg.stage == "rl") * cfg.gpus)
    monkeypatch.setattr(plan, "advice", lambda cfg: f"not on {cfg.gpus} x {cfg.gpu}")
    monkeypatch.setattr(doctor, "CHECKS", (doctor.memory,))
    results = doctor.examine(rl.Config(model=mini.model, data=mini.train), ALONE)
    assert results["memory"][0] == status
    assert f"40.0 of {room}.0 GB" in results["memory"][1]


# ------------------------------------------------------------------ sound


def test_a_sound_set_up_passes_every_check_and_its_files_stay_as_they_were(copy, mini, capsys):
    results = examined(copy)
    assert names(results, "SKIP") == ["memory"] and not names(results, "FAIL")
    assert "12; pictures in 6 of 12" in results["rows"][1] and "grid" in capsys.readouterr().out
    for file in Path(mini.model).iterdir():
        assert (copy.model / file.name).read_bytes() == file.read_bytes()


def test_a_tied_model_passes_and_says_that_head_and_embedding_are_one(copy):
    edit(copy, "config.json", tie_word_embeddings=True)
    edit_weights(copy, lambda weights: weights.pop(HEAD))
    results = examined(copy)
    assert not names(results, "FAIL") and "one" in results["tied"][1]


def test_rows_with_responses_pass_the_cold_start_which_has_no_rewards_and_no_sampler(mini):
    results = doctor.examine(coldstart.Config(model=mini.model, data=mini.sft), ALONE)
    assert names(results, "SKIP") == ["reward", "memory", "sampler", "sync"]
    assert not names(results, "FAIL")


def test_a_failed_check_makes_the_exit_status_1(copy):
    copy.rows[3]["answer"] = "\\frac{1}{"
    rows = write_rows(copy.folder / "rows.jsonl", copy.rows)
    command = [sys.executable, "-m", "tools.doctor", "rl", "--model", str(copy.model)]
    done = subprocess.run([*command, "--data", rows], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "FAIL  reward" in done.stdout, done.stderr
    assert done.stdout.count("PASS  ") == 12
