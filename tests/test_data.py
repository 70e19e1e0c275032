"""data.py against naive references, the official image processor and the real tokenizer."""

import io
import json
import logging
import random
import re
import shutil
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as official

from common import data, distributed
from common.data import Example, ImageSettings, Problem, Stream
from miniature import world
from model import config_json, read_config

REAL = Path(__file__).resolve().parents[2] / "shared/qwen2_5_vl"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SETTINGS = ImageSettings(3136, 12_845_056, 14, 2, 2, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    world.save_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    return data.load_tokenizer(folder)


def picture(width, height, mode="RGB", seed=0):
    """Noise, also in what is transparent."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    made = Image.fromarray(pixels[..., :3]).convert(mode)
    if mode in ("RGBA", "LA"):
        made.putalpha(Image.fromarray(pixels[..., 3]))
    return made


def write_jsonl(folder, *rows):
    """Rows as dicts, or as the bytes of a line."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "train.jsonl"


def row(**changes):
    return {"id": "a", "prompt": "what is 1 + 2 ?", "answer": "3"} | changes


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_rows_become_problems_and_examples_and_other_columns_are_named(tmp_path, capsys):
    picture(30, 30).save(tmp_path / "p.png")
    more = dict(twin=[4], precison=1, image="p.png", system=None, videos=[], response="r")
    full = row(id="b", images=["p.png"], source="s", choices=["x", 2], precision=1, **more)
    path = write_jsonl(tmp_path, row(), b"", full)
    problems = data.read_problems(path)
    plain, whole = problems
    assert plain == Problem("a", "what is 1 + 2 ?", "3") and plain.place == f"{path}, line 1"
    image = str(tmp_path / "p.png")
    assert whole == Problem("b", "what is 1 + 2 ?", "3", (image,), "s", ("x", "2"), 1.0, more)
    assert whole.place == f"{path}, line 3"
    assert len(problems) == 2 and list(problems[1:]) == [whole]
    assert capsys.readouterr().out.endswith(": image, precison, twin\n")

    line = {"id": 7, "prompt": "é <b>\u2028\r", "response": "x", "source": None, "images": None}
    (example,) = data.read_examples(write_jsonl(tmp_path, line))
    assert example == Example("7", "é <b>\u2028\r", "x") and not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"line 1: column 'response' contains <\|im_end\|>"):
        data.read_examples(write_jsonl(tmp_path, line | {"response": "y<|im_end|>"}))


DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_ROWS = [
    (b'{"id": 1', "not JSON"),
    ([1, 2], "must be an object"),
    ({"prompt": "x"}, "'answer' is missing"),
    (row(answer=["3"]), "'answer' is neither text nor a number: ['3']"),
    (row(answer=float("nan")), "text nor a number: nan"),
    (row(prompt="  \n"), "'prompt' is empty"),
    (row(images=["gone.png"]), "image 'gone.png' does not exist; paths are relative to"),
    (row(choices="AB"), "'choices' must be a list"),
    (row(precision="2"), "'precision' must be a number"),
    (row(images=["p.png"] * 2, prompt="<image>"), "1 markers <image> for 2 images; write"),
    (row(prompt="see <|image_pad|>"), "contains <|image_pad|>"),
    # half a character: in a text, in a column nobody reads, not escaped
    (b'{"prompt": "bad \\ud83d here", "answer": "1"}', "'\\ud83d' in position 16"),
    (b'{"prompt": "x", "answer": "1", "more": [{"a": "\\ud83d"}]}', "'\\ud83d'"),
    (b'{"prompt": "x \xed\xa0\xbd", "answer": "1"}', "not JSON"),
    # what could break out of the checks
    (b'{"prompt": "x", "answer": ' + DEEP + b"}", "not JSON"),
    (row(images=[3]), "does not exist"),
    (row(images=["data:image/png;base64," + "A" * 100_000]), "does not exist"),
    (row(images=[{"bytes": "iVBORw0KGgo="}]), "damaged picture"),
    (row(images=["cut.png"]), "cut.png: damaged picture"),
    (row(images=["grey.png"]), "grey.png: damaged picture (mode I;16, which would turn white"),
    (row(images=["float.tiff"]), "float.tiff: damaged picture (mode F, which would turn white"),
    (row(images=["thin.png"]), "thin.png: damaged picture (2 x 500 px: aspect ratio > 200)"),
    # columns that would be lost without a word
    (row(image="p.png", images=[]), "'image' is not read: --columns images=image, if these"),
    (row(Decoded_Imgs=["p.png"]), "or extra_Decoded_Imgs=Decoded_Imgs, if the question"),
    (row(system="Be brief."), "'system' is not read"),
    (row(videos=["v.mp4"], images=["p.png"]), "'videos' is not read"),
    (row(id="first"), "the id 'first' is also that of"),
]


