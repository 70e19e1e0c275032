"""Memory and hours of a run before it is started: which phase needs what, and does it fit the GPU?

    python -m tools.plan --model 7b --gpus 8 --gpu h100 --offload --kv-cache-gb 40
    python -m tools.plan --model 3b --gpus 1 --gpu h200 --stage coldstart --pack-tokens 16384
    python -m tools.plan --table         # what fits which GPUs, some minutes

Memory is not estimated, it is run: the real model, cut by FSDP2 as in training, takes one full pack
through forward and backward with its real optimiser, but tensors are fake (shapes without contents)
and so are the other ranks. 7B takes ten to twenty seconds of a core. What shares the GPU is added:
  weights, gradients, moments   of the model at work: slices in float32, what is frozen in bfloat16
  kept, working            what forward leaves for backward (no pictures), and the most beyond that
  engine, cache, waiting   the sampler's, and the model whose turn it is not (without --offload)

Hours are FLOPs and bytes at assumed shares of the GPU's peak and bandwidth, which are printed;
--mfu, --decode, --mean and --reserve-gb take what you have measured (bench/gpu.py). Not counted is
waiting for the longest response, traffic and checkpoints.
"""

import sys
from collections import deque, namedtuple
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as qwen
from common import distributed
from common.data import model_directory
from common.log import run_main
from common.packs import full_pack

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
    lora_rank: int = 0  # of adapters that train in place of the decoder
    recompute: Literal["none", "selective", "full"] = "full"
    offload: bool = False  # a model that waits does so in host memory (rl)
    kv_cache_gb: float = 16.0  # the engine's room for keys and values, a GPU (rl)
    sampler_batch: int = 128  # responses that a GPU samples at once (rl)
    batch: int = 0  # responses (rl) or packs (coldstart) a step; 0: the paper's 8,192 or 640
    steps: int = 0  # of the run; 0: the paper's 900 (rl) or 1,060 (coldstart)
    mean: int = 10_000  # assumed: tokens of a response or row; paper: 7.2k to 12.6k
    mfu: float = 0.4  # assumed: FLOPs in training over the GPU's peak
    decode: float = 0.6  # assumed: bytes read in sampling over the GPU's bandwidth
    reserve_gb: float = RESERVE_GB  # assumed: what tensors do not show
    table: bool = False  # print settings for GPUs of 24 to 141 GB instead

    def __post_init__(self):
        if self.gpus < 1 or (self.gpus > NODE and self.gpus % NODE):
            raise ValueError(f"--gpus {self.gpus}: 1 to {NODE}, or whole nodes of {NODE}")
        if not (self.mean and self.mfu and self.decode):
            raise ValueError("--mean, --mfu and --decode must be above 0")
        if self.mean > self.pack_tokens:  # a document is never cut
            raise ValueError(f"--mean {self.mean} is more than --pack-tokens {self.pack_tokens}")


ONE = "--gpus 1 --pack-tokens 16384 --mean 3000 --batch 512"
TRIED = f"""
--stage coldstart
--offload --kv-cache-gb 40
--offload --kv-cache-gb 40 --gpus 64
--algorithm grpo --kv-cache-gb 32
--gpu h200 --recompute selective --offload --kv-cache-gb 95
--gpu h200 --gpus 4 --offload --kv-cache-gb 90
--gpu h200 --gpus 2 --offload --kv-cache-gb 80
--lora-rank 32 --offload --kv-cache-gb 30 --sampler-batch 256 {ONE}
--lora-rank 32 --algorithm grpo --offload --kv-cache-gb 4 --gpus 1 --gpu l40s --pack-tokens 8192 --mean 3000 --batch 256
--model 3b
--model 3b --stage coldstart --recompute selective {ONE} --batch 12
--model 3b --recompute selective --offload --kv-cache-gb 40 --sampler-batch 256 {ONE}
--model 3b --recompute selective --offload --kv-cache-gb 60 --sampler-batch 256 {ONE} --gpu h200
--model 3b --stage coldstart --lora-rank 64 --gpus 1 --gpu rtx4090 --pack-tokens 8192 --mean 4000 --batch 32 --reserve-gb 4
--model 3b --lora-rank 32 --algorithm grpo --offload --kv-cache-gb 1.5 --sampler-batch 32 --gpus 1 --gpu rtx4090 --pack-tokens 6144 --mean 2000 --batch 128 --reserve-gb 4
"""  # noqa: E501  settings for GPUs of 24 to 141 GB, of both stages and sizes

