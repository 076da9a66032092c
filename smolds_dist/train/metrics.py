"""What a run writes while it trains: metrics.jsonl and TensorBoard scalars, by rank 0 alone.

Shape letters: L layers, E experts.
"""

import json
from pathlib import Path

from torch import Tensor

from smolds_dist.parallel.balancer import max_violation


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and the same numbers to TensorBoard.

    Rows after `start_step`, which a resumed run will repeat, are removed from both.
    """

    def __init__(self, run_dir: Path, start_step: int, tensorboard: bool):
        path = run_dir / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= start_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def training_row(self, row: dict, counts_LE: Tensor) -> dict:
        """Writes a step's row, with MaxVio and load from the routed tokens of the whole global batch; returns it."""
        violation = max_violation(counts_LE)
        load = counts_LE / counts_LE.sum(-1, keepdim=True)
        row = row | {
            "max_vio": round(violation.mean().item(), 5),
            "load": [[round(share, 5) for share in layer] for layer in load.tolist()],
        }
        self._write(row)
        if self._board is not None:
            for name in ("loss", "lr", "grad_norm", "tokens_per_s"):
                self._board.add_scalar(f"train/{name}", row[name], row["step"])
            self._board.add_scalar("balance/max_vio", row["max_vio"], row["step"])
            for layer, shares in enumerate(row["load"]):
                self._board.add_scalar(f"balance_by_layer/max_vio_{layer:02}", violation[layer].item(), row["step"])
                for expert, share in enumerate(shares):
                    self._board.add_scalar(f"load_layer_{layer:02}/expert_{expert:02}", share, row["step"])
        return row

    def evaluation_row(self, row: dict) -> None:
        """Writes a row with `val_loss` and `val_bits_per_byte`."""
        self._write(row)
        if self._board is not None:
            self._board.add_scalar("validation/loss", row["val_loss"], row["step"])
            self._board.add_scalar("validation/bits_per_byte", row["val_bits_per_byte"], row["step"])

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed writer left unfinished is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def load_table(rows: list[dict], last: int = 20) -> str:
    """Each expert's share of the routed tokens per layer, over the last training rows, as text."""
    loads = [row["load"] for row in rows if "load" in row][-last:]
    if not loads:
        return "(no training steps)"
    layers, experts = len(loads[0]), len(loads[0][0])
    lines = ["layer " + "".join(f"{f'e{expert}':>7}" for expert in range(experts)) + "  MaxVio"]
    for layer in range(layers):
        shares = [sum(load[layer][expert] for load in loads) / len(loads) for expert in range(experts)]
        cells = "".join(f"{share:>7.1%}" for share in shares)
        lines.append(f"{layer:>5} {cells}  {max(shares) * experts - 1:>6.2f}")
    return "\n".join(lines)
