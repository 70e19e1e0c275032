"""LoRA (Hu et al. 2021, arXiv 2106.09685): the decoder is frozen, small adapters beside it learn.

    y = W x + b + (alpha / r) B (A x)      W (out, in) frozen; A (r, in), B (out, r) trained

Every linear layer of the decoder has them: attention alone learns less for as many weights
(Schulman et al. 2025, "LoRA Without Regret"). A starts random and B at 0, so the first step starts
from the base model bit for bit. W takes 2 bytes in bfloat16 in place of 16 for master, gradient and
moments. Sampler and files get merged(), W + (alpha / r) B A, rounded in bfloat16, where the trainer
computes with the exact product: they differ a little more than without (metric logp_diff, --tis).

    python rl.py --lora-rank 16 --lr 3e-3 --critic-lr 1e-2     # ten times the rate of full training
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from common.log import write_json
from model import Qwen25VL, gathered, put

# In a model of transformers; the vision tower has layers of the same names, hence the path.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


class AdaptedLinear(nn.Linear):
    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias, self.alpha, self.scale = base.weight, base.bias, alpha, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """{name in the model: layer}; without LoRA there are none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def add_adapters(model: Qwen25VL, rank: int, alpha: float, dtype: torch.dtype):
    """On the meta device: the decoder is frozen in `dtype`, adapters in float32 train instead."""
    for part in (model.model, model.lm_head):
        if part is not None:  # a tied head is the embedding, a critic has none
            part.requires_grad_(False).to(dtype)
    with torch.device("meta"):
        for parent in (part for b in model.model.layers for part in (b.self_attn, b.mlp)):
            for name, base in [*parent.named_children()]:
                setattr(parent, name, AdaptedLinear(base, rank, alpha))


@torch.no_grad()
def draw_adapters(model: nn.Module, seed: int):
    """A from the uniform distribution of nn.Linear, as in the authors' code, the same on all ranks;
    B is 0. Each rank draws the whole of A and takes its own rows.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        shape, bound = layer.lora_A.weight.shape, layer.in_features**-0.5
        put(layer.lora_A.weight, torch.empty(shape).uniform_(-bound, bound, generator=generator))
        layer.lora_B.weight.zero_()


@torch.no_grad()
def merged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model without adapters that computes the same, in float32 where it was
    adapted; of a sharded model, slices. One at a time: all would be a copy of the model.
    """
    weights, layers = model.state_dict(), adapters(model)
    for name, weight in weights.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in layers:
            a, b = (weights[f"{layer}.lora_{x}.weight"] for x in "AB")
            if isinstance(a, DTensor):  # so that each rank has what its rows of B need
                a = a.redistribute(placements=[Replicate()] * a.device_mesh.ndim)
            weight = weight.float() + layers[layer].scale * (b @ a)
        if ".lora_" not in name:
            yield name, weight


def save_adapters(model: nn.Module, directory: Path, base: str, main: bool):
    """As peft and vLLM open them on top of `base`. All ranks call it, and the main one writes."""
    weights = {}
    for name, weight in model.state_dict().items():
        if ".lora_" in name:
            inside = name.replace("model.layers", "model.language_model.layers", 1)
            weights[f"base_model.model.{inside}"] = gathered(weight).cpu()
    if main:
        layer = next(iter(adapters(model).values()))
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        settings |= {"r": layer.lora_A.out_features, "lora_alpha": layer.alpha, "lora_dropout": 0.0}
        settings |= {"bias": "none", "inference_mode": True}
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "adapter_config.json", settings | {"target_modules": TARGETS})
        save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})
