"""parallel.py: two and four gloo processes give the numbers of one, wherever the pictures lie.

    pytest tests/test_parallel.py       # starts itself under torchrun, three times

The second start trains the vision tower, so that its blocks are sharded, with all pictures on one
rank: a rank that left the tower out would leave the other one waiting for ever. The third has four
ranks in two groups that hold a copy of the weights each, as two nodes would.
"""

import faulthandler
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finished
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import coldstart
import rl
from common import checkpoint as checkpoints
from common import data
from common import distributed as parallel
from model import Qwen25VL, load_model, read_config, save_model

ROOT = Path(__file__).resolve().parents[1]
ALONE = parallel.World(0, 1, torch.device("cpu"))
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to kill by")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++")
LIMIT = 300  # seconds; a start takes about 12, and ten times that on a busy machine


FEW = dict(problems=4, samples=2, steps=1)  # two responses for each of the critic's steps


def coldstart_config(mini: dict, out, **changed) -> coldstart.Config:
    small = dict(model=mini["model"], data=mini["sft"], replay=mini["replay"], out=str(out))
    small |= dict(epochs=0.5, batch=7, valid=8, valid_every=1, pack_tokens=300, max_tokens=300)
    return coldstart.Config(**small | dict(threads=1) | changed)  # 3 steps


def rl_config(mini: dict, out, **changed) -> rl.Config:
    small = dict(model=mini["model"], data=mini["train"], out=str(out), steps=2, problems=6)
    small |= dict(samples=4, lengths=(12,), length_from=(0,), pack_tokens=100, prompt_tokens=64)
    return rl.Config(**small | dict(threads=1, warmup=2, save_every=100) | changed)


def in_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """In place of data.permutation: pictures and text alternate, so each rank has one kind."""
    return np.arange(n)


def stop_in_step(number: int):
    """Ctrl-C in this optimiser step of the process, counted from 1, for the last rank only.

    -> the function to put in place of parallel.clip_gradients.
    """
    clip, calls = parallel.clip_gradients, []
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1)

    def clip_gradients(*arguments):
        calls.append(None)
        if last and len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments)

    return clip_gradients


# ------------------------------------------------------------------ what runs under torchrun


def picture_and_text(mini: dict) -> list[data.Pack]:
    """One pack of a problem with a picture, one without."""
    tokenizer = data.load_tokenizer(mini["model"])
    settings = data.load_image_settings(mini["model"])
    packs = []
    for problem in data.read_problems(mini["train"])[:2]:
        prompt = data.encode_prompt(problem.prompt, problem.images, tokenizer, settings)
        packs += data.pack([data.Document(prompt, [20, 30, 2])], 100)
    return packs


def gradients(mini: dict, world, train_vision: bool, head: str) -> dict:
    """Of the summed output over both packs: rank r has the r-th, one process has both."""
    torch.manual_seed(0)
    model = parallel.load(mini["model"], world, head, train_vision)
    packs = picture_and_text(mini)[world.rank :: world.size] or [data.filler_pack()]
    if train_vision:
        packs = [data.with_blank_picture(pack) for pack in packs]
    with torch.no_grad():  # as judge() does before the critic learns
        for pack in packs:
            model(**pack.inputs, rows=pack.rows)
    for pack in packs:
        targets = {"targets": pack.targets} if head == "lm" else {}
        out = model(**pack.inputs, rows=pack.rows, **targets)
        out = out[0] if head == "lm" else out
        parallel.backward(model, out.sum(), world, last=True)
    norm = parallel.clip_gradients(model, 1e9)
    whole = {}
    for name, weight in model.named_parameters():
        if (grad := weight.grad) is not None:
            whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    weights = {name: weight.clone() for name, weight in parallel.whole_weights(model)}
    sharded = {name: isinstance(p, DTensor) for name, p in model.named_parameters()}
    return {"gradients": whole, "norm": norm, "weights": weights, "sharded": sharded}


