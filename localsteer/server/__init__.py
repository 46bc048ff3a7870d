"""`localsteer serve`: the APIs of OpenAI, Anthropic and Ollama, each request with its own steering.

    app.py        puts the parts together            run.py       uvicorn, signals, grace
    schemas.py    what a request may hold            limits.py    how much of it
    models.py     what a model's name means           served.py    one that is loaded
    pool.py       which are loaded                   holding.py   which request uses which
    steering.py   the folder of vectors
    replies.py    from a request to tickets          answers.py   from tickets to JSON, streaming.py to events
    turns.py      one turn of a conversation, whichever API asked; ensured.py where it is checked; parts.py
    chat.py       the face of chat completions       faces/       those of the other three APIs
    completions.py, embeddings.py, vectors.py, pages.py: further routes
    security.py   who may ask                        errors.py    what went wrong, shapes.py how it looks
    fields.py     which fields do what               reading.py   from bytes to a checked request
    formats.py    response_format                    tools.py     tool calls        metrics.py   Prometheus

Needs the extra: pip install "localsteer[serve]". docs/server.md and docs/clients.md show it from outside.
"""
