"""``policy.yaml``: what this site permits, and the budget of each of its patients."""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from consilium_client.budget.policy_automatic import AutomaticApproval, Part
from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic
from consilium_common.ledger.entries import ThreatModel

DEFAULT_EPSILON = 10.0
DEFAULT_DELTA = 1e-3
#: Strong protection by itself, and enough for a mean score over some thirty test patients.
DEFAULT_METRICS_EPSILON = 1.0


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as the number people mean; YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class Budget(Part):
    """What one patient may spend over all studies: unit patient, adjacency add or remove one."""

    #: Largest ε of one patient, for ever or in any ``period_days``.
    epsilon: Annotated[float, Field(gt=0, le=100)] = DEFAULT_EPSILON
    #: δ at which every patient's ε is computed; below 1 / number of patients.
    delta: Annotated[float, Field(ge=1e-12, le=0.01)] = DEFAULT_DELTA
    #: Charges older than so many days no longer count; None: every charge counts for ever. With a
    #: period the promise holds within any such period, and not over longer times: what was
    #: released stays released, and successive periods compose.
    period_days: Annotated[int, Field(ge=1, le=36500)] | None = None

    def since(self, now: dt.datetime | None = None) -> str | None:
        """Return the time from which charges count, as the ledger writes times; None: all count."""
        if self.period_days is None:
            return None
        moment = (now or dt.datetime.now(dt.UTC)).astimezone(dt.UTC)
        start = moment - dt.timedelta(days=self.period_days)
        return start.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    @property
    def span(self) -> str:
        """In words, which charges count."""
        if self.period_days is None:
            return "over all studies, for ever"
        return f"over all studies of the last {self.period_days} days"


class Policy(Part):
    """A site's policy. The site's ledger records each change of it."""

    schema_: Annotated[Literal["consilium/policy/v1"], Field(alias="schema")]
    budget: Budget = Budget()
    #: Largest ε of one study on its own; None: the budget alone decides.
    per_study_epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    #: Who may add the noise of a private study; an empty list permits no private study.
    permitted_threat_models: list[ThreatModel] = Field(default=["silo-local"])
    #: Whether studies without differential privacy may train here.
    permit_non_private: bool = False
    #: Fewest patients with which this site takes part.
    minimal_cohort: Annotated[int, Field(ge=1, le=10**9)] = 10
    #: A study must need this many sites for a round: alone, an update is not mixed with others.
    minimal_sites: Annotated[int, Field(ge=1, le=10_000)] = 2
    #: Whether exact evaluation figures of studies without privacy may leave the site.
    release_exact_metrics: bool = False
    #: Largest ε of one study's released, noised figures: of its evaluations for a test patient, of
    #: its statistics for a training patient. None: none may be released.
    private_metrics_epsilon: Annotated[float, Field(gt=0, le=100)] | None = DEFAULT_METRICS_EPSILON
    #: Studies that this site takes part in at a time; None: in as many as there are.
    studies_at_once: Annotated[int, Field(ge=1, le=1000)] | None = None
    #: Studies approved without asking a person; None: a person approves every study.
    approve_automatically: AutomaticApproval | None = None

    def to_canonical(self) -> dict[str, Any]:
        """Return the plain values that the ledger records, every default written out.

        But for ``approve_automatically`` and ``studies_at_once``, which came later: a policy
        without them is the same.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        for key in ("approve_automatically", "studies_at_once"):
            if plain[key] is None:
                del plain[key]
        return plain


def default_policy_text(policy: Policy | None = None) -> str:
    """Return a commented ``policy.yaml`` with the values of ``policy`` (default: the cautious)."""
    chosen = policy or Policy.model_validate({"schema": "consilium/policy/v1"})
    budget = chosen.budget
    return f"""\
# What this hospital permits. Read before every study and every round; each change is recorded in
# the privacy ledger. Everything here is about one patient: all images of a patient count as one.
schema: consilium/policy/v1

# What one patient may spend over all studies (differential privacy: unit patient, adjacency add or
# remove one). Patients whose budget a study would overrun are left out of it when it is approved.
budget:
  # 1 is strong protection, 10 is weak but meaningful; no study is accepted beyond it.
  epsilon: {_scalar(budget.epsilon)}
  # Probability with which the promise may fail. It must stay below 1 / number of patients, or
  # publishing one whole record would keep the promise. 0.001 is 1 / (10 N) for 100 patients;
  # with 1000 patients set 0.0001. A larger cohort is refused until it is lowered.
  delta: {_scalar(budget.delta)}
  # null: every charge counts for ever. A number of days: charges older than that no longer count.
  # The promise then holds within any such period, but not over a lifetime: what has left stays
  # out, and whoever keeps it learns from one period after the other.
  period_days: {_scalar(budget.period_days)}

# Largest epsilon of one study by itself; null: only the budget above counts.
per_study_epsilon: {_scalar(chosen.per_study_epsilon)}

# Who may add the noise of a private study. silo-local: this site itself, before anything leaves,
# so that nobody else need be trusted. An empty list [] permits no private study.
permitted_threat_models: [{", ".join(chosen.permitted_threat_models)}]

# true: studies without differential privacy may train here. They give no formal protection.
permit_non_private: {_scalar(chosen.permit_non_private)}

