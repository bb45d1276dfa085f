"""Uploads the submitter's files to the store of a cluster, for hosts that do not have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from moray.platform.control.profiles import Profile
from moray.platform.core.errors import InputError
from moray.platform.core.units import size
from moray.platform.plan.recipe import Recipe
from moray.platform.store.paths import check_store, set_store_variables, store_root
from moray.platform.store.submitted import Progress, total_size, upload_tree

MOST_BYTES = 10**9  # of files that are uploaded without a confirmation


def upload_files(recipe: Recipe, profile: Profile, yes: bool = False, progress: Progress | None = None) -> list[str]:
    """Uploads the files of this machine that a recipe reads to the store of a cluster. Returns the overrides that name
    them there. Raises InputError, also if they are larger than 1 GB without `yes`."""
    shown = progress or (lambda phase, done, total: None)
    set_store_variables(profile.store, profile.variables())
    check_store(profile.store)
    trees: list[Mapping[str, Path]] = []

    def measure(files: Mapping[str, Path]) -> str:
        trees.append(files)
        return ""

    for planned in recipe.steps:
        planned.step.submitted(planned.config, measure)
    if (total := total_size(trees)) > MOST_BYTES and not yes:
        raise InputError(f"the recipe reads {size(total)} of this machine's files", "add --yes to upload them")
    store = store_root(profile.store)
    upload = lambda files: str(upload_tree(store, files, shown))  # noqa: E731
    found = {p.key: p.step.submitted(p.config, upload) for p in recipe.steps}
    return [f"{key}.{name}={json.dumps(value)}" for key, fields in found.items() for name, value in fields.items()]
