"""distributed.py: two and four gloo processes give the numbers of one, wherever the pictures lie.

It starts itself under torchrun. Two ranks: pictures on one, text on the other, the tower whole and
sharded; first of all they are killed and started again. Four ranks: two groups with a copy of the
weights each, as two nodes would, with recomputation and offload, and more ranks than packs.
"""

import faulthandler
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finished
from safetensors.torch import load_file
from test_rl import account
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import coldstart
import rl
from common import batches, checkpoint, data, distributed
from common.packs import Pack, filler_pack, full_pack, make_pack, with_blank_picture
from model import Qwen25VL, gathered, load_model, read_config, save_model
from rollout import Sampler

ROOT = Path(__file__).resolve().parents[1]
ALONE = distributed.World(0, 1, torch.device("cpu"))
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++")
LIMIT = 600  # seconds after which a rank that hangs says where; all takes a tenth of it


def coldstart_config(mini: dict, out, **changed) -> coldstart.Config:
    small = dict(model=mini["model"], data=mini["sft"], out=str(out))
    small |= dict(epochs=0.5, batch_rows=7, valid=8, valid_every=1)
    return coldstart.Config(**small | dict(pack_tokens=300, max_tokens=300) | changed)  # 3 steps


def rl_config(mini: dict, out, **changed) -> rl.Config:
    small = dict(model=mini["model"], data=mini["train"], out=str(out), steps=2, problems=6)
    small |= dict(samples=4, lengths=((0, 12),), pack_tokens=100, prompt_tokens=64)
    return rl.Config(**small | dict(warmup=2, save_every=100, critic_steps=2) | changed)


RUNS = {  # of rl.py, by one process and by several
    "rl": {},
    # of two samples many are alike, and their problems give way
    "grpo": dict(algorithm="grpo", policy_steps=2, lr=1e-3, steps=1, samples=2, resample=2),
    "vision": dict(train_vision=True, steps=1),
    "lora": dict(lora_rank=4, lora_alpha=8.0, lr=1e-3, critic_lr=1e-3, offload=True),
    # two responses for each of the critic's steps, on four ranks
    "few": dict(problems=4, samples=2, steps=1),
}
TAIL = dict(finish_share=0.5, steps=3)  # each rank puts aside what it has not finished


def in_order(n: int, seed: int, epoch: int, *order: int) -> np.ndarray:
    """In place of data.permutation: pictures and text alternate, so each rank has one kind."""
    return np.arange(n)


def reads_the_text(rollout) -> float:
    """In place of rl.reward_of."""
    return rollout.verdict.score * rollout.stopped + 0.5 * ("good" in rollout.text)


def patch_all(setattr):
    setattr(data, "permutation", in_order)
    setattr(rl, "reward_of", reads_the_text)
    setattr(batches, "LOGGED", 24)  # all rollouts of a step


# ------------------------------------------------------------------ what runs under torchrun


def picture_and_text(mini: dict) -> list[Pack]:
    """One pack of a problem with a picture, one without."""
    tokenizer = data.load_tokenizer(mini["model"])
    settings, packs = data.load_image_settings(mini["model"]), []
    for problem in data.read_problems(mini["train"])[:2]:
        prompt = data.encode_prompt(problem, tokenizer, settings)
        packs.append(make_pack([data.Document(prompt, [20, 30, 2])]))
    return packs


