"""SQuAD 1.1: questions about paragraphs, whose answers are spans of them (Rajpurkar et al., 2016).

An encoder predicts the answer's first and last token. A paragraph that is too long for it is read in overlapping
windows. Every window is a sample; if it does not hold the whole answer, its label is its first token. The predicted
answer is the best span of all windows. A decoder reads paragraph and question, and generates the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hosfl.halves.hub import fast_tokenizer_of, is_decoder, packaged_minilm
from hosfl.halves.split import SplitModel
from hosfl.settings import Settings
from hosfl.tasks.answers import answer_scores
from hosfl.tasks.data import Dataset, Splits, group_ids, public_tokens
from hosfl.tasks.lm import Decoder, Text, completion_task, encode_texts, generated_answers
from hosfl.tasks.pretrained import pretrained_task, split_pretrained
from hosfl.tasks.reading import Answer, DataError, Row, check_answer_offsets, check_type, field, hub_rows, read_json
from hosfl.tasks.task import Scores, Task

HUB = "rajpurkar/squad"
FILES = ("train-v1.1.json", "dev-v1.1.json")
# Tokens of an encoder's window, question and part of the paragraph; and of a decoder's sample, with the answer.
MAX_WINDOW_TOKENS = 384
PROMPT = "Context: {context}\nQuestion: {question}\nAnswer:"
MAX_ANSWER_TOKENS = 30
TOKENIZER_BATCH = 1000  # questions per call of the tokenizer
VERSION_2 = "is SQuAD 2.0, with questions that have no answer; this task reads 1.1"


class Question(NamedTuple):
    """A question about a context.

    article: the article's title, or its place in the file. answers: all reference answers. start: the first one's
    offset in the context, in characters.
    """

    article: str
    context: str
    question: str
    answers: list[str]
    start: int


@dataclass(frozen=True)
class Windows(Dataset):
    """Windows of one length over questions and contexts.

    labels: int64 [n, 2], the answer's first and last token; 0 and 0 if the window does not hold it. spans: int32
    [n, length, 2], where each token begins and ends in the context; -1 for tokens outside of it. question: int64 [n],
    the index of each window's question in `questions`.
    """

    spans: Tensor
    question: Tensor
    questions: Sequence[Question]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest window, without padding."""
        assert isinstance(self.inputs, dict)
        return int(self.inputs["attention_mask"].sum(1).max())

    def shortened(self, length: int) -> Windows:
        """Return the windows with padding removed behind the first `length` tokens, at least `longest`."""
        inputs = self._map_inputs(lambda x: x[:, :length].clone())
        return replace(self, inputs=inputs, spans=self.spans[:, :length].clone())


