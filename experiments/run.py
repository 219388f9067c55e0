"""Runs a study: `python -m experiments.run NAME [settings]`.

python -m experiments.run quickstart
python -m experiments.run combinations --dataset pneumonia_mnist --scale cpu --seeds 0 1 2
python -m experiments.run epsilon_curve --dataset pneumonia_mnist
python -m experiments.run codecs --dataset pneumonia_mnist --seeds 0 1 2
python -m experiments.run combinations --help
python -m experiments.run audit
python -m experiments.run attack --models results/combinations-pneumonia_mnist-cpu
"""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tyro
from rich.console import Console

import experiments.attack.settings as attack_settings
import experiments.attack.study as attack_study
import experiments.audit.settings as audit_settings
import experiments.audit.study as audit_study
import experiments.codecs.presets as codec_presets
import experiments.codecs.study as codec_study
import experiments.combinations.presets as combination_presets
import experiments.combinations.study as combination_study
import experiments.epsilon_curve.presets as curve_presets
import experiments.epsilon_curve.study as curve_study
from experiments.combinations.settings import Scale


class Command(NamedTuple):
    """A study. Attributes: preset: `(dataset, scale) -> settings`; run: `(settings, console) -> exit status`."""

    preset: Callable[[str, Scale], Any]
    run: Callable[[Any, Console], int]


def _shown(run: Callable[[Any, Console], Any]) -> Callable[[Any, Console], int]:
    """A study that has only results to show: status 0."""

    def run_and_return(settings: Any, console: Console) -> int:
        run(settings, console)
        return 0

    return run_and_return


COMMANDS = {
    "quickstart": Command(functools.partial(combination_presets.preset, "quickstart"), _shown(combination_study.run)),
    "combinations": Command(
        functools.partial(combination_presets.preset, "combinations"), _shown(combination_study.run)
    ),
    "epsilon_curve": Command(curve_presets.preset, _shown(curve_study.run)),
    "codecs": Command(codec_presets.preset, _shown(codec_study.run)),
    "audit": Command(functools.partial(audit_settings.audit_preset, "audit"), audit_study.run),
    # Data set and scale are those of the models.
    "attack": Command(lambda _dataset, _scale: attack_settings.Attacking(), _shown(attack_study.run)),
}


def main(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: what stands behind `python -m experiments.run`.

    Returns:
        The study's exit status, 0 where all is well; 2 after a one-line error on standard error.
    """
    try:
        settings = parse(arguments)
        return COMMANDS[arguments[0]].run(settings, Console())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str]) -> Any:
    """The settings that a command line asks for, of the type that its study has.

    Raises:
        ValueError: unknown study or setting, or a value that is not allowed.
        SystemExit: for --help.
    """
    name, *rest = arguments or ("--help",)
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0)
    if name not in COMMANDS:
        raise ValueError(f"study is {name!r}: must be one of {', '.join(COMMANDS)}")
    default = COMMANDS[name].preset(_peek(rest, "--dataset", "digits"), _scale(_peek(rest, "--scale", "cpu")))
    wants_help = "-h" in rest or "--help" in rest
    captured = io.StringIO()
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(captured):
            settings, unknown = tyro.cli(
                type(default),
                default=default,
                args=rest,
                prog=f"python -m experiments.run {name}",
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if wants_help:
            raise
        raise ValueError(_one_line(captured.getvalue())) from stop
    if unknown:
        raise ValueError(f"{unknown[0]}: no such setting; `python -m experiments.run {name} --help` lists all")
    return settings


def _peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of a flag that decides the preset, before the rest is parsed."""
    for position, argument in enumerate(arguments):
        if argument == flag and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return default


def _scale(value: str) -> Scale:
    if value not in ("smoke", "cpu", "paper"):
        raise ValueError(f"--scale is {value!r}: must be one of smoke, cpu, paper")
    return value  # type: ignore[return-value]


def _one_line(message: str) -> str:
    """What tyro printed in a box, as one line without its title and its pointer to the help."""
    text = " ".join(re.sub(r"-{4,}|[╭╮╰╯│─]", " ", message).split()).partition(" For full helptext")[0]
    text = re.sub(r"^(Value error )?(Error parsing \w+: )?", "", text)
    return re.sub(r"^(.+?) (?=\1)", "", text, flags=re.IGNORECASE)  # "Invalid choice invalid choice 'x' for ..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
