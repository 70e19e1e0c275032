"""doctor.py: a sound set-up passes every check; a broken one fails in the one check that is for it,
and its cure names the culprit.

Each way to break a set-up is a function of a copy of the miniature and of pytest's monkeypatch.
"""

import json
import os
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
from test_vllm import HOME, ROOT, why_not

import model
from common import data
from common import distributed as parallel
from rollout import TorchSampler
from tools import doctor

ALONE = parallel.World(0, 1, torch.device("cpu"))
RL = "files rows template reward start pictures stop packing tied sampler sync gradient precision"


@pytest.fixture
def copy(mini, tmp_path) -> SimpleNamespace:
    """The miniature to be broken: its model directory, and its problems beside their pictures."""
    shutil.copytree(mini.model, tmp_path / "model")
    shutil.copytree(Path(mini.train).parent / "images", tmp_path / "images")
    rows = [json.loads(line) for line in Path(mini.train).read_text().splitlines()]
    return SimpleNamespace(model=tmp_path / "model", rows=rows, folder=tmp_path)


def examined(copy, world=ALONE, **changed) -> dict:
    path = write_rows(copy.folder / "rows.jsonl", copy.rows)
    return doctor.examine(doctor.Config(model=str(copy.model), data=path, **changed), world)


def of(results: dict, status: str) -> list[str]:
    return [name for name, (was, *_) in results.items() if was == status]


def edit(file: Path, **changed):
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def edit_weights(copy, change):
    file = copy.model / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_template(copy, old: str, new: str):
    file = copy.model / "tokenizer_config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def loaded(patch, where, name: str, change):
    """where.name() loads a model; now it changes it, too."""
    load = getattr(where, name)

    def changed(*asked, **options):
        policy = load(*asked, **options)
        change(policy)
        return policy

    patch.setattr(where, name, changed)


class Ways:
    """To break it; what one returns are settings to run with."""

    def markup_is_doubled(copy, patch):
        edit_template(copy, "<|im_start|> {{", "<|im_start|> <|im_start|> {{")

    def answer_is_not_opened(copy, patch):
        edit_template(copy, "<|im_start|> assistant ", "")

    def config_names_another_stop(copy, patch):
        edit(copy.model / "config.json", eos_token_id=12)

    def sampler_does_not_know_the_stop(copy, patch):
        edit(copy.model / "config.json", eos_token_id=0)
        edit(copy.model / "tokenizer_config.json", eos_token="<|endoftext|>")

    def weight_is_missing(copy, patch):
        edit_weights(copy, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))

    def weight_has_another_shape(copy, patch):
        edit_weights(copy, lambda w: w.update({"lm_head.weight": w["lm_head.weight"][:-1].clone()}))

    def head_contradicts_that_it_is_tied(copy, patch):
        edit(copy.model / "config.json", tie_word_embeddings=True)

    def head_is_the_embedding_but_not_tied(copy, patch):
        edit_weights(copy, lambda w: w["lm_head.weight"].copy_(w["model.embed_tokens.weight"]))

    def row_lacks_its_answer(copy, patch):
        copy.rows[2]["answer"] = ""

    def picture_is_too_large(copy, patch):
        Image.new("RGB", (280, 140)).save(copy.folder / copy.rows[4]["images"][0])  # 50 tokens
        return {"prompt_tokens": 40}

    def gold_cannot_be_graded(copy, patch):
        copy.rows[3]["answer"] = "\\frac{1}{"

    def gold_is_none_of_its_choices(copy, patch):
        copy.rows[5] |= {"answer": "E", "choices": ["1", "2", "3", "4"]}

    def sync_does_nothing(copy, patch):
        patch.setattr(TorchSampler, "sync", lambda self, weights: [*weights] and None)

    def sync_forgets_the_tower(copy, patch):
        whole = TorchSampler.sync
        kept = lambda weights: (w for w in weights if not w[0].startswith("visual."))  # noqa: E731
        patch.setattr(TorchSampler, "sync", lambda self, weights: whole(self, kept(weights)))

    def sampler_has_another_temperature(copy, patch):
        sample = TorchSampler.generate
        patch.setattr(TorchSampler, "generate", lambda *asked: sample(*asked[:4], temperature=0.7))

    def sampler_has_weights_a_little_off(copy, patch):
        loaded(patch, doctor, "load_model", lambda own: own.model.norm.weight.mul_(1.03))

    def stop_token_is_left_out(copy, patch):
        whole = data.encode_response
        patch.setattr(data, "encode_response", lambda words, t: whole(words, t)[:-1])

    def attention_leaks(copy, patch):
        attend = model.attend
        one = lambda q, k, v, lengths, causal: attend(q, k, v, [sum(lengths)], causal)  # noqa: E731
        patch.setattr(model, "attend", one)

    def prompts_are_shared_wrongly(copy, patch):
        lay_out = data.lay_out

        def slipped(documents, members, merge=2, shared=False):
            pack = lay_out(documents, members, merge, shared)
            if pack.expand is not None:
                pack.expand = pack.expand.roll(1)
            return pack

        patch.setattr(data, "lay_out", slipped)

    def layer_is_frozen(copy, patch):
        loaded(patch, parallel, "load", lambda policy: policy.model.layers[1].requires_grad_(False))

    def tower_is_not_frozen(copy, patch):
        loaded(patch, parallel, "load", lambda policy: policy.visual.merger.requires_grad_(True))

    def masters_are_bfloat16(copy, patch):
        loaded(patch, parallel, "load", lambda policy: policy.to(torch.bfloat16))
        return {"lr": 1e-6, "world": parallel.World(0, 1, torch.device("cpu"), torch.bfloat16)}


