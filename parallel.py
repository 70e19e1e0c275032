"""The only file that knows of more than one device: ranks, FSDP2, sums over ranks.

    world = start()                        # torchrun's ranks, or one process without it
    model = shard(model, world)            # FSDP2 from outside: each block, then the root
    total, = sums(world, tokens)           # before backward: one global denominator
    norm = clip_gradients(model, 1.0)

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
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Qwen25VL


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
