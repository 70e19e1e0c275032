"""Memory and time of a run before it is started: what fits, with which settings, in how many hours.

    python -m tools.plan --model 7b --gpus 8 --gpu h100 --stage rl --length 49152
    python -m tools.plan --model 3b --gpus 1 --gpu h200 --stage coldstart --length 16384

On a GPU of the list coldstart.py and rl.py print their first two steps beside this plan.

Three kinds of numbers stand in it:
  counted   parameters, state, bytes that backward needs, FLOPs, traffic: arithmetic on model.py and
            parallel.py, checked against real models, tensors and operators (tests/test_plan.py)
  facts     of the GPUs, from their data sheets: GPUS
  assumed   what share of those is reached, and how lengths are spread: ASSUMED, but for what stands
            under "plan" in --measured FILE (bench/gpu.py). No GPU has run this: times are derived

Settings left open are all tried, and the fastest that fit are recommended. If none fit, the plan is
refused, and changes that fit are named. GPUs beyond a node save time, not memory.
"""

import heapq
import json
import math
import random
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import NormalDist, mean

import numpy as np
import torch
import tyro

from common.distributed import RECOMPUTE
from model import HEAD_CHUNK, Qwen25VL, VisionConfig, read_config, train_flops
from model import Config as ModelConfig

NODE = 8  # GPUs that share one copy of the weights
BF16, FP32 = 2, 4  # bytes
STATE, MOVED = 4 * FP32, 3 * FP32  # master, gradient, two moments; --offload drops the gradient
MEASURED = "out/gpu.json"  # what bench/gpu.py writes
MOST_ROWS = 512  # responses at once; with more, decoding is not bound by bandwidth alone
TOWER = VisionConfig(32, 1280, 3420, 16, 2048, (7, 15, 23, 31))
TOWER_7B = replace(TOWER, out_hidden_size=3584)
MODELS = {  # the config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct
    "3b": ModelConfig(2048, 11008, 36, 16, 2, 151936, (16, 24, 24), TOWER, True),
    "7b": ModelConfig(3584, 18944, 28, 28, 4, 152064, (16, 24, 24), TOWER_7B),
}
GPUS = {  # NVIDIA's data sheets, SXM: GB (1e9 B), TFLOP/s in bf16 (dense), GB/s of HBM, GB/s of
    # NVLink one way, GB/s of the network a GPU (DGX: 200 Gb/s for the A100, then 400 Gb/s)
    "a100-80": (80, 312, 2039, 300, 25),
    "h100": (80, 989, 3350, 450, 50),
    "h200": (141, 989, 4800, 450, 50),
    "b200": (180, 2250, 8000, 900, 50),
}
ASSUMED = {
    # MFU by length of document: midway between torchtitan's 35 % and what we aim at
    "mfu": {"8192": 0.45, "16384": 0.435, "32768": 0.415, "65536": 0.40},
    "mfu_recompute": "selective",  # with which it is reached
    "decode": 0.6,  # share of the HBM's bandwidth in decoding
    "links": 0.7,  # share of NVLink's and the network's
    "host_gbs": 8.0,  # GB/s a GPU to host memory that is not pinned
    "reserve_gb": 6.0,  # CUDA, NCCL, vLLM's graphs, gaps between the allocator's blocks
    "spread": 0.8,  # deviation of the logarithm of lengths, which are lognormal
    "prompt": 1024,  # tokens on average (rl); for memory all of them of a picture
}


