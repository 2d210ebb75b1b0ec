"""Compare an answer with the ground truth. Pure text; nothing here raises on any text.

Multiple choice: the option that an answer commits to, by its letter or by its words, must be the ground truth's. Free
answers are compared as numbers, as yes or no, or as normalised text. Strict on purpose: a policy would soon list all
options if that earned a reward. tests/rewards/matching_cases.jsonl has what is right and what is not, row by row."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from ergo_rl.episodes.types import Question
from ergo_rl.rewards import mentions
from ergo_rl.rewards.answer_text import plain
from ergo_rl.rewards.quantities import Quantity, quantities, quantity

LONGEST_ANSWER = 2000
"""Of a longer text only its last 2,000 characters count, and of these what is in a ``\\boxed`` or stands behind "the
answer is"."""

_YES = ("yes", "yeah", "yep", "true", "是", "是的", "对", "对的", "正确")
_NO = ("no", "nope", "false", "否", "不", "不是", "不是的", "不对", "错误")
_POLARITY = dict.fromkeys(_YES, True) | dict.fromkeys(_NO, False)
_LETTERS_OF_WORDS = re.compile(r"[^\W_]+")
_NO_ANSWERS = re.compile(
    r"no\b\W*$|no\s*[,.;:!-]|no (?:it|there|they|he|she|the|this|that|i|you|we|because|since|as|not)\b"
)

_ANSWER_IS = re.compile(
    r"(?:\b(?:so|thus|therefore|hence|and|the|my|final|correct|right|best) ){0,4}\b(?:answer|choice|option)\"?"
    r"(?: (?:is|would be|should be|must be)\b:?|'s\b|:| =)\s*"
    r"|(?:正确|最终|最后)?的?(?:答案|选项)(?:应该|应|就)?(?:是|为|选|:)+\s*",
    re.IGNORECASE,
)
_NOT_THE_ANSWER = re.compile(r"\b(?:other|bad|worst)\W+(?:the |my |an? )?$", re.IGNORECASE)

_ARTICLE = re.compile(r"(?:^(?:A|An|The|AN|THE)|(?<![\w'])(?:a|an|the))(?= [^\W\d_])")
_TOKEN = re.compile(
    r"(?:(?<![\w)])-|[<>≤≥≠±]=? ?)?[$€£¥]?(?:[0-9]+(?:[.,:/^][0-9]+)*)(?: ?%|°[A-Za-z]?|[+#]+(?!\w))?|[<>≤≥≠±$€£¥%°^]|"
    r"[^\W_]{1,3}[+#]+(?!\w)|(?<![\w-])[^\W_]{1,2}-(?![\w-])|(?<=\w)\+(?=\w)|[^\W_]+"
)
_ONLY_LETTERS = re.compile(r"(?:[A-Za-z]\b|[\s,.;:/|&()\[\]?!-]|\b(?:or|and|option)\b)+", re.IGNORECASE)
_BARE_LETTER = re.compile(
    r"(?:the )?(?:option |choice |letter )?[\[(<→=>\-: ]*([A-Za-z])[\])>.:,;!? -]*(?:option|选项)?|选项?([A-Za-z])\.?",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    r"(?:(?:the|this|that|its|his|her|their|it|he|she|they|there|these|those|what|i|a|an)\b ?)(?:[^\W\d_]+ ){0,5}?"
    r"(?:is|are|was|were|says?|reads?|shows?|said|'s|see)(?: :|:)? |it's |(?:on|at|in) the |"
    r"[^\W\d_]+(?: [^\W\d_]+)?:\s?|[\u4e00-\u9fff]{0,8}?(?:写着|是|为)",
    re.IGNORECASE,
)
_NO_SUBJECT = re.compile(
    r"\b(?:not|never|no|nobody|nothing|none|wrong|incorrect|opposite|unlikely|doubt|if|whether|false|hardly|except|other|"
    r"neither|without|\w+n't)\b|[不非没别]",
    re.IGNORECASE,
)
_NOT_A_LETTER = re.compile(rf"\bnot\b\W*{mentions.MENTION}", re.IGNORECASE)
_EDGE_MENTION = re.compile(rf"^\W*{mentions.MENTION}\W*|\W*{mentions.MENTION}\W*$")


