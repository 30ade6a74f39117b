"""Draw one round of layer-parallel decoding: `python -m experiments.round_picture`.

The devices' work follows from the grouping and the mesh that the engine would use. Lengths are
sequential steps, counted from these; none is a measured time.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyspec_jax import EasySpecError, SpeculativeConfig
from easyspec_jax.cli.command import Parser, run_command
from easyspec_jax.draft.grouping import Group, format_group, paper_groups, position_of
from easyspec_jax.parallel.mesh import MeshShape, parse_mesh

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCS = Path(__file__).parents[2] / "docs"

READABLE = {"layers": 14, "lp_size": 14, "devices": 8, "num_speculative_tokens": 8}
"""The most that fits on a page."""


class Kind(Enum):
    """The work of a block, by its color.

    The hues are from the palette of Okabe and Ito, far enough apart in lightness to survive grey.
    """

    MLP = "#bfe0f3"
    ATTENTION = "#e69f00"
    TARGET = "#00507d"


@dataclass(frozen=True)
class Block:
    """Work on some layers of the draft, shared by consecutive devices."""

    kind: Kind
    layers: tuple[int, ...]
    devices: range

    @property
    def label(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return str(first) if first == last else f"{first}–{last}"


Step = tuple[Block, ...]
"""Blocks that run at once; the next step waits for all of them."""

Pass = Callable[[Sequence[Group], MeshShape], list[Step]]


def exact_pass(groups: Sequence[Group], mesh: MeshShape) -> list[Step]:
    """Run the layers in order; a group's devices take turns with the attentions."""
    steps = []
    for group in groups:
        for layer in group:
            steps += [attentions(range(layer, layer + 1), group, mesh), mlp(layer, mesh)]
    return steps


def fuzzy_pass(groups: Sequence[Group], mesh: MeshShape) -> list[Step]:
    """Run a group's attentions at once, then its MLPs in order."""
    steps = []
    for group in groups:
        steps.append(attentions(group, group, mesh))
        steps += [mlp(layer, mesh) for layer in group]
    return steps


def attentions(layers: range, group: Group, mesh: MeshShape) -> Step:
    """Place the attentions of some of a group's layers on their devices."""
    together = groupby(layers, key=lambda layer: owners(layer, group, mesh))
    return tuple(Block(Kind.ATTENTION, tuple(held), devices) for devices, held in together)


def owners(layer: int, group: Group, mesh: MeshShape) -> range:
    """Return the devices that hold a layer's attention, as draft/layer_group.py places it.

    A single layer is split over all.
    """
    if len(group) == 1:
        return range(mesh.size)
    first = position_of(layer, group, mesh.layer) * mesh.tensor
    return range(first, first + mesh.tensor)


def mlp(layer: int, mesh: MeshShape) -> Step:
    """Split a layer's MLP over all devices."""
    return (Block(Kind.MLP, (layer,), range(mesh.size)),)


@dataclass(frozen=True)
class Round:
    """The round to draw: a draft's groups on a mesh, and the number of tokens it drafts."""

    groups: tuple[Group, ...]
    mesh: MeshShape
    levels: int

    @property
    def exact(self) -> list[Step]:
        return exact_pass(self.groups, self.mesh)

    @property
    def fuzzy(self) -> list[Step]:
        return fuzzy_pass(self.groups, self.mesh)

    @property
    def title(self) -> str:
        return (
            f"One round of layer-parallel speculative decoding on {self.mesh.size} devices: the "
            f"first of {self.levels} tokens is drafted by an exact pass of {len(self.exact)} "
            f"sequential steps, each other by a fuzzy pass of {len(self.fuzzy)}; one pass of the "
            "target verifies them all."
        )


# A page is 900 units wide, as wide as a README shows it; y grows downward.
WIDTH, LEFT, RIGHT = 900, 74, 886
GAP, VERIFY, ACCEPT = 10, 92, 54
INK, SOFT, IDLE, WHITE = "#1f1f1f", "#5a5a5a", "#f1f1f1", "#ffffff"

NOTES = (
    "The number in a block is its layer; what spans all rows is split over all devices.",
    "A step is an attention or an MLP that has to wait for the step before. Steps are counted, "
    "not timed.",
)


@dataclass(frozen=True)
class Track:
    """A timeline on the page: steps to the right, devices downward."""

    left: float
    top: float
    step: float
    row: float
    devices: int

    @property
    def height(self) -> float:
        return self.devices * self.row

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def middle(self) -> float:
        return self.top + self.height / 2

    def x(self, steps: float) -> float:
        return self.left + steps * self.step


