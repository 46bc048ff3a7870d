"""llama-cpp-python code, steered: localsteer.SteeredLlama in place of llama_cpp.Llama.

localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
python examples/drop_in.py MODEL.gguf json.gguf "Tell me about foxes."
"""

from __future__ import annotations

import sys

import localsteer


def main(model: str, vector_file: str, question: str) -> None:
    vector = localsteer.ControlVector.load(vector_file)
    llama = localsteer.SteeredLlama(model, n_ctx=512, verbose=False)
    messages = [{"role": "user", "content": question}]

    def ask() -> str:
        reply = llama.create_chat_completion(messages, temperature=0, max_tokens=100)
        return reply["choices"][0]["message"]["content"]

    print("plain:  ", ask())
    with llama.steering([vector]):
        print("steered:", ask())
    # from here on every call is steered, until llama.unsteer()
    llama.steer([vector.at(positions="prompt")])
    print("prompt: ", ask())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
