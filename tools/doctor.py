"""Is a run sound, before it is started? Of your own model, data and disk, what no start looks at.

    python -m tools.doctor rl --model DIR --data rl.jsonl ...              # as rl.py's
    python -m tools.doctor coldstart --model DIR --data sft.jsonl ...      # as coldstart.py's
    torchrun --nproc-per-node 8 -m tools.doctor rl ...     # a model that wants the run's GPUs

The settings are the run's, so what is checked is what will run. A check prints PASS and what it
measured, or ends the doctor with the culprit, the cure and exit status 1; its docstring says what
goes wrong without it. rl.py and coldstart.py themselves look at rows, pictures and weights when
they start, and rl.py at memory and at its sampler.
"""

import math
import shutil
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase

import torch
import tyro
from torch import Tensor

from common import checkpoint, data, distributed, packs
from common.log import run_main
from reward import grade

# nats a token by which log-probs in a pack may differ from those alone; rounding is a tenth of it
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
SAMPLE = 2000  # rows, spread over the data, whose prompts and golds are looked at


def refuse(wrong: list[str], cure: str):
    """ValueError that names the first culprits, if there are any."""
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])} ({len(wrong)} in all): {cure}")


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def logps_of(policy, documents: list[data.Document], world) -> tuple[Tensor, ...]:
    """The trainer's, of each response, from one pack."""
    pack = packs.make_pack(documents, share_prompts=True)
    return policy.logps(pack.to(world.device))[0].split(pack.counts)


# ------------------------------------------------------------------ the checks


def template(rows: list, tokenizer) -> str:
    """Doubled or missing markup is learnt, and gives scores that nobody reproduces."""
    t, wrong = tokenizer, []
    markup = {*t.all_special_ids, *t.convert_tokens_to_ids([*data.MARKUP])}
    for row in rows:
        ids = data.chat_ids(row.prompt, len(row.images), t, row.place)
        twice = [t.decode([a]) for a, b in pairwise(ids) if a == b and a in markup]
        wrong += [f"{row.place} has {token} twice in a row" for token in twice]
        end = "".join(t.decode(ids).rpartition(data.STOP)[2].split())
        if not end.count("<|im_start|>") == end.count("<|im_start|>assistant") == 1:
            wrong.append(f"{row.place} ends in {end!r}, not in one <|im_start|>assistant")
    refuse(wrong, "give the model the chat_template of Qwen2.5-VL")
    return f"{len(rows):,} prompts"


def golds(problems: list[data.Problem]) -> str:
    """A gold that does not match itself never rewards; one that is not one option misleads. (A
    sentence matches only itself: curate.py drops golds of many words.)
    """
    wrong = []
    for p in problems:
        boxes = [f"\\boxed{{{x}}}" for x in (p.answer, *ascii_uppercase[: len(p.choices or ())])]
        how = {"choices": p.choices, "precision": p.precision}
        itself, *options = [grade(p.answer, box, **how).score for box in boxes]
        if not itself or (options and sum(options) != 1):
            fault = "is not one choice" if itself else "cannot be graded"
            wrong.append(f"{p.place}: {p.answer!r:.40} {fault}")
    refuse(wrong, "mend or drop these rows")
    return f"{len(problems):,} answers match themselves"


@torch.no_grad()
def packing(policy, documents: list[data.Document], world) -> str:
    """Where attention or positions leak, each row is trained on its neighbours."""
    together, limit = logps_of(policy, documents, world), LIMITS[world.dtype]
    alone = [logps_of(policy, [document], world)[0] for document in documents]
    distributed.release(policy)
    gaps = [(a - b).abs().mean().item() for a, b in zip(alone, together, strict=True)]
    wrong = [d.name for d, gap in zip(documents, gaps, strict=True) if not gap <= limit]  # NaN, too
    refuse(wrong, "read their neighbours in a pack, mend attend() in model.py")
    return f"log-probs off by {max(gaps):.0e} (limit {limit:g})"


