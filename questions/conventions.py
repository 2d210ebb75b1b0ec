"""How a data set writes what can be written in several ways: options, answers, boxes.

Decided for the whole column, from all of its rows, before any row is converted; never from one cell. What the rows do
not decide is refused, and the message names the option that does.
"""

from __future__ import annotations

import ast
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ergo_rl.questions.dataset import DatasetError
from ergo_rl.questions.rows import BadCell, Cells, check_number_of_options, four_numbers, read_text, shorten

LETTERS = string.ascii_uppercase


class BoxCorners(StrEnum):
    """What the four numbers of a box are: two corners, or a corner with width and height."""

    XYXY = "xyxy"
    XYWH = "xywh"


class BoxUnit(StrEnum):
    """Unit of the numbers of a box: pixels of the original, shares of its sides (0 to 1), or thousandths of them."""

    PIXELS = "pixels"
    SHARES = "shares"
    THOUSANDTHS = "thousandths"


class Letters(StrEnum):
    """Whether options begin with letters of their own, which are taken off ("A. red"), or the text is the option."""

    STRIP = "strip"
    KEEP = "keep"


class Answers(StrEnum):
    """How answers name an option. WORDS: by its letter or its text, which never contradict each other in the data."""

    WORDS = "words"
    LETTER = "letter"
    TEXT = "text"
    ZERO = "zero"
    """The number of the option, counted from 0."""
    ONE = "one"
    """The same, counted from 1."""


class NoneText(StrEnum):
    """What the text "None" is in a column of options: an option, or a cell without one."""

    OPTION = "option"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Told:
    """What the user said (None: to be decided), by the options of ``ergo-rl prepare``."""

    corners: BoxCorners | None = None
    boxes: BoxUnit | None = None
    letters: Letters | None = None
    answers: Answers | None = None
    none: NoneText | None = None


