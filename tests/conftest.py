"""Fixtures that several test files share: the tiny models, written once a session."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# `python -m pytest` puts the checkout first, whose localsteer/ has no native library: test what is installed
ROOT = Path(__file__).parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
from workers import take_share_of_cores, workers_for  # noqa: E402

take_share_of_cores()
from tiny_models import ARCHITECTURES, TinyModel, write_tiny  # noqa: E402

# readline, which pytest loads, sets them where a worker of pytest-xdist inherits them: tables would be cut
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# Tokenizers are used from forked helpers in some tests; their thread pool warns about it otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The first load of each tiny model in a process of its own would take a second each: tests/hostile/ alone.
os.environ.setdefault("LOCALSTEER_MODEL_CHECK", "header")
# A vector that is made on request would wait until the tests beside it have ended.
os.environ.setdefault("LOCALSTEER_NICE", "0")


# A shell that starts a job in the background lets it ignore Ctrl-C, and what the job starts inherits that.
# Children of a process with a handler of its own get the default back.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return workers_for(config)


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For the same reason: `python -m localsteer` in a child process looks in the current folder first."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """`tiny("llama")`: a random model of that architecture, as a checkpoint and as F32 GGUF."""
    directory = tmp_path_factory.mktemp("tiny-models")
    written: dict[str, TinyModel] = {}

    def model(arch: str) -> TinyModel:
        if arch not in written:
            pytest.importorskip("torch", reason="the tiny models are written with torch and transformers")
            written[arch] = write_tiny(arch, directory)
        return written[arch]

    return model


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_model(request: pytest.FixtureRequest, tiny: Callable[[str], TinyModel]) -> TinyModel:
    """Each of the four architectures in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def tiny_llama(tiny: Callable[[str], TinyModel]) -> TinyModel:
    return tiny("llama")


@pytest.fixture(scope="session")
def exact_bundled():
    """The bundled model in F32 and exact, so that a reply is the same whatever is decoded beside it."""
    from bundled_vectors import open_bundled

    from localsteer import bundled

    if not bundled.is_available():
        pytest.skip("this copy of the package holds no bundled model")
    with open_bundled(n_ctx=256, n_seq_max=32) as engine:
        yield engine


@pytest.fixture(scope="session")
def extracted(exact_bundled):
    """Vectors of the bundled model, by the id of the instruction."""
    from bundled_vectors import bundled_vectors

    return bundled_vectors(exact_bundled, ("no_comma", "title", "lowercase"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real models and data that lie beside the repository; a test that needs them skips without."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real models at {folder}")
    return folder
