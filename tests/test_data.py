"""data.py against naive references, the official image processor and the real tokenizer."""

import io
import json
import logging
import math
import random
import re
import shutil
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as official

from common import data
from common.data import Example, ImageSettings, Problem, Stream
from miniature import world
from model import config_json, read_config

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "qwen2_5_vl"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository: the real tokenizer"
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SETTINGS = ImageSettings(3136, 12_845_056, 14, 2, 2, CLIP_MEAN, CLIP_STD)
# ---- a small world


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    world.save_tokenizer(folder := tmp_path_factory.mktemp("tokenizer"))
    return data.load_tokenizer(folder)


def picture(width, height, mode="RGB", seed=0):
    """Noise; what is transparent differs from pixel to pixel too."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    made = Image.fromarray(pixels[..., :3]).convert(mode)
    if mode in ("RGBA", "LA"):
        made.putalpha(Image.fromarray(pixels[..., 3]))
    return made


def write_jsonl(folder, *rows, name="train.jsonl"):
    """Rows as dicts, or as the bytes of a line."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def row(**changes):
    return {"id": "a", "prompt": "what is 1 + 2 ?", "answer": "3"} | changes


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`datasets`, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


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
    assert len(problems) == 2 and list(problems[1:]) == [whole] and problems[-1] == whole
    says = f"{path}: columns that only a reward of your own may read: image, precison, twin\n"
    assert capsys.readouterr().out == says

    line = {"id": 7, "prompt": "é <b>\u2028\r", "response": "x", "source": None, "images": None}
    (example,) = data.read_examples(write_jsonl(tmp_path, line))
    assert example == Example("7", "é <b>\u2028\r", "x") and not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"line 1: column 'response' contains <\|im_end\|>"):
        data.read_examples(write_jsonl(tmp_path, line | {"response": "y<|im_end|>"}))


HALF = "can't encode character '\\ud83d'"
DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_ROWS = [
    (b'{"id": 1', "not JSON"),
    ([1, 2], "must be an object"),
    ({"prompt": "x"}, "'answer' is missing"),
    (row(answer=["3"]), "'answer' is neither text nor a number: ['3']"),
    (row(answer=math.nan), "text nor a number: nan"),
    (row(prompt="  \n"), "'prompt' is empty"),
    (row(images=["gone.png"]), "image 'gone.png' does not exist; paths are relative to"),
    (row(choices="AB"), "'choices' must be a list"),
    (row(precision="2"), "'precision' must be a number"),
    (row(images=["p.png"] * 2, prompt="<image>"), "1 markers <image> for 2 images; write"),
    (row(prompt="see <|image_pad|>"), "contains <|image_pad|>"),
    # half a character: in a text, in a column nobody reads, in a name, not escaped
    (b'{"prompt": "bad \\ud83d here", "answer": "1"}', f"{HALF} in position 16"),
    (b'{"prompt": "x", "answer": "1", "more": [{"a": "\\ud83d"}]}', HALF),
    (b'{"prompt": "x", "answer": "1", "\\ud83d": 1}', "can't encode character"),
    (b'{"prompt": "x \xed\xa0\xbd", "answer": "1"}', "not JSON"),
    # what could break out of the checks
    (b'{"prompt": "x", "answer": ' + DEEP + b"}", "not JSON"),
    (row(images=[3]), "does not exist"),
    (row(images=["data:image/png;base64," + "A" * 100_000]), "does not exist"),
    (row(images=[{"bytes": "iVBORw0KGgo="}]), "damaged picture"),
    (row(images=["cut.png"]), "cut.png: damaged picture"),
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
    (tmp_path / "cut.png").write_bytes(encoded(picture(200, 150))[:-600])
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
        assert [rows[i].answer for i in (0, 1, 2, 4)] == [str(a) for a in answers if a != ["no"]]
    with pytest.raises(ValueError, match="line 4: column 'answer' is neither"):
        data.read_problems(path, share=(1, 2))


def test_columns_of_other_names_are_mapped_and_rows_without_an_id_are_numbered(tmp_path):
    rows = [{"问题": "1+1?", "solution": 2, "answer": "?"}, {"问题": "2?", "solution": 2}]
    rows[1] |= {"options": ["x", "y"], "system": "s"}  # rare columns are not missed by who checks 0
    path = write_jsonl(tmp_path, *rows)
    columns = ("prompt=问题", "answer=solution", "extra_system=system", "choices=options")
    problems = data.read_problems(path, columns=columns, share=(0, 2))
    assert problems[0] == Problem("row-0", "1+1?", "2")
    assert problems[1].id == "row-1" and problems[1].choices == ("x", "y")
    assert problems[1].extra == {"extra_system": "s"}
    for wrong in ("images=pics", "prompt"):
        with pytest.raises(ValueError, match=f"--columns {wrong}=?: no row has a column"):
            data.read_problems(path, columns=(*columns, wrong))


def test_parquet_gives_the_same_problems_with_pictures_as_files_or_inside(tmp_path, cache):
    images = [picture(40, 30, seed=s) for s in range(3)]
    images[1].save(tmp_path / "p.png")
    rows = [row(id=str(i), answer=str(i), images=["p.png"], level=i) for i in range(5)]
    cache.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    expected = list(data.read_problems(write_jsonl(tmp_path, *rows)))
    assert list(data.read_problems(tmp_path / "rows.parquet")) == expected

    texts = {c: cache.Value("string") for c in ("id", "prompt", "answer")}
    features = cache.Features(texts | {"pictures": cache.List(cache.Image())})
    rows = [row(pictures=images[:2]), row(id="b", pictures=images[2:]), row(id="c", pictures=[])]
    table, hub = cache.Dataset.from_list(rows, features=features), tmp_path / "set"
    table.to_parquet(hub / "data/train-00000-of-00001.parquet")
    table.select([0]).to_parquet(hub / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="row 0: column 'pictures' .*images=pictures"):
        data.read_problems(hub)
    problems = data.read_problems(hub, columns=("images=pictures",))  # its train split
    assert [len(p.images) for p in problems] == [2, 1, 0]
    assert np.array_equal(np.asarray(problems[0].images[1]), np.asarray(images[1]))


def test_a_source_that_is_not_there_is_named(tmp_path, cache, monkeypatch):
    (tmp_path / "rows.csv").write_text("no\n")
    for source in (tmp_path / "rows.csv", "nowhere/rows.jsonl", "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{source}"):
            data.read_problems(source)
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("no network")))
    with pytest.raises(FileNotFoundError, match="owner/name: neither .*no network"):
        data.read_problems("owner/name")