# Fewest patients with which this site takes part; small groups are easily told apart.
minimal_cohort: {chosen.minimal_cohort}

# Fewest sites that a study must need for a round (its federation.quorum).
minimal_sites: {chosen.minimal_sites}

# true: exact evaluation figures (Dice, AUC) of studies without privacy may leave this site.
release_exact_metrics: {_scalar(chosen.release_exact_metrics)}

# Largest epsilon that a private study may spend on noised figures that leave this site: of each
# test patient on evaluation figures, and of each training patient on statistics (nobody is both).
# null: none may leave. It counts in the budget above like all else.
private_metrics_epsilon: {_scalar(chosen.private_metrics_epsilon)}

# Studies that run here at a time; each keeps a model and data in memory, and on the GPU if there is
# one. Their rounds take turns. The aggregator starts no more of them; null: as many as there are.
studies_at_once: {_scalar(chosen.studies_at_once)}

# Studies that this site approves by itself, without asking a person, while it runs. Every bound
# holds at approval and before every step of training; whatever exceeds one waits for a person.
# Such a study also keeps to everything above. null: a person approves every study. For example:
#   approve_automatically:
#     operators: [operator]          # whose proposals
#     tasks: [segmentation]          # segmentation, classification
#     epsilon_per_study: 1.0         # largest epsilon of one study, for every patient
#     hours: "20:00-06:00"           # by this machine's clock, in quotes; left out: at any hour
#     days: [monday, tuesday]        # on which these hours begin; left out: every day
#     gpu_share: 0.5                 # largest share of the GPU's memory
approve_automatically: {_automatic(chosen.approve_automatically)}
"""


def _automatic(rule: AutomaticApproval | None) -> str:
    # JSON is YAML, but for its exponents: those are written by _scalar.
    if rule is None:
        return "null"
    plain = rule.model_dump(mode="json", exclude_none=True)
    return "".join(
        f"\n  {key}: {_scalar(value) if isinstance(value, float) else json.dumps(value)}"
        for key, value in plain.items()
    )


def write_default_policy(home: SiteHome) -> Path:
    """Write the commented default where there is no policy yet; never overwrite one."""
    if not home.policy.exists():
        write_atomic(home.policy, default_policy_text().encode())
    return home.policy


def load_policy(home: SiteHome | Path) -> Policy:
    """Read the site's policy.

    Parameters
    ----------
    home : SiteHome or Path
        The site's folder.

    Raises
    ------
    ConsiliumError
        ``privacy.no-policy``; ``privacy.policy-invalid`` naming file, line, key and remedy. A
        missing policy is an error and not a default: a deleted strict one must not become lax.
    """
    path = home.policy if isinstance(home, SiteHome) else home / "policy.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConsiliumError(
            "privacy.no-policy",
            "The site has no policy, so nothing is permitted.",
            where=str(path),
            hint="Restore the file, or write it anew with the fields that README.md lists.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid("it cannot be read as UTF-8 text", str(path), "Check the file.") from error
    return parse_policy(text, where=str(path))


def parse_policy(text: str, *, where: str = "policy.yaml") -> Policy:
    """Read a policy from its text; errors as :func:`load_policy`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark else where
        raise _invalid("it is not YAML", at, "Check indentation and colons.") from error
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        raise _invalid("it is not a list of keys and values", where, "See README.md.")
    _refuse_double_keys(node, where)
    try:
        return Policy.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        key = ".".join(path)
        at = f"{where}:{_line(node, path)}"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _known_keys(path), n=1)
            hint = (
                f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(_known_keys(path))}."
            )
            raise _invalid(f"there is no key `{key}`", at, hint) from error
        if path[-1:] == ["hours"]:
            hint = 'Write them in quotes, like "20:00-06:00".'
            raise _invalid(f"`{key}` are no hours from and to", at, hint) from error
        raise _invalid(f"`{key}`: {first['msg']}", at, "Correct the value.") from error


def _known_keys(path: list[str]) -> list[str]:
    models: dict[str, type[BaseModel]] = {
        "budget": Budget,
        "approve_automatically": AutomaticApproval,
    }
    model = models.get(path[0], Policy) if len(path) > 1 else Policy
    return [field.alias or name for name, field in model.model_fields.items()]


def _refuse_double_keys(node: yaml.MappingNode, where: str) -> None:
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            raise _invalid(
                f"`{key.value}` stands twice",
                f"{where}:{key.start_mark.line + 1}",
                "Keep the line you mean.",
            )
        seen.add(key.value)
        if isinstance(value, yaml.MappingNode):
            _refuse_double_keys(value, where)


def _line(node: yaml.Node, path: list[str]) -> int:
    """Line of the deepest key of ``path`` that the file has, from 1."""
    line = int(node.start_mark.line) + 1
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            break
        found = [(key, value) for key, value in node.value if key.value == part]
        if not found:
            break
        line = int(found[0][0].start_mark.line) + 1
        node = found[0][1]
    return line


def _invalid(what: str, where: str, hint: str) -> ConsiliumError:
    return ConsiliumError(
        "privacy.policy-invalid", f"The site's policy is not valid: {what}.", where=where, hint=hint
    )


def _scalar(value: float | bool | None) -> str:
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    # YAML 1.1 reads 1e-05 as text: exponents need a point there.
    text = repr(float(value))
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
