"""Checkpoints: a run that is killed at any moment goes on from the newest whole one.

    start, state = claim(run, config)            # where a run begins, or goes on
    load_state(state, pairs)                     # on as many ranks as wrote it, or on others
    with Saver(run, config.model) as saver:      # leaves when nothing is in flight
        saver.save(step, pairs, policy, card)    # copies; a thread writes, the training goes on
        saver.settle()                           # every step: what failed there is raised here
    save_whole(policy, run / "model", config.model, dtype, card)

    RUN/checkpoints/step_000060/state/           slices of every rank, read by any number of ranks
    RUN/checkpoints/step_000060/model/           a Hugging Face directory: average.py, eval.py, vLLM
    RUN/checkpoints/step_000060/checkpoint.json  step, ranks, time

No random state, place in the data or length budget is kept: all are functions of (seed, step).

Whole or ignored: all is written into step_000060.part, and rank 0 renames it when the files of
every rank are there and fsync has brought them to the disk, so that no power cut leaves empty ones
under the final name. fsync costs the writing thread alone. What is deleted is renamed first; a
*.part that a kill left behind is removed at the next start. All nodes write to one shared
directory.

Room, for 7B with a critic: a state is 180 GB over the ranks of a node, in host memory while it is
written, and keep_last + 1 times on the disk; a model is 17 GB in bfloat16. So old models can be
kept, old states are not.
"""

import concurrent.futures
import dataclasses
import json
import os
import shutil
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from common import provenance
from common.distributed import everyone, is_main, whole_weights
from model import Qwen25VL, save_weights

# Settings that may change when a run goes on: they move no number by more than rounding, which
# another number of ranks does as well.
FREE = (
    "out threads shard_ranks offload recompute compile share_prompts pack_tokens "  # how, where
    "sampler_batch kv_cache_gb save_every keep_last keep_every valid_every log_rollouts record "
    "dump_minutes wandb trace replay step gap_limit "
    "steps"  # rl.py's rates and lengths hang on the step alone; coldstart.py's cosine on `epochs`
).split()
PATIENCE = timedelta(hours=2)  # a rank that has written its part waits for the slowest disk
Pairs = dict[str, tuple[nn.Module, torch.optim.Optimizer]]  # {"policy": (model, optimizer), ...}

# One process saves and loads alone here, and means to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

# ------------------------------------------------------------------ going on


def claim(run: str | Path, config) -> tuple[int, Path | None]:
    """Where a run begins: (0, None), or the step after its newest checkpoint and its state.

    Raises FileExistsError where the directory holds a finished run, or an unfinished one of other
    settings or data: nothing is overwritten, and no run goes on under what it did not start with.
    """
    run = Path(run)
    if (run / "model").is_dir():
        raise FileExistsError(
            f"{run} holds a finished run: choose another --out, remove it, or remove {run}/model "
            f"to go on from its newest checkpoint"
        )
    start, state = newest(run)
    if state is not None:
        # rank 0 looks for all: a fingerprint reads the whole of the data
        if changed := everyone(changes(run, config, start) if is_main() else "")[0]:
            raise FileExistsError(
                f"{run} was started with other settings ({changed}): choose another --out"
            )
    if is_main():
        for pattern in ("*.part", "checkpoints/*.part", "checkpoints/*/*.part"):
            for part in list(run.glob(pattern)):  # run.json.part is a file, and written anew
                shutil.rmtree(part) if part.is_dir() else part.unlink()
    return start, state


