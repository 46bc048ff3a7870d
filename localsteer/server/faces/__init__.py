"""The APIs beside OpenAI's chat (../chat.py), each a face of the same turns (../turns.py).

    responses.py   OpenAI's /v1/responses         anthropic.py  /v1/messages, /v1/messages/count_tokens
    ollama.py      Ollama's /api/chat, /api/generate; ollama_models.py: /api/tags, /api/show and their like

Beside each *_body.py says what its requests may hold, and how they become a ChatRequest.
"""