@dataclass(frozen=True)
class Config:
    """What is to be run. What is empty, 0 or None is chosen."""

    model: str = "7b"  # 3b, 7b, or a directory with config.json
    stage: str = "rl"  # coldstart, rl
    gpus: int = 8  # in all; beyond 8 in whole nodes
    gpu: str = "h100"  # a100-80, h100, h200, b200
    length: int = 49152  # tokens of the longest response (rl) or sequence (coldstart)
    mean: int = 0  # tokens on average; 0: 10,000 (rl; paper: 7.2k to 12.6k), 8,192 (coldstart)
    prompt_tokens: int = 8192  # longest prompt (rl)
    batch: int = 0  # responses or sequences a step; 0: the paper's 8,192 (rl), 640 (coldstart)
    samples: int = 16  # tries a problem (rl); paper: 16
    steps: int = 0  # of the policy; 0: the paper's 900 (rl), 5 x 2 M / 640 (coldstart)
    recompute: str = ""  # none, selective, full
    offload: bool | None = None  # the model that waits does so in host memory (rl)
    pack_tokens: int = 0  # a micro-batch
    sampler_batch: int = 0  # responses in flight a GPU (rl)
    kv_cache_gb: float = 0.0  # a GPU (rl)
    measured: str = ""  # JSON with constants under "plan", in place of those of ASSUMED

    def __post_init__(self):
        if self.stage not in ("coldstart", "rl") or self.recompute not in ("", *RECOMPUTE):
            raise ValueError(f"stage: coldstart or rl; recompute: {', '.join(RECOMPUTE)}")
        if self.gpu not in GPUS or self.gpus < 1 or (self.gpus > NODE and self.gpus % NODE):
            raise ValueError(f"gpu: {', '.join(GPUS)}; gpus: 1 to {NODE}, or whole nodes of {NODE}")
        if 0 < self.pack_tokens < self.longest:
            raise ValueError(f"pack_tokens {self.pack_tokens} < longest document {self.longest}")

    @property
    def rl(self) -> bool:
        return self.stage == "rl"

    @property
    def longest(self) -> int:
        return self.length + self.prompt_tokens * self.rl

    @property
    def typical(self) -> int:
        return min(self.length, self.mean or (10_000 if self.rl else 8192))

    @property
    def share(self) -> float:
        """Documents of a step on each GPU."""
        return (self.batch or (8192 if self.rl else 640)) / self.gpus


# ------------------------------------------------------------------ memory, in bytes


# parameters of the frozen tower, of a layer, of all layers, of embedding, norm and head
Sizes = namedtuple("Sizes", "tower layer layers rest")


@cache
def sizes(c: ModelConfig, head: str = "lm") -> Sizes:
    """Of model.py's own modules, on the meta device; a tied head is the embedding, once."""
    with torch.device("meta"):
        model = Qwen25VL(c, head)
    parts = (model.visual, model.model.layers[0], model.model.layers, model)
    tower, layer, layers, every = (sum(p.numel() for p in part.parameters()) for part in parts)
    return Sizes(tower, layer, layers, every - tower - layers)


def trained(s: Sizes) -> int:
    return s.layers + s.rest


def block_bytes(c: ModelConfig, kind: str, unit: int = BF16) -> int:
    """What a decoder block of width C and MLP I keeps of a token; `unit` bytes a number.

    full: its input, C. selective: besides, q, k, v, attention's output, and a fp32 sum a head.
    none: of two norms the fp32 input, the normed, the weighted, and a fp32 factor; q, k, v turned;
    attention's output, twice (torch.cat), with its sums; gate, silu, up and their product, 4 I.
    """
    wide, keys = c.hidden_size, c.num_key_value_heads * c.head_dim
    attention = unit * (3 * wide + 2 * keys) + FP32 * c.num_attention_heads
    norms = 2 * (FP32 * (wide + 1) + 2 * unit * wide)
    whole = norms + attention + 4 * unit * c.intermediate_size
    return {"full": unit * wide, "selective": attention, "none": whole}[kind]


def activation_bytes(c: ModelConfig, kind: str, tokens: int, unit: int = BF16) -> dict[str, int]:
    """{"kept": by the blocks, "tail": by what follows, "working": the most besides kept}.

    tail: final norm, rows for the head, cos and sin; ids, positions, log-probs, entropies: 20 B.
    working, the larger of two moments. Head: tail and 20 B a logit of a chunk (five of fp32). Last
    block: what it computes again and its input, two gradients of I, one of the stream.
    """
    wide, kept = c.hidden_size, block_bytes(c, kind, unit)
    tail = tokens * ((FP32 + 2 * unit) * wide + 2 * unit * c.head_dim + 20)
    head = tail + 20 * c.vocab_size * min(tokens, HEAD_CHUNK)
    again = block_bytes(c, "none", unit) - kept + unit * (2 * c.intermediate_size + wide)
    again += unit * wide * (kind != "none")
    working = max(head, again * tokens)
    return {"kept": kept * c.num_hidden_layers * tokens, "tail": tail, "working": working}


def forward_bytes(c: ModelConfig, tokens: int, unit: int = BF16) -> int:
    """Most that a forward alone takes: three tensors of I, four of C, cos and sin."""
    return unit * tokens * (3 * c.intermediate_size + 4 * c.hidden_size + 2 * c.head_dim)


