"""The loss curve is a picture of log.csv."""

from pathlib import Path

import pytest
from PIL import Image

from blip2.train import plots


def test_draws_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.csv"
    log.write_text("step,loss,itc,grad_norm,lr,images_per_s\n2,3.0,1.0,1.0,0.1,5\n4,2.0,0.5,1.0,0.2,5\n")
    plots.draw(log, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (800, 500)
    plots.draw(tmp_path / "missing.csv", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
