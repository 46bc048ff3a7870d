"""Writes the tables of measured figures in docs/ from docs/results/: python docs/make_results.py

Each stands between the marks `<!-- NAME begin -->` and `<!-- NAME end -->` of its page. The text around it is
written by hand: read it again when the results are made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
EVALS = {"Q8_0": "eval-q8_0", "Q4_K_M": "eval-q4_k_m"}  # of the bundled model
# general.name of a file -> the name under which its publisher has it
MODEL_NAMES = {
    "Smollm2 135M 8k Lc100K Mix1 Ep2": "SmolLM2-135M-Instruct",
    "Qwen2.5 Coder 0.5B Instruct AWQ": "Qwen2.5-Coder-0.5B-Instruct",
}
# beginning of a file's sha256 -> the same, with its quantization
LEARNED_ON = {
    "b179c952": "SmolLM2-135M-Instruct Q4_1",
    "1d961463": "Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
}
# file -> the same
STYLES_ON = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct Q4_1",
    "qwen0.5b.gguf": "Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
}
# folders of evaluations, where there are any, and what to add to the model's name
REAL = {
    "smollm2-135m-instruct": "",
    "smollm2-135m-instruct-shipped": ", vectors that ship",
    "qwen2.5-coder-0.5b-instruct": "",
    "qwen2.5-coder-0.5b-instruct-shipped": ", vectors that ship",
}
CONDITIONS = ("none", "steered", "instructed", "both", "random", "other")
# Stolfo et al., arXiv 2410.12877, table of the format instructions: none, steered, told, both, in per cents
PAPER = {
    "Phi-3-mini-instruct": (11.0, 30.7, 69.9, 77.3),
    "Gemma-2-2b-it": (12.9, 30.7, 69.3, 76.1),
    "Gemma-2-9b-it": (12.3, 30.7, 86.5, 87.1),
    "Mistral-7B-Instruct": (6.7, 14.1, 62.6, 63.8),
}

Document = dict[str, Any]


def pages() -> dict[Path, str]:
    """The whole of each page, its tables made anew."""
    found: dict[Path, str] = {}
    for (name, page), rows in TABLES.items():
        path = DOCS / page
        text = found.get(path) or path.read_text("utf-8")
        between = re.compile(rf"(<!-- {name} begin -->\n).*?(<!-- {name} end -->)", re.S)
        if not between.search(text):
            raise SystemExit(f"{page} has no marks for {name}")
        made = "\n".join(rows())
        found[path] = between.sub(lambda marks, made=made: f"{marks[1]}{made}\n{marks[2]}", text)
    return found


def paper() -> Iterator[str]:
    """The paper's own prompts, ours above theirs."""
    yield "| Model | none | steered | told | told and steered | random | other | prompts |"
    yield "|---|---|---|---|---|---|---|---|"
    for title, document in _real("ifeval"):
        rows = document["suites"]["ifeval"]["all"]
        cells = [_interval(rows[name]["strict"]) if name in rows else "-" for name in CONDITIONS]
        yield _row(f"**{title}**", [*cells, str(rows["none"]["n"])])
    for model, shares in PAPER.items():
        yield _row(f"{model}, from the paper", [*(f"{share:g}%" for share in shares), "", "", "163"])


def paper_shipped(folder: str) -> Iterator[str]:
    """The paper's prompts by IFEval's id, with the vectors that ship for a model."""
    yield "| Instruction | none | steered | told | told and steered | prompts | steered at |"
    yield "|---|---|---|---|---|---|---|"
    suite = _read(RESULTS / f"{folder}-shipped/results.json")["suites"]["ifeval"]
    for name, row in suite["instructions"].items():
        shares = [percent(round(row[condition]["strict"]["accuracy"], 3)) for condition in CONDITIONS[:4]]
        settings = row["steered"]["settings"]
        where = "one for each language" if isinstance(settings, list) else _place(settings)
        yield _row(name.partition(":")[2], [*shares, str(row["none"]["n"]), where])


def catalogue() -> Iterator[str]:
    """Every instruction of the catalogue that has a verifier, on unseen questions."""
    yield "| Model | Instruction | none | steered | told | told and steered | random | other | steered at |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for title, document in _real("format"):
        suite = document["suites"]["format"]
        for name, row in [*suite["instructions"].items(), ("**mean**", suite["all"])]:
            shares = [row.get(condition, {}).get("strict", {}).get("accuracy") for condition in CONDITIONS]
            cells = ["-" if share is None else percent(round(share, 3)) for share in shares]
            yield _row(title, [name, *cells, _place(row.get("steered", {}).get("settings"))])


