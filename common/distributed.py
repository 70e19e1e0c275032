"""The only file that knows of more than one device: ranks, FSDP2, sums over ranks.

With one CPU process every function here is the identity, and a reader may skip the file. With
several, each rank holds a slice of every weight, gathers a block's weights when the block runs, and
gets its slice of the summed gradient (FSDP2, `fully_shard`). On several nodes weights are sharded
inside a node and replicated across (HSDP): the slow network carries one all-reduce of a slice an
optimiser step. Gradients are *summed* over ranks: the losses are already divided by the global
token count, so the result does not depend on the number of ranks. A frozen vision tower is whole on
every rank: no gather that could hang when one rank has pictures and another has none. On GPUs:
bf16 compute, float32 masters and sums.

    torchrun --nproc-per-node 2 rl.py          # two gloo ranks on a CPU; nccl where there are GPUs
"""

import atexit
import math
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

# MKL's products differ in their last bits by where operands lie in memory, and a resumed run then
# leaves the uninterrupted one. Read at its first product. It cost no time that showed.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import checkpoint

from common import lora
from model import Qwen25VL, empty_model, gathered, load_weights

# What selective recomputation keeps, by the names of torch's and flash-attn's operators: attention,
# and the products with a bias, which in a decoder block are q, k and v.
KEPT = ("attention", "flash_attn", "addmm")
TIMEOUT = timedelta(hours=2)  # a rank may wait for another's longest response, of 48k tokens


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the compute; masters and sums are float32
    mesh: DeviceMesh | None = None  # (shard,), over several nodes (replicate, shard); None: alone

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self):
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class Trained:
    """What learns: the decoder, or LoRA adapters on it (common/lora.py); the tower or not."""

    vision: bool = False
    lora_rank: int = 0  # 0: the decoder itself
    lora_alpha: float = 0.0
    seed: int = 0  # of the adapters' first values


DECODER = Trained()


def start(dtype: str = "auto") -> World:
    """Joins torchrun's process group; without torchrun, a world of one. ValueError where ranks
    would wait for others for ever. dtype: of the compute; auto is bfloat16 on GPUs, else float32.
    """
    environ, cure = os.environ, ""
    rank, size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    local, here = int(environ.get("LOCAL_RANK", 0)), int(environ.get("LOCAL_WORLD_SIZE", 1))
    # torchrun may keep one store over its restarts: ranks would read there where dead ones were
    keeps = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank >= size or (size > 1 and not {"MASTER_ADDR", "RANK"} <= environ.keys()):
        cure = f"start with torchrun --nproc-per-node {size}, or unset WORLD_SIZE and RANK"
    elif size % here:
        cure = f"{here} ranks run on this node: each node must have as many"
    elif size > 1 and keeps and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        cure = "for --max-restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
    if cure:
        raise ValueError(f"WORLD_SIZE is {size}, but ranks would not meet: {cure}")
    # torchrun sets OMP_NUM_THREADS=1 for several processes: on larger machines cores would be idle
    if here > 1 or "OMP_NUM_THREADS" not in environ:
        no_affinity = not hasattr(os, "sched_getaffinity")  # macOS
        cores = os.cpu_count() if no_affinity else len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // here))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    compute = getattr(torch, dtype if dtype != "auto" else "bfloat16" if cuda else "float32")
    if size == 1 and not cuda and compute == torch.float32:
        return World(rank, size, device)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "MASTER_ADDR" in environ else {"store": dist.HashStore()}
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, rank=rank, world_size=size, **alone)
    shape, names = (size // here, here), ("replicate", "shard")
    flat = size == here  # one node: all ranks share one copy of the weights
    mesh = init_device_mesh(device.type, shape[flat:], mesh_dim_names=names[flat:])
    for name in mesh.mesh_dim_names:  # groups of its own start with 10 minutes under nccl
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, mesh.get_group(name))
    return World(rank, size, device, compute, mesh)


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def finish(world: World):
    """Leaves the group when all ranks are done, and skips Python's own clean-up at exit: in it a
    gloo thread that lets go of a tensor of FSDP's aborts the process (2 of 25 runs on busy cores),
    upon which torchrun calls a finished run a failure. What fails after this still exits with 0.
    """
    if dist.is_initialized():
        world.wait()
        dist.destroy_process_group()
        atexit.register(os._exit, 0)  # is called last
        atexit.register(sys.stdout.flush)
        atexit.register(sys.stderr.flush)


# ------------------------------------------------------------------ models


