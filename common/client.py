r"""Replies of a model behind any OpenAI-compatible endpoint: a vLLM of one's own, or a paid one.

    jobs ──`concurrency` at a time──▶ POST URL/chat/completions ──stream──▶ Reply or Failure

    endpoint = Endpoint("http://127.0.0.1:8000/v1", "deepseek-r1", concurrency=256)
    jobs = ((row["id"], {"messages": [user_message(row["prompt"])]}) for row in rows)
    for key, reply in ask_all(endpoint, jobs):        # as they finish
        ...

Jobs are pulled when a place is free, so that millions of them take no memory. A long reply takes
many minutes; it is streamed, and silence on the wire for `stall` seconds is what tells a dead one
from a slow one. What may go well another time (429, 5xx, a stall, a cut stream, a page of HTML) is
tried again, later each time, or when the server says. An error of one request is data, a Failure.
An error that all requests share (a wrong key, an unknown model, a dead server) raises Unusable.

Tokens are those that the server counts; where it counts none they are unknown, never estimated. A
try that was given up may have cost too: no server tells. Loads no torch.
"""

import asyncio
import base64
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

IMAGE_MARKER = "<image>"  # as data.py reads it
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before another try; doubles each time
PATIENCE = 600  # seconds; who says "come again in a day" has an empty account
IN_A_ROW = {"rejected": 50, "failed": 3}  # such ends, and not a word from the server in between
SAME_FOR_ALL = {  # status -> what to do; no other request would fare better
    401: "the key is not accepted; put it into an environment variable and give its name",
    402: "the account is empty",
    403: "the key may not use this model",
    404: "no such model or path; the url ends in /v1, and URL/models lists the models",
    405: "not a path that answers; the url ends in /v1",
}
TOKENS = ("prompt_tokens", "completion_tokens")
TEXTS = ("content", "refusal", "reasoning_content", "reasoning")  # DeepSeek's name, vLLM's name
MAYBE_LATER = {408, 409, 425, 429}  # and all from 500
# vLLM's, OpenRouter's and DeepSeek's words for a reply that their machines did not finish
INTERRUPTED = {"abort", "error", "insufficient_system_resource"}


class Unusable(RuntimeError):
    """Nothing more is to be had from this endpoint; the message says why, and what to do."""


class Again(Exception):
    """A try that went wrong, and may go well another time."""

    def __init__(self, reason: str, message: str, status: int | None = None, wait: float = 0.0):
        super().__init__(message)
        self.reason, self.status, self.wait = reason, status, wait


class Rejected(Exception):
    """The server's word on this one request: (status, message)."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how hard. The key itself is in no field, so that no log can hold it."""

    url: str  # ends in /v1
    model: str
    key_env: str = ""  # name of the environment variable that holds the key
    concurrency: int = 64  # requests in flight
    rpm: int = 0  # requests a minute, evenly; 0: no limit
    stall: float = 300.0  # seconds without a byte; a full vLLM lets requests wait in silence
    retries: int = 6  # tries after the first: about a minute
    price_in: float = 0.0  # USD per million tokens of prompts
    price_out: float = 0.0  # USD per million tokens of replies, thoughts included

    def __post_init__(self):
        if not re.match(r"https?://[^@/?]+(/[^@?]*)?$", self.url):
            raise ValueError("url must be http(s)://HOST/v1, without a password or a key in it")
        if self.key_env and not re.fullmatch(r"[A-Za-z_]\w*", self.key_env):
            raise ValueError("key_env is the NAME of an environment variable, never the key itself")
        if self.concurrency < 1 or self.stall <= 0:
            raise ValueError("concurrency must be at least 1, stall more than 0 seconds")
        if min(self.rpm, self.retries, self.price_in, self.price_out) < 0:
            raise ValueError("rpm, retries and prices must not be negative")

    def key(self) -> str:
        if self.key_env and not os.environ.get(self.key_env):
            raise Unusable(f"the environment has no {self.key_env}: export {self.key_env}=...")
        return os.environ[self.key_env].strip() if self.key_env else ""


@dataclass(frozen=True)
class Reply:
    text: str
    thought: str | None  # where the server tells it from the text
    finish: str  # "stop", "length", "content_filter", ...
    model: str | None  # as the server calls it
    prompt_tokens: int | None  # None: the server did not say
    completion_tokens: int | None
    seconds: float  # of the try that went well
    retries: Sequence[str] = ()  # what went wrong before


