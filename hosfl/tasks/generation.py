"""What a split decoder writes: greedy generation through both halves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hosfl.halves.split import SplitModel
from hosfl.tasks.data import evaluation_batch_size


@torch.no_grad()
def generate(
    halves: SplitModel, prompts: Sequence[Sequence[int]], most: int, stops: Collection[int], vocabulary: int
) -> list[list[int]]:
    """The tokens that follow each prompt, every one the likeliest: what transformers' `generate(do_sample=False)` adds.

    halves: of a decoder, in eval mode; its output is logits [batch, length, vocabulary]. prompts: tokens, one at least
    each. most: new tokens. stops: tokens at which a text ends; they are no part of it.

    There is no cache of keys and values, which would have to live on both sides of the cut: every new token is a pass
    over the whole text so far, without those texts that have ended. n tokens cost n passes over the prompt.

    Prompts are padded on the right. A decoder looks at nothing that is behind a token, so that positions, masks and
    logits at the last token of a text are those of the text alone, in every family.
    """
    device = next(halves.server.parameters()).device
    longest = max(map(len, prompts)) + most
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    together = evaluation_batch_size(longest, vocabulary)
    for begin in range(0, len(order), together):
        chosen = order[begin : begin + together]
        lengths = torch.tensor([len(prompts[i]) for i in chosen], device=device)
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64, device=device)
        for row, i in enumerate(chosen):
            tokens[row, : len(prompts[i])] = torch.tensor(prompts[i], device=device)
        going = torch.arange(len(chosen), device=device)
        for _ in range(most):
            following = _next(halves, tokens[going], lengths[going])
            kept = ~torch.isin(following, torch.tensor(list(stops), device=device))
            going = going[kept]
            if not len(going):
                break
            tokens[going, lengths[going]] = following[kept]
            lengths[going] += 1
        for row, i in enumerate(chosen):
            found[i] = tokens[row, len(prompts[i]) : int(lengths[row])].tolist()
    return found


def _next(halves: SplitModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The likeliest token behind each text."""
    places = torch.arange(int(lengths.max()), device=tokens.device)
    mask = (places < lengths[:, None]).long()
    logits = halves({"input_ids": tokens[:, : len(places)], "attention_mask": mask})
    return logits[torch.arange(len(logits), device=logits.device), lengths - 1].argmax(-1)
