"""Is a run sound, before it is started? Its invariants, on your own model, data and engine.

    python -m tools.doctor rl --model DIR --data rl.jsonl --sampler vllm ...     # as rl.py's
    python -m tools.doctor coldstart --model DIR --data sft.jsonl ...            # as coldstart.py's
    torchrun --nproc-per-node 8 -m tools.doctor rl ...     # a model that wants the run's GPUs

The settings are the run's, so what is checked is what will run; no file is changed. A line a check:
PASS, FAIL or SKIP, what was measured, the cure. Checks stand on those before them: mend the first
FAIL first. Any FAIL makes the exit status 1. The docstring of a check says what goes wrong without
it. Seconds with the miniature; with real data as long as a run takes to start, since every row is
read and every picture opened.
"""

import atexit
import math
import string
import sys
from dataclasses import fields
from itertools import pairwise
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor

from common import data, distributed, packs
from common.log import run_main
from model import check_weights, empty_model, put, read_config
from reward import grade
from rollout import canary, canary_gap, open_sampler
from tools import plan

# nats a token by which log-probs in a pack may differ from those alone; rounding is a tenth of it
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
SAMPLE = 2000  # rows, spread over the data, whose prompts and golds are looked at
TURNED = ("visual.merger.ln_q", "model.layers.0.input_layernorm", "model.norm")  # for each cache


class Skip(Exception):
    """Why a check says nothing."""


class Case(SimpleNamespace):
    """What checks leave for those after them; who wants what is not there is skipped."""

    def __getattr__(self, name: str):
        raise Skip(f"no {name}: a check above has failed, or this stage has none")


def verdict(figure: str, sound: bool, cure: str) -> str:
    """What was measured; ValueError with the cure where that is not sound."""
    if not sound:
        raise ValueError(f"{figure}: {cure}")
    return figure


def named(culprits: list[str]) -> str:
    more = f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""
    return ", ".join(culprits[:3]) + more


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def logps_of(case: Case, documents: list[data.Document]) -> list[Tensor]:
    """The trainer's, of each response, from one pack; samples of a problem share its rows."""
    pack = packs.make_pack(documents, share_prompts=True)
    logps, _ = case.policy.logps(pack.to(case.world.device))
    if not torch.is_grad_enabled():
        distributed.release(case.policy)
    return [*logps.split(pack.counts)]


def files(case: Case) -> str:
    """A weight that no file holds stays noise; where ids differ, picture tokens are sampled."""
    where = data.model_directory(case.cfg.model)
    config, t = read_config(where), data.load_tokenizer(where)
    weights = check_weights(empty_model(where), where)
    ids = dict(zip(data.VISION, config.vision_token_ids, strict=True))
    ids |= {} if t.eos_token_id in config.stop_ids else {t.eos_token: config.stop_ids[0]}
    ours = dict(zip(ids, t.convert_tokens_to_ids([*ids]), strict=True))
    wrong = [f"{x} is {ours[x]}, in config.json {ids[x]}" for x in ids if ours[x] != ids[x]]
    case.directory, case.config, case.tokenizer = where, config, t
    case.settings = data.load_image_settings(where)
    figure = f"{where}: {len(weights)} tensors, {len(t):,} tokens"
    return verdict(figure, not wrong, f"{named(wrong)}: take all files from one model")


def rows(case: Case) -> str:
    """A bad row stops the run when it starts; a column that nobody reads may be the pictures'."""
    read = data.read_problems if case.rl else data.read_examples
    case.rows = read(case.cfg.data, columns=case.cfg.columns, share=case.share)
    case.some = [*case.rows[:: math.ceil(len(case.rows) / SAMPLE)]]
    shown = sum(bool(row.images) for row in case.some)
    return f"{case.cfg.data}: {len(case.rows):,}; pictures in {shown:,} of {len(case.some):,}"


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
    cure = f"{named(wrong)}: give {case.directory} the chat_template of Qwen2.5-VL"
    return verdict(f"{len(case.some):,} prompts", not wrong, cure)


def reward(case: Case) -> str:
    """A gold that does not match itself never rewards; one that is not one option misleads."""
    if not case.rl:
        raise Skip("this stage has none")
    wrong = []
    for p in case.some:
        how = {"choices": p.choices, "precision": p.precision}
        letters = string.ascii_uppercase[: len(p.choices or ())]
        boxes = [f"\\boxed{{{x}}}" for x in (p.answer, *letters)]
        itself, *options = [grade(p.answer, box, **how).score for box in boxes]
        if not itself:
            wrong.append(f"{p.id}: {p.answer!r:.40} cannot be graded")
        elif options and sum(options) != 1:
            wrong.append(f"{p.id}: {p.answer!r:.40} is not one choice")
    cure = f"{named(wrong)}: mend or drop these rows of {case.cfg.data}"
    return verdict(f"{len(case.some):,} golds", not wrong, cure)


