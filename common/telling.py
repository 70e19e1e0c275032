"""What a step of rl.py tells: metrics, rollouts, single tokens, the trace, a replay.

describe      means over all rollouts                          metrics.jsonl
rows_of       the first rollouts of a batch, decoded           rollouts.jsonl
token_rows    up to four tries at one problem, token by token  tokens.jsonl, shown by report.py
print_trace   the same problem through the six steps           python rl.py --trace
print_replay  a recorded step and what it gives today          python rl.py --replay RUN --step N
"""

import base64
import io
import json
import math
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import Tensor

from common import data
from common import distributed as parallel
from evaluation import behaviors
from rollout import Rollout

TOLD = 4  # tries of a problem that are told token by token
HEAD = 1000  # tokens of a long response that are told, at its beginning and at its end
SIDE = 320  # pixels of a picture there


def describe(rollouts: list[Rollout], verdicts: list, scores: list[float], world) -> dict:
    """Means over the rollouts of all ranks; pictures and text apart where it matters."""
    pairs = {}

    def mean(name: str, values: list[float]):
        pairs[name] = (sum(values), len(values))

    mean("reward", scores)
    mean("length", [len(r.response_ids) for r in rollouts])
    mean("truncated", [not r.stopped for r in rollouts])
    mean("no_box", [v.status in ("no_box", "unclosed") for v in verdicts])
    mean("unparsed", [v.status in ("unparsed", "gold_unparsed", "too_big") for v in verdicts])
    for kind, wanted in (("image", True), ("text", False)):
        mine = [i for i, r in enumerate(rollouts) if bool(r.problem.images) is wanted]
        mean(f"reward_{kind}", [scores[i] for i in mine])
        mean(f"length_{kind}", [len(rollouts[i].response_ids) for i in mine])
        counts = [behaviors.count(rollouts[i].text) for i in mine]
        for name in behaviors.NAMES:
            mean(f"{kind}/{name}", [c[name] > 0 for c in counts])
    return parallel.means(world, pairs)


def row_of(step: int, r: Rollout, verdict, score: float) -> dict:
    """What every file tells of a rollout."""
    told = {
        "step": step,
        "id": r.problem.id,
        "source": r.problem.source,
        "prompt": r.problem.prompt,
    }
    told |= {"answer": r.problem.answer, "score": score, "status": verdict.status}
    return told | {"stop": r.stopped}


def rows_of(step: int, rollouts: list[Rollout], verdicts: list, scores: list[float]) -> list[dict]:
    """What rollouts.jsonl keeps."""
    return [
        row_of(step, r, v, score)
        | {"image": bool(r.problem.images), "response": r.text, "tokens": len(r.response_ids)}
        for r, v, score in zip(rollouts, verdicts, scores, strict=True)
    ]


# ------------------------------------------------------------------ token by token


def group_to_tell(rollouts: list[Rollout], scores: list[float], samples: int) -> range:
    """The first problem with right and wrong tries; one with a picture, if there is any."""
    groups = [range(i, i + samples) for i in range(0, len(rollouts), samples)]
    seen = [g for g in groups if rollouts[g[0]].problem.images] or groups
    return next((g for g in seen if len({scores[i] for i in g}) > 1), seen[0])


