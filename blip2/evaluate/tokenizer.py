"""Captions cut into words as the published scores cut them: Penn Treebank style, lower case, without punctuation.

COCO's scores are computed on what Stanford's PTBTokenizer (CoreNLP 3.4.1, a Java program) makes of captions. This gives
the same words without Java; tests/evaluate/ compares the two on sentences of every kind. As there, all sentences are
one text with a line for each: what stands at the end of one (an abbreviation, say) may be read by how the next begins.

At each place every rule is tried, and the one that reaches farthest counts, among equals the first. What a rule asks
for behind its token counts for how far it reaches, and is read again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)  # what is dropped; brackets are lower case by then ("-lrb-") and stay, which is part of the published scores


def tokenize(sentences: Sequence[str]) -> list[str]:
    """Sentences -> their words, lower case and without punctuation, one space between two."""
    lines: list[list[str]] = [[]]
    for token in _tokens("\n".join(_LINE_END.sub(" ", sentence) for sentence in sentences)):
        if token == "\n":
            lines.append([])
        elif (word := token.lower()) not in PUNCTUATION:
            lines[-1].append(word)
    return [" ".join(line) for line in lines[: len(sentences)]]


_LINE_END = re.compile("\r\n|[\n\r\v\f\x85\u2028\u2029]")

# --- the pieces that rules are made of ---

_SPACE = "[ \t\xa0\u2000-\u200a\u3000]"
_SPACE_OR_LINE = "[ \t\xa0\u2000-\u200a\u3000\n]"
_APOSTROPHE = "(?:['\x92\u2019]|&apos;)"
_ANY_APOSTROPHE = "(?:['`\x92\u2019\x91\u2018\u201b]|&apos;)"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_COLON_LIKE = "[,;:\u3001]"
_AUXILIARY = f"{_APOSTROPHE}(?:[msd]|re|ve|ll)"  # 's 'm 'd 're 've 'll
_NEGATION = f"n{_ANY_APOSTROPHE}t"


def _ranges(wanted: Callable[[str], bool], end: int = 0x10000) -> str:
    """The characters below `end` that are wanted, as the inside of a character class."""
    parts, start = [], None
    for code in range(end + 1):
        if code < end and wanted(chr(code)):
            start = code if start is None else start
        elif start is not None:
            parts.append(f"\\u{start:04x}-\\u{code - 1:04x}")
            start = None
    return "".join(parts)


def _exactly(pattern: str) -> str:
    """Upper and lower case count in this piece."""
    return f"(?-i:{pattern})"


@dataclass(frozen=True)
class _Rule:
    """The token, in a group, and what must stand behind it.

    write: the token as it is written. back: so many characters at its end are read again, for the next token.
    """

    pattern: re.Pattern[str]
    write: Callable[[str], str] = str
    back: int = 0
    doubled: bool = False  # the full stop at its end is a token too: it ends the sentence


# --- how tokens are written ---


def _no_soft_hyphens(text: str) -> str:
    return text.replace("\xad", "") or "-"


def _hard_spaces(text: str) -> str:
    return text.replace(" ", "\xa0")


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


def _telephone(text: str) -> str:
    return _brackets(_hard_spaces(text))


def _ampersand(text: str) -> str:
    return re.sub("&amp;", "&", text, flags=re.IGNORECASE)


def _fractions(text: str) -> str:
    for one, written in zip("\xbc\xbd\xbe\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3")):
        text = text.replace(one, written)
    return text


def _currency(text: str) -> str:
    text = text.replace("\xa2", "cents").replace("\xa3", "#")
    return re.sub("[\x80\xa4\u20a0\u20ac]", "$", text)


def _quotes(text: str, opening: bool) -> str:
    single, double = ("`", "``") if opening else ("'", "''")
    text = re.sub("&apos;|'", single, text)
    text = re.sub('"|&quot;', double, text)
    text = re.sub("[\x91\u2018\u201b\u2039]", "`", text)
    text = re.sub("[\x92\u2019\u203a]", "'", text)
    text = re.sub("[\x93\u201c\xab]", "``", text)
    return re.sub("[\x94\u201d\xbb]", "''", text)


def _opening(text: str) -> str:
    return _quotes(text, True)


def _closing(text: str) -> str:
    return _quotes(text, False)


def _dashes(text: str) -> str:
    return "--" if 3 <= len(text) <= 4 else text


def _always(text: str) -> Callable[[str], str]:
    return lambda _: text


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
_SENTENCE_STARTERS = "|".join(f"{_exactly(word[0])}{word[1:]}" for word in _STARTERS.split())
_FILE = (
    r"[a-z0-9]+(?:\.[a-z0-9]+)*\.(?:bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|"
    r"pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|x|xml|zip)"
)


@lru_cache(maxsize=1)
def _rules() -> dict[str, tuple[_Rule, ...]]:
    """The rules by class of the first character, in their order."""
    plain = _ranges(lambda char: unicodedata.category(char).startswith("L"))
    marks = _ranges(lambda char: unicodedata.category(char) in ("Mn", "Mc"), 0xED0)
    letter = f"(?:[{plain}\xad{marks}]|&[aeiou](?:acute|grave|uml);)"
    digits = _ranges(lambda char: unicodedata.category(char) == "Nd")
    only_letter, digit, alnum = f"[{plain}]", f"[{digits}]", f"[{plain}{digits}]"
    word = rf"{letter}(?:{letter}|{digit})*(?:[.!?]{letter}(?:{letter}|{digit})*)*"
    number = rf"[-+]?(?:{digit}+(?:[.:,\xad\u066b\u066c]{digit}+)*|(?:[.:,\xad\u066b\u066c]{digit}+)+)"
    thing = (
        rf"(?:[dol]{_ANY_APOSTROPHE}{alnum})?{alnum}+(?:{_HYPHEN}(?:[dol]{_ANY_APOSTROPHE}{alnum})?{alnum}+)*"
    )
    hyphenated = rf"[a-z0-9][a-z0-9.,\xad]*(?:-(?:{_LONG_ACRONYM}\.|[a-z0-9\xad]+))+"
    tag = (
        r"<(?:[!?][a-z-][^>\n]*|[a-z][a-z0-9_:.-]*(?: +(?:[a-z][a-z0-9_:.-]* *= *(?:'[^'\n]*'|\"[^\"\n]*\")|"
        r"[a-z][a-z0-9_:.-]*))* */?|/[a-z][a-z0-9_:.-]*) *>"
    )
    sentence_end = f"{_SPACE_OR_LINE}(?:{_SPACE_OR_LINE}|(?-i:[A-Z])|{tag})"
    slashed = r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}"
    initials = r"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"
    double = '(?:"|&quot;)'
    rows: list[tuple[str, str, str, Callable[[str], str], int, bool]] = []

    def rule(
        starts: str,
        token: str,
        then: str = "",
        write: Callable[[str], str] = str,
        back: int = 0,
        stop: bool = False,
    ) -> None:
        rows.append((starts, token, then, write, back, stop))

    rule("l", r"c\+\+|[cf]#")
    rule("lo", "cannot|'twas", back=3)
    rule("lo", f"{_APOSTROPHE}tis|gonna|gotta|lemme|gimme|wanna", back=2)
    rule("o", tag, write=_hard_spaces)
    rule("o", "&(?:MD|mdash|ndash);|[\x96\x97\u2013\u2014\u2015]", write=_always("--"))
    rule("o", "&amp;", write=_ampersand)
    rule("o", "&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);")
    rule("lo", word, _AUXILIARY, _no_soft_hyphens)
    rule("lo", "[a-z\xad]*[a-mo-z]\xad*", _NEGATION, _no_soft_hyphens)
    rule("lo", word, write=_no_soft_hyphens)
    rule(
        "lo",
        f"{_APOSTROPHE}n{_APOSTROPHE}?|[ldj]{_APOSTROPHE}|dunkin{_APOSTROPHE}|somethin{_APOSTROPHE}|ol{_APOSTROPHE}|"
        f"{_APOSTROPHE}em|(?-i:[A-HJ-XZn]){_ANY_APOSTROPHE}{only_letter}{{2,}}|{_APOSTROPHE}[2-9]0s|{_APOSTROPHE}till?|"
        f"{only_letter}+[aeiouy]{_ANY_APOSTROPHE}(?-i:[aeiouA-Z]){only_letter}*|{_APOSTROPHE}cause|cont'd\\.?|"
        "nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l",
    )
    rule("l", f"y{_APOSTROPHE}", only_letter)
    rule("l", r"https?://[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-]")
    rule(
        "ldo",
        r"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-z]{2,4}|"
        r"(?-i:(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+)(?:com|net|org|edu))"
        r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?",
    )
    rule(
        "ldo",
        r"(?:&lt;|<)?[a-z0-9][^ \t\n\f\r\"<>|()\xa0]*@"
        r"(?:[^ \t\n\f\r\"<>|().\xa0]+\.)*[^ \t\n\f\r\"<>|().\xa0]+(?:&gt;|>)?",
    )
    rule("o", f"@[a-z_][a-z_0-9]*|#{letter}+")
    rule("o", _AUXILIARY, "[^a-z]", _closing)
    rule("l", _NEGATION, r"[^a-z]|\Z", _closing)
    rule("d", f"{digit}{{1,2}}[-/]{digit}{{1,2}}[-/]{digit}{{2,4}}")
    rule("do", number, write=_no_soft_hyphens)
    rule("o", "[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)")
    rule("d", rf"(?:{digit}{{1,4}}[- \xa0])?{digit}{{1,4}}(?:\\?/|\u2044){digit}{{1,4}}", write=_hard_spaces)
    rule("o", "[\xbc\xbd\xbe\u2153-\u215e]", write=_fractions)
    rule(
        "lo",
        f"-(?:rrb|lrb|rcb|lcb|rsb|lsb)-|c\\.d\\.s|pro-|anti-|s(?:&amp;|&)p-500|s(?:&amp;|&)ls|cap{_APOSTROPHE}n|c{_APOSTROPHE}est",
        write=_ampersand,
    )
    rule("ld", slashed)
    rule("lo", r"(?-i:[A-Z]*)\$|#")
    rule("o", "[\xa2\xa3\xa4\xa5\x80\u20a0\u20ac\u060b\u0e3f\u20a4\uffe0\uffe1\uffe5\uffe6]", write=_currency)
    starter = f"{_SPACE_OR_LINE}+(?:{_SENTENCE_STARTERS}){_SPACE_OR_LINE}"
    rule("l", rf"{_LONG_ACRONYM}\.", starter, stop=True)
    rule("l", r"[a-z]\.", starter, back=1)
    rule("l", _BEFORE_NUMBERS, f"{_SPACE_OR_LINE}?[0-9]")
    rule("l", r"(?:pt(?-i:[ey])|co)\.", f"{_SPACE}(?:ltd|lim)")
    rule("l", _BEFORE_LOWER_CASE, sentence_end, stop=True)
    rule("l", _BEFORE_LOWER_CASE, "(?s:..)")
    rule("l", _BEFORE_LOWER_CASE, stop=True)
    rule("l", rf"{_BEFORE_NAMES}\.")
    rule("l", _BEFORE_NAMES, _SPACE)
    rule("l", _ACRONYM, _SPACE_OR_LINE)
    rule("o", f"{_APOSTROPHE}[0-9][0-9]", _SPACE_OR_LINE)
    rule("ld", _FILE, "[ \t\xa0\n.?!,]")
    rule("lo", rf"{word}\.", _COLON_LIKE, _no_soft_hyphens)
    rule(
        "do",
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}|"
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        write=_telephone,
    )
    rule("o", double, "[a-z0-9$]", _opening)
    rule("o", double, write=_closing)
    rule("o", "<|&lt;", write=_always("<"))
    rule("o", ">|&gt;", write=_always(">"))
    rule("o", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^a-z0-9]", _brackets)
    rule(
        "lo",
        r"[\^x=~<>]\.\[\^x=~<>]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)",
        write=_brackets,
    )
    for bracket, name in zip("{}[]()", ("-LCB-", "-RCB-", "-LSB-", "-RSB-", "-LRB-", "-RRB-")):
        rule("o", re.escape(bracket), write=_always(name))
    rule("o", "-+", write=_dashes)
    rule("o", r"\.\.\.+|\.[ \xa0](?:\.[ \xa0])+\.|[\x85\u2026]", write=_always("..."))
    rule("o", r"@+|#+|_+|\*+|(?:\\\*){1,3}")
    rule("o", _COLON_LIKE)
    rule("o", "[?!]+")
    rule("o", "[.\xa1\xbf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002=/]")
    rule("ld", rf"{hyphenated}\.", _COLON_LIKE, _no_soft_hyphens)
    rule("ld", hyphenated, write=_no_soft_hyphens)
    rule("ld", rf"{thing}\.", _COLON_LIKE)
    rule("ld", thing)
    rule("l", rf"{initials}\.", _COLON_LIKE, _ampersand)
    rule("l", initials, write=_ampersand)
    rule("o", "'", r"[a-z][^ \t\n\r\xa0]", _opening)
    rule("o", _AUXILIARY, write=_closing)
    rule("o", f"''|[`\u2018-\u201f\x91-\x94\u2039\u203a\xab\xbb]{{1,2}}|{_APOSTROPHE}", write=_closing)
    rule("o", "<<|>>")
    rule(
        "o",
        r"[+%&~\^|\\\xa6\xa7\xa8\xa9\xac\xae\xaf\xb0-\xb3\xb4-\xba\xd7\xf7\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
        r"\u0600-\u0603\u0606-\u060a\u060c\u0614\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6\u07f7\u07f8\u0964\u0965\u0e4f"
        r"\u1fbd\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f"
        r"\u2190-\u21ff\u2200-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
        r"\uff5b-\uff65]",
    )
    flags = re.IGNORECASE | re.ASCII
    made = [
        (
            starts,
            _Rule(re.compile(f"({token})(?:{then})" if then else f"({token})", flags), write, back, stop),
        )
        for starts, token, then, write, back, stop in rows
    ]
    return {
        kind: tuple(one for starts, one in made if kind in starts or kind == "other")
        for kind in ("l", "d", "o", "other")
    }


# A plain word before a space, a mark perhaps between, is what it is, but for abbreviations and what is two words.
_PLAIN = re.compile("[A-Za-z]{2,}(?=[.,;:!?]?[ \n])")
_TWO_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_ABBREVIATION = re.compile(
    rf"{_BEFORE_LOWER_CASE}|{_BEFORE_NAMES}\.|{_BEFORE_NUMBERS}", re.IGNORECASE | re.ASCII
)
_SKIPPED = re.compile(f"(?:{_SPACE}|&nbsp;|[\0\u200b\u200e\u200f\ufeff\x7f])+", re.IGNORECASE)


def _tokens(text: str) -> Iterator[str]:
    """The tokens of a text, and "\\n" for each end of a line."""
    rules, at, end = _rules(), 0, len(text)
    while at < end:
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
        best, match = None, None
        for rule in rules[kind]:
            found = rule.pattern.match(text, at)
            if found and (match is None or found.end() > match.end()):
                best, match = rule, found
        if best is None or match is None:  # a character that no rule knows is left out
            at += 1
            continue
        token = match[1]
        at += len(token) - best.back - best.doubled
        yield best.write(token[: len(token) - best.back])
