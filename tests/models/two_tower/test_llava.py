"""Managers in LLaVA-OneVision's visual stream, at the smallest size."""

import pytest
import torch

from models.two_tower.llava import managed_llava
from models.two_tower.tiles import grid_of, pinpoints, visual_tokens

IMAGE_TOKEN, WIDTH, SIDE, PATCHES = 39, 16, 8, 2
KINDS = ("static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross")
GRIDS = ((2, 1), (1, 2), (2, 2))
SIZES = {
    "vocab_size": 40, "image_size": SIDE, "patch_size": 4, "vision_width": 12, "vision_layers": 3, "vision_heads": 2,
    "vision_intermediate": 24, "width": WIDTH, "layers": 4, "heads": 4, "key_value_heads": 2, "intermediate": 32, "every": 2,
    "init_std": 0.1,
}  # fmt: skip


def small(kind: str = "static", drawn: bool = True, grids=GRIDS, **options):
    torch.manual_seed(0)
    model = managed_llava(**SIZES, grids=grids, kind=kind, **options)
    if drawn and model.managers is not None:
        generator = torch.Generator().manual_seed(3)
        for parameter in model.managers.parameters():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model.eval()


def inputs(grids=GRIDS, cut: int | None = None) -> dict:
    """An image, another one of another shape, and a text alone, with questions of different lengths, right padded."""
    torch.manual_seed(1)
    sizes, points = [(16, 16), (8, 16), (0, 0)], None if grids is None else pinpoints(grids, SIDE)
    tiles = [torch.randn(count, 3, SIDE, SIDE) for count in ((5, 3, 0) if grids else (1, 1, 0))]
    visual = [visual_tokens(size, points, SIDE, PATCHES) if len(part) else 0 for size, part in zip(sizes, tiles, strict=True)]
    rows = [[7, *[IMAGE_TOKEN] * count, *range(10, 10 + extra)] for count, extra in zip(visual, (3, 5, 4), strict=True)]
    spans = [(1, min(count, (cut or 99) - 1)) for count in visual]
    query = [[len(row) - 2, len(row) - 1] for row in rows[:2]] + [[-1, -1]]
    rows = [row[:cut] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"ids": ids, "mask": mask, "tiles": tiles, "sizes": sizes, "spans": spans, "query": torch.tensor(query)}


def of(given: dict, *rows: int) -> dict:
    """Some of the rows."""
    return {
        name: value[list(rows)] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
        for name, value in given.items()
    }


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (5, 16), (13, 7), (90, 30)])
@pytest.mark.parametrize("grids", [GRIDS, 6])
def test_visual_tokens_are_counted_as_they_are_arranged(size, grids):
    """With grids of up to 6 x 6 tiles the patches of large images are shrunk."""
    model = small(grids=grids)
    rows, columns = grid_of(size, model.llava.config.image_grid_pinpoints, SIDE)
    (packed,) = model._encode([torch.randn(1 + rows * columns, 3, SIDE, SIDE)], [size])
    assert len(packed) == visual_tokens(size, pinpoints(grids, SIDE), SIDE, PATCHES)


def test_the_defaults_are_the_sizes_of_the_paper():
    """Six managers of 13 experts and their layer embedding have 80,640 parameters; the first one leaves an expert out."""
    with torch.device("meta"):
        model = managed_llava(grids=6)
    assert sum(p.numel() for p in model.managers.parameters()) == 68_992 + 11_648
    assert model.managers.layers == (0, 4, 8, 12, 16, 20) and model.expert_layers == tuple(range(13, 26))
    assert visual_tokens((2304, 2304), model.llava.config.image_grid_pinpoints, 384, 27) == 729 + 81 * 82


def test_grids_are_columns_by_rows():
    assert pinpoints(((1, 2), (3, 1)), 384) == [[768, 384], [384, 1152]]
    assert pinpoints(2, 10) == [[10, 10], [20, 10], [10, 20], [20, 20]]


