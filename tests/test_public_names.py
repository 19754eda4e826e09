"""The names that the package's root exports."""

import art_pixeldefend


def test_public_names_are_listed_before_they_are_imported():
    assert "greedy_decode" not in vars(art_pixeldefend)
    assert {*art_pixeldefend.__all__, "__version__"} <= set(dir(art_pixeldefend))
    assert dir(art_pixeldefend) == sorted(set(dir(art_pixeldefend)))


def test_every_public_name_is_a_class_or_function_of_that_name():
    assert art_pixeldefend.__all__ == sorted(art_pixeldefend.__all__)
    assert {name: getattr(art_pixeldefend, name).__name__ for name in art_pixeldefend.__all__} == {
        name: name for name in art_pixeldefend.__all__
    }
