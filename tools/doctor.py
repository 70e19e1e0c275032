"""Is a run sound, before it is started? Of your own model, data and disk, what no start looks at.

    python -m tools.doctor rl --model DIR --data rl.jsonl ...              # as rl.py's
    python -m tools.doctor coldstart --model DIR --data sft.jsonl ...      # as coldstart.py's
    torchrun --nproc-per-node 8 -m tools.doctor rl ...     # a model that wants the run's GPUs

The settings are the run's, so what is checked is what will run. A check prints PASS and what it
measured, or ends the doctor with the culprit, the cure and exit status 1; its docstring says what
goes wrong without it. Rows, pictures, weights, memory and sampler are looked at by every start.
"""

import math
import re
import shutil
from pathlib import Path
from string import ascii_uppercase

import torch
import tyro

from common import checkpoint, data, distributed, packs
from common.log import run_main
from model import gathered
from reward import grade

# nats a token by which log-probs in a pack may differ from those alone; rounding is a tenth of it
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
SAMPLE = 2000  # rows, spread over the data, whose golds are looked at
PICTURE = r"<\|vision_start\|>\s*<\|image_pad\|>\s*<\|vision_end\|>"
TURN = rf"((?!{data.MARKUP_PATTERN.pattern}).|{PICTURE})*"  # no markup but that of pictures
CHAT = rf"(<\|im_start\|>\s*system{TURN}<\|im_end\|>\s*)?"  # Qwen2.5-VL's, up to the answer
CHAT += rf"<\|im_start\|>\s*user{TURN}<\|im_end\|>\s*<\|im_start\|>\s*assistant{TURN}"


def conclude(check: str, wrong: list[str], cure: str, measured: str, world):
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])} ({len(wrong)} in all): {cure}")
    if world.main:
        print(f"PASS  {check:9} {measured}", flush=True)


def logps_of(policy, documents: list[data.Document], world) -> tuple[torch.Tensor, ...]:
    """The trainer's, of each response, from one pack."""
    pack = packs.make_pack(documents, share_prompts=True)
    return policy.logps(pack.to(world.device))[0].split(pack.counts)


def template(documents: list[data.Document], tokenizer, world):
    """Doubled or missing markup is learnt, and gives scores that nobody reproduces."""
    chats = [(d.name, tokenizer.decode(d.prompt.short_ids)) for d in documents]
    wrong = [f"{name} reads {x!r:.200}" for name, x in chats if not re.fullmatch(CHAT, x, re.S)]
    cure = "give the model the chat_template of Qwen2.5-VL"
    conclude("template", wrong, cure, f"{len(chats)} prompts", world)


def golds(problems: list[data.Problem], world):
    """A gold that does not match itself never rewards; one that is not one option misleads."""
    wrong = []
    for p in problems:
        boxes = [f"\\boxed{{{x}}}" for x in (p.answer, *ascii_uppercase[: len(p.choices or ())])]
        how = {"choices": p.choices, "precision": p.precision}
        itself, *options = [grade(p.answer, box, **how).score for box in boxes]
        if not itself or (options and sum(options) != 1):
            fault = "is not one choice" if itself else "cannot be graded"
            wrong.append(f"{p.place}: {p.answer!r:.40} {fault}")
    measured = f"{len(problems):,} answers match themselves"
    conclude("golds", wrong, "mend or drop these rows", measured, world)


@torch.no_grad()
def packing(policy, documents: list[data.Document], world):
    """Where attention or positions leak, each row is trained on its neighbours."""
    together, limit = logps_of(policy, documents, world), LIMITS[world.dtype]
    alone = [logps_of(policy, [document], world)[0] for document in documents]
    distributed.release(policy)
    gaps = [(a - b).abs().mean().item() for a, b in zip(alone, together, strict=True)]
    wrong = [d.name for d, gap in zip(documents, gaps, strict=True) if not gap <= limit]  # NaN, too
    cure = "read their neighbours in a pack (mend attend() in model.py), or a weight is NaN"
    conclude("packing", wrong, cure, f"log-probs off by {max(gaps):.0e} (limit {limit:g})", world)


