from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_salt.report import score_histogram


@pytest.fixture(autouse=True)
def pictures_only_where_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes most of a selection's time; one test looks at what is drawn."""
    if request.node.originalname != "test_picture_holds_every_score_by_its_side":
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **about: Path(path).touch())
        monkeypatch.setattr(score_histogram, "plot_scores", lambda *about: Figure())
