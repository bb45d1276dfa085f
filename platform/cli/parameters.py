"""Parameters that several commands have."""

from typing import Annotated

from cyclopts import Parameter

Overrides = Annotated[list[str] | None, Parameter(name="--set", negative=(), help="STEP.FIELD=VALUE; may be repeated")]
