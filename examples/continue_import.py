"""Continue training from an export: export, import, train on other text, export again. Run it with

    python examples/continue_import.py runs/first text:'corpus/*.txt' --train.steps 100

The first argument is a run's folder, the second the new text; any option of `smolds train` may follow.
"""

import sys
from pathlib import Path

from smolds_dist import load_config, train
from smolds_dist.interchange.export import export
from smolds_dist.interchange.import_model import import_model


def main(run: Path, source: str, args: list[str]) -> None:
    first, again = run.with_name(f"{run.name}-exported"), run.with_name(f"{run.name}-again")
    export([str(run), "--to", str(first)])
    # `first` could as well be a model from elsewhere: ERNIE 4.5 MoE or DeepSeek-V3 with a mixture in every layer.
    import_model([str(first), "--to", str(again), "--preset", "debug", f"--data.source={source}", *args])
    result = train(load_config(["--config", str(again / "config.yaml"), "--checkpoint.resume=auto"]))
    print(f"{result.run_dir}: validation loss {result.val_loss:.4f}")
    export([str(again), "--to", str(run.with_name(f"{run.name}-again-exported"))])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