# GB of one GPU; sync: the most that handing over the weights takes on top of the first three
Footprint = namedtuple("Footprint", "weights gradients moments kept working sync")
PARTS = ("engine", "cache", "waiting", *Footprint._fields[:-1])  # columns of a plan
PHASES = "load resume sample critic policy sync".split()  # its rows, and columns of the table


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, now and at most. Storages that nobody holds leave the set by
    themselves; those that FSDP keeps, but has emptied, count 0.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.peak = WeakSet(), 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        out, before = operator(*arguments, **(options or {})), len(self.storages)
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        local = (x._local_tensor if isinstance(x, DTensor) else x for x in tensors)
        self.storages.update(x.untyped_storage() for x in local)
        if len(self.storages) > before:
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.storages)


@cache
def measure(
    config: qwen.Config, head: str, recompute: str, tokens: int, ranks: int, lora_rank: int = 0
) -> Footprint:
    """What a model (head: lm or value) takes of the first of `ranks` GPUs: an optimiser step,
    another pack, and the weights on their way to the sampler.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    world = distributed.World(0, ranks, torch.device("cpu"), torch.bfloat16, mesh)
    with torch.device("meta"):  # and on, in the order of distributed.load
        model = qwen.Qwen25VL(config, head)
    distributed.freeze(model, distributed.Trained(lora_rank=lora_rank), world.dtype)
    distributed.recompute_blocks(model, recompute)
    model = distributed.shard(model, world)

    def loss_of(pack):
        return model.values(pack).square().sum() if head == "value" else model.logps(pack)[0].sum()

    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        model.to_empty(device="cpu")
        weights, trained = live.now(), [p for p in model.parameters() if p.requires_grad]
        for weight in trained:  # of an earlier pack of the same step
            weight.grad = torch.zeros_like(weight)
        gradients = live.now() - weights
        optimizer = torch.optim.AdamW(trained, fused=True)
        optimizer.step()  # makes the moments
        live.peak = state = live.now()
        loss = loss_of(full_pack(tokens))
        kept = live.now() - state
        distributed.backward(model, loss, world, last=True)
        working = live.peak - kept - state
        del loss
        live.peak = rest = live.now()
        with torch.no_grad():
            deque(distributed.whole_weights(model, world.dtype), maxlen=0)
            loss_of(full_pack(CANARY_TOKENS))
        sync = live.peak - rest
    dist.destroy_process_group()
    sizes = weights, gradients, state - weights - gradients, kept, working, sync
    return Footprint(*(size / 1e9 for size in sizes))


def engine_gb(config: qwen.Config) -> float:
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in qwen.Qwen25VL(config).parameters()) / 1e9


def token_bytes(c: qwen.Config) -> int:
    """Keys and values of a token in all layers, in bfloat16. 7B: 57,344."""
    return 2 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def phases(cfg: Config, c: qwen.Config, models: dict[str, Footprint]) -> dict[str, dict]:
    """{phase: {part: GB of a GPU}} of policy and critic. A phase takes the sum of its parts."""
    sizes = {name: model._asdict() for name, model in models.items()}
    engine = {"engine": engine_gb(c), "cache": cfg.kv_cache_gb}
    state = ("weights", "gradients", "moments")
    turns = {  # phase: (which model's turn it is, what there is of all models, what else)
        "load": ("policy", ["weights"], {}),
        "resume": ("policy", ["weights", "moments"], {}),  # as read from a checkpoint
        "sample": (None, state, engine),
    }
    for name, of in sizes.items():
        turns[name] = name, state, {"kept": of["kept"], "working": of["working"]}
    with_engine = engine | {"working": sizes["policy"]["sync"]}
    turns["sync"] = "policy", ["weights"] if cfg.offload else state, with_engine
    table = {}
    for phase in ("resume", "policy") if cfg.stage == "coldstart" else turns:
        active, parts, more = turns[phase]
        own = {part: sizes[active][part] for part in parts} if active else {}
        idle = sum(of[part] for name, of in sizes.items() if name != active for part in parts)
        table[phase] = own | more | {"waiting": 0.0 if cfg.offload else idle}
    return table


def at_once(cfg: Config, c: qwen.Config) -> int:
    """Responses that a GPU samples at once: what the cache holds of average ones."""
    room = cfg.kv_cache_gb * 1e9 // (token_bytes(c) * (PROMPT + cfg.mean))
    return max(1, min(cfg.sampler_batch, int(room)))


def seconds(cfg: Config, c: qwen.Config) -> dict[str, float]:
    """{phase: seconds of a step}, at the assumed shares of the GPU's peak and bandwidth."""
    _, tflops, gbs = GPUS[cfg.gpu]
    # a frozen matrix gets no gradient, one of three products with it; attention saves nothing, so
    # the hours of long rows are too few
    executed = EXECUTED[cfg.recompute] - (1 / 3 if cfg.lora_rank else 0)
    speed = 1e12 * tflops * cfg.mfu * cfg.gpus / executed
    if cfg.stage == "coldstart":
        rows = (cfg.batch or 640) * cfg.pack_tokens / cfg.mean
        return {"policy": rows * qwen.train_flops(c, cfg.mean) / speed}
    responses = cfg.batch or 8192
    tokens = responses / cfg.gpus * cfg.mean  # that a GPU samples
    weights = tokens / at_once(cfg, c) * 1e9 * engine_gb(c)  # bytes, once for a token of each row
    keys = tokens * (PROMPT + cfg.mean / 2) * token_bytes(c)  # and values, before each token
    update = responses * qwen.train_flops(c, PROMPT + cfg.mean) / speed
    critic = {} if cfg.algorithm == "grpo" else {"critic": update * 4 / 3}  # values, then update
    sample = (weights + keys) / (1e9 * gbs * cfg.decode)
    return {"sample": sample} | critic | {"policy": update}


