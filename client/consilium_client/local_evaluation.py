"""Evaluation of the global or the site's personal model: figures and pictures that stay here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilium_client.home import SiteHome
from consilium_client.store import StudyStore
from consilium_client.training.cases import Array, PatientCohort
from consilium_client.training.evaluation import Evaluation
from consilium_client.training.session import TrainingSession
from consilium_common.files import private_folder, write_atomic
from consilium_common.models.exchange import CONTROL
from consilium_common.models.weights import pack, unpack
from consilium_common.study import Study

_PICTURES = 2


def evaluate(
    home: SiteHome,
    session: TrainingSession,
    cohort: PatientCohort,
    weights: bytes,
    *,
    site: str,
    rounds_done: int,
    last: bool,
    before_case: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on the site's test patients and write a report folder.

    Writes ``reports/<digest>/round-NNNNN.json``, of the starting model too (``round-00000.json``);
    after the last round also ``evaluation.json``, pictures of a few cases and the model. Where the
    site has a personal model the report is that model's and says so, and ``personal.safetensors``
    is written beside the global one. What ``before_case`` raises ends it.

    Returns
    -------
    Evaluation
        What the figures that may leave are made of: the personal model's, where there is one. In
        a private study always the global model's: the noise of a score is made for the patients
        who are scored, and a personal model has seen those who train without any noise.
    """
    study = session.study
    received = unpack(weights)
    model = {name: received[name] for name in received if not name.startswith(CONTROL)}
    kept = StudyStore(home).kept(study.digest)
    personal = None if kept is None else session.personal(model, unpack(kept))
    shown = model if personal is None else personal
    evaluation = session.evaluate(shown, "test", before_case)
    released = evaluation
    figures = {
        "site": site,
        "study": study.digest,
        "name": study.name,
        "rounds_done": rounds_done,
        "model": "global" if personal is None else "personal",
        **evaluation.to_dict(rows=True),
    }
    if personal is not None and study.privacy.mode != "none":
        released = session.evaluate(model, "test", before_case)
        figures["global"] = released.to_dict(rows=True)
    folder = private_folder(home.reports / study.digest[:16])
    content = json.dumps(figures, indent=2).encode()
    write_atomic(folder / f"round-{rounds_done:05d}.json", content)
    if last:
        if study.task.kind == "segmentation":
            _write_pictures(folder, cohort, session, shown)
        write_atomic(folder / "evaluation.json", content)
        write_atomic(folder / "model.safetensors", pack(model))
        if personal is not None:
            write_atomic(folder / "personal.safetensors", pack(personal))
    return released


def _write_pictures(
    folder: Path,
    cohort: PatientCohort,
    session: TrainingSession,
    tensors: Mapping[str, NDArray[np.float32]],
) -> None:
    study = session.study
    if study.task.dimensions != 3:
        return
    from consilium_client.training.pictures import slice_picture

    cases = [case for patient in cohort.patients("test") for case in patient.cases]
    for index, case in enumerate(cases[:_PICTURES]):
        prediction = session.predict(tensors, case)
        picture = slice_picture(
            _as_radiologists_look(case.image(), study, leading=1),
            _as_radiologists_look(case.label(), study),
            _as_radiologists_look(prediction, study),
            study.task.classes,
            spacing=study.preprocessing.spacing,
        )
        write_atomic(folder / f"case-{index + 1}.png", picture)


def _as_radiologists_look(array: Array, study: Study, *, leading: int = 0) -> Array:
    """Turn an array so that a picture shows the patient's right on the left, and the front above.

    A picture's first axis runs to the right and its second upwards; ``leading`` axes come before.
    """
    turned = {"RAS": leading, "LPS": leading + 1}.get(study.preprocessing.orientation)
    return array if turned is None else np.flip(array, turned)
