"""The miniature world: what it promises to the experiment that runs in it."""

import json
import random
import re
import subprocess

import jinja2
import pytest
import torch

import model
from common import data, distributed
from miniature import world
from reward import grade


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    cfg = world.Config(out=str(out), train=64, sft=96, test=32)
    world.write_data(cfg, out / "data")
    world.save_tokenizer(out / "model")
    return out


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text().splitlines()]


def test_no_grid_of_the_tests_is_seen_in_any_stage():
    rng = random.Random(0)
    seen = {tuple(world.random_grid(rng)) for _ in range(500)}
    held = {tuple(world.random_grid(rng, test=True)) for _ in range(500)}
    assert not seen & held and all(world.held_out(list(g)) for g in held)


def test_training_files_hold_no_test_grid_and_test_files_no_training_grid(folder):
    for name in ("train", "valid", "test", "reading"):
        for row in rows(folder, name):
            assert world.held_out(list(row["grid"].values())) == (name in ("test", "reading"))
    for row in rows(folder, "sft"):
        cells = dict(re.findall(r"([AB][123]) ([1-5])", row["prompt"]))
        assert not world.held_out([int(cells[c]) for c in world.CELLS])


def test_the_reference_answers_are_the_sums(folder):
    for row in rows(folder, "train") + rows(folder, "test"):
        grid = row["grid"]
        asked = re.search(r"grid \?|row ([AB])|\bat (\w\d)", row["prompt"])
        cells = [c for c in grid if asked[2] in (None, c) and asked[1] in (None, c[0])]
        assert row["answer"] == str(sum(grid[c] for c in cells))


def test_every_trace_ends_in_the_right_answer_and_holds_no_picture(folder):
    for row in rows(folder, "sft"):
        assert grade(row["answer"], row["response"]).score == 1
        assert "<image>" not in row["prompt"] and "images" not in row


def test_traces_show_each_habit_and_a_late_slip_is_found_by_the_check():
    rng = random.Random(1)
    texts = [world.trace([1, 2, 3, 4, 5, 1], *world.question(rng), rng) for _ in range(2000)]

    def share(words):
        return sum(words in text for text in texts) / len(texts)

    assert 0.5 < share("i need the sum") < 0.7 and 0.5 < share("first list cells") < 0.7
    assert 0.1 < share("that is not right") < 0.3 and 0.35 < share("let me check") < 0.55
    late = [text for text in texts if "so it is" in text]
    assert late and all("let me check" in text for text in late)


def test_the_tokenizer_knows_every_word_and_gives_them_back(folder):
    tokenizer = data.load_tokenizer(folder / "model")
    rng = random.Random(2)
    for _ in range(300):
        example = world.base_example(rng)
        ids = tokenizer.encode(example.response)
        assert tokenizer.decode(ids) == example.response
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user", "content": "what is in the picture ?"}, "picture"),
        ({"role": "user", "content": [{"type": "text", "text": "How many ?"}]}, "How many"),
        ({"role": "system", "content": "what is the sum ?"}, "system"),
    ],
)
def test_unknown_words_are_named_with_a_prompt_that_works(folder, turn, words):
    tokenizer = data.load_tokenizer(folder / "model")
    with pytest.raises(jinja2.TemplateError, match=rf"world of \d+ words, .*: {words}\.") as error:
        tokenizer.apply_chat_template([turn])
    prompt = str(error.value).split("It can read: ")[1]
    ids = tokenizer.apply_chat_template([turn | {"role": "user", "content": prompt}])["input_ids"]
    assert tokenizer.decode(ids) == f"<|im_start|> user {prompt} <|im_end|>"


def test_a_cell_of_a_picture_is_one_token_and_its_noise_says_nothing(folder):
    settings = data.load_image_settings(folder / "model")
    rng = random.Random(3)
    picture = world.draw([1, 2, 3, 4, 5, 1], list(world.COLOURS), 3, rng)
    assert picture.size == (84, 56)
    patches, grid = data.image_patches(picture, settings)
    assert grid == (1, 4, 6) and patches.shape == (24, 1176)
    again = world.draw([1, 2, 3, 4, 5, 1], list(world.COLOURS), 3, rng)
    assert picture.tobytes() != again.tobytes()


def test_reading_is_counted_from_the_thinking_alone():
    row = {"grid": {"A1": 4, "A2": 5, "A3": 1, "B1": 2, "B2": 2, "B3": 3}}
    response = "<think> A1 4 = 4 A2 3 = 7 wait </think> answer \\boxed{ 7 } B1 2"
    assert world.read_accuracy(row, response) == (1, 2)


def test_a_ledger_adds_up_and_stays_in_the_vocabulary():
    rng = random.Random(4)
    for _ in range(300):
        prompt, response, images = world.ledger(rng)
        numbers = [int(n) for n in re.findall(r" (\d+) =", response)]
        totals = [int(n) for n in re.findall(r"= (\d+)", response)]
        assert totals == [sum(numbers[: i + 1]) for i in range(len(numbers))]
        assert max(totals) <= world.LARGEST and prompt.count("<image>") == len(images)


def test_the_base_model_trains_and_opens_as_a_model_directory(tmp_path):
    cfg = world.Config(out=str(tmp_path), align_steps=2, steps=3, batch=4)
    trained = world.train_base(cfg, tmp_path / "base")
    loaded = model.load_model(tmp_path / "base/model")
    for (name, ours), theirs in zip(trained.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert data.load_tokenizer(tmp_path / "base/model").chat_template


def test_base_answers_hold_no_habit():
    from evaluation import behaviors

    rng = random.Random(5)
    answers = [e.response for e in (world.base_example(rng) for _ in range(500)) if e.id == "guess"]
    assert len(answers) > 20 and not any(behaviors.rates(answers).values())


def test_a_stage_on_its_defaults_first_makes_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ran, ends = [], []

    def run(command, env):
        ran.append(command[-1])
        assert not [k for k in env if k in ("RANK", "MASTER_ADDR", "WORLD_SIZE")]
        return subprocess.CompletedProcess(command, ends.pop() if ends else 0)

    monkeypatch.setattr(world.subprocess, "run", run)
    alone = distributed.World(0, 1, torch.device("cpu"))
    world.ensure(alone, "out/laptop/coldstart/model", "out/laptop/data/train.jsonl")
    world.ensure(alone, "out/laptop/base/model", "elsewhere/rows.jsonl")
    assert ran == ["coldstart", "miniature.world", "miniature.world"]
    assert (tmp_path / "elsewhere").exists() is False  # an own path is never made up
    ends.append(1)
    with pytest.raises(RuntimeError, match="coldstart has failed, .* out/laptop/coldstart/model"):
        world.ensure(alone, "out/laptop/coldstart/model")
