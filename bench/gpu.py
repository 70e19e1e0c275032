"""Both stages at a real size on one GPU, with random weights: does bfloat16 follow float32, and at
what cost?

    torchrun --standalone bench/gpu.py --size 3b           # an 80 GB GPU or more; about 10 minutes
    python bench/gpu.py --size mini                        # the same path on a CPU, in seconds

A model of the named size is drawn at random and written as a Hugging Face directory with the
miniature's tokenizer, so that nothing has to be fetched. coldstart.py and rl.py then run a few
steps on it as they ship, once with bfloat16 compute over float32 masters and recomputation, once in
float32 (the cold start), and a table compares losses, seconds and peak memory with the prediction:
16 bytes a trained parameter and 2 a frozen one, without activations.

Not yet run on a GPU.
"""

import gc
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import coldstart  # noqa: E402
import parallel  # noqa: E402
import rl  # noqa: E402
import toy  # noqa: E402
from data import load_tokenizer  # noqa: E402
from model import Qwen25VL, VisionConfig, save_model  # noqa: E402

SIZES = {  # the hub's config.json of Qwen2.5-VL-3B and -7B
    "mini": {},
    "3b": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
    ),
}
SHOWN = ("loss", "grad_norm", "seconds", "tokens_per_second", "peak_gb", "policy_loss")
SHOWN += ("value_loss", "logp_diff_mean", "logp_diff_max", "ratio_max")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    size: str = "3b"  # mini, 3b, 7b (7b with its optimiser needs more than one GPU)
    steps: int = 3  # of each stage
    batch: int = 64  # sequences of the cold start; problems of RL are an eighth of it
    recompute: str = "selective"  # none, selective, full
    compare: bool = True  # the cold start in float32 too
    out: str = "out/gpu"  # model, data and runs; removed and made anew


def make_model(directory: Path, size: str) -> Qwen25VL:
    toy.save_tokenizer(directory)
    config = toy.model_config(len(load_tokenizer(directory)))
    if SIZES[size]:
        width = SIZES[size]["hidden_size"]
        tower = VisionConfig(32, 1280, 3420, 16, width, (7, 15, 23, 31))
        config = replace(config, vision=tower, mrope_section=(16, 24, 24), **SIZES[size])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen25VL(config).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # the hub's initializer_range
            weight.data.normal_(std=0.02, generator=generator)
        elif name.endswith("bias"):
            weight.data.zero_()
    save_model(model, directory)
    return model


def rows_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def clean():
    """Models of the run before: FSDP's modules refer to each other, and wait for the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(title: str, rows: list[dict]):
    names = [name for name in SHOWN if name in rows[0]]
    print(f"\n{title}\n| step | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for row in rows:
        print(f"| {row['step']} | {' | '.join(f'{row[name]:.4g}' for name in names)} |")


def main(cfg: Config):
    if cfg.size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {cfg.size}")
    out = Path(cfg.out)
    shutil.rmtree(out, ignore_errors=True)
    model = make_model(out / "model", cfg.size)
    trained = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("visual."))
    frozen = sum(p.numel() for p in model.visual.parameters())
    del model
    toy.write_data(toy.Config(out=str(out)), out / "data")
    finish, parallel.finish = parallel.finish, lambda world: None  # runs share the process group

    def stage_1(dtype: str) -> list[dict]:
        run = str(out / f"coldstart_{dtype}")
        rows = cfg.steps * cfg.batch / (16384 - 128)  # of an epoch; 128 rows are for validation
        clean()
        coldstart.main(
            coldstart.Config(
                model=str(out / "model"), data=str(out / "data/sft.jsonl"), out=run, lr=1e-5,
                epochs=rows, batch=cfg.batch, dtype=dtype, recompute=cfg.recompute,
            )
        )  # fmt: skip
        return rows_of(run)

    half = stage_1("bfloat16")
    show(f"cold start, {cfg.size}, bfloat16 over float32 masters, {cfg.recompute}", half)
    if cfg.compare:
        whole = stage_1("float32")
        show(f"cold start, {cfg.size}, float32, {cfg.recompute}", whole)
        gaps = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(half, whole, strict=True)]
        print(f"\nlosses differ by {max(gaps):.2%} at most (bfloat16 resolves 0.4 %)")
    clean()
    rl.main(
        rl.Config(
            model=str(out / "model"), data=str(out / "data/train.jsonl"), out=str(out / "rl"),
            steps=cfg.steps, problems=max(4, cfg.batch // 8), samples=4, lr=1e-6, critic_lr=5e-6,
            dtype="bfloat16", recompute=cfg.recompute, offload=True,
        )
    )  # fmt: skip
    show(f"PPO, {cfg.size}, bfloat16, {cfg.recompute}, offload", rows_of(str(out / "rl")))
    state = (16 * trained + 2 * frozen) / 1e9
    print(f"\n{trained / 1e9:.3f} B trained, {frozen / 1e9:.3f} B frozen parameters")
    print(f"predicted: {state:.1f} GB for one model's state, and activations")
    finish(parallel.World(0, 1, torch.device("cpu")))


if __name__ == "__main__":
    main(tyro.cli(Config))
