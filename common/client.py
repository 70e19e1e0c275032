r"""Replies of a model behind any OpenAI-compatible address: a vLLM of one's own, or a paid one.

    ask_for_all(Endpoint("http://127.0.0.1:8000/v1", "deepseek-r1"), jobs, request, write)

    request(job) -> {"messages": [user_message(prompt)], "temperature": 0.6}, None: nothing is left
    write(job, reply)                             # puts the Reply on disk

The `openai` package tries again what fails before a reply begins. A reply takes minutes: it is
streamed, so that `stall` seconds of silence tell a dead server from a slow one, and a stream that
breaks off or holds garbage is asked for again here. A request that fails all the same is counted,
and asked again by the next run; what all share (a wrong key, a dead server) ends the run.
"""

import asyncio
import base64
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from PIL import Image

from common.data import split_at_markers
from common.log import command_line

PAUSE = 5.0  # seconds before a broken stream is asked for again, then twice and three times that
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
    """Where to ask, and how hard: the settings of a script that asks begin with these. The key
    itself is in no field, so that no log can hold it."""

    url: str  # of an OpenAI-compatible server, with its /v1
    model: str  # as the server calls it
    key_env: str = ""  # NAME of the environment variable that holds the key; empty: none
    concurrency: int = 64  # requests in flight
    stall: float = 300.0  # seconds without a byte; a full vLLM lets requests wait in silence
    retries: int = 6  # tries after the first that the server fails

    def __post_init__(self):
        if not re.match(r"https?://[^@/?]+(/[^@?]*)?$", self.url):
            raise ValueError("url must be http(s)://HOST/v1, without a password or a key in it")
        if self.key_env and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise ValueError("key_env is the NAME of an environment variable, never the key itself")
        if self.concurrency < 1 or self.stall <= 0 or self.retries < 0:
            raise ValueError("concurrency and stall must be positive, retries not negative")


@dataclass(frozen=True)
class Reply:
    text: str
    thought: str | None  # where the server tells it from the text
    finish: str  # "stop", "length", "content_filter", ...
    prompt_tokens: int | None  # None: the server did not say
    completion_tokens: int | None


def user_message(prompt: str, pictures: Sequence[str | Path] = ()) -> dict:
    """The prompt with pictures where <image> stands, or before it where it stands nowhere."""
    if not pictures:
        return {"role": "user", "content": prompt}
    pieces = [text.strip() for text in split_at_markers("the prompt", prompt, len(pictures))]
    content = [{"type": "text", "text": pieces[0]}]
    for path, text in zip(pictures, pieces[1:], strict=True):
        with Image.open(path) as image:
            kind = Image.MIME[image.format]  # by what the file holds and not by its name
        url = f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
        content += [{"type": "image_url", "image_url": {"url": url}}]
        content += [{"type": "text", "text": text}]
    return {"role": "user", "content": [part for part in content if part.get("text") != ""]}


def ask_for_all(endpoint: Endpoint, jobs: Iterable, request: Callable, write: Callable) -> None:
    """Asks for every job until request(job) is None, `concurrency` jobs at a time. A job is pulled
    when there is a place for it: millions take no memory. A reply is on disk before its job asks
    for more; a request that fails after all tries ends its job. Where nothing more is to be had,
    and at Ctrl-C, it stops with the command that goes on. What request or write raise comes out."""
    key = os.environ.get(endpoint.key_env, "").strip() if endpoint.key_env else "none"
    if not key:
        raise Unusable(f"the environment has no {endpoint.key_env}: export {endpoint.key_env}=...")
    settings = {"base_url": endpoint.url, "api_key": key, "max_retries": endpoint.retries}
    settings["timeout"] = openai.Timeout(endpoint.stall, connect=30.0)
    client, shared = openai.AsyncOpenAI(**settings), iter(jobs)
    failures, in_a_row = Counter(), 0

    async def worker():
        nonlocal in_a_row
        for job in shared:
            while body := request(job):
                try:
                    reply = await ask(client, endpoint, body)
                except BROKEN as error:
                    status, in_a_row = getattr(error, "status_code", None), in_a_row + 1
                    message = str(error).replace(key, "KEY")  # some servers repeat it
                    if status in SAME_FOR_ALL or in_a_row >= IN_A_ROW:
                        same = f"{in_a_row} failures and no reply since: {message}; {CURE}"
                        raise Unusable(f"{endpoint.url}, model {endpoint.model}, {same}") from error
                    kind = f"status {status}" if status else type(error).__name__
                    failures[f"{kind}: {message}"] += 1
                    break
                in_a_row = 0
                write(job, reply)

    async def workers():
        async with client, asyncio.TaskGroup() as group:
            for _ in range(endpoint.concurrency):
                group.create_task(worker())

    try:
        asyncio.run(workers())
    except (KeyboardInterrupt, ExceptionGroup) as error:
        why = error.exceptions[0] if isinstance(error, ExceptionGroup) else Unusable("Ctrl-C")
        if not isinstance(why, Unusable):
            raise why from None
        print(f"every reply that came is on disk; to go on: {command_line()}")
        raise SystemExit(f"stopped: {why}") from None
    for why, count in failures.most_common(5):
        print(f"{count:,} requests failed: {why}")


async def ask(client: openai.AsyncOpenAI, endpoint: Endpoint, body: dict) -> Reply:
    """One reply, streamed; one of BROKEN where all tries fail, Unusable where nobody listens."""
    body = {"model": endpoint.model, "stream": True} | body
    body["stream_options"] = {"include_usage": True}
    for attempt in range(endpoint.retries + 1):
        await asyncio.sleep(attempt * PAUSE)
        try:  # the library itself tries again what fails before the first byte
            stream = await client.chat.completions.create(**body)
        except openai.APITimeoutError:
            raise
        except openai.APIConnectionError as error:
            raise Unusable(f"{endpoint.url}: {error.__cause__}; does it run?") from error
        try:
            return await collect(stream)
        except BROKEN as error:
            broken = error
    raise broken


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
