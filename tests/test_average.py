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
        qwen.save_weights(weights, config, tmp_path / name, dtype)
        (tmp_path / name / "tokenizer.json").write_text(f"tokenizer {seed}")
        return str(tmp_path / name)

    return write


def run(*models: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """-> the average's directory and weights."""
    out = Path(models[0]).parent / "out"
    average.main(average.Config(models, str(out)))
    return out, load_file(out / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_the_mean_rounded_once_however_members_are_cut(member, dtype):
    paths = [member(name, seed, dtype=dtype) for seed, name in enumerate("abc")]
    members = [load_file(f"{path}/model.safetensors") for path in paths]
    names = [*members[2]]
    for file, part in (("model", names[::2]), ("more", names[1::2])):
        save_file({name: members[2][name] for name in part}, f"{paths[2]}/{file}.safetensors")
    out, mean = run(*paths)
    assert mean.keys() == members[0].keys()
    for name, tensor in mean.items():
        exact = np.mean([m[name].double().numpy() for m in members], axis=0)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # half a unit in bf16's last place
        assert tensor.dtype == dtype
        np.testing.assert_allclose(tensor.double().numpy(), exact, rtol=tolerance, atol=1e-7)
    assert (out / "tokenizer.json").read_text() == "tokenizer 0"
    assert paths[2] in (out / "README.md").read_text()


def test_a_new_average_leaves_nothing_of_an_older_one_in_its_directory(member):
    out, _ = run(member("a", 0), member("b", 1))
    (out / "model.safetensors").rename(out / "model-00001-of-00002.safetensors")  # as if sharded
    _, mean = run(*(member(name, 2, dtype=torch.bfloat16) for name in "cde"))
    assert [file.name for file in out.glob("*.safetensors*")] == ["model.safetensors"]
    one = load_file(out.parent / "c/model.safetensors")  # and equal members come back bit for bit
    assert all(torch.equal(tensor, one[name]) for name, tensor in mean.items())


def test_a_tied_head_is_averaged_and_written_once(member):
    embedding = torch.zeros(64, TIED.hidden_size)
    twice = member("b", 1, {HEAD: embedding.clone(), EMBEDDING: embedding}, TIED)
    assert HEAD not in run(member("a", 0, config=TIED), twice)[1]


@pytest.mark.parametrize(
    "match, options",
    [
        (f"model.safetensors: {NORM}", {"changes": {NORM: NAN}}),
        (f"missing {NORM}", {"changes": {NORM: None}}),
        ("rope_theta 10.0 instead of 1000000", {"config": replace(TINY, rope_theta=10.0)}),
    ],
)  # fmt: skip
def test_a_member_that_does_not_belong_is_named_and_nothing_is_written(member, match, options):
    good = member("good", 0)
    with pytest.raises(ValueError, match=f"other.*{match}"):
        run(good, member("other", 1, **options))
    assert not (Path(good).parent / "out").exists()


@pytest.mark.parametrize(
    "models, out, match",
    [
        (["a/b", "a/./c/../b"], "c", "/a/b twice"),
        (["a", "b"], "c/../a", "/a twice"),
        (["a", "b"], str(Path(__file__).parent), "is no model directory"),  # of other files
    ],
)
def test_no_member_counts_twice_and_none_nor_other_files_are_overwritten(models, out, match):
    with pytest.raises(ValueError, match=match):
        average.Config(models, out)
