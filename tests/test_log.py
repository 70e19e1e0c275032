"""log.py: what stands in a run directory, what a resume cuts off, what Ctrl-C and errors do, and
what a run and an exported model say of where they came from.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest

from common import log
from common.log import RunLog, fingerprint, model_card, run_main

ROOT = Path(__file__).resolve().parents[1]
# json.loads makes "\\ud83d" a lone surrogate, which no encoding has bytes for
HALF = "π or half a character: \ud83d"


@dataclass(frozen=True)
class Config:
    lr: float = 1e-4
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    data: str = ""
    wandb: str = ""
    tensorboard: bool = False


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(directory: Path, steps: int, start: int = 0, main: bool = True):
    """A run up to a step, which writes rows of several kinds."""
    run_log = RunLog(directory, Config(model=HALF), steps=5, main=main, start=start)
    for step in range(start, steps):
        run_log.log(step, {"loss": 1.0 / (step + 1), "lr": 1e-4}, show=("loss",))
        for name in ("rollouts", "trace"):
            run_log.append(name, [{"step": step, "text": HALF}] * 2)
    run_log.close()


# ------------------------------------------------------------------ the run directory


def test_the_screen_and_the_files_hold_the_same_numbers(tmp_path, capsys):
    metrics = {"loss": 0.25, "lr": 1e-4, "seconds_update": 1310.0, "peak_gb": 0.9}
    RunLog(tmp_path, Config(), steps=5).log(3, metrics, ("loss",), {"lengths": [{"step": 3}]})
    line = capsys.readouterr().out
    assert all(text in line for text in ("step 3/5", "loss   0.25", "update 1,310 s", "0.9 GB"))
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 3, "seconds": row["seconds"]} | metrics
    assert rows(tmp_path / "lengths.jsonl") == [{"step": 3}]
    about = log.read_record(tmp_path)
    assert about["config"] == vars(Config()) and about["resumed"] == []
    assert {"command", "commit", "started"} <= about.keys()
    assert {"python", "torch", "transformers"} <= about["versions"].keys()


def test_viewers_get_the_metrics_and_a_table_of_rollouts_where_they_are_asked_for(
    tmp_path, monkeypatch
):
    wandb, tensorboard = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    run(tmp_path / "none", 1)
    assert not wandb.mock_calls and not tensorboard.mock_calls
    run_log = RunLog(tmp_path, Config(wandb="ovr", tensorboard=True), steps=5)
    run_log.log(0, {"loss": 0.5})
    row = {"step": 0, "reward": 1.0, "id": "p", "prompt": "a|b\n", "response": HALF}
    run_log.append("rollouts", (row for _ in range(2)))
    run_log.close()
    online, board = wandb.init.return_value, tensorboard.SummaryWriter.return_value
    assert wandb.init.call_args.kwargs["project"] == "ovr"
    assert tensorboard.SummaryWriter.call_args.kwargs == {"purge_step": 0}
    metrics, table = online.log.call_args_list
    assert metrics.args[0]["loss"] == 0.5 and metrics.kwargs == table.kwargs == {"step": 0}
    board.add_scalar.assert_any_call("loss", 0.5, 0)
    plain = HALF.replace("\ud83d", "\\ud83d")
    assert wandb.Table.call_args.kwargs["data"] == [[1.0, "p", "a|b\n", plain]] * 2
    name, text, step = board.add_text.call_args.args
    assert (name, step) == ("rollouts", 0) and text.count("\n") == 3  # two heads, two rows
    assert text.endswith(f"1.0 | p | a&#124;b<br> | {plain}")
    assert online.finish.called and board.close.called


def test_a_viewer_that_is_not_installed_is_refused_with_the_cure(tmp_path, monkeypatch):
    for flag, module in log.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=f"--{flag} needs .*pip install {flag}"):
            RunLog(tmp_path, Config(**{flag: "ovr"}), steps=1)


def test_a_resumed_run_holds_every_step_once_whatever_characters_it_has_written(tmp_path):
    def steps_of(name: str) -> list[int]:
        return [row["step"] for row in rows(tmp_path / f"{name}.jsonl")]

    run(tmp_path, 4)
    began = log.read_record(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')  # killed in the middle of a line
    for start in (4, 2):  # the last step with a checkpoint
        run(tmp_path, 5, start)
    assert steps_of("metrics") == [0, 1, 2, 3, 4]
    assert steps_of("rollouts") == steps_of("trace") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert {row["text"] for row in rows(tmp_path / "rollouts.jsonl")} == {HALF}
    about = log.read_record(tmp_path)
    assert about["config"]["model"] == HALF
    assert about["started"] == began["started"]
    assert [resume["step"] for resume in about["resumed"]] == [4, 2]
    run(tmp_path, 1)  # from the beginning again
    assert log.read_record(tmp_path)["resumed"] == [] and steps_of("metrics") == [0]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys, monkeypatch):
    run(tmp_path / "rank1", 5, main=False)
    monkeypatch.setenv("RANK", "1")
    assert [*log.progress(range(3), "count")] == [0, 1, 2] and capsys.readouterr() == ("", "")
    assert not (tmp_path / "rank1").exists()


def test_the_seconds_of_the_phases_add_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    timer = log.Timer()
    for phase, pause in [("read", 0.25), ("sample", 50.0), ("update", 2.5), ("sample", 3.0)]:
        timer(phase)
        now[0] += pause
    assert timer.seconds() == {"seconds_read": 0.25, "seconds_sample": 53, "seconds_update": 2.5}
    now[0] += 1.5  # the phase under way goes on
    assert timer.seconds() == {"seconds_sample": 1.5}


# ------------------------------------------------------------------ stopping, hanging, failing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_or_a_file_asks_and_a_second_signal_has_its_ordinary_effect(
    number, tmp_path, capsys
):
    # a process started in the background (nohup, &) inherits an ignored SIGINT: set Python's own
    before = signal.signal(number, signal.default_int_handler)
    with log.stop_on_signal(tmp_path) as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and "again kills" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.signal(number, before) is signal.default_int_handler
    with log.stop_on_signal(tmp_path) as stop, log.stop_on_signal(tmp_path, main=False) as other:
        (tmp_path / "stop").touch()
        assert stop.requested and not other.requested  # rank 0 looks for all
    assert not (tmp_path / "stop").exists()


HANGS = """
import dataclasses, sys
from common.log import run_main
def nobody_else_comes(cfg):
    print("ready", "\\ud83d", flush=True)
    sys.stdin.readline()
