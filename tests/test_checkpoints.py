"""checkpoint.py: whole or ignored, read by any number of ranks, and never in the training's way.

The model is a Qwen2.5-VL of some thousand weights; its gradients are drawn, not computed. What is
killed and several ranks are forked from a process that has imported torch: most of a start.
"""

import itertools
import os
import resource
import shutil
import signal
import sys
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from conftest import finished
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from common import checkpoint, distributed
from common.log import RunLog, read_record
from model import Config, Qwen25VL, VisionConfig, gathered

STEPS = 6  # of the run that is killed


@dataclass(frozen=True)
class Settings:
    """As much of a stage's Config as `resume_or_start` looks at."""

    model: str = "a/b"
    data: str = ""
    algorithm: str = "ppo"
    lr: float = 0.1
    steps: int = 100


def make_pairs(seed: int = 0, decay: float = 0.01, width: int = 32, mesh=None) -> dict:
    """The tower is frozen, and whole on each rank, as in stage 1."""
    torch.manual_seed(seed)
    vision = VisionConfig(1, 16, 24, num_heads=2, out_hidden_size=width, fullatt_block_indexes=(0,))
    sizes = dict(hidden_size=width, intermediate_size=48, num_hidden_layers=2, vocab_size=40)
    heads = dict(num_attention_heads=width // 16, num_key_value_heads=1, mrope_section=(2, 3, 3))
    config, pairs = Config(vision=vision, **sizes, **heads), {}
    for name, head in (("policy", "lm"), ("critic", "value")):
        model = Qwen25VL(config, head)
        model.visual.requires_grad_(False)
        model = distributed.shard(model, distributed.World(0, 1, torch.device("cpu"), mesh=mesh))
        trained = [p for p in model.parameters() if p.requires_grad]
        pairs[name] = model, torch.optim.AdamW(trained, 0.1, weight_decay=decay)
    return pairs


def learn(pairs: dict, step: int):
    """One optimiser step of each model, its gradient drawn from the number of the step."""
    for _, optimizer in pairs.values():
        torch.manual_seed(step)
        for weight in optimizer.param_groups[0]["params"]:
            gradient = torch.randn(weight.shape)
            if isinstance(weight, DTensor):
                gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements)
            weight.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def everything(pairs: dict) -> dict:
    """{name: whole tensor} of weights and moments."""
    tensors = {}
    for name, (model, optimizer) in pairs.items():
        tensors |= {f"{name}/{key}": weight for key, weight in model.state_dict().items()}
        for number, weight in enumerate(optimizer.param_groups[0]["params"]):
            moments = optimizer.state[weight].items()
            tensors |= {f"{name}/{number}/{key}": moment for key, moment in moments}
    return {name: gathered(tensor).clone() for name, tensor in tensors.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saver_of(run: Path, start: int = 0, settings: Settings | None = None, **options):
    """A run directory as a stage begins it, and what saves its checkpoints."""
    RunLog(run, settings or Settings(), 100, distributed.is_main(), start)
    return checkpoint.Saver(run, None, **options)


def saved(run: Path, steps: int, **options) -> dict:
    """A run that stopped after so many steps, with a checkpoint at each. -> its models."""
    pairs, saver = make_pairs(), saver_of(run, **options)
    for step in range(steps):
        learn(pairs, step)
        saver.save(step + 1, pairs, pairs["policy"][0], f"step {step + 1}, half \ud83d")
    return pairs


def read(run: Path, **options) -> tuple[int, dict]:
    """(steps, everything) of the newest checkpoint, loaded into models of another seed."""
    start, state = checkpoint.newest(run)
    pairs = make_pairs(99, **options)
    checkpoint.load_state(state, pairs)
    return start, everything(pairs)


def folders(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------ what runs in other processes


def train(run: Path, kill_at: int = 0):
    """The order of a stage's main()."""
    if kill_at:
        die_at(run, kill_at)
    start, state = checkpoint.resume_or_start(run, Settings())
    assert not list(run.rglob("*.part"))
    pairs = make_pairs()
    if state:
        checkpoint.load_state(state, pairs)
    saver = saver_of(run, start)
    for step in range(start, STEPS):
        learn(pairs, step)
        saver.save(step + 1, pairs, pairs["policy"][0], "card")
    checkpoint.export(pairs["policy"][0], run / "model", None, torch.float32, "card")


def die_at(run: Path, count: int):
    """kill -9 of this process by itself, when it touches files of the run for the n-th time."""
    touches = itertools.count(1)

    def touch(event: str, arguments: tuple):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        changes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(run) in str(arguments[0]) and next(touches) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touch)


def killed_again_and_again(run: Path):
    """Every child lives a bit longer."""
    kills = leftovers = safe = 0
    for count in range(2, 10_000, 4):
        child = mp.get_context("fork").Process(target=train, args=(run, count))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        assert checkpoint.newest(run)[0] >= safe  # what was whole is not lost
        kills, safe = kills + 1, checkpoint.newest(run)[0]
        leftovers += any(run.rglob("*.part"))
    assert kills >= 8 and leftovers >= 4, (kills, leftovers)


def meet(rank: int, job, folder: Path, ranks: int):
    place = f"file://{folder}/meet-{ranks}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=ranks)
    job(folder)
    dist.barrier()
    os._exit(0)


def two_ranks(folder: Path):
    """Reads what one process wrote, goes on, writes; then a disk fails on one rank only."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    pairs, run = make_pairs(1, mesh=mesh), folder / "two"
    policy = pairs["policy"][0]
    checkpoint.load_state(folder / "one/checkpoints/step_000002/state", pairs)
    assert equal(everything(pairs), torch.load(folder / "one.pt"))
    saver = saver_of(run)
    for step in (2, 3):
        learn(pairs, step)
        saver.save(step + 1, pairs, policy, "two ranks")
    after = everything(pairs)
    torch.save(after, folder / "two.pt") if rank == 0 else None
    assert equal(read(run, mesh=mesh)[1], after)

    disk, on = r"failed: rank 1: OSError: \[Errno 27\] File too large", "goes on from step 4$"
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if rank == 1 else hard, hard))  # ulimit -f
    with pytest.raises(OSError, match=f"{disk}.*{on}"):
        saver.save(5, pairs, policy, "never written")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert folders(run) == ["step_000003", "step_000004", "step_000005.part"]
    assert equal(read(run, mesh=mesh)[1], after)
    checkpoint.publish = full_disk  # what rank 0 alone does
    with pytest.raises(OSError, match=rf"step_000005 failed: OSError: \[Errno 28\].*{on}"):
        saver.save(5, pairs, policy, "never written")
    with pytest.raises(OSError, match=r"two/model failed: OSError: \[Errno 28\]"):
        checkpoint.export(policy, run / "model", None, torch.float32, "never written")
    for part in ("read_metadata", "read_data"):  # of a disk that rank 1 alone cannot read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dcp.FileSystemReader, part, full_disk) if rank == 1 else None
            with pytest.raises(OSError, match=r"step_000004/state cannot be read: .*\[Errno 28\]"):
                checkpoint.load_state(run / "checkpoints/step_000004/state", pairs)


def four_ranks(folder: Path):
    """Two replicas of two slices each, as on two nodes: reads what two ranks wrote."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    pairs = make_pairs(3, mesh=mesh)
    checkpoint.load_state(folder / "two/checkpoints/step_000004/state", pairs)
    assert equal(everything(pairs), torch.load(folder / "two.pt"))
    learn(pairs, 4)
    saver_of(folder / "four").save(5, pairs, pairs["policy"][0], "four ranks")
    after = everything(pairs)
    torch.save(after, folder / "four.pt") if dist.get_rank() == 0 else None


def started(job: str, folder: Path):
    """This file as a program."""
    finished([sys.executable, __file__, job, str(folder)], folder, {"OMP_NUM_THREADS": "1"}, 900)


# ------------------------------------------------------------------ killed, full, broken


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole)
    started("killed", tmp_path)
    (one, ours), (other, theirs) = read(whole), read(cut)
    assert one == other == STEPS and equal(ours, theirs)
    assert equal(*(load_file(run / "model/model.safetensors") for run in (whole, cut)))