@dataclass(frozen=True)
class Page:
    """The elements of the picture."""

    axes: "Axes"

    def say(
        self,
        x: float,
        y: float,
        text: str,
        *,
        ha: str = "center",
        size: float = 12,
        bold: bool = False,
        ink: str = INK,
    ) -> None:
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, text, ha=ha, va="center_baseline", size=size, weight=weight, color=ink)

    def box(self, x: float, y: float, width: float, height: float, color: str) -> None:
        self.axes.bar(
            x,
            height,
            width,
            y,
            align="edge",
            color=color,
            edgecolor=WHITE,
            linewidth=0.8,
            clip_on=False,
        )

    def line(self, *points: tuple[float, float], **style: Any) -> None:
        self.axes.plot(*zip(*points, strict=True), color=SOFT, linewidth=1, clip_on=False, **style)

    def bracket(self, left: float, right: float, y: float, text: str, title: str = "") -> None:
        """Write a text over a span."""
        self.line((left + 1, y), (left + 1, y - 5), (right - 1, y - 5), (right - 1, y))
        self.say((left + right) / 2, y - 15, text)
        self.say((left + right) / 2, y - 32, title, size=13, bold=True)

    def token(self, x: float, y: float, text: str, color: str = WHITE) -> None:
        self.line((x, y), marker="o", markersize=17, markerfacecolor=color, markeredgecolor=INK)
        self.say(x, y, text, ink=INK if color == WHITE else WHITE)

    def lanes(self, track: Track, right: float) -> None:
        """Draw an empty row for every device."""
        for device in range(track.devices):
            y = track.top + device * track.row
            self.box(track.left, y, right - track.left, track.row, IDLE)
            self.say(track.left - 8, y + track.row / 2, f"device {device}", ha="right")

    def steps(self, track: Track, steps: Sequence[Step], labelled: bool = False) -> None:
        """Draw each step's blocks on the rows of their devices."""
        for start, step in enumerate(steps):
            for block in step:
                y, height = (
                    track.top + block.devices.start * track.row,
                    len(block.devices) * track.row,
                )
                self.box(track.x(start), y, track.step, height, block.kind.value)
                if labelled:
                    size = min(12, 1.4 * track.step / len(block.label))
                    self.say(track.x(start + 0.5), y + height / 2, block.label, size=size)


def draw(picture: Round, out: Path) -> None:
    """Write the picture as SVG; the same picture gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    whole = Track(LEFT, 84, round_step(picture), 16, picture.mesh.size)
    exact = Track(
        LEFT, whole.bottom + 160, (RIGHT - LEFT) / len(picture.exact), 21, picture.mesh.size
    )
    fuzzy = replace(exact, top=exact.bottom + 80)
    height = fuzzy.bottom + 84
    # Letters become outlines: a reader's own fonts would have other widths.
    with matplotlib.rc_context(
        {"svg.hashsalt": "round", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    ):
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=WHITE)
        page = Page(figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0)))
        page.axes.set_axis_off()
        draw_legend(page, 20)
        draw_round(page, whole, picture)
        draw_passes(page, exact, fuzzy, picture)
        svg = StringIO()
        figure.savefig(
            svg, format="svg", metadata={"Title": picture.title, "Creator": None, "Date": None}
        )
    out.write_text(re.sub(r"\s*\n\s*", "\n", svg.getvalue()), encoding="utf-8")


def round_step(picture: Round) -> float:
    """Return the width of a step with which the whole round fills the page."""
    steps = len(picture.exact) + (picture.levels - 1) * len(picture.fuzzy)
    return (RIGHT - LEFT - VERIFY - ACCEPT - picture.levels * GAP) / steps


def draw_legend(page: Page, y: float) -> None:
    """Explain the colors."""
    for x, name, color in (
        (568, "attention", Kind.ATTENTION.value),
        (666, "MLP", Kind.MLP.value),
        (726, "target", Kind.TARGET.value),
        (800, "takes no part", IDLE),
    ):
        page.box(x - 20, y - 7, 14, 14, color)
        page.say(x, y, name, ha="left")


def draw_round(page: Page, track: Track, picture: Round) -> None:
    """Draw the whole round on one timeline, and the tokens that come of it."""
    page.say(
        12,
        20,
        "One round: tokens drafted in turn, verified in one pass",
        ha="left",
        size=15,
        bold=True,
    )
    page.lanes(track, RIGHT)
    page.say(LEFT - 8, track.bottom + 24, "tokens", ha="right")
    exact, fuzzy, later = picture.exact, picture.fuzzy, picture.levels - 1
    verify = draft = draw_drafting(page, track, exact, 1)
    page.bracket(
        track.left, draft.left - GAP, track.top - 5, f"exact pass, {len(exact)} steps", "calibrate"
    )
    for token in range(2, picture.levels + 1):
        verify = draw_drafting(page, verify, fuzzy, token)
    if later:
        text = f"{later} × fuzzy pass, {len(fuzzy)} steps each"
        page.bracket(draft.left, verify.left - GAP, track.top - 5, text, "draft")
    draw_verdict(page, verify, accepted=(picture.levels + 1) // 2)


def draw_drafting(page: Page, track: Track, steps: Sequence[Step], token: int) -> Track:
    """Draw a pass and the token that it drafts, and return the timeline after it."""
    page.steps(track, steps)
    end = track.x(len(steps))
    page.line((end, track.bottom), (end, track.bottom + 20))
    page.token(end, track.bottom + 24, str(token))
    return replace(track, left=end + GAP)


def draw_verdict(page: Page, track: Track, accepted: int) -> None:
    """Draw the target's pass, and an example of its verdict."""
    accept = track.left + VERIFY
    page.box(track.left, track.top, VERIFY, track.height, Kind.TARGET.value)
    page.say(track.left + VERIFY / 2, track.middle, "target", ink=WHITE)
    page.bracket(track.left, accept, track.top - 5, "not to scale", "verify")
    page.box(accept, track.top, ACCEPT, track.height, INK)
    page.say(accept + ACCEPT / 2, track.middle, "accept", ink=WHITE)
    for token in range(1, accepted + 2):
        color = WHITE if token <= accepted else Kind.TARGET.value
        page.token(RIGHT - 9 - 23 * (accepted + 1 - token), track.bottom + 24, str(token), color)
    text = f"for example: {accepted} accepted, one more from the target"
    page.say(RIGHT, track.bottom + 46, text, ha="right", ink=SOFT)


