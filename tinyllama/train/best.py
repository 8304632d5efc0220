"""The lowest validation loss of a run, and how long ago it was."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """`val_loss` was measured after `step`; `since` validations after it were no lower."""

    step: int
    val_loss: float
    since: int = 0

    def why(self) -> str:
        """Why a run ends early."""
        return (
            f"stopped early: {self.since} validations in a row gave no lower loss than"
            f" {self.val_loss:.4f}, that of step {self.step}, which best/ holds"
        )


def better(best: Best | None, step: int, val_loss: float) -> Best:
    """What is the best after one more validation. The same step once more changes nothing."""
    if best is None or val_loss < best.val_loss:
        return Best(step, val_loss)
    return best if step <= best.step else replace(best, since=best.since + 1)
