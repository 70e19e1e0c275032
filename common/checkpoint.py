"""Checkpoints: a run that is killed at any moment goes on from the newest whole one.

    RUN/checkpoints/step_000060/state/   slices of every rank, read by any number of ranks
    RUN/checkpoints/step_000060/model/   a Hugging Face directory: averaging, eval.py, vLLM

No random state, place in the data or length budget is saved: all are functions of (seed, step).

Whole or ignored: all is written into step_000060.part, and rank 0 renames it when the files of
every rank are there and fsync has brought them to the disk. What is deleted is renamed first; a
*.part that a kill left is removed at the next start. All nodes see one directory. An error of one
rank is raised on all.

Room, for 7B with a critic: a state is 180 GB over the ranks of a node, in host memory while it is
written, and three times on the disk; a model is 17 GB in bfloat16. Old states are not kept.
"""

import concurrent.futures
import os
import shutil
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from common import log, lora, viewers
from common.distributed import everyone, is_main, release
from model import Config, Qwen25VL, save_weights

# Settings that say how a run is executed, and not what it learns: rollouts stay good under others.
EXECUTION = {"out", "steps", "save_every", "keep_every", "recompute", "compile", "offload"}
EXECUTION |= {"sampler_batch", "kv_cache_gb", "pack_tokens", "wandb", "tensorboard"}
KEEP_STATES = 2  # the newest checkpoints, from which a run can go on
SAVE_TIMEOUT = timedelta(hours=2)  # a rank that has written its part waits for the slowest disk
Pairs = dict[str, tuple[nn.Module, torch.optim.Optimizer]]  # {"policy": (model, optimizer), ...}

# ------------------------------------------------------------------ going on


def resume_or_start(run: str | Path, config) -> tuple[int, Path | None]:
    """Where a run begins: (0, None), or the step after its newest checkpoint and its state.

    FileExistsError where compare_settings finds that it may not go on: nothing is overwritten.
    """
    run = Path(run)
    viewers.refuse_missing(config)
    start, state = everyone(newest(run))[0]
    # rank 0 looks for all: a fingerprint reads the whole of the data
    if reason := everyone(is_main() and compare_settings(run, config, start))[0]:
        raise FileExistsError(f"{run} cannot go on: {reason}; or choose another --out")
    if is_main():
        for part in list(run.rglob("*.part")):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    return start, state


def compare_settings(run: Path, config, start: int) -> str:
    """Prints what has changed since run.json (RunLog records it); returns what forbids going on."""
    if (run / "model").is_dir():
        again = f"go on from step {start}" if start else "begin again: it has no checkpoint"
        return f"it is a finished run: remove {run}/model to {again}"
    if not (run / "run.json").exists():
        return ""
    before, about = log.read_record(run), log.provenance(config)
    now, codes = about["config"], [x["commit"] for x in (before, *before["resumed"])]
    changed = log.changed_settings(before["config"], now)
    lines = {name: f"--{name.replace('_', '-')} {a} -> {b}" for name, (a, b) in changed.items()}
    print(f"{run} goes on from step {start}", *lines.values(), sep="\n  ", flush=True)
    if codes[-1] != about["commit"]:
        print(f"  the code has changed: {codes[-1]} -> {about['commit']}", flush=True)
    fixed = ["algorithm", "lora_rank"]
    if now.get("lora_rank"):  # a state of adapters lacks what they were trained on
        fixed += ["lora_alpha", "model"]
    reason = next((lines[name] for name in fixed if name in lines), "")
    old, new = before["data"], log.fingerprints(config)
    if (steps := now.get("steps", start)) < start:
        reason = f"--steps {steps}, of which {start} are done"
    if sorted(old.values()) != sorted(new.values()):  # its files may have moved
        reason = f"the data has changed, {old} -> {new}"
    if start and reason:
        return reason
    if reason or {*changed} - EXECUTION:  # what was sampled came from the run as it was
        for file in (run / "rollouts").glob("step_*[0-9].npz"):
            if int(file.stem[5:]) >= start:  # of the step before, rollouts may have to go on
                file.unlink()
    return ""


