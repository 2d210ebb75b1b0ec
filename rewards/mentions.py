"""What a text asserts of its *mentions*: option letters, options' words and numbers, each masked by a character.

``asserted`` leaves out what is negated ("not B"), excluded ("rather than B"), conditional ("if it were B") or asked."""

from __future__ import annotations

import re
from collections.abc import Iterator

WORDS, LETTERS, NUMBER = 0xE000, 0xE200, "\ue400"
"""First private character of options' words, of options' letters; a number that is none of the options."""
MENTION = "[\ue000-\ue400]"
_CJK = r"\u3400-\u9fff"


def is_letter(mark: str) -> bool:
    return LETTERS <= ord(mark) < ord(NUMBER)


def marks(text: str) -> list[str]:
    return re.findall(MENTION, text)


# --- letters ------------------------------------------------------------------------------------------------------

# Words after which a single letter is an option's; "vitamin C" and "Plan B" are none.
_BEFORE = """like for option options choice letter answer is be it's that's was would must should could and or
    nor not neither either than but think believe say says pick choose chose select selected go with guess so
    thus therefore hence probably maybe perhaps possibly likely most definitely certainly clearly surely indeed
    obviously simply really truly undoubtedly apparently both between then except also only just answered of no
    excluding because since as unlike alternatively namely hmm wait actually sorry"""
_BEFORE_A_LETTER = frozenset(_BEFORE.split())
# A and I are words, too: before another word they are letters only where the sentence goes on about the letter.
_GOES = """are were both or and fits matches appears makes is because as since isn't was seems looks would must
    should nor but so not can cannot doesn't has for rather"""
_GOES_ON = frozenset(_GOES.split())
_FOLLOWS = """maybe perhaps presumably it i the a an definitely obviously clearly probably most in to on by due given
    while with if unless only shows that which this there where when from though although being however would"""
_MAY_FOLLOW = _GOES_ON | frozenset(_FOLLOWS.split())
_NAMES_A_LETTER = frozenset(("option", "choice", "answer", "letter"))
_A_LETTER = re.compile(rf"(?<!\w-)(?<![^\W{_CJK}]|['.+#@^])([A-Za-z])(?![^\W{_CJK}]|['+#@^]|-\w|\.[A-Za-z0-9])")
_WORD_BEFORE = re.compile(r"([^\W\d_']+(?:'\w+)?)[\s(\[\"]*$")
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|No)\. $")
_WORD_AFTER = re.compile(rf" ([^\W\d_{_CJK}]+(?:'t)?|[\ue000-\ue1ff])")
_CHINESE_BEFORE = re.compile(rf"[{_CJK}]\s?$")
_CHINESE_LEAD = re.compile(rf"[{_CJK}]*(?:选择?|是|为|或者?|和|与|跟|及|还有|还是|不选|除了|选项|认为)\s?$|[,.:;]\s?$")
_BRACKETS = re.compile(rf"[(\[]\s?({MENTION})\s?[)\]]")
_LABEL = re.compile(r"(?<!\w)([A-Z])[.):] ?(?=[\w\ue000-\ue400])")


def mask_letters(text: str, letters: str) -> str:
    """Replace every letter that stands for one of the options ``letters``, brackets around it included."""
    return _BRACKETS.sub(r" \1 ", _A_LETTER.sub(lambda match: _letter(match, letters), text))


def labels(text: str, letters: str) -> list[str]:
    """Return the letters that stand before something as its label: "A. this B. that"."""
    return [match[1] for match in _LABEL.finditer(text) if match[1] in letters]


def _letter(match: re.Match[str], letters: str) -> str:
    """Return the private character of a letter that stands for an option, else the letter itself."""
    text, letter = match.string, match[1]
    if letter.upper() not in letters:
        return letter
    before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 20]
    mark = chr(LETTERS + letters.index(letter.upper()))
    if re.search(r"[(\[] ?$", before) and re.match(r" ?[)\]]", after):
        return mark
    if _TITLE.search(before):
        return letter
    if _CHINESE_BEFORE.search(before):
        return mark if _CHINESE_LEAD.search(before) else letter
    word = _WORD_BEFORE.search(before)
    name = word[1].casefold() if word else ""
    if word and not before.endswith(("(", "[")) and name not in _BEFORE_A_LETTER and not _is_capital(word[1]):
        return letter
    if _is_part_of_words(letter, after):
        return letter
    if letter.islower() and name not in _NAMES_A_LETTER and not _is_small_letter(letter, bool(word), before, after):
        return letter
    return mark


def _is_capital(word: str) -> bool:
    return len(word) == 1 and word.isupper()


