import pytest

from models.hammer.parameter_groups import hammer_groups
from models.hammer.schedule import epoch_cosine
from tests.models.hammer.stand_in import small_hammer


def rates(steps, **options):
    curve = epoch_cosine(0, lr=1e-3, **options)
    return [1e-3 * curve(step) for step in steps]


def test_stairs_are_reached_one_step_late():
    found = rates([0, 10, 11, 20, 21, 99], steps_per_epoch=100, epochs=4, warmup_stairs=2, stair=10)
    middle = 1e-6 + (1e-3 - 1e-6) / 2
    assert found == pytest.approx([1e-6, 1e-6, middle, middle, 1e-3, 1e-3])


def test_a_short_first_epoch_cuts_the_warm_up():
    found = rates([4, 5, 10, 19, 20, 99], steps_per_epoch=5, epochs=4, warmup_stairs=10, stair=100, min_lr=1e-5)
    assert found[0] == pytest.approx(1e-6)
    assert found[1] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + 2**-0.5))
    assert found[2] == pytest.approx((1e-3 + 1e-5) / 2)
    assert found[4:] == pytest.approx([1e-5, 1e-5])


def test_groups_hold_every_trainable_parameter_once():
    model = small_hammer()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for scale in (5.0, None):
        groups = hammer_groups(model.named_parameters(), scale)
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, trainable))


def test_one_rate_spares_vectors_but_not_the_temperature():
    model = small_hammer()
    spared, decayed = hammer_groups(model.named_parameters(), None)
    assert spared["weight_decay"] == 0 and "weight_decay" not in decayed
    assert {p.ndim for p in spared["params"]} == {1}
    assert any(p is model.temp for p in decayed["params"])
    assert any(p is model.cls_token_local for p in decayed["params"])


def test_the_temperature_may_have_a_rate_of_its_own():
    model = small_hammer()
    for scale in (5.0, None):
        *_, last = hammer_groups(model.named_parameters(), scale, temperature_lr_scale=0.01)
        assert last["lr_scale"] == 0.01 and len(last["params"]) == 1 and last["params"][0] is model.temp