def composition() -> Iterator[str]:
    """Two instructions at once, with the vectors that ship: the share of replies in which both hold."""
    conditions = ("none", "instructed", "first alone", "both vectors", "random", "other")
    yield "| Pair | none | told | first vector | both vectors | random | other | degenerate | steered at |"
    yield "|---|---|---|---|---|---|---|---|---|"
    suite = _read(RESULTS / "smollm2-135m-instruct-composition/results.json")["suites"]["composition"]
    for name, row in suite["instructions"].items():
        row["both vectors"] = row.get("same layer") or row["different layers"]
        shares = []
        for condition in conditions:
            share, low, high = (row[condition]["strict"][key] for key in ("accuracy", "low", "high"))
            shares.append(f"{share:.0%} ({100 * low:.0f}-{100 * high:.0f})" if share else "0%")
        degenerate = f"{row['both vectors']['quality']['degenerate']:.0%}"
        where = "; ".join(map(_place, row["both vectors"]["settings"]))
        yield _row(name, [*shares, degenerate, where])


def search() -> Iterator[str]:
    yield "| Model | Instruction | plain | told | steered | setting | seconds | tokens | exhaustive |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for path in sorted(RESULTS.glob("search-*.json")):
        document = _read(path)
        for row in document["rows"]:
            found, whole = row["likelihood"], row.get("exhaustive")
            setting = "nothing helps" if found["setting"] == "None" else found["setting"]
            cells = [percent(row["plain"]), percent(row["told"]), percent(found["follows"]), setting]
            cells += [f"{row['extract_seconds'] + found['seconds']:.0f}", f"{found['tokens']:,}"]
            reference = f"{percent(whole['follows'])}, {whole['tokens']:,} tokens" if whole else ""
            yield _row(document["model"].removesuffix(".gguf"), [row["id"], *cells, reference])
        mean = document["mean"]
        cells = [percent(mean[name]) for name in ("plain", "told", "steered")]
        yield _row("", ["**mean**", *cells, "", f"{mean['seconds']:.0f}", "", ""])


def learned() -> Iterator[str]:
    arms = ("none", "learned", "told", "both", "random", "other")
    heads = ("none", "learned", "told", "told and learned", "random", "other")
    yield f"| | {' | '.join(heads)} | length | perplexity | subject named | distinct | layer |"
    yield "|---|" + "---|" * 11
    for path in sorted(RESULTS.glob("learned-*.json"), reverse=True):
        document = _read(path)
        yield _row(f"**{LEARNED_ON[document['sha256'][:8]]}**", [""] * 11)
        for row in document["rows"]:
            cells = [percent(row[arm]["followed"]) if row.get(arm) else "-" for arm in arms]
            cells[1] += f" ({round(100 * row['learned']['low'])}-{round(100 * row['learned']['high'])})"
            quality = row["quality"]
            cells += [
                f"{quality['length']:.2f}",
                f"{quality['ppl']:.2f}",
                percent(quality["subject_learned"]),
            ]
            yield _row(row["id"], [*cells, percent(quality["distinct"]), _layers(row)])
        means = [percent(document["mean"][arm]) if arm in document["mean"] else "-" for arm in arms]
        yield _row("mean", [*means, "", "", "", "", ""])


def styles() -> Iterator[str]:
    """What is learned from examples of one's own."""
    yield "| | follow | subject named | perplexity | seconds |"
    yield "|---|---|---|---|---|"
    for path in sorted(RESULTS.glob("styles-*.json"), reverse=True):
        document = _read(path)
        yield _row(f"**{STYLES_ON[document['model']]}**", [""] * 4)
        for row in document["rows"]:
            low, high, kept = round(100 * row["low"]), round(100 * row["high"]), row["subject_kept"]
            cells = [f"{percent(row['followed'])} ({low}-{high})", "-" if kept is None else percent(kept)]
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
            yield _row(f"{row['style']}, {row['arm']}", [*cells, f"{row['ppl']:.1f}", seconds])


def _layers(row: Document) -> str:
    return ", ".join(map(str, row["layers"]))


