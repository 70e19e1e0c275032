"""What one GPU does with this code: ceilings, the parts of a step, and what plan.py should assume.

    python bench/gpu.py                               # 7B decoder, 3B step; under 8 minutes
    python bench/gpu.py --parts attention decoder     # those alone; stages only where it is named
    python bench/gpu.py --size mini                   # the same code on a CPU, half a minute
    python -m tools.plan --mfu 0.42 --decode 0.55 ...       # plans with what the last table shows

Weights and inputs are random, nothing is fetched. Correctness before speed: an attention kernel
that misses float32 by 2 % gets no figures, nor does a decoder whose log-probs or gradients drift.
What fails, does not fit or has no time left is a row that says so. FLOPs are the model's: 6 a
weight and token, 6 H D n (n + 1) for causal attention in a document of n tokens, nothing that is
computed again; `mfu` is their share of the data sheet's peak (of the measured one where plan.py
does not know the GPU). `predicted_gb` of step3b is what plan.py finds with fake tensors. `first_ms`
is the first call at a shape: cuDNN plans for every new length
(TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 rounds it). The file is written after every part. Not yet run
on a GPU; on a CPU it checks the path, no more.
"""

import gc
import inspect
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model as qwen  # noqa: E402
from common import distributed  # noqa: E402
from common.data import Document, Prompt  # noqa: E402
from common.log import run_main  # noqa: E402
from common.packs import Pack, make_pack  # noqa: E402
from tools import plan  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GATE, ATTENTION_ERROR = ((512,), (300, 170, 42)), 0.02  # documents; relative: bf16 has 0.005
SHORT, LOGP_ERROR, COSINE = (200, 90, 30), 0.05, 0.98  # documents; nats on average; of gradients
WAYS = [*product(("selective", "none", "full"), (False, True))]  # recompute, compiled
if not CUDA:  # where there is nothing to measure, one kind shows that it works
    WAYS = [("selective", False), ("selective", True)]
SECONDS = dict(ceilings=15, parity=30, attention=90, decoder=190, step3b=80, head=15, vision=15)
SECONDS |= dict(sampler=40, stages=900)  # the parts; after so long one begins no further row
UNEVEN = (9011, 7013, 5003, 4001, 3001, 2011, 1511, 1217)  # documents, no two alike
Lengths = tuple[int, ...]  # documents of a pack
random = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Config:
    size: str = "7b"  # mini, 3b, 7b; step3b and parity are 3B at most
    parts: tuple[str, ...] = ()  # ceilings, parity, ... as in SECONDS; none: all but stages
    out: str = "out/gpu.json"


@dataclass
class Bench:
    """How large the parts are, what the GPU could do, and what was found."""

    model: qwen.Config = plan.MODELS["7b"]
    small: qwen.Config = plan.MODELS["3b"]  # of step3b and parity
    square: int = 8192  # of a product; its tokens, and in proportion those of step3b and the head
    attention: tuple[Lengths, ...] = (*((512 << i,) for i in (0, 2, 4, 6, 7)), (512,) * 64, UNEVEN)
    decoder: tuple[Lengths, ...] = (*((8192 << i,) for i in range(4)), UNEVEN)
    pictures: tuple[tuple[int, int], ...] = ((448, 448), (896, 896), (1344, 1008))  # pixels
    seconds: float = 0.4  # for which a call is repeated; eight times that in training
    tflops: float = 1.0  # peak of bf16 products
    gbs: float = 1.0  # peak of the memory, bytes read and written
    room: float = math.inf  # bytes
    until: float = math.inf  # of the part at work, by time.monotonic
    found: dict[str, list[dict]] = field(default_factory=dict)


TINY = qwen.Config(64, 128, 2, 4, 2, 512, (2, 3, 3), qwen.VisionConfig(2, 32, 64, 2, 64, (1,)))
MINI = (TINY, TINY, 64, ((64,), (9, 33, 22)), ((64,), (128,), (50, 33, 21)), ((56, 84),), 0.01)


