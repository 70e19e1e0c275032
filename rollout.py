"""Sampling: problems in, rollouts out, each token with the log-prob that the sampler gave it.

    sampler.generate(problems, samples=16, max_tokens=..., seed=(seed, step)) -> list[Rollout]
    sampler.rest()           # until the next sync its GPU memory is free for training
    sampler.sync(weights)    # (hub name, tensor) pairs of the policy after its update

TorchSampler is plain torch: below some tens of millions of parameters it outruns vLLM. VllmSampler
is for real runs. Each is checked against the other. Log-probs are those of the unmasked
distribution at temperature 1, as the trainer's are, whatever temperature samples. A rollout's
random numbers follow from (seed, problem id, sample), not from its batch or rank (with vLLM up to
rounding, which may flip a close draw).

Dimensions: P problems, n samples each, N = P n rows, V vocabulary.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common import data, distributed
from common.data import ImageSettings, Problem, Prompt, Rollout
from common.packs import make_pack, pack_alone, with_blank_picture
from model import Config, Inputs, KVCache, Qwen25VL, load_model, read_config
from reward import grade

CANARY_TOKENS = 160  # more than a block of vLLM's prefix cache: 16 tokens on GPUs, 128 on CPUs
# On GPUs vLLM runs what no test on a CPU does. Where sampler and trainer disagree there alone,
# docs/at-scale.md says what to set one after the other: these, and vLLM's older runner.
ASYNC_SCHEDULING = False if os.environ.get("OVR_VLLM_ASYNC") == "0" else None  # None: vLLM decides
SLEEP_LEVEL = int(os.environ.get("OVR_VLLM_SLEEP", "2"))


# ------------------------------------------------------------------ what both samplers share


def forbidden_ids(config: Config, tokenizer, words: Iterable[str] = ()) -> list[int]:
    """Never sampled: tokens that stand for pictures, as no picture is behind a sampled one; rows of
    the vocabulary that are no token (7B: 152,064 rows for 151,665 tokens); and the tokens that are
    `words`, space and case included: " wait" is another than "wait".
    """
    ids = sorted(tokenizer.get_vocab().values())
    forbidden = {*range(config.vocab_size)} - {*ids} | {*config.vision_token_ids}
    texts = tokenizer.batch_decode([[i] for i in ids]) if words else []
    for word in words:
        if word not in texts:
            raise ValueError(f"--forbid {word!r}: the tokenizer has no single token that is this")
        forbidden |= {i for i, text in zip(ids, texts, strict=True) if text == word}
    return sorted(forbidden)


def address(seed: tuple[int, ...], problem_id: str, sample: int, twin: int = 0) -> int:
    """The seed of one rollout. twin: places behind the first of an equal id, as in steps longer
    than an epoch; without it the second would be a copy.
    """
    key = "/".join(map(str, (*seed, problem_id, sample))) + (f"\n{twin}" if twin else "")
    return zlib.crc32(key.encode())  # torch uses 32 bits of a seed


def divergence(rollout: Rollout, token: int, model: nn.Module) -> FloatingPointError:
    """From logits that hold NaN or infinity nothing can be sampled."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    names = ", ".join(broken[:4]) or "none"
    return FloatingPointError(
        f"{rollout.name}: the logits of response token {token} are not finite (weights with NaN or "
        f"infinity: {names}): go back to a sound checkpoint, lower --lr or raise --warmup"
    )


def go_on(rollout: Rollout, problem: Problem, prompt: Prompt) -> Rollout:
    """A copy to add tokens to; those that it has are now of an earlier policy."""
    ids, logps = (np.asarray(x).tolist() for x in (rollout.response_ids, rollout.logps))
    own = dict(problem=problem, prompt=prompt, response_ids=ids, logps=logps)
    return replace(rollout, **own, stale=len(ids))