def _is_part_of_words(letter: str, after: str) -> bool:
    """Tell whether the word behind a letter makes it a part of a name or an article: "C major", "A car"."""
    following = _WORD_AFTER.match(after)
    if following is None or (letter.upper() not in "AI" and following[1] >= "\ue000"):
        return False
    return following[1].casefold() not in (_GOES_ON if letter.upper() in "AI" else _MAY_FOLLOW)


def _is_small_letter(letter: str, has_word: bool, before: str, after: str) -> bool:
    ends = re.match(r"\W*$|[):.](?:\s|$)|\s(?:or|and|because|since)\b", after)
    if not ends or not (has_word or not before.strip()):
        return False
    return letter != "a" or re.match(r"\W*$|[):]", after) is not None


# --- clauses ------------------------------------------------------------------------------------------------------

NOT = re.compile(
    r"\b(?:not|never|no|none|cannot|cant|\w+n't|wrong|incorrect|false|doubts?|doubtful|unlikely|improbable|impossible|"
    r"(?:least|less) likely|is out|invalid|inaccurate|hardly|nobody|nothing|excluded?|eliminated?|ruled? out|opposite|"
    r"without|lacks?|absent|too (?:many|few|much|little)|refuse|mistaken|non)\b|不|没|非|错|别|无",
    re.IGNORECASE,
)
NEITHER = re.compile(r"\b(?:neither|nor|if|unless|whether|suppose|either)\b|除了|如果|还是", re.IGNORECASE)
DECLINES = re.compile(
    r"\b(?:do not|don't|can ?not|can't|could not|couldn't|unable to|impossible to) "
    r"(?:know|tell|say|determine|decide|answer|be determined)\b|\b(?:no idea|not enough|no way)\b|无法|不知道",
    re.IGNORECASE,
)
_DECLINES_TO_ANSWER = re.compile(
    r"\b(?:not|n't|cannot) (?:know|tell|determine|decide|answer)\b|\bno idea\b", re.IGNORECASE
)
RETRACTS = re.compile(
    r"\b(?:wait|actually|sorry|correction|hmm|scratch that|on second thought|i mean|alternatively|maybe|perhaps|"
    r"possibly|or)\b|\bno[,.:]|或",
    re.IGNORECASE,
)
_UNSURE = re.compile(  # no negations: who is not sure still commits
    r"\b(?:not (?:entirely |completely |quite |absolutely |100 ?% |very )?(?:sure|certain)|no doubt|"
    r"without (?:a )?doubt|not only)\b",
    re.IGNORECASE,
)
_EXCEPT = re.compile(
    r"\b(?:(?:any|every|no)(?:thing|one|body)?|all|none) (?:of them )?but\b|"
    r"\b(?:than|instead of|except(?: for)?|excluding|apart from|aside from|besides|as opposed to|unlike)\b",
    re.IGNORECASE,
)
_AND = re.compile(r"\b(?:as well as|along with|together with)\b", re.IGNORECASE)
_IF = re.compile(r"\b(?:if|unless|suppose)\b|如果", re.IGNORECASE)
_CLAUSE = re.compile(
    r"([,;!?()\n]|:(?= )|\.(?![0-9])|-(?= )|\b(?:but|because|since|as|so|while|whereas|although|though|for|hence|"
    r"therefore|which|and not)\b|但|而是|因为|所以|因此)",
    re.IGNORECASE,
)
_NOT_AT_END = re.compile(rf"(?:{NOT.pattern})\W*$", re.IGNORECASE)
_QUESTION = re.compile(
    r"\s*(?:and |or )?(?:is|are|was|does|do|did|could|should|would|can|might|may|will)\b", re.IGNORECASE
)
_LIST = re.compile(rf"(?:\s|{MENTION}|\b(?:or|and|nor|an?|the)\b|[/&|])*", re.IGNORECASE)


def asserted(masked: str) -> set[str]:
    """Return the private characters that a text asserts."""
    found, waiting, denied, conditional, negated = set[str](), set[str](), False, False, False
    masked = _AND.sub(" and ", _UNSURE.sub(" ", masked))
    for before, clause, after, last in _clauses(_EXCEPT.sub(" instead of ", masked)):
        conditional = (conditional and before not in (".", ";", "!", "?")) or bool(_IF.search(clause))
        if not (mentions := marks(clause)):
            denied, negated = False, after == "(" and bool(_NOT_AT_END.search(clause))
            continue
        in_list = _LIST.fullmatch(clause) is not None
        asked = after == "?" and (bool(_QUESTION.match(clause)) or not last)
        inherits = denied and before == "," and in_list  # "not A, B or C"
        silent = asked or conditional or inherits or negated or before == "and not"
        kept = set[str]() if silent else set(_kept(clause))
        if kept and after == "," and in_list:
            waiting |= kept
            continue
        # "A, C and D are wrong" denies the A, too
        found |= kept | (set() if not kept and len(mentions) > 1 and before == "," else waiting)
        waiting, denied, negated = set(), not kept, False
    return found | waiting