@dataclass(frozen=True, slots=True)
class Conventions:
    """What holds for all rows."""

    corners: BoxCorners = BoxCorners.XYXY
    boxes: BoxUnit = BoxUnit.PIXELS
    letters: Letters = Letters.KEEP
    answers: Answers = Answers.WORDS
    none: NoneText = NoneText.OPTION


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """An option as the row has it."""

    label: str
    """What an answer may call it: the key of a dictionary, the letter of a column, of a line, or of its place."""
    text: str


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a row."""

    items: tuple[Option, ...] = ()
    labelled: bool = False
    """Whether the row says what an answer may call them. Else letters may stand in their texts."""


_ROUND = re.compile(r"\(([A-Z])\)\s*(?=\S)|([A-Z])\)\s+(?=\S)")
_POINT = re.compile(r"([A-Z])(?::|\.(?=\s|[^\W_]{2}))\s*(?=\S)")  # not A.M.
_INSTRUCTION = re.compile(
    r"(?:please )?(?:answer|respond|select|choose)\b.*\b(?:option|choice|letter)s?\b.*|options?:|choices:|"
    r"the (?:choices|options) are listed below:?",
    re.IGNORECASE,
)
_INLINE = re.compile(r"(?<!\w)\(?([A-Z])\)\s*(?=\S)")
_ASKS_FOR_A_LETTER = re.compile(r"[.\n]\s*(?=(?:please )?(?:answer|respond|select|choose)\b)|\n", re.IGNORECASE)
_LONGEST_LIST = 100_000
"""Characters of a list that is written as text."""


def lettered(text: str) -> tuple[str, str, str] | None:
    """Return (letter, rest, style) of ``(A) red``, ``A) red``, ``A. red`` or ``A: red``; None for another text."""
    text = text.strip()
    if found := _ROUND.match(text):
        return found[1] or found[2], text[found.end() :], "(A)"
    if found := _POINT.match(text):
        return found[1], text[found.end() :], "A."
    return None


def split_options(text: str) -> tuple[str, list[str]]:
    """Split a text with lines ``(A) ...``, ``(B) ...`` (or ``A. ...``) into the question without them, and the options
    without their letters; also lines ``a) ...``, ``b) ...``, and options in one line, ``(A) ... (B) ...``. A line that
    asks to answer with a letter is left out: prompts say that in words of their own. What does not count up from A is
    no option."""
    stem, options = _split_lines(text, lettered)
    if not options:
        stem, options = _split_lines(text, lambda line: lettered(line.strip()[:3].upper() + line.strip()[3:]))
    return (stem, options) if options else _split_inline(text)


def _split_inline(text: str) -> tuple[str, list[str]]:
    marks = list(_INLINE.finditer(text))
    if not 2 <= len(marks) <= 26 or [mark[1] for mark in marks] != list(LETTERS[: len(marks)]):
        return text.strip(), []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    options = [text[mark.end() : end].strip(" ,;\n") for mark, end in zip(marks, ends, strict=True)]
    options[-1] = _ASKS_FOR_A_LETTER.split(options[-1])[0].strip()
    stem = text[: marks[0].start()].strip()
    return (stem, options) if stem and all(options) else (text.strip(), [])


def _split_lines(text: str, lettered: Callable[[str], tuple[str, str, str] | None]) -> tuple[str, list[str]]:
    stem, options = list[str](), list[str]()
    for line in text.splitlines():
        found = lettered(line)
        if found and len(options) < 26 and found[0] == LETTERS[len(options)]:
            options.append(found[1])
        else:
            stem.append(line)
    if len(options) < 2:
        return text.strip(), []
    return "\n".join(line for line in stem if not _INSTRUCTION.fullmatch(line.strip())).strip(), options


def listed_options(given: Any, cells: Cells, none: NoneText = NoneText.OPTION) -> Options:
    """Return the options of a row from their own cell ``given`` (list, dictionary, or either as JSON or Python text, or
    lettered lines), or else from columns A, B, C, ...

    Raises BadCell for what is none of these."""
    problem: BadCell | None = None
    if given is not None and given != []:
        try:
            return _from_cell(given)
        except BadCell as bad:
            problem = bad
    if "A" in cells:
        found = [(letter, cells[letter]) for letter in LETTERS if letter in cells]
        items = [Option(letter, _option_text(cell)) for letter, cell in found if not _is_missing(cell, none)]
        if items:
            return Options(tuple(items), labelled=True)
    if problem is not None:
        raise problem
    return Options()


def _from_cell(given: Any) -> Options:
    value = parsed(given) if isinstance(given, str) else given
    if isinstance(value, str):
        _, lines = split_options(value)
        if not lines:
            raise BadCell("options", f"is no list of options: {shorten(given)}")
        return Options(tuple(map(Option, LETTERS, lines)), labelled=True)
    if isinstance(value, Mapping):
        pairs = [(_label(key), text) for key, text in value.items() if text is not None]
        # Arrow gives a struct all keys that any row has; the letters among them are put in order.
        pairs.sort(key=lambda pair: LETTERS.find(pair[0].upper()) if len(pair[0]) == 1 else -1)
        return Options(tuple(Option(key, _option_text(text)) for key, text in pairs), labelled=True)
    if not isinstance(value, list | tuple):
        raise BadCell("options", f"should be a list: is {shorten(given)}")
    if value and all(isinstance(item, Mapping) for item in value):
        return Options(tuple(_keyed(item, place) for place, item in enumerate(value)), labelled=True)
    return Options(tuple(Option(_letter(place), _option_text(item)) for place, item in enumerate(value)))


def _label(key: object) -> str:
    name = str(key).strip()
    return bare[1] if (bare := _BARE_LETTER.fullmatch(name)) else name


def _letter(place: int) -> str:
    return LETTERS[place] if place < 26 else str(place)


def _keyed(item: Mapping[str, Any], place: int) -> Option:
    """An option of its own dictionary: ``{"key": "A", "text": "red"}``."""
    text = next((item[name] for name in ("text", "value", "content", "option") if item.get(name) is not None), None)
    label = next((item[name] for name in ("key", "label", "letter", "id") if item.get(name) is not None), None)
    return Option(_letter(place) if label is None else str(label).strip(), _option_text(text))


def parsed(text: str) -> Any:
    """A list or dictionary written as JSON or as Python's repr; else the text."""
    if len(text) <= _LONGEST_LIST and text.strip()[:1] in ("[", "{", "("):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text.strip())
            except Exception:  # neither JSON nor Python; nested without end
                continue
    return text


def _option_text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = None if value != value else str(value)
    return read_text("options", value).strip()


def _is_missing(cell: Any, none: NoneText) -> bool:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return True
    if not isinstance(cell, str):
        return False
    return cell.strip().lower() in ("", "nan", "null") or (cell.strip() == "None" and none is NoneText.MISSING)


