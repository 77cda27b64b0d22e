"""``fastdiff completion``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from fastdiff.cli.parser import add_command

SHELLS = ("bash", "zsh", "fish")


def add(commands: Any) -> None:
    completion = add_command(
        commands,
        "completion",
        "print what makes a shell complete commands and options",
        "Prints a script for a shell, which then completes commands, options and the\n"
        "values that are words. Written anew by each start of a shell it knows the\n"
        "version that is installed.",
        "to be added to the file that the shell reads when it starts:\n"
        '  ~/.bashrc    eval "$(fastdiff completion bash)"\n'
        '  ~/.zshrc     eval "$(fastdiff completion zsh)"\n'
        "  config.fish  fastdiff completion fish | source\n",
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=lambda args: run(args, commands))


def run(args: argparse.Namespace, commands: Any) -> int:
    if args.shell == "fish":
        lines = _fish(commands.choices, {action.dest: action.help for action in commands._choices_actions})
    else:
        lines = _bash(commands.choices, zsh=args.shell == "zsh")
    print("\n".join(lines))
    return 0


def _actions(command: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in command._actions if action.help != argparse.SUPPRESS]


def _bash(commands: Mapping[str, argparse.ArgumentParser], *, zsh: bool) -> Iterator[str]:
    """A function for bash, which zsh understands as well; where it offers nothing, the shell offers files."""
    if zsh:
        yield "autoload -Uz compinit bashcompinit && compinit && bashcompinit"
    yield "_fastdiff() {"
    yield '    local now=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=""'
    yield '    case "${COMP_WORDS[1]} $before" in'
    for name, command in commands.items():
        for action in _actions(command):
            if action.choices:  # after the option, or, of what is none, after the command
                cases = "|".join(f"'{name} {option}'" for option in action.option_strings or [name])
                yield f"        {cases}) words='{' '.join(map(str, action.choices))}' ;;"
    yield "    esac"
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f"        words='{' '.join([*commands, '--help', '--version'])}'"
    yield '    elif [ -z "$words" ] && [ "${now#-}" != "$now" ]; then'
    yield '        case "${COMP_WORDS[1]}" in'
    for name, command in commands.items():
        words = " ".join(option for action in _actions(command) for option in action.option_strings)
        yield f"            {name}) words='{words}' ;;"
    yield "        esac"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$now"))'
    yield "}"
    yield "complete -o default -F _fastdiff fastdiff"


def _fish(commands: Mapping[str, argparse.ArgumentParser], about: Mapping[str, str]) -> Iterator[str]:
    for name, command in commands.items():
        yield f"complete -c fastdiff -n __fish_use_subcommand -a {name} -d {shlex.quote(about[name])}"
        for action in _actions(command):
            words = "" if not action.choices else f" -a {shlex.quote(' '.join(map(str, action.choices)))}"
            if action.option_strings or words:
                names = [f" -l {word[2:]}" if word[:2] == "--" else f" -s {word[1:]}" for word in action.option_strings]
                takes = "" if action.nargs == 0 else " -x" if words else " -r"
                here = f"complete -c fastdiff -n '__fish_seen_subcommand_from {name}'"
                yield f"{here}{''.join(names)}{takes}{words}"
