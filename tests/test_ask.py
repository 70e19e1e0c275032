"""ask.py: one question to a model directory, and to a server. (test_vllm_run.py asks a real one,
as runs/serve.sh starts it.)
"""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from common import data
from miniature import world
from model import load_model
from rollout import TorchSampler
from tools import ask

CHUNKS = [  # of a reply; a server like vLLM streams thoughts before the answer
    ({"reasoning": "I count. "}, None),
    ({"content": "There are "}, None),
    ({"content": "three."}, "stop"),
]


class Server(BaseHTTPRequestHandler):
    """OpenAI's interface: one model, one answer to all."""

    questions = []

    def do_GET(self):  # noqa: N802  the name is http.server's
        self.send(json.dumps({"data": [{"id": "served"}]}), "application/json")

    def do_POST(self):  # noqa: N802
        self.questions.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        chunks = [{"choices": [dict(index=0, delta=d, finish_reason=f)]} for d, f in CHUNKS]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self.send("".join([*lines, "data: [DONE]\n\n"]), "text/event-stream")

    def send(self, text: str, kind: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Server.questions.clear()
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


@pytest.fixture(scope="module")
def problem(mini) -> data.Problem:
    return next(p for p in data.read_problems(mini.train) if p.images)


def test_a_model_directory_answers_and_several_answers_are_numbered_and_differ(
    mini, problem, capsys
):
    own = dict(image=problem.images, model=mini.model)
    ask.main(ask.Config(problem.prompt, **own))
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(load_model(mini.model), tokenizer, settings)
    (rollout,) = sampler.generate([problem], 1, 40, temperature=0)
    output = capsys.readouterr()
    assert output.out == rollout.text + "\n" and "boxed" in output.out and mini.model in output.err
    ask.main(ask.Config(problem.prompt, samples=8, **own))
    pairs = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [number for number, _ in pairs] == [f"#{n}" for n in range(8)]
    assert len({text for _, text in pairs}) > 1
    ask.main(ask.Config("what is A + B ?", model=mini.model, max_tokens=2))
    assert capsys.readouterr().out.endswith("[cut: --max-tokens]\n")


def test_what_a_picture_of_the_miniature_shows_is_printed_line_by_line(tmp_path):
    (tmp_path / "images").mkdir()
    made = world.Config(out=str(tmp_path))
    row = world.problem_row(random.Random(0), 0, "test", made)  # a smudged bill, as a picture
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    grid = ask.drawn(str(tmp_path / row["images"][0])).splitlines()
    assert " ".join(grid) == row["bill"] and [line.split()[0] for line in grid] == [*world.LINES]
    for other in ("elsewhere-0.png", "test-1-0.png", "test.png"):  # no row is about these
        assert ask.drawn(str(tmp_path / "images" / other)) == "" == ask.drawn(f"/{other}")


@pytest.mark.parametrize("samples, said", [(1, "{}\n"), (2, "#0  {}\n#1  {}\n")])
def test_a_server_streams_thoughts_and_answers_of_the_model_it_has(
    url, problem, capsys, samples, said
):
    ask.main(ask.Config("How many?", image=problem.images, url=url, samples=samples))
    assert capsys.readouterr().out == said.replace("{}", "I count. There are three.")
    assert len(Server.questions) == samples
    for body in Server.questions:
        picture, text = body["messages"][0]["content"]
        about = body["model"], body["temperature"], "max_tokens" in body
        assert about == ("served", samples - 1.0, False)
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        assert text == {"type": "text", "text": "How many?"}


@pytest.mark.parametrize(
    "question, settings, said",
    [
        ("what <image> ?", {}, "1 markers <image> for 0 images"),
        ("what ?", {"samples": 0}, "--samples 0"),
        ("what ?", {"image": ("no.png",)}, "no.png: no picture .*No such file"),
        ("what ?", {"url": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1: .* does it run"),
        ("How many ?", {}, "a world of .* words.*: How many.*It can read: A 4 ;"),
    ],
)
def test_what_a_user_gets_wrong_is_named(mini, question, settings, said):
    with pytest.raises((ValueError, OSError), match=said):
        ask.main(ask.Config(question, **{"model": mini.model} | settings))