def load(
    directory: str, world: World, head="lm", trained=DECODER, recompute="none", compile=False
) -> Qwen25VL:
    """A model directory as this rank's slices, float32 where it trains. Errors: load_weights."""
    model = empty_model(directory, head)  # without memory until it is sharded
    freeze(model, trained, world.dtype)
    if compile:
        compile_blocks(model)
    recompute_blocks(model, recompute)
    model = shard(model, world).to_empty(device=world.device)
    load_weights(model, directory)
    lora.draw_adapters(model, trained.seed)
    return model


def freeze(model: Qwen25VL, trained: Trained, dtype: torch.dtype):
    """Leaves what `trained` says to the optimiser; the rest is in the compute dtype from here on,
    which loses nothing: the hub's files are bfloat16.
    """
    model.visual.requires_grad_(trained.vision)
    if not trained.vision:
        model.visual.to(dtype)
    if trained.lora_rank:
        lora.add_adapters(model, trained.lora_rank, trained.lora_alpha, dtype)


def compile_blocks(model: Qwen25VL):
    """Decoder blocks by torch.compile. Attention stays outside: it follows the documents, the rest
    runs on a pack of any length by one graph.
    """
    for block in model.model.layers:
        block.before = torch.compile(block.before, dynamic=True)
        block.behind = torch.compile(block.behind, dynamic=True)


def recompute_blocks(model: Qwen25VL, kind: str):
    """What backward computes again instead of keeping it (Chen et al. 2016, arXiv 1604.06174).

    full: all but the input of each block. selective: keeps attention as well, the part that grows
    with the square of the length, and its q, k and v; a tower that trains is recomputed in full.
    """
    if kind == "none":
        return
    again = partial(checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.visual.blocks:
        block.forward = partial(again, block.forward)
    if kind == "selective":
        kept = partial(checkpoint.create_selective_checkpoint_contexts, keep_attention)
        again = partial(again, context_fn=kept)
    for block in model.model.layers:
        block.forward = partial(again, block.forward)


def keep_attention(context, operator, *arguments, **options) -> checkpoint.CheckpointPolicy:
    name, policy = str(operator), checkpoint.CheckpointPolicy
    # .out: what compiled code writes into it also overwrites
    keep = any(part in name for part in KEPT) and not name.endswith(".out")
    return policy.MUST_SAVE if keep else policy.PREFER_RECOMPUTE


def shard(model: Qwen25VL, world: World) -> Qwen25VL:
    """FSDP2 around each block and the rest (embedding, head, norm, merger), which is gathered for
    the whole forward and backward: the chunked head reads one gathered weight, not one a chunk.
    """
    if world.mesh is None:
        return model
    frozen = {p for p in model.visual.parameters() if not p.requires_grad}
    # inputs as they are: FSDP would cast the tower's float32 angles as well
    kinds = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = fsdp.MixedPrecisionPolicy(world.dtype, **kinds)
    options = dict(mesh=world.mesh, mp_policy=precision, ignored_params=frozen)
    for block in [*model.visual.blocks, *model.model.layers]:
        if not set(block.parameters()) <= frozen:
            fsdp.fully_shard(block, **options)
    model = fsdp.fully_shard(model, **options)
    for entry in ("logps", "values", "logits"):  # each gathers weights as forward() would
        fsdp.register_fsdp_forward_method(model, entry)
    return model


def release(model: nn.Module):
    """After a forward without backward: embedding and head, gathered for one, are slices again."""
    if isinstance(model, fsdp.FSDPModule):
        model.reshard()


def whole_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple]:
    """(name, whole tensor), one at a time, adapters merged: all ranks have to iterate together.
    dtype: cast to before the slices are sent, which halves the traffic of bfloat16.
    """
    release(model)  # else those of the compute dtype are taken for the masters
    for name, weight in lora.merged(model):
        yield name, gathered(weight.detach().to(dtype or weight.dtype))


def move(model: nn.Module, optimizer: torch.optim.Optimizer, device, for_moments=None):
    """Weights and moments of a model that waits go to host memory, and back when it is its turn.
    for_moments: their device where it is another one, since only an update needs them.
    """
    optimizer.zero_grad()
    model.to(device)
    for state in optimizer.state.values():  # AdamW's count of steps as well: fused, it must
        state.update({name: value.to(for_moments or device) for name, value in state.items()})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the sampler takes its memory from the same GPU