def tower_bytes(v: VisionConfig, patches: int, unit: int = BF16) -> int:
    """The same of the frozen tower: its MLP, or turning q and k in fp32 (about 28 B x C)."""
    wide, dim = v.hidden_size, v.hidden_size // v.num_heads
    return patches * (max(3 * unit * (v.intermediate_size + wide), 28 * wide) + 10 * dim)


def gathered_bytes(s: Sizes, backward: bool) -> int:
    """Whole weights and gradients that come and go. Weights: the rest, and three layers (at work,
    fetched ahead, in the buffer). Gradients: the rest's with a chunk's, and two layers' in bf16 and
    in fp32 to be summed. (The rest's fp32 comes when the activations are gone.)
    """
    weights, gradients = s.rest + 3 * s.layer, BF16 * 1.5 * s.rest + 2 * s.layer * (BF16 + FP32)
    return int(BF16 * weights + backward * gradients)


def cache_bytes(c: ModelConfig) -> int:
    """Keys and values of a token in all layers; 7B: 57,344."""
    return 2 * BF16 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim


def memory(cfg: Config, c: ModelConfig, known: dict) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes of a GPU}}; all settings must be chosen."""
    policy, critic, tokens = sizes(c), sizes(c, "value"), cfg.pack_tokens
    valued, prompt = replace(c, vocab_size=1), known["prompt"] * cfg.rl  # the critic's head
    pictures = tower_bytes(c.vision, 4 * prompt * tokens // (prompt + cfg.typical))
    always = {"reserve": 1e9 * known["reserve_gb"]}

    def state(*models: Sizes) -> float:
        shards = min(cfg.gpus, NODE)
        return sum(STATE * trained(s) / shards + BF16 * s.tower for s in models)

    def learn(s: Sizes, model: ModelConfig, idle: Sizes) -> dict[str, float]:
        took = activation_bytes(model, cfg.recompute, tokens)
        parts = {"state": state(s), "idle": waits * state(idle), "pictures": pictures}
        parts |= {"gathered": gathered_bytes(s, True), "kept": took["kept"]}
        return parts | {"working": took["working"]} | always

    waits = cfg.rl and not cfg.offload  # on the GPU
    if not cfg.rl:
        return {"learn": learn(policy, c, critic)}
    engine = {"engine": BF16 * (policy.tower + trained(policy)), "cache": 1e9 * cfg.kv_cache_gb}
    synced = {"state": state(policy), "idle": waits * state(critic), "gathered": BF16 * policy.rest}
    valuing = learn(critic, valued, policy)
    judged = {"gathered": gathered_bytes(critic, False), "kept": 0}
    judged["working"] = forward_bytes(c, tokens)
    return {
        "answer": {"idle": waits * state(policy, critic)} | engine | always,
        "judge": valuing | judged,
        "learn critic": valuing,
        "learn policy": learn(policy, c, critic),
        "sync": synced | engine | always,
    }


def peaks(cfg: Config, c: ModelConfig, known: dict) -> dict[str, float]:
    """{phase: GB of a GPU}"""
    return {phase: sum(parts.values()) / 1e9 for phase, parts in memory(cfg, c, known).items()}


# ------------------------------------------------------------------ time, in seconds


def executed_flops(c: ModelConfig, length: int, kind: str) -> float:
    """train_flops of a document and what backward does again: the head; selective: o, gate and up
    (the block's last product is read by nobody); full: all of the blocks but that product.
    """
    token = 2 * c.num_hidden_layers * c.hidden_size * length
    blocks = train_flops(replace(c, vocab_size=0), length) / 3
    selective = token * (c.hidden_size + 2 * c.intermediate_size)
    full = blocks - token * c.intermediate_size
    again = {"none": 0, "selective": selective, "full": full}[kind]
    return train_flops(c, length) + 2 * c.vocab_size * c.hidden_size * length + again


def train_seconds(c: ModelConfig, length: int, kind: str, tflops: float, known: dict) -> float:
    """Of a document: model FLOPs / (peak x MFU), times the FLOPs it executes over those that were
    executed where MFU was measured.
    """
    points = sorted((int(at), share) for at, share in known["mfu"].items())
    mfu = np.interp(length, *zip(*points, strict=True))
    ran = executed_flops(c, length, known["mfu_recompute"])
    again = executed_flops(c, length, kind) / ran
    return train_flops(c, length) / (1e12 * tflops * mfu) * again


def gather_seconds(s: Sizes, shards: int, nvlink: float, backward: bool = True) -> float:
    """Of a micro-batch in a node: bf16 weights gathered, the layers' twice, fp32 gradients reduced
    and scattered; a GPU has 1/n of them and receives the others.
    """
    sent = BF16 * trained(s) + backward * (BF16 * s.layers + FP32 * trained(s))
    return sent * (shards - 1) / shards / (1e9 * nvlink)


def reduce_seconds(s: Sizes, nodes: int, shards: int, network: float) -> float:
    """Of an optimiser step, across nodes: a ring sends 2 (n-1)/n of a GPU's slice in fp32."""
    return 2 * (nodes - 1) / nodes * FP32 * trained(s) / shards / (1e9 * network)


def decode_steps(lengths: list[int], rows: int) -> int:
    """Token steps of so many rows that take the next response whenever one ends."""
    ends = [0] * rows
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def decode_seconds(c: ModelConfig, lengths: list[int], prompt: int, rows: int, hbm: float) -> float:
    """Bound by bandwidth: each step reads blocks and head once, each token all keys and values
    before it, in a response of n tokens n prompt + n^2 / 2. Prompts are read in no time.
    """
    weights = BF16 * (sizes(c).layers + c.vocab_size * c.hidden_size)
    before = sum(n * prompt + n * n / 2 for n in lengths)
    return (decode_steps(lengths, rows) * weights + cache_bytes(c) * before) / (1e9 * hbm)


def lengths_of(cfg: Config, known: dict, count: int = 256) -> list[int]:
    """Those of a step that has been; else quantiles of a lognormal, cut at the longest, in random
    order.
    """
    if "lengths" in known:
        return known["lengths"]
    spread, normal = known["spread"], NormalDist()
    middle = math.log(cfg.typical) - spread**2 / 2
    drawn = [math.exp(middle + spread * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    random.Random(0).shuffle(drawn)
    return [min(cfg.length, max(1, round(n))) for n in drawn]


def live_bytes(cfg: Config, c: ModelConfig, known: dict) -> float:
    """Of the cache, a response at work: half of it is there on average, long ones for longer."""
    lengths = lengths_of(cfg, known)
    return cache_bytes(c) * (known["prompt"] + sum(n * n for n in lengths) / sum(lengths) / 2)


def seconds(cfg: Config, c: ModelConfig, known: dict) -> dict[str, float]:
    """{phase of a step: its seconds}. Traffic inside a node hides behind work where it can."""
    _, tflops, hbm, nvlink, network = GPUS[cfg.gpu]
    nvlink, network, hbm = nvlink * known["links"], network * known["links"], hbm * known["decode"]
    nodes, shards, prompt = math.ceil(cfg.gpus / NODE), min(cfg.gpus, NODE), known["prompt"]
    policy, critic, valued = sizes(c), sizes(c, "value"), replace(c, vocab_size=1)
    documents = [length + prompt * cfg.rl for length in lengths_of(cfg, known)]
    packs = math.ceil(cfg.share * mean(documents) / cfg.pack_tokens)

    def work(model: ModelConfig) -> float:
        took = (train_seconds(model, d, cfg.recompute, tflops, known) for d in documents)
        return cfg.share * mean(took)

    def gathers(s: Sizes, backward: bool = True) -> float:
        return packs * gather_seconds(s, shards, nvlink, backward)

    reduced = reduce_seconds(policy, nodes, shards, network)
    learn = max(work(c), gathers(policy))
    if not cfg.rl:
        return {"learn": learn, "all-reduce": reduced}
    share = sum(train_flops(valued, d) / 3 for d in documents)  # of judge: forward alone
    share /= sum(executed_flops(valued, d, cfg.recompute) for d in documents)
    answers = lengths_of(cfg, known, math.ceil(cfg.share))
    held = int(1e9 * cfg.kv_cache_gb / live_bytes(cfg, c, known))
    rows = max(1, min(cfg.sampler_batch, held))
    moved = 2 * MOVED * (trained(policy) + trained(critic)) / shards / (1e9 * known["host_gbs"])
    return {
        "answer": decode_seconds(c, answers, prompt, rows, hbm),
        "judge": max(share * work(valued), gathers(critic, False)),
        "learn critic": max(work(valued), gathers(critic)),
        "learn policy": learn,
        "all-reduce": reduced + 4 * reduce_seconds(critic, nodes, shards, network),
        "offload": moved * cfg.offload,
    }


# ------------------------------------------------------------------ the choice


def with_sampler(cfg: Config, c: ModelConfig, known: dict) -> Config:
    """KV cache: what answer and sync leave, but at least one longest response and at most all of a
    GPU's. Batch: as many as it holds.
    """
    live, token = live_bytes(cfg, c, known), cache_bytes(c)
    most = min(cfg.sampler_batch or MOST_ROWS, math.ceil(cfg.share / cfg.samples) * cfg.samples)
    empty = peaks(replace(cfg, kv_cache_gb=0.0), c, known)
    spare = 1e9 * (GPUS[cfg.gpu][0] - max(empty["answer"], empty["sync"]))
    room = max(cfg.longest * token + 1e8, min(spare, most * live))
    gb = cfg.kv_cache_gb or math.floor(room / 1e8) / 10
    rows = max(1, min(most, int(1e9 * gb / live)) // cfg.samples) * cfg.samples
    return replace(cfg, kv_cache_gb=gb, sampler_batch=cfg.sampler_batch or rows)


def fitting(cfg: Config, c: ModelConfig, known: dict) -> Iterator[Config]:
    """What was left open, chosen in every way that fits the GPU in every phase."""
    kinds = [cfg.recompute] if cfg.recompute else RECOMPUTE
    waits = [False, True][: 1 + cfg.rl] if cfg.offload is None else [cfg.offload]
    packs = [cfg.pack_tokens] if cfg.pack_tokens else [cfg.longest * n for n in (1, 2, 4)]
    for kind, wait, pack in product(kinds, waits, packs):
        tried = replace(cfg, recompute=kind, offload=wait, pack_tokens=pack)
        tried = with_sampler(tried, c, known) if cfg.rl else tried
        if max(peaks(tried, c, known).values()) <= GPUS[cfg.gpu][0]:
            yield tried


def nearest(cfg: Config, c: ModelConfig, known: dict) -> Iterator[str]:
    """Changes that fit: settings let go, more GPUs, larger ones, the most tokens that do."""
    free = dict(recompute="", offload=None, pack_tokens=0, sampler_batch=0, kv_cache_gb=0.0)
    changes = [{name: value} for name, value in free.items() if getattr(cfg, name) != value]
    changes += [free] if len(changes) > 1 else []
    changes += [{"gpus": n} for n in (2, 4, 8) if n > cfg.gpus]
    changes += [{"gpu": name} for name in GPUS if GPUS[name][0] > GPUS[cfg.gpu][0]]
    for change in changes:
        if best := next(fitting(replace(cfg, **change), c, known), None):
            yield " ".join(f"--{k.replace('_', '-')} {getattr(best, k)}" for k in change)
    for length in range(cfg.length // 1024 * 1024, 0, -1024):
        if best := next(fitting(replace(cfg, length=length, pack_tokens=0), c, known), None):
            return (yield f"--length {length} --pack-tokens {best.pack_tokens}")


def choose(cfg: Config, c: ModelConfig, known: dict) -> Config:
    """The fastest that fits, of equals with the smallest packs; ValueError with cures if none."""
    if fits := [*fitting(cfg, c, known)]:
        return min(fits, key=lambda x: (sum(seconds(x, c, known).values()), x.pack_tokens))
    where = f"{cfg.gpus} x {cfg.gpu} of {GPUS[cfg.gpu][0]} GB"
    what = f"{cfg.stage} of {cfg.model} at {cfg.length} tokens does not fit {where}"
    cures = "; ".join(nearest(cfg, c, known)) or "nothing that was tried"
    raise ValueError(f"{what}. Each of these would: {cures}")


def constants(file: str) -> tuple[dict, set[str]]:
    """ASSUMED with what was measured in its place, and the names of that."""
    found = json.loads(Path(file).read_text()).get("plan", {}) if file else {}
    if file and (not found or set(found) - set(ASSUMED)):
        raise ValueError(f'{file}: its key "plan" must hold some of {", ".join(ASSUMED)}')
    return ASSUMED | found, set(found)


# ------------------------------------------------------------------ beside what was measured


def gpu_of(name: str) -> str:
    """Which of GPUS a driver's name is: "NVIDIA H100 80GB HBM3" is h100; empty: none of them."""
    words = name.lower().replace("-", " ").split()
    if {"pcie", "nvl"} & {*words}:  # slower than SXM
        return ""
    fits = (g for g in GPUS if all(any(w.startswith(x) for w in words) for x in g.split("-")))
    return next(fits, "")


def here() -> str:
    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""


def known_here() -> dict:
    """Constants that bench/gpu.py has measured on this very kind of GPU, else those assumed."""
    file = Path(MEASURED)
    if file.is_file() and torch.cuda.is_available():
        if json.loads(file.read_text())["machine"]["name"] == torch.cuda.get_device_name():
            return constants(MEASURED)[0]
    return ASSUMED


def config_of(stage: str, run, gpu: str, gpus: int) -> Config:
    """The plan of a run from its own configuration (coldstart.Config, rl.Config)."""
    what = dict(
        stage=stage, gpu=gpu, gpus=gpus, recompute=run.recompute, pack_tokens=run.pack_tokens
    )
    if stage == "coldstart":
        return Config(length=run.max_tokens, batch=run.batch, **what)
    what |= dict(length=max(run.lengths), prompt_tokens=run.prompt_tokens, samples=run.samples)
    what |= dict(batch=run.problems * run.samples, offload=run.offload)
    return Config(sampler_batch=run.sampler_batch, kv_cache_gb=run.kv_cache_gb, **what)


def show_beside(stage: str, run, c: ModelConfig, gpus: int, packs: list, took: dict):
    """Prints a step that has been beside its plan, if this machine's GPU is one of GPUS.

    run: the stage's configuration; packs: data.Pack of this GPU, with whose lengths it is planned,
    not with those assumed; took: the step's metrics, "seconds_PHASE" and "peak_gb".
    """
    if not (gpu := here()):
        return
    try:
        cfg = config_of(stage, run, gpu, gpus)
    except ValueError as error:
        return print(f"no plan: {error}")
    whole = [length for pack in packs for length in pack.lengths]
    trained = [length for pack in packs for length in pack.trained]
    known = known_here() | {"lengths": trained if cfg.rl else whole}
    known["prompt"] = (sum(whole) - sum(trained)) / len(whole)
    planned, gb = seconds(cfg, c, known), max(peaks(cfg, c, known).values())
    if cfg.rl:  # the critic's turn, the policy's, and what lies between
        planned["learn"] = sum(planned[x] for x in planned if x not in ("answer", "judge"))
    pairs = [
        (name, took[f"seconds_{name}"], "s", planned[name])
        for name in ("answer", "judge", "learn")
        if f"seconds_{name}" in took and planned.get(name)
    ]
    pairs.append(("memory", took["peak_gb"], "GB", gb))
    told = (f"{name} {x:.3g} {unit} for {y:.3g} ({x / y - 1:+.0%})" for name, x, unit, y in pairs)
    print("measured for planned:", ", ".join(told))


def main(cfg: Config):
    c = MODELS[cfg.model] if cfg.model in MODELS else read_config(cfg.model)
    known, measured = constants(cfg.measured)
    best, s, (gb, *_, nvlink, _) = choose(cfg, c, known), sizes(c), GPUS[cfg.gpu]
    print(f"{cfg}\n{trained(s) / 1e9:.3f} B trained, {s.tower / 1e9:.3f} B frozen parameters")
    for phase, parts in memory(best, c, known).items():
        shown = "  ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
        print(f"{phase:12} {sum(parts.values()) / 1e9:5.1f} of {gb} GB: {shown}")
    if best.offload:
        waits = MOVED * (trained(s) + trained(sizes(c, "value"))) / 1e9
        print(f"host         {waits:.0f} GB a node: masters and moments of both models")
    took, steps = seconds(best, c, known), cfg.steps or (900 if cfg.rl else 15_625)
    step, tokens = sum(took.values()), cfg.share * cfg.gpus * mean(lengths_of(cfg, known))
    print("a step       " + ", ".join(f"{name} {t:.1f} s" for name, t in took.items()))
    print(f"in all       {step / 60:.1f} min x {steps} = {step * steps / 3600:.0f} h")
    gather = gather_seconds(s, min(cfg.gpus, NODE), nvlink * known["links"])
    print(f"speed        {tokens / step:.0f} tokens/s; traffic inside a node {gather:.2f} s a pack")
    chosen = ["recompute", "pack_tokens"] + ["offload", "sampler_batch", "kv_cache_gb"] * cfg.rl
    flags = " ".join(f"--{k.replace('_', '-')} {getattr(best, k)}" for k in chosen)
    print(
        "recommended ", flags.replace("--offload True", "--offload").replace("--offload False ", "")
    )
    for name, value in known.items():
        print(f"{'measured' if name in measured else 'assumed':12} {name} {value}")
    print("Derived from what was measured" if measured else "All derived: nothing was measured")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
