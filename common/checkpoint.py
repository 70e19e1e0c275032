"""Checkpoints: a run that is killed at any moment goes on from the newest whole one.

    RUN/checkpoints/step_000060/state/   slices of every rank, read by any number of ranks
    RUN/checkpoints/step_000060/model/   a Hugging Face directory: averaging, eval.py, vLLM

No random state, place in the data or length budget is saved: all are functions of (seed, step).
Whole or ignored: all is written into step_000060.part, and rank 0 renames it when the files of
every rank are on the disk. What is deleted is renamed first; a *.part that a kill left is removed
at the next start. All nodes see one directory. An error of one rank is raised on all.
For 7B with a critic a state is 180 GB, three times on the disk; a model is 17 GB in bfloat16.
"""

import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions as Options
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from common import log, lora
from common.distributed import everyone, is_main, release
from model import Qwen25VL, save_weights

# Settings that say how a run is executed, and not what it learns: rollouts stay good under others.
EXECUTION = set(
    "out steps save_every save_minutes keep_every recompute compile offload sampler_batch "
    "kv_cache_gb pack_tokens wandb tensorboard commit".split()
)
KEEP_STATES = 2  # the newest checkpoints, from which a run can go on
Pairs = dict[str, tuple[torch.nn.Module, torch.optim.Optimizer]]  # {"policy": (..., ...), ...}


def resume_or_start(run: str | Path, config) -> tuple[int, Path | None]:
    """Where a run begins: (0, None), or the step after its newest checkpoint and its state.

    FileExistsError where compare_settings finds that it may not go on: nothing is overwritten.
    """
    run = Path(run)
    log.modules_of(config)  # one that is missing is refused before models are loaded
    start, state = everyone(newest(run))[0]
    # rank 0 looks for all: a fingerprint reads the whole of the data
    if reason := everyone(is_main() and compare_settings(run, config, start))[0]:
        raise FileExistsError(f"{run} cannot go on: {reason}, or choose another --out")
    if is_main():
        for part in list(run.rglob("*.part")):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    return start, state


def compare_settings(run: Path, config, start: int) -> str:
    """Prints what has changed since run.json (RunLog records it); returns what forbids going on."""
    if (run / "model").is_dir():
        go_on = f"with more --steps, remove {run}/model" if start else "it has no checkpoint"
        return f"it is a finished run; to go on from step {start}: {go_on}"
    if not (run / "run.json").exists():
        return ""
    before, now = log.read_record(run), log.provenance(config)
    lines, settings = log.changed_settings(before, now), now["config"]
    print(f"{run} goes on from step {start}", *lines, sep="\n  ", flush=True)
    changed = {line.split()[0]: line for line in lines}
    # a state of adapters lacks what they were trained on
    fixed = ["algorithm", "lora_rank", *["lora_alpha", "model"] * bool(settings.get("lora_rank"))]
    reasons = [changed[name] for name in fixed if name in changed]
    if settings.get("steps", start) < start:
        reasons.append(f"--steps {settings['steps']}, of which {start} are done")
    old, new = before["data"], log.fingerprints(config)
    if sorted(old.values()) != sorted(new.values()):  # its files may have moved
        reasons.append(f"the data has changed, {old} -> {new}: put the old file back")
    if start and reasons:
        return reasons[0]
    if reasons or {*changed} - EXECUTION:  # what was sampled came from the run as it was
        for file in (run / "rollouts").glob("step_*[0-9].npz"):
            if int(file.stem[5:]) >= start:  # of the step before, rollouts may have to go on
                file.unlink()
    return ""


def newest(run: str | Path) -> tuple[int, Path | None]:
    """(next step, state) of the newest checkpoint of a run; (0, None) if there is none."""
    steps = complete_steps(run)
    return (steps[-1], Path(run) / f"checkpoints/step_{steps[-1]:06}/state") if steps else (0, None)


def complete_steps(run: str | Path) -> list[int]:
    """Steps from which a run can go on. What is not whole is called *.part and not found."""
    states = Path(run).glob("checkpoints/step_*[0-9]/state")
    return sorted(int(state.parent.name[5:]) for state in states)


def parts_of(model: torch.nn.Module) -> Options:
    """Of a model with adapters a state has what trains: the base is read from --model again."""
    adapted = bool(lora.adapters(model))
    return Options(ignore_frozen_params=adapted, strict=not adapted)


def train_state(pairs: Pairs) -> dict:
    """The nested dict of weights and moments that torch.distributed.checkpoint reads and writes."""
    both = {name: get_state_dict(*pair, options=parts_of(pair[0])) for name, pair in pairs.items()}
    return {name: {"model": w, "optimizer": moments} for name, (w, moments) in both.items()}


