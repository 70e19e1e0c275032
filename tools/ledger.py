"""The ledger: every setting of both stages beside the paper's, every departure with its reason.

    name: type = default  # meaning; paper: X (sec. N); ours: why; laptop: why
    ──▶ | setting | what it is | paper | 7B | laptop | source and reason |

The words are the comments of coldstart.Config and rl.Config, the values their defaults and what
runs/ovr_7b.sh and runs/laptop.sh give. They are read from the files, so that nothing can drift.

    python -m tools.ledger [--write README.md]    # prints the page, or puts it between two markers
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- ledger -->", "<!-- /ledger -->"
# what is learnt hangs on RECIPE; the others are only how a run is executed and watched
RECIPE = """model data coldstart.replay epochs batch pack_tokens max_tokens prompt_tokens lr lr_end
    critic_lr warmup weight_decay beta1 beta2 clip dtype algorithm steps problems samples lengths
    length_from temperature critic_steps gamma lam epsilon value_init train_vision tis""".split()
EXECUTION = """out recompute compile shard_ranks valid valid_every save_every keep_last keep_every
    dump_minutes seed threads wandb sampler sampler_batch kv_cache_gb gap_limit share_prompts
    offload log_rollouts record trace rl.replay step""".split()
STAGES = {  # title, what no flag changes
    "coldstart": ("Stage 1: linguistic cold start", "the LLM alone trains, not tower or merger"),
    "rl": ("Stage 2: multimodal RL", "reward 1 if the last box is right, else 0; no KL term, no "
           "entropy bonus; policy and critic are two networks; one policy step a batch; "
           "advantages normalised over the batch; the mean of checkpoints is the final model"),
}  # fmt: skip
DEVIATIONS = (  # from, what, theirs, ours, why, where
    ("OVR", "value head starts at", "U(-sqrt 5, sqrt 5)", "N(0, 1/(d+1)), as in ORZ's code",
     "read literally, V starts off by 77 and the loss near 3,000", "rl.py:load_pair"),
    ("OVR", "4 critic steps a batch", "not said how", "one pass in 4 parts, as in ORZ's code",
     "four passes would cost four times as much", "rl.py:learn_critic"),
    ("OVR", "a response that is cut", "not said", "reward 0, nothing bootstrapped",
     "as in ORZ's code: a penalty that the curriculum relaxes", "rl.py:score_of"),
    ("OVR", "vision tower in stage 2", "not said", "frozen; `--train-vision` trains it",
     "it is frozen in stage 1", "parallel.py:load"),
    ("OVR", "sampling with top-p 1", "every token", "never those that stand for pictures",
     "a drawn one would ask for a picture that is not there", "rollout.py:draw_tokens"),
    ("OVR", "data", "2 M traces, 300 k problems", "its steps, with thresholds of ours",
     "the paper gives no thresholds", "curate.py:decide"),
    ("OVR", "behaviours while training", "GPT-4o counts", "a lexicon; `judge.py` asks a model",
     "free, at every step, and the same each time", "behaviors.py:find"),
    ("ORZ", "sampled responses", "tokenised again from text", "ids from sampler to loss",
     "encoding what was decoded is not the identity", "rollout.py:Rollout"),
    ("ORZ", "packs over the limit", "vanish", "an error that names the document",
     "the longest responses would go untrained", "packing.py:plan"),
    ("ORZ", "packs that ranks cannot share out", "copied at random; dropped for the critic",
     "fillers train nothing", "every rollout counts once", "data.py:filler_pack"),
    ("ORZ", "losses", "a mean for each pack", "one sum over the tokens of the step",
     "a token of a short last pack weighs up to 13.8 times the rest", "rl.py:learn_policy"),
    ("ORZ", "log-softmax", "in the logits' dtype", "float32", "bfloat16 is off by 0.02 on average",
     "model.py:chunked_logps"),
    ("ORZ", "advantages", "kept in bfloat16", "float32, summed in float64",
     "bfloat16 rounds to 8 bits", "rl.py:normalise"),
    ("ORZ", "values", "clipped at 0.2", "not clipped", "neither paper's equation has it",
     "rl.py:value_loss"),
    ("ORZ", "GRPO's division by std", "never: `std := np.std(x) > 0` is True", "by std",
     "a slip of theirs", "rl.py:group_advantages"),
    ("ORZ", "order of the data", "a resume begins at sample 0, epochs share a seed",
     "a function of (seed, step)", "a resumed run is the same run", "data.py:Stream.batch"),
    ("ORZ", "prompts that are too long", "cut from the right", "left out, with a count",
     "a cut prompt has lost its question", "data.py:filter_long"),
    ("ORZ", "matcher", "takes 12 for (1,2)", "reads both before it compares",
     "the policy finds every false positive", "reward.py:compare"),
    ("ORZ", "words of reflection", "by case", "in any case", "a sentence opens with a capital",
     "behaviors.py:find"),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    write: str = ""  # file with the two markers, rewritten between them; empty: print


def settings_of(root: Path, stage: str) -> dict[str, tuple[list[str], str, bool]]:
    """{setting: (default as it is written, comment, is it of the recipe?)} of a stage."""
    source = (root / f"{stage}.py").read_text(encoding="utf-8")
    (config,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == "Config")
    found = {}
    for node in (n for n in config.body if isinstance(n, ast.AnnAssign)):
        name, lines = node.target.id, source.splitlines()[node.lineno - 1 : node.end_lineno]
        parts = getattr(node.value, "elts", [node.value])  # of a tuple
        words = [ast.get_source_segment(source, part).strip('"') for part in parts]
        places = [not {name, f"{stage}.{name}"}.isdisjoint(x) for x in (RECIPE, EXECUTION)]
        if sum(places) != 1:
            raise ValueError(f"{stage}.py, {name}: name it in RECIPE or in EXECUTION of ledger.py")
        found[name] = words, " ".join(re.findall("  # (.*)", "\n".join(lines))), places[0]
    return found


def values_of(root: Path, stage: str, script: str) -> dict[str, list[str]]:
    """The settings of a run: the defaults, and over them what a script under runs/ gives."""
    text = (root / "runs" / script).read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*|\\\n", " ", text, flags=re.M)  # comments, ends of broken lines
    lines = re.findall(rf"(?:torchrun .*|stage {stage}) {stage}\.py (.*)", text)
    if len(lines) != 1:
        raise ValueError(f"runs/{script}: {len(lines)} lines start {stage}.py; it takes one")
    own = dict(re.findall(r"(?:^|\s)(\w+)=(?:\$\{\w+:-)?([\w./-]+)", text))  # its variables
    line = re.sub(r"\$(\w+)", lambda m: own.get(m[1], m[0]), lines[0])
    values = {name: words for name, (words, _, _) in settings_of(root, stage).items()}
    for flag, words in re.findall(r"--([\w-]+)((?: +(?!--)\S+)*)", line):
        if (name := flag.replace("-", "_")) not in values:
            raise ValueError(f"runs/{script} gives --{flag}, which {stage}.py does not have")
        values[name] = shlex.split(words) or ["True"]
    return values


def read_comment(comment: str) -> tuple[str, str, str]:
    """'meaning; paper: X (sec. N). Remark; ours: why' -> meaning, X, source and reason."""
    meaning, paper, why = [], "not said", []
    for part in comment.split("; "):
        if found := re.match(r'"?paper"?: (.+?)(?: \((sec\. .+?)\))?(?:\. (.+))?$', part):
            paper, section, remark = found.groups()
            why += [f"OVR {section or 'sec. 4.1'}", *filter(None, [remark])]
        else:
            is_why = re.match(r"(ours|laptop|7B|ORZ|Open-Reasoner-Zero|the paper)\b", part)
            (why if is_why else meaning).append(part)
    return "; ".join(meaning), paper, "; ".join(why) or "ours"


def show(word: str) -> str:
    if word.isdecimal() and int(word):
        return f"{int(word):,}" if int(word) % 4096 else f"{int(word) // 1024}k"
    said = {"True": "on", "False": "off", "": "none"}.get(word, word)
    return f"`{said}`" if re.search("[/$]", said) else said.removesuffix(".0")


def table(*rows: tuple[str, ...]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]


def generate(root: Path = ROOT) -> str:
    """The page, in markdown."""
    page = ["Written by `python -m tools.ledger --write README.md`; k is 1,024.", ""]
    for stage, (title, fixed) in STAGES.items():
        rows = [("setting", "what it is", "paper", "7B (ovr_7b.sh)", "laptop", "source, reason")]
        runs, others = [values_of(root, stage, script) for script in ("ovr_7b.sh", "laptop.sh")], []
        for name, (_, comment, in_recipe) in settings_of(root, stage).items():
            meaning, paper, why = read_comment(comment)
            values = (", ".join(map(show, run[name])) for run in runs)
            (rows if in_recipe else others).append((f"`{name}`", meaning, paper, *values, why))
        page += [f"### {title}", "", *table(*rows), f"As in the paper, no flag: {fixed}.", ""]
        names = ", ".join(row[0] for row in others)
        page += [f"Only how it runs (`python {stage}.py --help`): {names}.", ""]
    rows = [(*row, "[{0}]({0}) `{1}`".format(*where.split(":"))) for *row, where in DEVIATIONS]
    page += ["### Deviations", "", "OVR is the paper, ORZ Open-Reasoner-Zero's code.", ""]
    return "\n".join(page + table(("from", "what", "theirs", "here", "why", "where"), *rows))


def written(text: str) -> str:
    """The text with the page between its two markers; ValueError where it has none."""
    block = re.compile(f"(?<={BEGIN}\n).*(?={END})", re.S)
    text, found = block.subn(lambda _: generate(), text)
    if not found:
        raise ValueError(f"{BEGIN} and {END} are missing: put them there, a line each")
    return text


def main(cfg: Config):
    if not cfg.write:
        return print(generate())
    file = Path(cfg.write)
    file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