def memory(case: Case) -> str:
    """A run that does not fit dies at its first long response, perhaps hours in."""
    if not torch.cuda.is_available() or not case.world.main:
        raise Skip("no GPU here: python -m tools.plan says what others need")
    room = torch.cuda.get_device_properties(0).total_memory / 1e9
    names = [f.name for f in fields(plan.Config) if hasattr(case.cfg, f.name)]
    settings = {name: getattr(case.cfg, name) for name in names}
    settings |= {"stage": "rl" if case.rl else "coldstart", "gpus": case.world.size}
    settings["longest"] = case.limit + (case.cfg.longest if case.rl else 0)
    sizes = {name: size for name, (size, *_) in plan.GPUS.items()}  # the next smaller one's cures
    settings["gpu"] = min(sizes, key=lambda name: (sizes[name] > room, abs(sizes[name] - room)))
    cfg = plan.Config(**settings)
    fits = (peak := plan.peak_gb(cfg)) <= room
    return verdict(f"{peak:.1f} of {room:.1f} GB at most", fits, "" if fits else plan.advice(cfg))


def start(case: Case) -> str:
    """The engine, then the trainer, as rl.py does: vLLM wants the memory free."""
    from rl import GAP_LIMITS  # here, because the stages import tools

    cfg, where, world = case.cfg, case.directory, case.world
    if case.rl:
        room = cfg.sampler_batch, cfg.prompt_tokens + cfg.longest, cfg.kv_cache_gb
        case.sampler = open_sampler(cfg.sampler, where, world, room)
        case.gap_limit = GAP_LIMITS[world.dtype]
    how = (case.train_vision, cfg.recompute, cfg.compile)
    case.policy = distributed.load(where, world, "lm", *how)
    return f"{world.size} x {world.device.type}, computing in {world.dtype}"


def pictures(case: Case) -> str:
    """A picture that was cut stops the run when its row comes up, perhaps hours in."""
    t, settings, documents = case.tokenizer, case.settings, []
    opened = data.check_images(case.rows, case.share)

    def length(row) -> int:
        return data.prompt_length(row.prompt, row.images, t, settings, row.id)

    short = sorted((row for row in case.some if length(row) <= case.limit), key=length)
    few = [row for row in short if row.images][:3] + [row for row in short if not row.images][:3]
    for row in few:  # a problem has no response, so its own words are one
        words = getattr(row, "response", row.prompt.replace(data.IMAGE_MARKER, " "))
        prompt = data.encode_prompt(row.prompt, row.images, t, settings, row.id)
        documents.append(data.Document(prompt, data.encode_response(words, t), row.id))
    if few:
        case.few, case.documents = few, documents
    share = f"{len(short):,} of {len(case.some):,} prompts have at most {case.limit:,} tokens"
    return verdict(f"{opened:,} are whole; {share}", bool(few), "raise that limit")


def stop(case: Case) -> str:
    """A stop token without loss is never learnt; one that the sampler ignores ends nothing."""
    t, trained = case.tokenizer, {d.response_ids[-1] for d in case.documents}
    wanted = {t.convert_tokens_to_ids(data.STOP), t.eos_token_id}
    stops = {*case.sampler.stops} if case.rl else {t.eos_token_id}
    cure = f"{data.STOP} must be {case.directory}'s eos_token, and end what encode_response gives"
    return verdict(f"trained {trained}, stops {stops}", trained <= wanted <= stops, cure)


def packing(case: Case) -> str:
    """Where attention or positions leak, each row is trained on its neighbours."""
    limit, documents = LIMITS[case.world.dtype], 2 * case.documents
    packed = zip(documents, logps_of(case, documents), strict=True)
    gaps = [(logps_of(case, [d])[0] - x).abs().mean().item() for d, x in packed]
    wrong = {d.name for d, gap in zip(documents, gaps, strict=True) if not gap <= limit}
    cure = f"{named(sorted(wrong))} read their neighbours: mend attend() in model.py, and lengths"
    return verdict(f"log-probs off by {max(gaps):.0e} (limit {limit:g})", not wrong, cure)


def tied(case: Case) -> str:
    """Tied weights that come apart, or an export that forgot that they are, train differently."""
    head, embedding = case.policy.head_weight, case.policy.model.embed_tokens.weight
    same = head is embedding or torch.equal(whole(head), whole(embedding))
    cure = f"{case.directory}/config.json is wrong, tie_word_embeddings is {not same}"
    sound = same == case.config.tie_word_embeddings
    return verdict(f"head and embedding are {'one' if same else 'two'}", sound, cure)


