"""Load a `RunConfig` from a preset, YAML files and dotted options, each overriding the previous."""

import base64
import contextlib
import dataclasses
import difflib
import glob
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.files import replace_text
from smolds_dist.inputs import read_yaml
from smolds_dist.rules import validate
from smolds_dist.settings import RunConfig, Source, Stage, Yarn

# A full command line as base64 of JSON, safe to pass through shells: `--encoded=...`.
ENCODED = "--encoded="
PRESET_DIR = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def load_config(args: list[str], prog: str = "smolds train", benchmark: bool = False) -> RunConfig:
    """Parse a command line such as `--preset debug --train.steps 50`; options override the preset.

    `--config FILE` (for instance another run's config.yaml) overrides `--preset NAME`, or the preset that the file itself
    names as `preset: NAME`.

    Args:
        benchmark: allow settings that train no usable model.

    Raises:
        ConfigError: for an unknown option, a value of the wrong type, or a contradiction.
    """
    if len(args) == 1 and args[0].startswith(ENCODED):
        args = json.loads(base64.urlsafe_b64decode(args[0].removeprefix(ENCODED)))
    base_parser = OptionParser(add_help=False, allow_abbrev=False)
    base_parser.add_argument("--preset")
    base_parser.add_argument("--config", type=Path)
    base_parser.add_argument("-q", dest="level", action="store_const", const="quiet")
    base_parser.add_argument("-v", dest="level", action="store_const", const="verbose")
    base, rest = base_parser.parse_known_args(args)
    preset, base_files = _base(base.preset, base.config)
    if any(
        word.partition("=")[0].endswith(".class_path") or _has_class_path(word.partition("=")[2] or word)
        for word in rest
    ):
        raise ConfigError("class_path is not a setting; remove it: settings are plain values.")
    rest = _with_whole_stages(rest, base_files)
    if base.level:
        rest.append(f"--log.level={base.level}")

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE] [--SECTION.FIELD VALUE ...]",
        epilog=f"example: {prog} --preset debug --run.name first --data.source text:'corpus/*.txt' --train.steps 200",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[*base_files],
    )
    # Only for --help: these were read above, because other options override the preset.
    parser.add_argument("--preset", help=f"settings to start from: {', '.join(preset_names())}")
    parser.add_argument(
        "--config",
        help="YAML file that overrides the preset and may name one (preset: NAME), such as runs/NAME/config.yaml",
    )
    parser.add_argument("-q", action="store_true", help="same as --log.level quiet")
    parser.add_argument("-v", action="store_true", help="same as --log.level verbose")
    parser.add_class_arguments(RunConfig)
    try:
        settings = parser.instantiate(parser.parse_args(rest))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(_format_parser_error(str(error), parser)) from None
    config = RunConfig(**{f.name: settings[f.name] for f in dataclasses.fields(RunConfig)})
    if config.run.name is None:
        config.run.name = preset or "run"
    validate(config)
    if base.config and config.checkpoint.resume == "auto":
        _check_names_own_run(base.config, config, {word.partition("=")[0] for word in rest})
    if config.model.force_uniform_routing and not benchmark:
        raise ConfigError(
            "--model.force_uniform_routing ignores the router, which then learns nothing; use it only in smolds bench."
        )
    return config


def _check_names_own_run(file: Path, config: RunConfig, given: set[str]) -> None:
    """Raise a `ConfigError` if `file` is a moved or copied run's, with which another run would be resumed or begun.

    Args:
        given: names of the command line's options; without --checkpoint.resume the settings may be only read.
    """
    own = file.resolve().parent
    other = "--checkpoint.resume" not in given or given & {"--run.dir", "--run.name"}
    if other or own == config.run_dir.resolve() or not (own / "checkpoints").is_dir():
        return
    raise ConfigError(
        f"--config {file} names the run {config.run_dir}, but is in the run {own}; to continue that one, add "
        f"--run.dir {own.parent} --run.name {own.name}."
    )