def timed(work: Callable, b: Bench, flops=0.0, count=0, longer=1) -> dict:
    """Median of up to 20 calls after the first; of `count` tokens or pictures how many a second."""
    times, wait = [], torch.cuda.synchronize if CUDA else (lambda: None)
    while len(times) < 2 or (sum(times[1:]) < longer * b.seconds and len(times) < 21):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    ms, tflops = median(times[1:]), 1e-9 * flops / median(times[1:])
    row = {"ms": ms, "first_ms": times[0]} | ({"per_second": 1e3 * count / ms} if count else {})
    return row | ({"tflops": tflops, "mfu": tflops / b.tflops} if flops else {})


def attempt(b: Bench, row: dict, work: Callable[[], dict], needs: float = 0.0) -> dict:
    """The row with what work() found, or why it found nothing. needs: bytes, as plan.py has it."""
    gc.collect()  # FSDP's modules refer to each other
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row |= {"predicted_gb": needs / 1e9} if needs else {}
    if time.monotonic() > b.until or needs > b.room:
        return row | {"error": "does not fit" if needs > b.room else "no time left"}
    try:
        row |= work() or {}
    except Exception as error:  # kernels refuse with any type they like: the text is the finding
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if CUDA and needs:
        peak, (free, total) = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()
        row |= dict(peak_gb=peak / 1e9, gb_error=needs / peak - 1)
        row["reserve_gb"] = (total - free - peak) / 1e9
    return row


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([row.get(n, "") for n in names] for row in rows)]
    lines = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def built(c: qwen.Config, head: str = "lm", dtype=torch.bfloat16) -> qwen.Qwen25VL:
    """Matrices by the hub's initializer_range, norms 1, biases 0; the tower is frozen."""
    with torch.device("meta"):
        model = qwen.Qwen25VL(c, head).to(dtype)
    torch.manual_seed(0)
    for name, x in model.to_empty(device=DEVICE).named_parameters():
        x.data.normal_(0, 0.02) if x.ndim > 1 else x.data.fill_(float(name.endswith("weight")))
        x.requires_grad_(not name.startswith("visual."))
    return model


def packed(c: qwen.Config, lengths: Lengths) -> Pack:
    documents = []
    for n in lengths:
        first, *others = torch.randint(0, min(500, c.vocab_size), (n,)).tolist()
        documents.append(Document(Prompt([first], [first], None, (), ()), others))
    return make_pack(documents).to(DEVICE)


def treat(model: qwen.Qwen25VL, kind: str, compiled: bool) -> qwen.Qwen25VL:
    """As it was built, then compiled, then recomputed."""
    for module in model.modules():
        for name in [name for name in vars(module) if callable(getattr(type(module), name, None))]:
            delattr(module, name)  # what stands before a method of the class
    if compiled:
        distributed.compile_blocks(model)
    distributed.recompute_blocks(model, kind)
    return model


def ceilings(b: Bench) -> list[dict]:
    """A large product, those of a block and of the head, and copies."""
    c, n, rows = b.model, b.square, []
    wide, keys, inner = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    shapes = [(n, n, n), (n, wide, wide), (n, wide, keys), (n, wide, inner), (n, inner, wide)]
    for m, k, out in (*shapes, (min(n, qwen.HEAD_CHUNK), wide, c.vocab_size)):
        work = partial(F.linear, random(m, k), random(out, k))
        rows.append({"what": f"{m} x {k} x {out}"} | timed(work, b, 2 * m * k * out))
    there, host = torch.rand(4 * n * n, device=DEVICE), torch.rand(4 * n * n)
    copies = {"on the device": partial(torch.empty_like(there).copy_, there)}
    copies |= {"to host, pageable": partial(there.to, "cpu", copy=True)}  # as distributed.move does
    copies |= {"from host, pageable": partial(host.to, DEVICE, copy=True)}
    if CUDA:
        copies |= {"to host, pinned": partial((pinned := host.pin_memory()).copy_, there)}
        copies |= {"from host, pinned": partial(there.copy_, pinned)}
    for name, work in copies.items():
        row = {"what": name} | timed(work, b)
        rows.append(row | {"gbs": (1 + (name == "on the device")) * host.nbytes / 1e6 / row["ms"]})
    return rows


