"""checkpoints.py: whole or ignored, read by any number of ranks, and never in the training's way.

    pytest tests/test_checkpoints.py     # starts itself alone, and under torchrun on 2 and 4 ranks

The model is a Qwen2.5-VL of some thousand weights; its gradients are drawn, not computed.
"""

import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from common import checkpoint as checkpoints
from common import provenance
from model import Config, Qwen25VL, VisionConfig

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds; a start takes about 10


@dataclass(frozen=True)
class Settings:
    """As much of a stage's Config as `claim` looks at."""

    out: str
    lr: float = 0.1
    steps: int = 100
    save_every: int = 1


def tiny(head: str = "lm", width: int = 32, mesh=None) -> Qwen25VL:
    """The tower is frozen, and whole on each rank, as in stage 1."""
    vision = VisionConfig(1, 16, 24, num_heads=2, out_hidden_size=width, fullatt_block_indexes=(0,))
    sizes = dict(hidden_size=width, intermediate_size=48, num_hidden_layers=2, vocab_size=40)
    heads = dict(num_attention_heads=width // 16, num_key_value_heads=1, mrope_section=(2, 3, 3))
    model = Qwen25VL(Config(vision=vision, **sizes, **heads), head)
    for weight in model.visual.parameters():
        weight.requires_grad_(False)
    if mesh is not None:
        frozen = set(model.visual.parameters())
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=frozen)
    return model


