"""Command line of ``vllm-launch``: finds the command, runs it, and exits with its code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from vllm_launch.commands import check, discard_stdout, download, gpus, plan, print_text, serve
from vllm_launch.engine.options import nearest, pinned_vllm
from vllm_launch.errors import UsageError

USAGE = """\
usage: vllm-launch COMMAND ...

  serve MODEL [any flag of vllm serve] [--launch-SETTING VALUE] [--config FILE]
        plan for this machine, run vLLM with that plan, watch it, and drain it before it stops
  plan  MODEL [the same flags] [--hardware FILE|NAME:COUNT] [--format table|json|yaml|helm]
        print the plan and start nothing. --hardware plans for another machine: H100:8, L4, or a file written by
        `vllm-launch gpus --format json`. --format helm prints values for the chart
  gpus  [--format table|json]
        print the hardware of this machine. The JSON output is a hardware file
  check CONFIG [MODEL] [flags]
        check a config file and start nothing
  download MODEL [--wait] [the same flags]
        download the model from the hub into the cache that serve uses. Complete files are not downloaded again.
        --wait: download nothing, and wait until another process has downloaded the model

MODEL is a folder or a model name on the Hugging Face hub. Write vLLM's options as flags or as lines of config.yaml.
`vllm serve --help=all` explains them. Our own settings have three spellings, for example --launch-health-port,
LAUNCH_HEALTH_PORT and `launch: {health_port: 8001}`:
"""


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
        discard_stdout()
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
    commands = {"serve": serve, "plan": plan, "gpus": gpus, "check": check, "download": download}
    for position, word in enumerate(words, 1):
        if not word.isascii() and word != word.encode(errors="ignore").decode():  # it may be a key, so it is not shown
            raise UsageError("command line", f"word {position} is not UTF-8 text", "write it in UTF-8")
    command_word, rest = (words[0], words[1:]) if words else ("", [])
    if command_word in {"", "-h", "--help", "help"} or (command_word in commands and _wants_help(rest)):
        if not words:
            print(USAGE + _setting_names(), file=sys.stderr)
            return 2
        print_text(USAGE + _setting_names() + "\n")
        return 0
    if command_word in {"-V", "--version"}:
        from importlib.metadata import version  # noqa: PLC0415 - loads slowly and is needed only here

        print_text(f"vllm-launch {version('vllm-launch')}, for vLLM {pinned_vllm()}\n")
        return 0
    if command_word not in commands:
        raise _unknown_command(command_word, rest, commands)
    return commands[command_word](rest)


def _wants_help(words: Sequence[str]) -> bool:
    return any(word in {"-h", "--help"} or word.startswith("--help=") for word in words)


def _unknown_command(word: str, rest: Sequence[str], commands: Iterable[str]) -> UsageError:
    remedy = "use serve, plan, gpus, check or download"
    if word.startswith("-") or {*rest} & {*commands}:
        return UsageError(word, "the command must come first", remedy)
    if os.path.isdir(word) or "/" in word:  # noqa: PTH112 - loading pathlib takes time
        remedy = f"write vllm-launch serve {word}"
    return UsageError(f"command {word!r}", "there is no such command", nearest(word, commands, remedy))


def _setting_names() -> str:
    from vllm_launch.settings.settings import LauncherSettings  # noqa: PLC0415 - only for its field names

    names = ", ".join(LauncherSettings.__struct_fields__)
    return f"  {names}\ndocs/config.example.yaml explains each setting"


if __name__ == "__main__":
    sys.exit(main())
