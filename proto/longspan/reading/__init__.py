"""Reading of documents that are longer than the model's context, through the client alone.

A document is cut into passages of so many tokens, which overlap, and read by many short requests:

- ``map-reduce``: every passage is asked; the answers that their passages tell are merged into one.
- ``hierarchical``: the same, merged within each section of the document first.
- ``extractive``: passages are ranked by how likely they make the question; the best are read together.

All three cite the passages that make the answer more likely. ``longspan read`` is this as a command::

    async with AsyncClient() as client:
        reading = await read(client, Path("manual.txt").read_bytes(), "Who wrote it?")
"""

from longspan.reading.reader import read
from longspan.reading.types import METHODS, Citation, Method, Passage, Reading, ReadOptions, Spent

__all__ = ["METHODS", "Citation", "Method", "Passage", "ReadOptions", "Reading", "Spent", "read"]
