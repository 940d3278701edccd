"""Language modelling: a decoder learns to complete prompts. Loss and perplexity are of the completions' tokens alone.

    {"prompt": "Translate: cat =>", "completion": " chat"}
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day!"}]}

A sample's labels are one for each token: the next token where that is a completion's, -100 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hosfl.halves.hub import fast_tokenizer_of, is_decoder, pretrained_model, stop_tokens, text_limits
from hosfl.halves.split import SplitModel, split
from hosfl.settings import Settings
from hosfl.tasks.answers import answer_scores
from hosfl.tasks.data import Dataset, group_ids, public_tokens, split_held_out
from hosfl.tasks.generation import generate
from hosfl.tasks.pretrained import cut_place
from hosfl.tasks.reading import DataError, Found, Row, check_type, field, read_json_lines, text_field
from hosfl.tasks.task import Scores, Task

IGNORED = -100  # the label of tokens that are no completion's: torch's cross_entropy, and transformers, leave it out
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")
TOKENIZER_BATCH = 1000  # texts to the tokenizer
MAX_TOKENS = 256  # tokens of a sample, where nobody says


# --- texts ----------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text and its completions, [begin, end) in characters, in order. Nothing is behind the last one.

    where: of the message. special: whether the tokenizer has to add its special tokens, which a template has written.
    """

    where: str
    text: str
    completions: list[tuple[int, int]]
    special: bool = True


def parts(folder: Path) -> tuple[list[Found], list[Found], list[Found]]:
    """Training, validation and test rows of a folder. Without validation.jsonl a tenth of train.jsonl is held out, the
    same in every run. Raises OSError; DataError naming file and line."""
    train, validation, test = (folder / name for name in FILES)
    rows = read_json_lines(train)
    if validation.exists() or validation.is_symlink():
        return rows, read_json_lines(validation), read_json_lines(test)
    kept, held = split_held_out(np.zeros(len(rows), np.int64))
    return [rows[i] for i in kept], [rows[i] for i in held], read_json_lines(test)


