"""Removing the padding that all texts of a batch have in common, from tensors or numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Inputs with a value for every token, by their names in transformers.
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def without_padding(inputs: Mapping[str, Any], tokens: int, longest: int) -> dict[str, Any] | None:
    """Cut the inputs of texts, padded to `tokens` tokens, after the first `longest` tokens.

    None if an input of an unknown name also has `tokens` as its second size: it may or may not be one value per token.
    """
    wide = [name for name, x in inputs.items() if x.shape[1:2] == (tokens,)]
    if not set(wide) <= set(TOKEN_INPUTS):
        return None
    return {name: x[:, :longest] if name in wide else x for name, x in inputs.items()}