def plan(cfg: Config) -> tuple[qwen.Config, dict[str, Footprint], dict[str, dict], float]:
    """-> the model's config, what each model that trains takes, phases(), the most GB of a GPU."""
    c = MODELS.get(cfg.model) or qwen.read_config(model_directory(cfg.model))
    heads = {"critic": "value", "policy": "lm"}
    if cfg.stage == "coldstart" or cfg.algorithm == "grpo":
        del heads["critic"]
    sizes = cfg.recompute, cfg.pack_tokens, min(cfg.gpus, NODE), cfg.lora_rank
    models = {name: measure(c, head, *sizes) for name, head in heads.items()}
    table = phases(cfg, c, models)
    return c, models, table, cfg.reserve_gb + max(sum(parts.values()) for parts in table.values())


def tried(line: str) -> str:
    """A row of the table in Markdown."""
    cfg = tyro.cli(Config, args=line.split())
    c, _, table, peak = plan(cfg)
    sums = (f"{sum(table[p].values()):.1f}" if p in table else "" for p in PHASES)
    fits, minutes = f"{peak:.1f} of {GPUS[cfg.gpu][0]}", sum(seconds(cfg, c).values()) / 60
    return f"| `{line}` | {' | '.join(sums)} | {fits} | {minutes:.1f} |"


def main(cfg: Config):
    if cfg.table:
        columns = (*PHASES, "with reserve", "minutes a step")
        print(f"| `python -m tools.plan ...` | {' | '.join(columns)} |")
        print("|---" * (len(PHASES) + 3) + "|")
        with get_context("spawn").Pool(2) as pool:
            # neighbours share models, which are measured once in a process
            for row in pool.imap(tried, TRIED.strip().splitlines(), chunksize=8):
                print(row, flush=True)
        return
    (gb, tflops, gbs), (c, models, table, peak) = GPUS[cfg.gpu], plan(cfg)
    print(f"{'GB of a GPU':12}" + "".join(f"{name:>10}" for name in (*PARTS, "sum")))
    for phase, parts in table.items():
        sizes = [parts.get(name, 0.0) for name in PARTS]
        cells = (f"{x:10.1f}" if x else " " * 10 for x in (*sizes, sum(sizes)))
        print(f"{phase:12}" + "".join(cells))
    if cfg.stage == "rl" and cfg.offload:
        state = sum(model.weights + model.moments for model in models.values())
        print(f"host memory: {state * min(cfg.gpus, NODE):.0f} GB a node for models that wait")
    times, steps = seconds(cfg, c), cfg.steps or (900 if cfg.stage == "rl" else 1060)
    print("a step: " + ", ".join(f"{name} {t / 60:.1f} min" for name, t in times.items()))
    print(f"{steps} steps: {sum(times.values()) * steps / 3600:.0f} hours on {cfg.gpus} GPUs")
    shares = f"{cfg.mfu:.0%} of {tflops} TFLOP/s, {cfg.decode:.0%} of {gbs} GB/s"
    print(f"assumed: {shares}, {at_once(cfg, c)} rows of {PROMPT} + {cfg.mean} tokens at once")
    print(f"{peak:.1f} GB with {cfg.reserve_gb:g} GB in reserve, of {gb} GB of {cfg.gpu}")
    if peak > gb:
        cures = "--recompute full, --offload, less cache, shorter packs, --lora-rank, more GPUs"
        sys.exit(f"does not fit: {cures}")


if __name__ == "__main__":
    run_main(main, Config)
