"""A decoder as a classifier: after a prompt, which of the classes' words does it expect next?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hosfl.halves.hub import tokenizer_of
from hosfl.halves.modules import replace_submodule
from hosfl.halves.split import SplitModel, split


def first_tokens(name: str, end: str, words: Sequence[str]) -> list[int]:
    """The first token of each word as a model's tokenizer writes it behind the end of a prompt.

    Raises ValueError naming words that begin with the same token: the model's next token cannot tell them apart.
    """
    tokenizer = tokenizer_of(name)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before = ids(end)
    tokens: dict[int, str] = {}
    for word in words:
        both = ids(end + word)
        # Not simply what is behind the prompt: a tokenizer may join its end with the word's beginning.
        token = next(t for i, t in enumerate(both) if i >= len(before) or t != before[i])
        if token in tokens:
            piece = tokenizer.convert_ids_to_tokens(token)
            raise ValueError(f"{tokens[token]!r} and {word!r} begin with the same token of {name}, {piece!r}")
        tokens[token] = word
    return list(tokens)


class SelectedRows(nn.Module):
    """Some rows of an output layer: hidden states [..., width] -> logits [..., len(tokens)]."""

    def __init__(self, layer: nn.Module, tokens: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.tokens = layer, list(tokens)

    def forward(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return nn.functional.linear(hidden, weight[self.tokens], None if bias is None else bias[self.tokens])


class LastToken(nn.Module):
    """A server half's logits [batch, length, n] at each sample's last token, on whichever side its padding is."""

    def __init__(self, server: nn.Module) -> None:
        super().__init__()
        self.server = server

    def forward(self, cut: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.server(cut, attention_mask=attention_mask)
        if attention_mask is None:
            return logits[:, -1]
        places = torch.arange(logits.shape[1], device=logits.device)
        last = (places * attention_mask).argmax(1)
        return logits[torch.arange(len(logits), device=logits.device), last]


def with_words(model: nn.Module, tokens: Sequence[int]) -> nn.Module:
    """A causal language model whose logits are those of some tokens only; shares the model's weights."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    path = next(path for path, module in model.named_modules() if module is layer)
    return replace_submodule(model, path, SelectedRows(layer, tokens))


def split_with_words(model: nn.Module, tokens: Sequence[int], at: int | str) -> SplitModel:
    """A causal language model cut in two, whose output is the logits of some tokens behind the text, [batch, tokens].

    Raises what `hosfl.split.split` raises.
    """
    halves = split(with_words(model, tokens), at)
    return SplitModel(halves.client, LastToken(halves.server))