def update(policy, optimizer, documents: list[data.Document], cfg, world):
    """A weight without gradient never learns, a tower with one is not frozen, and a bfloat16 master
    of 1 stays what it was after a step of 1e-6. Of adapters, B alone has a gradient at first.
    """
    wrong, lora, vision = [], cfg.lora_rank > 0, getattr(cfg, "train_vision", False)
    loss = -torch.cat(logps_of(policy, documents, world)).mean() / world.size
    distributed.backward(policy, loss, world, last=True)
    for name, weight in policy.named_parameters():
        norm = 0.0 if weight.grad is None else gathered(weight.grad).norm().item()
        learns = vision if name.startswith("visual.") else not lora or ".lora_B." in name
        if not math.isfinite(norm) or learns != (norm > 0):
            wrong.append(f"the gradient of {name} is {norm:g}")
    cure = "mend requires_grad (distributed.load), or the weights"
    conclude("gradient", wrong, cure, f"loss {loss.item() * world.size:.3g}", world)
    part = "lora_B.weight" if lora else "weight"
    weight = policy.get_parameter(f"model.layers.0.mlp.down_proj.{part}")
    before, clear = gathered(weight).clone(), gathered(weight.grad).abs() > 1e-7  # eps: 1e-8
    optimizer.step()
    share = (gathered(weight) != before)[clear].float().mean().item()
    measured = f"{share:.1%} of {weight.dtype} masters move at --lr {cfg.lr:g}"
    wrong = [] if share > 0.5 else [measured]
    conclude("update", wrong, "too coarse, keep them in float32", measured, world)


def disk(policy, optimizer, cfg, world):
    """A checkpoint that cannot be written ends the run at its first one."""
    run = Path(cfg.out) / "doctor.part"  # a run that starts there removes what a kill leaves
    pairs, like = {"policy": (policy, optimizer)}, data.model_directory(cfg.model)
    try:
        checkpoint.Saver(run, like, world.dtype).save(1, pairs, policy, "of tools/doctor.py")
        checkpoint.load_state(checkpoint.newest(run)[1], pairs)
        free = shutil.disk_usage(run).free
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    finally:
        world.wait()
        if world.main:
            shutil.rmtree(run, ignore_errors=True)
    measured = f"{cfg.out}: {size / 1e9:.3g} GB written and read, {free / 1e9:.3g} GB left"
    need = 3 * size * (2 if getattr(cfg, "algorithm", "") == "ppo" else 1)
    cure = f"a run needs {need / 1e9:.3g} GB, three checkpoints"
    conclude("disk", [measured] if free <= need else [], cure, measured, world)


def examine(cfg, world: distributed.World):
    """All checks, for settings of rl.py or coldstart.py."""
    rl, where = hasattr(cfg, "algorithm"), data.model_directory(cfg.model)
    tokenizer, settings = data.load_tokenizer(where), data.load_image_settings(where)
    read = data.read_problems if rl else data.read_examples
    rows = read(cfg.data, columns=cfg.columns, share=(world.rank, world.size))
    rows = [*rows[:: math.ceil(len(rows) / SAMPLE)]]
    pictured = sum(len(row.images) > 0 for row in rows)
    conclude("pictures", [], "", f"{pictured:,} of {len(rows):,} rows looked at have some", world)
    if rl:
        golds(rows, world)
        texts = [row.prompt.replace(data.IMAGE_MARKER, " ") for row in rows]  # as responses
        pairs = zip(rows, texts, strict=True)
        rows = [data.Example(r.id, r.prompt, text, r.images, place=r.place) for r, text in pairs]
    rows.sort(key=lambda row: len(row.prompt + row.response))
    short = [r for r in rows if r.images][:3] + [r for r in rows if not r.images][:3]
    documents = [data.encode_example(row, tokenizer, settings) for row in short]
    template(documents, tokenizer, world)
    learns = distributed.Trained(rl and cfg.train_vision, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    policy = distributed.load(where, world, "lm", learns, cfg.recompute, cfg.compile)
    packing(policy, documents, world)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=0.0, fused=True)
    update(policy, optimizer, documents, cfg, world)
    disk(policy, optimizer, cfg, world)


def main(cfg):
    world = distributed.start()
    examine(cfg, world)
    distributed.finish(world)


if __name__ == "__main__":
    import coldstart  # here: no folder needs the stages but for this command line
    import rl

    stages = {"rl": rl.Config(), "coldstart": coldstart.Config()}
    run_main(main, tyro.extras.subcommand_type_from_defaults(stages))
