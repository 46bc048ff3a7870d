"""The plain openai package against `localsteer serve`: steering by the model's name, or by a field.

pip install openai "localsteer[serve]"
localsteer extract --gguf MODEL.gguf --instruction json -o vectors/json.gguf
localsteer serve -m MODEL.gguf --vectors vectors/
python examples/openai_client.py http://127.0.0.1:8080/v1 json "Tell me about foxes."

Verified with openai 3.54.0.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(base_url: str, vector: str, question: str) -> None:
    client = OpenAI(base_url=base_url, api_key=os.environ.get("LOCALSTEER_API_KEY", "none"))
    # every vector is listed as MODEL+VECTOR, the models themselves without a plus
    model = next(each.id for each in client.models.list() if "+" not in each.id)
    messages = [{"role": "user", "content": question}]

    def ask(name: str, **more) -> str:
        reply = client.chat.completions.create(
            model=name, messages=messages, temperature=0, max_tokens=100, **more
        )
        return reply.choices[0].message.content

    print("plain:  ", ask(model))
    print("by name:", ask(f"{model}+{vector}"))
    steering = [{"name": vector, "positions": "prompt"}]
    print("by field:", ask(model, extra_body={"steering": steering}))
    stream = client.chat.completions.create(
        model=f"{model}+{vector}", messages=messages, temperature=0, max_tokens=100, stream=True
    )
    print("stream: ", "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
