"""What the command line says of the HTTP side, for whoever needs it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    served_model_name: str = "folio"
    api_key: str | None = None  # None: whoever reaches the port may ask
    max_body_bytes: int = 8 << 20
    max_prompts: int = 256  # of one request
    request_timeout: float = 600.0  # seconds, the wait in the queue included
    cors_origins: tuple[str, ...] = ()  # web pages from elsewhere that may ask
    tool_call_parser: str | None = None  # how the model says a tool call; None: as its chat template tells
    reasoning_parser: str | None = None  # how it says its thoughts; None: as its chat template tells
