"""The one kind of error that is the user's to mend.

Whatever a person can get wrong (a folder, a flag, a prompt, a field) raises `UserError` with one
line that names the thing and the limit. `generate.py` prints that line and exits with code 2; the
server answers 400 with it. Every other exception is a bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in what was asked; the message is one clear line."""
