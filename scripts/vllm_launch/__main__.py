"""Command line of ``vllm-launch``: finds the command, runs it, and exits with its code."""

from __future__ import annotations

import io
import os
import signal
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

from vllm_launch import commands
from vllm_launch.engine.options import nearest, pinned_vllm
from vllm_launch.errors import UsageError
from vllm_launch.settings.flags import Once, Parser, settings_parser, with_dashes

SETTINGS_USAGE = " [vLLM's flags] [the launcher's flags]"
VLLM_OPTIONS = """\
MODEL is a folder or a name on the Hugging Face hub. All other flags are vLLM's, such as --max-model-len or
--served-model-name: `vllm serve --help=all` explains them. The plan decides what you do not set.
"""


def _choice(names: Sequence[str]) -> str:
    return f"{{{','.join(names)}}}"


def _plan_flags(parser: ArgumentParser) -> None:
    where = (
        "a file that `vllm-launch gpus --format json` wrote, or GPUs by name, for example H100:8, L4, GB10, "
        "H100-1g.10gb; a wrong name lists similar ones"
    )
    parser.add_argument("--hardware", action=Once, metavar="FILE|NAME:COUNT", help=where)
    about = "default: table; helm: values for the chart"
    parser.add_argument("--format", action=Once, metavar=_choice(commands.PLAN_FORMATS), help=about)


def _gpus_flags(parser: ArgumentParser) -> None:
    engine = "engine: cuda or cpu, the vLLM build that this machine needs"
    about = f"default: table; json: a hardware file for plan --hardware; {engine}"
    parser.add_argument("--format", action=Once, metavar=_choice(commands.GPU_FORMATS), help=about)


def _download_flags(parser: ArgumentParser) -> None:
    about = "download nothing: wait until another process has downloaded the model"
    parser.add_argument("--wait", action="store_true", help=about)


class Command(NamedTuple):
    """One sub-command: its function, its arguments for the usage line, and its purpose.

    ``add_flags``: the function that adds the sub-command's own flags. ``takes_settings``: whether it also takes vLLM's
    flags and the launcher's settings.
    """

    run: Callable[[Namespace, Sequence[str]], int]
    usage: str
    does: str
    add_flags: Callable[[ArgumentParser], None] | None = None
    takes_settings: bool = True


COMMANDS = {
    "serve": Command(
        commands.serve,
        "MODEL",
        "plan for this machine, run vLLM with that plan, watch it, and drain it before it stops",
    ),
    "plan": Command(
        commands.plan,
        "MODEL [--hardware FILE|NAME:COUNT] [--format FORMAT]",
        "print the plan and start nothing; --hardware plans for another machine",
        _plan_flags,
    ),
    "gpus": Command(
        commands.gpus, "[--format FORMAT]", "print the hardware of this machine", _gpus_flags, takes_settings=False
    ),
    "check": Command(commands.check, "CONFIG [MODEL]", "check a config file and start nothing"),
    "download": Command(
        commands.download,
        "MODEL [--wait]",
        "download a model from the hub into the cache that serve uses",
        _download_flags,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Invalid input prints one line on stderr and returns 2."""
    _open_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"vllm-launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `vllm-launch plan ... | head`
        commands.discard_stdout()
        return 128 + signal.SIGPIPE
    return code


def _open_streams() -> None:
    """Open closed standard streams as /dev/null, and write stdout in UTF-8 under every locale.

    If a standard stream stays closed, the next file or socket gets its number and receives vLLM's output.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open until exit
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _run(words: list[str]) -> int:
    if words[:1] == ["vllm-health"]:  # `docker run IMAGE vllm-health …`: the entrypoint is vllm-launch
        from vllm_health.__main__ import main as vllm_health  # noqa: PLC0415 - the other commands need no HTTP

        return vllm_health(words[1:])
    for position, word in enumerate(words, 1):
        if not word.isascii() and word != word.encode(errors="ignore").decode():  # it may be a key, so it is not shown
            raise UsageError("command line", f"word {position} is not UTF-8 text", "write it in UTF-8")
    if not words:
        print(command_line().format_help(), end="", file=sys.stderr)
        return 2
    if words[0] not in {*COMMANDS, "help", "-h", "--help", "-V", "--version"}:
        raise _no_command(words[0], words[1:], COMMANDS)
    try:
        parsed, rest = command_line().parse_known_args(
            with_dashes(["--help" if words[0] == "help" else words[0], *words[1:]])
        )
    except _Answered:
        return 0
    return COMMANDS[parsed.command].run(parsed, rest)


def command_line() -> ArgumentParser:
    """Return the parser of all commands.

    It parses only the launcher's flags. ``parse_known_args`` returns all other words in their order.
    """
    parser = Parser(prog="vllm-launch", usage="vllm-launch COMMAND ...", add_help=False)
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help; after a command, its options")
    versions = "print the version of vllm-launch and of the vLLM that it needs"
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help=versions)
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    settings = settings_parser()
    for name, command in COMMANDS.items():
        one = chosen.add_parser(
            name,
            usage=f"vllm-launch {name} {command.usage}{SETTINGS_USAGE if command.takes_settings else ''}",
            help=command.does,
            description=f"{command.does[0].upper()}{command.does[1:]}.",
            epilog=VLLM_OPTIONS if command.takes_settings else None,
            parents=[settings] if command.takes_settings else [],
            add_help=False,
        )
        one.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help")
        if command.add_flags:
            command.add_flags(one)
    return parser


class _Answered(Exception):  # noqa: N818 - it is no error
    """The help text or the version is printed, so there is nothing more to do."""


class _Help(Action):
    def __call__(self, parser: ArgumentParser, *_: Any) -> NoReturn:
        commands.print_text(parser.format_help())
        raise _Answered


class _Version(Action):
    def __call__(self, *_: Any) -> NoReturn:
        from importlib.metadata import version  # noqa: PLC0415 - slow to load, and only needed here

        commands.print_text(f"vllm-launch {version('vllm-launch')}, for vLLM {pinned_vllm()}\n")
        raise _Answered


def _no_command(word: str, rest: Sequence[str], known: Iterable[str]) -> UsageError:
    otherwise = "give serve, plan, gpus, check or download"
    if word.startswith("-") or {*rest} & {*known}:
        return UsageError(word, "must come after the command", otherwise)
    if os.path.isdir(word) or "/" in word:  # noqa: PTH112 - Path.is_dir raises OSError if the name is too long
        otherwise = f"write vllm-launch serve {word}"
    return UsageError(f"command {word!r}", "there is no such command", nearest(word, known, otherwise))


if __name__ == "__main__":
    sys.exit(main())
