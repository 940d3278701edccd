"""Inputs of texts without the places that are padding in all of them: tensors, or numpy's arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Inputs that have a place for every token, where there is an attention mask, by the names that transformers give them.
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def without_padding(inputs: Mapping[str, Any], tokens: int, longest: int) -> dict[str, Any] | None:
    """The inputs of texts of `tokens` places, without those from `longest` on.

    None where an input of a name of its own has as many numbers in a row: nobody knows whether they are of tokens.
    """
    wide = [name for name, x in inputs.items() if x.shape[1:2] == (tokens,)]
    if not set(wide) <= set(TOKENS):
        return None
    return {name: x[:, :longest] if name in wide else x for name, x in inputs.items()}
