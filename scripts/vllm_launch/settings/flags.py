"""An argparse parser for the launcher's command-line flags: ``--config`` and one flag per setting."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from vllm_launch.engine.options import nearest, options
from vllm_launch.errors import UsageError
from vllm_launch.settings.settings import LauncherSettings

FIELDS = LauncherSettings.__struct_fields__


class Flags(NamedTuple):
    """The parsed command line.

    ``launch``: the launcher's settings by field, each as (flag, text). ``engine_argv``: all other arguments in their
    order, which are vLLM's flags, their values and the model. ``engine.parse`` reads them.
    """

    launch: dict[str, tuple[str, str]]
    config: str | None
    engine_argv: list[str]


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=100)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations. Its errors are UsageError and show no values: they may be secrets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"allow_abbrev": False, "formatter_class": _help_formatter})

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for what argparse found wrong."""
        argument = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
        if argument is None:
            raise UsageError("command line", message, f"see {self.prog} --help")
        names, what = argument[1], argument[2]
        flag = names.split("/")[0]
        if "ignored explicit" in what:
            raise UsageError(flag, "takes no value", f"write {' or '.join(names.split('/'))}")
        raise UsageError(flag, "its value is missing", f"write {flag} VALUE")


class Once(argparse.Action):
    """Stores (flag, text). Refuses an empty text, and a second value for the same destination."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        """Store (flag, text). The text of a flag without a value is "true", and "false" for its ``--no-`` form."""
        del parser
        assert flag is not None  # noqa: S101 - only flags use this action
        if getattr(namespace, self.dest) is not None:
            raise UsageError(flag, "is given twice", "keep one")
        if self.nargs == 0:
            values = "false" if flag.startswith("--no-") else "true"
        if not values:
            raise UsageError(flag, "its value is missing", f"write {flag} VALUE")
        setattr(namespace, self.dest, (flag, values))


def settings_parser() -> Parser:
    """Return a parser of ``--config`` and of each setting, to be a parent of a command's parser."""
    parser = Parser(add_help=False)
    about = "YAML file with vLLM's options; the launcher's settings go under the key launch:"
    parser.add_argument("--config", metavar="FILE", action=Once, help=about)
    group = parser.add_argument_group(
        "the launcher's settings",
        "Each is also an environment variable (LAUNCH_DRAIN_SECONDS=90)\n"
        "and a key of the config file (launch: {drain_seconds: 90}).",
    )
    defaults = LauncherSettings()
    for field, kind in get_type_hints(LauncherSettings, include_extras=True).items():
        name, description = field.replace("_", "-"), kind.__metadata__[-1].description
        if not isinstance(default := getattr(defaults, field), bool) and default:
            description += f" (default: {default})"
        if kind.__origin__ is bool:
            names = [f"--launch-{name}", f"--no-launch-{name}"]
            group.add_argument(*names, dest=field, action=Once, nargs=0, help=description)
        else:
            shown = _metavar(field, kind)
            group.add_argument(f"--launch-{name}", dest=field, action=Once, metavar=shown, help=description)
    return parser


def _metavar(field: str, kind: Any) -> str:
    """Return what stands for the value in the help text."""
    if get_origin(kind.__origin__) is Literal:
        return f"{{{','.join(get_args(kind.__origin__))}}}"
    endings = {
        "seconds": "SECONDS", "port": "PORT", "host": "ADDRESS", "dir": "FOLDER", "file": "FILE", "log": "FILE",
        "routes": "ROUTES",
    }  # fmt: skip
    return endings[field.rpartition("_")[2]]


def parse_flags(words: Sequence[str]) -> Flags:
    """Parse ``words``, the arguments of a command, into the launcher's settings and the rest."""
    return flags_of(*settings_parser().parse_known_args(with_dashes(words)))


def with_dashes(words: Sequence[str]) -> list[str]:
    """Replace underscores by dashes in the launcher's flag names. vLLM does the same with its own flags."""
    return [re.sub(r"^--(no[-_])?launch[-_][^=]*", lambda name: name[0].replace("_", "-"), word) for word in words]


def flags_of(parsed: argparse.Namespace, rest: Sequence[str]) -> Flags:
    """Return the settings in ``parsed``, which comes from ``settings_parser``, and the unknown arguments ``rest``.

    Raises:
        UsageError: an argument in ``rest`` looks like a launcher flag, but the launcher has no such flag.
    """
    for word in rest:
        _check_name(word.partition("=")[0])
    launch = {field: value for field in FIELDS if (value := getattr(parsed, field)) is not None}
    return Flags(launch, parsed.config and parsed.config[1], list(rest))


def _check_name(flag: str) -> None:
    dashed = flag.replace("_", "-")
    if dashed.startswith("--no-launch-") and field_of(dashed.removeprefix("--no-launch-"), flag):
        raise UsageError(
            flag,
            "has no --no- form, because its setting takes a value",
            f"write --{dashed.removeprefix('--no-')} VALUE, or leave it out",
        )
    if dashed.startswith("--launch-"):
        field_of(dashed.removeprefix("--launch-"), flag)
    if dashed.startswith("--") and dashed[2:].replace("-", "_") in FIELDS:
        raise UsageError(flag, "is a setting of the launcher, not of vLLM", f"write --launch-{dashed[2:]}")


def field_of(name: str, where: str, spelling: str = "--launch-{}") -> str:
    """Return the field of the setting ``name``. ``where`` is where the user wrote it, for the error message.

    ``spelling`` is how settings are written there: "--launch-{}", "LAUNCH_{}" or "{}".

    Raises:
        UsageError: the launcher has no such setting; the nearest one is named.
    """
    field = name.replace("-", "_")
    if field in FIELDS:
        return field
    if field in options() and f"{field}_file" not in FIELDS:  # for api_key, suggest our api_key_file instead
        flag = options()[field].flags[0]
        remedy = f"write {flag}, or {field} in the config file outside launch:"
        raise UsageError(where, f"{name} is an option of vLLM, not a setting of the launcher", remedy)
    spelt = [_spelt(spelling, known) for known in FIELDS]
    raise UsageError(where, f"the launcher has no setting {name}", nearest(_spelt(spelling, field), spelt))


def _spelt(spelling: str, field: str) -> str:
    if spelling.startswith("--"):
        field = field.replace("_", "-")
    return spelling.format(field.upper() if spelling.startswith("LAUNCH_") else field)