@pytest.mark.parametrize("kind", KINDS)
def test_without_managers_it_is_transformers_and_new_managers_change_nothing(kind):
    given, model = inputs(), small(kind, drawn=False)
    ours, bare = model(**given), small(managed=False)
    bare.llava.load_state_dict(model.llava.state_dict())
    torch.testing.assert_close(ours, bare(**given))
    model.llava.config.image_token_id = IMAGE_TOKEN
    padded = torch.stack([torch.cat([part, part.new_zeros(5 - len(part), 3, SIDE, SIDE)]) for part in given["tiles"][:2]])
    sizes = torch.tensor(given["sizes"][:2])
    theirs = model.llava(given["ids"][:2], attention_mask=given["mask"][:2], pixel_values=padded, image_sizes=sizes).logits
    real = given["mask"][:2].bool()
    torch.testing.assert_close(model.logits(ours[:2])[real], theirs[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grids", [GRIDS, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_batch(kind, grids):
    """Nor on the padding of its question, which is not there in a batch of one."""
    given, model = inputs(grids), small(kind, grids=grids)
    together, bare = model(**given), small(managed=False, grids=grids)
    bare.llava.load_state_dict(model.llava.state_dict())
    for row in range(3):
        alone, length = of(given, row), int(given["mask"][row].sum())
        alone |= {name: alone[name][:, :length] for name in ("ids", "mask")}
        torch.testing.assert_close(model(**alone)[0], together[row, :length], rtol=1e-4, atol=1e-5)
    changed = (together - bare(**given)).abs().amax(dim=(1, 2))
    assert bool((changed[:2] > 1e-3).all()) and changed[2] == 0  # a text alone has no visual tokens


@pytest.mark.parametrize("grids", [GRIDS, None])
def test_sums_before_the_tiles_are_arranged_are_the_sums_behind_it(grids):
    """In training as well: with one jitter the states are the same, and so are the gradients."""
    gradients = []
    for fold in (True, False):
        model = small(grids=grids, fold=fold).train()
        torch.manual_seed(5)
        states = model(**inputs(grids))
        states.square().sum().backward()
        gradients.append([states, *(p.grad for p in (*model.managers.parameters(), *model.llava.model.parameters()))])
    for folded, plain in zip(*gradients, strict=True):
        if plain is not None:
            torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)
        assert (folded is None) == (plain is None)


@pytest.mark.parametrize("grid_type, changed", [("all", 24), ("main", 4), ("grid", 20)])
def test_the_grid_type_says_which_tokens_change(grid_type, changed):
    given, model = inputs(), small(grid_type=grid_type, fold=False)
    prepared = model.prepare(*(given[name] for name in ("ids", "tiles", "sizes", "spans")))
    assert int((prepared.span[0] >= 0).sum()) == changed and prepared.experts.shape == (3, 2, 24, WIDTH)
    places = prepared.span[0][prepared.span[0] >= 0]
    assert bool((given["ids"][0][places] == IMAGE_TOKEN).all()) and int((prepared.span[2] >= 0).sum()) == 0


def test_static_managers_add_the_weighted_experts():
    given, model = inputs(), small(fold=False)
    prepared = model.prepare(*(given[name] for name in ("ids", "tiles", "sizes", "spans")))
    seen = []
    model.llava.model.language_model.layers[0].register_forward_hook(
        lambda m, args, kwargs, out: seen.append(args[0]), with_kwargs=True
    )
    small_sum = model.managers.manager[0].layer_scores[0, :, 0]
    model(**given)
    expected = prepared.embeds[0].clone()
    expected[1:25] += torch.einsum("nld,nd->ld", prepared.experts[0, :-1], small_sum)
    torch.testing.assert_close(seen[0][0], expected)


def test_what_is_cut_off_the_sequence_is_cut_off_the_image():
    """The states of a sequence that ends inside the visual tokens are those of its beginning."""
    model, whole, cut = small(), inputs(), inputs(cut=20)
    assert [count for _, count in cut["spans"]] == [19, 14, 0]
    states, expected = model(**cut), model(**whole)
    torch.testing.assert_close(states[0], expected[0, :20], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="visual tokens"):
        model(**{**whole, "spans": [(1, 25), (1, 14), (1, 0)]})


def test_generation_continues_the_managed_prompt():
    """Greedy tokens with the cache equal those of whole passes."""
    model, given = small("adaptive_cross"), of(inputs(), 0)
    length = int(given["mask"].sum())
    given |= {name: given[name][:, :length] for name in ("ids", "mask")}
    new = model.generate(**given, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = given["ids"]
    for _ in range(3):
        whole = {**given, "ids": ids, "mask": torch.ones_like(ids)}
        ids = torch.cat([ids, model.logits(model(**whole)[:, -1:]).argmax(-1)], dim=1)
    assert torch.equal(new, ids[:, length:])


@pytest.mark.parametrize("grids", [GRIDS, None])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_from_texts_alone(kind, grids):
    """Ranks with images in their batch wait for those of the others."""
    gradients = []
    for rows in ((0, 2), (2, 2)):
        model = small(kind, grids=grids).train()
        states = model(**of(inputs(grids), *rows))
        model.logits(states).square().sum().backward()
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] == gradients[1] and any(name.startswith("managers.") for name in gradients[0])
