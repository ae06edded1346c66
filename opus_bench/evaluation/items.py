"""Multiple-choice items made from held-out encyclopedic text, without a parser or a download.

A stock benchmark needs a hub and says little below about 100 M parameters. Each task here asks
for what a model of one million parameters learns first, and the correct option is always what the
author of the text wrote; the other options change it by a rule stated below.

    cloze            next content word, 4 options; the word is scored after the text before it
    cloze_sentence   one content word inside a sentence, 4 options; the whole sentence is scored
    preposition      one of of, in, to, by, for, with, from, on; 4 options, whole sentence
    agreement        is/are, was/were or has/have in a sentence, 2 options, whole sentence
    article          a/an in a sentence, 2 options, whole sentence
    number           a word with or without its -s (river/rivers), 2 options, whole sentence
    word_swap        a sentence and the same with two adjacent words exchanged, 2 options

What keeps an option from being found by its surface:
    cloze tasks      the options share a frequency neighbourhood and a suffix class; the answer's
                     frequency rank among them is balanced, so a unigram model scores 1/4; no
                     option occurs elsewhere in the sentence or in the text before it
    preposition      every preposition is the answer equally often; the others are drawn evenly
    agreement, article  both directions equally often, so preferring one form scores 1/2
    number           with and without -s, and the commoner and the rarer form, equally often
    word_swap        both options hold the same words
    every task       the position of the answer is balanced; a sentence serves one task only

The rules are crude on purpose: a "content word" is a lower-case word of four letters or more that
is no function word, and its class is its suffix. A distractor may now and then fit as well as the
answer, so the ceiling is below 1. `surface_baselines` scores what needs no model.
"""

from __future__ import annotations

import json
import math
import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

SENTENCE_WORDS = (8, 22)
"""Shortest and longest sentence used, in words."""
CONTEXT_WORDS = 24
"""Words of text before the missing word in `cloze`."""
VOCABULARY = 2000
"""Content words that may be asked for: the commonest in the reference texts, at least five times."""
NEIGHBOURHOOD = 40
"""Distractors come from this many places above and below the answer in its class, by frequency."""

AGREEMENT = (("is", "are"), ("was", "were"), ("has", "have"))
PREPOSITIONS = ("of", "in", "to", "by", "for", "with", "from", "on")
BARE_VERB_AFTER = frozenset("to may might would could should must can will shall did does do not".split())
SUFFIXES = (
    "ing",
    "ed",
    "ly",
    "tion",
    "sion",
    "ment",
    "ness",
    "ity",
    "ism",
    "al",
    "ic",
    "ous",
    "ive",
    "ful",
    "er",
    "or",
)
FUNCTION_WORDS = frozenset(
    """about above after again against all along also although always among another around because been before
    being below between both cannot could does doing down during each either else even ever every from further
    have having hence here hers herself himself however into itself just least less made make many more most much
    must near neither never nevertheless often once only onto other others ought ours over perhaps quite rather
    same shall should since some such than that their theirs them themselves then there therefore these they this
    those though through throughout thus together toward towards under unless until upon usually very well were
    what when where whereas whether which while whom whose will with within without would your yours""".split()
)
WORD = re.compile(r"[^\W\d_]+")
LOWER = re.compile(r"[a-z]+")
PLAIN = re.compile(r"[A-Z][A-Za-z0-9,' -]*[a-z0-9]\.")
BREAK = re.compile(r"(?<=[a-z0-9)]\.) +(?=[A-Z])")


@dataclass(frozen=True)
class Item:
    """One question: `choices[answer]` is what the text says; options follow `context` and a space,
    or stand alone where `context` is empty. `cell` is the balanced group the item was drawn for."""

    context: str
    choices: tuple[str, ...]
    answer: int
    cell: str


@dataclass(frozen=True)
class Sentence:
    """A sentence of letters, digits, commas, apostrophes and hyphens, and the text before it."""

    words: tuple[str, ...]
    before: str

    def with_word(self, place: int, word: str) -> str:
        return " ".join((*self.words[:place], word, *self.words[place + 1 :]))


Candidate = tuple[str, str, list[str]]
"""Context, correct option, other options."""


