"""`fastmoco completion SHELL`: prints a script with which bash, zsh or fish completes what is typed.

The scripts ask `fastmoco completion --words WORD ...` at every completion, so that what they offer is what this version
takes. Its answer has a line for each candidate, `VALUE<tab>EXPLANATION`, and PATHS where files and folders fit too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastmoco.config.arguments import suggestion
from fastmoco.config.fields import Option, options_of
from fastmoco.config.flags import HELP, Takes, flags_of
from fastmoco.config.help import first_statement
from fastmoco.errors import ConfigError
from fastmoco.recipes import RECIPES
from fastmoco.registry import COMMAND_OPTIONS
from pipelines.data.names import NAMES
from pipelines.registry import load

PATHS = ":paths"
OF_RUN_CONFIG = ("train", "sweep")  # they take [RECIPE] [DATA]
ADDED = {
    "train": {"--config": "Settings from the config.json of a run"},
    "sweep": {"--vary": "A setting and its values, such as moco-m=0,0.9"},
}
"""Flags that a command has beside those of its dataclass."""

USAGE = """usage: fastmoco completion bash|zsh|fish

Print a script that completes commands, flags, their values, recipes and paths.

  bash  echo 'eval "$(fastmoco completion bash)"' >> ~/.bashrc
  zsh   echo 'eval "$(fastmoco completion zsh)"' >> ~/.zshrc, after compinit
  fish  fastmoco completion fish > ~/.config/fish/completions/fastmoco.fish"""

_BASH = """_fastmoco() {
    local value text current="${COMP_WORDS[COMP_CWORD]}"
    [[ $current == '=' ]] && current=''
    COMPREPLY=()
    while IFS=$'\\t' read -r value text; do
        if [[ $value == ':paths' ]]; then
            compopt -o filenames 2>/dev/null
            while IFS= read -r value; do COMPREPLY+=("$value"); done < <(compgen -f -- "$current")
        else
            COMPREPLY+=("$value")
        fi
    done < <("${COMP_WORDS[0]}" completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _fastmoco fastmoco"""

_ZSH = """#compdef fastmoco
_fastmoco() {
    local line paths
    local -a candidates
    for line in "${(@f)$("${words[1]}" completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == ':paths' ]]; then
            paths=1
        elif [[ -n $line ]]; then
            candidates+=("${${line//:/\\\\:}/$'\\t'/:}")
        fi
    done
    (( $#candidates )) && _describe fastmoco candidates
    [[ -n $paths ]] && _files
    return 0
}
if [[ ${funcstack[1]} == _fastmoco ]]; then
    _fastmoco "$@"
else
    compdef _fastmoco fastmoco
fi"""

_FISH = """function __fastmoco_complete
    set -l words (commandline -opc) (commandline -ct)
    for line in ($words[1] completion --words $words[2..-1] 2>/dev/null)
        if test "$line" = ':paths'
            __fish_complete_path (commandline -ct)
        else
            echo $line
        end
    end
end
complete -c fastmoco -f -a '(__fastmoco_complete)'"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion_command(argv: list[str]) -> None:
    """Print the script of a shell, or the candidates that it asks for. Raises ConfigError for an unknown shell."""
    if argv[:1] == ["--words"]:
        for value, text in candidates(argv[1:]):
            print(f"{value}\t{text}" if text else value)
        return
    if {*HELP} & {*argv}:
        print(USAGE)
        return
    if len(argv) != 1 or argv[0] not in SCRIPTS:
        advice = suggestion(argv[0], SCRIPTS) if len(argv) == 1 else "see fastmoco completion --help"
        found = repr(" ".join(argv)) if argv else "none"
        raise ConfigError(f"fastmoco completion takes a shell, bash, zsh or fish, and got {found}; {advice}")
    print(SCRIPTS[argv[0]])


def candidates(words: Sequence[str]) -> list[tuple[str, str]]:
    """What the last of the words after `fastmoco` can become, each with an explanation; (PATHS, "") for paths."""
    *before, current = words
    before, current = [word for word in before if word != "="], "" if current == "=" else current
    if not before:
        return _starting(current, [(name, "") for name in COMMAND_OPTIONS])
    command = before[0]
    if command not in COMMAND_OPTIONS:
        return []
    name, equals, value = current.partition("=")
    if equals and name.startswith("--"):  # as zsh and fish have it; bash divides it into three words
        return [(f"{name}={v}", text) for v, text in _values(command, name, value) if v != PATHS]
    if _takes_value(command, before[-1]):
        return _values(command, before[-1], current)
    if current.startswith("-"):
        return _starting(current, _flags(command))
    return _positional(command, current)


def _options(command: str) -> list[Option]:
    target = COMMAND_OPTIONS[command]
    return options_of(load(target)) if target else []


def _flags(command: str) -> list[tuple[str, str]]:
    flags = [("--help", "The most used flags"), (HELP[-1], "All flags")]
    for option in _options(command):
        flags += [(name, first_statement(option.text)) for name in option.flags]
        if option.has_opposite:
            flags.append(("--no-" + option.flags[-1].removeprefix("--"), f"Not: {first_statement(option.text)}"))
    return [*flags, *ADDED.get(command, {}).items()]


def _takes_value(command: str, word: str) -> bool:
    target = COMMAND_OPTIONS[command]
    takes = flags_of(load(target)).takes if target else {}
    return word in ADDED.get(command, {}) or takes.get(word, Takes.NOTHING) != Takes.NOTHING


def _values(command: str, flag: str, current: str) -> list[tuple[str, str]]:
    """The values of a flag."""
    option = next((option for option in _options(command) if flag in option.flags), None)
    if flag == "--config":
        return [(PATHS, "")]
    if option is None:
        return []
    names = NAMES if option.name == "data" else option.choices
    return _starting(current, [(name, "") for name in names]) + ([(PATHS, "")] if option.is_path else [])


def _positional(command: str, current: str) -> list[tuple[str, str]]:
    """The values that need no flag, and --resume's RUN."""
    recipes = [(name, function.__doc__ or "") for name, function in RECIPES.items()]
    if command == "completion":
        return _starting(current, [(shell, "") for shell in SCRIPTS])
    if command == "recipes":
        return _starting(current, recipes)
    named = [*(recipes if command in OF_RUN_CONFIG else []), *((name, "data set") for name in NAMES)]
    takes_data = command in OF_RUN_CONFIG or any(o.name == "data" and not o.flags for o in _options(command))
    return (_starting(current, named) if takes_data else []) + ([(PATHS, "")] if COMMAND_OPTIONS[command] else [])


def _starting(current: str, known: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, text) for name, text in known if name.startswith(current)]
