"""The paper's final model: the uniform average of several intermediate checkpoints of one run.

    python -m tools.average --models out/a/step_000700 out/a/step_000800 --out out/mean

Every member is a Hugging Face directory: model.safetensors, or shards with an index. One shard of
the first member is in memory at a time, so 8 billion parameters need a few GB and no GPU. Each
tensor is summed in fp32, divided once and cast once to the dtype of the first member: summing in
bf16 would round after every addition, with 8 bits of mantissa. Members may be cut into different
shards, but must hold the same tensors in the same shapes. A tied head is the embedding itself and
is written once, under the embedding's name, also where a member stored a second copy. Config,
tokenizer and image settings come from the first member; the model card is written anew and names
all of them. A critic has no place here: average policies.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

INDEX = "model.safetensors.index.json"
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---
# The average of {count} checkpoints

The weights are the uniform average, summed in float32 and rounded once, of

{members}

The first of them gave the config, the tokenizer and the image settings. The README.md of each tells
how it was trained. Written by average.py.
"""


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]  # checkpoint directories; paper: "several intermediate checkpoints"
    out: str  # directory to write

    def __post_init__(self):
        if not self.models:
            raise ValueError("--models names no checkpoint")
        if Path(self.out).resolve() in {Path(model).resolve() for model in self.models}:
            raise ValueError(f"--out {self.out} is one of the models and would be overwritten")


def tensor_files(directory: Path) -> dict[str, str]:
    """{tensor name: file that holds it} of one checkpoint, a tied head left out."""
    if (directory / INDEX).exists():
        files = json.loads((directory / INDEX).read_text())["weight_map"]
    else:
        with safe_open(directory / "model.safetensors", "pt") as stored:
            files = dict.fromkeys(stored.keys(), "model.safetensors")
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    tied = config.get("tie_word_embeddings", False)
    return {name: file for name, file in files.items() if not (tied and name == "lm_head.weight")}


def mean_tensor(name: str, members: dict[Path, dict[str, str]]) -> torch.Tensor:
    """sum_i theta_i / n of one tensor: summed in fp32, divided once, cast once."""
    total = None
    for directory, files in members.items():
        with safe_open(directory / files[name], "pt") as stored:
            tensor = stored.get_tensor(name)
        if total is None:
            total, dtype = torch.zeros(tensor.shape), tensor.dtype
        if tensor.shape != total.shape:
            shapes = f"{tuple(tensor.shape)}, the first member {tuple(total.shape)}"
            raise ValueError(f"{directory}: {name} has shape {shapes}")
        total += tensor.float()
    return (total / len(members)).to(dtype)


def average(models: tuple[str, ...], out: str) -> None:
    members = {Path(model): tensor_files(Path(model)) for model in models}
    assert len(members) == len(models), f"a model is named twice: {models}"
    first, target = Path(models[0]), Path(out)
    for directory, files in members.items():
        if odd := sorted(files.keys() ^ members[first].keys()):
            raise ValueError(f"{directory} and {first} differ in {len(odd)} tensors: {odd[:4]}")
    target.mkdir(parents=True, exist_ok=True)
    for path in first.iterdir():
        weights = path.suffix == ".safetensors" or path.name == INDEX
        if path.is_file() and not weights and path.name != "README.md":
            shutil.copy2(path, target)
    size = 0
    for shard in tqdm(sorted(set(members[first].values())), desc="shards"):
        names = [name for name, file in members[first].items() if file == shard]
        tensors = {name: mean_tensor(name, members) for name in names}
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / shard, metadata={"format": "pt"})
    if (first / INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": members[first]}
        (target / INDEX).write_text(json.dumps(index, indent=1))
    listed = "\n".join(f"- {model}" for model in models)
    card = CARD.format(count=len(models), members=listed)
    (target / "README.md").write_text(card, encoding="utf-8")
    print(f"average of {len(models)} checkpoints, {size / 1e9:.2f} GB -> {target}")


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    average(config.models, config.out)
