"""Qwen2.5-VL from torch up: vision tower, M-RoPE, decoder over packs, KV cache, value head.

A pack is one row of T tokens that holds several documents back to back. There is no padding and no
mask: attention runs document by document, everything else token by token. Images enter as patches,
leave the tower as one row per 2x2 patches, and are written over the embeddings of their
<|image_pad|> tokens.

    ids (T,) ──embed──▶ x (T, C) ◀──slots── visual(patches (S, 1176)) (S/4, C)
    x ──28 blocks, attention within each document──▶ hidden (T, C)
    hidden ──rows (R,)──▶ logits | log-probs and entropies | values

The names of the parameters are those of the hub's files (`visual.*`, `model.layers.*`,
`lm_head.weight`), so that loading and saving is a copy. The file knows nothing of GPUs, optimisers
or RL: FSDP, dtype and recomputation are applied from outside. Equal to transformers'
Qwen2_5_VLForConditionalGeneration to float rounding, logits and gradients (tests/test_model.py).

Sources: Qwen2.5-VL (arXiv 2502.13923, sec. 2.1), M-RoPE: Qwen2-VL (arXiv 2409.12191, sec. 2.1).
Dimensions: T tokens of a pack, N rows of a KV cache, B images, S patches, R rows wanted, H heads, K
KV heads, D head dim, C width, V vocabulary.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # torch's own attention does the same
    flash_attn_varlen_func = None

VISION_ROPE_THETA = 10_000.0  # Qwen2.5-VL's vision tower; not in config.json
CUDNN_FROM = 2048  # tokens of a document; a guess until bench/gpu.py has run
HEAD_CHUNK = 2048  # rows of logits at a time: 2048 x 152k x 4 B = 1.2 GB; 64k rows would be 40 GB
KEPT_LOGITS = 64 << 20  # bytes of logits that are kept for backward, not computed again
SHARD_BYTES = 4 << 30  # one safetensors file of a saved checkpoint
INDEX = "model.safetensors.index.json"  # which of several files holds which weight
COMPANIONS = (  # a model directory's tokenizer, chat template, image and sampling settings
    "*token*.json vocab.json merges* chat_template* *processor_config.json generation_config.json"
)

Grid = tuple[int, int, int]  # time, height, width of an image, in patches

# ------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class VisionConfig:
    """Fields as in the hub's `vision_config`: sizes in patches, widths in features."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    in_chans: int = 3
    hidden_act: str = "silu"


@dataclass(frozen=True)
class Config:
    """Fields as in the hub's `config.json`; defaults are what 3B and 7B share."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    mrope_section: tuple[int, ...]  # frequencies that turn with time, row, column
    vision: VisionConfig
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 128_000
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    bos_token_id: int = 151643
    eos_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_token_id: int = 151654
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self):
        v, width, heads, dim = (
            self.vision,
            self.hidden_size,
            self.num_attention_heads,
            self.head_dim,
        )
        kv, sections = self.num_key_value_heads, self.mrope_section
        unit = v.patch_size * v.spatial_merge_size  # pixels a token, along one side
        wrong = {
            f"hidden_size {width} with num_attention_heads {heads}": width % heads,
            f"num_attention_heads {heads} with num_key_value_heads {kv}": heads % kv,
            f"mrope_section {sections}, not 3 counts": len(sections) != 3,
            f"mrope_section {sections} with head_dim {dim}": 2 * sum(sections) != dim,
            "use_sliding_window: attention covers the whole document": self.use_sliding_window,
            f"hidden_act {self.hidden_act}, not silu": self.hidden_act != "silu",
            f"vision hidden_act {v.hidden_act}, not silu": v.hidden_act != "silu",
            f"vision num_heads {v.num_heads} of {v.hidden_size}": v.hidden_size % (4 * v.num_heads),
            f"out_hidden_size {v.out_hidden_size}, not {width}": v.out_hidden_size != width,
            f"window_size {v.window_size}, no multiple of {unit}": v.window_size % unit,
        }
        if found := [problem for problem, is_so in wrong.items() if is_so]:
            raise ValueError(f"not supported: {'; '.join(found)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """What a sampler must never emit: no picture would stand behind it."""
        ends = (self.vision_start_token_id, self.vision_end_token_id)
        return (*ends, self.vision_token_id, self.image_token_id, self.video_token_id)


def read_config(directory: str | Path) -> Config:
    """`config.json`, in the hub's flat layout or in transformers' nested one (`text_config`).

    Raises FileNotFoundError or ValueError, naming the file and the key.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: a model directory has config.json, *.safetensors, tokenizer.json"
        )
    raw = json.loads(path.read_text())
    if (kind := raw.get("model_type")) != "qwen2_5_vl":
        raise ValueError(f"{path}: model_type is {kind!r}; this code runs qwen2_5_vl only")
    # The top level says whether the head is tied: text_config may repeat a default instead.
    flat = raw | raw.get("text_config", {})
    flat["tie_word_embeddings"] = raw.get("tie_word_embeddings", flat.get("tie_word_embeddings"))
    rope = flat.get("rope_scaling") or flat.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "mrope")) not in ("mrope", "default"):
        raise ValueError(f"{path}: rope {rope} is not supported; Qwen2.5-VL's type is mrope")
    try:
        flat["vision"] = VisionConfig(**_own(VisionConfig, flat["vision_config"]))
        return Config(**_own(Config, flat | rope))  # rope: mrope_section, in newer files rope_theta
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _own(cls, raw: dict) -> dict:
    names = {f.name for f in fields(cls)}
    known = {k: v for k, v in raw.items() if k in names and v is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """The hub's flat layout, which transformers and vLLM open."""
    flat = asdict(config)
    vision, sections = flat.pop("vision"), flat.pop("mrope_section")
    return flat | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": vision | {"tokens_per_second": 2},
        # the hub's; without one, transformers warns that the tokenizer is broken, as Mistral's was
        "transformers_version": "4.49.0",
    }


