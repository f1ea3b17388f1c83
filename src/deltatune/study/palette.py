"""One colour and one marker per method, the same in every figure and table of a report."""

from __future__ import annotations

from dataclasses import dataclass

# After Okabe and Ito: told apart with any colour vision, and seen on white or on black; the last one is neutral.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0559b", "#d99000", "#2fa1dd", "#7a6a52", "#5b6470")
DARK = ("#4ba3e3", "#f0803c", "#2fc79b", "#dd8fc4", "#f0b23e", "#83c9f4", "#b8a68a", "#a7b0bb")
MARKERS = ("o", "s", "D", "^", "v", "P", "h", "X")


@dataclass(frozen=True)
class Theme:
    """The colours of a figure: text and axes, grid lines, background, and the methods."""

    ink: str
    grid: str
    paper: str
    methods: tuple[str, ...]


PRINT = Theme("#1d1f24", "#dcdfe4", "#ffffff", LIGHT)
# Stand-ins for the page's own colours, which change with its light and dark mode; see `SCREEN_VARIABLES`.
SCREEN = Theme("#010101", "#020202", "#030303", tuple(f"#0400{index:02x}" for index in range(len(LIGHT))))
SCREEN_VARIABLES = {
    SCREEN.ink: "currentColor",
    SCREEN.grid: "var(--rule)",
    SCREEN.paper: "var(--paper)",
    **{color: f"var(--m{index})" for index, color in enumerate(SCREEN.methods)},
}


@dataclass(frozen=True)
class Palette:
    """The look of each method: the baseline is grey, and methods beyond the seventh share a colour but not a marker."""

    methods: tuple[str, ...]
    baseline: str | None
    theme: Theme

    def index(self, method: str) -> int:
        """The number of the method's colour."""
        if method == self.baseline:
            return len(LIGHT) - 1
        return self._place(method) % (len(LIGHT) - 1)

    def color(self, method: str) -> str:
        """The colour of the method in this theme."""
        return self.theme.methods[self.index(method)]

    def marker(self, method: str) -> str:
        """The marker of the method."""
        if method == self.baseline:
            return MARKERS[-1]
        place = self._place(method)
        return MARKERS[(place + place // (len(LIGHT) - 1)) % (len(MARKERS) - 1)]

    def _place(self, method: str) -> int:
        return [name for name in self.methods if name != self.baseline].index(method)
