"""lora.py: adapters start as nothing, learn alone, and are merged wherever somebody looks.

It starts itself under torchrun once: two ranks that shard the frozen decoder give the runs of one.
"""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import finished
from safetensors.torch import load_file
from test_distributed import (
    NAMES,
    OF_PPO,
    assert_same_run,
    coldstart_config,
    half,  # noqa: F401 (a fixture)
    learn,
    picture_and_text,
    rl_config,
    rows_of,
)
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.functional import linear
from transformers import Qwen2_5_VLForConditionalGeneration as Official

import coldstart
import rl
from common import checkpoint, distributed, lora
from model import Qwen25VL, chunked_logps, load_model
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]
ALONE = distributed.World(0, 1, torch.device("cpu"))
LORA = distributed.Trained(lora_rank=4, lora_alpha=8.0, seed=3)
OF_LORA = dict(lora_rank=4, lora_alpha=8.0)
RUNS = {  # of both stages, by one process and by two
    "coldstart": (coldstart, coldstart_config, dict(lr=5e-3, recompute="full")),
    "rl": (rl, rl_config, dict(lr=1e-3, critic_lr=1e-3, offload=True, recompute="selective")),
}


def stage(name: str, mini, out, **changed):
    """Runs one of RUNS. mini: as a dict."""
    module, config, settings = RUNS[name]
    module.main(config(mini, out, **settings | OF_LORA | changed))


