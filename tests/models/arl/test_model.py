"""ARL's shortcuts give what the plain forms give, and its parts what their formulas say."""

import pytest
import torch
import torch.nn.functional as F

from models.arl import objectives as knowledge_objectives
from models.arl.graph import NO_ENTITY, GraphAttention, pick
from models.arl.masked_image import patch_pixels, remove_patches, sincos_positions
from models.two_tower import objectives
from tests.models.arl.stand_in import ENTITIES, small_arl, small_inputs


def encode(model, padded=12, trim=True):
    ids, mask, images, entities, cover = small_inputs(padded)
    text = model.with_entities(model.encode_text(ids, mask, trim), entities, cover, model.encode_entities())
    return text, model.encode_image(images)


def plain_attention(layer: GraphAttention, x, edges):
    """One node and one head at a time."""
    values = (x @ layer.lin.weight.T).unflatten(-1, (layer.heads, -1))
    out = torch.zeros_like(values)
    pairs = [(s, t) for s, t in edges.T.tolist() if s != t] + [(node, node) for node in range(len(x))]
    for node in range(len(x)):
        sources = [s for s, t in pairs if t == node]
        for head in range(layer.heads):
            own = values[node, head] @ layer.att_dst[0, head]
            scores = torch.stack([values[s, head] @ layer.att_src[0, head] + own for s in sources])
            weights = F.leaky_relu(scores, layer.slope).softmax(dim=0)
            out[node, head] = sum(w * values[s, head] for w, s in zip(weights, sources, strict=True))
    return (out.flatten(1) if layer.concat else out.mean(dim=1)) + layer.bias


@pytest.mark.parametrize("heads, concat", [(3, True), (1, False), (2, False)])
def test_graph_attention_equals_the_formula(heads, concat):
    torch.manual_seed(0)
    layer = GraphAttention(5, 4, heads, concat).eval()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(6, 5, requires_grad=True)
    edges = torch.tensor([[0, 0, 1, 2, 2, 3, 4], [1, 1, 0, 2, 3, 0, 0]])  # a repeated one, one to itself, a lonely node
    torch.testing.assert_close(layer(x, edges), plain_attention(layer, x, edges))
    ours, plain = (torch.autograd.grad(f.square().sum(), x)[0] for f in (layer(x, edges), plain_attention(layer, x, edges)))
    torch.testing.assert_close(ours, plain)


def test_empty_places_of_entities_are_zero():
    table = torch.randn(4, 3)
    picked = pick(table, torch.tensor([[2, NO_ENTITY], [NO_ENTITY, 0]]))
    torch.testing.assert_close(
        picked, torch.stack([torch.stack([table[2], torch.zeros(3)]), torch.stack([torch.zeros(3), table[0]])])
    )


@pytest.mark.parametrize("source", ["graph", "table"])
def test_reading_less_trimming_and_starting_change_nothing(source):
    model = small_arl(entity_source=source)
    ids, mask, images, entities, cover = small_inputs()
    whole = model(ids, mask, images, entities, cover)
    text, image = encode(model)
    assert text.mask.shape[1] < ids.shape[1]
    torch.testing.assert_close(model.fuse(text, image, read="first").pooled, whole.pooled)
    real = text.mask.bool()
    torch.testing.assert_close(model.fuse(text, image, read="text").text[real], whole.text[:, : real.shape[1]][real])
    torch.testing.assert_close(model.fuse(text, image, read="image").image, whole.image)
    order = torch.tensor([2, 0, 3, 1])
    pairs = model.fuse(model.start("text", text).rows(order), model.start("image", image).rows(order))
    torch.testing.assert_close(pairs.pooled, whole.pooled[order])
    longer = model(*[part for part in small_inputs(14)])
    torch.testing.assert_close(longer.pooled, whole.pooled)


