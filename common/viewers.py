"""Where a run is looked at beside its own files: Weights & Biases, TensorBoard.

Both get every row of metrics.jsonl, and the step's decoded rollouts as a table. Without their flag
nothing of them is imported; neither is in requirements.txt. A run that resumes is a new one on
Weights & Biases, with the name of the first, and goes on in the same files of TensorBoard.
"""

import dataclasses
import html
from importlib import import_module
from pathlib import Path
from types import ModuleType

MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # by flag and package
TEXTS = ("id", "prompt", "response")  # of the table of rollouts; their reward comes first


def modules_of(config) -> dict[str, ModuleType]:
    """{flag: module} of the viewers that the settings ask for; ImportError where one is missing."""
    modules = {}
    for flag in (flag for flag in MODULES if getattr(config, flag, None)):
        try:
            modules[flag] = import_module(MODULES[flag])
        except ImportError as error:
            raise ImportError(f"--{flag} needs {flag} ({error}): pip install {flag}") from error
    return modules


class Viewers:
    """--wandb PROJECT (WANDB_MODE=offline in the environment keeps it on this disk) and
    --tensorboard, whose files lie in RUN/tensorboard.
    """

    def __init__(self, directory: Path, config, start: int):
        modules, self.run, self.board = modules_of(config), None, None
        if "wandb" in modules:
            place = dict(project=config.wandb, name=str(directory), dir=str(directory))
            self.run = modules["wandb"].init(**place, config=dataclasses.asdict(config))
            self.table = modules["wandb"].Table
        if "tensorboard" in modules:  # what a resume has cut off is hidden
            folder = str(directory / "tensorboard")
            self.board = modules["tensorboard"].SummaryWriter(folder, purge_step=start)

    def log(self, step: int, row: dict):
        if self.run:
            self.run.log(row, step=step)
        if self.board:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # a killed run keeps every finished step

    def rollouts(self, rows: list[dict]):
        def plain(text: str) -> str:  # no encoding has bytes for half a character
            return text.encode(errors="backslashreplace").decode()

        if not (self.run or self.board) or not rows:
            return
        columns, step = ["reward", *TEXTS], rows[0]["step"]
        cells = [[row["reward"], *(plain(row[name]) for name in TEXTS)] for row in rows]
        if self.run:
            self.run.log({"rollouts": self.table(columns=columns, data=cells)}, step=step)
        if self.board:  # in Markdown, where a cell can hold neither a bar nor a line's end
            cells = [[html.escape(f"{x}").replace("|", "&#124;") for x in row] for row in cells]
            lines = (" | ".join(line) for line in [columns, ["---"] * len(columns), *cells])
            text = "\n".join(line.replace("\n", "<br>") for line in lines)
            self.board.add_text("rollouts", text, step)

    def close(self):
        if self.run:
            self.run.finish()
        if self.board:
            self.board.close()
