"""What a search for a vector costs the replies of the same server: python benchmarks/making.py [-m MODEL]

The same request, again and again, before a job (/v1/jobs), while it runs, and after it. Run it with nothing
else running: where before and after differ, it was not. Exit status 1 where replies take more than BOUND
times as long beside a job.

    python benchmarks/making.py -m bundled --learn title

has a vector learned instead, from the request to its end, and asks for a reply by it: a minute, with PyTorch.
Exit status 1 where it was not offered, or the reply does not follow.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import httpx

BOUND = 1.5
N = 8  # replies of each kind
N_TOKENS = 64
CHAT = {
    "messages": [{"role": "user", "content": "Tell me about the history of bridges."}],
    "max_tokens": N_TOKENS,
    "temperature": 0,
}
SENTENCE = "Answer as a list of three facts."


def seconds_of(client: httpx.Client) -> float:
    started = time.perf_counter()
    client.post("/v1/chat/completions", json=CHAT).raise_for_status()
    return time.perf_counter() - started


def measured(client: httpx.Client) -> dict[str, object]:
    seconds_of(client)  # the prompt is in the cache from here on
    before = [seconds_of(client) for _ in range(N)]
    job = client.post("/v1/jobs", json={"instruction": SENTENCE})
    job.raise_for_status()
    address = f"/v1/jobs/{job.json()['id']}"
    while not (doing := client.get(address).json()["doing"]) or "loading" in doing:
        time.sleep(0.1)
    beside = [seconds_of(client) for _ in range(N)]
    at = client.get(address).json()
    client.delete(address), client.delete(address)
    while client.get(address).json()["status"] == "stopping":
        time.sleep(0.1)
    after = [seconds_of(client) for _ in range(N)]
    return {
        "before_seconds": round(statistics.median(before), 3),
        "beside_a_job_seconds": round(statistics.median(beside), 3),
        "after_seconds": round(statistics.median(after), 3),
        "ratio": round(statistics.median(beside) / statistics.median([*before, *after]), 3),
        "the_search_was": f"{at['status']}: {at['doing']} {at['best']}",
    }


def learned(client: httpx.Client, instruction: str, catalog: str) -> dict[str, object]:
    """A vector that is learned by a job, and a reply that it steers."""
    from localsteer.catalog import load_catalog
    from localsteer.verify import verify

    rule = load_catalog(catalog).get(instruction)
    answer = client.post("/v1/jobs", json={"instruction": instruction, "method": "learn", "name": "learned"})
    answer.raise_for_status()
    address = f"/v1/jobs/{answer.json()['id']}"
    while (job := client.get(address).json())["status"] in ("queued", "running"):
        time.sleep(0.5)
    if job["vector"] is None:
        return {"status": job["status"], "error": job["error"], "follows": False}
    reply = client.post("/v1/chat/completions", json={**CHAT, "steering": ["learned"], "max_tokens": 256})
    text = reply.json()["choices"][0]["message"]["content"]
    follows = verify(rule.verifier, text, rule.kwargs_for(CHAT["messages"][0]["content"]))
    return {
        "status": job["status"],
        "seconds": job["seconds"],
        "scores": job["result"]["scores"],
        "follows": follows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smol")
    parser.add_argument("--learn", metavar="ID", help="an instruction of the catalogue that has a verifier")
    options = parser.parse_args()
    model = options.model
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "localsteer",
            "serve",
            "-m",
            model,
            "--vectors",
            folder,
            "--port",
            "0",
        ]
        process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True)
        try:
            text = ""
            while not text.endswith("}\n"):
                line = process.stdout.readline()
                assert line, "the server did not start"
                text += line
            with httpx.Client(base_url=json.loads(text)["url"], timeout=600, trust_env=False) as client:
                catalog = "bundled" if model.startswith("bundled") else "general"
                figures = learned(client, options.learn, catalog) if options.learn else measured(client)
        finally:
            process.terminate()
            process.wait()
    figures |= {"model": model, "tokens": N_TOKENS, "n": N, "python": platform.python_version()}
    print(json.dumps(figures))
    return int(not figures["follows"] if options.learn else figures["ratio"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())
