"""Did the launcher start what was asked for? Checked in every process before anything else, from the environment alone.

`accelerate launch` has several ways to start one unconnected process where many were asked for, each without an error. No process group is
needed to find out, so nothing here can wait for a process that never comes.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tracknet.errors import ConfigError

MODULE = "tracknet.scripts.train"
# What FSDP can be asked for besides: variable, the value that is honoured, why no other one is.
SHARDING_SETTINGS = (
    ("FSDP_OFFLOAD_PARAMS", "false", "parameters stay on the device"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "false", "training.micro_batch_size bounds the memory of activations"),
    ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "the stages and layers of the network are gathered one by one anyway"),
    ("FSDP_IGNORED_MODULES", "", "all parameters are sharded"),
    ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT", "checkpoints are whole, so that they can be resumed and used without sharding"),
)


@dataclass(frozen=True)
class LaunchRequest:
    """What a command line asked `accelerate launch` for; None where it left the choice to accelerate.

    Attributes:
        num_processes: Processes on all machines together.
        num_machines: Machines.
        cpu: Whether the CPU was asked for.
    """

    num_processes: int | None = None
    num_machines: int | None = None
    cpu: bool = False


def world_from_environment(environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Reads what torchrun and `accelerate launch` tell each process; a process without a launcher is alone.

    Returns:
        rank (0 to world size - 1), world size, local rank, local world size (processes on this machine).

    Raises:
        ConfigError: One of the variables is not a whole number, or only some of them are set.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    there = [name for name in names if name in environ]
    if not there:
        return 0, 1, 0, 1
    if len(there) < len(names):
        missing = ", ".join(name for name in names if name not in there)
        raise ConfigError(
            f"the environment has {', '.join(there)} but not {missing}; unset them, or start with launch.sh, accelerate launch or torchrun"
        )
    rank, world_size, local_rank, local_world_size = (_whole_number(name, environ) for name in names)
    return rank, world_size, local_rank, local_world_size


def ancestor_command_lines() -> list[list[str]]:
    """The command lines of the processes above this one, nearest first; those that may not be read are left out."""
    lines: list[list[str]] = []
    with contextlib.suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            with contextlib.suppress(psutil.Error, OSError):
                lines.append(process.cmdline())
    return lines


def check_world_size(found: int, environ: Mapping[str, str], ancestors: Sequence[Sequence[str]], module: str = MODULE) -> None:
    """Refuses a world of another size than was asked for.

    The size asked for is TRACKNET_EXPECTED_WORLD_SIZE (launch.sh exports it), else what the nearest `accelerate launch` among the ancestors
    was given (options, its YAML, or the default YAML), else WORLD_SIZE. Nothing is checked where none of them says a number.
    Call it before `Accelerator()` is made with the world size of `world_from_environment`, and after with `accelerator.num_processes`:
    on a CPU, accelerate can leave processes unconnected that WORLD_SIZE calls a group.

    Args:
        found: Processes that really train together.
        environ: The environment variables of this process.
        ancestors: Command lines of the ancestors, nearest first.
        module: What runs, for the command in the message.

    Raises:
        ConfigError: Names both numbers and the command that starts the number asked for on this machine.
    """
    request = _request_of_ancestors(ancestors, environ)
    expected = _expected_world_size(found, request, environ)
    if expected is not None and found != expected:
        cpu = request.cpu or _is_true(environ, "ACCELERATE_USE_CPU") or not _has_gpu()
        raise ConfigError(
            f"found {_processes(found)} where {expected} {'was' if expected == 1 else 'were'} expected; "
            f"{recipe(expected, request.num_machines or 1, cpu=cpu, sharded=sharding_requested(environ), module=module)}"
        )


def recipe(num_processes: int, num_machines: int, *, cpu: bool, sharded: bool = False, module: str = MODULE) -> str:
    """The commands that start `num_processes` on `num_machines` (both in total), on CPU or on GPUs, in one line."""
    config = "ACCELERATE_CONFIG=accelerate_configs/fsdp2.yaml " if sharded else ""
    variables = f"{config}{'CPU=1 ' if cpu else ''}NUM_PROCESSES={num_processes}"
    several = "--use_fsdp --fsdp_version 2 " if sharded else "--multi_gpu " if num_processes > 1 else ""
    options = f"{several}--num_processes {num_processes}"
    if cpu and num_processes == 1:
        options = f"--cpu {options}"
    where = "on this machine run"
    if num_machines > 1:
        where = "on each machine R (0 is the one at IP) run"
        variables += f" NUM_MACHINES={num_machines} MACHINE_RANK=R MAIN_PROCESS_IP=IP"
        options += f" --num_machines {num_machines} --machine_rank R --main_process_ip IP --main_process_port 29500"
    prefix = "ACCELERATE_USE_CPU=true " if cpu and num_processes > 1 else ""
    script = f"`{variables} ./launch.sh` or " if module == MODULE else ""  # which trains
    return f"{where} {script}`{prefix}accelerate launch {options} -m {module}`"


def check_accelerate_environment(resolved_precision: str, environ: Mapping[str, str]) -> None:
    """Refuses what accelerate's options or YAML ask for and this program decides elsewhere or does not do.

    Args:
        resolved_precision: `fp32`, `fp16` or `bf16`, after `auto` has been resolved.
        environ: The environment variables of this process.

    Raises:
        ConfigError: Names accelerate's setting and the key of ours to use.
    """
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed not in ("no", resolved_precision):
        raise ConfigError(
            f"accelerate was given mixed_precision {mixed} but training.precision is {resolved_precision}; "
            "take mixed_precision out of accelerate's options, its YAML and ACCELERATE_MIXED_PRECISION, and set training.precision alone"
        )
    accumulation = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if accumulation in environ and _whole_number(accumulation, environ) > 1:
        raise ConfigError(
            f"accelerate was given gradient_accumulation_steps {environ[accumulation]}; take it out and set training.micro_batch_size: "
            "each step of training.batch_size is cut into micro-batches of that size"
        )
    _refuse_other_trainers(environ)


def sharding_requested(environ: Mapping[str, str]) -> bool:
    """Whether accelerate was asked for FSDP (`--use_fsdp`, or `distributed_type: FSDP` in its YAML)."""
    return _is_true(environ, "ACCELERATE_USE_FSDP")


def check_sharding(resolved_precision: str, found: int, environ: Mapping[str, str]) -> None:
    """Refuses what sharding was asked to do and does not do; the model itself is checked when it has been sharded.

    Args:
        resolved_precision: `fp32`, `fp16` or `bf16`.
        found: processes that really train together.
        environ: the environment variables of this process.

    Raises:
        ConfigError: names accelerate's setting, or the key of ours.
    """
    if not sharding_requested(environ):
        return
    reshard = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if reshard.lower() not in ("true", "false"):
        raise ConfigError(f"accelerate was given fsdp_reshard_after_forward {reshard}; FSDP2 takes true or false")
    if environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"accelerate was given FSDP version {environ.get('FSDP_VERSION', '1')}, which is not supported; give it --fsdp_version 2"
            " (fsdp_version: 2 in its YAML), or have every process hold the whole model with accelerate_configs/multi_gpu.yaml"
        )
    for variable, accepted, why in SHARDING_SETTINGS:
        value = environ.get(variable, accepted)
        if value.lower() != accepted.lower():
            raise ConfigError(f"accelerate was given {variable.lower()} {value}, which is not supported: {why}; take it out")
    if resolved_precision == "fp16":
        raise ConfigError(
            "training.precision=fp16 cannot be sharded (FSDP): its loss scale would differ; set training.precision=bf16 or fp32"
        )
    if found == 1:
        raise ConfigError(
            "sharding was asked for (--use_fsdp, ACCELERATE_USE_FSDP) but there is one process alone; start two or more, or take it out"
        )


def reshard_after_forward(environ: Mapping[str, str]) -> bool:
    """Whether a sharded model gives gathered parameters back between forward and backward (`--fsdp_reshard_after_forward`)."""
    return _is_true({"FSDP_RESHARD_AFTER_FORWARD": "true"} | dict(environ), "FSDP_RESHARD_AFTER_FORWARD")


def _refuse_other_trainers(environ: Mapping[str, str]) -> None:
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if _is_true(environ, variable):
            raise ConfigError(
                f"accelerate was given {name} ({variable}), which is not supported; "
                "use accelerate_configs/multi_gpu.yaml or --multi_gpu, or shard the model with accelerate_configs/fsdp2.yaml"
            )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise ConfigError(f"accelerate was given dynamo_backend {backend}, which is not supported; set it to no")


def _expected_world_size(found: int, request: LaunchRequest, environ: Mapping[str, str]) -> int | None:
    if "TRACKNET_EXPECTED_WORLD_SIZE" in environ:
        return _whole_number("TRACKNET_EXPECTED_WORLD_SIZE", environ)
    if request.num_processes is not None:
        return max(request.num_processes, 1)  # accelerate itself says 0 on a machine without GPUs
    if request.num_machines is not None and request.num_machines > found:
        return request.num_machines
    return _whole_number("WORLD_SIZE", environ) if "LOCAL_RANK" in environ else None


def _request_of_ancestors(ancestors: Sequence[Sequence[str]], environ: Mapping[str, str]) -> LaunchRequest:
    for command_line in ancestors:
        arguments = _launch_arguments(command_line)
        if arguments is not None:
            return _read_request(arguments, environ)
    return LaunchRequest()


def _launch_arguments(command_line: Sequence[str]) -> list[str] | None:
    """The options of `accelerate launch`, without the script and its own arguments; None for any other command."""
    for i, word in enumerate(command_line):
        name, rest = Path(word).name, list(command_line[i + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and rest[:1] == ["launch"]:
            return _until_script(rest[1:])
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return _until_script(rest)
    return None


def _until_script(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if word in ("-m", "--module") or word.endswith(".py"):
            break
        kept.append(word)
    return kept


def _read_request(arguments: Sequence[str], environ: Mapping[str, str]) -> LaunchRequest:
    options: dict[str, str] = {}
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            options[name[2:].replace("-", "_")] = value if equals else following
    cpu = "cpu" in options
    settings = _read_config_file(options.get("config_file"), environ, use_default=not cpu)
    return LaunchRequest(
        num_processes=_positive(options.get("num_processes", settings.get("num_processes"))),
        num_machines=_positive(options.get("num_machines", settings.get("num_machines"))),
        cpu=cpu or settings.get("use_cpu") is True,
    )


def _read_config_file(given: str | None, environ: Mapping[str, str], *, use_default: bool) -> dict[str, Any]:
    """The YAML (or JSON) that accelerate reads; empty where it cannot be read, for then accelerate itself has complained or it has none."""
    if given is None and not use_default:
        return {}
    cache = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()
    path = Path(given) if given is not None else home / "accelerate" / "default_config.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _positive(value: object) -> int | None:
    """A number of processes; None for what is not one, such as the -1 by which accelerate's YAML asks for the option."""
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if number >= 0 else None


def _whole_number(name: str, environ: Mapping[str, str]) -> int:
    if not environ[name].strip().isdecimal():
        raise ConfigError(f"the environment variable {name} is '{environ[name]}'; it must be a whole number, or unset")
    return int(environ[name])


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").strip().lower() in ("1", "true", "yes", "y", "t", "on")


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _has_gpu() -> bool:
    import torch  # only on the way to an error, so that importing this module stays quick

    return torch.cuda.is_available()