def changes(run: Path, config, start: int) -> str:
    """What differs between run.json and the settings and data of today, FREE ones left out."""
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    before, now = about["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    names = [name for name in now if name not in FREE]
    found = provenance.changes({n: before.get(n) for n in names}, {n: now[n] for n in names})
    for path, fingerprint in about.get("data", {}).items():
        if provenance.fingerprint(path) != fingerprint:
            found.append(f"{path} has changed since")
    if now.get("steps", start) < start:
        found.append(f"steps {now['steps']}, of which {start} are done")
    return "; ".join(found)


def newest(run: str | Path, at_most: int | None = None) -> tuple[int, Path | None]:
    """(next step, state) of the newest checkpoint of a run, or of the newest from which step
    `at_most` is still to be done; (0, None) if there is none.
    """
    steps = [step for step in whole_ones(run) if at_most is None or step <= at_most]
    return (steps[-1], folder_of(run, steps[-1]) / "state") if steps else (0, None)


def whole_ones(run: str | Path) -> list[int]:
    """Steps from which a run can go on. What is not whole is called *.part and not found."""
    found = Path(run).glob("checkpoints/step_*[0-9]/state")
    return sorted(int(state.parent.name[5:]) for state in found)


def folder_of(run: str | Path, step: int) -> Path:
    return Path(run) / f"checkpoints/step_{step:06}"


def train_state(pairs: Pairs) -> dict:
    """Models and optimisers by name -> a nested dict that torch.distributed.checkpoint reads and
    writes.
    """
    state = {}
    for name, (model, optimizer) in pairs.items():
        weights, moments = get_state_dict(model, optimizer)
        state[name] = {"model": weights, "optimizer": moments}
    return state


def load_state(directory: Path, pairs: Pairs):
    """Weights and moments, on any number of ranks. OSError, on all of them, where that fails: a
    checkpoint that cannot be read is never skipped for an older one behind the user's back.
    """
    directory, error = Path(directory), None
    state = train_state(pairs)
    try:
        require_files(directory)
    except ValueError as found:
        error = found
    raise_together(error, f"{directory} cannot be read", advice(directory))
    try:
        alone = not dist.is_initialized()
        dcp.load(state, checkpoint_id=directory, planner=Exactly(), no_dist=alone)
    except dcp.CheckpointException as error:  # no Exception to Python; the same on all ranks
        raise_together(error, f"{directory} cannot be read", advice(directory))
    for name, (model, optimizer) in pairs.items():
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state[name]["model"],
            optim_state_dict=state[name]["optimizer"],
        )


class Exactly(dcp.DefaultLoadPlanner):
    """torch's planner refuses what the checkpoint lacks; this one also what it has besides."""

    def create_local_plan(self):
        if extra := sorted(self.metadata.state_dict_metadata.keys() - self.state_dict.keys()):
            raise ValueError(f"{len(extra)} entries that this run has not, such as {extra[0]}")
        return super().create_local_plan()


def require_files(state: Path):
    """ValueError if the list of a state's files cannot be read, or a file is not there in full."""
    try:
        metadata = dcp.FileSystemReader(state).read_metadata()
    except Exception as error:  # whatever unpickling half a file may raise
        raise ValueError(f".metadata: {type(error).__name__}: {error}") from error
    sizes = {}
    for piece in metadata.storage_data.values():
        end = piece.offset + piece.length
        sizes[piece.relative_path] = max(end, sizes.get(piece.relative_path, 0))
    for name, size in sizes.items():
        if not (state / name).exists():
            raise ValueError(f"{name} is missing (all nodes must see one directory)")
        if (found := (state / name).stat().st_size) < size:
            raise ValueError(f"{name} has {found:,} of {size:,} bytes")


def advice(state: Path) -> str:
    folder = state.parent
    older = [step for step in whole_ones(folder.parents[1]) if step < int(folder.name[5:])]
    return f"Without {folder} the run goes on " + (
        f"from step {older[-1]}: remove it" if older else "from the start: it is the only one"
    )


# ------------------------------------------------------------------ saving


