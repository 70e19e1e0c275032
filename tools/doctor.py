r"""Is it sound, before it is started? The invariants of a run, on your own model, data and engine.

A check returns what it measured, the culprits, and the cure; its docstring says what goes wrong
without it. SKIP says why. What raises is a FAIL, and the others go on; then the exit status is 1.
Seconds with the miniature; a 7B is not timed yet. Give it the settings of the run:

    python -m tools.doctor   # the miniature of runs/laptop.sh
    python -m tools.doctor --model DIR --data rl.jsonl --sampler vllm --gpus 8 ...
    python -m tools.doctor --stage coldstart --model DIR --data sft.jsonl --lr 2e-4
"""

import atexit
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import SkipTest

import torch
import tyro
from torch import Tensor

from common import data
from common import distributed as parallel
from common.log import progress
from model import empty_model, load_model, load_weights, read_config
from reward import grade
from rollout import TorchSampler, VllmSampler, canary, canary_gap
from tools import plan

# nats a token: sampler against trainer, as in rl.py; packed against alone. Rounding is a tenth
LIMITS = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.1, 0.05)}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEFT_OUT = 0.01  # share of rows that may be too long: more is a setting, not an outlier
CHANGED = "visual.merger.ln_q model.layers.0.input_layernorm model.norm".split()  # for each cache
USUAL = dict(repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=50, min_p=0.0)


@dataclass(frozen=True)
class Config:
    model: str = "out/laptop/coldstart/model"  # HF directory or Hub name
    data: str = "out/laptop/data/train.jsonl"  # rows of the stage: JSONL, parquet, Hub id
    stage: Literal["rl", "coldstart"] = "rl"
    sampler: Literal["torch", "vllm"] = "torch"
    rows: int = 2000  # that are looked at, from the start
    lr: float = 1.5e-4
    prompt_tokens: int = 512  # rl: longer prompts are left out
    pack_tokens: int = 4096
    length: int = 0  # tokens of a response (rl) or row (coldstart); 0: what a pack has room for
    kv_cache_gb: float = 0.25  # of vllm
    recompute: Literal["none", "selective", "full"] = "none"
    offload: bool = False  # rl: a model that waits does so in host memory
    gpus: int = 1  # of the run, for the plan of its memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 on GPUs, float32 on CPUs


class Case(SimpleNamespace):
    """What checks leave for those after them; who asks for what is not there is skipped."""

    def __getattr__(self, name: str):
        raise SkipTest(
            f"needs {name.removesuffix('_ok')}: that failed above, or this stage has none"
        )


def local(weight: Tensor) -> Tensor:
    """In a world of one, FSDP's slice is the whole."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def logps_of(case: Case, documents: list[data.Document]) -> list[Tensor]:
    """The trainer's, of each response, from one pack; tries at one problem share its rows."""
    pack = data.pack(documents, 1 << 40, shared=True)[0].to(case.world.device)
    logps, _ = case.policy(**pack.inputs, rows=pack.rows, targets=pack.targets)
    if not torch.is_grad_enabled():
        parallel.release(case.policy)
    parts = logps.split([len(documents[i].response_ids) for i in pack.members])
    return [parts[pack.members.index(i)] for i in range(len(documents))]


def files(case: Case):
    """A weight that no file holds stays noise; where ids differ, picture tokens are drawn."""
    case.directory = where = data.model_directory(case.cfg.model)
    case.config, case.settings = read_config(where), data.load_image_settings(where)
    case.tokenizer, sizes = data.load_tokenizer(where), []
    load_weights(empty_model(where), where, lambda weight, tensor: sizes.append(tensor.numel()))
    case.weights, t, c = sum(sizes), case.tokenizer, case.config
    ids = dict(zip(data.VISION, c.vision_token_ids, strict=True)) | {t.eos_token: c.eos_token_id}
    ours = {token: t.convert_tokens_to_ids(token) for token in ids}
    wrong = [f"{x} is {ours[x]}, in config.json {ids[x]}" for x in ids if ours[x] != ids[x]]
    file = Path(where) / "generation_config.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    acts = [f"; {k} {said[k]} ({file.name})" for k, x in USUAL.items() if said.get(k, x) != x]
    figure = f"{case.weights / 1e6:,.1f} M weights, {len(t):,} tokens{''.join(acts)}"
    return figure, wrong, f"take all files of {where} from one model"


def rows(case: Case):
    """A bad row stops the stage when it starts; here all are found at once."""
    raw, good, bad = data.raw_rows(case.cfg.data, "train", None), [], []
    for i in progress(range(min(len(raw), case.cfg.rows)), "rows"):
        try:
            good.append((data.problem_of if case.rl else data.example_of)(*raw[i]))
        except (ValueError, FileNotFoundError) as error:
            bad.append(str(error))
    vars(case).update({name: good for name in ("rows", "problems")[: 1 + case.rl] if good})
    return f"{len(good):,} of {len(raw):,} read, {len(bad):,} bad", bad, "mend them, or --stage"


