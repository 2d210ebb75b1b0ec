"""Numbers with magnitudes and units, in digits and in words, in English and Chinese.

A number is read exactly (``Fraction``). What stands beside it decides: "5 million" is 5,000,000, "more than
7" and "3rd" are no 7 and no 3, and "$5" is not "5 euros"."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_SCALES = {
    "hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "mn": 10**6, "mio": 10**6, "M": 10**6,
    "tens": 10, "billion": 10**9, "bn": 10**9, "trillion": 10**12, "dozen": 12, "dozens": 12, "lakh": 10**5,
    "crore": 10**7,
    "hundreds": 100, "thousands": 1000, "millions": 10**6, "billions": 10**9, "K": 1000,
    "十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8,
}  # fmt: skip
_MONEY = {"B": 10**9, "T": 10**12}  # $5B; 12B may be a seat
_NAMES = """% percent percents pct; ° degree degrees deg 度; °c celsius; °f fahrenheit; $ dollar dollars usd us$
    € euro euros eur; £ gbp sterling; ¥ yen yuan rmb cny jpy 元 円; pound pounds; lb lbs; oz ounce ounces
    mm millimeter millimeters millimetre millimetres; cm centimeter centimeters centimetre centimetres
    m meter meters metre metres; km kilometer kilometers kilometre kilometres; mile miles mi; yd yard yards
    inch inches; ft foot feet; mg milligram milligrams; g gram grams; kg kilogram kilograms kilo kilos kgs
    ton tons tonne tonnes; ml milliliter milliliters millilitre millilitres; l liter liters litre litres
    ms millisecond milliseconds; s sec secs second seconds; min mins minute minutes; h hr hrs hour hours
    day days; week weeks; month months; year years; km/h kmh kph; mph; m/s; hz; khz; ghz; kw; kwh
    w watt watts; v volt volts; amp amps; 个 只 辆 人 条 张 位 名 件 本 匹 头 棵 朵 座 台 把"""
_UNITS = {name: names.split()[0] for names in _NAMES.replace("\n", ";").split(";") for name in names.split()}
"""Canonical unit by each of its names."""
_CASE_MATTERS = frozenset(("mw", "mb", "gb", "kb", "tb", "mpa"))
_NOT_UNITS = frozenset("GHMS")  # 5G is no weight
_EITHER = {"pound": {"£", "lb"}, "°": {"°c", "°f"}, "个": set[str]()}
_NO_NOUN = """a an the of in on at to is are was were be and or but not no nor with without for from by as than
    that this these those there it its they he she we you i because since so if then total altogether here
    visible left right shown seen"""
_NO_UNIT = frozenset(_NO_NOUN.split())

_DIGITS = r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:(?<=[0-9])\.(?![0-9])|\.[0-9]+)?"
_TOKEN = re.compile(
    rf"(?P<sign>[-+])?(?P<currency>us\$|[$€£¥])?(?P<number>{_DIGITS})(?:e(?P<exponent>[-+]?[0-9]{{1,3}})|\^(?P<power>[0-9]{{1,2}})|"
    rf"/(?P<below>[1-9][0-9]{{0,8}}))?(?P<rest>[^\W\d_]*|%|°[a-z]?|[$€£¥]|km/h|m/s)",
    re.IGNORECASE,
)
_MOST_DIGITS = 60
_LARGEST_BELOW = 10
_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_SMALL.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 2)
}
_MINUS = ("minus", "negative")
_COUNTED = ("dozen", "hundred", "thousand", "million", "billion")
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourths": 4, "fifths": 5}
_CHINESE = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {
    "两": 2,
    "\N{IDEOGRAPHIC NUMBER ZERO}": 0,
}
_CHINESE_NUMBER = re.compile(
    r"(?:一共|总共|共|有|是|为)*+([零〇一二两三四五六七八九十百千万亿]{1,12})(?:[个只辆人条张位名件本匹头棵朵座台把](?:(?![或和与到至还零〇一二两三四五六七八九十])[\u4e00-\u9fff]){0,6})?"
)
_ORDINAL = re.compile(r"first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|\w*(?:teenth|tieth|elfth)")

_BEFORE = re.compile(
    r"(?:\b(?:than|over|under|above|below|at (?:least|most)|up to|almost|nearly|close to|beyond|past|exceed\w*|until|"
    r"within|(?:min|max)(?:imum)?|"
    r"(?<!total )(?<!number )(?<!count )(?<!sum )(?<!year )(?<!age )(?<!price )(?<!result )(?<!all )of|"
    r"as (?:many|few|much) as|twice|double|triple|half|another|plus|"
    r"times|sqrt|before|after|since|prior to)|"
    r"[<>!]=|[<>≤≥±≠/*\u00d7+^]|不到|超过|至少|至多|最多|大于|小于|多于|少于|第)\s*(?:the |an? )?$",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\s*(?:[+^*\u00d7/]|or (?:more|less|fewer|so|above|below|higher|lower|later|earlier)\b|"
    r"(?:and|or) (?:up|over|above|higher|older|beyond|under)\b|"
    r"(?:plus|at (?:least|most)|minimum|maximum|more|fewer|less|out of|squared|cubed|times|bce?)\b|%o|以上|以下)",
    re.IGNORECASE,
)
_ROUGHLY = frozenset(("", "about", "approximately", "roughly", "around", "exactly", "circa"))
_PRONOUN = re.compile(r"\b(?:the|this|that|which|each|any|every|no|another|some)(?: \w+)? $", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Quantity:
    value: Fraction
    unit: str = ""
    """Canonical ("cm", "$"), or the noun behind the number without its plural; empty: none was given."""

    def equals(self, other: Quantity, tolerance: float = 0.0) -> bool:
        """Compare; units count only where both have one. ``tolerance`` is relative to ``other``."""
        if self.unit and other.unit and not _same_unit(self.unit, other.unit):
            return False
        return abs(self.value - other.value) <= abs(other.value) * Fraction(tolerance)


@dataclass(frozen=True, slots=True)
class Found:
    """A number in a text, ``text[start:end]``; quantity None: it says something else (a limit, a time, an ordinal)."""

    start: int
    end: int
    quantity: Quantity | None


def quantity(text: str) -> Quantity | None:
    """Read a plain text that is one number and nothing else but its unit ("about 7 cars", "$5 million")."""
    found = list(quantities(text))
    if len(found) != 1 or found[0].quantity is None:
        return None
    before, after = text[: found[0].start].strip(" ~≈").casefold(), text[found[0].end :].strip(" .,;!").casefold()
    noun = after.removesuffix("s") == found[0].quantity.unit.removesuffix("s")
    return found[0].quantity if before in _ROUGHLY and (not after or noun) else None


def quantities(text: str) -> Iterator[Found]:
    """Yield every number of a plain text, in order."""
    words = [(word, match.start()) for match in _WORD.finditer(text) if (word := match[0].rstrip(".,;:!?)]"))]
    place = 0
    while place < len(words):
        if (read := _read(words, place)) is None:
            place += 1
            continue
        value, unit, past = read
        start, end = words[place][1], words[past - 1][1] + len(words[past - 1][0])
        if value is not None and (
            _BEFORE.search(text[max(0, start - 40) : start]) or _AFTER.match(text[end : end + 40])
        ):
            value = None
        if not (words[place][0].casefold() == "one" and _PRONOUN.search(text[max(0, start - 40) : start])):
            yield Found(start, end, None if value is None else Quantity(value, unit))
        place = past  # always beyond the number


_DECADE = re.compile(r"(?:1[0-9]|20)[0-9]0")
"""With an s behind it: the 1990s are no 1990."""
_WORD = re.compile(r"[^\s\u4e00-\u9fff]+|[\u4e00-\u9fff]+")
_Words = list[tuple[str, int]]
"""Words of a text without the punctuation behind them, and where each begins."""
_Read = tuple[Fraction | None, str, int]
"""Value (None: something else than a number), unit, index of the next word."""


def _read(words: _Words, place: int) -> _Read | None:
    """Read a number that begins at a word; None where none does."""
    token = words[place][0].lstrip("([~≈#")
    if any(character.isdigit() for character in token):
        return _read_digits(token, words, place)
    if (chinese := _CHINESE_NUMBER.fullmatch(token)) is not None:
        value = _chinese(chinese[1])
        return value, "", place + 1
    return _read_words(words, place)


def _read_digits(token: str, words: _Words, place: int) -> _Read:
    match = _TOKEN.fullmatch(token)
    value = _value(match) if match else None
    if match is None or value is None:
        return None, "", place + 1
    unit, rest = _unit(match["currency"] or ""), match["rest"]
    if rest == "s" and _DECADE.fullmatch(match["number"]):
        return None, "", place + 1
    if scale := _SCALES.get(rest, _MONEY.get(rest) if unit else None):
        value *= scale
    elif rest:
        if not (given := _unit(rest)):
            return None, "", place + 1  # 3rd, 12B
        unit = unit or given
    place += 1
    if not match["below"] and place < len(words) and (part := re.fullmatch(r"([1-9])/([1-9][0-9]?)", words[place][0])):
        value, place = value + Fraction(int(part[1]), int(part[2])), place + 1  # 5 1/2
    return _scaled(value, unit, words, place)


def _value(match: re.Match[str]) -> Fraction | None:
    number = match["number"].replace(",", "").rstrip(".")
    if not number.strip("+-") or len(number) > _MOST_DIGITS:
        return None
    value = Fraction(number) * (-1 if match["sign"] == "-" else 1)
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["power"]:
        value = value ** int(match["power"])
    if match["below"]:
        if (below := int(match["below"])) > _LARGEST_BELOW or math.gcd(int(value), below) != 1:
            return None  # 50/50 and 9/11 are no fractions
        value /= below
    return value


def _read_words(words: _Words, place: int) -> _Read | None:
    """Read "twenty-one", "one hundred and five", "two point five", "minus five", "a dozen", "three quarters"."""
    first, second = _lower(words, place), _lower(words, place + 1)
    if first in _MINUS:
        read = _read(words, place + 1) if second and second not in _MINUS else None
        return read and (None if read[0] is None else -read[0], *read[1:])
    if first in ("a", "an") and second in _COUNTED:
        return _scaled(Fraction(1), "", words, place + 1)
    if (first, second, _lower(words, place + 2)) == ("half", "a", "dozen"):
        return _scaled(Fraction(6), "", words, place + 3)
    if first.split("-")[0] not in _WORDS:
        return None
    begin = place
    whole, place = _cardinal(words, place)
    if place == begin:  # four-fifths
        return None, "", place + 1
    if whole is None or (_ORDINAL.fullmatch(following := _lower(words, place)) and following not in _PARTS):
        return None, "", place if whole is None else place + 1
    value, place = _with_part(Fraction(whole), words, place)
    return _scaled(value, "", words, place)


def _cardinal(words: _Words, place: int) -> tuple[int | None, int]:
    """Return a whole number in words, None where the words make none ("two one"), and the index of the next word."""
    total, current, last = 0, 0, -1  # last: the value of the word before, 100 or 1000 behind a magnitude
    while word := _lower(words, place):
        if all(part in _WORDS for part in word.split("-")):
            for value in (_WORDS[part] for part in word.split("-")):
                if not (last < 0 or last >= 100 or (last >= 20 and last % 10 == 0 and value < 10)):
                    return None, place + 1
                current, last = current + value, value
        elif word == "hundred" and 0 <= last < 100:
            current, last = current * 100, 100
        elif word in ("thousand", "million", "billion", "trillion"):
            total, current, last = total + current * _SCALES[word], 0, 1000
        elif not (word == "and" and last >= 100 and _lower(words, place + 1).split("-")[0] in _WORDS):
            break
        place += 1
    return total + current, place


def _with_part(value: Fraction, words: _Words, place: int) -> tuple[Fraction, int]:
    """Add the part behind a number in words: "two point five"; "three quarters" divides."""
    if (below := _PARTS.get(_lower(words, place))) is not None:
        return value / below, place + 1
    a_part = _lower(words, place) == "and" and _lower(words, place + 1) in ("a", "one")
    if a_part and (below := _PARTS.get(_lower(words, place + 2))) is not None:
        return value + Fraction(1, below), place + 3
    digits = ""
    if _lower(words, place) == "point":
        while 0 <= _WORDS.get(_lower(words, place + 1 + len(digits)), -1) < 10:
            digits += str(_WORDS[_lower(words, place + 1 + len(digits))])
    return (value + Fraction(int(digits), 10 ** len(digits)), place + 1 + len(digits)) if digits else (value, place)


def _scaled(value: Fraction, unit: str, words: _Words, place: int) -> _Read:
    """Take up the magnitude and the unit that stand behind a number as words of their own."""
    while place < len(words) and (scale := _SCALES.get(words[place][0], _SCALES.get(_lower(words, place)))):
        value, place = value * scale, place + 1
    if not unit and place < len(words) and _adjacent(words, place):
        word = words[place][0]
        if word.casefold() == "in":
            return (value, "inch", place + 1) if place + 1 == len(words) else (value, "", place)
        if found := _unit(word):
            if found == "°" and (finer := _unit(words[place + 1][0]) if place + 1 < len(words) else "") in ("°c", "°f"):
                return value, finer, place + 2
            return value, found, place + 1
        if word.isascii() and word.isalpha() and word.casefold() not in _NO_UNIT and len(word) > 1:
            unit = word.casefold()
            return value, unit.removesuffix("s") if len(unit) > 3 else unit, place  # the noun stays in the text
    return value, unit, place


def _adjacent(words: _Words, place: int) -> bool:
    """No punctuation stands between a word and the one before it."""
    word, start = words[place - 1]
    return words[place][1] - (start + len(word)) <= 1


def _unit(word: str) -> str:
    folded = word.casefold()
    if word in _NOT_UNITS:
        return ""
    return word if folded in _CASE_MATTERS else _UNITS.get(folded, "")


def _same_unit(one: str, other: str) -> bool:
    return one == other or other in _EITHER.get(one, ()) or one in _EITHER.get(other, ()) or "个" in (one, other)


def _lower(words: _Words, place: int) -> str:
    return words[place][0].casefold() if place < len(words) else ""


def _chinese(numeral: str) -> Fraction | None:
    total = section = digit = 0
    fresh = True
    for character in numeral:
        if (value := _CHINESE.get(character)) is not None:
            if not fresh and value:
                return None  # 两三: two or three
            digit, fresh = value, value == 0
        elif (scale := _SCALES[character]) < 10**4:
            section, digit, fresh = section + (digit or 1) * scale, 0, True
        else:
            total, section, digit, fresh = (total + section + digit) * scale, 0, 0, True
    return Fraction(total + section + digit)
