"""The picture of an audit of a run: how well scores tell which canaries were in, and what that says of epsilon."""

from pathlib import Path

import numpy as np

from hf_dpzo.auditing.run_audit import RunAudit
from hf_dpzo.plots import create_figure


def draw_run_audit(audit: RunAudit, path: Path) -> None:
    """Draw the scores of the canaries, and the lower bounds on epsilon beside the claim.

    Args:
        audit: the result of an audit.
        path: the file to write; its suffix chooses the format, such as `.png` or `.svg`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(9, 4))
    left, right = figure.subplots(1, 2)
    scores, coins = np.array(audit.scores), np.array(audit.coins)
    bins = np.histogram_bin_edges(scores, bins=24)
    left.hist(scores[~coins], bins=bins, color="tab:blue", alpha=0.5, label="out")
    left.hist(scores[coins], bins=bins, color="tab:red", alpha=0.5, label="in")
    left.set(xlabel="score: log-likelihood ratio", ylabel="canaries")
    left.set_title(f"{audit.correct} of {audit.guesses} guesses right, over {audit.steps} steps", fontsize="medium")
    left.legend()
    bounds = {
        "claimed": audit.epsilon_claimed,
        "at least, from the spread": audit.from_spread,
        "at least, from guesses": audit.from_guesses,
        "at least, from guesses alone": audit.from_guesses_alone,
    }
    right.barh([*bounds], [*bounds.values()], color=["tab:red", "tab:blue", "tab:blue", "tab:blue"], alpha=0.6)
    right.axvline(audit.epsilon_claimed, color="tab:red", linestyle=":")
    right.invert_yaxis()
    right.set(xlabel=f"ε at δ = {audit.delta:g}")
    right.set_title(f"bounds at {audit.confidence:.0%} confidence", fontsize="medium")
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