def without_letters(options: Options) -> Options | None:
    """Return the options with the letters that stand in their texts as their labels, None where these are no letters of
    options: ``(A)`` counts up from A, with gaps at most, ``A.`` without any."""
    found = [lettered(option.text) for option in options.items]
    if not found or None in found:
        return None
    letters, styles = [one[0] for one in found if one], {one[2] for one in found if one}
    exact = letters == list(LETTERS[: len(letters)])
    rising = letters[0] == "A" and letters == sorted(set(letters))
    own = options.labelled and letters == [option.label for option in options.items]
    if not (own if options.labelled else exact or (rising and styles == {"(A)"})):
        return None
    return Options(tuple(Option(one[0], one[1].strip()) for one in found if one), labelled=True)


def row_options(options: Options, conventions: Conventions) -> tuple[Option, ...]:
    """Return the options of a row by the conventions of its column. Raises BadCell for a number of them that is not
    possible."""
    stripped = without_letters(options) if conventions.letters is Letters.STRIP else None
    found = (stripped or options).items
    check_number_of_options(found)
    return found


# --- answers ---------------------------------------------------------------------------------------------------------

_BARE_LETTER = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer):? )?[(\[]?([A-Za-z])[)\]]?[.:]?")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WRAPPED = re.compile(r"\$*\\boxed\{(.*)\}\$*\.?", re.DOTALL)
_PLAIN = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")


def answer_text(value: Any) -> str:
    """Return an answer as text, also of a number, the first of a list, ``\\boxed{B}`` or ``<answer>B</answer>``.

    Raises BadCell."""
    if isinstance(value, list):
        if len(set(map(str, value))) > 1 and all(_BARE_LETTER.fullmatch(str(one).strip()) for one in value):
            raise BadCell("answer", f"names several options: {shorten(value)}")
        value = value[0] if value else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        value = str(int(value)) if value.is_integer() and abs(value) < 1e15 else str(value)
    text = read_text("answer", value).strip()
    if tagged := _ANSWER_TAG.findall(text):
        text = tagged[-1].strip()
    if boxed := _WRAPPED.fullmatch(text):
        text = _PLAIN.sub(r"\1", boxed[1]).strip()
    return read_text("answer", text)


def readings(answer: str, options: Sequence[Option]) -> dict[Answers, int]:
    """Return the place of the option that ``answer`` names, for each way of reading it that gives one."""
    found: dict[Answers, int] = {}
    folded = answer.casefold()
    by_label = [place for place, option in enumerate(options) if option.label.casefold() == folded]
    if not by_label and (bare := _BARE_LETTER.fullmatch(answer)):
        by_label = [place for place, option in enumerate(options) if option.label.casefold() == bare[1].casefold()]
    by_text = [place for place, option in enumerate(options) if option.text.casefold() == folded]
    if not by_label and len(by_text) != 1 and (parts := lettered(answer)):
        # "B. red": the letter and the text of one option, or the text behind a letter that is none of theirs
        label, text = parts[0].casefold(), parts[1].strip().casefold()
        by_text = [place for place, option in enumerate(options) if option.text.casefold() == text]
        named = [place for place, option in enumerate(options) if option.label.casefold() == label]
        if len(by_text) == 1 and named and named != by_text:
            return {}
    if len(by_label) == 1:
        found[Answers.LETTER] = by_label[0]
    if len(by_text) == 1:
        found[Answers.TEXT] = by_text[0]
    if re.fullmatch(r"[0-9]{1,3}", answer):
        for way, place in ((Answers.ZERO, int(answer)), (Answers.ONE, int(answer) - 1)):
            if 0 <= place < len(options):
                found[way] = place
    return found


def read_answer(answer: str, options: Sequence[Option], conventions: Conventions) -> str:
    """Return the answer of a row: the letter of its option by place where there are options. Raises BadCell."""
    if not options:
        return answer
    found = readings(answer, options)
    way = conventions.answers
    place = found.get(Answers.LETTER, found.get(Answers.TEXT)) if way is Answers.WORDS else found.get(way)
    if place is None:
        shown = shorten([option.text for option in options])
        raise BadCell("answer", f"is none of the options: {shorten(answer)} of the {len(options)} options {shown}")
    return LETTERS[place]