def learned_paper() -> Iterator[str]:
    """On the paper's own prompts for these instructions."""
    arms = ("none", "told", "steered", "both")
    yield "| | none | told | learned | told and learned | prompts |"
    yield "|---|---|---|---|---|---|"
    for path in sorted(RESULTS.glob("learned_paper-*.json")):
        for row in _read(path)["rows"]:
            cells = [percent(round(row["passed"][arm] / row["n"], 3)) for arm in arms]
            low, high = row["interval"]["steered"]
            cells[2] += f" ({round(100 * low)}-{round(100 * high)})"
            yield _row(row["instruction"], [*cells, str(row["n"])])


def real_speed() -> Iterator[str]:
    contention = _read(RESULTS / "contention.json")
    yield "| Decoding, tokens per second | nothing else running | beside two busy processes |"
    yield "|---|---|---|"
    for name, row in contention["tokens_per_second"].items():
        yield _row(name, [f"{row['quiet']:.0f}", f"{row['loaded']:.0f}"])


def peers() -> Iterator[str]:
    """What benchmarks/peers.py measured on the real model."""
    contenders = _read(RESULTS / "peers.json")["smol.gguf"]["contenders"]
    yield f"| | {' | '.join(contenders)} |"
    yield "|---|" + "---|" * len(contenders)
    for clients in contenders["llama-server"]["clients"]:
        rows = [row["clients"][clients] for row in contenders.values()]
        speeds = [f"{row['tokens_per_second']:.0f} ({row['speed_ratio']:.2f})" for row in rows]
        firsts = [f"{row['first_token']:.2f} ({row['first_token_ratio']:.2f})" for row in rows]
        yield _row(f"tokens per second, clients: {clients}", speeds)
        yield _row(f"seconds to the first token, clients: {clients}", firsts)
    for k, prompt in enumerate(("2,000 tokens, new", "2,000 tokens, beginning known")):
        yield _row(
            f"seconds to the first token, {prompt}",
            [f"{row['prefix'][k]:.2f}" for row in contenders.values()],
        )
    for what, key in (("seconds to the first reply after the start", "start"), ("peak memory, MB", "memory")):
        yield _row(what, ["-" if row[key] is None else f"{row[key]:g}" for row in contenders.values()])


def _real(suite: str) -> Iterator[tuple[str, Document]]:
    """Titles and documents of the evaluations of real models that have a suite."""
    for folder, more in REAL.items():
        path = RESULTS / folder / "results.json"
        document = _read(path) if path.exists() else {"suites": {}}
        if suite in document["suites"]:
            model = document["model"]
            yield f"{MODEL_NAMES[model['name']]} {model['quantization']}{more}", document


def _interval(share: Document) -> str:
    low, high = round(100 * share["low"]), round(100 * share["high"])
    return f"{percent(round(share['accuracy'], 3))} ({low}-{high})"


def _place(settings: Document | list[Document] | None) -> str:
    if not isinstance(settings, dict):
        return "-"
    layers = ", ".join(map(str, settings["layer"]))
    return f"{settings['mode']} at layer {layers}, {settings['positions']}, {settings['strength']:g}"


def evaluations() -> Iterator[str]:
    evals = [_read(RESULTS / name / "results.json") for name in EVALS.values()]
    bundled = _read(RESULTS / "bundled-model.json")
    yield f"| Question | {' | '.join(EVALS)} |"
    yield "|---|" + "---|" * len(EVALS)
    for what, figure in STEERED.items():
        yield _row(what, (figure(bundled["steered"][quant]) for quant in EVALS))
    for what, figure in SUITES.items():
        yield _row(what, (figure(each["suites"]) for each in evals))
    means = bundled["told"]["means"]
    for what in means:
        yield _row(f"told in words: {what}", [percent(means[what]["followed"]), ""])


def speed() -> Iterator[str]:
    """What steering costs, one sequence at a time."""
    document = _read(RESULTS / "decode_overhead.json")
    yield "| Ratio to unsteered | prefill | decode |"
    yield "|---|---|---|"
    for name, row in document["variants"].items():
        if name != "unsteered":
            yield _row(name, (f"{row[f'{phase}_ratio']:.3f}" for phase in ("prefill", "decode")))


def concurrency() -> Iterator[str]:
    document = _read(RESULTS / "concurrency.json")
    yield "| Ratio | measured | asked for |"
    yield "|---|---|---|"
    for name, ratio in document["ratios"].items():
        yield _row(name, [f"{ratio:.2f}", str(document["bounds"].get(name, ""))])


