"""The only file that knows of more than one device: ranks, FSDP2, sums over ranks, checkpoints.

    world = start()                        # torchrun's ranks, or one process without it
    model = shard(model, world)            # FSDP2 from outside: each block, then the root
    total, = sums(world, tokens)           # before backward: one global denominator
    norm = clip_gradients(model, 1.0)
    save_checkpoint(run, step, ...)        # under its name only when complete

With one CPU process every function here is the identity, so a laptop runs the plain model and a
reader may skip the file. With several, each rank holds a slice of every weight, gathers a block's
weights when the block runs, and gets its slice of the summed gradient. Gradients are *summed* over
ranks: the losses are already divided by the global token count, so the result does not depend on
the number of ranks.

Frozen weights (the vision tower in stage 1) are left whole on every rank: no gather that could hang
when one rank has pictures and another has none. On GPUs: bf16 compute, float32 masters and gradient
sums.

    torchrun --nproc-per-node 2 rl.py      # two gloo ranks on a CPU; nccl where there are GPUs
"""

import atexit
import dataclasses
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Qwen25VL, save_weights

# One process saves and loads alone here, and means to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self):
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


def start(threads: int = 0) -> World:
    """Joins torchrun's process group (`cpu:gloo,cuda:nccl`); without torchrun, a world of one.

    threads: CPU threads a process; 0 shares the cores out evenly.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # torchrun sets OMP_NUM_THREADS=1 for more than one process; one alone would then leave cores
    # idle
    torch.set_num_threads(threads or max(1, cores() // here))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return World(rank, size, device)


def cores() -> int:
    """CPU cores that this process may use (macOS knows no affinity)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait():
    if dist.is_initialized():
        dist.barrier()


def finish(world: World):
    """Leaves the group when all ranks are done. Several then skip Python's own clean-up at exit:
    FSDP still holds the group, and a gloo thread that lets go of a tensor during that clean-up
    aborts the process ("terminate called without an active exception"; 2 of 25 runs on busy cores),
    upon which torchrun calls a finished run a failure.
    """
    if world.size > 1:
        world.wait()
        dist.destroy_process_group()
        atexit.register(leave)


def leave():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shard(model: Qwen25VL, world: World) -> Qwen25VL:
    """FSDP2 (`fully_shard`) around each block and the rest. What needs no gradient stays whole.

    The rest (embedding, head, norm, merger) is gathered for the whole forward and backward, so that
    the chunked head reads one gathered weight, not one a chunk.
    """
    if world.size == 1 and world.device.type == "cpu":
        return model
    frozen = {p for p in model.parameters() if not p.requires_grad}
    options = {}
    if world.device.type == "cuda":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    for block in [*model.visual.blocks, *model.model.layers]:
        if not set(block.parameters()) <= frozen:
            fully_shard(block, mesh=mesh, ignored_params=frozen, **options)
    return fully_shard(model, mesh=mesh, ignored_params=frozen, **options)


def sums(world: World, *values: float) -> tuple[float, ...]:
    """Each value summed over the ranks, in float64: counts stay exact."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return tuple(total.tolist())


def largest(world: World, value: float) -> float:
    if world.size == 1:
        return value
    top = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top.item()


def means(world: World, pairs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """{name: (sum, count)} of each rank -> {name: mean over all ranks}; names that nobody
    counted are left out.
    """
    totals = sums(world, *(x for pair in pairs.values() for x in pair))
    by_name = zip(pairs, totals[::2], totals[1::2], strict=True)
    return {name: total / count for name, total, count in by_name if count}


def refuse_nan(step: int, metrics: dict[str, float]):
    """FloatingPointError where a metric is not finite. The metrics are those of all ranks, so all
    stop together, with the last checkpoint as it was."""
    if bad := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        raise FloatingPointError(f"step {step}: {bad}; the newest checkpoint is from before it")


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scales the gradient to at most `limit` in norm, over all shards; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor), one at a time, on every rank: all ranks have to iterate together."""
    for name, weight in model.named_parameters():
        weight = weight.detach()
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


# ------------------------------------------------------------------ checkpoints


def train_state(pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> dict:
    """Models and optimisers by name -> a nested dict that torch.distributed.checkpoint reads and
    writes.
    """
    state = {}
    for name, (model, optimizer) in pairs.items():
        weights, moments = get_state_dict(model, optimizer)
        state[name] = {"model": weights, "optimizer": moments}
    return state


def save_state(directory: Path, pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]):
    """Everything that a resumed run needs. Written beside and renamed: a half-written one is
    never found.
    """
    directory, part = Path(directory), Path(f"{directory}.part")
    dcp.save(train_state(pairs), checkpoint_id=part, no_dist=not dist.is_initialized())
    if is_main():
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    wait()


def load_state(directory: Path, pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]):
    state = train_state(pairs)
    dcp.load(state, checkpoint_id=Path(directory), no_dist=not dist.is_initialized())
    for name, (model, optimizer) in pairs.items():
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state[name]["model"],
            optim_state_dict=state[name]["optimizer"],
        )


def save_checkpoint(run: Path, step: int, pairs: dict, policy: Qwen25VL, like: str | Path):
    """RUN/checkpoints/step_000060/: model/ for average.py and eval.py, state/ to resume from.

    model/ is kept for every step, state/ (6 times as large) for the newest only.
    """
    folder = Path(run) / f"checkpoints/step_{step:06}"
    save_whole(policy, folder / "model", like)
    save_state(folder / "state", pairs)
    if is_main():
        for old in sorted(Path(run).glob("checkpoints/step_*/state")):
            if old.parent != folder:
                shutil.rmtree(old)


def save_whole(policy: Qwen25VL, directory: Path, like: str | Path):
    """The policy as one Hugging Face directory, written by rank 0 from the shards of all.

    Written beside and renamed: a directory under its own name is a complete one.
    """
    directory, part = Path(directory), Path(f"{directory}.part")
    weights = whole_weights(policy)
    if is_main():
        save_weights(weights, policy.config, part, torch.float32, like)
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    else:
        for _ in weights:  # takes part in the gathering
            pass
    wait()


def newest(run: str | Path) -> tuple[int, Path | None]:
    """(next step, state) of the newest complete checkpoint of a run; (0, None) if there is none."""
    found = sorted(Path(run).glob("checkpoints/step_*/state"))
    return (int(found[-1].parent.name[5:]), found[-1]) if found else (0, None)


def claim(run: str | Path, config) -> tuple[int, Path | None]:
    """Where a run begins: (0, None), or the step after its newest checkpoint and that checkpoint.

    Raises FileExistsError where the directory holds a finished run, or an unfinished one of other
    settings: nothing is overwritten, and no run goes on under settings that it did not start with.
    """
    run = Path(run)
    if (run / "model").is_dir():
        raise FileExistsError(f"{run} holds a finished run: choose another --out, or remove it")
    start, state = newest(run)
    if state is None:
        return start, state
    before = json.loads((run / "run.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [f"{k} {before.get(k)!r} -> {now[k]!r}" for k in now if before.get(k) != now[k]]
    if changed:
        raise FileExistsError(
            f"{run} was started with other settings ({'; '.join(changed)}): choose another --out"
        )
    return start, state
