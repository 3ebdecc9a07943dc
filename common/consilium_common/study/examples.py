"""The studies that are shipped as examples, by name."""

from __future__ import annotations

from pathlib import Path

from consilium_common.errors import ConsiliumError

#: The folder of the examples; each is a commented YAML file, to be copied and changed.
FOLDER = Path(__file__).parent / "examples"


def example_files() -> list[Path]:
    """Return the file of every shipped example, sorted by name; the name is the file's stem."""
    return sorted(FOLDER.glob("*.yaml"))


def example_study(name: str) -> Path:
    """Return the file of one example.

    Raises
    ------
    ConsiliumError
        ``study.no-example``, with the names there are.
    """
    found = {path.stem: path for path in example_files()}
    if name not in found:
        raise ConsiliumError(
            "study.no-example",
            f"There is no example {name!r}.",
            hint=f"There are {', '.join(found)}.",
        )
    return found[name]