def newest(run: str | Path) -> tuple[int, Path | None]:
    """(next step, state) of the newest checkpoint of a run; (0, None) if there is none."""
    steps = complete_steps(run)
    return (steps[-1], step_directory(run, steps[-1]) / "state") if steps else (0, None)


def complete_steps(run: str | Path) -> list[int]:
    """Steps from which a run can go on. What is not whole is called *.part and not found."""
    states = Path(run).glob("checkpoints/step_*[0-9]/state")
    return sorted(int(state.parent.name[5:]) for state in states)


def step_directory(run: str | Path, step: int) -> Path:
    return Path(run) / f"checkpoints/step_{step:06}"


def train_state(pairs: Pairs) -> dict:
    """The nested dict of weights and moments that torch.distributed.checkpoint reads and writes."""
    both = {name: get_state_dict(*pair, options=parts_of(pair[0])) for name, pair in pairs.items()}
    return {name: {"model": w, "optimizer": moments} for name, (w, moments) in both.items()}


def parts_of(model: nn.Module) -> StateDictOptions:
    """Of a model with adapters a state has what trains: the base is read from --model again."""
    adapted = bool(lora.adapters(model))
    return StateDictOptions(ignore_frozen_params=adapted, strict=not adapted)


def load_state(directory: Path, pairs: Pairs):
    """Weights and moments, on any number of ranks; rates and decays stay those of today's command.

    OSError, on all ranks, where that fails: no older one is taken behind the user's back.
    """
    state, folder = train_state(pairs), Path(directory).parent
    older = [0, *(s for s in complete_steps(folder.parents[1]) if s < int(folder.name[5:]))]
    advice = f"If it is of another model, choose another --out; else remove {folder}, and the run"
    words = f"{directory} cannot be read", f"{advice} goes on from step {older[-1]}"
    with together(*words):  # first of all, since a rank that fails alone leaves others in load()
        check_files(directory)
    with together(*words):
        dcp.load(state, checkpoint_id=directory, no_dist=not dist.is_initialized())
    for name, (model, optimizer) in pairs.items():
        settings = [dict(group) for group in optimizer.param_groups]
        weights, moments = state[name]["model"], state[name]["optimizer"]
        both = dict(model_state_dict=weights, optim_state_dict=moments)
        set_state_dict(model, optimizer, **both, options=parts_of(model))
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)


def check_files(state: Path):
    """ValueError where a file of a state is not there in full."""
    for piece in dcp.FileSystemReader(state).read_metadata().storage_data.values():
        file, size = state / piece.relative_path, piece.offset + piece.length
        there = file.stat().st_size if file.exists() else 0
        if there < size:
            lost = f"{file.name} is missing or cut: {there:,} of {size:,} bytes"
            raise ValueError(f"{lost} (all nodes must see one directory)")


# ------------------------------------------------------------------ saving


