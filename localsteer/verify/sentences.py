"""Sentences as IFEval counts them: the decisions of the English Punkt model, without its data.

IFEval counts sentences with NLTK's Punkt tokenizer and the English model that NLTK downloads. Nothing may
be downloaded here, so this file restates Punkt's decision procedure (Kiss and Strunk, "Unsupervised
Multilingual Sentence Boundary Detection", Computational Linguistics 32:4, 2006, section 4) over small
hand-made tables. What the model learned from newspaper text about some 15,000 words is reduced to a few
hundred common ones; how often that changes a count is measured in docs/evaluation.md. The model's quirks
are kept, because people compare numbers:

- "e.g.", "i.e.", "etc.", "Mar.", "Apr.", "Mon.", "Capt.", "No." and "approx." are NOT abbreviations: a
  sentence ends there whatever follows, a lowercase word included.
- "ok.", "ill.", "wash.", "pa." and "fri." ARE abbreviations: no sentence ends there before a name.
- the number of a list item counts as a sentence: "1. Mix it." holds two, but "1. mix it." holds one.
- closing quotes and brackets belong to the sentence before them.
- a line break never ends a sentence: a list without full stops is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

# Characters that end a token wherever they stand: Punkt's "non-word" characters. A comma ends one only before
# a blank or another of these, so that 1,000 stays whole.
_BREAKERS = r"""[)";}\]*:@'({\[?!]"""
_RUN = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"  # a dash, an ellipsis, a spaced ellipsis
_TOKEN_END = rf"(?=\s|$|{_BREAKERS}|{_RUN}|,(?=$|\s|{_BREAKERS}|{_RUN}))"
_TOKEN = re.compile(rf"""{_RUN}|(?=[^("`{{\[:;&#*@)}}\]\-,])\S+?{_TOKEN_END}|\S""")

# A mark can end a sentence when a breaker follows it, or a blank and more text.
_MARK = re.compile(rf"[.?!](?=(?P<follower>{_BREAKERS}|\s+(?P<next>\S+)))")
_BLANK = re.compile(r"[ \t\n\r\x0b\x0c]")  # no-break spaces do not part words here
_CLOSERS = re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")
_ELLIPSIS = re.compile(r"\.{2,}$")
_SHORT = 32  # characters of a word and its follower
_INNER_PUNCTUATION = frozenset(";:,.!?")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ABBREVIATIONS = (
    _words("mr mrs ms messrs dr prof gen col lt maj adm sen rep reps jr sr")  # titles
    | _words("inc ltd co cos corp bros cie st ave ft mg yr vs ok ct sw")
    | _words("jan feb aug sep sept oct nov dec tues wed fri")
    | _words("ala ariz calif colo conn fla ga ill kan ky mich minn nev okla ore pa tenn va vt wash wis w.va")
    | _words("u.s u.k u.n u.s.a u.s.s.r d.c n.y n.j n.c n.d n.h n.m n.v l.a s.c r.i a.m p.m a.d ph.d m.b.a")
    | _words("s.a s.s c.v i.m.s p.a.m j.b j.c j.j j.k j.p j.r r.j g.k m.j")
    | _words("c d e f g h k l m n p r s t v w")  # single letters; a, b, i, j, o, q, u, x, y, z are not
)

# After an abbreviation or an ellipsis a capitalised word starts a sentence when the model saw it in lower
# case and never capitalised within a sentence, or often at a sentence's start.
_STARTERS = _words(
    "the but so if in it were he they i this these there here when which while although though however "
    "therefore since even yet still tomorrow yesterday yes please thank thanks does your her some many most "
    "finally moreover furthermore overall instead meanwhile nevertheless nonetheless despite between both "
    "either neither nor regards remember try mix put serve think consider note ask call according including "
    "such very among under indeed similarly thus sales anyway suddenly someone nothing anything imagine "
    "wait listen always sometimes soon honestly seriously frankly unfortunately surprisingly apparently "
    "certainly probably absolutely exactly right sorry okay welcome without unless unlike whether whenever "
    "wherever section step example question response explanation conclusion"
)
# Ordinary words that the model also saw capitalised within a sentence (in titles and names): no evidence.
_NEUTRAL = _words(
    "a an and or on at to for from by with as is are was she we you that those what where why who how "
    "because then also after before once until just only maybe perhaps well now today not no let can could "
    "would should will may might must do did have has had my his our their its all each every another other "
    "one two three first second third next during good great best make take use get go come see look keep "
    "give find start add place read write tell say said like than too much more less few"
)
# Pairs over which the model never breaks. Of its 37 the ones whose second word is not a name: so
# "2. Business plan" holds no sentence end.
_AFTER_NUMBER = _words(
    "international commodities insider credit corrections financing business leisure dividend review "
    "abreast who letters notable"
)


