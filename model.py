"""Qwen2.5-VL from torch up: vision tower, M-RoPE, decoder over packs, KV cache, value head.

A pack is one row of T tokens that holds several documents back to back, without padding or mask:
attention runs document by document, everything else token by token. Images enter as patches, leave
the tower as one row per 2x2 patches, and are written over the embeddings of their image tokens.

    ids (T,) ──embed──▶ x (T, C) ◀──slots── visual(patches (S, 1176)) (S/4, C)
    x ──28 blocks, attention within each document──▶ hidden (T, C)
    hidden ──rows (R,)──▶ logps (R,), entropies (R,)  |  values (R,)  |  logits (R, V)

Parameters are named as in the hub's files; logits and gradients equal those of transformers to
float rounding (tests/test_model.py). FSDP, dtype and recomputation are applied from outside.
Dimensions: T tokens of a pack, E of its documents (T, unless they share a prompt), N rows of a KV
cache, S patches, R rows wanted, H heads, K KV heads, D head dim, C width, V vocabulary.
"""

import json
import math
import shutil
import warnings
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # torch's own attention does the same
    flash_attn_varlen_func = None

VISION_ROPE_THETA = 10_000.0  # Qwen2.5-VL's vision tower; not in config.json
HEAD_CHUNK = 2048  # rows of logits at a time: 2048 x 152k x 4 B = 1.2 GB; 64k rows would be 40 GB
COMPANIONS = "*token*.json", "vocab.json", "merges*", "chat_template*", "*processor_config.json"
COMPANIONS += ("generation_config.json",)  # what else a model directory holds

Folder = str | Path
Rope = tuple[Tensor, Tensor]  # cos and sin of the rotary angles
Grid = tuple[int, int, int]  # 1 (there are no films), height and width of an image, in patches

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each rank reads alone

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
    bos_token_id: int = 151643
    eos_token_id: int | tuple[int, ...] = 151645  # some files list several
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_token_id: int = 151654
    image_token_id: int = 151655
    video_token_id: int = 151656

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """What a sampler must never emit: no picture would stand behind it."""
        ends = (self.vision_start_token_id, self.vision_end_token_id)
        return (*ends, self.vision_token_id, self.image_token_id, self.video_token_id)


def read_config(directory: Folder) -> Config:
    """`config.json`, in the hub's flat layout or in transformers' nested one (`text_config`)."""
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        flat = raw | (raw.get("text_config") or {})
        rope = flat.get("rope_scaling") or flat["rope_parameters"]  # in newer files, with theta
        kinds = raw["model_type"], rope.get("rope_type", rope.get("type", "mrope"))
        kinds += bool(flat.get("use_sliding_window")), flat.get("hidden_act", "silu")
        if kinds not in (("qwen2_5_vl", kind, False, "silu") for kind in ("mrope", "default")):
            names = "model_type, rope_type, use_sliding_window, hidden_act"
            raise ValueError(f"its {names} are {kinds}")
        # the top level says whether the head is tied: text_config may repeat a default instead
        tied = raw.get("tie_word_embeddings", flat.get("tie_word_embeddings"))
        vision = VisionConfig(**known_fields(VisionConfig, raw["vision_config"]))
        flat |= rope | {"vision": vision, "tie_word_embeddings": tied}
        return Config(**known_fields(Config, flat))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} describes no Qwen2.5-VL: {error!r}") from error


def known_fields(cls: type, raw: dict) -> dict:
    """The entries that are fields of `cls`; null means the default."""
    values = {field.name: raw.get(field.name) for field in fields(cls)}
    return {n: tuple(x) if isinstance(x, list) else x for n, x in values.items() if x is not None}


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
        "transformers_version": "4.49.0",  # without one, it warns that the tokenizer is broken
    }


# ------------------------------------------------------------------------------------------- inputs


