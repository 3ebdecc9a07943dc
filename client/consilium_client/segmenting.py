"""One case of this site segmented by a study's final model: back onto the image as it came."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_common.console import command, note, result
from consilium_common.errors import ConsiliumError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from consilium_client.data.cohort import CaseData, Cohort
    from consilium_common.study import Study

Form = Literal["nifti", "seg"]
_MODEL: Final = "model.safetensors"
#: Where the strategy gives each site a model of its own, which the report then shows.
_PERSONAL: Final = "personal.safetensors"


@dataclass(frozen=True)
class Segmented:
    """What was written.

    Parameters
    ----------
    study : Study
        Whose final model drew it.
    path : Path
        The file.
    form : str
        ``nifti`` or ``seg``.
    voxels : dict
        Voxels of each class but the background.
    """

    study: Study
    path: Path
    form: Form
    voxels: dict[str, int]


def segment_case(
    home: SiteHome, which: str, case_id: str, out: Path, form: Form | None = None
) -> Segmented:
    """Segment one case with a study's final model and write it on the original image's grid.

    Nothing leaves the site, and nothing of the study changes.

    Parameters
    ----------
    which : str
        Name of the study, or first digits of its digest.
    case_id : str
        As in cases.csv.
    out : Path
        New file.
    form : str, optional
        ``nifti`` or ``seg`` (DICOM SEG); None goes by the file's name.

    Raises
    ------
    ConsiliumError
        ``study.no-results``, ``study.ambiguous``, ``study.not-finished``, ``study.task``,
        ``data.unknown-case``, ``data.format``, ``usage.output``, ``state.exists``, and whatever is
        wrong with the site's data.
    """
    from consilium_client.data.cohort import open_cohort
    from consilium_common.files import require_new

    form = form or _form_of(out)
    require_new(out)
    study, weights = _final_model(home, which)
    if study.task.kind != "segmentation":
        raise ConsiliumError(
            "study.task",
            f"The study {study.name} does not segment: its task is {study.task.kind}.",
            hint="Name a segmentation study.",
        )
    cohort = open_cohort(home, study)
    case = _case(cohort, case_id)
    labels = case.to_original(_predicted(home, study, weights, cohort, case))
    _write(home, study, case, labels, out, form=form)
    voxels = {
        name: int((labels == index).sum()) for index, name in enumerate(study.task.classes) if index
    }
    return Segmented(study, out, form, voxels)


def _form_of(out: Path) -> Form:
    name = out.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith(".dcm"):
        return "seg"
    raise ConsiliumError(
        "usage.output",
        "The file's name does not tell its format.",
        where=str(out),
        hint="Call it .nii.gz for NIfTI or .dcm for DICOM SEG, or give --format.",
    )


def _final_model(home: SiteHome, which: str) -> tuple[Study, bytes]:
    """Return the study and its final model, as the last round's evaluation left it here."""
    from consilium_client.results import newest_evaluation
    from consilium_client.store import StudyStore

    found = newest_evaluation(home, which)
    path = Path(found["folder"]) / (_PERSONAL if found.get("model") == "personal" else _MODEL)
    decided = StudyStore(home).decision(found["study"])
    if not found["finished"] or not path.is_file() or decided is None:
        raise ConsiliumError(
            "study.not-finished",
            f"This site does not have the final model of {found['name']}: after "
            f"{found['rounds_done']} rounds the study is not finished here.",
            where=found["folder"],
            hint="The model comes with the last round; `consilium site studies` shows the state.",
        )
    return decided.study, path.read_bytes()


def _case(cohort: Cohort, case_id: str) -> CaseData:
    from consilium_client.data.split import SPLITS

    for split in SPLITS:
        for patient in cohort.patients(split):
            for case in patient.cases:
                if case.case_id == case_id:
                    return case
    raise ConsiliumError(
        "data.unknown-case",
        "The site's data has no such case.",
        where="cases.csv",
        hint="`consilium site data list` shows the cases.",
    )


def _predicted(
    home: SiteHome, study: Study, weights: bytes, cohort: Cohort, case: CaseData
) -> NDArray[Any]:
    from consilium_client.identity import SiteIdentity
    from consilium_client.training.session import TrainingSession
    from consilium_common.models.weights import unpack

    config = SiteIdentity.load(home).config
    session = TrainingSession(
        study,
        cohort,
        **config.compute(),
    )
    return session.predict(unpack(weights), case)


def _write(
    home: SiteHome, study: Study, case: CaseData, labels: NDArray[Any], out: Path, *, form: Form
) -> None:
    from consilium_client.data.export import Origin, export_dicom_seg, export_nifti
    from consilium_client.data.ingest.sources import Sources, read_image
    from consilium_client.data.manifest import load_manifest

    if form == "nifti":
        export_nifti(labels, case.original_affine, out)
        return
    manifest = load_manifest(home)
    listed = next(row for row in manifest.cases if row.case_id == case.case_id)
    # The first channel's place is the case's: see the ingest.
    source = Sources(manifest.root).find(listed.images[manifest.site.inputs[0]])
    if source.kind != "dicom":
        raise ConsiliumError(
            "data.format",
            "The case is no DICOM series, so a DICOM SEG has nothing to refer to.",
            where=source.where,
            hint="Write NIfTI: --format nifti.",
        )
    image, slices = read_image(source)
    origin = Origin(study.name, study.digest)
    export_dicom_seg(labels, image, slices, study.task.classes, out, origin=origin)


@command
def segment(
    study: Annotated[
        str, typer.Argument(help="Name of the finished study, or first digits of its digest.")
    ],
    case: Annotated[str, typer.Argument(help="case_id, as in cases.csv.")],
    out: Annotated[Path, typer.Option("--out", help="New file: .nii, .nii.gz or .dcm.")],
    form: Annotated[
        Form | None,
        typer.Option("--format", help="nifti or seg (DICOM SEG); by the file's name if absent."),
    ] = None,
    home: Annotated[
        Path, typer.Option("--home", envvar=HOME_VARIABLE, help="The site's state folder.")
    ] = Path("site"),
) -> None:
    """Segment one case with a study's final model, on the grid of the image as it came."""
    note("loading the site's data and the final model")
    written = segment_case(SiteHome.existing(home), study, case, out, form)
    counts = ", ".join(f"{name} {voxels}" for name, voxels in written.voxels.items())
    secret = (
        " It names the patient, as its series does: it belongs into the same archive."
        if written.form == "seg"
        else ""
    )
    result(
        {
            "study": written.study.digest,
            "case": case,
            "file": str(written.path),
            "format": written.form,
            "voxels": written.voxels,
        },
        f"Wrote {written.path}. Voxels: {counts}.{secret}\n"
        "A research result: nobody has checked it for care of a patient.",
    )