def soak() -> Iterator[str]:
    document = _read(RESULTS / "server_soak.json")
    memory = document["memory_mb"]
    heads = (
        "Minutes",
        "Requests",
        "Lost replies",
        "Slots in use at the end",
        "Memory, second and last quarter",
    )
    heads += ("Plain clients' p99, before and beside hostile ones", "/health p99")
    yield _row(heads[0], heads[1:])
    yield "|---|---|---|---|---|---|---|"
    requests = f"{sum(document['requests'].values()):,}"
    quarters = f"{memory['second_quarter']:.0f} MB, {memory['last_quarter']:.0f} MB"
    plain, health = document["plain_p99_seconds"], document["health_p99_seconds"]
    waited = [f"{plain['quiet']:.2f} s, {plain['hostile']:.2f} s", f"{1000 * health:.0f} ms"]
    lost, running = document["lost"], document["counts"]["running"]
    yield _row(f"{document['minutes']:g}", [requests, str(lost), str(running), quarters, *waited])


def packs() -> Iterator[str]:
    yield "| Model | Instruction | Setting | plain | steered | told | told and steered | of |"
    yield "|---|---|---|---|---|---|---|---|"
    for path in sorted((DOCS.parent / "localsteer" / "packs").glob("*/pack.json")):
        pack = _read(path)
        for name, row in pack["instructions"].items():
            scores = [row["scores"][key] for key in ("none", "steered", "instructed", "both")]
            cells = ["-" if score is None else percent(score) for score in scores]
            where = f"{row['mode']} at layer {', '.join(map(str, row['layers']))}, {row['positions']}"
            setting = f"{where}, strength {row['strength']:g}" if row["strength"] else "nothing helps"
            yield _row(f"{pack['model']} {pack['quantization']}", [name, setting, *cells, str(row["n"])])


def unseen() -> Iterator[str]:
    """What benchmarks/packs.py kept of test questions."""
    yield "| Model | Instruction | plain | steered | told | told and steered |"
    yield "|---|---|---|---|---|---|"
    for name, row in _read(RESULTS / "packs-qwen2.5-coder-0.5b.json").items():
        shares = [row[key] for key in ("none", "steered", "instructed", "both")]
        cells = [f"{100 * share:.0f}% ({100 * low:.0f}-{100 * high:.0f})" for share, low, high, _ in shares]
        yield _row("Qwen2.5-Coder-0.5B-Instruct Q4_K_M", [name, *cells])


def calls() -> Iterator[str]:
    """Of benchmarks/steered_calls.py: calls that validate, and in brackets those with the right city."""
    steered = ("generated tokens, forms too", "forms plain", "prompt as well, forms too", "forms plain")
    yield _row("Layer", ["Calls", "plain", *steered])
    yield "|---|---|---|---|---|---|---|"
    for layer, row in _read(RESULTS / "steered_calls.json").items():
        for kind, name in (("forced", "forced by `tool_choice`"), ("free", "free")):
            ways = (f"{kind}, steered everywhere", f"{kind}, forms plain")
            counts = [
                row[kind],
                *(row[positions][way] for positions in ("generation", "all") for way in ways),
            ]
            yield _row(layer, [name, *(f"{count['valid']} ({count['right']})" for count in counts)])


def ensuring() -> Iterator[str]:
    document = _read(RESULTS / "ensure.json")
    ways = ("plain", "always", "ensure")
    heads = [f"followed: {' | '.join(ways)}", f"tokens: {' | '.join(ways)}"]
    yield f"| | {' | '.join(heads)} | perplexity where plain complied: {' | '.join(ways)} | replies |"
    yield "|---|" + "---|" * 10
    for name, row in document["mean"].items():
        cells = [percent(row[way]["followed"]) for way in ways]
        cells += [f"{row[way]['tokens']:.0f}" for way in ways]
        known = [row[way]["perplexity_complied"] for way in ways]
        cells += ["-" if each is None else f"{each:.2f}" for each in known]
        yield _row(f"{name} ({row['n']})", [*cells, f"{row['tries']:.2f}"])


