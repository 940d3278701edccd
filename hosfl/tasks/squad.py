"""SQuAD 1.1: questions about paragraphs, whose answers are spans of them (Rajpurkar et al., 2016).

An encoder points at the answer. A paragraph that is longer than it reads at once is read in windows that overlap. Every
window is a sample; the answer of one that does not hold it whole is its first token. The predicted answer is the best
span of all windows. A decoder is given paragraph and question, and writes the answer.
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
MAX_WINDOW_TOKENS = (
    384  # tokens of a window: question, and part of the paragraph; of a decoder's sample, with the answer
)
PROMPT = "Context: {context}\nQuestion: {question}\nAnswer:"
MAX_ANSWER_TOKENS = 30  # tokens
TOKENIZER_BATCH = 1000  # questions to the tokenizer
VERSION_2 = "is SQuAD 2.0, with questions that have no answer; this task reads 1.1"


class Question(NamedTuple):
    """One question. article: its title, or its place in the file. answers: all that were given. start: where the first
    one begins in the context, in characters."""

    article: str
    context: str
    question: str
    answers: list[str]
    start: int


@dataclass(frozen=True)
class Windows(Dataset):
    """Windows of a model's length. labels: int64 [n, 2], the answer's first and last token, 0 and 0 where it is not.

    spans: int32 [n, length, 2], where in its context a token begins and ends, -1 where it is none of the context.
    question: int64 [n], the number of a window's question. questions: those.
    """

    spans: Tensor
    question: Tensor
    questions: Sequence[Question]

    @property
    def used(self) -> int:
        """Tokens of the longest window, without padding."""
        assert isinstance(self.inputs, dict)
        return int(self.inputs["attention_mask"].sum(1).max())

    def shortened(self, length: int) -> Windows:
        """Of fewer tokens; only padding may be lost."""
        return replace(self, inputs=self._each(lambda x: x[:, :length].clone()), spans=self.spans[:, :length].clone())


def parts(data: str) -> tuple[list[Question], list[Question], list[Question]]:
    """Training, validation and test questions: from a folder, one file, or by name from the hub where data is empty.

    The published test part is hidden: the development part is the test part, and the validation part, for choosing
    rates, is held out of the training part: whole articles, drawn alike in every run, until they have as many
    questions as the test part or a tenth of the training part. One file that is not a folder is all there is: a quarter
    of it, again whole articles, is the test part.

    Raises: OSError; DataError for a file that is not SQuAD 1.1 or has too few articles; without `datasets` ImportError.
    """
    parts_of: Path | str = HUB
    if not data:
        published = hub_rows(HUB, parts=("train", "validation"))
        train, test = (_checked([_from_hub(row, where) for where, row in part]) for part in published)
    elif Path(data).is_dir():
        train, test = (read(Path(data) / name) for name in FILES)
        parts_of = Path(data) / FILES[0]
    else:
        everything = read(Path(data))
        _enough(everything, 3, data)
        train, test = split_by_article(everything, max(1, len(everything) // 4), keep=2)
        parts_of = data
    _enough(train, 2, parts_of)
    train, validation = split_by_article(train, max(1, min(len(test), len(train) // 10)), keep=1)
    return train, validation, test


def _enough(questions: list[Question], needed: int, where: Path | str) -> None:
    count = len({q.article for q in questions})
    if count < needed:
        what = ("to train, to choose rates and to test on", "to train and to choose rates on")[needed == 2]
        raise DataError(f"{where}: too few articles, {count}: at least {needed} are needed, {what}")


def read(path: Path) -> list[Question]:
    """The questions of a file in SQuAD's JSON.

    Raises OSError; DataError for another format, a question without answer, an answer that does not stand where its
    offset says, a file without questions.
    """
    document = read_json(path)
    if str(document.get("version")).lower().removeprefix("v").startswith("2"):
        raise DataError(f"{path} {VERSION_2}")
    found = []
    for number, article in enumerate(field(document, "data", list, str(path))):
        place = f"data[{number}]"
        named = article.get("title") if isinstance(article, dict) else None  # it may come again, later in the file
        title = named if named and isinstance(named, str) else place
        for p, paragraph in enumerate(_objects(article, "paragraphs", f"{path}, {place}")):
            inner = f"{place}.paragraphs[{p}]"
            for q, asked in enumerate(_objects(paragraph, "qas", f"{path}, {inner}")):
                where = f"{path}, {inner}.qas[{q}]"
                if check_type(asked, dict, where).get("is_impossible"):
                    raise DataError(f"{path} {VERSION_2}")
                if isinstance(asked.get("id"), str):
                    where = f"{path}, question {asked['id']}"
                context = field(paragraph, "context", str, f"{path}, {inner}")
                found.append(_question(title, context, asked, _objects(asked, "answers", where), where))
    if not found:
        raise DataError(f"{path} has no questions")
    return _checked(found)


def _objects(row: Any, name: str, where: str) -> list[Any]:
    return field(check_type(row, dict, where), name, list, where)


def _question(article: str, context: str, asked: Row, given: list[Any], where: str) -> tuple[str, Question, list[int]]:
    """One question with its place, and where its answers are said to begin."""
    if not given:
        raise DataError(f"{where} has no answer, as none has in SQuAD 1.1")
    texts, starts = [], []
    for number, answer in enumerate(given):
        place = f"{where}, answers[{number}]"
        texts.append(field(check_type(answer, dict, place), "text", str, place))
        starts.append(field(answer, "answer_start", int, place))
    return where, Question(article, context, field(asked, "question", str, where), texts, starts[0]), starts


def _from_hub(row: Row, where: str) -> tuple[str, Question, list[int]]:
    answers = field(row, "answers", dict, where)
    texts, starts = (field(answers, name, list, f"{where}, answers") for name in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise DataError(f"{where}: {len(texts)} answers with {len(starts)} offsets")
    given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    return _question(field(row, "title", str, where), field(row, "context", str, where), row, given, where)


def _checked(found: list[tuple[str, Question, list[int]]]) -> list[Question]:
    """The questions, if every answer stands where it is said to."""
    check_answer_offsets(
        [
            Answer(where, asked.context, text, start)
            for where, asked, starts in found
            for text, start in zip(asked.answers, starts, strict=True)
        ]
    )
    return [asked for _, asked, _ in found]


def split_by_article(questions: list[Question], count: int, keep: int = 0) -> tuple[list[Question], list[Question]]:
    """(kept, apart): whole articles are set apart until they have `count` questions; the same in every run.

    keep: so many articles are kept, whatever count says.
    """
    sizes = Counter(q.article for q in questions)
    names = sorted(sizes)
    apart: set[str] = set()
    for i in np.random.default_rng(0).permutation(len(names)):
        if sum(sizes[name] for name in apart) >= count or len(names) - len(apart) <= keep:
            break
        apart.add(names[i])
    return [q for q in questions if q.article not in apart], [q for q in questions if q.article in apart]


def windows(found: Sequence[Sequence[Question]], model: str) -> tuple[Splits, Tensor]:
    """Parts as a model's tokens, all windows of one length, and the training windows' articles as int64 [n].

    Neighbouring windows share a third of their length. A question is cut at a sixth of it. Raises ValueError for a
    model whose tokenizer does not say where its tokens are in the text.
    """
    tokenizer = fast_tokenizer_of(model)
    whole = [_windows(tokenizer, questions) for questions in found]
    longest = max(part.used for part in whole)
    train, validation, test = (part.shortened(longest) for part in whole)
    return Splits(Dataset(train.inputs, train.labels), validation, test), articles(train.questions)[train.question]


def articles(questions: Sequence[Question]) -> Tensor:
    """The numbers of the questions' articles, int64 [n]."""
    return group_ids([q.article for q in questions])


