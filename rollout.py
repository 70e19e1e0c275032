"""Sampling: problems in, rollouts out, each token with the log-prob that the sampler gave it.

    sampler.generate(problems, samples=16, max_tokens=..., seed=(seed, step)) -> list[Rollout]
    sampler.rest()                 # until the next sync: gives its GPU memory to the training
    sampler.sync(weights)          # (hub name, tensor) pairs of the policy after its update

Two samplers stand behind that interface, and each is checked against the other. TorchSampler is
plain torch, for laptops and tests: below some tens of millions of parameters it outruns vLLM.

    1  one packed prefill a batch of prompts; a picture is looked at once, whatever the samples
    2  the prompt's keys and values are repeated for its n samples
    3  one token for each live row a step; rows that have finished leave the batch

VllmSampler is for the real runs: one vLLM engine in the process of each rank, next to the model
that trains. A rank takes the next problem when its engine has room, so with `turns` dealt from a
counter that the ranks share, none idles behind another's long responses.

Token ids are the only currency between sampler and loss: text is for the reward and the log. Log-
probs are those of the unmasked distribution, so that they equal the trainer's; tokens that stand
for pictures are never drawn (a sampled <|image_pad|> has no picture behind it, and breaks the
trainer's pack). Draws are addressed by (seed, problem id, sample): a rollout does not depend on
what else is in the batch, nor on the rank (vLLM: up to rounding, which may flip a close draw).

Dimensions: P problems, n samples each, N = P n rows, V vocabulary.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from common.data import (
    IMAGE_MARKER,
    Document,
    ImageSettings,
    Problem,
    Prompt,
    encode_prompt,
    load_image,
    pack,
    prompt_length,
    with_blank_picture,
)
from common.log import progress
from model import KVCache, Qwen25VL, read_config

CANARY_TOKENS = 160  # more than a block of vLLM's prefix cache: 16 tokens on GPUs, 128 on CPUs


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
    index: int = 0  # place of the problem in the list that was handed to generate()

    @property
    def document(self) -> Document:
        return Document(self.prompt, self.response_ids)


def address(seed: tuple[int, ...], problem_id: str, sample: int) -> int:
    """Randomness addressed by (seed, problem, sample): the same in any batch, on any rank."""
    key = "/".join(map(str, (*seed, problem_id, sample))).encode()
    return zlib.crc32(key)  # torch uses 32 bits of a seed


def row_generator(seed: tuple[int, ...], problem_id: str, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed(address(seed, problem_id, sample))


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

    def rest(self):
        """Nothing to give back: the model is small."""

    @torch.no_grad()
    def generate(
        self,
        problems: list[Problem],
        samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: tuple[int, ...] = (0,),
        bar: str = "",
        turns: Iterable[int] | None = None,
    ) -> list[Rollout]:
        """n rollouts a problem, in the order of the turns: sample 0, sample 1, ... of each.

        max_tokens: of a response. temperature 0: greedy. bar: name of a progress bar, none if
        empty. turns: which of the problems to do, taken as many at a time as a batch holds and not
        before, so several ranks can share them; all of them in order, if None.
        """
        size = max(1, self.batch // samples)  # whole groups, so that a prompt is read once
        total = None if turns is not None else -(-len(problems) // size)
        turns = iter(range(len(problems)) if turns is None else turns)
        batches, rollouts = iter(lambda: [*islice(turns, size)], []), []
        for indices in progress(batches, bar, total) if bar else batches:
            group = []
            for i in indices:
                p = problems[i]
                prompt = encode_prompt(p.prompt, p.images, self.tokenizer, self.settings, p.id)
                group += [Rollout(p, n, prompt, index=i) for n in range(samples)]
            self._fill(group, samples, max_tokens, temperature, seed)
            for rollout in group:
                rollout.text = self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
            rollouts += group
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
        ids = torch.full((max_tokens, len(rollouts)), -1, device=device)  # -1: has ended before
        logps = torch.zeros(ids.shape, device=device)
        for step in range(max_tokens):
            token = draw_tokens(logits, uniforms[step, rows], temperature, self.forbidden)
            every = (logits / (temperature or 1.0)).log_softmax(-1)
            ids[step, rows] = token
            logps[step, rows] = every.gather(1, token[:, None]).squeeze(1)
            live = ~torch.isin(token, stops)
            left = int(live.sum())  # all that the host waits for in a step
            if not left or step == max_tokens - 1:
                break
            if left < len(live):
                kept = cache.keep(live)
                rows, token, positions = rows[kept], token[kept], positions[kept]
            logits = self.model(token, positions.expand(3, -1), cache=cache)
            positions = positions + 1
        ids, logps = ids[: step + 1].T.tolist(), logps[: step + 1].T.tolist()
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


class VllmSampler:
    """A vLLM engine in this process, kept equal to the policy by sync(). Checked with vLLM 0.32.

    Build it before the model that trains: its start wants the GPU's memory free. Under torchrun
    the process group must be there first (the engine joins it; where it has to make its own, the
    group of each rank holds that rank alone, and sums over the ranks silently do nothing), and all
    ranks build their engines together. The start sets the global random seed, the same on every
    rank, and on a CPU it disables torch.set_num_threads: set OMP_NUM_THREADS instead.

    batch: responses in flight. max_model_len: most tokens of a prompt and its response.
    kv_cache_gb: room for keys and values; responses that do not fit are put off and begun again.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer,
        settings: ImageSettings,
        batch: int = 256,
        max_model_len: int = 4096,
        kv_cache_gb: float = 0.25,
        dtype: torch.dtype = torch.float32,
    ):
        self.tokenizer, self.settings = tokenizer, settings
        self.batch, self.limit, self.cuda = batch, max_model_len, torch.cuda.is_available()
        config = read_config(directory)
        self.stops = {config.eos_token_id, tokenizer.eos_token_id}
        LLM, SamplingParams, RequestOutputKind = import_vllm()
        pixels = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        parallel = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.llm = LLM(
            str(directory),
            dtype=dtype,
            seed=0,
            max_model_len=max_model_len,
            max_num_seqs=batch,
            kv_cache_memory_bytes=int(kv_cache_gb * 1e9),
            gpu_memory_utilization=0.01,  # means nothing beside that, but the start checks it
            enable_prefix_caching=True,
            enable_sleep_mode=self.cuda,
            enforce_eager=not self.cuda,
            distributed_executor_backend="external_launcher" if parallel else None,
            limit_mm_per_prompt={"video": 0},
            mm_processor_kwargs={"size": pixels},
            mm_processor_cache_gb=0,  # a picture comes back an epoch later
            generation_config="vllm",  # not the model's
            logprobs_mode="raw_logprobs",  # from before masks and penalties: the trainer's
            disable_log_stats=True,
        )
        # Every field that acts is set: none is left to a model's generation_config.json (Qwen2.5-
        # VL's has repetition_penalty 1.05).
        self.params = partial(
            SamplingParams,
            n=1,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            min_tokens=0,
            stop_token_ids=sorted(self.stops),
            ignore_eos=True,  # what vLLM takes for one: the stops above are all there are
            logit_bias=dict.fromkeys(config.vision_token_ids, float("-inf")),
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def generate(
        self,
        problems: list[Problem],
        samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,
        seed: tuple[int, ...] = (0,),
        bar: str = "",
        turns: Iterable[int] | None = None,
    ) -> list[Rollout]:
        """As TorchSampler.generate, but the next turn is taken as soon as there is room for it."""
        if temperature not in (0, 1):
            raise ValueError(
                f"temperature {temperature}: vLLM gives log-probs at temperature 1 only (use 1, or "
                "0 for greedy, or --sampler torch)"
            )
        total = None if turns is not None else len(problems) * samples
        turns = iter(range(len(problems)) if turns is None else turns)
        rollouts = []
        drawn = {"max_tokens": max_tokens, "temperature": temperature}
        ended = self._play(problems, turns, rollouts, samples, seed, drawn)
        for rollout in progress(ended, bar, total) if bar else ended:
            rollout.text = self.tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        return rollouts

    def _play(self, problems, turns, rollouts: list[Rollout], samples: int, seed, drawn: dict):
        """Yields each rollout when it ends; `rollouts` gets them in the order they were begun."""
        engine, running, more = self.llm.llm_engine, {}, True
        try:
            while more or running:
                while more and (not running or len(running) + samples <= self.batch):
                    index = next(turns, None)
                    if more := index is not None:
                        asked = self._ask(problems[index], index, samples, seed, drawn)
                        running |= asked
                        rollouts += asked.values()
                for output in engine.step() if running else []:
                    if output.finished:
                        yield self._read(output.outputs[0], running.pop(output.request_id))
        finally:
            engine.abort_request([*running])  # after an error: the next call must not meet them

    def _ask(self, problem: Problem, index: int, samples: int, seed, drawn: dict) -> dict:
        """Hands the engine n requests for one problem. -> {request id: rollout}.

        The prompt is prepared once. n requests of one sample, not one of n: each leaves the batch
        when it ends, and not when the longest of the n does. They share the prompt's keys and
        values, block by block, and its pictures pass the tower once.
        """
        prompt = encode_prompt(
            problem.prompt, problem.images, self.tokenizer, self.settings, problem.id
        )
        if len(prompt.ids) + drawn["max_tokens"] > self.limit:
            raise ValueError(
                f"{problem.id}: {len(prompt.ids)} prompt + {drawn['max_tokens']} response tokens "
                f"exceed the sampler's max_model_len of {self.limit}; raise it, or leave it out"
            )
        given = self._prepared(problem, prompt)
        asked = {}
        for n in range(samples):
            name = f"{index}/{n}"
            params = self.params(seed=address(seed, problem.id, n), **drawn)
            self.llm.llm_engine.add_request(name, given, params)
            asked[name] = Rollout(problem, n, prompt, index=index)
        return asked

    def _prepared(self, problem: Problem, prompt: Prompt) -> dict:
        """The prompt as vLLM wants it. It gets one image token a picture and expands it itself;
        an expanded prompt would be expanded again, without a word.

        Pictures are resized here, as the trainer's are. vLLM's own resize is torchvision's, which
        is off by one of 255 levels here and there.
        """
        given = {"prompt_token_ids": prompt.short_ids}
        if problem.images:
            side, pictures = self.settings.patch_size, []
            for image, (_, h, w) in zip(problem.images, prompt.grids, strict=True):
                size = (w * side, h * side)
                pictures.append(load_image(image).resize(size, Image.Resampling.BICUBIC))
            given["multi_modal_data"] = {"image": pictures}
        (prepared,) = self.llm.renderer.render_cmpl([given])
        if prepared["prompt_token_ids"] != prompt.ids:
            raise RuntimeError(
                f"{problem.id}: {len(prepared['prompt_token_ids'])} prompt tokens in vLLM, "
                f"{len(prompt.ids)} in the trainer: their image settings differ"
            )
        return prepared

    def _read(self, output, rollout: Rollout) -> Rollout:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(
                f"{rollout.problem.id}: vLLM dropped the request ({output.finish_reason}); its log "
                "above says why"
            )
        rollout.response_ids, rollout.logps = [*output.token_ids], output.logprobs.logprobs
        rollout.stopped = rollout.response_ids[-1] in self.stops
        counts = len(rollout.response_ids), len(rollout.logps)
        assert counts[0] == counts[1], f"{counts[0]} tokens with {counts[1]} log-probs"
        return rollout

    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Copies the policy's weights in, one layer at a time, and forgets what the old ones left:
        keys and values of prompts, and pictures as the old tower saw them.

        Ranks that gather the weights together have to go through all of them, so the rest is
        gathered, too, before an error is raised.
        """
        weights = iter(weights)
        if self.llm.llm_engine.is_sleeping():  # not yet run on a GPU
            torch.cuda.empty_cache()  # what the training had taken
            self.llm.wake_up(["weights"])
            self.llm.collective_rpc(clear_positions)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        left = [name for name, _ in weights]
        if left:
            raise RuntimeError(f"vLLM left {len(left)} weights unread, from {left[0]} on")
        if self.llm.llm_engine.is_sleeping():
            self.llm.wake_up(["kv_cache"])  # not yet run on a GPU
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests were still running")
        self.llm.llm_engine.reset_encoder_cache()

    def rest(self):
        """Frees the GPU memory of weights, keys and values until sync() brings them back. Level 2
        drops them; level 1 would keep the weights, which sync() replaces, in host memory.
        """
        if self.cuda:
            self.llm.sleep(level=2)  # not yet run on a GPU


def clear_positions(worker):
    """M-RoPE positions of vLLM's GPU runner. Sleep drops them with the weights, and rows that only
    pad a CUDA graph are never written: left as found, they would index anywhere.
    """
    state = getattr(worker.model_runner, "model_state", None)
    if (rope := getattr(state, "rope_state", None)) is not None:
        rope.positions.zero_()


def import_vllm():
    """The one place that needs it. What vLLM reads from the environment has to be set before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, by our weights
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
    # on CPUs it warns of every call of torch.set_num_threads
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if torch.cuda.is_available() else "ERROR")
    try:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind
    except ImportError as error:
        raise ImportError(
            f"--sampler vllm needs vLLM ({error}): pip install -r requirements-gpu.txt, or take "
            "--sampler torch"
        ) from error
    return LLM, SamplingParams, RequestOutputKind


