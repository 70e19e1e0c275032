"""score.py: its figures against naive loops, its bytes against kills and ranks.

    pytest tests/test_score.py       # starts itself under torchrun

The plain model is a Qwen2 of random weights and a byte-level BPE of a few merges, so that tokens
would grow over the boundary of prompt and response if they could.
"""

import faulthandler
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import finished, write_rows
from tokenizers import ByteLevelBPETokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import data, distributed
from common.log import beside
from curation import score
from model import load_model
from reward import grade
from rollout import TorchSampler

LIMIT = 300  # seconds; a start takes about 10, and ten times that on a busy machine
WORDS = "so the sum of two and three is five , wait , let me check again :".split()


def sentence(i: int, words: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (i + 1)) % len(WORDS)] for k in range(words))


def text_rows() -> list[dict]:
    """Of many lengths; some responses begin with what a tokenizer would join to the prompt."""
    rows = []
    for i in range(23):
        row = {"id": f"r{i}", "source": "ab"[i % 2]}
        row["prompt"] = sentence(i + 3, 40 if i == 11 else 2 + i % 9)
        row["response"] = "\n" * (i % 3) + sentence(i, 1 + (i * 5) % 17) + f" \\boxed{{{i}}}"
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """Directory of a causal LM with a token before every text, as Llama has one."""
    directory, inner = tmp_path_factory.mktemp("plain"), ByteLevelBPETokenizer()
    texts = [" ".join(WORDS), "\n\n\n", "\n\n\n\n"] * 9
    inner.train_from_iterator(texts, vocab_size=340, special_tokens=["<s>"], show_progress=False)
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    inner.save(str(directory / "bpe.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "bpe.json"), bos_token="<s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3)
    config = AutoConfig.for_model("qwen2", vocab_size=inner.get_vocab_size(), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return str(directory)


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
    folder = tmp_path_factory.mktemp("loss")
    rows, out = write_rows(folder / "rows.jsonl", text_rows()), str(folder / "x.losses.jsonl")
    cfg = score.Config(rows=rows, kind="loss", model=plain, out=out, tokens=30, chunk=5)
    score.main(cfg)
    return cfg


@pytest.fixture(scope="module")
def passes(mini, tmp_path_factory) -> score.Config:
    out = str(tmp_path_factory.mktemp("passes") / "x.passes.jsonl")
    long = {"id": "long", "source": "mini/text", "prompt": "good . " * 32, "answer": "1"}
    place = Path(mini.train).parent / "passes.jsonl"  # beside the pictures
    rows = write_rows(place, [long, *records_of(mini.train)])
    small = dict(samples=5, max_tokens=10, prompt_tokens=64, sampler_batch=15, chunk=5, seed=3)
    cfg = score.Config(rows=rows, kind="passes", model=mini.model, out=out, **small)
    score.main(cfg)
    return cfg


def naive_nats(tokenizer, model, row: dict, limit: int) -> tuple[int, list[float]]:
    """(tokens of the prompt, of each response token -log p), prompt and response cut apart."""
    prompt = tokenizer.encode(row["prompt"] + "\n\n")
    ids = (prompt + tokenizer.encode(row["response"], add_special_tokens=False))[:limit]
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return len(prompt), [-logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_response_cut_into_tokens_apart(plain, losses):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    found, rows, cut, shared = records_of(losses.out), records_of(losses.rows), 0, 0
    assert [r["id"] for r in found] == [r["id"] for r in rows]
    for row, record in zip(rows, found, strict=True):
        prompt, whole = naive_nats(tokenizer, model, row, 999)
        nats = naive_nats(tokenizer, model, row, losses.tokens)[1]
        together = tokenizer.encode(row["prompt"] + "\n\n" + row["response"])
        shared += len(together) < prompt + len(whole)
        cut += len(nats) < len(whole)
        assert record["tokens"] == len(nats)
        if nats:
            assert record["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)
        else:
            assert record["loss"] is None and f"prompt of {prompt} tokens" in record["why"]
    assert cut > sum(r["loss"] is None for r in found) > 0  # both were met
    assert shared  # a token would stand in both if they were cut together
    report = json.loads(beside(losses.out, "report.json").read_text())["loss"]
    for source, mine in (("a", found[::2]), ("b", found[1::2])):
        known = [record["loss"] for record in mine if record["loss"] is not None]
        mean = pytest.approx(sum(known) / len(known), abs=1e-4)
        assert report[source] == {"rows": len(mine), "measured": len(known), "mean": mean}


@torch.no_grad()
def test_a_model_that_overflows_gives_null_and_the_softmax_of_one_in_bfloat16_is_in_float32(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    example = data.Example("x", "the sum", "is five")
    _, nats = naive_nats(tokenizer, model, vars(example), 99)
    record = score.loss_record(example, tokenizer, model, 99)
    assert record["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    model.lm_head.weight.data.fill_(float("nan"))
    record = score.loss_record(example, tokenizer, model, 99)
    assert record["loss"] is None and record["why"] == "the loss is not finite"


def test_passes_are_those_of_each_problem_sampled_alone_but_of_too_long_a_prompt(mini, passes):
    tools = data.load_tokenizer(mini.model), data.load_image_settings(mini.model)
    sampler = TorchSampler(load_model(mini.model), *tools)
    long, *found = records_of(passes.out)
    assert long == {"id": "long", "passes": None, "why": "prompt longer than 64 tokens"}
    for problem, record in zip(data.read_problems(mini.train), found, strict=True):
        rollouts = sampler.generate([problem], 5, 10, 1.0, (3,))
        verdicts = [grade(problem.answer, rollout.text) for rollout in rollouts]
        right = [r.stopped and v.score == 1 for r, v in zip(rollouts, verdicts, strict=True)]
        wanted = {"id": problem.id, "passes": sum(right), "samples": 5}
        wanted["truncated"] = sum(not rollout.stopped for rollout in rollouts)
        wanted["no_box"] = sum(verdict.status in ("no_box", "unclosed") for verdict in verdicts)
        wanted["tokens"] = sum(len(rollout.response_ids) for rollout in rollouts) / 5
        assert record == wanted
    assert 0 < sum(r["passes"] for r in found) < 60 and sum(r["truncated"] for r in found)


def test_a_try_that_was_cut_is_wrong_and_options_reach_the_matcher():
    said = [(r"\boxed{4}", True), (r"\boxed{B}", True), (r"\boxed{3}", True)]
    said += [(r"\boxed{B}", False), (r"\boxed{B", False)]
    prompt, problem = data.Prompt([1], [1], None, (), ()), data.Problem("p", "?", "B")
    tries = [
        score.Rollout(problem, i, prompt, response_ids=[1] * i, stopped=stopped, text=text)
        for i, (text, stopped) in enumerate(said)
    ]
    record = score.pass_record(replace(problem, choices=("3", "4")), tries)
    assert record == dict(id="p", passes=2, samples=5, truncated=2, no_box=1, tokens=2.0)
    tries[0].text = r"\boxed{0.3333}"
    rounded = replace(problem, answer="0.33", precision=2)
    assert score.pass_record(rounded, tries)["passes"] == 1


@pytest.mark.parametrize("first, last", [(5, 0), (7, 3), (4, 19)])
def test_a_run_that_was_cut_off_measures_what_is_missing_and_ends_with_the_same_bytes(
    losses, tmp_path, monkeypatch, first, last
):
    """Lines of two ranks, the first from the beginning, its last one torn, the second from the
    end."""
    lines = Path(losses.out).read_text().splitlines(keepends=True)
    torn = "".join(lines[:first]) + lines[first][:17]
    cfg = begun(tmp_path, losses, {0: torn, 3: "".join(lines[23 - last :])})
    monkeypatch.setattr(score, "loss_record", Mock(wraps=score.loss_record))
    score.main(cfg)
    assert Path(cfg.out).read_bytes() == Path(losses.out).read_bytes()
    measured = [call.args[0].id for call in score.loss_record.call_args_list]
    assert measured == [f"r{i}" for i in range(first, 23 - last)]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"o.jsonl", "o.protocol.json", "o.report.json"}


def test_a_complete_run_loads_no_model(losses, monkeypatch):
    before = Path(losses.out).read_bytes()
    report, part = beside(losses.out, "report.json"), beside(losses.out, "rank1.part.jsonl")
    report.unlink()  # killed between the last rename and the end
    part.write_bytes(before[:50])
    monkeypatch.setattr(score, "scorer", None)
    score.main(losses)
    assert Path(losses.out).read_bytes() == before
    assert report.exists() and not part.exists()


def test_records_of_another_setting_other_rows_or_weights_are_not_mixed(losses, passes):
    for cfg, name in ((losses, "tokens"), (losses, "rows"), (losses, "weights"), (passes, "seed")):
        note = beside(cfg.out, "protocol.json")
        protocol = note.read_text()
        note.write_text(json.dumps(json.loads(protocol) | {name: "before"}))
        with pytest.raises(ValueError, match=f"another protocol \\({name} 'before' -> ['0-9]"):
            score.main(cfg)
        note.write_text(protocol)


def test_what_makes_no_sense_is_refused(losses, passes, tmp_path):
    with pytest.raises(ValueError, match="would be overwritten"):
        replace(losses, out=f"{Path(losses.rows).parent}/./rows.jsonl")
    with pytest.raises(ValueError, match="5 greedy tries"):
        replace(passes, temperature=0.0)
    with pytest.raises(ValueError, match="--tokens 512"):  # all that the model reads
        score.main(replace(losses, out=str(tmp_path / "o.jsonl"), tokens=600))
    with pytest.raises(ValueError, match="is no causal LM of text"):
        score.main(replace(losses, out=str(tmp_path / "o.jsonl"), model=passes.model))
    with pytest.raises(ValueError, match="--chunk counts from 1"):
        replace(losses, chunk=0)


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
    finished([*command, "--nproc-per-node=2", __file__, str(tmp_path)], tmp_path, {}, LIMIT)
    for cfg, whole in zip(cfgs, (passes, losses, passes), strict=True):
        assert Path(cfg.out).read_bytes() == Path(whole.out).read_bytes()
        assert not list(Path(cfg.out).parent.glob("*.part.jsonl"))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