def save_config(config: RunConfig, path: Path) -> None:
    """Write all fields as YAML that `--config` reads."""
    replace_text(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


def _base(preset: str | None, config: Path | None) -> tuple[str | None, list[str]]:
    """Return the preset's name and the YAML files, each overriding the previous."""
    option = "--preset"
    if config and not config.is_file():
        raise ConfigError(f"--config {str(config)!r} is not a file; name a YAML file such as runs/NAME/config.yaml.")
    if config:
        settings = read_yaml(config, "write it like runs/NAME/config.yaml", dict[Any, Any])
        if unquoted := [name for name in settings if not isinstance(name, str)]:
            raise ConfigError(f"{config}: {unquoted[0]!r} is not a section; quote the name if it is one.")
        sections = [name for name in (f.name for f in fields(RunConfig)) if isinstance(settings.get(name), str)]
        if sections or _has_class_path(settings):
            problem = f"{sections[0]} is not a mapping" if sections else "class_path is not a setting"
            raise ConfigError(f"{config}: {problem}; write plain values, as in runs/NAME/config.yaml.")
        if not preset:
            preset, option = settings.get("preset"), f"{config}: preset"
    if preset and preset not in preset_names():
        raise ConfigError(f"{option} {preset!r} is unknown; use one of {', '.join(preset_names())}.")
    return preset, ([str(PRESET_DIR / f"{preset}.yaml")] if preset else []) + (
        [glob.escape(str(config))] if config else []  # jsonargparse treats it as a pattern
    )


def _with_whole_stages(options: list[str], files: list[str]) -> list[str]:
    """Return the options, with the stages that apply as one of them, each with all its fields.

    jsonargparse (4.53) fills in what an element of a list does not set from that element of an earlier file's list, and
    rejects an empty one. Remove this when a list replaces the earlier one.
    """
    found, others, words = None, [], iter(options)
    for file in files:
        section = (read_yaml(Path(glob.glob(file)[0]), "fix it", dict[Any, Any])).get("train")
        found = section["stages"] if isinstance(section, dict) and "stages" in section else found
    for word in words:
        name, given, value = word.partition("=")
        if name.startswith(("--train.stages.", "--train.stages+")):
            raise ConfigError(f"{name} is not an option; set all: --train.stages '[{{until: 0.8}}, {{lr: 1e-4}}]'.")
        if name == "--train.stages":
            with contextlib.suppress(yaml.YAMLError):
                found = yaml.safe_load(value if given else next(words, ""))
        else:
            others.append(word)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        return options  # none, or an invalid value
    empty = {field.name: None for field in fields(Stage)}
    unset = {field.name: field.default for field in fields(Yarn) if field.default is not dataclasses.MISSING}
    stages = [empty | one for one in found]
    for one in stages:
        if isinstance(one["rope_scaling"], dict):
            one["rope_scaling"] = unset | one["rope_scaling"]
    return [*others, f"--train.stages={json.dumps(stages)}"]


def _has_class_path(value: object) -> bool:
    """Return True if a value has a `class_path` somewhere, which jsonargparse would import before it rejects it."""
    if isinstance(value, dict):
        return "class_path" in value or any(map(_has_class_path, value.values()))
    if isinstance(value, list):
        return any(map(_has_class_path, value))
    if not isinstance(value, str) or ":" not in value:
        return False
    try:
        inner = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return "class_path" in value
    return not isinstance(inner, str) and _has_class_path(inner)


_SHAPES = {
    "model.rope_scaling": "set `factor` and `original_max_position_embeddings`, and optionally "
    + ", ".join(f.name for f in fields(Yarn)[2:]),
    "data.sources": "set for each name a `source`, and optionally " + ", ".join(f.name for f in fields(Source)[1:]),
    "train.stages": "set a list, each with `until` and optionally " + ", ".join(f.name for f in fields(Stage)[1:]),
}


def _format_parser_error(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """Return jsonargparse's message, which may be a paragraph, as one sentence with the fix."""
    if match := re.match(r'Parser key "([^"]+)":.*(?:Got value|Given value): (.*)$', message, re.DOTALL):
        key, value = match.groups()
        if key in _SHAPES:
            unknown = re.search(r"Option '(\w+)' is not accepted", message)
            problem = f"has no setting {unknown[1]!r}" if unknown else "is not valid"
            return f"--{key} {problem}; {_SHAPES[key]}."
        kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])", message)
        wanted = " or ".join(name or values for name, values in kinds).replace("NoneType", "null")
        wanted = re.sub(r"\bbool\b", "true or false", wanted)
        return f"--{key} {value} is not valid; set {wanted}."
    if match := re.match(r'Parser key "(\w+)":\s*Unable to load config', message):
        return f"--{match[1]} is a section; set its settings one by one, as --{match[1]}.NAME VALUE."
    if match := re.match(r"(?:unrecognized arguments: |Group '(\w+)' does not accept option ')([^\s'=]+)", message):
        group, name = match.groups()
        name = f"--{group}.{name}" if group else name
        options = [option for action in parser._actions for option in action.option_strings]
        longer = [option for option in options if option.startswith(name)]
        near = longer or difflib.get_close_matches(name, options, n=1)
        return f"{name} is not an option; " + (
            f"did you mean {near[0]}?" if near else f"`{parser.prog} --help` lists them."
        )
    if match := re.match(r'Parser key "([^"]+)":\s*Exceeds the limit', message):
        return f"--{match[1]} has too many digits; set a smaller number."
    if match := re.match(r"Option '(\w+)' is not accepted", message):
        defaults = vars(RunConfig())
        under = next((name for name, section in defaults.items() if hasattr(section, match[1])), None)
        return f"{match[1]} is not a section; " + (
            f"write it under {under}." if under else f"use {', '.join(defaults)}."
        )
    return " ".join(message.split()) + "."
