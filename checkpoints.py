"""Checkpoints: a run that is killed at any moment goes on from the newest complete one.

    save_checkpoint(run, step, pairs, policy, like)   # RUN/checkpoints/step_000060/{model,state}
    start, state = claim(run, config)                 # where a run begins, or goes on
    load_state(state, pairs)

state/ is what torch.distributed.checkpoint writes: the slices of every rank, to be read by any
number of ranks. model/ is one Hugging Face directory, for average.py, eval.py, transformers, vLLM.
Both are written beside and renamed: a directory under its own name is a complete one.
"""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from model import Qwen25VL, save_weights
from parallel import is_main, wait, whole_weights

# One process saves and loads alone here, and means to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


def train_state(pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> dict:
    """Models and optimisers by name -> a nested dict that torch.distributed.checkpoint reads and
    writes.
    """
    state = {}
    for name, (model, optimizer) in pairs.items():
        weights, moments = get_state_dict(model, optimizer)
        state[name] = {"model": weights, "optimizer": moments}
    return state


def save_state(directory: Path, pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]):
    """Everything that a resumed run needs. Written beside and renamed: a half-written one is
    never found.
    """
    directory, part = Path(directory), Path(f"{directory}.part")
    dcp.save(train_state(pairs), checkpoint_id=part, no_dist=not dist.is_initialized())
    if is_main():
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    wait()


def load_state(directory: Path, pairs: dict[str, tuple[nn.Module, torch.optim.Optimizer]]):
    state = train_state(pairs)
    dcp.load(state, checkpoint_id=Path(directory), no_dist=not dist.is_initialized())
    for name, (model, optimizer) in pairs.items():
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state[name]["model"],
            optim_state_dict=state[name]["optimizer"],
        )


def save_checkpoint(run: Path, step: int, pairs: dict, policy: Qwen25VL, like: str | Path):
    """RUN/checkpoints/step_000060/: model/ for average.py and eval.py, state/ to resume from.

    model/ is kept for every step, state/ (6 times as large) for the newest only.
    """
    folder = Path(run) / f"checkpoints/step_{step:06}"
    save_whole(policy, folder / "model", like)
    save_state(folder / "state", pairs)
    if is_main():
        for old in sorted(Path(run).glob("checkpoints/step_*/state")):
            if old.parent != folder:
                shutil.rmtree(old)


def save_whole(policy: Qwen25VL, directory: Path, like: str | Path):
    """The policy as one Hugging Face directory, written by rank 0 from the shards of all.

    Written beside and renamed: a directory under its own name is a complete one.
    """
    directory, part = Path(directory), Path(f"{directory}.part")
    weights = whole_weights(policy)
    if is_main():
        save_weights(weights, policy.config, part, torch.float32, like)
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
    else:
        for _ in weights:  # takes part in the gathering
            pass
    wait()


def newest(run: str | Path) -> tuple[int, Path | None]:
    """(next step, state) of the newest complete checkpoint of a run; (0, None) if there is none."""
    found = sorted(Path(run).glob("checkpoints/step_*/state"))
    return (int(found[-1].parent.name[5:]), found[-1]) if found else (0, None)


def claim(run: str | Path, config) -> tuple[int, Path | None]:
    """Where a run begins: (0, None), or the step after its newest checkpoint and that checkpoint.

    Raises FileExistsError where the directory holds a finished run, or an unfinished one of other
    settings: nothing is overwritten, and no run goes on under settings that it did not start with.
    """
    run = Path(run)
    if (run / "model").is_dir():
        raise FileExistsError(f"{run} holds a finished run: choose another --out, or remove it")
    start, state = newest(run)
    if state is None:
        return start, state
    before = json.loads((run / "run.json").read_text())["config"]
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [f"{k} {before.get(k)!r} -> {now[k]!r}" for k in now if before.get(k) != now[k]]
    if changed:
        raise FileExistsError(
            f"{run} was started with other settings ({'; '.join(changed)}): choose another --out"
        )
    return start, state