def parity(b: Bench) -> list[dict]:
    """Log-probs and gradients of a model in bf16 against the same weights in float32."""
    pack, model = packed(b.small, SHORT), built(b.small).float()
    weights = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[Tensor, list[Tensor]]:
        logps, _ = model.logps(pack)
        return logps.detach(), [x.float() for x in grad(-logps.mean(), weights)]

    def compare(way: tuple) -> dict:
        treat(model, *way)
        logps, found = run()
        dots = [(x * y).sum().item() for x, y in zip(found, exact, strict=True)]
        norms = math.prod(sum(x.square().sum().item() for x in every) for every in (found, exact))
        gap, cosine = (logps - wanted).abs(), sum(dots) / math.sqrt(norms)
        row = {"logp_mean": gap.mean().item(), "logp_max": gap.max().item(), "cosine": cosine}
        return row | {"passes": row["logp_mean"] < LOGP_ERROR and cosine > COSINE}

    wanted, exact = run()
    model.bfloat16()  # exact: the weights were drawn in bf16
    rows = [({"recompute": way[0], "compiled": way[1]}, partial(compare, way)) for way in WAYS]
    return [attempt(b, *row) for row in rows]


def by_document(kernels, lengths: Lengths, step: int = 1, repeat: bool = False) -> Callable:
    """Each document alone. step: lengths are rounded up, which no token sees. repeat: the keys."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, times = [], q.shape[1] // k.shape[1]
        for n, *heads in zip(lengths, *(x.split(lengths) for x in (q, k, v)), strict=True):
            heads = [F.pad(x, (0, 0, 0, 0, 0, -n % step)) if n % step else x for x in heads]
            if repeat:
                heads[1:] = [x.repeat_interleave(times, dim=1) for x in heads[1:]]
            heads = [x.transpose(0, 1)[None] for x in heads]
            with sdpa_kernel(kernels):
                out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=not repeat)
            outputs.append(out[0].transpose(0, 1)[:n])
        return torch.cat(outputs)

    return run


def by_ends(module: str, name: str, lengths: Lengths) -> Callable:
    """All documents in one call, by the ends of their tokens. Options differ with torch."""
    call, most = getattr(import_module(module), name), max(lengths)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    options = {"causal": True, "is_causal": True, "window_size": (-1, 0), "enable_gqa": True}
    options = {k: v for k, v in options.items() if k in inspect.signature(call).parameters}
    return lambda q, k, v: call(q, k, v, ends, ends, most, most, **options)


def by_flex(lengths: Lengths) -> Callable:
    flex, n = import_module("torch.nn.attention.flex_attention"), sum(lengths)
    owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=DEVICE)
    sees = lambda batch, head, i, j: (owner[i] == owner[j]) & (i >= j)  # noqa: E731
    mask = flex.create_block_mask(sees, None, None, n, n, device=DEVICE)
    call = partial(torch.compile(flex.flex_attention), block_mask=mask, enable_gqa=True)
    return lambda *qkv: call(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)


CUDNN, EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
FLASH, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH
CANDIDATES = {  # lengths -> attention of q (T, H, D), k and v (T, K, D)
    "as shipped": lambda lengths: partial(qwen.attend, lengths=[*lengths], causal=True),
    "cudnn": partial(by_document, CUDNN),
    "cudnn, rounded to 1024": partial(by_document, CUDNN, step=1024),
    "flash": partial(by_document, FLASH),
    "efficient, keys repeated": partial(by_document, EFFICIENT, repeat=True),
    "varlen": partial(by_ends, "torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn": partial(by_ends, "flash_attn", "flash_attn_varlen_func"),
    "flex": by_flex,
}


def attention(b: Bench) -> list[dict]:
    """A layer's attention, forward and backward, by every kernel that passes the gate."""
    c, rows, kv = b.model, [], [b.model.num_key_value_heads] * 2
    shapes = [(n, c.head_dim) for n in (c.num_attention_heads, *kv, c.num_attention_heads)]
    drawn = lambda xs: [random(sum(xs), *one, requires_grad=True) for one in shapes]  # noqa: E731

    def gate(make: Callable) -> dict:  # largest relative error against float32
        errors = []
        for lengths in GATE:
            *inputs, slope = drawn(lengths)
            exact = [x.detach().float().requires_grad_() for x in inputs]
            out, wanted = make(lengths)(*inputs), by_document(MATH, lengths)(*exact)
            found = (out, *grad(out, inputs, slope))
            wanted = (wanted, *grad(wanted, exact, slope.float()))
            errors += [(x - y).norm() / y.norm() for x, y in zip(found, wanted, strict=True)]
        worst = torch.stack(errors).max().item()  # NaN, if one is
        return {"parity": worst} | ({} if worst < ATTENTION_ERROR else {"error": "parity failed"})

    def measure(make: Callable, lengths: Lengths) -> dict:
        (*inputs, slope), run = drawn(lengths), make(lengths)
        flops = 6 * math.prod(shapes[0]) * sum(n * (n + 1) for n in lengths)
        return timed(lambda: grad(run(*inputs), inputs, slope), b, flops)

    for name, make in CANDIDATES.items():
        row = attempt(b, {"candidate": name}, partial(gate, make))
        for lengths in () if "error" in row else b.attention:
            more = row | {"documents": len(lengths), "longest": max(lengths)}
            rows.append(attempt(b, more, partial(measure, make, lengths)))
        rows += [row] if "error" in row else []
    return rows