def load_parts(data: str) -> tuple[list[Question], list[Question], list[Question]]:
    """Load training, validation and test questions. data: a folder, or one file; "": from the Hugging Face hub.

    The published test part is hidden. So the development part is the test part, and the validation part, for choosing
    rates, is held out of the training part: whole articles, the same in every run, until they have as many questions as
    the test part, or a tenth of the training part. If data is a single file, a quarter of it, again of whole articles,
    is the test part.

    Raises OSError; DataError for a file that is not SQuAD 1.1 or has too few articles; ImportError without `datasets`.
    """
    source: Path | str = HUB
    if not data:
        published = hub_rows(HUB, parts=("train", "validation"))
        train, test = (_check_offsets([_question_of_row(row, where) for where, row in part]) for part in published)
    elif Path(data).is_dir():
        train, test = (read(Path(data) / name) for name in FILES)
        source = Path(data) / FILES[0]
    else:
        everything = read(Path(data))
        _check_article_count(everything, 3, data)
        train, test = split_by_article(everything, max(1, len(everything) // 4), keep=2)
        source = data
    _check_article_count(train, 2, source)
    train, validation = split_by_article(train, max(1, min(len(test), len(train) // 10)), keep=1)
    return train, validation, test


def _check_article_count(questions: list[Question], needed: int, where: Path | str) -> None:
    count = len({q.article for q in questions})
    if count < needed:
        purpose = ("to train, to choose rates and to test on", "to train and to choose rates on")[needed == 2]
        raise DataError(f"{where}: too few articles, {count}: at least {needed} are needed, {purpose}")


def read(path: Path) -> list[Question]:
    """Read the questions of a file in SQuAD's JSON.

    Raises OSError; DataError for another format, a file without questions, a question without answer, and an answer
    that is not at its offset.
    """
    document = read_json(path)
    if str(document.get("version")).lower().removeprefix("v").startswith("2"):
        raise DataError(f"{path} {VERSION_2}")
    questions = []
    for number, article in enumerate(field(document, "data", list, str(path))):
        place = f"data[{number}]"
        given_title = article.get("title") if isinstance(article, dict) else None  # may occur again later in the file
        title = given_title if given_title and isinstance(given_title, str) else place
        for p, paragraph in enumerate(_list_field(article, "paragraphs", f"{path}, {place}")):
            inner = f"{place}.paragraphs[{p}]"
            for q, entry in enumerate(_list_field(paragraph, "qas", f"{path}, {inner}")):
                where = f"{path}, {inner}.qas[{q}]"
                if check_type(entry, dict, where).get("is_impossible"):
                    raise DataError(f"{path} {VERSION_2}")
                if isinstance(entry.get("id"), str):
                    where = f"{path}, question {entry['id']}"
                context = field(paragraph, "context", str, f"{path}, {inner}")
                questions.append(_make_question(title, context, entry, _list_field(entry, "answers", where), where))
    if not questions:
        raise DataError(f"{path} has no questions")
    return _check_offsets(questions)


def _list_field(row: Any, name: str, where: str) -> list[Any]:
    return field(check_type(row, dict, where), name, list, where)


def _make_question(
    article: str, context: str, entry: Row, answers: list[Any], where: str
) -> tuple[str, Question, list[int]]:
    """Return (its place, the question, its answers' stated offsets)."""
    if not answers:
        raise DataError(f"{where} has no answer, as none has in SQuAD 1.1")
    texts, starts = [], []
    for number, answer in enumerate(answers):
        place = f"{where}, answers[{number}]"
        texts.append(field(check_type(answer, dict, place), "text", str, place))
        starts.append(field(answer, "answer_start", int, place))
    return where, Question(article, context, field(entry, "question", str, where), texts, starts[0]), starts


def _question_of_row(row: Row, where: str) -> tuple[str, Question, list[int]]:
    """Return what `_make_question` does, for a row of the Hugging Face hub."""
    columns = field(row, "answers", dict, where)
    texts, starts = (field(columns, name, list, f"{where}, answers") for name in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise DataError(f"{where}: {len(texts)} answers with {len(starts)} offsets")
    answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    return _make_question(field(row, "title", str, where), field(row, "context", str, where), row, answers, where)


def _check_offsets(questions: list[tuple[str, Question, list[int]]]) -> list[Question]:
    """Return the questions. Raises DataError for an answer that is not at its offset."""
    check_answer_offsets(
        [
            Answer(where, question.context, text, start)
            for where, question, starts in questions
            for text, start in zip(question.answers, starts, strict=True)
        ]
    )
    return [question for _, question, _ in questions]


def split_by_article(questions: list[Question], count: int, keep: int = 0) -> tuple[list[Question], list[Question]]:
    """Hold out whole articles until they have `count` questions: (kept, held out), the same in every run.

    keep: the number of articles that are kept in any case.
    """
    sizes = Counter(q.article for q in questions)
    names = sorted(sizes)
    held_out: set[str] = set()
    for i in np.random.default_rng(0).permutation(len(names)):
        if sum(sizes[name] for name in held_out) >= count or len(names) - len(held_out) <= keep:
            break
        held_out.add(names[i])
    return [q for q in questions if q.article not in held_out], [q for q in questions if q.article in held_out]


def make_windows(parts: Sequence[Sequence[Question]], model: str) -> tuple[Splits, Tensor]:
    """Tokenize training, validation and test questions: (windows of one length, the training windows' articles).

    The articles are int64 [n]. Neighbouring windows overlap by a third of their length. Questions are truncated to a
    sixth of it. Raises ValueError for a model whose tokenizer does not give its tokens' offsets.
    """
    tokenizer = fast_tokenizer_of(model)
    padded = [_tokenize_windows(tokenizer, questions) for questions in parts]
    longest = max(part.longest for part in padded)
    train, validation, test = (part.shortened(longest) for part in padded)
    return (
        Splits(Dataset(train.inputs, train.labels), validation, test),
        article_numbers(train.questions)[train.question],
    )


def article_numbers(questions: Sequence[Question]) -> Tensor:
    """Return the number of each question's article, int64 [n]."""
    return group_ids([q.article for q in questions])


def _tokenize_windows(tokenizer: Any, questions: Sequence[Question], longest: int = MAX_WINDOW_TOKENS) -> Windows:
    longest = min(longest, tokenizer.model_max_length)
    pieces: dict[str, list[Tensor]] = {}
    for begin in range(0, len(questions), TOKENIZER_BATCH):
        batch = questions[begin : begin + TOKENIZER_BATCH]
        encodings = tokenizer(
            _truncate_questions(tokenizer, [q.question.strip() for q in batch], longest // 6),
            [q.context for q in batch],
            truncation="only_second",
            max_length=longest,
            stride=longest // 3,
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in encodings.items()}  # much faster than "pt"
        question, spans = arrays.pop("overflow_to_sample_mapping"), arrays.pop("offset_mapping").int()
        for i in range(len(question)):
            spans[i, [sequence != 1 for sequence in encodings.sequence_ids(i)]] = -1
        pieces.setdefault("spans", []).append(spans)
        pieces.setdefault("question", []).append(question + begin)
        answers = [_answer_tokens(encodings, i, batch[q]) for i, q in enumerate(question.tolist())]
        pieces.setdefault("labels", []).append(torch.tensor(answers, dtype=torch.int64))
        for name, value in arrays.items():
            pieces.setdefault(name, []).append(value)
    joined = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    spans, question, labels = (joined.pop(name) for name in ("spans", "question", "labels"))
    return Windows(joined, labels, spans, question, questions)


def _truncate_questions(tokenizer: Any, questions: list[str], tokens: int) -> list[str]:
    """Truncate questions to so many tokens."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [q if len(ends) <= tokens else q[: ends[tokens - 1][1]] for q, ends in zip(questions, offsets, strict=True)]


def _answer_tokens(encodings: Any, window: int, question: Question) -> tuple[int, int]:
    """Return the first and the last token of the answer in a window; (0, 0) if it does not hold the whole answer."""
    text = question.answers[0]
    begin = question.start + len(text) - len(text.lstrip())
    ends = (encodings.char_to_token(window, char, 1) for char in (begin, begin + len(text.strip()) - 1))
    first, last = ends
    return (0, 0) if first is None or last is None else (first, last)


def span_scores(outputs: Tensor, data: Dataset) -> dict[str, float]:
    """Return F1 and exact match of the predicted answers, from 0 to 1: see `answer_scores`.

    outputs: [n, length, 2], logits of start and end.
    """
    assert isinstance(data, Windows)
    return answer_scores(predictions(outputs, data), [question.answers for question in data.questions])


def predictions(outputs: Tensor, data: Windows) -> list[str]:
    """Return each question's predicted answer: the span of context, of all windows, with the highest sum of logits."""
    spans = data.spans.cpu()
    logits = outputs.float().cpu().masked_fill(spans[..., :1] < 0, float("-inf"))
    start, end = logits.unbind(-1)
    length = start.shape[1]
    best = torch.full((len(start),), float("-inf"))
    first = torch.zeros(len(start), dtype=torch.int64)
    last = first.clone()
    for distance in range(min(MAX_ANSWER_TOKENS, length)):  # from a span's first token to its last
        score, begin = (start[:, : length - distance] + end[:, distance:]).max(1)
        better = score > best
        best, first, last = (
            torch.where(better, new, old) for new, old in ((score, best), (begin, first), (begin + distance, last))
        )
    answers: list[tuple[float, str]] = [(float("-inf"), "")] * len(data.questions)
    for i, number in enumerate(data.question.tolist()):
        if float(best[i]) > answers[number][0]:
            context = data.questions[number].context
            answers[number] = float(best[i]), context[int(spans[i, first[i], 0]) : int(spans[i, last[i], 1])]
    return [text for _, text in answers]


@dataclass(frozen=True)
class PromptedQuestions(Dataset):
    """Prompts with the first answer as completion, from `lm.encode_texts`, and the questions with all answers."""

    questions: Sequence[Question]


def encode_prompts(questions: Sequence[Question], decoder: Decoder, longest: int) -> PromptedQuestions:
    """Encode questions as a decoder's samples, of at most `longest` tokens. Raises DataError for too long an answer.

    A sample that is too long loses the paragraph's beginning. Questions are truncated to a sixth of the length.
    """
    truncated = _truncate_questions(decoder.tokenizer, [q.question.strip() for q in questions], longest // 6)
    texts = []
    for q, question in zip(questions, truncated, strict=True):
        prompt, answer = PROMPT.format(context=q.context, question=question), f" {q.answers[0].strip()}"
        completion = (len(prompt), len(prompt) + len(answer))
        texts.append(Text(f"SQuAD, question {q.question.strip()!r}", prompt + answer, [completion]))
    data = encode_texts(texts, decoder, longest)
    return PromptedQuestions(data.inputs, data.labels, questions)


def squad_task(config: Settings, samples: Dataset | None = None) -> Task:
    """Make the task "squad": an encoder predicts the answer's span, or a decoder generates it.

    config.data: see `load_parts`. An encoder gets a random head with two logits per token: that it begins and that it
    ends the answer. The loss is the mean of both cross-entropies over the windows. A decoder learns the first answer,
    by `lm.completion_loss`.

    The metrics are F1 and exact match over the questions. Clients' data differ by article. samples: one client's
    samples, instead of all parts.
    """
    name = config.model or packaged_minilm()
    decoder = Decoder.of(name) if is_decoder(name) else None
    if samples is not None:
        if decoder is not None:
            return completion_task(config, decoder, [samples, samples, samples])
        return pretrained_task(
            samples, samples.length, lambda at: split_pretrained(name, "QuestionAnswering", at, 2), config
        )
    parts = load_parts(config.data)
    if decoder is not None:
        return generation_task(config, decoder, parts)
    splits, groups = make_windows(parts, name)
    task = pretrained_task(
        splits, splits.train.length, lambda at: split_pretrained(name, "QuestionAnswering", at, 2), config
    )
    return replace(task, scores=span_scores, groups=groups, public=public_tokens(name))


def read_client_questions(config: Settings, path: Path, longest: int) -> Dataset:
    """Read one client's samples: a file in SQuAD's format, or a folder with the training part's file."""
    questions = read(path / FILES[0] if path.is_dir() else path)
    name = config.model or packaged_minilm()
    if is_decoder(name):
        decoder = Decoder.of(name)
        return encode_prompts(questions, decoder, min(longest + 1, max_sample_tokens(decoder)))
    data = _tokenize_windows(fast_tokenizer_of(name), questions, min(longest, MAX_WINDOW_TOKENS))
    data = data.shortened(data.longest)
    return Dataset(data.inputs, data.labels)


def max_sample_tokens(decoder: Decoder) -> int:
    """Return the most tokens of a decoder's sample: they leave room for generating an answer."""
    return min(MAX_WINDOW_TOKENS, decoder.longest - MAX_ANSWER_TOKENS)


def generation_task(config: Settings, decoder: Decoder, parts: Sequence[Sequence[Question]]) -> Task:
    """Make the task for a decoder, which generates answers of at most `MAX_ANSWER_TOKENS` tokens."""
    longest = max_sample_tokens(decoder)

    def scores(halves: SplitModel, data: PromptedQuestions) -> Scores:
        answers = generated_answers(halves, data, decoder, MAX_ANSWER_TOKENS)
        return answer_scores(answers, [q.answers for q in data.questions])

    data = [encode_prompts(part, decoder, longest) for part in parts]
    return completion_task(config, decoder, data, metrics={}, generated=scores, groups=article_numbers(parts[0]))
