"""Greedy generation through both halves is the whole model's, token for token, for every family of decoders."""

import pytest
import torch
from test_split import TEXT, text_model

from hosfl.halves.families import FAMILIES
from hosfl.halves.split import split
from hosfl.tasks import data, generation
from hosfl.tasks.generation import generate

DECODERS = [name for name in TEXT if FAMILIES[name].decoder]
PROMPTS = [[11, 5, 60, 7, 30, 2, 88, 19], [42], [3, 71, 12], [9, 8, 7, 6]]
NEW, VOCABULARY, NEVER = 6, 97, 1000


def decoder(family, end=None):
    model = text_model(family, "words")
    with torch.no_grad():  # what such small weights say hardly depends on the text
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = 0
    return model


def whole(model, prompts):
    """What transformers generates for each prompt alone, with its cache; without the token that ends a text."""
    end, found = model.generation_config.eos_token_id, []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        new = made[0, len(prompt) :].tolist()
        found.append(new[:-1] if new[-1] == end else new)
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_the_halves_write_what_the_model_writes(family):
    """Also with a token at which some of the texts end, which is one that they write."""
    model = decoder(family)
    expected = whole(model, PROMPTS)
    assert {len(text) for text in expected} == {NEW}
    assert len({tuple(text) for text in expected}) > 2
    for at in (0, 1, 3):
        assert generate(split(model, at, verify=False), PROMPTS, NEW, [NEVER], VOCABULARY) == expected, at
    end = expected[0][3]
    model.generation_config.eos_token_id = end
    shorter = whole(model, PROMPTS)
    assert shorter != expected
    assert generate(split(model, 1, verify=False), PROMPTS, NEW, [NEVER, end], VOCABULARY) == shorter


def test_texts_that_have_ended_cost_nothing_more():
    model = decoder("llama")
    free = whole(model, PROMPTS)
    ends = {text[n] for text, n in zip(free, (0, 1, 2, 3), strict=True)}
    halves, sizes = split(model, 1), []
    halves.server.register_forward_hook(lambda module, given, output: sizes.append(tuple(output.shape[:2])))
    found = generate(halves, PROMPTS, NEW, ends, VOCABULARY)
    for text, was in zip(found, free, strict=True):
        assert text == was[: next(n for n, token in enumerate(was) if token in ends)]
    assert found[0] == []  # one that ends at once
    longest = max(map(len, found))
    assert [batch for batch, _ in sizes] == [sum(len(text) >= n for text in found) for n in range(longest + 1)]
    assert sizes[0] == (4, 8)


def test_few_at_a_time_write_the_same(monkeypatch):
    model = decoder("qwen2")
    halves, seen = split(model, 1), []
    expected = generate(halves, PROMPTS, NEW, [NEVER], VOCABULARY)
    monkeypatch.setattr(data, "MAX_OUTPUTS", 2 * VOCABULARY * (8 + NEW))
    halves.server.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    assert generate(halves, PROMPTS, NEW, [NEVER], VOCABULARY) == expected
    assert {shape[0] for shape in seen} == {2}
    assert seen[0][1] == 3  # short ones with short ones
    assert all(shape.numel() <= data.MAX_OUTPUTS for shape in seen)
    assert expected == whole(model, PROMPTS)


def test_nothing_to_write():
    halves = split(decoder("gpt2"), 1)
    assert generation.generate(halves, PROMPTS, 0, [NEVER], VOCABULARY) == [[]] * 4
