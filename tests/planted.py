"""Real bugs, planted one at a time: what each does to the reward, and what gives it away.

BUGS holds what a bug puts in the place of shipped code, which knows nothing of it; where people met
it, the metric that shows it best, what catches it (test_planted.py proves it: a mutation test of
the suite), and the cure. Signs of all in a run: docs/metrics.md.

    python tests/planted.py    # after runs/laptop.sh; draws OUT/all.png, which is docs/planted.png

Each is rl.main on the miniature, which goes on where it would stop, as sampler and trainer differ;
finished ones are kept. All take half an hour on two busy cores.
"""

import json
import math
import sys
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

import model  # noqa: E402
import reward  # noqa: E402
import rl  # noqa: E402
import rollout  # noqa: E402
from common import distributed, packs  # noqa: E402

# lr: high, as 30 steps have to show it
SETTINGS = rl.Config(steps=30, problems=32, lr=3e-4, save_every=0, out="out/planted")


@dataclass(frozen=True)
class Bug:
    wrong: str
    patches: list  # (where, name, what becomes of what is there)
    metric: str  # that shows it best
    caught_by: tuple[str, ...]  # "rl: words of its refusal", "doctor: words", "file.test[case]"
    trap: str  # where people met it
    cure: str


def one_slot_further(inputs):
    return inputs if inputs.slots is None else replace(inputs, slots=inputs.slots + 1)


def late(values, counts):
    return torch.cat([torch.cat([v[1:], v[-1:]]) for v in values.split(counts)])


def with_rewards_of_neighbours(rollouts, samples):
    others = rollouts[samples:] + rollouts[:samples]
    return [replace(r, reward=o.reward) for r, o in zip(rollouts, others, strict=True)]


def coarse(made, weights):
    for weight in weights:
        weight.data.copy_(weight.data.bfloat16())
    return made


def estranged(models):
    group = models["policy"].optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(w.detach().clone()) for w in group["params"]]
    return models


def without_stops(pack, policy):
    stops = torch.isin(pack.targets, torch.tensor(policy.config.stop_ids))
    return replace(pack, advantages=pack.advantages * ~stops)


EXACT = "test_rl.test_values_gae_normalise_and_train_give_the_exact_gradient_of_a_batch"
HEALTHY = "test_rl.test_a_run_logs_what_it_did_and_the_sampler_agrees_with_the_trainer"
RATES = "test_rl.test_warm_up_counts_optimiser_steps"
# fmt: off
BUGS = {
    "stale_sampler": Bug("after an update the sampler keeps the old weights",
        [(rollout.TorchSampler, "sync", lambda sync: lambda self, weights: [*weights] and None)],
        "logp_diff", ("rl: after the update of step 0",), "vllm#9744, verl#3694",
        "copy every weight after every update; drop what was cached under the old ones"),
    "bent_draws": Bug("draws are bent (as by temperature 1.8), the log-probs reported are not",
        [(rollout, "draw_tokens", lambda draw: lambda x, u, t, *of: draw(x, u, 1.8 * t, *of))],
        "no_box", ("test_rollout.test_the_first_tokens_of_many_samples_follow_the_model",),
        "NeMo-RL#3497", "set every sampling field, take none from generation_config.json"),
    "attention_leaks": Bug("attention takes a pack for one document",
        [(model, "attend", lambda attend: lambda q, k, v, lengths, causal: attend(
            q, k, v, [sum(lengths)] if causal else lengths, causal))], "logp_diff",
        ("doctor: neighbours in a pack",
         "test_model.test_logits_and_all_gradients_equal_those_of_transformers[2]"),
        "LlamaFactory#7754, transformers#40154",
        "give attention the lengths of documents, not of packs"),
    "features_one_off": Bug("image features stand one slot too far",
        [(model.Qwen25VL, "hidden", lambda hidden: lambda self, inputs, *rest: hidden(
            self, one_slot_further(inputs), *rest))], "reward_image",
        ("test_model.test_logits_and_all_gradients_equal_those_of_transformers[1]",),
        "EasyR1#110, R1-V#180",
        "place them by offsets stored with the prompt; compare logits with transformers"),
    "wrong_sign": Bug("the loss is the objective, not minus it",
        [(rl, "policy_loss", lambda loss: lambda *tensors: -loss(*tensors))],
        "reward", ("test_rl.test_the_loss_of_a_token_by_hand[0]", EXACT),
        "open-r1#239, TRL#2703", "hold the loss against an exact gradient"),
    "value_late": Bug("V is read behind the token that it should not have seen",
        [(rl, "gae", lambda gae: lambda rewards, values, counts, *rest: gae(
            rewards, late(values, counts), counts, *rest))], "truncated", (EXACT,),
        "SkyRL#1305, verl#1758", "read V(s_t) at the row that predicts token t"),
    "rewards_shuffled": Bug("each problem's rewards go to the samples at its neighbour",
        [(where, "share_packs", lambda share: lambda rollouts, cfg, *rest: share(
            with_rewards_of_neighbours(rollouts, cfg.samples), cfg, *rest))
         for where in (packs, rl)], "reward", (EXACT,), "Search-R1#88",
        "keep the reward in the record of its rollout; pair no lists by place alone"),
    "spaces_in_box": Bug("the box is compared as it stands, spaces and all",
        [(reward, "compare", lambda same: lambda gold, box, *rest: (
            "match" if gold == box else "mismatch"))],
        "reward", ("test_reward.test_each_example_of_a_policy_rule_has_its_verdict[1]",),
        "verl#5635, Math-Verify#55",
        "grade twenty rollouts by hand; keep a status beside every score"),
    "gold_anywhere": Bug("a response is right if the reference stands anywhere in it",
        [(reward, "extract", lambda extract: lambda response: ("", response)),
         (reward, "compare", lambda same: lambda gold, response, *rest: (
            "match" if gold in response.split() else "mismatch"))], "length",
        ("test_reward.test_rule_1_the_last_closed_box_counts_and_every_score_has_a_status[1]",),
        "Open-Reasoner-Zero", "only the last closed box counts; read what scored"),
    "bf16_masters": Bug("the weights that the optimiser moves are kept in bfloat16",
        [(distributed, "load", lambda load: lambda *given, **more: coarse(
            made := load(*given, **more), made.parameters())),
         (torch.optim.AdamW, "step", lambda step: lambda self, *rest: coarse(
            step(self, *rest), self.param_groups[0]["params"]))],
        "reward", ("doctor: masters move at",),
        "AReaL#1292", "keep masters and moments in float32"),
    "stale_optimizer": Bug("the optimiser holds weights that are no longer the policy's",
        [(rl, "load_models", lambda load: lambda *given: estranged(load(*given)))],
        "grad_norm", (HEALTHY,), "NeMo-RL#227, verl#7834",
        "build it from the weights that train, after sharding; see that they move"),
    "critic_frozen": Bug("the critic's learning rate is 0",
        [(rl, "rates", lambda rates: lambda step, count, peak, warmup: rates(
            step, count, peak * (count == 1), warmup))],
        "value_loss", (RATES,), "a critic that does not learn",
        "see that value_mean meets return_mean"),
    "endless_warmup": Bug("the warm-up does not end, the rates go on rising",
        [(rl, "rates", lambda rates: lambda step, count, peak, warmup: [
            peak * (step * count + k + 1) / max(1, warmup) for k in range(count)])],
        "lr", (RATES,), "warm-up counts steps", "log the rate that is used"),
    "stop_untrained": Bug("a mask by token id (pad is the stop token) takes its loss away",
        [(rl, "policy_losses", lambda losses: lambda policy, pack, cfg: losses(
            policy, without_stops(pack, policy), cfg))],
        "policy_loss", (HEALTHY,), "TRL#1623, open-r1#494",
        "masks follow from lengths, never from token ids"),
}
# fmt: on


