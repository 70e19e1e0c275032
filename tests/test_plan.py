"""plan.py: what its fake tensors take is what real ones take, and what cannot fit is refused."""

import gc
import json
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from common.data import Document, Prompt
from common.packs import make_pack
from miniature import world
from model import KVCache, Qwen25VL, config_json, read_config, train_flops
from tools import plan

HUB = Path(__file__).resolve().parents[2] / "shared" / "qwen2_5_vl"
TOY = world.model_config(512)
TOWER = replace(TOY.vision, out_hidden_size=256)
SMALL = replace(TOY, hidden_size=256, num_attention_heads=8, vision=TOWER, intermediate_size=1024)
SEVEN = plan.MODELS["7b"]


@cache
def parameters(config, head: str) -> tuple[int, int]:
    """Trained and frozen ones."""
    with torch.device("meta"):
        model = Qwen25VL(config, head)
    tower = sum(p.numel() for p in model.visual.parameters())
    return sum(p.numel() for p in model.parameters()) - tower, tower


def real_peak(*task) -> float:
    """GB that the same run takes at most with real tensors, by what the allocator reports."""
    gc.collect()  # an earlier run's tensors would be freed in this one's account
    real = patch.object(plan, "FakeTensorMode", lambda **_: nullcontext())
    with real, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        plan.measure(*task)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 1e9


@pytest.mark.parametrize(
    "head, recompute, ranks",
    [("lm", "none", 2), ("lm", "selective", 2), ("lm", "full", 1), ("value", "full", 2)],
)
def test_fake_tensors_take_what_real_ones_are_given_by_the_allocator(head, recompute, ranks):
    task = (SMALL, head, recompute, 1024, ranks)
    real = plan.workers().submit(real_peak, *task)
    parts = plan.footprint(*task).result()
    assert sum(parts[:5]) == pytest.approx(real.result(), rel=0.01)
    assert min(parts) > 0 and not dist.is_initialized()  # nothing of it in this process


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_ranks_share_16_bytes_a_trained_weight_and_each_has_the_frozen_tower(ranks):
    trained, tower = parameters(SMALL, "lm")
    parts = plan.footprint(SMALL, "lm", "full", 1024, ranks).result()
    exact = (4 * trained / ranks + 2 * tower, 4 * trained / ranks, 8 * trained / ranks)
    assert [1e9 * size for size in parts[:3]] == pytest.approx(exact, rel=0.01)


def test_7b_over_8_ranks_takes_43_gb_for_a_pack_of_56k_tokens():
    """As storages followed by other code had it, which made no moments."""
    parts = plan.footprint(SEVEN, "lm", "full", 57_344, 8).result()
    assert sum(parts[:5]) - parts.moments == pytest.approx(43.1, rel=0.02)


def test_pictures_do_not_raise_the_peak_since_a_frozen_tower_is_done_before_the_decoder_starts():
    model, peaks = Qwen25VL(SMALL), []
    model.visual.requires_grad_(False)
    picture = Prompt([SMALL.image_token_id] * 64, [], torch.randn(256, 1176), ((1, 16, 16),), (0,))
    for prompt in (Prompt([0] * 64, [], None, (), ()), picture):
        model.zero_grad()
        pack = make_pack([Document(prompt, [1] * 960)])
        with plan.LiveBytes() as live:
            model.logps(pack)[0].sum().backward()
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


