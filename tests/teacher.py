"""A stand-in for R1 behind an OpenAI-compatible address, which knows the answers.

It thinks in one set phrase, is wrong in a quarter of its tries and sometimes breaks off, so that
what depends on a teacher can be run whole where there is none. What it writes teaches the form,
and nothing else. Not a mock of a client: requests go over HTTP, replies are streamed.
"""

import json
import random
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "teacher"
WRONG, CUT = 0.25, 0.05
THOUGHT = (
    "Let me look at every condition. If it were {other}, one of them would fail. So it has to be "
    "{value}. Let me check that once more: {value} fits."
)


def reply(asked: dict, known: dict[str, dict]) -> tuple[str, str, str]:
    """(thought, text, finish) for a request."""
    content = asked["messages"][-1]["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    rng = random.Random(zlib.crc32(f"{content}/{asked.get('seed')}".encode()))
    row = next(row for question, row in known.items() if content.strip().startswith(question))
    value, other = str(row["answer"]), str(rng.randint(100, 999))
    if rng.random() < WRONG:
        value, other = other, value
    thought = THOUGHT.format(value=value, other=other)
    if rng.random() < CUT:
        return thought[: len(thought) // 2], "", "length"
    return thought, f"The answer is \\boxed{{{value}}}.", "stop"


class Teacher(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    known: dict[str, dict] = {}  # {question: its row}

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        thought, text, finish = reply(asked, self.known)
        parts = [({"reasoning_content": thought}, None), ({"content": text}, finish)]
        choices = [{"index": 0, "delta": delta, "finish_reason": end} for delta, end in parts]
        usage = {"prompt_tokens": 20, "completion_tokens": len((thought + text).split())}
        events = [*({"choices": [choice]} for choice in choices), {"choices": [], "usage": usage}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self.answer("text/event-stream", "".join(lines))

    def answer(self, kind: str, body: str):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        """Says nothing: one line a request would hide everything else."""


def serve(files) -> ThreadingHTTPServer:
    """On a free port. files: JSONL {"prompt", "answer"}."""
    rows = [json.loads(line) for path in files for line in Path(path).open()]
    known = {row["prompt"].replace("<image>", "").strip(): row for row in rows}
    handler = type("Knowing", (Teacher,), {"known": known})
    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 512})
    return server(("127.0.0.1", 0), handler)
