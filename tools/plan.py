"""Memory and hours of a run before it is started: which phase needs what, and does it fit the GPU?

    python -m tools.plan --model 7b --gpus 8 --gpu h100 --offload --kv-cache-gb 32
    python -m tools.plan --model 3b --gpus 1 --gpu h200 --stage coldstart --pack-tokens 16384

Memory is not estimated, it is run: the real model, cut by FSDP2 as in training, takes one full pack
through forward and backward with its real optimiser. Only the tensors are fake (FakeTensorMode:
shapes without contents) and so are the other ranks. Every operator shows the tensors that it makes,
and the bytes of those still alive are added up; 7B takes ten seconds on a laptop. The parts:
  weights    this GPU's slice in float32, and the frozen vision tower, whole, in bfloat16
  gradients  of the slice, float32
  moments    AdamW's two, float32
  kept       what forward leaves for backward: activations, and embedding and head, gathered
  working    the most on top of that: a block computed again, logits, gathered weights
What shares the GPU with them is arithmetic: the engine's weights in bfloat16, its cache, and a
model that waits (without --offload). Pictures are left out: a frozen tower has run, and its memory
is free again, before the decoder takes more. RESERVE_GB is for what no tensor of ours shows.

Hours are FLOPs at an assumed share of the GPU's peak, and bytes at an assumed share of its
bandwidth. What is assumed is printed; --mfu, --decode and --mean take what you have measured.
"""

import atexit
import sys
from collections import deque, namedtuple
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as qwen
from common import distributed
from common.data import Document, Prompt, model_directory
from common.log import run_main
from common.packs import Pack, make_pack

NODE = 8  # GPUs that share one copy of the weights; further nodes save time, not memory
RESERVE_GB = 6.0  # CUDA, NCCL, the engine's graphs, attention's buffers, gaps between tensors
CANARY_TOKENS = 256  # of the prompt on which engine and policy are compared after each sync
PROMPT = 1024  # tokens on average, assumed
EXECUTED = {"none": 1.0, "selective": 1.2, "full": 4 / 3}  # of a model's FLOPs, by recomputation
TOWER = qwen.VisionConfig(32, 1280, 3420, 16, 2048, (7, 15, 23, 31))
WIDER = replace(TOWER, out_hidden_size=3584)
MODELS = {  # the config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct
    "3b": qwen.Config(2048, 11008, 36, 16, 2, 151936, (16, 24, 24), TOWER, True),
    "7b": qwen.Config(3584, 18944, 28, 28, 4, 152064, (16, 24, 24), WIDER),
}
GPUS = {  # NVIDIA's data sheets: GB of 1e9 bytes, bf16 TFLOP/s without sparsity, GB/s of memory
    "rtx4090": (24, 165, 1008),
    "l40s": (48, 362, 864),
    "a100-80": (80, 312, 2039),
    "h100": (80, 989, 3350),
    "h200": (141, 989, 4800),
    "b200": (180, 2250, 8000),
}


