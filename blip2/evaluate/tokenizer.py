"""Captions split into words as the published scores split them: Penn Treebank style, lower case, without punctuation.

COCO's scores are computed on the output of Stanford's PTBTokenizer (CoreNLP 3.4.1, a Java program). This gives the same
words without Java; tests/evaluate/ compares the two on sentences of every kind. As there, all sentences are one text
with a line for each, so how the end of one is read (an abbreviation, say) may depend on how the next begins.

At each position every rule is tried, and the longest match counts, among equals the first. What a rule requires behind
its token counts towards the length, and is read again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)  # what is dropped; brackets are lower case by then ("-lrb-") and stay, which is part of the published scores


def tokenize(sentences: Sequence[str]) -> list[str]:
    """Sentences -> their words in lower case, without punctuation, separated by single spaces."""
    lines: list[list[str]] = [[]]
    for token in _tokens("\n".join(_LINE_END.sub(" ", sentence) for sentence in sentences)):
        if token == "\n":
            lines.append([])
        elif (word := token.lower()) not in PUNCTUATION:
            lines[-1].append(word)
    return [" ".join(line) for line in lines[: len(sentences)]]


_LINE_END = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")

# --- parts of the rules' patterns ---

_FLAGS = re.IGNORECASE | re.ASCII
_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_SPACE_OR_LINE = "[ \t\xa0\u2000-\u200a\u3000\n]"
_APOSTROPHE = "(?:['\x92\u2019]|&apos;)"
_ANY_APOSTROPHE = "(?:['`\x92\u2019\x91\u2018\u201b]|&apos;)"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_COLON_LIKE = "[,;:\u3001]"
_AUXILIARY = f"{_APOSTROPHE}(?:[msd]|re|ve|ll)"  # 's 'm 'd 're 've 'll
_NEGATION = f"n{_ANY_APOSTROPHE}t"


def _ranges(categories: tuple[str, ...], end: int = 0x10000) -> str:
    """The characters below `end` in these categories of Unicode, as the inside of a character class."""
    codes = [code for code in range(end) if unicodedata.category(chr(code)).startswith(categories)]
    runs = groupby(enumerate(codes), lambda pair: pair[1] - pair[0])  # consecutive codes keep their distance
    bounds = ([code for _, code in run] for _, run in runs)
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in bounds)


Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Rule:
    """A token, by what it starts with, its pattern and the pattern of what must follow it.

    write: patterns in the token and what replaces each, in order.
    back: how many characters at its end are read again, for the next token.
    doubled: the full stop at its end is a token too, as it ends the sentence.
    """

    starts: str  # with "l" a letter, "d" a digit, "o" another ASCII character
    token: str
    then: str = ""
    write: Edits = ()
    back: int = 0
    doubled: bool = False


# --- how tokens are written ---


def _always(text: str) -> Edits:
    return (("(?s).+", text),)


_NO_SOFT_HYPHENS = (("\xad", ""), (r"\A\Z", "-"))
_HARD_SPACES = ((" ", "\xa0"),)
_BRACKETS = ((r"\(", "-LRB-"), (r"\)", "-RRB-"))
_AMPERSAND = (("(?i)&amp;", "&"),)
_FRACTIONS = tuple(zip("\xbc\xbd\xbe\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3"), strict=True))
_CURRENCY = (("\xa2", "cents"), ("\xa3", "#"), ("[\x80\xa4\u20a0\u20ac]", "$"))
_ONE_SIDED = (
    ("[\x91\u2018\u201b\u2039]", "`"), ("[\x92\u2019\u203a]", "'"),
    ("[\x93\u201c\xab]", "``"), ("[\x94\u201d\xbb]", "''"),
)  # fmt: skip
_OPENING = (("&apos;|'", "`"), ('"|&quot;', "``"), *_ONE_SIDED)
_CLOSING = (("&apos;|'", "'"), ('"|&quot;', "''"), *_ONE_SIDED)
_DASHES = ((r"\A-{3,4}\Z", "--"),)

# --- abbreviations, by what usually follows them ---

_MONTHS_AND_DAYS = "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri"
_STATES = (
    "ala|ariz|(?-i:A)z|(?-i:A)rk|calif|colo|conn|ct|dak|(?-i:D)el|fla|ga|(?-i:I)ll|ind|kans?|ky|(?-i:L)a|"
    "(?-i:M)ass|md|mich|minn|(?-i:M)iss|mo|mont|neb|nev|okla|(?-i:O)re|(?-i:P)a|penn|tenn|(?-i:T)ex|va|vt|"
    "(?-i:W)ash|wisc?|wyo"
)
_FIRMS = "inc|cos?|corp|pp?t(?-i:[ye])s?|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys"
_BEFORE_LOWER_CASE = (
    rf"(?:{_MONTHS_AND_DAYS}|{_STATES}|{_FIRMS}|tel|est|ext|sq|jr|bros|(?:ed|ph)\.d|esq|etc|al|seq|bldg)\."
)
_ACRONYM = r"(?:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.s\.s\.r|u\.k)|[a-z](?:\.[a-z])*)"
_LONG_ACRONYM = r"(?:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.s\.s\.r|u\.k)|[a-z](?:\.[a-z])+)"
_TITLES = (
    "mr|mrs|ms|(?-i:M)iss|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|"
    "pres|lieut|rt|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|sr"
)
_BEFORE_NAMES = (
    f"(?:{_TITLES}|vs|(?-i:v)|alex|wm|jos|cie|a\\.k\\.a|cf|treas|"
    f"ph|invt|elec|natl|m(?-i:[ft])g|dept|blvd|rd|{_ACRONYM})"
)
_BEFORE_NUMBERS = r"(?:ca|figs?|prop|nos?|arts?|bldg|pp|op)\."
# Their first letter is upper case, the others may be.
_STARTERS = r"""
About According Additionally After An? As At But Earlier He Her Here However If In It Last Many More Mr\. Ms\. Now Once
One Other Our She Since So Some Such That The Then There These They This We When While What Yet You
"""
_SENTENCE_STARTERS = "|".join(f"(?-i:{word[0]}){word[1:]}" for word in _STARTERS.split())
_FILE = (
    r"[a-z0-9]+(?:\.[a-z0-9]+)*\.(?:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|"
    r"pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)"
)
_LETTERS = _ranges(("L",))
_MARKS = _ranges(("Mn", "Mc"), 0xED0)
_LETTER = f"(?:[{_LETTERS}\xad{_MARKS}]|&[aeiou](?:acute|grave|uml);)"
_DIGITS = _ranges(("Nd",))
_ONLY_LETTER, _DIGIT, _ALNUM = f"[{_LETTERS}]", f"[{_DIGITS}]", f"[{_LETTERS}{_DIGITS}]"
_WORD = rf"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_NUMBER = rf"[-+]?(?:{_DIGIT}+(?:[.:,\xad\u066b\u066c]{_DIGIT}+)*|(?:[.:,\xad\u066b\u066c]{_DIGIT}+)+)"
_THING = (
    rf"(?:[dol]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+(?:{_HYPHEN}(?:[dol]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+)*"
)
_HYPHENATED = rf"[a-z0-9][a-z0-9.,\xad]*(?:-(?:{_LONG_ACRONYM}\.|[a-z0-9\xad]+))+"
_TAG = (
    r"<(?:[!?][a-z-][^>\n]*|[a-z][a-z0-9_:.-]*(?: +(?:[a-z][a-z0-9_:.-]* *= *(?:'[^'\n]*'|\"[^\"\n]*\")|"
    r"[a-z][a-z0-9_:.-]*))* */?|/[a-z][a-z0-9_:.-]*) *>"
)
_SENTENCE_END = f"{_SPACE_OR_LINE}(?:{_SPACE_OR_LINE}|(?-i:[A-Z])|{_TAG})"
_SLASHED = r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"
_INITIALS = r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"
_DOUBLE_QUOTE = '(?:"|&quot;)'
_STARTER = f"{_SPACE_OR_LINE}+(?:{_SENTENCE_STARTERS}){_SPACE_OR_LINE}"

# --- the rules, in their order ---

_RULES = (
    # Words, contractions, markup.
    _Rule("l", r"c\+\+|[cf]#"),
    _Rule("lo", "cannot|'twas", back=3),
    _Rule("lo", f"{_APOSTROPHE}tis|gonna|gotta|lemme|gimme|wanna", back=2),
    _Rule("o", _TAG, write=_HARD_SPACES),
    _Rule("o", "&(?:MD|mdash|ndash);|[\x96\x97\u2013\u2014\u2015]", write=_always("--")),
    _Rule("o", "&amp;", write=_AMPERSAND),
    _Rule("o", "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    _Rule("lo", _WORD, _AUXILIARY, _NO_SOFT_HYPHENS),
    _Rule("lo", "[a-z\xad]*[a-mo-z]\xad*", _NEGATION, _NO_SOFT_HYPHENS),
    _Rule("lo", _WORD, write=_NO_SOFT_HYPHENS),
    _Rule(
        "lo",
        f"{_APOSTROPHE}n{_APOSTROPHE}?|[ldj]{_APOSTROPHE}|dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE}|"
        f"{_APOSTROPHE}em|(?-i:[A-HJ-XZn]){_ANY_APOSTROPHE}{_ONLY_LETTER}{{2,}}|{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}till?|"
        f"{_ONLY_LETTER}+[aeiouy]{_ANY_APOSTROPHE}(?-i:[aeiouA-Z]){_ONLY_LETTER}*|{_APOSTROPHE}cause|cont'd\\.?|"
        "nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l",
    ),
    _Rule("l", f"y{_APOSTROPHE}", _ONLY_LETTER),
    # Addresses on the internet.
    _Rule("l", r"https?://[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-]"),
    _Rule(
        "ldo",
        r"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-z]{2,4}|"
        r"(?-i:(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+)(?:com|net|org|edu))"
        r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?",
    ),
    _Rule(
        "ldo",
        r"(?:&lt;|<)?[a-z0-9][^ \t\n\f\r\"<>|()\xa0]*@"
        r"(?:[^ \t\n\f\r\"<>|().\xa0]+\.)*[^ \t\n\f\r\"<>|().\xa0]+(?:&gt;|>)?",
    ),
    _Rule("o", f"@[a-z_][a-z_0-9]*|#{_LETTER}+"),
    # Contractions after their word, numbers, currencies.
    _Rule("o", _AUXILIARY, "[^a-z]", _CLOSING),
    _Rule("l", _NEGATION, r"[^a-z]|\Z", _CLOSING),
    _Rule("d", f"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    _Rule("do", _NUMBER, write=_NO_SOFT_HYPHENS),
    _Rule("o", "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _Rule(
        "d", rf"(?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}(?:\\?/|\u2044){_DIGIT}{{1,4}}", write=_HARD_SPACES
    ),
    _Rule("o", "[\xbc\xbd\xbe\u2153-\u215e]", write=_FRACTIONS),
    _Rule(
        "lo",
        f"-(?:rrb|lrb|rcb|lcb|rsb|lsb)-|c\\.d\\.s|pro-|anti-|s(?:&amp;|&)p-500|s(?:&amp;|&)ls|cap{_APOSTROPHE}n|c{_APOSTROPHE}est",
        write=_AMPERSAND,
    ),
    _Rule("ld", _SLASHED),
    _Rule("lo", r"(?-i:[A-Z]*)\$|#"),
    _Rule(
        "o", "[\xa2\xa3\xa4\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", write=_CURRENCY
    ),
    # Abbreviations, acronyms, file names.
    _Rule("l", rf"{_LONG_ACRONYM}\.", _STARTER, doubled=True),
    _Rule("l", r"[a-z]\.", _STARTER, back=1),
    _Rule("l", _BEFORE_NUMBERS, f"{_SPACE_OR_LINE}?[0-9]"),
    _Rule("l", r"(?:pt(?-i:[ey])|co)\.", f"{_SPACE}(?:ltd|lim)"),
    _Rule("l", _BEFORE_LOWER_CASE, _SENTENCE_END, doubled=True),
    _Rule("l", _BEFORE_LOWER_CASE, "(?s:..)"),
    _Rule("l", _BEFORE_LOWER_CASE, doubled=True),
    _Rule("l", rf"{_BEFORE_NAMES}\."),
    _Rule("l", _BEFORE_NAMES, _SPACE),
    _Rule("l", _ACRONYM, _SPACE_OR_LINE),
    _Rule("o", f"{_APOSTROPHE}[0-9][0-9]", _SPACE_OR_LINE),
    _Rule("ld", _FILE, "[ \t\xa0\n.?!,]"),
    _Rule("lo", rf"{_WORD}\.", _COLON_LIKE, _NO_SOFT_HYPHENS),
    # Telephone numbers, quotes, smileys, brackets, punctuation.
    _Rule(
        "do",
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}|"
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        write=_HARD_SPACES + _BRACKETS,
    ),
    _Rule("o", _DOUBLE_QUOTE, "[a-z0-9$]", _OPENING),
    _Rule("o", _DOUBLE_QUOTE, write=_CLOSING),
    _Rule("o", "<|&lt;", write=_always("<")),
    _Rule("o", ">|&gt;", write=_always(">")),
    _Rule("o", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^a-z0-9]", _BRACKETS),
    _Rule(
        "lo",
        r"[\^x=~<>]\.\[\^x=~<>]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        write=_BRACKETS,
    ),
    *(
        _Rule("o", re.escape(bracket), write=_always(name))
        for bracket, name in zip("{}[]()", ("-LCB-", "-RCB-", "-LSB-", "-RSB-", "-LRB-", "-RRB-"))
    ),
    _Rule("o", "-+", write=_DASHES),
    _Rule("o", r"\.\.\.+|\.[ \xa0](?:\.[ \xa0])+\.|[\x85\u2026]", write=_always("...")),
    _Rule("o", r"@+|#+|_+|\*+|(?:\\\*){1,3}"),
    _Rule("o", _COLON_LIKE),
    _Rule("o", "[?!]+"),
    _Rule("o", "[.\xa1\xbf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002=/]"),
    # Compounds, closing quotes, symbols.
    _Rule("ld", rf"{_HYPHENATED}\.", _COLON_LIKE, _NO_SOFT_HYPHENS),
    _Rule("ld", _HYPHENATED, write=_NO_SOFT_HYPHENS),
    _Rule("ld", rf"{_THING}\.", _COLON_LIKE),
    _Rule("ld", _THING),
    _Rule("l", rf"{_INITIALS}\.", _COLON_LIKE, _AMPERSAND),
    _Rule("l", _INITIALS, write=_AMPERSAND),
    _Rule("o", "'", r"[a-z][^ \t\n\r\xa0]", _OPENING),
    _Rule("o", _AUXILIARY, write=_CLOSING),
    _Rule("o", f"''|[`\u2018-\u201f\x91-\x94\u2039\u203a\xab\xbb]{{1,2}}|{_APOSTROPHE}", write=_CLOSING),
    _Rule("o", "<<|>>"),
    _Rule(
        "o",
        r"[+%&~\^|\\\xa6\xa7\xa8\xa9\xac\xae\xaf\xb0-\xb3\xb4-\xba\xd7\xf7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
        r"\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6\u07f7\u07f8\u0964\u0965\u0e4f"
        r"\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f"
        r"\u2190-\u21ff\u2200-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
        r"\uff5b-\uff65]",
    ),
)


@cache
def _rules(kind: str) -> list[tuple[re.Pattern[str], _Rule]]:
    """The rules for tokens whose first character is of a class, each with its compiled pattern."""
    return [
        (re.compile(f"({rule.token})(?:{rule.then})", _FLAGS), rule)
        for rule in _RULES
        if kind in (*rule.starts, "other")
    ]


# A shortcut: plain words before a space, except abbreviations and contractions of two words, need no rule.
_PLAIN = re.compile("[A-Za-z]{2,}(?=[.,;:!?]?[ \n])")
_TWO_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_ABBREVIATION = re.compile(rf"{_BEFORE_LOWER_CASE}|{_BEFORE_NAMES}\.|{_BEFORE_NUMBERS}", _FLAGS)
_SKIPPED = re.compile(f"(?:{_SPACE}|&nbsp;|[\0\u200b\u200e\u200f\ufeff\x7f])+", re.IGNORECASE)


def _tokens(text: str) -> Iterator[str]:
    """The tokens of a text, and "\\n" for each end of a line."""
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\n":
            yield char
            at += 1
            continue
        if plain := _PLAIN.match(text, at):
            short = text[plain.end()] == "." and _ABBREVIATION.match(text, at)
            if not short and plain[0].lower() not in _TWO_WORDS:
                yield plain[0]
                at = plain.end()
                continue
        elif skipped := _SKIPPED.match(text, at):
            at = skipped.end()
            continue
        kind = "other" if char > "\x7f" else "d" if char.isdigit() else "l" if char.isalpha() else "o"
        matches = [(match, rule) for pattern, rule in _rules(kind) if (match := pattern.match(text, at))]
        if not matches:  # a character that no rule knows is left out
            at += 1
            continue
        match, rule = max(matches, key=lambda pair: pair[0].end())  # among equals the first
        token = match[1]
        at += len(token) - rule.back - rule.doubled
        token = token[: len(token) - rule.back]
        for pattern, replacement in rule.write:
            token = re.sub(pattern, replacement, token)
        yield token
