r"""Bring an answer into plain characters: Unicode, TeX, markup, quotes. Linear in the length of the text.

``plain`` keeps what tells two answers apart (signs, units, the commas of numbers) and drops what only dresses them."""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = str.maketrans(
    dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}", "-")
    | dict.fromkeys("\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{PRIME}", "'")
    | dict.fromkeys("“”„«»「」『』《》\N{DOUBLE PRIME}", '"')
    | {"\N{FRACTION SLASH}": "/", "\N{DIVISION SLASH}": "/", "。": ".", "、": ",", "【": "[", "】": "]", "\x00": " "}
)
_THIN_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")  # 1 000 000
_KEYCAP = "\N{COMBINING ENCLOSING KEYCAP}"

_TEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![\w\\$])\${1,2}([^$]{1,200}?)(?<!\\)\${1,2}(?![0-9])", r" \1 "),  # $B$, but not "$5 or $6"
        (r"\\\\(?=[a-z])", r"\\"),
        (r"\\(?:neg|lnot|not)\b", " not "),
        (r"\\(?:begin|end)\{[a-z]{1,20}\*?\}", " "),
        (r"\\[dtc]?frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}", r" \1/\2 "),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2 "),
        (r"\s*(?:\\times|\\cdot|\u00d7)\s*10\s?\^\s?\{?([-+]?[0-9]{1,3})\}?", r"e\1"),
        (r"\s?\^\s?\{?\s?\\circ\s?\}?", "°"),
        (r"\^\{([^{}]{0,20})\}", r"^\1"),
        (r"(?<=[0-9])(?:\{,\}|\\[,; ])(?=[0-9]{3})", ","),
        (r"\\([%$#&_])", r"\1"),
        (r"\\(?:rightarrow|Rightarrow|to)\b", "→"),
        (r"\\leq?\b", "≤"),
        (r"\\geq?\b", "≥"),
        (r"\\pm\b", "±"),
        (r"\\sqrt\b", " sqrt "),
        (r"\\[a-zA-Z]+\*?|\\[()\[\],;:! \\]", " "),  # \text, \mathbf, \left; \( and \]; spaces
        (r"[{}]", " "),
    )
]
_PLAIN = frozenset("\\${^\N{MULTIPLICATION SIGN}")  # signs of TeX
_TAGS = re.compile(r"</?(?:think|answer|zoom|b|i|u|p|em|strong|span|div|code|br|sub|sup) ?/?>", re.IGNORECASE)
_MARKDOWN = re.compile(r"[*`]|__|~~")
_BULLET = re.compile(r"(?:#+ |(?:[>•-] )(?=[\[(]?[A-Za-z])|[>#] ?(?=[\[(]?[A-Z]\b))+")
_LINE_END = re.compile(r"(?<=[^\s.,:;!?])[ \t\r]*\n\s*")
_INCHES = re.compile(r"(?<=[0-9])\"(?![^\"]*\")(?<!\"[0-9]\")(?<!\"[0-9]{2}\")")
_NUMBER_SIGN = re.compile(r"\b(?:No\. ?|№ ?)(?=[0-9])")
_FEET = re.compile(r"(?<=[0-9])'(?!\w)(?<!'[0-9]')(?<!'[0-9]{2}')")
_QUOTES = re.compile(r"\"|(?<!\w)'+|'+(?!\w)")


def plain(text: str) -> str:
    r"""Return ``text`` in NFKC without invisible characters, markup, TeX commands and quotes.

    Dashes and marks become ASCII, a line's end a full stop, white space one space. Where the text has a ``\boxed``,
    only what is boxed counts: ``plain("so $\\boxed{\\text{B}}$.") == "B"``; two different boxes are joined by "or"."""
    text = _visible(text).translate(_CHARACTERS)
    if not _PLAIN.isdisjoint(text):
        text = _boxed(text)
        for pattern, replacement in _TEX:
            text = pattern.sub(replacement, text)
    text = _MARKDOWN.sub(" ", _TAGS.sub(" ", text))
    text = _LINE_END.sub(". ", text.strip())
    text = _QUOTES.sub(" ", _FEET.sub(" ft ", _INCHES.sub(" inch ", text)))
    text = " ".join(_NUMBER_SIGN.sub("#", text).split())
    return text[bullet.end() :] if (bullet := _BULLET.match(text)) else text


def _visible(text: str) -> str:
    """Return NFKC without format characters; what NFKC would fuse with its neighbours stays apart: 10² is 10^2, 5½ is
    5 1/2, and two circled digits are two."""
    text = _THIN_SPACE.sub(",", text)
    return unicodedata.normalize("NFKC", text if text.isascii() else "".join(map(_apart, text)))


def _apart(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf" or "\ufe00" <= character <= "\ufe0f" or character == _KEYCAP or category == "Co":
        return ""
    if category == "No":
        folded = unicodedata.normalize("NFKC", character)
        if unicodedata.decomposition(character).startswith("<super>"):
            return "^" + folded
        return folded if unicodedata.decomposition(character).startswith("<sub>") else f" {folded} "
    return character


def _boxed(text: str) -> str:
    contents: list[str] = []
    start = 0
    while (found := re.compile(r"\\(?:boxed|fbox|framebox)\s?\{").search(text, start)) is not None:
        depth, start = 1, found.end()
        while start < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[start], 0)
            start += 1
        content = text[found.end() : start - (depth == 0)].strip()
        if content not in contents:
            contents.append(content)
    return " or ".join(contents) if contents else text
