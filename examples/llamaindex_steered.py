"""LlamaIndex's llama.cpp class with a steered model.

pip install llama-index-llms-llama-cpp
localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
python examples/llamaindex_steered.py MODEL.gguf json.gguf "Tell me about foxes."

LlamaCPP takes no instance: it loads a llama_cpp.Llama of its own and keeps it in `_model`. So it is made with
the vocabulary alone, and the steered model takes that one's place. LlamaCPP sends plain text, whatever the
model's template: messages_to_prompt and completion_to_prompt say how a model wants to be asked.
Verified with llama-index-llms-llama-cpp 0.7.0 and llama-index-core 0.14.25.
"""

from __future__ import annotations

import sys

import localsteer


def llama_index_model(llama: localsteer.SteeredLlama, **settings):
    """A LlamaCPP that asks `llama`, in the chat template of its model."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter
    from llama_index.llms.llama_cpp import LlamaCPP

    formatter = Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"], bos_token="", eos_token=""
    )

    def messages_to_prompt(messages) -> str:
        turns = [{"role": message.role.value, "content": message.content} for message in messages]
        return formatter(messages=turns).prompt

    def completion_to_prompt(question: str) -> str:
        return formatter(messages=[{"role": "user", "content": question}]).prompt

    model = LlamaCPP(
        model_path=llama.model_path,
        model_kwargs={"vocab_only": True},
        messages_to_prompt=messages_to_prompt,
        completion_to_prompt=completion_to_prompt,
        verbose=False,
        **settings,
    )
    model._model = llama
    return model


def main(model: str, vector_file: str, question: str) -> None:
    from llama_index.core.llms import ChatMessage

    vector = localsteer.ControlVector.load(vector_file)
    llama = localsteer.SteeredLlama(model, n_ctx=512, verbose=False)
    llm = llama_index_model(llama, temperature=0, max_new_tokens=100, context_window=512)

    print("plain:  ", llm.complete(question).text)
    with llama.steering([vector]):
        print("steered:", llm.complete(question).text)
        print("chat:   ", llm.chat([ChatMessage(role="user", content=question)]).message.content)
        stream = llm.stream_complete(question)  # keeps the steering that it was asked for under
    print("stream: ", "".join(chunk.delta for chunk in stream))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
