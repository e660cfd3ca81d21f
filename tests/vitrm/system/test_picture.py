"""Pictures: what is not as asked for is said."""

from __future__ import annotations

import warnings

from PIL import Image

from vitrm.system.picture import picture


def test_letters_that_no_font_has_are_named_once(tmp_path, capsys):
    path = tmp_path / "confusion.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, one for each time it draws
        with picture(path, 2, 1, "cats") as figure:
            for name in ("a\U0010fffdb", "\U0010fffd", "plain"):
                figure.text(0.1, 0.1, name)
    Image.open(path).load()
    said = capsys.readouterr().err
    assert said.count("confusion.png has boxes in place of") == 1
    with picture(path, 2, 1, "plain") as figure:
        figure.text(0.1, 0.1, "naïve Ж")
    assert not capsys.readouterr().err
