"""plan.py: what its fake tensors take is what real ones take, and what cannot fit is refused."""

import gc
import json
import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import tyro
from torch.profiler import ProfilerActivity, profile

from miniature import base
from model import KVCache, Qwen25VL, config_json, read_config, train_flops
from tools import plan

HUB = Path(__file__).resolve().parents[2] / "shared" / "qwen2_5_vl"
TOY, SEVEN = base.model_config(512), plan.MODELS["7b"]
TOWER = replace(TOY.vision, out_hidden_size=256)
SMALL = replace(TOY, hidden_size=256, num_attention_heads=8, vision=TOWER, intermediate_size=1024)
SIZES = [("lm", "none", 2, 0), ("lm", "selective", 2, 0), ("lm", "full", 1, 0)]
SIZES += [("lm", "full", 2, 8), ("value", "full", 2, 0)]


@pytest.mark.parametrize("head, recompute, ranks, lora", SIZES)
def test_fake_tensors_take_what_real_ones_are_given_by_the_allocator(head, recompute, ranks, lora):
    task = (SMALL, head, recompute, 1024, ranks, lora)
    parts = plan.measure(*task)
    gc.collect()  # an earlier run's tensors would be freed in this one's account
    real = patch.object(plan, "FakeTensorMode", lambda **_: nullcontext())
    with real, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        plan.measure.__wrapped__(*task)  # not what its cache holds
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert sum(parts[:5]) == pytest.approx(max(accumulate(changes)) / 1e9, rel=0.01)
    assert min(parts) > 0 and not dist.is_initialized()


@pytest.mark.parametrize("ranks, lora_rank", [(1, 0), (8, 0), (1, 8)])
def test_a_trained_weight_takes_16_bytes_of_all_ranks_and_a_frozen_one_2_of_each(ranks, lora_rank):
    with torch.device("meta"):
        model = Qwen25VL(SMALL)
    frozen = sum(p.numel() for p in model.visual.parameters())
    trained = sum(p.numel() for p in model.parameters()) - frozen
    if lora_rank:  # only adapters train, and the decoder is frozen as the tower is
        linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        adapters = lora_rank * sum(m.in_features + m.out_features for m in linears)
        frozen, trained = frozen + trained, adapters
    parts = plan.measure(SMALL, "lm", "full", 1024, ranks, lora_rank)
    exact = (4 * trained / ranks + 2 * frozen, 4 * trained / ranks, 8 * trained / ranks)
    assert [1e9 * size for size in parts[:3]] == pytest.approx(exact, rel=0.01)


@pytest.mark.skipif(not HUB.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository")
@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_table_of_models_is_the_hubs_files(size, tmp_path):
    (tmp_path / "config.json").write_text((HUB / f"config-{size}.json").read_text())
    assert read_config(tmp_path) == plan.MODELS[size]


def test_a_phase_holds_what_works_the_engine_and_without_offload_what_waits():
    policy, critic = plan.Footprint(5, 4, 8, 3, 20, 6), plan.Footprint(4, 3, 7, 2, 10, 5)
    both, alone, cfg = {"critic": critic, "policy": policy}, {"policy": policy}, plan.Config()
    here = plan.phases(cfg, SEVEN, both)
    assert [phase["waiting"] for phase in here.values()] == [4, 11, 31, 17, 14, 14]
    away = plan.phases(replace(cfg, offload=True, kv_cache_gb=10.0), SEVEN, both)
    engine = 2 * 8.292 + 10
    sums = [5, 13, engine, 26, 40, engine + 5 + 6]
    assert [sum(parts.values()) for parts in away.values()] == pytest.approx(sums, rel=1e-4)
    grpo = plan.phases(cfg, SEVEN, alone)
    assert "critic" not in grpo and grpo["policy"]["waiting"] == 0
    assert [*plan.phases(plan.Config(stage="coldstart"), SEVEN, alone)] == ["resume", "policy"]


def test_hours_are_flops_and_bytes_over_the_assumed_shares():
    cache = KVCache(SEVEN, 1, 9024, torch.bfloat16, torch.device("meta")).layers.nbytes
    times = plan.seconds(plan.Config(mean=8000, batch=800, kv_cache_gb=10 * cache / 1e9), SEVEN)
    flops = 800 * train_flops(SEVEN, 9024) * 4 / 3
    assert times["policy"] == pytest.approx(flops / (8 * 0.4 * 989e12))
    assert times["critic"] == pytest.approx(4 / 3 * times["policy"])
    weights = 100 * 8000 / 10 * 2 * 8.292e9  # the cache holds 10 responses
    keys = 100 * 8000 * (1024 + 4000) * 57_344
    assert times["sample"] == pytest.approx((weights + keys) / (0.6 * 3350e9), rel=1e-3)
    cold = plan.Config(stage="coldstart", recompute="none", mfu=0.5, mean=4096)
    flops = 640 * 65_536 / 4096 * train_flops(SEVEN, 4096)
    for rank, share in ((0, 1), (32, 2 / 3)):  # frozen: two of three products
        wanted = pytest.approx(share * flops / (8 * 0.5 * 989e12))
        assert plan.seconds(replace(cold, lora_rank=rank), SEVEN) == {"policy": wanted}


def test_a_plan_and_the_table_give_the_same_sums_and_what_does_not_fit_is_an_error(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "config.json").write_text(json.dumps(config_json(TOY, torch.float32)))
    small = f"--model {tmp_path} --gpus 2 --gpu rtx4090 --pack-tokens 512 --mean 256"
    lines = [f"{small} --stage coldstart", f"{small} --kv-cache-gb 2 --offload --algorithm grpo"]
    monkeypatch.setattr(plan, "TRIED", "\n".join(lines))
    plan.main(plan.Config(table=True))
    rows = capsys.readouterr().out.splitlines()[2:]
    for line, row in zip(lines, rows, strict=True):
        plan.main(tyro.cli(plan.Config, args=line.split()))
        printed = capsys.readouterr().out
        sums = re.findall(rf"^(?:{'|'.join(plan.PHASES)}) .* ([\d.]+)$", printed, flags=re.M)
        (peak,) = re.findall(r"^([\d.]+) GB with", printed, flags=re.M)
        assert re.findall(r"\| ([\d.]+)(?= \|)", row)[:-1] == sums  # the last are minutes
        assert f"| {peak} of 24 |" in row
    with pytest.raises(SystemExit, match="does not fit: .*--offload.*--lora-rank"):
        plan.main(tyro.cli(plan.Config, args=[*small.split(), "--kv-cache-gb", "20"]))


@pytest.mark.parametrize(
    "settings, said",
    [({"gpus": 12}, "gpus"), ({"mean": 70000}, "--mean"), ({"mfu": 0.0}, "--mfu")],
)
def test_settings_that_no_run_can_have_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        plan.Config(**settings)