def questions() -> Iterator[str]:
    """The task of examples/harness, arm by arm."""
    yield "| smol, 60 questions | names the answer | difference | is JSON | picks the answer of four |"
    yield "|---|---|---|---|---|"
    for arm, row in _read(RESULTS / "harness.json")["arms"].items():
        metrics = ("names_it", "is_json", "acc")
        cells = [_share_between(row[metric], "share", "interval") for metric in metrics]
        gap = "" if arm == "plain" else _share_between(row["names_it"], "difference", "difference_interval")
        yield _row(arm, [cells[0], gap, *cells[1:]])


def architectures() -> Iterator[str]:
    """Where PyTorch and llama.cpp compute the same model."""
    heads = ("in llama.cpp", "plain", "states", "steered", "reply", "vector", "learn", "GGUF", "remark")
    yield _row("Architecture", heads)
    yield "|---|" + "---|" * len(heads)
    for name, row in _read(RESULTS / "architectures.json")["rows"].items():
        if "stopped" in row or row.get("differs"):
            continue
        reply, vector, gguf = row["reply"], row["extraction"], row["from_gguf"]
        cells = [row["architecture"], f"{row['plain']:.0e}", _worst(row["states"]), _worst(row["steered"])]
        same = min(reply["generate"], reply["greedy"]) if isinstance(reply, dict) else 0
        cells += [f"{same} of {reply['tokens']}" if isinstance(reply, dict) else "-"]
        cells += [f"{vector['cosine']:.5f}" if isinstance(vector, dict) else "-", _worst(row["learning"])]
        cells += [f"{gguf:.0e}" if isinstance(gguf, float) else "no"]
        yield _row(f"`{name}`", [*cells, ", ".join(row["failed"])])


def architectures_other() -> Iterator[str]:
    """Where they do not, or a step did not work, and why."""
    yield _row("Architecture", ["what happens"])
    yield "|---|---|"
    for name, row in _read(RESULTS / "architectures.json")["rows"].items():
        if "stopped" in row:
            yield _row(f"`{name}`", [f"not {row['stopped']}: {row['why'].replace('|', '/')}"])
        elif row.get("differs"):
            states = row.get("states", ())
            first = next((i for i, difference in enumerate(states) if difference > 0.01), None)
            where = "" if first is None else f", states from layer {first} on"
            yield _row(f"`{name}`", [f"logits differ by {row['plain']:.2g}{where}"])


def _worst(differences: list[float] | dict[str, float] | str) -> str:
    if isinstance(differences, str):  # of what went wrong
        return "-"
    return f"{max(differences.values() if isinstance(differences, dict) else differences):.0e}"


def _share_between(row: Document, name: str, interval: str) -> str:
    low, high = (round(100 * bound) for bound in row[interval])
    return f"{100 * row[name]:.0f}% ({low} to {high})"


def rpc() -> Iterator[str]:
    """What a token costs on two hosts."""
    document = _read(RESULTS / "rpc.json")
    yield "| | ms per token | kB sent | kB received | exchanges |"
    yield "|---|---|---|---|---|"
    for name, milliseconds in document["milliseconds"].items():
        row = document["traffic"].get(name)
        cells = ["", "", ""]
        if row:
            cells = [f"{row[key] / 1000:,.0f}" for key in ("bytes_sent", "bytes_received")]
            cells.append(f"{row['exchanges']:.0f}")
        yield _row(name, [f"{milliseconds:.1f}", *cells])


def vllm_follow() -> Iterator[str]:
    """The same vectors in vLLM and in the GGUF engine."""
    document = _read(RESULTS / "vllm_follow.json")
    yield "| Vector | vLLM | GGUF engine | plain, either |"
    yield "|---|---|---|---|"
    for name, rows in document.items():
        cells = []
        for kind in ("vLLM, steered", "GGUF engine, steered", "GGUF engine, plain"):
            row = rows[kind]
            low, high = row["interval"]
            cells.append(f"{row['follow']} of {row['of']} ({100 * low:.0f}-{100 * high:.0f}%)")
        yield _row(name, cells)


def _read(path: Path) -> Document:
    return json.loads(path.read_text("utf-8"))


def _row(what: str, figures: Iterator[str] | list[str]) -> str:
    return f"| {what} | {' | '.join(figures)} |"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%".replace(".0%", "%")


def _regime(name: str) -> Callable[[Document], str]:
    def figure(steered: Document) -> str:
        found = steered[name]["summary"]
        controls = max(found[each]["mean"] for each in ("none", "random", "other"))
        return (
            f"{percent(found['steered']['mean'])} (controls at most {percent(controls)}; "
            f"lowest {percent(found['worst']['steered'])} {found['worst']['id']}; "
            f"degenerate {percent(found['degenerate'])}; subject named {percent(found['subject_kept'])})"
        )

    return figure


