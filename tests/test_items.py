"""Items are a function of their inputs, balanced by construction, and their surface is computed, not assumed.

Documents are synthetic sentences drawn from a seeded generator, so no test needs text from elsewhere.
Balance is exact (cells and positions differ by at most one item); surface baselines are worked by hand.
"""

import random
import re
from collections import Counter

import pytest

from opus_bench.evaluation import items as rules
from opus_bench.evaluation.items import (
    Item, Lexicon, build_items, from_jsonl, split_sentences, surface_baselines, to_jsonl, word_counts,
)

SIZE = 24
NOUNS = """river mountain city castle forest church school temple market garden bridge harbour planet engine
writer painter singer farmer soldier village island empire kingdom treaty language player novel theory island
method number colour animal flower window letter street valley desert ocean metal crystal cell vessel journal""".split()
NAMES = "Arden Belmont Corvin Dalmar Estrel Fenwick Garon Halden Istria Jorvik Kelmar Lorin".split()


def synthetic_documents(n, seed=0):
    """n documents of three plain sentences whose words follow a skewed distribution."""
    generator = random.Random(seed)
    weights = [1 / (place + 2) ** 0.7 for place in range(len(NOUNS))]

    def noun():
        return generator.choices(NOUNS, weights)[0] + generator.choice(["", "s"])

    def sentence():
        verb = generator.choice(["is", "are", "was", "were", "has", "have"])
        first, second, third = (generator.choice(rules.PREPOSITIONS) for _ in range(3))
        return (
            f"The {noun()} {first} {generator.choice(NAMES)} {verb} {generator.choice(['a', 'an'])} {noun()} "
            f"{second} the {noun()} and {noun()} {third} {generator.choice(NAMES)} {generator.randrange(1000, 2000)}."
        )

    return [" ".join(sentence() for _ in range(3)) for _ in range(n)]


@pytest.fixture(scope="module")
def documents():
    return synthetic_documents(200, seed=1)


@pytest.fixture(scope="module")
def reference():
    return synthetic_documents(200, seed=2)


@pytest.fixture(scope="module")
def items(documents, reference):
    return build_items(documents, reference, SIZE, seed=3)


def original_sentences(documents):
    return {" ".join(s.words) for document in documents for s in split_sentences(document)}


def test_items_are_a_function_of_documents_and_seed(documents, reference, items):
    assert build_items(documents, reference, SIZE, seed=3) == items
    assert build_items(documents[::-1], reference, SIZE, seed=3) == items
    assert build_items(documents, reference, SIZE, seed=4) != items


def test_items_do_not_touch_the_global_generator(documents, reference):
    random.seed(0)
    before = random.getstate()
    build_items(documents, reference, 8, seed=0)
    assert random.getstate() == before


