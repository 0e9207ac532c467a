"""The HTTP server's two sides. Nothing in this package but engine_process.py needs torch.

settings.py        what the command line says, for whoever asks
app.py             the FastAPI application: routes, errors, the gate
gate.py            in front of every route: key, body limit, deadline, clients that leave
api_errors.py      every failure as the OpenAI API's error object
native_api.py      the routes that SGLang has
openai_api.py      the routes that OpenAI has
metrics.py         /metrics
params.py          sampling parameters as JSON

client.py          EngineClient: the engine as asyncio sees it; restarts it
answers.py         what one request has been told, until its reader takes it
child.py           the engine's process, and the socket to it
messages.py        what the two processes say to each other
engine_process.py  the engine's side
"""
