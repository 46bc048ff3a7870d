"""The plugin in a real vLLM, against PyTorch hooks in float32: python tests/vllm/check.py FOLDER [CHECK ...]

In an environment of its own (tests/vllm/run makes it). FOLDER keeps the checkpoint for the next time. Each
check is a function below whose name begins with `check_`; the last line counts them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

WORK = Path(sys.argv[1] if len(sys.argv) > 1 else "vllm-check").resolve()
VECTORS = WORK / "vectors"
os.environ |= {
    "LOCALSTEER_VECTORS": str(VECTORS),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}

import torch  # noqa: E402
import transformers  # noqa: E402
from checkpoint import write_checkpoint  # noqa: E402

from localsteer import ControlVector, packs  # noqa: E402
from localsteer.extract.torch_steering import steer_hooks  # noqa: E402
from localsteer.vllm.asked import plan_of  # noqa: E402
from localsteer.vllm.shelf import VectorShelf  # noqa: E402

CLOSE = 1e-4  # of log probabilities: float32 sums in another order
N_LAYER, N_EMBD = 30, 576
N_TOKENS = 8
LAYER = 128  # tokens of a cache layer on a CPU: a shorter prompt is never found in the prefix cache
MODEL_LENGTH, CHUNK = 1024, 64
QUESTION = "Tell me about foxes."
LONG = " ".join(["The fox is a small animal that lives in the woods and hunts at night."] * 14) + " Why?"
STEERINGS: list[dict[str, Any]] = [
    {},
    {"steer": "json"},
    {"steer": "title"},
    {"steer": "wide"},
    {"steer": "wide", "positions": "prompt", "strength": 0.5},
    {"steer": "wide", "positions": "last", "layer": [3, 14]},
    {"steer": "wide", "positions": "generation", "mode": "add", "strength": 0.05},
    {"steer": "wide", "mode": "ablate"},
    {"steer": "gate"},
    {"steer": ["wide", "other", "gate"], "strength": [0.5, 0.8, 1], "layer": 12, "positions": "all"},
]


# --- what is compared --------------------------------------------------------------------------------------


def write_vectors() -> None:
    """Those of the pack, and random ones of every mode."""
    VECTORS.mkdir(parents=True, exist_ok=True)
    for path in Path(packs.__file__).parent.glob("SmolLM2-135M-Instruct/*.gguf"):
        (VECTORS / path.name).write_bytes(path.read_bytes())
    draw = np.random.default_rng(0)
    ones, zeros = np.ones(N_LAYER), np.zeros(N_LAYER)
    for name in ("wide", "other"):
        directions = draw.standard_normal((N_LAYER, N_EMBD))
        statistics = (20 * ones, zeros, ones, ones)
        ControlVector(directions, *statistics, layers=(10, 20), name=name).save(VECTORS / f"{name}.gguf")
    reader, writer = draw.standard_normal((2, N_EMBD))
    gate = {"mean_gate": 1.0, "n_layer": N_LAYER, "one_sided": True, "cap": 40.0, "name": "gate"}
    ControlVector.from_gate(12, 0.1 * reader, 0.5, writer, **gate).save(VECTORS / "gate.gguf")
    other = ControlVector(draw.standard_normal((12, 64)), *[None] * 4, layers=(3,), mode="add", name="small")
    other.save(VECTORS / "small.gguf")
    (VECTORS / "broken.gguf").write_bytes(b"GGUF and no more")


@lru_cache(maxsize=1)
def reference() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(WORK / "smol", dtype=torch.float32).eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(WORK / "smol")


def prompt_ids(question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def expected(prompt: Sequence[int], reply: Sequence[int], steering: dict[str, Any]) -> np.ndarray:
    """(n_reply,) log probabilities of the reply's tokens, by hooks in PyTorch."""
    plan = plan_of(steering, VectorShelf(VECTORS), n_layer=N_LAYER, n_embd=N_EMBD)
    ids = torch.tensor([[*prompt, *reply]])
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        if plan is not None:
            stack.enter_context(steer_hooks(reference(), plan, n_prompt=len(prompt)))
        logits = reference()(input_ids=ids, use_cache=False).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[range(len(reply)), list(reply)].numpy()


