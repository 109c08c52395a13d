"""The console command se-keras: arguments in, one library call, output.

It is installed as the package `se_keras_cli`, next to se_keras, and imports se_keras only when a command runs. As a
part of se_keras, Python would import Keras and TensorFlow first, and `se-keras --help` would take seconds.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from rich.console import Console

if __name__ != "se_keras_cli":
    raise ImportError(f"This package is se_keras_cli: the command se-keras. Received: {__name__}")

from . import (
    benchmarking,
    checking,
    evaluating,
    exporting,
    gating,
    networks,
    predicting,
    profiling,
    quickstart,
    serving,
    training,
)
from .arguments import complete_network
from .screen import USER_ERRORS, hide_native_logs, print_message

COMMANDS = (  # in the order of the help
    networks.add_list,
    networks.add_show,
    training.add_train,
    evaluating.add_evaluate,
    training.add_curves,
    training.add_pack,
    exporting.add_export,
    predicting.add_predict,
    checking.add_inspect,
    checking.add_verify,
    gating.add_gates,
    benchmarking.add_benchmark,
    profiling.add_profile,
    benchmarking.add_report,
    benchmarking.add_benchmark_input,
    benchmarking.add_benchmark_training,
    serving.add_serve_config,
    serving.add_serve_check,
    serving.add_benchmark_serving,
    quickstart.add_quickstart,
)
RUNS_ON = {"TensorFlow": "tensorflow", "Keras": "keras", "LiteRT": "ai-edge-litert"}
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    It is 0 for success, 2 for an error that the user can correct, 130 after Ctrl-C, 1 if `verify` or `serve-check`
    finds that two models disagree or `predict` cannot read a photo, and 75 if `train` was stopped by SIGTERM and can be
    resumed.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete  # an extra; the shell calls it for each completion

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` interrupts as Ctrl-C does
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="se_keras")
    warnings.showwarning = lambda message, *_, **__: print_message(console, f"warning: {message}")
    try:
        with hide_native_logs():
            status = options.command(options, console)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as interrupt:
        print_message(console, f"interrupted. {interrupt}".rstrip())
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `se-keras list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print_message(console, f"error: {' '.join(str(error).split()) or type(error).__name__}")
        return EXIT_ERROR


def _parser():
    parser = argparse.ArgumentParser(
        prog="se-keras",
        description="Squeeze-and-Excitation networks for Keras 3, from training to the phone and the server.",
        epilog="Examples:\n  se-keras quickstart\n  se-keras show se_resnet50\n  se-keras COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    used = ", ".join(f"{name} {version(package)}" for name, package in RUNS_ON.items())
    parser.add_argument("--version", action="version", version=f"se-keras {version('se-keras')} ({used})")
    parser.set_defaults(traceback=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest == "network":
                setattr(action, "completer", complete_network)  # noqa: B010  argcomplete's own attribute
    return parser
