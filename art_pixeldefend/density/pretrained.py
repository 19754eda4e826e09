"""Models that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def names() -> list[str]:
    """The bundled models."""
    return sorted(file.stem for file in WEIGHTS.glob("*.safetensors"))


def path(name: str) -> Path:
    """Where the weights of the bundled model ``name`` are; its card is the ``.md`` file beside them.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in names():
        raise ValueError(f"name must be a bundled model ({', '.join(names())}), got {name!r}")
    return WEIGHTS / f"{name}.safetensors"
