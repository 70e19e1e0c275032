"""The paper's final model: the uniform average of several intermediate checkpoints of one run.

    python -m tools.average --models out/a/step_000700/model out/a/step_000800/model --out out/mean

Each tensor is summed in float32, divided once and rounded once to the dtype of the files: a sum in
bfloat16, with its 8 bits of mantissa, would round after every addition. One tensor of one member is
in memory at a time, beside the average as it will be written (7B: 17 GB); no GPU is needed. Members
may be cut into files in any way, but must be one architecture in one dtype, all finite: what is
not so is named, and nothing is written. A tied head is the embedding, and is stored once.
Tokenizer, template and image settings come from the first member. A critic has no place here.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from common.checkpoint import publish
from common.log import model_card, progress, run_main
from model import check_weights, empty_model, read_config, save_weights


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]  # model directories; paper: "several intermediate checkpoints"
    out: str  # directory to write; older weights in it are removed

    def __post_init__(self):
        places = [Path(model).resolve() for model in self.models]
        if not places:
            raise ValueError("--models names no checkpoint")
        if twice := [m for i, m in enumerate(self.models) if places[i] in places[:i]]:
            raise ValueError(f"--models names {twice[0]} twice: it would count double")
        if Path(self.out).resolve() in places:
            raise ValueError(f"--out {self.out} is one of the models and would be overwritten")


def find_tensors(member: str, first: str) -> dict[str, tuple[Path, str]]:
    """{name: (file, name in the file)}; ValueError if `first` is of another architecture."""
    config, other = asdict(read_config(member)), asdict(read_config(first))
    if odd := [f"{k} {config[k]} instead of {other[k]}" for k in config if config[k] != other[k]]:
        raise ValueError(f"{member} is another model than {first}: {', '.join(odd)}")
    architecture = empty_model(member)
    stored = check_weights(architecture, member)
    if "value_head.weight" in stored:
        raise ValueError(f"{member} is a critic, which has a value head: average policies")
    return {name: stored[name][:2] for name, _ in architecture.named_parameters()}


def read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)


def mean_tensor(places: list[tuple[Path, str]], dtype: torch.dtype) -> Tensor:
    """sum_i theta_i / n of the members' tensors at `places`."""
    total = 0.0
    for file, name in places:
        tensor = read(file, name)
        if tensor.dtype != dtype:
            raise ValueError(f"{file}: {name} is {tensor.dtype}, others are {dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} has NaN or infinite numbers: leave this model out")
        total = total + tensor.float()
    return (total / len(places)).to(dtype)


def main(cfg: Config):
    first, out = cfg.models[0], Path(cfg.out)
    members = [find_tensors(member, first) for member in cfg.models]
    dtype = read(*members[0]["model.norm.weight"]).dtype
    names = progress(members[0], "tensors")
    mean = {name: mean_tensor([places[name] for places in members], dtype) for name in names}
    part = out.with_name(f"{out.name}.part")  # so that what is called `out` is whole
    part.mkdir(parents=True, exist_ok=True)
    save_weights(mean, read_config(first), part, dtype, like=first)
    card = model_card(f"The average of {len(members)} checkpoints", cfg, out)
    (part / "README.md").write_text(card, encoding="utf-8")
    publish(part, out)
    size = sum(tensor.nbytes for tensor in mean.values())
    print(f"average of {len(members)} checkpoints, {size / 1e9:.2f} GB -> {out}")


if __name__ == "__main__":
    run_main(main, Config)