def template(case: Case):
    """Doubled or missing markup is learnt, and gives scores that nobody reproduces."""
    t, wrong, asked = case.tokenizer, [], case.rows[:: math.ceil(len(case.rows) / 64)]
    markup = {*t.all_special_ids, *t.convert_tokens_to_ids([*data.MARKUP])}
    for row in asked:
        ids = data.chat_ids(row.prompt, len(row.images), t, row.id)
        texts = data.split_at_markers(row.id, row.prompt, len(row.images))
        parts = [x for text in texts for x in ({"type": "image"}, {"type": "text", "text": text})]
        turn = [{"role": "user", "content": [x for x in parts[1:] if x.get("text") != ""]}]
        whole = t.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        twice = [t.decode([a]) for a, b in zip(ids, ids[1:], strict=False) if a == b in markup]
        end = "".join(t.decode(ids).rpartition(data.STOP)[2].split())
        opened = end.count("<|im_start|>") == end.count("<|im_start|>assistant") == 1
        wrong += [f"{row.id} is not what apply_chat_template gives"] * (whole != ids)
        wrong += [f"{row.id} has {' '.join(twice)} twice in a row"] * bool(twice)
        wrong += [f"{row.id} ends in {end!r}, not in one <|im_start|>assistant"] * (not opened)
    cure = f"the chat_template in {case.directory} is at fault, take Qwen2.5-VL's"
    return f"{len(asked)} prompts, {len(wrong)} not as the chat template should be", wrong, cure


def reward(case: Case):
    """A gold that does not match itself never rewards; one that is not one option misleads."""
    wrong = []
    for p in progress(case.problems, "golds"):
        boxes = [f"\\boxed{{{answer}}}" for answer in (p.answer, *LETTERS[: len(p.choices or "")])]
        options = dict(choices=p.choices, precision=p.precision)
        itself, *chosen = (grade(p.answer, box, **options).score for box in boxes)
        why = "is not one choice" if itself else "cannot be graded"
        wrong += [f"{p.id}: {p.answer!r:.40} {why}"] * (not itself or sum(chosen) != bool(chosen))
        spaced, bare = (f"\\boxed{{ {p.answer} }}", f"{p.answer} \\boxed{{}}")
        loose = (
            grade(p.answer, bare, **options).score or not grade(p.answer, spaced, **options).score
        )
        wrong += [f"{p.id}: spaces or no box decide"] * bool(itself and loose)
    figure = f"{len(case.problems) - len(wrong)} of {len(case.problems)} golds match themselves"
    return figure, wrong, f"mend or drop these rows of {case.cfg.data}"


def memory(case: Case):
    """A run that does not fit dies at its first long response, perhaps hours in."""
    cfg, c, known = case.cfg, case.config, plan.ASSUMED
    state = sum(plan.trained(plan.sizes(c, head)) for head in ("lm", "value")[: 1 + case.rl])
    state *= plan.STATE / min(cfg.gpus, plan.NODE) / 1e9
    if not torch.cuda.is_available():
        raise SkipTest(f"no GPU here; weights, gradients and moments: {state:.3g} GB a GPU")
    room = torch.cuda.get_device_properties(0).total_memory / 1e9
    kind = min(plan.GPUS, key=lambda name: abs(plan.GPUS[name][0] - room))
    asked = {name: getattr(cfg, name, usual) for name, usual in vars(plan.Config()).items()}
    asked |= {"model": case.directory, "length": case.longest, "gpu": kind}
    peaks = plan.peaks(plan.choose(plan.Config(**asked), c, known), c, known)
    gb, phase = max((gb, phase) for phase, gb in peaks.items())
    figure = f"{gb:.1f} of {room:.1f} GB predicted, in {phase}"
    return figure, [phase] * (gb > room), "take more --gpus, or settings that plan.py finds"


def start(case: Case):
    """The engine, then the trainer, as rl.py does: vLLM wants the memory free."""
    cfg, world, where = case.cfg, case.world, case.weights and case.directory
    if case.rl and cfg.sampler == "vllm":
        room = (256, cfg.prompt_tokens + case.longest, cfg.kv_cache_gb, world.dtype)
        case.sampler = VllmSampler(where, case.tokenizer, case.settings, *room)
    elif case.rl:
        model = load_model(where, world.dtype, world.device)
        case.sampler = TorchSampler(model, case.tokenizer, case.settings)
    case.policy = parallel.load(where, world, recompute=cfg.recompute)
    return f"on {world.device}, {parallel.peak_gb(world):.1f} GB", [], ""


