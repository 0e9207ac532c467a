"""The HTTP server's two sides. Nothing in this package but engine_process.py needs torch.

settings.py        what the command line says, for whoever asks
app.py             the FastAPI application: routes, errors, the gate
gate.py            in front of every route: key, body limit, deadline, clients that leave
api_errors.py      every failure as the OpenAI API's error object
openapi.py         the server's own description; fields.py: what each field means, and its limits
native_api.py      the routes that SGLang has; native_generate.py: what /generate does; native_protocol.py: what they take and say
sse.py             streams, as server-sent events
openai_api.py      the routes that OpenAI has; openai_protocol.py: what they take; openai_answers.py, openai_shapes.py, logprobs.py:
                   what they say; openai_route.py: how they refuse
chat.py            a chat becomes a prompt, with what its answer must be
reader.py          a model's text taken apart: tool_calls.py takes out calls, ../reasoning.py thoughts; harmony.py both, of gpt-oss
page.py            the page, and the events that it lives from
metrics.py         /metrics
params.py          sampling parameters as JSON

client.py          EngineClient: the engine as asyncio sees it; restarts it
answers.py         what one request has been told, until its reader takes it
child.py           the engine's process, and the socket to it
messages.py        what the two processes say to each other
engine_process.py  the engine's side
"""
