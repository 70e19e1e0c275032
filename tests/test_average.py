"""average.py against a mean taken by numpy, and what it must not average."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import model as qwen
from miniature import base
from tools import average

TINY = replace(base.model_config(64), num_hidden_layers=1, intermediate_size=32)
NAN = torch.full((TINY.hidden_size,), torch.nan)
TIED = replace(TINY, tie_word_embeddings=True)
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def member(tmp_path):
    """Writes a random model, with changes {name: tensor or None}, as a directory; -> its path."""

    def write(name: str, seed: int, changes=(), config=TINY, dtype=torch.float32) -> str:
        torch.manual_seed(seed)
        weights = qwen.Qwen25VL(config).state_dict() | dict(changes)
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        (tmp_path / name).mkdir()
        qwen.save_weights(weights, config, tmp_path / name, dtype)
        (tmp_path / name / "tokenizer.json").write_text(f"tokenizer {seed}")
        return str(tmp_path / name)

    return write


def weights(directory) -> dict[str, torch.Tensor]:
    return {n: t for f in Path(directory).glob("*.safetensors") for n, t in load_file(f).items()}


def run(*models: str) -> Path:
    out = Path(models[0]).parent / "out"
    average.main(average.Config(models, str(out)))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_the_mean_rounded_once_however_members_are_cut(member, dtype):
    paths = [member(name, seed, dtype=dtype) for seed, name in enumerate("abc")]
    members = [weights(path) for path in paths]
    half = {name: members[2].pop(name) for name in [*members[2]][::2]}
    save_file(members[2], Path(paths[2]) / "model.safetensors")
    save_file(half, Path(paths[2]) / "more.safetensors")
    members[2] |= half
    mean = weights(out := run(*paths))
    assert mean.keys() == members[0].keys()
    for name, tensor in mean.items():
        exact = np.mean([m[name].double().numpy() for m in members], axis=0)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # half a unit in bf16's last place
        assert tensor.dtype == dtype
        np.testing.assert_allclose(tensor.double().numpy(), exact, rtol=tolerance, atol=1e-7)
    assert (out / "tokenizer.json").read_text() == "tokenizer 0"
    assert paths[2] in (out / "README.md").read_text()


def test_a_new_average_leaves_nothing_of_an_older_one_in_its_directory(member):
    out = run(member("a", 0), member("b", 1))
    (out / "model.safetensors").rename(out / "model-00001-of-00001.safetensors")
    assert run(*(member(name, 2, dtype=torch.bfloat16) for name in "cde")) == out
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    one = weights(out.parent / "c")  # and equal members come back bit for bit
    assert all(torch.equal(tensor, one[name]) for name, tensor in weights(out).items())


def test_a_tied_head_is_averaged_and_written_once(member):
    embedding = torch.zeros(64, TIED.hidden_size)
    twice = member("b", 1, {HEAD: embedding.clone(), EMBEDDING: embedding}, TIED)
    assert HEAD in weights(twice) and HEAD not in weights(run(member("a", 0, config=TIED), twice))


@pytest.mark.parametrize(
    "match, options",
    [
        (f"other.model.safetensors: {NORM} has NaN", {"changes": {NORM: NAN}}),
        (f"other.*missing {NORM}", {"changes": {NORM: None}}),
        ("other.*rope_theta 10.0 instead of 1000000", {"config": replace(TINY, rope_theta=10.0)}),
        ("other.*intermediate_size 48", {"config": replace(TINY, intermediate_size=48)}),
    ],
)  # fmt: skip
def test_a_member_that_does_not_belong_is_named_and_nothing_is_written(member, match, options):
    good = member("good", 0)
    with pytest.raises(ValueError, match=match):
        run(good, member("other", 1, **options))
    assert not (Path(good).parent / "out").exists()


def test_no_member_counts_twice_and_none_is_overwritten():
    with pytest.raises(ValueError, match="twice"):
        average.Config(("a/b", "a/./c/../b"), "out")
    with pytest.raises(ValueError, match="/a twice"):
        average.Config(("a", "b"), "c/../a")