def test_fewer_levels_are_the_first_ones():
    model = small_arl()
    text, image = encode(model)
    seen = []
    model.cross_modal_image_layers[2].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.fuse(text, image)
    torch.testing.assert_close(model.fuse(text, image, read="image", levels=2).image, seen[0])


def test_no_entities():
    """Without entities, and with empty places alone, the result is the same; it is not that of the plain two-tower layers."""
    model = small_arl()
    ids, mask, images, entities, cover = small_inputs()
    none = model(ids, mask, images).pooled
    torch.testing.assert_close(
        model(ids, mask, images, torch.full_like(entities, NO_ENTITY), torch.zeros_like(cover)).pooled, none
    )
    some = model(ids, mask, images, entities, cover).pooled
    torch.testing.assert_close(some[3], none[3])
    assert not torch.isclose(some[:3], none[:3]).all(dim=1).any()
    assert bool(some.isfinite().all())


def test_the_graph_reaches_what_the_entity_alone_does_not():
    model = small_arl()
    model.align_head.set_graph(torch.tensor([[1, 0]] * 20))  # entity 1 is read by entity 0
    before = model.encode_entities()
    with torch.no_grad():
        model.align_head.x[1] += torch.randn(8)
    changed = (model.encode_entities() != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 1]


def test_masked_images():
    model = small_arl()
    text, _ = encode(model)
    images = small_inputs()[2]
    noise = torch.rand(4, 16)
    patches = remove_patches(noise, 0.75)
    assert patches.left.shape == (4, 4) and patches.removed.sum(dim=1).tolist() == [12.0] * 4
    assert bool((patches.removed.gather(1, patches.left) == 0).all())
    whole = model.encode_image(images, patches=torch.arange(16).expand(4, -1))
    torch.testing.assert_close(whole.experts[0], model.encode_image(images).experts[0])
    restored = knowledge_objectives.masked_image(model, text, images, noise, levels=1)
    # Pixels of removed patches do not reach the prediction.
    other = torch.where(patches.removed.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) == 1, 7.0, images)
    torch.testing.assert_close(knowledge_objectives.masked_image(model, text, other, noise, levels=1).logits, restored.logits)
    error = (restored.logits - patch_pixels(images, 4)).square().mean(dim=-1)
    torch.testing.assert_close(restored.loss, error[patches.removed == 1].mean())
    torch.testing.assert_close(
        patch_pixels(images, 4, normalise=False)[1, 6], images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten()
    )
    assert knowledge_objectives.masked_image(model, text, images, noise, levels=0).logits.shape == restored.logits.shape


def test_positions_tell_column_then_row():
    positions = sincos_positions(3, 8)
    assert positions.shape == (10, 8) and bool((positions[0] == 0).all())
    table = positions[1:].unflatten(0, (3, 3))
    assert bool((table[0, :, 4:] == table[0, :1, 4:]).all()) and bool((table[:, 1, :4] == table[:1, 1, :4]).all())


def test_every_parameter_gets_a_gradient():
    """DDP waits for the gradient of each parameter that asks for one; the last layer's entities are read by nobody."""
    model = small_arl().train()
    ids, mask, images, _, _ = small_inputs()
    text, image = encode(model, trim=False)
    labels = torch.zeros(4, ENTITIES)
    total = objectives.masked_language(model, text, image, torch.where(mask == 1, ids, -100))[0]
    total = total + knowledge_objectives.masked_image(model, text, images, levels=2).loss
    total = total + objectives.matching(model, text, image, torch.tensor([1, 0, 1, 0]))[0]
    total = total + knowledge_objectives.align(model, text, image, model.encode_entities(), labels, labels).loss
    total = (
        total + objectives.answer_logits(model, text, image).sum() + knowledge_objectives.class_logits(model, text, image).sum()
    )
    (total + objectives.rank_scores(model, text, image).sum()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    last = "cross_modal_text_layers.2.knowledge_"
    assert without == {n for n, _ in model.named_parameters() if n.startswith((f"{last}intermediate", f"{last}output"))}