def gradients(mini: dict, world, head: str) -> dict:
    """Of the summed output over both packs: rank r has the r-th, one process has both. A critic
    comes with a tower that trains, and so is sharded.
    """
    torch.manual_seed(0)
    model = distributed.load(mini["model"], world, head, distributed.Trained(head == "value"))
    packs = picture_and_text(mini)[world.rank :: world.size] or [filler_pack()]
    packs = [with_blank_picture(pack) if head == "value" else pack for pack in packs]
    for learns in (False, True):  # as the critic's values are read before it learns
        for pack in packs:
            with torch.set_grad_enabled(learns):
                total = (model.logps(pack)[0] if head == "lm" else model.values(pack)).sum()
            if learns:
                distributed.backward(model, total, world, last=True)
    norm, named = distributed.clip_gradients(model, 1e9), [*model.named_parameters()]
    return {
        "norm": norm,
        "gradients": {name: gathered(p.grad) for name, p in named if p.grad is not None},
        "sharded": {name for name, p in named if isinstance(p, DTensor)},
        "weights": {name: weight.clone() for name, weight in distributed.whole_weights(model)},
    }


def small_things(world) -> dict:
    r = world.rank
    running_sum = distributed.running_sum(world, "ended")
    early = [running_sum(n) for n in (r + 1, r + 1, 3 + r)]  # does not wait for the other
    world.wait()
    return {
        "running": [*early, running_sum(3 + r)],
        "problems": [[*distributed.my_problems(world, 5, k, dynamic=True)] for k in ("a", "b")],
        "sums": distributed.sums(2**53 - 1 if r else 1, 0.5 + r),
        "largest": [distributed.largest(x) for x in (r, -r, bool(r))],
        "nan": [distributed.largest(math.nan if r == k else 1.0) for k in (0, 1)],
    }


KILLS = [  # in step 1: of which function the n-th call by this process does not return
    (Sampler, "generate", 1),
    (rl, "train", 2),  # the critic has learnt, the policy has not
    (rl, "canary_gap", 2),  # after the start, after step 1
    (checkpoint, "save_weights", 1),
]


def kill_in(place, name: str, number: int, run: Path):
    """SIGKILL of this process, with the checkpoint before step 1 on the disk."""
    original, calls = getattr(place, name), count(1)

    def killed(*given, **more):
        if checkpoint.complete_steps(run) and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **more)

    setattr(place, name, killed)


def two_ranks(mini: dict, folder: Path) -> dict:
    start, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if start < len(KILLS) and rank == start % 2:
        kill_in(*KILLS[start], folder / "killed")
    rl.main(rl_config(mini, folder / "killed", save_every=1))
    world, stopped = distributed.start(), coldstart_config(mini, folder / "coldstart")
    results = {"small": small_things(world)}
    results |= {head: gradients(mini, world, head) for head in ("lm", "value")}
    Path(stopped.out).mkdir(exist_ok=True)
    Path(stopped.out, "stop").touch()  # rank 0 finds it where its first step ends, and tells all
    coldstart.main(stopped)
    assert checkpoint.complete_steps(stopped.out) == [1]
    coldstart.main(stopped)  # goes on
    for name in ("rl", "grpo", "vision", "lora"):
        rl.main(rl_config(mini, folder / name, **RUNS[name]))
    rl.main(rl_config(mini, folder / "tail", **TAIL))
    return results


def four_ranks(mini: dict, folder: Path) -> dict:
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as on two nodes of two GPUs
    world = distributed.start()
    groups = {name: world.mesh.get_group(name) for name in world.mesh.mesh_dim_names}
    cpu = torch.device("cpu")
    waits = [group._get_backend(cpu).options._timeout for group in groups.values()]
    results = {"mesh": world.mesh.shape, "waits": waits, "lm": gradients(mini, world, "lm")}
    coldstart.main(coldstart_config(mini, folder / "coldstart", recompute="full"))
    few = RUNS["few"] | dict(recompute="selective", offload=True)
    rl.main(rl_config(mini, folder / "few", **few))
    return results


def worker(job: str, folder: Path):
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    mini = json.loads((folder / "mini.json").read_text())
    finish = distributed.finish
    distributed.finish = lambda world: None  # the next run uses the group again
    patch_all(setattr)
    results = globals()[job](mini, folder)
    rank = int(os.environ["RANK"])
    torch.save(results, folder / f"{rank}.pt")
    finish(distributed.World(rank, int(os.environ["WORLD_SIZE"]), torch.device("cpu")))
    print(f"rank {rank} left")  # into a buffer: leaving must not lose it