def small_things(world) -> dict:
    r = world.rank
    dealt = [list(parallel.turns(world, 5, key, dynamic=True)) for key in ("a", "b")]
    return {
        "union": parallel.union(world, {r: "x" * r}),
        "turns": list(parallel.turns(world, 5, "static", dynamic=False)),
        "dealt": dealt,
        "sums": parallel.sums(world, 2**53 - 1 if r else 1, 0.5 + r, 3),
        "largest": [parallel.largest(world, x) for x in (r, -r, 0.25 * (1 - r), bool(r))],
        "means": parallel.means(
            world, {"a": (3.0 + r, 2), "one": (5.0 * r, r), "nobody": (0.0, 0)}
        ),
    }


def taken(world) -> dict:
    """What put() gives this rank of tensors that its ranks cannot share evenly, and the whole."""
    found = {}
    for shape in ((1, 5), (3, 4), (7, 2), (8,)):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.zeros(shape))
        fully_shard(module, mesh=world.mesh)
        parallel.put(module.weight, torch.arange(math.prod(shape)).view(shape) + 1.0)
        found[shape] = module.weight.to_local().detach(), module.weight.full_tensor().detach()
    return found


def worker(job: str, folder: Path):
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    mini = json.loads((folder / "mini.json").read_text())
    world, finish = parallel.start(1), parallel.finish
    parallel.finish = lambda world: None  # the next run uses the group again
    data.permutation = in_order
    if job == "frozen":
        found = {"small": small_things(world)}
        found["lm"] = gradients(mini, world, False, "lm")
        coldstart.main(coldstart_config(mini, folder / "coldstart"))
        rl.main(rl_config(mini, folder / "rl"))
        rl.main(rl_config(mini, folder / "grpo", algorithm="grpo"))
        parallel.clip_gradients = stop_in_step(1)
        coldstart.main(coldstart_config(mini, folder / "moved"))  # step 1; one process did step 0
    elif job == "hybrid":
        world = parallel.start(1, shard_ranks=2)
        found = {"lm": gradients(mini, world, False, "lm"), "mesh": world.mesh.shape}
        found["taken"] = taken(world)
        two = dict(shard_ranks=2)
        coldstart.main(coldstart_config(mini, folder / "coldstart", recompute="full", **two))
        rl.main(rl_config(mini, folder / "rl", recompute="selective", offload=True, **two))
        rl.main(rl_config(mini, folder / "few", **FEW | two))
    else:
        found = {"value": gradients(mini, world, True, "value")}
        cfg = rl_config(mini, folder / "rl_vision", train_vision=True)
        clip = parallel.clip_gradients
        parallel.clip_gradients = stop_in_step(5)  # four of the critic, one of the policy: step 0
        rl.main(cfg)
        parallel.clip_gradients = clip
        assert not (folder / "rl_vision/model").exists() and checkpoints.claim(cfg.out, cfg)[0] == 1
        rl.main(cfg)
    torch.save(found, folder / f"{job}-{world.rank}.pt")
    world.wait()
    finish(world)
    print(f"rank {world.rank} left")  # into a buffer: leaving must not lose it


# ------------------------------------------------------------------ the tests


def torchrun(ranks: int, job: str, folder: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, job, str(folder)]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return finished(command, folder, ours, LIMIT + 60)  # the ranks end themselves before


def folder_of(tmp_path_factory, name: str, mini) -> Path:
    folder = tmp_path_factory.mktemp(name)
    (folder / "mini.json").write_text(json.dumps(asdict(mini)))
    return folder


@pytest.fixture(scope="module")
def frozen(mini, tmp_path_factory):
    """Folder of the two-process runs with a frozen tower; `moved` was begun by one process."""
    folder = folder_of(tmp_path_factory, "frozen", mini)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "permutation", in_order)
        patch.setattr(parallel, "clip_gradients", stop_in_step(1))
        coldstart.main(coldstart_config(asdict(mini), folder / "moved"))
    (folder / "output.txt").write_text(torchrun(2, "frozen", folder))
    return folder


