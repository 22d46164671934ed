"""Sources of a few rows that the converters' tests write."""

import json


def write(folder, *rows):
    """A file of rows, which are objects, or strings for lines as they are."""
    path = folder / "source.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
