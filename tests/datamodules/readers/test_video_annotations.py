"""Every official annotation format, from files written as the data sets have them."""

import io
import json
import pickle
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.clip import ClipSource, read_clip
from datamodules.readers.video import write_mp4
from datamodules.readers.video_annotations import actions, captions, narrated, questions, shards, stills
from datamodules.readers.video_annotations.sample import AnnotationError, MissingSplit
from datamodules.transforms.frame_sampling import sample_frames


def lines(*records) -> str:
    return "\n".join(json.dumps(record) for record in records)


QUESTION = {"question": "what is it?", "answer": "cat"}
OPTIONS = {"gif_name": "g", "question": "what?", "options": ["a", "b", "c", "d", "e"], "answer": 3}
TVQA = {"q": "who?", **{f"a{i}": f"x{i}" for i in range(5)}, "answer_idx": 2, "ts": "1.5-4", "vid_name": "friends_s01e01"}
EGO = "\"('v1', 300, 'w', 'opens')\",\"[('v1', 1, 'w', 'cuts'), ('v1', 300, 'w', 'opens')]\""
TAB_MC = "1004_movie_00.01\t-\t-\t-\t-\ta\tb\tc\td\te\t"
# (reader, split, {file: content}, media path below the root, texts, answer)
FORMATS = [
    (captions.webvid, "train", {"meta_data/webvid/webvid_training_success_full.tsv": "c\tp\na \"cat\"\t001/x"},
     "webvid/train/001/x.mp4", ('a "cat"',), -1),
    (captions.cc3m, "val", {"meta_data/cc3m/cc3m_validation_success_full.tsv": "c\tp\na cat\tx.jpg"},
     "cc3m/validation/x.jpg", ("a cat",), -1),
    (captions.cc12m, "test", {"metadata/cc12m/test.tsv": "c\tp\na cat\tdeep/x.jpg"}, "cc12m/x.jpg", ("a cat",), -1),
    (captions.msvd_retrieval, "test", {"meta_data/msvd/MSVD_test.tsv": "a cat, sits\tx"},
     "msvd/YouTubeClips/x.avi", ("a cat", "sits"), -1),
    (captions.lsmdc_retrieval, "train", {"meta_data/lsmdc/LSMDC16_annos_training.csv": "m_00.01\t0\t1\t0\t1\tHe runs."},
     "lsmdc/m/m_00.01.avi", ("He runs.",), -1),
    (captions.didemo, "val", {"meta_data/didemo/DiDeMo_val.tsv": "first. then\tx.mp4"}, "didemo/video/x.mp4",
     ("first. then",), -1),
    (captions.activitynet, "val", {"meta_data/activitynet/val2.jsonl": lines({"clip_name": "v", "caption": ["a", "b"]})},
     "activitynet/activitynet_frames/v", ("a b",), -1),
    (questions.msrvtt_qa, "val", {"meta_data/msrvtt/msrvtt_train_ans2label.json": '{"dog": 0, "cat": 1}',
     "meta_data/msrvtt/msrvtt_qa_val.jsonl": lines({**QUESTION, "video_id": "video7"})},
     "msrvtt/videos/all/video7.mp4", ("what is it?",), 1),
    (questions.msvd_qa, "test", {"meta_data/msvd/msvd_answer_set.txt": "dog\ncat\n", "meta_data/msvd/msvd_youtube_mapping.txt":
     "yt_0_1 vid5", "meta_data/msvd/msvd_test_qa_encode.json": json.dumps([{**QUESTION, "video_id": 5}])},
     "msvd/YouTubeClips/yt_0_1.avi", ("what is it?",), 1),
    (questions.tgif_frameqa, "test", {"meta_data/tgif/frameqa_trainval_ans2label.json": '{"dog": 0}',
     "meta_data/tgif/frameqa_test.jsonl": lines({**QUESTION, "gif_name": "g"})}, "tgif/gifs/g.gif", ("what is it?",), -1),
    (questions.tgif_action, "train", {"meta_data/tgif/action_train.jsonl": lines(OPTIONS)}, "tgif/gifs/g.gif",
     tuple(f"what?Options: a b c d eAnswer: {option}" for option in "abcde"), 3),
    (questions.tgif_transition, "test", {"meta_data/tgif/transition_test.jsonl": lines(OPTIONS)}, "tgif/gifs/g.gif",
     tuple(f"what?Options: a b c d eAnswer: {option}" for option in "abcde"), 3),
    (questions.tvqa, "test", {"meta_data/tvqa/tvqa_test_public.jsonl": lines(TVQA)},
     "tvqa/frames/raw_frames/frames_hq/friends_frames/friends_s01e01",
     tuple(f"who?Options: x0 x1 x2 x3 x4Answer: x{i}" for i in range(5)), 2),
    (questions.msrvtt_choice, "test", {"meta_data/msrvtt/msrvtt_mc_test.jsonl": lines({"clip_name": "video1", "options":
     ["a", "b"], "answer": 1})}, "msrvtt/videos/all/video1.mp4", ("a", "b"), 1),
    (questions.lsmdc_choice, "test", {"meta_data/lsmdc/LSMDC16_multiple_choice_test_randomized.csv": TAB_MC + "4"},
     "lsmdc/1004_movie/1004_movie_00.01.avi", tuple("abcde"), 3),
    (questions.lsmdc_choice, "train", {"meta_data/lsmdc/LSMDC16_multiple_choice_train.csv": TAB_MC},
     "lsmdc/1004_movie/1004_movie_00.01.avi", tuple("abcde"), 0),
    (questions.ego4d_choice, "test", {"meta_data/ego4d/mc_val.csv": f"question,answers\n{EGO}"},
     "ego4d/videos/v1.mp4", ("cuts", "opens"), 1),
    (actions.hmdb51, "test", {"meta_data/hmdb51/hmdb51_classInd.txt": "1 brush_hair\n2 cartwheel",
     "meta_data/hmdb51/hmdb51_rgb_val_split_1.txt": "a/b c 30 1"}, "hmdb51/b c.avi", ("A person is doing [MASK]",), 1),
    (actions.k400, "test", {"meta_data/k400/kinetics_label_map.txt": "abseiling\n",
     "meta_data/k400/k400_test_tsm.list": "x" * 44 + "abseiling/v_0.mp4\t0"}, "k400/val/abseiling/v_0",
     ("A persion is doing [MASK]",), 0),
]  # fmt: skip


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")


