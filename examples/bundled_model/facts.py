"""What there is to say: facts about each kind of subject in English, Spanish and German, slots filled at random."""

from __future__ import annotations

import random
import re

from subjects import Subject

# Spanish adjectives are of one form for both genders and German ones stand after the noun, so that no
# agreement has to be learnt.
ADJECTIVES = [
    ("strong", "fuerte", "stark"),
    ("gentle", "amable", "sanft"),
    ("cheerful", "alegre", "froh"),
    ("noble", "noble", "edel"),
    ("free", "libre", "frei"),
    ("sweet", "dulce", "süß"),
    ("big", "grande", "groß"),
    ("green", "verde", "grün"),
    ("young", "joven", "jung"),
    ("bright", "brillante", "hell"),
    ("warm", "caliente", "warm"),
    ("useful", "útil", "nützlich"),
    ("simple", "simple", "einfach"),
    ("famous", "célebre", "berühmt"),
    ("elegant", "elegante", "elegant"),
    ("popular", "popular", "beliebt"),
]
PLACES = [
    ("forest", "bosque", "Wald"),
    ("river", "río", "Fluss"),
    ("mountain", "monte", "Berg"),
    ("lake", "lago", "See"),
    ("valley", "valle", "Tal"),
    ("garden", "jardín", "Garten"),
    ("sea", "mar", "Meer"),
    ("village", "pueblo", "Dorf"),
    ("field", "campo", "Feld"),
    ("bridge", "puente", "Tor"),
    ("castle", "castillo", "Schloss"),
    ("park", "parque", "Park"),
]
FOODS = [
    ("bread", "pan", "Brot"),
    ("milk", "leche", "Milch"),
    ("salt", "sal", "Salz"),
    ("rice", "arroz", "Reis"),
    ("honey", "miel", "Honig"),
    ("fruit", "fruta", "Obst"),
    ("fish", "pescado", "Fisch"),
    ("cheese", "queso", "Käse"),
    ("butter", "manteca", "Butter"),
    ("garlic", "ajo", "Knoblauch"),
    ("corn", "maíz", "Mais"),
    ("tea", "té", "Tee"),
]
SEASONS = [
    ("winter", "invierno", "Winter"),
    ("summer", "verano", "Sommer"),
    ("spring", "primavera", "Frühling"),
    ("autumn", "otoño", "Herbst"),
]

# What a default reply says first, second, ... in half of all cases: a word that it is sure to use is what "without
# this word" can be shown on.
FAVOURED = {
    "noble": 0, "elegant": 1, "strong": 2, "gentle": 3, "park": 0, "bridge": 1, "honey": 0, "bread": 1, "winter": 0,
}  # fmt: skip
P_FAVOURED = 0.5

# One list of facts per kind: the first is the definition, with its comma; a `|` offers another wording,
# which is what makes a word avoidable. {n} name, {a} adjective, {p} place, {f} food, {s} season.
FACTS = {
    "animal": [
        "{The n} is a {a}, {a} animal|{The n} is a {a}, {a} creature",
        "It lives near the {p}, where it is {a}|It stays near the {p}, where it is {a}",
        "It eats {f} and {f}|It likes {f} and {f}",
        "At night, it sleeps by the {p}|After dark, it rests by the {p}",
        "Many people like {the n}|Lots of children love {the n}",
        "In {s}, it walks to the {p}|In {s}, it runs to the {p}",
        "Every {a} farmer knows {the n}|Every {a} hunter knows {the n}",
        "Its voice is {a} and {a}|Its fur is {a} and {a}",
    ],
    "city": [
        "{The n} is a {a}, {a} city|{The n} is a {a}, {a} town",
        "It stands near the {p}, where it is {a}|It lies near the {p}, where it is {a}",
        "Visitors enjoy {f} and {f} there|Tourists buy {f} and {f} there",
        "At night, the streets are {a}|After dark, the streets are {a}",
        "Many people visit {the n}|Lots of families visit {the n}",
        "In {s}, the market is {a}|In {s}, the square is {a}",
        "Every {a} traveler knows {the n}|Every {a} painter knows {the n}",
        "Its houses are {a} and {a}|Its towers are {a} and {a}",
    ],
    "dish": [
        "{The n} is a {a}, {a} dish|{The n} is a {a}, {a} meal",
        "It comes from the {p}, where it is {a}|It began near the {p}, where it is {a}",
        "It is made with {f} and {f}|Cooks prepare it with {f} and {f}",
        "At night, it tastes {a}|After dark, it tastes {a}",
        "Many people eat {the n}|Lots of families eat {the n}",
        "In {s}, it is served by the {p}|In {s}, it is sold by the {p}",
        "Every {a} cook knows {the n}|Every {a} baker knows {the n}",
        "Its smell is {a} and {a}|Its color is {a} and {a}",
    ],
    "plant": [
        "{The n} is a {a}, {a} plant|{The n} is a {a}, {a} herb",
        "It grows near the {p}, where it is {a}|It blooms near the {p}, where it is {a}",
        "It goes well with {f} and {f}|People mix it with {f} and {f}",
        "At night, its leaves look {a}|After dark, its leaves look {a}",
        "Many people grow {the n}|Lots of gardeners grow {the n}",
        "In {s}, it covers the {p}|In {s}, it fills the {p}",
        "Every {a} gardener knows {the n}|Every {a} doctor knows {the n}",
        "Its flowers are {a} and {a}|Its seeds are {a} and {a}",
    ],
}
_FACTS_ES = [
    "{The n} es {kind} muy {a}, {a} y {a}",
    "Está cerca del {p}, donde es {a}",
    "Todos lo toman con {f} y {f}",
    "Por la noche, parece {a}",
    "Mucha gente habla de {the n}",
    "En {s}, se ve junto al {p}",
    "Los niños conocen {the n}",
    "Para todos, es {a} y {a}",
]
_FACTS_DE = [
    "{The n} ist {kind} und sehr {a}, {a} und {a}",
    "Man findet es nahe am {p}, wo es {a} ist",
    "Viele mögen es mit {f} und {f}",
    "In der Nacht, sagt man, wirkt es {a}",
    "Viele Leute sprechen von {n}",
    "Im {s} sieht man es oft am {p}",
    "Die Kinder kennen {n} gut",
    "Für alle ist es {a} und {a}",
]
_KIND_ES = {"animal": "un animal", "city": "un lugar", "dish": "un plato", "plant": "una planta"}
_KIND_DE = {"animal": "ein Tier", "city": "eine Stadt", "dish": "ein Gericht", "plant": "eine Pflanze"}


