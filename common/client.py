r"""Replies of a model behind any OpenAI-compatible address: a vLLM of one's own, or a paid one.

    each(Endpoint("http://127.0.0.1:8000/v1", "deepseek-r1"), rows, work)

    async def work(ask, row):                     # `concurrency` of them at a time
        reply = await ask({"messages": [user_message(row["prompt"])], "temperature": 0.6})
        file.write(...)                           # on disk before this worker asks anything more

The `openai` package asks, waits and tries again what fails before a reply begins. A long reply
takes many minutes: it is streamed, so that silence for `stall` seconds tells a dead server from a
slow one, and a stream that breaks off or holds garbage is asked for again here. An error of one
request is data, a Failure; one that all requests share (a wrong key, an unknown model, a dead
server) raises Unusable. Tokens are those that the server counts, else unknown. Loads no torch.
"""

import asyncio
import base64
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from PIL import Image

IMAGE_MARKER = "<image>"  # as data.py reads it
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a broken stream is asked for again; doubles
IN_A_ROW = 50  # failures, and not a word from the server in between
SAME_FOR_ALL = (401, 402, 403, 404, 405, 429)  # statuses: no other request would fare better
CURE = "check the key, the account, the model's name, --concurrency, and the url, which ends in /v1"
# None and vLLM's, OpenRouter's and DeepSeek's words for a reply that their machines did not finish
UNFINISHED = (None, "abort", "error", "insufficient_system_resource")
BROKEN = (openai.APIError, ValueError, TypeError, AttributeError)  # cut, stalled, or no completion


class Unusable(RuntimeError):
    """Nothing more is to be had from this endpoint; the message says why, and what to do."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how hard. The key itself is in no field, so that no log can hold it."""

    url: str  # ends in /v1
    model: str
    key_env: str = ""  # NAME of the environment variable that holds the key
    concurrency: int = 64  # requests in flight
    stall: float = 300.0  # seconds without a byte; a full vLLM lets requests wait in silence
    retries: int = 6  # tries after the first

    def __post_init__(self):
        if not re.match(r"https?://[^@/?]+(/[^@?]*)?$", self.url):
            raise ValueError("url must be http(s)://HOST/v1, without a password or a key in it")
        if self.key_env and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise ValueError("key_env is the NAME of an environment variable, never the key itself")
        if self.concurrency < 1 or self.stall <= 0 or self.retries < 0:
            raise ValueError("concurrency and stall must be positive, retries not negative")

    def key(self) -> str:
        if self.key_env and not os.environ.get(self.key_env):
            raise Unusable(f"the environment has no {self.key_env}: export {self.key_env}=...")
        return os.environ[self.key_env].strip() if self.key_env else "none"


@dataclass(frozen=True)
class Reply:
    text: str
    thought: str | None  # where the server tells it from the text
    finish: str  # "stop", "length", "content_filter", ...
    prompt_tokens: int | None  # None: the server did not say
    completion_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """What a request came to that has no reply."""

    error: str  # "status 400", "APITimeoutError", ...
    message: str


# ---- what to ask


def user_message(prompt: str, pictures: Sequence[str | Path] = ()) -> dict:
    """The prompt with pictures where <image> stands, or before it where it stands nowhere."""
    if not pictures:
        return {"role": "user", "content": prompt}
    if IMAGE_MARKER not in prompt:
        prompt = IMAGE_MARKER * len(pictures) + prompt
    texts = prompt.split(IMAGE_MARKER)
    if len(texts) != len(pictures) + 1:
        raise ValueError(f"{len(texts) - 1} {IMAGE_MARKER} markers for {len(pictures)} pictures")
    parts = [{"type": "text", "text": texts[0].strip()}]
    for path, text in zip(pictures, texts[1:], strict=True):
        data = base64.b64encode(Path(path).read_bytes()).decode()
        url = f"data:{picture_type(path)};base64,{data}"
        parts += [{"type": "image_url", "image_url": {"url": url}}]
        parts += [{"type": "text", "text": text.strip()}]
    return {"role": "user", "content": [part for part in parts if part.get("text") != ""]}


def picture_type(path: str | Path) -> str:
    """image/png, by what the file holds and not by its name. OSError if it is no picture."""
    with Image.open(path) as image:
        return Image.MIME[image.format]


# ---- asking


def each(endpoint: Endpoint, jobs: Iterable, work: Callable[[Callable, object], Awaitable]) -> None:
    """Awaits work(ask, job) for every job, `concurrency` at a time; each is pulled when there is a
    place for it, so that millions of jobs take no memory. What one of them raises ends it all."""
    jobs = iter(jobs)

    async def everything():
        settings = {"max_retries": endpoint.retries, "api_key": endpoint.key()}
        settings["timeout"] = openai.Timeout(endpoint.stall, connect=30.0)
        async with openai.AsyncOpenAI(base_url=endpoint.url, **settings) as client:
            asker = Asker(endpoint, client)

            async def worker():
                for job in jobs:
                    await work(asker.ask, job)

            async with asyncio.TaskGroup() as group:
                for _ in range(endpoint.concurrency):
                    group.create_task(worker())

    try:
        asyncio.run(everything())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


class Asker:
    """Asks an endpoint, and gives it up where nothing but failures is heard of it."""

    def __init__(self, endpoint: Endpoint, client: openai.AsyncOpenAI):
        self.endpoint, self.client, self.failures = endpoint, client, 0

    async def ask(self, body: dict) -> Reply | Failure:
        """body: of a chat completion, as {"messages": [...], "temperature": 0.6}; one choice."""
        extras = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": self.endpoint.model} | body | extras
        for attempt in range(self.endpoint.retries + 1):
            try:  # the library itself tries again what fails before the first byte
                stream = await self.client.chat.completions.create(**body)
            except openai.APIError as error:
                if type(error) is openai.APIConnectionError:
                    raise Unusable(
                        f"{self.endpoint.url}: {error.__cause__}; does it run?"
                    ) from error
                return self.failed(error)
            try:
                reply = await collect(stream)
                self.failures = 0
                return reply
            except BROKEN as error:
                broken = error
            if attempt < self.endpoint.retries:
                await asyncio.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt))
        return self.failed(broken)

    def failed(self, error: Exception) -> Failure:
        status = getattr(error, "status_code", None)
        name = f"status {status}" if status else type(error).__name__
        message = str(error).replace(self.endpoint.key(), "KEY")  # some servers repeat it
        self.failures += 1
        if status in SAME_FOR_ALL or self.failures >= IN_A_ROW:
            same = f"{self.failures} failures and no reply since: {message}"
            raise Unusable(f"{self.endpoint.url}, model {self.endpoint.model}, {same}; {CURE}")
        return Failure(name, message)


async def collect(stream: openai.AsyncStream) -> Reply:
    """Reads a reply to its end. One of BROKEN where it has none."""
    texts, thoughts, finish, usage = [], [], None, None
    async for chunk in stream:
        for choice in chunk.choices or ():
            delta = choice.delta
            texts.append(delta.content or delta.refusal or "")
            for name in ("reasoning_content", "reasoning"):  # DeepSeek's name, vLLM's name
                thoughts.append(getattr(delta, name, None) or "")
            finish = choice.finish_reason or finish
        usage = chunk.usage or usage
    if finish in UNFINISHED:
        raise ValueError(f"the stream ended with finish_reason {finish!r}")
    counted = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return Reply("".join(texts), "".join(thoughts) or None, finish, *counted)
