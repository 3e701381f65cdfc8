"""What went wrong, said the way a user needs it; only real bugs show a traceback."""

from __future__ import annotations

import re
import sys
import traceback

import hydra.errors

from experiments.config.overrides import as_written
from experiments.config.validation import CONF, keys_like, known_keys, nearest, siblings_of
from experiments.run.interruption import Interrupted
from models.errors import UserError

FROM_HYDRA = (hydra.errors.CompactHydraException, hydra.errors.MissingConfigException)


def explain(error: BaseException) -> int:
    """Print the explanation of an error and return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        print("Interrupted. Go on with resume=auto.", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            print(f"Error: {cause}", file=sys.stderr)
            return 2
        if isinstance(cause, FROM_HYDRA):
            print(f"Error: {_explain_hydra(cause)}", file=sys.stderr)
            return 2
        cause = cause.__cause__ or cause.__context__
    traceback.print_exception(error)
    return 1


def _explain_hydra(error: BaseException) -> str:
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
    text = "\n  ".join(dict.fromkeys(lines))
    if isinstance(error, hydra.errors.OverrideParseException):
        (override,) = as_written([error.override])
        return (
            f"the override {override} cannot be read. Values with spaces, commas, brackets, = or ~ need quotes inside "
            "those of the shell: \"datamodule.root='/data/a b'\"."
        )
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:  # an unknown choice of a group
        return _unknown_option(missing.group(1))
    unknown = re.search(r"Key '([^']+)' is not in struct", text) or re.search(r"Could not override '([^']+)'", text)
    if unknown:
        full = re.search(r"full_key: (\S+)", text)
        return _unknown_key(full.group(1) if full else unknown.group(1))
    return text


def _unknown_option(path: str) -> str:
    group, _, choice = path.rpartition("/")
    while group and not (CONF / group).is_dir():
        group, _, rest = group.rpartition("/")
        choice = f"{rest}/{choice}"
    choices = [p.relative_to(CONF / group).with_suffix("").as_posix() for p in (CONF / group).rglob("[!_]*.yaml")]
    ends = [option for option in choices if option.split("/")[-1] == choice.split("/")[-1]]
    return f"there is no {group}={choice}." + (f" Did you mean '{ends[0]}'?" if ends else nearest(choice, choices))


def _unknown_key(key: str) -> str:
    folder = CONF / key
    if folder.is_dir() and not any(folder.glob("*.yaml")):
        groups = sorted(f"{key}/{inner.name}" for inner in folder.iterdir() if inner.is_dir())
        return f"'{key}' is not a group; its groups are {' and '.join(groups)}: {groups[0]}=<option>."
    if folder.is_dir():
        return f"this recipe has no {key}, so {key}=<option> changes nothing. See `python run.py experiment=<name> --cfg job`."
    if "." in key:
        return f"unknown key '{key}' [command line].{nearest(key.rpartition('.')[2], siblings_of(key))}"
    hint = keys_like(key) or nearest(key, known_keys() | {"experiment", "sweep", "debug"})
    return f"unknown key '{key}' [command line].{hint}"