def tries_to_tell(rollouts: list[Rollout], scores: list[float], samples: int) -> list[int]:
    """At most TOLD of that problem, as many right as wrong where there are."""
    group = group_to_tell(rollouts, scores, samples)
    mean = sum(scores[i] for i in group) / samples  # whatever the reward: right is above it
    right, wrong = ([i for i in group if (scores[i] > mean) is is_so] for is_so in (True, False))
    few = right[: max(TOLD // 2, TOLD - len(wrong))]
    return sorted(few + wrong[: TOLD - len(few)])


def token_rows(
    step: int,
    chosen: list[int],
    rollouts: list[Rollout],
    verdicts: list,
    scores: list[float],
    share: list[int],
    ours: list[Rollout],
    values: list[Tensor] | None,
    advantages: list[Tensor],
    found: dict[int, tuple[Tensor, Tensor]],
    tokenizer,
    world,
) -> list[dict]:
    """Lines of tokens.jsonl: the `chosen` of the batch, each by the rank that trained it.

    share, ours, values (None without a critic), advantages: what this rank trained, as in rl.main;
    found: of those that are told, (log-probs, entropies) by the trainer. Four digits of a number;
    pictures as data URIs; "skipped": after how many tokens of a long one how many are not here.
    """
    mine = {}
    for k, i in ((k, i) for k, i in enumerate(share) if i in chosen):
        r, (logps, entropies) = ours[k], found[k]
        columns = {"sampled": r.logps, "logp": logps, "entropy": entropies}
        columns |= {"value": values[k] if values else None, "advantage": advantages[k]}
        size = len(r.response_ids)
        kept = [t for t in range(size) if t < HEAD or t >= size - HEAD]
        row = row_of(step, r, verdicts[i], scores[i]) | {"sample": r.sample, "length": size}
        row["pictures"] = [picture(image) for image in r.problem.images]
        row["tokens"] = [tokenizer.decode([r.response_ids[t]]) for t in kept]
        for name, column in columns.items():
            row[name] = None if column is None else [float(f"{column[t]:.4g}") for t in kept]
        mine[i] = row | ({"skipped": [HEAD, size - 2 * HEAD]} if size > 2 * HEAD else {})
    every = parallel.union(world, mine)
    return [every[i] for i in chosen]


def picture(source) -> str:
    image, file = data.load_image(source), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.convert("RGB").save(file, "webp")
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def print_trace(rollouts, verdicts, scores, values, advantages, cfg, tokenizer):
    """One picture problem through the six steps with the numbers of this batch."""
    group = group_to_tell(rollouts, scores, cfg.samples)
    first = rollouts[group[0]]
    problem, prompt = first.problem, first.prompt
    print(f"1 ask     {problem.id}: {problem.prompt!r}, reference {problem.answer}")
    runs = ((tokenizer.decode([token]), len([*run])) for token, run in groupby(prompt.ids))
    words = " ".join(f"{word} x {n}" if n > 1 else word for word, n in runs)
    print(f"          {len(prompt.ids)} tokens: {words}")
    print(f"          pictures of (t, h, w) patches {prompt.grids}")
    print(f"2 answer  {cfg.samples} tries at temperature {cfg.temperature:g}")
    for i in group:
        print(f"          #{rollouts[i].sample}  {rollouts[i].text}")
    print("3 grade")
    for i in group:
        print(f"          #{rollouts[i].sample}  {verdicts[i].status}, reward {scores[i]:g}")
    best, worst = max(group, key=scores.__getitem__), min(group, key=scores.__getitem__)
    for i in dict.fromkeys((best, worst)):
        print(f"4 judge   #{rollouts[i].sample}, reward {scores[i]:g}")
        print("          token           log p   value V  advantage A   5 learn")
        for t, token in enumerate(rollouts[i].response_ids):
            a, v = advantages[i][t].item(), values[i][t].item() if values else math.nan
            push = "likelier" if a > 0 else "less likely" if a < 0 else "-"
            word = tokenizer.decode([token])
            print(f"          {word:14} {rollouts[i].logps[t]:6.2f} {v:9.2f} {a:12.2f}   {push}")


# ------------------------------------------------------------------ a replay


def print_replay(run: Path, step: int, metrics: dict[str, float]):
    """What the step told when it was trained, and what it tells now; seconds and memory aside."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = next(row for row in map(json.loads, lines) if row["step"] == step)
    names = [n for n in metrics if n in told and not n.startswith(("seconds", "peak_gb"))]
    same = [n for n in names if told[n] == float(metrics[n])]
    print(f"{'':20} {'then':>14} {'now':>14}")
    for name in names:
        if name not in same or name in ("reward", "policy_loss", "grad_norm", "value_loss"):
            print(f"{name:20} {told[name]:14.7g} {metrics[name]:14.7g}")
    print(f"{len(same)} of {len(names)} numbers of step {step} are the same, bit for bit")
    if len(same) < len(names):
        print("another machine, dtype or number of ranks rounds otherwise: give it as in run.json")


def print_pushes(rollouts: list[Rollout], advantages: list[Tensor], scores, world, shown: int = 8):
    """The rollouts that pulled most at the policy: sum over their tokens of |A| (1 - p).

    1 - p is how far a token's logit can still move its log-prob, so |A| (1 - p) goes with the size
    of its gradient. A spike of the gradient is mostly a few tokens that were nearly impossible.
    """
    pulls = {}
    for r, a, score in zip(rollouts, advantages, scores, strict=True):
        pull = np.abs(a.numpy()) * (1 - np.exp(np.array(r.logps)))
        t = int(pull.argmax())
        name, strongest = f"{r.problem.id}#{r.sample}", f"{r.logps[t]:.2f}, advantage {a[t]:.2f}"
        told = name, score, len(pull), f"{t}: log p {strongest}"
        pulls[r.index, r.sample] = float(pull.sum()), *told  # a batch may hold a problem twice
    pulls = parallel.union(world, pulls)
    total = sum(pull for pull, *_ in pulls.values()) or 1.0
    rows = sorted(pulls.values(), key=lambda row: -row[0])[: shown * world.main]
    header = (
        f"{'rollout':20} {'share of the pull':>18} {'reward':>7} {'tokens':>7}   strongest token"
    )
    if world.main:
        print(header)
    for pull, name, score, size, strongest in rows:
        print(f"{name:20} {pull / total:18.1%} {score:7g} {size:7}   {strongest}")
