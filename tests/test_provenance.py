"""provenance.py: what a run and an exported model say of where they came from."""

import ast
import dataclasses
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass

import huggingface_hub
import pytest

from common import provenance
from common.log import RunLog
from common.provenance import fingerprint, fingerprints, model_card


@dataclass(frozen=True)
class Config:
    lr: float = 1e-4
    wandb: str = ""


@dataclass(frozen=True)
class Training(Config):
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    data: str = "train.jsonl"
    replay: str = ""
    lengths: tuple[int, ...] = (24576, 32768)
    note: str = "a | b\nc"


def test_a_fingerprint_is_of_the_bytes_not_of_their_date(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    before = fingerprint(file)
    assert before == f"sha256 {digest}, 2 lines, 18 bytes"
    os.utime(file, (1, 1))
    assert fingerprint(file) == before
    file.write_text('{"a": 1}\n{"a": 3}')
    assert fingerprint(file) != before and "2 lines, 17 bytes" in fingerprint(file)


def test_a_fingerprint_is_the_same_in_blocks(tmp_path, monkeypatch):
    file = tmp_path / "train.jsonl"
    file.write_bytes(bytes(range(256)) * 40)
    whole = fingerprint(file)
    monkeypatch.setattr(provenance, "BLOCK", 1000)
    monkeypatch.setattr(provenance, "QUIET_BYTES", 0)  # with a progress bar
    assert fingerprint(file) == whole and " 41 lines" in whole


def test_the_fingerprint_of_a_directory_is_of_names_and_bytes(tmp_path):
    (tmp_path / "b").mkdir()
    files = {"train.jsonl": b"{}\n", "b/1.png": b"png", "b.txt": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    listing = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    digest = hashlib.sha256("".join(listing).encode()).hexdigest()
    assert fingerprint(tmp_path) == f"sha256 {digest}, 3 files, 6 bytes"
    (tmp_path / "b/1.png").rename(tmp_path / "b/2.png")
    assert digest not in fingerprint(tmp_path)


def test_a_hub_id_is_not_hashed_and_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint("open-thoughts/OpenThoughts-114k") == "hub id, not hashed"
    for missing in ("data/train.jsonl", "train", "/a/b/c"):
        with pytest.raises(FileNotFoundError, match=missing):
            fingerprint(missing)
    (tmp_path / "data/set").mkdir(parents=True)
    assert "0 files" in fingerprint("data/set")  # looks like a hub id, and is a directory


def test_run_json_tells_the_data_of_a_run(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("{}\n")
    config = Training(data=str(file), replay="owner/replayed")
    RunLog(tmp_path / "run", config, steps=1).close()
    about = json.loads((tmp_path / "run/run.json").read_text())
    expected = {str(file): fingerprint(file), "owner/replayed": "hub id, not hashed"}
    assert about["data"] == expected == fingerprints(config)
    assert fingerprints(Training(data=str(file))) == {str(file): fingerprint(file)}
    assert fingerprints(Config()) == {}


def test_a_model_card_holds_the_recipe_and_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_commit", lambda: {"hash": "c0ffee", "dirty": True})
    file = tmp_path / "train.jsonl"
    file.write_text("{}\n")
    config, run = Training(data=str(file)), tmp_path / "run"
    RunLog(run, config, steps=1).close()
    about = json.loads((run / "run.json").read_text())
    monkeypatch.setattr(sys, "argv", ["another.py"])  # the card tells of the run, not of now
    card = model_card("OVR: step 60", config, "my model", run, 4096, {"reward": 0.71})
    read = huggingface_hub.ModelCard(card)
    assert read.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    table = dict(re.findall(r"^\| (.*?) \| (.*) \|$", read.content, flags=re.M))
    for name, value in dataclasses.asdict(config).items():
        shown = r"a \| b c" if name == "note" else str(value)
        assert table[f"`{name}`"] == shown
    assert table[str(file)] == fingerprint(file) and table["reward"] == "0.71"
    assert "# OVR: step 60" in card and "c0ffee with uncommitted changes" in card
    assert about["command"] in card and f"torch {about['versions']['torch']}" in card
    assert "vllm serve 'my model' --generation-config vllm --max-model-len 4096\n" in card
    assert "$" not in card
    python = re.search(r"```python\n(.*?)```", card, flags=re.S)[1]
    assert '"my model"' in ast.unparse(ast.parse(python)).replace("'", '"')


def test_a_model_card_claims_no_base_and_no_commit_that_it_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_commit", lambda: None)
    card = model_card("OVR", Training(model=str(tmp_path), data="owner/rows"), tmp_path)
    assert "base_model" not in card and "Commit unknown" in card and "--max-model-len" not in card
    assert "| owner/rows | hub id, not hashed |" in card


def test_what_changed_is_named_with_both_values():
    assert provenance.changes({"k": 1, "seed": 0}, {"k": 2, "seed": 0, "url": ""}) == [
        "k 1 -> 2",
        "url None -> ''",
    ]
    assert provenance.changes({"k": 1}, {"k": 1}) == []


def test_a_step_of_stage_0_says_what_it_made_of_which_files(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("{}\n{}\n")
    out = tmp_path / "out.jsonl"
    out.write_text("{}\n")
    counts = {"rules": {"s": {"in": 2, "kept": 1, "reasons": {"leak": 1}}}}
    provenance.write_report(out, Config(), [tmp_path / "raw" / "a.jsonl"], counts, cost=1.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.report.json", "raw"]
    report = json.loads((tmp_path / "out.report.json").read_text())
    digest = hashlib.sha256(b"{}\n{}\n").hexdigest()
    assert report["inputs"] == {"raw/a.jsonl": f"sha256 {digest}, 2 lines, 6 bytes"}
    assert report["output"]["out.jsonl"].endswith("1 lines, 3 bytes")
    assert report["steps"] == counts and report["cost"] == 1.5
    assert provenance.beside(out, "dropped.jsonl") == tmp_path / "out.dropped.jsonl"
