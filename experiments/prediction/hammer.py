"""Is this image-text pair manipulated, how, and where? The stage ``predict`` of HAMMER, and one pair for its figures."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.text import Text
from torchvision.ops import box_convert

from datamodules.readers.images import open_required, open_rgb
from datamodules.tokenizers.word_labels import CaptionTokenizer, raw_words
from datamodules.transforms.image_box import image_tensor
from experiments.config.instantiation import build
from experiments.figures import hammer
from experiments.prediction.base import write
from experiments.run import parts
from experiments.run.directory import Run
from models.errors import UserError
from models.hammer.metrics import EMPTY
from models.hammer.model import MANIPULATIONS, Hammer


class Finding(NamedTuple):
    """What the model says about one pair. Probabilities from 0 to 1; what a single-modality variant cannot see is empty.

    ``box`` (x1, y1, x2, y2) in pixels of the image, None where no region is manipulated; ``words`` of the raw caption with
    the highest probability of their tokens.
    """

    manipulated: float
    kinds: dict[str, float]
    box: tuple[float, float, float, float] | None
    words: list[tuple[str, float]]


def manipulation(run: Run, image: str | None = None, text: str | None = None) -> dict[str, Any]:
    """The verdict on one ``image`` (file) and its ``text``: on screen, in ``predictions.json`` and ``prediction.png``."""
    if not image or not text:
        raise UserError('predict needs an image and its caption: predict.image=a.jpg predict.text="what it says"')
    opened = open_required(image, f"predict.image: {image}", opener=partial(open_rgb, official=True, truncated=True))
    # The datamodule's settings without its data: a single pair needs no copy of DGM4.
    tokenizer, size = build(run.cfg.datamodule.tokenizer), run.cfg.datamodule.image_size
    module = parts.trained_module(run, {})
    finding = examine(module.model, tokenizer, opened, text, size)
    hammer.findings([(opened, finding, None)], run.dir / "prediction.png")
    write(run, [{"image": image, "text": text, **finding._asdict()}], *_lines(finding))
    return {"manipulated": finding.manipulated}


@torch.inference_mode()
def examine(model: Hammer, tokenizer: CaptionTokenizer, image: Image.Image, text: str, image_size: int) -> Finding:
    """``model``, in eval mode, on one RGB image and its raw caption."""
    device = next(model.parameters()).device
    tokens = tokenizer([text])
    if tokens.input_ids.shape[1] < 2:
        raise UserError(f"the caption {text!r} has no word that the model can read.")
    pixels = image_tensor(image, image_size)[None].to(device)
    output = model(pixels, tokens.input_ids.to(device), tokens.mask.to(device))
    kinds = output.multi_label[0].float().sigmoid().tolist()
    words, box = [], None
    if output.token is not None:
        raw = text.split()
        chances = [0.0] * len(raw)
        spans = raw_words(text, tokenizer.clean(text), tokens.spans[0])
        for word, chance in zip(spans, output.token[0].float().softmax(-1)[:, 1].tolist(), strict=True):
            if word >= 0:
                chances[word] = max(chances[word], chance)
        words = list(zip(raw, chances, strict=True))
    if output.box is not None:
        corners = box_convert(output.box.float(), "cxcywh", "xyxy")[0].clamp(0, 1)
        # A box that has all but vanished says that no region was manipulated; so does the head of the kinds.
        if not bool((corners < EMPTY).all()) and max(kinds[:2]) >= 0.5:
            box = tuple((corners.cpu() * torch.tensor([*image.size, *image.size])).tolist())
    verdict = output.real_fake[0].float().softmax(-1)[1].item()
    return Finding(verdict, dict(zip(MANIPULATIONS, kinds, strict=True)), box, words)


def _lines(finding: Finding) -> list[str | Text]:
    """The verdict as lines for the screen."""
    lines: list[str | Text] = [f"manipulated: {100 * finding.manipulated:.1f} %"]
    lines += [f"  {kind:15} {100 * chance:5.1f} %" for kind, chance in finding.kinds.items()]
    where = "none" if finding.box is None else ", ".join(f"{value:.0f}" for value in finding.box)
    words = Text("words: ")
    for word, chance in finding.words:
        words.append(word, style="bold red" if chance >= 0.5 else "").append(" ")
    return [*lines, f"region (x1, y1, x2, y2): {where}", words]
