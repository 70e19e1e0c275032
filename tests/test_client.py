"""client.py against a server with all bad manners."""

import re

import pytest
from bad_server import THOUGHT, serving
from PIL import Image

from common.client import Endpoint, Reply, ask_for_all, user_message


def replies(endpoint: Endpoint, words) -> list:
    """To requests that the server answers by `words`, in the order they ended."""
    jobs, found = [*enumerate(words)], []
    bodies = {(i, w): {"messages": [user_message(f"{i}: 2 + 3 ? [{w}]")]} for i, w in jobs}
    ask_for_all(endpoint, jobs, lambda job: bodies.pop(job, None), lambda _, r: found.append(r))
    return found


def asked_once(server, words: str, **settings):
    """The reply, or None where the request fails."""
    found = replies(Endpoint(server.url, "m", **dict(stall=1.0, retries=2) | settings), [words])
    return found[0] if found else None


def test_a_reply_has_the_text_its_end_and_the_counted_tokens(server):
    text = f"<think>\n{THOUGHT}\n</think>\n\n\\boxed{{5}}"
    assert asked_once(server, "right") == Reply(text, None, "stop", 10, len(text.split()))
    assert asked_once(server, "uncounted") == Reply(text, None, "stop", None, None)
    assert asked_once(server, "long").finish == "length"
    for words in ("apart", "vllm"):  # the thought in a field of its own, by either name
        reply = asked_once(server, words)
        assert (reply.thought, reply.text) == (THOUGHT, "\\boxed{5}")


FAULTS = {"500": "status 500", "stall": "APITimeoutError", "cut": "APIConnectionError"}
FAULTS |= {"error": "APIError", "junk": "JSONDecodeError"}
FAULTS |= dict.fromkeys(("unfinished", "abort", "html"), "ValueError")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_is_a_failure_when_it_stays(server, fault, capsys):
    assert asked_once(server, f"{fault} {fault} right").text.endswith("\\boxed{5}")
    assert asked_once(server, fault) is None and len(server.requests) == 6
    assert re.search(rf"1 requests failed: {FAULTS[fault]}: .", capsys.readouterr().out)


def test_what_the_server_rejects_is_not_asked_again_and_printed(server, capsys):
    assert asked_once(server, "400 right") is None and len(server.requests) == 1
    assert re.search("1 requests failed: status 400: .*context too long", capsys.readouterr().out)


@pytest.mark.parametrize("words", ["401", "402", "404", "tomorrow"])
def test_what_all_requests_share_stops_with_the_cure_without_the_key(server, words, monkeypatch):
    monkeypatch.setenv("SECRET", "told")  # the server repeats it
    with pytest.raises(SystemExit, match=f"KEY to say {words}; check the key, .* ends in /v1"):
        asked_once(server, words, key_env="SECRET")
    assert len(server.requests) == 1


def test_a_dead_server_and_one_that_rejects_everything_are_not_asked_to_the_end(server):
    with pytest.raises(SystemExit, match="127.0.0.1:9/v1: .*does it run"):
        replies(Endpoint("http://127.0.0.1:9/v1", "m", retries=1), ["right"] * 100)
    with pytest.raises(SystemExit, match="50 failures and no reply since: .*context too long"):
        replies(Endpoint(server.url, "m", concurrency=4), ["400"] * 10_000)
    assert 50 <= len(server.requests) <= 54
    found = replies(Endpoint(server.url, "m", concurrency=1, retries=0), ["500", "right"] * 60)
    assert len(found) == 60  # a failure between two replies stops nothing


def test_the_key_is_sent_and_stands_in_nothing_that_is_printed(server, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    assert asked_once(server, "right", key_env="SECRET").text
    assert "authorization: bearer s3cr3t" in server.headers[0].lower()
    assert "s3cr3t" not in repr(Endpoint(server.url, "m", key_env="SECRET"))
    with pytest.raises(RuntimeError, match="no ABSENT: export ABSENT="):
        asked_once(server, "right", key_env="ABSENT")
    with pytest.raises(ValueError, match="NAME of an environment variable") as error:
        Endpoint(server.url, "m", key_env="sk-s3cr3t")
    assert "s3cr3t" not in str(error.value)


@pytest.mark.usefixtures("impatient")
def test_jobs_are_pulled_one_by_one_as_places_become_free():
    pulled, done = [], []

    def jobs():
        for i in range(40):
            pulled.append(i)
            assert len(pulled) <= len(done) + 5
            yield i

    def request(job):
        return None if job in done else {"messages": [user_message(f"{job} 1 + 1 [right]")]}

    with serving(hold=0.02) as server:
        endpoint = Endpoint(server.url, "m", concurrency=5)
        ask_for_all(endpoint, jobs(), request, lambda job, _: done.append(job))
    assert sorted(done) == pulled == [*range(40)] and server.most == 5
    assert server.connections == 5  # kept open from request to request


def test_an_error_in_the_work_or_the_jobs_comes_out_as_it_is(server):
    with pytest.raises(ZeroDivisionError):
        ask_for_all(Endpoint(server.url, "m"), [1, 0], lambda job: 1 // job and None, print)
    with pytest.raises(KeyError, match="a bad job"):
        ask_for_all(Endpoint(server.url, "m"), ({}["a bad job"] for _ in [1]), print, print)


def test_pictures_stand_where_their_markers_are_and_carry_what_they_are(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", "JPEG")  # by its name a PNG
    Image.new("RGB", (4, 4)).save(tmp_path / "b", "PNG")
    names = [tmp_path / "a.png", tmp_path / "b"]
    see, first, et, second = user_message("see <image> and <image>", names)["content"]
    assert (see["text"], et["text"]) == ("see", "and")
    assert first["image_url"]["url"].startswith("data:image/jpeg;base64,/9j/")
    assert second["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    unmarked = user_message("which ?", names)["content"]
    assert [part["type"] for part in unmarked] == ["image_url", "image_url", "text"]
    assert user_message("text <alone>") == {"role": "user", "content": "text <alone>"}
    with pytest.raises(ValueError, match="1 markers <image> for 2 images"):
        user_message("see <image>", names)
