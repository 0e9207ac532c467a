"""The errors that are not bugs of ours.

Whatever a person can get wrong (a folder, a flag, a prompt, a field) raises `UserError` with one
line that names the thing and the limit. `generate.py` prints that line and exits with code 2; the
server answers 400 with it. `EngineFailed` says that the device has failed and this engine answers no more.
Every other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in what was asked; the message is one clear line."""


class EngineFailed(RuntimeError):
    """A step has failed; all requests have ended with an error, and no new ones are taken."""