def trained(b: Bench, c, lengths: Lengths, way: tuple, needs: float, make: Callable) -> dict:
    """A row. make() -> what runs once forward and backward; c: whose FLOPs count; needs: bytes."""
    row = dict(documents=len(lengths), longest=max(lengths), recompute=way[0], compiled=way[1])
    for checked in b.found.get("parity", []):
        if (checked.get("recompute"), checked.get("compiled")) == way and not checked.get("passes"):
            return row | {"error": "parity failed"}
    flops = sum(qwen.train_flops(c, n) for n in lengths)
    return attempt(b, row, lambda: timed(make(), b, flops, sum(lengths), 8), needs)


def decoder(b: Bench) -> list[dict]:
    """Embedding, all blocks and the last norm, forward and backward, without head or optimiser."""
    c, rows, model = b.model, [], built(b.model, "value")

    def make(way: tuple, lengths: Lengths) -> Callable:
        inner, pack = treat(model, *way).model, packed(c, lengths)
        slope = random(sum(lengths), c.hidden_size)
        return lambda: inner(inner.embed_tokens(pack.ids), pack).backward(slope)

    for way, lengths in product(WAYS, b.decoder):
        run = partial(trained, b, replace(c, vocab_size=0), lengths, way)
        rows.append(run(0.0, partial(make, way, lengths)))
        model.zero_grad()
    return rows


def step3b(b: Bench) -> list[dict]:
    """A cold start's step: FSDP2 on one rank, fp32 masters, clipping and fused AdamW included."""
    c, tokens, rows = b.small, 2 * b.square, []
    kinds = dict.fromkeys(kind for kind, _ in WAYS)
    parts = {kind: sum(plan.measure(c, "lm", kind, tokens, 1)[:-1]) for kind in kinds}  # no sync
    world = distributed.start("bfloat16")

    def make(way: tuple) -> Callable:
        model, pack = treat(built(c, dtype=torch.float32), *way), packed(c, (tokens,))
        model.visual.bfloat16()
        weights = [p for p in distributed.shard(model, world).parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, 1e-6, fused=True)

        def step():
            loss = -model.logps(pack)[0].sum() / tokens
            distributed.backward(model, loss, world, last=True)
            distributed.clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    for way in WAYS:
        needs = 1e9 * parts[way[0]]
        rows.append(trained(b, c, (tokens,), way, needs, partial(make, way)))
    return rows