@pytest.mark.parametrize("bad, says", BAD_ROWS)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path, bad, says):
    picture(30, 30).save(tmp_path / "p.png")
    picture(2, 500).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "p.png").read_bytes()[:-600])
    for name, kind in (("grey.png", np.uint16), ("float.tiff", np.float32)):
        Image.fromarray(np.full((20, 20), 300, kind)).save(tmp_path / name)
    path = write_jsonl(tmp_path, row(id="first"), b"", bad, row(id="last"))  # blank lines count
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        data.read_problems(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and says in message
    assert "\n" not in message and len(message) < 600


def test_each_process_checks_its_share_and_reads_every_row(tmp_path):
    answers = [1, "x", 12345678901234567890, ["no"], 0.5]  # numbers here and text there
    path = write_jsonl(tmp_path, *(row(id=i, answer=a) for i, a in enumerate(answers)))
    for share in ((0, 2), (8, 9)):  # more processes than rows
        rows = data.read_problems(path, share=share)
        assert [rows[i].answer for i in (0, 2, 4)] == ["1", "12345678901234567890", "0.5"]
    with pytest.raises(ValueError, match="line 4: column 'answer' is neither"):
        data.read_problems(path, share=(1, 2))


def test_an_id_that_another_process_has_read_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path, row(id="a"), row(id="b"), row(id="a"), row(id="c"))
    monkeypatch.setattr(distributed, "everyone", lambda ids: [{"a": 0, "c": 3}, ids])
    with pytest.raises(ValueError, match="line 1: the id 'a' is also that of .*, line 3; make"):
        data.read_problems(path, share=(2, 4))


def test_columns_of_other_names_are_mapped_and_rows_without_an_id_are_numbered(tmp_path):
    plain = {"问题": "1?", "solution": 2, "answer": "?"}
    rare = {"问题": "2?", "solution": 2, "options": ["x", "y"], "system": "s"}  # checked by others
    path = write_jsonl(tmp_path, plain, rare)
    columns = ("prompt=问题", "answer=solution", "extra_system=system", "choices=options")
    problems = data.read_problems(path, columns=columns, share=(0, 2))
    options = Problem("row-1", "2?", "2", choices=("x", "y"), extra={"extra_system": "s"})
    assert list(problems) == [Problem("row-0", "1?", "2"), options]
    for wrong in ("images=pics", "prompt"):
        with pytest.raises(ValueError, match=f"--columns {wrong}=?: no row has a column"):
            data.read_problems(path, columns=(*columns, wrong))


def test_parquet_gives_the_same_problems_with_pictures_as_files_or_inside(tmp_path, no_cache):
    images = [picture(40, 30, seed=s) for s in range(3)]
    images[1].save(tmp_path / "p.png")
    rows = [row(id=str(i), images=["p.png"], level=i) for i in range(5)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    problems = data.read_problems(tmp_path / "rows.parquet")
    assert list(problems) == list(data.read_problems(write_jsonl(tmp_path, *rows)))
    assert problems[4].place == f"{tmp_path}/rows.parquet, row 4"

    features = {name: datasets.Value("string") for name in row()}
    features["images"] = datasets.List(datasets.Image())
    rows = [row(images=images[:2]), row(id="b", images=images[2:]), row(id="c", images=[])]
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    table.select([0]).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    problems = data.read_problems(tmp_path / "set")  # its train split
    assert [len(p.images) for p in problems] == [2, 1, 0]
    assert np.array_equal(np.asarray(problems[0].images[1]), np.asarray(images[1]))


def test_a_source_that_is_not_there_is_named(tmp_path, monkeypatch, no_cache):
    (tmp_path / "rows.csv").write_text("no\n")
    for source in (tmp_path / "rows.csv", "nowhere/rows.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"{source}"):
            data.read_problems(source)
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=ConnectionError("no network")))
    with pytest.raises(FileNotFoundError, match="owner/name: neither .*no network"):
        data.read_problems("owner/name")


def official_patches(image, max_pixels=SETTINGS.max_pixels):
    size = {"shortest_edge": SETTINGS.min_pixels, "longest_edge": max_pixels}
    made = official.Qwen2VLImageProcessorPil(size=size)(images=[image], return_tensors="np")
    return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())


SIZES = [(640, 480), (333, 777), (1000, 13), (1, 1), (5, 700), (84, 56)]
SIZES += [(42, 70), (98, 126), (1, 200), (2600, 13)]  # halves are rounded to even
CASES = [(*size, "RGB", SETTINGS.max_pixels) for size in SIZES]
CASES += [(2000, 1500, "RGB", 200_704), (2999, 31, "RGB", 50_176)]
CASES += [(300, 200, mode, 50_176) for mode in ("L", "LA", "RGBA", "P", "1", "CMYK")]


