"""`site data show`: the picture of one case, from the cache, read first where it is not there."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import numpy as np

from consilium_client.data.ingest.run import ingest, using
from consilium_client.data.ingest.volume import Affine
from consilium_client.data.looking.montage import Channel, montage
from consilium_client.data.manifest import Manifest, load_manifest
from consilium_client.data.match import class_names
from consilium_client.data.schema import Case
from consilium_client.data.split import assign_splits, open_patient_key
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic


def show_case(home: SiteHome, case_id: str, out: Path | None = None) -> Path:
    """Write a case's picture and return where.

    Parameters
    ----------
    case_id : str
        As in cases.csv.
    out : Path, optional
        PNG to write (default: ``reports/show-<case>.png``). It shows a patient; it names none but
        by keyed hash.

    Raises
    ------
    ConsiliumError
        ``usage.case`` where cases.csv has no such case, ``data.*`` where it cannot be read.
    """
    manifest = load_manifest(home)
    case = _case(manifest, case_id)
    site = manifest.site
    with using(home):
        outcome = ingest(home, Manifest(site, (case,), manifest.root))
        for finding in outcome.findings:
            raise ConsiliumError(
                finding.code, finding.message, where=finding.where, hint=finding.hint
            )
        entry = outcome.entries[case.case_id]
        key = open_patient_key(home)
        patient = key.name(case.patient_id)
        split = assign_splits(manifest.cases, key, site.split)[patient]
        modalities = entry.modality.split(" + ")
        several = len(modalities) == len(entry.channels)
        channels = [
            Channel(
                name,
                entry.image(name),
                entry.facts[name],
                modalities[number if several else 0],
            )
            for number, name in enumerate(entry.channels)
        ]
        masked = entry.label_values is not None
        title = [f"patient {patient[:12]}", split]
        if not masked:
            title.append(f"class: {', '.join(class_names(case.label, site)) or 'none'}")
        title.append(_size(entry.shape, entry.affine if entry.spacing_known else None))
        picture = montage(
            channels,
            entry.label() if masked else None,
            {value: name for name, value in site.labels.items() if isinstance(value, int)},
            entry.affine,
            title="  ·  ".join(title),
            spacing_known=entry.spacing_known,
        )
    path = out or home.reports / f"show-{_file_name(case_id)}.png"
    write_atomic(path, picture)
    return path


def _case(manifest: Manifest, case_id: str) -> Case:
    for case in manifest.cases:
        if case.case_id == case_id:
            return case
    near = difflib.get_close_matches(case_id, [case.case_id for case in manifest.cases], 3)
    raise ConsiliumError(
        "usage.case",
        "This site has no case of this name.",
        where="cases.csv",
        hint=f"Did you mean {' or '.join(near)}?"
        if near
        else "`consilium site data list` names all cases.",
    )


def _file_name(case_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", case_id).strip(".")[:100] or "case"


def _size(shape: tuple[int, ...], affine: Affine | None) -> str:
    voxels = " × ".join(str(size) for size in shape)
    if affine is None:
        return f"{voxels} pixels"
    edges = np.linalg.norm(affine[:3, : len(shape)], axis=0)
    return f"{voxels} voxels of {' × '.join(f'{edge:.2g}' for edge in edges)} mm"
