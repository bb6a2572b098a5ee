"""The application for a Serve config: ``import_path: longspan.ray:app``. Needs ``longspan[ray,server]``."""

from server.ray.deploy import app

__all__ = ["app"]