@dataclass(frozen=True)
class Config:
    """The settings of coldstart.py and rl.py that decide memory and time."""

    model: str = "7b"  # 3b, 7b, a model directory or a Hub name
    stage: Literal["coldstart", "rl"] = "rl"
    algorithm: Literal["ppo", "grpo"] = "ppo"  # grpo has no critic
    gpus: int = 8  # in all; beyond 8 in whole nodes
    gpu: Literal["rtx4090", "l40s", "a100-80", "h100", "h200", "b200"] = "h100"  # 24 to 180 GB
    pack_tokens: int = 65536  # tokens a pack, which is a micro-batch
    longest: int = 0  # tokens of the longest document, its prompt included; 0: a pack
    recompute: Literal["none", "selective", "full"] = "full"
    offload: bool = False  # a model that waits does so in host memory (rl)
    kv_cache_gb: float = 16.0  # the engine's room for keys and values, a GPU (rl)
    sampler_batch: int = 128  # responses that a GPU samples at once (rl)
    batch: int = 0  # responses (rl) or packs (coldstart) a step; 0: the paper's 8,192 or 640
    steps: int = 0  # of the run; 0: the paper's 900 (rl) or 1,060 (coldstart)
    mean: int = 0  # assumed: tokens of a response or row; 0: 10,000 (paper: 7.2k to 12.6k) or less
    mfu: float = 0.4  # assumed: FLOPs in training over the GPU's peak
    decode: float = 0.6  # assumed: bytes read in sampling over the GPU's bandwidth

    def __post_init__(self):
        if self.gpus < 1 or (self.gpus > NODE and self.gpus % NODE):
            raise ValueError(f"--gpus {self.gpus}: 1 to {NODE}, or whole nodes of {NODE}")
        if self.pack_tokens < self.longest:
            text = f"--pack-tokens {self.pack_tokens} is less than --longest {self.longest}"
            raise ValueError(f"{text}: a document is never cut")

    @property
    def rl(self) -> bool:
        return self.stage == "rl"

    @property
    def document(self) -> int:
        return self.longest or self.pack_tokens

    @property
    def average(self) -> int:
        return self.mean or min(10_000, self.document // 2)

    @property
    def config(self) -> qwen.Config:
        return MODELS.get(self.model) or qwen.read_config(model_directory(self.model))


# ------------------------------------------------------------------ one model with fake tensors

# GB of one GPU; sync: the most that handing over the weights takes on top of the first three
Footprint = namedtuple("Footprint", "weights gradients moments kept working sync")
PARTS = ("engine", "cache", "waiting", *Footprint._fields[:-1])  # of a phase


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, now and at most. Storages that nobody holds leave the set by
    themselves; those that FSDP keeps, but has emptied, count 0.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakSet(), 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        out = operator(*arguments, **(options or {}))
        before = len(self.storages)
        self.watch(x for x in tree_leaves(out) if isinstance(x, Tensor))
        if len(self.storages) > before:
            self.peak = max(self.peak, self.now())
        return out

    def watch(self, tensors):
        for x in tensors:
            local = x._local_tensor if isinstance(x, DTensor) else x
            self.storages.add(local.untyped_storage())

    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


def one_document(tokens: int) -> Pack:
    return make_pack([Document(Prompt([0], [0], None, (), ()), [0] * (tokens - 1))])


def loss_of(model: qwen.Qwen25VL, pack: Pack) -> Tensor:
    critic = model.value_head is not None
    return model.values(pack).square().sum() if critic else model.logps(pack)[0].sum()


def sharded_model(config: qwen.Config, head: str, recompute: str, world) -> qwen.Qwen25VL:
    """Without memory, in the order of distributed.load."""
    with torch.device("meta"):
        model = qwen.Qwen25VL(config, head)
    model.visual.requires_grad_(False).to(world.dtype)
    distributed.recompute_blocks(model, recompute)
    return distributed.shard(model, world)


def follow(model: qwen.Qwen25VL, world, live: LiveBytes, pack: Pack, canary: Pack) -> Footprint:
    """An optimiser step, another pack, and the weights on their way to the sampler."""
    model.to_empty(device="cpu")
    live.watch(model.parameters())
    weights, trained = live.now(), [p for p in model.parameters() if p.requires_grad]
    for weight in trained:  # of an earlier pack of the same step
        weight.grad = torch.zeros_like(weight)
    gradients = live.now() - weights
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()  # makes the moments
    live.peak = state = live.now()
    loss = loss_of(model, pack)
    kept = live.now() - state
    distributed.backward(model, loss, world, last=True)
    working = live.peak - kept - state
    del loss
    live.peak = rest = live.now()
    with torch.no_grad():
        deque(distributed.whole_weights(model, world.dtype), maxlen=0)
        loss_of(model, canary)
    sizes = weights, gradients, state - weights - gradients, kept, working, live.peak - rest
    return Footprint(*(size / 1e9 for size in sizes))


def measure(config: qwen.Config, head: str, recompute: str, tokens: int, ranks: int) -> Footprint:
    """What a model (head: "lm" or "value") takes of the first of `ranks` GPUs to train on a pack.

    It founds a process group, so it wants a process of its own: see footprint.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        world = distributed.World(0, ranks, torch.device("cpu"), torch.bfloat16, mesh)
        model = sharded_model(config, head, recompute, world)
        packs = one_document(tokens), one_document(CANARY_TOKENS)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            return follow(model, world, live, *packs)
    finally:
        dist.destroy_process_group()


@cache
def workers() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(distributed.cores(), mp_context=get_context("spawn"))
    atexit.register(pool.shutdown)
    return pool


@cache
def footprint(*task) -> Future:
    """What measure(*task) returns, in another process; each task is run once."""
    return workers().submit(measure, *task)


def footprints(cfg: Config) -> dict[str, Future]:
    how = cfg.recompute, cfg.pack_tokens, min(cfg.gpus, NODE)
    heads = {"critic": "value", "policy": "lm"}
    if not cfg.rl or cfg.algorithm == "grpo":
        heads.pop("critic")
    return {name: footprint(cfg.config, head, *how) for name, head in heads.items()}


# ------------------------------------------------------------------ the phases of a run


@cache
def engine_gb(config: qwen.Config) -> float:
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in qwen.Qwen25VL(config).parameters()) / 1e9


def token_bytes(c: qwen.Config) -> int:
    """Keys and values of a token in all layers, in bfloat16. 7B: 57,344."""
    return 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def phases(cfg: Config) -> dict[str, dict[str, float]]:
    """{phase: {part: GB of a GPU}}. A phase takes the sum of its parts."""
    models = {name: future.result()._asdict() for name, future in footprints(cfg).items()}
    syncs = {name: parts.pop("sync") for name, parts in models.items()}
    policy = models["policy"]
    if not cfg.rl:
        return {"update": policy}

    def waiting(active: str = "") -> dict[str, float]:
        """Weights, gradients and moments of the models whose turn it is not."""
        idle = [[*parts.values()][:3] for name, parts in models.items() if name != active]
        return {"waiting": 0.0 if cfg.offload else sum(map(sum, idle))}

    engine = {"engine": engine_gb(cfg.config), "cache": cfg.kv_cache_gb}
    return {
        "load": waiting("policy") | {name: policy[name] for name in ("weights", "moments")},
        "sample": engine | waiting(),
        **{name: waiting(name) | parts for name, parts in models.items()},
        "sync": engine | waiting("policy") | policy | {"kept": 0.0, "working": syncs["policy"]},
    }


def peak_gb(cfg: Config) -> float:
    return RESERVE_GB + max(sum(parts.values()) for parts in phases(cfg).values())


def cures(cfg: Config) -> list[dict]:
    """Changes with which it fits: one setting, or all that save memory, or those on other GPUs."""
    saving = {"recompute": "full", "pack_tokens": cfg.document}
    if cfg.rl:  # the cache has to hold one longest response
        least = cfg.document * token_bytes(cfg.config)
        saving |= {"offload": True, "kv_cache_gb": (least // 10**8 + 1) / 10}
    saving = {name: value for name, value in saving.items() if getattr(cfg, name) != value}
    single = [{name: value} for name, value in saving.items()]
    machines = [{"gpus": n} for n in (2, 4, 8) if n > cfg.gpus]
    machines += [{"gpu": name} for name in GPUS if GPUS[name][0] > GPUS[cfg.gpu][0]]
    for changes in single, [saving], [saving | machine for machine in machines]:
        pairs = [(change, replace(cfg, **change)) for change in changes]
        for _, other in pairs:
            footprints(other)  # all begin before the first is waited for
        if good := [change for change, other in pairs if peak_gb(other) <= GPUS[other.gpu][0]]:
            return good
    return []


# ------------------------------------------------------------------ time


def at_once(cfg: Config) -> int:
    """Responses that a GPU samples at once: what the cache holds of average ones."""
    room = cfg.kv_cache_gb * 1e9 // (token_bytes(cfg.config) * (PROMPT + cfg.average))
    return max(1, min(cfg.sampler_batch, int(room)))


def seconds(cfg: Config) -> dict[str, float]:
    """{phase: seconds of a step}, at the assumed shares of the GPU's peak and bandwidth."""
    c, (_, tflops, gbs) = cfg.config, GPUS[cfg.gpu]
    speed = 1e12 * tflops * cfg.mfu * cfg.gpus / EXECUTED[cfg.recompute]
    if not cfg.rl:
        rows = (cfg.batch or 640) * cfg.pack_tokens / cfg.average
        return {"update": rows * qwen.train_flops(c, cfg.average) / speed}
    responses = cfg.batch or 8192
    tokens = responses / cfg.gpus * cfg.average  # that a GPU samples
    weights = tokens / at_once(cfg) * 1e9 * engine_gb(c)  # bytes read, once for a token of each row
    keys = tokens * (PROMPT + cfg.average / 2) * token_bytes(c)  # and values, before each token
    update = responses * qwen.train_flops(c, PROMPT + cfg.average) / speed
    critic = {} if cfg.algorithm == "grpo" else {"critic": update * 4 / 3}  # values, then update
    sample = (weights + keys) / (1e9 * gbs * cfg.decode)
    return {"sample": sample} | critic | {"policy": update}


# ------------------------------------------------------------------ what is printed


def main(cfg: Config):
    (gb, tflops, gbs), table, peak = GPUS[cfg.gpu], phases(cfg), peak_gb(cfg)
    print(f"{'GB of a GPU':12}" + "".join(f"{name:>10}" for name in (*PARTS, "sum")))
    for phase, parts in table.items():
        sizes = [parts.get(name, 0.0) for name in PARTS]
        cells = (f"{x:10.1f}" if x else " " * 10 for x in (*sizes, sum(sizes)))
        print(f"{phase:12}" + "".join(cells))
    fits = "fits" if peak <= gb else "DOES NOT FIT"
    print(f"{peak:.1f} GB with {RESERVE_GB:g} GB in reserve: {fits} {cfg.gpu} of {gb} GB")
    states = sum(x.result().weights + x.result().moments for x in footprints(cfg).values())
    states, waiting = states * min(cfg.gpus, NODE), "of models that wait, and as many "
    why = f"{waiting * (cfg.rl and cfg.offload)}while a checkpoint is written"
    print(f"host memory: {states:.0f} GB a node {why}")
    times, steps = seconds(cfg), cfg.steps or (900 if cfg.rl else 1060)
    print("a step: " + ", ".join(f"{name} {t / 60:.1f} min" for name, t in times.items()))
    print(f"{steps} steps: {sum(times.values()) * steps / 3600:.0f} hours on {cfg.gpus} GPUs")
    what = f"{EXECUTED[cfg.recompute]:.2f} times the model's FLOPs; rows of {cfg.average} tokens"
    print(f"assumed: {cfg.mfu:.0%} of {tflops} TFLOP/s in training, {what}")
    if cfg.rl:
        how = f"prompts of {PROMPT} tokens; {at_once(cfg)} responses at once"
        print(f"assumed: {cfg.decode:.0%} of {gbs} GB/s in sampling; {how}")
    print("not counted: waiting for the longest response, traffic, checkpoints")
    if peak > gb:
        print("looking for changes with which it fits ...", flush=True)
        sys.exit(advice(cfg))


def advice(cfg: Config) -> str:
    changes, text = cures(cfg), f"{cfg.gpus} x {cfg.gpu} of {GPUS[cfg.gpu][0]} GB: "
    if not changes or {"gpus", "gpu"} & changes[0].keys():
        text += "not without LoRA, which is not here yet. "
    return text + ("It fits with " + ", or with ".join(map(flags, changes)) if changes else "")


def flags(change: dict) -> str:
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in change.items())
    return " ".join(name if value is True else f"{name} {value}" for name, value in pairs)


if __name__ == "__main__":
    run_main(main, Config)