def _clauses(text: str) -> Iterator[tuple[str, str, str, bool]]:
    """Yield (what separates it from the one before, clause, what ends it, whether nothing follows)."""
    pieces = ["", *_CLAUSE.split(text), ""]
    for place in range(1, len(pieces), 2):
        last = not "".join(pieces[place + 2 :]).strip()
        yield pieces[place - 1].strip().casefold(), pieces[place], pieces[place + 1], last


def _kept(clause: str) -> Iterator[str]:
    """Yield the mentions of one clause that are not denied."""
    if NEITHER.search(clause) and not re.match(r"\s*either\b", clause, re.IGNORECASE):
        return
    mentions = list(re.finditer(MENTION, clause))
    negations = [match.start() for match in NOT.finditer(clause)]
    excluded = clause.find("instead of")
    for mention in mentions:
        if 0 <= excluded < mention.start() or any(at < mention.start() for at in negations):
            continue
        if negations and not any(other.start() > negations[0] for other in mentions):
            continue  # "B is not correct", but not "B and not C"
        yield mention[0]


# --- commitments --------------------------------------------------------------------------------------------------

_FIRST = re.compile(
    rf"^[^\w\ue000-\ue400]*({MENTION}(?:[\s()\[\].,:;-]*[\ue000-\ue1ff]|[\s(]*{MENTION})?)[^\w\ue000-\ue400]*?"
    rf"(?:[).,;:!-]+(?: |(?=[{_CJK}]))|\s(?=(?:because|since|as|for)\b)|因为)(?=(.*))",
    re.IGNORECASE | re.DOTALL,
)
_REASONS = re.compile(r"\s*(?:because|since|as|for)\b", re.IGNORECASE)
_BESIDE = re.compile(rf"(?=({MENTION})[\s()\[\].,:;=→\"-]*(?:\b(?:an?|the|is|option)\b )?({MENTION}))", re.IGNORECASE)
_LABELLED_BEHIND = re.compile(  # "the red car (B)"
    r"([\ue000-\ue1ff])(?: (?!(?:so|thus|hence|therefore|then|but|and|is)\b)[^\W\d_]+){1,2} +([\ue200-\ue3ff])\W*$"
)
_OR = re.compile(
    rf"{MENTION}\W*(?:\b(?:or|and(?: also| maybe)?|maybe|perhaps|possibly|alternatively|also)\b|[/&|]|"
    rf"或|和|与|跟|及|还有)\W*"
    rf"(?:maybe |perhaps |also |possibly |an? |the )?{MENTION}",
    re.IGNORECASE,
)


CORRECTS = re.compile(rf"{MENTION}\s?(?:[,;:.-] ?)+no,? {MENTION}", re.IGNORECASE)
"""A reply that takes back what it has just said: "B, no C"."""


def first_commitment(masked: str) -> tuple[str, str]:
    """Return the mention that a text begins with and the first sentence of its reasons: "B. The car is not red."

    The rest must be words, take nothing back, and commit to no other letter; else the whole text comes back, and ""."""
    first = _FIRST.match(_AND.sub(" and ", masked))
    if first is None or not _agree(first[1]):
        return masked, ""
    rest = first[2]
    sentence = re.split(r"[.;!?]", rest)[0]
    if RETRACTS.search(rest) or _DECLINES_TO_ANSWER.search(rest) or _LIST.fullmatch(sentence.strip(" ,:()-")):
        return masked, ""
    if not re.search(r"[^\W\d_\ue000-\ue400]{2}", sentence) or re.match(
        r"\s*(?:is|isn't|are|not)\b", rest, re.IGNORECASE
    ):
        return masked, ""
    others = {one for one in asserted(rest) if is_letter(one)} - set(first[1])
    if (others and not _REASONS.match(rest)) or "?" in masked[first.end(1) : first.end(1) + 2]:
        return masked, ""
    return first[1], sentence


def conflict(masked: str) -> bool:
    """Tell whether a letter stands right beside another option's words: "B) red", "red (B)", "B or red"."""
    for match in (*_BESIDE.finditer(masked), *_LABELLED_BEHIND.finditer(masked)):
        one, other = sorted(match.groups())
        if not is_letter(one) and is_letter(other) and ord(other) - LETTERS != ord(one) - WORDS:
            return True
        if is_letter(one) and match[2] == NUMBER:
            return True
    if NOT.search(masked) or NEITHER.search(masked):
        return False
    return any(not _agree(match[0]) for match in _OR.finditer(masked))


def _agree(text: str) -> bool:
    return len({(ord(one) - WORDS) % (LETTERS - WORDS) for one in marks(text)}) == 1
