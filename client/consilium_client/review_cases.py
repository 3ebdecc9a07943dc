"""On which of a site's own cases a study would work, and which are left out; stays at the site."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from consilium_client.home import SiteHome
from consilium_common.files import private_folder, write_atomic
from consilium_common.study import Study
from consilium_common.study.words import count_of

if TYPE_CHECKING:
    from consilium_client.data.cohort import Cohort

_NO_CLASS: Final = "its class is none of the study's"
_BUDGET: Final = "the study would overrun its patient's privacy budget"


@dataclass(frozen=True)
class OnCases:
    """Counts of one site's cases for one study, exact; they stay at the site.

    Attributes
    ----------
    splits : dict
        Patients and cases by split, without those left out.
    left_out : dict
        Number of cases by why they are left out.
    listing : Path or None
        The file that names them; None where none is left out.
    covariates : dict
        By covariate: training cases with a value and without.
    """

    splits: dict[str, tuple[int, int]]
    left_out: dict[str, int]
    listing: Path | None
    covariates: dict[str, tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; no case is named."""
        return {
            "splits": {
                split: {"patients": patients, "cases": cases}
                for split, (patients, cases) in self.splits.items()
            },
            "left_out": self.left_out,
            "left_out_list": None if self.listing is None else str(self.listing),
            "covariates": {
                name: {"known": known, "missing": missing}
                for name, (known, missing) in self.covariates.items()
            },
        }

    def lines(self) -> list[str]:
        """Say it in words."""
        uses = {
            "train": "to train on",
            "validation": "for validation",
            "test": "to evaluate on",
        }
        counted = [
            f"{count_of(cases, 'case')} of {count_of(patients, 'patient')} {uses[split]}"
            for split, (patients, cases) in self.splits.items()
            if cases
        ]
        said = ["On these cases: " + ("; ".join(counted) or "none") + "."]
        said += [f"  left out: {count_of(n, 'case')}, {why}" for why, n in self.left_out.items()]
        if self.listing is not None:
            said.append(f"  which: {self.listing}")
        said += [
            f"  covariate {name}: known of {count_of(known, 'training case')}, missing of "
            f"{missing:,}"
            for name, (known, missing) in self.covariates.items()
        ]
        return said


def on_cases(home: SiteHome, study: Study, cohort: Cohort, overrun: Collection[str]) -> OnCases:
    """Count the cases of an opened cohort, and write down which of the site's are left out.

    Parameters
    ----------
    overrun : collection of str
        Keyed hashes of patients whose budget the study would overrun.
    """
    from consilium_client.data.manifest import load_manifest
    from consilium_client.data.split import SPLITS

    whole = [case for split in SPLITS for p in cohort.patients(split) for case in p.cases]
    taken = {case.case_id for case in whole}
    out = [(c.case_id, _NO_CLASS) for c in load_manifest(home).cases if c.case_id not in taken]
    out += [(case.case_id, _BUDGET) for case in whole if case.patient in overrun]
    left = cohort.without(overrun)
    trained = [case for patient in left.patients("train") for case in patient.cases]
    known = {
        one.name: sum(case.covariates.get(one.name) is not None for case in trained)
        for one in study.task.covariates
    }
    return OnCases(
        splits={
            split: (
                len(left.patients(split)),
                sum(len(patient.cases) for patient in left.patients(split)),
            )
            for split in SPLITS
        },
        left_out={
            why: count
            for why in (_NO_CLASS, _BUDGET)
            if (count := sum(reason == why for _, reason in out))
        },
        listing=_write(home, study, out),
        covariates={name: (n, len(trained) - n) for name, n in known.items()},
    )


def _write(home: SiteHome, study: Study, out: list[tuple[str, str]]) -> Path | None:
    """Write the case numbers into the site's private folder: they may tell who somebody is."""
    path = home.reports / study.digest[:16] / "left-out.csv"
    if not out:
        path.unlink(missing_ok=True)
        return None
    private_folder(path.parent)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("case_id", "why"))
    writer.writerows(out)
    write_atomic(path, text.getvalue().encode())
    return path