def word_counts(texts: Sequence[str]) -> Counter[str]:
    """Occurrences of each word as written: "March" and "march" are two words."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    return counts


def split_sentences(document: str) -> list[Sentence]:
    """The sentences of a document that are plain and of a usable length, each once."""
    sentences, before = [], ""
    for text in BREAK.split(" ".join(document.split())):
        words = tuple(text.split(" "))
        if PLAIN.fullmatch(text) and SENTENCE_WORDS[0] <= len(words) <= SENTENCE_WORDS[1]:
            sentences.append(Sentence(words, before))
        before = f"{before} {text}".strip()
    return sentences


class Lexicon:
    """Content words of the reference texts in classes, each class ordered by frequency."""

    def __init__(self, reference_texts: Sequence[str]):
        self.counts = word_counts(reference_texts)
        content = [
            (count, word)
            for word, count in self.counts.items()
            if count >= 5 and len(word) >= 4 and LOWER.fullmatch(word) and word not in FUNCTION_WORDS
        ]
        self.classes: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for count, word in sorted(content, reverse=True)[:VOCABULARY]:
            self.classes[word_class(word)].append((count, word))
        for members in self.classes.values():
            members.sort()
        self.content = {word for members in self.classes.values() for _, word in members}

    def neighbours(self, word: str, rarer: int, commoner: int, generator: random.Random) -> list[str] | None:
        """Words of the same class near `word` in frequency, so many on each side; None at an edge."""
        members = self.classes[word_class(word)]
        place = bisect_left(members, (self.counts[word], word))
        below = [w for _, w in members[max(0, place - NEIGHBOURHOOD) : place]]
        above = [w for _, w in members[place + 1 : place + 1 + NEIGHBOURHOOD]]
        if len(below) < max(rarer, 3) or len(above) < max(commoner, 3):
            return None
        return generator.sample(below, rarer) + generator.sample(above, commoner)


def word_class(word: str) -> str:
    """The longest listed suffix of a word, `-s` for other words in -s, or nothing.

    A stand-in for the part of speech: it keeps "painted" beside "founded" and "rivers" beside
    "cities", and knows nothing of "run" as noun or verb.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if word.endswith(suffix) and len(word) >= len(suffix) + 3:
            return suffix
    return "s" if word.endswith("s") and not word.endswith(("ss", "us", "is")) else ""


# One function a task: the candidates a sentence offers for one cell.


