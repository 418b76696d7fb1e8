"""Plots of training runs."""

import json
from importlib import import_module

import numpy as np
import pytest

from ddpm_fast.data.image_io import first_row, grid, save_grid
from ddpm_fast.plotting.training import plot_course, plot_loss

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path):
    home = tmp_path / "run"
    (home / "samples").mkdir(parents=True)
    lines = []
    for step in range(50, 2050, 50):
        line = dict(step=step, images=64 * step, epoch=step / 938, loss=0.03 + 1 / step)
        lines.append(line | dict(seconds=step / 2))
        if step % 500 == 0:
            line = dict(step=step, ema_loss=0.028 + 1 / step, raw_loss=0.03 + 1 / step)
            lines.append(line | dict(held_out=True))
            grid = np.full((12, 8, 8, 1), step // 10, np.uint8)
            save_grid(home / "samples" / f"{step:08d}.png", grid, columns=4)
    write_log(home, lines)
    with open(home / "log.jsonl", "a") as f:
        f.write('{"step": 2050, "los')  # truncated, as after a kill
    return home


def write_log(run, lines):
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def figure_of(plot, monkeypatch, *arguments):
    """Returns the figure that a function saves, and saves it."""
    figures, module = [], import_module("ddpm_fast.plotting.training")
    save = module.save
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "save", lambda figure, out: figures.append(figure) or save(figure, out)
        )
        plot(*arguments)
    return figures[0]


def test_loss(run, tmp_path, monkeypatch):
    figure = figure_of(plot_loss, monkeypatch, run, tmp_path / "loss.png")
    lines = {line.get_label(): line.get_data() for line in figure.axes[0].get_lines()}
    assert len(lines) == 4
    x, y = lines["averaged weights, on held-out images"]
    assert list(x) == [32000, 64000, 96000, 128000] and y[1] == pytest.approx(0.029)
    x, y = lines["training, as logged"]
    assert x[0] == 3200 and y[0] == pytest.approx(0.05) and len(x) == 40
    with Image.open(tmp_path / "loss.png") as png:
        assert png.width > 500


def test_losses_by_quartile_have_a_panel(run, tmp_path, monkeypatch):
    lines = []
    for step in (1, 2, 3):
        quartiles = {f"loss_q{i}": None if i == step else i + 1 / step for i in range(4)}
        line = dict(step=step, images=64 * step, epoch=step, loss=1 / step, seconds=step)
        lines += [line | quartiles, dict(step=step, ema_kid=0.1, ema_kid_deviation=0.01)]
    write_log(run, lines)
    figure = figure_of(plot_loss, monkeypatch, run, tmp_path / "loss.png")
    curves = [line.get_data() for line in figure.axes[1].get_lines()]
    assert [list(x) for x, _ in curves] == [[64, 128, 192]] * 4
    assert curves[0][1] == pytest.approx([1, 1 / 2, 1 / 3])
    assert curves[2][1] == pytest.approx([3, np.nan, 2 + 1 / 3], nan_ok=True)


def test_the_axes_cover_the_whole_curve(run, tmp_path, monkeypatch):
    """Regression: the upper limit was five times the lowest loss and cut off the first half."""
    lines = []
    for step, loss in ((1, 1.13), (2, None), (3, 0.5), (4, 0.12)):
        quartiles = {f"loss_q{i}": loss and loss * 10**-i for i in range(4)}
        line = dict(step=step, images=step, epoch=step / 9, loss=loss, seconds=162)
        lines.append(line | quartiles)
    write_log(run, [*lines, dict(step=4, ema_loss=0.1, raw_loss=None, held_out=True)])
    upper, lower = figure_of(plot_loss, monkeypatch, run, tmp_path / "loss.png").axes
    for axes, lowest in ((upper, 0.1), (lower, 0.12e-3)):
        low, high = axes.get_ylim()
        assert lowest / 2 < low <= lowest and 1.13 <= high < 2.3
    assert upper.get_title("left") == "4 steps, 0.4 epochs, 2.7 minutes of training"


@pytest.mark.parametrize("columns", [1, 3, 10])
def test_the_figure_is_as_wide_as_the_images(run, tmp_path, monkeypatch, columns):
    """Regression: three columns had wide margins in a figure of eight inches."""
    for path in (run / "samples").iterdir():
        save_grid(path, np.zeros((4 * columns, 8, 8, 1), np.uint8), columns)
    figure = figure_of(plot_course, monkeypatch, run, tmp_path / "course.png")
    figure.draw_without_rendering()
    images = figure.axes[0].get_window_extent()
    assert figure.bbox.width - images.width < 1.3 * figure.dpi
    assert images.height > 0.8 * figure.bbox.height


def test_course(run, tmp_path):
    for name in ("course.png", "course.svg", "course.pdf"):
        plot_course(run, tmp_path / name, rows=3)
        assert (tmp_path / name).stat().st_size > 1000


def test_first_row(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), dtype=np.uint8)
    save_grid(tmp_path / "grid.png", images, columns=3)
    row = first_row(tmp_path / "grid.png")
    assert np.array_equal(row, grid(images[:3], columns=3)[:-2])
    Image.fromarray(images[0]).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="not written by save_grid"):
        first_row(tmp_path / "other.png")


def test_command_line(run, tmp_path, capsys):
    main = import_module("ddpm_fast.cli.main").main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["plot", *map(str, arguments)])
        return end.value.code, capsys.readouterr().err

    assert call("loss", run, "--out", tmp_path / "a.png") == (0, "")
    assert call("course", run, "--out", tmp_path / "b.png") == (0, "")
    for arguments, message in (
        (("loss", tmp_path), "has no losses"),
        (("course", tmp_path), "has no grids"),
        (("loss", run, "--out", tmp_path / "a.txt"), "unknown kind of file"),
        (("loss", run, "--out", tmp_path / "no" / "a.png"), "create it first"),
    ):
        code, err = call(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1