@contextmanager
def planted(name: str):
    """The bug of this name, while it lasts; `healthy` is none."""
    with ExitStack() as stack:
        for where, attribute, change in BUGS[name].patches if name in BUGS else ():
            instead = change(getattr(where, attribute))
            stack.enter_context(patch.object(where, attribute, instead))
        yield


def run(name: str, cfg: rl.Config):
    """rl.main with a bug, and without its limit on the gap between sampler and trainer."""
    with planted(name), patch.dict(rl.GAP_LIMITS, dict.fromkeys(rl.GAP_LIMITS, math.inf)):
        rl.main(replace(cfg, out=f"{cfg.out}/{name}"))


def rows_of(out: str, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, name, "metrics.jsonl").open()]


def draw(out: str, names: list[str]):
    """A panel a bug: its reward over the healthy run's in grey, and under it where its metric first
    leaves the healthy run's range and half of it more."""
    healthy, down = rows_of(out, "healthy"), -(-len(names) // 4)
    figure = plt.figure(figsize=(13, 2.7 * down), layout="tight")
    for place, name in enumerate(names, start=1):
        axis, rows = figure.add_subplot(down, 4, place), rows_of(out, name)
        for curve, colour in ((healthy, "#b5bac4"), (rows, "#d1495b")):
            values = [row["reward"] for row in curve]
            near = [values[max(0, i - 2) : i + 3] for i in range(len(values))]
            axis.plot([sum(x) / len(x) for x in near], color=colour, lw=2.2)
        metric, caught_by = BUGS[name].metric, BUGS[name].caught_by
        known = [row[metric] for row in healthy]
        room = max((max(known) - min(known)) / 2, 1e-6)
        low, high = min(known) - room, max(known) + room
        low = max(low, 0.0) if min(known) >= 0 else low
        sign = f"not in {metric}, but {caught_by[0]}"
        if off := [row for row in rows if not low <= row[metric] <= high]:
            seen = f"{metric} {off[0][metric]:.2g} in step {off[0]['step']}"
            sign = f"{seen}, not {low:.2g} to {high:.2g}"
        axis.set(title=name, xlim=(0, len(healthy) - 1), ylim=(-0.04, 1.04))
        axis.set_xlabel(textwrap.fill(sign, 38), loc="left")
    figure.suptitle("reward by step, with one bug each (red) and without (grey)")
    figure.savefig(Path(out, "all.png"), dpi=100)


def main(cfg: rl.Config):
    for name in ["healthy", *BUGS]:
        if not Path(cfg.out, name, "model").is_dir():
            run(name, cfg)
    draw(cfg.out, [*BUGS])


if __name__ == "__main__":
    main(tyro.cli(rl.Config, default=SETTINGS, description=__doc__))
