"""plan.py: what it counts is what real models hold, keep and run; what cannot fit is refused.

The referee for memory is a dispatch mode that follows every storage an operator makes and asks
which are still alive: it sees what autograd and checkpointing keep without asking either.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run by itself
import model
import rl
from common import distributed as parallel
from miniature import world as toy
from model import KVCache, Qwen25VL, VisionTower, config_json, read_config, train_flops
from tools import plan

HUB = Path(__file__).resolve().parents[2] / "shared" / "qwen2_5_vl"
TOY = toy.model_config(512)
TOWER = replace(TOY.vision, out_hidden_size=256)
SMALL = replace(TOY, hidden_size=256, num_attention_heads=8, vision=TOWER, intermediate_size=1024)
KNOWN = plan.ASSUMED


class Alive(TorchDispatchMode):
    """Bytes of all storages made under it that somebody still holds, now and at most."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        out = operator(*arguments, **(options or {}))
        given = {x.untyped_storage()._cdata for x in tensors((arguments, options))}
        for storage in (x.untyped_storage() for x in tensors(out)):
            if storage._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        self.made = {key: held for key, held in self.made.items() if not held[0].expired()}
        return sum(size for _, size in self.made.values())


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(autouse=True)
def no_logits_are_small(monkeypatch):
    """As with a vocabulary of 152k, where even a short pack's logits are computed again."""
    monkeypatch.setattr(model, "KEPT_LOGITS", 0)


def built(config, dtype=torch.float32, kind: str = "none", head: str = "lm") -> Qwen25VL:
    """Trained but for the tower, with gradients already there, so that they do not count."""
    torch.manual_seed(0)
    model = Qwen25VL(config, head).to(dtype)
    model.visual.requires_grad_(False)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    parallel.recompute_blocks(model, kind)
    return model


