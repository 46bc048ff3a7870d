"""Words of a length that llama.cpp's pre-tokenizers don't survive."""

from __future__ import annotations

import subprocess
import sys

import pytest
from raw_gguf import STRING, value
from tiny_gguf import tiny_gguf

from localsteer.errors import ContextError
from localsteer.runtime.bridge import Model, long_runs
from localsteer.runtime.bridge import model as model_module

# in a process of its own: without the cuts it is ended
TOKENIZES = """
import sys
from localsteer.runtime.bridge import Model
with Model(sys.argv[1]) as model:
    for text in ("a" * 100_000, "!" * 40_000, " " * 40_000, "\\u5ddd" * 40_000, "aB1!" * 9999):
        tokens = model.tokenize("x " + text, add_special=True, parse_special=True)
        assert b"".join(model.token_to_piece(token) for token in tokens).decode() == "x " + text
print("alive")
"""


def model_file(tmp_path, pre):
    raw = tiny_gguf(tokenizer="gpt2")
    raw.key_values["tokenizer.ggml.pre"] = value(STRING, pre)
    path = tmp_path / f"{pre}.gguf"
    path.write_bytes(raw.to_bytes())
    return path


DROP_IN = """
import sys
from localsteer import SteeredLlama
llama = SteeredLlama(sys.argv[1], n_ctx=64, verbose=False)
for text in ("a" * 100_000, "!" * 40_000, " " * 40_000, "aB1!" * 9999):
    tokens = llama.tokenize(b"x " + text.encode(), add_bos=False)
    assert llama.detokenize(tokens) == b"x " + text.encode()
    assert llama.tokenize(text.encode(), special=True)
print("alive")
"""


def test_nor_does_it_in_the_drop_in_for_llama_cpp_python(tmp_path):
    command = [sys.executable, "-c", DROP_IN, str(model_file(tmp_path, "gpt-4o"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize("pre", ["gpt-4o", "bloom"])
def test_a_very_long_word_does_not_end_the_process(tmp_path, pre):
    command = [sys.executable, "-c", TOKENIZES, str(model_file(tmp_path, pre))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_text_of_ordinary_words_is_not_cut(tmp_path):
    text = "the fox " * 5000
    assert long_runs.pieces(text) == [text]
    with Model(model_file(tmp_path, "gpt-4o")) as model:
        whole = model._tokens(text.encode(), True, True)
        assert model.tokenize(text, add_special=True, parse_special=True) == whole


@pytest.mark.parametrize("text", ["a" * 100_000, "ab1" * 30_000, " " * 20_000 + "x" * 8193, "", "x" * 8192])
def test_pieces_are_the_text_and_hold_no_longer_run(text):
    found = long_runs.pieces(text)
    assert "".join(found) == text
    assert all(len(run) <= long_runs.MAX_RUN for piece in found for run in piece.split())


def test_a_cut_is_made_between_kinds_of_characters():
    first, *_ = long_runs.pieces("a" * 6000 + "1" * 6000)
    assert first == "a" * 6000


@pytest.mark.parametrize("pre", ["gpt-2", "gpt-4o"])
def test_a_text_with_more_tokens_than_any_context_is_refused_before_its_list_is_made(
    tmp_path, pre, monkeypatch
):
    monkeypatch.setattr(model_module, "MANY_TOKENS", 10_000)
    with Model(model_file(tmp_path, pre)) as model:
        assert len(model.tokenize(" the" * 9000, add_special=True, parse_special=True)) < 10_000
        with pytest.raises(ContextError, match=r"^the first 65,536 characters of the text have [\d,]+"):
            model.tokenize("a1" * 200_000, add_special=True, parse_special=True)
