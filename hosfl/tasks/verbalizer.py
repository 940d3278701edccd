"""A decoder as a classifier: its outputs are the logits of the classes' words as the token after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hosfl.halves.hub import tokenizer_of
from hosfl.halves.modules import replace_submodule
from hosfl.halves.split import SplitModel, split


def first_tokens(name: str, prompt_end: str, words: Sequence[str]) -> list[int]:
    """Return the first token of each word as a model's tokenizer encodes it after the end of a prompt.

    Raises ValueError for words that begin with the same token: the next token does not distinguish them.
    """
    tokenizer = tokenizer_of(name)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = ids(prompt_end)
    tokens: dict[int, str] = {}
    for word in words:
        # The first token that differs, since a tokenizer may join the prompt's end with the word's beginning.
        token = next(t for i, t in enumerate(ids(prompt_end + word)) if i >= len(prompt) or t != prompt[i])
        if token in tokens:
            piece = tokenizer.convert_ids_to_tokens(token)
            raise ValueError(f"{tokens[token]!r} and {word!r} begin with the same token of {name}, {piece!r}")
        tokens[token] = word
    return list(tokens)


class SelectedRows(nn.Module):
    """An output layer restricted to some tokens: hidden states [..., width] -> logits [..., len(tokens)]."""

    def __init__(self, layer: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.tokens = layer, list(tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return nn.functional.linear(hidden, weight[self.tokens], None if bias is None else bias[self.tokens])


class LastToken(nn.Module):
    """A server half whose outputs [batch, n] are the logits at each sample's last token, whichever side is padded."""

    def __init__(self, server: nn.Module) -> None:
        super().__init__()
        self.server = server

    def forward(self, cut: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.server(cut, attention_mask=attention_mask)
        if attention_mask is None:
            return logits[:, -1]
        positions = torch.arange(logits.shape[1], device=logits.device)
        last = (positions * attention_mask).argmax(1)
        return logits[torch.arange(len(logits), device=logits.device), last]


def select_tokens(model: nn.Module, tokens: Sequence[int]) -> nn.Module:
    """Return a causal language model that outputs the logits of some tokens only; it shares the model's weights."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    path = next(path for path, module in model.named_modules() if module is layer)
    return replace_submodule(model, path, SelectedRows(layer, tokens))


def split_with_selected_tokens(model: nn.Module, tokens: Sequence[int], at: int | str) -> SplitModel:
    """Split a causal language model whose outputs are the logits of some tokens as the next one, [batch, len(tokens)].

    Raises what `hosfl.split` raises.
    """
    halves = split(select_tokens(model, tokens), at)
    return SplitModel(halves.client, LastToken(halves.server))