def _share(rows: Document, condition: str) -> str:
    """The mean; where no setting of an instruction won it has no controls, and how many have is said."""
    found = [row[condition]["strict"]["accuracy"] for row in rows.values() if condition in row]
    return percent(fmean(found)) + (f" ({len(found)} of {len(rows)})" if len(found) < len(rows) else "")


def _shares(suite: str, pattern: str, *conditions: str) -> Callable[[Document], str]:
    """Mean over the instructions whose id is like pattern, for each condition."""

    def figure(suites: Document) -> str:
        rows = {id: row for id, row in suites[suite]["instructions"].items() if re.fullmatch(pattern, id)}
        return ", ".join(f"{each} {_share(rows, each)}" for each in conditions)

    return figure


def _excluded(word: str, *more: str) -> Callable[[Document], str]:
    return _shares("words", f"exclude_word:{word}", "none", "steered", "random", "other", *more)


def _words(direction: str) -> Callable[[Document], str]:
    """Mean words at each strength of the sweep, the unsteered model first."""

    def figure(suites: Document) -> str:
        row = suites["length"]["instructions"][direction]
        names = ["none", *(name for name in row if name.startswith("strength"))]
        return ", ".join(f"{row[name]['quality']['words']:.1f}" for name in names)

    return figure


def _paraphrases(suites: Document) -> str:
    section = next(each for each in suites["format"]["sections"] if each["title"].startswith("Paraphrases"))
    _, count, told, both, _ = section["tables"][0]["rows"][-1]
    return f"{count} wordings: told {percent(told['share'])}, both {percent(both['share'])}"


OWN = ("own", "own random", "own other")
STEERED = {
    "formats and lengths, steered, settings free": _regime("free"),
    "middle layers, prompt positions": _regime("middle, prompt"),
    "middle layers, all positions (the paper's setting)": _regime("middle, all"),
}
SUITES = {
    "instruction in the prompt": _shares("format", ".*", "instructed", "both"),
    "paraphrases that are followed badly": _paraphrases,
    "mean words, conciseness at growing strength": _words("conciseness"),
    "mean words, verbosity at growing strength": _words("verbosity"),
    "a word included": _shares("words", "include.*", "none", "steered", "random", "other"),
    "a word excluded that the question's context brings": _excluded("[^:]*:context", *OWN),
    "a word excluded that every reply holds": _excluded("[^:]*", *OWN),
    "a word excluded that the prompt asks for": _excluded("[^:]*:asked"),
    "two instructions at once": _shares(
        "composition", ".*", "none", "same layer", "different layers", "random", "other"
    ),
    "on the base model": _shares("cross-model", ".*", "none", "own", "instruct", "instructed"),
}


TABLES: dict[tuple[str, str], Callable[[], Iterator[str]]] = {
    ("packs", "packs.md"): packs,
    ("paper", "results/README.md"): paper,
    ("paper_shipped", "results/README.md"): partial(paper_shipped, "smollm2-135m-instruct"),
    ("paper_shipped_qwen", "results/README.md"): partial(paper_shipped, "qwen2.5-coder-0.5b-instruct"),
    ("catalogue", "results/README.md"): catalogue,
    ("composition", "results/README.md"): composition,
    ("search", "results/README.md"): search,
    ("real_speed", "results/README.md"): real_speed,
    ("peers", "results/README.md"): peers,
    ("learned", "learning.md"): learned,
    ("learned_paper", "learning.md"): learned_paper,
    ("evaluations", "results/bundled.md"): evaluations,
    ("speed", "results/bundled.md"): speed,
    ("concurrency", "results/bundled.md"): concurrency,
    ("soak", "results/bundled.md"): soak,
    ("styles", "learning.md"): styles,
    ("ensure", "ensure.md"): ensuring,
    ("unseen", "packs.md"): unseen,
    ("calls", "clients.md"): calls,
    ("questions", "harness.md"): questions,
    ("rpc", "scale.md"): rpc,
    ("vllm_follow", "scale.md"): vllm_follow,
    ("architectures", "architectures.md"): architectures,
    ("architectures_other", "architectures.md"): architectures_other,
}

if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
