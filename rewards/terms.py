"""The reward of ERGO (arXiv 2509.21991): its terms, and their weighted sum.

A term scores one trajectory. Most terms judge the crop that the policy chose in turn 1; ``region`` also needs the reply
of the frozen verifier, which saw that crop and the question and nothing else.

A new term is a subclass of ``RewardTerm`` or a plain function ``(question, trajectory, reply) -> float``. Users name
theirs in ``reward.terms`` or hand it over as an object (docs/extending.md); ours are in ``TERMS``."""

from __future__ import annotations

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ergo_rl.episodes.plugins import import_class
from ergo_rl.episodes.prompts import answer_of, parse_answer
from ergo_rl.episodes.types import BoxOutcome, Outcome, Question, Score, Trajectory, Unscored, Verdict, View
from ergo_rl.rewards.config import RewardConfig
from ergo_rl.rewards.matching import matches

VerifierReply = str | Unscored | None
"""Reply of the verifier to (crop, question); ``Unscored`` if it failed; None if there was no crop to ask about."""

RewardFunction = Callable[[Question, Trajectory, VerifierReply], float | Unscored]


class RewardTerm(ABC):
    """One part of the reward, before its weight.

    Example::

        class ShortThought(RewardTerm):
            def __call__(self, question, trajectory, reply):
                return max(0.0, 1 - len(trajectory.turns[0].text.split()) / 40)
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float | Unscored:
        """Return the value of the term, or ``Unscored`` where it cannot be computed.

        A trajectory that failed at its task earns 0; ``Unscored`` is for scoring that failed."""

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        """Split ``value`` between the two turns, for ``learner.advantages.credit: turn``.

        The default credits turn 1, which chose the crop."""
        return value, 0.0


class FunctionTerm(RewardTerm):
    """Make a reward term of a plain function; its value is credited to turn 1."""

    def __init__(self, config: RewardConfig, function: RewardFunction) -> None:
        super().__init__(config)
        self._function = function

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float | Unscored:
        """Raise ValueError for a value that is no finite number: it would make every advantage of the group NaN."""
        value = self._function(question, trajectory, reply)
        if isinstance(value, Unscored):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            name = getattr(self._function, "__qualname__", repr(self._function))
            raise ValueError(f"the reward function {name} returned {value!r}; return a finite number or Unscored")
        return number


TermSource = type[RewardTerm] | RewardTerm | RewardFunction
"""What a user may hand over as a term: a class (made with the reward configuration), an instance, or a function."""


def policy_crop(trajectory: Trajectory) -> View | None:
    """Return the crop that the policy asked for, or None.

    None also where the crop is the whole image because the box could not be used (``on_bad_box: whole_image``): that
    lets the policy answer, but earns nothing for a region."""
    return trajectory.crop if BoxOutcome(trajectory.box_outcome).usable else None


class Region(RewardTerm):
    """r_region: 1 if the verifier, given only the crop and the question, gives the ground truth; else 0."""

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float | Unscored:
        if policy_crop(trajectory) is None:
            return 0.0
        if reply is None:
            raise ValueError(f"{question.id!r} sample {trajectory.sample}: the verifier was not asked about its crop")
        if isinstance(reply, Unscored):
            return reply
        # A verifier that was trained elsewhere may not use the answer tag: its bare reply counts then.
        answer = parse_answer(reply) or reply
        return float(matches(answer, question, self.config.number_tolerance))


class SmallBox(RewardTerm):
    """r_box: 1 if area(crop) / area(original) <= gamma; 0 if it is larger, or without a crop."""

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        crop = policy_crop(trajectory)
        return float(crop is not None and crop.box.area <= self.config.gamma * trajectory.original.area)


class SoftBox(RewardTerm):
    """max(0, 1 - area(crop) / (gamma * area(original))) if ``Region`` is 1; else 0.

    Not in the paper: it falls smoothly with the area, where r_box is a step. Only a crop that is enough to answer from
    earns it, because the policy could otherwise earn it at once with small boxes that show nothing."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self._region = Region(config)

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float | Unscored:
        enough, crop = self._region(question, trajectory, reply), policy_crop(trajectory)
        if isinstance(enough, Unscored) or crop is None:
            return enough
        return enough * max(0.0, 1 - crop.box.area / (self.config.gamma * trajectory.original.area))


class Accuracy(RewardTerm):
    """r_acc: 1 if the text of the last ``<answer>`` in turn 2 is the ground truth.

    0 for a reply that was cut off or has no tag: unlike the verifier, the policy is told to use it."""

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        answer = answer_of(trajectory)
        return float(answer is not None and matches(answer, question, self.config.number_tolerance))

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        return 0.0, value


class Format(RewardTerm):
    """r_format: 1 if turn 1 is a thought and a usable box, and turn 2 a thought and an answer that is not empty.

    Only white space may stand around the tags, and no tag inside another."""

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> float:
        return float(all(self.by_turn(1.0, trajectory)))

    def by_turn(self, value: float, trajectory: Trajectory) -> tuple[float, float]:
        """Credit each turn for its own tags."""
        texts = [turn.text for turn in trajectory.turns]
        first = is_thought_then(texts[0], "zoom") and BoxOutcome(trajectory.box_outcome).usable
        second = (
            trajectory.outcome is Outcome.ANSWERED
            and is_thought_then(texts[1], "answer")
            and parse_answer(texts[1]) is not None
        )
        return float(first), float(second)


_TAG = re.compile(r"</?(?:think|zoom|answer)>")


