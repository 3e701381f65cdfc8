from functools import partial

import pytest
import torch

from models.bev_fusion.cadconv import CaDConv, gather_taps, stacked_taps
from models.bev_fusion.decoder import FUSIONS, Fusion
from models.bev_fusion.network import BEVFusion, image_backbone
from models.bev_fusion.refinement import DeformableConv, PlainDilated
from models.bev_fusion.view import ViewTransform
from models.errors import UserError

SMALL = partial(image_backbone, name="test_resnet", pretrained=False)


def inputs(heights=2, rows=8, echo_side=32):
    torch.manual_seed(0)
    grid = torch.rand(2, heights, rows, rows, 2) * 2 - 1
    return torch.rand(2, 3, 48, 64), grid, torch.rand(2, heights, rows, rows) > 0.2, torch.rand(2, 3, echo_side, echo_side)


def build(**settings) -> BEVFusion:
    torch.manual_seed(0)
    defaults = {"channels": 16, "heights": 2, "refinement": partial(CaDConv, groups=4)}
    return BEVFusion(SMALL, SMALL, **{**defaults, **settings})


@pytest.mark.parametrize("dilations, groups", [((1, 2, 3), 4), ((2,), 1), ((1, 4), 8)])
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (3, 16, 5, 9)])
def test_shifted_taps_equal_the_unfolded_ones(dilations, groups, shape):
    torch.manual_seed(0)
    batch, _, height, width = shape
    value = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(batch, len(dilations), height, width, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(batch, len(dilations), groups, 9, height, width, dtype=torch.float64, requires_grad=True)
    ours, reference = gather_taps(value, alpha, taps, dilations), stacked_taps(value, alpha, taps, dilations)
    torch.testing.assert_close(ours, reference)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (value, alpha, taps)),
        torch.autograd.grad((reference * weight).sum(), (value, alpha, taps)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_chunks_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    value, alpha, taps = torch.randn(3, 8, 6, 6), torch.rand(3, 2, 6, 6), torch.rand(3, 2, 4, 9, 6, 6)
    whole = gather_taps(value, alpha, taps, (1, 2))
    for chunk in (1, 130, 1500):
        monkeypatch.setattr("models.bev_fusion.cadconv.CPU_VALUES", chunk)
        torch.testing.assert_close(gather_taps(value, alpha, taps, (1, 2)), whole)


def test_half_precision_loses_only_the_last_rounding():
    torch.manual_seed(0)
    value, alpha = torch.randn(2, 8, 7, 6).bfloat16(), torch.randn(2, 3, 7, 6).softmax(1)
    taps = torch.randn(2, 3, 4, 9, 7, 6).softmax(3)
    ours, exact = gather_taps(value, alpha, taps, (1, 2, 3)), stacked_taps(value.float(), alpha, taps, (1, 2, 3))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("layer", [CaDConv(16), CaDConv(16, mode="select"), PlainDilated(16, 2), DeformableConv(16)])
def test_alignment_starts_as_the_identity(layer):
    x = torch.rand(2, 16, 8, 8)  # not negative: the last step is a ReLU
    torch.testing.assert_close(layer.eval()(x), x)


@pytest.mark.parametrize("kind", FUSIONS)
def test_fusion_gives_the_width_it_promises(kind):
    fusion = Fusion(kind, 4)
    assert fusion(torch.rand(1, 4, 3, 3), torch.rand(1, 4, 3, 3)).shape == (1, fusion.out_channels, 3, 3)


@pytest.mark.parametrize("pooling", ["concat", "mean", "softmax"])
def test_what_no_height_shows_is_zero_before_mixing(pooling):
    view = ViewTransform(4, 2, pooling)
    view.mix = torch.nn.Identity()
    _, grid, valid, _ = inputs()
    valid[:, :, 3, 3] = False
    out = view(torch.rand(2, 4, 6, 8), grid, valid)
    assert (out[:, :, 3, 3] == 0).all()
    assert out.isfinite().all() and out.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"modality": "camera_only"}, {"modality": "ultrasonic_only"}, {"place": "late"}, {"refinement": None},
     {"fuse": "gated", "refine_at": "fused"}, {"refine_at": "camera", "pooling": "softmax", "num_classes": 4}],
)  # fmt: skip
def test_every_switch_gives_maps_and_gradients_to_all_parameters(settings):
    model = build(**settings)
    image, grid, valid, echo = inputs()
    found = model(image, grid, valid, echo)
    assert found.coarse.shape == (2, 1, 8, 8)
    assert found.classes.shape == (2, settings.get("num_classes", 2), 16, 16)
    (found.coarse.square().sum() + found.classes.square().sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not [name for name in missing if not name.startswith(("camera_encoder", "ultrasonic_encoder"))]


def test_early_fusion_needs_the_grid_of_the_echo_map():
    model = build(place="early")
    image, grid, valid, echo = inputs(heights=1, rows=32)
    assert model(image, grid, valid, echo).classes.shape == (2, 2, 16, 16)
    with pytest.raises(UserError, match="view_scale"):
        model(*inputs())


def test_modalities_depend_on_their_sensor_alone():
    image, grid, valid, echo = inputs()
    camera, ultrasonic = build(modality="camera_only").eval(), build(modality="ultrasonic_only").eval()
    torch.testing.assert_close(camera(image, grid, valid, None), camera(image, grid, valid, echo))
    torch.testing.assert_close(ultrasonic(image, grid, valid, echo), ultrasonic(image * 0, grid, valid, echo))


def test_unknown_words_are_answered():
    with pytest.raises(UserError, match="unknown 'radar'"):
        build(modality="radar")