# ------------------------------------------------------------------ the runs


def torchrun(job: str, ranks: int, mini, folder: Path) -> list[dict]:
    """-> the results of each rank; folder/output.txt is what was printed. It starts them again when
    one is killed, and they must not meet what the dead ones left in its store.
    """
    (folder / "mini.json").write_text(json.dumps(asdict(mini)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--max-restarts={len(KILLS)}", f"--nproc-per-node={ranks}"]
    ours = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command += [__file__, job, str(folder)]
    (folder / "output.txt").write_text(finished(command, folder, ours, 3 * LIMIT))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(mini, tmp_path_factory):
    """Folder of the runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch_all(patch.setattr)
        coldstart.main(coldstart_config(asdict(mini), folder / "coldstart"))
        for name, changed in RUNS.items():
            rl.main(rl_config(asdict(mini), folder / name, **changed))
    return folder


@pytest.fixture(scope="module")
def two(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, torchrun("two_ranks", 2, mini, folder)


@pytest.fixture(scope="module")
def four(mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, torchrun("four_ranks", 4, mini, folder)


def rows_of(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    machine = ("seconds", "tokens_per_second", "peak_gb")
    return [{k: v for k, v in r.items() if not k.startswith(machine)} for r in rows]


def gaps_of(one: Path, other: Path, file="model/model.safetensors") -> list[torch.Tensor]:
    mine, theirs = load_file(one / file), load_file(other / file)
    return [(mine[name] - theirs[name]).abs() for name in mine.keys() | theirs.keys()]


@pytest.mark.parametrize(
    "ranks, run, lr",
    [
        ("two", "coldstart", 1e-3),  # which has been stopped by hand and goes on
        ("two", "rl", 1.5e-4),
        ("two", "grpo", 1e-3),
        ("two", "vision", 1.5e-4),  # the tower is sharded, its pictures are all on one rank
        ("two", "lora", 1e-3),
        ("four", "coldstart", 1e-3),
        ("four", "few", 1.5e-4),  # there are ranks that have nothing to train
    ],
)
def test_several_ranks_give_the_run_of_one(request, alone, ranks, run, lr):
    several, one = request.getfixturevalue(ranks)[0] / run, alone / run
    for a, b in zip(rows_of(several), rows_of(one), strict=True):
        assert a.keys() == b.keys() and max(a.get("logp_diff", 0), b.get("logp_diff", 0)) < 1e-5
        for name in a.keys() - {"logp_diff", "sampler_kl", "ratio_diff"}:
            rel = 5e-6 if name.endswith("grad_norm") else 1e-6  # a norm sums 800,000 squares
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), (a["step"], name)
    # Adam's steps have the size of lr whatever the gradient: where that is 0 but for rounding, so
    # may be their sign. Hence a look at the typical difference, not the largest.
    for file in one.glob("*/*.safetensors"):  # of the model, of its adapters
        gaps = gaps_of(several, one, file.relative_to(one))
        assert all(gap.mean() < 1e-3 * lr for gap in gaps)
        assert torch.cat([gap.flatten() for gap in gaps]).mean() < 1e-4 * lr


def test_the_runs_that_are_compared_learn_what_they_are_there_for(alone):
    first = {name: rows_of(alone / name)[0] for name in RUNS}
    assert all(row["reward"] > 0 and row["grad_norm"] > 0 for row in first.values())
    assert first["grpo"]["ratio_diff"] > 1e-4 and first["grpo"]["resampled"] > 0
    assert first["vision"]["grad_norm"] > first["rl"]["grad_norm"]  # the tower has its share


def test_a_reward_that_reads_the_text_is_trained_as_it_is_logged_on_any_number_of_ranks(two, alone):
    """The text stays on the rank that sampled it: a reward made anew elsewhere would be lower."""
    for run in (alone / "rl", two[0] / "rl"):
        for row in rows_of(run):
            rollouts = [r for r in rows_of(run, "rollouts.jsonl") if r["step"] == row["step"]]
            rewards, lengths = np.array([(r["reward"], r["length"]) for r in rollouts]).T
            assert len(rewards) == 24 and {0.0, 0.5} < {*rewards}
            assert row["reward"] == pytest.approx(rewards.mean())
            assert row["return_mean"] == pytest.approx(np.average(rewards, weights=lengths))


def test_two_ranks_that_put_responses_aside_lose_none(two, mini, monkeypatch):
    monkeypatch.setattr(data, "permutation", in_order)
    account(two[0] / "tail", mini, rl_config(asdict(mini), two[0] / "tail", **TAIL))
    assert rows_of(two[0] / "tail")[1]["stale_tokens"] > 0


def test_a_rank_killed_in_each_phase_is_started_again_and_the_run_ends_bit_for_bit(two):
    """Rank 0 while sampling and in the sync, rank 1 while learning and saving."""
    killed, whole = two[0] / "killed", two[0] / "rl"
    about = json.loads((killed / "run.json").read_text())
    assert [start["step"] for start in about["resumed"]] == [1] * len(KILLS)
    for file in ("metrics.jsonl", "rollouts.jsonl", "trace.jsonl"):
        assert rows_of(killed, file) == rows_of(whole, file)
    assert not any(gap.any() for gap in gaps_of(killed, whole))


def test_ranks_that_are_done_leave_with_status_0_and_one_of_them_prints(two):
    output = (two[0] / "output.txt").read_text()  # torchrun() saw the status
    assert "rank 0 left" in output and "rank 1 left" in output
    assert output.count("step 1/3 ") == 2  # coldstart, tail
    assert output.count("to resume:") == 1


# ------------------------------------------------------------------ gradients, sums


@pytest.mark.parametrize("ranks, head", [("two", "lm"), ("two", "value"), ("four", "lm")])
def test_several_ranks_give_the_gradient_of_one_with_the_picture_on_one_of_them(
    mini, request, ranks, head
):
    mine, tower = gradients(asdict(mini), ALONE, head), head == "value"
    for result in (results[head] for results in request.getfixturevalue(ranks)[1]):
        assert result["norm"] == pytest.approx(mine["norm"], rel=1e-5)
        for kind, atol in (("gradients", 1e-5), ("weights", 0)):
            torch.testing.assert_close(result[kind], mine[kind], atol=atol, rtol=10 * atol)
        assert {n for n in mine["weights"] if tower or "visual" not in n} == result["sharded"]
    assert any(n.startswith("visual.") for n in mine["gradients"]) == tower


def test_two_nodes_hold_a_copy_of_the_weights_each_and_their_groups_wait_as_long(four):
    for result in four[1]:
        assert result["mesh"] == (2, 2) and result["waits"] == [distributed.TIMEOUT] * 2


def test_sums_and_maxima_are_over_all_ranks_and_problems_are_taken_once(two):
    one, other = (results["small"] for results in two[1])
    for rank, result in enumerate((one, other)):
        assert result["sums"] == (2**53, 2.0)  # counts are exact
        assert result["largest"] == [1, 0, 1] and all(map(math.isnan, result["nan"]))
        running = result["running"]
        assert running == sorted(running) and running[0] >= rank + 1 and running[-1] == 3 + 4
    for mine, theirs in zip(one["problems"], other["problems"], strict=True):
        assert sorted(mine + theirs) == [0, 1, 2, 3, 4] and mine == sorted(mine)


def test_a_blank_picture_changes_no_number_and_gives_the_tower_a_gradient_of_0(mini):
    model = load_model(mini.model)
    picture, text = picture_and_text(asdict(mini))
    assert with_blank_picture(picture) is picture
    for pack in (text, filler_pack()):
        blank = with_blank_picture(pack)
        assert torch.equal(model.logps(pack)[0], model.logps(blank)[0])
        model.zero_grad()
        model.logps(blank)[0].sum().backward()
        assert all((w.grad == 0).all() for w in model.visual.parameters())


# ------------------------------------------------------------------ recomputed, compiled, bfloat16


def trained(model) -> list:
    return [p for p in model.parameters() if p.requires_grad]


def learn(model, pack: Pack) -> torch.Tensor:
    logps, _ = model.logps(pack)
    logps.sum().backward()
    return logps.detach()


class Calls(TorchDispatchMode):
    """Counts the operators that run: attention, products with (addmm) and without a bias (mm)."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator).split(".")[1]
        attention = "attention" in name and "backward" not in name
        self.counts["attention" if attention else name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, attention, qkv", [("selective", 0, 0), ("full", 1, 3)])
def test_recomputation_changes_no_bit_of_the_gradient_and_selective_does_not_repeat_attention(
    mini, kind, attention, qkv
):
    plain, model = (distributed.load(mini.model, ALONE, recompute=k) for k in ("none", kind))
    pack, layers = picture_and_text(asdict(mini))[0], model.config.num_hidden_layers
    with Calls() as once:
        learn(plain, pack)
    with Calls() as again:
        learn(model, pack)
    repeated = again.counts - once.counts
    assert repeated["attention"] == layers * attention and repeated["addmm"] == layers * qkv
    assert repeated["mm"] >= 3 * layers  # the MLPs at least are recomputed
    for a, b in zip(trained(plain), trained(model), strict=True):
        assert torch.equal(a.grad, b.grad)


@needs_compiler
def test_compiled_blocks_give_the_same_numbers_from_one_graph_for_packs_of_any_length(mini):
    """And with recomputation, whose policy sees other operators in compiled code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = dict(recompute="selective")
    plain, model = (distributed.load(mini.model, ALONE, **how, compile=c) for c in (False, True))
    packs = [*picture_and_text(asdict(mini)), filler_pack()]
    assert len({tuple(pack.lengths) for pack in packs}) == 3
    for pack in packs:
        torch.testing.assert_close(learn(plain, pack), learn(model, pack), atol=1e-4, rtol=0)
    for a, b in zip(trained(plain), trained(model), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # before, behind attention


@pytest.fixture
def half():
    """A process group of this process alone, with bfloat16 compute."""
    world = distributed.start("bfloat16")
    yield world
    torch.distributed.destroy_process_group()


def test_bfloat16_computes_over_float32_masters_that_a_small_step_moves(mini, half):
    """A bfloat16 weight of 0.02 does not feel a step of 1e-6: it has 8 bits."""
    model, whole = distributed.load(mini.model, half), load_model(mini.model)
    pack = picture_and_text(asdict(mini))[0]
    logps, wanted = learn(model, pack), learn(whole, pack)
    assert 1e-6 < (logps - wanted).abs().max() < 0.1 and logps.dtype == torch.float32
    with torch.no_grad():  # leaves embedding and head gathered, in bfloat16
        model.logps(pack)
    assert model.lm_head.weight.dtype == torch.bfloat16
    before = {name: weight.clone() for name, weight in distributed.whole_weights(model)}
    assert before["lm_head.weight"].dtype == torch.float32
    theirs = dict(whole.named_parameters())
    for name, weight in model.named_parameters():
        if name.startswith("visual."):
            assert weight.dtype == torch.bfloat16 and not isinstance(weight, DTensor)
            continue
        assert weight.dtype == weight.grad.dtype == torch.float32, name
        grads = weight.grad.full_tensor().flatten(), theirs[name].grad.flatten()
        assert torch.cosine_similarity(*grads, dim=0) > 0.99, name
    torch.optim.AdamW(trained(model), lr=1e-6).step()
    after = dict(distributed.whole_weights(model))
    moved = [before[name] != after[name] for name in after if "visual" not in name]
    assert torch.cat([x.flatten() for x in moved]).float().mean() > 0.9


def test_a_tied_head_is_one_weight_after_sharding_a_step_and_saving(mini, half, tmp_path):
    torch.manual_seed(0)
    start = Qwen25VL(replace(read_config(mini.model), tie_word_embeddings=True))
    start.model.embed_tokens.weight.data *= 0.02  # so that every word has some probability
    save_model(start, tmp_path / "tied", like=mini.model)
    model = distributed.load(tmp_path / "tied", half)
    assert model.head_weight is model.model.embed_tokens.weight
    pack = picture_and_text(asdict(mini))[1]
    learn(model, pack)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    checkpoint.export(model, tmp_path / "saved", tmp_path / "tied", torch.float32, "a card")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert "lm_head.weight" not in saved
    changed = saved["model.embed_tokens.weight"] != start.head_weight
    assert changed.any(dim=1).sum() > len(set(pack.ids.tolist()))  # by the head: not looked up
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.head_weight, saved["model.embed_tokens.weight"])


@pytest.mark.parametrize("where, waits", [("cpu", False), ("meta", True)])
def test_weights_and_moments_of_a_model_that_waits_lie_where_they_are_sent(mini, where, waits):
    """meta stands for another device. AdamW's count of steps goes as well."""
    model = distributed.load(mini.model, ALONE)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=True)
    learn(model, picture_and_text(asdict(mini))[0])
    optimizer.step()
    distributed.move(model, optimizer, where, for_moments="meta")
    moments = [x for state in optimizer.state.values() for x in state.values()]
    assert moments and all(x.is_meta for x in moments)
    assert all(w.is_meta == waits and w.grad is None for w in model.parameters())


def test_a_rehearsal_leaves_nothing_behind_and_says_what_to_do_where_memory_is_short(
    mini, monkeypatch, capsys
):
    """That it changes no number of a run is proven by one, in test_rl.py."""
    model = distributed.load(mini.model, ALONE, "value")
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    distributed.rehearse(model, optimizer, full_pack(64), ALONE)
    assert re.search(r"a pack of 64 tokens: [\d.]+ GB", capsys.readouterr().out)
    assert not optimizer.state and all(w.grad is None for w in trained(model))

    def full(*given, **more):
        raise torch.OutOfMemoryError("tried to allocate 9.28 GiB")

    monkeypatch.setattr(distributed, "backward", full)
    with pytest.raises(RuntimeError, match="a pack of 64 tokens .*9.28 GiB.*--recompute full"):
        distributed.rehearse(model, optimizer, full_pack(64), ALONE)


# ------------------------------------------------------------------ what is refused


TWO = {"WORLD_SIZE": "2", "RANK": "0"}
UNEVEN = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
RESTARTS = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    "environment, cure",
    [
        (TWO, "WORLD_SIZE is 2, .* start with torchrun --nproc-per-node 2, or unset WORLD"),
        (TWO | RESTARTS | {"MASTER_ADDR": "x"}, "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        (TWO | {"RANK": "5", "MASTER_ADDR": "x"}, "start with torchrun --nproc-per-node 2"),
        (UNEVEN, "WORLD_SIZE is 3, .* 2 ranks run on this node: each node must have as many"),
    ],
)
def test_ranks_that_would_never_meet_are_refused(monkeypatch, environment, cure):
    """Most of them waited for ever."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=cure):
        distributed.start()


def test_more_ranks_than_problems_is_an_error_that_says_so(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "start", lambda *arguments: replace(ALONE, size=9))
    with pytest.raises(ValueError, match="problems 6 < 9 ranks"):
        rl.main(rl_config(asdict(mini), tmp_path))


if __name__ == "__main__":
    worker(sys.argv[1], Path(sys.argv[2]))