class Sampler:
    """What both share. What differs is _run(groups, samples, max_tokens, temperature, enough): it
    takes the next group (rollouts that go on from the same tokens) when it has room for one, adds
    to their response_ids and logps, and yields each rollout when it has ended or is put aside.
    """

    top_p = 1.0  # of evaluation; what is trained on is drawn from the whole distribution

    def __init__(self, config: Config, tokenizer, settings: ImageSettings, batch: int, forbid):
        self.tokenizer, self.settings, self.batch = tokenizer, settings, batch
        self.stops = {*config.stop_ids, tokenizer.eos_token_id}
        self.forbidden = forbidden_ids(config, tokenizer, forbid)

    def generate(
        self,
        problems: list[Problem] | dict[int, Problem],
        samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 1.0,  # 0: greedy
        seed: tuple[int, ...] = (0,),
        indices: Iterable[int] | None = None,
        unfinished: Sequence[Rollout] = (),
        enough: Callable[[int, int], bool] | None = None,
    ) -> list[Rollout]:
        """`samples` rollouts of each problem, of a list or {place: problem}, ordered by `indices`.

        indices: problems to sample, None for all; each is taken when there is room for it, so that
        ranks can share a counter. unfinished: rollouts of an earlier call, which go on; their
        problems are not sampled anew. enough(ended, of): whether the rest is put aside, now that so
        many of so many have ended: of a batch (torch), or of a rank, all taken by then (vLLM).
        """
        problems = problems if isinstance(problems, dict) else dict(enumerate(problems))
        first = {p.id: index for index, p in reversed(problems.items())}
        rollouts = []

        def groups() -> Iterator[list[Rollout]]:
            for index in problems if indices is None else indices:
                p = problems[index]
                prompt = data.encode_prompt(p, self.tokenizer, self.settings)
                twin = index - first[p.id]
                seeds = [address(seed, p.id, n, twin) for n in range(samples)]
                new = [Rollout(p, n, prompt, index, seed=s) for n, s in enumerate(seeds)]
                begun = [[go_on(r, p, prompt)] for r in unfinished if r.index == index]
                for group in begun or [new]:
                    rollouts.extend(group)
                    yield group

        for r in self._run(groups(), samples, max_tokens, temperature, enough):
            r.stopped = bool(r.response_ids) and r.response_ids[-1] in self.stops
            r.unfinished = not r.stopped and len(r.response_ids) < max_tokens
            r.text = self.tokenizer.decode(r.response_ids, skip_special_tokens=True)
        return rollouts


# ------------------------------------------------------------------ plain torch


def draw_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, forbidden: Tensor, top_p: float = 1.0
) -> Tensor:
    """One token a row by inverse CDF. logits (N, V), uniforms (N,) in [0, 1) -> (N,) int64.

    temperature 0 takes the likeliest. top_p: only of the likeliest, the fewest that have this share
    together. float64: in float32 the cumulative sum of 152k probabilities ends at 1 +- 1e-3, and
    the last tokens would be drawn too often. NaN gives the last row.
    """
    logits = logits.index_fill(1, forbidden, float("-inf"))
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it have the share
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0)
    cdf = probs.cumsum(-1)
    tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True).squeeze(1)
    return tokens.clamp_max(logits.shape[1] - 1)


