from models.hammer.parameter_groups import hammer_groups
from tests.models.hammer.stand_in import small_hammer


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
