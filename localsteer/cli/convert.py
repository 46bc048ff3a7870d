"""`localsteer convert`: checkpoints to GGUF, and vectors from and to the formats of other tools."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from localsteer.errors import ModelFileError

from . import options
from .console import note, print_json, shown
from .extract import check_folder, check_output, refuse_source

FTYPES = ("F32", "F16", "BF16")  # those of localsteer.convert.checkpoint
# those of localsteer.convert
CONVENTIONS = ("repeng", "cvector-generator", "easysteer", "layers", "hidden_states")
FORMATS = ("llama.cpp", "repeng", "easysteer", "steering-vectors", "npz", "safetensors")


class Convention(click.Choice[str]):
    """One of CONVENTIONS; `blocks` is an old name of `layers`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert("layers" if value == "blocks" else value, param, ctx)


@click.group("convert", short_help="Convert models and vectors from and to other formats.")
def command() -> None:
    """Convert models and vectors from and to the formats of other tools.

    \b
    Examples:
      localsteer convert model ./my-checkpoint -o my-model.gguf --quantize Q4_K_M
      localsteer convert import happy.gguf --from repeng -o happy-localsteer.gguf
      localsteer convert export json.gguf --static -o json-static.gguf
      localsteer convert export json.gguf --to steering-vectors -o json.pt
    """