run_main(nobody_else_comes, dataclasses.make_dataclass("Config", []))
"""


def test_a_process_that_hangs_prints_its_stacks_when_it_is_asked_and_goes_on():
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # which has no half characters
    command = [sys.executable, "-c", HANGS]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready \\ud83d\n"
        process.send_signal(signal.SIGUSR1)
        assert "nobody_else_comes" in "".join(process.stderr.readline() for _ in range(3))
        process.communicate("\n")
    assert process.returncode == 0


def refuse():
    raise ValueError("a bad row")


@pytest.mark.parametrize(
    "action, error, message",
    [
        (refuse, SystemExit, "^error: a bad row$"),
        (lambda: fingerprint("data/none.jsonl"), SystemExit, "^error: .*'data/none.jsonl'$"),
        (lambda: list(zip([1], [], strict=True)), ValueError, "shorter"),
        (lambda: json.loads("{"), ValueError, "Expecting"),
    ],
)
def test_an_error_in_the_projects_words_ends_as_one_line_and_others_keep_their_traceback(
    tmp_path, monkeypatch, action, error, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(error, match=message):
        run_main(lambda cfg: action(), Config)


@pytest.mark.parametrize(
    "flag, value, refused",
    [
        ("limit", "-1", True),
        ("limit", "0", False),
        ("lr", "nan", True),
        ("lr", "inf", True),
        ("step", "-2", True),
        ("step", "-1", False),
    ],
)
def test_a_number_below_0_or_without_end_is_refused_unless_it_is_the_default(
    monkeypatch, flag, value, refused
):
    numbers = [("limit", int, 0), ("lr", float, 1.0), ("step", int, -1)]
    monkeypatch.setattr(sys, "argv", ["script.py", f"--{flag}", value])
    wanted = pytest.raises(SystemExit, match=f"--{flag} {value}: must be a number from 0 on$")
    with wanted if refused else nullcontext():
        run_main(lambda cfg: None, make_dataclass("Config", numbers, frozen=True))


# ------------------------------------------------------------------ where a result came from


def test_a_change_of_the_code_shows_in_the_commit(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path)]
    file, seen = tmp_path / "log.py", []
    monkeypatch.setattr(log, "__file__", str(file))
    file.write_text("a = 1")
    assert log.commit() == ""  # no repository
    for command in ("init -q", "add log.py", "commit -qm one"):
        subprocess.run([*git, *command.split()], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    for text in ("a = 1", "a = 2", "a = 3"):
        file.write_text(text)
        seen.append(log.commit())
    assert seen[0] == head and all(x.startswith(f"{head}-dirty-") for x in seen[1:])
    assert seen[1] != seen[2]


def test_the_command_is_one_that_can_be_given_again(monkeypatch):
    given = ["/bin/python3", "-u", "-m", "tools.plan", "--out", "a b"]
    monkeypatch.setattr(sys, "orig_argv", given)
    assert log.command_line() == "python -m tools.plan --out 'a b'"
    ranks = dict(TORCHELASTIC_RUN_ID="x", GROUP_WORLD_SIZE="2", WORLD_SIZE="16")
    monkeypatch.setattr(os, "environ", os.environ | ranks)
    start = "torchrun --nnodes=2 --nproc_per_node=8"
    assert log.command_line() == f"{start} -m tools.plan --out 'a b'"


def test_a_fingerprint_is_of_names_and_bytes_and_not_of_dates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("train.jsonl")
    file.write_text('{"a": 1}\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    before, folder = fingerprint(file), fingerprint(tmp_path)
    assert before == f"sha256 {digest}, 9 bytes" and folder.endswith(", 1 files")
    os.utime(file, (1, 1))
    assert (fingerprint(file), fingerprint(tmp_path)) == (before, folder)
    moved = file.rename("valid.jsonl")
    assert fingerprint(moved) == before and fingerprint(tmp_path) != folder
    Path("data/set").mkdir(parents=True)
    assert "0 files" in fingerprint("data/set")  # looks like a hub id, and is a directory


def test_a_model_card_holds_the_recipe_and_the_data_and_claims_no_base_that_it_does_not_know(
    tmp_path, monkeypatch
):
    file, run = tmp_path / "train.jsonl", tmp_path / "run"
    file.write_text("{}\n")
    config = Config(data=str(file))
    RunLog(run, config, steps=1)
    about = log.read_record(run)
    assert about["data"] == {str(file): fingerprint(file)}
    monkeypatch.setattr(log, "commit", None)  # the card tells of the run, not of now
    card = model_card("OVR: step 60", config, "my model", run, 4096, reward=0.71)
    read = huggingface_hub.ModelCard(card)
    assert read.data.base_model == config.model and read.data.library_name == "transformers"
    shown = json.loads(re.search("```json\n(.*)```", read.content, re.S)[1])
    assert shown == {"reward": 0.71} | about
    assert "vllm serve 'my model' --generation-config vllm --max-model-len 4096\n" in card
    assert "bfloat16 unless told `--dtype float32`" in card
    card = model_card("OVR", Config(model=str(tmp_path)), tmp_path, run)
    assert "base_model" not in card and "--max-model-len" not in card
