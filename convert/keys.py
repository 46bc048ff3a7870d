"""Names and limits of the control-vector format; docs/format.md is the normative text."""

from __future__ import annotations

ARCHITECTURE = "controlvector"  # value of general.architecture, as llama.cpp and repeng write it
MODEL_HINT = "controlvector.model_hint"
LAYER_COUNT = "controlvector.layer_count"
DIRECTION = "direction."  # tensor `direction.N` acts at the output of 0-based layer N, N >= 1

# A reader refuses a newer major version, and ignores key-values that it does not know within its own.
VERSION_MAJOR = 2
VERSION_MINOR = 1  # of a file with learned gates; one without is written as 0
COMPLETE = 1  # major version of a file with a row for every layer, which older readers take
COMPACT = 2  # of one that leaves rows of zeros out

PREFIX = "localsteer."
MAJOR = PREFIX + "format.major"
MINOR = PREFIX + "format.minor"
N_LAYER = PREFIX + "n_layer"
N_EMBD = PREFIX + "n_embd"
# llama.cpp's loader rejects direction.0, so layer 0 is stored in a key-value
DIRECTION_0 = PREFIX + "direction.0"
READER = PREFIX + "reader."  # + layer; no tensor, because llama.cpp's loader rejects names it does not know
BIASES = PREFIX + "biases"
ROW_LAYERS = PREFIX + "blocks"  # in a compact file: the layers whose rows it holds
LAYERS = PREFIX + "layers"
MODE = PREFIX + "mode"
POSITIONS = PREFIX + "positions"
STRENGTH = PREFIX + "strength"
ONE_SIDED = PREFIX + "one_sided"
CAP = PREFIX + "cap"
NAME = PREFIX + "name"
PROVENANCE = PREFIX + "provenance."  # + key: one scalar
PROVENANCE_JSON = PREFIX + "provenance_json."  # + key: anything else, as JSON text
PROBES_TEXT = PREFIX + "probes.text"
PROBES_LENGTH = PREFIX + "probes.length"
PROBES_TOKENS = PREFIX + "probes.tokens"

# What a file may claim. Real models have at most some hundred layers, 20,000 wide; a file beyond these is
# damaged or hostile. Whatever it claims, nothing is read or allocated beyond the bytes that it has.
MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20
MAX_KEY_VALUES = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ARRAY = 1 << 22  # items of one key-value array; the largest vocabularies have some 300,000
MAX_NAME = 1 << 10  # bytes of the name of a key or a tensor
MAX_BYTES = 1 << 30  # of all directions together, where layers that a file leaves out are filled with zeros