@dataclass
class Inputs:
    """What the model reads: a pack of documents, back to back."""

    ids: Tensor  # (T,) int64
    positions: Tensor  # (3, T) int64: M-RoPE, from 0 in each document
    lengths: list[int] | None  # tokens of each document, in order; None: one token a cache row
    patches: Tensor | None = None  # (S, 1176) float32: the pixels of every picture, once
    grids: list[Grid] = ()  # of the pictures, in patches
    slots: Tensor | None = None  # (M,) int64: the tokens that show them, in the tower's order
    expand: Tensor | None = None  # (E,) int64: all documents' rows of ids, if some share a prompt


def mrope_positions(length: int, images: list[tuple[int, Grid]], merge: int = 2) -> Tensor:
    """M-RoPE (arXiv 2409.12191, sec. 2.1): (time, row, column) of a document's tokens, (3, length).

    images: (index of the first image token, grid), in order. Text counts 0, 1, 2 on all three axes;
    an image's tokens count rows and columns from where it starts; the text goes on from the largest
    plus one. 20 x 30 merged patches take 600 tokens and 30 positions.
    """
    pieces, done, start = [], 0, 0  # done: tokens placed; start: next free position
    for offset, (_, h, w) in images:
        text = torch.arange(offset - done) + start
        start += offset - done
        grid = torch.cartesian_prod(*map(torch.arange, (1, h // merge, w // merge))).T
        pieces += [text.expand(3, -1), grid + start]
        done, start = offset + grid.shape[1], start + int(grid.max()) + 1
    pieces.append((torch.arange(length - done) + start).expand(3, -1))
    return torch.cat(pieces, dim=1)


def rotary(angles: Tensor) -> Rope:
    """(T, D/2) -> cos, sin (T, 1, D). In float32: bf16 cannot tell positions above 256 apart."""
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of (T, H, D): feature i turns together with feature i + D/2."""
    (cos, sin), (first, second) = rope, x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


# ---------------------------------------------------------------------------------------- attention


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Attention within each document of a pack. q (T, H, D), k and v (T, K, D) -> (T, H, D).

    One call for each run of documents of equal length, with the kernel's own causal mask, never a
    (T, T) one. flash-attn, where installed, does all in one call (not yet run on a GPU).
    """
    if flash_attn_varlen_func is not None and q.is_cuda and q.dtype != torch.float32:
        ends, longest = ends_of(tuple(lengths), q.device), max(lengths)
        return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)
    grouped, outputs = q.shape[1] != k.shape[1], []
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]  # documents, tokens each
    # split, not slices: a slice's backward writes a gradient of the whole pack, for each document
    parts = (x.split([math.prod(run) for run in runs]) for x in (q, k, v))
    for shape, *heads in zip(runs, *parts, strict=True):
        heads = [x.unflatten(0, shape).transpose(1, 2) for x in heads]
        out = F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@lru_cache(maxsize=4)  # every layer asks, and a copy to the GPU waits for it
def ends_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class KVCache:
    """Keys and values of N rows that grow by a token a step; the room behind a row is masked."""

    def __init__(self, c: Config, rows: int, room: int, dtype: torch.dtype, device: torch.device):
        shape = (c.num_hidden_layers, 2, rows, c.num_key_value_heads, room, c.head_dim)
        self.layers = torch.zeros(shape, dtype=dtype, device=device)  # 2: keys and values
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each row
        self.longest = 0  # bounds the lengths: to ask the GPU for their maximum is to wait for it

    def advance(self, lengths: list[int] | None):
        """Before the layers: each row gets its prompt of lengths[n] tokens, or one more token."""
        device, rows = self.lengths.device, len(self.lengths)
        if lengths is not None:
            self.lengths, self.longest = torch.tensor(lengths, device=device), max(lengths)
            return
        self.places = torch.arange(rows, device=device), self.lengths  # of the new tokens
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        self.seen = torch.arange(self.longest, device=device) < self.lengths[:, None]  # (N, used)

    def fill(self, layer: int, k: Tensor, v: Tensor, lengths: list[int]):
        """A packed prefill: document n becomes row n. k, v (T, K, D)."""
        for row, document in enumerate(torch.stack([k, v]).split(lengths, dim=1)):
            self.layers[layer, :, row, :, : document.shape[1]] = document.transpose(1, 2)

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes a token a row and attends to all up to it. q (N, H, D), k and v (N, K, D)."""
        rows, ends = self.places
        # around a slice, index tensors come first: (N, 2, K, D)
        self.layers[layer][:, rows, :, ends] = torch.stack([k, v], dim=1)
        keys, values = self.layers[layer, ..., : self.longest, :]
        # The H/K query heads of a KV head stand as its queries: grouped, and no key is repeated.
        grouped = q.unflatten(1, (k.shape[1], -1))  # (N, K, H/K, D)
        mask = self.seen[:, None, None]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return out.flatten(1, 2)  # (N, H, D)

    def take(self, rows: Tensor):
        """Row i is from now on what row rows[i] was: repeats a prompt for its samples."""
        self.layers, self.lengths = self.layers[:, :, rows], self.lengths[rows]

    def keep(self, live: Tensor) -> Tensor:
        """Drops ended rows as take(rows) would; only the last move. live (N,) bool -> rows (n,)."""
        count = int(live.sum())
        rows = torch.arange(count, device=live.device)
        gaps, last = (~live[:count]).nonzero()[:, 0], live[count:].nonzero()[:, 0] + count
        rows[gaps] = last
        self.layers[:, :, gaps] = self.layers[:, :, last]
        self.layers, self.lengths = self.layers[:, :, :count], self.lengths[rows]
        return rows


# ------------------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """Rounds before it multiplies, as transformers and vLLM do; nn.RMSNorm is 0.005 off in bf16."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionBlock(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        width, self.heads = c.hidden_size, c.num_heads
        self.norm1, self.norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = SwiGLU(width, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, rope: Rope, lengths: list[int]) -> Tensor:
        qkv = self.attn.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # (S, H, D) each
        q, k = (rotate(y.float(), rope).to(v.dtype) for y in (q, k))
        x = x + self.attn.proj(attend(q, k, v, lengths, causal=False).flatten(1))
        return x + self.mlp(self.norm2(x))


def window_order(grids: list[Grid], merge: int, side: int) -> tuple[Tensor, Tensor, list[int]]:
    """Windows without masks (arXiv 2502.13923, sec. 2.1.1): the patches of one become neighbours.

    Patches come in 2x2 blocks; a window has `side` x `side` blocks, fewer at the edges, no padding.
    -> new order (S/4,) of the blocks, row and column (S, 2) of patches in it, patches per window.
    """
    order, places, lengths, start = [], [], [], 0
    for _, h, w in grids:
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        place = place.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
        places.append(place.reshape(-1, merge**2, 2))  # (blocks, patches of a block, 2)
        row, column = (places[-1][:, 0] // merge // side).T  # of the window
        window = row * math.ceil(w / merge / side) + column
        order.append(window.argsort(stable=True) + start)
        lengths += (window.bincount() * merge**2).tolist()
        start += len(window)
    order = torch.cat(order)
    return order, torch.cat(places)[order].flatten(0, 1), lengths


class VisionTower(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        # The hub has a Conv3d here. Its stride is its kernel: one product with flattened patches.
        shape = (c.hidden_size, c.in_chans, c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Module()})
        start = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
        self.patch_embed.proj.weight = nn.Parameter(start)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger, wide = nn.Module(), c.hidden_size * c.spatial_merge_size**2
        self.merger.ln_q, out = RMSNorm(c.hidden_size, 1e-6), nn.Linear(wide, c.out_hidden_size)
        self.merger.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), out)

    def forward(self, patches: Tensor, grids: list[Grid]) -> Tensor:
        """patches (S, 1176) of B images -> (S/4, width of the decoder): a row an image token."""
        c, device, merge = self.config, patches.device, self.config.spatial_merge_size
        order, places, windows = window_order(grids, merge, c.window_size // c.patch_size // merge)
        pictures = [math.prod(grid) for grid in grids]
        turns = frequencies(c.hidden_size // c.num_heads // 2, VISION_ROPE_THETA, device)
        # (S, D/2): half of the frequencies turn with the row, half with the column
        rope = rotary((places.to(device)[..., None] * turns).flatten(1))
        order, weight = order.to(device), self.patch_embed.proj.weight.flatten(1)
        x = patches.to(weight.dtype) @ weight.T  # (S, 1176) -> (S, C)
        x = x.unflatten(0, (-1, merge**2))[order].flatten(0, 1)
        for index, block in enumerate(self.blocks):
            x = block(x, rope, pictures if index in c.fullatt_block_indexes else windows)
        x = self.merger.ln_q(x).unflatten(0, (-1, merge**2)).flatten(1)  # neighbours side by side
        return self.merger.mlp(x)[order.argsort()]


class Block(nn.Module):
    """before() and behind() do not follow the lengths of documents, and so can be compiled."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.dim = layer, c.head_dim  # layer: which of the cache's tensors are its own
        width, kv_width = c.hidden_size, c.num_key_value_heads * c.head_dim
        self.input_layernorm, self.self_attn = RMSNorm(width, c.rms_norm_eps), nn.Module()
        self.self_attn.q_proj = nn.Linear(width, width)
        self.self_attn.k_proj = nn.Linear(width, kv_width)
        self.self_attn.v_proj = nn.Linear(width, kv_width)
        self.self_attn.o_proj = nn.Linear(width, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, c.rms_norm_eps)
        self.mlp = SwiGLU(width, c.intermediate_size, bias=False)

    def before(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, C) -> q (T, H, D), k and v (T, K, D)."""
        x, attn = self.input_layernorm(x), self.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (project(x).unflatten(1, (-1, self.dim)) for project in projections)
        return rotate(q, rope), rotate(k, rope), v

    def behind(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: Tensor, rope: Rope, inputs: Inputs, cache: KVCache | None) -> Tensor:
        q, k, v = self.before(x, rope)
        if inputs.lengths is None:  # one token a row, everything before it is in the cache
            return self.behind(x, cache.step(self.layer, q, k, v))
        if cache is not None:
            cache.fill(self.layer, k, v, inputs.lengths)
        if inputs.expand is None:
            return self.behind(x, attend(q, k, v, inputs.lengths, causal=True))
        # Responses share a prompt, for which all else runs once; only here does each have a copy.
        # Copies come out equal, the first goes on; index_select's backward adds up what they pass.
        # Prompt 0 1, responses 2 and 3 4: expand is 0 1 2 0 1 3 4, first is 0 1 2 5 6.
        every = torch.arange(len(inputs.expand), device=q.device)
        first = every.new_zeros(len(q))  # of a token's places among the E
        first.scatter_reduce_(0, inputs.expand, every, "amin", include_self=False)
        q, k, v = (part.index_select(0, inputs.expand) for part in (q, k, v))
        attended = attend(q, k, v, inputs.lengths, causal=True)
        return self.behind(x, attended.index_select(0, first))


class Decoder(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, inputs: Inputs, cache: KVCache | None = None) -> Tensor:
        c = self.config
        # Each frequency turns with one axis: at 7B 16 with time, 24 with row, 24 with column.
        turns = frequencies(c.head_dim, c.rope_theta, x.device).split(c.mrope_section)
        axes = zip(inputs.positions, turns, strict=True)
        angles = torch.cat([axis[:, None] * turn for axis, turn in axes], dim=1)  # (T, D/2)
        rope = tuple(part.to(x.dtype) for part in rotary(angles))
        for layer in self.layers:
            x = layer(x, rope, inputs, cache)
        return self.norm(x)


class Qwen25VL(nn.Module):
    """Policy (head="lm") or critic ("value", 1 wide), entered by logps(), values() or logits()."""

    def __init__(self, config: Config, head: str = "lm"):
        super().__init__()
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

    def hidden(self, inputs: Inputs, rows: Tensor | None = None, cache: KVCache | None = None):
        """The last layer's output at `rows` (R,), or at all tokens: (R, C)."""
        x = self.model.embed_tokens(inputs.ids)
        if inputs.patches is not None:
            seen = self.visual(inputs.patches, inputs.grids).to(x.dtype)
            # fewer slots than rows: a blank picture that no token shows
            x = x.index_copy(0, inputs.slots, seen[: len(inputs.slots)])
        if cache is not None:
            cache.advance(inputs.lengths)
        x = self.model(x, inputs, cache)
        # x[rows] would add up the gradients of repeated rows in whatever order
        return x if rows is None else x.index_select(0, rows)

    def logps(self, pack: Inputs) -> tuple[Tensor, Tensor]:
        """Log-probs of a common.packs.Pack's trained tokens, and entropies: (R,) each."""
        return chunked_logps(self.hidden(pack, pack.rows), self.head_weight, pack.targets)

    def values(self, pack: Inputs) -> Tensor:
        """The critic's V (R,) before each trained token; near 1, bf16 would have steps of 0.008."""
        return F.linear(self.hidden(pack, pack.rows).float(), self.value_head.weight[0].float())

    def logits(self, inputs: Inputs, rows: Tensor | None = None, cache: KVCache | None = None):
        """(R, V) float32, for sampling. With a cache, a pack of N documents fills its N rows; with
        lengths=None, ids (N,) are one more token for each row.
        """
        return F.linear(self.hidden(inputs, rows, cache), self.head_weight).float()


def chunked_logps(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = HEAD_CHUNK):
    """Log-prob of each target, and entropy of its distribution without gradient; softmax in float32
    (bf16 is off by 0.02). hidden (R, C), weight (V, C), targets (R,) -> logps (R,), entropies (R,).
    """
    return ChunkedLogps.apply(hidden, weight, targets, chunk)


class ChunkedLogps(torch.autograd.Function):
    """`chunk` rows of logits z = hidden weight^T at a time. Backward, with d logp / d z =
    onehot(target) - softmax(z), computes them once more (7 % of a 7B step) rather than keep
    32k x 152k x 4 B = 19 GB. It sums the weight's gradient in float32: in bf16 it is off by 0.7 %.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk, logps, entropies = chunk, [], []
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            every = F.linear(rows, weight).log_softmax(-1, dtype=torch.float32)  # (chunk, V)
            logps.append(every.gather(1, wanted[:, None]).squeeze(1))
            entropies.append(-every.exp().mul_(every).sum(-1))
        logps, entropies = torch.cat(logps), torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, upstream: Tensor, _):
        hidden, weight, targets = ctx.saved_tensors
        hidden_grads, trains = [], ctx.needs_input_grad[1]  # a frozen head does not
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        parts = (x.split(ctx.chunk) for x in (hidden, targets, upstream[:, None]))
        for rows, wanted, slope in zip(*parts, strict=True):
            grad = F.linear(rows, weight).softmax(-1, dtype=torch.float32).neg_()  # (chunk, V)
            grad.scatter_add_(1, wanted[:, None], torch.ones_like(slope))
            grad = grad.mul_(slope).to(weight.dtype)
            hidden_grads.append(grad @ weight)
            if trains:
                weight_grad += grad.T @ rows
        return torch.cat(hidden_grads), weight_grad, None, None  # rounded to the weight's dtype


def train_flops(c: Config, length: int) -> float:
    """FLOPs of forward and backward through the decoder for one document of `length` tokens.

    6 a weight of a matrix product and token, and causal attention: half of 12 H D L^2 a layer.
    7B: 42.4 GFLOP a token and 0.60 MFLOP x length.
    """
    wide, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    layer = 2 * wide * (wide + kv) + 3 * wide * c.intermediate_size
    weights = c.num_hidden_layers * layer + c.vocab_size * wide
    return 6.0 * weights * length + 6.0 * c.num_hidden_layers * wide * length**2


# ------------------------------------------------------------------------------- loading and saving


def empty_model(directory: Folder, head: str = "lm") -> Qwen25VL:
    """The architecture of a model directory on the meta device: shapes without memory."""
    with torch.device("meta"):
        return Qwen25VL(read_config(directory), head)


def load_model(directory: Folder, dtype=torch.float32, device="cpu", head="lm") -> Qwen25VL:
    """A whole model directory, as policy or critic."""
    model = empty_model(directory, head).to(dtype).to_empty(device=device)
    load_weights(model, directory)
    return model


@torch.no_grad()
def load_weights(model: Qwen25VL, directory: Folder):
    """Fills a model, plain or sharded; of sharded weights each rank reads its own rows alone.

    A critic may come from a policy's files: its value head then starts as in Open-Reasoner-Zero's
    code, normal with std 1/(C+1), the same on all ranks if they have seeded torch alike.
    """
    stored, weights = check_weights(model, directory), model.state_dict()
    state = {stored[name][1]: weight for name, weight in weights.items() if name in stored}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    if model.value_head is not None and "value_head.weight" not in stored:
        weight = model.value_head.weight
        put(weight, torch.empty(weight.shape).normal_(std=1 / (weight.shape[1] + 1)))


@torch.no_grad()
def put(weight: Tensor, whole: Tensor):
    """weight[...] = whole, of which a sharded weight takes its own rows; nothing is sent."""
    if isinstance(weight, DTensor):
        whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(whole)


def gathered(weight: Tensor) -> Tensor:
    """All rows of a sharded weight, for which all ranks ask together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def check_weights(model: Qwen25VL, directory: Folder) -> dict[str, tuple[Path, str]]:
    """{hub name: (file, name in the file)} of all weights, from the headers of the files.

    ValueError unless each weight of the model is there, once and in its shape, and no other; but
    adapters and a value head may be missing, and a head of the other kind (or tied) may be there.
    """
    wanted = {n: [*w.shape] for n, w in model.named_parameters() if ".lora_" not in n}
    unused, stored, wrong = {"lm_head.weight", "value_head.weight"} - wanted.keys(), {}, []
    for file in sorted(Path(directory).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut, or a Git-LFS pointer ({error}): fetch it") from error
        for own_name, shape in shapes.items():
            name = hub_name(own_name)
            if name in stored:
                wrong.append(f"{name} stands twice, in {stored[name][0].name} and {file.name}")
            if name not in unused and shape != wanted.get(name):
                right = wanted.get(name)
                wrong.append(f"{name} in {file.name} is {shape}, by config.json {right}")
            stored[name] = file, own_name
    wrong += [f"missing {name}" for name in wanted if name not in {*stored, "value_head.weight"}]
    if wrong:
        raise ValueError(f"{len(wrong)} weights of {directory} are wrong: {'; '.join(wrong[:8])}")
    return stored


def hub_name(name: str) -> str:
    """transformers >= 4.52 in memory (`model.visual.*`, `model.language_model.*`) -> the files."""
    name = name.replace("model.language_model.", "model.", 1)
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def save_model(model: Qwen25VL, directory: Folder, like: Folder | None = None, dtype=None):
    """Like save_weights. dtype: of the files, the decoder's own if None."""
    weights = model.state_dict()  # of a sharded model: float32 slices, not what a forward gathered
    own = weights["model.norm.weight"].dtype
    save_weights(weights, model.config, directory, dtype or own, like)


def save_weights(weights: dict[str, Tensor], config: Config, directory: Folder, dtype, like=None):
    """A directory that transformers and vLLM open, the weights in one file; older ones go first.

    like: a model directory whose tokenizer, template and image settings are copied along. All ranks
    call this: each writes its own rows of sharded weights, the first joins their files.
    """
    directory = Path(directory)
    several = dist.is_initialized() and dist.get_world_size() > 1
    first = not several or dist.get_rank() == 0
    if first:  # the others do not write before they have met it in dcp.save
        shutil.rmtree(directory / "sharded", ignore_errors=True)
        for old in directory.glob("*.safetensors*"):
            old.unlink()
    weights = {name: weight.detach().to(dtype) for name, weight in weights.items()}
    writer = dcp.HuggingFaceStorageWriter(str(directory), None, 1, several, several)
    dcp.save(weights, storage_writer=writer, no_dist=not several)
    if not first:
        return
    shutil.rmtree(directory / "sharded", ignore_errors=True)  # the parts of all ranks
    (directory / "model-00001-of-00001.safetensors").rename(directory / "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    text = json.dumps(config_json(config, dtype), indent=1)
    (directory / "config.json").write_text(text, encoding="utf-8")
    if like and Path(like).resolve() != directory.resolve():
        for file in (file for pattern in COMPANIONS for file in Path(like).glob(pattern)):
            shutil.copy(file, directory)