def _exchange_form(sentence: Sentence, cell: str, pairs, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    other = {a: b for pair in pairs for a, b in (pair, pair[::-1])}[cell]
    for place, word in enumerate(sentence.words[1:-1], start=1):
        if word == cell and sentence.words[place - 1].lower() not in BARE_VERB_AFTER:
            yield "", sentence.with_word(place, word), [sentence.with_word(place, other)]


def _agreement(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    return _exchange_form(sentence, cell, AGREEMENT, lexicon, generator)


def _article(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    return _exchange_form(sentence, cell, (("a", "an"),), lexicon, generator)


def _number(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    ending, frequency = cell.split()
    for place, word in enumerate(sentence.words[1:-1], start=1):
        other = word[:-1] if word.endswith("s") else word + "s"
        if word not in lexicon.content or other not in lexicon.content or lexicon.counts[word] == lexicon.counts[other]:
            continue
        commoner = lexicon.counts[word] > lexicon.counts[other]
        if (ending == "s") == word.endswith("s") and (frequency == "commoner") == commoner:
            yield "", sentence.with_word(place, word), [sentence.with_word(place, other)]


def _preposition(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    for place, word in enumerate(sentence.words[1:-1], start=1):
        if word == cell:
            others = generator.sample([p for p in PREPOSITIONS if p != cell], 3)
            yield "", sentence.with_word(place, word), [sentence.with_word(place, other) for other in others]


def _content_words(
    sentence: Sentence, cell: str, lexicon: Lexicon, generator, first: int
) -> Iterator[tuple[int, list[str]]]:
    seen = Counter(WORD.findall(f"{sentence.before} {' '.join(sentence.words)}"))
    commoner = int(cell)
    for place, word in enumerate(sentence.words[first:-1], start=first):
        if word in lexicon.content and seen[word] == 1:
            others = lexicon.neighbours(word, 3 - commoner, commoner, generator)
            if others and not any(seen[other] for other in others):
                yield place, others


def _cloze(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    for place, others in _content_words(sentence, cell, lexicon, generator, first=5):
        context = [*sentence.before.split(), *sentence.words[:place]][-CONTEXT_WORDS:]
        yield " ".join(context), sentence.words[place], others


def _cloze_sentence(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    for place, others in _content_words(sentence, cell, lexicon, generator, first=2):
        yield "", sentence.with_word(place, sentence.words[place]), [sentence.with_word(place, o) for o in others]


def _word_swap(sentence: Sentence, cell: str, lexicon: Lexicon, generator) -> Iterator[Candidate]:
    words = sentence.words
    for place in range(1, len(words) - 2):
        first, second = words[place], words[place + 1]
        if LOWER.fullmatch(first) and LOWER.fullmatch(second) and first != second:
            swapped = (*words[:place], second, first, *words[place + 2 :])
            yield "", " ".join(words), [" ".join(swapped)]


@dataclass(frozen=True)
class ItemTask:
    """A task: its cells, which get equal shares of the items (a cell named twice gets two), what a
    sentence offers for a cell, and the number of options."""

    cells: tuple[str, ...]
    candidates: Callable[[Sentence, str, Lexicon, random.Random], Iterator[Candidate]]
    options: int


# In the order they take sentences: the scarcest first.
TASKS: dict[str, ItemTask] = {
    "agreement": ItemTask(("is", "are", "is", "are", "was", "were", "has", "have"), _agreement, 2),
    "article": ItemTask(("a", "an"), _article, 2),
    "number": ItemTask(("s commoner", "bare rarer", "s rarer", "bare commoner"), _number, 2),
    "preposition": ItemTask(PREPOSITIONS, _preposition, 4),
    "cloze": ItemTask(("0", "1", "2", "3"), _cloze, 4),
    "cloze_sentence": ItemTask(("0", "1", "2", "3"), _cloze_sentence, 4),
    "word_swap": ItemTask(("swap",), _word_swap, 2),
}


def build_items(
    documents: Sequence[str],
    reference_texts: Sequence[str],
    size: int = 250,
    seed: int = 0,
) -> dict[str, list[Item]]:
    """`size` items for each task, a function of the arguments alone.

    Args:
        documents: held-out texts the items are made from.
        reference_texts: other texts of the same kind, for word frequencies; training texts will do.
        size: items a task; cells of a task differ by at most one item.

    Raises:
        ValueError: if size is not positive, or the documents hold too few usable sentences.
    """
    if size < 1:
        raise ValueError(f"size is {size}: ask for at least one item a task")
    sentences = sorted({s.words: s for document in documents for s in split_sentences(document)}.values(), key=str)
    lexicon = Lexicon(reference_texts)
    used: set[tuple[str, ...]] = set()
    return {name: _draw(name, task, sentences, used, lexicon, size, seed) for name, task in TASKS.items()}


def _draw(
    name: str, task: ItemTask, sentences: list[Sentence], used: set, lexicon: Lexicon, size: int, seed: int
) -> list[Item]:
    generator = random.Random(f"{name} {seed}")
    order = generator.sample(sentences, len(sentences))
    positions = [place % task.options for place in range(size)]
    generator.shuffle(positions)
    items: list[Item] = []
    for index, cell in enumerate(task.cells):
        wanted = len(range(index, size, len(task.cells)))
        drawn = 0
        for sentence in order:
            if drawn == wanted:
                break
            if sentence.words in used:
                continue
            found = list(task.candidates(sentence, cell, lexicon, generator))
            if not found:
                continue
            context, answer, others = generator.choice(found)
            position = positions[len(items)]
            items.append(Item(context, (*others[:position], answer, *others[position:]), position, cell))
            used.add(sentence.words)
            drawn += 1
        if drawn < wanted:
            raise ValueError(
                f"task {name} found {drawn} of {wanted} items of kind '{cell}' in {len(sentences)} plain sentences: "
                f"give more documents or reference texts, or a size below {size}"
            )
    generator.shuffle(items)
    return items


def surface_baselines(items: Sequence[Item], counts: Counter[str]) -> dict[str, float]:
    """Accuracy of rules that need no model; options that tie share the credit.

        unigram             highest sum over words of log((count + 1) / (total + distinct + 1)),
                            words as written
        shortest, longest   fewest, most characters

    The sum is what `acc` asks of a model, so unigram is the baseline of a model without context.

    Raises:
        ValueError: if there are no items.
    """
    if not items:
        raise ValueError("no items: a baseline needs at least one")
    log_total = math.log(sum(counts.values()) + len(counts) + 1)

    def unigram(option: str) -> float:
        return math.fsum(math.log(counts[word] + 1) - log_total for word in WORD.findall(option))

    rules = {"unigram": unigram, "shortest": lambda option: -len(option), "longest": len}
    return {name: sum(_credit(item, rule) for item in items) / len(items) for name, rule in rules.items()}


def _credit(item: Item, score: Callable[[str], float]) -> float:
    scores = [score(choice) for choice in item.choices]
    best = [place for place, value in enumerate(scores) if value == max(scores)]
    return (item.answer in best) / len(best)


def chance(items: Sequence[Item]) -> float:
    """Expected accuracy of picking an option at random."""
    return sum(1 / len(item.choices) for item in items) / len(items)


def to_jsonl(items: Sequence[Item]) -> str:
    """One JSON object a line, in the shape the task templates read."""
    return "".join(json.dumps(asdict(item), ensure_ascii=False, sort_keys=True) + "\n" for item in items)


def from_jsonl(text: str) -> list[Item]:
    """The items `to_jsonl` wrote."""
    rows = [json.loads(line) for line in text.split("\n") if line]  # splitlines also ends lines at U+2028
    return [Item(row["context"], tuple(row["choices"]), row["answer"], row["cell"]) for row in rows]