@command.command("model", short_help="Convert a transformers checkpoint to a GGUF model.")
@click.argument("folder", type=click.Path())
@click.option("-o", "--output", required=True, type=click.Path(), metavar="GGUF", help="The model file.")
@click.option(
    "--ftype",
    type=click.Choice(FTYPES, case_sensitive=False),
    help="How matrices are stored. [default: F16; F32 before --quantize]",
)
@click.option("--quantize", metavar="TYPE", help="Then quantize it: Q4_K_M, Q8_0, ...")
@click.option("--name", metavar="TEXT", help="The model's name in the file. [default: the folder's]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@options.as_json
def model_command(
    folder: str,
    output: str,
    ftype: str | None,
    quantize: str | None,
    name: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert the transformers checkpoint in FOLDER (llama, qwen2, gemma2, phi3) to GGUF, without PyTorch.

    \b
    Examples:
      localsteer convert model ./my-checkpoint -o my-model.gguf
      localsteer convert model ./my-checkpoint -o my-model.gguf --quantize Q4_K_M
    """
    from localsteer.convert.checkpoint import checkpoint_to_gguf

    path = Path(output)
    _check_output(path, force)
    ftype = (ftype or ("F32" if quantize else "F16")).upper()
    if quantize is None:
        checkpoint_to_gguf(folder, path, ftype, name=name)
    else:
        _quantized(folder, path, ftype, quantize.upper(), name)
    _report(path, as_json, {"type": quantize.upper() if quantize else ftype})


def _check_output(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ModelFileError(f"{path} already exists: choose another name, or --force to replace it.")
    check_folder(path)


def _quantized(folder: str, path: Path, ftype: str, quantization: str, name: str | None) -> None:
    from localsteer.convert.checkpoint import checkpoint_to_gguf
    from localsteer.runtime.bridge import quantization_types, quantize

    if quantization not in quantization_types():
        known = ", ".join(sorted(quantization_types()))
        raise ModelFileError(f"unknown quantization {quantization!r}: choose one of {known}.")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        full = Path(temporary) / "full.gguf"
        checkpoint_to_gguf(folder, full, ftype, name=name or Path(folder).resolve().name)
        quantize(full, path, quantization)


@command.command("import", short_help="Convert another tool's vector to a localsteer vector.")
@click.argument("file", type=click.Path())
@click.option(
    "--from",
    "convention",
    type=Convention(CONVENTIONS),
    help="How the file counts layers. GGUF: repeng, cvector-generator (llama.cpp's and jukofyork's), or "
    "easysteer. npz, safetensors and a tensor of PyTorch: layers (row 0 is layer 0), or hidden_states (row 0 "
    "is the embedding).",
)
@click.option(
    "--n-layer",
    cls=options.Renamed,
    old=["--blocks"],
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of layers of the model.",
)
@click.option("-o", "--output", required=True, type=click.Path(), metavar="GGUF", help="The vector file.")
@options.settings
@click.option("--name", metavar="TEXT", help="The vector's name. [default: the file's]")
@options.as_json
def import_command(
    file: str,
    convention: str | None,
    n_layer: int | None,
    output: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Read a vector from another tool's FILE (GGUF, npz, safetensors, or PyTorch's .pt), and write it as a
    localsteer file.

    Without --from, the convention is taken from the file if that is certain. A vector without mean
    projections can add or ablate, but not project.

    \b
    Examples:
      localsteer convert import happy.gguf --from repeng -o happy-localsteer.gguf
      localsteer convert import control_vector.gguf --from cvector-generator -o ours.gguf
      localsteer convert import vectors.npz --from layers --layer 12 -o ours.gguf
      localsteer convert import steering_vector.pt --n-layer 28 -o ours.gguf
    """
    from localsteer.convert import import_vector
    from localsteer.extract.torch_files import import_torch_vector, is_torch_file

    check_output(Path(output))
    read = import_torch_vector if is_torch_file(file) else import_vector
    own = {name: settings.pop(name) for name in ("layer", "name")}
    vector = read(file, convention=convention, n_layer=n_layer, **own).at(**settings)
    _save(vector, output, as_json)


@command.command("export", short_help="Convert a localsteer vector for another tool.")
@click.argument("file", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(FORMATS),
    default="llama.cpp",
    show_default=True,
    help="The tool or format. npz and safetensors hold a whole vector, the others one that is added.",
)
@click.option(
    "--static",
    is_flag=True,
    default=True,
    help="One constant vector per layer, the only kind that llama.cpp reads.",
)
@click.option("-o", "--output", required=True, type=click.Path(), metavar="FILE", help="The new file.")
@click.option(
    "--layer", type=options.Layers(), metavar="LAYERS", help="Layers to keep. [default: the chosen ones]"
)
@click.option(
    "--strength",
    type=options.Finite(),
    metavar="X",
    help="Multiply the directions by this. [default: the file's strength]",
)
@click.option("--force", is_flag=True, help="Replace an existing file that is not a localsteer vector.")
@options.as_json
def export_command(
    file: str,
    to: str,
    static: bool,
    output: str,
    layer: tuple[int, ...] | None,
    strength: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write FILE for another tool: its chosen layers, times the strength, as constant directions. A notice
    says what the format can't hold.

    llama.cpp (`llama-cli --control-vector`, at scale 1), repeng, EasySteer and steering-vectors can only add
    a constant at every position, so a vector that projects becomes one that adds, and may need another
    strength. npz and safetensors hold everything, and `import` restores it exactly.

    \b
    Examples:
      localsteer convert export json.gguf --static --layer 12 --strength 0.8 -o json-static.gguf
      localsteer convert export json.gguf --to repeng -o json-repeng.gguf
      localsteer convert export json.gguf --to steering-vectors -o json.pt
      localsteer convert export json.gguf --to npz -o json.npz
    """
    from localsteer.vector import ControlVector

    vector, path = ControlVector.load(file).at(layer=layer, strength=strength), Path(output)
    refuse_source(path, file)
    if force:
        check_folder(path)
    else:
        check_output(path)
    lost = _export(vector, path, to)
    if to == "llama.cpp" and (vector.mode, vector.positions) != ("add", "all"):
        note(
            f"{vector.label} was made to {vector.mode} at positions {vector.positions}; "
            "stock llama.cpp will add it at all of them."
        )
    if lost:
        note(f"not in the file: {'; '.join(lost)}.")
    mode, strength = (vector.mode, vector.strength) if to in ("npz", "safetensors") else ("add", 1.0)
    more = {"to": to, "layers": list(vector.layers), "mode": mode, "strength": strength, "lost": list(lost)}
    _report(path, as_json, more)


def _export(vector: Any, path: Path, to: str) -> tuple[str, ...]:
    if to == "steering-vectors":
        from localsteer.extract.torch_files import write_torch_vector

        return write_torch_vector(vector, path)
    from localsteer.convert import export_vector

    return export_vector(vector, path, to=to)


def _save(vector: Any, output: str, as_json: bool) -> None:
    path = Path(output)
    vector.save(path)
    _report(path, as_json, {"layers": list(vector.layers), "mode": vector.mode, "strength": vector.strength})


def _report(path: Path, as_json: bool, more: Mapping[str, Any]) -> None:
    if as_json:
        print_json({"file": str(path), **more, "bytes": path.stat().st_size})
    else:
        click.echo(shown(str(path)))