def as_text(row: Row, where: str, tokenizer: Any) -> Text:
    """A row with "prompt" and "completion", which are joined as they are, or with "messages". Raises DataError."""
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise DataError(f"{where}: messages beside prompt or completion: which is it? Take one away")
        return conversation(field(row, "messages", list, where), where, tokenizer)
    prompt, completion = (field(row, name, str, where) for name in ("prompt", "completion"))
    if not completion.strip():
        raise DataError(f"{where}: field 'completion' is empty: there is nothing to learn from it")
    return Text(where, prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def conversation(messages: Sequence[Any], where: str, tokenizer: Any) -> Text:
    """Messages as the tokenizer's chat template writes them; the assistant's turns, with their end, are completions.

    Raises DataError for messages that are none, and where a turn cannot be found in what the template writes.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template, which says how messages become"
            " a text: choose a model that was trained for conversation, set the tokenizer's chat_template and save it,"
            " or write samples with prompt and completion"
        )
    said = [_message(message, f"{where}, messages[{n}]") for n, message in enumerate(messages)]
    turns = [n for n, message in enumerate(said) if message["role"] == "assistant"]
    if not turns:
        raise DataError(f"{where}: no message has the role assistant: there is nothing to learn from it")
    if not turns[0]:
        raise DataError(f"{where}, messages[0]: the assistant speaks first: put a message before it that it answers")

    def written(count: int, ask: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(said[:count], tokenize=False, add_generation_prompt=ask))
        except Exception as error:  # a template raises what it likes, such as about roles that do not alternate
            raise DataError(f"{where}: the chat template refuses the messages: {error}") from None

    whole = written(turns[-1] + 1, ask=False)
    completions = []
    for n in turns:
        before, behind = written(n, ask=True), written(n + 1, ask=False)
        turn = whole[len(before) : len(behind)].rstrip()
        if not (whole.startswith(before) and whole.startswith(behind) and turn):
            raise DataError(
                f"{where}, messages[{n}]: the chat template writes this turn otherwise when others follow it: make a"
                " sample for each turn of the assistant, or write prompt and completion"
            )
        completions.append((len(before), len(before) + len(turn)))
    return Text(where, whole[: completions[-1][1]], completions, special=False)


def _message(value: Any, where: str) -> Row:
    message = check_type(value, dict, where)
    role, content = text_field(message, "role", where), field(message, "content", str, where)
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant's content is empty: there is nothing to learn from it")
    return {**message, "role": role}  # a template may read other fields


# --- tokens ---------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """What is known of a decoder without its weights. longest: tokens that it reads. stops: see `stop_tokens`."""

    name: str
    tokenizer: Any
    stops: list[int]
    vocabulary: int
    longest: int

    @classmethod
    def of(cls, name: str) -> Decoder:
        """Raises ImportError, OSError; ValueError for another kind of model, or a tokenizer that cannot serve."""
        if not is_decoder(name):
            raise ValueError(f"a decoder is needed, such as Llama, OPT or Qwen, and {name} is an encoder")
        tokenizer = fast_tokenizer_of(name)
        vocabulary, longest = text_limits(name)
        return cls(name, tokenizer, stop_tokens(name), vocabulary, min(longest, tokenizer.model_max_length))


def encode_texts(texts: Sequence[Text], decoder: Decoder, longest: int) -> Dataset:
    """Texts as tokens without the last one, which is only predicted, and labels int64 [n, length], padded on the right.

    A token is a completion's if it holds any of its characters. A token for the end follows the last completion, where
    the template has not written one. A text without prompt begins with the tokenizer's token for that.

    longest: tokens of a text. One that has more loses the beginning of its prompt, but not a special token there.
    Nothing of a completion is ever cut: raises DataError for a text that is too long from its first completion on;
    ValueError for tokens that the model does not know.
    """
    tokenizer = decoder.tokenizer
    samples: list[tuple[list[int], list[bool]]] = [([], [])] * len(texts)
    for special in (True, False):
        chosen = [i for i, text in enumerate(texts) if text.special is special]
        for begin in range(0, len(chosen), TOKENIZER_BATCH):
            some = chosen[begin : begin + TOKENIZER_BATCH]
            encodings = tokenizer(
                [texts[i].text for i in some],
                add_special_tokens=special,
                return_offsets_mapping=True,
                truncation=False,
                verbose=False,
            )
            for i, ids, offsets in zip(some, encodings["input_ids"], encodings["offset_mapping"], strict=True):
                samples[i] = _sample(texts[i], ids, offsets, decoder, longest)
    length = max(len(ids) for ids, _ in samples) - 1
    inputs = torch.full((len(samples), length), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(inputs), torch.full_like(inputs, IGNORED)
    for row, (ids, learnt) in enumerate(samples):
        tokens = torch.tensor(ids)
        if int(tokens.max()) >= decoder.vocabulary:
            raise ValueError(
                f"{texts[row].where}: token {int(tokens.max())} of the tokenizer, and the model knows"
                f" {decoder.vocabulary}: take the tokenizer that belongs to it, or enlarge its embeddings"
            )
        inputs[row, : len(ids) - 1], mask[row, : len(ids) - 1] = tokens[:-1], 1
        labels[row, : len(ids) - 1] = torch.where(torch.tensor(learnt[1:]), tokens[1:], IGNORED)
    return Dataset({"input_ids": inputs, "attention_mask": mask}, labels)


def _sample(
    text: Text, ids: list[int], offsets: Sequence[tuple[int, int]], decoder: Decoder, longest: int
) -> tuple[list[int], list[bool]]:
    """A text's tokens as `encode_texts` has them, and which of them are learnt."""
    tokenizer, learnt = decoder.tokenizer, _is_completion(offsets, text.completions)
    end = len(learnt) - learnt[::-1].index(True) if True in learnt else 0
    ids, learnt = ids[:end], learnt[:end]
    if not end:
        raise DataError(f"{text.where}: the tokenizer makes no token of the completion")
    if ids[-1] not in decoder.stops:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    if learnt[0]:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids, learnt = [first, *ids], [False, *learnt]
    return _truncate(ids, learnt, longest, tokenizer.all_special_ids, text.where)


def _is_completion(offsets: Sequence[tuple[int, int]], completions: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens are of a completion. A blank may be a token whose offsets are behind it, [a, a)."""
    return [
        any((a < end and begin < b) or begin < a == b <= end for begin, end in completions)  # specials are at [0, 0)
        for a, b in offsets
    ]


def _truncate(
    ids: list[int], learnt: list[bool], longest: int, special: Sequence[int], where: str
) -> tuple[list[int], list[bool]]:
    """Without so much of the prompt's beginning as is too long."""
    over = len(ids) - longest
    if over <= 0:
        return ids, learnt
    kept = 1 if ids[0] in special else 0
    prompt = learnt.index(True)
    if prompt - over < max(kept, 1):
        raise DataError(
            f"{where}: {len(ids) - prompt} tokens from its first completion on, and a sample may have {longest}, one of"
            " them of its prompt: raise longest, or make it shorter; a completion is never cut"
        )
    return ids[:kept] + ids[kept + over :], learnt[:kept] + learnt[kept + over :]


# --- loss and scores ------------------------------------------------------------------------------------------------


def completion_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy over the labels that count. outputs: [batch, length, vocabulary]; labels: [batch, length].

    A client's loss is the mean over the completions' tokens of its batch; the run's loss is the mean of the clients'
    losses, weighted as `aggregation` says: by samples, not by tokens. So a client with long completions counts no more
    than one with short ones. Both halves descend that one loss.
    """
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class Perplexity:
    """exp of the mean cross-entropy over all tokens that count, whatever the batches. Lower is better."""

    higher_is_better = False  # as torchmetrics say it

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.loss, self.tokens = 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """outputs: logits [batch, length, vocabulary]; labels: int64 [batch, length], -100 where they do not count."""
        count = int((labels != IGNORED).sum())
        if count:
            self.loss += float(completion_loss(outputs.float(), labels)) * count
            self.tokens += count

    def compute(self) -> float:
        return math.exp(min(700.0, self.loss / self.tokens))  # finite, since JSON has no infinity


def last_completions(data: Dataset) -> tuple[list[list[int]], list[list[int]]]:
    """(what stands before each text's last completion, that completion), as tokens."""
    assert isinstance(data.inputs, dict)
    prompts, completions = [], []
    for tokens, labels in zip(data.inputs["input_ids"].cpu(), data.labels.cpu(), strict=True):
        places = (labels != IGNORED).nonzero().flatten()
        gaps = (places.diff() > 1).nonzero().flatten()
        begin = int(places[int(gaps[-1]) + 1 if len(gaps) else 0])
        prompts.append(tokens[: begin + 1].tolist())
        completions.append(labels[begin : int(places[-1]) + 1].tolist())
    return prompts, completions


def generated_answers(halves: SplitModel, data: Dataset, decoder: Decoder, most: int) -> list[str]:
    """What the model writes in the place of each text's last completion: `most` tokens at most, without blanks at the
    ends."""
    prompts, _ = last_completions(data)
    found = generate(halves, prompts, most, decoder.stops, decoder.vocabulary)
    return [_text(tokens, decoder) for tokens in found]


def generation_scores(halves: SplitModel, data: Dataset, decoder: Decoder, most: int) -> Scores:
    """Exact match and F1 of what the model writes in the place of each text's last completion."""
    given = [[_text(tokens, decoder)] for tokens in last_completions(data)[1]]
    scores = answer_scores(generated_answers(halves, data, decoder, most), given)
    return {name: scores[name] for name in ("exact match", "F1")}


def _text(tokens: Sequence[int], decoder: Decoder) -> str:
    kept = [token for token in tokens if token not in decoder.stops]
    return str(decoder.tokenizer.decode(kept, skip_special_tokens=True)).strip()


# --- tasks ----------------------------------------------------------------------------------------------------------


def lm_task(
    config: Settings, longest: int = MAX_TOKENS, generate: int = 0, by: str = "", own: Dataset | None = None
) -> Task:
    """Completions of prompts, or an assistant's turns, with a decoder that is named by config.model.

    config.data: a folder with train.jsonl, test.jsonl and, if it is not to be a tenth of the training part,
    validation.jsonl; see `as_text`. longest: tokens of a sample, see `encode_texts`. generate: the
    largest number of new tokens, from which exact match and F1 are scored beside the perplexity; 0: no generation. by:
    a field of the training part's rows, by whose values clients' data differ; without it they do not differ, and
    config.partition is "iid". own: a client's
    samples, in place of the folder's.

    The objective: see `completion_loss`.
    """
    if not config.data and own is None:
        raise ValueError(f"the lm task needs data: a folder with {FILES[0]} and {FILES[2]}")
    if not config.model:
        raise ValueError("the lm task needs a model: a decoder, on the hub or a folder")
    if longest < 2 or generate < 0:
        raise ValueError(f"longest must be at least 2 and generate at least 0, got {longest} and {generate}")
    if config.partition != "iid" and not by:
        raise ValueError(
            "texts have no classes by which clients' data could differ: use partition iid, or name a field of the rows"
            " with the option by"
        )
    decoder = Decoder.of(config.model)
    if longest + generate > decoder.longest:
        also = f" and {generate} that are generated" if generate else ""
        raise ValueError(f"{config.model} reads {decoder.longest} tokens: {longest}{also} are too many; lower longest")
    if own is not None:
        return completion_task(config, decoder, [own, own, own], metrics={"perplexity": Perplexity()})
    found = parts(Path(config.data))
    texts = [[as_text(row, where, decoder.tokenizer) for where, row in part] for part in found]
    scores = (lambda halves, data: generation_scores(halves, data, decoder, generate)) if generate else None
    groups = None
    if by:
        groups = group_ids([text_field(row, by, where) for where, row in found[0]])
    return completion_task(
        config,
        decoder,
        [encode_texts(part, decoder, longest) for part in texts],
        metrics={"perplexity": Perplexity()},
        generated=scores,
        groups=groups,
    )


def own_completions(config: Settings, path: Path, longest: int) -> Dataset:
    """One client's samples: a file such as train.jsonl, or a folder with one. longest: tokens that the half reads."""
    decoder = Decoder.of(config.model)
    rows = read_json_lines(path / FILES[0] if path.is_dir() else path)
    most = min(longest + 1, int(config.options.get("longest", MAX_TOKENS)))  # the last one is only predicted
    return encode_texts([as_text(row, where, decoder.tokenizer) for where, row in rows], decoder, most)


def completion_task(config: Settings, decoder: Decoder, data: Sequence[Dataset], **more: Any) -> Task:
    """A task of completing texts. data: training, validation and test part; more: of `Task`."""
    train, validation, test = data

    def model() -> SplitModel:
        return split(pretrained_model(decoder.name, "CausalLM"), cut_place(config))

    return Task(
        model=model,
        train=train,
        validation=validation,
        test=test,
        loss=completion_loss,
        classes=decoder.vocabulary,
        ignore_index=IGNORED,
        public=public_tokens(decoder.name),
        **more,
    )