def official_patches(image, config):
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor = official.Qwen2VLImageProcessorPil(size=size)
    made = processor(images=[image], return_tensors="np")
    return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())


SIZES = [(640, 480), (333, 777), (1000, 13), (1, 1), (5, 700), (84, 56)]
SIZES += [(42, 70), (98, 126), (1, 200), (2600, 13)]  # halves are rounded to even
CASES = [(*size, "RGB", SETTINGS.max_pixels) for size in SIZES]
CASES += [(2000, 1500, "RGB", 200_704), (2999, 31, "RGB", 50_176)]
CASES += [(300, 200, mode, 50_176) for mode in ("L", "LA", "RGBA", "P", "1", "CMYK")]


@pytest.mark.parametrize("width, height, mode, max_pixels", CASES)
def test_patches_equal_the_official_processor_bit_for_bit(width, height, mode, max_pixels):
    config, image = replace(SETTINGS, max_pixels=max_pixels), picture(width, height, mode)
    assert image.mode == mode
    patches, grid = data.image_patches(image, config)
    expected, expected_grid = official_patches(image, config)
    assert grid == expected_grid and patches.is_contiguous()
    assert patches.dtype == torch.float32 and np.array_equal(patches.numpy(), expected)


def exif(*fields):
    """Of (tag, type, count, 4 bytes): fields as a camera writes them, or as it should not."""
    head = b"II*\0" + struct.pack("<IH", 8, len(fields))
    return b"Exif\0\0" + head + b"".join(struct.pack("<HHI4s", *f) for f in fields) + bytes(4)


SIDEWAYS = (0x0112, 3, 1, b"\6\0\0\0")
BROKEN = [(0x0100, 1, 1, b"abc\0"), (0x011A, 2, 1, b"abc\0"), (0x010F, 5, 1, bytes(4))]
BROKEN += [(0x8769, 6, 1, b"\xff\xff\xff\x7f")]  # four kinds of error in exif_transpose


