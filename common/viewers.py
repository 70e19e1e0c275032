"""Where a run is looked at beside its own files: Weights & Biases, TensorBoard.

Both get the row of metrics.jsonl of every step, and the step's decoded rollouts as a table. They
are optional: without their flag nothing of them is imported, and neither is in requirements.txt.
A run that resumes is a new run on Weights & Biases, with the name of the first, and goes on in the
same files of TensorBoard, which hides what a resume has cut off.
"""

import html
import os
from importlib import import_module
from pathlib import Path

COLUMNS = ("id", "prompt", "response", "reward")  # of the table of rollouts


class Wandb:
    """--wandb PROJECT. WANDB_MODE=offline in the environment keeps it on this disk."""

    def __init__(self, directory: Path, project: str, settings: dict):
        self.module = imported("wandb", "--wandb", "wandb")
        place = dict(project=project, name=str(directory), dir=str(directory))
        self.run = self.module.init(**place, config=settings)

    def log(self, step: int, row: dict):
        self.run.log(row, step=step)

    def rollouts(self, step: int, rows: list[dict]):
        table = self.module.Table(columns=[*COLUMNS], data=cells(rows))
        self.run.log({"rollouts": table}, step=step)

    def close(self):
        self.run.finish()


class Tensorboard:
    """--tensorboard: RUN/tensorboard, for `tensorboard --logdir RUN`."""

    def __init__(self, directory: Path, start: int):
        module = imported("torch.utils.tensorboard", "--tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=start)

    def log(self, step: int, row: dict):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # a killed run keeps every finished step

    def rollouts(self, step: int, rows: list[dict]):
        """A table in Markdown, where a cell can hold neither a line's end nor a bar."""
        lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
        for row in cells(rows):
            line = " | ".join(html.escape(str(x)).replace("|", "&#124;") for x in row)
            lines.append(line.replace("\n", "<br>"))
        self.writer.add_text("rollouts", "\n".join(lines), step)

    def close(self):
        self.writer.close()


def project_of(config) -> str:
    return getattr(config, "wandb", "") or os.environ.get("WANDB_PROJECT", "")


def refuse_missing(config):
    """ImportError at a run's start, and not when its models are loaded."""
    if project_of(config):
        imported("wandb", "--wandb", "wandb")
    if getattr(config, "tensorboard", False):
        imported("torch.utils.tensorboard", "--tensorboard", "tensorboard")


def imported(module: str, flag: str, package: str):
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{flag} needs {package} ({error}): pip install {package}") from error


def cells(rows: list[dict]) -> list[list]:
    """Lines of rollouts.jsonl as rows of the table. Half characters, which no encoding has bytes
    for, are written out as in the file.
    """

    table = [[row[name] for name in COLUMNS] for row in rows]
    return [
        [x.encode("utf-8", "backslashreplace").decode() if isinstance(x, str) else x for x in row]
        for row in table
    ]
