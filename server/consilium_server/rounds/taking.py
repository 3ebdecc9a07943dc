"""Updates that were accepted and are not in a checkpoint yet: on disk, each counted once.

An update is checked, noted as received, and then named in a small file of its own that says for
which step it is. That file is what counts. Killed before it is there, the site is asked again and
answers from its store; killed after it, the update is taken from here. Once the step's checkpoint
is there, what was taken for it is void, whether or not it was removed in time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from consilium_common.errors import ConsiliumError
from consilium_common.files import disk_error, private_folder, write_atomic
from consilium_common.models.compression import decode, is_plain
from consilium_common.models.exchange import steps_of
from consilium_common.study import Study
from consilium_common.wire.messages import Reference
from consilium_server.aggregation import SiteUpdate, check_update, cohort_weights
from consilium_server.asking import Participant, Reply
from consilium_server.networks import exchanged


@dataclass(frozen=True)
class Began:
    """What a site began from.

    Attributes
    ----------
    number : int
        Round index that it was asked under.
    model : str
        SHA-256 of the file that it was offered.
    base : Path
        The whole global model that its change is against.
    """

    number: int
    model: str
    base: Path


@dataclass(frozen=True)
class Taken:
    """An accepted update.

    Attributes
    ----------
    into : int
        Rounds done before the step that it is for.
    seconds : float or None
        From when its site was asked to when it was here.
    update : SiteUpdate
        As the aggregation takes it; its staleness is that of the step it is for.
    """

    into: int
    began: Began
    reference: Reference
    figures: dict[str, float]
    seconds: float | None
    session: str | None
    update: SiteUpdate

    @property
    def site(self) -> str:
        """Whose it is."""
        return self.update.site

    @property
    def norm(self) -> float:
        """L2 norm of its change."""
        assert self.update.norm is not None  # it was checked
        return self.update.norm


class Taking:
    """The folder of the updates that were taken for the step under way.

    Parameters
    ----------
    folder : Path
        Of the study.
    note : callable
        Notes what was received of a site: its name, the round index, what came.
    """

    def __init__(
        self, study: Study, folder: Path, note: Callable[[str, int, Reference], None]
    ) -> None:
        self._study = study
        self._folder = private_folder(folder / "taken")
        self._note = note

    def take(
        self,
        site: Participant,
        reply: Reply,
        *,
        into: int,
        began: Began,
        seconds: float | None,
    ) -> Taken:
        """Check an update and keep it.

        Raises
        ------
        ConsiliumError
            ``run.bad-update``; ``state.disk``.
        """
        if reply.update is None or reply.reference is None:
            raise ConsiliumError("run.bad-message", "The reply names no update.")
        sent = self._sent(site.name)
        self._drop(site.name)
        try:
            # The gateway may replace what lies in its folder; the link here stays.
            os.link(reply.update, sent)
        except FileNotFoundError as error:
            raise ConsiliumError(
                "run.bad-update", "The update that the reply names has gone."
            ) from error
        except OSError as error:
            raise disk_error(sent, error) from error
        weight = cohort_weights({site.name: site.cohort_size}, self._study.federation.weighting)
        taken = self._checked(
            Taken(
                into,
                began,
                reply.reference,
                reply.figures,
                seconds,
                site.session,
                SiteUpdate(
                    site.name,
                    self._decoded(site.name),
                    weight[site.name],
                    steps_of(self._study, site.cohort_size),
                    staleness=into - began.number,
                ),
            )
        )
        self._note(site.name, began.number, reply.reference)
        document = asdict(taken)
        document["began"].pop("base")
        document["update"] = {
            name: getattr(taken.update, name) for name in ("site", "weight", "steps", "staleness")
        }
        # Not waited for: after a crash of the machine the site sends it again from its store.
        write_atomic(self._named(site.name), json.dumps(document).encode(), durable=False)
        return taken

    def again(self, into: int, base_of: Callable[[str], Path | None]) -> list[Taken]:
        """Return what was taken for a step before this process began; the rest is removed.

        Parameters
        ----------
        base_of : callable
            Returns the whole model of a name that sites were offered; None when it is not known.
        """
        found = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                taken = self._read(json.loads(path.read_bytes()), into, base_of)
            except (ConsiliumError, ValueError, KeyError, TypeError, OSError) as error:
                if isinstance(error, ConsiliumError) and error.code.startswith("state."):
                    raise
                continue  # asked again, the site sends it from its store
            found.append(taken)
        self.clear(but={taken.site for taken in found})
        return found

    def clear(self, *, but: Collection[str] = ()) -> None:
        """Remove what was taken, but that of some sites."""
        for path in sorted(self._folder.iterdir(), key=lambda one: one.suffix != ".json"):
            if path.name.rpartition(".")[0] not in but:
                path.unlink(missing_ok=True)

    def _read(self, document: Any, into: int, base_of: Callable[[str], Path | None]) -> Taken:
        base = base_of(str(document["began"]["model"]))
        if document["into"] != into or base is None:
            raise ValueError("it is of another step")
        site = str(document["update"]["site"])
        reference = Reference(**document["reference"])
        sent = self._sent(site)
        with sent.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != reference.sha256:
                raise ValueError("it is not what was sent")
        return self._checked(
            Taken(
                into,
                Began(base=base, **document["began"]),
                reference,
                dict(document["figures"]),
                document["seconds"],
                document["session"],
                SiteUpdate(path=self._decoded(site), **document["update"]),
            )
        )

    def _checked(self, taken: Taken) -> Taken:
        """Bring the update that was sent into plain form and check it against the study."""
        update, base = taken.update, taken.began.base
        sent = self._sent(update.site)
        try:
            if is_plain(self._study.federation.compression):
                update = replace(update, path=sent)
            else:
                decode(self._study, sent, base, update.path, specs=exchanged(self._study).sent)
            norm = check_update(self._study, update.path, base)
        except BaseException:
            self._drop(update.site)
            raise
        buffered = self._study.federation.buffered is not None
        return replace(taken, update=replace(update, norm=norm, base=base if buffered else None))

    def _drop(self, site: str) -> None:
        # The name first: what it names is void without it.
        for path in (self._named(site), self._sent(site), self._decoded(site)):
            path.unlink(missing_ok=True)

    def _named(self, site: str) -> Path:
        return self._folder / f"{site}.json"

    def _sent(self, site: str) -> Path:
        return self._folder / f"{site}.sent"

    def _decoded(self, site: str) -> Path:
        return self._folder / f"{site}.safetensors"