class Saver:
    """Writes one checkpoint at a time, in a thread, while the training goes on; leaving its `with`
    waits for what is in flight. (dcp.async_save has a thread for the state alone: the model and the
    name come after it, and each of the three may fail.)

    like: model directory whose tokenizer and settings go into each model/. keep_every: of the
    checkpoints before the newest two, model/ stays where this divides the step; 0: nowhere.
    """

    def __init__(self, run, like, dtype: torch.dtype = torch.float32, keep_every: int = 1):
        self.run, self.like, self.dtype, self.keep_every = Path(run), like, dtype, keep_every
        self.group = None  # its collectives run beside the training's: in one they would meet
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.step, self.writing = 0, None  # what is in flight: its step and its future
        self.saved = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.thread.shutdown()  # what is in flight arrives, also when the training has failed
        if kind is None:
            self.wait_for_save(block=True)

    def due(self, step: int, cfg) -> bool:
        """Whether a checkpoint is wanted after so many steps, by cfg.save_every or
        cfg.save_minutes. Rank 0's clock is that of all.
        """
        minutes = (time.monotonic() - self.saved) / 60
        late = cfg.save_minutes and everyone(minutes)[0] >= cfg.save_minutes
        return bool(late or (cfg.save_every and step % cfg.save_every == 0))

    def save(self, step: int, pairs: Pairs, policy: Qwen25VL, card: str):
        """Returns when all is in host memory. policy: is exported, with `card` beside it."""
        self.wait_for_save(block=True)
        self.saved = time.monotonic()
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies now, unpinned
        state = stager.stage(train_state(pairs))
        stager.close()
        (name,) = (name for name, (model, _) in pairs.items() if model is policy)
        weights, self.step = state[name]["model"], step
        if lora.adapters(policy):
            every = lora.merged(policy)
            weights = {name: weight.to("cpu", self.dtype, copy=True) for name, weight in every}
        self.writing = self.thread.submit(self._write, step, state, weights, policy.config, card)

    def wait_for_save(self, block: bool = False):
        """Raises, on all ranks, the OSError of a checkpoint that could not be written; all have to
        call it at the same place. block: until nothing is in flight.
        """
        if self.writing is None:
            return
        if block:
            concurrent.futures.wait([self.writing])
        if not all(everyone(self.writing.done())):
            return
        writing, self.writing = self.writing, None
        advice = f"When that is mended, the same command goes on from step {newest(self.run)[0]}"
        with together(f"writing {step_directory(self.run, self.step)} failed", advice):
            writing.result()

    def _write(self, step: int, state: dict, weights: dict, config: Config, card: str):
        """In the thread: the files of all ranks; rank 0 names them when all are there."""
        folder = step_directory(self.run, step)
        part = folder.with_suffix(".part")
        # copy-ahead from a GPU would open a CUDA context on device 0, and all is in host memory
        writer = Writer(part / "state", per_thread_copy_ahead=0)
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=not self.group)
        save_weights(weights, config, part / "model", self.dtype, self.like, self.group)
        if is_main():
            check_files(part / "state")  # of all nodes
            (part / "model/README.md").write_text(card, **log.UTF8)
            publish(part, folder)
            for old in complete_steps(self.run)[:-KEEP_STATES]:
                folder = step_directory(self.run, old)
                stays = self.keep_every and old % self.keep_every == 0
                remove(folder / "state" if stays else folder)


class Writer(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        """On a full disk, torch's zip writer complains of a position: raise what the disk said."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ or error from None


def export(policy: Qwen25VL, directory: Path, like, dtype: torch.dtype, card: str):
    """The policy as a Hugging Face directory, whole or not at all; OSError on all ranks. Adapters
    are merged, and stand alone in adapter/ beside it.
    """
    part = directory.with_name(f"{directory.name}.part")
    release(policy)  # else gathered weights of the compute dtype are taken for the masters
    with together(f"writing {directory} failed", "Checkpoints are untouched"):
        if lora.adapters(policy):
            lora.save_adapters(policy, directory.with_name("adapter"), str(like), is_main())
        weights = {name: weight.to("cpu", dtype) for name, weight in lora.merged(policy)}
        save_weights(weights, policy.config, part, dtype, like)
        if is_main():
            (part / "README.md").write_text(card, **log.UTF8)
            publish(part, directory)


def publish(part: Path, final: Path):
    """Gives a whole directory its name, once its files are on the disk and not in its cache."""
    for path in filter(Path.is_file, part.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():  # without its state, which a user or an earlier save has removed
        remove(final)
    part.rename(final)


def remove(directory: Path):
    """Renamed first: what a kill in the middle leaves is not taken for a whole one."""
    trash = directory.with_name(f"{directory.name}.old.part")
    directory.rename(trash)
    shutil.rmtree(trash)


@contextmanager
def together(what: str, advice: str):
    """OSError on every rank if the block fails on one of them."""
    error, cause = None, ""
    try:
        yield
    except (Exception, dcp.CheckpointException) as caught:  # the latter is no Exception to Python
        error, cause = caught, f"{type(caught).__name__}: {caught}"
        if isinstance(error, dcp.CheckpointException):  # the errors of all ranks, with their traces
            rank, (first, _) = next(iter(error.failures.items()))
            cause = f"rank {rank}: {type(first).__name__}: {first}"
    if causes := [cause for cause in everyone(cause) if cause]:
        raise OSError(f"{what}: {causes[0]}. {advice}") from error