def head(b: Bench) -> list[dict]:
    """chunked_logps, forward and backward; with what it computes again 8 FLOPs a weight and row."""
    wide, words, n, rows = b.model.hidden_size, b.model.vocab_size, 8 * b.square, []

    def measure(chunk: int) -> dict:
        both = random(n, wide, requires_grad=True), random(words, wide).mul_(0.02).requires_grad_()
        targets = torch.randint(words, (n,), device=DEVICE)
        run = partial(qwen.chunked_logps, *both, targets, chunk=chunk)
        return timed(lambda: grad(run()[0].sum(), both), b, 8 * words * wide * n, n)

    for chunk in (n // 64, n // 32, n // 16):
        needs = 6 * words * wide + 4 * n * wide + 20 * (words * chunk + n)
        rows.append(attempt(b, {"chunk": chunk}, partial(measure, chunk), needs))
    return rows


@torch.no_grad()
def vision(b: Bench) -> list[dict]:
    """The frozen tower on 8 pictures of one size; a new size has new windows: the first call."""
    tower, rows, size = built(b.model).visual, [], b.model.vision.patch_size
    for wide, high in b.pictures:
        grids = 8 * [(1, high // size, wide // size)]
        run = partial(tower, random(8 * math.prod(grids[0]), 6 * size**2), grids)
        rows.append(attempt(b, {"pixels": f"{wide} x {high}"}, partial(timed, run, b, count=8)))
    return rows


@torch.no_grad()
def sampler(b: Bench, context: int = 2048) -> list[dict]:
    """A step as TorchSampler's, against the time to read weights and cache once."""
    c, model, draw = b.model, built(b.model), import_module("rollout").draw_tokens
    weights = 2 * sum(p.numel() for p in (*model.model.layers.parameters(), model.head_weight))
    forbidden = torch.arange(5, device=DEVICE)

    def measure(batch: int) -> dict:
        cache = qwen.KVCache(c, batch, context + 24, torch.bfloat16, DEVICE)
        cache.layers.normal_()
        cache.lengths += context
        cache.longest = context

        def step():
            token = qwen.Inputs(cache.lengths * 0, cache.lengths.expand(3, -1), None)
            logits = model.logits(token, cache=cache)
            uniforms = torch.rand(batch, dtype=torch.float64, device=DEVICE)
            token = draw(logits, uniforms, 1.0, forbidden)
            logits.log_softmax(-1).gather(1, token[:, None]).cpu()

        row, read = timed(step, b, 0, batch, 4), weights + batch * context * plan.token_bytes(c)
        return row | {"share": 1e-6 * read / b.gbs / row["ms"]}  # of the time to read once

    return [attempt(b, {"batch": n}, partial(measure, n)) for n in (64, 128, 256)]


def stages(b: Bench) -> list[dict]:
    """coldstart.py, then rl.py, on the miniature's data: the last step of each."""
    coldstart, rl = map(import_module, ("coldstart", "rl"))
    base, world = map(import_module, ("miniature.base", "miniature.world"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        world.save_tokenizer(Path(model := f"{name}/model"))
        tiny = vars(base.model_config(len(world.SPECIAL) + len(world.VOCABULARY)))
        ids = {name: tiny[name] for name in tiny if name.endswith("token_id")}
        qwen.save_model(built(replace(b.small, **ids)), model)
        files = dict(files=("train", "sft"), train=256, sft=1024)
        world.main(world.Config(out=f"{name}/data", **files))
        sft = dict(data=f"{name}/data/sft.jsonl", batch_rows=64, epochs=192 / 896, lr=1e-5)
        ppo = dict(data=f"{name}/data/train.jsonl", steps=3, problems=8, samples=4, offload=True)
        ppo |= dict(lr=1e-6, critic_lr=5e-6)
        for stage, settings in (coldstart, sft), (rl, ppo):  # three steps each
            more = dict(model=model, recompute="selective", out=f"{name}/{stage.__name__}")
            run = partial(stage.main, stage.Config(**settings | more))
            rows.append(attempt(b, {"stage": stage.__name__}, run))
            if (log := Path(more["out"]) / "metrics.jsonl").is_file():
                rows[-1] |= json.loads(log.read_text().splitlines()[-1])
    return rows


def constants(b: Bench) -> dict[str, tuple[float, float]]:
    """{setting or constant of plan.py: (what it assumes, what this has measured)}."""
    found, best, peak = {}, {}, 1e9 * b.tflops  # FLOPs a millisecond
    good = {name: [r for r in rows if "error" not in r] for name, rows in b.found.items()}
    heads = [1e3 / r["per_second"] for r in good.get("head", [])]  # ms a row
    for r in (r for r in good.get("decoder", []) if heads and r["documents"] == 1):
        n = r["longest"]
        flops = qwen.train_flops(b.model, n) * plan.EXECUTED[r["recompute"]]
        best[n] = max(best.get(n, 0.0), flops / (peak * (r["ms"] + n * min(heads))))
    if best:
        found["mfu"] = plan.Config.mfu, median(best.values())  # over the lengths
    if shares := [r["share"] for r in good.get("sampler", [])]:
        found["decode"] = plan.Config.decode, max(shares)  # the torch sampler's, which is no vLLM
    if held := [r["reserve_gb"] for rows in good.values() for r in rows if "reserve_gb" in r]:
        found["RESERVE_GB"] = plan.RESERVE_GB, max(held)
    return found


def sheet_of(name: str) -> tuple[float, ...]:
    """NVIDIA's (TFLOP/s, GB/s) by the driver's name; () for a GPU that plan.py does not know, as
    for PCIe and NVL boards, which are slower than those it has.
    """
    name = name.lower().replace(" ", "")
    if "pcie" in name or "nvl" in name:
        return ()
    fits = (g for g in plan.GPUS if all(part in name for part in g.split("-")))
    return plan.GPUS.get(next(fits, ""), ())[1:]


def machine(b: Bench) -> dict:
    """Its name and versions. Sets the peaks: the data sheet's, or measured where there is none."""
    row = {"name": "cpu", "torch": torch.__version__}
    if CUDA:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        row |= {"name": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        row |= {"driver": subprocess.run(asked, capture_output=True, text=True).stdout.strip()}
        b.room = torch.cuda.mem_get_info()[0]
    sheet = sheet_of(row["name"])
    found = [] if sheet else ceilings(b)
    b.tflops, b.gbs = sheet or (max(r.get(n, 0) for r in found) for n in ("tflops", "gbs"))
    return row | {"tflops": b.tflops, "gbs": b.gbs, "by": "data sheet" if sheet else "measured"}


def main(cfg: Config):
    if cfg.size not in ("mini", *plan.MODELS) or {*cfg.parts} - {*SECONDS}:
        raise ValueError(f"size: mini, {', '.join(plan.MODELS)}; parts: {', '.join(SECONDS)}")
    if not CUDA and cfg.size != "mini":
        raise ValueError("there is no GPU here; --size mini runs the same code on a CPU")
    b, out = Bench(*MINI) if cfg.size == "mini" else Bench(plan.MODELS[cfg.size]), Path(cfg.out)
    found = {"machine": machine(b), "parts": b.found}
    out.parent.mkdir(parents=True, exist_ok=True)
    print(table([found["machine"]]))
    for name in cfg.parts or [*SECONDS][:-1]:
        begun = time.monotonic()
        b.until = math.inf if cfg.size == "mini" else begun + SECONDS[name]  # a CPU is in no haste
        row = attempt(b, {}, partial(lambda part: {"rows": part(b)}, globals()[name]))
        b.found[name] = row.get("rows", [row])
        out.write_text(json.dumps(found | {"plan": constants(b)}, indent=1))
        spent = f"{time.monotonic() - begun:.0f} s, written to {out}"
        print(f"\n## {name}: {spent}\n\n{table(b.found[name])}", flush=True)
    rows = [{"plan.py": name, "assumed": x, "measured": y} for name, (x, y) in constants(b).items()]
    print(table(rows) if rows else "")
    distributed.finish(distributed.World(0, 1, DEVICE))


if __name__ == "__main__":
    run_main(main, Config)