def row_uniforms(seed: int, count: int) -> Tensor:
    """The random numbers of one rollout, one a token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class TorchSampler(Sampler):
    """Samples from a model of its own, kept equal to the policy by sync().

    One packed prefill reads the prompts of a batch, a picture once whatever the samples; a prompt's
    keys and values are repeated for its samples; then one token a step for each row that has not
    ended. Rows that end leave the batch.
    """

    def __init__(self, model: Qwen25VL, tokenizer, settings, batch: int = 256, forbid=()):
        super().__init__(model.config, tokenizer, settings, batch, forbid)
        self.model, self.device = model.eval(), next(model.parameters()).device
        self.forbidden = torch.tensor(self.forbidden, device=self.device)

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Copies the policy's weights in. An unknown name is a KeyError."""
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def rest(self):
        """Nothing to give back: the model is small."""

    def _run(self, groups, samples, max_tokens, temperature, enough) -> Iterator[Rollout]:
        while True:
            batch = []  # as many groups as have room, of up to `samples` rollouts each
            while not batch or sum(map(len, batch)) + samples <= self.batch:
                if (group := next(groups, None)) is None:
                    break
                batch.append(group)
            if not batch:
                return
            self._fill(batch, max_tokens, temperature, enough)
            yield from sum(batch, [])

    @torch.no_grad()
    def _fill(self, groups: list[list[Rollout]], max_tokens: int, temperature: float, enough):
        """Samples the responses of one batch. A rollout that goes on draws with the random numbers
        behind those of its tokens, so that by the same weights it ends as if never interrupted.
        """
        rollouts = sum(groups, [])
        rest = [row_uniforms(r.seed, max_tokens)[len(r.response_ids) :] for r in rollouts]
        budgets = torch.tensor([len(own) for own in rest], device=self.device)
        uniforms = nn.utils.rnn.pad_sequence(rest).to(self.device)  # (most tokens, N)
        cache, logits, positions = self._prefill(groups, len(uniforms))
        rows = torch.arange(len(rollouts), device=self.device)  # which rollout each row is
        stops = torch.tensor(sorted(self.stops), device=self.device)
        ids = torch.full(uniforms.shape, -1, device=self.device)  # -1: the rollout has ended
        logps = torch.zeros(uniforms.shape, device=self.device)
        for step, uniform in enumerate(uniforms):
            token = draw_tokens(logits, uniform[rows], temperature, self.forbidden, self.top_p)
            logp = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            ids[step, rows], logps[step, rows] = token, logp
            # NaN or infinity among a row's logits makes its log-prob NaN. The host waits for the
            # GPU once a step, to read both counts.
            live, finite = torch.isin(token, stops, invert=True), logp.isfinite()
            live &= step + 1 < budgets[rows]
            left, sound = torch.stack([live.sum(), finite.sum()]).tolist()
            if sound < len(rows):
                broken = rollouts[rows[~finite][0]]
                raise divergence(broken, len(broken.response_ids) + step + 1, self.model)
            if not left or (enough and enough(len(rollouts) - left, len(rollouts))):
                break
            if left < len(rows):
                order = cache.keep(live)
                rows, token, positions = rows[order], token[order], positions[order]
            logits = self.model.logits(Inputs(token, positions.expand(3, -1), None), cache=cache)
            positions = positions + 1
        for rollout, own, its_logps in zip(rollouts, ids.T.cpu(), logps.T.cpu(), strict=True):
            length = int((own >= 0).sum())
            rollout.response_ids += own[:length].tolist()
            rollout.logps += its_logps[:length].tolist()

    def _prefill(self, groups: list[list[Rollout]], steps: int) -> tuple:
        """-> KVCache of N rows, logits (N, V) of the next token, its position (N,)."""
        pack = pack_alone([group[0].document for group in groups]).to(self.device)
        room, dtype = max(pack.lengths) + steps, next(self.model.parameters()).dtype
        cache = KVCache(self.model.config, len(groups), room, dtype, self.device)
        last = torch.tensor(pack.lengths, device=self.device).cumsum(0) - 1
        logits = self.model.logits(pack, last, cache)
        order = torch.tensor(pack.members, device=self.device).argsort()  # where each group stands
        counts = torch.tensor([len(group) for group in groups], device=self.device)
        rows = order.repeat_interleave(counts)
        cache.take(rows)
        return cache, logits[rows], pack.positions[:, last].amax(0)[rows] + 1


# ------------------------------------------------------------------ vLLM