BROKEN = {  # the check that has to fail, and what its cure has to name
    "markup_is_doubled": ("template", "train-0 has <|im_start|> twice", "chat_template"),
    "answer_is_not_opened": ("template", "train-0 ends in ''", "chat_template"),
    "config_names_another_stop": (
        "files",
        "<|im_end|> is 2, in config.json 12",
    ),
    "sampler_does_not_know_the_stop": ("stop", "stops {0}", "eos_token"),
    "weight_is_missing": ("files", "missing model.layers.2.mlp.up_proj.weight"),
    "weight_has_another_shape": ("files", "lm_head.weight is [140, 128] in the files"),
    "head_contradicts_that_it_is_tied": ("files", "lm_head.weight differs", "config.json ties"),
    "head_is_the_embedding_but_not_tied": ("tied", "config.json", "tie_word_embeddings is False"),
    "row_lacks_its_answer": ("rows", "rows.jsonl, line 3: column 'answer' is empty"),
    "picture_is_too_large": ("pictures", "train-4 has 62 tokens: raise --prompt-tokens"),
    "gold_cannot_be_graded": ("reward", "train-3: '\\\\frac{1}{' cannot be graded", "rows.jsonl"),
    "gold_is_none_of_its_choices": ("reward", "train-5: 'E' is not one choice", "rows.jsonl"),
    "sync_does_nothing": ("sync", "--sampler torch: sync() leaves old weights"),
    "sync_forgets_the_tower": ("sync", "--sampler torch: sync() leaves old weights"),
    "sampler_has_another_temperature": ("sampler", "--sampler torch: its temperature"),
    "sampler_has_weights_a_little_off": ("sampler", "--sampler torch: its temperature"),
    "stop_token_is_left_out": ("stop", "train-0", "data.encode_response must add it"),
    "attention_leaks": ("packing", "train-", "attend()"),
    "prompts_are_shared_wrongly": ("packing", "train-", "attend()"),
    "layer_is_frozen": ("gradient", "model.layers.1.input_layernorm.weight has none"),
    "tower_is_not_frozen": ("gradient", "visual.merger.ln_q.weight has 0.", "requires_grad"),
    "masters_are_bfloat16": ("precision", "bfloat16: too coarse for --lr 1e-06: keep float32"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_what_is_broken_fails_one_check_whose_cure_names_the_culprit(way, copy, monkeypatch):
    results = examined(copy, **getattr(Ways, way)(copy, monkeypatch) or {})
    check, *named = BROKEN[way]
    assert of(results, "FAIL") == [check]
    assert not [words for words in named if words not in results[check][2]], results[check][2]


def test_a_sound_set_up_passes_every_check_and_leaves_the_files_as_they_were(copy, mini):
    assert of(examined(copy), "PASS") == RL.split()
    for file in Path(mini.model).iterdir():
        assert (copy.model / file.name).read_bytes() == file.read_bytes()


def test_a_tied_model_passes_and_says_that_head_and_embedding_are_one(copy):
    edit(copy.model / "config.json", tie_word_embeddings=True)
    edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    assert of(results := examined(copy), "PASS") == RL.split() and "one" in results["tied"][1]


def test_rows_with_responses_pass_the_cold_start_and_skip_what_needs_answers(mini):
    cfg = doctor.Config(model=mini.model, data=mini.sft, stage="coldstart")
    results = doctor.examine(cfg, ALONE)
    assert of(results, "SKIP") == ["reward", "memory", "sampler", "sync"]
    assert not of(results, "FAIL") and "this stage has none" in results["reward"][1]


def test_a_penalty_that_would_act_elsewhere_is_noted(copy):
    (copy.model / "generation_config.json").write_text('{"repetition_penalty": 1.05, "top_p": 1}')
    status, figure, _ = examined(copy)["files"]
    assert status == "PASS" and "repetition_penalty 1.05" in figure and "top_p" not in figure


@pytest.mark.parametrize("room, status", [(80, "PASS"), (5, "FAIL")])
def test_the_plan_is_held_against_the_memory_of_this_gpu(mini, monkeypatch, room, status):
    about = SimpleNamespace(total_memory=room * 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    case = doctor.Case(cfg=doctor.Config(), config=model.read_config(mini.model), rl=True)
    case.directory, case.longest = mini.model, 512
    figure, wrong, _ = doctor.memory(case)
    assert f"of {room}.0 GB" in figure and bool(wrong) == (status == "FAIL")


def command(python, copy, *settings: str) -> subprocess.CompletedProcess:
    rows = write_rows(copy.folder / "rows.jsonl", copy.rows)
    line = [str(python), str(ROOT / "doctor.py"), "--model", str(copy.model), "--data", rows]
    paths = os.pathsep.join([str(ROOT / "tests/vllm_cpu"), str(ROOT)])
    ours = os.environ | ({"PYTHONPATH": paths} if HOME in Path(python).parents else {})
    ours |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.run([*line, *settings], env=ours, capture_output=True, text=True, timeout=300)


def test_the_exit_status_tells_in_bfloat16_too(copy):
    sound = command(sys.executable, copy)
    assert sound.returncode == 0 and "13 PASS, 0 FAIL, 1 SKIP" in sound.stdout, sound.stderr
    Ways.gold_cannot_be_graded(copy, None)
    broken = command(sys.executable, copy, "--dtype", "bfloat16")
    assert broken.returncode == 1 and "12 PASS, 1 FAIL, 1 SKIP" in broken.stdout, broken.stderr


@pytest.mark.skipif(bool(why_not()), reason=f"no vllm-cpu: {why_not()}")
def test_a_real_engine_passes_every_check(copy):
    settings = "--sampler vllm --kv-cache-gb 0.05 --length 64".split()
    done = command(HOME / "bin/python", copy, *settings)
    assert done.returncode == 0 and "13 PASS, 0 FAIL, 1 SKIP" in done.stdout, done.stdout
