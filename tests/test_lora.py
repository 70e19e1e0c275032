"""lora.py: adapters start as nothing, learn alone, and are merged wherever somebody looks.

That two ranks which shard the frozen decoder give the run of one is a case of test_distributed.py.
"""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import test_distributed as several
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import Qwen2_5_VLForConditionalGeneration as Official

import coldstart
import rl
from common import checkpoint, distributed, lora
from model import load_model
from rollout import Sampler
from tools import doctor

half = several.half  # a fixture
ALONE = distributed.World(0, 1, torch.device("cpu"))
OF_LORA = dict(lora_rank=4, lora_alpha=8.0)
LORA = distributed.Trained(**OF_LORA, seed=3)


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    rl.main(several.rl_config(asdict(mini), run, **several.RUNS["lora"]))
    return run


def test_the_first_step_starts_from_the_base_model_bit_for_bit(mini):
    base, model = load_model(mini.model), distributed.load(mini.model, ALONE, "lm", LORA)
    pack = several.picture_and_text(asdict(mini))[0]
    with torch.no_grad():
        assert torch.equal(model.logits(pack), base.logits(pack))


def test_every_linear_layer_of_the_decoder_has_an_adapter_drawn_from_the_seed(mini):
    one, same = (distributed.load(mini.model, ALONE, "lm", LORA) for _ in range(2))
    other = distributed.load(mini.model, ALONE, "value", replace(LORA, seed=4))
    modules = load_model(mini.model).model.layers.named_modules()
    linear_layers = {name for name, m in modules if isinstance(m, torch.nn.Linear)}
    assert {*lora.adapters(one.model.layers)} == linear_layers
    for name, layer in lora.adapters(one).items():
        a = layer.lora_A.weight
        assert torch.equal(a, same.get_submodule(name).lora_A.weight)
        assert not torch.equal(a, other.get_submodule(name).lora_A.weight)
        assert 0.5 < a.std() * (3 * layer.in_features) ** 0.5 < 1.5  # of U(-x, x): x / sqrt 3


def test_merged_weights_compute_what_base_and_adapter_do(mini):
    base, merged = load_model(mini.model), load_model(mini.model)
    adapted = distributed.load(mini.model, ALONE, "lm", LORA)
    torch.manual_seed(1)
    for layer in lora.adapters(adapted).values():  # as if they had learnt: B is no longer 0
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    merged.load_state_dict(dict(lora.merged(adapted)))
    changed = [n for n, w in merged.named_parameters() if not torch.equal(w, base.get_parameter(n))]
    assert changed == [f"{name}.weight" for name in lora.adapters(adapted)]
    for pack in several.picture_and_text(asdict(mini)):
        ours, theirs, before = (m.logits(pack).detach() for m in (adapted, merged, base))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert (ours - before).abs().max() > 0.1


