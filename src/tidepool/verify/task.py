"""Stories that tell numbers, and questions about them: the task that the shipped model is trained on.

A story tells *facts* once and sets *registers* again and again, with filler sentences between:

    note ann boat 4 7 2 .   the tide waits .   set red 0 1 9 .   set red 5 5 8 .   ask ann boat

After ``ask`` and a key the model answers with three digits and a full stop: ``4 7 2 .``. A fact is found again by
attention, however far back it was told; a register's value is the last one that was set. Both are lost when a cache
is: random digits are right once in a thousand times.

Every word is one token, so the length of a text is its number of words. Nothing here needs torch.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["fact", "register"]

MODEL = Path(__file__).parent / "model"
"""Directory of the shipped checkpoint: weights, configuration and tokenizer."""

MAX_TOKENS = 4096
"""Longest text that the model was trained on, answers included."""

ANSWER_TOKENS = 4
"""Tokens to generate for one answer: three digits and a full stop."""

SPECIALS = ("<end>", "<unk>")
_MARKS = (".", "note", "set", "ask")
_DIGITS = tuple("0123456789")
_PEOPLE, _THINGS, _REGISTERS, _FILLER = (
    tuple(words.split())
    for words in (
        "ann ben cleo dan eve finn gwen hugo ida jon kate leo mia nils olga paul rosa sam tess ugo vera will yara zoe",
        "boat bucket rope lamp anchor net oar sail drum kettle map coat knife clock chair hat key ladder mirror needle "
        "pipe ring spade violin",
        "red blue green white black grey pink amber silver gold violet brown teal ivory coral navy",
        "the a tide pool sea shore water sand stone crab fish weed cloud wind rain sun moon wave rock gull harbour "
        "beach village winter summer morning evening night people children two three comes goes waits keeps brings "
        "leaves moves stays turns falls in out on under over by near far slow quick deep cold warm quiet old new "
        "again still never often once and but",
    )
)
WORDS = SPECIALS + _MARKS + _DIGITS + _PEOPLE + _THINGS + _REGISTERS + _FILLER
"""The vocabulary; a word's place is its token."""

_TOKEN = {word: token for token, word in enumerate(WORDS)}
_STOP, _NOTE, _SET, _ASK = (_TOKEN[mark] for mark in _MARKS)
_ZERO = _TOKEN["0"]
_VALUE_DIGITS = 3
_SENTENCE = range(3, 10)
"""Words of a filler sentence, its full stop not counted."""


def to_tokens(text: str) -> list[int]:
    """Tokens of a text whose words are separated by blanks; a word that isn't in the vocabulary is a KeyError."""
    return [_TOKEN[word] for word in text.split()]


def to_text(tokens: Sequence[int]) -> str:
    """The words of ``tokens``, separated by blanks."""
    return " ".join(WORDS[token] for token in tokens)


@dataclass(frozen=True, slots=True)
class Question:
    """What to append to a story, and what the model has to answer."""

    kind: Kind
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    """`ANSWER_TOKENS` tokens, the full stop included."""
    told: int
    """Place in the story of the sentence that last told the value, in tokens from the start."""

    def is_right(self, output: Sequence[int]) -> bool:
        """Whether generated tokens begin with the whole answer."""
        return tuple(output[:ANSWER_TOKENS]) == self.answer