def pictures(case: Case):
    """Where tokens and rows of a picture differ in number, it slips; long rows are left out."""
    t, s, rows, sizes = case.tokenizer, case.settings, case.template_ok and case.rows, []
    (name, limit), pad, wrong, documents = case.limit, case.config.image_token_id, [], []
    for r in progress(rows, "prompts"):
        told = [] if case.rl else data.encode_response(r.response, t)
        sizes.append(data.prompt_length(r.prompt, r.images, t, s, r.id) + len(told))
    order = sorted(range(len(rows)), key=sizes.__getitem__)
    short, last = [rows[i] for i in order if sizes[i] <= limit], order[-1]
    tried = [r for r in short if r.images][:3] + [r for r in short if not r.images][:3]
    for r in tried:  # a problem has no response: it is asked to say itself again
        words = getattr(r, "response", r.prompt.replace(data.IMAGE_MARKER, " "))
        p = data.encode_prompt(r.prompt, r.images, t, s, r.id)
        documents.append(data.Document(p, data.encode_response(words, t)))
        if p.grids:
            shown = len(case.policy.visual(p.patches.to(case.world.device), p.grids))
            counts = {shown, p.ids.count(pad), sum(map(math.prod, p.grids)) // 4}
            wrong += [f"{r.id}: {counts} image tokens and rows"] * (len(counts) > 1)
    vars(case).update({"tried": tried, "documents": documents} if tried else {})
    share = 1 - len(short) / len(rows)
    wrong += [f"{rows[last].id} has {sizes[last]} tokens"] * (share > LEFT_OUT)
    figure = f"{len(tried)} rows tried; longest {sizes[last]:,}, {share:.1%} over {name} {limit:,}"
    return figure, wrong, f"raise {name}, or mend {case.directory}/preprocessor_config.json"


def stop(case: Case):
    """A stop token without loss is never learnt; one that the sampler ignores ends nothing."""
    t, (pack,) = case.tokenizer, data.pack(case.documents, 1 << 40)
    token, stops = t.convert_tokens_to_ids(data.STOP), {t.eos_token_id}
    stops, learnt = case.sampler.stops if case.rl else stops, (pack.targets == token).sum()
    wrong = [r.id for r in case.tried] * (learnt != len(case.tried))
    wrong += [f"stops {stops}"] * (not {token, t.eos_token_id} <= stops)
    figure = f"{data.STOP} ({token}) carries loss in {learnt} of {len(case.tried)} rows"
    figure += ", pad is the same: harmless" * (t.pad_token_id == token)
    return figure, wrong, f"data.encode_response must add it; {case.directory}: as eos_token"


def packing(case: Case):
    """Where attention or positions leak, each row is trained on its neighbours."""
    limit, documents = LIMITS[case.world.dtype][1], 2 * case.documents
    alone = [logps_of(case, [document])[0] for document in documents]
    pairs = zip(alone, logps_of(case, documents), strict=True)
    gaps = [(a - b).abs().mean().item() for a, b in pairs]
    wrong = sorted({r.id for r, gap in zip(2 * case.tried, gaps, strict=True) if not gap <= limit})
    figure = f"log-probs of {len(gaps)} rows off by {max(gaps):.0e} at most (limit {limit:g})"
    return figure, wrong, "these read their neighbours: mend attend() in model.py, and its lengths"


def tied(case: Case):
    """Tied weights that come apart, or an export that forgot that they are, train differently."""
    head, embedding = case.policy.head_weight, case.policy.model.embed_tokens.weight
    same = head is embedding or torch.equal(local(head), local(embedding))
    figure = f"head and embedding are {'one' if same else 'two'}"
    wrong = [f"{case.directory}/config.json"] * (same != case.config.tie_word_embeddings)
    return figure, wrong, f"tie_word_embeddings is {not same} there, contrary to the weights"


def sampler(case: Case):
    """A sampler that is another model than the trainer makes PPO off-policy: slow decay."""
    rollouts = case.packing_ok and case.sampler.generate(case.tried, 2, min(32, case.longest))
    logps = torch.cat(logps_of(case, [r.document for r in rollouts])).cpu()
    gap = (logps - torch.tensor([x for r in rollouts for x in r.logps])).abs()
    limit = LIMITS[case.world.dtype][0]
    wrong = [f"--sampler {case.cfg.sampler}"] * (not gap.mean() <= limit)
    figure = f"{len(gap)} tokens off by {gap.mean():.0e} (limit {limit:g}), {gap.max():.0e} at most"
    return figure, wrong, "its temperature, penalties, dtype or positions are not the trainer's"


def sync(case: Case):
    """After an update the sampler must keep no old weight, and no old keys or pictures."""
    policy, limit, cfg = case.policy, LIMITS[case.world.dtype][0], case.sampler_ok and case.cfg
    bird = canary(case.tried, case.tokenizer, case.settings, cfg.prompt_tokens)
    weights, gaps = [policy.get_parameter(f"{name}.weight").detach() for name in CHANGED], []
    for factor, synced in ((1, False), (-1, False), (1, True), (-1, True)):
        for weight in weights:
            local(weight).mul_(factor)
        if synced:  # as rl.py does
            case.sampler.rest()
            case.sampler.sync(parallel.whole_weights(policy, case.world.dtype))
        gaps.append(canary_gap(case.sampler, policy, bird, 1.0, False))
        parallel.release(policy)
    case.sampler.rest()  # the gradient takes its room
    _, stale, fresh, back = gaps
    figure = f"turned weights: off by {stale:.0e}, after a sync {fresh:.0e}, turned back {back:.0e}"
    wrong = [f"--sampler {cfg.sampler}"] * (not max(fresh, back) <= limit < stale)
    return figure, wrong, "sync() leaves old weights, or a cache of prompts or pictures"


@torch.enable_grad()
def gradient(case: Case):
    """A weight without gradient never learns; a tower with one is not frozen."""
    weights = dict(case.policy.named_parameters())
    loss = -torch.cat(logps_of(case, case.documents)).mean()
    parallel.backward(case.policy, loss, case.world, last=True)
    got = {n: local(w.grad).norm().item() for n, w in weights.items() if w.grad is not None}
    case.stepped = [weights[n] for n in got if ".layers.0." in n]  # all: 60 GB of moments at 7B
    wrong = [f"{n} has {x:g}" for n, x in got.items() if n[:7] == "visual." or not x < math.inf]
    wrong += [f"{n} has none" for n in weights if not n.startswith("visual.") and not got.get(n)]
    figure = f"in {len(got)} of {len(weights)} tensors, norm {math.hypot(*got.values()):.3g}"
    return figure, wrong, "mend requires_grad (parallel.load), or the weights"


def precision(case: Case):
    """1 - 1e-6 is 1 in bfloat16: such weights stay what they were."""
    lr, moved, before = case.cfg.lr, [], [local(w).clone() for w in case.stepped]
    torch.optim.AdamW(case.stepped, lr, weight_decay=0.0, fused=True).step()
    for weight, old in zip(case.stepped, before, strict=True):
        clear = local(weight.grad).abs() > 1e-7  # AdamW's eps is 1e-8: these move by all of lr
        moved.append((local(weight) != old)[clear].float())
        local(weight).copy_(old)
    share, kind = torch.cat(moved).mean().item(), f"masters {before[0].dtype}"
    figure = f"{100 * share:.1f} % move at --lr {lr:g}; {kind}, compute {case.world.dtype}"
    return figure, [kind] * (not share > 0.5), f"too coarse for --lr {lr:g}: keep float32"


CHECKS = (files, rows, template, reward, memory, start, pictures, stop)
CHECKS += (packing, tied, sampler, sync, gradient, precision)


@torch.no_grad()
def examine(cfg: Config, world: parallel.World) -> dict[str, tuple[str, str, str]]:
    """{check: (status, what was measured, the cure)}, each printed when it is known."""
    rl, results = cfg.stage == "rl", {}
    longest = cfg.length or cfg.pack_tokens - cfg.prompt_tokens * rl
    limit = ("--prompt-tokens", cfg.prompt_tokens) if rl else ("--length", longest)
    case = Case(cfg=cfg, world=world, rl=rl, longest=longest, limit=limit)
    for check in CHECKS:
        name = check.__name__
        print(f"      {name} ...", end="\r", file=sys.stderr, flush=True)
        try:
            figure, wrong, cure = check(case)
            status = "FAIL" if wrong else "PASS"
        except SkipTest as reason:
            status, figure, wrong, cure = "SKIP", str(reason), [], ""
        except Exception as error:  # whatever is broken: the other checks go on
            status, figure, wrong, cure = "FAIL", "raised", [type(error).__name__], str(error)
        vars(case).update({f"{name}_ok": True} if status == "PASS" else {})
        blamed = ", ".join(wrong[:3]) + f" and {len(wrong) - 3} more" * (len(wrong) > 3)
        results[name] = status, figure, f"{blamed}: {cure}" if wrong else ""
        lines = f"{status}  {name:9}  {figure}" + f"\n      {results[name][2]}" * bool(wrong)
        print(lines, flush=True)
    return results


def main(cfg: Config):
    world = parallel.start(dtype=cfg.dtype)
    found = [status for status, *_ in examine(cfg, world).values()]
    print(", ".join(f"{found.count(status)} {status}" for status in ("PASS", "FAIL", "SKIP")))
    parallel.finish(world)
    atexit.unregister(parallel.leave)  # it would end with 0, whatever was found
    sys.exit("FAIL" in found)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