def make_pairs(seed: int = 0, names=("policy", "critic"), **options) -> dict:
    torch.manual_seed(seed)
    pairs = {}
    for name in names:
        model = tiny("lm" if name == "policy" else "value", **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        pairs[name] = (model, torch.optim.AdamW(trained, 0.1, fused=True))
    return pairs


def learn(pairs: dict, step: int):
    """One optimiser step of each model, its gradient drawn from the number of the step."""
    for model, optimizer in pairs.values():
        torch.manual_seed(step)
        for weight in (p for p in model.parameters() if p.requires_grad):
            grad = torch.randn(weight.shape)
            if isinstance(weight, DTensor):
                grad = distribute_tensor(grad, weight.device_mesh, weight.placements)
            weight.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def everything(pairs: dict) -> dict:
    """{name: whole tensor or number}, of weights, moments and settings of the optimisers."""
    found = {}

    def walk(name: str, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[name] = whole.detach().clone()
        else:
            found[name] = value

    walk("", checkpoints.train_state(pairs))
    return found


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys() and len(one) > 60
    return all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def begin(run: Path, **options) -> checkpoints.Saver:
    """A run directory as RunLog leaves it, and a saver for it."""
    run.mkdir(parents=True, exist_ok=True)
    about = {"config": asdict(Settings(str(run)))}
    (run / "run.json").write_text(json.dumps(about))
    return checkpoints.Saver(run, None, **options)


def saved(run: Path, steps: int, pairs: dict | None = None, **options) -> dict:
    """A run that stopped after so many steps, with a checkpoint at each. -> its models."""
    saver, pairs = begin(run, **options), pairs or make_pairs()
    for step in range(steps):
        learn(pairs, step)
        saver.save(step + 1, pairs, pairs["policy"][0], f"step {step + 1}")
    saver.settle(wait=True)
    return pairs


def folders(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------ what runs in other processes


def train(run: Path, steps: int):
    """The order of a stage's main(). RUN/journal: where each start began, and what was safe."""
    start, state = checkpoints.claim(run, Settings(str(run)))
    assert not list(run.rglob("*.part"))
    pairs = make_pairs()
    if state:
        checkpoints.load_state(state, pairs)
    with begin(run) as saver, (run / "journal").open("a") as journal:
        print("start", start, file=journal, flush=True)
        for step in range(start, steps):
            learn(pairs, step)
            saver.settle()
            saver.save(step + 1, pairs, pairs["policy"][0], "card")
            print("safe", step, file=journal, flush=True)  # it waited for the one before
    checkpoints.save_whole(pairs["policy"][0], run / "model", None, torch.float32, "card")


def killed_again_and_again(run: Path, steps: int):
    """Forks, since torch's import is most of a start; kills the child at any moment of its life."""
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(0.01), fsync(file))  # a slow disk
    rng, longest, leftovers, kills = random.Random(0), 1.2, 0, 0
    while True:
        if (child := os.fork()) == 0:
            try:
                train(run, steps)
                os._exit(0)
            finally:
                faulthandler.dump_traceback()
                os._exit(1)
        deadline = time.monotonic() + rng.uniform(0, longest)
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        if ended != (0, 0):
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills, longest = kills + 1, longest * 1.05  # so that it ends on the slowest machine
        leftovers += any(run.rglob("*.part"))
    assert ended[1] == 0, ended
    print(json.dumps({"kills": kills, "leftovers": leftovers}))


def two_ranks(folder: Path):
    """Reads what one process wrote, goes on, writes; then a disk fails on one rank only."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    pairs = make_pairs(1, mesh=mesh)
    policy = pairs["policy"][0]
    assert isinstance(policy.model.norm.weight, DTensor)
    assert not isinstance(next(policy.visual.parameters()), DTensor)
    checkpoints.load_state(folder / "one/checkpoints/step_000002/state", pairs)
    torch.save(everything(pairs), folder / f"two-read-{rank}.pt")
    run = folder / "two"
    saver = begin(run)
    for step in (2, 3):
        learn(pairs, step)
        saver.save(step + 1, pairs, policy, "two ranks")
        while saver.writing is not None:  # the training's collectives run beside the writer's
            dist.all_reduce(torch.ones(1000))
            saver.settle()
    if rank == 0:
        torch.save(folders(run), folder / "two-folders.pt")
    after = everything(pairs)
    torch.save(after, folder / f"two-wrote-{rank}.pt")
    again = make_pairs(2, mesh=mesh)
    checkpoints.load_state(folder / "two/checkpoints/step_000004/state", again)
    assert same(everything(again), after)

    def full(file):
        raise OSError(28, "No space left on device")

    fsync, write_model, errors = os.fsync, checkpoints.write_model, []
    for broken in ("state", "model"):  # the last rank's slices; what rank 0 alone writes
        if rank == 1 and broken == "state":
            os.fsync = full
        if rank == 0 and broken == "model":
            checkpoints.write_model = full_disk
        learn(pairs, 4)
        saver.save(5, pairs, policy, "never written")
        try:
            while saver.writing is not None:
                saver.settle()
        except OSError as error:
            errors.append(str(error))
        os.fsync = fsync
    try:
        checkpoints.save_whole(policy, run / "model", None, torch.float32, "never written")
    except OSError as error:
        errors.append(str(error))
    checkpoints.write_model = write_model
    torch.save(errors, folder / f"two-errors-{rank}.pt")
    broken = run / "checkpoints/step_000004/state/__1_0.distcp"
    if rank == 0:
        broken.rename(folder / "away")
    dist.barrier()
    try:
        checkpoints.load_state(broken.parent, pairs)
    except OSError as error:
        torch.save(str(error), folder / f"two-broken-{rank}.pt")
    dist.barrier()
    if rank == 0:
        (folder / "away").rename(broken)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def four_ranks(folder: Path):
    """Two replicas of two slices each, as on two nodes: reads what two ranks wrote."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    pairs = make_pairs(3, mesh=mesh)
    checkpoints.load_state(folder / "two/checkpoints/step_000004/state", pairs)
    torch.save(everything(pairs), folder / f"four-read-{dist.get_rank()}.pt")
    learn(pairs, 4)
    saver = begin(folder / "four")
    saver.save(5, pairs, pairs["policy"][0], "four ranks")
    saver.settle(wait=True)
    torch.save(everything(pairs), folder / f"four-wrote-{dist.get_rank()}.pt")


def started(*arguments, ranks: int = 0) -> str:
    """This file as a program, under torchrun where it has ranks. -> what it prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(torchrun if ranks else []), __file__, *map(str, arguments)]
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=os.environ | ours, capture_output=True, text=True, timeout=LIMIT + 60
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


# ------------------------------------------------------------------ killed, full, broken


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    steps = 12
    train(tmp_path / "whole", steps)
    told = json.loads(started("killed", tmp_path / "cut", steps))
    assert told["kills"] >= 4 and told["leftovers"] >= 2, told
    one, other = make_pairs(5), make_pairs(6)
    for run, pairs in (("whole", one), ("cut", other)):
        checkpoints.load_state(checkpoints.newest(tmp_path / run)[1], pairs)
        assert checkpoints.newest(tmp_path / run)[0] == steps
    assert same(everything(one), everything(other))
    one, other = (load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    safe = 0
    for line in (tmp_path / "cut/journal").read_text().splitlines():
        word, step = line.split()
        assert word == "safe" or int(step) >= safe  # nothing that was safe is lost
        safe = max(safe, int(step))


@pytest.fixture
def small_disk(tmp_path):
    """A directory with room for one checkpoint and a half."""
    saved(tmp_path / "measured", 1)
    size = sum(f.stat().st_size for f in (tmp_path / "measured").rglob("*") if f.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a disk of its own")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fills_the_disk(run: Path):
    pairs = saved(run, 1)
    before, saver = everything(pairs), begin(run)
    learn(pairs, 1)
    saver.save(2, pairs, pairs["policy"][0], "card")
    with pytest.raises(OSError, match="step_000002 failed.*goes on from step 1") as error:
        saver.settle(wait=True)
    assert checkpoints.newest(run)[0] == 1 and "step_000002.part" in folders(run)
    start, state = checkpoints.claim(run, Settings(str(run)))
    again = make_pairs(4)
    checkpoints.load_state(state, again)
    assert start == 1 and same(everything(again), before) and folders(run) == ["step_000001"]
    return str(error.value)


def test_a_full_disk_is_told_and_the_checkpoint_before_is_as_it_was(small_disk):
    assert "No space left" in fills_the_disk(small_disk / "run")


def test_a_disk_that_takes_the_state_but_not_the_model_is_told(tmp_path, monkeypatch):
    """And a rank 0 that fails at the end of a run says which directory it was."""
    pairs = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "save_weights", full_disk)
    saver = checkpoints.Saver(tmp_path, None)
    saver.save(2, pairs, pairs["policy"][0], "card")
    with pytest.raises(OSError, match="step_000002 failed: OSError.*No space left"):
        saver.settle(wait=True)
    assert checkpoints.newest(tmp_path)[0] == 1
    with pytest.raises(OSError, match="model failed: OSError.*No space left"):
        checkpoints.save_whole(pairs["policy"][0], tmp_path / "model", None, torch.float32, "")
    assert not (tmp_path / "model").exists()


def lose(file: Path):
    file.unlink()


def cut(file: Path):
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    "file, harm, cause",
    [
        (".metadata", lose, r"ValueError: \.metadata: FileNotFoundError"),
        (".metadata", cut, r"ValueError: \.metadata: \w+Error"),
        ("__0_0.distcp", lose, "ValueError: __0_0.distcp is missing"),
        ("__0_0.distcp", cut, r"ValueError: __0_0.distcp has [\d,]+ of [\d,]+ bytes"),
        ("__0_0.distcp", overwrite, "rank 0: "),
    ],
)
def test_a_broken_checkpoint_is_named_with_its_cause_and_the_one_before(
    tmp_path, file, harm, cause
):
    saved(tmp_path, 3)
    start, state = checkpoints.claim(tmp_path, Settings(str(tmp_path)))
    assert start == 3  # not skipped
    harm(state / file)
    with pytest.raises(OSError, match=f"step_000003/state cannot be read: {cause}") as error:
        checkpoints.load_state(state, make_pairs())
    assert str(error.value).endswith("step_000003 the run goes on from step 2: remove it")
    state.parent.rename(tmp_path / "removed")
    assert checkpoints.claim(tmp_path, Settings(str(tmp_path)))[0] == 2


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved(tmp_path / "both", 1)
    state = checkpoints.newest(tmp_path / "both")[1]
    wide, alone = make_pairs(width=64), make_pairs(names=("policy",))
    with pytest.raises(OSError, match="Size mismatch.*only one"):
        checkpoints.load_state(state, wide)
    with pytest.raises(OSError, match=r"entries that this run has not, such as critic\."):
        checkpoints.load_state(state, alone)
    saved(tmp_path / "alone", 1, alone)
    with pytest.raises(OSError, match=r"Missing key.*critic\."):
        checkpoints.load_state(checkpoints.newest(tmp_path / "alone")[1], make_pairs())


# ------------------------------------------------------------------ beside the training


def test_saving_changes_nothing_of_what_is_trained(tmp_path):
    pairs = make_pairs()
    for step in range(4):
        learn(pairs, step)
    assert same(everything(saved(tmp_path, 4)), everything(pairs))


@pytest.fixture
def held(monkeypatch):
    """The gate that the writer waits at."""
    gate, save = threading.Event(), dcp.save

    def waits(*arguments, **options):
        assert gate.wait(60)
        save(*arguments, **options)

    monkeypatch.setattr(dcp, "save", waits)
    return gate


def test_what_is_written_is_the_moment_of_the_call(tmp_path, held):
    saver, pairs = begin(tmp_path), make_pairs()
    learn(pairs, 0)
    before = everything(pairs)
    weights = {n: p.detach().clone() for n, p in pairs["policy"][0].named_parameters()}
    saver.save(1, pairs, pairs["policy"][0], "the card")
    learn(pairs, 1)  # goes on while nothing is on the disk yet
    saver.settle()
    assert checkpoints.newest(tmp_path) == (0, None) and saver.writing is not None
    held.set()
    saver.settle(wait=True)
    again = make_pairs(7)
    start, state = checkpoints.newest(tmp_path)
    checkpoints.load_state(state, again)
    assert start == 1 and same(everything(again), before)
    stored = load_file(state.parent / "model/model.safetensors")
    assert {n.removeprefix("model.") for n in stored} >= {"norm.weight", "embed_tokens.weight"}
    assert torch.equal(stored["model.norm.weight"], weights["model.norm.weight"])
    assert (state.parent / "model/README.md").read_text() == "the card"
    about = json.loads((state.parent / "checkpoint.json").read_text())
    assert about["step"] == 1 and about["ranks"] == 1 and about["time"]


def test_one_checkpoint_is_in_flight_at_most(tmp_path, held):
    saver, pairs = begin(tmp_path), make_pairs()
    threading.Timer(0.3, held.set).start()
    saver.save(1, pairs, pairs["policy"][0], "")
    assert not held.is_set()
    for step in (2, 3):  # a second copy of the state would not fit
        saver.save(step, pairs, pairs["policy"][0], "")
        assert checkpoints.newest(tmp_path)[0] == step - 1
    saver.settle(wait=True)
    assert checkpoints.newest(tmp_path)[0] == 3


def test_leaving_waits_for_what_is_in_flight_and_hides_no_other_error(tmp_path, held):
    pairs = make_pairs()
    threading.Timer(0.3, held.set).start()
    with pytest.raises(FloatingPointError), begin(tmp_path) as saver:
        saver.save(1, pairs, pairs["policy"][0], "")
        raise FloatingPointError
    assert checkpoints.newest(tmp_path)[0] == 1
    with pytest.raises(OSError, match="step_000002 failed"), begin(tmp_path) as saver:
        (tmp_path / "checkpoints/step_000002.part").touch()  # no directory can be made there
        saver.save(2, pairs, pairs["policy"][0], "")


def test_the_export_has_the_dtype_that_was_asked_for(tmp_path):
    saved(tmp_path, 1, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "checkpoints/step_000001/model/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "checkpoints/step_000001/model/config.json").read_text())
    assert "bfloat16" in str(config)


# ------------------------------------------------------------------ kept and claimed


@pytest.mark.parametrize(
    "keep_last, keep_every, states, models",
    [
        (2, 1, [5, 6], [1, 2, 3, 4, 5, 6]),
        (1, 0, [6], [6]),
        (2, 3, [5, 6], [3, 5, 6]),
        (9, 0, [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_newest_are_kept_and_models_at_the_steps_that_were_asked_for(
    tmp_path, keep_last, keep_every, states, models
):
    saved(tmp_path, 6, keep_last=keep_last, keep_every=keep_every)
    found = (tmp_path / "checkpoints").iterdir()
    found = {int(f.name[5:]): {inner.name for inner in f.iterdir()} for f in found}
    assert sorted(found) == models
    assert sorted(step for step, names in found.items() if "state" in names) == states
    assert all("model" in names for names in found.values())
    with pytest.raises(ValueError, match="keep_last 0"):
        checkpoints.Saver(tmp_path, None, keep_last=0)


def test_a_model_whose_state_is_gone_is_written_again(tmp_path):
    """Somebody removed the newest states to go back; the run comes by again."""
    pairs = saved(tmp_path, 3, keep_last=1)
    saver = checkpoints.Saver(tmp_path, None)
    saver.save(2, pairs, pairs["policy"][0], "again")
    saver.settle(wait=True)
    assert (tmp_path / "checkpoints/step_000002/model/README.md").read_text() == "again"
    assert checkpoints.whole_ones(tmp_path) == [2, 3]


def test_what_a_kill_left_is_ignored_and_removed(tmp_path):
    saved(tmp_path, 2)
    left = ["model.part", "checkpoints/step_000003.part/state", "checkpoints/step_000001.old.part"]
    left += ["checkpoints/step_000002/state.old.part"]
    (tmp_path / "run.json.part").write_text("{")  # a file, and no directory
    for name in left:
        (tmp_path / name).mkdir(parents=True)
    assert checkpoints.newest(tmp_path)[0] == 2
    assert checkpoints.claim(tmp_path, Settings(str(tmp_path)))[0] == 2
    assert not list(tmp_path.rglob("*.part")) and folders(tmp_path) == [
        "step_000001",
        "step_000002",
    ]
    assert checkpoints.claim(tmp_path / "new", Settings("")) == (0, None)


def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", full_disk)
        with pytest.raises(OSError, match="step_000002 failed.*goes on from step 2"):
            saved(tmp_path, 2, keep_last=1, keep_every=0)
    assert checkpoints.whole_ones(tmp_path) == [2]
    checkpoints.claim(tmp_path, Settings(str(tmp_path)))
    assert folders(tmp_path) == ["step_000002"]


def test_settings_that_move_no_number_may_change_and_others_may_not(tmp_path):
    saved(tmp_path, 2)
    assert checkpoints.claim(tmp_path, Settings("moved", steps=20, save_every=5))[0] == 2
    with pytest.raises(FileExistsError, match=r"\(lr 0.1 -> 0.5\): choose another --out"):
        checkpoints.claim(tmp_path, Settings(str(tmp_path), lr=0.5))
    with pytest.raises(FileExistsError, match="steps 1, of which 2 are done"):
        checkpoints.claim(tmp_path, Settings(str(tmp_path), steps=1))
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="finished run"):
        checkpoints.claim(tmp_path, Settings(str(tmp_path)))


def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "fingerprint", lambda path: Path(path).read_text())
    saved(tmp_path, 1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("a")
    about = json.loads((tmp_path / "run.json").read_text()) | {"data": {str(rows): "a"}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    assert checkpoints.claim(tmp_path, Settings(str(tmp_path)))[0] == 1
    rows.write_text("b")
    with pytest.raises(FileExistsError, match="rows.jsonl has changed since"):
        checkpoints.claim(tmp_path, Settings(str(tmp_path)))


# ------------------------------------------------------------------ several ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Folder of: one/ by one process, two/ by two ranks from it, four/ by four from that."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(everything(saved(folder / "one", 2)), folder / "one-wrote.pt")
    started("two", folder, ranks=2)
    started("four", folder, ranks=4)
    return folder


def test_a_state_moves_between_one_two_and_two_times_two_ranks(ranks):
    one, two = torch.load(ranks / "one-wrote.pt"), torch.load(ranks / "two-wrote-0.pt")
    for rank in (0, 1):
        assert same(torch.load(ranks / f"two-read-{rank}.pt"), one)
    for rank in range(4):
        assert same(torch.load(ranks / f"four-read-{rank}.pt"), two)
    for name, step in (("two", 4), ("four", 5)):
        start, state = checkpoints.claim(ranks / name, Settings(str(ranks / name)))
        pairs = make_pairs(8)
        checkpoints.load_state(state, pairs)
        wrote = torch.load(ranks / f"{name}-wrote-0.pt")
        assert start == step and same(everything(pairs), wrote)
        stored = load_file(state.parent / "model/model.safetensors")
        for weight, tensor in pairs["policy"][0].named_parameters():
            if weight in stored:
                assert torch.equal(stored[weight], tensor), weight
        about = json.loads((state.parent / "checkpoint.json").read_text())
        assert about["ranks"] == {"two": 2, "four": 4}[name]
    assert torch.load(ranks / "two-folders.pt") == ["step_000003", "step_000004"]


def test_an_error_of_one_rank_stops_all_and_says_whose_it_was(ranks):
    for rank in (0, 1):
        state, model, final = torch.load(ranks / f"two-errors-{rank}.pt")
        assert "step_000005 failed: rank 1: OSError: [Errno 28]" in state
        assert "step_000005 failed: OSError: [Errno 28]" in model
        assert state.endswith("goes on from step 4") and model.endswith("goes on from step 4")
        assert "two/model failed: OSError: [Errno 28]" in final
        broken = torch.load(ranks / f"two-broken-{rank}.pt")
        assert "__1_0.distcp is missing" in broken and "goes on from step 3" in broken


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    torch.set_num_threads(1)
    job, place = sys.argv[1], Path(sys.argv[2])
    if job == "killed":
        killed_again_and_again(place, int(sys.argv[3]))
    else:
        dist.init_process_group("gloo")
        {"two": two_ranks, "four": four_ranks}[job](place)
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # as parallel.leave: gloo's threads may abort Python's own clean-up