class Story:
    """A text that grows, and everything that can be asked at its end.

    Stories differ in how many facts and registers they have, and each register stops being set at a random place,
    so that a value's age is anything up to the length of the story. The same arguments give the same story.

    Args:
        seed: of everything random in the story.
        length: about how many tokens it will get in the end; registers come to rest before that.
    """

    def __init__(self, seed: int, length: int) -> None:
        self._random = rng = random.Random(seed)
        self.tokens: list[int] = []
        self._facts: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        self._values: dict[int, tuple[int, tuple[int, ...]]] = {}
        count = rng.randint(4, len(_REGISTERS))
        self._rest = {_TOKEN[word]: rng.random() * length for word in rng.sample(_REGISTERS, count)}
        self._fact_share = rng.uniform(0.05, 0.4)
        self._set_share = rng.uniform(0.1, 0.5)

    def tell(self, count: int) -> None:
        """Let the story go on for exactly ``count`` tokens of facts, settings and filler."""
        rng, end = self._random, len(self.tokens) + count
        while (room := end - len(self.tokens)) > 0:
            dice = rng.random()
            if room < 4 + _VALUE_DIGITS:
                self._fill(room)
            elif dice < self._fact_share:
                self._tell_fact()
            elif dice < self._fact_share + self._set_share and self._set_register():
                pass
            else:
                self._fill(min(room, rng.choice(_SENTENCE) + 1))

    def ask(self, question: Question) -> None:
        """Append a question with its right answer, as in a conversation."""
        self.tokens += question.tokens + question.answer

    def branch(self, seed: int) -> "Story":
        """A copy that goes on in another way."""
        branch = copy.copy(self)
        branch.tokens, branch._facts, branch._values = self.tokens.copy(), self._facts.copy(), self._values.copy()
        branch._random = random.Random(seed)
        return branch

    def questions(self, kind: Kind | None = None) -> list[Question]:
        """All that can be asked now, of one kind or of both, in the order in which keys were first told."""
        asked: list[Question] = []
        if kind != "register":
            asked += [self._question("fact", key, *told) for key, told in self._facts.items()]
        if kind != "fact":
            asked += [self._question("register", (key,), *told) for key, told in self._values.items()]
        return asked

    def _question(self, kind: Kind, key: tuple[int, ...], told: int, value: tuple[int, ...]) -> Question:
        return Question(kind, (_ASK, *key), (*value, _STOP), told)

    def _tell_fact(self) -> None:
        rng = self._random
        key = (_TOKEN[rng.choice(_PEOPLE)], _TOKEN[rng.choice(_THINGS)])
        if key in self._facts:  # told once, never again
            self._fill(rng.choice(_SENTENCE[:3]) + 1)
            return
        value = self._value()
        self._facts[key] = (len(self.tokens), value)
        self.tokens += (_NOTE, *key, *value, _STOP)

    def _set_register(self) -> bool:
        moving = [register for register, rest in self._rest.items() if len(self.tokens) < rest]
        if not moving:
            return False
        register, value = self._random.choice(moving), self._value()
        self._values[register] = (len(self.tokens), value)
        self.tokens += (_SET, register, *value, _STOP)
        return True

    def _value(self) -> tuple[int, ...]:
        number = self._random.randrange(10**_VALUE_DIGITS)
        return tuple(_ZERO + number // 10**place % 10 for place in reversed(range(_VALUE_DIGITS)))

    def _fill(self, count: int) -> None:
        """A sentence of ``count`` tokens."""
        first = len(WORDS) - len(_FILLER)
        self.tokens += [first + int(self._random.random() * len(_FILLER)) for _ in range(count - 1)]
        self.tokens.append(_STOP)


def make_story(seed: int, length: int) -> Story:
    """A story of ``length`` tokens that has at least one fact and one register to ask for."""
    for attempt in range(1000):
        story = Story(seed * 1000 + attempt, length)
        story.tell(length)
        if story.questions("fact") and story.questions("register"):
            return story
    raise ValueError(f"a story of {length} tokens has no room for a fact and a register")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A story and one question about it."""

    tokens: list[int]
    question: Question


def make_prompts(seed: int, *, length: int, stories: int, questions: int = 1, kind: Kind | None = None) -> list[Prompt]:
    """Prompts of at most ``length`` tokens.

    Args:
        seed: the same seed gives the same prompts.
        length: of the longest prompt, without the answer; a question about a register is a token shorter than one
            about a fact. Up to `MAX_TOKENS` - `ANSWER_TOKENS` the model was trained for.
        stories: number of different stories.
        questions: number of different questions about each story, or as many as it has if they are fewer. These
            prompts share all but their last two or three tokens, and stand next to each other.
        kind: of questions; by default facts and registers take turns, as far as the story has both.
    """
    prompts = []
    for number in range(stories):
        story = make_story(seed * _APART + number, length - _QUESTION_TOKENS)
        asked = _shuffled(story, random.Random(f"{seed} {number}"), kind, first=number % 2)
        prompts += [Prompt([*story.tokens, *question.tokens], question) for question in asked[:questions]]
    return prompts


def make_conversation(seed: int, *, length: int, turns: int) -> list[Prompt]:
    """Prompts of one conversation: each is the one before, its right answer, more of the story and a question.

    The last prompt has about ``length`` tokens, a few more at most if turns are many. Half of the story is told
    before the first question. Facts and registers take turns.
    """
    share = length // (2 * turns)
    story = make_story(seed, length - turns * share)
    rng, prompts, asked = random.Random(seed), [], set()
    for turn in range(turns):
        story.tell(max(1, share - _QUESTION_TOKENS - ANSWER_TOKENS))
        questions = _shuffled(story, rng, None, first=turn % 2)
        question = next((question for question in questions if question.tokens not in asked), questions[0])
        asked.add(question.tokens)
        prompts.append(Prompt([*story.tokens, *question.tokens], question))
        story.ask(question)
    return prompts


_APART = 100_003
"""Stories of neighbouring seeds."""

_QUESTION_TOKENS = 3
"""Of the longest question."""


def _shuffled(story: Story, rng: random.Random, kind: Kind | None, first: int) -> list[Question]:
    """A story's questions in random order, of one kind, or of both in turns with facts first or registers first."""
    facts, registers = story.questions("fact"), story.questions("register")
    rng.shuffle(facts)
    rng.shuffle(registers)
    if kind:
        return facts if kind == "fact" else registers
    sides = (registers, facts) if first else (facts, registers)
    both = min(len(facts), len(registers))
    turns = [question for pair in zip(*sides, strict=False) for question in pair]
    return turns + facts[both:] + registers[both:]