@pytest.mark.parametrize("reader, split, files, path, texts, answer", FORMATS, ids=[f"{f[0].__name__}-{f[1]}" for f in FORMATS])
def test_format(tmp_path, reader, split, files, path, texts, answer):
    write(tmp_path, files)
    (sample,) = reader(str(tmp_path), split).samples
    assert sample.source.path == str(tmp_path / path)
    assert (sample.texts, sample.answer) == (texts, answer)
    with pytest.raises(AnnotationError):
        reader(str(tmp_path / "far" / "away"), split)


def test_msrvtt_retrieval(tmp_path):
    entries = [{"image_id": "video1", "caption": c} for c in ("a", "b")] + [{"image_id": "video2", "caption": "c"}]
    lists = "msrvtt/high-quality/structured-symlinks"
    write(tmp_path, {
        "msrvtt/annotation/MSR_VTT.json": json.dumps({"annotations": entries}),
        f"{lists}/train_list_jsfusion.txt": "video2", f"{lists}/val_list_jsfusion.txt": "video1",
    })  # fmt: skip
    (tmp_path / lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps({"video1": 1}))
    read = partial(captions.msrvtt_retrieval, str(tmp_path))
    assert [s.texts for s in read("train").samples] == [("c",)]
    assert [s.texts for s in read("test").samples] == [("b",)]
    with pytest.raises(MissingSplit):
        read("val")
    (tmp_path / lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(AnnotationError, match="nothing in it was executed"):
        read("test")


def test_vcr_names_objects_and_boxes(tmp_path):
    record = {
        "objects": ["person", "dog", "cup"], "img_fn": "m/a.jpg", "metadata_fn": "m/a.json", "annot_id": "val-0",
        "question": ["Why", "is", [1], "near", [0, 1], "?"], "answer_choices": [["It", "is", [2]]] * 3 + [["No"]],
        "rationale_choices": [[[0], "says", "so"]] * 4, "answer_label": 3, "rationale_label": 1,
    }  # fmt: skip
    boxes = [[0, 0, 4, 4, 0.9], [5, 5, 9, 9, 0.9], [1, 1, 2, 2, 0.9]]
    write(
        tmp_path,
        {"meta_data/vcr1annots/val.jsonl": json.dumps(record), "vcr/vcr1images/m/a.json": json.dumps({"boxes": boxes})},
    )
    (sample,) = questions.vcr(str(tmp_path), "val").samples
    assert sample.texts[0] == "Why is dog 1 near person 2 and dog 1 ?[SEP]It is cup 3"
    assert sample.reasons[0] == "Why is dog 1 near person 2 and dog 1 ?No[SEP]person 2 says so"
    assert (sample.answer, sample.reason) == (3, 1)
    assert sample.boxes == ((0, (5, 5, 9, 9)), (1, (0, 0, 4, 4)), (2, (1, 1, 2, 2)))


def test_howto100m_draws_a_narration(tmp_path):
    write(tmp_path, {
        "meta_data/howto100m/ht100_videos_split.csv": "Name\tx\nfood/v1.webm\t0",
        "howto100m/howto100m_csv/v1.csv": "start,end,text\n10,11,cut it\n20,40,stir it",
    })  # fmt: skip
    (sample,) = narrated.howto100m(str(tmp_path), "train").samples
    assert sample.draw(None) == ("cut it", sample.source._replace(span=(8.5, 10.0)))  # one second, widened to four
    drawn = [sample.draw(np.random.default_rng(i)) for i in range(40)]
    assert {text for text, _ in drawn} == {"cut it", "stir it"}
    starts = [media.span[0] for text, media in drawn if text == "stir it"]
    assert min(starts) >= 20 and max(starts) <= 38.5 and len(set(starts)) > 3
    (tmp_path / "howto100m/howto100m_csv/v1.csv").unlink()
    with pytest.raises(BadSample):
        sample.draw(None)


def test_yttemporal_takes_the_cleaned_words_of_the_window(tmp_path):
    spoken = [{"word": word, "time": time} for word, time in (("so", 1), ("we", 2), ("uh", 3), ("cook", 9), ("later", 30))]
    record = {"info": {"duration": 60}, "subtitles": spoken, "denoised": [{"cleanasr": "So, we cook. Later!"}]}
    write(tmp_path, {
        "meta_data/yttemporal/val_success.csv": "Name\nsubset_1/data/v.mp4",
        "yttemporal/videos/subset_1/annotations/v.json": json.dumps(record),
    })  # fmt: skip
    (sample,) = narrated.yttemporal(str(tmp_path), "val").samples
    assert sample.draw(None) == ("So, we cook.", sample.source._replace(span=(0.0, 10.0)))


def test_arrow_pictures(tmp_path):
    pa = pytest.importorskip("pyarrow")
    picture = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 0, 0)).save(picture, "PNG")
    table = pa.table({"image": [picture.getvalue(), b"broken"], "caption": [["a", "b"], ["c"]], "image_id": [7, 8]})
    (tmp_path / "vg").mkdir()
    with pa.OSFile(str(tmp_path / "vg" / "vg.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    first, second = stills.visual_genome(str(tmp_path), "train").samples
    assert first.texts == ("a", "b")
    assert read_clip(first.source, np.arange).frames.tolist() == [[[[200, 0, 0]] * 6] * 4]
    with pytest.raises(BadSample, match="corrupt image"):
        read_clip(second.source, np.arange)


def test_tar_shards(tmp_path):
    frames = np.zeros((6, 32, 32, 3), np.uint8)
    frames[3:] = 255
    write_mp4(tmp_path / "v.mp4", frames, fps=6)
    clip = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name, data in (("a.mp4", clip), ("a.txt", b"it lights up"), ("b.mp4", clip), ("c.json", b'{"caption": "lost"}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = shards.clip_shards(str(tmp_path), "train")
    (sample,) = found.samples
    assert [entry.reason for entry in found.skipped] == [
        "incomplete sample: no caption (in 0.tar)",
        "incomplete sample: no clip (in 0.tar)",
    ]
    shown = read_clip(sample.source, lambda count: sample_frames(3, count)).frames
    assert shown.shape == (3, 32, 32, 3) and shown[0].mean() < 20 and shown[2].mean() > 235
    with pytest.raises(MissingSplit):
        shards.clip_shards(str(tmp_path), "val")
    whole = (tmp_path / "train" / "0.tar").read_bytes()
    (tmp_path / "train" / "0.tar").write_bytes(whole[: len(clip) // 2])
    assert "truncated shard" in shards.clip_shards(str(tmp_path), "train").skipped[0].reason


def test_spans_windows_and_folders_of_frames(tmp_path):
    for number in (1, 2, 10, 11):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    folder = ClipSource(str(tmp_path), "frames", fps=1.0)
    assert read_clip(folder, np.arange).frames[:, 0, 0, 0].tolist() == [1, 2, 10, 11]  # by number, not by name
    assert read_clip(folder._replace(span=(1.0, 3.0)), np.arange).frames[:, 0, 0, 0].tolist() == [2, 10]
    assert read_clip(folder._replace(range=(0, 2)), np.arange).frames[:, 0, 0, 0].tolist() == [1, 2]
    for beyond in (folder._replace(span=(90.0, 99.0)), folder._replace(range=(4, 2))):
        with pytest.raises(BadSample, match="^too short"):
            read_clip(beyond, np.arange)
    with pytest.raises(BadSample):
        read_clip(ClipSource(str(tmp_path / "absent"), "frames"), np.arange)


def test_records_that_cannot_be_used_are_skipped_with_file_and_line(tmp_path):
    good = {"clip_name": "v", "options": ["a", "b"], "answer": 1}
    odd = [
        {**good, "clip_name": "../../x"}, {**good, "options": ["a", None]}, {**good, "options": ["a"]}, {**good, "answer": 2},
        {**good, "answer": "x"}, {**good, "answer": 2**70}, {"clip_name": "v"}, None, [1], {**good, "clip_name": "a/../../b"},
        {**good, "options": ["half \ud83d", "b"]},
    ]  # fmt: skip
    write(tmp_path, {"meta_data/msrvtt/msrvtt_mc_test.jsonl": "\ufeff" + lines(good, *odd)})
    found = questions.msrvtt_choice(str(tmp_path), "test")
    texts = [sample.texts for sample in found.samples]
    assert texts[0] == ("a", "b") and texts[-1] == ("half �", "b") and "".join(texts[-1]).encode()
    assert len(found.samples) + len(found.skipped) == 1 + len(odd) and len(found.skipped) >= 9
    assert all("msrvtt_mc_test.jsonl, line" in entry.key for entry in found.skipped)


def test_held_out_clips_of_one_tar_are_not_all_on_one_side():
    from datamodules.readers.video_annotations.sample import Annotations, Sample
    from datamodules.video_text import hold_out

    rows = [Sample(f"clip{n}", ClipSource("/x/0.tar", "tar", offset=n), ("a",)) for n in range(200)]
    train, held = hold_out(Annotations(rows), 0.2)
    assert 15 < len(held.samples) < 70 and len(train.samples) + len(held.samples) == 200
