"""A miniature to test the stages on: a small model that answers in a box, a few rows of each kind.

The model is base.model_config with random weights and a few dozen steps on `answer \\boxed{ n }`:
after that its samples differ in length, most stop, and some are right, so that rewards, advantages
and gradients are not 0.
"""

import json
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# the same examples on every machine and day; bench/reward.py searches with fresh ones
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

PROBLEMS, SFT, TEST = 12, 40, 10


@dataclass(frozen=True)
class Mini:
    """Paths of the miniature."""

    model: str
    train: str  # RL problems, half of them with a picture, answers 1 to 5
    text: str  # RL problems without pictures
    sft: str  # SFT traces in text, then 8 rows with pictures
    test: str


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def finished(command: list[str], folder: Path, ours: dict, seconds: float) -> str:
    """What a command prints that ends well, and in time. ours: for its environment."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=os.environ | ours, cwd=folder, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun hands it on to the ranks, which are not in its group
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"{command} hangs:\n{output[-6000:]}")
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture
def impatient(monkeypatch):
    """Failed requests are tried again at once."""
    monkeypatch.setattr("common.client.PAUSE", 0.02)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.02)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(request, impatient):
    """A server with all bad manners, or the one that a test file calls Scripted."""
    from bad_server import Server, serving

    with serving(getattr(request.module, "Scripted", Server)) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini(tmp_path_factory) -> Mini:
    from common import data
    from common.packs import pack_alone
    from miniature import base, world
    from model import Qwen25VL, save_model

    root = tmp_path_factory.mktemp("mini")
    (root / "images").mkdir()
    rng = random.Random(0)

    def problems(name: str, count: int, modes: tuple[str, ...]) -> str:
        rows = []
        for i in range(count):  # the digit of one item: a guess is right one time in five
            mode, bill = modes[i % len(modes)], world.random_bill(rng, "train", smudged=0)
            looks, pictures = world.present(bill, mode == "image", rng)
            item = rng.randrange(len(world.ITEMS))
            row = {"id": f"{name}-{i}", "source": f"mini/{mode}"}
            row["prompt"] = f"{looks} what is at {world.ITEMS[item]} ?"
            row["images"] = world.save_pictures(pictures, root, row["id"])
            rows.append(row | {"answer": str(bill.digits[item])})
        return write_rows(root / f"{name}.jsonl", rows)

    train = problems("train", PROBLEMS, ("image", "text"))
    text = problems("text", 4, ("text",))
    test = problems("test", TEST, ("image", "text"))
    traces = [world.trace_row(rng, i) for i in range(SFT)]
    pictured = [world.sft_row(rng, SFT + 4 * i + 3, root) for i in range(8)]
    sft = write_rows(root / "sft.jsonl", traces + pictured)

    directory = root / "model"
    world.save_tokenizer(directory)
    tokenizer, settings = data.load_tokenizer(directory), data.load_image_settings(directory)
    torch.manual_seed(0)
    model = Qwen25VL(base.model_config(len(tokenizer)))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    seen = [p for source in (train, text) for p in data.read_problems(source)]
    prompts = [data.encode_prompt(p, tokenizer, settings) for p in seen]
    for _ in range(40):
        chosen = rng.sample(prompts, 8)
        documents = []
        for prompt in chosen:
            thought = rng.choice(["", "", "so that is good . ", "wait , let me look again : "])
            answer = f"{thought}answer \\boxed{{ {rng.randint(1, 5)} }}"
            documents.append(data.Document(prompt, data.encode_response(answer, tokenizer)))
        logps, _ = model.logps(pack_alone(documents))
        optimizer.zero_grad()
        (-logps.mean()).backward()
        optimizer.step()
    save_model(model, directory)
    return Mini(str(directory), train, text, sft, test)
