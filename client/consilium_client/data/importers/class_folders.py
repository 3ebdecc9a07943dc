"""Pictures sorted into one folder per class; every picture counts as a patient of its own."""

from __future__ import annotations

from pathlib import Path

from consilium_client.data.importers.base import NO_PATIENTS, Found, new_case
from consilium_client.data.importers.pairs import is_pair_folder
from consilium_client.data.ingest.picture import SUFFIXES
from consilium_client.data.match import written_classes
from consilium_common.errors import ConsiliumError


class ClassFolderImporter:
    """Reads ``<class>/<picture>`` with PNG, JPEG, TIFF or BMP pictures."""

    name = "folders"
    understands: frozenset[str] = frozenset()

    def detect(self, folder: Path) -> str | None:
        """See :class:`~consilium_client.data.importers.base.Importer`."""
        if not folder.is_dir():
            return None
        filled = [child for child in _folders(folder) if any(map(_is_picture, child.iterdir()))]
        if all(is_pair_folder(child.name) for child in filled):
            return None  # pictures and their masks, no classes
        return f"{len(filled)} folders of pictures" if len(filled) >= 2 else None

    def cases(self, folder: Path) -> Found:
        """List the pictures by class.

        Raises
        ------
        ConsiliumError
            ``data.no-list`` when there are not two folders with pictures.
        """
        by_class = {
            child.name: sorted(path for path in child.iterdir() if _is_picture(path))
            for child in _folders(folder)
        }
        by_class = {name: pictures for name, pictures in by_class.items() if pictures}
        if len(by_class) < 2:
            raise ConsiliumError(
                "data.no-list",
                "There are not two folders with pictures, one per class.",
                where=str(folder),
                hint="Leave --format out: the layout is then detected.",
            )
        for name in by_class:
            _require_class(name, folder)
        cases = tuple(
            new_case(
                path,
                case_id=f"{name}/{path.name}",
                images={"image": f"{name}/{path.name}"},
                label=name,
            )
            for name, pictures in by_class.items()
            for path in pictures
        )
        return Found(
            root=folder,
            cases=cases,
            label_kind="class",
            labels={name: name for name in by_class},
            notes=(NO_PATIENTS,),
        )


def _require_class(name: str, folder: Path) -> None:
    if written_classes(name) != (name.strip(),):
        raise ConsiliumError(
            "data.name",
            "The folder's name cannot be a class: | and ; stand between classes, - for none.",
            where=str(folder / name),
            hint="Rename the folder.",
        )


def _folders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