class _Token(NamedTuple):
    """One token and what its form says about it (Punkt's first pass)."""

    text: str
    ends: bool  # ends a sentence, as far as its form says
    abbreviation: bool
    ellipsis: bool

    @property
    def kind(self) -> str:
        """The word that the tables know: lower case, no full stop."""
        if _NUMBER.match(self.text):
            return "##number##"
        return self.text.lower().rstrip(".") if self.text.endswith(".") else self.text.lower()

    @property
    def initial(self) -> bool:
        return _INITIAL.match(self.text) is not None


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with its closing quotes and brackets, without the blanks between them."""
    return list(sentences(text))


def sentences(text: str) -> Iterator[str]:
    """Like `split_sentences`, but lazily: each sentence is found when it is asked for."""
    for begin, end in _give_closers_back(text, _pieces(text)):
        if text[begin:end]:
            yield text[begin:end]


def count_sentences(text: str, at_most: int | None = None) -> int:
    """How many sentences IFEval's `length_constraints:number_sentences` sees in a text. at_most: where the
    counting may end, as a megabyte of full stops takes seconds."""
    return count(sentences(text), len(text) + 1 if at_most is None else min(at_most, len(text) + 1))


def count(found: Iterator[object], at_most: int) -> int:
    """How many there are, up to a number."""
    return sum(1 for _ in islice(found, at_most))


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for end, next_start in _breaks(text):
        yield start, end
        start = next_start
    yield start, len(text.rstrip())


def _breaks(text: str) -> Iterator[tuple[int, int]]:
    """(end of a sentence, start of the next) at every mark that ends one."""
    for word_start, match in _candidates(text):
        context = text[word_start : match.end()] + match["follower"]
        if _ends_sentence(context, label=_opens_line(text, word_start)):
            yield match.end(), match.start("next") if match["next"] else match.end()


def _candidates(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """The last mark of each word that could end a sentence, with the word's start.

    NLTK from 3.6.6 on keeps the first mark too when the word begins with it: "x ?? y" holds three sentences.
    """
    last: tuple[int, re.Match[str]] | None = None
    word_start, seen = 0, 1  # NLTK overlooks a blank that opens the text
    for match in _MARK.finditer(text):
        if match.start() > seen:
            for blank in _BLANK.finditer(text, seen, match.start()):
                word_start = blank.end()
        seen = match.end()
        if last and not last[0] == word_start < last[1].start():
            yield last
        last = (word_start, match)
    if last:
        yield last


def _opens_line(text: str, word_start: int) -> bool:
    """Does nothing but markup stand before the word on its line, as before the label of a list item?"""
    while word_start > 0 and text[word_start - 1] in " \t#*>-(":
        word_start -= 1
    return word_start == 0 or text[word_start - 1] == "\n"


def _give_closers_back(text: str, pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Move quotes and brackets that open a piece to the end of the piece before."""
    shift = 0
    start, end = next(pieces)
    for following in pieces:
        start += shift
        shift = 0
        closers = _CLOSERS.match(text[following[0] : following[1]])
        if closers:
            end = following[0] + len(closers[0].rstrip())
            shift = closers.end()
        yield start, end
        start, end = following
    yield start + shift, end


def _ends_sentence(context: str, *, label: bool) -> bool:
    """Does any token of a word and its follower, the last token apart, end a sentence?"""
    judge = _short_one_ends if len(context) <= _SHORT else _any_token_ends
    return judge(context, label)


@lru_cache(maxsize=4096)
def _short_one_ends(context: str, label: bool) -> bool:
    """Cached: a reply of full stops asks the same question at every one of them."""
    return _any_token_ends(context, label)


def _any_token_ends(context: str, label: bool) -> bool:
    tokens = (_first_pass(match[0]) for match in _TOKEN.finditer(context))
    return any(_second_pass(token, after, label) for token, after in pairwise(tokens))


def _first_pass(text: str) -> _Token:
    ellipsis = _ELLIPSIS.match(text) is not None
    stop = text.endswith(".") and not text.endswith("..") and text != "."
    word = text[:-1].lower()
    abbreviation = stop and (word in _ABBREVIATIONS or word.split("-")[-1] in _ABBREVIATIONS)
    return _Token(text, text in (".", "?", "!") or (stop and not abbreviation), abbreviation, ellipsis)


def _second_pass(token: _Token, after: _Token, label: bool) -> bool:
    """Does the token end a sentence, given the token after it?"""
    if not token.text.endswith("."):
        return token.ends
    if token.kind == "##number##" and after.kind in _AFTER_NUMBER:
        return False
    if (token.abbreviation or token.ellipsis) and not token.initial:
        return _starts_sentence(after)
    if token.initial or token.kind == "##number##":
        return token.ends and not _continues(token, after, label)
    return token.ends


def _starts_sentence(token: _Token) -> bool:
    return token.text[0].isupper() and token.kind in _STARTERS


def _continues(token: _Token, after: _Token, label: bool) -> bool:
    """After a number or an initial: does the next token carry the sentence on?"""
    if after.text in _INNER_PUNCTUATION or after.text[0].islower():
        return True
    # "J. Smith" goes on, "plan B. However" and "\nA. Preparation" do not: after an initial only an ordinary
    # word starts a sentence. The model knows thousands of those; we take what follows a label as one, unless
    # another initial follows or it is a J, which opens more names than lists.
    heading = label and token.kind != "j" and len(after.kind) > 1
    ordinary = heading or after.kind in _STARTERS or after.kind in _NEUTRAL
    return token.initial and after.text[0].isupper() and not ordinary
