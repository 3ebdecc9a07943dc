"""``policy.yaml``: what this site permits, and the budget of each of its patients."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium_client.home import SiteHome
from consilium_common.errors import ConsiliumError
from consilium_common.files import write_atomic

DEFAULT_EPSILON = 10.0
DEFAULT_DELTA = 1e-3


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as the number people mean; YAML 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Part(BaseModel):
    """Frozen and strict; a misspelt key is an error rather than a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Budget(_Part):
    """What one patient may ever spend: unit patient, adjacency add or remove one."""

    #: Largest ε of one patient over all studies, for ever.
    epsilon: Annotated[float, Field(gt=0, le=100)] = DEFAULT_EPSILON
    #: δ at which every patient's ε is computed; below 1 / number of patients.
    delta: Annotated[float, Field(ge=1e-12, le=0.01)] = DEFAULT_DELTA


class Policy(_Part):
    """A site's policy. The site's ledger records each change of it."""

    schema_: Annotated[Literal["consilium/policy/v1"], Field(alias="schema")]
    budget: Budget = Budget()
    #: Largest ε of one study on its own; None: the budget alone decides.
    per_study_epsilon: Annotated[float, Field(gt=0, le=100)] | None = None
    #: Whether studies without differential privacy may train here.
    permit_non_private: bool = False
    #: Fewest patients with which this site takes part.
    minimal_cohort: Annotated[int, Field(ge=1, le=10**9)] = 10
    #: Whether exact evaluation figures of studies without privacy may leave the site.
    release_exact_metrics: bool = False

    def to_canonical(self) -> dict[str, Any]:
        """Return the plain values that the ledger records, every default written out."""
        return self.model_dump(mode="json", by_alias=True)


def default_policy_text(
    *,
    epsilon: float = DEFAULT_EPSILON,
    delta: float = DEFAULT_DELTA,
    per_study_epsilon: float | None = None,
    permit_non_private: bool = False,
    minimal_cohort: int = 10,
    release_exact_metrics: bool = False,
) -> str:
    """Return a commented ``policy.yaml``; the arguments replace the cautious defaults."""
    cap = "null" if per_study_epsilon is None else _number(per_study_epsilon)
    return f"""\
# What this hospital permits. Read before every study and every round; each change is recorded in
# the privacy ledger. Everything here is about one patient: all images of a patient count as one.
schema: consilium/policy/v1

# What one patient may spend over all studies, for ever (differential privacy: unit patient,
# adjacency add or remove one). A study that would overrun any patient's budget is refused.
budget:
  # 1 is strong protection, 10 is weak but meaningful; no study is accepted beyond it.
  epsilon: {_number(epsilon)}
  # Probability with which the promise may fail. It must stay below 1 / number of patients, or
  # publishing one whole record would keep the promise. 0.001 is 1 / (10 N) for 100 patients;
  # with 1000 patients set 0.0001. A larger cohort is refused until it is lowered.
  delta: {_number(delta)}

# Largest epsilon of one study by itself; null: only the budget above counts.
per_study_epsilon: {cap}

# true: studies without differential privacy may train here. They give no formal protection.
permit_non_private: {_boolean(permit_non_private)}

# Fewest patients with which this site takes part; small groups are easily told apart.
minimal_cohort: {minimal_cohort}

# true: exact evaluation figures (Dice, AUC) of studies without privacy may leave this site.
release_exact_metrics: {_boolean(release_exact_metrics)}
"""


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
        raise _invalid(f"`{key}`: {first['msg']}", at, "Correct the value.") from error


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Budget if path[:-1] == ["budget"] else Policy
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


def _number(value: float) -> str:
    # YAML 1.1 reads 1e-05 as text: exponents need a point there.
    text = repr(float(value))
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _boolean(value: bool) -> str:
    return "true" if value else "false"