def load_state(directory: Path, pairs: Pairs):
    """Weights and moments, on any number of ranks; rates and decays stay those of today's command.
    OSError, on all ranks, where that fails: no older one is taken behind the user's back.
    """
    cure = f"If it is of another model, choose another --out; else remove {directory.parent}, and"
    state = train_state(pairs)
    with together(f"{directory} cannot be read", f"{cure} the run goes on from the one before"):
        dcp.load(state, checkpoint_id=directory, no_dist=not dist.is_initialized())
    for name, (model, optimizer) in pairs.items():
        settings = [dict(group) for group in optimizer.param_groups]
        weights, moments = state[name]["model"], state[name]["optimizer"]
        both = dict(model_state_dict=weights, optim_state_dict=moments)
        set_state_dict(model, optimizer, **both, options=parts_of(model))
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)


class Saver:
    """Writes checkpoints and deletes old ones. The training waits meanwhile, at 7B with a critic 3
    minutes at 1 GB/s: a thread beside it would need a second copy of 180 GB in host memory.

    like: model directory whose tokenizer and settings go into each model/. keep_every: of the
    checkpoints before the newest two, model/ stays where this divides the step; 0: nowhere.
    """

    def __init__(self, run, like, dtype: torch.dtype = torch.float32, keep_every: int = 1):
        self.run, self.like, self.dtype, self.keep_every = Path(run), like, dtype, keep_every
        self.saved = time.monotonic()

    def due(self, step: int, cfg) -> bool:
        """After so many steps, by cfg.save_every or cfg.save_minutes on rank 0's clock."""
        minutes = (time.monotonic() - self.saved) / 60
        late = cfg.save_minutes and everyone(minutes)[0] >= cfg.save_minutes
        return bool(late or (cfg.save_every and step % cfg.save_every == 0))

    def save(self, step: int, pairs: Pairs, policy: Qwen25VL, card: str):
        """policy: is exported, with `card` beside it. OSError on all ranks."""
        folder = self.run / f"checkpoints/step_{step:06}"
        part = folder.with_suffix(".part")
        advice = f"When that is mended, the same command goes on from step {newest(self.run)[0]}"
        with together(f"writing {folder} failed", advice):
            for model, _ in pairs.values():
                release(model)  # else gathered weights of the compute dtype pass for the masters
            alone = not dist.is_initialized()
            dcp.save(train_state(pairs), storage_writer=Writer(part / "state"), no_dist=alone)
            write_model(policy, part / "model", self.like, self.dtype, card)
            if is_main():
                check_files(part / "state")  # of all nodes
                publish(part, folder)
                for old in complete_steps(self.run)[:-KEEP_STATES]:
                    folder = folder.with_name(f"step_{old:06}")
                    stays = self.keep_every and old % self.keep_every == 0
                    remove(folder / "state" if stays else folder)
        self.saved = time.monotonic()


class Writer(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        """On a full disk, torch's zip writer complains of a position: raise what the disk said."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise error.__context__ or error from None


def check_files(state: Path):
    """ValueError where a file of a state is not there in full, as where nodes have own disks."""
    for piece in dcp.FileSystemReader(state).read_metadata().storage_data.values():
        file, size = state / piece.relative_path, piece.offset + piece.length
        if not file.exists() or file.stat().st_size < size:
            lost = f"{file.name} is missing or cut, of {size:,} bytes"
            raise ValueError(f"{lost} (all nodes must see one directory)")


def export(policy: Qwen25VL, directory: Path, like, dtype: torch.dtype, card: str):
    """The policy as a Hugging Face directory, whole or not at all; OSError on all ranks. Adapters
    are merged, and stand alone in adapter/ beside it.
    """
    part = directory.with_name(f"{directory.name}.part")
    with together(f"writing {directory} failed", "Checkpoints are untouched"):
        release(policy)
        if lora.adapters(policy):
            lora.save_adapters(policy, directory.with_name("adapter"), str(like), is_main())
        write_model(policy, part, like, dtype, card)
        if is_main():
            publish(part, directory)


def write_model(policy: Qwen25VL, directory: Path, like, dtype: torch.dtype, card: str):
    weights = {name: weight.to("cpu", dtype) for name, weight in lora.merged(policy)}
    save_weights(weights, policy.config, directory, dtype, like)
    if is_main():
        (directory / "README.md").write_text(card, **log.UTF8)


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
    except dcp.CheckpointException as caught:  # of all ranks; to Python it is no Exception
        error, (rank, (first, _)) = caught, next(iter(caught.failures.items()))
        cause = f"rank {rank}: {type(first).__name__}: {first}"
    except Exception as caught:
        error, cause = caught, f"{type(caught).__name__}: {caught}"
    if causes := [cause for cause in everyone(cause) if cause]:
        raise OSError(f"{what}: {causes[0]}. {advice}") from error
