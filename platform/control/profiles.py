"""Profiles of clusters: small YAML files that say where a cluster is and how to use it.

    MORAY_HOME/clusters/NAME.yaml     the user's own, written by `moray cluster add`
    cluster/profiles/NAME.yaml        those that ship with Moray

`local` (the cluster of `moray up`) and `embedded` (that of `moray run`) need no file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moray.platform.control.choices import LOCAL
from moray.platform.core import bounded_yaml
from moray.platform.core.atomic import write_text
from moray.platform.core.errors import InputError, RecipeError, nearest
from moray.platform.core.home import Home
from moray.platform.core.references import Secret, references_in, substitute

EMBEDDED = "embedded"
SHIPPED = Path(__file__).parents[2] / "cluster" / "profiles"
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_PLANNED = ("ssh", "slurm", "kuberay")


class Profile(BaseModel):
    """A profile file. address: of Ray's dashboard, which has the Jobs API. store: for the files of all runs.

    token: for Ray's token authentication, by reference. environment: variables of drivers and tasks; values may be
    references. code: `package` sends Moray's code with each job, `image` expects it on every host. python: the
    command that starts Python on the hosts. slots: jobs that run at the same time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: Literal["existing"]
    address: str
    store: str
    token: Secret | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    code: Literal["package", "image"] = "package"
    python: str = Field("python3", min_length=1)
    slots: int = Field(4, ge=1, le=1000)

    @field_validator("address")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^/\s]+/?", value):
            raise ValueError("must be the address of Ray's dashboard, such as http://10.0.0.1:8265")
        return value.rstrip("/")

    @field_validator("store")
    @classmethod
    def _is_store(cls, value: str) -> str:
        if not re.fullmatch(r"s3://[^/?#\s]+(/[^?#\s]*)?|/.+", value):
            raise ValueError("must be s3://bucket/prefix, or the absolute path of a folder that all hosts see")
        return value.rstrip("/")

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers_as_text(cls, value: Any) -> Any:
        """YAML reads `OMP_NUM_THREADS: 1` as a number."""
        if not isinstance(value, dict):
            return value
        return {name: str(one) if type(one) in (int, float) else one for name, one in value.items()}

    @model_validator(mode="after")
    def _no_reserved_variables(self) -> Profile:
        if "MORAY_ARTIFACTS" in self.environment:
            raise ValueError("environment.MORAY_ARTIFACTS: use `store`")
        return self

    def variables(self) -> Mapping[str, str]:
        """The environment for drivers and tasks, with the values of references. Raises pydantic's errors."""
        return {**substitute(self.environment), "MORAY_ARTIFACTS": self.store}

    def digest(self) -> str:
        """Changes with the profile, and with the values of its references."""
        token = self.token.reveal() if self.token else ""
        values = [self.model_dump_json(), token, *sorted(f"{name}={one}" for name, one in self.variables().items())]
        return hashlib.sha256("\n".join(values).encode()).hexdigest()


def folder_of(home: Home) -> Path:
    """The folder of the user's own profiles."""
    return home.root / "clusters"


def profile_names(home: Home) -> list[str]:
    """The names of all profiles, sorted. The user's own replace those that ship with Moray."""
    found = {path.stem for folder in (SHIPPED, folder_of(home)) for path in folder.glob("*.yaml")}
    return sorted(found)


def known_names(home: Home) -> list[str]:
    """The names of all clusters to which jobs can be submitted."""
    return [LOCAL, *(name for name in profile_names(home) if name not in (LOCAL, EMBEDDED))]


def profile_path(home: Home, name: str) -> Path:
    """The file of a profile. Raises InputError that names the nearest known one."""
    for folder in (folder_of(home), SHIPPED):
        if (path := folder / f"{name}.yaml").is_file() and _NAME.fullmatch(name):
            return path
    hint = nearest(name, known_names(home))
    raise InputError(f"unknown cluster {name!r}", f"{hint}; moray cluster list" if hint else "moray cluster list")


def load_profile(home: Home, name: str) -> Profile:
    """Reads a profile. Raises InputError with file, line, field and the nearest valid one."""
    path = profile_path(home, name)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}", "make it a readable file in UTF-8") from error
    return parse_profile(text, path)


def parse_profile(text: str, path: Path) -> Profile:
    """Parses and checks the text of a profile. Raises InputError."""
    import yaml

    try:
        _, data = bounded_yaml.compose(text)
    except RecipeError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(
            f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}", "see docs/clusters.md"
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: a profile is a mapping of fields", "see docs/clusters.md")
    if (kind := data.get("kind")) in _PLANNED:
        raise InputError(f"{path}: kind {kind!r} is not available yet", "start Ray there, and use kind: existing")
    try:
        profile = Profile.model_validate(data)
        profile.variables()  # resolves the references
        return profile
    except ValidationError as error:
        raise _explained(path, text, error) from error
    except ValueError as error:  # a reference in `environment`
        hint = getattr(error, "context", None) or {}
        raise InputError(f"{path}: environment: {error}", str(hint.get("hint", "correct the reference"))) from error


def new_profile(address: str, store: str) -> Profile:
    """A profile of a cluster without a file. Raises InputError."""
    return parse_profile(json.dumps({"kind": "existing", "address": address, "store": store}), Path("--address"))


def add_profile(home: Home, name: str, fields: Mapping[str, Any], replace: bool = False) -> Path:
    """Writes a profile after checking it. Raises InputError."""
    import yaml

    if not _NAME.fullmatch(name) or name in (LOCAL, EMBEDDED):
        raise InputError(f"{name!r} cannot be the name of a cluster", "use a-z, 0-9, - and _; not local or embedded")
    path = folder_of(home) / f"{name}.yaml"
    if path.exists() and not replace:
        raise InputError(f"cluster {name!r} exists already: {path}", "edit the file, or add --replace")
    text = yaml.safe_dump({key: value for key, value in fields.items() if value not in (None, {}, "")}, sort_keys=False)
    parse_profile(text, path)
    write_text(path, text)
    return path


def parse_variables(given: Sequence[str]) -> dict[str, str]:
    """Parses NAME=VALUE. Raises InputError."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env {text!r:.80} is not NAME=VALUE", "for example --env AWS_REGION=eu-west-1")
        found[name] = value
    return found


def _explained(path: Path, text: str, error: ValidationError) -> InputError:
    """The first mistake of a profile, with its line and the nearest valid field."""
    found = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    field = ".".join(map(str, found["loc"])) or "profile"
    last = f"{found['loc'][-1]}:" if found["loc"] else "\n"
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith(last)]
    where = f"{path}, line {lines[0]}" if lines else str(path)
    if found["type"] == "extra_forbidden":
        return InputError(f"{where}: unknown field {field!r}", nearest(field, Profile.model_fields))
    if found["type"] == "missing":
        return InputError(f"{where}: {field} is missing", "see docs/clusters.md")
    given = found.get("input")
    shown = "" if field in ("token", "profile") or references_in(given) else f" (got {given!r:.80})"
    problem = str(found["msg"]).removeprefix("Value error, ")
    hint = str((found.get("ctx") or {}).get("hint", "see docs/clusters.md"))
    return InputError(f"{where}: {field}: {problem}{shown}", hint)
