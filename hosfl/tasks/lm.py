"""Language modelling: a decoder learns to complete prompts. Only the completions' tokens count in loss and perplexity.

    {"prompt": "Translate: cat =>", "completion": " chat"}
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day!"}]}

A sample has a label for each token: the next token if that is part of a completion, else -100.
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
from hosfl.tasks.reading import DataError, LocatedRow, Row, check_type, field, read_json_lines, text_field
from hosfl.tasks.task import Scores, Task

IGNORED = -100  # the label where the next token is no completion's: torch's cross_entropy and transformers ignore it
FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")
TOKENIZER_BATCH = 1000  # texts per call of the tokenizer
MAX_TOKENS = 256  # tokens of a sample, by default


# --- texts ----------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text and its completions, [begin, end) in characters, in order. The text ends with the last one.

    where: its place in the data, for errors. special: whether the tokenizer has to add special tokens; False if a chat
    template has written them.
    """

    where: str
    text: str
    completions: list[tuple[int, int]]
    special: bool = True


def load_parts(folder: Path) -> tuple[list[LocatedRow], list[LocatedRow], list[LocatedRow]]:
    """Read the training, validation and test rows of a folder.

    Without validation.jsonl a tenth of train.jsonl is held out, the same in every run. Raises OSError; DataError naming
    file and line.
    """
    train, validation, test = (folder / name for name in FILES)
    rows = read_json_lines(train)
    if validation.exists() or validation.is_symlink():
        return rows, read_json_lines(validation), read_json_lines(test)
    kept, held_out = split_held_out(np.zeros(len(rows), np.int64))
    return [rows[i] for i in kept], [rows[i] for i in held_out], read_json_lines(test)


def as_text(row: Row, where: str, tokenizer: Any) -> Text:
    """Convert a row, with "prompt" and "completion", which are joined as they are, or with "messages".

    Raises DataError for any other row.
    """
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise DataError(f"{where}: messages beside prompt or completion: which is it? Take one away")
        return conversation(field(row, "messages", list, where), where, tokenizer)
    prompt, completion = (field(row, name, str, where) for name in ("prompt", "completion"))
    if not completion.strip():
        raise DataError(f"{where}: field 'completion' is empty: there is nothing to learn from it")
    return Text(where, prompt + completion, [(len(prompt), len(prompt) + len(completion))])


