"""Official annotation formats of questions about clips: open-ended, multiple choice, VCR."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from datamodules.readers.base import BadSample, inside
from datamodules.readers.video_annotations.captions import lsmdc_clip
from datamodules.readers.video_annotations.sample import (
    UNKNOWN,
    AnnotationError,
    Annotations,
    Sample,
    answer_numbers,
    choose,
    collect,
    json_file,
    json_records,
    lines,
    metadata,
    named_rows,
    table,
    video,
)


def msrvtt_qa(root: str, split: str) -> Annotations:
    """MSRVTT-QA: ``msrvtt_qa_{train,val,test}.jsonl`` and the 1500 answers of ``msrvtt_train_ans2label.json``."""
    folder = metadata(root, "msrvtt")
    answers = answer_numbers(folder / "msrvtt_train_ans2label.json")

    def sample_of(record: dict[str, Any]) -> Sample:
        clip, question = record["video_id"], record["question"]
        name = f"video{clip}" if str(clip).isdigit() else clip
        source = video(root, "msrvtt", "videos", "all", f"{name}.mp4")
        answer = answers.get(record.get("answer"), UNKNOWN)
        return Sample(clip, source, (question,), answer, group=record.get("type", _kind(question)))

    return collect(json_records(folder / f"msrvtt_qa_{split}.jsonl"), sample_of, _by_number(answers), numbered=True)


def msvd_qa(root: str, split: str) -> Annotations:
    """MSVD-QA: ``msvd_{train,val,test}_qa_encode.json`` (one JSON list), 1000 answers, and the names of the files."""
    folder = metadata(root, "msvd")
    names = [line.strip() for _, line in lines(folder / "msvd_answer_set.txt")]
    answers = {name: number for number, name in enumerate(names)}
    files = {}
    for where, line in lines(folder / "msvd_youtube_mapping.txt"):
        if len(line.split()) != 2:
            raise AnnotationError(f"{where}: '{line[:80]}' is not '<file> <video>'.")
        youtube, clip = line.split()
        files[clip] = youtube

    def sample_of(record: dict[str, Any]) -> Sample:
        clip, question = str(record["video_id"]), record["question"]
        name = files.get(clip, files.get(f"vid{clip}"))
        if name is None:
            raise BadSample(f"missing video: msvd_youtube_mapping.txt does not know {clip}")
        answer = answers.get(record.get("answer"), UNKNOWN)
        source = video(root, "msvd", "YouTubeClips", f"{name}.avi")
        return Sample(clip, source, (question,), answer, group=_kind(question))

    return collect(json_records(folder / f"msvd_{split}_qa_encode.json"), sample_of, tuple(answers), numbered=True)


def tgif_frameqa(root: str, split: str) -> Annotations:
    """TGIF-FrameQA: ``frameqa_{train,test}.jsonl`` and the 1540 answers of ``frameqa_trainval_ans2label.json``."""
    choose(split, {"train": (), "test": ()})
    folder = metadata(root, "tgif")
    answers = answer_numbers(folder / "frameqa_trainval_ans2label.json")

    def sample_of(record: dict[str, Any]) -> Sample:
        clip, question = record["gif_name"], record["question"]
        answer = answers.get(record.get("answer"), UNKNOWN)
        return Sample(clip, video(root, "tgif", "gifs", f"{clip}.gif"), (question,), answer, group=_kind(question))

    return collect(json_records(folder / f"frameqa_{split}.jsonl"), sample_of, _by_number(answers), numbered=True)


def tgif_action(root: str, split: str) -> Annotations:
    """TGIF-Action: ``action_{train,test}.jsonl``, five options."""
    return _tgif_choice(root, split, "action")


def tgif_transition(root: str, split: str) -> Annotations:
    """TGIF-Transition: ``transition_{train,test}.jsonl``, five options."""
    return _tgif_choice(root, split, "transition")


def _tgif_choice(root: str, split: str, task: str) -> Annotations:
    choose(split, {"train": (), "test": ()})

    def sample_of(record: dict[str, Any]) -> Sample:
        clip, texts = record["gif_name"], prompts(record["question"], record["options"])
        return Sample(clip, video(root, "tgif", "gifs", f"{clip}.gif"), texts, int(record["answer"]))

    return collect(json_records(metadata(root, "tgif") / f"{task}_{split}.jsonl"), sample_of, choices=True, numbered=True)


def tvqa(root: str, split: str) -> Annotations:
    """TVQA: ``tvqa_{train,val,test_public}.jsonl``; frames of the localised span, 3 per second."""

    def sample_of(record: dict[str, Any]) -> Sample:
        clip = record["vid_name"]
        show = clip.split("_")[0] if clip.split("_")[0] in ("castle", "friends", "grey", "house", "met") else "bbt"
        begin, end = (float(part) for part in str(record["ts"]).split("-"))
        folder = ("tvqa", "frames", "raw_frames", "frames_hq", f"{show}_frames", clip)
        source = video(root, *folder, kind="frames", span=(begin, max(end, begin)), fps=3.0)
        texts = prompts(record["q"], [record[f"a{i}"] for i in range(5)])
        return Sample(clip, source, texts, int(record.get("answer_idx", UNKNOWN)))

    path = metadata(root, "tvqa") / f"tvqa_{'test_public' if split == 'test' else split}.jsonl"
    return collect(json_records(path), sample_of, choices=True, numbered=True)


def prompts(question: str, options: Sequence[str]) -> tuple[str, ...]:
    """One candidate text per option, in the official words (without blanks before "Options:" and "Answer:")."""
    stem = question + "Options: " + " ".join(options)
    return tuple(stem + "Answer: " + option for option in options)


def msrvtt_choice(root: str, split: str) -> Annotations:
    """MSRVTT-MC: ``msrvtt_mc_test.jsonl``, five captions. The official "training" file is this test file: none here."""
    choose(split, {"test": ()})

    def sample_of(record: dict[str, Any]) -> Sample:
        clip = record["clip_name"]
        source = video(root, "msrvtt", "videos", "all", f"{clip}.mp4")
        return Sample(clip, source, tuple(record["options"]), int(record["answer"]))

    return collect(json_records(metadata(root, "msrvtt") / "msrvtt_mc_test.jsonl"), sample_of, choices=True)


def lsmdc_choice(root: str, split: str) -> Annotations:
    """LSMDC-MC: ``LSMDC16_multiple_choice_{train,test_randomized}.csv`` (tab): clip 0, options 5-9, answer 10 from 1.

    In the training file the right option is the first one.
    """
    (part,) = choose(split, {"train": ("train",), "test": ("test_randomized",)})

    def sample_of(row: list[str]) -> Sample:
        answer = 0 if split == "train" else int(row[10]) - 1
        return Sample(row[0], lsmdc_clip(root, row[0]), tuple(row[5:10]), answer)

    rows = table(metadata(root, "lsmdc") / f"LSMDC16_multiple_choice_{part}.csv", 10 if split == "train" else 11)
    return collect(rows, sample_of, choices=True)


def ego4d_choice(root: str, split: str) -> Annotations:
    """Ego4D-MC: ``mc_val.csv``, Python literals (video, frame, ..., text), four options, evaluation only.

    The literals are parsed, never evaluated (the official reader evaluates them). The clip is the 120 frames around the
    narration.
    """
    choose(split, {"test": ()})

    def sample_of(row: dict[str, str]) -> Sample:
        question, options = ast.literal_eval(row["question"]), ast.literal_eval(row["answers"])
        texts = tuple(str(option[-1]) for option in options)
        first = int(question[1]) - 60
        frames = (max(first, 0), 120 + min(first, 0))
        source = video(root, "ego4d", "videos", f"{question[0]}.mp4", range=frames)
        return Sample(f"{question[0]}@{question[1]}", source, texts, texts.index(str(question[-1])))

    return collect(named_rows(metadata(root, "ego4d") / "mc_val.csv", ",", "question", "answers"), sample_of, choices=True)


def vcr(root: str, split: str) -> Annotations:
    """VCR: ``{train,val,test}.jsonl`` of the official annotations, four answers, then four reasons for the right one.

    Objects are called by ``<class> <k>``, k their rank of first mention in the sample, and painted into the image.
    """
    records = json_records(metadata(root, "vcr1annots") / f"{split}.jsonl")
    return collect(records, lambda record: _vcr_sample(root, record), choices=True)


def _vcr_sample(root: str, record: dict[str, Any]) -> Sample:
    objects = record["objects"]
    names: dict[int, str] = {}

    def words(tokens: Sequence[Any]) -> str:
        parts = []
        for token in tokens:
            if isinstance(token, list):
                for index in token:
                    names.setdefault(index, f"{objects[index]} {len(names) + 1}")
                parts.append(" and ".join(names[index] for index in token))
            else:
                parts.append(token)
        return " ".join(parts)

    question = words(record["question"])
    answers = [words(choice) for choice in record["answer_choices"]]
    reasons = [words(choice) for choice in record["rationale_choices"]]
    label, reason = int(record.get("answer_label", UNKNOWN)), int(record.get("rationale_label", UNKNOWN))
    if not UNKNOWN <= reason < len(reasons) or not UNKNOWN <= label < len(answers):
        raise BadSample(f"bad record: answer {label} of {len(answers)}, reason {reason} of {len(reasons)}")
    try:
        boxes = json_file(inside(root, "vcr", "vcr1images", record["metadata_fn"]))["boxes"]
    except AnnotationError as error:
        raise BadSample(f"missing boxes: {error}") from error
    gold = answers[label] if label != UNKNOWN else ""
    return Sample(
        key=str(record["annot_id"]),
        # Boxes are in pixels of the stored image.
        source=video(root, "vcr", "vcr1images", record["img_fn"], kind="image", official=True),
        texts=tuple(f"{question}[SEP]{answer}" for answer in answers),
        answer=label,
        reasons=tuple(f"{question}{gold}[SEP]{reason_text}" for reason_text in reasons),
        reason=reason,
        boxes=tuple((place, tuple(map(float, boxes[index][:4]))) for place, index in enumerate(names)),
    )


def _by_number(answers: dict[str, int]) -> tuple[str, ...]:
    names = [""] * (max(answers.values(), default=-1) + 1)
    for name, number in answers.items():
        names[number] = name
    return tuple(names)


def _kind(question: str) -> str:
    """The first word, as the data sets' own statistics have it: what, who, how, when, where."""
    return question.split(" ", 1)[0].lower().strip("?")