def matches(answer: str, question: Question, tolerance: float = 0.0) -> bool:
    """Tell whether ``answer`` is the ground truth of ``question``, which may be an option's letter or its text.

    ``tolerance`` is relative and holds for decimal numbers; a ground truth that is a whole number (a count, a year, a
    house number) must always be met exactly."""
    if question.options:
        right = choice(question.answer, question.options)
        if right is not None:
            return choice(answer, question.options) == right
    return same(answer, question.answer, tolerance)


def choice(answer: str, options: Sequence[str]) -> int | None:
    """Return the index of the only option that ``answer`` commits to, or None.

    A bare letter is a letter even where an option's text is that letter; give such a ground truth as its letter. A
    reply that is unsure commits ("maybe B"), one that declines does not ("I don't know, maybe B")."""
    text = _shortened(answer)
    if not _BARE_LETTER.fullmatch(text) and (whole := _equal_option(text, options)) is not None:
        return whole
    found = {_choice(part, options) for part in _final_parts(text)}
    return found.pop() if len(found) == 1 else None


def same(answer: str, truth: str, tolerance: float = 0.0) -> bool:
    """Tell whether two free answers are equal as text, as yes or no, or as numbers."""
    right, text = plain(truth), _shortened(answer)
    if text and text == right:
        return True
    parts = _final_parts(text)
    return bool(parts) and all(_same(part, right, tolerance) for part in parts)


def normalise(text: str) -> str:
    """Return lower case, no punctuation but what tells answers apart (5:30, A+, <5), no articles, single spaces.

    An article stands before a word: the A of "Gate A" is none."""
    return _normalise(plain(text))


def polarity(text: str) -> bool | None:
    """Return True for a text that says yes, False for no, None for neither or both.

    The first word must be the yes or no: "there is no car" is not a no, nor is "no idea"."""
    return _polarity(plain(text))


def _shortened(answer: str) -> str:
    if len(answer) <= LONGEST_ANSWER:
        return plain(answer)
    tail = answer[-LONGEST_ANSWER:]
    if (boxed := tail.rfind("\\boxed")) >= 0:
        return plain(tail[boxed:])
    text = plain(tail)
    return text[found[-1].start() :] if (found := list(_ANSWER_IS.finditer(text))) else ""


def _final_parts(text: str) -> list[str]:
    """Return what stands behind each "the answer is"; the text itself where it says so nowhere.

    A letter or number that the text began with counts beside it."""
    found = [match for match in _ANSWER_IS.finditer(text) if not _denied_before(text[: match.start()])]
    if not found:
        return [text] if text else []
    ends = [*(match.start() for match in found[1:]), len(text)]
    parts = [text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)]
    head = re.match(r"\W*(\w{1,3})\W+$", text[: found[0].start()])
    return [*([head[1]] if head else []), *filter(None, parts)]


def _denied_before(text: str) -> bool:
    """Tell whether "the answer is" behind ``text`` is denied ("I doubt the answer is") or is about another."""
    clause = re.split(r"[.,;:!?]", text[-80:])[-1]
    return any(pattern.search(clause) for pattern in (mentions.NOT, mentions.NEITHER, _NOT_THE_ANSWER))


# --- multiple choice ----------------------------------------------------------------------------------------------


