"""One question, with pictures or without, to one model: prints its answer, or several.

    python -m tools.ask "A 4 ; B 3 ~5 C 1 ; D 2 ; T 12 ; what is B + D ?"
    python -m tools.ask --model out/ovr_7b/rl/model --image a.png "How many apples are there?"
    python -m tools.ask --samples 4 --image out/laptop/data/images/test-0-0.png "what is B + A ?"
    python -m tools.ask --url http://127.0.0.1:8000/v1 --image a.png "How many apples are there?"

A model directory is sampled here, in plain torch. A server (runs/serve.sh, or any other with
OpenAI's interface) streams its answer; if it wants a key, that stands in OPENAI_API_KEY. Pictures
are seen where the question says <image>, or before it; what one of the miniature shows is printed.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional, UseAppendAction

from common import data, distributed
from common.client import user_message
from common.log import run_main
from common.records import read_rows
from rollout import open_sampler


@dataclass(frozen=True)
class Config:
    question: Positional[str]
    image: UseAppendAction[tuple[str, ...]] = ()  # a picture; give it again for each further one
    model: str = ""  # HF directory, Hub name (out/laptop/rl/model); a server's name (its first)
    url: str = ""  # of a server, with its /v1
    max_tokens: int = 0  # of the answer; 0: what the server allows, or 2,048
    samples: int = 1  # answers
    temperature: float = -1.0  # 0: the likeliest token each time; -1: 0, of several answers 1

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"--samples {self.samples}: answers count from 1")


def drawn(image: str) -> str:
    """What a picture of the miniature shows, three cells a line, from the row that it is of."""
    name, _, _ = Path(image).stem.rpartition("-")  # test-0 of images/test-0-0.png
    file = Path(image).absolute().parent.parent / f"{name.partition('-')[0]}.jsonl"
    bills = (r["bill"] for r in read_rows(file) if r.get("id") == name and "bill" in r)
    cells = next(bills, "").split()
    return "\n".join(" ".join(cells[i : i + 3]) for i in range(0, len(cells), 3))


def sampled(cfg: Config, temperature: float) -> Iterator[str]:
    """The answers of a model directory, each in one piece."""
    where, world = data.model_directory(cfg.model or "out/laptop/rl/model"), distributed.start()
    print(f"{where}, {world.dtype} on {world.device}", file=sys.stderr)
    sampler = open_sampler("torch", where, world)
    problem = data.Problem("the question", cfg.question, "", cfg.image)
    for r in sampler.generate([problem], cfg.samples, cfg.max_tokens or 2048, temperature):
        yield f"#{r.sample}  " if cfg.samples > 1 else ""
        yield r.text + ("\n" if r.stopped else " [cut: --max-tokens]\n")
    distributed.finish(world)


def streamed(cfg: Config, temperature: float) -> Iterator[str]:
    """The answers of a server one after the other, piece by piece, with thoughts that it sends."""
    import openai  # here: a directory needs no second of it

    client = openai.OpenAI(base_url=cfg.url, api_key=os.environ.get("OPENAI_API_KEY") or "none")
    settings = {"temperature": temperature, "max_tokens": cfg.max_tokens or openai.omit}
    settings |= {"messages": [user_message(cfg.question, cfg.image)], "stream": True}
    try:
        model = cfg.model or client.models.list().data[0].id
        print(f"{model} at {cfg.url}", file=sys.stderr)
        for n in range(cfg.samples):
            yield f"#{n}  " if cfg.samples > 1 else ""
            for chunk in client.chat.completions.create(model=model, **settings):
                for choice in chunk.choices:
                    for name in ("reasoning", "reasoning_content", "content"):
                        yield getattr(choice.delta, name, None) or ""
                    yield " [cut: --max-tokens]" if choice.finish_reason == "length" else ""
            yield "\n"
    except openai.OpenAIError as error:
        raise ConnectionError(f"{cfg.url}: {error}; does it run, does it end in /v1?") from error


def main(cfg: Config):
    for image in cfg.image:
        data.load_image(image)  # a missing or damaged picture is named
        if grid := drawn(image):
            print(f"{image}:\n{grid}", file=sys.stderr)
    heat = cfg.temperature if cfg.temperature >= 0 else float(cfg.samples > 1)
    for piece in streamed(cfg, heat) if cfg.url else sampled(cfg, heat):
        print(piece, end="", flush=True)


if __name__ == "__main__":
    run_main(main, Config)
