"""average.py against a mean taken by numpy, on checkpoints of a few random tensors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.average import INDEX, Config, average

SHAPES = {"model.embed_tokens.weight": (7, 4), "model.norm.weight": (4,), "visual.w": (2, 3, 2)}


def checkpoint(directory, seed, dtype=torch.float32, tied=False, cut=False, extra=None):
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} | (extra or {})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"tie_word_embeddings": tied, "seed": seed}))
    (directory / "tokenizer.json").write_text(f"tokenizer {seed}")
    (directory / "README.md").write_text(f"trained with seed {seed}")
    if not cut:
        save_file(tensors, directory / "model.safetensors")
        return tensors
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tensors


def load(directory):
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [False, True])
def test_the_average_is_the_mean_rounded_once(tmp_path, dtype, cut):
    paths = [tmp_path / name for name in "abc"]
    # the first is sharded or not, the last always the other way round
    members = [checkpoint(p, i, dtype, cut=cut ^ (i == 2)) for i, p in enumerate(paths)]
    average(tuple(map(str, paths)), str(tmp_path / "out"))
    got = load(tmp_path / "out")
    assert got.keys() == SHAPES.keys()
    for name in SHAPES:
        mean = np.mean([m[name].double().numpy() for m in members], axis=0)
        assert got[name].dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # half a unit in bf16's last place
        np.testing.assert_allclose(got[name].double().numpy(), mean, rtol=tolerance, atol=1e-7)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer 0"
    assert (tmp_path / "out" / INDEX).exists() == cut


def test_equal_members_come_back_bit_for_bit(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    member = [checkpoint(path, 0, torch.bfloat16) for path in paths][0]
    average(tuple(map(str, paths)), str(tmp_path / "out"))
    assert all(torch.equal(t, member[name]) for name, t in load(tmp_path / "out").items())


def test_the_card_names_the_members_and_is_not_the_first_ones(tmp_path):
    paths = [str(tmp_path / name) for name in "abc"]
    for seed, path in enumerate(paths):
        checkpoint(tmp_path / path, seed)
    average(tuple(paths), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "average of 3 checkpoints" in card and "trained with seed" not in card
    assert [line[2:] for line in card.splitlines() if line.startswith("- ")] == paths
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_a_tied_head_is_averaged_and_written_once(tmp_path):
    checkpoint(tmp_path / "a", 0, tied=True)
    checkpoint(tmp_path / "b", 1, tied=True, extra={"lm_head.weight": torch.zeros(7, 4)})
    average((str(tmp_path / "a"), str(tmp_path / "b")), str(tmp_path / "out"))
    assert load(tmp_path / "out").keys() == SHAPES.keys()


def test_a_member_that_does_not_fit_is_named(tmp_path):
    checkpoint(tmp_path / "a", 0)
    checkpoint(tmp_path / "more", 1, extra={"odd.weight": torch.zeros(2)})
    checkpoint(tmp_path / "wide", 1, extra={"visual.w": torch.zeros(2, 3, 3)})
    with pytest.raises(ValueError, match="more.*odd.weight"):
        average((str(tmp_path / "a"), str(tmp_path / "more")), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"wide: visual.w has shape \(2, 3, 3\)"):
        average((str(tmp_path / "a"), str(tmp_path / "wide")), str(tmp_path / "out"))


def test_no_member_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match="overwritten"):
        Config((str(tmp_path / "a"),), str(tmp_path / "b" / ".." / "a"))