def packed(config, tokens: int) -> dict:
    ids = torch.arange(tokens) % config.vocab_size
    lengths = [tokens - tokens // 3, tokens // 3]
    return dict(ids=ids, positions=torch.arange(tokens).expand(3, -1), lengths=lengths)


def forward(model: Qwen25VL, tokens: int) -> torch.Tensor:
    pack = packed(model.config, tokens)
    logps, _ = model(**pack, rows=torch.arange(tokens), targets=pack["ids"])
    return -logps.sum()


def kept_and_peak(config, tokens: int, kind: str, dtype) -> tuple[int, int]:
    """Bytes alive after a forward, and the most during its backward."""
    model = built(config, dtype, kind)
    with Alive() as alive:
        loss = forward(model, tokens)
        kept, alive.most = alive.now(), 0
        loss.backward()
    return kept, alive.most


@pytest.mark.parametrize("size, published", [("3b", 3.75e9), ("7b", 8.29e9)])
def test_parameters_of_the_hubs_models_are_the_published_ones(size, published):
    s = plan.sizes(plan.MODELS[size])
    assert s.tower + plan.trained(s) == pytest.approx(published, rel=0.002)
    c = plan.MODELS[size]  # and, written out: q, k, v with bias, o, the MLP, two norms
    wide, keys = c.hidden_size, c.num_key_value_heads * c.head_dim
    layer = (wide + 1) * (wide + 2 * keys) + wide**2 + 3 * wide * c.intermediate_size + 2 * wide
    assert s.layer == layer and s.layers == layer * c.num_hidden_layers
    assert s.rest == c.vocab_size * wide * (2 - c.tie_word_embeddings) + wide


@pytest.mark.skipif(not HUB.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository")
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_table_of_models_is_the_hubs_files(size, tmp_path):
    (tmp_path / "config.json").write_text((HUB / f"config-{size}.json").read_text())
    assert read_config(tmp_path) == plan.MODELS[size]


@pytest.mark.parametrize("head", ["lm", "value"])
def test_parameters_and_state_are_those_of_a_real_model_after_a_step_of_adam(head):
    model, s = built(TOY, head=head), plan.sizes(TOY, head)
    assert sum(p.numel() for p in model.parameters()) == s.tower + plan.trained(s)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    held = sum(x.nbytes for p in trained for x in (p, p.grad)) + sum(x.nbytes for x in moments)
    assert held == plan.STATE * plan.trained(s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", parallel.RECOMPUTE)
@pytest.mark.parametrize("config, tokens", [(TOY, 512), (SMALL, 1024)])
def test_what_forward_keeps_and_backward_needs_on_top_is_as_counted(config, tokens, kind, dtype):
    kept, peak = kept_and_peak(config, tokens, kind, dtype)
    counted = plan.activation_bytes(config, kind, tokens, dtype.itemsize)
    assert counted["kept"] + counted["tail"] == pytest.approx(kept, rel=0.01)
    assert counted["kept"] + counted["working"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_autograd_saves_is_what_a_block_is_said_to_keep(dtype):
    def saved(config) -> int:
        model, found = built(config, dtype), {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(x):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = forward(model, 512)
        assert loss.requires_grad  # the graph holds what was saved until here
        return sum(size for place, size in found.items() if place not in weights)

    more = saved(replace(SMALL, num_hidden_layers=4)) - saved(replace(SMALL, num_hidden_layers=2))
    assert more / 2 / 512 == pytest.approx(plan.block_bytes(SMALL, "none", dtype.itemsize), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_alone_and_the_frozen_tower_take_what_is_counted(dtype):
    model = built(SMALL, dtype, head="value")
    with torch.no_grad(), Alive() as alive:
        model(**packed(SMALL, 1024), rows=torch.arange(1024))
    assert plan.forward_bytes(SMALL, 1024, dtype.itemsize) == pytest.approx(alive.most, rel=0.1)
    v = replace(TOY.vision, hidden_size=128, intermediate_size=342, num_heads=4)  # as wide as 7B's
    patches, tower = torch.randn(512, 1176), VisionTower(v).to(dtype).requires_grad_(False)
    with Alive() as alive:
        tower(patches, [(1, 16, 16)] * 2)
    assert plan.tower_bytes(v, 512, dtype.itemsize) == pytest.approx(alive.most, rel=0.15)


def test_a_token_of_the_cache_is_as_large_as_the_samplers():
    cache = KVCache(TOY, 3, 40, torch.bfloat16, torch.device("cpu"))
    held = sum(x.nbytes for x in (*cache.keys, *cache.values))
    assert held == 3 * 40 * plan.cache_bytes(TOY) and plan.cache_bytes(plan.MODELS["7b"]) == 57_344


@pytest.mark.parametrize("kind", parallel.RECOMPUTE)
def test_the_flops_are_those_of_the_products_that_torch_runs(kind):
    """Attention aside, which the counter does not know on CPUs: 6 (full: 8) L C n^2 a document."""
    model, n = built(SMALL, kind=kind), 96
    with FlopCounterMode(display=False) as counter:
        pack = packed(SMALL, n) | {"lengths": [n]}
        logps, _ = model(**pack, rows=torch.arange(n), targets=pack["ids"])
        logps.sum().backward()
    ran = counter.get_flop_counts()["Global"]
    products = sum(flops for name, flops in ran.items() if "attention" not in str(name))
    attention = (8 if kind == "full" else 6) * SMALL.num_hidden_layers * SMALL.hidden_size * n**2
    assert plan.executed_flops(SMALL, n, kind) - attention == pytest.approx(products, rel=0.001)


def test_a_document_takes_its_model_flops_at_the_measured_mfu():
    c = plan.MODELS["7b"]
    known = KNOWN | {"mfu": {"1000": 0.2, "3000": 0.4}, "mfu_recompute": "full"}
    took = plan.train_seconds(c, 2000, "full", 100, known)
    assert took == pytest.approx(train_flops(c, 2000) / (0.3 * 100e12))
    assert plan.train_seconds(c, 2000, "none", 100, known) < took


def test_rows_of_the_sampler_take_the_next_response_when_one_ends():
    assert plan.decode_steps([5, 3, 4, 1], rows=2) == 7  # 5 and 1 after it; 3 and 4
    assert plan.decode_steps([5, 3, 4, 1], rows=4) == 5 and plan.decode_steps([5, 3], 1) == 8
    c = replace(TOY, num_hidden_layers=1)
    few, many = (plan.decode_seconds(c, [8] * 8, 4, rows, 1.0) for rows in (2, 8))
    weights = 2 * (plan.sizes(c).layers + c.vocab_size * c.hidden_size)
    assert few - many == pytest.approx((32 - 8) * weights / 1e9)  # keys are read just as often
    before = 8 * (8 * 4 + 8 * 8 / 2)  # tokens that 8 responses look back on
    assert many == pytest.approx((8 * weights + plan.cache_bytes(c) * before) / 1e9)


def test_traffic_is_what_the_rings_send():
    s = plan.Sizes(0, 1, 1_000_000, 500_000)
    assert plan.gather_seconds(s, 8, 1.0) == pytest.approx((8e6 + 3e6) * 7 / 8 / 1e9)
    assert plan.gather_seconds(s, 8, 1.0, backward=False) == pytest.approx(3e6 * 7 / 8 / 1e9)
    assert plan.gather_seconds(s, 1, 1.0) == plan.reduce_seconds(s, 1, 8, 1.0) == 0
    assert plan.reduce_seconds(s, 4, 8, 1.0) == pytest.approx(1.5 * 6e6 / 8 / 1e9)


def planned(**asked) -> plan.Config:
    cfg = plan.Config(**asked)
    return plan.choose(cfg, plan.MODELS[cfg.model], KNOWN)


def peak(cfg: plan.Config) -> float:
    return max(plan.peaks(cfg, plan.MODELS[cfg.model], KNOWN).values())


def peak_of(cfg: plan.Config, phase: str) -> float:
    return plan.peaks(cfg, plan.MODELS[cfg.model], KNOWN)[phase]


@pytest.mark.parametrize("stage", ["coldstart", "rl"])
def test_more_gpus_and_shorter_documents_take_less_of_each_and_more_nodes_only_time(stage):
    fixed = dict(stage=stage, recompute="full", offload=stage == "rl")
    fixed |= dict(kv_cache_gb=8.0, sampler_batch=16)

    def of(gpus: int, length: int) -> plan.Config:
        cfg = plan.Config(gpus=gpus, length=length, gpu="b200", **fixed)
        return replace(cfg, pack_tokens=cfg.longest)

    at = {(n, k): peak(of(n, k)) for n in (2, 8, 64) for k in (8192, 49152)}
    assert at[8, 8192] < at[2, 8192] < at[2, 49152] > at[8, 49152] > at[8, 8192]
    assert at[64, 49152] == at[8, 49152]
    times = [sum(plan.seconds(of(n, 49152), plan.MODELS["7b"], KNOWN).values()) for n in (8, 64)]
    assert 4 < times[0] / times[1] < 8.1


def test_the_plan_fits_and_its_settings_are_those_that_the_stages_take():
    best = planned()
    assert peak(best) <= 80 < peak(replace(best, recompute="none"))
    chosen = dict(recompute=best.recompute, offload=best.offload, pack_tokens=best.pack_tokens)
    chosen |= dict(sampler_batch=best.sampler_batch, kv_cache_gb=best.kv_cache_gb)
    rl.Config(lengths=(best.length,), length_from=(0,), prompt_tokens=8192, **chosen)
    stays = peak_of(replace(best, offload=False), "learn policy")
    s = plan.sizes(plan.MODELS["7b"], "value")  # the critic's slice, and its tower
    idle = 16e-9 * plan.trained(s) / 8 + 2e-9 * s.tower
    assert stays - peak_of(best, "learn policy") == pytest.approx(idle)
    assert best.sampler_batch % best.samples == 0
    wider = plan.seconds(replace(best, sampler_batch=512), plan.MODELS["7b"], KNOWN)
    answer = plan.seconds(best, plan.MODELS["7b"], KNOWN)["answer"]  # the cache is the limit
    assert wider["answer"] == pytest.approx(answer, rel=0.05)
    assert best.kv_cache_gb * 1e9 >= best.longest * 57_344


@pytest.mark.parametrize(
    "asked",
    [
        dict(recompute="none"),
        dict(offload=False, kv_cache_gb=40.0),
        dict(pack_tokens=262_144),
        dict(gpus=1),
        dict(stage="coldstart", length=131_072),
    ],
)
def test_what_cannot_fit_is_refused_and_every_cure_cures(asked):
    with pytest.raises(ValueError, match="does not fit") as refusal:
        planned(**asked)
    cures = str(refusal.value).split("would: ")[1].split("; ")
    assert cures and cures != ["nothing that was tried"]
    for cure in cures:
        words = cure.split()
        changed = dict(zip([w[2:].replace("-", "_") for w in words[::2]], words[1::2], strict=True))
        types = {
            "recompute": str,
            "gpu": str,
            "offload": lambda x: x == "True",
            "kv_cache_gb": float,
        }
        changed = {name: types.get(name, int)(value) for name, value in changed.items()}
        assert peak(planned(**asked | changed)) <= plan.GPUS[changed.get("gpu", "h100")][0]


def test_measured_constants_replace_assumed_ones_and_unknown_ones_are_refused(tmp_path, capsys):
    (file := tmp_path / "gpu.json").write_text(json.dumps({"plan": {"decode": 0.3}}))
    known, names = plan.constants(str(file))
    assert known == KNOWN | {"decode": 0.3} and names == {"decode"}
    plan.main(plan.Config(measured=str(file)))
    shown = capsys.readouterr().out
    assert "measured     decode 0.3" in shown and "assumed      links" in shown
    (tmp_path / "config.json").write_text(json.dumps(config_json(TOY, torch.float32)))
    plan.main(plan.Config(str(tmp_path), "coldstart", gpus=1, length=512))
    assert "nothing was measured" in capsys.readouterr().out
    file.write_text(json.dumps({"plan": {"speed": 1}}))
    with pytest.raises(ValueError, match="gpu.json"):
        plan.constants(str(file))


def test_the_first_two_steps_of_a_run_stand_beside_the_plan_of_the_documents_they_had(
    mini, tmp_path, monkeypatch, capsys
):
    """On a machine that says it is an H100: what is printed is checked, not the machine's speed."""
    monkeypatch.setattr(plan, "here", lambda: "h100")
    seen, seconds = [], plan.seconds
    monkeypatch.setattr(plan, "seconds", lambda *given: seen.append(given) or seconds(*given))
    small = dict(steps=3, problems=4, samples=2, lengths=(8,), length_from=(0,), threads=1)
    small |= dict(pack_tokens=128, prompt_tokens=64, model=mini.model, data=mini.train)
    rl.main(rl.Config(out=str(tmp_path / "rl"), **small))
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("measured for")]
    assert len(lines) == len(seen) == 2
    rows = [json.loads(x) for x in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    for line, row, (cfg, c, known) in zip(lines, rows, seen, strict=False):
        assert len(known["lengths"]) == 8 and sum(known["lengths"]) == row["tokens"]
        assert (cfg.share, cfg.length, cfg.gpus) == (8, 8, 1) and c.hidden_size == 128
        assert f"learn {row['seconds_learn']:.3g} s for " in line and " GB for " in line
        assert f"memory {row['peak_gb']:.3g} GB for " in line
    monkeypatch.setattr(plan, "config_of", lambda *given: plan.Config(gpus=12))
    plan.show_beside("rl", None, None, 12, [], {})
    assert "no plan: gpu: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, gpu",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", ""),
        ("NVIDIA H100 PCIe", ""),
        ("NVIDIA GH200 480GB", ""),
        ("Tesla T4", ""),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(monkeypatch, name, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert plan.here() == gpu


def test_what_was_measured_on_this_gpu_takes_the_place_of_what_is_assumed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan, "MEASURED", str(tmp_path / "gpu.json"))
    assert plan.known_here() == plan.ASSUMED
    found = {"machine": {"name": "NVIDIA H200"}, "plan": {"decode": 0.11}}
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    for name, decode in (("NVIDIA H200", 0.11), ("NVIDIA H100 80GB HBM3", plan.ASSUMED["decode"])):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert plan.known_here() == plan.ASSUMED | {"decode": decode}


if __name__ == "__main__":  # the README's table
    model.KEPT_LOGITS = 0
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), parallel.RECOMPUTE):
        found = kept_and_peak(SMALL, 1024, kind, dtype)
        counted = plan.activation_bytes(SMALL, kind, 1024, dtype.itemsize)
        planned = (counted["kept"] + counted[part] for part in ("tail", "working"))
        for what, is_so, said in zip(("kept", "peak"), found, planned, strict=True):
            print(f"{dtype} {kind}: {what} {is_so / 1e6:.2f} MB, planned {said / 1e6:.2f}")