@pytest.mark.parametrize(
    "name, harm, cause",
    [
        (".metadata", Path.unlink, "No such file"),
        ("__0_0.distcp", Path.unlink, "No such file"),
        ("__0_0.distcp", lambda file: file.write_bytes(bytes(file.stat().st_size)), r"\w+Error"),
        ("", lambda folder: None, "ValueError: Size mismatch"),  # of another model
    ],
)
def test_a_checkpoint_that_is_broken_or_of_another_model_is_named_and_not_skipped(
    tmp_path, name, harm, cause
):
    saved(tmp_path, 2)
    start, state = checkpoint.resume_or_start(tmp_path, Settings())
    assert start == 2
    harm(state / name)
    words = f"(?s)step_000002/state cannot be read: .*{cause}.*choose another --out; else remove"
    with pytest.raises(OSError, match=words):
        checkpoint.load_state(state, make_pairs(width=32 if name else 64))
    shutil.rmtree(state.parent)
    assert checkpoint.resume_or_start(tmp_path, Settings())[0] == 1


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: os.truncate(file, 99)])
def test_a_state_whose_files_are_not_all_seen_gets_no_name(tmp_path, monkeypatch, harm):
    """As where each node writes to a disk of its own."""
    save = checkpoint.save_weights  # is called when the state has been written

    def save_weights(*arguments):
        harm(next(tmp_path.rglob("*.distcp")))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    with pytest.raises(OSError, match="step_000001 failed: .*missing or cut.*one directory"):
        saved(tmp_path, 1)
    assert checkpoint.newest(tmp_path) == (0, None)


