"""Is a run sound, before it is started? Checks on your own model, data, engine and disk.

    python -m tools.doctor rl --model DIR --data rl.jsonl --sampler vllm ...     # as rl.py's
    python -m tools.doctor coldstart --model DIR --data sft.jsonl ...            # as coldstart.py's
    torchrun --nproc-per-node 8 -m tools.doctor rl ...     # a model that wants the run's GPUs

The settings are the run's, so what is checked is what will run. A line a check: PASS and what was
measured, or FAIL, the culprit and the cure; later checks stand on it, so that is the end, with exit
status 1. A check is a function that returns a sentence or raises, and leaves in the case what later
ones need; its docstring says what goes wrong without it. Seconds with the miniature; with real data
as long as a run takes to start, since every row is read and every picture opened.
"""

import atexit
import math
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from types import SimpleNamespace as Case  # the settings, and what checks leave for later ones

import torch
import tyro
from torch import Tensor

from common import checkpoint, data, distributed, packs
from common.log import provenance, run_main
from model import check_weights, empty_model, read_config
from reward import grade
from rollout import open_sampler

# nats a token by which log-probs in a pack may differ from those alone; rounding is a tenth of it
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
SAMPLE = 2000  # rows, spread over the data, whose prompts and golds are looked at
TURNED = ("visual.merger.ln_q", "model.layers.0.input_layernorm", "model.norm")  # for each cache


def require(sound: bool, measured: str | list[str], cure: str):
    """ValueError, with the measured figure or the first culprits, where it is not sound."""
    if isinstance(measured, list):
        more = f" and {len(measured) - 3} more" if len(measured) > 3 else ""
        measured = ", ".join(measured[:3]) + more
    if not sound:
        raise ValueError(f"{measured}: {cure}")


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def logps_of(case: Case, documents: list[data.Document]) -> list[Tensor]:
    """The trainer's, of each response, from one pack; samples of a problem share its rows."""
    pack = packs.make_pack(documents, share_prompts=True)
    logps, _ = case.policy.logps(pack.to(case.world.device))
    if not torch.is_grad_enabled():
        distributed.release(case.policy)
    return [*logps.split(pack.counts)]