@pytest.mark.parametrize("width, height, mode, max_pixels", CASES)
def test_patches_equal_the_official_processor_bit_for_bit(width, height, mode, max_pixels):
    image = picture(width, height, mode)
    patches, grid = data.image_patches(image, replace(SETTINGS, max_pixels=max_pixels))
    expected, expected_grid = official_patches(image, max_pixels)
    assert image.mode == mode and grid == expected_grid
    assert patches.dtype == torch.float32 and np.array_equal(patches.numpy(), expected)


def exif(*fields):
    """Of (tag, type, count, 4 bytes): fields as a camera writes them, or as it should not."""
    head = b"II*\0" + struct.pack("<IH", 8, len(fields))
    return b"Exif\0\0" + head + b"".join(struct.pack("<HHI4s", *f) for f in fields) + bytes(4)


SIDEWAYS = (0x0112, 3, 1, b"\6\0\0\0")
BROKEN = [(0x0100, 1, 1, b"abc\0"), (0x011A, 2, 1, b"abc\0")]  # struct.error, TypeError of pillow


@pytest.mark.parametrize("fields", [(SIDEWAYS,), *((SIDEWAYS, field) for field in BROKEN)])
def test_a_rotated_photograph_is_turned_upright_whatever_else_its_camera_wrote(tmp_path, fields):
    file = tmp_path / "p.jpg"
    picture(120, 60).save(file, exif=exif(*fields))
    stored = np.asarray(Image.open(file))  # pillow does not turn it
    assert np.array_equal(np.asarray(data.load_image(str(file))), np.rot90(stored, -1))
    assert data.image_patches(str(file), SETTINGS)[1] == (1, 8, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AVIF", "PNG", "JPEG", "WEBP", "TIFF"])
def test_whatever_is_damaged_in_a_picture_the_error_names_it(kind):
    picture(64, 48).save(file := io.BytesIO(), kind)
    whole = 0
    for seed in range(60):
        rng, damaged = random.Random(seed), bytearray(file.getvalue())
        for _ in range(rng.choice((1, 3))):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        try:
            data.image_patches(io.BytesIO(damaged), SETTINGS, "row 7")
            whole += 1
        except ValueError as error:
            assert re.match("row 7: .*: damaged picture [(]", str(error))
    assert whole < 60  # of AVIF 27 of the others are RuntimeErrors of its decoder


def asked(prompt: str, *images) -> data.Problem:
    return data.Problem("row-7", prompt, "", images)


def test_pictures_stand_at_their_markers_or_before_the_text(tokenizer):
    two = [picture(84, 56), picture(56, 56)]  # of 6 and 4 tokens
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    for words, shown in (
        ("look <image> at <image> so", f"look {image} at {image} so"),
        ("look at", f"{image} {image} look at"),
    ):
        prompt = data.encode_prompt(asked(words, *two), tokenizer, SETTINGS)
        turn = f"<|im_start|> user {shown} <|im_end|> <|im_start|> assistant".split()
        assert tokenizer.decode(prompt.short_ids).split() == turn
        first, second = (i for i, token in enumerate(turn) if token == "<|image_pad|>")
        turn[second : second + 1] = ["<|image_pad|>"] * 4
        turn[first : first + 1] = ["<|image_pad|>"] * 6
        assert tokenizer.decode(prompt.ids).split() == turn
        assert prompt.offsets == (first, second + 5)
        assert prompt.grids == ((1, 4, 6), (1, 4, 4)) and prompt.patches.shape == (40, 1176)
        assert torch.equal(prompt.patches[:24], data.image_patches(two[0], SETTINGS)[0])


def test_a_prompt_that_the_model_cannot_read_is_an_error_that_names_the_row(tokenizer, monkeypatch):
    for token in data.MARKUP:
        with pytest.raises(ValueError, match=re.escape(f"row-7 contains {token}")):
            data.encode_prompt(asked(f"look {token}"), tokenizer, None)
    for encode in (data.encode_prompt, data.prompt_length):
        with pytest.raises(ValueError, match="row-7: embedded .*2010 x 10 px: aspect ratio > 200"):
            encode(asked("A", picture(2010, 10)), tokenizer, SETTINGS)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="row-7: .* wrote 0 image tokens for 1 images"):
        data.encode_prompt(asked("A", picture(56, 56)), tokenizer, SETTINGS)


def test_a_document_is_prompt_and_response_with_the_stop_token_that_ends_it(tokenizer):
    document = data.encode_example(Example("a", "what", "<think> so </think> 3"), tokenizer, None)
    words = "<|im_start|> user what <|im_end|> <|im_start|> assistant".split()
    words += "<think> so </think> 3 <|im_end|>".split()
    assert document.ids == tokenizer.convert_tokens_to_ids(words) and len(document) == len(words)
    assert len(document.response_ids) == 5  # what is trained