def _choice(text: str, options: Sequence[str]) -> int | None:
    letters = string.ascii_uppercase[: len(options)]
    if (bare := _BARE_LETTER.fullmatch(text)) and (letter := (bare[1] or bare[2]).upper()) in letters:
        return letters.index(letter)
    if (whole := _equal_option(text, options)) is not None:
        return whole
    if _ONLY_LETTERS.fullmatch(text) and len(text) > 1:
        named = {one.upper() for one in re.findall(r"\b[A-Za-z]\b", text)}
        return letters.index(min(named)) if len(named) == 1 and named <= set(letters) else None
    polarities = [_polarity(plain(option)) for option in options]
    masked, words = _mask_options(text, options, polarities)
    if _is_list(masked, text, options, letters):
        return None
    masked = mentions.mask_letters(masked, letters)
    commitment, reasons = mentions.first_commitment(masked)
    if mentions.DECLINES.search(commitment) or mentions.CORRECTS.search(masked) or mentions.conflict(commitment):
        return None
    if any(kind is not None for kind in polarities):
        return _yes_or_no(f"{commitment} {reasons}", polarities, words)
    return _one_of(mentions.asserted(commitment), words)


def _one_of(asserted: set[str], words: dict[str, set[int]]) -> int | None:
    """Return the one option that is asserted; a letter counts more than words, which may be a description."""
    by_letter = {ord(one) - mentions.LETTERS for one in asserted if mentions.is_letter(one)}
    by_words = {place for one in asserted - {mentions.NUMBER} if not mentions.is_letter(one) for place in words[one]}
    if by_letter:
        return by_letter.pop() if len(by_letter) == 1 else None
    return by_words.pop() if len(by_words) == 1 and mentions.NUMBER not in asserted else None


def _yes_or_no(masked: str, polarities: Sequence[bool | None], words: dict[str, set[int]]) -> int | None:
    """As ``_one_of``, where options are a yes or a no: "B. No, it isn't" is B, where B is the no."""
    said = _polarity(_EDGE_MENTION.sub("", masked))
    if said is None:
        said = next(map(_polarity, _sentence_ends(masked)), None)
    places = {place for place, kind in enumerate(polarities) if kind is not None and kind is said}
    if _NOT_A_LETTER.search(masked):
        return None  # "Yes (not A)"
    if places and None not in polarities:  # the no is the answer then, and denies no letter
        by_letter = {ord(one) - mentions.LETTERS for one in mentions.marks(masked) if mentions.is_letter(one)}
        found = by_letter & places if by_letter else places
        return found.pop() if len(found) == 1 and len(by_letter) <= 1 else None
    asserted = mentions.asserted(masked)
    marks = {mark: {place} for place in places if (mark := chr(mentions.WORDS + place))}
    return _one_of(asserted | marks.keys(), words | marks)


def _equal_option(text: str, options: Sequence[str]) -> int | None:
    """Return the only option that equals the whole text, as written or normalised."""
    keys: tuple[Callable[[str], str], ...] = (str.casefold, _normalise)
    plains = [plain(option) for option in options]
    for key in keys:
        wanted = key(text)
        equal = [place for place, option in enumerate(plains) if wanted and key(option) == wanted]
        if len(equal) == 1:
            return equal[0]
    return None


def _mask_options(
    text: str, options: Sequence[str], polarities: Sequence[bool | None]
) -> tuple[str, dict[str, set[int]]]:
    """Return the text with a private character for each option that it names, and which options each stands for.

    Longest first: "dark red" does not name "red"."""
    words: dict[str, set[int]] = {}
    plains = [plain(option) for option in options]
    numbers = [quantity(option) for option in plains]
    folded = [_normalise(option) for option in plains]
    for place in sorted(range(len(options)), key=lambda place: -len(folded[place])):
        parts = tuple(_TOKEN.findall(_without_articles(plains[place])))
        if not parts or polarities[place] is not None or numbers[place] is not None:
            continue
        text, count = _naming(parts).subn(mark := chr(mentions.WORDS + place), text)
        if count:
            words[mark] = {other for other, its in enumerate(folded) if its == folded[place]}
    if any(number is not None for number in numbers):
        text = _mask_numbers(text, numbers, words)
    return text, words