class VllmSampler(Sampler):
    """A vLLM engine in this process, kept equal to the policy by sync(). Checked with vLLM 0.32.

    Build it before the model that trains: its start wants the GPU's memory free. Under torchrun
    start the process group first (an engine that makes its own makes one of that rank alone, and
    sums over the ranks silently do nothing), and build all ranks' engines together.

    batch: responses in flight. limit: most tokens of a prompt and its response. kv_cache_gb: room
    for keys and values; responses that do not fit are put off and begun again.
    """

    def __init__(
        self, directory: str, batch: int, limit: int, kv_cache_gb: float, dtype, forbid=()
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, by our weights
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
        try:
            import vllm
        except ImportError as error:
            cure = "pip install -r requirements-gpu.txt, or --sampler torch"
            raise ImportError(f"--sampler vllm needs vLLM ({error}): {cure}") from error
        settings = data.load_image_settings(directory)
        tokenizer = data.load_tokenizer(directory)
        super().__init__(read_config(directory), tokenizer, settings, batch, forbid)
        self.limit, self.cuda = limit, torch.cuda.is_available()
        parallel = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        pixels = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        self.llm = vllm.LLM(
            str(directory),
            dtype=dtype,
            max_model_len=limit,
            max_num_seqs=batch,
            kv_cache_memory_bytes=int(kv_cache_gb * 1e9),
            gpu_memory_utilization=0.01,  # means nothing beside that, but the start checks it
            enable_prefix_caching=True,
            enable_sleep_mode=self.cuda,
            enforce_eager=not self.cuda,
            async_scheduling=ASYNC_SCHEDULING,
            distributed_executor_backend="external_launcher" if parallel else None,
            limit_mm_per_prompt={"video": 0},
            mm_processor_kwargs={"size": pixels},
            mm_processor_cache_gb=0,  # a picture comes back an epoch later
            generation_config="vllm",  # its own defaults: Qwen2.5-VL's file has a penalty of 1.05
            logprobs_mode="raw_logprobs",  # from before masks and temperature: the trainer's
        )
        self.params = partial(
            vllm.SamplingParams,
            stop_token_ids=sorted(self.stops),
            ignore_eos=True,  # what vLLM takes for one: the stops above are all there are
            logit_bias=dict.fromkeys(self.forbidden, float("-inf")),
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )
        self.kinds = vllm.sampling_params.RequestOutputKind
        (runner,) = self.llm.collective_rpc(lambda worker: type(worker.model_runner))
        if os.environ.get("RANK", "0") == "0":
            print(f"vLLM runs {runner.__module__}.{runner.__name__}, sleep level {SLEEP_LEVEL}")

    def _run(self, groups, samples, max_tokens, temperature, enough) -> Iterator[Rollout]:
        """n requests of one sample each, which share the prompt's keys, values and pictures. One
        request of n would keep its place until the longest of the n has ended.
        """
        # of a request that is aborted the engine gives back nothing but what it gave on the way
        kind = self.kinds.DELTA if enough else self.kinds.FINAL_ONLY
        how = dict(output_kind=kind, temperature=temperature, top_p=self.top_p)
        engine, running, number, more = self.llm.llm_engine, {}, 0, True  # request: its rollout
        try:
            while True:
                while more and (not running or len(running) + samples <= self.batch):
                    if (group := next(groups, None)) is None:
                        more = False
                        break
                    prompt = self._prepare(group[0], max_tokens)
                    for r in group:
                        request, done = f"{r.index}/{r.sample}", len(r.response_ids)
                        own = dict(seed=r.seed + done, max_tokens=max_tokens - done)
                        engine.add_request(request, prompt, self.params(**how, **own))
                        running[request] = r
                        number += 1
                if not running:
                    return
                for output in engine.step():
                    self._read(output.outputs[0], running[output.request_id])
                    if output.finished:
                        yield running.pop(output.request_id)
                # asked in any case: it also tells the other ranks how many have ended here
                if enough and enough(number - len(running), number) and not more:
                    yield from running.values()
                    return
        finally:
            engine.abort_request([*running])  # after an error, too: no later call may meet them

    def _prepare(self, rollout: Rollout, max_tokens: int) -> dict:
        """The prompt for vLLM, which itself expands one image token a picture; pictures resized as
        the trainer's are (its own resize is torchvision's, off by one of 255 levels).
        """
        problem, prompt, side = rollout.problem, rollout.prompt, self.settings.patch_size
        if (tokens := len(prompt.ids) + max_tokens) > self.limit:
            fault = f"prompt and response, {tokens} tokens, exceed max_model_len of {self.limit}"
            raise ValueError(f"{problem.id}: {fault}: raise it, or leave the problem out")
        inputs = {"prompt_token_ids": prompt.short_ids + rollout.response_ids}
        pictures = []
        for image, (_, h, w) in zip(problem.images, prompt.grids, strict=True):
            size = (w * side, h * side)
            pictures.append(data.load_image(image).resize(size, Image.Resampling.BICUBIC))
        if pictures:
            inputs["multi_modal_data"] = {"image": pictures}
        (prepared,) = self.llm.renderer.render_cmpl([inputs])
        tokens = len(prepared["prompt_token_ids"]), len(rollout.document)
        assert tokens[0] == tokens[1], f"{problem.id} has {tokens} tokens in vLLM and trainer"
        return prepared

    def _read(self, output, rollout: Rollout):
        """Adds what is new of a response: all of it, or a token or two."""
        why = output.finish_reason
        if why not in ("stop", "length", None):
            raise RuntimeError(f"{rollout.name}: vLLM dropped it ({why}); its log says more")
        finite = np.isfinite(output.logprobs.logprobs)
        if not finite.all():
            token = len(rollout.response_ids) + int(finite.argmin()) + 1
            raise self.llm.apply_model(partial(divergence, rollout, token))[0]
        rollout.response_ids += output.token_ids
        rollout.logps += output.logprobs.logprobs

    def sync(self, weights: Iterable[tuple[str, Tensor]]):
        """Copies the policy's weights in, and forgets what the old ones left: keys and values of
        prompts, and pictures. The iterator is always exhausted: ranks gather weights together.
        """
        weights, asleep = iter(weights), self.llm.llm_engine.is_sleeping()
        if asleep:  # not yet run on a GPU
            torch.cuda.empty_cache()  # what the training had taken
            self.llm.wake_up(["weights"])
            self.llm.collective_rpc(clear_positions)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if left := [name for name, _ in weights]:
            raise RuntimeError(f"vLLM left {len(left)} weights unread, from {left[0]} on")
        if asleep:
            self.llm.wake_up(["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests were still running")
        self.llm.llm_engine.reset_encoder_cache()

    def rest(self):
        """Frees the GPU memory of weights, keys and values until sync() brings them back."""
        if self.cuda:
            self.llm.sleep(level=SLEEP_LEVEL)  # not yet run on a GPU


def clear_positions(worker):
    """M-RoPE positions of vLLM's GPU runner. Sleep drops them with the weights, and rows that only
    pad a CUDA graph are never written: left as they are, they would index anywhere.
    """
    state = getattr(worker.model_runner, "model_state", None)
    if (rope := getattr(state, "rope_state", None)) is not None:
        rope.positions.zero_()


def open_sampler(kind: str, directory: str, world, room=(256,), forbid=()) -> Sampler:
    """The sampler that --sampler names. room: responses at once, and of vLLM most tokens of a
    prompt and its response, GB for keys and values. forbid: tokens that it never draws.
    """
    if kind == "vllm":
        return VllmSampler(directory, *room, world.dtype, forbid)
    tools = data.load_tokenizer(directory), data.load_image_settings(directory)
    return TorchSampler(load_model(directory, world.dtype, world.device), *tools, room[0], forbid)


# ------------------------------------------------------------------ what a run asks of either


def solved(sampler: Sampler, problems, max_tokens: int, world) -> dict[str, float]:
    """Share of problems whose likeliest answer is right, with pictures and in text; each rank takes
    its part. Outside of the training: no weight, draw or order of it changes.
    """
    scores = {"eval_image": [], "eval_text": []}
    mine = range(world.rank, len(problems), world.size)
    for r in sampler.generate(problems, 1, max_tokens, temperature=0, indices=mine):
        p = r.problem
        verdict = grade(p.answer, r.text, choices=p.choices, precision=p.precision)
        scores["eval_image" if p.images else "eval_text"].append(verdict.score * r.stopped)
    return distributed.means(scores)


def canary(problems, tokenizer, settings: ImageSettings, limit: int) -> Problem:
    """A prompt of at most `limit` tokens for canary_gap, the same at every step: with pictures if a
    problem has some, and its words again and again until a block of the prefix cache is full.
    """
    problem = next((p for p in islice(problems, 4096) if p.images), problems[0])
    length = data.prompt_length(problem, tokenizer, settings)
    words = " " + problem.prompt.replace(data.IMAGE_MARKER, " ")
    more = max(1, len(tokenizer.encode(words, add_special_tokens=False)))
    copies = max(0, min(CANARY_TOKENS + more, limit) - length) // more
    return replace(problem, id="canary", prompt=problem.prompt + copies * words)


@torch.no_grad()
def canary_gap(sampler: Sampler, policy: Qwen25VL, problem: Problem, vision: bool) -> float:
    """Mean |difference| in nats of sampler's and policy's log-probs on a prompt that it has seen:
    large where weights were not copied, or a cache of prompts or pictures is of the old weights.
    vision: the tower is sharded, so every rank has to run it.
    """
    (rollout,) = sampler.generate([problem], max_tokens=8)
    pack = with_blank_picture(make_pack([rollout.document]), vision)
    logps, _ = policy.logps(pack.to(next(policy.parameters()).device))
    return (logps.cpu() - torch.tensor(rollout.logps)).abs().mean().item()