@pytest.mark.skipif(not HUB.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository")
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_table_of_models_is_the_hubs_files(size, tmp_path):
    (tmp_path / "config.json").write_text((HUB / f"config-{size}.json").read_text())
    assert read_config(tmp_path) == plan.MODELS[size]


@pytest.fixture
def arithmetic(monkeypatch):
    """Footprints of 7B by counting and at once: 16 B a weight, and what a pack takes."""

    def footprint(config, head: str, recompute: str, tokens: int, ranks: int) -> Future:
        trained, tower = (x / 1e9 for x in parameters(config, head))
        kept = {"none": 70, "selective": 12, "full": 3}[recompute] * 1e-9 * tokens * 28 * 3584
        slices = 4 * trained / ranks + 2 * tower, 4 * trained / ranks, 8 * trained / ranks
        (future := Future()).set_result(plan.Footprint(*slices, kept, 20 * tokens / 65536, 5.0))
        return future

    monkeypatch.setattr(plan, "footprint", footprint)


def test_a_phase_holds_what_works_the_engine_and_without_offload_what_waits(arithmetic):
    cfg = plan.Config(kv_cache_gb=10.0)
    here, away = plan.phases(cfg), plan.phases(replace(cfg, offload=True))
    assert [*here] == ["load", "sample", "critic", "policy", "sync"]
    policy, critic = (sum([*here[name].values()][1:4]) for name in ("policy", "critic"))
    waits = [phase["waiting"] for phase in here.values()]
    assert waits == pytest.approx([critic, policy + critic, policy, critic, critic])
    assert not any(phase["waiting"] for phase in away.values())
    engine = 2 * 8.292 + 10
    sums = [sum(away[phase].values()) for phase in ("sample", "sync")]
    assert sums == pytest.approx([engine, engine + policy + 5], rel=0.001)
    grpo = plan.phases(replace(cfg, algorithm="grpo"))
    assert "critic" not in grpo and grpo["policy"]["waiting"] == 0
    assert [*plan.phases(replace(cfg, stage="coldstart"))] == ["update"]
    assert plan.phases(replace(cfg, gpus=64)) == here  # further nodes save time, not memory


@pytest.mark.parametrize(
    "settings, cure",
    [
        (dict(offload=True, recompute="none"), {"recompute"}),
        (dict(kv_cache_gb=24.0), {"offload", "kv_cache_gb"}),
        (dict(offload=True, pack_tokens=262_144, longest=57_344), {"pack_tokens"}),
        (dict(recompute="none", kv_cache_gb=40.0), {"recompute", "offload", "kv_cache_gb"}),
        (dict(stage="coldstart", gpu="a100-80", recompute="selective"), {"recompute"}),
        (dict(gpus=2), {"gpus", "gpu", "offload", "kv_cache_gb"}),
    ],
)
def test_the_mildest_changes_that_cure_are_named_and_do(arithmetic, settings, cure):
    cfg = plan.Config(**settings)
    assert plan.peak_gb(cfg) > plan.GPUS[cfg.gpu][0]
    cures, advice = plan.cures(cfg), plan.advice(cfg)
    assert set().union(*cures) == cure and ("LoRA" in advice) == ("gpu" in cure)
    for change in cures:
        other = replace(cfg, **change)
        assert plan.peak_gb(other) <= plan.GPUS[other.gpu][0] and plan.flags(change) in advice


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_7b_on_one_card_of_24_gb_wants_lora_or_another_card(arithmetic, capsys, algorithm):
    with pytest.raises(SystemExit, match="24 GB: not without LoRA.* --offload .*--gpu b200"):
        plan.main(plan.Config(gpu="rtx4090", gpus=1, algorithm=algorithm))
    assert "DOES NOT FIT rtx4090" in capsys.readouterr().out


def test_settings_that_no_run_can_have_are_refused():
    with pytest.raises(ValueError, match="--gpus 12"):
        plan.Config(gpus=12)
    with pytest.raises(ValueError, match="--longest 70000"):
        plan.Config(longest=70_000)


def test_hours_are_flops_and_bytes_over_the_assumed_shares():
    cache = KVCache(SEVEN, 1, 9024, torch.bfloat16, torch.device("meta")).layers.nbytes
    cfg = plan.Config(mean=8000, batch=800, kv_cache_gb=10 * cache / 1e9)
    times = plan.seconds(cfg)
    flops = 800 * train_flops(SEVEN, 9024) * 4 / 3
    assert times["policy"] == pytest.approx(flops / (8 * 0.4 * 989e12))
    assert times["critic"] == pytest.approx(4 / 3 * times["policy"])
    weights = 100 * 8000 / 10 * 2 * 8.292e9  # the cache holds 10 responses
    keys = 100 * 8000 * (1024 + 4000) * 57_344
    assert times["sample"] == pytest.approx((weights + keys) / (0.6 * 3350e9), rel=1e-3)
    assert plan.seconds(replace(cfg, gpus=16))["sample"] == pytest.approx(times["sample"] / 2)
    cold = plan.Config(stage="coldstart", recompute="none", mfu=0.5, mean=4096)
    flops = 640 * 65_536 / 4096 * train_flops(SEVEN, 4096)
    assert plan.seconds(cold) == {"update": pytest.approx(flops / (8 * 0.5 * 989e12))}


def test_a_table_with_all_that_is_assumed_is_printed_for_a_model_directory(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config_json(TOY, torch.float32)))
    plan.main(plan.Config(str(tmp_path), gpus=2, pack_tokens=512, offload=True))
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines()[1:6]]
    assert rows == ["load", "sample", "critic", "policy", "sync"]
    for part in ("6 GB in reserve: fits h100", "40% of 989", "60% of 3350", "rows of 256"):
        assert part in out
