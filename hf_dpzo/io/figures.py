"""Numbers as they are read: with few figures."""


def show_figures(value: float, figures: int = 2) -> str:
    """Return `value` rounded to so many figures, without an exponent from a ten-thousandth up to a million.

    >>> show_figures(123.4), show_figures(0.04567), show_figures(6053.2, 3), show_figures(1.25e-7)
    ('120', '0.046', '6050', '1.2e-07')
    """
    return f"{float(f'{value:.{figures}g}'):g}"
