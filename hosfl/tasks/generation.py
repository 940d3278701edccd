"""Greedy generation by a split decoder, through both halves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hosfl.halves.split import SplitModel
from hosfl.tasks.data import evaluation_batch_size


@torch.no_grad()
def generate(
    halves: SplitModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: Collection[int], vocabulary: int
) -> list[list[int]]:
    """Return the tokens that continue each prompt, as transformers' `generate(do_sample=False)` does.

    halves: of a decoder, in eval mode; its output is logits [batch, length, vocabulary]. prompts: of one token or more.
    stops: tokens that end a text; they are not returned.

    There is no cache of keys and values, which would have to exist on both sides of the cut: every new token takes a
    pass over the whole text so far. Texts that have ended are left out of it.

    Prompts are padded on the right. No token of a decoder attends to later ones, so positions, masks and logits at the
    last token of a text are those of the text alone, in every family.
    """
    device = next(halves.server.parameters()).device
    longest = max(map(len, prompts)) + max_new_tokens
    generated: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch = evaluation_batch_size(longest, vocabulary)
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        lengths = torch.tensor([len(prompts[i]) for i in chosen], device=device)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64, device=device)
        for row, i in enumerate(chosen):
            tokens[row, : len(prompts[i])] = torch.tensor(prompts[i], device=device)
        unfinished = torch.arange(len(chosen), device=device)
        for _ in range(max_new_tokens):
            next_tokens = _next_tokens(halves, tokens[unfinished], lengths[unfinished])
            goes_on = ~torch.isin(next_tokens, torch.tensor(list(stops), device=device))
            unfinished = unfinished[goes_on]
            if not len(unfinished):
                break
            tokens[unfinished, lengths[unfinished]] = next_tokens[goes_on]
            lengths[unfinished] += 1
        for row, i in enumerate(chosen):
            generated[i] = tokens[row, len(prompts[i]) : int(lengths[row])].tolist()
    return generated


def _next_tokens(halves: SplitModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the most likely next token of each text, int64 [batch]."""
    places = torch.arange(int(lengths.max()), device=tokens.device)
    mask = (places < lengths[:, None]).long()
    logits = halves({"input_ids": tokens[:, : len(places)], "attention_mask": mask})
    return logits[torch.arange(len(logits), device=logits.device), lengths - 1].argmax(-1)
