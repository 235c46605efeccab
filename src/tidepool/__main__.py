"""``python -m tidepool``, where the command isn't on the path."""

from tidepool.cli import app

app()
