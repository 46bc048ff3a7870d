"""The studies that take several models or many replies, once each, small, on the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
from study_runs import check, job

from localsteer import bundled
from localsteer.errors import CatalogError, LocalsteerError, MismatchError
from localsteer.evaluate.studies.common import run_study


def test_quantization_needs_two_files_and_compares_them(tmp_path, tiny_llama):
    with pytest.raises(LocalsteerError, match="two files"):
        run_study("quantization", job(tmp_path))
    files = tuple((quant, bundled.gguf_path("instruct", quant)) for quant in ("F16", "Q4_0"))
    other = (files[0], ("other", tiny_llama.gguf_path))
    with pytest.raises(MismatchError, match="was made for a model with embedding width"):
        run_study("quantization", job(tmp_path, files=other))
    done = run_study("quantization", job(tmp_path, files=files))
    exact, coarse = check(done, tmp_path, "quantization")["files"]
    assert exact["cosines"]["json"] == pytest.approx([1.0] * 8, abs=1e-4)
    assert max(coarse["cosines"]["json"]) < 0.99999 and min(coarse["cosines"]["json"]) > 0.9
    assert exact["followed"]["reference"]["share"] >= 0.6 and exact["followed"]["random"]["share"] == 0


def test_compound_takes_three_by_name(tmp_path):
    with pytest.raises(CatalogError, match="2 are named"):
        run_study("compound", job(tmp_path, wanted=("json", "title")))
    small = job(tmp_path, wanted=("lowercase", "one_sentence", "no_comma"), n=2)
    (found,) = check(run_study("compound", small), tmp_path, "compound")["triples"]
    assert set(found["parts"]["best"]) == {"lowercase", "one_sentence", "no_comma"}
    assert set(found["best"]) >= {"one layer", "different layers", "best"}


def test_layers(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(LocalsteerError, match="checkpoint"):
        run_study("layers", job(tmp_path))
    done = run_study("layers", job(tmp_path, checkpoint=bundled.checkpoint_folder("instruct")))
    figures = check(done, tmp_path, "layers")
    assert np.array(figures["engine"]).shape == np.array(figures["torch"]).shape == (1, 8)
    assert figures["mean_difference"] <= 0.2
