"""Compare an answer with the ground truth. Pure text; nothing here raises on any text.

Multiple choice: the option that an answer commits to, by its letter or by its words, must be the ground truth's. An
answer that names several options, or that is a negation, commits to none. Free answers are compared as numbers, as yes
or no, or as normalised text. Strict on purpose: a policy would soon list all options if that earned a reward."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Callable, Hashable, Sequence

from ergo_rl.episodes.types import Question

_NUMBER = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?"
_QUANTITY = re.compile(rf"(?:about |approximately |~)?[$€£¥]? ?({_NUMBER}) ?(%|°?[^\W\d_]*)[.]?", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(rf"(?<![\w.:/])({_NUMBER})(?![:/\w-]*[0-9]) ?(%|°?[^\W\d_]*)", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_WORD = re.compile(r"(?:(?<!\w)-)?[0-9]+(?:[.,:][0-9]+)*%?|[^\W_]+")
_ARTICLES = frozenset(("a", "an", "the"))
_POLARITY = {"yes": True, "yeah": True, "yep": True, "true": True, "no": False, "nope": False, "false": False}
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot|wrong|incorrect|\w+n't)\b", re.IGNORECASE)
_ASCII = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}", "-") | {"\N{RIGHT SINGLE QUOTATION MARK}": "'"}
)
_DECORATION = re.compile(r"</?(?:think|answer|zoom)>|\\(?:boxed|text|textbf|mathrm)\b|[*`\"“”{}\x00]")
_LEAD_IN = re.compile(r"(?:so |thus )?(?:the |my )?(?:final |correct )?answer(?: is\b:?|:) ?", re.IGNORECASE)
_LONGEST_ANSWER = 2000

_MASK = "\x00"  # stands where the words of an option were
# A and I are also words: before another word they are a letter only where a sentence goes on about the letter.
_GOES_ON = r"(?!(?<=[AaIi]) (?!(?:or|and|is|because|as|since)\b)[\w\x00])"
_LETTER = rf"(?<![\w'.-])([A-Z])(?![\w']|-\w){_GOES_ON}"
_ANY_CASE_LETTER = rf"(?<![\w'.-])([A-Za-z])(?![\w']|-\w){_GOES_ON}"
_BARE_LETTER = re.compile(r"(?:option )?[\[($ ]*([A-Za-z])[\])$.:,; ]*", re.IGNORECASE)
_STANDING_LETTER = re.compile(_LETTER)
_COMMITTED_LETTER = tuple(
    re.compile(pattern)
    for pattern in (
        rf"^[^\w\x00]*{_LETTER}(?= ?$| ?[]).:,;-]| \x00| (?:or|and|is|because|as|since)\b)",
        r"(?<!\w)[(\[] ?([A-Za-z]) ?[)\]]",
        rf"{_LETTER}[).:] ?(?=\x00)",
        r"(?i:\b(?:answer|option|choice|choose|select|pick|letter|is|it's)\b)[^\w\x00]*"
        rf"(?:(?i:is|would be|should be|must be|the|correct|letter|option)\b[^\w\x00]*)*{_ANY_CASE_LETTER}",
    )
)


def matches(answer: str, question: Question, tolerance: float = 0.01) -> bool:
    """Tell whether ``answer`` is the ground truth of ``question``, which may be an option's letter or its text.

    ``tolerance`` is relative and holds for decimal numbers; a ground truth that is a whole number (a count, a year, a
    house number) must be met exactly. A text of more than 2,000 characters matches nothing."""
    if len(answer) > _LONGEST_ANSWER:
        return False
    if question.options:
        right = choice(question.answer, question.options)
        if right is not None:
            return choice(answer, question.options) == right
    return same(answer, question.answer, tolerance)


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Return the index of the only option that ``answer`` commits to, or None.

    A bare letter is a letter even where an option's text is that letter; give such a ground truth as its letter."""
    text = _without_lead_in(_plain(answer))
    letters = string.ascii_uppercase[: len(options)]
    if (bare := _BARE_LETTER.fullmatch(text)) and bare[1].upper() in letters:
        return letters.index(bare[1].upper())
    if (whole := _equal_option(text, options)) is not None:
        return whole
    yes_or_no = [polarity(option) for option in options]
    by_polarity = None not in yes_or_no
    masked, named = (text, set[int]()) if by_polarity else _mask_options(text, options)
    if _NEGATION.search(masked) and not by_polarity:
        return None
    committed = _letters(masked, letters)
    if committed:
        (letter, *others) = committed
        return letter if not others and (not named or letter in named) else None
    if by_polarity:
        named = {place for place, kind in enumerate(yes_or_no) if kind is polarity(text)}
    return named.pop() if len(named) == 1 else None