# ---------------------------------------------------------------------------------------- positions


def mrope_positions(length: int, images: list[tuple[int, Grid]], merge: int = 2) -> Tensor:
    """M-RoPE (arXiv 2409.12191, sec. 2.1): (time, row, column) of a document's tokens, (3, length).

    images: (index of the first image token, grid), in order. Text counts 0, 1, 2 on all three axes.
    An image's tokens share the time of its start and count rows and columns from there; the text
    after it goes on from the largest of them plus one. So a picture of 20 x 30 merged patches takes
    600 tokens and 30 positions.
    """
    pieces, done, start = [], 0, 0  # done: tokens placed; start: next free position
    for offset, (t, h, w) in images:
        text = torch.arange(offset - done) + start
        start += offset - done
        time = torch.zeros(t, dtype=torch.int64)  # one picture is one moment
        grid = torch.cartesian_prod(time, torch.arange(h // merge), torch.arange(w // merge)).T
        pieces += [text.expand(3, -1), grid + start]
        done, start = offset + grid.shape[1], start + int(grid.max()) + 1
    assert done <= length, f"images end at token {done} of a document of {length}"
    pieces.append((torch.arange(length - done) + start).expand(3, -1))
    return torch.cat(pieces, dim=1)


def rotary(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D/2) -> cos, sin (T, 1, D). In float32: bf16 cannot tell positions above 256 apart."""
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (T, H, D): feature i turns together with feature i + D/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@lru_cache(maxsize=4)  # every forward asks, and a copy to the GPU waits for it
def axes_of(sections: tuple[int, ...], device: torch.device) -> Tensor:
    """(D/2,): which of time, row and column each frequency turns with."""
    return torch.arange(3).repeat_interleave(torch.tensor(sections)).to(device)


def frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


# ---------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Attention within each document of a pack. q (T, H, D), k and v (T, K, D) -> (T, H, D).

    One call per run of documents of equal length: windows of a picture and the 16 short rows of a
    toy pack go together, two long documents go one by one, each with the kernel's own causal mask.
    A (T, T) mask never exists. flash-attn does all documents in one call, where it is installed.
    """
    assert sum(lengths) == len(q), f"lengths sum to {sum(lengths)}, the pack has {len(q)} tokens"
    if takes_flash(q):
        ends = ends_of(tuple(lengths), q.device)
        spans = (ends, ends, max(lengths), max(lengths))
        return flash_attn_varlen_func(q, k, v, *spans, causal=causal)  # not yet run on a GPU
    grouped, outputs = q.shape[1] != k.shape[1], []
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]  # documents, tokens each
    # split, not slices: a slice's backward writes a gradient of the whole pack, for each document
    parts = (x.split([math.prod(run) for run in runs]) for x in (q, k, v))
    for shape, *heads in zip(runs, *parts, strict=True):
        more = room_for_cudnn(q, shape[1]) if causal else 0
        heads = [x.unflatten(0, shape) for x in heads]
        if more:  # tokens behind the end, which causal attention does not look at
            heads = [F.pad(x, (0, 0, 0, 0, 0, more)) for x in heads]
        heads = [x.transpose(1, 2) for x in heads]
        with kernels(q, shape[1] if causal else 0):
            out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=grouped)
        outputs.append(out[:, :, : shape[1]].transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def kernels(q: Tensor, length: int):
    """On GPUs, cuDNN for long causal documents, flash for all else; elsewhere torch's choice.

    cuDNN is the fastest on Hopper, but plans every new shape for 0.04 to 0.5 s (pytorch issue
    171627, FunASR issue 3704), and a batch of RL has thousands of lengths. Not yet run on a GPU.
    """
    if not q.is_cuda or q.dtype == torch.float32:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION] * (length >= CUDNN_FROM)
    order += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def room_for_cudnn(q: Tensor, length: int) -> int:
    """Tokens that a long document gets behind its end, so that an octave has eight lengths."""
    if not q.is_cuda or q.dtype == torch.float32 or length < CUDNN_FROM:
        return 0
    return -length % (1 << (length.bit_length() - 4))


