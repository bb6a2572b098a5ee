"""Does a server's model generate text? Only then there are tokens to measure."""

from __future__ import annotations

from longspan import Client
from longspan.v1.inference_pb2 import TASK_GENERATE, GetModelInfoResponse


def require_generation(client: Client, model: GetModelInfoResponse) -> None:
    """Ends with the server's own refusal if its model does not generate.

    Args:
        client: of the server.
        model: as it describes itself; a server that tells no tasks is older than encoders.

    Raises:
        longspan.LongspanError: it has another task; the sentence says which.
    """
    if model.tasks and TASK_GENERATE not in model.tasks:
        client.generate([0], max_tokens=1)