@lru_cache(maxsize=1)
def engine() -> Any:
    import vllm

    return vllm.LLM(
        model=str(WORK / "smol"), dtype="float32", max_model_len=MODEL_LENGTH, max_num_seqs=16,
        max_num_batched_tokens=CHUNK, enable_prefix_caching=True, enable_chunked_prefill=True,
    )  # fmt: skip


def ask(jobs: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> list[Any]:
    """All at once; greedy."""
    import vllm

    settings = [
        vllm.SamplingParams(
            temperature=0, max_tokens=N_TOKENS, logprobs=1, ignore_eos=True, extra_args=dict(steering)
        )
        for _, steering in jobs
    ]
    prompts = [{"prompt_token_ids": list(prompt)} for prompt, _ in jobs]
    return engine().generate(prompts, settings, use_tqdm=False)


def difference(prompt: Sequence[int], output: Any, steering: dict[str, Any]) -> float:
    """The largest, between vLLM's log probabilities and the reference's of the same tokens."""
    reply = list(output.outputs[0].token_ids)
    ours = [row[token].logprob for row, token in zip(output.outputs[0].logprobs, reply, strict=True)]
    return float(np.abs(np.array(ours) - expected(prompt, reply, steering)).max())


def agree(jobs: Sequence[tuple[Sequence[int], dict[str, Any]]]) -> list[Any]:
    outputs = ask(jobs)
    worst = max(
        difference(prompt, output, steering) for (prompt, steering), output in zip(jobs, outputs, strict=True)
    )
    print(f"    largest difference {worst:.1e}")
    assert worst < CLOSE, worst
    return outputs


# --- in this process ---------------------------------------------------------------------------------------


def check_every_way_of_steering_alone() -> None:
    replies = [agree([(prompt_ids(QUESTION), steering)])[0] for steering in STEERINGS]
    texts = {output.outputs[0].text for output in replies}
    assert len(texts) > len(STEERINGS) // 2  # they do steer


def check_many_plans_in_one_batch() -> None:
    questions = (QUESTION, "What is rain?", LONG[:300])
    agree([(prompt_ids(question), steering) for steering in STEERINGS for question in questions])


def check_a_prompt_in_chunks() -> None:
    prompt = prompt_ids(LONG)
    assert len(prompt) > 3 * CHUNK
    agree([(prompt, steering) for steering in STEERINGS[1:6]])


def check_a_cached_prompt_is_that_of_its_steering() -> None:
    """Layers of a steered prompt must not serve a plain request, nor another steering or other positions."""
    prompt = prompt_ids(LONG + " How?")
    assert len(prompt) > LAYER + 16
    for steering in (*STEERINGS, *STEERINGS):
        output = agree([(prompt, steering)])[0]
    assert output.num_cached_tokens >= LAYER  # the second time they were cached


def check_a_reply_that_is_prompt_in_the_next_turn() -> None:
    """Under `prompt` its tokens were plain when they were generated, and are steered now."""
    for steering in (STEERINGS[4], STEERINGS[5], STEERINGS[6]):
        prompt = prompt_ids(LONG + " Say more.")[: 2 * LAYER - 4]
        reply = ask([(prompt, steering)])[0].outputs[0].token_ids
        agree([([*prompt, *reply, *prompt_ids(QUESTION)], steering)])


def check_several_replies_to_one_prompt() -> None:
    import vllm

    prompt = prompt_ids(QUESTION)
    settings = vllm.SamplingParams(
        temperature=1,
        n=3,
        max_tokens=N_TOKENS,
        logprobs=1,
        ignore_eos=True,
        extra_args={"steer": "wide"},
    )
    (output,) = engine().generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    for one in output.outputs:
        reply = list(one.token_ids)
        ours = [row[token].logprob for row, token in zip(one.logprobs, reply, strict=True)]
        assert np.abs(np.array(ours) - expected(prompt, reply, {"steer": "wide"})).max() < CLOSE
    assert settings.extra_args == {"steer": "wide"}  # the caller's are left alone


def check_a_vector_that_changes_on_disk_is_another_one() -> None:
    prompt = prompt_ids(LONG + " When?")
    path, before = VECTORS / "wide.gguf", (VECTORS / "wide.gguf").read_bytes()
    try:
        agree([(prompt, {"steer": "wide"})])
        ControlVector.load(path).at(layer=5, strength=0.7).save(path)
        agree([(prompt, {"steer": "wide"})])
    finally:
        path.write_bytes(before)


REFUSED = [
    ({"steer": "../wide"}, "not the name of a vector"),
    ({"steer": "/etc/passwd"}, "not the name of a vector"),
    ({"steer": "wide/../wide"}, "not the name of a vector"),
    ({"steer": "wide\n"}, "not the name of a vector"),
    ({"steer": ""}, "not the name of a vector"),
    ({"steer": "jsonn"}, "choose one of"),
    ({"steer": "small"}, "was made for a model with embedding width 64"),
    ({"steer": "broken"}, "broken"),
    ({"steer": []}, "send 1 to 16 names"),
    ({"steer": ["wide", "wide"]}, "each once"),
    ({"steer": 3}, "not the name of a vector"),
    ({"steer": "wide", "strength": "strong"}, "strength: 'strong' is not a number"),
    ({"steer": "wide", "strength": float("nan")}, "is not between"),
    ({"steer": "wide", "strength": 1e38}, "is not between"),
    ({"steer": "wide", "strength": [1, 2]}, "2 values for 1 vectors"),
    ({"steer": "wide", "positions": "everywhere"}, "unknown positions 'everywhere'"),
    ({"steer": "wide", "mode": "push"}, "unknown mode 'push'"),
    ({"steer": "wide", "mode": "gate"}, "no learned gate"),
    ({"steer": "wide", "layer": 30}, "out of range"),
    ({"steer": "wide", "layer": [1.5]}, "not a layer's number"),
    ({"strength": 0.5}, "strength needs steer"),
    ({"localsteer_plan": "x"}, "not for requests"),
]


def check_bad_requests_are_refused_before_they_run() -> None:
    from vllm.exceptions import VLLMValidationError

    for steering, says in REFUSED:
        try:
            ask([(prompt_ids(QUESTION), steering)])
        except VLLMValidationError as error:
            assert says in str(error), (steering, str(error))
            assert str(WORK) not in str(error) and "\n" not in str(error), str(error)
        else:
            raise AssertionError(f"{steering} was taken")
    agree([(prompt_ids(QUESTION), STEERINGS[1])])  # and nothing is broken by them


# --- over HTTP ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", WORK / "smol", "--dtype",
        "float32", "--max-model-len", MODEL_LENGTH, "--host", "127.0.0.1", "--port", port,
        "--served-model-name", "smol",
    ]  # fmt: skip
    log = (WORK / "serve.log").open("w")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen([*map(str, words)], stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            assert process.poll() is None, (WORK / "serve.log").read_text()[-2000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def posted(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    words = json.dumps(body, allow_nan=False).encode()
    request = urllib.request.Request(url, words, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def check_over_http() -> None:
    prompt = prompt_ids(QUESTION)
    with serving() as url:
        for steering in STEERINGS:
            body = {
                "model": "smol", "prompt": prompt, "max_tokens": N_TOKENS, "temperature": 0, "logprobs": 1,
                "ignore_eos": True, "return_token_ids": True, "vllm_xargs": steering,
            }  # fmt: skip
            status, answer = posted(f"{url}/v1/completions", body)
            assert status == 200, answer
            choice = answer["choices"][0]
            theirs = expected(prompt, choice["token_ids"], steering)
            worst = np.abs(np.array(choice["logprobs"]["token_logprobs"]) - theirs).max()
            assert worst < CLOSE, (steering, worst)
        chat = {
            "model": "smol",
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 40,
            "temperature": 0,
        }
        status, answer = posted(f"{url}/v1/chat/completions", {**chat, "vllm_xargs": {"steer": "json"}})
        assert status == 200 and answer["choices"][0]["message"]["content"].startswith("{"), answer
        for steering, says in REFUSED:
            if steering.get("strength") != steering.get("strength"):  # JSON has no NaN
                continue
            status, answer = posted(f"{url}/v1/chat/completions", {**chat, "vllm_xargs": steering})
            assert status == 400, (steering, status, answer)
            assert steering == {"steer": []} or says in answer["error"]["message"], (steering, answer)


def main() -> int:
    WORK.mkdir(parents=True, exist_ok=True)
    write_checkpoint(WORK / "smol")
    write_vectors()
    checks = {name: check for name, check in globals().items() if name.startswith("check_")}
    failed = 0
    wanted = sys.argv[2:] or list(checks)
    for name in wanted:
        started = time.monotonic()
        try:
            checks[name]()
            print(f"ok   {name} ({time.monotonic() - started:.0f} s)", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAIL {name}", flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