def environment(case: Case) -> str:
    """What a report of a fault should begin with."""
    versions = provenance(case.cfg)["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{shown}; {case.world.size} x {case.world.device.type} in {case.world.dtype}"


def model(case: Case) -> str:
    """A weight that no file holds stays noise; where ids differ, picture tokens are sampled, and a
    stop token that the sampler does not know ends nothing."""
    where = case.directory = data.model_directory(case.cfg.model)
    config, t = read_config(where), data.load_tokenizer(where)
    weights = check_weights(empty_model(where), where)
    good = {name: {i} for name, i in zip(data.VISION, config.vision_token_ids, strict=True)}
    good |= {data.STOP: {*config.stop_ids}, t.eos_token: {*config.stop_ids}}
    ours = {name: t.convert_tokens_to_ids(name) for name in good}
    wrong = [f"{x} is {ours[x]}, in config.json {good[x]}" for x in good if ours[x] not in good[x]]
    require(not wrong, wrong, f"take all files of {where} from one model")
    case.tokenizer, case.settings = t, data.load_image_settings(where)
    return f"{where}: {len(weights)} tensors, {len(t):,} tokens"


def rows(case: Case) -> str:
    """A bad row or a cut picture stops the run, and what is longer than the budget is left out."""
    cfg, known = case.cfg, (case.tokenizer, case.settings)
    read = data.read_problems if case.rl else data.read_examples
    every = read(cfg.data, columns=cfg.columns, share=case.share)
    opened = data.check_images(every, case.share)
    case.some = [*every[:: math.ceil(len(every) / SAMPLE)]]
    if case.rl:
        lengths = [data.prompt_length(r.prompt, r.images, *known, r.id) for r in case.some]
    else:
        lengths = [len(data.encode_example(row, *known)) for row in case.some]
    limit = cfg.prompt_tokens if case.rl else cfg.max_tokens
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    short = [case.some[i] for i in order if lengths[i] <= limit]
    fitting = f"{len(short):,} of {len(lengths):,} have at most {limit:,} tokens"
    require(bool(short), f"{cfg.data}: {fitting}", "raise that limit")
    case.few = [row for row in short if row.images][:3] + [r for r in short if not r.images][:3]
    return f"{len(every):,} with {opened:,} pictures; {fitting}"


def template(case: Case) -> str:
    """Doubled or missing markup is learnt, and gives scores that nobody reproduces."""
    t, wrong = case.tokenizer, []
    markup = {*t.all_special_ids, *t.convert_tokens_to_ids([*data.MARKUP])}
    for row in case.some:
        ids = data.chat_ids(row.prompt, len(row.images), t, row.id)
        twice = [t.decode([a]) for a, b in pairwise(ids) if a == b and a in markup]
        wrong += [f"{row.id} has {token} twice in a row" for token in twice]
        end = "".join(t.decode(ids).rpartition(data.STOP)[2].split())
        if not end.count("<|im_start|>") == end.count("<|im_start|>assistant") == 1:
            wrong.append(f"{row.id} ends in {end!r}, not in one <|im_start|>assistant")
    require(not wrong, wrong, f"give {case.directory} the chat_template of Qwen2.5-VL")
    return f"{len(case.some):,} prompts"


def reward(case: Case) -> str:
    """A gold that does not match itself never rewards; one that is not one option misleads."""
    wrong = []
    for p in case.some:
        boxes = [f"\\boxed{{{x}}}" for x in (p.answer, *ascii_uppercase[: len(p.choices or ())])]
        how = {"choices": p.choices, "precision": p.precision}
        itself, *options = [grade(p.answer, box, **how).score for box in boxes]
        if not itself or (options and sum(options) != 1):
            fault = "is not one choice" if itself else "cannot be graded"
            wrong.append(f"{p.id}: {p.answer!r:.40} {fault}")
    require(not wrong, wrong, f"mend or drop these rows of {case.cfg.data}")
    return f"{len(case.some):,} golds"


def start(case: Case) -> str:
    """The engine, then the trainer, as rl.py does: vLLM wants the memory free."""
    cfg, where, world = case.cfg, case.directory, case.world
    if case.rl:
        room = cfg.sampler_batch, cfg.prompt_tokens + cfg.longest, cfg.kv_cache_gb
        case.engine = open_sampler(cfg.sampler, where, world, room)
        case.engine.rest()
    case.vision = case.rl and cfg.train_vision
    learns = distributed.Trained(case.vision, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    case.policy = distributed.load(where, world, "lm", learns, cfg.recompute, cfg.compile)
    return f"{sum(p.numel() for p in case.policy.parameters()):,} weights"


def packing(case: Case) -> str:
    """Where attention or positions leak, each row is trained on its neighbours."""
    case.documents, limit = [], LIMITS[case.world.dtype]
    for row in case.few:  # a problem has no response, so its own words are one
        words = getattr(row, "response", row.prompt.replace(data.IMAGE_MARKER, " "))
        example = data.Example(row.id, row.prompt, words, row.images)
        case.documents.append(data.encode_example(example, case.tokenizer, case.settings))
    packed = zip(case.documents, logps_of(case, case.documents), strict=True)
    gaps = {d.name: (logps_of(case, [d])[0] - x).abs().mean().item() for d, x in packed}
    wrong = sorted(name for name, gap in gaps.items() if not gap <= limit)
    require(not wrong, wrong, "read their neighbours in a pack, mend attend() in model.py, lengths")
    return f"log-probs off by {max(gaps.values()):.0e} (limit {limit:g})"


def sampler(case: Case) -> str:
    """A sampler that is another model than the trainer, or one that keeps old weights, old keys or
    old pictures after sync(), makes PPO off-policy: slow decay. So all of them are turned round."""
    from rl import GAP_LIMITS  # here, because the stages import tools

    engine, policy, gaps, limit = case.engine, case.policy, [], GAP_LIMITS[case.world.dtype]
    for _ in range(2):
        engine.sync(distributed.whole_weights(policy, case.world.dtype))
        rollouts = engine.generate(case.few, 2, min(32, case.cfg.longest))
        engine.rest()
        logps = torch.cat(logps_of(case, [r.document for r in rollouts])).cpu()
        gap = (logps - torch.tensor([x for r in rollouts for x in r.logps])).abs().mean()
        gaps.append(gap.item())
        for name in TURNED:
            policy.get_parameter(f"{name}.weight").mul_(-1)
    figure = f"log-probs off by {gaps[0]:.0e}, by {gaps[1]:.0e} of other weights (limit {limit:g})"
    cure = "weights, dtype or positions of the sampler are not the trainer's, or sync() leaves some"
    require(all(gap <= limit for gap in gaps), figure, cure)  # NaN is not
    return figure


@torch.enable_grad()
def update(case: Case) -> str:
    """A weight without gradient never learns, a tower with one is not frozen, and a bfloat16 master
    of 1 stays what it was after a step of 1e-6. Of adapters, B alone has a gradient at first."""
    policy, lr, wrong, lora = case.policy, case.cfg.lr, [], case.cfg.lora_rank > 0
    loss = -torch.cat(logps_of(case, case.documents)).mean() / case.world.size
    distributed.backward(policy, loss, case.world, last=True)
    for name, weight in policy.named_parameters():
        norm = 0.0 if weight.grad is None else whole(weight.grad).norm().item()
        tower = name.startswith("visual.")
        frozen = not case.vision if tower else lora and ".lora_B." not in name
        if not math.isfinite(norm) or frozen == (norm > 0):
            wrong.append(f"the gradient of {name} is {norm:g}")
    require(not wrong, wrong, "mend requires_grad (distributed.load), or the weights")
    trained = [p for p in policy.parameters() if p.requires_grad]
    case.optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0, fused=True)
    part = "lora_B.weight" if lora else "weight"
    weight = policy.get_parameter(f"model.layers.0.mlp.down_proj.{part}")
    before, clear = whole(weight).clone(), whole(weight.grad).abs() > 1e-7  # AdamW's eps is 1e-8
    case.optimizer.step()
    share = (whole(weight) != before)[clear].float().mean().item()
    figure = f"{share:.1%} of {weight.dtype} masters move at --lr {lr:g}"
    require(share > 0.5, figure, "too coarse, keep them in float32")
    return f"loss {loss.item():.3g}, {figure}"


def disk(case: Case) -> str:
    """A checkpoint that cannot be written ends the run at its first one."""
    run = Path(case.cfg.out) / "doctor.part"  # a run that starts there removes what a kill leaves
    pairs = {"policy": (case.policy, case.optimizer)}
    try:
        with checkpoint.Saver(run, case.directory, case.world.dtype) as saver:
            saver.save(1, pairs, case.policy, "of tools/doctor.py")
        checkpoint.load_state(checkpoint.newest(run)[1], pairs)
        free = shutil.disk_usage(run).free
        size = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    finally:
        case.world.wait()
        if case.world.main:
            shutil.rmtree(run, ignore_errors=True)
    figure = f"{case.cfg.out}: {size / 1e9:.3g} GB written and read, {free / 1e9:.3g} GB left"
    need = 3 * size * (2 if getattr(case.cfg, "algorithm", "") == "ppo" else 1)
    require(free > need, figure, f"a run needs {need / 1e9:.3g} GB, three checkpoints")
    return figure


CHECKS = (environment, model, rows, template, reward, start, packing, sampler, update, disk)
OF_RL = (reward, sampler)  # a cold start has none


@torch.no_grad()
def examine(cfg, world: distributed.World) -> dict[str, tuple[str, str]]:
    """{check: (PASS or FAIL, what to say)}, printed as they come, for settings of rl.py or
    coldstart.py. With several ranks a check fails where it fails on any."""
    rl, results = hasattr(cfg, "algorithm"), {}
    case = Case(cfg=cfg, world=world, rl=rl, share=(world.rank, world.size))
    for check in (check for check in CHECKS if rl or check not in OF_RL):
        try:
            result = "PASS", check(case)
        except Exception as error:  # whatever is broken; ours speak for themselves
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            result = "FAIL", f"{kind}{error}"
        status, words = min(distributed.everyone(result), key=lambda one: one[0])  # FAIL < PASS
        results[check.__name__] = status, words
        if world.main:
            print(f"{status}  {check.__name__:11}  {words}", flush=True)
        if status == "FAIL":
            break
    return results


def main(cfg):
    world = distributed.start()
    results = examine(cfg, world)
    distributed.finish(world)
    if "FAIL" in {status for status, _ in results.values()}:
        atexit.unregister(distributed.leave)  # it would end with 0
        sys.exit(1)
    if world.main:
        print("all checks passed")


if __name__ == "__main__":
    import coldstart  # here, because the stages import tools
    import rl

    stages = {"rl": rl.Config(), "coldstart": coldstart.Config()}
    run_main(main, tyro.extras.subcommand_type_from_defaults(stages))
