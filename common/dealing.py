"""Who trains what: the ranks of rl.py exchange what they sampled, and each takes its packs.

    mine ──exchange──▶ every rollout of the batch, on every rank, in one order
         ──keep──▶ RUN/sampled/step_000040.npz           Recording ──▶ the same rollouts once more
         ──place──▶ this rank's packs of each part ──gather──▶ a pack's advantages, returns, ...

Ids, log-probs and lengths travel, pictures do not: who trains a rollout reads its prompt anew.
Every rank plans the same packs, so nothing else has to be agreed upon.

Dimensions: N rollouts of a batch, R trained tokens of a pack.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import checkpoint as checkpoints
from common import data, packing
from common import distributed as parallel
from rollout import Rollout


def exchange(rollouts: list[Rollout], verdicts: list, asked: list, cfg, world):
    """Every rank's rollouts and verdicts on every rank, in the order of the batch.

    -> rollouts, verdicts, lengths in tokens of their documents. Ids travel as arrays, 8 bytes a
    token with the log-prob. Texts stay but for those that are logged.
    """
    if world.size == 1:
        return rollouts, verdicts, [len(r.document) for r in rollouts]
    sent, known = {}, {(r.index, r.sample): r for r in rollouts}
    for r, verdict in zip(rollouts, verdicts, strict=True):
        text = r.text if r.index * cfg.samples + r.sample < cfg.log_rollouts else ""
        sent[r.index, r.sample] = (*arrays(r), r.stopped, text, verdict, len(r.document))
    every, verdicts, lengths = [], [], []
    for (index, sample), found in sorted(parallel.union(world, sent).items()):
        ids, logps, stopped, text, verdict, length = found
        theirs = Rollout(asked[index], sample, None, ids, logps, stopped, text, index)
        every.append(known.get((index, sample), theirs))
        verdicts.append(verdict)
        lengths.append(length)
    return every, verdicts, lengths


def arrays(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    return np.array(rollout.response_ids, np.int32), np.array(rollout.logps, np.float32)


# ------------------------------------------------------------------ packs


def deal(rollouts: list[Rollout], lengths: list[int], cfg, world, cost=float) -> list:
    """This rank's bins of rollouts (indices), for each of the `critic_steps` parts of the batch.

    A part is whole problems and does not depend on the number of ranks, so that the critic takes
    the same steps on any. Every rollout is in exactly one bin of one rank; ranks get equally many,
    and those that run at the same time cost about the same.
    """
    problems, parts = len(rollouts) // cfg.samples, []
    for part in range(cfg.critic_steps):
        low, high = (problems * k // cfg.critic_steps * cfg.samples for k in (part, part + 1))
        groups = [r.problem.id for r in rollouts[low:high]]
        bins = packing.plan(lengths[low:high], groups, cfg.pack_tokens, world.size, cost)
        parts.append([[low + i for i in members] for members in bins[world.rank]])
    return parts


def read_prompts(rollouts: list[Rollout], tokenizer, settings):
    """Prompts and lists of those that this rank has not sampled; tries of a problem share one."""
    prompts = {}
    for r in (r for r in rollouts if r.prompt is None):
        if r.index not in prompts:
            p = r.problem
            prompts[r.index] = data.encode_prompt(p.prompt, p.images, tokenizer, settings, p.id)
        r.prompt = prompts[r.index]
        r.response_ids, r.logps = r.response_ids.tolist(), r.logps.tolist()


def lay_out(rollouts: list[Rollout], parts: list, cfg, world) -> list:
    """Bins of rollouts -> (packs, trained tokens on all ranks) of each part."""
    documents, laid = [r.document for r in rollouts], []

    def pack_of(members: list[int]) -> data.Pack:
        if not members:
            return data.filler_pack()
        members = sorted(members, key=lambda i: len(documents[i]))
        return data.lay_out(documents, members, shared=cfg.share_prompts)

    for bins in parts:
        packs = [pack_of(members) for members in bins]
        if cfg.train_vision:  # ranks gather the tower together, and Adam wants a 0, not no gradient
            packs = [data.with_blank_picture(pack) for pack in packs]
        (tokens,) = parallel.sums(world, sum(len(pack.targets) for pack in packs))
        laid.append((packs, tokens))
    return laid


def place(rollouts, lengths, cfg, world, tokenizer, settings, cost):
    """-> indices of the rollouts that this rank trains, and its (packs, tokens) of each part, whose
    members count along those indices.
    """
    parts = deal(rollouts, lengths, cfg, world, cost)
    share = sorted(i for bins in parts for members in bins for i in members)
    places = {i: k for k, i in enumerate(share)}
    ours = [rollouts[i] for i in share]
    read_prompts(ours, tokenizer, settings)
    parts = [[[places[i] for i in members] for members in bins] for bins in parts]
    return share, lay_out(ours, parts, cfg, world)


def gather(per_rollout: list[Tensor], pack: data.Pack, device) -> Tensor:
    """Values of every rollout's response tokens -> those of a pack's trained tokens, (R,)."""
    values = torch.cat([torch.zeros(0), *(per_rollout[i] for i in pack.members)])
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


# ------------------------------------------------------------------ a step on disk


def keep(run: Path, step: int, rollouts: list[Rollout]):
    """What was sampled in a step, 8 bytes a token, until a state of a later step is the oldest.

    With the state of a step before it, that is all it takes to learn from it once more, on a CPU.
    """
    folder = Path(run) / "sampled"
    folder.mkdir(exist_ok=True)
    ids, logps = zip(*map(arrays, rollouts), strict=True)
    part = folder / f"step_{step:06}.part.npz"
    np.savez(
        part,
        problems=[r.problem.id for r in rollouts],
        samples=[r.sample for r in rollouts],
        stopped=[r.stopped for r in rollouts],
        sizes=[len(x) for x in ids],
        ids=np.concatenate(ids),
        logps=np.concatenate(logps),
    )
    part.rename(file_of(run, step))
    oldest = min(checkpoints.whole_ones(run), default=0)
    for file in folder.glob("step_*[0-9].npz"):
        if int(file.stem[5:]) < oldest:
            file.unlink()


def file_of(run: Path, step: int) -> Path:
    return Path(run) / f"sampled/step_{step:06}.npz"


class Recording:
    """In the sampler's place: hands out what was sampled in the recorded steps of a run."""

    def __init__(self, run: Path, tokenizer, settings):
        self.run, self.tokenizer, self.settings = Path(run), tokenizer, settings

    def rest(self):
        """Has nothing."""

    def generate(self, problems, samples, max_tokens, temperature, seed, turns) -> list[Rollout]:
        """As TorchSampler.generate; FileNotFoundError where the step was not kept, ValueError where
        it was sampled for other problems than these.
        """
        if not (file := file_of(self.run, seed[-1])).is_file():
            raise FileNotFoundError(f"{file}: step {seed[-1]} was not recorded, or is long past")
        with np.load(file) as found:
            found = {name: found[name] for name in found.files}
        if [*found["problems"]] != [p.id for p in problems for _ in range(samples)]:
            raise ValueError(f"{file} is of other problems: has the data file changed since?")
        ends = found["sizes"].cumsum()[:-1]
        ids, logps = np.split(found["ids"], ends), np.split(found["logps"], ends)
        rollouts = []
        for i in (index * samples + n for index in turns for n in range(samples)):
            text = self.tokenizer.decode(ids[i].tolist(), skip_special_tokens=True)
            told = int(found["samples"][i]), None, ids[i], logps[i], bool(found["stopped"][i]), text
            rollouts.append(Rollout(problems[i // samples], *told, i // samples))
        read_prompts(rollouts, self.tokenizer, self.settings)
        return rollouts
