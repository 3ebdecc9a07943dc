"""Sites in a simulation: homes of their own over the data of real ones, and the ClientApp in them.

Started by name, as Flower starts a ClientApp: the aggregator's packages import nothing of a site's.
A simulated site trains as a real one does, with a ledger and an identity that are good for nothing
else; what the site whose data it uses has decided and spent stays as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from consilium_client.app import app as clientapp
from consilium_client.app import pool
from consilium_client.home import HOME_VARIABLE, SiteHome
from consilium_client.identity import SiteConfig, read_config
from consilium_client.received import model_file
from consilium_client.store import StudyStore
from consilium_common.canonical import canonical_json
from consilium_common.errors import ConsiliumError
from consilium_common.files import private_folder, write_atomic
from consilium_common.study import Study
from consilium_common.wire.messages import Reference, instructions_of, update_of

#: Names the file that says which node is which site, and where models and updates lie.
WIRE_VARIABLE: Final = "CONSILIUM_SIMULATION"
_PREFIX: Final = "site-"
#: Nobody is asked in a simulation, and nothing leaves: the study alone decides.
_POLICY: Final = """\
schema: consilium/policy/v1
budget: {epsilon: 100.0, delta: %s}
permit_non_private: true
minimal_cohort: 1
minimal_sites: 1
release_exact_metrics: true
private_metrics_epsilon: 100.0
"""

app = ClientApp()


def sites_in(folder: Path) -> dict[str, Path]:
    """Return the folders of sites below a folder, by the sites' names.

    A site's folder is what `site data import` has filled. Its name is the one it joined with, else
    that of the folder.

    Raises
    ------
    ConsiliumError
        ``data.no-sites``; ``data.same-site`` where two have one name.
    """
    found: dict[str, Path] = {}
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in folders:
        if not (path / "data" / "site.yaml").is_file():
            continue
        home = SiteHome(path.resolve())
        joined = home.config.is_file()
        name = read_config(home).name if joined else path.name.removeprefix(_PREFIX)
        if name in found:
            raise ConsiliumError(
                "data.same-site",
                f"Two folders are of the site {name}.",
                where=f"{found[name].name}, {path.name}",
                hint="Move one of them out of the folder of sites.",
            )
        found[name] = home.path
    if not found:
        raise ConsiliumError(
            "data.no-sites",
            "There is no site's data in the folder.",
            where=str(folder),
            hint="Fill a folder for each site: consilium site data import IMAGES --home "
            "FOLDER/NAME.",
        )
    return found


def prepare(study: Study, name: str, source: Path, target: Path) -> dict[str, int]:
    """Make a simulated site that has approved the study.

    Parameters
    ----------
    source : Path
        Folder of the site whose data is used. Prepared cases are added to its cache; nothing else
        of it changes.
    target : Path
        Folder of the simulated site; made.

    Returns
    -------
    dict
        ``cohort_size`` and ``evaluation_size`` as `site approve` would declare them.

    Raises
    ------
    ConsiliumError
        ``data.*`` where the data does not fit the study, ``state.*``.
    """
    from consilium_client.data.cohort import open_cohort
    from consilium_client.reviewing import declared_evaluation_size, declared_size

    home = SiteHome.create(target)
    _write_identity(home, name, SiteHome(source))
    delta = study.privacy.delta if study.privacy.mode == "patient" else 0.001
    write_atomic(home.policy, (_POLICY % f"{min(delta, 0.01):.12f}").encode())
    (home.path / "data").symlink_to(source / "data", target_is_directory=True)
    cohort = open_cohort(home, study)
    released = study.evaluation.release == "private"
    size = declared_size(len(cohort.patients("train")))
    tested = declared_evaluation_size(len(cohort.patients("test"))) if released else 0
    StudyStore(home).decide(study, "approved", size, "simulated", evaluation_size=tested)
    return {"cohort_size": size, "evaluation_size": tested}


def _write_identity(home: SiteHome, name: str, source: SiteHome) -> None:
    """Write what `site join` writes, certified by an authority that nobody keeps."""
    from consilium_common.identity.authority import Authority, certificate_pem
    from consilium_common.identity.certificates import Role
    from consilium_common.identity.keys import (
        new_signing_key,
        new_tls_key,
        openssh_pem,
        public_pem,
        save_private,
    )

    authority = Authority.create("simulation")
    key, signer = new_tls_key(), new_signing_key()
    folder = home.identity
    save_private(folder / "site-key.pem", key)
    save_private(folder / "ledger-key.pem", signer)
    files = {
        "site-key.openssh": openssh_pem(key),
        "authority.pem": certificate_pem(authority.certificate),
        "site.pem": certificate_pem(authority.issue(key.public_key(), Role.SITE, name)),
        "ledger-signer.pem": certificate_pem(
            authority.issue(signer.public_key(), Role.SIGNER, name)
        ),
        "ledger-public.pem": public_pem(signer.public_key()),
    }
    for file, content in files.items():
        write_atomic(folder / file, content)
    patient_key = source.path / "identity" / "patient_key"
    if patient_key.exists():
        # The same patients are trained and tested on, in the same order, as at the real site.
        write_atomic(folder / "patient_key", patient_key.read_bytes())
    joined = read_config(source) if source.config.is_file() else SiteConfig(name, "", "")
    config = SiteConfig(
        name,
        "simulation",
        "127.0.0.1:1",
        device=joined.device,
        precision=joined.precision,
        # Said here, because the simulation's processes see other limits, and because sums over
        # another number of threads are other sums.
        threads=joined.compute()["threads"],
    )
    write_atomic(home.config, json.dumps(asdict(config), indent=2).encode() + b"\n")


# --- the ClientApp -----------------------------------------------------------------------------


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Have the site's ClientApp train."""
    return _at_site(message, context)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Have the site's ClientApp evaluate."""
    return _at_site(message, context)


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Have the site's ClientApp count."""
    return _at_site(message, context)


def _at_site(message: Message, context: Context) -> Message:
    """Run the ClientApp in the home of the node's site; the wire is a folder."""
    wire: dict[str, Any] = json.loads(Path(os.environ[WIRE_VARIABLE]).read_text(encoding="utf-8"))
    home = SiteHome.existing(Path(wire["sites"][str(context.node_id)]))
    os.environ[HOME_VARIABLE] = str(home.path)
    pool.cache_clear()
    model: Path | None = None
    try:
        instructions = instructions_of(message.content)
        if instructions.model is not None:
            model = model_file(home, instructions.study, instructions.model)
            _link(Path(wire["models"]) / model.name, model)
        reply = clientapp(message, context)
        if message.metadata.message_type == "train":
            _send(home, instructions.study, instructions.round_index, reply, Path(wire["updates"]))
        return reply
    except ConsiliumError as error:
        # In full: nothing leaves this machine, and whoever simulates must see what is wrong.
        reason = canonical_json(error.to_dict()).decode()
        return Message(Error(code=1, reason=reason), reply_to=message)
    finally:
        # The next message of this site may come to another process, and a study has one worker.
        pool().end_all_but(set())
        if model is not None:
            model.unlink(missing_ok=True)


def _send(home: SiteHome, study: str, number: int, reply: Message, updates: Path) -> None:
    reference: Reference = update_of(reply.content)
    stored = StudyStore(home).update(study, number)
    if stored is None or stored.sha256 != reference.sha256:
        raise ConsiliumError("run.not-stored", "The reply names an update that was never stored.")
    _link(stored.file, private_folder(updates) / reference.sha256)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk cannot."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