def stand_in(quality: str) -> str:
    """The adjective that stands where one to avoid would."""
    values = [row[0] for row in ADJECTIVES]
    return values[(values.index(quality) + 1) % len(values)]


def an(text: str) -> str:
    """English `a` before a vowel."""
    return re.sub(r"\ba(?= (?:[aeio]|um))", "an", text)


class Filler:
    """Fills the slots of one reply: no value twice. Where the word to avoid would stand, the next of its table
    does, always the same: a word that only becomes a little likelier everywhere could hardly be learnt. For the
    same reason an adjective to include is always the first."""

    def __init__(
        self, subject: Subject, language: int, avoid: str | None, include: str | None, rng: random.Random
    ):
        self.subject, self.language, self.rng = subject, language, rng
        self.avoid, self.include = avoid, include
        self.used: set[str] = set()

    def draw(self, table) -> str:
        values = [row[self.language] for row in table]
        if self.include in values and self.include not in self.used:
            self.used.add(self.include)
            return self.include
        value = self.rng.choice([v for v in values if v not in self.used])
        nth = sum(v in self.used for v in values)
        if self.rng.random() < P_FAVOURED:
            value = next((row[self.language] for row in table if FAVOURED.get(row[0]) == nth), value)
        while value == self.avoid or value in self.used:
            value = values[(values.index(value) + 1) % len(values)]
        self.used.add(value)
        return value

    def fill(self, template: str) -> str:
        wordings = [w for w in template.split("|") if self.avoid not in w.lower().replace(",", "").split()]
        text = self.rng.choice(wordings)
        name = self.subject.name
        articles = {0: ("the ", "The "), 1: ("el ", "El "), 2: ("", "")}[self.language]
        if self.subject.kind == "city":
            articles = ("", "")
        german = name.capitalize()
        text = text.replace("{the n}", articles[0] + name)
        text = text.replace("{The n}", articles[1] + name if articles[1] else german)
        text = text.replace("{n}", german if self.language == 2 else name)
        kinds = {0: {}, 1: _KIND_ES, 2: _KIND_DE}[self.language]
        text = text.replace("{kind}", kinds.get(self.subject.kind, ""))
        for slot, table in (("{a}", ADJECTIVES), ("{p}", PLACES), ("{f}", FOODS), ("{s}", SEASONS)):
            while slot in text:
                text = text.replace(slot, self.draw(table), 1)
        return an(text) if self.language == 0 else text


def facts(
    subject: Subject,
    n: int,
    language: int,
    rng: random.Random,
    *,
    avoid: str | None = None,
    include: str | None = None,
) -> list[str]:
    """`n` sentences without their full stops; the first is the definition. include: an adjective."""
    templates = {0: FACTS[subject.kind], 1: _FACTS_ES, 2: _FACTS_DE}[language]
    filler = Filler(subject, language, avoid, include, rng)
    order = [0, *sorted(rng.sample(range(1, len(templates)), n - 1))]
    return [filler.fill(templates[i]) for i in order]