# ------------------------------------------------------------------ is it still the policy?


def canary(problems, tokenizer, settings: ImageSettings, limit: int) -> Problem:
    """A prompt of at most `limit` tokens for canary_gap, the same at every step: with pictures if a
    problem has some, and its words again and again until a block of the prefix cache is full.
    """
    first = next((p for p in islice(problems, 4096) if p.images), problems[0])
    words, longest = first.prompt.replace(IMAGE_MARKER, " "), first
    for times in range(1, 1 + CANARY_TOKENS):
        longer = replace(first, id="canary", prompt=" ".join([words] * times))
        length = prompt_length(longer.prompt, longer.images, tokenizer, settings)
        if length <= limit:
            longest = longer
        if length >= min(limit, CANARY_TOKENS):
            break
    return longest


@torch.no_grad()
def canary_gap(sampler, policy, problem: Problem, temperature: float, vision: bool) -> float:
    """Mean |difference| in nats of sampler's and policy's log-probs on a prompt that it has seen.

    Large where weights were not copied, or a cache of prompts or pictures is of the old weights.
    vision: the tower is sharded, so every rank has to run it.
    """
    (rollout,) = sampler.generate([problem], 1, 8, temperature)
    (batch,) = pack([rollout.document], len(rollout.document))
    batch = with_blank_picture(batch) if vision else batch
    moved = batch.to(next(policy.parameters()).device)
    wanted = dict(rows=moved.rows, targets=moved.targets, temperature=temperature)
    logps, _ = policy(**moved.inputs, **wanted)
    return (logps.cpu() - torch.tensor(rollout.logps)).abs().mean().item()
