"""`localsteer serve`: the OpenAI API over HTTP, each request with its own steering.

    app.py        puts the parts together            run.py       uvicorn, signals, grace
    schemas.py    what a request may hold            limits.py    how much of it
    models.py     what a model's name means           served.py    one that is loaded
    pool.py       which are loaded                   holding.py   which request uses which
    steering.py   the folder of vectors
    replies.py    from a request to tickets          answers.py   from tickets to JSON, streaming.py to events
    chat.py, ensured.py, completions.py, embeddings.py, vectors.py, pages.py: routes
    security.py   who may ask                        errors.py    how a refusal looks
    formats.py    response_format                    tools.py     tool calls        metrics.py   Prometheus

Needs the extra: pip install "localsteer[serve]". docs/server.md shows it from outside.
"""
