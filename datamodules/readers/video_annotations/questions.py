"""Official annotation formats of questions about clips: open-ended, multiple choice, VCR."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from datamodules.readers.clips import Media
from datamodules.readers.video_annotations.captions import lsmdc_clip
from datamodules.readers.video_annotations.sample import (
    UNKNOWN,
    AnnotationError,
    Annotations,
    Sample,
    choose,
    existing,
    field,
    json_file,
    json_lines,
    metadata,
    table,
)


def msrvtt_qa(root: str, split: str) -> Annotations:
    """MSRVTT-QA: ``msrvtt_qa_{train,val,test}.jsonl`` and the 1500 answers of ``msrvtt_train_ans2label.json``."""
    folder = metadata(root, "msrvtt")
    answers = json_file(folder / "msrvtt_train_ans2label.json")
    path = folder / f"msrvtt_qa_{split}.jsonl"
    samples = []
    for number, record in enumerate(json_lines(path)):
        clip, question = field(record, "video_id", path), field(record, "question", path)
        media = Media(str(Path(root, "msrvtt", "videos", "all", f"{_video_name(clip)}.mp4")))
        answer = answers.get(record.get("answer"), UNKNOWN)
        samples.append(Sample(f"{clip}#{number}", media, (question,), answer, group=record.get("type", _kind(question))))
    return Annotations(samples, _by_number(answers))


def msvd_qa(root: str, split: str) -> Annotations:
    """MSVD-QA: ``msvd_{train,val,test}_qa_encode.json`` (one JSON list), 1000 answers, and the names of the files."""
    folder = metadata(root, "msvd")
    names = existing(folder / "msvd_answer_set.txt").read_text(encoding="utf-8").split("\n")
    answers = {name.strip(): number for number, name in enumerate(names) if name.strip()}
    pairs = (line.split() for line in existing(folder / "msvd_youtube_mapping.txt").read_text().splitlines() if line.strip())
    files = {video: youtube for youtube, video in pairs}
    path = folder / f"msvd_{split}_qa_encode.json"
    samples = []
    for number, record in enumerate(json_file(path)):
        clip, question = str(field(record, "video_id", path)), field(record, "question", path)
        name = files.get(clip, files.get(f"vid{clip}"))
        if name is None:
            raise AnnotationError(f"{path} asks about {clip}, which msvd_youtube_mapping.txt does not know")
        media = Media(str(Path(root, "msvd", "YouTubeClips", f"{name}.avi")))
        answer = answers.get(record.get("answer"), UNKNOWN)
        samples.append(Sample(f"{clip}#{number}", media, (question,), answer, group=_kind(question)))
    return Annotations(samples, tuple(answers))


def tgif_frameqa(root: str, split: str) -> Annotations:
    """TGIF-FrameQA: ``frameqa_{train,test}.jsonl`` and the 1540 answers of ``frameqa_trainval_ans2label.json``."""
    choose(split, {"train": (), "test": ()})
    folder = metadata(root, "tgif")
    answers = json_file(folder / "frameqa_trainval_ans2label.json")
    path = folder / f"frameqa_{split}.jsonl"
    samples = []
    for number, record in enumerate(json_lines(path)):
        clip, question = field(record, "gif_name", path), field(record, "question", path)
        answer = answers.get(record.get("answer"), UNKNOWN)
        samples.append(Sample(f"{clip}#{number}", _gif(root, clip), (question,), answer, group=_kind(question)))
    return Annotations(samples, _by_number(answers))


def tgif_action(root: str, split: str) -> Annotations:
    """TGIF-Action: ``action_{train,test}.jsonl``, five options."""
    return _tgif_choice(root, split, "action")


def tgif_transition(root: str, split: str) -> Annotations:
    """TGIF-Transition: ``transition_{train,test}.jsonl``, five options."""
    return _tgif_choice(root, split, "transition")


def _tgif_choice(root: str, split: str, task: str) -> Annotations:
    choose(split, {"train": (), "test": ()})
    path = metadata(root, "tgif") / f"{task}_{split}.jsonl"
    samples = []
    for number, record in enumerate(json_lines(path)):
        clip, options = field(record, "gif_name", path), field(record, "options", path)
        texts = prompts(field(record, "question", path), options)
        samples.append(Sample(f"{clip}#{number}", _gif(root, clip), texts, int(field(record, "answer", path))))
    return Annotations(samples)


def tvqa(root: str, split: str) -> Annotations:
    """TVQA: ``tvqa_{train,val,test_public}.jsonl``; frames of the localised span, 3 per second."""
    path = metadata(root, "tvqa") / f"tvqa_{'test_public' if split == 'test' else split}.jsonl"
    samples = []
    for number, record in enumerate(json_lines(path)):
        clip = field(record, "vid_name", path)
        show = clip.split("_")[0] if clip.split("_")[0] in ("castle", "friends", "grey", "house", "met") else "bbt"
        folder = Path(root, "tvqa", "frames", "raw_frames", "frames_hq", f"{show}_frames", clip)
        begin, end = (float(part) for part in str(field(record, "ts", path)).split("-"))
        texts = prompts(field(record, "q", path), [field(record, f"a{i}", path) for i in range(5)])
        media = Media(str(folder), "frames", span=(begin, max(end, begin)), fps=3.0)
        samples.append(Sample(f"{clip}#{number}", media, texts, int(record.get("answer_idx", UNKNOWN))))
    return Annotations(samples)


def prompts(question: str, options: Sequence[str]) -> tuple[str, ...]:
    """One candidate text per option, in the official words (without blanks before "Options:" and "Answer:")."""
    stem = question + "Options: " + " ".join(options)
    return tuple(stem + "Answer: " + option for option in options)


def msrvtt_choice(root: str, split: str) -> Annotations:
    """MSRVTT-MC: ``msrvtt_mc_test.jsonl``, five captions. The official "training" file is this test file: none here."""
    choose(split, {"test": ()})
    path = metadata(root, "msrvtt") / "msrvtt_mc_test.jsonl"
    samples = []
    for record in json_lines(path):
        clip = field(record, "clip_name", path)
        media = Media(str(Path(root, "msrvtt", "videos", "all", f"{clip}.mp4")))
        samples.append(Sample(clip, media, tuple(field(record, "options", path)), int(field(record, "answer", path))))
    return Annotations(samples)


def lsmdc_choice(root: str, split: str) -> Annotations:
    """LSMDC-MC: ``LSMDC16_multiple_choice_{train,test_randomized}.csv`` (tab): clip 0, options 5-9, answer 10 from 1.

    In the training file the right option is the first one.
    """
    (part,) = choose(split, {"train": ("train",), "test": ("test_randomized",)})
    rows = table(metadata(root, "lsmdc") / f"LSMDC16_multiple_choice_{part}.csv", 10 if split == "train" else 11)
    return Annotations(
        [Sample(r[0], lsmdc_clip(root, r[0]), tuple(r[5:10]), 0 if split == "train" else int(r[10]) - 1) for r in rows]
    )


def ego4d_choice(root: str, split: str) -> Annotations:
    """Ego4D-MC: ``mc_val.csv``, Python literals (video, frame, ..., text), four options, evaluation only.

    The literals are parsed, never evaluated (the official reader evaluates them). The clip is the 120 frames around the
    narration.
    """
    choose(split, {"test": ()})
    path = metadata(root, "ego4d") / "mc_val.csv"
    import csv

    samples = []
    with existing(path).open(encoding="utf-8", newline="") as file:
        for number, record in enumerate(csv.DictReader(file), 2):
            try:
                question, options = ast.literal_eval(record["question"]), ast.literal_eval(record["answers"])
                texts = tuple(str(option[-1]) for option in options)
                media = Media(str(Path(root, "ego4d", "videos", f"{question[0]}.mp4")), window=(int(question[1]), 120))
                samples.append(Sample(f"{question[0]}@{question[1]}", media, texts, texts.index(str(question[-1]))))
            except (KeyError, ValueError, SyntaxError, TypeError, IndexError) as error:
                raise AnnotationError(f"{path}, line {number} is not a question of Ego4D-MC ({error!r})") from None
    return Annotations(samples)


def vcr(root: str, split: str) -> Annotations:
    """VCR: ``{train,val,test}.jsonl`` of the official annotations, four answers, then four reasons for the right one.

    Objects are called by ``<class> <k>``, k their rank of first mention in the sample, and painted into the picture.
    """
    path = metadata(root, "vcr1annots") / f"{split}.jsonl"
    samples = []
    for number, record in enumerate(json_lines(path)):
        objects = field(record, "objects", path)
        names: dict[int, str] = {}

        def words(tokens: Sequence, objects=objects, names=names) -> str:
            parts = []
            for token in tokens:
                if isinstance(token, list):
                    for index in token:
                        names.setdefault(index, f"{objects[index]} {len(names) + 1}")
                    parts.append(" and ".join(names[index] for index in token))
                else:
                    parts.append(token)
            return " ".join(parts)

        question = words(field(record, "question", path))
        answers = [words(choice) for choice in field(record, "answer_choices", path)]
        reasons = [words(choice) for choice in field(record, "rationale_choices", path)]
        label, reason = int(record.get("answer_label", UNKNOWN)), int(record.get("rationale_label", UNKNOWN))
        boxes_file = Path(root, "vcr", "vcr1images", field(record, "metadata_fn", path))
        boxes = json_file(boxes_file)["boxes"]
        gold = answers[label] if label != UNKNOWN else ""
        samples.append(
            Sample(
                key=f"{record.get('annot_id', number)}",
                media=Media(str(Path(root, "vcr", "vcr1images", field(record, "img_fn", path))), "image"),
                texts=tuple(f"{question}[SEP]{answer}" for answer in answers),
                answer=label,
                reasons=tuple(f"{question}{gold}[SEP]{reason_text}" for reason_text in reasons),
                reason=reason,
                boxes=tuple((place, tuple(boxes[index][:4])) for place, index in enumerate(names)),
            )
        )
    return Annotations(samples)


def _gif(root: str, name: str) -> Media:
    return Media(str(Path(root, "tgif", "gifs", f"{name}.gif")))


def _video_name(clip: int | str) -> str:
    return f"video{clip}" if str(clip).isdigit() else str(clip)


def _by_number(answers: dict[str, int]) -> tuple[str, ...]:
    names = [""] * (max(answers.values(), default=-1) + 1)
    for name, number in answers.items():
        names[number] = name
    return tuple(names)


def _kind(question: str) -> str:
    """The first word, as the data sets' own statistics have it: what, who, how, when, where."""
    return question.split(" ", 1)[0].lower().strip("?")
