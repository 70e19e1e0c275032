"""score.py: its figures against naive loops, its bytes against kills and ranks.

    pytest tests/test_score.py       # starts itself under torchrun

The plain model is a Qwen2 of random weights and a byte-level BPE of a few merges, so that tokens
would grow over the boundary of prompt and response if they could.
"""

import faulthandler
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import finished, write_rows
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from common import data, distributed
from common.log import beside
from curation import score
from model import load_model
from reward import grade
from rollout import TorchSampler

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds; a start takes about 10, and ten times that on a busy machine
WORDS = "so the sum of two and three is five , wait , let me check again :".split()


def sentence(i: int, words: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (i + 1)) % len(WORDS)] for k in range(words))


def text_rows() -> list[dict]:
    """Of many lengths; some responses begin with what a tokenizer would join to the prompt."""
    rows = []
    for i in range(23):
        response = ("\n" * (i % 3)) + sentence(i, 1 + (i * 5) % 17) + f" \\boxed{{{i}}}"
        about = {
            "id": f"r{i}",
            "source": ("a", "b")[i % 2],
            "prompt": sentence(i + 3, 40 if i == 11 else 2 + i % 9),
        }
        rows.append(about | {"response": response})
    return rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """Directory of a causal LM with a token before every text, as Llama has one."""
    directory = tmp_path_factory.mktemp("plain")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = [AddedToken("<s>", special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([" ".join(WORDS), "\n\n\n", "\n\n\n\n"] * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(directory)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3)
    config = Qwen2Config(vocab_size=inner.get_vocab_size(), **sizes)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return str(directory)


def loss_config(plain, out: Path, **changed) -> score.Config:
    rows = out.parent / "rows.jsonl"
    if not rows.exists():
        rows.parent.mkdir(exist_ok=True)
        write_rows(rows, text_rows())
    small = dict(rows=str(rows), kind="loss", model=plain, out=str(out), tokens=30, chunk=5)
    return score.Config(**small | changed)


def passes_config(mini, out: Path, **changed) -> score.Config:
    small = dict(rows=mini.train, kind="passes", model=mini.model, out=str(out), samples=5)
    small |= dict(max_tokens=10, prompt_tokens=64, sampler_batch=15, chunk=5, seed=3)
    return score.Config(**small | changed)


def records_of(out) -> list[dict]:
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def begun(folder: Path, whole: score.Config, parts: dict[int, str]) -> score.Config:
    """A run that was killed: the whole one's protocol, and what its ranks had written."""
    cfg = replace(whole, out=str(folder / "o.jsonl"))
    folder.mkdir(exist_ok=True)
    beside(cfg.out, "protocol.json").write_text(beside(whole.out, "protocol.json").read_text())
    for rank, text in parts.items():
        beside(cfg.out, f"rank{rank}.part.jsonl").write_text(text)
    return cfg


@pytest.fixture(scope="module")
def losses(plain, tmp_path_factory) -> score.Config:
    cfg = loss_config(plain, tmp_path_factory.mktemp("loss") / "x.losses.jsonl")
    score.main(cfg)
    return cfg


@pytest.fixture(scope="module")
def passes(mini, tmp_path_factory) -> score.Config:
    cfg = passes_config(mini, tmp_path_factory.mktemp("passes") / "x.passes.jsonl")
    score.main(cfg)
    return cfg


# ------------------------------------------------------------------ loss


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_response_cut_into_tokens_apart(plain, losses):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    found, cut, shared = records_of(losses.out), 0, 0
    rows = records_of(losses.rows)
    assert [r["id"] for r in found] == [r["id"] for r in rows]
    for row, record in zip(rows, found, strict=True):
        prompt = tokenizer.encode(row["prompt"] + "\n\n")
        ids = prompt + tokenizer.encode(row["response"], add_special_tokens=False)
        shared += len(tokenizer.encode(row["prompt"] + "\n\n" + row["response"])) < len(ids)
        cut += len(ids) > losses.tokens
        ids = ids[: losses.tokens]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats = [-logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        assert record["tokens"] == len(nats)
        if nats:
            assert record["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)
        else:
            assert record["loss"] is None and f"prompt of {len(prompt)} tokens" in record["why"]
    nulls = sum(r["loss"] is None for r in found)
    assert cut > nulls > 0  # both were met
    assert len({r["loss"] for r in found}) > 15
    assert shared  # a token would stand in both if they were cut together


def test_a_model_that_overflows_gives_null_and_says_so(plain):
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.lm_head.weight.data.fill_(float("nan"))
    tools = AutoTokenizer.from_pretrained(plain), model
    record = score.loss_record(data.Example("x", "the sum", "five"), *tools, 99)
    assert record["loss"] is None and record["why"] == "the loss is not finite"


@torch.no_grad()
def test_the_softmax_of_a_model_in_bfloat16_is_in_float32(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    record = score.loss_record(data.Example("x", "the sum", "is five"), tokenizer, model, 99)
    ids = tokenizer.encode("the sum\n\n")
    first = len(ids)
    ids += tokenizer.encode("is five", add_special_tokens=False)
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = [-logps[t - 1, ids[t]].item() for t in range(first, len(ids))]
    assert record["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_a_model_that_reads_fewer_tokens_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="--tokens 512"):
        score.main(loss_config(plain, tmp_path / "o.jsonl", tokens=600))


# ------------------------------------------------------------------ passes


def test_passes_are_those_of_each_problem_sampled_alone(mini, passes):
    tokenizer, settings = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(load_model(mini.model), tokenizer, settings)
    found = records_of(passes.out)
    problems = data.read_problems(mini.train)
    assert [r["id"] for r in found] == [p.id for p in problems]
    for problem, record in zip(problems, found, strict=True):
        wanted = Counter(samples=5)
        for sample in range(5):
            (rollout,) = [
                r for r in sampler.generate([problem], 5, 10, 1.0, (3,)) if r.sample == sample
            ]
            verdict = grade(problem.answer, rollout.text)
            wanted["passes"] += int(rollout.stopped and verdict.score)
            wanted["truncated"] += not rollout.stopped
            wanted["no_box"] += verdict.status in ("no_box", "unclosed")
            wanted["tokens"] += len(rollout.response_ids)
        wanted["tokens"] = round(wanted["tokens"] / 5, 1)
        assert record == {"id": problem.id} | {
            name: wanted[name] for name in record if name != "id"
        }
    assert 0 < sum(r["passes"] for r in found) < 60 and sum(r["truncated"] for r in found)


def rollout_of(problem: data.Problem, text: str, stopped: bool = True, tokens: int = 3):
    prompt = data.Prompt([1], [1], None, (), ())
    return score.Rollout(problem, 0, prompt, response_ids=[1] * tokens, stopped=stopped, text=text)


def test_a_try_that_was_cut_is_wrong_and_options_reach_the_matcher():
    problem = data.Problem("p", "?", "B", choices=("3", "4"))
    tries = [
        rollout_of(problem, r"\boxed{4}"),
        rollout_of(problem, r"\boxed{B}", tokens=6),
        rollout_of(problem, r"\boxed{3}"),
        rollout_of(problem, r"\boxed{B}", stopped=False),
        rollout_of(problem, r"\boxed{B", stopped=False),
    ]
    record = score.pass_record(problem, tries)
    assert record == dict(id="p", passes=2, samples=5, truncated=2, no_box=1, tokens=3.6)
    rounded = data.Problem("p", "?", "0.33", precision=2)
    assert score.pass_record(rounded, [rollout_of(rounded, r"\boxed{0.3333}")])["passes"] == 1


def test_a_prompt_that_is_too_long_is_not_tried_and_says_so(mini, passes, tmp_path):
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    problems = data.read_problems(mini.train)
    sizes = {p.id: len(data.encode_prompt(p.prompt, p.images, *tools).ids) for p in problems}
    limit = sorted(sizes.values())[5]
    cfg = replace(passes, out=str(tmp_path / "o.jsonl"), prompt_tokens=limit)
    score.main(cfg)
    nulls = {"passes": None, "why": f"prompt longer than {limit} tokens"}
    assert max(sizes.values()) > limit
    for record, tried in zip(records_of(cfg.out), records_of(passes.out), strict=True):
        name = record["id"]
        assert record == ({"id": name} | nulls if sizes[name] > limit else tried)


# ------------------------------------------------------------------ what came out


def test_each_source_is_summed_up_in_print_and_report(losses, capsys):
    score.main(losses)
    report = json.loads(beside(losses.out, "report.json").read_text())
    printed = capsys.readouterr().out
    sources = {row["id"]: row["source"] for row in records_of(losses.rows)}
    for source in ("a", "b"):
        mine = [r["loss"] for r in records_of(losses.out) if sources[r["id"]] == source]
        measured = [loss for loss in mine if loss is not None]
        mean = pytest.approx(sum(measured) / len(measured), abs=1e-4)
        about = {"rows": len(mine), "measured": len(measured), "mean": mean}
        assert report["loss"][source] == about
        assert re.search(rf"^{source} +{len(mine)} rows +{len(measured)} measured", printed, re.M)


# ------------------------------------------------------------------ kills, ranks, refusals


@pytest.mark.parametrize("first, last", [(0, 0), (5, 0), (7, 3), (15, 7), (23, 0), (4, 19)])
def test_a_run_that_was_cut_off_measures_what_is_missing_and_ends_with_the_same_bytes(
    losses, tmp_path, monkeypatch, first, last
):
    """Lines of two ranks, the first from the beginning, its last one torn, the second from the
    end."""
    lines, measured = Path(losses.out).read_text().splitlines(keepends=True), []
    texts = {0: "".join(lines[:first]) + "".join(lines[first : first + 1])[:17]}
    texts[3] = "".join(lines[23 - last :])
    measure = score.loss_record

    def noted(example, *tools):
        measured.append(example.id)
        return measure(example, *tools)

    monkeypatch.setattr(score, "loss_record", noted)
    cfg = begun(tmp_path, losses, texts)
    score.main(cfg)
    assert Path(cfg.out).read_bytes() == Path(losses.out).read_bytes()
    assert measured == [f"r{i}" for i in range(first, 23 - last)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"o.jsonl", "o.protocol.json", "o.report.json"}


def test_a_complete_run_loads_no_model(losses, monkeypatch):
    before = Path(losses.out).read_bytes()
    report, part = beside(losses.out, "report.json"), beside(losses.out, "rank1.part.jsonl")
    report.unlink()  # killed between the last rename and the end
    part.write_bytes(before[:50])
    monkeypatch.setattr(score, "loss_scorer", None)
    score.main(losses)
    assert Path(losses.out).read_bytes() == before
    assert report.exists() and not part.exists()


def test_records_of_another_setting_other_rows_or_weights_are_not_mixed(losses, passes):
    for cfg, changed in ((losses, {"tokens": 25}), (passes, {"seed": 4})):
        ((name, value),) = changed.items()
        match = f"another protocol \\({name} {getattr(cfg, name)!r} -> {value!r}\\)"
        with pytest.raises(ValueError, match=match):
            score.main(replace(cfg, **changed))
    note = beside(losses.out, "protocol.json")
    protocol = json.loads(note.read_text())
    for name in ("rows", "weights"):  # the hashes of both
        note.write_text(json.dumps(protocol | {name: "sha256 of what it was before"}))
        with pytest.raises(ValueError, match=f"another protocol \\({name} 'sha256 of .*'sha256 "):
            score.main(losses)
    note.write_text(json.dumps(protocol))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(out="o.json"), "o.json must be a .jsonl"),
        (dict(out="x/../r.jsonl"), "would be overwritten"),
        (dict(temperature=0.0), "8 greedy tries"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changed, message):
    base = dict(rows="r.jsonl", kind="passes", model="m", out="o.jsonl")
    with pytest.raises(ValueError, match=message):
        score.Config(**base | changed)


def every_other(world, count: int, key: str, dynamic: bool):
    """distributed.my_problems of which each rank surely gets some."""
    return range(world.rank, count, world.size)


def worker(folder: Path):
    faulthandler.dump_traceback_later(LIMIT, exit=True)  # says where it hangs
    cfgs = [score.Config(**given) for given in json.loads((folder / "cfgs.json").read_text())]
    world, finish = distributed.start(), distributed.finish
    distributed.finish = lambda world: None  # the next run uses the group again
    for cfg in cfgs:
        score.main(cfg)
        distributed.my_problems = every_other  # the first by the counter, which may deal all to one
    world.wait()
    finish(world)


def test_two_ranks_and_those_who_go_on_for_one_give_its_bytes(losses, passes, tmp_path):
    lines = Path(passes.out).read_text().splitlines(keepends=True)
    cfgs = [begun(tmp_path / "begun", passes, {0: "".join(lines[:6]) + lines[6][:20]})]
    cfgs += [begun(tmp_path / str(n), whole, {}) for n, whole in enumerate((losses, passes))]
    (tmp_path / "cfgs.json").write_text(json.dumps([asdict(cfg) for cfg in cfgs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, str(tmp_path)]
    finished(command, tmp_path, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, LIMIT)
    for cfg, whole in zip(cfgs, (passes, losses, passes), strict=True):
        assert Path(cfg.out).read_bytes() == Path(whole.out).read_bytes()
        assert not list(Path(cfg.out).parent.glob("*.part.jsonl"))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