def update(policy, optimizer, documents: list[data.Document], cfg, world) -> str:
    """A weight without gradient never learns, a tower with one is not frozen, and a bfloat16 master
    of 1 stays what it was after a step of 1e-6. Of adapters, B alone has a gradient at first."""
    wrong, lora, vision = [], cfg.lora_rank > 0, getattr(cfg, "train_vision", False)
    loss = -torch.cat(logps_of(policy, documents, world)).mean() / world.size
    distributed.backward(policy, loss, world, last=True)
    for name, weight in policy.named_parameters():
        norm = 0.0 if weight.grad is None else whole(weight.grad).norm().item()
        learns = vision if name.startswith("visual.") else not lora or ".lora_B." in name
        if not math.isfinite(norm) or learns != (norm > 0):
            wrong.append(f"the gradient of {name} is {norm:g}")
    refuse(wrong, "mend requires_grad (distributed.load), or the weights")
    part = "lora_B.weight" if lora else "weight"
    weight = policy.get_parameter(f"model.layers.0.mlp.down_proj.{part}")
    before, clear = whole(weight).clone(), whole(weight.grad).abs() > 1e-7  # AdamW's eps is 1e-8
    optimizer.step()
    share = (whole(weight) != before)[clear].float().mean().item()
    figure = f"{share:.1%} of {weight.dtype} masters move at --lr {cfg.lr:g}"
    refuse([figure] * (not share > 0.5), "too coarse, keep them in float32")
    return f"loss {loss.item() * world.size:.3g}, {figure}"


def disk(policy, optimizer, cfg, world) -> str:
    """A checkpoint that cannot be written ends the run at its first one."""
    run = Path(cfg.out) / "doctor.part"  # a run that starts there removes what a kill leaves
    pairs, like = {"policy": (policy, optimizer)}, data.model_directory(cfg.model)
    try:
        saver = checkpoint.Saver(run, like, world.dtype)
        saver.save(1, pairs, policy, "of tools/doctor.py")
        checkpoint.load_state(checkpoint.newest(run)[1], pairs)
        free = shutil.disk_usage(run).free
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    finally:
        world.wait()
        if world.main:
            shutil.rmtree(run, ignore_errors=True)
    figure = f"{cfg.out}: {size / 1e9:.3g} GB written and read, {free / 1e9:.3g} GB left"
    need = 3 * size * (2 if getattr(cfg, "algorithm", "") == "ppo" else 1)
    refuse([figure] * (free <= need), f"a run needs {need / 1e9:.3g} GB, three checkpoints")
    return figure


# ------------------------------------------------------------------ all of them


def documents_of(rows: list, tokenizer, settings) -> list[data.Document]:
    """Of three short rows with pictures and three without. A problem's own words are a response."""
    rows = sorted(rows, key=lambda row: len(row.prompt + getattr(row, "response", "")))
    pictured, others = ([r for r in rows if bool(r.images) is kind][:3] for kind in (True, False))
    documents = []
    for row in pictured + others:
        words = getattr(row, "response", row.prompt.replace(data.IMAGE_MARKER, " "))
        example = data.Example(row.id, row.prompt, words, row.images, place=row.place)
        documents.append(data.encode_example(example, tokenizer, settings))
    return documents


def examine(cfg, world: distributed.World):
    """All checks, for settings of rl.py or coldstart.py."""

    def passed(name: str, measured: str):
        if world.main:
            print(f"PASS  {name:9} {measured}", flush=True)

    rl, where = hasattr(cfg, "algorithm"), data.model_directory(cfg.model)
    tokenizer, settings = data.load_tokenizer(where), data.load_image_settings(where)
    read = data.read_problems if rl else data.read_examples
    rows = read(cfg.data, columns=cfg.columns, share=(world.rank, world.size))
    some = [*rows[:: math.ceil(len(rows) / SAMPLE)]]
    passed("template", template(some, tokenizer))
    if rl:
        passed("golds", golds(some))
    vision = rl and cfg.train_vision
    learns = distributed.Trained(vision, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    policy = distributed.load(where, world, "lm", learns, cfg.recompute, cfg.compile)
    documents = documents_of(some, tokenizer, settings)
    passed("packing", packing(policy, documents, world))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.lr, weight_decay=0.0, fused=True)
    passed("update", update(policy, optimizer, documents, cfg, world))
    passed("disk", disk(policy, optimizer, cfg, world))


def main(cfg):
    world = distributed.start()
    examine(cfg, world)
    distributed.finish(world)


if __name__ == "__main__":
    import coldstart  # here, because the stages import tools
    import rl

    stages = {"rl": rl.Config(), "coldstart": coldstart.Config()}
    run_main(main, tyro.extras.subcommand_type_from_defaults(stages))
