"""The paper's final model: the uniform average of several intermediate checkpoints of one run.

    python -m tools.average --models out/a/step_000700/model out/a/step_000800/model --out out/mean

Each tensor is summed in float32 and rounded once, to the dtype of the files: a sum in bfloat16,
with its 8 bits of mantissa, would round after every addition. In memory is one tensor of one member
and twice the average as it is written (7B: 34 GB); no GPU is needed. Members may be cut into files
in any way. Tokenizer, template and image settings come from the first.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

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
        if not self.models:
            raise ValueError("--models names no model directory")
        places = [Path(path).resolve() for path in (*self.models, self.out)]
        if twice := [str(path) for path in places if places.count(path) > 1]:
            raise ValueError(f"--models and --out name {twice[0]} twice")


def find_tensors(member: str, first: str) -> dict[str, tuple[Path, str]]:
    """{name: (file, name in the file)}; ValueError if `first` is of another architecture."""
    config, other = asdict(read_config(member)), asdict(read_config(first))
    if odd := [f"{k} {config[k]} instead of {other[k]}" for k in config if config[k] != other[k]]:
        raise ValueError(f"{member} is another model than {first}: {', '.join(odd)}")
    architecture = empty_model(member)
    stored = check_weights(architecture, member)
    return {name: stored[name][:2] for name, _ in architecture.named_parameters()}


def mean_tensor(places: list[tuple[Path, str]]) -> Tensor:
    """sum_i theta_i / n of the members' tensors at `places`, in the dtype of the last."""
    total = 0.0
    for file, name in places:
        with safe_open(file, "pt") as weights:
            tensor = weights.get_tensor(name)
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} has NaN or infinite numbers: leave this model out")
        total = total + tensor.float()
    return (total / len(places)).to(tensor.dtype)


def main(cfg: Config):
    first, out = cfg.models[0], Path(cfg.out)
    members = [find_tensors(member, first) for member in cfg.models]
    names = progress(members[0], "tensors")
    mean = {name: mean_tensor([places[name] for places in members]) for name in names}
    part = out.with_name(f"{out.name}.part")  # so that what is called `out` is whole
    save_weights(mean, read_config(first), part, mean["model.norm.weight"].dtype, like=first)
    card = model_card(f"The average of {len(members)} checkpoints", cfg, out)
    (part / "README.md").write_text(card, encoding="utf-8")
    publish(part, out)
    print(f"average of {len(members)} checkpoints -> {out}")


if __name__ == "__main__":
    run_main(main, Config)
