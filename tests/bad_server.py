"""An OpenAI-compatible server that does what the prompt says: good replies, and all bad manners.

    what is 2 + 3 ? [500 stall right]

The first request for it gets a 500, the second silence, the third and all later ones the answer.

    with serving() as server:                 # on a thread; server.url, server.requests, ...
        ...
"""

import asyncio
import contextlib
import json
import random
import re
import threading

HEAD = "HTTP/1.1 {} X\r\nContent-Type: {}\r\nTransfer-Encoding: chunked\r\n{}\r\n"
MIDDLE = {  # of a stream
    "junk": 'data: {"choices": [{"de\n\n',
    "error": 'data: {"error": {"message": "out of memory"}}\n\n',
}
THOUGHT = "Two numbers are to be added. Let me visualize them on a line and count on."


class Server:
    """requests: (prompt, body, its number) in their order; most: in flight at once; hold: seconds
    that a reply takes in the mean."""

    def __init__(self, hold: float = 0.0):
        self.hold, self.requests, self.headers = hold, [], []
        self.now = self.most = self.connections = 0
        self.rng = random.Random(0)

    async def connection(self, reader, writer):
        self.connections += 1
        ends = ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        with contextlib.suppress(*ends):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                size = re.search(r"content-length: (\d+)", head, re.I)
                body = json.loads(await reader.readexactly(int(size[1]))) if size else {}
                self.headers.append(head)
                self.now += 1
                self.most = max(self.most, self.now)
                try:
                    await self.answer(body, writer)
                finally:
                    self.now -= 1
        writer.close()

    async def answer(self, body: dict, writer):
        content = body["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        words = re.search(r"\[(.*?)\]", prompt)[1].split()
        turn = sum(prompt == before for before, *_ in self.requests)
        self.requests.append((prompt, body, len(self.requests)))
        word = words[min(turn, len(words) - 1)]
        if word == "draw":  # by the seed of the request, as a sampler does
            word = "right" if body["seed"] % 3 == 0 else "wrong"
        await asyncio.sleep(self.hold * (0.5 + self.rng.random()))
        if word.isdigit() or word in ("tomorrow", "html"):
            return await send(writer, *plain(word), last=True)
        a, b = re.search(r"(\d+) \+ (\d+)", prompt).groups()
        deltas, finish, usage = reply(word, int(a) + int(b))
        await send(writer, HEAD.format(200, "text/event-stream", ""), ": keep-alive\n\n")
        for number, delta in enumerate(deltas):
            if number == 1 and word == "stall":
                await asyncio.sleep(60)
            if number == 1 and word == "cut":
                return writer.close()
            if number == 1 and word in MIDDLE:
                await send(writer, "", MIDDLE[word])
            await send(writer, "", event({"choices": [{"delta": delta}], "model": "served"}))
        if word != "unfinished":
            await send(writer, "", event({"choices": [{"delta": {}, "finish_reason": finish}]}))
        if word != "uncounted":
            assert body["stream_options"] == {"include_usage": True}
            await send(writer, "", event({"choices": [], "usage": usage}))
        await send(writer, "", "data: [DONE]\n\n", last=True)


def reply(word: str, total: int) -> tuple[list[dict], str, dict]:
    """(deltas, finish_reason, usage) of a behaviour."""
    ends = {"wrong": f"\\boxed{{{total + 1}}}", "nobox": f"it is {total}", "void": ""}
    ends |= {"refuse": "I'm sorry, but I can't help.", "markup": f"<|im_end|>\\boxed{{{total}}}"}
    end = ends.get(word, f"\\boxed{{{total}}}")
    whole = end if word in ("bare", "void") else f"<think>\n{THOUGHT}\n</think>\n\n{end}"
    whole = whole.removeprefix("<think>") if word == "opened" else whole
    if word == "lines":  # ends of lines for Python, not for server-sent events
        whole = whole.replace(". ", ".\u2028\x85\x0b")
    deltas = [{"content": whole[:20]}, {"content": whole[20:]}]
    if word in ("apart", "vllm", "alone"):
        name = "reasoning" if word == "vllm" else "reasoning_content"
        deltas = [{"role": "assistant", "content": None}, {name: THOUGHT[:9]}, {name: THOUGHT[9:]}]
        deltas += [] if word == "alone" else [{"content": end}]
    finishes = {"long": "length", "filter": "content_filter", "abort": "abort"}
    words = sum(len((next(iter(d.values())) or "").split()) for d in deltas)
    usage = {"prompt_tokens": 10, "completion_tokens": words}
    return deltas, finishes.get(word, "stop"), usage


def plain(word: str) -> tuple[str, str]:
    """(head, body) of a reply that is no stream."""
    if word == "html":
        return HEAD.format(200, "text/html", ""), "<html>Please log in</html>"
    after = {"429": "Retry-After: 1\r\n", "tomorrow": "Retry-After: 86400\r\n"}.get(word, "")
    message = "context too long" if word == "400" else f"told to say {word}"
    head = HEAD.format(word if word.isdigit() else "429", "application/json", after)
    return head, json.dumps({"error": {"message": message}})


def event(chunk: dict) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


async def send(writer, head: str, body: str, last: bool = False):
    data = body.encode()
    chunk = f"{len(data):x}\r\n".encode() + data + b"\r\n" + (b"0\r\n\r\n" if last else b"")
    writer.write(head.encode() + chunk)
    await writer.drain()


@contextlib.contextmanager
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
