"""Block Transformer: transformers' GPT-NeoX put together as the authors do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_form import error, in_chunks, load_module, new_state, random_model, recognised_by
from tolerances import TOLERANCES
from torch import Tensor, nn

from xexport.core.checkpoint import open_checkpoint
from xexport.core.errors import InputError, LimitError
from xexport.core.registry import get_family
from xexport.models.block_transformer import BlockTransformerConfig

FAMILY = get_family("block_transformer")
TINY: BlockTransformerConfig = FAMILY.presets["tiny"]


class Authors(nn.Module):
    """The authors' model with their names: lookup embedder, two GPT-NeoX of transformers, prefix decoding."""

    def __init__(self, block: int, prefix: int, width: int, token_width: int, heads: int = 16) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="the oracle is not installed")

        def decoder(hidden: int, layers: int) -> Any:
            config = transformers.GPTNeoXConfig(
                vocab_size=29,
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=2 * hidden,
                max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                },
                initializer_range=0.3,
            )
            return transformers.GPTNeoXModel(config)

        self.block, self.prefix = block, prefix
        self.embedder, self.block_decoder, self.token_decoder = nn.Module(), nn.Module(), nn.Module()
        self.embedder.embeddings = nn.Embedding(29, width // block)
        self.block_decoder.gpt_neox = decoder(width, 2)
        self.block_decoder.gpt_neox.embed_in = None
        self.token_decoder.gpt_neox = decoder(token_width, 1)
        self.token_decoder.expansion_layer = nn.Conv1d(width, prefix * token_width, 1)
        self.token_decoder.embed_out = nn.Linear(token_width, 29, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p) * 0.1)

    def forward(self, blocks: Tensor) -> Tensor:
        """``[N,P]`` -> logits ``[N-1,P,V]`` of the tokens of every block but the first."""
        rows = self.embedder.embeddings(blocks).flatten(1)
        context = self.block_decoder.gpt_neox(inputs_embeds=rows[None]).last_hidden_state
        expanded = self.token_decoder.expansion_layer(context.transpose(1, 2)).transpose(1, 2)[0, :-1]
        given_ = expanded.reshape(len(blocks) - 1, self.prefix, -1)
        read = self.token_decoder.gpt_neox.embed_in(blocks[1:, :-1])
        hidden = self.token_decoder.gpt_neox(inputs_embeds=torch.cat((given_, read), 1)).last_hidden_state
        logits: Tensor = self.token_decoder.embed_out(hidden[:, self.prefix - 1 :])
        return logits


@pytest.mark.oracle
@pytest.mark.parametrize(("block", "prefix"), [(4, 2), (3, 1), (2, 3)])
def test_parity_with_gpt_neox_put_together(tmp_path: Path, block: int, prefix: int) -> None:
    torch.manual_seed(0)
    width = 16 * 8 * (3 if block == 3 else 1)
    model = Authors(block, prefix, width, 128).eval().requires_grad_(False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    raw = open_checkpoint(tmp_path / "model.pt")
    assert recognised_by(raw) == {"block_transformer"}
    module = load_module(FAMILY, tmp_path / "model.pt")
    tokens = torch.randint(0, 29, (1, 5 * block))
    # the block before the first is one of end tokens; the logits after token t are those of token t+1
    blocks = torch.cat((torch.zeros(1, block, dtype=torch.int64), tokens.view(-1, block)))
    want = model(blocks).flatten(0, 1)[1:]
    got = in_chunks(module, tokens, new_state(module, 1), [1, 2, block + 3, block + 4])[0]
    assert error(got[0, :-1], want) < TOLERANCES["oracle_fp32"]


def test_the_longest_stream() -> None:
    module = random_model(FAMILY, replace(TINY, blocks=3))
    assert module.max_tokens == 9
    _, *state = module(torch.zeros(1, 9, dtype=torch.int64), *new_state(module, 1))
    with pytest.raises(LimitError):
        module(torch.zeros(1, 4, dtype=torch.int64), *state)


@pytest.mark.parametrize(
    "change", [{"block": 0}, {"block": 5}, {"heads": 5}, {"rotary": 0.4}, {"start_token": 29}], ids=str
)
def test_a_bad_configuration_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TINY, **change)


def test_preset_has_the_published_parameter_count() -> None:
    """85 million besides the embeddings, the head and the prefix' expansion (the authors' name for it)."""
    with torch.device("meta"):
        module = FAMILY.build(FAMILY.presets["85m"])
    inside = sum(p.numel() for n, p in module.named_parameters() if ".layers." in n)
    assert inside == pytest.approx(85e6, rel=5e-3)
