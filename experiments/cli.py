"""Shared parts of the commands: flags, changes to configs, and one line with exit code 2 for wrong input."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from absl import app, flags, logging

from experiments import flag_help
from lcx.errors import UserError
from lcx.text import visible

HELP = {"--help", "-help", "-h", "--h", "-?"}

_changes: dict[str, str] = {}
_arguments: list[str] = []


def _has(package: str) -> bool:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(package) is not None
    return False


# wheels that only compile for a GPU come without cuDNN: JAX would log an error and fall back to the CPU, so it takes the CPU at once
if _has("jax_plugins.xla_cuda13") and not (Path("/dev/nvidia0").exists() and _has("nvidia.cudnn")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def define_flags(config: str | None = None, several: bool = False) -> None:
    """Define the flags of every command that runs a model.

    Args:
      config: the default of --config.
      several: --model, --dtype, --budget and --keep_ratio take several, with commas between.
    """
    flags.DEFINE_string(
        "config", config, "Config file, or snapkv for configs/snapkv.py; --config.FIELD=VALUE changes a field."
    )
    flags.DEFINE_string(
        "model", None, "A name of lcx.pretrained, a GGUF file, a folder or a hub id; the default is the config's."
    )
    dtype_help = "Type of weights, activations and exact caches."
    if several:
        flags.DEFINE_string("dtype", "float32", f"{dtype_help}  float32, bfloat16 or both with a comma between.")
    else:
        flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], dtype_help)
    budget_help = "Tokens kept per KV head, sinks and observation window included"
    ratio_help = "The budget as a fraction of the prompt, above 0 and at most 1"
    if several:
        flags.DEFINE_string("budget", None, f"{budget_help}; several with commas between.")
        flags.DEFINE_string("keep_ratio", None, f"{ratio_help}; several with commas between.")
    else:
        flags.DEFINE_integer("budget", None, f"{budget_help}.", lower_bound=1)
        flags.DEFINE_float("keep_ratio", None, f"{ratio_help}.")
    flags.DEFINE_integer(
        "chunk_size", None, "Tokens a prefill step takes; the default is the config's schedule.", lower_bound=1
    )
    flags.DEFINE_enum(
        "implementation",
        None,
        ["xla", "pallas", "cudnn"],
        "Of attention; by default the kernels where they can on a Hopper GPU, else XLA.",
    )
    flags.DEFINE_bool("allow_extrapolation", False, "Run beyond the context that the model was trained for.")
    flags.DEFINE_bool("accept_licence", False, "You agree to the licence of a model that asks for it (Gemma).")


def arguments() -> list[str]:
    """Return the words of the command line that are no flags."""
    return list(_arguments)


def run(name: str, main: Callable[[], None], takes_arguments: bool = False) -> None:
    """Parse the flags and run a command; wrong input ends in one line on stderr and exit code 2.

    Args:
      name: of the command.
      main: what it does.
      takes_arguments: words that are no flags are kept for `arguments`, else refused.
    """

    def guarded(argv: Sequence[str]) -> None:
        _arguments[:] = argv[1:]
        if len(argv) > 1 and not takes_arguments:
            refuse(name, f"argument {argv[1]!r}; allowed are only flags, such as --model=smollm2-135m")
        # absl shows INFO unless told otherwise: JAX's search for other backends and matplotlib's for fonts
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            refuse(name, str(error))
        except BrokenPipeError:
            # the reader of a pipe has gone; finished work is on disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    app.run(guarded, flags_parser=lambda argv: _parse(name, argv))


def refuse(name: str, problem: str) -> None:
    # text from outside must not steer the terminal
    print(f"{name}: {visible(' '.join(problem.split()), 4_000)}", file=sys.stderr)
    sys.exit(2)


def _parse(name: str, argv: Sequence[str]) -> list[str]:
    rest = []
    for arg in argv:
        dashes = arg.lstrip("-") if arg.startswith("-") else ""
        if dashes.startswith("config."):
            key, equals, value = dashes.removeprefix("config.").partition("=")
            if "config" not in flags.FLAGS:
                refuse(name, f"--config.{key}: this command takes no config")
            if not equals:
                refuse(name, f"--config.{key} needs a value: --config.{key}=VALUE")
            _changes[key] = value
        else:
            rest.append(arg)
    if HELP & set(argv[1:]):
        print(flag_help.text(name))
        sys.exit(0)
    # absl prints its whole help for a wrong flag and exits with 1
    try:
        words = flags.FLAGS(rest)
    except flags.Error as error:
        refuse(name, str(error))
        raise
    if "config" in flags.FLAGS and flags.FLAGS.config:
        _name_configs(flags.FLAGS.config)
    return words


def _name_configs(given: str) -> None:
    """Write --config=snapkv as the path of its file, so that every use of the flag names the same config."""
    from lcx.config_files import full_name

    flags.FLAGS["config"].value = ",".join(full_name(part.strip()) for part in given.split(","))


def changes() -> dict[str, str]:
    """Return the changes of --config.FIELD=VALUE: field -> text."""
    return dict(_changes)


def config():
    """Return the config of --config with its changes and with --chunk_size and --model."""
    from lcx.config_files import load_config

    loaded = load_config(flags.FLAGS.config, _changes)
    if flags.FLAGS.model is not None:
        loaded = replace(loaded, model=flags.FLAGS.model)
    if flags.FLAGS.chunk_size is not None:
        loaded = loaded.with_chunks(flags.FLAGS.chunk_size)
    return loaded


def experiment():
    """Return the config, which must be that of one method."""
    from lcx.experiment import Experiment

    loaded = config()
    if not isinstance(loaded, Experiment):
        raise UserError(f"config={flags.FLAGS.config!r} is a sweep; allowed here is the config of one method")
    if flags.FLAGS.implementation is not None:
        loaded = replace(loaded, implementation=flags.FLAGS.implementation)
    return loaded


def with_budget(experiment, prompt: int):
    """Return the experiment with --budget or --keep_ratio of the prompt."""
    return experiment.with_budget(prompt, flags.FLAGS.budget, flags.FLAGS.keep_ratio)


def check_model_free(experiment) -> None:
    """Raise UserError, before the model is loaded, for requests that need no model to be refused: a budget where none fits."""
    if flags.FLAGS.budget is not None or flags.FLAGS.keep_ratio is not None:
        with_budget(experiment, 1 << 20)


MOST_COMPILED = 1 << 30  # bytes of compiled programs that are kept between runs; those not used for longest go first


def keep_compiled() -> None:
    """Let JAX keep compiled programs between runs, in the user's cache folder; JAX's own variables have their way."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "lcx" / "compiled"))
        if _has("filelock"):  # JAX counts what lies there only with it
            jax.config.update("jax_compilation_cache_max_size", MOST_COMPILED)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def load_model(name: str):
    """Load a model by its name, file, folder or hub id."""
    import lcx.models.loading

    keep_compiled()
    return lcx.models.loading.load(name, flags.FLAGS.dtype, flags.FLAGS.accept_licence)


def load(experiment):
    """Load the model of a config."""
    model = load_model(experiment.model)
    experiment.check_weights(model.config, model.sha256, lambda: model.tensors_sha256)
    return model


def check_writable(name: str, path: str | Path) -> None:
    """Raise UserError, before anything runs, for a file that could not be written at the end."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{name}={str(path)!r} is a folder; allowed is a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{name}={str(path)!r} cannot be written; give a file in a folder that may be")


def read_text(path: str) -> str:
    """Read a UTF-8 text file, as `lcx.texts.read_file` gives it."""
    from lcx import texts

    return texts.read_file(path)
