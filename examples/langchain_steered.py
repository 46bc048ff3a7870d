"""LangChain's llama.cpp classes with a steered model.

pip install langchain-community
localsteer extract --gguf MODEL.gguf --instruction json -o json.gguf
python examples/langchain_steered.py MODEL.gguf json.gguf "Tell me about foxes."

LlamaCpp and ChatLlamaCpp take no instance: each loads a llama_cpp.Llama of its own and keeps it in the field
`client`. So they are made with the vocabulary alone, and the steered model takes that one's place.
Verified with langchain-community 0.4.2 and langchain-core 1.7.2.
"""

from __future__ import annotations

import sys

import localsteer


def chat_model(llama: localsteer.SteeredLlama, **settings):
    """A ChatLlamaCpp that asks `llama`. settings: temperature, max_tokens, stop, ..."""
    from langchain_community.chat_models import ChatLlamaCpp

    chat = ChatLlamaCpp(model_path=llama.model_path, vocab_only=True, verbose=False, **settings)
    chat.client = llama
    return chat


def text_model(llama: localsteer.SteeredLlama, **settings):
    """A LlamaCpp that asks `llama`."""
    from langchain_community.llms import LlamaCpp

    model = LlamaCpp(model_path=llama.model_path, vocab_only=True, verbose=False, **settings)
    model.client = llama
    return model


def main(model: str, vector_file: str, question: str) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate

    vector = localsteer.ControlVector.load(vector_file)
    llama = localsteer.SteeredLlama(model, n_ctx=512, verbose=False)
    settings = {"temperature": 0, "max_tokens": 100, "repeat_penalty": 1.0}
    prompt = ChatPromptTemplate.from_messages([("user", "{question}")])
    chain = prompt | chat_model(llama, **settings) | StrOutputParser()

    print("plain:  ", chain.invoke({"question": question}))
    with llama.steering([vector]):
        print("steered:", chain.invoke({"question": question}))
    # LangChain asks for a stream when its first piece is read: steer until then, or read it inside a `with`
    llama.steer([vector])
    print("stream: ", "".join(chain.stream({"question": question})))
    print("text:   ", text_model(llama, **settings).invoke(question))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
