"""`smolds board [RUN...]`: TensorBoard on this machine, with the experts' curves in front."""

import os
import sys
import threading
import webbrowser
from pathlib import Path

from smolds_dist.errors import ConfigError, OptionParser

# TensorBoard keeps few pictures and texts of each kind unless told; all of a run's are less than this.
SAMPLES = {"images": 200, "text": 200, "histograms": 200}


def board(args: list[str]) -> None:
    """Serves until Ctrl-C."""
    parser = OptionParser(
        prog="smolds board",
        description="Opens TensorBoard for some runs, or for all in ./runs; Custom Scalars has a tab Experts.",
        example="smolds board runs/first --port 6007",
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="a run's folder (runs/NAME), or one with several"
    )
    parser.add_argument("--port", type=int, help="6006 or the next that is free where not given; 0: any")
    parser.add_argument("--host", default="localhost", help="address to serve on; 0.0.0.0: all of this machine")
    parser.add_argument("--no-open", action="store_true", help="only print the address")
    options = parser.parse_args(args)
    runs = options.runs or [Path("runs")]
    for run in runs:
        if not any(run.rglob("*tfevents*")):
            raise ConfigError(
                f"{run} holds no TensorBoard files; name a run's folder, such as runs/NAME, or make them with "
                "`smolds report RUN --rebuild-tensorboard`."
            )
    url = serve(runs, options.port, options.host)
    print(f"{url} shows {', '.join(map(str, runs))}; Ctrl-C ends it", flush=True)
    has_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_screen and not options.no_open:
        webbrowser.open(url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def serve(runs: list[Path], port: int | None, host: str) -> str:
    """Starts TensorBoard in a thread of this process; returns its address."""
    import logging

    from tensorboard import default
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.program import TensorBoard, TensorBoardServerException

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # The first plugin that has something to show is the tab that opens.
    first = [plugin for plugin in default.get_plugins() if plugin is CustomScalarsPlugin]
    server = TensorBoard(plugins=first + [plugin for plugin in default.get_plugins() if plugin not in first])
    if all((run / "tensorboard").is_dir() for run in runs):
        where = {"logdir_spec": ",".join(named(runs))}
    elif len(runs) == 1:
        where = {"logdir": str(runs[0])}  # runs that come into being meanwhile will show
    else:
        raise ConfigError("several folders were named and not all are runs; name runs, or one folder that holds them.")
    chosen = {} if port is None else {"port": port}
    # Its faster loader is an experiment that says so on every start, and takes no names.
    server.configure(host=host, samples_per_plugin=SAMPLES, load_fast="false", **where, **chosen)
    if host not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: with --host {host} anyone who can reach this machine can see the runs", file=sys.stderr)
    try:
        return server.launch()
    except TensorBoardServerException as error:
        raise ConfigError(f"{' '.join(str(error).split())}; choose another --port or --host.") from None


def named(runs: list[Path]) -> list[str]:
    """Runs as TensorBoard's NAME:PATH; the folder's name is enough where no other has it."""
    names = [run.resolve().name for run in runs]
    for run in runs:
        if any(mark in str(run.resolve()) for mark in ",:"):
            raise ConfigError(f"{run.resolve()} has a comma or colon in it, which TensorBoard takes apart; rename it.")
    return [
        f"{name if names.count(name) == 1 else run.resolve().as_posix().strip('/')}:{run.resolve() / 'tensorboard'}"
        for name, run in zip(names, runs, strict=True)
    ]
