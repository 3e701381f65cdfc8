from functools import partial

import pytest
import torch

from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector, LinearProjector, MLPProjector
from models.io import CheckpointError, read_tensors
from models.sail.checkpoint import head_from_official, to_official
from models.sail.sharelock import ShareLockHead

HEADS = {
    "star": lambda: AlignmentHead(6, 4, 5, partial(GatedProjector, width_factor=3)),
    "mlp": lambda: AlignmentHead(6, 4, 5, MLPProjector),
    "linear": lambda: AlignmentHead(6, 4, 5, LinearProjector),
    "mixed": lambda: AlignmentHead(6, 4, 5, partial(GatedProjector, width_factor=2), text_projector=LinearProjector),
    "vision only": lambda: AlignmentHead(6, None, 5, GatedProjector),
    "sharelock": lambda: ShareLockHead(6, 4, hidden_dim=7),
}


def shaken(head):
    """No weight at its initial value, so that a swapped pair of tensors shows."""
    with torch.no_grad():
        for tensor in head.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return head.eval()


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.vlhead.", "vlhead.", "module.vlhead._orig_mod."])
def test_there_and_back(tmp_path, kind, prefix):
    head = shaken(HEADS[kind]())
    official = {prefix + name: tensor for name, tensor in to_official(head).items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": official, "optimizer": {}}, tmp_path / "epoch_3.pt")
    again = head_from_official(read_tensors(tmp_path / "epoch_3.pt")).eval()
    assert type(again) is type(head)
    assert again.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    image = torch.randn(3, 6)
    assert torch.equal(again.encode_image(image), head.encode_image(image))


def test_official_names_and_shapes():
    """The table of SAIL's released layout, at small widths."""
    shapes = {name: tuple(tensor.shape) for name, tensor in to_official(HEADS["star"]()).items()}
    assert shapes == {
        "logit_scale": (1,), "logit_bias": (1,),
        "vision_layer_norm.weight": (6,), "vision_layer_norm.bias": (6,),
        "vision_mapping_network.f1.weight": (18, 6), "vision_mapping_network.f1.bias": (18,),
        "vision_mapping_network.f2.weight": (18, 6), "vision_mapping_network.f2.bias": (18,),
        "vision_mapping_network.g.weight": (5, 18), "vision_mapping_network.g.bias": (5,),
        "text_layer_norm.weight": (4,), "text_layer_norm.bias": (4,),
        "text_mapping_network.f1.weight": (12, 4), "text_mapping_network.f1.bias": (12,),
        "text_mapping_network.f2.weight": (12, 4), "text_mapping_network.f2.bias": (12,),
        "text_mapping_network.g.weight": (5, 12), "text_mapping_network.g.bias": (5,),
    }  # fmt: skip
    names = to_official(HEADS["sharelock"]())
    assert names["logit_scale"].shape == names["logit_bias"].shape == ()
    assert {int(n.split(".")[2]) for n in names if n.startswith("text_mapping_network.layers.")} == {0, 1, 4, 5, 8, 9, 12}


def test_a_full_model_brings_its_encoders_along():
    head = shaken(HEADS["star"]())
    weights = {f"vlhead.{k}": v for k, v in to_official(head).items()} | {"vision_model.cls_token": torch.ones(1)}
    assert torch.equal(head_from_official(weights).logit_bias, head.logit_bias)


def test_half_precision_weights_become_float32():
    weights = {k: v.half() for k, v in to_official(HEADS["linear"]()).items()}
    assert head_from_official(weights).logit_bias.dtype == torch.float32


@pytest.mark.parametrize("kind", HEADS)
def test_any_missing_tensor_is_an_error(kind):
    official = to_official(HEADS[kind]())
    for name in official:
        if name.endswith("num_batches_tracked"):
            continue  # a counter that changes nothing
        with pytest.raises(CheckpointError, match="missing|SAIL head"):
            head_from_official({k: v for k, v in official.items() if k != name})


@pytest.mark.parametrize("kind", HEADS)
def test_any_extra_tensor_is_an_error(kind):
    with pytest.raises(CheckpointError, match="unexpected"):
        head_from_official(to_official(HEADS[kind]()) | {"extra.weight": torch.ones(1)})


def test_wrong_shapes_are_an_error():
    official = to_official(HEADS["star"]())
    with pytest.raises(CheckpointError, match="another shape"):
        head_from_official(official | {"text_mapping_network.g.weight": torch.ones(3, 12)})


def test_another_architecture_is_named():
    with pytest.raises(CheckpointError, match="not the weights of a SAIL head.*layer1.0.conv1.weight"):
        head_from_official({"layer1.0.conv1.weight": torch.ones(2, 2, 1, 1)})


def test_unknown_projector_cannot_be_exported():
    with pytest.raises(CheckpointError, match="Identity"):
        to_official(AlignmentHead(5, 5, 5, lambda a, b: torch.nn.Identity()))
