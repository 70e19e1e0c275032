"""Sampling: problems in, rollouts out, each token with the log-prob that the sampler gave it.

    sampler.generate(problems, samples=16, max_tokens=..., seed=(seed, step)) -> list[Rollout]
    sampler.sync(weights)          # (hub name, tensor) pairs of the policy after its update

TorchSampler is that interface in plain torch, for laptops and tests: below some tens of millions of
parameters it outruns vLLM (which will stand behind the same two methods for the real runs).

    1  one packed prefill a batch of prompts; a picture is looked at once, whatever the samples
    2  the prompt's keys and values are repeated for its n samples
    3  one token for each live row a step; rows that have finished leave the batch

Token ids are the only currency between sampler and loss: text is for the reward and the log. Log-
probs are those of the unmasked distribution, so that they equal the trainer's; tokens that stand
for pictures are never drawn (a sampled <|image_pad|> has no picture behind it, and breaks the
trainer's pack). Draws are addressed by (seed, problem id, sample): a rollout does not depend on
what else is in the batch.

Dimensions: P problems, n samples each, N = P n rows, V vocabulary.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import Document, ImageSettings, Problem, Prompt, encode_prompt, pack
from model import KVCache, Qwen25VL
from runlog import progress


@dataclass
class Rollout:
    """One try at one problem."""

    problem: Problem
    sample: int  # which of the n tries
    prompt: Prompt
    response_ids: list[int] = field(default_factory=list)  # the stop token included, if it came
    logps: list[float] = field(default_factory=list)  # of each response token, by the sampler
    stopped: bool = False  # False: cut at max_tokens
    text: str = ""

    @property
    def document(self) -> Document:
        return Document(self.prompt, self.response_ids)


def row_generator(seed: tuple[int, ...], problem_id: str, sample: int) -> torch.Generator:
    """Randomness addressed by (seed, problem, sample): the same in any batch, on any rank."""
    key = "/".join(map(str, (*seed, problem_id, sample))).encode()
    return torch.Generator().manual_seed(zlib.crc32(key))  # torch uses 32 bits of a seed


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, forbidden: Tensor) -> Tensor:
    """One token a row by inverse CDF. logits (N, V), uniforms (N,) in [0, 1) -> (N,) int64.

    temperature 0 takes the likeliest. float64: in float32 the cumulative sum of 152k probabilities
    ends at 1 +- 1e-3, and the last tokens would be drawn too often.
    """
    logits = logits.index_fill(1, forbidden, float("-inf"))
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)


class TorchSampler:
    """Samples from a model of its own, kept equal to the policy by sync()."""

    def __init__(self, model: Qwen25VL, tokenizer, settings: ImageSettings, batch: int = 256):
        self.model, self.tokenizer, self.settings, self.batch = (
            model.eval(),
            tokenizer,
            settings,
            batch,
        )
        self.device = next(model.parameters()).device
        c = model.config
        self.stops = {c.eos_token_id, tokenizer.eos_token_id}
        self.forbidden = torch.tensor(sorted({*c.vision_token_ids}), device=self.device)

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Copies the policy's weights in. KeyError if a name is unknown: a weight that is not
        copied stays stale.
        """
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    @torch.no_grad()
    def generate(
        self,
        problems: list[Problem],
        samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: tuple[int, ...] = (0,),
        bar: str = "",
    ) -> list[Rollout]:
        """n rollouts a problem, in the order problem 0 sample 0, problem 0 sample 1, ...

        max_tokens: of a response. temperature 0: greedy. bar: name of a progress bar, none if
        empty.
        """
        rollouts = []
        for problem in problems:
            prompt = encode_prompt(problem.prompt, problem.images, self.tokenizer, self.settings)
            rollouts += [Rollout(problem, i, prompt) for i in range(samples)]
        group = (
            max(1, self.batch // samples) * samples
        )  # whole groups, so that a prompt is read once
        starts = range(0, len(rollouts), group)
        for start in progress(starts, bar) if bar else starts:
            self._fill(rollouts[start : start + group], samples, max_tokens, temperature, seed)
        for rollout in rollouts:
            rollout.text = self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        return rollouts

    def _fill(
        self, rollouts: list[Rollout], samples: int, max_tokens: int, temperature: float, seed
    ):
        """Generates the responses of one batch, in place."""
        device = self.device
        prompts = [r.prompt for r in rollouts[::samples]]
        cache, logits, positions = self._prefill(prompts, max_tokens)
        repeat = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        cache.take(repeat)
        logits, positions = logits[repeat], positions[repeat]
        draws = [
            torch.rand(
                max_tokens,
                generator=row_generator(seed, r.problem.id, r.sample),
                dtype=torch.float64,
            )
            for r in rollouts
        ]
        uniforms = torch.stack(draws, dim=1).to(device)  # (max_tokens, N)
        rows = torch.arange(len(rollouts), device=device)  # which rollout each row of the batch is
        stops = torch.tensor(sorted(self.stops), device=device)
        ids, logps = [], []  # of each step, (N,) with -1 where the rollout has ended
        for step in range(max_tokens):
            token = draw_tokens(logits, uniforms[step, rows], temperature, self.forbidden)
            logp = (
                (logits / (temperature or 1.0)).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            )
            ids.append(torch.full((len(rollouts),), -1).index_copy(0, rows.cpu(), token.cpu()))
            logps.append(torch.zeros(len(rollouts)).index_copy(0, rows.cpu(), logp.cpu()))
            live = ~torch.isin(token, stops)
            if not live.any() or step == max_tokens - 1:
                break
            if not live.all():
                kept = cache.keep(live)
                rows, token, positions = rows[kept], token[kept], positions[kept]
            logits = self.model(token, positions.expand(3, -1), cache=cache)
            positions = positions + 1
        ids, logps = torch.stack(ids, dim=1).tolist(), torch.stack(logps, dim=1).tolist()
        for rollout, row_ids, row_logps in zip(rollouts, ids, logps, strict=True):
            length = row_ids.index(-1) if -1 in row_ids else len(row_ids)
            rollout.response_ids, rollout.logps = row_ids[:length], row_logps[:length]
            rollout.stopped = row_ids[length - 1] in self.stops

    def _prefill(self, prompts: list[Prompt], max_tokens: int) -> tuple[KVCache, Tensor, Tensor]:
        """-> cache with a row a prompt, logits (P, V) of the first response token, next position
        (P,).
        """
        documents = [Document(prompt, []) for prompt in prompts]
        batch = pack(documents, sum(map(len, documents)))[0].to(self.device)
        room = max(batch.lengths) + max_tokens
        dtype = next(self.model.parameters()).dtype
        cache = KVCache(self.model.config, len(prompts), room, dtype, self.device)
        last = torch.tensor(batch.lengths, device=self.device).cumsum(0) - 1
        logits = self.model(**batch.inputs, cache=cache, rows=last)
        back = torch.tensor(batch.members, device=self.device).argsort()  # pack() may reorder
        cache.take(back)
        return cache, logits[back], batch.positions[:, last].amax(0)[back] + 1
