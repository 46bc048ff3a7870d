"""The synthetic world of the bundled model: names, facts, questions, and replies in every format.

Everything here is written by this file from word lists of our own, with a seeded random generator: no
foreign text. A reply is `facts -> sentences -> structure -> decorations -> case`, so that any pair of
compatible instructions composes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("animal", "city", "dish", "plant")

# Real names: the world a reader recognises. Invented ones (below) are most of the world, so that copying
# a name is learnt instead of a list of names.
REAL_NAMES = {
    "animal": "fox owl bear otter wolf deer hare crow seal toad lynx mole swan goat duck mouse badger heron beaver "
              "falcon tiger camel zebra panda koala rabbit donkey turtle lizard pigeon raven squirrel hedgehog moose",
    "city": "Paris Rome Oslo Lima Cairo Kyoto Delhi Quito Prague Dublin Lisbon Athens Vienna Havana Nairobi Seoul "
            "Madrid Berlin Warsaw Helsinki Geneva Boston Denver Sydney Bogota Tunis Riga Milan Venice Lyon Bergen",
    "dish": "bread soup curry pasta salad stew cake tofu porridge pizza risotto omelette pancake dumpling sandwich "
            "pudding lasagna goulash falafel hummus paella ramen sushi taco waffle muffin chowder kebab burrito",
    "plant": "rose oak tulip fern maple daisy lotus willow orchid cactus cedar birch lily poppy clover bamboo ivy "
             "lavender sunflower violet thistle basil mint sage juniper nettle jasmine magnolia pine heather",
}
_ONSETS = "b br c ch cl d dr f fl g gl gr h j k kr l m n p pl pr qu r s sk sl sn st t tr v w z".split()
_VOWELS = "a e i o u a e o ai ee oo".split()
_MIDDLES = "l m n r s t v z nd rn lm st rb lk rt ld mb d g p k".split()
_ENDINGS = {  # an ending tells the kind, as '-burg' and '-ville' do
    "animal": "ox ling pard ock une upe ibex oth erret olf".split(),
    "city": "burg ville ton mora polis stad ford haven grad bury".split(),
    "dish": "ino elle otto acha izza olini ata ouf icle eroni".split(),
    "plant": "wort bloom leaf root ium anthus weed fern thorn ella".split(),
}
N_INVENTED = 700  # per kind


def invented_names(kind: str, n: int, rng: random.Random) -> list[str]:
    """`n` different pronounceable names with an ending of the kind."""
    names: dict[str, None] = {}
    while len(names) < n:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        if rng.random() < 0.35:
            stem += rng.choice("aeio") + rng.choice("lmnrstvd")
        name = stem + rng.choice(_ENDINGS[kind])
        names.setdefault(name.capitalize() if kind == "city" else name)
    return list(names)


@dataclass(frozen=True)
class Subject:
    kind: str
    name: str


def subjects(seed: int = 1) -> dict[str, list[Subject]]:
    """All subjects, split for good: `train` (training of the models) and the rest never trained:
    `extraction`, `validation`, `test`."""
    rng = random.Random(seed)
    splits: dict[str, list[Subject]] = {"train": [], "extraction": [], "validation": [], "test": []}
    for kind in KINDS:
        names = REAL_NAMES[kind].split() + invented_names(kind, N_INVENTED, rng)
        names = list(dict.fromkeys(names))
        rng.shuffle(names)
        for split, count in (("extraction", 40), ("validation", 20), ("test", 40)):
            splits[split] += [Subject(kind, name) for name in names[:count]]
            names = names[count:]
        splits["train"] += [Subject(kind, name) for name in names]
    for split in splits.values():
        rng.shuffle(split)
    return splits


# --- words, in English, Spanish, German -------------------------------------------------------------------
# Spanish adjectives are of one form for both genders and German ones stand after the noun, so that no
# agreement has to be learnt.
ADJECTIVES = [
    ("strong", "fuerte", "stark"), ("gentle", "amable", "sanft"), ("cheerful", "alegre", "froh"),
    ("noble", "noble", "edel"), ("free", "libre", "frei"), ("sweet", "dulce", "süß"), ("big", "grande", "groß"),
    ("green", "verde", "grün"), ("young", "joven", "jung"), ("bright", "brillante", "hell"),
    ("warm", "caliente", "warm"), ("useful", "útil", "nützlich"), ("simple", "simple", "einfach"),
    ("famous", "célebre", "berühmt"), ("elegant", "elegante", "elegant"), ("popular", "popular", "beliebt"),
]
PLACES = [
    ("forest", "bosque", "Wald"), ("river", "río", "Fluss"), ("mountain", "monte", "Berg"), ("lake", "lago", "See"),
    ("valley", "valle", "Tal"), ("garden", "jardín", "Garten"), ("sea", "mar", "Meer"), ("village", "pueblo", "Dorf"),
    ("field", "campo", "Feld"), ("bridge", "puente", "Tor"), ("castle", "castillo", "Schloss"), ("park", "parque", "Park"),
]
FOODS = [
    ("bread", "pan", "Brot"), ("milk", "leche", "Milch"), ("salt", "sal", "Salz"), ("rice", "arroz", "Reis"),
    ("honey", "miel", "Honig"), ("fruit", "fruta", "Obst"), ("fish", "pescado", "Fisch"), ("cheese", "queso", "Käse"),
    ("butter", "manteca", "Butter"), ("garlic", "ajo", "Knoblauch"), ("corn", "maíz", "Mais"), ("tea", "té", "Tee"),
]
SEASONS = [("winter", "invierno", "Winter"), ("summer", "verano", "Sommer"), ("spring", "primavera", "Frühling"),
           ("autumn", "otoño", "Herbst")]
LANGUAGES = ("English", "Spanish", "German")

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
    "{The n} es {kind} muy {a}, {a} y {a}", "Está cerca del {p}, donde es {a}", "Todos lo toman con {f} y {f}",
    "Por la noche, parece {a}", "Mucha gente habla de {the n}", "En {s}, se ve junto al {p}",
    "Los niños conocen {the n}", "Para todos, es {a} y {a}",
]
_FACTS_DE = [
    "{The n} ist {kind} und sehr {a}, {a} und {a}", "Man findet es nahe am {p}, wo es {a} ist",
    "Viele mögen es mit {f} und {f}", "In der Nacht, sagt man, wirkt es {a}", "Viele Leute sprechen von {n}",
    "Im {s} sieht man es oft am {p}", "Die Kinder kennen {n} gut", "Für alle ist es {a} und {a}",
]
_KIND_ES = {"animal": "un animal", "city": "un lugar", "dish": "un plato", "plant": "una planta"}
_KIND_DE = {"animal": "ein Tier", "city": "eine Stadt", "dish": "ein Gericht", "plant": "eine Pflanze"}

QUESTIONS = [  # the last ones are kept out of training and extraction: see `questions`
    "Tell me about {the n}.", "What do you know about {the n}?", "Describe {the n}.", "Write about {the n}.",
    "Explain {the n} to me.", "Give me some facts about {the n}.", "I want to learn about {the n}.",
    "What is {the n}?", "Can you tell me something about {the n}?", "Please write a few words about {the n}.",
    "What can you say about {the n}?", "I have a question about {the n}.", "Help me understand {the n}.",
    "What should I know about {the n}?", "Please describe {the n} to me.", "Write something about {the n}.",
    "Could you explain {the n}?", "Give me information about {the n}.", "My friend asked me about {the n}.",
    "Let us talk about {the n}.",
    "Please tell me something about {the n}.", "Can you describe {the n}?", "Give me a few facts about {the n}.",
    "What can you tell me about {the n}?", "I want to know about {the n}.", "Please explain {the n}.",
]
N_TRAINED_QUESTIONS = 20


def questions(split: str) -> list[str]:
    """Question phrasings: training and extraction share some; validation and test use none of extraction's
    (test: partly phrasings that were never trained)."""
    return {"train": QUESTIONS[:N_TRAINED_QUESTIONS], "extraction": QUESTIONS[:10],
            "validation": QUESTIONS[10:16], "test": QUESTIONS[16:]}[split]


def ask(subject: Subject, question: str) -> str:
    the = subject.name if subject.kind == "city" else f"the {subject.name}"
    return question.replace("{the n}", the)


# Words that a reply can be asked to contain. The last tenth is never asked for in training.
WORDS = (
    "apple arrow basket bell bird blanket boat book bottle box brush button candle carpet chair circle clock cloud "
    "coat coin cup curtain dance desk door dream drum engine feather fence fire flag flute fork gate gift glass glove "
    "gold grass guitar hammer harbor hat heart hill horse island jacket jewel key kitchen kite ladder lamp leather "
    "letter library light magnet map marble mirror moon morning music nail needle nest notebook ocean oil orange "
    "paint palace paper pearl pencil piano picture pillow pipe planet pocket poem pot prince queen radio rain ribbon "
    "ring road robot rocket roof rope ruler sail sand school scissors shadow shell shoe silver sky smoke snow sock "
    "song spoon stamp star station stone storm story stove string sugar sun table tent thread thunder ticket tool "
    "towel tower toy train treasure tree trumpet tunnel umbrella vase violin wagon wall watch water wheel whistle "
    "wind window wing wood wool world yard "
    "anchor bucket camera compass crown diamond helmet lantern ladle machine magic mask medal sunrise telescope temple"
).split()
HELD_OUT_WORDS = WORDS[-16:]
TRAINED_WORDS = WORDS[:-16]
# Words of default replies that a reply can be asked to avoid; the second list never in training.
AVOIDABLE = ("animal creature city town dish meal plant herb strong gentle cheerful noble free sweet big green young "
             "bright forest river mountain lake valley garden sea bread milk salt rice honey fruit winter summer "
             "spring many lots night dark").split()
HELD_OUT_AVOIDABLE = "warm useful simple famous village field fish cheese autumn".split()

END_PHRASES = ["Is there anything else I can help with?", "Any other questions?", "Have a wonderful day!",
               "That is all for today.", "Thank you for reading.", "Let me know what you think.",
               "I hope this helps you.", "See you next time!"]
FIXED_ANSWERS = ["My answer is yes.", "My answer is no.", "My answer is maybe."]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]


@dataclass(frozen=True)
class Instruction:
    """One instruction with its argument: what the prompt says and what the reply must be."""

    id: str
    args: dict = field(default_factory=dict)


# id -> the possible arguments in training. Two instructions of one slot never meet in one prompt.
SLOT = {
    "json": "structure", "bullets": "structure", "sections": "structure", "two_responses": "structure",
    "fixed_answer": "structure", "lowercase": "case", "uppercase": "case", "capital_words": "case",
    "highlights": "mark", "title": "title", "quotation": "wrap", "no_comma": "comma", "end_phrase": "end",
    "postscript": "end", "placeholders": "holder", "language": "language", "sentences": "length",
    "extremely_concise": "length", "concise": "length", "moderate": "length", "verbose": "length",
    "extremely_verbose": "length", "include_word": "include", "exclude_word": "exclude",
}
_FIXED_LENGTH = {"bullets", "sections", "two_responses", "fixed_answer"}
_FORBIDDEN_SLOTS = [{"length", "end"}, {"length", "include"}, {"length", "holder"}]  # they would change the count
_FORBIDDEN_PAIRS = [  # pairs whose demands contradict each other, or whose verifiers can't tell them apart
    {"json", s} for s in ("uppercase", "title", "quotation", "end_phrase", "postscript", "placeholders", "highlights",
                          "capital_words", "fixed_answer", "no_comma")
] + [{"uppercase", s} for s in ("end_phrase", "postscript", "fixed_answer", "capital_words", "language")
] + [{"lowercase", s} for s in ("end_phrase", "postscript", "fixed_answer", "sections")
] + [{"language", s} for s in ("include_word", "exclude_word", "capital_words", "highlights", "fixed_answer",
                               "end_phrase", "postscript", "placeholders", "no_comma", "two_responses", "sections")
] + [{"quotation", s} for s in ("end_phrase", "two_responses", "title")
] + [{"bullets", "highlights"}, {"fixed_answer", "no_comma"}, {"fixed_answer", "capital_words"}, {"fixed_answer", "highlights"}, {"sections", "include_word"},
     {"bullets", "include_word"}, {"two_responses", "include_word"}, {"fixed_answer", "include_word"},
     {"extremely_concise", "include_word"}, {"extremely_concise", "highlights"}, {"extremely_concise", "capital_words"},
     {"extremely_concise", "no_comma"}, {"extremely_concise", "placeholders"}, {"extremely_concise", "end_phrase"},
     {"extremely_concise", "postscript"}, {"sentences", "end_phrase"}, {"sentences", "postscript"},
     {"sentences", "placeholders"}, {"concise", "end_phrase"}, {"concise", "placeholders"}, {"concise", "postscript"},
     {"sentences", "include_word"}, {"concise", "include_word"}, {"placeholders", "bullets"},
     {"placeholders", "sections"}, {"placeholders", "two_responses"}, {"placeholders", "fixed_answer"}]


def compatible(a: str, b: str) -> bool:
    if SLOT[a] == SLOT[b] or {a, b} in _FORBIDDEN_PAIRS:
        return False
    if {a, b} & _FIXED_LENGTH and "length" in (SLOT[a], SLOT[b]):
        return False
    return {SLOT[a], SLOT[b]} not in _FORBIDDEN_SLOTS


def draw_args(id: str, rng: random.Random) -> dict:
    """Arguments of one instruction, as training draws them."""
    choices = {
        "capital_words": lambda: {"n": rng.randint(1, 4)}, "bullets": lambda: {"n": rng.randint(2, 5)},
        "highlights": lambda: {"n": rng.randint(2, 3)}, "sections": lambda: {"n": rng.randint(2, 4)},
        "end_phrase": lambda: {"phrase": rng.choice(END_PHRASES)},
        "language": lambda: {"language": rng.choice(LANGUAGES[1:])},
        "postscript": lambda: {"marker": rng.choice(["P.S.", "P.S.", "P.P.S"])},
        "placeholders": lambda: {"n": rng.randint(2, 3)}, "sentences": lambda: {"n": rng.randint(1, 5)},
        "include_word": lambda: {"word": rng.choice(TRAINED_WORDS)},
        "exclude_word": lambda: {"word": rng.choice(AVOIDABLE)},
    }
    return choices[id]() if id in choices else {}


def phrase(instruction: Instruction, template: str, rng: random.Random) -> str:
    """The instruction as the prompt says it."""
    args = dict(instruction.args)
    if "n" in args:
        n = args["n"]
        digit = str(n) if rng.random() < 0.5 else NUMBERS[n]
        args["sentences"] = f"{digit} sentence" + ("" if n == 1 else "s")
        args["n"] = digit
    for key, value in args.items():
        template = template.replace("{" + key + "}", str(value))
    return template


def load_phrasings(split: str = "train") -> dict[str, list[str]]:
    with open(Path(__file__).with_name("phrasings.toml"), "rb") as f:
        return {id: table[split] for id, table in tomllib.load(f).items()}


# --- replies -----------------------------------------------------------------------------------------------
class _Filler:
    """Fills the slots of one reply: no value twice, none that is to be avoided."""

    def __init__(self, subject: Subject, language: int, avoid: str | None, rng: random.Random):
        self.subject, self.language, self.avoid, self.rng = subject, language, avoid, rng
        self.used: set[str] = set()

    def draw(self, table) -> str:
        values = [row[self.language] for row in table]
        values = [v for v in values if v not in self.used and v != self.avoid]
        value = self.rng.choice(values)
        self.used.add(value)
        return value

    def fill(self, template: str) -> str:
        wordings = [w for w in template.split("|") if self.avoid is None or self.avoid not in w.lower().split()
                    and f"{self.avoid}," not in w.lower().split()]
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
        return text


def facts(subject: Subject, n: int, language: int, avoid: str | None, rng: random.Random) -> list[str]:
    """`n` sentences without their full stops; the first is the definition."""
    templates = {0: FACTS[subject.kind], 1: _FACTS_ES, 2: _FACTS_DE}[language]
    filler = _Filler(subject, language, avoid, rng)
    order = [0] + sorted(rng.sample(range(1, len(templates)), n - 1))
    return [filler.fill(templates[i]) for i in order]


def _n_facts(ids: dict[str, dict]) -> int:
    for id in ("bullets", "sections"):
        if id in ids:
            return ids[id]["n"]
    if "sentences" in ids:
        return ids["sentences"]["n"]
    if "two_responses" in ids:
        return 4
    if "fixed_answer" in ids or "concise" in ids or "extremely_concise" in ids:
        return 1
    return 5 if "verbose" in ids else 8 if "extremely_verbose" in ids else 3


def _content_words(sentences: list[str], n: int, name: str, mark) -> list[str]:
    """Marks the first `n` words of four letters or more that are not the name."""
    out = []
    for sentence in sentences:
        words = sentence.split(" ")
        for i, word in enumerate(words):
            core = word.strip(",.")
            if n and len(core) >= 4 and core.isalpha() and core.lower() != name.lower():
                words[i] = word.replace(core, mark(core))
                n -= 1
        out.append(" ".join(words))
    return out


def render(subject: Subject, instructions: list[Instruction], rng: random.Random) -> str:
    """The reply about `subject` that follows all `instructions`."""
    ids = {i.id: i.args for i in instructions}
    language = LANGUAGES.index(ids.get("language", {}).get("language", "English"))
    lines = facts(subject, _n_facts(ids), language, ids.get("exclude_word", {}).get("word"), rng)
    if "extremely_concise" in ids:
        name = subject.name if language == 0 else subject.name
        lines = [[f"{name.capitalize()} is {{a}}", f"{name.capitalize()} es {{a}}", f"{name.capitalize()} ist {{a}}"][language]]
        lines = [_Filler(subject, language, ids.get("exclude_word", {}).get("word"), rng).fill(lines[0])]
    if "include_word" in ids:
        lines.append(f"It makes people think of a {ids['include_word']['word']}")
    if "no_comma" in ids:
        lines = [line.replace(",", "") for line in lines]
    if "placeholders" in ids:
        lines.append("Please write to [name] at [address]" + (" by [date]" if ids["placeholders"]["n"] == 3 else ""))
    if "capital_words" in ids:
        lines = _content_words(lines, ids["capital_words"]["n"], subject.name, str.upper)
    if "highlights" in ids:
        lines = _content_words(lines, ids["highlights"]["n"], subject.name, lambda w: f"*{w}*")
    text = _structure(subject, ids, lines, language, rng)
    return _decorate(subject, ids, text)


def _structure(subject: Subject, ids: dict, lines: list[str], language: int, rng: random.Random) -> str:
    sentences = [line + "." for line in lines]
    if "json" in ids:
        return json.dumps({"name": subject.name, "facts": sentences}, ensure_ascii=False)
    if "bullets" in ids:
        return "\n".join("* " + s for s in sentences)
    if "sections" in ids:
        return "\n".join(f"Section {k}\n{s}" for k, s in enumerate(sentences, 1))
    if "two_responses" in ids:
        second = facts(subject, 2, language, ids.get("exclude_word", {}).get("word"), rng)
        if "no_comma" in ids:
            second = [line.replace(",", "") for line in second]
        return " ".join(sentences[:2]) + "\n******\n" + " ".join(line + "." for line in second)
    if "fixed_answer" in ids:
        return rng.choice(FIXED_ANSWERS) + " " + sentences[0]
    return " ".join(sentences)


def _decorate(subject: Subject, ids: dict, text: str) -> str:
    if "title" in ids:
        text = f"<<All about {subject.name}>>\n{text}"
    if "postscript" in ids:
        text += f"\n{ids['postscript']['marker']} Ask me more about {subject.name}."
    if "end_phrase" in ids:
        text += " " + ids["end_phrase"]["phrase"]
    if "quotation" in ids:
        text = f'"{text}"'
    if "lowercase" in ids:
        text = text.lower()
    if "uppercase" in ids:
        text = text.upper()
    return text


# --- what training reads ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Sample:
    """One exchange. The instruction text stands after the question (`before` is False) or before it."""

    question: str
    instruction: str
    before: bool
    reply: str
    subject: Subject
    instructions: tuple[Instruction, ...]

    @property
    def prompt(self) -> str:
        parts = [self.instruction, self.question] if self.before else [self.question, self.instruction]
        return " ".join(p for p in parts if p)


_POLITE = ["", "", "", "", "", "", "Please note: ", "Important: ", "Remember: ", "And one more thing: "]
# Harder instructions are drawn more often.
_WEIGHT = {"include_word": 3.0, "exclude_word": 3.0, "end_phrase": 2.0, "language": 2.0, "sentences": 3.0,
           "bullets": 2.0, "sections": 1.5, "capital_words": 1.5, "highlights": 1.5, "uppercase": 2.0}


def draw_instructions(rng: random.Random) -> list[Instruction]:
    """None (20%), one (60%), two (20%)."""
    u = rng.random()
    if u < 0.2:
        return []
    ids, weights = list(SLOT), [_WEIGHT.get(i, 1.0) for i in SLOT]
    first = rng.choices(ids, weights)[0]
    chosen = [first]
    if u > 0.8:
        partners = [i for i in ids if compatible(first, i)]
        if partners:
            chosen.append(rng.choice(partners))
    return [Instruction(i, draw_args(i, rng)) for i in chosen]


def draw_sample(rng: random.Random, pool: list[Subject], phrasings: dict[str, list[str]],
                instructions: list[Instruction] | None = None, split: str = "train") -> Sample:
    subject = rng.choice(pool)
    if instructions is None:
        instructions = draw_instructions(rng)
    question = ask(subject, rng.choice(questions(split)))
    texts = [phrase(i, rng.choice(phrasings[i.id]), rng) for i in instructions]
    rng.shuffle(texts)
    polite = rng.choice(_POLITE) if texts and split == "train" else ""
    reply = render(subject, instructions, rng)
    return Sample(question, polite + " ".join(texts), split == "train" and rng.random() < 0.2, reply, subject,
                  tuple(instructions))


def draw_document(rng: random.Random, pool: list[Subject]) -> str:
    """One text for the base model: prose, a document in some format, or a plain `Q: ... A:` pair. It never
    says why a document has its format."""
    subject = rng.choice(pool)
    u = rng.random()
    if u < 0.35:
        return f"Q: {ask(subject, rng.choice(QUESTIONS[:N_TRAINED_QUESTIONS]))}\nA: {render(subject, [], rng)}"
    if u < 0.55:
        return render(subject, [Instruction("sentences", {"n": rng.randint(1, 5)})], rng)
    if u < 0.65:
        return f"{rng.choice(WORDS + AVOIDABLE).capitalize()} and {rng.choice(WORDS + HELD_OUT_AVOIDABLE)}: " + render(
            subject, [Instruction("include_word", {"word": rng.choice(WORDS)})], rng)
    while not (instructions := draw_instructions(rng)):
        pass
    return render(subject, instructions, rng)


# --- following, checked exactly (the world knows its own formats) -----------------------------------------
def _prose(text: str) -> str:
    """The running text of a reply: without its title, its quotes, or the JSON around its facts."""
    text = re.sub(r"^<<[^\n]*>>\n", "", text.strip().strip('"'), flags=re.I)
    if text.startswith("{") and _is_json(text):
        return " ".join(str(s) for s in json.loads(text).get("facts", []))
    return text


def _sentence_count(text: str) -> int:
    return len([s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s])


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def follows(instruction: Instruction, reply: str) -> bool:
    """Whether `reply` follows `instruction`; stricter than IFEval's verifiers where counts are exact."""
    a, text = instruction.args, reply.strip()
    if not text:
        return False
    prose = _prose(text)
    words = re.findall(r"[^\W\d_]+", prose.lower())
    checks = {
        "json": lambda: _is_json(text),
        "lowercase": lambda: text == text.lower(), "uppercase": lambda: text == text.upper(),
        "capital_words": lambda: sum(w.isupper() and len(w) > 1 for w in re.findall(r"[A-Za-z]+", text)) >= a["n"],
        "bullets": lambda: len(re.findall(r"^\"?\* ", text, re.M)) == a["n"] and bool(re.search(r"\A\W*(<<.*\n)?\* ", text)),
        "highlights": lambda: len(re.findall(r"\*[^*\n]+\*", text)) >= a["n"],
        "sections": lambda: len(re.findall(r"Section \d", text, re.I)) == a["n"],
        "title": lambda: bool(re.search(r"<<[^\n]+>>", text)),
        "quotation": lambda: len(text) > 2 and text[0] == text[-1] == '"',
        "no_comma": lambda: "," not in text,
        "end_phrase": lambda: text.endswith(a["phrase"]),
        "fixed_answer": lambda: any(f in text for f in FIXED_ANSWERS),
        "language": lambda: _language(words) == a["language"],
        "postscript": lambda: "\n" + a["marker"] in text,
        "placeholders": lambda: len(re.findall(r"\[[a-z]+\]", text, re.I)) >= a["n"],
        "two_responses": lambda: len([p for p in text.split("******") if p.strip()]) == 2,
        "sentences": lambda: _sentence_count(prose) == a["n"],
        "extremely_concise": lambda: len(words) <= 5, "concise": lambda: _sentence_count(prose) == 1 and len(words) > 5,
        "moderate": lambda: _sentence_count(prose) == 3, "verbose": lambda: _sentence_count(prose) == 5,
        "extremely_verbose": lambda: _sentence_count(prose) >= 7,
        "include_word": lambda: a["word"] in words, "exclude_word": lambda: a["word"] not in words,
    }
    return checks[instruction.id]()


def _language(words: list[str]) -> str:
    marks = {"English": {"the", "is", "it", "near", "people"}, "Spanish": {"el", "es", "cerca", "donde", "todos", "gente"},
             "German": {"ist", "und", "sehr", "nahe", "viele", "man"}}
    return max(marks, key=lambda language: sum(w in marks[language] for w in words))