class Saver:
    """Writes one checkpoint at a time, in a thread, while the training goes on.

    like: model directory whose tokenizer and settings go into each model/. keep_last: so many
    newest checkpoints stay whole. keep_every: of older ones model/ stays where this divides the
    step; 1 keeps all, 0 none.
    """

    def __init__(self, run, like, dtype=torch.float32, keep_last: int = 2, keep_every: int = 1):
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"keep_last {keep_last} must be at least 1, keep_every {keep_every} 0")
        self.run, self.like, self.dtype = Path(run), like, dtype
        self.keep_last, self.keep_every = keep_last, keep_every
        # Its collectives run beside the training's: in one group the two would meet.
        grouped = dist.is_initialized()
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if grouped else None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.step, self.writing = 0, None  # of the checkpoint in flight, and its future

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        self.thread.shutdown()  # what is in flight arrives, also when the training has failed
        if kind is None:
            self.settle(wait=True)

    def save(self, step: int, pairs: Pairs, policy: Qwen25VL, card: str):
        """Returns when everything is copied to host memory. card: README.md of the model."""
        self.settle(wait=True)
        stager = DefaultStager(StagingOptions(False, False, False, False))  # copies now, unpinned
        state = stager.stage(train_state(pairs))
        stager.close()
        weights = gather(policy, self.dtype)
        self.step = step
        self.writing = self.thread.submit(self.write, step, state, weights, policy.config, card)

    def settle(self, wait: bool = False):
        """Raises, on all ranks together, the OSError of a checkpoint that could not be written.

        Every rank has to call it at the same place. wait: until nothing is in flight.
        """
        if self.writing is None:
            return
        if wait:
            concurrent.futures.wait([self.writing])
        if not all(everyone(self.writing.done())):
            return
        error, self.writing = self.writing.exception(), None
        start, _ = newest(self.run)
        raise_together(
            error,
            f"writing {folder_of(self.run, self.step)} failed",
            f"Older ones are untouched: when the cause is mended, the same command goes on from "
            f"step {start}",
        )

    def write(self, step: int, state: dict, weights: dict[str, Tensor], config, card: str):
        """In the thread: the files of all ranks; rank 0 names them when all are there."""
        folder = folder_of(self.run, step)
        part = folder.with_name(f"{folder.name}.part")
        # copy-ahead from a GPU would open a CUDA context on device 0, and all is in host memory
        writer = dcp.FileSystemWriter(part / "state", per_thread_copy_ahead=0)
        alone = self.group is None
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=alone)
        if is_main():
            require_files(part / "state")
            write_model(weights, config, part / "model", self.like, self.dtype, card)
            ranks = 1 if alone else dist.get_world_size()
            about = {"step": step, "ranks": ranks, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            (part / "checkpoint.json").write_text(json.dumps(about) + "\n")
            publish(part, folder)
            self.prune()

    def prune(self):
        for step in whole_ones(self.run)[: -self.keep_last]:
            folder = folder_of(self.run, step)
            kept = self.keep_every and step % self.keep_every == 0
            remove(folder / "state" if kept else folder)


def save_whole(policy: Qwen25VL, directory: Path, like, dtype: torch.dtype, card: str):
    """The policy as a Hugging Face directory, written by rank 0; OSError on all ranks together.

    like: model directory whose tokenizer and settings are copied along; card: its README.md.
    """
    directory, error = Path(directory), None
    part = directory.with_name(f"{directory.name}.part")
    weights = gather(policy, dtype)
    try:
        if is_main():
            write_model(weights, policy.config, part, like, dtype, card)
            publish(part, directory)
    except Exception as found:  # safetensors has its own for a full disk
        error = found
    raise_together(error, f"writing {directory} failed", "Checkpoints are untouched")


def gather(policy: Qwen25VL, dtype: torch.dtype) -> dict[str, Tensor]:
    """A copy of the whole weights in rank 0's host memory; the others take part and get {}."""
    weights = {}
    for name, weight in whole_weights(policy, dtype):
        if is_main():
            weights[name] = weight.to("cpu", copy=True)
    return weights


def write_model(weights, config, directory: Path, like, dtype: torch.dtype, card: str):
    save_weights(weights.items(), config, directory, dtype, like)
    (directory / "README.md").write_text(card, encoding="utf-8")


def publish(part: Path, final: Path):
    """Gives a whole directory its name, once its files are on the disk and not in its cache."""
    for path in part.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():  # without its state, which a user or an earlier prune has removed
        remove(final)
    part.rename(final)


def remove(directory: Path):
    """Renamed first: what a kill in the middle leaves is not taken for a whole one."""
    trash = directory.with_name(f"{directory.name}.old.part")
    directory.rename(trash)
    shutil.rmtree(trash)


# ------------------------------------------------------------------ errors


def raise_together(error: BaseException | None, what: str, advice: str):
    """OSError on every rank if one of them has an error."""
    if causes := [cause for cause in everyone(error and cause_of(error)) if cause]:
        raise OSError(f"{what}: {causes[0]}. {advice}") from error


def cause_of(error: BaseException) -> str:
    """In one line. torch gathers the errors of all ranks, with their traces, in one exception."""
    where = ""
    if isinstance(error, dcp.CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        where = f"rank {rank}: "
    return f"{where}{type(error).__name__}: {error}"