def draw_passes(page: Page, exact: Track, fuzzy: Track, picture: Round) -> None:
    """Draw one token drafted exactly and fuzzily, on one scale."""
    before, after = len(picture.exact), len(picture.fuzzy)
    page.say(
        12, exact.top - 70, "One drafted token, exactly and fuzzily", ha="left", size=15, bold=True
    )
    draw_pass(page, exact, picture, exact_pass, f"Exact pass: {before} steps")
    page.say(LEFT + 158, exact.top - 42, "every attention waits for the layer before", ha="left")
    draw_pass(page, fuzzy, picture, fuzzy_pass, f"Fuzzy pass: {after} steps")
    page.say(
        LEFT + 158, fuzzy.top - 42, "a group’s attentions read one input and run at once", ha="left"
    )
    draw_saving(page, exact, fuzzy, before, after)
    page.say(LEFT - 14, fuzzy.bottom + 13, "steps", ha="right", ink=SOFT)
    for step in range(0, before + 1, 2):
        page.say(fuzzy.x(step), fuzzy.bottom + 13, str(step), ink=SOFT)
    for line, note in enumerate(NOTES):
        page.say(LEFT, fuzzy.bottom + 44 + 19 * line, note, ha="left", ink=SOFT)


def draw_pass(page: Page, track: Track, picture: Round, run: Pass, title: str) -> None:
    """Draw a pass with its layers' numbers, group by group."""
    page.say(LEFT, track.top - 42, title, ha="left", bold=True)
    page.lanes(track, track.x(len(run(picture.groups, picture.mesh))))
    for group in picture.groups:
        steps = run([group], picture.mesh)
        end = track.x(len(steps))
        name = ("group " if len(group) > 1 else "layer ") + format_group(group).replace("-", "–")
        page.bracket(track.left, end, track.top - 4, name)
        page.steps(track, steps, labelled=True)
        track = replace(track, left=end)


def draw_saving(page: Page, exact: Track, fuzzy: Track, before: int, after: int) -> None:
    """Mark the steps that a fuzzy pass saves, where there is room for the text."""
    start, end = exact.x(before), fuzzy.x(after)
    if start - end > 110:
        page.line((start, exact.bottom), (start, fuzzy.bottom), linestyle=":")
        page.axes.annotate(
            "",
            (end, fuzzy.middle),
            (start, fuzzy.middle),
            arrowprops={"arrowstyle": "->", "color": INK},
        )
        page.say((start + end) / 2, fuzzy.middle - 12, f"{before - after} steps fewer", bold=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog="python -m experiments.round_picture", description=__doc__)
    default = SpeculativeConfig()
    parser.add_argument("--layers", type=int, default=12, help="layers of the draft")
    parser.add_argument("--lp-size", type=int, default=default.lp_size, help="layers in a group")
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=default.num_speculative_tokens
    )
    parser.add_argument("--out", type=Path, default=DOCS / "round.svg")

    def run(args: argparse.Namespace) -> None:
        draw(plan(args), args.out)

    return run_command("experiments.round_picture", parser, run, argv)


def plan(args: argparse.Namespace) -> Round:
    """Return the round that the engine would run.

    Raises:
        EasySpecError: It does not fit on a page.
    """
    for name, most in READABLE.items():
        if not 1 <= (value := getattr(args, name)) <= most:
            raise EasySpecError(f"--{name.replace('_', '-')} {value} must be from 1 to {most}")
    groups = paper_groups(args.layers, args.lp_size)
    return Round(
        groups, parse_mesh(str(args.devices), max(map(len, groups))), args.num_speculative_tokens
    )


if __name__ == "__main__":
    sys.exit(main())
