"""data.py against naive references, the official image processor and the real tokenizer."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as official

from common import data
from common.data import Document, Example, ImageSettings, Problem, Prompt, Stream
from model import config_json, read_config

REAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "qwen2_5_vl"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="no ../shared/qwen2_5_vl beside the repository: the real tokenizer"
)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SETTINGS = ImageSettings(3136, 12_845_056, 14, 2, 2, CLIP_MEAN, CLIP_STD)
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


# ---- a small world


@pytest.fixture(scope="module")
def tokenizer():
    words = "user assistant look at what is the sum of 1 2 3 4 = so <think> </think> [UNK]".split()
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": list(data.MARKUP)})
    made.chat_template = TEMPLATE
    return made


def picture(width, height, mode="RGB", seed=0):
    """Photograph-like: smooth gradients and noise."""
    rng = np.random.default_rng(seed)
    channels = len(mode) if mode in ("RGB", "RGBA", "LA") else 3
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, channels)
    waves = np.sin(x[..., None] / 17 + phase) + np.cos(y[..., None] / 23 - phase)
    noisy = 128 + 50 * waves + rng.normal(0, 20, (height, width, channels))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels) if channels != 3 else Image.fromarray(pixels).convert(mode)


def write_jsonl(folder, rows, name="train.jsonl"):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(**changes):
    return {"id": "a", "prompt": "what is 1 + 2 ?", "answer": "3"} | changes


def text_prompt(n, first=10):
    return Prompt(list(range(first, first + n)), list(range(first, first + n)), None, (), ())


# ---- reading


def test_a_row_becomes_a_problem(tmp_path):
    picture(30, 30).save(tmp_path / "p.png")
    full = row(images=["p.png"], source="s", choices=["x", 2], precision=1, twin="ignored")
    problems = data.read_problems(write_jsonl(tmp_path, [row(), full]))
    plain, whole = problems
    assert plain == Problem("a", "what is 1 + 2 ?", "3")
    expected = ("a", "what is 1 + 2 ?", "3", (str(tmp_path / "p.png"),), "s", ("x", "2"), 1.0)
    assert whole == Problem(*expected)
    assert len(problems) == 2 and list(problems[1:]) == [whole] and problems[-1] == whole


def test_a_row_becomes_an_example(tmp_path):
    rows = [{"id": 7, "prompt": "é <b>\u2028", "response": "x", "source": None, "images": None}]
    assert list(data.read_examples(write_jsonl(tmp_path, rows))) == [
        Example("7", "é <b>\u2028", "x")
    ]


def test_answers_may_be_numbers_in_one_row_and_text_in_the_next(tmp_path):
    path = write_jsonl(tmp_path, [row(answer=a) for a in (3, 0.5, "x", 12345678901234567890)])
    answers = [p.answer for p in data.read_problems(path)]
    assert answers == ["3", "0.5", "x", "12345678901234567890"]


@pytest.mark.parametrize(
    "bad, says",
    [
        ('{"id": 1', "not JSON"),
        ("[1, 2]", "must be an object"),
        ({"id": "a", "prompt": "x"}, "'answer' is missing"),
        (row(answer=None), "'answer' is missing"),
        (row(answer=True), "'answer' must be text or a number"),
        (row(answer=["3"]), "'answer' must be text or a number"),
        (row(prompt="  \n"), "'prompt' is empty"),
        (row(prompt=["x"]), "'prompt' must be text"),
        (row(source=3), "'source' must be text"),
        (row(images="p.png"), "'images' must be a list"),
        (row(images=[3]), "an image must be a path"),
        (row(image="p.png"), "'image' is not read; write 'images'"),
        (row(choices="AB"), "'choices' must be a list"),
        (row(precision="2"), "'precision' must be a number"),
        (row(prompt="<image> and <image>"), "2 markers <image> for 0 images"),
        (row(prompt="see <|image_pad|>"), "contains <|image_pad|>"),
        (row(prompt="<|im_end|>"), "contains <|im_end|>"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(tmp_path, bad, says):
    path = write_jsonl(tmp_path, [row(), "", bad, row()])  # the blank line counts
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3")) as caught:
        data.read_problems(path)
    assert says in str(caught.value)


def test_a_missing_image_file_is_reported_before_the_run(tmp_path):
    path = write_jsonl(tmp_path, [row(), row(images=["gone.png"])])
    with pytest.raises(
        FileNotFoundError, match=r"line 2: image gone.png does not exist; paths are"
    ):
        data.read_problems(path)


def test_markers_must_be_none_or_one_for_each_image(tmp_path):
    picture(30, 30).save(tmp_path / "p.png")
    for marks in (0, 2):
        path = write_jsonl(tmp_path, [row(prompt="<image>" * marks + "x", images=["p.png"] * 2)])
        assert len(data.read_problems(path)[0].images) == 2
    path = write_jsonl(tmp_path, [row(prompt="<image> x", images=["p.png"] * 2)])
    with pytest.raises(ValueError, match="line 1: 1 markers <image> for 2 images; write one"):
        data.read_problems(path)


def test_a_response_may_not_hold_the_stop_token_in_writing(tmp_path):
    path = write_jsonl(tmp_path, [{"id": "a", "prompt": "x", "response": "y<|im_end|>"}])
    with pytest.raises(ValueError, match=r"line 1: column 'response' contains <\|im_end\|>"):
        data.read_examples(path)


def test_json_and_parquet_and_directories_give_the_same_problems(tmp_path):
    import datasets

    picture(40, 30).save(tmp_path / "p.png")
    rows = [row(id=str(i), answer=str(i), images=["p.png"]) for i in range(5)]
    expected = list(data.read_problems(write_jsonl(tmp_path, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert list(data.read_problems(tmp_path / "rows.json")) == expected
    write_jsonl(tmp_path, [row(id="never")], "test.jsonl")
    assert list(data.read_problems(tmp_path)) == expected
    assert data.read_problems(tmp_path, split="test")[0].id == "never"

    cache = tmp_path / "cache"
    table = datasets.Dataset.from_list(rows, features=None)
    table.to_parquet(tmp_path / "rows.parquet")
    bars = datasets.are_progress_bars_disabled()
    found = list(data.read_problems(tmp_path / "rows.parquet", cache_dir=str(cache)))
    assert found == expected
    assert datasets.are_progress_bars_disabled() == bars


def test_pictures_inside_a_table_are_read_as_pictures(tmp_path):
    import datasets

    images = [picture(40, 30, seed=s) for s in range(3)]
    features = datasets.Features(
        {c: datasets.Value("string") for c in ("id", "prompt", "answer")}
        | {"images": datasets.List(datasets.Image())}
    )
    rows = [row(images=images[:2]), row(images=images[2:])]
    table = datasets.Dataset.from_list(rows, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    problems = data.read_problems(tmp_path, cache_dir=str(tmp_path / "cache"))
    assert [len(p.images) for p in problems] == [2, 1]
    assert np.array_equal(np.asarray(problems[0].images[1]), np.asarray(images[1]))


def test_a_source_that_is_not_there_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read_problems("nowhere/rows.jsonl")
    with pytest.raises(FileNotFoundError, match="no train.jsonl, .json or .parquet"):
        data.read_problems(tmp_path)
    (tmp_path / "rows.csv").write_text("id\n")
    with pytest.raises(ValueError, match="rows are read from .jsonl, .json, .parquet"):
        data.read_problems(tmp_path / "rows.csv")
    (tmp_path / "rows.parquet").write_text("no")
    with pytest.raises(ValueError, match="is it parquet"):
        data.read_problems(tmp_path / "rows.parquet", cache_dir=str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        data.read_problems(tmp_path / "empty.jsonl")
    (tmp_path / "rows.json").write_text('{"id": 1}')
    with pytest.raises(ValueError, match="call it .jsonl"):
        data.read_problems(tmp_path / "rows.json")

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="owner/name: not readable .no network"):
        data.read_problems("owner/name")


# ---- pictures


def official_patches(image, config):
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor = official.Qwen2VLImageProcessorPil(size=size)
    made = processor(images=[image], return_tensors="np")
    return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())


@pytest.mark.parametrize(
    "width, height, mode, max_pixels",
    [
        (640, 480, "RGB", 12_845_056),
        (333, 777, "RGB", 12_845_056),
        (1000, 13, "RGB", 12_845_056),
        (1, 1, "RGB", 12_845_056),
        (5, 700, "RGB", 12_845_056),
        (84, 56, "RGB", 12_845_056),
        (2000, 1500, "RGB", 200_704),
        (2999, 31, "RGB", 50_176),
        (300, 200, "L", 12_845_056),
        (300, 200, "LA", 12_845_056),
        (300, 200, "RGBA", 12_845_056),
        (300, 200, "P", 12_845_056),
        (300, 200, "1", 12_845_056),
        (300, 200, "CMYK", 12_845_056),
    ],
)
def test_patches_equal_the_official_processor_bit_for_bit(width, height, mode, max_pixels):
    config, image = replace(SETTINGS, max_pixels=max_pixels), picture(width, height, mode)
    assert image.mode == mode
    patches, grid = data.image_patches(image, config)
    expected, expected_grid = official_patches(image, config)
    assert grid == expected_grid and patches.shape == (math.prod(grid), 1176)
    assert patches.dtype == torch.float32 and patches.is_contiguous()
    assert np.array_equal(patches.numpy(), expected)


def test_the_patch_order_is_block_by_block_as_a_naive_loop_says():
    image = picture(84, 56)
    patches, (t, h, w) = data.image_patches(image, SETTINGS)
    assert (t, h, w) == (1, 4, 6)
    pixels = (np.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD  # 84 x 56 is not resized
    row_index = 0
    for by in range(h // 2):
        for bx in range(w // 2):
            for y in (2 * by, 2 * by + 1):
                for x in (2 * bx, 2 * bx + 1):
                    square = pixels[14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
                    values = [[square[:, :, c]] * 2 for c in range(3)]
                    naive = np.array(values).reshape(-1)
                    assert np.abs(patches[row_index].numpy() - naive).max() < 1e-6
                    row_index += 1


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([50_176, 1_003_520, 12_845_056]))
@settings(max_examples=300, deadline=None)
def test_smart_resize_equals_the_official_one(height, width, most):
    config = replace(SETTINGS, max_pixels=most)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            data.smart_resize(height, width, config)
    else:
        expected = official.smart_resize(height, width, 28, 3136, most)
        assert data.smart_resize(height, width, config) == expected


def test_a_strip_of_paper_is_refused():
    with pytest.raises(ValueError, match="image of 2010 x 10 px: aspect ratio 201 > 200"):
        data.image_patches(picture(2010, 10), SETTINGS)


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    picture(120, 60).save(tmp_path / "p.png", exif=exif)
    assert data.load_image(str(tmp_path / "p.png")).size == (60, 120)
    assert data.image_patches(str(tmp_path / "p.png"), SETTINGS)[1] == (1, 8, 4)


def test_a_damaged_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match="a.png: pillow cannot open it"):
        data.load_image(tmp_path / "a.png")
    picture(200, 200).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match="b.png: damaged image"):
        data.load_image(tmp_path / "b.png")


def test_both_spellings_of_the_image_settings_are_read(tmp_path):
    common = dict(patch_size=14, temporal_patch_size=2, merge_size=2)
    common |= dict(image_mean=CLIP_MEAN, image_std=CLIP_STD)
    path = tmp_path / "preprocessor_config.json"
    for bounds in (
        dict(min_pixels=3136, max_pixels=12_845_056),
        dict(size=dict(shortest_edge=3136, longest_edge=12_845_056)),
    ):
        path.write_text(json.dumps(common | bounds))
        assert data.load_image_settings(tmp_path) == SETTINGS
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json is missing"):
        data.load_image_settings(tmp_path / "elsewhere")


# ---- tokens


def naive_expansion(ids, pad, grids):
    counts = [t * h * w // 4 for t, h, w in grids]
    expanded = []
    for token in ids:
        expanded += [pad] * counts.pop(0) if token == pad else [token]
    assert not counts
    return expanded


def test_pictures_stand_at_their_markers_or_before_the_text(tokenizer):
    two = [picture(84, 56), picture(56, 56)]
    marked = data.encode_prompt("look <image> at <image> so", two, tokenizer, SETTINGS)
    shown = tokenizer.decode(marked.short_ids)
    open_, close = "<|vision_start|>", "<|vision_end|>"
    image = f"{open_} <|image_pad|> {close}"
    turn = "<|im_start|> user {} <|im_end|> <|im_start|> assistant"
    assert shown.split() == turn.format(f"look {image} at {image} so").split()
    plain = data.encode_prompt("look at", two, tokenizer, SETTINGS)
    assert (
        tokenizer.decode(plain.short_ids).split() == turn.format(f"{image} {image} look at").split()
    )

    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for prompt in (marked, plain):
        assert prompt.grids == ((1, 4, 6), (1, 4, 4)) and prompt.patches.shape == (40, 1176)
        assert prompt.ids == naive_expansion(prompt.short_ids, pad, prompt.grids)
        starts = [i for i, t in enumerate(prompt.ids) if t == pad and prompt.ids[i - 1] != pad]
        assert list(prompt.offsets) == starts
    first = data.image_patches(two[0], SETTINGS)[0]
    assert torch.equal(plain.patches[:24], first)


def test_markup_in_the_text_of_a_user_is_an_error_that_names_the_row(tokenizer):
    for token in data.MARKUP:
        with pytest.raises(ValueError, match=re.escape(f"row-7 contains {token}")):
            data.encode_prompt(f"look {token}", [], tokenizer, None, name="row-7")
    with pytest.raises(ValueError, match="row-7: 2 markers"):
        data.encode_prompt("<image> <image>", [picture(9, 9)], tokenizer, SETTINGS, name="row-7")
    with pytest.raises(ValueError, match="row-7: image of 2010 x 10"):
        data.encode_prompt("x", [picture(2010, 10)], tokenizer, SETTINGS, name="row-7")


def test_a_written_response_ends_in_a_stop_token_that_is_trained(tokenizer):
    ids = data.encode_response("<think> so </think> 3", tokenizer)
    words = "<think> so </think> 3 <|im_end|>".split()
    assert ids == tokenizer.convert_tokens_to_ids(words)
    prompt = data.encode_prompt("what", [], tokenizer, None)
    (packed,) = data.pack([Document(prompt, ids)], budget=99)
    assert packed.targets.tolist() == ids
    with pytest.raises(ValueError, match=r"response contains <\|im_end\|>"):
        data.encode_response("3 <|im_end|>", tokenizer)


def test_a_template_that_forgets_the_pictures_is_noticed(tokenizer):
    old = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['role'] }}"
    try:
        with pytest.raises(ValueError, match="wrote 0 image tokens for 1 images"):
            data.encode_prompt("x", [picture(56, 56)], tokenizer, SETTINGS)
    finally:
        tokenizer.chat_template = old


def test_the_tokenizer_finds_its_template_in_either_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    expected = data.encode_prompt("look at", [], tokenizer, None)
    assert data.encode_prompt("look at", [], data.load_tokenizer(tmp_path), None) == expected
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert data.encode_prompt("look at", [], data.load_tokenizer(tmp_path), None) == expected
    with pytest.raises(FileNotFoundError, match="not a model directory"):
        data.load_tokenizer(tmp_path / "elsewhere")


def test_the_length_is_known_without_decoding_a_picture(tokenizer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [picture(333, 777), str(tmp_path / "p.png"), picture(10, 20)]
    picture(120, 61).save(tmp_path / "p.png", exif=exif)
    for count in range(4):
        case = ("look at", images[:count], tokenizer, SETTINGS)
        assert data.prompt_length(*case) == len(data.encode_prompt(*case).ids)


def test_a_picture_of_no_possible_size_is_an_error_that_names_the_row(tokenizer):
    with pytest.raises(ValueError, match="row 7: .*ratio"):
        data.prompt_length("look at", [picture(1, 900)], tokenizer, SETTINGS, "row 7")


def test_a_tokenizer_without_the_tokens_of_pictures_is_an_error(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved = tmp_path / "tokenizer.json"
    saved.write_text(saved.read_text().replace(data.IMAGE_PAD, "<|other|>"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace(data.IMAGE_PAD, "<|other|>"))
    with pytest.raises(ValueError, match="image_pad.*Qwen2.5-VL"):
        data.load_tokenizer(tmp_path)


def test_a_directory_of_two_kinds_of_files_is_an_error_that_names_them(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    (tmp_path / "train-1.json").write_text("[]")
    with pytest.raises(ValueError, match="several kinds"):
        data.split_files(tmp_path, "train")


def test_an_image_column_of_datasets_may_hold_bytes_or_a_path(tmp_path):
    picture(30, 20).save(tmp_path / "p.png")
    whole = (tmp_path / "p.png").read_bytes()
    opened = data.located("row 1", {"bytes": whole, "path": None}, tmp_path)
    assert opened.size == (30, 20)
    path = data.located("row 1", {"bytes": None, "path": "p.png"}, tmp_path)
    assert Path(path) == tmp_path / "p.png"
    with pytest.raises(ValueError, match="row 1: an image must be a path"):
        data.located("row 1", {"bytes": None, "path": None}, tmp_path)


def test_long_prompts_are_left_out_and_counted_and_never_cut():
    kept, dropped = data.filter_long(["aaaa", "b", "cc", "ddd"], 2, [4, 1, 2, 3])
    assert list(kept) == ["b", "cc"] and dropped == 2


@needs_real
def test_the_real_tokenizer_is_taken_as_it_is_from_a_directory_that_we_export(tmp_path):
    """transformers takes one of that size for a broken one of Mistral's, and says so, unless the
    config beside it tells of a version before 5."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REAL / name, tmp_path)
    config = config_json(read_config(REAL), torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        f"from common import data; print(data.load_tokenizer({str(tmp_path)!r}).encode('a1 b22'))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "regex" not in done.stderr and done.stdout.startswith("[64, 16, 293, 17, 17]")


@needs_real
def test_with_the_real_tokenizer_ids_equal_the_official_path(tmp_path):
    real = data.load_tokenizer(REAL)
    config = data.load_image_settings(REAL)
    assert config == SETTINGS
    images = [picture(333, 200), picture(120, 456)]
    content = [
        {"type": "text", "text": "Compare\n"},
        {"type": "image"},
        {"type": "text", "text": " with "},
        {"type": "image"},
        {"type": "text", "text": ": which is larger? $x^2 < 3$ é 数"},
    ]
    prompt = data.encode_prompt(
        "Compare\n<image> with <image>: which is larger? $x^2 < 3$ é 数", images, real, config
    )
    # The official processor: template, each pad replaced by grid.prod() / 4 pads, then tokenised.
    template = json.loads((REAL / "chat_template.json").read_text())["chat_template"]
    chat = real.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert chat.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.short_ids == real(chat)["input_ids"]
    grids = [official_patches(image, config)[1] for image in images]
    pieces = chat.split("<|image_pad|>")
    expanded = pieces[0]
    for grid, piece in zip(grids, pieces[1:], strict=True):
        expanded += "<|image_pad|>" * (math.prod(grid) // 4) + piece
    assert prompt.ids == real(expanded)["input_ids"]
    assert prompt.grids == tuple(grids)
    assert all(prompt.ids[o] == 151655 != prompt.ids[o - 1] for o in prompt.offsets)

    # A whole turn through the template ends as ours does, but for the line break after it.
    response = "<think>\nWait, 2.\n</think>\n\\boxed{2}"
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": response}]
    whole = real.apply_chat_template(turns, tokenize=False)
    ours = Document(
        data.encode_prompt("1+1?", [], real, None), data.encode_response(response, real)
    )
    assert [*ours.ids, *real.encode("\n")] == real.encode(whole)
    assert ours.response_ids[-1] == 151645


# ---- packs


def test_a_pack_holds_whole_documents_and_trains_responses_only():
    # 151645 (stop) stands in the prompt too, and a response token is 0: the mask goes by lengths.
    prompts = [Prompt([5, 151645, 6], [5, 151645, 6], None, (), ()), text_prompt(2)]
    documents = [Document(prompts[0], [0, 8, 151645]), Document(prompts[1], [9, 151645])]
    (packed,) = data.pack(documents, budget=10)
    assert packed.members == [1, 0] and packed.lengths == [4, 6]  # short to long
    assert packed.ids.tolist() == [10, 11, 9, 151645, 5, 151645, 6, 0, 8, 151645]
    assert packed.targets.tolist() == [9, 151645, 0, 8, 151645]  # stop tokens included
    assert packed.rows.tolist() == [1, 2, 6, 7, 8] and packed.trained == [2, 3]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 3
    assert packed.patches is None and packed.grids == [] and not len(packed.slots)
    assert packed.ids.dtype == packed.slots.dtype == packed.sources.dtype == torch.int64
    assert packed.rows.dtype == packed.targets.dtype == torch.int64
    assert [p.members for p in data.pack(documents, budget=9)] == [[0], [1]]


def test_a_shared_picture_stands_once_and_every_image_token_finds_its_row(tokenizer):
    shared = data.encode_prompt(
        "look <image> at <image>", [picture(84, 56), picture(56, 56, seed=1)], tokenizer, SETTINGS
    )
    other = data.encode_prompt("so", [picture(56, 84, seed=2)], tokenizer, SETTINGS)
    plain = data.encode_prompt("what is 1", [], tokenizer, None)
    answers = [(shared, 7), (shared, 3), (plain, 4), (other, 9), (shared, 5), (other, 2)]
    documents = [Document(p, [1] * n) for p, n in answers]
    (packed,) = data.pack(documents, budget=1000)
    assert sorted(packed.members) == list(range(6)) and packed.lengths == sorted(packed.lengths)
    assert len(packed.patches) == 24 + 16 + 24  # each picture once
    assert sum(math.prod(grid) for grid in packed.grids) == 64

    # A tower that gives each merged row the mean of its four patches; reference: one at a time.
    tower = packed.patches.reshape(-1, 4, 1176).mean(dim=1)
    assert sum(t * h * w // 4 for t, h, w in packed.grids) == len(tower)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    placed = torch.zeros(len(packed.ids), 1176)
    placed[packed.slots] = tower[packed.sources]
    start = 0
    for i, length in zip(packed.members, packed.lengths, strict=True):
        document = documents[i]
        here = slice(start, start + length)
        assert packed.ids[here].tolist() == document.ids
        expected = torch.zeros(length, 1176)
        where = torch.tensor(document.prompt.ids + [-1] * len(document.response_ids)) == pad
        if document.prompt.patches is not None:
            expected[where] = document.prompt.patches.reshape(-1, 4, 1176).mean(dim=1)
        assert torch.equal(placed[here], expected)
        assert torch.equal(packed.positions[:, here], naive_positions(document))
        start += length
    assert packed.expand is None


@pytest.mark.parametrize("shared", [False, True])
def test_every_trained_token_is_predicted_from_the_one_before_it_in_its_document(tokenizer, shared):
    first = data.encode_prompt("look <image>", [picture(84, 56)], tokenizer, SETTINGS)
    second = data.encode_prompt("what is 1", [], tokenizer, None)
    tries = [(first, [1, 2]), (second, [3]), (first, [4, 5, 6]), (second, []), (first, [7])]
    documents = [Document(prompt, response) for prompt, response in tries]
    packed = data.lay_out(documents, [4, 1, 0, 3, 2], shared=shared)
    order = [documents[i] for i in packed.members]
    assert packed.trained == [1, 1, 2, 0, 3] and packed.lengths == [*map(len, order)]
    alone = 2 * len(first.ids) + len(second.ids) if shared else 0  # copies that are left out
    assert len(packed.ids) == sum(packed.lengths) - alone
    rows = packed.expand if shared else torch.arange(len(packed.ids))
    told = zip(packed.rows.split(packed.trained), packed.targets.split(packed.trained), strict=True)
    for document, own, (at, targets) in zip(order, rows.split(packed.lengths), told, strict=True):
        assert packed.ids[own].tolist() == document.ids
        assert torch.equal(packed.positions[:, own], naive_positions(document))
        assert at.tolist() == own[len(document.prompt.ids) - 1 : -1].tolist()[: len(targets)]
        assert targets.tolist() == document.response_ids
        pads = [i for i in own.tolist() if i in set(packed.slots.tolist())]
        assert len(pads) == (6 if document.prompt is first else 0)
    assert len(packed.patches) == 24  # the picture stands once, shared or not
    assert len(packed.slots) == (6 if shared else 18)
    assert len(set(packed.slots.tolist())) == len(packed.slots)


def naive_positions(document):
    """M-RoPE token by token: text counts on; a picture's tokens count rows and columns."""
    places, following, i = [], 0, 0
    images = dict(zip(document.prompt.offsets, document.prompt.grids, strict=True))
    while i < len(document):
        if i in images:
            _, h, w = images[i]
            for y in range(h // 2):
                for x in range(w // 2):
                    places.append((following, following + y, following + x))
            i += h * w // 4
            following += max(h // 2, w // 2)
        else:
            places.append((following,) * 3)
            following, i = following + 1, i + 1
    return torch.tensor(places).T


def test_sampled_image_tokens_are_text_and_not_pictures(tokenizer):
    prompt = data.encode_prompt("look", [picture(56, 56)], tokenizer, SETTINGS)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    (packed,) = data.pack([Document(prompt, [1, pad, pad])], budget=100)
    first = prompt.offsets[0]
    assert packed.slots.tolist() == list(range(first, first + 4))
    assert packed.sources.tolist() == [0, 1, 2, 3]


def test_samples_of_a_prompt_stay_together_where_there_is_room():
    a, b = text_prompt(4), text_prompt(4, first=50)
    # a: 12 and 4 tokens, b: 8 and 8. By falling length alone 12 would stand with an 8.
    documents = [Document(a, [1] * 8), Document(b, [1] * 4), Document(a, []), Document(b, [1] * 4)]
    packs = data.pack(documents, budget=20)
    assert [p.members for p in packs] == [[2, 0], [1, 3]]


def test_a_document_over_the_budget_is_named_and_not_cut():
    documents = [Document(text_prompt(2), [1]), Document(text_prompt(6), [1] * 5)]
    with pytest.raises(ValueError, match="document 1: 11 tokens exceed the budget of 10; raise"):
        data.pack(documents, budget=10)
    with pytest.raises(ValueError, match="document 0 has no prompt"):
        data.pack([Document(text_prompt(0), [1])], budget=10)
    assert data.pack([], budget=10) == []


def test_a_filler_pack_trains_nothing_and_moves_like_any_other():
    filler = data.filler_pack().to("cpu")
    assert not len(filler.targets) and filler.members == [] and filler.patches is None
    assert filler.lengths == [2] and filler.positions.tolist() == [[0, 1]] * 3


# ---- order


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
    with pytest.raises(ValueError, match="at least one item"):
        Stream([], seed=0)


# ---- the Hub's cache


def test_a_hub_name_is_its_snapshot_in_the_local_cache_and_a_directory_is_itself(tmp_path):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    snapshot = tmp_path / "hub/models--org--tiny/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub/models--org--tiny/refs").mkdir()
    (tmp_path / "hub/models--org--tiny/refs/main").write_text("0123abc")
    code = (
        "from common import data\n"
        f"assert data.model_directory('org/tiny') == {str(snapshot)!r}\n"
        f"assert data.model_directory({str(tmp_path)!r}) == {str(tmp_path)!r}\n"
        "assert data.model_directory('no/such/thing') == 'no/such/thing'\n"
        "data.model_directory('org/other')\n"
    )
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    offline.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code]
    root = Path(data.__file__).parents[1]
    ran = subprocess.run(command, env=offline, cwd=root, capture_output=True, text=True)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: org/other") and "hf download org/other" in last