def same(answer: str, truth: str, tolerance: float = 0.01) -> bool:
    """Tell whether two free answers are equal as text, as yes or no, or as numbers."""
    right = _plain(truth)
    for text in (_plain(answer), _without_lead_in(_plain(answer))):
        if text and (text.casefold() == right.casefold() or (normalise(text) and normalise(text) == normalise(right))):
            return True
    if (kind := polarity(right)) is not None and len(normalise(right).split()) == 1:
        return polarity(text) is kind
    if (expected := _quantity(right)) is not None and (got := _quantity(text) or _only_quantity(text)) is not None:
        return _close(got, expected, 0.0 if _whole_number(right) else tolerance)
    return False


def normalise(text: str) -> str:
    """Return lower case, NFKC, no punctuation (but signs and points inside numbers), no articles, single spaces."""
    words = _WORD.findall(_plain(text).casefold())
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def polarity(text: str) -> bool | None:
    """Return True for a text that says yes, False for no, None for neither or both.

    The first word must be the yes or no: "there is no car" is not a no."""
    words = normalise(text).split()
    kinds = {_POLARITY[word] for word in words if word in _POLARITY}
    return _POLARITY.get(words[0]) if words and len(kinds) == 1 else None


def _plain(text: str) -> str:
    """Return NFKC, without tags, markdown, quotes and TeX wrappers; dashes in ASCII, white space collapsed."""
    text = unicodedata.normalize("NFKC", text).translate(_ASCII)
    return " ".join(_DECORATION.sub(" ", text).split())


def _without_lead_in(text: str) -> str:
    lead_in = _LEAD_IN.match(text)
    return text[lead_in.end() :] if lead_in else text


def _equal_option(text: str, options: Sequence[str]) -> int | None:
    """Return the only option that equals the whole text: as written, else normalised, else as a quantity."""
    keys: tuple[Callable[[str], Hashable], ...] = (lambda given: _plain(given).casefold(), normalise, _quantity)
    for key in keys:
        wanted = key(text)
        equal = [place for place, option in enumerate(options) if wanted and key(option) == wanted]
        if len(equal) == 1:
            return equal[0]
    return None


def _mask_options(text: str, options: Sequence[str]) -> tuple[str, set[int]]:
    """Return the text with the words of options masked, and the indices of these options.

    Longest first: "dark red" does not name "red"."""
    named: set[int] = set()
    words = [_leading_article_dropped(_WORD.findall(_plain(option))) for option in options]
    for parts in sorted(filter(None, words), key=lambda parts: -sum(map(len, parts))):
        between = r"\W*(?:\b(?:a|an|the)\b\W*)?"
        inner = between.join(map(re.escape, parts))
        pattern = re.compile(rf"(?<![\w-])(?<![0-9][.,:]){inner}(?![\w-])(?![.,:][0-9])", re.IGNORECASE)
        if pattern.search(text):
            named |= {place for place, its in enumerate(words) if _folded(its) == _folded(parts)}
            text = pattern.sub(_MASK, text)
    return text, named


def _letters(masked: str, letters: str) -> set[int]:
    """Return the indices of the letters that a text commits to; empty where it commits to none ("vitamin C").

    Once it commits to any letter, every other letter standing in it counts too: "B, or C" names two."""
    committed = {match.upper() for pattern in _COMMITTED_LETTER for match in pattern.findall(masked)} & set(letters)
    standing = set(_STANDING_LETTER.findall(masked)) & set(letters)
    return {letters.index(letter) for letter in committed | standing} if committed else set()


def _leading_article_dropped(words: list[str]) -> list[str]:
    return words[1:] if len(words) > 1 and words[0].lower() in _ARTICLES else words


def _folded(words: list[str]) -> list[str]:
    return [word.casefold() for word in words]


Quantity = tuple[float, str]
"""A finite number, and the word or sign right after it."""


def _quantity(text: str) -> Quantity | None:
    """Read a text that is a number, with or without a currency sign before it and one unit after it."""
    match = _QUANTITY.fullmatch(_plain(text))
    return _read(match) if match else None


def _only_quantity(text: str) -> Quantity | None:
    """Read the only number in a sentence. "7 or 8", "10:30", "3/4" and "B12" have none."""
    plain = _plain(text)
    numbers = list(_NUMBER_IN_TEXT.finditer(plain))
    if len(numbers) != 1 or len(_DIGITS.findall(plain)) != 1:
        return None
    return _read(numbers[0])


def _read(match: re.Match[str]) -> Quantity | None:
    number = float(match[1].replace(",", ""))
    return (number, match[2].casefold()) if math.isfinite(number) else None


def _whole_number(text: str) -> bool:
    quantity = _quantity(text)
    return quantity is not None and quantity[0].is_integer() and "." not in text


def _close(got: Quantity, expected: Quantity, tolerance: float) -> bool:
    """Compare two quantities. Units count only where both are given: a ground truth of "7" is met by "7 cars"."""
    if got[1] and expected[1] and got[1] != expected[1]:
        return False
    return math.isclose(got[0], expected[0], rel_tol=tolerance)