@dataclass(frozen=True)
class Failure:
    """What a request came to that has no reply."""

    error: str  # "rejected", or why the last try failed: "stall", "status 500", ...
    status: int | None
    message: str
    retries: Sequence[str] = ()


@dataclass
class Totals:
    """What a number of requests came to, and cost."""

    replies: int = 0
    failures: int = 0
    uncounted: int = 0  # replies whose tokens the server did not count
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter = field(default_factory=Counter)  # reason -> tries

    def add(self, outcome: Reply | Failure) -> None:
        self.retries.update(outcome.retries)
        if isinstance(outcome, Failure):
            self.failures += 1
            return
        self.replies += 1
        self.uncounted += outcome.completion_tokens is None
        self.prompt_tokens += outcome.prompt_tokens or 0
        self.completion_tokens += outcome.completion_tokens or 0

    def cost(self, endpoint: Endpoint) -> float:
        """USD, as far as tokens were counted."""
        asked, written = self.prompt_tokens, self.completion_tokens
        return (asked * endpoint.price_in + written * endpoint.price_out) / 1e6


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


# ---- one request


class Client:
    """Asks an endpoint over one pool of connections."""

    def __init__(self, endpoint: Endpoint, http: httpx2.AsyncClient):
        self.endpoint, self.http = endpoint, http
        self.next_turn, self.bad_ends = 0.0, Counter()

    async def ask(self, body: dict) -> Reply | Failure:
        """body: of a chat completion, as {"messages": [...], "temperature": 0.6}; one choice."""
        extras = {"stream": True, "stream_options": {"include_usage": True}}
        body, retries = {"model": self.endpoint.model} | body | extras, []
        while True:
            await self.turn()
            began = time.monotonic()
            try:
                told = await self.read(body)
                return Reply(**told, seconds=round(time.monotonic() - began, 3), retries=retries)
            except Rejected as error:
                return self.ended("rejected", Failure("rejected", *error.args, retries))
            except Again as error:
                if len(retries) == self.endpoint.retries:
                    failure = Failure(error.reason, error.status, str(error), retries)
                    return self.ended("failed", failure)
                retries.append(error.reason)
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (len(retries) - 1))
                # apart, or those that failed together would come again together
                await asyncio.sleep(error.wait + wait * random.uniform(0.5, 1))

    async def turn(self) -> None:
        """Waits until the limit of requests a minute allows another one."""
        if self.endpoint.rpm:
            mine = max(self.next_turn, time.monotonic())
            self.next_turn = mine + 60 / self.endpoint.rpm
            await asyncio.sleep(mine - time.monotonic())

    def ended(self, kind: str, failure: Failure) -> Failure:
        """Unusable where nothing but such ends is heard of the server any more."""
        self.bad_ends[kind] += 1
        if self.bad_ends[kind] >= IN_A_ROW[kind]:
            raise Unusable(
                f"{self.endpoint.url}: the last {self.bad_ends[kind]} requests all {kind} "
                f"({failure.error}: {failure.message}). Does the server run, and does it take such "
                "requests?"
            )
        return failure

    async def read(self, body: dict) -> dict:
        """The fields of a Reply that the server tells. Again, Rejected or Unusable."""
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        key = self.endpoint.key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            async with self.http.stream("POST", url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise self.refusal(response, (await response.aread()).decode(errors="replace"))
                async with aclosing(aiter(httpx2.EventSource(response))) as events:
                    return await self.collect(events)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Again("connection", f"{type(error).__name__}: {error}") from error
        except httpx2.TimeoutException as error:
            raise Again("stall", f"silent for {self.endpoint.stall:g} seconds") from error
        except (httpx2.SSEError, httpx2.DecodingError) as error:
            raise Again("garbage", str(error), 200) from error
        except httpx2.TransportError as error:
            raise Again("cut", f"{type(error).__name__}: {error}") from error

    def refusal(self, response: httpx2.Response, body: str) -> Exception:
        """What another status than 200 means."""
        status = response.status_code
        message = f"HTTP {status}: {error_message(body)}"
        if key := self.endpoint.key():
            message = message.replace(key, "KEY")  # some servers repeat it
        if cure := SAME_FOR_ALL.get(status, "" if status >= 400 else "the url leads elsewhere"):
            return Unusable(f"{self.endpoint.url}, model {self.endpoint.model}: {message}. {cure}")
        if status not in MAYBE_LATER and status < 500:
            return Rejected(status, message)
        wait = seconds_until(response.headers.get("retry-after", ""))
        if wait > PATIENCE:
            return Unusable(f"{self.endpoint.url}: {message}. Come again in {wait / 3600:.1f} h")
        return Again(f"status {status}", message, status, wait)

    async def collect(self, events: AsyncIterator[httpx2.ServerSentEvent]) -> dict:
        """Reads to the end, beyond [DONE], or the connection could not be used again."""
        texts, thoughts, finish, usage, model = [], [], None, {}, None
        async for event in events:
            if event.data == "[DONE]":
                continue
            chunk = parsed(event.data)
            for choice in chunk["choices"]:
                delta = choice.get("delta") or {}
                texts.append(delta.get("content") or delta.get("refusal") or "")
                thoughts.append(delta.get("reasoning_content") or delta.get("reasoning") or "")
                finish = choice.get("finish_reason") or finish
            usage, model = chunk.get("usage") or usage, chunk.get("model") or model
            self.bad_ends.clear()
        if finish is None or finish in INTERRUPTED:
            raise Again("cut", f"the stream ended with finish_reason {finish!r}", 200)
        tokens = {name: usage.get(name) for name in TOKENS}
        thought = "".join(thoughts) or None
        return dict(text="".join(texts), thought=thought, finish=finish, model=model) | tokens


def parsed(data: str) -> dict:
    """A chunk of a streamed chat completion, its shape looked at. Again if it is none."""
    try:
        chunk = json.loads(data)
        if "error" in chunk:
            raise Again("error", f"in the stream: {error_message(data)}", 200)
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            "".join(delta.get(name) or "" for name in TEXTS)
        usage = chunk.get("usage") or {}
        sum(usage.get(name) or 0 for name in TOKENS)
        return chunk
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Again("garbage", f"{type(error).__name__}: {error}: {data:.200}", 200) from error


def error_message(body: str) -> str:
    """{"error": {"message": ...}} as most servers write it, {"message": ...}, or what there is."""
    try:
        found = json.loads(body)
        found = found.get("error") or found
        return str(found["message"] if isinstance(found, dict) else found)[:500]
    except (ValueError, KeyError, AttributeError):
        return " ".join(body.split())[:200]


def seconds_until(retry_after: str) -> float:
    """Of a Retry-After: seconds, or a date; 0 if it is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
        until = until if until.tzinfo else until.replace(tzinfo=UTC)
        return max(0.0, (until - datetime.now(UTC)).total_seconds())
    except ValueError:
        return 0.0


# ---- many requests


END = object()  # after the last result


def each(
    endpoint: Endpoint, jobs: Iterable, work: Callable[[Callable, Any], Awaitable]
) -> Iterator:
    """The results of `await work(ask, job)`, as they finish, `concurrency` jobs at a time.

    work may ask several times. A job is pulled when a place is free; no more than `concurrency`
    results wait for the caller, and while it is busy with one the rest stands still. Leaving the
    loop early (close it: contextlib.closing) gives up what is in flight, and so does Ctrl-C.
    """
    jobs, results, room = iter(jobs), asyncio.Queue(), asyncio.Semaphore(endpoint.concurrency)

    async def worker(client: Client):
        for job in jobs:
            result = await work(client.ask, job)
            await room.acquire()
            results.put_nowait(result)

    async def everything():
        n, stall = endpoint.concurrency, endpoint.stall
        limits = httpx2.Limits(max_connections=n, max_keepalive_connections=n)
        timeout = httpx2.Timeout(stall, connect=min(stall, 30.0), pool=None)
        try:
            async with httpx2.AsyncClient(limits=limits, timeout=timeout) as http:
                client = Client(endpoint, http)
                async with asyncio.TaskGroup() as group:
                    for _ in range(n):
                        group.create_task(worker(client))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            results.put_nowait(END)

    with asyncio.Runner() as runner:
        whole = runner.get_loop().create_task(everything())
        while (result := runner.run(results.get())) is not END:
            room.release()
            yield result
        runner.run(asyncio.wait_for(whole, None))  # raises what stopped it


def ask_all(endpoint: Endpoint, jobs: Iterable[tuple[Any, dict]]) -> Iterator[tuple[Any, Any]]:
    """(key, Reply or Failure) of each job (key, body), as they finish."""

    async def work(ask: Callable, job: tuple[Any, dict]):
        return job[0], await ask(job[1])

    return each(endpoint, jobs, work)
