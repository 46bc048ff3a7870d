"""The weights for which a vector is learned, in PyTorch: a GGUF, dequantized by transformers, or its
checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from localsteer.errors import LocalsteerError, MismatchError, ModelFileError
from localsteer.extract.torch_backend import (
    caps_attention,
    decoder_layers,
    observe_layers,
    torch,
    transformers,
)
from localsteer.templates import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from localsteer.engine import Engine

# Bytes per token of a step and per layer that gradients pass through: hidden states, attention and the wide
# middle of the MLP in float32, some twenty times n_embd. Measured on two Llamas and a Qwen2; rounded up.
ACTIVATION_WIDTHS = 24
LIKENESS_PROMPT = "Tell me about foxes."
# Least correlation of logits: for the same weights, at worst in bfloat16; and for quantized weights, at worst
# in two bits. Unrelated models have a correlation of 0.
LIKE_GGUF, LIKE_CHECKPOINT = 0.98, 0.7

Edit = Callable[[Any], Any]  # of hidden states (..., n_embd)


class Weights:
    """A frozen transformers model with the shape of an engine's model.

    model: in bfloat16 if the processor has instructions for it, else float32.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layers = decoder_layers(model)
        config = model.config.get_text_config(decoder=True)
        self.n_layer, self.n_embd = config.num_hidden_layers, config.hidden_size
        self._n_outputs: list[int | None] | None = None
        # without the head; Llama 4 names its prefix wrongly, and then is its own base
        base = model.base_model
        self._decoder = model.get_decoder() if base is model else base

    @classmethod
    def load(
        cls, engine: Engine, checkpoint: str | None = None, *, n_tokens: int, n_threads: int | None = None
    ) -> Weights:
        """Load weights. checkpoint: a folder or a name on the hub; None takes the engine's GGUF. n_tokens: of
        one step, for the memory that it needs.

        Raises LocalsteerError if they do not fit into memory, ModelFileError if transformers can't load them,
        MismatchError for another model.
        """
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        dtype = fast_dtype()
        check_memory(engine, dtype, n_tokens)
        model = _from_checkpoint(checkpoint, dtype) if checkpoint else _from_gguf(engine.path, dtype)
        weights = cls(model)
        shape = (engine.model.n_layer, engine.model.n_embd)
        if (weights.n_layer, weights.n_embd) != shape:
            raise MismatchError(
                f"{checkpoint} has {weights.n_layer} layers of width {weights.n_embd}, but the model has "
                f"{shape[0]} of {shape[1]}: use the checkpoint that the GGUF was made from."
            )
        weights.check_likeness(engine, checkpoint)
        return weights

    def check_likeness(self, engine: Engine, checkpoint: str | None) -> None:
        """Raise MismatchError if the logits of a prompt differ from the engine's: transformers drops settings
        of some GGUFs, and another checkpoint can have the same shape."""
        ids = engine.prompt_tokens(LIKENESS_PROMPT)
        with torch.inference_mode():
            ours = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
        theirs = engine.logits(ids)
        width = min(ours.shape[1], theirs.shape[1])  # some models have rows beyond the vocabulary
        likeness = np.corrcoef(ours[1:, :width].ravel(), theirs[1:, :width].ravel())[0, 1]
        if likeness >= (LIKE_CHECKPOINT if checkpoint else LIKE_GGUF):
            return
        if checkpoint:
            raise MismatchError(
                f"{checkpoint} is not the model of {engine.path.name} (their logits correlate by "
                f"{likeness:.2f}): use the checkpoint that the GGUF was made from."
            )
        raise MismatchError(
            f"transformers reads {engine.path.name} differently from llama.cpp (their logits correlate "
            f"by {likeness:.2f}): name the model's checkpoint with --checkpoint FOLDER_OR_NAME."
        )

    def logits(self, hidden: Any) -> Any:
        """Logits (n, n_vocab) float32 from (n, n_embd) states after the final norm, by the model's own head,
        since many models scale or cap logits."""
        base = self._decoder
        base.forward = lambda *_args, **_options: _Ready(last_hidden_state=hidden[None])
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long)
            return self.model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            del base.forward

    def states(self, ids: Any, attention: Any, layers: Sequence[int]) -> tuple[dict[int, Any], Any]:
        """The outputs of layers for a padded batch, and the last hidden state, without gradients."""
        seen: dict[int, Any] = {}

        def keep(layer: int, hidden: Any) -> None:
            if layer in layers:
                seen[layer] = hidden

        with torch.inference_mode(), observe_layers(self.model, keep):
            output = self._decoder(input_ids=ids, attention_mask=attention, use_cache=False)
        return seen, output.last_hidden_state

    def after(
        self, layer: int, hidden: Any, ids: Any, attention: Any, edits: Mapping[int, Edit] | None = None
    ) -> Any:
        """The last hidden state, computed from the output of layer `layer` by the layers above it.

        ids: the token ids of `hidden`, which some models use again in every layer. edits: what to do to the
        outputs of layers above.
        """
        with self._without_layers_up_to(layer, hidden), self._edited(edits or {}):
            output = self._decoder(input_ids=ids, attention_mask=attention, use_cache=False)
        return output.last_hidden_state

    @contextmanager
    def _edited(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        handles = [
            self.layers[layer].register_forward_hook(partial(_edited, edit)) for layer, edit in edits.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _without_layers_up_to(self, layer: int, hidden: Any) -> Iterator[None]:
        """Skips the layers up to one. They stay in place, since models choose the kind of attention by a
        layer's number."""
        skipped = self.layers[: layer + 1]
        for layer, n in zip(skipped, self._outputs_of_layers(), strict=False):
            layer.forward = _gives(hidden, n)
        try:
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def _outputs_of_layers(self) -> list[int | None]:
        """How many values each layer returns, the hidden state first; None if it returns only a hidden
        state."""
        if self._n_outputs is None:
            n_outputs = []

            def see(_layer: Any, _inputs: Any, output: Any) -> None:
                n_outputs.append(len(output) if isinstance(output, tuple) else None)

            handles = [layer.register_forward_hook(see) for layer in self.layers]
            try:
                with torch.inference_mode():
                    self._decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            self._n_outputs = n_outputs
        return self._n_outputs


class _Ready(transformers.modeling_outputs.BaseModelOutput):
    """The output of the model below the head, for a last hidden state that is already known."""

    def __getattr__(self, name: str) -> None:
        """None: heads pass on other fields, such as caches and router logits."""
        if name.startswith("__"):
            raise AttributeError(name)


def _edited(edit: Edit, _layer: Any, _inputs: Any, output: Any) -> Any:
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


def _gives(hidden: Any, n_outputs: int | None) -> Any:
    output = hidden if n_outputs is None else (hidden, *[None] * (n_outputs - 1))
    return lambda *_args, **_options: output


def fast_dtype() -> Any:
    """bfloat16 or float32. bfloat16 halves the memory, and is faster if the processor has instructions for
    it, but otherwise many times slower."""
    cpu = torch.cpu
    has = any(getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if has else torch.float32


def _from_checkpoint(checkpoint: str, dtype: Any) -> Any:
    return _load(checkpoint, checkpoint, dtype)


def _from_gguf(path: Path, dtype: Any) -> Any:
    options: dict[str, Any] = {"gguf_file": path.name}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the layers packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return _load(str(path.parent), path.name, dtype, **options)


def _load(source: str, label: str, dtype: Any, **options: Any) -> Any:
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **{name: dtype}, **options)
        if caps_attention(model.config):
            model.set_attn_implementation("eager")
        return model
    except Exception as error:  # the file may be anything, and transformers raises almost any type of error
        raise ModelFileError(
            f"transformers can't load {label} ({one_line(error)}): name the model's checkpoint with "
            "--checkpoint FOLDER_OR_NAME."
        ) from error


def memory_needed(engine: Engine, dtype: Any, n_tokens: int) -> int:
    """Bytes for the weights, and for what the gradients of one step keep."""
    width = torch.finfo(dtype).bits // 8
    activations = 4 * ACTIVATION_WIDTHS * n_tokens * engine.model.n_embd * engine.model.n_layer
    logits = 3 * 4 * n_tokens * engine.model.n_vocab
    return width * engine.model.n_params + activations + logits


def check_memory(engine: Engine, dtype: Any, n_tokens: int) -> None:
    """Raise LocalsteerError if steps of this many tokens do not fit into memory."""
    import psutil  # installed with accelerate, which transformers needs to read a GGUF

    needed, free = memory_needed(engine, dtype, n_tokens), psutil.virtual_memory().available
    if needed > free:
        raise LocalsteerError(
            f"learning on this model takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB "
            "are free: close other programs, or learn on a smaller model or from shorter examples."
        )