@pytest.mark.parametrize("name", rules.TASKS)
def test_every_task_has_its_size_its_options_and_balanced_positions(items, name):
    assert len(items[name]) == SIZE
    assert {len(item.choices) for item in items[name]} == {rules.TASKS[name].options}
    positions = Counter(item.answer for item in items[name])
    assert set(positions.values()) == {SIZE // rules.TASKS[name].options}


@pytest.mark.parametrize("name", rules.TASKS)
def test_every_cell_gets_its_share(items, name):
    cells = rules.TASKS[name].cells
    want = {cell: SIZE // len(cells) * cells.count(cell) for cell in cells}
    assert Counter(item.cell for item in items[name]) == want


@pytest.mark.parametrize("name", rules.TASKS)
def test_the_answer_is_what_the_text_says_and_no_distractor_is(documents, items, name):
    originals = original_sentences(documents)
    whole = " ".join(" ".join(document.split()) for document in documents)
    for item in items[name]:
        assert len(set(item.choices)) == len(item.choices)
        if item.context:
            assert f"{item.context} {item.choices[item.answer]} " in whole
        else:
            assert [choice in originals for choice in item.choices] == [
                i == item.answer for i in range(len(item.choices))
            ]


@pytest.mark.parametrize("name", ["agreement", "article", "number", "preposition", "cloze_sentence"])
def test_options_differ_in_exactly_one_word(items, name):
    for item in items[name]:
        answer = item.choices[item.answer].split()
        places = {
            tuple(i for i, (a, b) in enumerate(zip(answer, choice.split(), strict=True)) if a != b)
            for choice in item.choices
            if choice != item.choices[item.answer]
        }
        assert len(places) == 1 and len(places.pop()) == 1


def test_word_swap_exchanges_two_neighbours(items):
    for item in items["word_swap"]:
        answer, other = item.choices[item.answer].split(), item.choices[1 - item.answer].split()
        places = [i for i, (a, b) in enumerate(zip(answer, other, strict=True)) if a != b]
        assert len(places) == 2 and places[1] == places[0] + 1 and sorted(answer) == sorted(other)


def test_no_sentence_serves_two_items(items):
    sentences = [item.choices[item.answer] for name, task in items.items() if name != "cloze" for item in task]
    assert len(sentences) == len(set(sentences))


def cloze_words(item):
    """The options of a cloze item, single words whichever way it is scored."""
    if item.context:
        return item.choices
    place = next(i for i, column in enumerate(zip(*map(str.split, item.choices))) if len(set(column)) > 1)
    return [choice.split()[place] for choice in item.choices]


@pytest.mark.parametrize("name", ["cloze", "cloze_sentence"])
def test_cloze_options_share_class_and_neighbourhood_and_balance_the_rank(reference, items, name):
    lexicon = Lexicon(reference)
    for item in items[name]:
        words = cloze_words(item)
        assert len({rules.word_class(word) for word in words}) == 1
        members = [word for _, word in lexicon.classes[rules.word_class(words[0])]]
        ranks = [members.index(word) for word in words]
        assert sum(rank > ranks[item.answer] for rank in ranks) == int(item.cell)
        assert max(abs(rank - ranks[item.answer]) for rank in ranks) <= rules.NEIGHBOURHOOD


@pytest.mark.parametrize("name", ["cloze", "cloze_sentence"])
def test_no_cloze_option_can_be_copied_from_the_text_around_it(documents, reference, name):
    sentences = [s for document in documents for s in split_sentences(document)]
    for item in build_items(documents, reference, 48, seed=3)[name]:
        answer = f"{item.context} {item.choices[item.answer]}".strip()
        (sentence,) = [
            s for s in sentences if answer in f"{s.before} {' '.join(s.words)}" and " ".join(s.words)[:20] in answer
        ]
        around = Counter(re.findall(r"\w+", f"{sentence.before} {' '.join(sentence.words)}"))
        words = cloze_words(item)
        assert [around[word] for word in words] == [int(place == item.answer) for place in range(4)]


@pytest.mark.parametrize("name", ["agreement", "article", "number", "word_swap"])
def test_balanced_pairs_leave_nothing_to_the_surface(reference, items, name):
    assert surface_baselines(items[name], word_counts(reference)) == {"unigram": 0.5, "shortest": 0.5, "longest": 0.5}


def test_surface_baselines_equal_those_worked_by_hand():
    counts = word_counts(["the cat sat", "the dog sat", "The end"])
    assert counts == {"the": 2, "cat": 1, "sat": 2, "dog": 1, "The": 1, "end": 1}
    items = [
        Item("", ("the cat", "the elephant"), 0, ""),  # cat is commoner and shorter
        Item("", ("dog", "cat"), 1, ""),  # a tie in every rule
        Item("", ("sat", "ox"), 0, ""),  # sat is commoner and longer
        Item("", ("unknown", "the"), 0, ""),  # the answer is rarer and longer
    ]
    assert surface_baselines(items, counts) == {
        "unigram": (1 + 0.5 + 1 + 0) / 4,
        "shortest": (1 + 0.5 + 0 + 0) / 4,
        "longest": (0 + 0.5 + 1 + 1) / 4,
    }
    assert rules.chance(items) == 0.5


def test_a_unigram_counts_every_word_of_an_option():
    # log 3/10 + log 1/10 < log 2/10 + log 2/10: a rare word outweighs a common one
    counts = Counter({"common": 2, "middle": 1, "other": 1, "fourth": 1})
    item = Item("", ("common unseen", "middle other"), 1, "")
    assert surface_baselines([item], counts)["unigram"] == 1.0


def test_sentences_with_brackets_quotes_or_odd_lengths_are_left_out():
    text = (
        "This plain sentence has exactly eight words here. It is short. "
        'This one says "quoted" words and is therefore not used at all. '
        "This one (with a bracket) is also not used at all here. "
        "A last plain sentence comes after the others, as the eighth of them."
    )
    found = split_sentences(text)
    assert [s.words[0] for s in found] == ["This", "A"]
    assert found[1].before.endswith("used at all here.")


def test_items_survive_writing_and_reading(items):
    for task in items.values():
        assert from_jsonl(to_jsonl(task)) == task


def test_a_separator_of_lines_inside_a_text_ends_no_line():
    odd = [Item("one\u2028two\x85", ("a\x0b", "b\u2029"), 1, "c")]
    assert from_jsonl(to_jsonl(odd)) == odd


def test_errors_name_the_offending_value(documents, reference):
    with pytest.raises(ValueError, match="size is 0"):
        build_items(documents, reference, 0)
    with pytest.raises(ValueError, match=r"task agreement found \d+ of \d+ items of kind 'is' .* size below 500"):
        build_items(documents[:10], reference, 500)
    with pytest.raises(ValueError, match="no items"):
        surface_baselines([], Counter())