@pytest.mark.parametrize("limit", [10_000, 40_000])  # at 40,000 torch hid it: unexpected pos 704
def test_a_disk_that_is_full_is_named_wherever_in_a_file_it_is(tmp_path, limit):
    pairs, saver = make_pairs(), saver_of(tmp_path)
    learn(pairs, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # ulimit -f
    try:
        with pytest.raises(OSError, match=r"OSError: \[Errno 27\] File too large.*from step 0$"):
            saver.save(1, pairs, pairs["policy"][0], "never written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_exports_the_policy_in_its_type_with_its_card(tmp_path):
    policy = saved(tmp_path, 1, dtype=torch.bfloat16)["policy"][0]
    model = tmp_path / "checkpoints/step_000001/model"
    weights = {n: p.detach().bfloat16() for n, p in policy.named_parameters()}
    assert equal(load_file(model / "model.safetensors"), weights)
    assert (model / "README.md").read_text() == "step 1, half \\ud83d"


@pytest.mark.parametrize("keep_every, models", [(1, [1, 2, 3, 4, 5]), (0, [4, 5]), (3, [3, 4, 5])])
def test_two_states_are_kept_and_models_at_the_steps_that_were_asked_for(
    tmp_path, keep_every, models
):
    pairs = saved(tmp_path, 5, keep_every=keep_every)
    kept = [int(f.parent.name[5:]) for f in tmp_path.glob("checkpoints/*/model")]
    assert sorted(kept) == models and len(folders(tmp_path)) == len(models)
    again = checkpoint.Saver(tmp_path, None)  # somebody went back, and the run comes by again
    again.save(3, pairs, pairs["policy"][0], "again")
    assert (tmp_path / "checkpoints/step_000003/model/README.md").read_text() == "again"
    assert checkpoint.complete_steps(tmp_path) == [4, 5]


def test_a_checkpoint_is_due_by_steps_or_by_rank_0s_minutes(tmp_path, monkeypatch):
    now, pairs = [1000.0], make_pairs()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "everyone", lambda mine: [mine, 0.0])
    saver = checkpoint.Saver(tmp_path, None)

    def due(step: int, every: int, minutes: float) -> bool:
        return saver.due(step, SimpleNamespace(save_every=every, save_minutes=minutes))

    assert due(5, 5, 0) and not due(6, 5, 0) and not due(6, 5, 2)
    now[0] += 120
    assert due(6, 5, 2) and due(6, 0, 2) and not due(6, 0, 3)
    saver.save(6, pairs, pairs["policy"][0], "")
    assert not due(7, 5, 2)


def test_a_directory_that_a_kill_left_half_removed_is_ignored_and_goes(tmp_path, monkeypatch):
    saved(tmp_path, 3)
    (tmp_path / "run.json.part").write_text("{")  # a file, and no directory
    for half in ("step_000002", "step_000003/state"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(checkpoint.shutil, "rmtree", full_disk)
            checkpoint.remove(tmp_path / "checkpoints" / half)
    assert checkpoint.resume_or_start(tmp_path, Settings()) == (0, None)
    assert folders(tmp_path) == ["step_000001", "step_000003"]
    assert not list(tmp_path.rglob("*.part"))


# ------------------------------------------------------------------ changed settings


def test_changed_settings_are_printed_recorded_and_in_effect(tmp_path, capsys):
    saved(tmp_path, 2)
    newer = make_dataclass("Newer", [("gain", float, 1.0)], bases=(Settings,), frozen=True)
    changes = ["lr 0.1 -> 0.5", "steps 100 -> 20", "gain None -> 1.0"], ["lr 0.5 -> 0.2"]
    for lr, changed in zip((0.5, 0.2), changes, strict=True):
        settings = newer(model="a/./c/../b/", lr=lr, steps=20)  # the same place by another path
        assert checkpoint.resume_or_start(tmp_path, settings)[0] == 2
        assert [line.strip() for line in capsys.readouterr().out.splitlines()[1:]] == changed
        RunLog(tmp_path, settings, 20, start=2)
    about = read_record(tmp_path)
    assert [(x["step"], x["changed"]) for x in about["resumed"]] == [(2, x) for x in changes]
    assert about["config"]["lr"] == 0.2
    pairs = make_pairs(decay=0.3)
    checkpoint.load_state(checkpoint.newest(tmp_path)[1], pairs)
    assert all(o.param_groups[0]["weight_decay"] == 0.3 for _, o in pairs.values())


def test_what_does_not_fit_refuses_and_says_what_to_do(tmp_path):
    rows, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text("{}\n")
    saved(run, 2, settings=Settings(data=str(rows)))
    moved = Settings(data=str(rows.rename(tmp_path / "moved.jsonl")))
    assert checkpoint.resume_or_start(run, moved)[0] == 2
    for name, value in {"algorithm": "grpo", "steps": 1, "data": str(run / "run.json")}.items():
        with pytest.raises(FileExistsError, match=f"run cannot go on: .*{name}.*another --out"):
            checkpoint.resume_or_start(run, replace(moved, **{name: value}))
    (run / "model").mkdir()
    with pytest.raises(FileExistsError, match="finished run.*choose another --out"):
        checkpoint.resume_or_start(run, moved)
    (run / "model").rmdir()
    for damaged in ('{"config": ', "{}"):
        (run / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match="run.json is damaged .*choose another --out"):
            checkpoint.resume_or_start(run, moved)


@pytest.mark.parametrize("steps", [0, 1])
def test_what_was_sampled_after_the_checkpoint_is_read_again_only_if_nothing_has_changed(
    tmp_path, steps
):
    """What was sampled before it stays: some of it may have to go on."""
    saved(tmp_path, steps)
    (tmp_path / "rollouts").mkdir()
    for step in range(3):
        (tmp_path / f"rollouts/step_{step:06}.npz").touch()
    for changed, stays in ({"steps": 99}, 3), ({"lr": 0.5}, steps):
        assert checkpoint.resume_or_start(tmp_path, Settings(**changed))[0] == steps
        names = sorted(file.name for file in (tmp_path / "rollouts").iterdir())
        assert names == [f"step_{step:06}.npz" for step in range(stays)]


# ------------------------------------------------------------------ several ranks


def test_a_state_moves_between_one_two_and_four_ranks_and_an_error_of_one_stops_all(tmp_path):
    torch.save(everything(saved(tmp_path / "one", 2)), tmp_path / "one.pt")
    started("ranks", tmp_path)
    names = make_pairs()["policy"][0].state_dict()
    for name, step in (("two", 4), ("four", 5)):
        start, alone = read(tmp_path / name)
        assert start == step and equal(alone, torch.load(tmp_path / f"{name}.pt"))
        folder = tmp_path / name / f"checkpoints/step_{step:06}/model"
        policy = {n: alone[f"policy/{n}"] for n in names}
        assert equal(load_file(folder / "model.safetensors"), policy)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        killed_again_and_again(Path(sys.argv[2]) / "cut")
    for job, ranks in ((two_ranks, 2), (four_ranks, 4)) if sys.argv[1] == "ranks" else ():
        mp.start_processes(meet, (job, Path(sys.argv[2]), ranks), ranks, start_method="fork")
