"""Layouts of DINOv2 backbones, against timm and transformers themselves."""

import pytest
import timm
import torch
import transformers

from models.encoders.vision import HFVisionEncoder
from models.io import CheckpointError
from models.rad_dino.backbone import DinoViT
from models.rad_dino.checkpoint import (
    backbone_weights,
    export_transformers,
    load_backbone,
    load_official,
    sizes,
)
from models.rad_dino.head import DinoHead
from models.rad_dino.model import StudentAndTeacher
from models.rad_dino.preprocess import released_preprocess

REGISTERS = {"registers": 3, "position_offset": 0.0, "position_antialias": True}


def small(**more) -> DinoViT:
    torch.manual_seed(0)
    model = DinoViT(**{"image_size": 56, "dim": 48, "depth": 2, "heads": 3, "init_values": 0.5, **more}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("more", [{}, REGISTERS, {"ffn": "swiglu"}], ids=["plain", "registers", "swiglu"])
def test_transformers_reads_what_we_export_and_we_read_its_modules(tmp_path, more):
    model, images = small(**more), torch.randn(2, 3, 56, 56)
    export_transformers(model, tmp_path / "encoder", released_preprocess(56))
    network = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    back = DinoViT(**{**sizes(backbone_weights(network.state_dict())), "heads": 3}).eval()
    load_backbone(back, network.state_dict())
    with torch.no_grad():
        ours, theirs, again = model(images), network(pixel_values=images).last_hidden_state, back(images)
    torch.testing.assert_close(ours.cls, theirs[:, 0])
    torch.testing.assert_close(ours.patches, theirs[:, 1 + model.registers :])
    assert torch.equal(ours.cls, again.cls)


def test_the_alignment_family_reads_what_we_export(tmp_path):
    model = small()
    export_transformers(model, tmp_path / "encoder", released_preprocess(56))
    encoder = HFVisionEncoder("rad_dino", weights=str(tmp_path / "encoder"), pooling="cls")
    assert encoder.preprocess == released_preprocess(56)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(encoder(images).pooled, model(images).cls.detach())


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"])
def test_timm_names(name):
    network = timm.create_model(name, num_classes=0, img_size=56, depth=2, embed_dim=48, num_heads=3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = DinoViT(**{**sizes(backbone_weights(network.state_dict())), "heads": 3}).eval()
    load_backbone(model, network.state_dict())
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(images).cls, network.forward_features(images)[:, 0], rtol=1e-4, atol=1e-5)


def test_blocks_in_chunks_and_a_teacher_checkpoint():
    model = small()
    weights = {f"backbone.{name}".replace("blocks.1.", "blocks.1.1."): v for name, v in model.state_dict().items()}
    weights = {name.replace("blocks.0.", "blocks.0.0."): value for name, value in weights.items()}

    def head(width):
        return DinoHead(width, 20, 16, 8)

    pair = StudentAndTeacher(lambda: small(drop_path=0.1), head)
    official = {f"dino_head.{name}": torch.randn_like(value) for name, value in pair.student["dino_head"].state_dict().items()}
    load_official(pair, weights | official)
    for network in (pair.student, pair.teacher):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in network["backbone"].state_dict().items())
        assert torch.equal(network["dino_head"].last_layer.weight_v, official["dino_head.last_layer.weight_v"])


def test_positions_of_another_size_are_resized():
    model = small(image_size=84)
    load_backbone(model, small().state_dict())
    torch.testing.assert_close(model.pos_embed.data, small().positions(84, 84).data)


def test_other_files_are_refused():
    with pytest.raises(CheckpointError, match="no|not"):
        backbone_weights({"conv1.weight": torch.zeros(1)})