def sampler(case: Case) -> str:
    """A sampler that is another model than the trainer makes PPO off-policy: slow decay."""
    rollouts = case.sampler.generate(case.few, 2, min(32, case.cfg.longest))
    logps = torch.cat(logps_of(case, [r.document for r in rollouts])).cpu()
    gap = (logps - torch.tensor([x for r in rollouts for x in r.logps])).abs().mean()
    figure = f"{len(logps)} tokens off by {gap:.0e} (limit {case.gap_limit:g})"
    cure = "weights, dtype or positions of the sampler are not the trainer's"
    return verdict(figure, gap <= case.gap_limit, cure)


def sync(case: Case) -> str:
    """After an update the sampler must keep no old weight, and no old keys or pictures."""
    engine, policy, gaps = case.sampler, case.policy, []
    known = canary(case.few, case.tokenizer, case.settings, case.limit)
    for factor, synced in ((-1, False), (1, True), (-1, True)):
        for name in TURNED:
            policy.get_parameter(f"{name}.weight").mul_(factor)
        if synced:  # as rl.py does
            engine.rest()
            engine.sync(distributed.whole_weights(policy, case.world.dtype))
        gaps.append(canary_gap(engine, policy, known, case.train_vision))
        distributed.release(policy)
    engine.rest()  # the gradient takes its room
    stale, fresh, back = gaps
    figure = f"weights turned round: off by {stale:.0e}, synced {fresh:.0e}, and back {back:.0e}"
    cure = "sync() leaves old weights, or a cache of prompts or pictures"
    return verdict(figure, max(fresh, back) <= case.gap_limit < stale, cure)


@torch.enable_grad()
def gradient(case: Case) -> str:
    """A weight without gradient never learns; a tower with one is not frozen."""
    loss = -torch.cat(logps_of(case, case.documents)).mean() / case.world.size
    distributed.backward(case.policy, loss, case.world, last=True)
    norms, wrong = [], []
    for name, weight in case.policy.named_parameters():
        frozen = name.startswith("visual.") and not case.train_vision
        norms.append(0.0 if weight.grad is None else whole(weight.grad).norm().item())
        if not math.isfinite(norms[-1]) or frozen == (norms[-1] > 0):
            wrong.append(f"{name} has {norms[-1]:g}")
    figure = f"norm {math.hypot(*norms):.3g}, {sum(x > 0 for x in norms)} of {len(norms)} tensors"
    cure = f"{named(wrong)}: mend requires_grad (distributed.load), or the weights"
    return verdict(figure, not wrong, cure)


def precision(case: Case) -> str:
    """1 - 1e-6 is 1 in bfloat16: such weights stay what they were."""
    weights = [*case.policy.model.layers[0].parameters()]  # of all, 60 GB of moments at 7B
    before, lr, moved = [whole(weight).clone() for weight in weights], case.cfg.lr, []
    torch.optim.AdamW(weights, lr, weight_decay=0.0, fused=True).step()
    for weight, old in zip(weights, before, strict=True):
        clear = whole(weight.grad).abs() > 1e-7  # AdamW's eps is 1e-8: these move by all of lr
        moved.append((whole(weight) != old)[clear].float())
        put(weight, old)
    share = torch.cat(moved).mean().item()
    figure = f"{share:.1%} of {weights[0].dtype} masters move at --lr {lr:g}"
    return verdict(figure, share > 0.5, "too coarse: keep them in float32")


CHECKS = (files, rows, template, reward, memory, start, pictures, stop)
CHECKS += (packing, tied, sampler, sync, gradient, precision)


@torch.no_grad()
def examine(cfg, world: distributed.World) -> dict[str, tuple[str, str]]:
    """{check: (status, what to say)} for settings of rl.py or coldstart.py, printed as they come.

    With several ranks a check fails where it fails on any.
    """
    rl, results = hasattr(cfg, "algorithm"), {}
    limit = cfg.prompt_tokens if rl else cfg.max_tokens
    case = Case(cfg=cfg, world=world, rl=rl, limit=limit, share=(world.rank, world.size))
    case.train_vision = rl and cfg.train_vision
    for check in CHECKS:
        try:
            result = "PASS", check(case)
        except Skip as reason:
            result = "SKIP", str(reason)
        except Exception as error:  # whatever is broken: the other checks go on
            said = isinstance(error, ValueError | OSError)  # by this project
            result = "FAIL", str(error) if said else f"{type(error).__name__}: {error}"
        every = distributed.everyone(result)
        status, words = next((one for one in every if one[0] == "FAIL"), every[0])
        results[check.__name__] = status, words
        if world.main:
            print(f"{status}  {check.__name__:9}  {words}", flush=True)
    return results


def main(cfg):
    world = distributed.start()
    results = examine(cfg, world)
    distributed.finish(world)
    if "FAIL" in {status for status, _ in results.values()}:
        atexit.unregister(distributed.leave)  # it would end with 0
        sys.exit(1)


if __name__ == "__main__":
    import coldstart  # here, because the stages import tools
    import rl

    stages = {"rl": rl.Config(), "coldstart": coldstart.Config()}
    run_main(main, tyro.extras.subcommand_type_from_defaults(stages))