@lru_cache(maxsize=4096)
def _naming(parts: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern for the words of an option, as whole words."""
    inner = r"[\W_]{1,3}(?:(?:an?|the) )?".join(map(re.escape, parts))
    if re.match(r"[\u3400-\u9fff]", parts[0]):  # Chinese has no spaces: only particles may stand around
        return re.compile(rf"(?<![^\W是为选叫有在到了个辆只件条色或和非不没]){inner}(?![^\W的色吧呢啊了或和是])")
    return re.compile(rf"(?<![\w-])(?<![0-9][.,:]){inner}(?![\w-])(?![.,:][0-9])", re.IGNORECASE)


def _mask_numbers(text: str, numbers: Sequence[Quantity | None], words: dict[str, set[int]]) -> str:
    pieces, past = list[str](), 0
    for found in quantities(text):
        read = found.quantity
        equal = {place for place, number in enumerate(numbers) if number and read and read.equals(number)}
        mark = chr(mentions.WORDS + min(equal)) if equal else mentions.NUMBER
        if equal:
            words[mark] = equal
        pieces += [text[past : found.start], mark]
        past = found.end
    return "".join([*pieces, text[past:]])


def _is_list(masked: str, text: str, options: Sequence[str], letters: str) -> bool:
    """Tell whether a text lists options by letters ("A. this B. that"), or two of them behind their own letters."""
    labels = mentions.labels(masked, letters)
    if not mentions.NOT.search(masked) and any(ord(two) - ord(one) == 1 for one, two in pairwise(labels)):
        return True
    words = f" {_normalise(text)} "
    own = [f" {letter} {_normalise(plain(option))} " for letter, option in zip(letters.lower(), options, strict=False)]
    return sum(one in words for one in own) > 1


# --- free answers -------------------------------------------------------------------------------------------------


def _same(text: str, right: str, tolerance: float) -> bool:
    if (expected := quantity(right)) is not None:
        return _same_quantity(
            text, expected, 0.0 if expected.value.denominator == 1 and "." not in right else tolerance
        )
    for candidate in (text, *_sentence_ends(text)):
        if candidate.casefold() == right.casefold() or (_normalise(candidate) or None) == _normalise(right):
            return True
    if (kind := _polarity(right)) is not None and len(_normalise(right).split()) == 1:
        return _polarity(text) is kind
    return False


def _sentence_ends(text: str) -> Iterator[str]:
    """Yield what a sentence says of its subject: "The sign reads STOP" -> "STOP"."""
    if (lead := _SENTENCE.match(text[:200])) and not _NO_SUBJECT.search(lead[0]):
        yield text[lead.end() :]


def _same_quantity(text: str, expected: Quantity, tolerance: float) -> bool:
    if (equation := re.search(r"(?<![<>!≤≥=])=(?![=>])([^=]*)$", text)) is not None:
        text = equation[1]
    met, pieces, past = chr(mentions.WORDS), list[str](), 0
    for found in quantities(text):
        equal = found.quantity is not None and found.quantity.equals(expected, tolerance)
        pieces += [text[past : found.start], met if equal else mentions.NUMBER]
        past = found.end
    masked = "".join([*pieces, text[past:]])
    if any(pattern.search(masked) for pattern in (mentions.DECLINES, mentions.RETRACTS, mentions.CORRECTS)):
        return False
    return mentions.asserted(mentions.first_commitment(masked)[0]) == {met}


# --- words --------------------------------------------------------------------------------------------------------


def _polarity(text: str) -> bool | None:
    text = text.casefold()
    words = [match for match in _LETTERS_OF_WORDS.finditer(text)]
    if not words or words[0][0] not in _POLARITY:
        return None
    # "no sign" is no answer, where "no, it is not" is one
    kinds = [
        _POLARITY.get(word[0]) if word[0] != "no" or _NO_ANSWERS.match(text, word.start()) else None for word in words
    ]
    return kinds[0] if len({kind for kind in kinds if kind is not None}) == 1 else None


def _without_articles(text: str) -> str:
    return _ARTICLE.sub(" ", text)


def _normalise(text: str) -> str:
    return " ".join(token.replace(" ", "") for token in _TOKEN.findall(_without_articles(text).casefold()))
