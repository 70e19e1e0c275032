"""ask.py: one question to a model directory, and to a server. (test_vllm_run.py asks a real one,
as runs/serve.sh starts it.)
"""

import json
import random

import pytest
from bad_server import HEAD, Server, event, send
from conftest import write_rows

from common import data
from miniature import world
from model import load_model
from rollout import TorchSampler
from tools import ask

DELTAS = [{"reasoning": "I count. "}, {"content": "There are "}, {"content": "three."}]


class Scripted(Server):
    """One model, one answer to all, thoughts first, as vLLM streams them."""

    async def answer(self, body: dict, writer):
        kind, said = "application/json", json.dumps({"data": [{"id": "served"}]})
        if body:
            self.requests.append(body)
            chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in DELTAS]
            kind, said = "text/event-stream", "".join(map(event, chunks)) + "data: [DONE]\n\n"
        await send(writer, HEAD.format(200, kind, ""), said, last=True)


@pytest.fixture(scope="module")
def problem(mini) -> data.Problem:
    return next(p for p in data.read_problems(mini.train) if p.images)


def test_a_model_directory_answers_with_the_likeliest_tokens(mini, problem, capsys):
    ask.main(ask.Config(problem.prompt, image=problem.images, model=mini.model))
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(load_model(mini.model), *tools)
    (rollout,) = sampler.generate([problem], 1, 40, temperature=0)
    output = capsys.readouterr()
    assert output.out == rollout.text + "\n" and mini.model in output.err  # what was loaded


def test_several_answers_are_numbered_and_differ_and_a_cut_one_says_so(mini, capsys):
    ask.main(ask.Config("what is A + B ?", model=mini.model, samples=8, max_tokens=12))
    pairs = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [number for number, _ in pairs] == [f"#{n}" for n in range(8)]
    assert len({text for _, text in pairs}) > 1
    ask.main(ask.Config("what is A + B ?", model=mini.model, max_tokens=2))
    assert capsys.readouterr().out.endswith("[cut: --max-tokens]\n")


def test_what_a_picture_of_the_miniature_shows_is_printed_line_by_line(tmp_path):
    (tmp_path / "images").mkdir()
    row = world.problem_row(random.Random(0), 0, "test", world.Config(out=str(tmp_path)))
    write_rows(tmp_path / "test.jsonl", [row])  # a smudged bill, as a picture
    grid = ask.drawn(str(tmp_path / row["images"][0])).splitlines()
    assert " ".join(grid) == row["bill"] and [line.split()[0] for line in grid] == [*world.LINES]
    for other in ("elsewhere-0.png", "test-1-0.png", "test.png"):  # no row is about these
        assert ask.drawn(str(tmp_path / "images" / other)) == ""


@pytest.mark.parametrize("samples, said", [(1, "{}\n"), (2, "#0  {}\n#1  {}\n")])
def test_a_server_streams_thoughts_and_answers_of_the_model_it_has(
    server, problem, capsys, samples, said
):
    ask.main(ask.Config("How many?", image=problem.images, url=server.url, samples=samples))
    assert capsys.readouterr().out == said.replace("{}", "I count. There are three.")
    assert len(server.requests) == samples
    for body in server.requests:
        picture, text = body["messages"][0]["content"]
        assert (body["model"], body["temperature"]) == ("served", samples - 1.0)
        assert "max_tokens" not in body  # what the server allows
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        assert text == {"type": "text", "text": "How many?"}


@pytest.mark.parametrize(
    "question, settings, said",
    [
        ("what <image> ?", {}, "1 markers <image> for 0 images"),
        ("what ?", {"image": ("no.png",)}, "no.png: no picture .*No such file"),
        ("what ?", {"url": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1: .* does it run"),
        ("How many ?", {}, "a world of .* words.*: How many.*It can read: A 4 ;"),
    ],
)
def test_what_a_user_gets_wrong_is_named(mini, question, settings, said):
    with pytest.raises((ValueError, OSError), match=said):
        ask.main(ask.Config(question, **{"model": mini.model} | settings))
