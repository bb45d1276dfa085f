"""Parameters shared by several commands."""

from typing import Annotated

from cyclopts import Parameter

ClusterName = Annotated[str, Parameter(name="--cluster", help="name of the cluster; `moray cluster list` shows all")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", negative=(), help="override a recipe field: STEP.FIELD=VALUE; may be repeated"),
]