@pytest.mark.parametrize("fields", [(SIDEWAYS,), *((SIDEWAYS, field) for field in BROKEN)])
def test_a_rotated_photograph_is_turned_upright_whatever_else_its_camera_wrote(tmp_path, fields):
    turned = picture(120, 60)
    turned.save(tmp_path / "p.jpg", exif=exif(*fields), quality=95, subsampling=0)
    upright = data.load_image(str(tmp_path / "p.jpg"))
    plain = Image.open(io.BytesIO(encoded(turned, "JPEG", quality=95, subsampling=0)))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(plain), -1))
    assert data.image_patches(str(tmp_path / "p.jpg"), SETTINGS)[1] == (1, 8, 4)


def test_grey_of_more_than_8_bits_is_refused_and_does_not_turn_white():
    for kind in (np.uint16, np.float32):
        with pytest.raises(ValueError, match="damaged picture .*save 8 bits"):
            data.load_image(Image.fromarray(np.full((20, 20), 300, kind)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AVIF", "PNG", "JPEG", "WEBP", "TIFF"])
def test_whatever_is_damaged_in_a_picture_the_error_names_it(kind):
    content, whole = encoded(picture(64, 48), kind), 0
    for seed in range(60):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice((1, 3))):
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
        try:
            data.image_patches(io.BytesIO(damaged), SETTINGS, "row 7")
            whole += 1
        except ValueError as error:
            assert re.match("row 7: .*: damaged picture [(]", str(error))
    assert whole < 60  # of AVIF 27 of the others are RuntimeErrors of its decoder
    assert data.load_image(io.BytesIO(content + b"\0" * 3000)).size == (64, 48)
    with pytest.raises(ValueError, match="damaged picture"):  # cut
        data.load_image(io.BytesIO(content[:-200]))


def test_both_spellings_of_the_image_settings_are_read(tmp_path):
    common = dict(patch_size=14, temporal_patch_size=2, merge_size=2)
    common |= dict(image_mean=CLIP_MEAN, image_std=CLIP_STD)
    size = {"shortest_edge": 3136, "longest_edge": 12_845_056}
    for bounds in ({"min_pixels": 3136, "max_pixels": 12_845_056}, {"size": size}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(common | bounds))
        assert data.load_image_settings(tmp_path) == SETTINGS


def asked(prompt: str, *images) -> data.Problem:
    return data.Problem("row-7", prompt, "", images)


def test_pictures_stand_at_their_markers_or_before_the_text(tokenizer):
    two = [picture(84, 56), picture(56, 56)]
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for words, shown in (
        ("look <image> at <image> so", f"look {image} at {image} so"),
        ("look at", f"{image} {image} look at"),
    ):
        prompt = data.encode_prompt(asked(words, *two), tokenizer, SETTINGS)
        turn = f"<|im_start|> user {shown} <|im_end|> <|im_start|> assistant"
        assert tokenizer.decode(prompt.short_ids).split() == turn.split()
        assert prompt.grids == ((1, 4, 6), (1, 4, 4)) and prompt.patches.shape == (40, 1176)
        assert torch.equal(prompt.patches[:24], data.image_patches(two[0], SETTINGS)[0])
        first, second = (i for i, token in enumerate(prompt.short_ids) if token == pad)
        assert prompt.offsets == (first, second + 5)  # the first picture is six tokens, not one
        short = prompt.short_ids
        expanded = short[:first] + [pad] * 6 + short[first + 1 : second] + [pad] * 4
        assert prompt.ids == expanded + short[second + 1 :]


def test_markup_in_the_text_of_a_user_is_an_error_that_names_the_row(tokenizer):
    for token in data.MARKUP:
        with pytest.raises(ValueError, match=re.escape(f"row-7 contains {token}")):
            data.encode_prompt(asked(f"look {token}"), tokenizer, None)
    for encode in (data.encode_prompt, data.prompt_length):
        with pytest.raises(ValueError, match="row-7: embedded .*2010 x 10 px: aspect ratio 201 >"):
            encode(asked("A", picture(2010, 10)), tokenizer, SETTINGS)


def test_a_written_response_ends_in_a_stop_token_and_the_template_has_to_show_pictures(
    tokenizer, tmp_path
):
    tokenizer.save_pretrained(tmp_path)
    loaded = data.load_tokenizer(tmp_path)
    document = data.encode_example(Example("a", "what", "<think> so </think> 3"), loaded, None)
    words = "<think> so </think> 3 <|im_end|>".split()
    assert document.response_ids == tokenizer.convert_tokens_to_ids(words)
    prompt = data.encode_prompt(asked("what"), tokenizer, None)
    assert document.ids == prompt.ids + document.response_ids and len(document) == len(document.ids)
    # older model directories have the template elsewhere
    template = (tmp_path / "chat_template.jinja").rename(tmp_path / "old").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    loaded = data.load_tokenizer(tmp_path)
    assert data.encode_prompt(asked("what"), loaded, None) == prompt
    loaded.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(ValueError, match="wrote 0 image tokens for 1 images"):
        data.encode_prompt(asked("A", picture(56, 56)), loaded, SETTINGS)
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        data.load_tokenizer(tmp_path / "elsewhere")


def test_the_length_is_known_without_decoding_a_picture(tokenizer, tmp_path):
    picture(120, 61).save(tmp_path / "p.jpg", exif=exif(SIDEWAYS))
    images = [picture(333, 777), str(tmp_path / "p.jpg"), picture(10, 20)]
    for count in range(4):
        case = (asked("look at", *images[:count]), tokenizer, SETTINGS)
        assert data.prompt_length(*case) == len(data.encode_prompt(*case).ids)


@needs_real
def test_the_real_tokenizer_is_taken_as_it_is_from_a_directory_that_we_export(
    tmp_path, monkeypatch
):
    """transformers takes one of that size for a broken one of Mistral's, and says so, unless the
    config beside it tells of a version before 5."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REAL / name, tmp_path)
    config, said = config_json(read_config(REAL), torch.float32), []
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(logging.Logger, "warning", lambda self, *words: said.append(words))
    assert data.load_tokenizer(tmp_path).encode("a1 b22") == [64, 16, 293, 17, 17] and not said


@needs_real
def test_with_the_real_tokenizer_ids_equal_the_official_path(tmp_path):
    real = data.load_tokenizer(REAL)
    config = data.load_image_settings(REAL)
    assert config == SETTINGS
    images = [picture(333, 200), picture(120, 456)]
    words = ("Compare\n", " to ", "? $x^2 < 3$ é 数")
    prompt = data.encode_prompt(asked("<image>".join(words), *images), real, config)
    # The official processor: template, each pad replaced by grid.prod() / 4 pads, then tokenised.
    texts = [{"type": "text", "text": text} for text in words]
    content = [texts[0], {"type": "image"}, texts[1], {"type": "image"}, texts[2]]
    turn = [{"role": "user", "content": content}]
    template = json.loads((REAL / "chat_template.json").read_text())["chat_template"]
    chat = real.apply_chat_template(
        turn, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert prompt.short_ids == real(chat)["input_ids"]
    grids = [official_patches(image, config)[1] for image in images]
    expanded, *pieces = chat.split("<|image_pad|>")
    for grid, piece in zip(grids, pieces, strict=True):
        expanded += "<|image_pad|>" * (math.prod(grid) // 4) + piece
    assert prompt.ids == real(expanded)["input_ids"] and prompt.grids == tuple(grids)
    assert all(prompt.ids[o] == 151655 != prompt.ids[o - 1] for o in prompt.offsets)


def test_the_stream_is_a_function_of_seed_and_step():
    items = [f"item {i}" for i in range(10)]
    whole = [x for step in range(10) for x in Stream(items, seed=1).batch(step, 3)]
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == items  # each item once an epoch
    assert whole[:10] != whole[10:20] != items and whole[:10] != items
    resumed = Stream(items, seed=1)
    assert resumed.batch(7, 3) == whole[21:24] and resumed.batch(3, 3) == whole[9:12]
    assert Stream(items, seed=2).batch(0, 10) != whole[:10]
    assert len(Stream(items, seed=1).batch(0, 25)) == 25  # more than an epoch at once


def test_a_hub_name_is_its_snapshot_in_the_local_cache_and_a_directory_is_itself(
    tmp_path, monkeypatch
):
    download = partial(data.snapshot_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(data, "snapshot_download", download)
    (snapshot := tmp_path / "models--org--tiny/snapshots/0123abc").mkdir(parents=True)
    (refs := tmp_path / "models--org--tiny/refs").mkdir()
    (refs / "main").write_text("0123abc")
    for name in (tmp_path, "no/such/thing"):
        assert data.model_directory(name) == str(name)
    assert data.model_directory("org/tiny") == str(snapshot)
    with pytest.raises(FileNotFoundError, match="^org/other: .*hf download org/other"):
        data.model_directory("org/other")
