"""The whole network: what it costs, that shortcuts change nothing, and that every setting does what its name says."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.reference import avgn as plain
from models.avgn.compute import counting_macs
from models.avgn.encoders import MobileNetV2, ResNet50
from models.avgn.exits import apply_exit, exit_confidence, exit_thresholds
from models.avgn.network import take
from tests.models.avgn.conftest import small_network


@torch.no_grad()
def test_counted_macs_are_those_of_an_independent_counter(network, videos, monkeypatch):
    frames, clips, heard = videos
    spectrograms = network.front_end(clips)
    network.front_end = torch.nn.Identity()  # published figures leave spectrograms out
    # The plain kernels: the counter does not know the fused attention of CPUs.
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    with sdpa_kernel(SDPBackend.MATH), counting_macs(network) as ours, FlopCounterMode(display=False) as theirs:
        network(frames, spectrograms, heard)
    assert sum(ours.values()) == theirs.get_total_flops() // 2
    assert set(ours) == {"global_CNN", "audio_CNN", "avtest", "aespa", "policy", "local_CNN", "classifier"}


@torch.no_grad()
@pytest.mark.parametrize(
    "encoder, side, channels, giga",
    [(MobileNetV2, 224, 3, 0.299), (MobileNetV2, (64, 128), 1, 0.048), (ResNet50, 96, 3, 0.751), (ResNet50, 128, 3, 1.335)],
)
def test_large_encoders_cost_what_is_published(encoder, side, channels, giga):
    built = encoder(**({} if encoder is ResNet50 else {"channels": channels}), pretrained=False).eval()
    height, width = side if isinstance(side, tuple) else (side, side)
    with counting_macs(built) as counted:
        built(torch.zeros(1, channels, height, width))
    assert sum(counted.values()) / 1e9 == pytest.approx(giga, abs=0.001)


@torch.no_grad()
def test_parts_that_are_not_needed_do_not_run(videos):
    network = small_network(order="temporal", num_selected=6, patch_size=32)
    with counting_macs(network) as counted:
        network(*videos)
    assert set(counted) == {"global_CNN", "audio_CNN", "local_CNN", "classifier"}
    with network.using(modality="visual"), counting_macs(network) as counted:
        network(*videos)
    assert "audio_CNN" not in counted


@torch.no_grad()
@pytest.mark.parametrize("criterion", ["confidence", "entropy"])
def test_early_exit_on_shrinking_batches_is_the_exit_of_all_logits(network, videos, criterion):
    logits = network(*videos).logits.transpose(0, 1)
    thresholds = exit_thresholds(exit_confidence(logits, criterion), 1.0)
    expected = apply_exit(logits, thresholds, criterion)
    assert len(set(expected.steps.tolist())) > 1  # otherwise nothing shrinks
    found = network.early_exit(*videos, thresholds, criterion)
    assert found.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_batched_pass_is_the_two_passes(network, videos):
    frames = videos[0]
    glance = network.glance(*videos)
    indices = network.choose(glance, 3, "saliency", "saliency")[0]
    places = [network.look(glance, indices), torch.rand(4, 3, 2)]
    patches = torch.cat([network.patches(frames, indices, place) for place in places])
    local = network.local_CNN(patches).unflatten(0, (-1, 3))
    fused = torch.cat([network.fuse(glance, indices, part) for part in local.chunk(2)])
    expected = torch.cat(plain.two_passes(network, frames, glance, indices, places))
    torch.testing.assert_close(network.classifier(fused), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_policy_sees_frames_in_time_whatever_their_order(network, videos):
    torch.nn.init.normal_(network.policy.fc[0].weight)
    glance = network.glance(*videos)
    ascending = torch.tensor([[0, 2, 5]]).expand(4, 3)
    shuffled = ascending[:, [2, 0, 1]]
    torch.testing.assert_close(
        network.look(glance, shuffled), take(network.look(glance, ascending), torch.tensor([[2, 0, 1]] * 4))
    )


@torch.no_grad()
def test_an_untrained_policy_looks_at_the_middle_or_where_chance_put_it(videos):
    for start, moved in (("middle", False), ("chance", True)):
        network = small_network(policy_start=start)
        actions = network(*videos).actions
        assert bool((actions != 0.5).any()) is moved


@torch.no_grad()
def test_selections_hear_and_see_what_they_should(network, videos):
    frames, clips, heard = videos
    louder, darker = clips * 3 - 0.2, frames // 3

    def scores(select, frames=frames, clips=clips, heard=heard):
        return network.saliency(network.glance(frames, clips, heard), select=select).logits

    torch.testing.assert_close(scores("saliency_visual", clips=louder), scores("saliency_visual"))
    torch.testing.assert_close(scores("saliency_audio", frames=darker), scores("saliency_audio"))
    for changed in ({"frames": darker}, {"clips": louder}):
        assert not torch.allclose(scores("saliency", **changed), scores("saliency"))
    silent = torch.tensor([True, False, True, True])
    assert bool(torch.isfinite(scores("saliency_audio", heard=silent)).all())


@torch.no_grad()
def test_missing_sound_is_the_learnt_stand_in(network, videos):
    frames, clips, _ = videos
    network.audio_missing.fill_(0.3)
    glance = network.glance(frames, clips, torch.tensor([True, False, True, True]))
    assert bool((glance.audio[1] == 0.3).all()) and not bool((glance.audio[0] == 0.3).all())


@torch.no_grad()
def test_settings_hold_for_a_while_only(network, videos):
    before = network(*videos)
    with pytest.raises(RuntimeError), network.using(num_selected=2, select="uniform", patch_size=8):
        assert network(*videos).logits.shape == (4, 2, 5)
        raise RuntimeError
    torch.testing.assert_close(network(*videos).logits, before.logits)
    with network.using(select="random", policy_form="random"):
        assert not torch.equal(network(*videos).actions, before.actions)
    with network.using(policy_form="centre"):
        assert bool((network(*videos).actions == 0.5).all())


@torch.no_grad()
def test_patches_of_bytes_are_those_of_normalised_frames(network, videos):
    indices, actions = torch.tensor([[1, 4]] * 4), torch.rand(4, 2, 2)
    torch.testing.assert_close(
        network.patches(videos[0], indices, actions), network.patches(network.pixels(videos[0]), indices, actions)
    )


def test_without_aespa_the_policy_takes_the_map_itself(videos):
    network = small_network(aespa="none")
    assert network.policy.encoder[0].in_channels == network.global_CNN.out_dim
    assert network(*videos).actions.shape == (4, 3, 2)