@pytest.mark.parametrize("head", ["lm", "value"])
def test_adapters_and_a_value_head_learn_alone_above_a_base_in_bfloat16(mini, half, head):
    torch.manual_seed(0)
    model = distributed.load(mini.model, half, head, LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    pack = several.picture_and_text(asdict(mini))[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):  # the gradient of A is 0 as long as B is
        optimizer.zero_grad()
        outputs = model.logps(pack)[0] if head == "lm" else model.values(pack)
        distributed.backward(model, outputs.sum(), half, last=True)
        distributed.clip_gradients(model, 1.0)
        optimizer.step()
    for name, weight in model.named_parameters():
        learns = ".lora_" in name or name == "value_head.weight"
        assert (weight.grad is not None) == (weight in optimizer.state) == learns, name
        assert weight.dtype == (torch.float32 if learns else torch.bfloat16), name
        now, then = (getattr(w, "_local_tensor", w) for w in (weight, before[name]))
        assert torch.equal(now, then) != learns, name
    given = distributed.whole_weights(model, half.dtype)
    assert {weight.dtype for _, weight in given} == {torch.bfloat16}


def test_a_run_that_was_cut_off_goes_on_bit_for_bit_from_its_adapters(
    mini, whole, tmp_path, monkeypatch
):
    cfg = several.rl_config(asdict(mini), tmp_path, **several.RUNS["lora"], save_every=1)
    generate = Sampler.generate

    def killed(*given, **more):
        if checkpoint.complete_steps(tmp_path):
            raise RuntimeError("killed")
        return generate(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Sampler, "generate", killed)
        rl.main(cfg)
    _, state = checkpoint.newest(tmp_path)
    stored = FileSystemReader(state).read_metadata().state_dict_metadata
    tensors = [key for key, kind in stored.items() if isinstance(kind, TensorStorageMetadata)]
    assert tensors and all(".lora_" in x or "value_head" in x for x in tensors)
    torch.manual_seed(12345)
    rl.main(cfg)
    assert several.rows_of(tmp_path) == several.rows_of(whole)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert not any(gap.any() for gap in several.gaps_of(tmp_path, whole, file))


def test_a_cold_start_with_adapters_learns_and_goes_on_only_with_its_base_and_scale(mini, tmp_path):
    run, other = tmp_path / "run", str(shutil.copytree(mini.model, tmp_path / "other"))
    how = OF_LORA | dict(save_every=1, lr=1e-2, epochs=2)
    coldstart.main(several.coldstart_config(asdict(mini), run, **how))
    losses = [row["valid_loss"] for row in several.rows_of(run)]
    assert losses[-1] < losses[0] - 1.0
    shutil.rmtree(run / "model")  # as if it had not come to its end
    for changed in ({"model": other}, {"lora_alpha": 16.0}, {"lora_rank": 0}):
        cfg = replace(several.coldstart_config(asdict(mini), run, **how), **changed)
        with pytest.raises(FileExistsError, match=f"cannot go on: {[*changed][0]}"):
            coldstart.main(cfg)


def test_the_doctor_passes_a_sound_set_up_with_adapters_and_finds_a_decoder_that_is_not_frozen(
    mini, tmp_path, monkeypatch
):
    cfg = rl.Config(mini.model, mini.train, out=str(tmp_path), **OF_LORA)
    doctor.examine(cfg, ALONE)
    add_adapters = lora.add_adapters

    def forgets(model, *rest):
        add_adapters(model, *rest)
        model.model.norm.requires_grad_(True)

    monkeypatch.setattr(lora, "add_adapters", forgets)
    with pytest.raises(ValueError, match="gradient of model.norm.weight"):
        doctor.examine(cfg, ALONE)


def test_the_adapters_alone_are_peft_files_that_add_up_to_the_exported_model(whole, mini):
    """In transformers' model, whose modules the keys name."""
    folder = whole / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    theirs = Official.from_pretrained(mini.model)
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and re.fullmatch(settings["target_modules"], name):
            a, b = (weights.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
            assert len(a) == settings["r"] == 4
            module.weight.data += settings["lora_alpha"] / settings["r"] * b @ a
    assert not weights  # each has found its place
    merged = Official.from_pretrained(whole / "model").state_dict()
    torch.testing.assert_close(theirs.state_dict(), merged, atol=1e-6, rtol=1e-6)


def test_peft_opens_the_adapters(whole, mini):
    peft, ids = pytest.importorskip("peft"), torch.tensor([[5, 6, 7, 8, 9]])
    theirs = Official.from_pretrained(mini.model)
    with torch.no_grad():
        base = theirs(input_ids=ids).logits
        ours = peft.PeftModel.from_pretrained(theirs, whole / "adapter")(input_ids=ids).logits
        merged = Official.from_pretrained(whole / "model")(input_ids=ids).logits
    torch.testing.assert_close(ours, merged, atol=1e-4, rtol=1e-4)
    assert (ours - base).abs().max() > 1e-3
