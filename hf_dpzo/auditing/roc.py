"""The picture of an audit: what the best attacker reached, and what the claim allows."""

from pathlib import Path

from hf_dpzo.auditing.audit import Audit
from hf_dpzo.plots import create_figure


def draw_roc(audit: Audit, path: Path) -> None:
    """Write the best attacker's detections at each share of false alarms, beside those allowed, as a picture.

    Both curves are of one release at sampling rate 1. The attacker's is measured: it may lie above the other by the
    chance of `releases` draws. Whether it lies there by more is what the checks say.

    Args:
        audit: the audit.
        path: of the file to write; its suffix says the format, as `.png` or `.svg`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = create_figure(path, size=(5, 5))
    axes = figure.add_subplot()
    axes.plot(
        audit.roc.false_alarms, audit.roc.allowed, color="tab:red", alpha=0.4, linewidth=5, label="allowed by the claim"
    )
    axes.plot(audit.roc.false_alarms, audit.roc.detections, color="tab:blue", label="best attacker")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="guessing")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set(xlabel="false alarms", ylabel="detections", title=f"Is the row there? {audit.releases} releases each")
    axes.legend(loc="lower right")
    figure.savefig(path)