def takes_flash(q: Tensor) -> bool:
    return flash_attn_varlen_func is not None and q.is_cuda and q.dtype != torch.float32


@lru_cache(maxsize=4)  # every layer asks, and a copy to the GPU waits for it
def ends_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class KVCache:
    """Keys and values of N rows that grow by one token a step. Rows have lengths of their own:
    nothing is padded, the room behind a row's end is masked.
    """

    def __init__(self, c: Config, rows: int, room: int, dtype: torch.dtype, device: torch.device):
        shape, layers = (rows, c.num_key_value_heads, room, c.head_dim), range(c.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens held, a row
        self.longest, self.room = 0, room  # of the lengths, at most: to ask the GPU is to wait

    def fill(self, layer: int, k: Tensor, v: Tensor, lengths: list[int]):
        """A packed prefill: document n becomes row n. k, v (T, K, D)."""
        self.longest = max(lengths)
        for row, (keys, values) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
            self.keys[layer][row, :, : len(keys)] = keys.transpose(0, 1)
            self.values[layer][row, :, : len(values)] = values.transpose(0, 1)

    def look(self):
        """Once a token, before its layers: what each row sees, itself included."""
        device, unit = self.lengths.device, 128 if self.lengths.is_cuda else 1  # few shapes on GPUs
        used = min(self.room, -(-(self.longest + 1) // unit) * unit)
        self.rows = torch.arange(len(self.lengths), device=device)
        self.seen = torch.arange(used, device=device) <= self.lengths[:, None]  # (N, used)
        self.longest += 1

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes a token a row and attends to all up to it. q (N, H, D), k and v (N, K, D)."""
        used = self.seen.shape[1]
        self.keys[layer][self.rows, :, self.lengths] = k
        self.values[layer][self.rows, :, self.lengths] = v
        # The H/K query heads of a KV head stand as its queries: grouped, and no key is repeated.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (N, K, H/K, D)
        keys, values = self.keys[layer][:, :, :used], self.values[layer][:, :, :used]
        mask = self.seen[:, None, None]
        with kernels(q, 1):
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.flatten(1, 2)  # (N, H, D)

    def take(self, rows: Tensor):
        """Row i is from now on what row rows[i] was: repeats a prompt for its samples."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]
        self.lengths = self.lengths[rows]

    def keep(self, live: Tensor) -> Tensor:
        """Drops the rows that have ended: live (N,) bool -> rows (n,), as if by take(rows).

        In place: the last live rows move into the gaps, the others stay. take() would copy the
        whole cache whenever a row ends.
        """
        count = int(live.sum())
        rows = torch.arange(count, device=live.device)
        gaps, last = ~live[:count], live[count:].nonzero().squeeze(1) + count
        rows[gaps] = last
        for layers in (self.keys, self.values):
            for layer, held in enumerate(layers):
                held[:count][gaps] = held[last]
                layers[layer] = held[:count]
        self.lengths = self.lengths[rows]
        return rows


# ------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)  # bf16 squares lose 5 bits
        return self.weight * normed.to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # (S, H, D) each
        q, k = (rotate(y.float(), cos, sin).to(v.dtype) for y in (q, k))
        return self.proj(attend(q, k, v, lengths, causal=False).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden_size, 1e-6), RMSNorm(c.hidden_size, 1e-6)
        self.attn = VisionAttention(c)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The hub's Conv3d: its stride is its kernel, so it is one product with flattened patches."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.proj = nn.Module()
        shape = (c.in_chans, c.temporal_patch_size, c.patch_size, c.patch_size)
        start = torch.randn(c.hidden_size, *shape) / math.prod(shape) ** 0.5
        self.proj.weight = nn.Parameter(start)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return patches.to(weight.dtype) @ weight.T  # (S, 1176) -> (S, C)


class Merger(nn.Module):
    """Four neighbouring patches become one token of the decoder."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        wide = c.hidden_size * c.spatial_merge_size**2
        self.ln_q = RMSNorm(c.hidden_size, 1e-6)
        out = nn.Linear(wide, c.out_hidden_size)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.mlp[0].in_features))


def window_order(grids: list[Grid], merge: int, side: int) -> tuple[Tensor, list[int], list[int]]:
    """Windows without masks (arXiv 2502.13923, sec. 2.1.1): the patches of one become neighbours.

    side: of a window in merged patches. -> order (S/4,) of the merged patches, lengths in patches
    of the windows (smaller at the right and lower edge, never padded) and of the frames.
    """
    order, windows, frames, start = [], [], [], 0
    for t, h, w in grids:
        sides = (t, h // merge, w // merge)
        frame, row, column = torch.cartesian_prod(*map(torch.arange, sides)).T
        down, across = (math.ceil(n / side) for n in sides[1:])  # windows
        window = (frame * down + row // side) * across + column // side
        order.append(window.argsort(stable=True) + start)
        windows += (window.bincount() * merge**2).tolist()
        frames += [h * w] * t
        start += len(window)
    return torch.cat(order), windows, frames


def patch_positions(grids: list[Grid], merge: int) -> Tensor:
    """(S, 2): row and column of every patch. Their order: 2x2 blocks, row by row inside a block."""
    places = []
    for t, h, w in grids:
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        place = place.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
        places.append(place.reshape(h * w, 2).repeat(t, 1))
    return torch.cat(places)


class VisionTower(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = Merger(c)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """patches (S, 1176) of B images -> (S/4, width of the decoder): a row an image token."""
        c, device, merge = self.config, patches.device, self.config.spatial_merge_size
        if (expected := sum(t * h * w for t, h, w in grids)) != len(patches):
            raise ValueError(f"grids {grids} have {expected} patches, got {len(patches)}")
        order, windows, frames = window_order(grids, merge, c.window_size // c.patch_size // merge)
        order, places = order.to(device), patch_positions(grids, merge).to(device)
        turns = frequencies(c.hidden_size // c.num_heads // 2, VISION_ROPE_THETA, device)
        angles = (places[..., None] * turns).flatten(1)  # (S, D/2): half by row, half by column

        def by_window(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, merge**2))[order].flatten(0, 1)

        cos, sin = rotary(by_window(angles))
        x = by_window(self.patch_embed(patches))
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames if index in c.fullatt_block_indexes else windows)
        return self.merger(x)[order.argsort()]


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.dim = layer, c.head_dim  # layer: which of the cache's tensors are its own
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, C) -> q (T, H, D), k and v (T, K, D)."""
        split = (-1, self.dim)
        q, k, v = (p(x).unflatten(1, split) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths, cache, shared) -> Tensor:
        """-> (T, H D), each token having seen its document up to itself."""
        if lengths is None:  # one token a row, everything before it is in the cache
            return cache.step(self.layer, q, k, v).flatten(1)
        if cache is not None:
            cache.fill(self.layer, k, v, lengths)
        if shared is None:
            return attend(q, k, v, lengths, causal=True).flatten(1)
        expand, back = shared  # a prompt that several documents share stands once in x
        q, k, v = (y.index_select(0, expand) for y in (q, k, v))
        return attend(q, k, v, lengths, causal=True).flatten(1).index_select(0, back)


class Block(nn.Module):
    """Attention follows the lengths of the documents; what is before and behind it does not, and so
    can be compiled (parallel.compile_blocks).
    """

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size, bias=False)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def behind(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: list[int] | None,
        cache: KVCache | None,
        shared: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (T, C), cos and sin (T, 1, D); shared: expand (E,), back (T,)."""
        attended = self.self_attn(*self.before(x, cos, sin), lengths, cache, shared)
        return self.behind(x, attended)


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        lengths: list[int] | None,
        cache: KVCache | None,
        expand: Tensor | None = None,
    ) -> Tensor:
        """x (T, C), positions (3, T), expand (E,) -> hidden (T, C)."""
        c = self.config
        # Each frequency turns with one axis: the first 16 with time, 24 with row, 24 with column.
        axes = axes_of(tuple(c.mrope_section), x.device)
        angles = positions[axes].T * frequencies(c.head_dim, c.rope_theta, x.device)  # (T, D/2)
        cos, sin = (y.to(x.dtype) for y in rotary(angles))
        if lengths is None:
            cache.look()
        shared = None
        if expand is not None:  # back: of each token, the first of its places in attention's order
            places = torch.arange(len(expand), device=x.device)
            back = places.new_zeros(len(x)).scatter_reduce(
                0, expand, places, "amin", include_self=False
            )
            shared = expand, back
        for layer in self.layers:
            x = layer(x, cos, sin, lengths, cache, shared)
        return self.norm(x)


# ---------------------------------------------------------------------------------------- the model


class Qwen25VL(nn.Module):
    """Policy (head="lm") or critic (head="value": 1 wide instead of the vocabulary)."""

    def __init__(self, config: Config, head: str = "lm"):
        super().__init__()
        if head not in ("lm", "value"):
            raise ValueError(f"head must be 'lm' or 'value', got {head!r}")
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        self.lm_head = self.value_head = None
        if head == "value":
            self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        elif not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        lengths: list[int] | None = None,
        patches: Tensor | None = None,
        grids: list[Grid] = (),
        slots: Tensor | None = None,
        sources: Tensor | None = None,
        expand: Tensor | None = None,
        cache: KVCache | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ):
        """A pack of documents, or one more token for each row of a cache (lengths=None).

        ids (T,), positions (3, T), lengths of the documents; patches (S, 1176) with their grids;
        row sources[m] of the tower's output is written over token slots[m], so one picture can
        serve many documents. expand (E,): the rows of the documents one after the other, where
        several share a prompt that stands once in ids; lengths then sum to E. With a cache, a pack
        of N documents fills its N rows; without lengths, ids is (N,), one token a row. rows (R,):
        the tokens whose output is wanted (all, if None).
        -> critic: values (R,) float32; with targets (R,): log-probs and entropies, (R,) float32
        each; else logits (R, V) float32.
        """
        x = self.model.embed_tokens(ids)
        if patches is not None:
            seen = self.visual(patches, grids).to(x.dtype)
            x = x.index_copy(0, slots, seen.index_select(0, sources))
        hidden = self.model(x, positions, lengths, cache, expand)
        if cache is not None:
            cache.lengths += 1 if lengths is None else torch.tensor(lengths, device=ids.device)
        if rows is not None:  # hidden[rows] would add up repeated rows in whatever order
            hidden = hidden.index_select(0, rows)
        if self.value_head is not None:
            # float32: returns differ by less than bf16 resolves once values are near 1
            return F.linear(hidden.float(), self.value_head.weight[0].float())
        if targets is not None:
            return chunked_logps(hidden, self.head_weight, targets, temperature)
        return F.linear(hidden, self.head_weight).float()


def chunked_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = HEAD_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution; a long row's logits never exist.

    hidden (R, C), weight (V, C), targets (R,) -> logps (R,), entropies (R,) float32. `chunk` rows
    of logits at a time; backward computes them again (7 % of a 7B step, once more) rather than keep
    32k x 152k x 4 B = 19 GB. Softmax in float32: in bf16 the log-probs are off by 0.02 on average.
    Entropies carry no gradient (the paper has no entropy bonus, sec. 4.1).
    """

    def piece(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight).float()  # (chunk, V)
        logits = logits if temperature == 1 else logits / temperature
        logz = logits.logsumexp(-1)
        logps = logits.gather(1, targets[:, None]).squeeze(1) - logz
        with torch.no_grad():
            every = logits - logz[:, None]
            entropies = -(every.exp() * every).sum(-1)
        return logps, entropies

    if 4 * len(hidden) * len(weight) > KEPT_LOGITS:  # bytes
        piece = partial(checkpoint, piece, use_reentrant=False, preserve_rng_state=False)
    outputs = map(piece, hidden.split(chunk), targets.split(chunk))
    logps, entropies = zip(*outputs, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def train_flops(c: Config, length: int) -> float:
    """FLOPs of forward and backward through the decoder for one document of `length` tokens.

    6 a weight of a matrix product and token, and causal attention: half of 12 H D L^2 a layer. The
    embedding is a lookup. 7B: 42.4 GFLOP a token and 0.60 MFLOP x length.
    """
    wide, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    layer = 2 * wide * (wide + kv) + 3 * wide * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.vocab_size * wide
    return 6.0 * weights * length + 6.0 * c.num_hidden_layers * wide * length**2


# ------------------------------------------------------------------------------- loading and saving


def hub_name(name: str) -> str:
    """transformers >= 4.52 in memory (`model.visual.*`, `model.language_model.*`) -> the files."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def read_weights(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(hub name, tensor) of every weight file, one tensor in memory at a time."""
    files = sorted(Path(directory).glob("*.safetensors"))
    if (index := Path(directory) / INDEX).is_file():
        names = json.loads(index.read_text())["weight_map"].values()
        files = [Path(directory) / name for name in sorted({*names})]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names {missing}, which are not there: copy them")
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}: download the weights there")
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                yield hub_name(name), weights.get_tensor(name)


def empty_model(directory: str | Path, head: str = "lm") -> Qwen25VL:
    """The architecture of a model directory on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Qwen25VL(read_config(directory), head)


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    head: str = "lm",
) -> Qwen25VL:
    """A model directory, whole, as policy (head="lm") or critic (head="value"); ValueError as in
    load_weights. parallel.load is the same in slices.
    """
    model = empty_model(directory, head).to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model


def copy_weight(weight: Tensor, tensor: Tensor):
    weight.data.copy_(tensor)


def load_weights(
    model: Qwen25VL,
    directory: str | Path,
    put: Callable[[Tensor, Tensor], None] = copy_weight,
):
    """Fills a model from the files in either layout, one tensor in memory at a time.

    put(weight, tensor): how a weight takes its value. A critic may come from a policy's files: its
    value head then starts as in Open-Reasoner-Zero's code, N(0, 1/(C+1)). Every weight of the model
    must be in the files and every weight of the files must be used; ValueError names those that are
    not, and wrong shapes.
    """
    missing, problems, tied = dict(model.named_parameters()), [], None
    unused = {"lm_head.weight", "value_head.weight"} - set(missing)  # of the head that is not here
    for name, tensor in read_weights(directory):
        weight = missing.pop(name, None)
        if weight is not None and weight.shape == tensor.shape:
            put(weight, tensor)
        elif weight is not None:
            shapes = f"{[*tensor.shape]} in the files, {[*weight.shape]} by config.json"
            problems.append(f"{name} is {shapes}")
        elif name == "lm_head.weight" and model.config.tie_word_embeddings:
            tied = tensor
        elif name not in unused:
            problems.append(f"unexpected {name}")
    if tied is not None:
        stored = dict(weight for weight in read_weights(directory) if "embed_tokens" in weight[0])
        if not torch.equal(tied, stored["model.embed_tokens.weight"]):
            problems.append("lm_head.weight differs from the embedding that config.json ties it to")
    if (weight := missing.pop("value_head.weight", None)) is not None:
        put(weight, torch.empty(weight.shape).normal_(std=1 / (weight.shape[1] + 1)))
    problems += [f"missing {name}" for name in missing]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{directory} does not fit config.json: {'; '.join(problems[:8])}{more}")


def shards(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[dict]:
    """{name: tensor} of at most SHARD_BYTES: what saving a model takes of the host's memory."""
    shard, size = {}, 0
    for name, tensor in weights:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name], size = tensor, size + tensor.nbytes
    yield shard


def save_weights(
    weights: Iterable[tuple[str, Tensor]],
    config: Config,
    directory: str | Path,
    dtype: torch.dtype,
    like: str | Path | None = None,
):
    """Writes (name, tensor) pairs as a Hugging Face directory in the hub's layout.

    like: a model directory whose tokenizer, template and image settings are copied along.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    places, size = {}, 0
    for number, shard in enumerate(shards(weights, dtype), start=1):
        file = f"model-{number:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    if number == 1:
        (directory / file).rename(directory / "model.safetensors")
    else:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(config_json(config, dtype), indent=1))
    if like is not None and Path(like).resolve() != directory.resolve():
        for pattern in COMPANIONS.split():
            for file in Path(like).glob(pattern):
                shutil.copy(file, directory / file.name)


def save_model(model: Qwen25VL, directory: str | Path, like: str | Path | None = None):
    """As a directory that transformers and vLLM open. A tied head is stored once."""
    dtype = next(model.parameters()).dtype
    save_weights(model.named_parameters(), model.config, directory, dtype, like)
