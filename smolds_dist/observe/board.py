"""`smolds board [RUN...]`: TensorBoard on this machine, with the experts' curves first."""

import os
import sys
import threading
import webbrowser
from pathlib import Path

from smolds_dist.errors import ConfigError, OptionParser

# Kept of each kind, above any run's number; TensorBoard's defaults are too small.
SAMPLES = {"images": 200, "text": 200, "histograms": 200}


def board(args: list[str]) -> None:
    """Serve until Ctrl-C."""
    parser = OptionParser(
        prog="smolds board",
        description="Open TensorBoard for these runs, or for all in ./runs; its Custom Scalars tab shows the experts.",
        example="smolds board runs/first --port 6007",
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="folder of a run (runs/NAME) or of several runs"
    )
    parser.add_argument("--port", type=int, help="port; default: 6006 or the next free one; 0 = any")
    parser.add_argument("--host", default="localhost", help="address to serve on; 0.0.0.0 = all of this machine")
    parser.add_argument("--no-open", action="store_true", help="only print the address")
    options = parser.parse_args(args)
    runs = options.runs or [Path("runs")]
    for run in runs:
        if not any(run.rglob("*tfevents*")):
            raise ConfigError(
                f"{run} contains no TensorBoard files; use a run's folder, such as runs/NAME, or create them with "
                "`smolds report RUN --rebuild-tensorboard`."
            )
    url = serve(runs, options.port, options.host)
    print(f"{url} shows {', '.join(map(str, runs))}; stop with Ctrl-C", flush=True)
    has_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if has_screen and not options.no_open:
        webbrowser.open(url)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def serve(runs: list[Path], port: int | None, host: str) -> str:
    """Start TensorBoard in a thread of this process; return its address."""
    import logging

    from tensorboard import default
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.program import TensorBoard, TensorBoardServerException

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # The tab of the first active plugin opens.
    first = [plugin for plugin in default.get_plugins() if plugin is CustomScalarsPlugin]
    server = TensorBoard(plugins=first + [plugin for plugin in default.get_plugins() if plugin not in first])
    if all((run / "tensorboard").is_dir() for run in runs):
        where = {"logdir_spec": ",".join(named(runs))}
    elif len(runs) == 1:
        where = {"logdir": str(runs[0])}  # also shows runs created later
    else:
        raise ConfigError(
            "with several folders, each must be a run's; use runs' folders, or one folder that contains them."
        )
    chosen = {} if port is None else {"port": port}
    # Its fast loader is experimental, warns at every start and does not support run names.
    server.configure(host=host, samples_per_plugin=SAMPLES, load_fast="false", **where, **chosen)
    if host not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: with --host {host} anyone who can reach this machine can see the runs", file=sys.stderr)
    try:
        return server.launch()
    except TensorBoardServerException as error:
        raise ConfigError(f"{' '.join(str(error).split())}; choose another --port or --host.") from None


def named(runs: list[Path]) -> list[str]:
    """Return runs in TensorBoard's form NAME:PATH; the folder's name if unique, else its path."""
    names = [run.resolve().name for run in runs]
    for run in runs:
        if any(mark in str(run.resolve()) for mark in ",:"):
            raise ConfigError(f"{run.resolve()} contains a comma or colon, where TensorBoard splits paths; rename it.")
    return [
        f"{name if names.count(name) == 1 else run.resolve().as_posix().strip('/')}:{run.resolve() / 'tensorboard'}"
        for name, run in zip(names, runs, strict=True)
    ]