def test_older_and_newer_spellings_of_model_directories_are_read(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").rename(tmp_path / "old").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert data.load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    size = {"shortest_edge": 3136, "longest_edge": 12_845_056}  # of pixels, in spite of its name
    file = dict(patch_size=14, temporal_patch_size=2, merge_size=2, size=size)
    file |= dict(image_mean=CLIP_MEAN, image_std=CLIP_STD)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    assert data.load_image_settings(tmp_path) == SETTINGS
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        data.load_tokenizer(tmp_path / "elsewhere")


def test_the_length_is_known_without_decoding_a_picture(tokenizer, tmp_path):
    picture(120, 61).save(tmp_path / "p.jpg", exif=exif(SIDEWAYS))
    images = [picture(333, 777), str(tmp_path / "p.jpg"), picture(10, 20)]
    for count in range(4):
        case = (asked("look at", *images[:count]), tokenizer, SETTINGS)
        assert data.prompt_length(*case) == len(data.encode_prompt(*case).ids)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("tokenizer_config.json", None, "no tokenizer_config.json, so not a model directory"),
        ("tokenizer.json", "{", "its tokenizer cannot be read"),
        ("preprocessor_config.json", "{", "preprocessor_config.json: not JSON"),
        ("preprocessor_config.json", '{"size": {}}', "has no 'shortest_edge': fetch it again"),
    ],
)
def test_a_damaged_file_of_a_model_directory_is_named(tmp_path, name, content, says):
    world.save_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=says):
        data.load_tokenizer(tmp_path)
        data.load_image_settings(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real tokenizer beside the repository")
def test_a_directory_that_we_export_gives_the_ids_of_the_official_path(tmp_path, monkeypatch):
    """transformers takes a tokenizer of that size for a broken one of Mistral's, and says so,
    unless the config beside it tells of a version before 5."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(REAL / name, tmp_path)
    config, said = config_json(read_config(REAL), torch.float32), []
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(logging.Logger, "warning", lambda self, *words: said.append(words))
    ours, real = data.load_tokenizer(tmp_path), data.load_tokenizer(REAL)
    assert not said and data.load_image_settings(tmp_path) == SETTINGS
    images = [picture(333, 200), picture(120, 456)]
    words = ("Compare\n", " to ", "? $x^2 < 3$ é 数 a1 b22")
    prompt = data.encode_prompt(asked("<image>".join(words), *images), ours, SETTINGS)
    # The official processor: template, each pad replaced by grid.prod() / 4 pads, then tokenised.
    first, second, third = ({"type": "text", "text": text} for text in words)
    content = [first, {"type": "image"}, second, {"type": "image"}, third]
    template = json.loads((REAL / "chat_template.json").read_text())["chat_template"]
    how = dict(chat_template=template, tokenize=False, add_generation_prompt=True)
    chat = real.apply_chat_template([{"role": "user", "content": content}], **how)
    assert prompt.short_ids == real(chat)["input_ids"]
    grids = [official_patches(image)[1] for image in images]
    expanded, *pieces = chat.split("<|image_pad|>")
    for (_, h, w), piece in zip(grids, pieces, strict=True):
        expanded += "<|image_pad|>" * (h * w // 4) + piece
    assert prompt.ids == real(expanded)["input_ids"] and prompt.grids == tuple(grids)
    assert all(prompt.ids[o] == 151655 != prompt.ids[o - 1] for o in prompt.offsets)


def test_the_stream_is_a_function_of_seed_and_step():
    items = [f"item {i}" for i in range(10)]
    whole = [x for step in range(10) for x in Stream(items, seed=1).batch(step, 3)]
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == items  # each item once an epoch
    assert whole[:10] != whole[10:20] != items and whole[:10] != items
    resumed = Stream(items, seed=1)
    assert resumed.batch(7, 3) == whole[21:24] and resumed.batch(0, 25) == whole[:25]
    assert Stream(items, seed=2).batch(0, 10) != whole[:10]


def test_a_hub_name_is_its_snapshot_in_the_local_cache_and_a_directory_is_itself(
    tmp_path, monkeypatch
):
    download = partial(data.snapshot_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(data, "snapshot_download", download)
    (snapshot := tmp_path / "models--org--tiny/snapshots/0123abc").mkdir(parents=True)
    (refs := tmp_path / "models--org--tiny/refs").mkdir()
    (refs / "main").write_text("0123abc")
    assert data.model_directory("org/tiny") == str(snapshot)
    for name in (tmp_path, "no/such/thing"):
        assert data.model_directory(name) == str(name)
    with pytest.raises(FileNotFoundError, match="^org/other: .*hf download org/other"):
        data.model_directory("org/other")
