"""One prompt, plain and steered, then the same vector at other settings.

localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
python examples/steer.py MODEL.gguf json.gguf "Tell me about foxes."
"""

from __future__ import annotations

import sys

import localsteer


def main(model: str, vector_file: str, prompt: str) -> None:
    vector = localsteer.ControlVector.load(vector_file)
    greedy = localsteer.Sampling(temp=0)
    with localsteer.Engine(model) as engine:
        print("plain:  ", engine.generate(prompt, sampling=greedy, max_tokens=100).text)
        print("steered:", engine.generate(prompt, steer=[vector], sampling=greedy, max_tokens=100).text)
        # many settings in one batch, each sequence with its own
        settings = [vector.at(strength=strength) for strength in (0.5, 1.0, 1.5)]
        replies = engine.generate_batch(
            [prompt] * len(settings), steer=[[vector] for vector in settings], sampling=greedy, max_tokens=100
        )
        for setting, reply in zip(settings, replies, strict=True):
            print(f"strength {setting.strength}: {reply.text}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