def conversation(messages: Sequence[Any], where: str, tokenizer: Any) -> Text:
    """Render messages by the tokenizer's chat template. The assistant's turns, with their ends, are the completions.

    Raises DataError for invalid messages, and if a turn cannot be located in the rendered text.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: the tokenizer of {tokenizer.name_or_path} has no chat template, which says how messages become"
            " a text: choose a model that was trained for conversation, set the tokenizer's chat_template and save it,"
            " or write samples with prompt and completion"
        )
    checked = [_check_message(message, f"{where}, messages[{n}]") for n, message in enumerate(messages)]
    turns = [n for n, message in enumerate(checked) if message["role"] == "assistant"]
    if not turns:
        raise DataError(f"{where}: no message has the role assistant: there is nothing to learn from it")
    if not turns[0]:
        raise DataError(f"{where}, messages[0]: the assistant speaks first: put a message before it that it answers")

    def render(count: int, prompt: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(checked[:count], tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # of any type: templates raise their own, such as for roles that do not alternate
            raise DataError(f"{where}: the chat template refuses the messages: {error}") from None

    whole = render(turns[-1] + 1, prompt=False)
    completions = []
    for n in turns:
        before, through = render(n, prompt=True), render(n + 1, prompt=False)
        turn = whole[len(before) : len(through)].rstrip()
        if not (whole.startswith(before) and whole.startswith(through) and turn):
            raise DataError(
                f"{where}, messages[{n}]: the chat template writes this turn otherwise when others follow it: make a"
                " sample for each turn of the assistant, or write prompt and completion"
            )
        completions.append((len(before), len(before) + len(turn)))
    return Text(where, whole[: completions[-1][1]], completions, special=False)


def _check_message(value: Any, where: str) -> Row:
    message = check_type(value, dict, where)
    role, content = text_field(message, "role", where), field(message, "content", str, where)
    if role == "assistant" and not content.strip():
        raise DataError(f"{where}: the assistant's content is empty: there is nothing to learn from it")
    return {**message, "role": role}  # a template may read other fields


# --- tokens ---------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """A decoder's tokenizer and limits, without its weights.

    stops: tokens that end a text: see `stop_tokens`. vocabulary: the number of tokens. longest: the most tokens that it
    reads.
    """

    name: str
    tokenizer: Any
    stops: list[int]
    vocabulary: int
    longest: int

    @classmethod
    def of(cls, name: str) -> Decoder:
        """Load them by the model's name.

        Raises ImportError, OSError; ValueError for another kind of model, or an unsuitable tokenizer.
        """
        if not is_decoder(name):
            raise ValueError(f"a decoder is needed, such as Llama, OPT or Qwen, and {name} is an encoder")
        tokenizer = fast_tokenizer_of(name)
        vocabulary, longest = text_limits(name)
        return cls(name, tokenizer, stop_tokens(name), vocabulary, min(longest, tokenizer.model_max_length))


def encode_texts(texts: Sequence[Text], decoder: Decoder, longest: int) -> Dataset:
    """Tokenize texts: inputs without the last token, which is only predicted, and labels int64 [n, length].

    They are padded on the right. A token belongs to a completion if it holds any of its characters. An end token
    follows the last completion, unless the template has written one. A text without prompt begins with the tokenizer's
    token for the beginning.

    longest: the most tokens of a text. A longer one loses the beginning of its prompt, but not a special token there.
    Completions are never cut. Raises DataError for a text that is too long from its first completion on; ValueError for
    tokens that the model does not know.
    """
    tokenizer = decoder.tokenizer
    samples: list[tuple[list[int], list[bool]]] = [([], [])] * len(texts)
    for special in (True, False):
        chosen = [i for i, text in enumerate(texts) if text.special is special]
        for begin in range(0, len(chosen), TOKENIZER_BATCH):
            batch = chosen[begin : begin + TOKENIZER_BATCH]
            encodings = tokenizer(
                [texts[i].text for i in batch],
                add_special_tokens=special,
                return_offsets_mapping=True,
                truncation=False,
                verbose=False,
            )
            for i, ids, offsets in zip(batch, encodings["input_ids"], encodings["offset_mapping"], strict=True):
                samples[i] = _finish_tokens(texts[i], ids, offsets, decoder, longest)
    length = max(len(ids) for ids, _ in samples) - 1
    inputs = torch.full((len(samples), length), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(inputs), torch.full_like(inputs, IGNORED)
    for row, (ids, counts) in enumerate(samples):
        tokens = torch.tensor(ids)
        if int(tokens.max()) >= decoder.vocabulary:
            raise ValueError(
                f"{texts[row].where}: token {int(tokens.max())} of the tokenizer, and the model knows"
                f" {decoder.vocabulary}: take the tokenizer that belongs to it, or enlarge its embeddings"
            )
        inputs[row, : len(ids) - 1], mask[row, : len(ids) - 1] = tokens[:-1], 1
        labels[row, : len(ids) - 1] = torch.where(torch.tensor(counts[1:]), tokens[1:], IGNORED)
    return Dataset({"input_ids": inputs, "attention_mask": mask}, labels)


def _finish_tokens(
    text: Text, ids: list[int], offsets: Sequence[tuple[int, int]], decoder: Decoder, longest: int
) -> tuple[list[int], list[bool]]:
    """Add first and end token and truncate: (a text's tokens, whether each belongs to a completion)."""
    tokenizer, in_completion = decoder.tokenizer, _is_completion(offsets, text.completions)
    end = len(in_completion) - in_completion[::-1].index(True) if True in in_completion else 0
    ids, in_completion = ids[:end], in_completion[:end]
    if not end:
        raise DataError(f"{text.where}: the tokenizer makes no token of the completion")
    if ids[-1] not in decoder.stops:
        ids, in_completion = [*ids, tokenizer.eos_token_id], [*in_completion, True]
    if in_completion[0]:
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids, in_completion = [first, *ids], [False, *in_completion]
    return _truncate(ids, in_completion, longest, tokenizer.all_special_ids, text.where)


def _is_completion(offsets: Sequence[tuple[int, int]], completions: Sequence[tuple[int, int]]) -> list[bool]:
    """Tell of each token whether it belongs to a completion.

    A blank may be a token whose offsets are [a, a), behind it. Special tokens are at [0, 0).
    """
    return [any((a < end and begin < b) or begin < a == b <= end for begin, end in completions) for a, b in offsets]


def _truncate(
    ids: list[int], in_completion: list[bool], longest: int, special: Sequence[int], where: str
) -> tuple[list[int], list[bool]]:
    """Remove the beginning of the prompt of a text that is too long, but not a special token there."""
    excess = len(ids) - longest
    if excess <= 0:
        return ids, in_completion
    kept = 1 if ids[0] in special else 0
    prompt = in_completion.index(True)
    if prompt - excess < max(kept, 1):
        raise DataError(
            f"{where}: {len(ids) - prompt} tokens from its first completion on, and a sample may have {longest}, one of"
            " them of its prompt: raise longest, or make it shorter; a completion is never cut"
        )
    return ids[:kept] + ids[kept + excess :], in_completion[:kept] + in_completion[kept + excess :]


# --- loss and scores ------------------------------------------------------------------------------------------------


def completion_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labels that are not ignored.

    outputs: logits [batch, length, vocabulary]; labels: int64 [batch, length].

    A client's loss is the mean over the completions' tokens of its batch. The run's loss is the mean of the clients'
    losses, weighted as the setting `aggregation` says, by samples and not by tokens. So a client with long completions
    counts no more than one with short ones. Both halves descend that one loss.
    """
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


class Perplexity:
    """A streaming metric: exp of the mean cross-entropy over all labels that are not ignored. Lower is better."""

    higher_is_better = False  # torchmetrics' name

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.loss, self.tokens = 0.0, 0

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [batch, length, vocabulary] and labels, int64 [batch, length]."""
        count = int((labels != IGNORED).sum())
        if count:
            self.loss += float(completion_loss(outputs.float(), labels)) * count
            self.tokens += count

    def compute(self) -> float:
        """Return the perplexity of all batches."""
        return math.exp(min(700.0, self.loss / self.tokens))  # finite, since JSON has no infinity


def last_completions(data: Dataset) -> tuple[list[list[int]], list[list[int]]]:
    """Return (the tokens before each text's last completion, the tokens of that completion)."""
    assert isinstance(data.inputs, dict)
    prompts, completions = [], []
    for tokens, labels in zip(data.inputs["input_ids"].cpu(), data.labels.cpu(), strict=True):
        positions = (labels != IGNORED).nonzero().flatten()
        gaps = (positions.diff() > 1).nonzero().flatten()
        begin = int(positions[int(gaps[-1]) + 1 if len(gaps) else 0])
        prompts.append(tokens[: begin + 1].tolist())
        completions.append(labels[begin : int(positions[-1]) + 1].tolist())
    return prompts, completions


def generated_answers(halves: SplitModel, data: Dataset, decoder: Decoder, max_new_tokens: int) -> list[str]:
    """Generate a completion in place of each text's last one, and return it without blanks at its ends."""
    prompts, _ = last_completions(data)
    completions = generate(halves, prompts, max_new_tokens, decoder.stops, decoder.vocabulary)
    return [_decode(tokens, decoder) for tokens in completions]


def generation_scores(halves: SplitModel, data: Dataset, decoder: Decoder, max_new_tokens: int) -> Scores:
    """Return exact match and F1 of generated completions against each text's last one."""
    references = [[_decode(tokens, decoder)] for tokens in last_completions(data)[1]]
    scores = answer_scores(generated_answers(halves, data, decoder, max_new_tokens), references)
    return {name: scores[name] for name in ("exact match", "F1")}


def _decode(tokens: Sequence[int], decoder: Decoder) -> str:
    text = decoder.tokenizer.decode([t for t in tokens if t not in decoder.stops], skip_special_tokens=True)
    return str(text).strip()


# --- tasks ----------------------------------------------------------------------------------------------------------


def lm_task(
    config: Settings, longest: int = MAX_TOKENS, generate: int = 0, by: str = "", samples: Dataset | None = None
) -> Task:
    """Make the task "lm": a decoder learns completions of prompts, or an assistant's turns, by `completion_loss`.

    config.model: names the decoder. config.data: a folder with train.jsonl, test.jsonl and, unless a tenth of the
    training part is to be held out, validation.jsonl; `as_text` says what a row has. longest: the most tokens of a
    sample, see `encode_texts`. generate: the most tokens that are generated to score exact match and F1 beside the
    perplexity; 0: none are. by: a field of the training rows by whose values clients' data are to differ; without it
    config.partition must be "iid". samples: one client's samples, instead of the folder's.
    """
    if not config.data and samples is None:
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
    if samples is not None:
        return completion_task(config, decoder, [samples, samples, samples], metrics={"perplexity": Perplexity()})
    parts = load_parts(Path(config.data))
    texts = [[as_text(row, where, decoder.tokenizer) for where, row in part] for part in parts]
    scores = (lambda halves, data: generation_scores(halves, data, decoder, generate)) if generate else None
    groups = None
    if by:
        groups = group_ids([text_field(row, by, where) for where, row in parts[0]])
    return completion_task(
        config,
        decoder,
        [encode_texts(part, decoder, longest) for part in texts],
        metrics={"perplexity": Perplexity()},
        generated=scores,
        groups=groups,
    )


def read_client_completions(config: Settings, path: Path, longest: int) -> Dataset:
    """Read one client's samples, from a file such as train.jsonl or a folder with it.

    longest: the number of tokens that the half reads.
    """
    decoder = Decoder.of(config.model)
    rows = read_json_lines(path / FILES[0] if path.is_dir() else path)
    longest = min(longest + 1, int(config.options.get("longest", MAX_TOKENS)))  # the last token is only predicted
    return encode_texts([as_text(row, where, decoder.tokenizer) for where, row in rows], decoder, longest)


def completion_task(config: Settings, decoder: Decoder, data: Sequence[Dataset], **arguments: Any) -> Task:
    """Make a task of completing texts. data: training, validation and test part. arguments: of `Task`."""
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
        **arguments,
    )
