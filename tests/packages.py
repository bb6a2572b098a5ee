"""Small distributions, installed as an installer would leave them."""

from __future__ import annotations

from pathlib import Path


def install(
    folder: Path, name: str, entry_points: dict[str, dict[str, str]], module: str, version: str = "1.0"
) -> None:
    """Puts a distribution of one module into ``folder``, which has to be on the path to be found.

    Args:
        folder: where modules and metadata go.
        name: of the distribution; its module has the same with underscores.
        entry_points: by group, names to ``module:attribute``.
        module: the module's source.
        version: of the distribution.
    """
    stem = name.replace("-", "_")
    (folder / f"{stem}.py").write_text(module)
    info = folder / f"{stem}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
