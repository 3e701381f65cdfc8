"""The shared transformer parts against transformers' BERT, whose names they have."""

import pytest
import torch
from transformers import BertConfig, RobertaConfig
from transformers.models.bert.modeling_bert import BertEmbeddings as OfficialEmbeddings
from transformers.models.bert.modeling_bert import BertLayer as OfficialLayer
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from models.io import load_strictly
from models.layers.bert import BertEmbeddings, BertLayer
from models.layers.heads import mlp_head

SIZES = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "vocab_size": 30, "max_position_embeddings": 16}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if not name.endswith(("position_ids", "token_type_ids"))}


@pytest.mark.parametrize("cross", [False, True])
def test_layer_is_bert(cross):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, is_decoder=cross, add_cross_attention=cross, attn_implementation="eager")
    official, ours = OfficialLayer(config).eval(), BertLayer(12, 3, 20, 0.1, cross).eval()
    load_strictly(ours, weights_of(official))
    x, context, mask = torch.randn(2, 5, 12), torch.randn(2, 4, 12), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    context_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    additive, context_additive = ((1 - m[:, None, None].float()) * -10000 for m in (mask, context_mask))
    wanted = (
        official(x, additive, encoder_hidden_states=context, encoder_attention_mask=context_additive)
        if cross
        else official(x, additive)
    )
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(ours(x, mask, context, context_mask), wanted, rtol=1e-5, atol=1e-6)


def test_queries_of_fewer_tokens_give_those_rows():
    layer = BertLayer(12, 3, 20, 0.0, cross=False)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer.attention(x[:, :1], x), layer.attention(x, x)[:, :1])


def test_embeddings_are_berts_and_robertas():
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 1, 1]])
    official = OfficialEmbeddings(BertConfig(**SIZES)).eval()
    ours = BertEmbeddings(30, 16, 12, 0.1).eval()
    load_strictly(ours, weights_of(official))
    torch.testing.assert_close(ours(ids), official(ids))
    official = RobertaEmbeddings(RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)).eval()
    ours = BertEmbeddings(30, 16, 12, 0.1, eps=1e-5, padding_id=1, token_types=1).eval()
    load_strictly(ours, weights_of(official))
    torch.testing.assert_close(ours(ids, torch.tensor([[2, 3, 4, 5], [2, 3, 1, 1]])), official(ids))


def test_texts_beyond_the_position_table_are_refused():
    with pytest.raises(ValueError, match="17 tokens"):
        BertEmbeddings(30, 16, 12, 0.1)(torch.zeros(1, 17, dtype=torch.int64))


def test_mlp_head_has_the_widths_it_is_given():
    widths = [tuple(p.shape) for p in mlp_head(4, 8, 6, out=2).parameters() if p.ndim == 2]
    assert widths == [(8, 4), (6, 8), (2, 6)]
