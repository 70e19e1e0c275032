"""The paper's final model: the uniform average of several intermediate checkpoints of one run.

    python -m tools.average --models out/a/step_000700/model out/a/step_000800/model --out out/mean

Each tensor is summed in float32 and rounded once, to the dtype of the files: a sum in bfloat16
would round after every addition. In memory is one tensor of one member and twice the average as it
is written (7B: 34 GB); no GPU is needed. Tokenizer, template and settings come from the first.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from common.checkpoint import publish
from common.log import model_card, progress, run_main
from model import check_weights, empty_model, save_weights


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...]  # model directories; paper: "several intermediate checkpoints"
    out: str  # directory to write; a model directory that is there is replaced

    def __post_init__(self):
        if not self.models:
            raise ValueError("--models names no model directory")
        places = [str(Path(path).resolve()) for path in (*self.models, self.out)]
        if twice := [path for path in places if places.count(path) > 1]:
            raise ValueError(f"--models and --out name {twice[0]} twice")
        out = Path(self.out)
        if out.exists() and not (out / "config.json").is_file():
            raise ValueError(f"--out {out} is there and is no model directory: choose another name")


def main(cfg: Config):
    first, members = empty_model(cfg.models[0]), []
    for member in cfg.models:
        model = empty_model(member)
        own, wanted = vars(model.config), vars(first.config)
        if odd := [f"{k} {own[k]} instead of {x}" for k, x in wanted.items() if own[k] != x]:
            raise ValueError(f"{member} is another model than {cfg.models[0]}: {', '.join(odd)}")
        members.append(check_weights(model, member))
    mean = {}
    for name, _ in progress([*first.named_parameters()], "tensors"):
        total = 0.0
        for file, own_name in (stored[name] for stored in members):
            with safe_open(file, "pt") as weights:
                tensor = weights.get_tensor(own_name)
            if not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} has NaN or infinite numbers: leave it out")
            total = total + tensor.float()
        mean[name] = (total / len(members)).to(tensor.dtype)
    out = Path(cfg.out)
    part = out.with_name(f"{out.name}.part")  # so that what is called `out` is whole
    save_weights(mean, first.config, part, mean["model.norm.weight"].dtype, like=cfg.models[0])
    card = model_card(f"The average of {len(members)} checkpoints", cfg, out)
    (part / "README.md").write_text(card, encoding="utf-8")
    publish(part, out)
    print(f"average of {len(members)} checkpoints -> {out}")


if __name__ == "__main__":
    run_main(main, Config)