# --- boxes -----------------------------------------------------------------------------------------------------------


def list_of_boxes(value: Any) -> list[Any]:
    """One box, a list of them, or a list of objects that have one; also as text of JSON or Python. Raises BadCell."""
    given = value
    if isinstance(value, str):
        value = parsed(value)
    if value is None:
        return []
    if isinstance(value, str):
        raise BadCell("boxes", f"is no list of boxes: {shorten(given)}")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise BadCell("boxes", f"should be a list: is {shorten(given)}")
    value = list(value)
    if value and all(isinstance(item, int | float) for item in value):
        value = [value]
    return [_box_of(item) if isinstance(item, Mapping) else item for item in value]


def _box_of(item: Mapping[str, Any]) -> Any:
    if all(name in item for name in ("x1", "y1", "x2", "y2")):
        return [item[name] for name in ("x1", "y1", "x2", "y2")]
    return next((item[name] for name in ("bbox", "bbox_2d", "box") if item.get(name) is not None), None)


# --- the evidence ----------------------------------------------------------------------------------------------------

SIZED_BOXES = 200
"""Boxes that are compared with the sizes of their images, where numbers alone do not tell pixels from thousandths."""
FEW = 20
"""Fewer boxes say nothing by what they do not do."""


@dataclass
class Survey:
    """Counts over all rows of a data set what its conventions are decided from."""

    told: Told
    default: Conventions
    """What the data set's card says of boxes."""
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Of rows and boxes, by what they show."""
    largest: float = 0.0
    """Number of any box."""
    sized: int = 0
    """Boxes that were compared with their images."""

    def see(self, options: Options, answer: Any, boxes: Sequence[Any], cells: Cells) -> None:
        """Count one row. Raises BadCell for a row that will be skipped for that reason."""
        self.rows += 1
        for numbers in boxes:
            self._see_box(numbers)
        if options.items:
            self._see_options(options, answer_text(answer), cells)
        else:
            self.counts["open"] += 1
            self.counts["open letters"] += bool(re.fullmatch(r"[(\[]?[A-H][)\]]?\.?", answer_text(answer)))

    def _see_box(self, numbers: Any) -> None:
        corners = four_numbers(numbers)
        a, b, c, d = corners
        self.counts["boxes"] += 1
        self.counts["reversed"] += c < a or d < b
        self.largest = max(self.largest, *map(abs, corners))
        if all(0 <= number <= 1 for number in corners):
            self.counts["up to 1"] += 1
            self.counts["fractions"] += any(number not in (0, 1) for number in corners)

    def see_size(self, numbers: Any, width: int, height: int) -> None:
        """Compare one box with the size of its image. Raises BadCell."""
        a, b, c, d = four_numbers(numbers)
        right, bottom = (a + c, b + d) if (self.told.corners or self.default.corners) is BoxCorners.XYWH else (c, d)
        self.sized += 1
        self.counts["outside"] += right > width * 1.01 + 2 or bottom > height * 1.01 + 2
        self.counts["in large images"] += width > 1250 and height > 1250

    def _see_options(self, options: Options, answer: str, cells: Cells) -> None:
        count, stripped = self.counts, without_letters(options)
        count["with options"] += 1
        count["lettered"] += stripped is not None
        self._see_none(answer, cells)
        for name, found in (("keep", options.items), ("strip", (stripped or options).items)):
            ways = readings(answer, found)
            by_letter, by_text = ways.get(Answers.LETTER), ways.get(Answers.TEXT)
            count[f"{name} letter only"] += by_letter is not None and by_text is None
            count[f"{name} text only"] += by_text is not None and by_letter is None
            count[f"{name} contradict"] += None not in (by_letter, by_text) and by_letter != by_text
            if answer.isdecimal() and by_letter is None:
                count[f"{name} numbers"] += 1
                count[f"{name} unread numbers"] += by_text is None
                count[f"{name} zeros"] += answer == "0"
                count[f"{name} last"] += answer == str(len(found))

    def _see_none(self, answer: str, cells: Cells) -> None:
        said = [letter for letter in LETTERS if isinstance(cell := cells.get(letter), str) and cell.strip() == "None"]
        if said and "A" in cells:
            bare = _BARE_LETTER.fullmatch(answer)
            self.counts["none twice"] += len(said) > 1
            self.counts["none answered"] += answer.lower() == "none" or bool(bare and bare[1].upper() in said)

    @property
    def needs_sizes(self) -> bool:
        """Whether numbers alone do not tell pixels from thousandths."""
        return self.told.boxes is None and self.counts["boxes"] > 0 and 1 < self.largest <= 1000

    def decide(self) -> Conventions:
        """Return what holds for all rows. Raises DatasetError where the rows do not decide it."""
        letters_of_nothing, open_rows = self.counts["open letters"], self.counts["open"]
        if letters_of_nothing > 0.5 * open_rows and self.told.answers is None:
            raise DatasetError(
                f"the answers of {letters_of_nothing} of {open_rows} rows without options are letters of options: name "
                "the column that has the options, --map options=COLUMN, or say that these letters are the answers, "
                "--answers text"
            )
        letters = self.told.letters or self._letters()
        return Conventions(
            self._corners(), self._unit(), letters, self.told.answers or self._answers(letters.value), self._none()
        )

    def _letters(self) -> Letters:
        rows, lettered_rows = self.counts["with options"], self.counts["lettered"]
        return Letters.STRIP if lettered_rows and lettered_rows >= 0.9 * rows else Letters.KEEP

    def _none(self) -> NoneText:
        if self.told.none is not None:
            return self.told.none
        twice, answered = self.counts["none twice"], self.counts["none answered"]
        if twice and answered:
            raise DatasetError(
                f'"None" is the answer of {answered} rows, and stands for several options of {twice} others: say what '
                "it is, --none option or --none missing"
            )
        return NoneText.MISSING if twice else NoneText.OPTION

    def _answers(self, name: str) -> Answers:
        count, rows = self.counts, self.counts["with options"]
        if count[f"{name} numbers"] > 0.5 * rows and count[f"{name} unread numbers"] > 0.05 * rows:
            zeros, last = count[f"{name} zeros"], count[f"{name} last"]
            if zeros > 20 * last:
                return Answers.ZERO
            if last > 20 * zeros:
                return Answers.ONE
            raise DatasetError(
                f"answers are numbers of options in {count[f'{name} numbers']} of {rows} rows, 0 in {zeros} and the "
                f"number of all options in {last}: say what they count from, --answers zero or --answers one"
            )
        if not count[f"{name} contradict"]:
            return Answers.WORDS
        by_letter, by_text = count[f"{name} letter only"], count[f"{name} text only"]
        if by_letter > 20 * by_text:
            return Answers.LETTER
        if by_text > 20 * by_letter:
            return Answers.TEXT
        raise DatasetError(
            f"answers of {count[f'{name} contradict']} rows are the letter of one option and the text of another: say "
            "which they mean, --answers letter or --answers text"
        )

    def _corners(self) -> BoxCorners:
        boxes, reversed_boxes = self.counts["boxes"], self.counts["reversed"]
        corners = self.told.corners or self.default.corners
        if self.told.corners is None and corners is BoxCorners.XYXY and reversed_boxes > 0.05 * boxes:
            raise DatasetError(
                f"{reversed_boxes} of {boxes} boxes end before they begin if they are two corners: say what the four "
                "numbers are, --corners xywh (a corner, width, height) or --corners xyxy"
            )
        return corners

    def _unit(self) -> BoxUnit:
        if self.told.boxes is not None or not self.counts["boxes"]:
            return self.told.boxes or self.default.boxes
        say = "say what the numbers of boxes are, --boxes pixels, --boxes shares or --boxes thousandths"
        boxes, small = self.counts["boxes"], self.counts["up to 1"]
        if small == boxes and self.counts["fractions"]:
            return BoxUnit.SHARES
        if small > 0.5 * boxes:
            raise DatasetError(f"{small} of {boxes} boxes have no number above 1: {say}")
        outside, sized = self.counts["outside"], self.sized
        if self.largest > 1000 or not sized:
            return self.default.boxes
        if outside > 0.5 * sized and sized >= FEW:
            return BoxUnit.THOUSANDTHS
        if outside > 0.2 * sized:
            raise DatasetError(f"{outside} of {sized} boxes leave their images as pixels, none goes beyond 1000: {say}")
        if self.counts["in large images"] >= max(FEW, 0.5 * sized):
            raise DatasetError(f"no box goes beyond 1000, in {self.counts['in large images']} larger images: {say}")
        return self.default.boxes