@pytest.fixture
def adapted(mini) -> Qwen25VL:
    """A policy whose adapters have learnt something: B is no longer 0."""
    model = distributed.load(mini.model, ALONE, "lm", LORA)
    generator = torch.Generator().manual_seed(1)
    for layer in lora.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def alone(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        stage(name, asdict(mini), folder / name)
    return folder


def test_the_first_step_starts_from_the_base_model_bit_for_bit(mini):
    base, model = load_model(mini.model), distributed.load(mini.model, ALONE, "lm", LORA)
    pack = picture_and_text(asdict(mini))[0]
    with torch.no_grad():
        assert torch.equal(model.logits(pack), base.logits(pack))
    theirs, given = dict(base.named_parameters()), dict(distributed.whole_weights(model))
    assert [*given] == [*theirs]  # what the sampler gets has no adapters
    assert all(torch.equal(given[name], theirs[name]) for name in theirs)


def test_every_linear_layer_of_the_decoder_has_an_adapter_drawn_from_the_seed(mini):
    one, same = (distributed.load(mini.model, ALONE, "lm", LORA) for _ in range(2))
    other = distributed.load(mini.model, ALONE, "value", distributed.Trained(False, 4, 8.0, 4))
    linear_layers = {
        n
        for n, m in load_model(mini.model).model.layers.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert {*lora.adapters(one.model.layers)} == linear_layers
    for name, layer in lora.adapters(one).items():
        a = layer.lora_A.weight
        assert torch.equal(a, same.get_submodule(name).lora_A.weight)
        assert not torch.equal(a, other.get_submodule(name).lora_A.weight)
        assert 0.5 < a.std() * (3 * layer.in_features) ** 0.5 < 1.5  # of U(-x, x): x / sqrt 3
        assert not layer.lora_B.weight.any()


def test_merged_weights_compute_what_base_and_adapter_do(mini, adapted):
    merged = load_model(mini.model)
    changed = [n for n, w in lora.merged(adapted) if not torch.equal(w, merged.get_parameter(n))]
    assert changed == [f"{name}.weight" for name in lora.adapters(adapted)]
    merged.load_state_dict(dict(lora.merged(adapted)))
    for pack in picture_and_text(asdict(mini)):
        with torch.no_grad():
            ours, theirs, base = (m.logits(pack) for m in (adapted, merged, load_model(mini.model)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours - base).abs().max() > 0.1


@pytest.mark.parametrize("head", ["lm", "value"])
def test_adapters_and_a_value_head_learn_alone_above_a_base_in_bfloat16(mini, half, head):  # noqa: F811
    torch.manual_seed(0)
    model = distributed.load(mini.model, half, head, LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    pack = picture_and_text(asdict(mini))[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):  # the gradient of A is 0 as long as B is
        optimizer.zero_grad()
        if head == "lm":
            learn(model, pack)
        else:
            distributed.backward(model, model.values(pack).sum(), half, last=True)
        distributed.clip_gradients(model, 1.0)
        optimizer.step()
    for name, weight in model.named_parameters():
        learns = ".lora_" in name or name == "value_head.weight"
        assert (weight.grad is not None) == (weight in optimizer.state) == learns, name
        assert weight.dtype == (torch.float32 if learns else torch.bfloat16), name
        assert (
            torch.equal(*(getattr(w, "_local_tensor", w) for w in (weight, before[name]))) != learns
        )
    given = dict(distributed.whole_weights(model, half.dtype))
    assert {weight.dtype for weight in given.values()} == {torch.bfloat16}


def test_a_frozen_head_gives_the_same_gradient_to_what_is_below_it():
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8)
    targets, slopes, grads = torch.randint(11, (7,)), torch.randn(7), []
    for trains in (True, False):
        hidden.grad, weight.grad = None, None
        logps, _ = chunked_logps(hidden, weight.requires_grad_(trains), targets, chunk=3)
        (logps * slopes).sum().backward()
        grads.append(hidden.grad)
        assert (weight.grad is not None) == trains
    assert torch.equal(*grads)
    naive = linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad((naive * slopes).sum(), hidden)
    torch.testing.assert_close(grads[0], expected)


# ------------------------------------------------------------------ runs


def test_the_loss_falls_and_the_exported_model_has_learnt(mini, tmp_path):
    stage("coldstart", asdict(mini), tmp_path, epochs=2, lr=1e-2)
    losses = [row["valid_loss"] for row in rows_of(tmp_path)]
    assert losses[-1] < losses[0] - 1.0
    again = tmp_path / "again"
    shown = dict(model=str(tmp_path / "model"), lr=1e-9, lr_end=1e-9)
    stage("coldstart", asdict(mini) | {"model": shown.pop("model")}, again, epochs=0.1, **shown)
    assert rows_of(again)[0]["valid_loss"] == pytest.approx(losses[-1], abs=1e-4)


@pytest.fixture(scope="module")
def two(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "mini.json").write_text(json.dumps(asdict(mini)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished([sys.executable, *command, str(folder)], folder, ours, 600)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_run_of_one(two, alone, name):
    names, lr = (OF_PPO, 1e-3) if name == "rl" else (NAMES[name], 5e-3)
    assert_same_run(two / name, alone / name, names, lr)
    one, other = (load_file(f / name / "adapter/adapter_model.safetensors") for f in (two, alone))
    assert one.keys() == other.keys()
    assert all((one[n] - other[n]).abs().mean() < 1e-3 * lr for n in one)
    last = checkpoint.step_directory(two / name, checkpoint.complete_steps(two / name)[-1])
    one, other = (load_file(f / "model/model.safetensors") for f in (last, two / name))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_off_goes_on_bit_for_bit_from_its_adapters(
    mini, alone, tmp_path, monkeypatch, name
):
    run, update = tmp_path / name, distributed.clip_gradients

    def killed(*arguments):
        if checkpoint.complete_steps(run):
            raise RuntimeError("killed")
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "clip_gradients", killed)
        with pytest.raises(RuntimeError, match="killed"):
            stage(name, asdict(mini), run, save_every=1)
    _, state = checkpoint.newest(run)
    stored = FileSystemReader(state).read_metadata().state_dict_metadata
    tensors = [key for key, kind in stored.items() if isinstance(kind, TensorStorageMetadata)]
    assert len(tensors) > 100 and all(".lora_" in x or "value_head" in x for x in tensors)
    torch.manual_seed(12345)
    stage(name, asdict(mini), run, save_every=1)
    assert rows_of(run) == rows_of(alone / name)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = load_file(run / file), load_file(alone / name / file)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_adapters_go_on_only_with_the_base_and_the_scale_that_they_were_trained_with(
    mini, tmp_path
):
    run = tmp_path / "run"
    stage("coldstart", asdict(mini), run, save_every=1)
    shutil.rmtree(run / "model")
    shutil.copytree(mini.model, tmp_path / "other")
    for changed, named in (
        ({"model": str(tmp_path / "other")}, "--model .*other"),
        ({"lora_alpha": 16.0}, "--lora-alpha 8.0 -> 16.0"),
        ({"lora_rank": 0}, "--lora-rank 4 -> 0"),
    ):
        with pytest.raises(FileExistsError, match=f"cannot go on: {named}"):
            stage("coldstart", asdict(mini), run, **changed)


def test_the_doctor_passes_a_sound_set_up_with_adapters_and_finds_a_decoder_that_is_not_frozen(
    mini, tmp_path, monkeypatch
):
    cfg = rl.Config(mini.model, mini.train, out=str(tmp_path), **OF_LORA)
    doctor.examine(cfg, ALONE)
    freeze = distributed.freeze

    def forgets(model, *rest):
        freeze(model, *rest)
        model.model.norm.requires_grad_(True)

    monkeypatch.setattr(distributed, "freeze", forgets)
    with pytest.raises(ValueError, match="gradient of model.norm.weight"):
        doctor.examine(cfg, ALONE)


# ------------------------------------------------------------------ peft's files


def test_the_adapters_alone_are_peft_files_that_add_up_to_the_exported_model(alone, mini):
    """In transformers' model, whose modules the keys name."""
    folder = alone / "rl/adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    theirs = Official.from_pretrained(mini.model)
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(settings["target_modules"], name):
            a, b = (weights.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
            assert len(a) == settings["r"] == 4
            module.weight.data += settings["lora_alpha"] / settings["r"] * b @ a
    assert not weights  # each has found its place
    merged = dict(Official.from_pretrained(alone / "rl/model").named_parameters())
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=1e-6)


def test_peft_opens_the_adapters(alone, mini):
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        theirs = Official.from_pretrained(mini.model)
        base = theirs(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(theirs, alone / "rl/adapter")
        merged = Official.from_pretrained(alone / "rl/model")(input_ids=ids).logits
        ours = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours, merged, atol=1e-4, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-3


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    mini = json.loads((folder / "mini.json").read_text())
    finish, distributed.finish = distributed.finish, lambda world: None  # both runs use the group
    for name in RUNS:
        stage(name, mini, folder / name, save_every=1)
    finish(distributed.start())
