"""Managers in LLaVA-OneVision's visual stream, at the smallest size."""

import pytest
import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from models.io import CheckpointError
from models.two_tower.llava import ManagedLlava
from models.two_tower.visual_stream import StreamManagers

IMAGE_TOKEN, WIDTH, EXPERTS = 39, 16, (1, 2)
KINDS = ("static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross")


def small_llava() -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40, max_position_embeddings=128,
        ),
        image_token_id=IMAGE_TOKEN, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]], vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config).eval()


def small_managed(kind: str = "static", drawn: bool = True, **options) -> ManagedLlava:
    managers = StreamManagers(WIDTH, len(EXPERTS) + 1, (0, 2), kind)
    if drawn:
        for parameter in managers.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return ManagedLlava(small_llava(), managers, (*EXPERTS, 3), **options).eval()


def inputs(grid: bool = True) -> dict[str, torch.Tensor]:
    """Two samples of one image each, the second of another shape, questions of different lengths, right padded."""
    torch.manual_seed(1)
    sizes = torch.tensor([[16, 16], [8, 16]]) if grid else torch.tensor([[8, 8], [8, 8]])
    pixels = torch.randn(2, 5 if grid else 1, 3, 8, 8)
    # Four base tokens, then per row of the tiled image its tokens and a newline; without tiles one newline.
    visual = (4 + 4 * 5, 4 + 2 * 5) if grid else (5, 5)
    rows = [[7, *[IMAGE_TOKEN] * count, *range(10, 10 + extra)] for count, extra in zip(visual, (3, 5), strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    query = torch.tensor([[len(row) - 2, len(row) - 1] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes, "query": query}


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_new_managers_change_nothing_and_trained_ones_do(kind, grid):
    given = inputs(grid)
    plain = {name: value for name, value in given.items() if name != "query"}
    managed = small_managed(kind, drawn=False)
    real = given["attention_mask"].bool()
    ours = managed(**given).logits[real]
    if grid:
        torch.testing.assert_close(ours, managed.llava(**plain).logits[real], rtol=1e-4, atol=1e-5)
    drawn = small_managed(kind)(**given).logits[real]
    assert not torch.allclose(ours, drawn, atol=1e-3)


@pytest.mark.parametrize("grid_type, changed", [("all", 24), ("main", 4), ("grid", 20)])
def test_the_grid_type_says_which_tokens_change(grid_type, changed):
    managed, given = small_managed(grid_type=grid_type), inputs()
    prepared = managed.prepare(given["input_ids"], given["pixel_values"], given["image_sizes"])
    assert int((prepared.span[0] >= 0).sum()) == changed and prepared.experts.shape == (2, 3, 24, WIDTH)
    places = prepared.span[prepared.span >= 0]
    assert bool((given["input_ids"][0][places[:changed]] == IMAGE_TOKEN).all())


def test_static_managers_add_the_weighted_experts():
    managed, given = small_managed(), inputs()
    prepared = managed.prepare(given["input_ids"], given["pixel_values"], given["image_sizes"])
    seen = []
    managed.llava.model.language_model.layers[0].register_forward_hook(
        lambda m, args, kwargs, out: seen.append(args[0]), with_kwargs=True
    )
    managed(**given)
    expected = prepared.embeds.clone()
    weights = managed.managers.manager[0].layer_scores[0, :, 0]
    added = torch.einsum("nld,nd->ld", prepared.experts[0, :2, :24], weights)
    expected[0, 1:25] += added
    torch.testing.assert_close(seen[0][0], expected[0])


def test_generation_continues_the_managed_prompt():
    """Greedy tokens with the cache equal those of whole passes."""
    managed = small_managed("adaptive_cross")
    given = {name: value[:1] for name, value in inputs().items()}
    length = int(given["attention_mask"].sum())
    given |= {name: given[name][:, :length] for name in ("input_ids", "attention_mask")}
    new = managed.generate(**given, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = given["input_ids"]
    for _ in range(3):
        whole = {**given, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids = torch.cat([ids, managed(**whole).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(new, ids[:, length:])


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_the_managers(kind):
    managed, given = small_managed(kind).train(), inputs()
    managed.llava.requires_grad_(False)
    optimizer = torch.optim.AdamW(managed.managers.parameters(), lr=1e-2)
    labels = torch.where(given["input_ids"] == IMAGE_TOKEN, -100, given["input_ids"]).masked_fill(
        given["attention_mask"] == 0, -100
    )
    losses = []
    for _ in range(12):
        loss = managed(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in managed.managers.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_official_managers_are_loaded():
    source, target = small_managed(), small_managed(drawn=False)
    weights = {f"model.{name}": value for name, value in source.managers.state_dict().items()} | {
        "model.norm.weight": torch.ones(1)
    }
    target.load_official_managers(weights)
    torch.testing.assert_close(target.managers.state_dict(), source.managers.state_dict())
    with pytest.raises(CheckpointError):
        target.load_official_managers({"model.manager.0.layer_scores": torch.zeros(1, 2, 1, 8)})
    with pytest.raises(ValueError, match="2 expert layers"):
        ManagedLlava(source.llava, source.managers, (1, 2))