def _windows(tokenizer: Any, questions: Sequence[Question], longest: int = MAX_WINDOW_TOKENS) -> Windows:
    longest = min(longest, tokenizer.model_max_length)
    pieces: dict[str, list[Tensor]] = {}
    for begin in range(0, len(questions), TOKENIZER_BATCH):
        some = questions[begin : begin + TOKENIZER_BATCH]
        encodings = tokenizer(
            _first_tokens(tokenizer, [q.question.strip() for q in some], longest // 6),
            [q.context for q in some],
            truncation="only_second",
            max_length=longest,
            stride=longest // 3,
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        arrays = {name: torch.from_numpy(np.array(value)) for name, value in encodings.items()}  # much faster than "pt"
        own, spans = arrays.pop("overflow_to_sample_mapping"), arrays.pop("offset_mapping").int()
        for i in range(len(own)):
            spans[i, [sequence != 1 for sequence in encodings.sequence_ids(i)]] = -1
        pieces.setdefault("spans", []).append(spans)
        pieces.setdefault("question", []).append(own + begin)
        places = [_answer_tokens(encodings, i, some[q]) for i, q in enumerate(own.tolist())]
        pieces.setdefault("labels", []).append(torch.tensor(places, dtype=torch.int64))
        for name, value in arrays.items():
            pieces.setdefault(name, []).append(value)
    joined = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    spans, question, labels = (joined.pop(name) for name in ("spans", "question", "labels"))
    return Windows(joined, labels, spans, question, questions)


def _first_tokens(tokenizer: Any, questions: list[str], tokens: int) -> list[str]:
    """The questions' first tokens, so many at most."""
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [q if len(own) <= tokens else q[: own[tokens - 1][1]] for q, own in zip(questions, offsets, strict=True)]


def _answer_tokens(encodings: Any, window: int, asked: Question) -> tuple[int, int]:
    """The first and the last token of the answer in a window; (0, 0) where the window does not hold all of it."""
    text = asked.answers[0]
    begin = asked.start + len(text) - len(text.lstrip())
    ends = (encodings.char_to_token(window, char, 1) for char in (begin, begin + len(text.strip()) - 1))
    first, last = ends
    return (0, 0) if first is None or last is None else (first, last)


def span_scores(outputs: Tensor, data: Dataset) -> dict[str, float]:
    """F1 and exact match of the predicted answers, from 0 to 1: each against the given answer that it is nearest to.

    outputs: [n, length, 2], logits of start and end. As in the official evaluation, case, punctuation, articles and
    blanks do not count.
    """
    assert isinstance(data, Windows)
    return answer_scores(predictions(outputs, data), [asked.answers for asked in data.questions])


def predictions(outputs: Tensor, data: Windows) -> list[str]:
    """Each question's answer: of all its windows the span in the context with the highest sum of logits."""
    spans = data.spans.cpu()
    logits = outputs.float().cpu().masked_fill(spans[..., :1] < 0, float("-inf"))
    start, end = logits.unbind(-1)
    length = start.shape[1]
    best = torch.full((len(start),), float("-inf"))
    first = torch.zeros(len(start), dtype=torch.int64)
    last = first.clone()
    for more in range(min(MAX_ANSWER_TOKENS, length)):
        score, at = (start[:, : length - more] + end[:, more:]).max(1)
        better = score > best
        best, first, last = (
            torch.where(better, new, old) for new, old in ((score, best), (at, first), (at + more, last))
        )
    answers: list[tuple[float, str]] = [(float("-inf"), "")] * len(data.questions)
    for i, number in enumerate(data.question.tolist()):
        if float(best[i]) > answers[number][0]:
            begin, stop = int(spans[i, first[i], 0]), int(spans[i, last[i], 1])
            answers[number] = float(best[i]), data.questions[number].context[begin:stop]
    return [text for _, text in answers]


@dataclass(frozen=True)
class PromptedQuestions(Dataset):
    """Prompts with the first answer, as `lm.encoded` has them, and the questions with all answers."""

    questions: Sequence[Question]


def encode_prompts(questions: Sequence[Question], decoder: Decoder, longest: int) -> PromptedQuestions:
    """Questions as a decoder's samples of so many tokens at most. Raises DataError for an answer that does not fit.

    What is too long loses the paragraph's beginning. A question is cut at a sixth of the length.
    """
    shown = _first_tokens(decoder.tokenizer, [q.question.strip() for q in questions], longest // 6)
    texts = []
    for q, question in zip(questions, shown, strict=True):
        prompt, answer = PROMPT.format(context=q.context, question=question), f" {q.answers[0].strip()}"
        completion = (len(prompt), len(prompt) + len(answer))
        texts.append(Text(f"SQuAD, question {q.question.strip()!r}", prompt + answer, [completion]))
    data = encode_texts(texts, decoder, longest)
    return PromptedQuestions(data.inputs, data.labels, questions)


def squad_task(config: Settings, own: Dataset | None = None) -> Task:
    """SQuAD 1.1: an encoder points at the answer, a decoder writes it. data, parts: see `parts`.

    An encoder's random head gives every token's logits of beginning and of ending the answer; the loss is the mean of
    start's and end's cross-entropy, over windows. A decoder learns the first answer: see `lm.completion_loss`.

    The metric is F1, and exact match beside it, over questions. Clients' data differ by article. own: a client's
    samples, in place of all parts.
    """
    name = config.model or packaged_minilm()
    decoder = Decoder.of(name) if is_decoder(name) else None
    if own is not None:
        if decoder is not None:
            return completion_task(config, decoder, [own, own, own])
        return pretrained_task(own, own.length, lambda at: split_pretrained(name, "QuestionAnswering", at, 2), config)
    found = parts(config.data)
    if decoder is not None:
        return generation_task(config, decoder, found)
    splits, groups = windows(found, name)
    task = pretrained_task(
        splits, splits.train.length, lambda at: split_pretrained(name, "QuestionAnswering", at, 2), config
    )
    return replace(task, scores=span_scores, groups=groups, public=public_tokens(name))


def own_questions(config: Settings, path: Path, longest: int) -> Dataset:
    """One client's samples: a file of SQuAD's format, or a folder with the training part's."""
    found = read(path / FILES[0] if path.is_dir() else path)
    name = config.model or packaged_minilm()
    if is_decoder(name):
        decoder = Decoder.of(name)
        return encode_prompts(found, decoder, min(longest + 1, max_answer_tokens(decoder)))
    data = _windows(fast_tokenizer_of(name), found, min(longest, MAX_WINDOW_TOKENS))
    data = data.shortened(data.used)
    return Dataset(data.inputs, data.labels)


def max_answer_tokens(decoder: Decoder) -> int:
    """Of a decoder's sample, behind which it still has to write an answer."""
    return min(MAX_WINDOW_TOKENS, decoder.longest - MAX_ANSWER_TOKENS)


def generation_task(config: Settings, decoder: Decoder, found: Sequence[Sequence[Question]]) -> Task:
    """With a decoder, which writes answers of `MAX_ANSWER_TOKENS` tokens at most."""
    longest = max_answer_tokens(decoder)

    def scores(halves: SplitModel, data: PromptedQuestions) -> Scores:
        written = generated_answers(halves, data, decoder, MAX_ANSWER_TOKENS)
        return answer_scores(written, [q.answers for q in data.questions])

    data = [encode_prompts(part, decoder, longest) for part in found]
    return completion_task(config, decoder, data, metrics={}, generated=scores, groups=articles(found[0]))