def backward(model: nn.Module, loss: Tensor, world: World, last: bool):
    """Adds this micro-batch's gradient, summed over the ranks. last: of an optimiser step, when
    replicas on other nodes exchange their sums.
    """
    if world.mesh is not None and world.mesh.ndim == 2:
        model.set_requires_all_reduce(last)
    (loss * world.size).backward()  # FSDP takes the mean over ranks, and the loss is a sum


def rehearse(model: nn.Module, optimizer: torch.optim.Optimizer, pack, world: World, what="a pack"):
    """Forward and backward of one full pack, of which nothing stays: memory that is short shows
    here, as a RuntimeError, and not after an hour of sampling. Prints the most GB of a rank.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    pack = pack.to(world.device)
    try:  # with a stand-in for the moments, which AdamW makes in its first step
        moments = [] if optimizer.state else [torch.zeros_like(p) for p in trained for _ in "mv"]
        loss = model.values(pack) if model.value_head is not None else model.logps(pack)[0]
        backward(model, loss.sum(), world, last=True)
        gb = peak_gb(world)
        del moments
    except torch.OutOfMemoryError as error:
        where = f"a pack of {len(pack.ids)} tokens does not fit on rank {world.rank} ({error})"
        cures = "--recompute full, --offload, shorter packs, --lora-rank, more GPUs"
        raise RuntimeError(f"{where}: {cures}; tools/plan.py compares") from error
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if world.main:
        print(f"rehearsal: {what} of {len(pack.ids):,} tokens: {gb:.3g} GB")


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scales the gradient to at most `limit` in norm, over all shards; returns the norm before."""
    return gathered(nn.utils.clip_grad_norm_(model.parameters(), limit)).item()


# ------------------------------------------------------------------ numbers of all ranks


def everyone(value) -> list:
    """Each rank's value, on every rank. They are pickled: rollouts of a 7B batch take 0.7 GB."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sums(*values: float) -> tuple[float, ...]:
    """Each value summed over the ranks, in their order; whole numbers stay exact."""
    return tuple(map(sum, zip(*everyone(values), strict=True)))


def largest(value: float) -> float:
    """NaN where one rank has it."""
    return torch.tensor(everyone(value), dtype=torch.float64).max().item()


def means(values: dict[str, list[float]]) -> dict[str, float]:
    """{name: mean of the values of all ranks}. Ranks may have other names."""
    totals = defaultdict(lambda: (0.0, 0))
    for of_rank in everyone({name: (sum(x), len(x)) for name, x in values.items()}):
        for name, (total, count) in of_rank.items():
            totals[name] = totals[name][0] + total, totals[name][1] + count
    return {name: total / count for name, (total, count) in totals.items() if count}


def union(mine: dict) -> dict:
    """The ranks' dicts in one, on every rank."""
    return {key: value for one in everyone(mine) for key, value in one.items()}


def my_problems(world: World, count: int, key: str, dynamic: bool) -> Iterable[int]:
    """Which of `count` problems this rank samples, in order: every size-th one; dynamic: the next
    that nobody has taken, so that no rank waits behind long responses. key: new for each batch.
    """
    if world.size == 1 or not dynamic:
        return range(world.rank, count, world.size)
    store = dist.distributed_c10d._get_default_store()  # torchrun's, on its first node
    return iter(lambda: min(store.add(f"problems/{key}", 1) - 1, count), count)


def running_sum(world: World, key: str) -> Callable[[int], int]:
    """total(mine): the sum over the ranks of what each has last given, read from torchrun's store:
    no rank waits for another. key: a new one each time.
    """
    store = dist.HashStore() if world.size == 1 else dist.distributed_c10d._get_default_store()
    last = 0

    def total(mine: int) -> int:
        nonlocal last
        difference, last = mine - last, mine
        return store.add(f"sum/{key}", difference)

    return total


def refuse_nan(step: int, metrics: dict[str, float], packs: list, losses: list):
    """FloatingPointError where a metric (the same on all ranks) is not finite. It names the rows
    or rollouts in packs of all ranks whose loss was not.
    """
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        broken = (p for p, loss in zip(packs, losses, strict=True) if not math.isfinite(loss))
        names = sorted(union({name: None for pack in broken for name in pack.names}))
        where = f" in packs of {', '.join(names[:32])}" if names else ""
        raise FloatingPointError(f"step {step}: {bad}{where}; the last checkpoint is from before")


def peak_gb(world: World) -> float:
    """Most memory of a rank in GB: of its process, ever; on a GPU all that is taken there, torch's
    cache included. (torch's own peak counts what a sleeping vLLM has given back.)
    """
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return largest((total - free) / 1e9)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9)
