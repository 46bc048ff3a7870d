"""Makes the files of docs/results/ again: python docs/record_results.py [NAME ...]

Each of COMMANDS runs as a user would run it, in the checkout; what it leaves is kept but for the replies and
vectors, which are large and made again by the same command. About three quarters of an hour on two cores, so
name what is wanted. benchmarks/bundled_model.py writes its own page. docs/make_results.py then makes the
tables.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
STUDIES = ("quantization", "layers", "pairs", "compound", "linear")
COMMANDS = {
    "eval-q8_0": ("localsteer eval --suite all -o docs/results/eval-q8_0",),
    "eval-q4_k_m": ("localsteer eval -m bundled:Q4_K_M --suite all -o docs/results/eval-q4_k_m",),
    **{name: (f"localsteer study {name} -o docs/results/{name}",) for name in STUDIES},
    "similarity": ("localsteer similarity --pairs 50 --plot docs/results/similarity/similarity.png",),
    "transfer": (
        "localsteer extract --gguf bundled --instruction json -o json.gguf",
        "localsteer transfer json.gguf -m bundled-base --qa",
        "localsteer transfer json.gguf -m bundled:Q2_K",
        "localsteer transfer json.gguf --map --from bundled -m bundled:Q2_K",
        "localsteer transfer json.gguf --map --from bundled -m bundled-base --qa",
    ),
}
BENCHMARKS = ("decode_overhead", "concurrency", "ensure", "improbable", "server_soak")
KEPT = {"plots", "results.json", "report.md"}  # the page is made again from results.json


def run(command: str, allowed: tuple[int, ...] = (0,)) -> str:
    """What it prints, if it ends with a status that is allowed. Progress stays on the terminal."""
    print(f"$ {command}", file=sys.stderr)
    environment = {**os.environ, "COLUMNS": "110"}
    done = subprocess.run(
        shlex.split(command),
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
        text=True,
    )
    if done.returncode not in allowed:
        raise SystemExit(f"{command} ended with {done.returncode}")
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def record(name: str) -> None:
    folder = RESULTS / name
    if name in BENCHMARKS:
        # status 1 tells of a bound that was missed, which is a result too
        printed = run(shlex.join([sys.executable, f"benchmarks/{name}.py"]), allowed=(0, 1))
        last = printed.splitlines()[-1]
        (RESULTS / f"{name}.json").write_text(last + "\n", encoding="utf-8")
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name in ("similarity", "transfer"):
        record_printed(name, folder)
        return
    for command in COMMANDS[name]:
        run(command)
    for path in folder.iterdir():
        if path.name == f"{name}.md":  # beside its folder, where a reader looks for it
            page = path.read_text(encoding="utf-8").replace("](plots/", f"]({name}/plots/")
            (RESULTS / path.name).write_text(page, encoding="utf-8")
            path.unlink()
        elif path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def record_printed(name: str, folder: Path) -> None:
    """Commands that print and keep nothing: their output is the page, a picture lies in the folder."""
    page = [f"# {name.capitalize()}", "", "What the commands print on the bundled model.", ""]
    for command in COMMANDS[name]:
        page += ["```text", f"$ {command}", run(command), "```", ""]
    (ROOT / "json.gguf").unlink(missing_ok=True)
    page += [line for path in sorted(folder.glob("*.png")) for line in (f"![]({name}/{path.name})", "")]
    if not any(folder.iterdir()):
        folder.rmdir()
    (RESULTS / f"{name}.md").write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    known = (*COMMANDS, *BENCHMARKS)
    names = sys.argv[1:] or known
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown result {name!r}: choose from {', '.join(known)}.")
    for name in names:
        record(name)


if __name__ == "__main__":
    main()