def is_thought_then(text: str, tag: str) -> bool:
    """Tell whether ``text`` is exactly ``<think>...</think><tag>...</tag>``, with optional white space between and a
    thought that is not empty."""
    if _TAG.findall(text) != ["<think>", "</think>", f"<{tag}>", f"</{tag}>"]:
        return False
    before, thought, between, _content, after = _TAG.split(text)
    return bool(thought.strip()) and not (before + between + after).strip()


TERMS: dict[str, type[RewardTerm]] = {
    "region": Region,
    "box": SmallBox,
    "soft_box": SoftBox,
    "accuracy": Accuracy,
    "format": Format,
}


class TotalReward:
    """The weighted sum of all terms; with the default weights region + 0.5 box + accuracy + format, 0 .. 3.5."""

    def __init__(self, config: RewardConfig, own: Mapping[str, TermSource] | None = None) -> None:
        """own: terms handed over as objects, by name. Raises ValueError as ``load_terms`` and ``term_weights`` do."""
        require_handed_over(config, own)
        sources, self.weights = load_terms(config, own), term_weights(config, own)
        self._terms = {name: _build(sources[name], config) for name in self.weights}

    def __call__(self, question: Question, trajectory: Trajectory, reply: VerifierReply) -> Verdict:
        """Return a ``Score`` with every term before its weight, or ``Unscored`` if any term is.

        A total without one of its terms would not be comparable with the totals of the rest of the group."""
        parts: dict[str, float] = {}
        for name, term in self._terms.items():
            value = term(question, trajectory, reply)
            if isinstance(value, Unscored):
                return replace(value, reason=f"{name}: {value.reason}")
            parts[name] = value
        earned = [(self.weights[name], self._terms[name].by_turn(value, trajectory)) for name, value in parts.items()]
        first, second = (sum(weight * turns[turn] for weight, turns in earned) for turn in (0, 1))
        return Score(sum(self.weights[name] * value for name, value in parts.items()), parts, (first, second))


def load_terms(config: RewardConfig, own: Mapping[str, TermSource] | None = None) -> dict[str, TermSource]:
    """Return ``TERMS``, those of ``reward.terms`` (imported), and the user's ``own`` objects, by name.

    Raises ValueError for a name that is taken or a path that leads to no term."""
    own = own or {}
    if taken := sorted(TERMS.keys() & (config.terms.keys() | own.keys())):
        raise ValueError(f"reward.terms: {', '.join(taken)} is a term of ours; give yours another name")
    if twice := sorted(config.terms.keys() & own.keys()):
        raise ValueError(f"reward.terms names {', '.join(twice)}, and so does a term that was handed over")
    return TERMS | {name: _import_term(path) for name, path in config.terms.items()} | dict(own)


def term_weights(config: RewardConfig, own: Iterable[str] | None = None) -> dict[str, float]:
    """Return the weight of every term, in the order in which they are summed.

    A term that was handed over weighs 1 unless ``reward.weights`` names it. Raises ValueError for a weight without a
    term or of a term that alpha or beta weighs, and for a term of ``reward.terms`` without a weight."""
    handed_over = list(own or config.handed_over)
    others = sorted((TERMS.keys() | config.terms.keys() | set(handed_over)) - {"region", "box"})
    if weightless := sorted(config.terms.keys() - config.weights.keys()):
        raise ValueError(f"reward.weights has none for {', '.join(weightless)} of reward.terms; 0 only measures a term")
    if unknown := sorted(config.weights.keys() - set(others)):
        takes = f"{', '.join(others)} (alpha weighs region, beta box)"
        raise ValueError(f"reward.weights takes {takes}, not {', '.join(unknown)}")
    defaults = {name: 1.0 for name in handed_over if name not in config.weights}
    return {"region": config.alpha, "box": config.beta, **config.weights, **defaults}


def require_handed_over(config: RewardConfig, own: Iterable[str] | None) -> None:
    """Raise ValueError where the configuration is of a run with terms that only its Python program has."""
    if missing := sorted(set(config.handed_over) - set(own or ())):
        raise ValueError(
            f"reward.handed_over names {', '.join(missing)}, which only the Python program of that run has; call "
            "Trainer(config, reward_terms=[...]) with it"
        )


def named_terms(terms: Mapping[str, TermSource] | Iterable[TermSource]) -> dict[str, TermSource]:
    """Return terms by name; without a mapping a function has its own name, and ``ShortThought`` is ``short_thought``.

    Raises ValueError for two terms of one name, and for an object that is no term or has no name."""
    if isinstance(terms, Mapping):
        return dict(terms)
    named: dict[str, TermSource] = {}
    for term in terms:
        found = getattr(term, "__name__", type(term).__name__ if isinstance(term, RewardTerm) else "")
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", found).lower()
        if not name.isidentifier() or not callable(term):
            raise ValueError(f"{term!r} has no name to use as a reward term's; pass {{name: term}}")
        if name in named:
            raise ValueError(f"two reward terms are called {name}; pass {{name: term}}")
        named[name] = term
    return named


def _build(source: TermSource, config: RewardConfig) -> RewardTerm:
    if isinstance(source, RewardTerm):
        return source
    if isinstance(source, type):
        term: RewardTerm = source(config)
        return term
    return FunctionTerm(config, source)


def _import_term(path: str) -> TermSource:
    try:
        return import_class(path, RewardTerm)
    except ValueError as error:
        # Not a class of terms. If the module could be imported, it may be a function.
        module, _, name = path.partition(":")
        found: TermSource | None = getattr(sys.modules.get(module), name, None)
        if callable(found) and not isinstance(found, type):
            return found
        raise ValueError(f"{error}, or a function (question, trajectory, reply) -> float") from error
