"""`smolds data prepare`: tokenises what a run will want, long before it begins.

smolds data prepare --workers 8 -- TRAIN-OPTIONS
"""

import time

from smolds_dist.config import load_config
from smolds_dist.data.batch import TrainingData
from smolds_dist.data.cores import free_cores
from smolds_dist.data.prepare import begin_data
from smolds_dist.data.workers import Workers
from smolds_dist.errors import ConfigError, OptionParser
from smolds_dist.progress import ProgressBar
from smolds_dist.settings import RunConfig

LOOK_EVERY = 0.5  # seconds


def prepare(args: list[str]) -> int:
    """Runs the command; returns the exit code.

    Raises:
        ConfigError: for options that are none, and for text that cannot be read.
    """
    parser = OptionParser(
        prog="smolds data prepare",
        description="Tokenises what a run will want. Any number of processes on any number of machines share the work, and "
        "go on where others were stopped.",
        example="smolds data prepare --workers 8 -- --preset smollm2-deepseek-255m",
    )
    parser.add_argument("--workers", type=int, help="processes that tokenise; by default one for each core, up to 16")
    options, settings = parser.parse_before_training(args)
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is out of range; it must be at least 1.")
    config = load_config(settings, prog="smolds data prepare --")
    data = begin_data(config)
    samples = config.train.steps * config.train.global_batch
    if not data.covers(samples):
        with Workers(config, data, options.workers or free_cores(0), ahead=False) as workers:
            watch(config, data, samples, workers)
    for line in outcome(data):
        print(line)
    return 0


def watch(config: RunConfig, data: TrainingData, samples: int, workers: Workers) -> None:
    """Shows how far the workers are until there is all that the run wants."""
    sources = data.sources.values()
    files = sum(len(source.files) for source in sources)
    for source in sources:
        source.look()
    began, before = time.monotonic(), sum(source.tokens_found for source in sources)
    bar = ProgressBar("Tokenising: token", done=before, shown=config.log.level != "quiet")
    try:
        while workers.busy() and not data.covers(samples):
            time.sleep(LOOK_EVERY)
            for source in sources:
                source.look()
            there, ready = sum(source.tokens_found for source in sources), sum(source.files_found for source in sources)
            rate = (there - before) / (time.monotonic() - began)
            bar.total = wanted_tokens(data, samples)
            bar.show(there, f"{ready:,} of {files:,} files, {rate:,.0f} tokens/s")
    finally:
        bar.close()


def wanted_tokens(data: TrainingData, samples: int) -> int | None:
    """About how many tokens the run wants to have; None before there are any of each source."""
    total = 0.0
    for (_, source), needed in zip(data.sources.items(), data.mixture.totals(samples).tolist(), strict=True):
        if not source.num_found:
            return None
        all_of_it = source.tokens_found / source.num_found * len(source.units)
        total += max(source.tokens_found, min(all_of_it, needed * data.seq_len))
    return round(total)


def outcome(data: TrainingData) -> list[str]:
    """What there is now, a line for each source, and what was left out."""
    lines = []
    for name, source in data.sources.items():
        source.look()
        lines.append(
            f"{name}: {source.num_found:,} of {len(source.units):,} parts are tokenised, {source.tokens_found:,} tokens"
        )
        lines += [f"  {line}" for line in source.left_out()]
    return lines
