"""Conversations in LLaVA's files: what is read, how it is tokenised, what the model sees of images, what is skipped."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from datamodules.conversations import ConversationDataModule, check_copy
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.readers.conversations import Conversations, Turn, conversation, read_conversations
from datamodules.simulated.conversations import write_conversations, write_tokenizer
from datamodules.tokenizers.chat import ChatTokenizer
from datamodules.transforms.tiles import Tiles
from models.batch import IGNORE_INDEX, SKIPPED, TOKEN_IDS, TOKEN_MASK
from models.errors import UserError
from models.two_tower.batch import QUERY_PLACES, SIZES, SPANS, TILE_COUNTS, TILES, TOKEN_LABELS
from models.two_tower.tiles import pinpoints

WORDS = ["system\nuser\nassistant\nwhat is shown here? a red circle. and now describe it <image> blue square noise"]


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, WORDS)
    return str(path)


# ---- entries -----------------------------------------------------------------------------------------------------------


def test_the_image_stands_before_the_text_of_its_turn():
    entry = {"id": 7, "image": "a.jpg", "conversations": said("what is shown?\n<image>", "a circle", "and now?", "a square")}
    read = conversation(entry)
    assert read.turns[0] == Turn("user", "<image>\nwhat is shown?") and read.image == "a.jpg" and read.key == "7"
    assert (read.question, read.answer, len(read.turns)) == ("what is shown?", "a circle", 4)
    bare = conversation({"image": ["a.jpg"], "conversations": said("what is shown?", "a circle")})
    assert bare.turns[0].text == "<image>\nwhat is shown?"
    text = conversation({"conversations": [{"from": "gpt", "value": "hello"}, *said("what is it?", "a word")]})
    assert text.image == "" and [turn.role for turn in text.turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"image": ["a.jpg", "b.jpg"], "conversations": said("<image>?", "x")}, "several images"),
        ({"image": "a.jpg", "conversations": said("<image><image>?", "x")}, "several images"),
        ({"video": "a.mp4", "conversations": said("<image>?", "x")}, "video"),
        ({"conversations": said("<image>?", "x")}, "no image"),
        ({"image": "a.jpg", "conversations": said("<image>?")}, "bad record"),
        ({"image": "a.jpg", "conversations": [{"from": "robot", "value": "x"}]}, "bad record"),
        ({"image": "a.jpg"}, "bad record"),
        ("text", "bad record"),
    ],
)
def test_entries_that_cannot_be_used_say_why(entry, reason):
    with pytest.raises(BadSample, match=reason):
        conversation(entry)


def test_a_mix_takes_its_shares(tmp_path):
    entries = [{"id": number, "conversations": said("what?", "x")} for number in range(10)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    shares = {"all": 10, "first:15%": 2, "end:3": 3, "random:50%": 5, "first:100": 10}
    parts = "".join(
        f"  - json_path: {('list.json', 'lines.jsonl')[i % 2]}\n    sampling_strategy: {s}\n" for i, s in enumerate(shares)
    )
    (tmp_path / "mix.yaml").write_text(f"datasets:\n{parts}")
    keys = [sample.key for sample in read_conversations(tmp_path / "mix.yaml")]
    assert len(keys) == sum(shares.values()) and keys[10:15] == ["0", "1", "7", "8", "9"]
    assert keys == [sample.key for sample in read_conversations(tmp_path / "mix.yaml")]
    assert keys[15:20] != [sample.key for sample in read_conversations(tmp_path / "mix.yaml", seed=1)][15:20]
    for content in ("datasets:\n  - json_path: list.json\n    sampling_strategy: last:3\n", "a: [", "- x\n"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(UserError):
            read_conversations(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="datamodule.train"):
        read_conversations(tmp_path / "none.json")


def test_conversations_of_one_image_are_held_out_together():
    entries = [{"id": i, "image": f"{i // 4}.jpg", "conversations": said("<image>?", f"é{i}")} for i in range(400)]
    train, val = Conversations(entries).split(0.2)
    assert len(train) + len(val) == 400 and 20 < len(val) < 140
    assert not {sample.image for sample in train} & {sample.image for sample in val}
    assert val[0].answer.startswith("é") and train.fingerprint != val.fingerprint


# ---- tokens ------------------------------------------------------------------------------------------------------------


def shown(words: ChatTokenizer, ids) -> str:
    return words.tokenizer.decode(list(ids))


def test_chat_labels_the_answers_with_their_ends(folder):
    words = ChatTokenizer(folder, system="describe it")
    turns = [
        Turn("user", "<image>\nwhat is shown?"),
        Turn("assistant", "a red circle"),
        Turn("user", "and now?"),
        Turn("assistant", "blue"),
    ]
    chat = words(turns, visual=4)
    start, image = chat.span
    assert image == 4 and set(chat.ids[start : start + 4]) == {words.padding_id}
    text = shown(words, np.delete(chat.ids, range(start, start + 4)))
    assert text == (
        "<|im_start|>system\ndescribe it<|im_end|>\n<|im_start|>user\n\nwhat is shown?<|im_end|>\n<|im_start|>assistant\n"
        "a red circle<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>\n"
    )
    assert shown(words, chat.labels[chat.labels != IGNORE_INDEX]) == "a red circle<|im_end|>blue<|im_end|>"
    assert [shown(words, chat.ids[chat.turns == turn]) for turn in (1, 2)] == ["a red circle<|im_end|>", "blue<|im_end|>"]
    assert shown(words, chat.ids[chat.query]) == "what is shown?"
    asked = words.asked(turns, visual=4)
    assert np.array_equal(asked.ids, chat.ids[: len(asked.ids)]) and shown(words, asked.ids[-2:]) == "assistant\n"
    assert words.decode([*words.tokenizer.encode("a red circle"), words.end_id, 5]) == "a red circle"


def test_official_labels_hold_the_marks_as_well(folder):
    words = ChatTokenizer(folder, system=None, label_markers=True)
    chat = words([Turn("user", "what?"), Turn("assistant", "a circle")], visual=0)
    labelled = shown(words, chat.labels[chat.labels != IGNORE_INDEX])
    assert labelled == "<|im_start|>\n<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
    assert shown(words, chat.ids[chat.turns > 0]) == "a circle<|im_end|>"  # what held-out figures count


def test_plain_labels_the_caption_with_the_end_of_its_line(folder):
    words = ChatTokenizer(folder, prompt="plain")
    chat = words([Turn("user", "<image>\nwhat is shown?"), Turn("assistant", "a red circle.")], visual=3)
    assert chat.span == (0, 3) and shown(words, chat.labels[3:]) == "a red circle.\n" and not len(chat.query)
    assert list(chat.labels[:3]) == [IGNORE_INDEX] * 3
    with pytest.raises(BadSample, match="plain"):
        words([Turn("user", "what?"), Turn("assistant", "blue")], visual=0)


def test_long_conversations_are_cut_on_the_right(folder):
    turns = [Turn("user", "<image>\nwhat?"), Turn("assistant", "a red circle"), Turn("user", "and?"), Turn("assistant", "blue")]
    whole = ChatTokenizer(folder, system=None)(turns, visual=5)
    for length in (len(whole.ids) - 1, len(whole.ids) - 2, len(whole.ids) - 3):
        chat = ChatTokenizer(folder, system=None, max_length=length)(turns, visual=5)
        assert np.array_equal(chat.ids, whole.ids[:length]) and np.array_equal(chat.labels, whole.labels[:length])
        assert (2 in chat.turns) == (length == len(whole.ids) - 1)  # an answer without its end is not judged
    with pytest.raises(BadSample, match="no answer"):
        ChatTokenizer(folder, system=None, max_length=7)(turns, visual=5)
    cut = ChatTokenizer(folder, prompt="plain", max_length=4)([turns[0], turns[1]], visual=3)
    assert cut.span == (0, 3) and len(cut.ids) == 4
    with pytest.raises(UserError, match="tokenizer"):
        ChatTokenizer(str(folder) + "/none")


# ---- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 30), (30, 64), (16, 16), (100, 33)])
@pytest.mark.parametrize("grids", [[[1, 2], [2, 1], [2, 2]], 3])
def test_tiles_are_those_of_transformers(size, grids):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints(grids, 16), image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(Tiles(16, 8, grids)(image), expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(Tiles(16, 8)(image), expected[:1].float(), rtol=0, atol=1e-5)


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_batches_join_images_and_texts_and_count_what_is_skipped(tmp_path):
    Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    entries = [
        {"id": "image", "image": "a.jpg", "conversations": said("<image>\nwhat is shown?", "a red circle")},
        {"id": "text", "conversations": said("what?", "blue")},
        {"id": "two", "image": ["a.jpg", "a.jpg"], "conversations": said("<image><image>", "x")},
        {"id": "broken", "image": "broken.jpg", "conversations": said("<image>", "x")},
        {"id": "outside", "image": "../a.jpg", "conversations": said("<image>", "x")},
        {"id": "missing", "image": "b.jpg", "conversations": said("<image>", "x")},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    write_tokenizer(tmp_path, WORDS)
    data = ConversationDataModule(
        str(tmp_path), "train.json", val="train.json", image_size=16, patch_size=8, grids=[[1, 1], [2, 1]], batch_size=2,
        max_skipped=1.0,
    )  # fmt: skip
    data.setup()
    batch = data.splits["val"][BatchRequest(np.arange(6), 0, 0)]
    reasons = {entry.key: entry.reason.split(":")[0] for entry in batch[SKIPPED]}
    assert reasons == {"two": "several images", "broken": "corrupt image", "outside": "bad path", "missing": "missing image"}
    assert batch[TILES].shape == (3, 3, 16, 16) and batch[TILE_COUNTS] == [3, 0]
    assert batch[SIZES] == [(20, 40), (0, 0)] and batch[SPANS][0][1] == 4 + 2 * 5 and batch[SPANS][1] == (0, 0)
    assert batch[TOKEN_IDS].shape == batch[TOKEN_LABELS].shape == batch[TOKEN_MASK].shape
    assert int(batch[TOKEN_MASK][1].sum()) < batch[TOKEN_IDS].shape[1] and bool((batch[QUERY_PLACES][1] == -1).any())
    problems = check_copy(str(tmp_path / "train.json"), str(tmp_path))
    assert set(problems) == {
        "1 of 6 entries: several images, the first is two",
        "1 of 6 entries: bad path, the first is outside",
        "1 of 6 entries: missing image, the first is b.jpg",
    }
    assert "cannot be read" in check_copy(str(tmp_path / "none.json"), str(tmp_path))[0]
    assert data.splits["val"].display(1).shape == data.splits["val"].display(0).shape == (1, 16, 16, 3)


def test_the_simulated_set_is_read_by_the_ordinary_reader(tmp_path):
    simulate = partial(write_conversations, train=4, val=2, test=2)
    root = str(tmp_path / "simulated")
    data = ConversationDataModule(root, "mix.yaml", "val.json", "test.json", simulate=simulate, image_size=16, patch_size=8)
    data.prepare_data()
    data.setup()
    assert {sample.group for sample in data.splits["train"].samples} >= {"colour", "caption"}
    unknown = data.words.tokenizer.unk_token_id or data.words.tokenizer.get_vocab()["<unk>"]
    for split in data.splits.values():
        batch = split[BatchRequest(np.arange(len(split)), 0, 0)]
        assert not batch[SKIPPED] and not bool((batch[TOKEN_IDS] == unknown).any())
    assert write_conversations(root, 4, 2, 2) == simulate(root)
