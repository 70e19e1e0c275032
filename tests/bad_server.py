"""An OpenAI-compatible server that does what the prompt says: good replies, and all bad manners.

    what is 2 + 3 ? [500 stall right]

The first request for it gets a 500, the second silence, the third and all later ones the answer.

    with serving() as server:                 # on a thread; server.url, server.requests, ...
        ...
"""

import asyncio
import json
import random
import re
import threading
from contextlib import contextmanager, suppress

HEAD = "HTTP/1.1 {} X\r\nContent-Type: {}\r\nTransfer-Encoding: chunked\r\n{}\r\n"
THOUGHT = "Two numbers are to be added. Let me visualize them on a line and count on."


class Server:
    """requests: (prompt, body) in their order; hold: seconds that a reply takes in the mean."""

    def __init__(self, hold: float = 0.0):
        self.hold, self.requests, self.headers, self.connections = hold, [], [], 0

    async def connection(self, reader, writer):
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = re.search(r"content-length: (\d+)", head, re.I)
                body = json.loads(await reader.readexactly(int(size[1]))) if size else {}
                self.headers.append(head)
                await self.answer(body, writer)
        writer.close()

    async def answer(self, body: dict, writer):
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        words = re.search(r"\[(.*?)\]", prompt)[1].split()
        turn = sum(prompt == before for before, _ in self.requests)
        self.requests.append((prompt, body))
        word = words[min(turn, len(words) - 1)]
        if word == "draw":  # by the seed of the request, as a sampler does
            word = "right" if body["seed"] % 3 == 0 else "wrong"
        await asyncio.sleep(self.hold * random.uniform(0.5, 1.5))
        if word.isdigit() or word in ("tomorrow", "html"):
            return await send(writer, *plain(word), last=True)
        a, b = re.search(r"(\d+) \+ (\d+)", prompt).groups()
        first, *others = stream(word, int(a) + int(b))
        await send(writer, HEAD.format(200, "text/event-stream", ""), ": keep-alive\n\n" + first)
        if word == "stall":
            await asyncio.sleep(60)
        if word == "cut":
            return writer.close()
        await send(writer, "", "".join(others) + "data: [DONE]\n\n", last=True)


def stream(word: str, total: int) -> list[str]:
    """The events of a behaviour: pieces of the text, why it ends, how many tokens it has."""
    box = f"\\boxed{{{total + (word == 'wrong')}}}"
    right = f"<think>\n{THOUGHT}\n</think>\n\n{box}"
    odd = {"nobox": right.replace(box, f"it is {total}"), "void": "", "bare": box}
    odd |= {"opened": right.removeprefix("<think>"), "markup": right + "<|im_end|>"}
    odd["lines"] = right.replace(". ", ".\u2028\x85\x0b")  # these end lines for Python, not in SSE
    whole = odd.get(word, right)
    deltas = [{"content": whole[:20]}, {"content": whole[20:]}]
    if word in ("apart", "vllm", "alone"):
        name = "reasoning" if word == "vllm" else "reasoning_content"
        deltas = [{"role": "assistant", "content": None}, {name: THOUGHT[:9]}, {name: THOUGHT[9:]}]
        deltas += [] if word == "alone" else [{"content": box}]
    events = [event({"choices": [{"delta": delta}]}) for delta in deltas]
    if word == "junk":
        events.insert(1, 'data: {"choices": [{"de\n\n')
    if word == "error":
        events.insert(1, event({"error": {"message": "out of memory"}}))
    if word != "unfinished":
        finish = {"long": "length", "filter": "content_filter", "abort": "abort"}.get(word, "stop")
        events.append(event({"choices": [{"delta": {}, "finish_reason": finish}]}))
    if word != "uncounted":
        usage = {"prompt_tokens": 10, "completion_tokens": len(whole.split())}
        events.append(event({"choices": [], "usage": usage}))
    return events


def plain(word: str) -> tuple[str, str]:
    """(head, body) of a reply that is no stream."""
    if word == "html":
        return HEAD.format(200, "text/html", ""), "<html>Please log in</html>"
    status, after = (429, "Retry-After: 86400\r\n") if word == "tomorrow" else (word, "")
    message = "context too long" if word == "400" else f"told to say {word}"
    head = HEAD.format(status, "application/json", after)
    return head, json.dumps({"error": {"message": message}})


def event(chunk: dict) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def send(writer, head: str, body: str, last: bool = False):
    data = body.encode()
    chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n" + (b"0\r\n\r\n" if last else b"")
    writer.write(head.encode() + chunk)
    await writer.drain()


@contextmanager
def serving(kind: type[Server] = Server, **settings):
    """A server on a free port of the loopback, with its url."""
    server, ready = kind(**settings), threading.Event()

    async def serve():
        server.loop, server.over = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(server.connection, "127.0.0.1", 0, backlog=1024)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
        async with listener:
            ready.set()
            await server.over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.over.set)
        thread.join(20)