@pytest.fixture(scope="module")
def sharded(mini, tmp_path_factory):
    """Folder of the two-process runs with a sharded tower."""
    folder = folder_of(tmp_path_factory, "sharded", mini)
    torchrun(2, "sharded", folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(mini, tmp_path_factory):
    """Folder of the runs by four processes: two copies of the weights, each in two halves."""
    folder = folder_of(tmp_path_factory, "hybrid", mini)
    torchrun(4, "hybrid", folder)
    return folder


@pytest.fixture(scope="module")
def alone(mini, tmp_path_factory):
    """Folder of the same runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "permutation", in_order)
        coldstart.main(coldstart_config(asdict(mini), folder / "coldstart"))
        rl.main(rl_config(asdict(mini), folder / "rl"))
        rl.main(rl_config(asdict(mini), folder / "grpo", algorithm="grpo"))
        rl.main(rl_config(asdict(mini), folder / "rl_vision", train_vision=True))
        rl.main(rl_config(asdict(mini), folder / "few", **FEW))
    return folder


def metrics_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "tokens_per_second", "peak_gb")
    return [{k: v for k, v in r.items() if not k.startswith(machine)} for r in rows]


def assert_same_metrics(one: Path, other: Path, names: tuple[str, ...]):
    mine, theirs = metrics_of(one), metrics_of(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and set(names) <= a.keys()
        for name in a.keys() - {"logp_diff_mean", "logp_diff_max", "sampler_kl", "ratio_max"}:
            rel = 5e-6 if name.endswith("grad_norm") else 1e-6  # a norm sums 800,000 squares
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), (a["step"], name)
    for row in mine + theirs:
        assert row.get("logp_diff_max", 0) < 1e-5


def assert_same_weights(one: Path, other: Path, lr: float):
    """Adam's steps have the size of lr whatever the gradient: where that is 0 but for rounding, so
    may be their sign. Hence a look at the typical difference, not the largest."""
    mine, theirs = (load_file(run / "model/model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].shape == theirs[name].shape
        assert (mine[name] - theirs[name]).abs().mean() < 1e-3 * lr, name
    assert sum((mine[n] - theirs[n]).abs().sum() for n in mine) < 1e-4 * lr * sum(
        w.numel() for w in mine.values()
    )


def test_ranks_that_are_done_leave_with_status_0_and_lose_no_line(frozen):
    output = (frozen / "output.txt").read_text()  # torchrun() saw the status
    assert "rank 0 left" in output and "rank 1 left" in output


def test_in_one_cpu_process_every_function_is_the_identity(mini):
    model = load_model(mini.model)
    assert parallel.shard(model, ALONE) is model
    assert parallel.sums(ALONE, 1, 2.5) == (1, 2.5) and parallel.largest(ALONE, 7) == 7
    assert parallel.means(ALONE, {"a": (3, 2), "nobody": (0, 0)}) == {"a": 1.5}
    for (name, weight), (same, own) in zip(
        parallel.whole_weights(model), model.named_parameters(), strict=True
    ):
        assert name == same and weight.data_ptr() == own.data_ptr()


def test_the_norm_is_that_before_clipping(mini):
    model = load_model(mini.model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    count = sum(w.numel() for w in model.parameters())
    assert parallel.clip_gradients(model, 1.0) == pytest.approx(count**0.5, rel=1e-5)
    assert parallel.clip_gradients(model, 1e9) == pytest.approx(1.0, rel=1e-4)


def test_sums_maxima_and_means_are_over_all_ranks_and_counts_are_exact(frozen):
    for rank in (0, 1):
        found = torch.load(frozen / f"frozen-{rank}.pt", weights_only=False)["small"]
        assert found["sums"] == (2**53, 2.0, 6.0)
        assert found["union"] == {0: "", 1: "x"}
        assert found["turns"] == [rank, rank + 2, rank + 4][: 3 - rank]
        assert found["largest"] == [1, 0, 0.25, 1]
        assert found["means"] == {"a": 7 / 4, "one": 5.0}


def test_work_that_is_dealt_out_is_done_once_each_piece(frozen):
    ranks = [torch.load(frozen / f"frozen-{r}.pt", weights_only=False)["small"] for r in (0, 1)]
    for mine, theirs in zip(ranks[0]["dealt"], ranks[1]["dealt"], strict=True):
        assert sorted(mine + theirs) == [0, 1, 2, 3, 4] and mine == sorted(mine)


@pytest.mark.parametrize("job, head, train_vision", [("frozen", "lm", 0), ("sharded", "value", 1)])
def test_two_ranks_give_the_gradient_of_one_process_with_the_picture_on_one_rank(
    mini, request, job, head, train_vision
):
    folder = request.getfixturevalue(job)
    mine = gradients(asdict(mini), ALONE, bool(train_vision), head)
    ranks = [torch.load(folder / f"{job}-{r}.pt", weights_only=False)[head] for r in (0, 1)]
    for found in ranks:
        assert found["norm"] == pytest.approx(mine["norm"], rel=1e-5)
        assert found["gradients"].keys() == mine["gradients"].keys()
        for name, grad in mine["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], grad, atol=1e-5, rtol=1e-4)
        assert found["weights"].keys() == mine["weights"].keys()
        assert all(torch.equal(w, found["weights"][n]) for n, w in mine["weights"].items())
        whole = {name for name, sharded in found["sharded"].items() if not sharded}
        tower = {n for n in found["sharded"] if n.startswith("visual.")}
        assert whole == (set() if train_vision else tower)
    assert any(n.startswith("visual.") for n in mine["gradients"]) == bool(train_vision)


def test_a_blank_picture_changes_no_number_and_gives_the_tower_a_gradient_of_0(mini):
    model = load_model(mini.model)
    picture, text = picture_and_text(asdict(mini))
    assert data.with_blank_picture(picture) is picture
    for pack in (text, data.filler_pack()):
        blank = data.with_blank_picture(pack)
        assert blank.patches is not None and len(blank.slots) == 0
        mine = model(**pack.inputs, rows=pack.rows, targets=pack.targets)[0]
        other = model(**blank.inputs, rows=blank.rows, targets=blank.targets)[0]
        assert torch.equal(mine, other)
        model.zero_grad()
        other.sum().backward()
        assert all((w.grad == 0).all() for w in model.visual.parameters())


def test_the_cold_start_gives_the_numbers_of_one_process(frozen, alone):
    names = ("loss", "grad_norm", "valid_loss", "tokens", "lr", "too_long")
    assert_same_metrics(frozen / "coldstart", alone / "coldstart", names)
    assert_same_weights(frozen / "coldstart", alone / "coldstart", lr=1e-3)
    assert len(metrics_of(alone / "coldstart")) == 3


@pytest.mark.parametrize("run", ["rl", "grpo"])
def test_rl_gives_the_numbers_of_one_process(frozen, alone, run):
    names = ("reward", "policy_loss", "grad_norm", "entropy", "tokens", "length")
    names += ("value_loss", "critic_grad_norm", "explained_variance") if run == "rl" else ()
    assert_same_metrics(frozen / run, alone / run, names)
    assert_same_weights(frozen / run, alone / run, lr=1.5e-4)
    assert metrics_of(alone / run)[0]["reward"] > 0


def test_pictures_on_one_rank_text_on_the_other_do_not_hang_a_sharded_tower(sharded, alone):
    """And Ctrl-C that reaches one rank only stops both: they go on from one checkpoint."""
    names = ("policy_loss", "grad_norm", "value_loss", "critic_grad_norm", "reward_image")
    assert_same_metrics(sharded / "rl_vision", alone / "rl_vision", names)
    assert_same_weights(sharded / "rl_vision", alone / "rl_vision", lr=1.5e-4)
    before = metrics_of(alone / "rl")[0]["grad_norm"]
    assert metrics_of(alone / "rl_vision")[0]["grad_norm"] > before  # the tower's share


def test_four_ranks_with_two_copies_of_the_weights_give_the_gradient_of_one_process(mini, hybrid):
    mine = gradients(asdict(mini), ALONE, False, "lm")
    for rank in range(4):
        found = torch.load(hybrid / f"hybrid-{rank}.pt", weights_only=False)
        assert found["mesh"] == (2, 2)
        # ranks 2 and 3 have no pack of their own in this one: two packs for four ranks
        for name, grad in mine["gradients"].items():
            torch.testing.assert_close(found["lm"]["gradients"][name], grad, atol=1e-5, rtol=1e-4)


def test_each_rank_takes_its_rows_of_a_weight_and_together_they_are_the_whole(hybrid):
    for rank in range(4):
        found = torch.load(hybrid / f"hybrid-{rank}.pt", weights_only=False)["taken"]
        for shape, (own, whole) in found.items():
            wanted = torch.arange(math.prod(shape)).view(shape) + 1.0
            assert torch.equal(whole, wanted)
            rows = -(-shape[0] // 2) * (rank % 2)  # two copies, each in two halves
            assert torch.equal(own, wanted[rows : rows + -(-shape[0] // 2)])


def test_four_ranks_give_the_runs_of_one_process_with_recomputation_and_offload(hybrid, alone):
    """Also with more ranks than packs: those run fillers."""
    assert_same_metrics(hybrid / "coldstart", alone / "coldstart", ("loss", "grad_norm"))
    assert_same_weights(hybrid / "coldstart", alone / "coldstart", lr=1e-3)
    assert_same_metrics(hybrid / "rl", alone / "rl", ("policy_loss", "value_loss", "grad_norm"))
    assert_same_weights(hybrid / "rl", alone / "rl", lr=1.5e-4)


def test_ranks_that_have_nothing_to_train_run_fillers(hybrid, alone):
    """Each step of the critic has two responses for four ranks."""
    assert_same_metrics(hybrid / "few", alone / "few", ("policy_loss", "value_loss", "grad_norm"))
    assert_same_weights(hybrid / "few", alone / "few", lr=1.5e-4)


def test_a_run_moves_between_one_and_two_processes(mini, frozen, alone, monkeypatch):
    """Step 0 by one process, step 1 by two, the rest by one: the state is read by any number."""
    monkeypatch.setattr(data, "permutation", in_order)
    folders = sorted((frozen / "moved/checkpoints").iterdir())
    assert [f.name for f in folders] == ["step_000001", "step_000002"]
    assert (folders[1] / "state").is_dir() and not (frozen / "moved/model").exists()
    coldstart.main(coldstart_config(asdict(mini), frozen / "moved"))
    names = ("loss", "grad_norm", "valid_loss")
    assert_same_metrics(frozen / "moved", alone / "coldstart", names)
    assert_same_weights(frozen / "moved", alone / "coldstart", lr=1e-3)


# ------------------------------------------------------------------ killed


SIX = dict(steps=6, problems=8, samples=8, lengths=(24,), save_every=3)


@pytest.fixture(scope="module")
def six(mini, tmp_path_factory):
    """Folder of six steps without a break, in one process."""
    folder = tmp_path_factory.mktemp("six")
    rl.main(rl_config(asdict(mini), folder, **SIX))
    return folder


def kill_after_checkpoint(command: list[str], cfg: rl.Config):
    """kill -9 of all its processes as soon as the first checkpoint has its name."""
    command = command + [str(ROOT / "rl.py")]
    for name, value in asdict(cfg).items():
        if value != getattr(rl.Config(), name):
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (Path(cfg.out).parent / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        until = time.monotonic() + LIMIT
        while not (Path(cfg.out) / "checkpoints/step_000003/state").exists():
            output.seek(0)
            assert process.poll() is None and time.monotonic() < until, output.read()
            time.sleep(0.01)
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait(60)
    assert not (Path(cfg.out) / "model").exists()


def descendants(pid: int) -> list[int]:
    """torchrun starts each rank in a session of its own."""
    listing = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [d for child in map(int, listing) for d in (child, *descendants(child))]


@needs_proc
def test_six_steps_are_three_and_a_kill_and_three_more_bit_for_bit(mini, six, tmp_path):
    cfg = rl_config(asdict(mini), tmp_path / "run", **SIX)
    kill_after_checkpoint([sys.executable], cfg)
    rl.main(cfg)
    assert metrics_of(tmp_path / "run") == metrics_of(six)
    one, other = (load_file(run / "model/model.safetensors") for run in (tmp_path / "run", six))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@needs_proc
def test_two_processes_that_are_killed_go_on_as_one(mini, six, tmp_path):
    cfg = rl_config(asdict(mini), tmp_path / "run", **SIX)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    kill_after_checkpoint(torchrun, cfg)
    rl.main(cfg)
    assert_same_metrics(tmp_path / "run", six, ("policy_loss", "value_loss", "reward"))
    assert_same_weights(tmp_path / "run", six, lr=1.5e-4)


# ------------------------------------------------------------------ small things


def test_one_line_a_step_is_printed_and_by_one_rank_only(frozen):
    output = (frozen / "output.txt").read_text()
    assert output.count("step 1/3 ") == 2 and output.count("step 0/2 ") == 2
    assert output.count("to resume:") == 1


class Calls(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator).split(".")[1]] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind, attention, qkv", [("none", 1, 1), ("selective", 1, 1), ("full", 2, 2)]
)
def test_recomputation_changes_no_bit_of_the_gradient_and_selective_does_not_repeat_attention(
    mini, kind, attention, qkv
):
    plain, model = (parallel.load(mini.model, ALONE, recompute=k) for k in ("none", kind))
    pack = picture_and_text(asdict(mini))[0]
    for one in (plain, model):
        with Calls() as calls:
            logps, _ = one(**pack.inputs, rows=pack.rows, targets=pack.targets)
            logps.sum().backward()
    layers = model.config.num_hidden_layers
    assert calls.counts["addmm"] - plain_tower(mini, pack)["addmm"] == 3 * layers * qkv
    ran = sum(
        n for name, n in calls.counts.items() if "attention" in name and "backward" not in name
    )
    assert ran - plain_tower(mini, pack)["attention"] == layers * attention
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


@needs_compiler
@pytest.mark.parametrize("kind", parallel.RECOMPUTE)
def test_compiled_blocks_give_the_same_numbers_from_one_graph_for_packs_of_any_length(mini, kind):
    torch._dynamo.reset()
    plain, model = (
        parallel.load(mini.model, ALONE, recompute=kind, compile=c) for c in (False, True)
    )
    torch._dynamo.utils.counters.clear()
    packs = [*picture_and_text(asdict(mini)), data.filler_pack()]
    assert len({tuple(pack.lengths) for pack in packs}) == 3
    for pack in packs:
        found = []
        for one in (plain, model):
            logps, _ = one(**pack.inputs, rows=pack.rows, targets=pack.targets)
            logps.sum().backward()
            found.append(logps)
        torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        same = a.grad is None or (a.grad - b.grad).norm() <= 1e-4 * a.grad.norm()
        assert same and (a.grad is None) == (b.grad is None), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # before, behind attention


@needs_compiler
def test_compiled_blocks_work_in_bfloat16_over_sharded_masters(mini, half):
    plain, model = (parallel.load(mini.model, half, compile=c) for c in (False, True))
    pack = picture_and_text(asdict(mini))[0]
    found = []
    for one in (plain, model):
        logps, _ = one(**pack.inputs, rows=pack.rows, targets=pack.targets)
        parallel.backward(one, logps.sum(), half, last=True)
        gradients = (w.grad.full_tensor().flatten() for w in one.parameters() if w.grad is not None)
        found.append((logps.detach(), torch.cat([*gradients])))
    assert (found[0][0] - found[1][0]).abs().mean() < 0.01  # bfloat16, rounded in other places
    assert torch.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999


def plain_tower(mini, pack) -> Counter:
    """Operators of the vision tower alone, which does not train here."""
    tower = load_model(mini.model).visual.requires_grad_(False)
    with Calls() as calls:
        tower(pack.patches, pack.grids)
    return Counter(
        addmm=calls.counts["addmm"],
        attention=sum(n for name, n in calls.counts.items() if "attention" in name),
    )


@pytest.fixture
def half():
    """A process group of this process alone, with bfloat16 compute."""
    world = parallel.start(1, "bfloat16")
    yield world
    torch.distributed.destroy_process_group()


def test_bfloat16_computes_over_float32_masters_that_a_small_step_moves(mini, half):
    """A bfloat16 weight of 0.02 does not feel a step of 1e-6: it has 8 bits."""
    model, whole = parallel.load(mini.model, half), load_model(mini.model)
    pack = picture_and_text(asdict(mini))[0]
    found, wanted = (
        m(**pack.inputs, rows=pack.rows, targets=pack.targets)[0] for m in (model, whole)
    )
    assert 1e-6 < (found - wanted).abs().max() < 0.1 and found.dtype == torch.float32
    parallel.backward(model, found.sum(), half, last=True)
    wanted.sum().backward()
    with torch.no_grad():  # leaves embedding and head gathered, in bfloat16
        model(**pack.inputs, rows=pack.rows)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert dict(parallel.whole_weights(model))["lm_head.weight"].dtype == torch.float32
    theirs = {n: w.grad for n, w in whole.named_parameters() if not n.startswith("visual.")}
    for name, weight in model.named_parameters():
        if name.startswith("visual."):
            assert weight.dtype == torch.bfloat16 and not isinstance(weight, DTensor)
        else:
            assert weight.dtype == weight.grad.dtype == torch.float32, name
            angle = torch.cosine_similarity(
                weight.grad.full_tensor().flatten(), theirs[name].flatten(), dim=0
            )
            assert angle > 0.99, (name, angle)
    before = {n: w.clone() for n, w in parallel.whole_weights(model) if not n.startswith("visual.")}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6).step()
    after = dict(parallel.whole_weights(model))
    moved = torch.cat([(after[n] != w).flatten() for n, w in before.items()]).float().mean()
    cast = torch.cat([(after[n].bfloat16() != w.bfloat16()).flatten() for n, w in before.items()])
    assert moved > 0.9 > 0.1 > cast.float().mean()


def test_a_tied_head_is_one_weight_after_sharding_a_step_and_saving(mini, half, tmp_path):
    config = replace(read_config(mini.model), tie_word_embeddings=True)
    torch.manual_seed(0)
    start = Qwen25VL(config)
    start.model.embed_tokens.weight.data *= 0.02  # so that every word has some probability
    save_model(start, tmp_path / "tied", like=mini.model)
    model = parallel.load(tmp_path / "tied", half)
    assert model.head_weight is model.model.embed_tokens.weight
    pack = picture_and_text(asdict(mini))[1]
    logps, _ = model(**pack.inputs, rows=pack.rows, targets=pack.targets)
    parallel.backward(model, logps.sum(), half, last=True)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    checkpoints.save_whole(model, tmp_path / "saved", tmp_path / "tied", torch.float32, "a card")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert "lm_head.weight" not in saved
    before = load_file(tmp_path / "tied/model.safetensors")["model.embed_tokens.weight"]
    changed = (saved["model.embed_tokens.weight"] != before).any(dim=1)
    assert changed.sum() > len(set(pack.ids.tolist()))  # by the head: rows that are not looked up
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.head_weight, saved["model.embed_tokens.weight"])


def test_settings_of_the_ranks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="shard_ranks 3 does not divide 1 ranks"):
        parallel.start(1, shard_ranks=3)
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16, got fp8"):
        parallel.start(1, "fp8")


def test_an_unknown_kind_of_recomputation_is_refused(mini):
    with pytest.raises(ValueError, match="none, selective, full, got some"):
        parallel.load(mini.model, ALONE, recompute="some")


def test_a_model_that_waits_and_comes_back_goes_on_as_if_it_had_stayed(mini):
    weights = []
    for moves in (False, True):
        model = parallel.load(mini.model, ALONE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for pack in picture_and_text(asdict(mini)):
            model(**pack.inputs, rows=pack.rows, targets=pack.targets)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if moves:
                parallel.move(model, optimizer, "cpu")
        weights.append(dict(model.named_parameters()))
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())


def test_more_ranks_than_problems_is_an_error_that_says_so(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "start", lambda *arguments: replace(ALONE, size=9))
    with pytest.raises(ValueError, match="problems 6 < 9 ranks"):
        rl.main(rl_config(asdict(mini), tmp_path))


def test_a_metric_that_is_not_finite_stops_the_run_and_is_named():
    parallel.refuse_nan(ALONE, 3, {"loss": 0.5}, ["a#1"])
    with pytest.raises(FloatingPointError, match="step 3.*grad_norm.*packs of a#1, b#0"):
        parallel.refuse_nan(ALONE, 3, {"loss": 0.5, "grad_norm": float("nan")}, ["b#0", "a#1"])


if __name__ == "__main__":
    began = time.perf_counter()
    worker(sys.argv[1], Path(sys.argv[2]))
    print(f"{sys.argv[1]} took {time.perf_counter() - began:.1f} s")
