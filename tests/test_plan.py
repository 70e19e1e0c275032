"""plan.py: what its fake tensors take is what real ones take, and what cannot fit is refused."""

import gc
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import tyro
from torch.profiler import ProfilerActivity, profile

from common.data import Document, Prompt
from common.packs import make_pack
from miniature import base
from model import KVCache, Qwen25VL, config_json, read_config, train_flops
from tools import plan

HUB = Path(__file__).resolve().parents[2] / "shared" / "qwen2_5_vl"
TOY = base.model_config(512)
TOWER = replace(TOY.vision, out_hidden_size=256)
SMALL = replace(TOY, hidden_size=256, num_attention_heads=8, vision=TOWER, intermediate_size=1024)
SEVEN = plan.MODELS["7b"]


def model_weights() -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen25VL(SMALL).parameters())


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
    "head, recompute, ranks, lora_rank",
    [
        ("lm", "none", 2, 0),
        ("lm", "selective", 2, 0),
        ("lm", "full", 1, 0),
        ("value", "full", 2, 0),
        ("lm", "full", 2, 8),
    ],
)
def test_fake_tensors_take_what_real_ones_are_given_by_the_allocator(
    head, recompute, ranks, lora_rank
):
    task = (SMALL, head, recompute, 1024, ranks, lora_rank)
    parts = plan.measure(*task)
    assert sum(parts[:5]) == pytest.approx(real_peak(*task), rel=0.01)
    assert min(parts) > 0 and not dist.is_initialized()


def test_ranks_share_16_bytes_a_trained_weight_and_each_has_the_frozen_tower():
    with torch.device("meta"):
        model = Qwen25VL(SMALL)
    tower = sum(p.numel() for p in model.visual.parameters())
    trained = sum(p.numel() for p in model.parameters()) - tower
    for ranks in (1, 8):
        parts = plan.measure(SMALL, "lm", "full", 1024, ranks)
        exact = (4 * trained / ranks + 2 * tower, 4 * trained / ranks, 8 * trained / ranks)
        assert [1e9 * size for size in parts[:3]] == pytest.approx(exact, rel=0.01)


def test_with_adapters_a_frozen_weight_takes_2_bytes_and_an_adapters_16():
    with torch.device("meta"):
        decoder = Qwen25VL(SMALL).model
    linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    adapters = 8 * sum(m.in_features + m.out_features for m in linears)
    whole, parts = (plan.measure(SMALL, "lm", "full", 1024, 1, rank) for rank in (0, 8))
    exact = (2 * model_weights() + 4 * adapters, 4 * adapters, 8 * adapters)
    assert [1e9 * size for size in parts[:3]] == pytest.approx(exact, rel=0.01)
    assert sum(parts[:5]) < 0.5 * sum(whole[:5])


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


def test_a_phase_holds_what_works_the_engine_and_without_offload_what_waits():
    policy, critic = plan.Footprint(5, 4, 8, 3, 20, 6), plan.Footprint(4, 3, 7, 2, 10, 5)
    models, cfg = {"critic": critic, "policy": policy}, plan.Config(kv_cache_gb=10.0)
    here = plan.phases(cfg, SEVEN, models)
    away = plan.phases(replace(cfg, offload=True), SEVEN, models)
    assert [phase["waiting"] for phase in here.values()] == [4, 11, 31, 17, 14, 14]
    engine = 2 * 8.292 + 10
    sums = {
        "load": 5,
        "resume": 13,
        "sample": engine,
        "critic": 26,
        "policy": 40,
        "sync": engine + 5 + 6,
    }
    assert {n: sum(parts.values()) for n, parts in away.items()} == pytest.approx(sums, rel=1e-4)
    grpo = plan.phases(cfg, SEVEN, {"policy": policy})
    assert "critic" not in grpo and grpo["policy"]["waiting"] == 0
    cold = plan.phases(plan.Config(stage="coldstart"), SEVEN, {"policy": policy})
    assert [*cold] == ["resume", "update"]


def test_hours_are_flops_and_bytes_over_the_assumed_shares():
    cache = KVCache(SEVEN, 1, 9024, torch.bfloat16, torch.device("meta")).layers.nbytes
    cfg = plan.Config(mean=8000, batch=800, kv_cache_gb=10 * cache / 1e9)
    times = plan.seconds(cfg, SEVEN)
    flops = 800 * train_flops(SEVEN, 9024) * 4 / 3
    assert times["policy"] == pytest.approx(flops / (8 * 0.4 * 989e12))
    assert times["critic"] == pytest.approx(4 / 3 * times["policy"])
    weights = 100 * 8000 / 10 * 2 * 8.292e9  # the cache holds 10 responses
    keys = 100 * 8000 * (1024 + 4000) * 57_344
    assert times["sample"] == pytest.approx((weights + keys) / (0.6 * 3350e9), rel=1e-3)
    assert plan.seconds(replace(cfg, gpus=16), SEVEN)["sample"] == pytest.approx(
        times["sample"] / 2
    )
    cold = plan.Config(stage="coldstart", recompute="none", mfu=0.5, mean=4096)
    flops = 640 * 65_536 / 4096 * train_flops(SEVEN, 4096)
    assert plan.seconds(cold, SEVEN) == {"update": pytest.approx(flops / (8 * 0.5 * 989e12))}
    frozen = plan.seconds(replace(cold, lora_rank=32), SEVEN)  # two of three products
    assert frozen == {"update": pytest.approx(2 / 3 * flops / (8 * 0.5 * 989e12))}


def test_a_table_with_all_that_is_assumed_is_printed_and_what_does_not_fit_is_an_error(
    tmp_path, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(config_json(TOY, torch.float32)))
    sizes = dict(gpus=2, gpu="rtx4090", pack_tokens=512, mean=256, kv_cache_gb=20.0)
    with pytest.raises(SystemExit, match="does not fit: .*--offload"):
        plan.main(plan.Config(str(tmp_path), **sizes))
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines()[1:7]]
    assert rows == ["load", "resume", "sample", "critic", "policy", "sync"]
    for part in ("6 GB in reserve, of 24 GB", "40% of 165", "60% of 1008", "rows of 256"):
        assert part in out


def test_the_table_gives_what_a_single_plan_gives(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(config_json(TOY, torch.float32)))
    small = f"--model {tmp_path} --gpus 2 --gpu rtx4090 --pack-tokens 512 --mean 256"
    lines = [f"{small} --stage coldstart", f"{small} --kv-cache-gb 2 --offload --algorithm grpo"]
    monkeypatch.setattr(plan, "TRIED", "\n".join(lines))
    plan.main(plan.Config(table=True))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    for line, (name, *cells) in zip(lines, rows, strict=True):
        assert name == f"| `{line}`"
        plan.main(tyro.cli(plan.Config, args=line.split()))
        out = capsys.readouterr().out
        sums = {text.split()[0]: text.split()[-1] for text in out.splitlines()[1:6]}
        shown = [sums.get(name, "") for name in ("load", "resume", "sample", "critic")]
        assert cells[:4] == shown and cells[-2] == f"{out.splitlines()[-1].split()[0]} of 24"


def test_settings_that_no_run_can_have_are_refused():
    for settings in ({"gpus": 12}, {"pack_tokens": 4096}):
        with pytest.raises(ValueError, match="--gpus 12|--mean 10000 is more than --pack-tokens"):
            plan.Config(**settings)
