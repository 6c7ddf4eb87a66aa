"""The command line: which command, what it reads, what it prints, with which code it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from vllm_launch.commands import check, download, drop_stdout, gpus, plan, say, serve
from vllm_launch.engine.options import nearest, pinned_vllm
from vllm_launch.errors import UsageError

USAGE = """\
usage: vllm-launch COMMAND ...

  serve MODEL [any flag of vllm serve] [--launch-SETTING VALUE] [--config FILE]
        plan for this machine, run vLLM by the plan, watch it, drain it
  plan  MODEL [the same flags] [--hardware FILE|NAME:COUNT] [--format table|json|yaml|helm]
        the plan alone, also for hardware that is not here: H100:8, L4, a file made by `vllm-launch gpus`;
        helm: values for the chart
  gpus  [--format table|json]
        what this machine has; the JSON is a hardware file
  check CONFIG [MODEL] [flags]
        whether a config file is right, without starting anything
  download MODEL [--wait] [the same flags]
        fetch the model from the hub into the cache that serve uses, but for files that an earlier try has whole;
        --wait: let another process do it, and end when it has

MODEL is a folder or a name on the Hugging Face hub. vLLM's options may be flags or lines of config.yaml, and
`vllm serve --help=all` explains them; our own settings have three spellings, such as --launch-health-port,
LAUNCH_HEALTH_PORT and `launch: {health_port: 8001}`:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. 2 is a mistake in what was given, said in one line on stderr."""
    _open_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        print(f"vllm-launch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `vllm-launch plan ... | head`
        drop_stdout()
        return 128 + signal.SIGPIPE
    return code


def _open_streams() -> None:
    """What is closed of stdin, stdout and stderr becomes /dev/null; what we print is UTF-8, whatever the locale.

    Else the next file or socket would take the number of a closed one, and with it what vLLM prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - for the process's life
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _run(words: list[str]) -> int:
    if words[:1] == ["vllm-health"]:  # `docker run IMAGE vllm-health …`: our entrypoint is the image's
        from vllm_health.__main__ import main as vllm_health  # noqa: PLC0415 - the others need no HTTP

        return vllm_health(words[1:])
    commands = {"serve": serve, "plan": plan, "gpus": gpus, "check": check, "download": download}
    for place, word in enumerate(words, 1):
        if not word.isascii() and word != word.encode(errors="ignore").decode():  # maybe a key, so it is not shown
            remedy = "spell it in UTF-8, which is what a plan and vLLM's requests are written in"
            raise UsageError("command line", f"word {place} is not UTF-8 text", remedy)
    command_word, rest = (words[0], words[1:]) if words else ("", [])
    if command_word in {"", "-h", "--help", "help"} or (command_word in commands and _wants_help(rest)):
        if not words:
            print(USAGE + _setting_names(), file=sys.stderr)
            return 2
        say(USAGE + _setting_names() + "\n")
        return 0
    if command_word in {"-V", "--version"}:
        from importlib.metadata import version  # noqa: PLC0415 - slow to load, and only needed here

        say(f"vllm-launch {version('vllm-launch')}, for vLLM {pinned_vllm()}\n")
        return 0
    if command_word not in commands:
        raise _no_command(command_word, rest, commands)
    return commands[command_word](rest)


def _wants_help(words: Sequence[str]) -> bool:
    return any(word in {"-h", "--help"} or word.startswith("--help=") for word in words)


def _no_command(word: str, rest: Sequence[str], commands: Iterable[str]) -> UsageError:
    otherwise = "give serve, plan, gpus, check or download"
    if word.startswith("-") or {*rest} & {*commands}:
        return UsageError(word, "the command comes first", otherwise)
    if os.path.isdir(word) or "/" in word:  # noqa: PTH112 - a start need not wait for pathlib
        otherwise = f"write vllm-launch serve {word}"
    return UsageError(f"command {word!r}", "there is no such command", nearest(word, commands, otherwise))


def _setting_names() -> str:
    from vllm_launch.settings.settings import LauncherSettings  # noqa: PLC0415 - for its fields alone

    names = ", ".join(LauncherSettings.__struct_fields__)
    return f"  {names}\nWhat each one means: docs/config.example.yaml"


if __name__ == "__main__":
    sys.exit(main())
