"""The rules a site's data is held to: how grave a breach is, and why the rule is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Parameters
    ----------
    severity : str
        ``error``: the case is not used. ``warning``: a person should look.
    why : str
        Why it matters, in one sentence for a person at the site.
    """

    severity: Severity
    why: str


def _error(why: str) -> Rule:
    return Rule("error", why)


def _warning(why: str) -> Rule:
    return Rule("warning", why)


RULES: Final[Mapping[str, Rule]] = {
    # --- files ---
    "data.truncated": _error("A reader that guesses the rest trains on noise."),
    "data.missing": _error("A case without its files cannot be trained on."),
    "data.codec": _error("Pixels that no decoder here reads would be made up."),
    "data.format": _error("A file read as what it is not gives values without meaning."),
    "data.too-large": _error("A header that claims absurd sizes would exhaust the memory."),
    "data.dimensions": _error("The wrong number of axes means another kind of image."),
    "data.not-finite": _error("One NaN in one voxel spreads through the whole network."),
    "data.name": _error("A name that the case list cannot hold would not find its file again."),
    # --- geometry ---
    "data.missing-slices": _error(
        "Slices that are absent squeeze the anatomy: every size and every label behind the gap is "
        "wrong."
    ),
    "data.uneven-slices": _error("One spacing cannot describe slices at uneven distances."),
    "data.duplicate": _error("A slice that counts twice stretches the anatomy."),
    "data.tilt": _error("A shear this steep leaves too little of the volume to resample."),
    "data.mixed-geometry": _error("Slices of different planes do not form one volume."),
    "data.no-position": _error("File order is not anatomical order: slices may be permuted."),
    "data.multi-frame": _error("Frames of several stacks or phases do not form one volume."),
    "data.several-series": _error("Two series read as one give a volume that never was."),
    "data.no-spacing": _error("Without a size in millimetres an image cannot be resampled."),
    "data.geometry": _error("A label that lies elsewhere teaches the wrong anatomy."),
    # --- labels ---
    "data.no-label": _error("Supervised training needs a label for each case."),
    "data.two-labels": _error("Which of two labels is meant is not for a program to guess."),
    "data.label-values": _error("A value that no class has would be learnt as background."),
    "data.label-unknown": _error("A value that no class has would be learnt as background."),
    "data.overlap": _error("A voxel has one class: an overlap must be decided by a person."),
    "data.label-to-background": _warning(
        "What the study does not name is taught as background: often only the spelling differs."
    ),
    "data.label-kind": _error("Masks and classes train two different kinds of network."),
    "data.class-missing": _error("A class without a label here would be taught as absent."),
    "data.class-ambiguous": _error("Which class a label means is not for a program to guess."),
    "data.channel-missing": _error("A network that was promised a channel cannot go without it."),
    "data.covariate-missing": _error("A network that was promised a value cannot guess it."),
    "data.covariate": _error("A word where a number belongs would be learnt as nothing at all."),
    "data.empty-label": _error(
        "The study refuses cases without foreground: often the label was lost on export."
    ),
    # --- patients ---
    "data.no-patient": _error("Privacy per patient cannot be kept for a case without a patient."),
    "data.two-patients": _error("One series of two patients is a mixture of two bodies."),
    "data.two-splits": _error("A patient in training and test makes every figure too good."),
    "data.same-image": _error(
        "One image under two patients leaks between splits and counts one person's budget twice."
    ),
    "data.repeated-image": _warning("An image that is listed twice weighs twice in training."),
    "data.two-identifiers": _error(
        "One person under two identifiers spends two budgets: the promise per patient is broken."
    ),
    # --- the cohort ---
    "data.intensity-outlier": _warning("Values far from the cohort's often mean a lost rescale."),
    "data.blank": _warning("An image of one single value was often lost on its way here."),
    "data.unit-mismatch": _warning(
        "Hounsfield units and arbitrary ones in one cohort are two different images to a network."
    ),
    "data.orientation-outlier": _warning("A single turned case is often a header that lies."),
    "data.class-imbalance": _warning("A class with a handful of cases is hardly learnt."),
    "data.tiny-cohort": _warning("Noise per patient drowns what few patients can teach."),
    "data.scanner-mix": _warning("A model may learn the scanner in place of the disease."),
    "data.burned-in-unknown": _warning(
        "The file does not say whether text is burned into its pixels; names often are."
    ),
    # --- the site's own house ---
    "state.open-to-others": _warning("Images and keys of this site are for its own user alone."),
    "state.disk-low": _warning("A full disk stops an import, a round or the ledger half way."),
    "state.cache-damaged": _warning("Training would stop at a case that cannot be read."),
    # --- identity ---
    "deid.tags": _warning("Tags that identify a patient are a breach as soon as a copy travels."),
    "deid.claim-untrue": _warning(
        "The file says that the identity was removed, and it was not: nobody will look again."
    ),
    "deid.private-tags": _warning("Private tags may hold anything; vendors put names there."),
    "deid.filename": _warning("A file name goes into logs, listings and backups."),
    "deid.nifti-text": _warning("Converters copy patient names into NIfTI text fields."),
    "deid.burned-in": _warning("Text in the pixels survives every removal of tags."),
}

_OTHER: Final = _error("The case cannot be used as it is.")


def rule_of(code: str) -> Rule:
    """Return the rule behind an error's code."""
    return RULES.get(code, _OTHER)
